"""Muon matches its definition and torch's implementation, takes the right parameters, and sharding changes nothing."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raytrainer import preflight
from raytrainer.config import compose
from raytrainer.errors import ConfigError
from raytrainer.models import MLP, ResNet
from raytrainer.optim import Muon, build_optimizer, build_scheduler
from raytrainer.optim.muon import orthogonal, split
from raytrainer.parallel import World
from raytrainer.state import named_optimizer_state, restore_optimizer_state
from tests import ranks
from tests.training import checkpointer, differences, experiment, fitted, node


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Language(nn.Module):
    """Embeddings, hidden matrices of several shapes, a convolution, and an output layer (or the embedding again)."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = None if tied else nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.tokens(ids).mT).mT
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = x @ self.tokens.weight.T if self.head is None else self.head(x)
        return logits


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(11, (4, 6), generator=generator)
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def language(**options: Any) -> Language:
    torch.manual_seed(0)
    return Language(**options)


def names_of(model: nn.Module, **patterns: Any) -> tuple[list[str], list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    matrices, rest = split(model, **patterns)
    return [names[id(p)] for p in matrices], [names[id(p)] for p in rest]


# -- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 8, 32), (2, 32, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_the_orthogonal_polar_factor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Singular values from 1 down to 0.1 are all within the iteration's reach.
    rank, generator = min(shape[1:]), torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    found = orthogonal(1e3 * u @ torch.diag(torch.linspace(1, 0.1, rank)) @ vh, 5, dtype).float()
    # The singular vectors are the same, and the values are between the iteration's bounds.
    inside = u.mT @ found @ vh.mT
    diagonal = torch.diagonal(inside, dim1=1, dim2=2)
    assert 0.65 < diagonal.min() < diagonal.max() < 1.25
    assert (inside - torch.diag_embed(diagonal)).abs().max() < (1e-4 if dtype is torch.float32 else 3e-2)
    assert (found - u @ diagonal.diag_embed() @ vh).abs().max() < (1e-4 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_as_torchs_muon_on_matrices(nesterov: bool, adjust: str) -> None:
    ours, theirs = language(), language()
    optimizer = Muon(
        ours, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust, adamw_params=["mix.weight"]
    )
    names, rest = names_of(theirs, adamw_params=["mix.weight"])
    assert sorted(names) == [f"blocks.{i}.{n}.weight" for i in range(2) for n in ("down", "up")]
    parameters = dict(theirs.named_parameters())
    muon = torch.optim.Muon(
        [parameters[n] for n in names], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust
    )
    matrices = [parameters[n] for n in rest if parameters[n].ndim >= 2]
    vectors = [parameters[n] for n in rest if parameters[n].ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], 3e-4, (0.9, 0.95)
    )
    generator = torch.Generator().manual_seed(0)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    for _ in range(3):
        for (_, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(other.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for n, p in ours.named_parameters():
        moved = (parameters[n] - before[n]).norm()
        assert (p - parameters[n]).norm() <= (3e-2 if n in names else 1e-4) * moved, n  # bfloat16 has 8 bits


def test_a_kernel_is_the_matrix_of_its_outputs() -> None:
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 5, 2), nn.Linear(12, 5)
    with torch.no_grad():
        linear.weight.copy_(convolution.weight.flatten(1))
        linear.bias.copy_(convolution.bias if convolution.bias is not None else torch.zeros(5))
    x = torch.randn(7, 3, 2, 2)
    for layer, given in ((convolution, x), (linear, x.flatten(1))):
        optimizer = Muon(nn.Sequential(layer, nn.Linear(5, 2)), lr=0.1, ns_dtype="float32", muon_params=["0.weight"])
        for _ in range(2):
            layer(given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(convolution.weight.flatten(1), linear.weight, atol=1e-5)


def test_the_update_has_the_size_of_the_rate() -> None:
    model = MLP(16, 4, width=32, depth=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Muon(model, lr=0.5, weight_decay=0.0, ns_dtype="float32")
    for p in model.parameters():
        p.grad = 1e-9 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))  # its scale does not matter
    optimizer.step()
    weight = "hidden.0.weight"  # [32, 16] is tall, so the factor is the square root of 2
    values = torch.linalg.svdvals(before[weight] - dict(model.named_parameters())[weight])
    assert 0.5 * math.sqrt(2) * 0.6 < values.min() < values.max() < 0.5 * math.sqrt(2) * 1.25


# -- which parameters Muon takes -------------------------------------------------------------------------------------


def test_embeddings_the_output_layer_and_vectors_are_adamws() -> None:
    matrices, rest = names_of(language())
    hidden = [f"blocks.{i}.{n}.weight" for i in range(2) for n in ("up", "down")]
    assert matrices == ["mix.weight", *hidden]
    assert {"tokens.weight", "head.weight", "norm.weight", "mix.bias", "blocks.0.up.bias"} <= set(rest)
    assert names_of(language(tied=True))[0] == matrices  # the last matrix in a block is not an output layer
    model = ResNet("bottleneck", (1, 1), 10, width=4)
    matrices, rest = names_of(model)
    assert "fc.weight" in rest
    assert all(model.get_parameter(n).ndim == 4 for n in matrices)
    assert all(model.get_parameter(n).ndim == 1 for n in rest if n != "fc.weight")


def test_grouped_and_transposed_kernels_are_adamws_unless_asked_for() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.ConvTranspose2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Linear(4, 2, bias=False),
    )
    assert names_of(model) == (["2.weight"], ["0.weight", "1.weight", "3.weight"])
    assert names_of(model, muon_params=["1.*", "3.weight"], adamw_params=["2.*"]) == (
        ["1.weight", "3.weight"],
        ["0.weight", "2.weight"],
    )


def test_a_models_own_word_for_its_output_layer() -> None:
    class Model(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[0]

    assert names_of(Model(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))) == (["1.weight"], ["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adamw_params": ["blcoks.*"]},
            r"optimizer.adamw_params=blcoks.\* matches no name of the model's; valid: blocks",
        ),
        ({"muon_params": ["norm.weight"]}, "optimizer.muon_params=norm.weight is not a matrix"),
        ({"muon_params": ["mix.*t"], "adamw_params": ["mix.*"]}, "adamw_params both name mix.weight"),
        ({"adamw_params": ["*"]}, "optimizer=muon finds no hidden matrix"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0 must be at least 0 and below 1"),
        ({"adjust_lr_fn": "orignal"}, "optimizer.adjust_lr_fn=orignal must be one of these; valid: original"),
        ({"ns_dtype": "float16"}, "optimizer.ns_dtype=float16 must be one of these; valid: "),
        ({"adamw_lr": -1.0}, "optimizer is refused by its constructor: Invalid learning rate: -1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(partial(Muon, **options), language())


def test_before_anything_starts(in_tmp: Path) -> None:
    """The names come from the model on the meta device, so nothing is allocated."""
    preflight.check_objects(compose(["experiment=resnet", "optimizer=muon"]).experiment)
    wrong = compose(["experiment=resnet", "optimizer=muon", "optimizer.adamw_params=[layr1.*]"]).experiment
    with pytest.raises(ConfigError, match=r"^optimizer\.adamw_params=layr1\.\* .*valid: layer1\.\*"):
        preflight.check_objects(wrong)
    with pytest.raises(ConfigError, match=r"^trainer\.precision=16-mixed .*optimizer=muon"):
        compose(["experiment=mlp", "optimizer=muon", "trainer.precision=16-mixed"])


# -- one optimizer ---------------------------------------------------------------------------------------------------


def test_a_schedule_scales_both_rates() -> None:
    optimizer = build_optimizer(partial(Muon, lr=0.1, adamw_lr=0.01), language())
    scheduler = build_scheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), optimizer, 8)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005, 0.005]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]


