"""GPT-2 with 124M parameters on sequences of 1,024 tokens: `Trainer.fit` against a tuned plain loop, in tokens a second
and as the fraction of the GPU's peak that the model's arithmetic reaches (MFU).

Both use bf16 autocast, flash attention, torch.compile, fused AdamW, tokens on the device and a vocabulary padded to
50,304. The plain loop has its own model, with queries, keys and values as one matrix, and compiles the loss with it.
Both begin with the same weights, and so with the same losses.

    python -m benchmarks.gpu.bench_gpt2
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.gpu import rounds
from raytrainer.flops import peak_flops
from raytrainer.trainer import Trainer


def utilisation(tokens_per_second: float, dim: int, depth: int, length: int, vocabulary: int) -> float | None:
    """Return the fraction of this GPU's peak, or None if the peak is unknown, by Chowdhery et al. 2022
    (arXiv:2204.02311, appendix B): 6 FLOPs a token for each weight of a matrix product, and attention over the whole
    square."""
    peak = peak_flops(torch.device("cuda"), "bf16-mixed") if torch.cuda.is_available() else None
    flops = 6 * (12 * depth * dim**2 + vocabulary * dim) + 12 * depth * dim * length
    return tokens_per_second * flops / peak if peak else None


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Gpt2(nn.Module):
    """A GPT-2 whose output is the mean cross entropy of token ids and the ids that follow them, both `[N, T]`."""

    def __init__(self, vocabulary: int, length: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor, following: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]]))
        logits = F.linear(x, self.tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    @torch.no_grad()
    def take(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of our Transformer."""
        names = {"tokens": "embed_tokens", "positions": "embed_positions", "norm": "norm"}
        for number in range(len(self.blocks)):
            mine, theirs = f"blocks.{number}", f"layers.{number}"
            names |= {
                f"{mine}.norm_1": f"{theirs}.input_layernorm",
                f"{mine}.norm_2": f"{theirs}.post_attention_layernorm",
            }
            names |= {f"{mine}.out": f"{theirs}.self_attn.o_proj"}
            names |= {f"{mine}.up": f"{theirs}.mlp.up_proj", f"{mine}.down": f"{theirs}.mlp.down_proj"}
        for name, parameter in self.named_parameters():
            module, _, kind = name.rpartition(".")
            if module.endswith(".qkv"):
                attention = f"layers.{module.split('.')[1]}.self_attn"
                parameter.copy_(torch.cat([state[f"{attention}.{part}_proj.{kind}"] for part in "qkv"]))
            else:
                parameter.copy_(state[f"{names[module]}.{kind}"])


class Plain(rounds.PlainLoop):
    """A plain loop written for speed."""

    def __init__(self, trainer: Trainer, mode: str | None) -> None:
        e, device = trainer.experiment, trainer.world.device
        sizes: Any = e.model
        self._model = Gpt2(
            sizes["vocab_size"], sizes["max_seq_len"], sizes["dim"], sizes["num_heads"], sizes["num_layers"]
        ).to(device)
        self._model.take(trainer.raw_model.state_dict())
        if mode:
            self._model.compile(mode=mode)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        columns, size = trainer.train_loader.dataset.tensors, e.data.global_batch_size
        self._ids = [part.to(device) for part in columns["input_ids"].split(size)]
        self._following = [part.to(device) for part in columns["labels"].split(size)]
        self._mixed = e.trainer.precision == "bf16-mixed"

    def step(self, number: int) -> Tensor:
        at = number % len(self._ids)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._ids[at].device.type, torch.bfloat16, enabled=self._mixed):
            loss: Tensor = self._model(self._ids[at], self._following[at])
        loss.backward()
        self._optimizer.step()
        return loss.detach().clone()  # the next replay of the CUDA graph overwrites it


def compare(options: argparse.Namespace) -> dict[str, Any]:
    smoke = options.smoke
    batch, length, vocabulary = (2, 16, 64) if smoke else (options.batch or 32, 1024, 50_304)
    dim, heads, depth = (32, 2, 2) if smoke else (768, 12, 12)
    mode = None if smoke or options.compile == "false" else options.compile
    overrides = [
        "experiment=mlp",
        "model=gpt2_124m",
        "loss=token_cross_entropy",
        "~data.train.split",
        "data.train._target_=benchmarks.gpu.data.tokens",
        f"+data.train={{rows: {8 * batch}, length: {length}, vocabulary: {vocabulary}}}",
        f"data.global_batch_size={batch}",
        "data.resident=true",
        f"model.vocab_size={vocabulary}",
        f"model.max_seq_len={length}",
        f"model.dim={dim}",
        f"model.hidden_dim={4 * dim}",
        f"model.num_heads={heads}",
        f"model.num_layers={depth}",
        "model.dropout=0",
        "optimizer=adamw",
        "optimizer.lr=6e-4",
        "optimizer.betas=[0.9,0.95]",
        "optimizer.weight_decay=0",
        "lr_scheduler=constant",
        f"trainer.compile={mode or 'false'}",
        f"trainer.precision={'32-true' if smoke else 'bf16-mixed'}",
    ]
    figures = rounds.compare(
        overrides,
        lambda trainer: Plain(trainer, mode),
        warmup=10,
        chunk=10 if smoke else 50,
        rounds=2 if smoke else options.rounds,
        tolerance=1e-4 if smoke else 0.05,
    )
    tokens = {name: batch * length / figures[f"{name}_s_a_step"]["median"] for name in ("trainer", "plain")}
    return {
        "what": "GPT-2, bf16-mixed, on one GPU: Trainer.fit and a plain loop in turn; ratio of seconds",
        "compile": mode,
        "batch": batch,
        "tokens_a_sequence": length,
        "tokens_per_second": tokens,
        "mfu": {name: utilisation(rate, dim, depth, length, vocabulary) for name, rate in tokens.items()},
        **figures,
        "goal": {"ratio": 1.02},
        "holds": figures["ratio"]["median"] <= 1.02,
    }


if __name__ == "__main__":
    given = rounds.options(__doc__)
    found = compare(given)
    print(found) if given.smoke else report.write("gpu-gpt2", found)
