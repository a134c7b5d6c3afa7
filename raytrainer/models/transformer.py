"""A decoder-only transformer (Vaswani et al. 2017, arXiv:1706.03762): Llama's or GPT-2's, depending on its options.

Parameters have the names of Hugging Face's Llama, so that its weights load.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrainer.errors import ConfigError

Norm = Literal["rms", "layer"]
Feedforward = Literal["swiglu", "gelu"]
Positions = Literal["rotary", "learned"]

INIT_STD = 0.02  # GPT-2's (Radford et al. 2019)


class Transformer(nn.Module):
    """A transformer from token ids `[N, T]`, int64, to logits `[N, T, vocab_size]`; position `t` sees ids up to `t`.

    Each block adds attention and then a feed-forward layer to its input, each after a normalisation (pre-norm).

    Args:
        vocab_size: Number of token ids, and of logits.
        dim: Values per position between blocks.
        num_layers: Number of blocks.
        num_heads: Number of attention heads, each with `dim / num_heads` values.
        num_kv_heads: Number of heads for keys and values, each shared by a group of query heads (Ainslie et al. 2023,
            arXiv:2305.13245); None: `num_heads`.
        hidden_dim: Values inside a feed-forward layer; None: 4 times `dim`, or for `swiglu`, which has three matrices,
            8/3 times (about the same size), rounded up to a multiple of 64.
        norm: `rms` (Zhang and Sennrich 2019, arXiv:1910.07467) or `layer` (with a bias if `bias` is set).
        feedforward: `swiglu` (Shazeer 2020, arXiv:2002.05202) or `gelu`, in the tanh form of GPT-2.
        positions: `rotary` (Su et al. 2021, arXiv:2104.09864), or `learned`, one vector for each up to `max_seq_len`.
        max_seq_len: The longest sequence with `learned` positions. Rotary ones have no limit.
        rope_theta: The base of the rotary wavelengths.
        bias: Whether linear layers and layer norms have a bias.
        tied: Whether the output matrix is the embedding (Press and Wolf 2016, arXiv:1608.05859).
        dropout: The probability for the embedding, attention weights, and the outputs that each block adds.
        norm_eps: Added under the root of a normalisation.

    Raises:
        ConfigError: A choice is unknown, or a size is out of range; when called, a sequence is longer than
            `max_seq_len`.
    """

    _no_split_modules = ("Block",)  # Hugging Face's attribute for the unit of sharding and of activation checkpointing

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        norm: Norm = "rms",
        feedforward: Feedforward = "swiglu",
        positions: Positions = "rotary",
        max_seq_len: int | None = None,
        rope_theta: float = 10_000.0,
        bias: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _choice("norm", norm, ("rms", "layer"))
        _choice("feedforward", feedforward, ("swiglu", "gelu"))
        _choice("positions", positions, ("rotary", "learned"))
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(vocab_size, dim, num_layers, num_heads, kv_heads, hidden_dim, positions, max_seq_len)
        if not 0 <= dropout < 1:
            raise ConfigError("must be at least 0 and below 1", key="model.dropout", value=dropout)
        if hidden_dim is None:
            hidden_dim = 4 * dim if feedforward == "gelu" else 64 * math.ceil(8 * dim / 3 / 64)
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.embed_positions: nn.Embedding | None = None
        if positions == "learned":
            assert max_seq_len is not None
            self.embed_positions = nn.Embedding(max_seq_len, dim)
        self.dropout = nn.Dropout(dropout)
        theta = rope_theta if positions == "rotary" else None
        self.layers = nn.ModuleList(
            Block(
                Attention(dim, num_heads, kv_heads, rope_theta=theta, bias=bias, dropout=dropout),
                SwiGLU(dim, hidden_dim, bias) if feedforward == "swiglu" else GELU(dim, hidden_dim, bias),
                (normalisation(norm, dim, bias, norm_eps), normalisation(norm, dim, bias, norm_eps)),
                dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = normalisation(norm, dim, bias, norm_eps)
        self.lm_head = None if tied else nn.Linear(dim, vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights from a normal distribution with a standard deviation of 0.02.

        For matrices whose output a block adds to its input, it is 0.02 / sqrt(2 * num_layers), so that the sum does not
        grow with depth (Radford et al. 2019, 2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * len(self.layers)) if adds else INIT_STD)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map `[N, T]` to logits `[N, T, vocab_size]`."""
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            length, limit = input_ids.shape[1], self.embed_positions.num_embeddings
            if length > limit:
                raise ConfigError(
                    f"a sequence has {length} positions: data.train.seq_len must be at most this",
                    key="model.max_seq_len",
                    value=limit,
                )
            x = x + self.embed_positions.weight[:length]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        # Not a second module with the same parameter, which meta initialisation and state dicts would have to handle.
        logits: Tensor = F.linear(self.norm(x), (self.lm_head or self.embed_tokens).weight)
        return logits


