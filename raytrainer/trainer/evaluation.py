"""Evaluate a `Trainer` on each whole validation set, on all ranks: the figures of the loss, and the `metrics`.

Each sample counts once, and the evaluation does not change the training.
"""

from __future__ import annotations

import contextlib
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer import parallel, seeds
from raytrainer.checkpoint import Checkpointer, CheckpointInfo
from raytrainer.checkpoint.ranks import Ranks
from raytrainer.config import build, checkpoint_mode
from raytrainer.data import Loader
from raytrainer.errors import CheckpointError, CheckpointNotFound, ConfigError, StorageError
from raytrainer.events import EvalEnd
from raytrainer.metrics import Monitor, Names, WeightedMeans, summarised
from raytrainer.optim.protocols import evaluation_weights
from raytrainer.parallel import World
from raytrainer.state import restore_object
from raytrainer.trainer import outputs, snapshot
from raytrainer.trainer.system import modules_of, stateful_part, together

if TYPE_CHECKING:
    from raytrainer.trainer.loop import Trainer

_log = logging.getLogger("raytrainer.trainer")
_LONGEST_VECTOR = 1000  # of a vector; longer ones are not logged


@torch.no_grad()
def evaluate(t: Trainer) -> dict[str, float]:
    """Return the metrics as `val/NAME`, or with several validation sets as `val/SET/NAME`. Every rank calls it.

    It uses the EMA's weights if there are any, and the mean of the batch statistics over ranks.

    Raises:
        ConfigError: There is no validation set, or an entry of `metrics` does not fit the loss or the data.
    """
    if not t.val_loaders:
        raise ConfigError("is not set: there is nothing to evaluate on", key="data.val")
    model = t.raw_model if t.ema_model is None else t.ema_model
    snapshot.follow(t)
    found: dict[str, float] = {}
    everything = together(model, t.loss_state)
    with (
        evaluation_weights(t.optimizer),
        _evaluating(model, t.loss),
        parallel.averaged_buffers(everything, t.world),
        t.example.watching(model),
    ):
        for name, loader in t.val_loaders.items():
            prefix = f"val/{name}/" if name else "val/"
            values = {prefix + key: value for key, value in _over(t, model, loader, prefix).items()}
            found.update(t.names.apart(values, found, ""))
    return found


def _over(t: Trainer, model: nn.Module, loader: Loader, prefix: str) -> dict[str, float]:
    means = WeightedMeans(t.world.device, t.world.all_reduce)
    t.val_metrics.reset()
    with contextlib.closing(loader.one_epoch()) as batches:
        for batch in batches:
            for micro in batch.micro:
                with t.precision.autocast():
                    values = outputs.entries(t.loss(model, t.prepare(micro.data)), t.world.device, training=False)
                t.val_metrics.update(predictions(values), micro.size, values)
                weight = outputs.weight_of(values.pop("weight", micro.size))
                if values:  # a loss may return only predictions for `metrics`
                    means.add(values, weight if micro.size else 0.0)
    reduced = means.reduce()[0]
    metrics = t.val_metrics.compute()
    own = summarised(t.loss, reduced) if reduced else {}
    found = {**t.names.apart(own, metrics, "loss_", prefix), **metrics}
    if not found:
        raise ConfigError(
            "returned neither `loss` nor any other figure in evaluation, and there is nothing in metrics: return "
            "`preds` and `target` and add an object to metrics, or set data.val=null",
            key="loss",
        )
    return found


@contextlib.contextmanager
def _evaluating(model: nn.Module, loss: Any) -> Iterator[None]:
    """Set the model and the loss to eval() within the context; restore all modes and random states after it."""
    kept = seeds.random_state()
    # The mode of each module, because a part that is always in eval(), such as a frozen backbone, must stay so.
    modes = {module: module.training for module in modules_of(model, loss)}
    model.eval()
    if (part := loss if isinstance(loss, nn.Module) else stateful_part(loss)) is not None:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        parallel.reshard(model)
        seeds.set_random_state(kept)


def predictions(values: dict[str, Any]) -> tuple[Any, Any] | None:
    """Remove `preds` and `target` from a loss's result and return them; None unless it has both."""
    found = values.pop("preds", None), values.pop("target", None)
    return None if found[0] is None or found[1] is None else found


