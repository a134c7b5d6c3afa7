"""Means on the device: a step adds to them without waiting, and a log reduces them over all workers in one transfer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import ConfigError

BAD_WEIGHT = (
    "returned {given} below 0, infinite or NaN. 'weight' is the number of samples or tokens that the mean 'loss' is over; "
    "return 0 where nothing counts"
)

_FOLD = 4096  # rows kept before they are summed, which limits memory without waiting for the device


class WeightedMeans:
    """Weighted means, kept on the device as one row per `add` and summed in float64 when they are read.

    Every rank must add the same names in the same order; a rank without samples adds them with weight 0. A checkpoint
    saves the rows, so that a resumed run adds up its sums in the same order.

    Attributes:
        weight: The weight that all ranks added up to the last `reduce`, without the weight loaded from a checkpoint.
        empty: Whether the weight was 0 at the last `reduce`, so that there is no mean.
    """

    def __init__(self, device: torch.device, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self._device, self._all_reduce = device, all_reduce
        self._names: list[str] = []
        self.weight, self.empty = 0.0, True
        self._clear()

    def _clear(self) -> None:
        self._rows: list[Tensor] = []  # each [len(names)]
        self._weights: list[Tensor | float] = []
        self._sums: Tensor | None = None  # [len(names) + 1], float64: the sums of earlier rows, then their weight
        self._loaded: Tensor | None = None  # 0-d, float64: the weight that a checkpoint had
        self._bad = torch.zeros(
            (), dtype=torch.float64, device=self._device
        )  # 0-d: number of weights below 0, infinite or NaN
        self._bad_folded = self._bad  # those in `_sums`

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Add 0-d tensors, each a mean over `weight` samples or tokens.

        Raises:
            ConfigError: The names differ from those since the last `reduce`.
        """
        if not self._rows and self._sums is None:
            self._names = list(values)
        elif self._names != list(values):
            raise ConfigError(
                f"gave {', '.join(values)} for a batch and {', '.join(self._names)} for one before: it must always give "
                "the same entries in the same order",
                key="loss",
            )
        # A copy, in one operation, because the next step may overwrite a compiled model's outputs.
        row = [v.detach() for v in values.values()]
        self._rows.append(torch.stack(row) if row else torch.zeros(0, device=self._device))
        self._weights.append(weight)
        if len(self._rows) == _FOLD:
            self._sums = self._folded()
            self._bad_folded = self._bad
            self._rows, self._weights = [], []

    def reduce(self, *flags: float) -> tuple[dict[str, float], list[float]]:
        """Return the means over all ranks since the last call, and `flags` summed over ranks; wait for the device once.

        Raises:
            ConfigError: On all ranks, if a weight on some rank was below 0, infinite or NaN.
        """
        head = self._folded()
        added = head[-1:] if self._loaded is None else head[-1:] - self._loaded
        tail = torch.tensor(flags, dtype=torch.float64).to(self._device)
        reduced = self._all_reduce(torch.cat([head, added, self._bad.reshape(1), tail])).tolist()
        *sums, weight, self.weight, bad = reduced[: len(head) + 2]
        self.empty = weight == 0
        means = {n: s / weight if weight else float("nan") for n, s in zip(self._names, sums, strict=True)}
        self._clear()
        if bad:
            raise ConfigError(BAD_WEIGHT.format(given="a weight that is"), key="loss")
        return means, reduced[len(head) + 2 :]

    def nonfinite(self) -> Tensor:
        """Return whether one of this rank's sums is NaN or infinite: a 0-d bool tensor on the device."""
        return ~torch.isfinite(self._folded()).all()

    def _folded(self) -> Tensor:
        """Return all sums and the weight: float64 [len(names) + 1]."""
        if not self._rows:
            empty = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=self._device)
            return empty if self._sums is None else self._sums
        weights = self._weight_column()
        # Checked only here: the host does not know weights on a device, and asking in each step would wait.
        self._bad = self._bad_folded + (~(weights >= 0) | weights.isinf()).sum()
        # A row of weight 0 (a stand-in for an empty slice) adds nothing, even if its loss is not finite.
        rows = torch.where(weights > 0, torch.stack(self._rows).double(), 0.0)
        sums = torch.cat([(rows * weights).sum(0), weights.sum(0)])
        return sums if self._sums is None else self._sums + sums

    def _weight_column(self) -> Tensor:
        """Return the weights as float64 [rows, 1]."""
        if any(isinstance(w, Tensor) for w in self._weights):
            column = [torch.as_tensor(w, dtype=torch.float64, device=self._device) for w in self._weights]
            return torch.stack(column).unsqueeze(1)
        return torch.tensor(self._weights, dtype=torch.float64).to(self._device).unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self._names),
            "rows": torch.stack(self._rows) if self._rows else None,
            "weights": self._weight_column() if self._rows else None,
            "sums": self._sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._clear()
        self._names = list(state["names"])
        if state["rows"] is not None:
            self._rows = list(state["rows"].to(self._device))
            self._weights = list(state["weights"].to(self._device).squeeze(1))
        self._sums = None if state["sums"] is None else state["sums"].to(self._device)
        self._loaded = self._folded()[-1]


