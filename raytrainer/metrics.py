"""Means on the device: a step adds to them without waiting, a log reduces them over all workers in one transfer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import ConfigError


class WeightedMeans:
    """Sums of weighted values in float64 on the device.

    Every rank must add the same names in the same order, which a rank without samples does with weight 0.
    """

    def __init__(self, device: torch.device, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._device, self._all_reduce = device, all_reduce
        self._names: list[str] = []
        self._sums: Tensor | None = None  # [len(names) + 1]: value sums, then the weight

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Adds 0-d tensors, each a mean over `weight` samples or tokens.

        Raises:
            ConfigError: Other names than those since the last `reduce`.
        """
        if self._sums is not None and self._names != list(values):
            raise ConfigError(
                f"gave {', '.join(values)} for a batch and {', '.join(self._names)} for one before: it must always give "
                "the same entries in the same order",
                key="loss",
            )
        if self._sums is None:
            self._names = list(values)
            self._sums = torch.zeros(len(values) + 1, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            row = torch.stack([*(v.detach() for v in values.values()), torch.ones((), device=self._device)])
            # An empty slice (weight 0) adds nothing, also where its dummy's loss is not finite.
            if isinstance(weight, Tensor):
                row = torch.where(weight > 0, row.double() * weight, torch.zeros_like(row, dtype=torch.float64))
                self._sums += row
            elif weight:
                self._sums.add_(row, alpha=weight)

    def reduce(self, *flags: float) -> tuple[dict[str, float], list[float]]:
        """The means over all ranks since the last call, and `flags` summed over ranks; waits for the device once."""
        head = self._sums if self._sums is not None else torch.zeros(1, dtype=torch.float64, device=self._device)
        tail = torch.tensor(flags, dtype=torch.float64).to(self._device)
        *sums, weight = (everything := self._all_reduce(torch.cat([head, tail])).tolist())[: len(head)]
        means = {n: s / weight if weight else float("nan") for n, s in zip(self._names, sums, strict=True)}
        self._sums = None
        return means, everything[len(head) :]

    def nonfinite(self) -> Tensor:
        """Whether one of this rank's sums is NaN or infinite: a 0-d bool tensor on the device."""
        if self._sums is None:
            return torch.zeros((), dtype=torch.bool, device=self._device)
        return ~torch.isfinite(self._sums).all()

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._names), "sums": None if self._sums is None else self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names = list(state["names"])
        self._sums = None if state["sums"] is None else state["sums"].to(self._device)


class Throughput:
    """Samples a second between logs, by a clock that only goes forward; evaluation and saving are left out."""

    def __init__(self) -> None:
        self._samples = 0
        self._since = time.perf_counter()
        self._paused_at: float | None = None

    def add(self, samples: int) -> None:
        self._samples += samples

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def go_on(self) -> None:
        if self._paused_at is not None:
            self._since += time.perf_counter() - self._paused_at
            self._paused_at = None

    def rate(self) -> float:
        """Samples a second since the last call."""
        now = time.perf_counter()
        rate = self._samples / max(now - self._since, 1e-9)
        self._samples, self._since = 0, now
        return rate


class Monitor:
    """The best value of a metric so far, its step, and for how many values in a row there was none better.

    NaN is never best and counts as no improvement. `min_delta` is the least gain that counts.
    """

    def __init__(self, metric: str, mode: str, min_delta: float = 0.0) -> None:
        self.metric, self._sign, self._min_delta = metric, 1 if mode == "max" else -1, min_delta
        self.value: float | None = None
        self.step: int | None = None
        self.without_gain = 0

    def update(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metric's value out of an evaluation's; one without it changes nothing."""
        if self.metric not in metrics:
            return
        value = metrics[self.metric]
        gain = math.inf if self.value is None else (value - self.value) * self._sign
        if math.isnan(value) or not gain > self._min_delta:
            self.without_gain += 1
        else:
            self.value, self.step, self.without_gain = value, step, 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "without_gain": self.without_gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.step, self.without_gain = state["value"], state["step"], int(state["without_gain"])
