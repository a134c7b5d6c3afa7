"""Means over uneven steps and ranks, the best value so far, and the throughput."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raytrainer.errors import ConfigError
from raytrainer.metrics import Monitor, Throughput, WeightedMeans, summarised
from raytrainer.parallel import World
from tests import ranks

CPU = torch.device("cpu")
VALUES = st.tuples(st.floats(-10, 10, width=32), st.integers(0, 50), st.booleans())


def alone() -> WeightedMeans:
    return WeightedMeans(CPU, lambda t: t)


@given(st.lists(VALUES, min_size=1, max_size=20))
def test_a_mean_is_over_the_weights(added: list[tuple[float, int, bool]]) -> None:
    means = alone()
    for value, weight, on_device in added:
        loss = torch.tensor(value)
        means.add({"loss": loss, "twice": 2 * loss.double()}, torch.tensor(weight) if on_device else weight)
    got, flags = means.reduce(1.0, 0.0)
    assert flags == [1.0, 0.0]
    total = sum(weight for _, weight, _ in added)
    if not total:
        assert math.isnan(got["loss"])
        return
    expected = math.fsum(value * weight for value, weight, _ in added) / total
    assert got == pytest.approx({"loss": expected, "twice": 2 * expected}, rel=1e-12, abs=1e-12)
    after, flags = means.reduce(0.5)
    assert math.isnan(after["loss"])
    assert flags == [0.5]


@pytest.mark.parametrize("weight", [0, torch.tensor(0), torch.tensor(0.0)])
def test_what_has_no_weight_adds_nothing(weight: Tensor | float) -> None:
    means = alone()
    means.add({"loss": torch.tensor(2.0)}, 3)
    means.add({"loss": torch.tensor(math.nan)}, weight)
    assert not means.nonfinite()
    assert means.reduce()[0] == {"loss": 2.0}


def test_nothing_added_is_no_mean() -> None:
    assert alone().reduce(1.0) == ({}, [1.0])
    assert not alone().nonfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    means = alone()
    means.add({"loss": torch.tensor(1.0), "other": torch.tensor(bad)}, 1)
    assert means.nonfinite().shape == ()
    assert means.nonfinite()
    means.reduce()
    assert not means.nonfinite()


def test_entries_may_change_between_logs_only() -> None:
    means = alone()
    means.add({"loss": torch.tensor(1.0)}, 1)
    with pytest.raises(ConfigError, match=r"^loss gave loss, more .* and loss for "):
        means.add({"loss": torch.tensor(1.0), "more": torch.tensor(1.0)}, 1)
    means.reduce()
    means.add({"loss": torch.tensor(1.0), "more": torch.tensor(3.0)}, 1)
    assert means.reduce()[0] == {"loss": 1.0, "more": 3.0}


@pytest.mark.parametrize("added", [0, 2])
def test_the_window_survives_in_its_state(added: int) -> None:
    means, again = alone(), alone()
    for value in range(added):
        means.add({"loss": torch.tensor(float(value))}, 2)
    again.load_state_dict(means.state_dict())
    for each in (means, again):
        each.add({"loss": torch.tensor(4.0)}, 4)
    assert again.reduce() == means.reduce()


def test_the_weight_is_what_was_added_here() -> None:
    means, again = alone(), alone()
    assert means.weight == 0
    for weight in (2, torch.tensor(3)):
        means.add({"loss": torch.tensor(1.0)}, weight)
    again.load_state_dict(means.state_dict())
    again.add({"loss": torch.tensor(1.0)}, 10)
    assert (means.reduce(), means.weight) == (({"loss": 1.0}, []), 5)
    assert (again.reduce(), again.weight) == (({"loss": 1.0}, []), 10)  # its clock began after the loaded 5
    again.add({"loss": torch.tensor(1.0)}, 1)
    assert (again.reduce(), again.weight) == (({"loss": 1.0}, []), 1)


def test_a_loss_may_sum_up() -> None:
    class Loss:
        def summary(self, means: Mapping[str, float]) -> dict[str, float]:
            return {"squared": means["loss"] ** 2}

    assert summarised(Loss(), {"loss": 3.0}) == {"loss": 3.0, "squared": 9.0}
    assert summarised(len, {"loss": 3.0}) == {"loss": 3.0}


def test_a_long_window_is_folded_and_stays_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.metrics._FOLD", 3)
    means, again = alone(), alone()
    for value in range(5):
        means.add({"loss": torch.tensor(float(value))}, torch.tensor(value + 1))
    again.load_state_dict(means.state_dict())
    for each in (means, again):
        assert not each.nonfinite()
        each.add({"loss": torch.tensor(10.0)}, 5)
        with pytest.raises(ConfigError):
            each.add({"other": torch.tensor(10.0)}, 5)
    expected = {"loss": pytest.approx((sum(value * (value + 1) for value in range(5)) + 50) / 20)}
    assert [each.reduce()[0] for each in (means, again)] == [expected, expected]
    for later in (math.inf, 1.0, 1.0, 1.0):  # the infinite value is folded into the sums
        means.add({"loss": torch.tensor(later)}, 1)
    assert means.nonfinite()


def on_rank(world: World) -> tuple[dict[str, float], list[float]]:
    means = WeightedMeans(CPU, world.all_reduce)
    means.add({"loss": torch.tensor(float(world.rank))}, world.rank)  # rank r adds the value r with weight r
    return means.reduce(float(world.rank == 1))


def test_ranks_are_weighted_too() -> None:
    assert ranks.run(3, on_rank) == [({"loss": pytest.approx(5 / 3)}, [1.0])] * 3


# -- the best value --------------------------------------------------------------------------------------------------


def follow(monitor: Monitor, values: list[float]) -> list[tuple[float | None, int | None, int]]:
    told = []
    for step, value in enumerate(values, 1):
        monitor.update({"val/loss": value}, step)
        told.append((monitor.value, monitor.step, monitor.without_gain))
    return told


def test_the_best_and_how_long_there_was_none_better() -> None:
    assert follow(Monitor("val/loss", "min"), [3, 3, 4, 2, 2.5]) == [
        (3, 1, 0),
        (3, 1, 1),
        (3, 1, 2),
        (2, 4, 0),
        (2, 4, 1),
    ]
    assert follow(Monitor("val/loss", "max"), [3, 4, 4]) == [(3, 1, 0), (4, 2, 0), (4, 2, 1)]
    # Gains that are too small do not add up: each value is compared with the last best that counted.
    assert follow(Monitor("val/loss", "min", 0.5), [3, 2.6, 2.5, 2.4]) == [(3, 1, 0), (3, 1, 1), (3, 1, 2), (2.4, 4, 0)]


def test_nan_is_never_the_best() -> None:
    told = follow(Monitor("val/loss", "min"), [math.nan, math.nan, 5, math.nan])
    assert told == [(None, None, 1), (None, None, 2), (5, 3, 0), (5, 3, 1)]


def test_another_metric_changes_nothing() -> None:
    monitor = Monitor("val/loss", "min")
    monitor.update({"val/accuracy": 1.0}, 1)
    assert (monitor.value, monitor.without_gain) == (None, 0)


def test_a_monitor_goes_on_from_its_state() -> None:
    monitor, again = Monitor("val/loss", "min"), Monitor("val/loss", "min")
    follow(monitor, [3, 4])
    again.load_state_dict(monitor.state_dict())
    assert follow(again, [3.5, 2]) == follow(monitor, [3.5, 2])


# -- throughput ------------------------------------------------------------------------------------------------------


def test_throughput_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[Any] = [100.0]
    monkeypatch.setattr("raytrainer.metrics.time.perf_counter", lambda: now[0])
    throughput = Throughput()
    for _ in range(4):
        now[0] += 0.5
        throughput.add(10)
    throughput.pause()
    now[0] += 1000
    throughput.go_on()
    assert throughput.rate() == pytest.approx(20)
    assert throughput.seconds == pytest.approx(2)
    throughput.go_on()  # it was not paused, so this does nothing
    now[0] += 1
    assert throughput.rate() == 0
    assert math.isfinite(throughput.rate())  # no time has passed


def test_the_best_value_of_another_metric_or_mode_is_not_taken_over() -> None:
    before = Monitor("val/loss", "min")
    before.update({"val/loss": 0.1}, 5)
    for metric, mode in (("val/accuracy", "max"), ("val/loss", "max")):
        after = Monitor(metric, mode)
        after.load_state_dict(before.state_dict())
        assert (after.value, after.step, after.without_gain) == (None, None, 0)
    recorded = {"value": 0.1, "step": 5, "without_gain": 2}  # an older checkpoint, without the metric's name
    after = Monitor("val/loss", "min")
    after.load_state_dict(recorded)
    assert (after.value, after.step, after.without_gain) == (0.1, 5, 2)
