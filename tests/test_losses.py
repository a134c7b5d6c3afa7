"""The reference losses: values match torch and calculations by hand, weights make any split equal, and errors name the
problem."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from raytrainer.errors import ConfigError
from raytrainer.losses import CrossEntropy, MeanSquaredError, TokenCrossEntropy


def same(x: Tensor) -> Tensor:
    return x


LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.5, 0.0], [1.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 2, 1, 2])


def test_cross_entropy_and_accuracy_by_hand() -> None:
    out = CrossEntropy()(same, {"image": LOGITS, "label": LABELS})
    by_hand = [
        -row[label].item() + math.log(sum(math.exp(v) for v in row.tolist()))
        for row, label in zip(LOGITS, LABELS, strict=True)
    ]
    assert out["loss"].item() == pytest.approx(sum(by_hand) / 4)
    assert out["accuracy"].item() == 0.75
    assert set(out) == {"loss", "accuracy", "preds", "target"}
    assert torch.equal(out["preds"], LOGITS)
    assert torch.equal(out["target"], LABELS)


@dataclasses.dataclass
class Record:
    label: torch.Tensor
    image: torch.Tensor


BATCHES: list[Any] = [
    (LOGITS, LABELS),
    [LOGITS, LABELS],
    {"image": LOGITS, "label": LABELS},
    collections.UserDict(image=LOGITS, label=LABELS),
    Record(image=LOGITS, label=LABELS),
]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_is_a_mapping_a_sequence_or_a_record(batch: Any) -> None:
    assert CrossEntropy()(same, batch)["accuracy"].item() == 0.75


def test_other_keys_and_positions() -> None:
    by_key = CrossEntropy(input="x", target="y")(same, {"x": LOGITS, "y": LABELS, "image": None})
    by_position = CrossEntropy(input=2, target=0)(same, (LABELS, None, LOGITS))
    assert by_key["loss"] == by_position["loss"] == F.cross_entropy(LOGITS, LABELS)


def test_label_smoothing_and_probabilities() -> None:
    smoothed = CrossEntropy(label_smoothing=0.3)(same, (LOGITS, LABELS))
    spread = 0.7 * F.one_hot(LABELS, 3) + 0.1
    soft = CrossEntropy()(same, (LOGITS, spread))
    torch.testing.assert_close(smoothed["loss"], soft["loss"])
    assert soft["accuracy"].item() == 0.75


def test_dense_predictions() -> None:
    logits = torch.randn(2, 5, 4, 4)
    target = logits.argmax(1)
    target[0, 0, 0] = (target[0, 0, 0] + 1) % 5
    out = CrossEntropy()(same, (logits, target))
    assert out["accuracy"].item() == pytest.approx(31 / 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_taken_up(dtype: torch.dtype) -> None:
    out = CrossEntropy()(same, (LOGITS.to(dtype), LABELS))
    assert out["loss"].dtype == torch.float32


def test_double_stays_double() -> None:
    out = CrossEntropy()(same, (LOGITS.double(), LABELS))
    assert out["loss"].dtype == out["accuracy"].dtype == torch.float64


def test_accuracy_carries_no_gradient_and_the_loss_does() -> None:
    logits = LOGITS.clone().requires_grad_()
    out = CrossEntropy()(same, (logits, LABELS))
    assert out["loss"].requires_grad
    assert not out["accuracy"].requires_grad


def test_a_missing_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^loss\.target=label .*valid: labels, image") as caught:
        CrossEntropy()(same, {"image": LOGITS, "labels": LABELS})
    assert caught.value.key == "loss.target"
    with pytest.raises(ConfigError, match=r"entry 1 of a batch, which is 1 entries"):
        CrossEntropy()(same, (LOGITS,))
    with pytest.raises(ConfigError, match=r"which is a Tensor"):
        CrossEntropy()(same, LOGITS)
    with pytest.raises(ConfigError, match="label_smoothing"):
        CrossEntropy(label_smoothing=1.5)


def test_mean_squared_error() -> None:
    prediction, target = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 0.0, 1.0])
    out = MeanSquaredError()(same, {"input": prediction, "target": target})
    assert out["loss"].item() == pytest.approx((0 + 4 + 9) / 3)
    assert MeanSquaredError()(same, (prediction, target[:, None]))["loss"] == out["loss"]


def test_mean_squared_error_never_broadcasts() -> None:
    with pytest.raises(ConfigError, match=r"\[3\] .*the model gives \[3, 2\]"):
        MeanSquaredError()(same, (torch.zeros(3, 2), torch.zeros(3)))


class Output:
    """An output like those of Hugging Face's models."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_a_model_output_has_logits_and_takes_further_entries_by_name() -> None:
    def model(x: Tensor, attention_mask: Tensor) -> Output:
        return Output((x * attention_mask).bfloat16())

    batch = {"input_ids": torch.randn(2, 4, 6), "labels": torch.ones(2, 4).long(), "attention_mask": torch.tensor(2.0)}
    out = TokenCrossEntropy(keywords=["attention_mask"])(model, batch)
    expected = F.cross_entropy((2 * batch["input_ids"]).bfloat16().float().flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(out["loss"], expected)
    with pytest.raises(ConfigError, match=r"^loss\.keywords=mask .*valid: input_ids, labels, attention_mask"):
        TokenCrossEntropy(keywords=["mask"])(model, batch)
    with pytest.raises(ConfigError, match=r"^loss\.keywords=\[attention_mask\] .*dicts"):
        TokenCrossEntropy(keywords=["attention_mask"])(model, (batch["input_ids"], batch["labels"]))


def test_tokens_that_do_not_count() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 6), torch.randint(0, 6, (2, 4))
    target[0, 1:] = -100
    out = TokenCrossEntropy()(same, {"input_ids": logits, "labels": target})
    kept = target != -100
    assert out["weight"].item() == 5
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits[kept], target[kept]))
    assert out["accuracy"].item() == pytest.approx((logits.argmax(-1) == target)[kept].float().mean().item())


