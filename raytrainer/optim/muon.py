"""Muon for the hidden matrices of a model and AdamW for the rest, as one optimizer with one state dict.

Muon orthogonalises the momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from raytrainer.errors import ConfigError
from raytrainer.names import matching
from raytrainer.optim.groups import apart, grouped, trainable
from raytrainer.sharding import placed_as, whole

# Coefficients of the quintic Newton-Schulz step: the steepest at zero that stays bounded. It brings singular values to
# about [0.7, 1.2], not to 1, which costs nothing (the post above).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_BATCH = 1 << 26  # values that are orthogonalised at once; more would only need more memory
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Muon(Optimizer):
    """Muon for hidden matrices, AdamW for everything else that is trained. Schedulers scale the rates of both.

    Muon's parameters are those with two dimensions, and the kernels of convolutions (without groups, not transposed) as
    the matrix `[out, in * height * width]`, except embeddings and the output layer. The output layer is the result of
    the model's `get_output_embeddings()`, else its last module with a matrix, unless that is in a `ModuleList`.

    Under FSDP2 a rank keeps its shard of the momentum, and the whole matrix is gathered to be orthogonalised: the
    update equals that of an unsharded model. Under DDP each rank computes the same.

    Args:
        model: The trained model, already sharded if it is to be.
        lr: For the matrices: the size of an update, whatever the gradient's size.
        momentum: The weight of the past in the gradient's running mean.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: For the matrices, decoupled: multiplied by `lr`.
        ns_steps: Number of Newton-Schulz iterations.
        ns_dtype: The type for these, `bfloat16` or `float32`.
        adjust_lr_fn: As in torch.optim.Muon: `original` multiplies the update by `sqrt(max(1, rows / columns))`,
            `match_rms_adamw` by `0.2 * sqrt(max(rows, columns))`, so that AdamW's `lr` and `weight_decay` fit (Liu et
            al. 2025, arXiv:2502.16982).
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: For the rest; parameters with fewer than two dimensions
            never decay.
        muon_params, adamw_params: Patterns of names (`names.matching`) that override the choice between the two.
        system: The model and the loss as one module, if the loss has parameters: AdamW trains those.

    Raises:
        ConfigError: A value is invalid, a pattern matches nothing, or no trained parameter is left for Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        ns_steps: int = 5,
        ns_dtype: str = "bfloat16",
        adjust_lr_fn: str = "original",
        adamw_lr: float = 3e-4,
        adamw_betas: Sequence[float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
        muon_params: Sequence[str] = (),
        adamw_params: Sequence[str] = (),
        system: nn.Module | None = None,
    ) -> None:
        _check("lr", lr, lr >= 0, "at least 0")
        _check("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1")
        _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _check("ns_steps", ns_steps, 1 <= ns_steps < 100, "from 1 to 99")
        _check("ns_dtype", ns_dtype, ns_dtype in _DTYPES, "one of these", _DTYPES)
        _check("adjust_lr_fn", adjust_lr_fn, adjust_lr_fn in _SCALES, "one of these", _SCALES)
        matrices, rest = split(model, muon_params, adamw_params, system)
        adamw: AdamW | None = None
        if rest:
            beta1, beta2 = adamw_betas
            groups = [group for part in apart(rest, model) for group in grouped(part, adamw_weight_decay)]
            adamw = AdamW(groups, adamw_lr, (beta1, beta2), adamw_eps, fused=True)
        first = {
            "params": matrices,
            "use_muon": True,
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(
            [first, *({**group, "use_muon": False} for group in (adamw.param_groups if adamw else ()))], {}
        )
        self._adamw = adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_muon(group)
        if self._adamw is not None:
            # Its groups and state are ours, which load_state_dict may have replaced.
            self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
            self._adamw.state = self.state
            self._adamw.step()
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        gradients = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for shape, numbers in _batches(params):
            stack = torch.stack([whole(directions[i]).flatten(1) for i in numbers])
            stack = orthogonal(stack, group["ns_steps"], _DTYPES[group["ns_dtype"]])
            scale = _SCALES[group["adjust_lr_fn"]](*shape)
            for i, update in zip(numbers, stack, strict=True):
                params[i].add_(
                    placed_as(params[i], update.view(params[i].shape).to(params[i].dtype)), alpha=-lr * scale
                )


_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def orthogonal(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return about the nearest (semi-)orthogonal matrix `U V^T` to each `U S V^T` of `[number, rows, columns]`.

    The result is in `dtype`. After 5 steps of the Newton-Schulz iteration, the singular values are between 0.7 and 1.2,
    except those that were less than about a thousandth of the largest.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    # The Frobenius norm is at least the largest singular value; in half precision its squares could vanish.
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    norms: Tensor = torch.linalg.matrix_norm(wide, keepdim=True)
    x = (matrices / norms.clamp(min=_EPS)).to(dtype)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def split(
    model: nn.Module,
    muon_params: Sequence[str] = (),
    adamw_params: Sequence[str] = (),
    system: nn.Module | None = None,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return Muon's and AdamW's parameters, chosen as `Muon` describes.

    Raises:
        ConfigError: As `Muon`.
    """
    kernels = {id(m.weight) for m in model.modules() if _is_plain_convolution(m)}
    outer = {id(p) for m in _outer_modules(model) for p in m.parameters(recurse=False)}
    parameters = trainable(model if system is None else system)
    own = {id(p) for p in model.parameters()}
    theirs = {n for n, p in parameters.items() if id(p) in own - outer and (p.ndim == 2 or id(p) in kernels)}
    requested = matching(muon_params, parameters, "optimizer.muon_params")
    refused = matching(adamw_params, parameters, "optimizer.adamw_params")
    if both := sorted(requested & refused):
        raise ConfigError(f"and optimizer.adamw_params both name {both[0]}", key="optimizer.muon_params")
    if vectors := sorted(name for name in requested if parameters[name].ndim < 2):
        raise ConfigError(
            "is not a matrix: it has fewer than two dimensions", key="optimizer.muon_params", value=vectors[0]
        )
    theirs = (theirs | requested) - refused
    if not theirs:
        raise ConfigError(
            "finds no hidden matrix: beside embeddings and the output layer nothing of two dimensions is trained; "
            "optimizer.muon_params names some, optimizer=adamw trains all",
            key="optimizer",
            value="muon",
        )
    return [p for n, p in parameters.items() if n in theirs], [p for n, p in parameters.items() if n not in theirs]


def _is_plain_convolution(module: nn.Module) -> bool:
    # With groups the kernel is not one matrix, and the first dimension of a transposed kernel is not its output.
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1


def _outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the embeddings and the output layer."""
    yield from (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    get_output: Any = getattr(model, "get_output_embeddings", None)
    if callable(get_output) and isinstance(layer := get_output(), nn.Module):
        yield layer
        return
    blocks = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    with_matrix = [(n, m) for n, m in model.named_modules() if any(p.ndim >= 2 for p in m.parameters(recurse=False))]
    # If the last one is in a list of blocks, the output layer is a reused embedding.
    yield from (m for n, m in with_matrix[-1:] if not n.startswith(blocks))


def _batches(params: Sequence[Tensor]) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Yield matrices of one shape by their numbers, as many at a time as fit together."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, p in enumerate(params):
        by_shape.setdefault((p.shape[0], math.prod(p.shape[1:])), []).append(i)
    for shape, numbers in by_shape.items():
        most = max(1, _BATCH // max(1, math.prod(shape)))
        for begin in range(0, len(numbers), most):
            yield shape, numbers[begin : begin + most]


def _check(name: str, value: Any, holds: bool, expected: str, choices: Any = ()) -> None:
    if not holds:
        raise ConfigError(f"must be {expected}", key=f"optimizer.{name}", value=value, choices=list(choices))