def test_one_state_by_names_goes_on_exactly() -> None:
    whole = language()
    optimizer = Muon(whole)
    stepped(whole, optimizer, 3)
    state = copy.deepcopy(named_optimizer_state(optimizer, whole))
    assert set(state["state"]["mix.weight"]) == {"momentum_buffer"}
    assert set(state["state"]["head.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    again = copy.deepcopy(whole)
    stepped(whole, optimizer, 3, seed=1)
    second = Muon(again, lr=1.0)
    restore_optimizer_state(second, again, state)
    stepped(again, second, 3, seed=1)
    assert differences(dict(again.state_dict()), dict(whole.state_dict())) == []


MUON = node("raytrainer.optim.Muon", lr=0.05, adamw_lr=0.01)
NET = node("tests.training.Net")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_exact_resume(tmp_path: Path, precision: str) -> None:
    from raytrainer.trainer import Trainer

    e = experiment(model=NET, optimizer=MUON, lr_scheduler=node("raytrainer.optim.Cosine"))
    e.trainer.precision, e.trainer.max_steps, e.checkpoint.every_n_steps = precision, 6, 3
    whole, _ = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    assert whole.checkpointer is not None
    again = Trainer(e, checkpointer=whole.checkpointer)
    again.restore(next(i for i in whole.checkpointer.list() if i.step == 3))
    again.checkpointer = None
    again.fit()
    assert differences(dict(again.raw_model.state_dict()), dict(whole.raw_model.state_dict())) == []


def test_another_rate_of_either_kind_for_a_resume(tmp_path: Path) -> None:
    from raytrainer.trainer import Trainer

    e = experiment(model=NET, optimizer=MUON)
    saved = checkpointer(World(), tmp_path)
    fitted(e, checkpointer=saved)
    assert e.optimizer is not None
    e.optimizer = {**e.optimizer, "adamw_lr": 0.002}
    again = Trainer(e, checkpointer=saved)
    again.restore(saved.list()[-1], ["adamw_lr"])
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.05, 0.002, 0.002]


# -- several ranks ---------------------------------------------------------------------------------------------------


def sharded(world: World) -> tuple[dict[str, Tensor], list[str]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = language()
    mesh = init_device_mesh("cpu", (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Muon(model)
    stepped(model, optimizer, 4)
    plain = [
        n for n, p in model.named_parameters() if not isinstance(optimizer.state[p].get("momentum_buffer", p), DTensor)
    ]
    return {n: p.full_tensor() for n, p in model.named_parameters() if isinstance(p, DTensor)}, plain


def test_a_sharded_model_gets_the_update_of_the_whole() -> None:
    """Neither 8 nor 20 rows divide evenly among three ranks."""
    whole = language()
    stepped(whole, Muon(whole), 4)
    for found, plain in ranks.run(3, sharded):
        assert plain == []  # the momentum is sharded too
        assert found.keys() == dict(whole.named_parameters()).keys()
        for name, p in whole.named_parameters():
            assert torch.allclose(found[name], p, rtol=0, atol=1e-6), name


def fine_tuned(world: World, strategy: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after six steps from those of a file, with a frozen part; and again, resumed after three."""
    from raytrainer.trainer import Trainer

    e = experiment(
        model=node("tests.test_muon.Language"),
        loss=node("raytrainer.losses.TokenCrossEntropy"),
        optimizer=node("raytrainer.optim.Muon", lr=0.02, adamw_lr=0.01, ns_dtype="float32"),
        data={"train": node("tests.training.tokens", rows=48), "val": None},
        trainer={"strategy": strategy, "max_steps": 6, "freeze": ["norm.*", "blocks.0.*"]},
        checkpoint={"every_n_steps": 3},
    )
    saved = checkpointer(world, folder / f"{strategy}-{world.size}")
    whole = Trainer(e, world=world, checkpointer=saved)
    whole.init_from(str(folder / "model.safetensors"))
    whole.fit()
    again = Trainer(e, world=world, checkpointer=saved)
    again.restore(next(i for i in saved.list() if i.step == 3))
    again.checkpointer = None
    again.fit()
    first, second = ({n: _gathered(t) for n, t in x.raw_model.state_dict().items()} for x in (whole, again))
    return first, second


def _gathered(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def test_the_same_on_any_number_of_ranks_by_any_strategy(tmp_path: Path) -> None:
    published = {n: t.detach().clone() for n, t in language().state_dict().items()}
    save_file(published, tmp_path / "model.safetensors")
    alone, resumed = fine_tuned(World(), "ddp", tmp_path)
    assert differences(alone, resumed) == []
    frozen = {n for n in published if n.startswith(("norm.", "blocks.0."))}
    assert set(differences(alone, published)) == {f"/{n}" for n in published.keys() - frozen}
    for strategy in ("ddp", "fsdp"):
        for found, resumed in ranks.run(2, fine_tuned, strategy, tmp_path):
            assert differences(found, resumed) == []
            for name in published:
                assert torch.allclose(found[name], alone[name], rtol=0, atol=2e-5), (strategy, name)
                assert name not in frozen or torch.equal(found[name], published[name])