def test_perplexity_and_bits_a_byte() -> None:
    assert TokenCrossEntropy().summary({"loss": math.log(8)}) == {"perplexity": pytest.approx(8)}
    told = TokenCrossEntropy(bytes_per_token=4.0).summary({"loss": math.log(8), "accuracy": 0.5})
    assert told == {"perplexity": pytest.approx(8), "bits_per_byte": pytest.approx(3 / 4)}
    assert TokenCrossEntropy().summary({"loss": 1e4}) == {"perplexity": math.inf}
    assert math.isnan(TokenCrossEntropy().summary({"loss": math.nan})["perplexity"])
    with pytest.raises(ConfigError, match=r"^loss\.bytes_per_token=0\.0 .*above 0"):
        TokenCrossEntropy(bytes_per_token=0.0)


def test_no_token_counts() -> None:
    logits = torch.randn(1, 3, 6, requires_grad=True)
    out = TokenCrossEntropy()(same, (logits, torch.full((1, 3), -100)))
    out["loss"].backward()
    assert (out["loss"].item(), out["weight"].item(), out["accuracy"].item()) == (0, 0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_the_weighted_mean_over_any_split_is_the_whole(rows: int, parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, 5, dtype=torch.float64, generator=generator)
    target = torch.randint(0, 5, (rows, 3), generator=generator)
    target[torch.rand(rows, 3, generator=generator) < 0.4] = -100
    loss = TokenCrossEntropy()
    whole = loss(same, (logits, target))
    pieces = [loss(same, piece) for piece in zip(logits.chunk(parts), target.chunk(parts), strict=True)]
    weight = sum(piece["weight"] for piece in pieces)
    assert weight == whole["weight"]
    for key in ("loss", "accuracy"):
        total = sum(piece[key] * piece["weight"] for piece in pieces)
        torch.testing.assert_close(total / max(float(weight), 1.0), whole[key], rtol=1e-12, atol=1e-12)
