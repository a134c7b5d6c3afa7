"""The transformer: attention and rotary positions follow their definitions, no position sees a later one, the weights
of Llama and GPT-2 give their logits, and the sizes are the published ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from raytrainer.config import build
from raytrainer.errors import ConfigError
from raytrainer.models import Transformer
from raytrainer.models.transformer import Attention, rotary_tables, rotate

CONFIGS = Path(__file__).resolve().parent.parent / "configs/model"
SMALL: dict[str, Any] = {"vocab_size": 11, "dim": 16, "num_layers": 2, "num_heads": 4}
GPT2: dict[str, Any] = {"norm": "layer", "feedforward": "gelu", "positions": "learned", "max_seq_len": 8, "bias": True}


def small(seed: int = 0, **options: Any) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(**{**SMALL, **options})


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "parameters"), [("gpt2_124m", 124_439_808), ("llama_1b", 1_235_814_400)])
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, model.embed_tokens.num_embeddings)


def test_the_parameter_count_of_the_small_one_is_as_its_file_says() -> None:
    text = (CONFIGS / "transformer.yaml").read_text()
    assert f"{sum(p.numel() for p in build(yaml.safe_load(text)).parameters()):,} parameters" in text


# -- attention -------------------------------------------------------------------------------------------------------


def naive_attention(layer: Attention, x: Tensor, theta: float | None) -> Tensor:
    """Return the attention by its definition, position by position and head by head."""
    length, head_dim = x.shape[0], layer.head_dim
    q, k, v = ((p(x)).reshape(length, -1, head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if theta is not None:
        q, k = (torch.stack([turned(h, theta) for h in t.unbind(1)], 1) for t in (q, k))
    group, rows = q.shape[1] // k.shape[1], []
    for t in range(length):
        heads = []
        for h in range(q.shape[1]):
            scores = torch.stack([q[t, h] @ k[s, h // group] / math.sqrt(head_dim) for s in range(t + 1)])
            heads.append(scores.softmax(0) @ v[: t + 1, h // group])
        rows.append(torch.cat(heads))
    out: Tensor = layer.o_proj(torch.stack(rows))
    return out


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotate `[T, D]` as in arXiv:2104.09864 (14), by complex numbers: pair i by the angle t * theta^(-2i/D)."""
    length, dim = x.shape
    frequency = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    both = torch.complex(x[:, : dim // 2].double(), x[:, dim // 2 :].double()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([both.real, both.imag], 1).to(x.dtype)


@pytest.mark.parametrize("theta", [None, 100.0])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_as_defined(kv_heads: int, theta: float | None) -> None:
    torch.manual_seed(kv_heads)
    layer = Attention(16, 4, kv_heads, rope_theta=theta, bias=True, dropout=0.0).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = torch.stack([naive_attention(layer, row, theta) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_rotary_is_a_complex_rotation() -> None:
    x = torch.randn(2, 3, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = rotate(x, *rotary_tables(50, 8, 10_000.0, x))
    expected = torch.stack([turned(row, 10_000.0) for row in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # The purpose of the rotation: a product depends only on the distance of two positions.
    q, k = (rotate(x[0, row, :1].expand(50, 8), *rotary_tables(50, 8, 10_000.0, x)) for row in (0, 1))
    torch.testing.assert_close(q[7] @ k[4], q[40] @ k[37])
    assert not torch.isclose(q[7] @ k[4], q[7] @ k[5])


def test_rotary_tables_are_precise_whatever_the_model_is() -> None:
    for dtype, kept in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        x = torch.zeros(1, dtype=dtype)
        cos, sin = rotary_tables(2000, 8, 10_000.0, x)
        assert cos.dtype == sin.dtype == kept
        assert rotate(torch.ones(2000, 8, dtype=dtype), cos, sin).dtype == dtype
        exact, _ = rotary_tables(2000, 8, 10_000.0, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(cos.double(), exact, rtol=0, atol=2e-4)
    assert not list(small().buffers())


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, GPT2, {"tied": False, "norm": "layer"}])
def test_no_position_sees_a_later_one(options: dict[str, Any]) -> None:
    model, before = small(**options).eval(), ids(2, 8)
    for t in range(8):
        after = before.clone()
        after[:, t] = (after[:, t] + 1) % 11
        a, b = model(before), model(after)
        torch.testing.assert_close(a[:, :t], b[:, :t], rtol=0, atol=1e-6)
        assert ((a[:, t:] - b[:, t:]).abs().amax((0, 2)) > 1e-6).all()  # position t and all later ones


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "dropout": 0.1}, GPT2, {"tied": False}])
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = small(**options)
    nn.functional.cross_entropy(model(ids(4, 8)).flatten(0, 1), ids(4, 8, seed=1).flatten()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys adds the same to all scores of a position, so it does not change their softmax.
    assert [name for name in still if not name.endswith("k_proj.bias")] == []


def test_dropout_is_of_training_alone() -> None:
    model = small(dropout=0.5)
    assert not torch.equal(model(ids(2, 8)), model(ids(2, 8)))
    model.eval()
    assert torch.equal(model(ids(2, 8)), model(ids(2, 8)))


def test_initial_weights_have_the_scale_that_the_source_gives() -> None:
    model = Transformer(500, dim=256, num_layers=8, num_heads=4, norm="layer", bias=True)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.zeros_like(p) if "bias" in name else torch.ones_like(p)), name
        else:
            scale = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(scale, rel=0.02), name


def test_weights_made_on_the_meta_device_are_those_made_at_once() -> None:
    with torch.device("meta"):
        late = Transformer(**SMALL, dropout=0.1)
    late.to_empty(device="cpu")
    torch.manual_seed(5)
    late.reset_parameters()
    at_once = Transformer(**SMALL, dropout=0.1)
    torch.manual_seed(5)
    at_once.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), at_once.parameters(), strict=True))
    torch.testing.assert_close(late.eval()(ids(1, 5)), at_once.eval()(ids(1, 5)))


