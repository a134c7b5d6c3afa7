"""Micro-batches and ranks of weight 0 add nothing to the gradient, even if their loss is NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrainer.config import Experiment
from raytrainer.data import Arrays
from raytrainer.errors import ConfigError
from raytrainer.parallel import World
from raytrainer.trainer import Trainer
from tests import ranks
from tests.training import experiment, fitted, node


def masked(rows: int = 12, every: int = 3, sparse: bool = False) -> Arrays:
    """Return rows `[4]`, and whether each counts: every third does not. Its input is NaN, as padding may be."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.arange(rows) % every != 0
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    x[~counts] = torch.nan
    return Arrays({"x": x, "counts": counts, "ids": torch.arange(rows) % 5})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.hidden(x))).squeeze(1)
        return found


def mean_of_nothing(model: nn.Module, batch: Any, kind: str = "float") -> dict[str, Any]:
    """Return a masked mean as everybody writes it: 0/0 if nothing counts. With NaN in the inputs, the model's own
    derivatives are NaN too."""
    counts = batch["counts"]
    each = (model(batch["x"][counts]) - 1).square() if counts.any() else (model(batch["x"]) - 1).square()
    number = counts.sum()
    loss = each.mean() if counts.any() else each.sum() / number
    weights: dict[str, Any] = {
        "float": number.to(loss.dtype),
        "int": number,
        "python": int(number),
        "one": number.reshape(1),
        "numpy": number.numpy(),
    }
    return {"loss": loss, "weight": weights[kind]}


def case(micro: int | None = 1, kind: str = "float", every: int = 3, **trainer: Any) -> Experiment:
    return experiment(
        model=node(Net),
        loss=node(mean_of_nothing, _partial_=True, kind=kind),
        optimizer=node("torch.optim.SGD", lr=0.1, momentum=0.9),
        data={
            "train": node(masked, every=every),
            "val": None,
            "shuffle": False,
            "global_batch_size": 12,
            "micro_batch_size": micro,
        },
        trainer={"precision": "64-true", "max_steps": 3, **trainer},
    )


def end(world: World, e: Experiment, reads_cpu: bool = True) -> tuple[dict[str, Tensor], dict[int, float]]:
    from tests.training import Recorder

    recorder = Recorder()
    trainer = Trainer(e, world=world, listeners=[recorder])
    trainer.gradients.zero_weights.reads_cpu = reads_cpu
    trainer.fit()
    state: dict[str, Any] = trainer.raw_model.state_dict()
    return {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in state.items()}, recorder.series("train/loss")


def assert_same(got: tuple[dict[str, Tensor], Any], expected: tuple[dict[str, Tensor], Any]) -> None:
    assert got[1] == pytest.approx(expected[1], rel=1e-9)
    for name, value in expected[0].items():
        assert bool(value.isfinite().all())
        torch.testing.assert_close(got[0][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reads_cpu", [True, False])
def test_micro_batches(reads_cpu: bool) -> None:
    whole = end(World(), case(None))
    for kind in ("float", "int", "one", "python", "numpy"):
        assert_same(end(World(), case(1, kind), reads_cpu), whole)
    assert_same(end(World(), case(1, max_grad_norm=0.1), reads_cpu), end(World(), case(None, max_grad_norm=0.1)))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks(strategy: str) -> None:
    # With one sample in a micro-batch, one rank has weight 0 while the other has not, also in the last micro-batch.
    for reads_cpu in (True, False):
        for e in (case(1, strategy=strategy), case(None, every=2, strategy=strategy)):
            expected = end(World(), case(None, every=2 if e.data.micro_batch_size is None else 3))
            for got in ranks.run(2, end, e, reads_cpu):
                assert_same(got, expected)


def rank_without(world: World, strategy: str, reads_cpu: bool) -> tuple[dict[str, Tensor], dict[int, float]]:
    e = case(None, strategy=strategy)
    e.data.train = node(half)
    return end(world, e, reads_cpu)


def half() -> Arrays:
    """Return rows whose first half does not count. Rank 0 of 2 gets only that half."""
    found = masked(12, 12)
    found.tensors["counts"][:6] = False
    found.tensors["x"][:6] = torch.nan
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_of_weight_0(strategy: str) -> None:
    expected = rank_without(World(), "ddp", True)
    for reads_cpu in (True, False):
        for got in ranks.run(2, rank_without, strategy, reads_cpu):
            assert_same(got, expected)


@pytest.mark.parametrize("reads_cpu", [True, False])
def test_a_batch_of_weight_0_changes_nothing_and_has_no_mean(reads_cpu: bool) -> None:
    e = case(4, every=1)
    weights, losses = end(World(), e, reads_cpu)
    assert losses == {}  # no mean is logged, so no NaN ends the run
    assert all(bool(w.isfinite().all()) for w in weights.values())
    initial = Trainer(e).raw_model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in initial.items())


def test_a_scaler_sees_no_overflow() -> None:
    e = case(1, precision="16-mixed")
    e.optimizer = node("torch.optim.SGD", lr=0.1, fused=True)
    trainer, _ = fitted(e)
    assert trainer.precision.scaler is not None
    assert trainer.precision.scaler.get_scale() == 65536.0
    assert all(bool(p.isfinite().all()) for p in trainer.raw_model.parameters())


def plain_zero(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return a plain 0 if nothing counts."""
    counts = batch["counts"]
    if not counts.any():
        return {"loss": torch.zeros(()), "weight": 0}
    return {"loss": (model(batch["x"][counts]) - 1).square().mean(), "weight": counts.sum()}


def test_a_loss_may_return_a_plain_0_where_nothing_counts() -> None:
    e = case(1)
    e.loss = node(plain_zero, _partial_=True)
    assert_same(end(World(), e), end(World(), case(None)))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 1, sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids).squeeze(1)
        return found


def sparse_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    each = (model(batch["ids"]) - 1).square() * batch["counts"]
    return {"loss": each.sum() / batch["counts"].sum(), "weight": batch["counts"].sum()}


@pytest.mark.parametrize("reads_cpu", [True, False])
def test_sparse_gradients(reads_cpu: bool) -> None:
    def of(micro: int | None) -> Experiment:
        e = case(micro, max_grad_norm=0.1)
        e.model, e.loss = node(Sparse), node(sparse_loss, _partial_=True)
        return e

    assert_same(end(World(), of(1), reads_cpu), end(World(), of(None)))


def weighing(model: nn.Module, batch: Any, weight: float, plain: bool) -> dict[str, Any]:
    loss = model(torch.nan_to_num(batch["x"])).square().mean()
    return {"loss": loss, "weight": weight if plain else torch.tensor(weight)}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("plain", [True, False])
def test_a_weight_that_cannot_be_is_refused(weight: float, plain: bool) -> None:
    for reads_cpu in (True, False):
        e = case(None, max_steps=1)
        e.loss = node(weighing, _partial_=True, weight=weight, plain=plain)
        with pytest.raises(ConfigError, match=r"^loss returned .* below 0.* return 0 where nothing counts"):
            end(World(), e, reads_cpu)