def of_checkpoint(t: Trainer, wanted: str, group: Any = None) -> dict[str, Any]:
    """Evaluate a checkpoint in the state in which it was written, and report it to the listeners. Every rank calls it.

    Args:
        t: A trainer built for this, with the checkpoints of the run.
        wanted: `best`, `last`, or a step.
        group: As in `Checkpointer`.

    Returns:
        The fields of `FitResult` as plain values, and the `checkpoint`.

    Raises:
        CheckpointNotFound: There is no such checkpoint (any more).
    """
    info = _restored(t, wanted, Ranks(t.world.rank, t.world.size, group))
    metrics = t.evaluate()
    t.best = Monitor(t.best.metric, checkpoint_mode(t.experiment))  # for the metrics of this evaluation
    t.best.update(metrics, info.step)
    per_epoch = t.train_loader.steps_per_epoch
    epoch = info.step // per_epoch if per_epoch else 0
    t.events.eval_end(t, EvalEnd(info.step, epoch, metrics))
    best = None if t.best.value is None else (t.best.value, info.step)
    found = {"step": info.step, "epoch": epoch, "reason": "finished", "metrics": metrics, "best": best}
    return {**found, "checkpoint": info.name}


def _restored(t: Trainer, wanted: str, ranks: Ranks) -> CheckpointInfo:
    """Restore the wanted checkpoint. If the run deletes it meanwhile, because it still trains, choose again."""
    checkpoints = t.checkpointer
    assert checkpoints is not None
    tried: set[str] = set()
    while True:
        info = ranks.first(lambda: _chosen(checkpoints, wanted))
        try:
            # All ranks finish reading before any restores, because ranks may need each other to restore.
            states: list[Any] = []
            ranks.together(lambda: states.append(checkpoints.load(info, snapshot.template(t))))  # noqa: B023  called at once
            snapshot.restore(t, *states[0], source=info.path, evaluating=True)
            return info
        except (CheckpointError, StorageError):
            if info.name in tried or ranks.first(lambda: info.name in {one.name for one in checkpoints.list()}):  # noqa: B023
                raise
            tried.add(info.name)


def _chosen(checkpoints: Checkpointer, wanted: str) -> CheckpointInfo:
    found = checkpoints.list()
    if wanted == "best" and (best := checkpoints.best()) is not None:
        return best
    named = [info for info in found if wanted in ("best", "last", str(info.step))]
    if not named:
        steps = ", ".join(str(info.step) for info in found)
        raise CheckpointNotFound(f"no checkpoint {wanted}; there are {steps or 'none'}")
    return named[-1]


class Metrics:
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
                raise _too_few(f"data.val.{name}".rstrip("."), loader.length, world.size)
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

    def update(self, found: tuple[Any, Any] | None, size: int, others: Mapping[str, Any]) -> None:
        """Update all metrics with a micro-batch.

        Args:
            found: The result of `predictions`.
            size: The number of its samples that count. With 0 they belong to another rank, and are ignored.
            others: The other entries that the loss has returned.
        """
        if not self._metrics:
            return
        if found is None:
            raise ConfigError(
                f"needs a loss that returns `preds` and `target` too, each a tensor; it returns {', '.join(others)}",
                key="metrics",
            )
        if size:
            for metric in self._metrics.values():
                metric.update(*found)
            self._seen = True

    def compute(self) -> dict[str, float]:
        """Return the values over all ranks, equal on each: `NAME_KEY` for a metric's dict, `NAME_0`, … for a vector."""
        if not self._metrics:
            return {}
        # Before any communication, because a rank that has seen no sample would have states of another shape.
        seen = self._world.all_reduce(torch.tensor(float(self._seen), device=self._world.device))
        if int(seen) < self._world.size:
            raise _too_few("data.val", int(seen), self._world.size)
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
        which = float(zlib.crc32("\n".join(values).encode()))
        same_names = torch.tensor([which, -which], dtype=torch.float64, device=self._world.device)
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
            what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(
                f"gives {what}, not a number: let it average, or wrap it (torchmetrics.ClasswiseWrapper)",
                key=f"metrics.{name}",
            )
        return numbers, []
    found: dict[str, float] = {}
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
            found.update(names.apart(numbers, found, ""))
    if skipped and not found:
        raise ConfigError(f"gives no number, but {', '.join(skipped)}", key=f"metrics.{name}")
    return found, skipped


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


def _too_few(key: str, samples: int, ranks: int) -> ConfigError:
    return ConfigError(
        f"has {samples} sample{'' if samples == 1 else 's'} for {ranks} workers, and each needs one for the metrics",
        key=key,
    )