class Block(nn.Module):
    """A block from `[N, T, dim]` to the same shape: attention and a feed-forward layer, each added to its input."""

    def __init__(
        self, attention: Attention, mlp: nn.Module, norms: tuple[nn.Module, nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norms
        self.self_attn, self.mlp = attention, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x)))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Attention(nn.Module):
    """Causal attention with grouped heads: `[N, T, dim]` to the same shape; rotary unless `rope_theta` is None."""

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, *, rope_theta: float | None, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.head_dim, self.grouped = dim // num_heads, num_kv_heads != num_heads
        self.rope_theta, self.dropout = rope_theta, dropout
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # [N, heads, T, head_dim]
            projected(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope_theta is not None:
            cos, sin = rotary_tables(x.shape[1], self.head_dim, self.rope_theta, q)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`: `[..., dim]` to the same shape."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class GELU(nn.Module):
    """`down(gelu(up(x)))`: `[..., dim]` to the same shape."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return out


def rotary_tables(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine `[length, head_dim / 2]` of position times frequency i, theta^(-2i/head_dim).

    They are on the device of `like`, in float32 at least, because bfloat16 has no numbers between 256 and 258. Each
    forward pass computes them again, in a few small kernels. As buffers they would be rounded by bf16-true, empty after
    meta initialisation, cast by FSDP, averaged over ranks, and saved in checkpoints.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim)
    angles = torch.arange(length, dtype=dtype, device=like.device).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` `[..., T, head_dim]` with values i and i + head_dim/2 rotated as a pair, in the tables' precision."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def normalisation(norm: Norm, dim: int, bias: bool, eps: float) -> nn.Module:
    return nn.RMSNorm(dim, eps) if norm == "rms" else nn.LayerNorm(dim, eps, bias=bias)


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError("is unknown", key=f"model.{key}", value=value, choices=choices)


def _check_sizes(
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_dim: int | None,
    positions: Positions,
    max_seq_len: int | None,
) -> None:
    sizes = {"vocab_size": vocab_size, "dim": dim, "num_layers": num_layers, "num_heads": num_heads}
    sizes |= {"num_kv_heads": num_kv_heads}
    for key, size in (sizes | {"hidden_dim": hidden_dim, "max_seq_len": max_seq_len}).items():
        if size is not None and size < 1:
            raise ConfigError("must be at least 1", key=f"model.{key}", value=size)
    if dim % num_heads:
        raise ConfigError(f"must divide model.dim={dim}", key="model.num_heads", value=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"must divide model.num_heads={num_heads}", key="model.num_kv_heads", value=num_kv_heads)
    if positions == "rotary" and dim // num_heads % 2:
        raise ConfigError(
            f"gives heads of {dim // num_heads} values, and rotary positions turn pairs",
            key="model.num_heads",
            value=num_heads,
        )
    if positions == "learned" and max_seq_len is None:
        raise ConfigError("must be set for positions=learned", key="model.max_seq_len", value=None)
