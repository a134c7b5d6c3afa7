"""The objects of section `metrics`, and how their results become named numbers."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytrainer.config import build
from raytrainer.data import Loader
from raytrainer.errors import ConfigError
from raytrainer.metrics import Names
from raytrainer.parallel import World
from raytrainer.state import restore_object

_log = logging.getLogger("raytrainer.trainer")
_LONGEST_VECTOR = 1000  # of a vector; longer ones are not logged


class EvaluationMetrics:
    """The objects of section `metrics`, which see each sample of a validation set once.

    They are metrics of torchmetrics, or objects with `update(preds, target)`, `compute()` and `reset()` whose `compute`
    reduces over ranks itself.

    Args:
        nodes: NAME → `_target_` node; null omits the metric.
        loaders: The loaders of the validation sets.
        world: This process among all.
        names: Distinguishes results of two metrics that have the same name.

    Raises:
        ConfigError: A set has fewer samples than there are ranks. Each rank needs one, because a metric's state gets
            its shape from the first samples.
    """

    def __init__(
        self, nodes: Mapping[str, Any], loaders: Mapping[str, Loader], world: World, names: Names | None = None
    ) -> None:
        self._world, self._metrics = world, {name: build(node) for name, node in nodes.items() if node}
        for name, metric in self._metrics.items():
            if lacks := [m for m in ("update", "compute", "reset") if not callable(getattr(metric, m, None))]:
                raise ConfigError(
                    f"builds a {type(metric).__name__}, which has no {lacks[0]}(). A metric has update(preds, target), "
                    "compute() and reset()",
                    key=f"metrics.{name}",
                )
            if hasattr(metric, "to"):
                metric.to(world.device)
        for name, loader in loaders.items() if self._metrics else ():
            if loader.length is not None and loader.length < world.size:
                raise too_few_samples(f"data.val.{name}".rstrip("."), loader.length, world.size)
        self._seen = False
        self._names, self._skipped = names or Names(), set[str]()

    def reset(self) -> None:
        for metric in self._metrics.values():
            metric.reset()
        self._seen = False

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the metrics that have one, by name, as between two evaluations."""
        states = {name: m.state_dict() for name, m in self._metrics.items() if callable(getattr(m, "state_dict", None))}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any], source: str = "the state") -> None:
        """Restore the state of each metric. CheckpointCorrupt names a metric that rejects its state."""
        for name in state.keys() & self._metrics.keys():
            restore_object(f"metrics.{name}", self._metrics[name], state[name], source)

    def objects(self) -> Mapping[str, Any]:
        """The metrics by name."""
        return self._metrics

    def update(self, predictions: tuple[Any, Any] | None, size: int, others: Mapping[str, Any]) -> None:
        """Update all metrics with a micro-batch.

        Args:
            predictions: The result of `outputs.take_predictions`.
            size: The number of its samples that count. With 0 they belong to another rank, and are ignored.
            others: The other entries that the loss has returned.
        """
        if not self._metrics:
            return
        if predictions is None:
            raise ConfigError(
                f"needs a loss that returns `preds` and `target` too, each a tensor; it returns {', '.join(others)}",
                key="metrics",
            )
        if size:
            for metric in self._metrics.values():
                metric.update(*predictions)
            self._seen = True

    def compute(self) -> dict[str, float]:
        """Return the values over all ranks, equal on each: `NAME_KEY` for a metric's dict, `NAME_0`, … for a vector."""
        if not self._metrics:
            return {}
        # Before any communication, because a rank that has seen no sample would have states of another shape.
        seen = self._world.all_reduce(torch.tensor(float(self._seen), device=self._world.device))
        if int(seen) < self._world.size:
            raise too_few_samples("data.val", int(seen), self._world.size)
        values: dict[str, float] = {}
        for name, metric in self._metrics.items():
            numbers, skipped = numbers_of(name, metric.compute())
            values.update(self._names.apart(numbers, values, ""))
            if skipped and name not in self._skipped:
                self._skipped.add(name)
                if self._world.rank == 0:
                    _log.warning("metrics.%s: these results are not numbers and are not logged: %s", name, skipped)
        self.reset()  # their state may hold every prediction
        return self._agreed(values)

    def _agreed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values, equal to the last bit on all ranks, because decisions depend on them."""
        # First compare the number and names of the values, because all ranks must reduce the same ones together.
        checksum = float(zlib.crc32("\n".join(values).encode()))
        same_names = torch.tensor([checksum, -checksum], dtype=torch.float64, device=self._world.device)
        high_low = self._world.all_reduce(same_names, dist.ReduceOp.MAX).tolist()
        if high_low[0] != -high_low[1]:
            raise ConfigError(
                "give each rank values of other names: compute() must reduce over the ranks (torch.distributed), as "
                f"those of torchmetrics do; here they are {', '.join(values)}",
                key="metrics",
            )
        own = torch.tensor(list(values.values()), dtype=torch.float64)
        own = torch.where(own.isnan(), torch.finfo(torch.float64).max, own).to(self._world.device)
        high, low = self._world.all_reduce(torch.stack([own, -own]), dist.ReduceOp.MAX)
        same = torch.isclose(high, -low, rtol=1e-6, atol=1e-6).tolist()
        if not all(same):
            name = list(values)[same.index(False)]
            raise ConfigError(
                "gives each rank another value: its compute() must reduce over the ranks (torch.distributed), as "
                "those of torchmetrics do",
                key=f"metrics.{name}",
            )
        nan = torch.finfo(torch.float64).max
        return {name: float("nan") if v == nan else v for name, v in zip(values, high.tolist(), strict=True)}


def numbers_of(name: str, value: Any) -> tuple[dict[str, float], list[str]]:
    """Return a metric's result as numbers, and the names of a dict's entries that are not numbers.

    A vector becomes `NAME_0`, `NAME_1`, …. If a dict has `classes`, the classes of its vectors in order (torchmetrics'
    MeanAveragePrecision), the numbers are named after the classes, and a `…_per_class` of -1 is disabled and ignored.

    Raises:
        ConfigError: It contains no number.
    """
    if not isinstance(value, Mapping):
        numbers = _expanded(name, value)
        if numbers is None:
            kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(
                f"gives {kind}, not a number: let it average, or wrap it (torchmetrics.ClasswiseWrapper)",
                key=f"metrics.{name}",
            )
        return numbers, []
    results: dict[str, float] = {}
    skipped: list[str] = []
    classes = _classes(value.get("classes"))
    names = Names()
    for old, entry in value.items():
        if old == "classes" and classes is not None:
            continue
        if classes is not None and str(old).endswith("_per_class") and isinstance(entry, Tensor):
            if entry.numel() == 1 and float(entry) == -1:
                continue
            entry = entry.reshape(-1)
        # Only characters that MLflow allows in a name.
        key = re.sub(r"[^\w.\- ]", "_", f"{name}_{old}")
        try:
            numbers = numbers_of(key, entry)[0] if isinstance(entry, Mapping) else _expanded(key, entry, classes)
        except ConfigError:
            numbers = None
        if numbers is None:
            skipped.append(str(old))
        else:
            results.update(names.apart(numbers, results, ""))
    if skipped and not results:
        raise ConfigError(f"gives no number, but {', '.join(skipped)}", key=f"metrics.{name}")
    return results, skipped


def _expanded(name: str, value: Any, classes: list[int] | None = None) -> dict[str, float] | None:
    """Return a number, or each number of a vector, by name; None for any other value."""
    try:
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        numbers = value.detach().double()
    except (TypeError, ValueError, RuntimeError):
        return None
    if numbers.ndim == 1 and classes is not None and len(numbers) == len(classes):
        labels: list[int] = classes
    elif numbers.numel() == 1:
        return {name: numbers.item()}
    elif numbers.ndim == 1 and len(numbers) <= _LONGEST_VECTOR:
        labels = list(range(len(numbers)))
    else:
        return None
    return {f"{name}_{label}": number for label, number in zip(labels, numbers.tolist(), strict=True)}


def _classes(value: Any) -> list[int] | None:
    """Return class numbers from an integer tensor with at most one dimension; None for any other value."""
    if isinstance(value, Tensor) and value.ndim < 2 and not (value.is_floating_point() or value.is_complex()):
        return [int(label) for label in value.reshape(-1).tolist()]
    return None


def too_few_samples(key: str, samples: int, ranks: int) -> ConfigError:
    return ConfigError(
        f"has {samples} sample{'' if samples == 1 else 's'} for {ranks} workers, and each needs one for the metrics",
        key=key,
    )