def test_it_compiles_in_one_graph() -> None:
    model = small(num_kv_heads=2)
    graph = torch.compile(model, backend="eager", fullgraph=True)  # a break, or a wait for the device, raises
    torch.testing.assert_close(graph(ids(2, 8)), model(ids(2, 8)))


def test_half_precision_stays_near_the_full_one() -> None:
    model, half = small(num_kv_heads=2), small(num_kv_heads=2).bfloat16()
    got = half(ids(2, 64))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), model(ids(2, 64)), rtol=0.1, atol=0.03)


# -- other models as special cases -----------------------------------------------------------------------------------


def test_with_llamas_weights_it_gives_llamas_logits() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config).eval()
    ours = small(num_kv_heads=2, hidden_dim=24, tied=False).eval()
    ours.load_state_dict({name.removeprefix("model."): t for name, t in theirs.state_dict().items()})
    torch.testing.assert_close(ours(ids(2, 9)), theirs(ids(2, 9)).logits, rtol=1e-4, atol=1e-5)


def test_with_gpt2s_weights_it_gives_gpt2s_logits() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=4)).eval()
    names = {
        "wte": "embed_tokens",
        "wpe": "embed_positions",
        "ln_f": "norm",
        "h.": "layers.",
        "ln_1": "input_layernorm",
    }
    names |= {"ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj"}
    names |= {"mlp.c_proj": "mlp.down_proj"}
    state: dict[str, Tensor] = {}
    for name, value in theirs.transformer.state_dict().items():
        here = name
        for theirs_name, ours_name in names.items():
            here = here.replace(theirs_name, ours_name)
        t = value.T if ".c_" in name and value.dim() == 2 else value  # GPT-2's matrices are [in, out]
        if "c_attn" in here:
            for part, piece in zip("qkv", t.chunk(3), strict=True):
                state[here.replace("attn.c_attn", f"self_attn.{part}_proj")] = piece
        else:
            state[here] = t
    ours = small(**GPT2).eval()
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(ids(2, 8)), theirs(ids(2, 8)).logits, rtol=1e-4, atol=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, r"model\.norm=batch is unknown; valid: rms, layer"),
        ({"feedforward": "relu"}, r"model\.feedforward=relu is unknown; valid: gelu, swiglu"),
        ({"positions": "alibi"}, r"model\.positions=alibi is unknown"),
        ({"num_heads": 3}, r"model\.num_heads=3 must divide model\.dim=16"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads=3 must divide model\.num_heads=4"),
        ({"num_heads": 16}, r"gives heads of 1 values"),
        ({"num_layers": 0}, r"model\.num_layers=0 must be at least 1"),
        ({"hidden_dim": 0}, r"model\.hidden_dim=0 must be at least 1"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0 must be"),
        ({"positions": "learned"}, r"model\.max_seq_len must be set for positions=learned"),
    ],
)
def test_what_makes_no_network(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transformer(**{**SMALL, **options})


def test_a_sequence_longer_than_the_learned_positions() -> None:
    with pytest.raises(ConfigError, match=r"^model\.max_seq_len=8 .*9 positions"):
        small(**GPT2)(ids(1, 9))