def summarised(loss: Any, means: Mapping[str, float]) -> dict[str, float]:
    """Return the means, and the results of the loss's own `summary(means)` if it has one (such as perplexity)."""
    summary = getattr(loss, "summary", None)
    return dict(means) if summary is None else {**means, **summary(means)}


OWN_NAMES = ("lr", "samples_per_second", "tokens_per_second", "mfu")
"""Names of raytrainer's own figures in `train/`: a loss's entry of such a name is logged under another."""


class Names:
    """Distinguishes figures of one name from two sources: the one with lower priority is logged under another name.

    Args:
        say: Called with a sentence, once for each name.
    """

    def __init__(self, say: Callable[[str], None] = lambda sentence: None) -> None:
        self._say, self._reported = say, set[str]()

    def apart(self, values: Mapping[str, Any], taken: Container[str], prefix: str, shown: str = "") -> dict[str, Any]:
        """Return the values under names that are not taken.

        Args:
            values: Name → value.
            taken: The names of the other source.
            prefix: Put before a name that is taken. If it is empty or the result is taken, too, a number is appended.
            shown: The prefix of all names in the log, for messages.
        """
        apart: dict[str, Any] = {}
        for name, value in values.items():
            free = name
            if free in taken:
                free = prefix + name
                number = 1
                while free in taken or free in apart or free in values:
                    number += 1
                    free = f"{prefix}{name}_{number}"
                if shown + free not in self._reported:
                    self._reported.add(shown + free)
                    self._say(
                        f"The metric name {shown + name!r} is in use for another figure: the value that your code "
                        f"gives is logged as {shown + free!r}."
                    )
            apart[free] = value
        return apart


class Throughput:
    """Samples per second between logs, by a monotonic clock, without the time for evaluation and saving.

    Attributes:
        seconds: The time between the last two calls of `rate`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
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
        """Return the samples per second since the last call."""
        now = time.perf_counter()
        self.seconds = max(now - self._since, 1e-9)
        rate = self._samples / self.seconds
        self._samples, self._since = 0, now
        return rate


class Monitor:
    """The best value of a metric so far, its step, and the number of values since then that were not better.

    NaN is never best and counts as no improvement. `min_delta` is the gain that a better value must exceed.
    """

    def __init__(self, metric: str, mode: str, min_delta: float = 0.0) -> None:
        self.metric, self.mode, self._min_delta = metric, mode, min_delta
        self._sign = 1 if mode == "max" else -1
        self.value: float | None = None
        self.step: int | None = None
        self.without_gain = 0

    def update(self, metrics: Mapping[str, float], step: int) -> None:
        """Read the metric from an evaluation's metrics; without it, nothing changes."""
        if self.metric not in metrics:
            return
        value = metrics[self.metric]
        gain = math.inf if self.value is None else (value - self.value) * self._sign
        if math.isnan(value) or not gain > self._min_delta:
            self.without_gain += 1
        else:
            self.value, self.step, self.without_gain = value, step, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "mode": self.mode,
            "value": self.value,
            "step": self.step,
            "without_gain": self.without_gain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (state.get("metric", self.metric), state.get("mode", self.mode)) != (self.metric, self.mode):
            return  # a resumed run may have another metric, for which the old best value is meaningless
        self.value, self.step, self.without_gain = state["value"], state["step"], int(state["without_gain"])
