"""The floating-point operations of a model match the published formula, and a Trainer logs the utilisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrainer.config import Experiment
from raytrainer.flops import model_flops, peak_flops
from raytrainer.losses import TokenCrossEntropy
from raytrainer.models import Transformer
from raytrainer.parallel import World
from tests import ranks, training
from tests.training import differences, experiment, fitted, node, weights

META = torch.device("meta")
LAYERS, HEADS, HEAD_DIM, LENGTH = 3, 4, 8, 16
SHAPE: dict[str, Any] = {"vocab_size": 7, "dim": HEADS * HEAD_DIM, "num_layers": LAYERS, "num_heads": HEADS}


def palm(model: Transformer, length: int) -> int:
    """Return the operations per token by Chowdhery et al. 2022 (arXiv:2204.02311), appendix B: 6N + 12LHQT, where N
    counts the parameters that multiply."""
    multiply = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if model.lm_head is not None:
        multiply -= model.embed_tokens.weight.numel()  # an embedding is looked up; a tied one is the output matrix
    return 6 * multiply + 12 * LAYERS * HEADS * HEAD_DIM * length


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "dropout": 0.1}, {"tied": False, "feedforward": "gelu"}])
def test_a_transformers_are_those_of_the_formula(options: dict[str, Any]) -> None:
    ids = torch.zeros(2, LENGTH, dtype=torch.int64, device=META)

    def make() -> tuple[nn.Module, Any]:
        return Transformer(**SHAPE, **options), TokenCrossEntropy()

    expected = palm(Transformer(**SHAPE, **options), LENGTH) * 2 * LENGTH
    assert model_flops(make, {"input_ids": ids, "labels": ids}) == expected


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.0),
        ("NVIDIA H100 NVL", "16-mixed", 835.5),
        ("NVIDIA H200", "32-true", 66.9),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312.0),
        ("NVIDIA A10G", "bf16-mixed", 70.0),
        ("NVIDIA A10", "bf16-mixed", 125.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3", "64-true", None),
        ("NVIDIA Tomorrow", "bf16-mixed", None),
    ],
)
def test_the_peak_is_of_the_device_and_the_precision(
    name: str, precision: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda", 0), precision)
    assert found == (None if tflops is None else tflops * 1e12)
    assert peak_flops(torch.device("cuda", 0), precision, 2.5) == 2.5e12
    assert peak_flops(torch.device("cpu"), precision) is None


def test_tf32_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops(torch.device("cuda", 0), "32-true") == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


# -- in a Trainer ----------------------------------------------------------------------------------------------------


def language(**trainer: Any) -> Experiment:
    return experiment(
        model=node("raytrainer.models.Transformer", **SHAPE, dropout=0.2),
        loss=node("raytrainer.losses.TokenCrossEntropy", bytes_per_token=2.0),
        data={"train": node(training.tokens, rows=24, length=LENGTH), "val": None},
        trainer={"max_steps": 3, **trainer},
    )


def rates(world: World, e: Experiment) -> list[dict[str, float]]:
    return [event.metrics for event in fitted(e, world)[1].events("on_log")]


def test_what_a_language_model_logs() -> None:
    # 2 ranks, 3 micro-batches each.
    e = language(peak_tflops=2.0)
    e.data.micro_batch_size = 2
    e.data.shuffle = False
    counted = [
        int((training.tokens(24, LENGTH).tensors["labels"][rows] != -100).sum()) for rows in (slice(12), slice(12, 24))
    ]
    for size in (1, 2):
        logs = rates(World(), e) if size == 1 else ranks.run(2, rates, e)[1]
        assert len(logs) == 3
        for step, metrics in enumerate(logs):
            samples = metrics["train/samples_per_second"]
            assert metrics["train/tokens_per_second"] / samples == pytest.approx(counted[step % 2] / 12)
            flops = palm(Transformer(**SHAPE), LENGTH) * LENGTH * samples
            assert metrics["train/mfu"] == pytest.approx(flops / (size * 2e12))
            assert metrics["train/perplexity"] == pytest.approx(2.718281828 ** metrics["train/loss"])
            assert metrics["train/bits_per_byte"] == pytest.approx(metrics["train/loss"] / 0.69314718 / 2)


def test_counting_changes_nothing_of_the_training() -> None:
    with_it, without = (weights(fitted(language(peak_tflops=peak))[0]) for peak in (1.0, None))
    assert differences(with_it, without) == []


def test_frozen_parameters_cost_no_gradient() -> None:
    # Only the three matrices of the last feed-forward layer need a gradient: the output matrix is the frozen embedding.
    e = language(
        peak_tflops=1.0, freeze=["embed_tokens.*", "layers.[01].*", "layers.2.self_attn.*", "layers.2.*norm.*"]
    )
    metrics = fitted(e)[0].metrics
    model = Transformer(**SHAPE)
    forward = palm(model, LENGTH) / 3
    mlp = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.2.mlp."))
    head = model.embed_tokens.weight.numel()
    # The gradients of the three matrices, and of the inputs of two: of the output matrix and of the last of the three.
    backward = 2 * mlp + 2 * head + 2 * mlp // 3
    found = metrics["train/mfu"] * 1e12 / metrics["train/samples_per_second"] / LENGTH
    assert found == pytest.approx(forward + backward)


@pytest.mark.parametrize("peak", [None, 0.0])
def test_where_the_peak_is_not_known_nothing_is_counted(peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.trainer.utilisation.model_flops", lambda *_: pytest.fail("counted"))
    assert "train/mfu" not in fitted(language(peak_tflops=peak))[0].metrics


class OnlyWithValues(nn.Module):
    """A model that reads its own values, which do not exist on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 4))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.weight * (1.0 if self.weight.sum().item() else 0.0)


def test_a_model_that_cannot_be_counted_trains_without_the_figure() -> None:
    trainer, _ = fitted(experiment(model=node(OnlyWithValues), trainer={"peak_tflops": 1.0}))
    assert trainer.step == 4
    assert "train/mfu" not in trainer.metrics
    assert "train/tokens_per_second" not in trainer.metrics  # its loss returns no weight
