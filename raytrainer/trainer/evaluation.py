"""Evaluate a training on each whole validation set, on all ranks: the figures of the loss, and the `metrics`.

Each sample counts once, and the evaluation does not change the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from raytrainer import parallel, seeds
from raytrainer.checkpoint import Checkpointer, CheckpointInfo
from raytrainer.checkpoint.ranks import Ranks
from raytrainer.config import checkpoint_mode
from raytrainer.data import Loader
from raytrainer.errors import CheckpointError, CheckpointNotFound, ConfigError, StorageError
from raytrainer.events import EvalEnd
from raytrainer.metrics import Monitor, WeightedMeans, summarised
from raytrainer.optim.protocols import evaluation_weights
from raytrainer.trainer import outputs, snapshot
from raytrainer.trainer.components import Components
from raytrainer.trainer.system import modules_of, stateful_part, together


@torch.no_grad()
def evaluate(t: Components) -> dict[str, float]:
    """Return the metrics as `val/NAME`, or with several validation sets as `val/SET/NAME`. Every rank calls it.

    It uses the EMA's weights if there are any, and the mean of the batch statistics over ranks.

    Raises:
        ConfigError: There is no validation set, or an entry of `metrics` does not fit the loss or the data.
    """
    if not t.val_loaders:
        raise ConfigError("is not set: there is nothing to evaluate on", key="data.val")
    model = t.raw_model if t.ema_model is None else t.ema_model
    snapshot.follow(t)
    metrics: dict[str, float] = {}
    with (
        evaluation_weights(t.optimizer),
        _evaluating(model, t.loss),
        parallel.averaged_buffers(together(model, t.loss_state), t.world),
        t.example.watching(model),
    ):
        for name, loader in t.val_loaders.items():
            prefix = f"val/{name}/" if name else "val/"
            values = {prefix + key: value for key, value in _over(t, model, loader, prefix).items()}
            metrics.update(t.names.apart(values, metrics, ""))
    return metrics


def _over(t: Components, model: nn.Module, loader: Loader, prefix: str) -> dict[str, float]:
    means = WeightedMeans(t.world.device, t.world.all_reduce)
    t.val_metrics.reset()
    with contextlib.closing(loader.one_epoch()) as batches:
        for batch in batches:
            for micro in batch.micro:
                with t.precision.autocast():
                    values = outputs.entries(t.loss(model, t.prepare(micro.data)), t.world.device, training=False)
                t.val_metrics.update(outputs.take_predictions(values), micro.size, values)
                weight = outputs.weight_of(values.pop("weight", micro.size))
                if values:  # a loss may return only predictions for `metrics`
                    means.add(values, weight if micro.size else 0.0)
    reduced = means.reduce()[0]
    metrics = t.val_metrics.compute()
    of_loss = summarised(t.loss, reduced) if reduced else {}
    values = {**t.names.apart(of_loss, metrics, "loss_", prefix), **metrics}
    if not values:
        raise ConfigError(
            "returned neither `loss` nor any other figure in evaluation, and there is nothing in metrics: return "
            "`preds` and `target` and add an object to metrics, or set data.val=null",
            key="loss",
        )
    return values


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


def of_checkpoint(t: Components, checkpointer: Checkpointer, wanted: str, group: Any = None) -> dict[str, Any]:
    """Evaluate a checkpoint in the state in which it was written, and report it to the listeners. Every rank calls it.

    Args:
        t: The components, built for this.
        checkpointer: The checkpoints of the run.
        wanted: `best`, `last`, or a step.
        group: As in `Checkpointer`.

    Returns:
        The fields of `FitResult` as plain values, and the `checkpoint`.

    Raises:
        CheckpointNotFound: There is no such checkpoint (any more).
    """
    info = _restored(t, checkpointer, wanted, Ranks(t.world.rank, t.world.size, group))
    metrics = evaluate(t)
    best = t.state.best = Monitor(t.state.best.metric, checkpoint_mode(t.experiment))  # for these metrics alone
    best.update(metrics, info.step)
    t.events.send(t, EvalEnd(info.step, t.epoch, metrics))
    return {
        "step": info.step,
        "epoch": t.epoch,
        "reason": "finished",
        "metrics": metrics,
        "best": None if best.value is None else (best.value, info.step),
        "checkpoint": info.name,
    }


def _restored(t: Components, checkpointer: Checkpointer, wanted: str, ranks: Ranks) -> CheckpointInfo:
    """Restore the wanted checkpoint. If the run deletes it meanwhile, because it still trains, choose again."""
    tried: set[str] = set()
    while True:
        info = ranks.first(lambda: _chosen(checkpointer, wanted))
        try:
            # All ranks finish reading before any restores, because ranks may need each other to restore.
            states: list[Any] = []
            ranks.together(lambda: states.append(checkpointer.load(info, snapshot.template(t))))  # noqa: B023  called at once
            snapshot.restore(t, *states[0], source=info.path, evaluating=True)
            return info
        except (CheckpointError, StorageError):
            if info.name in tried or ranks.first(lambda: info.name in {c.name for c in checkpointer.list()}):  # noqa: B023
                raise
            tried.add(info.name)


def _chosen(checkpointer: Checkpointer, wanted: str) -> CheckpointInfo:
    checkpoints = checkpointer.list()
    if wanted == "best" and (best := checkpointer.best()) is not None:
        return best
    matching = [info for info in checkpoints if wanted in ("best", "last", str(info.step))]
    if not matching:
        steps = ", ".join(str(info.step) for info in checkpoints)
        raise CheckpointNotFound(f"no checkpoint {wanted}; there are {steps or 'none'}")
    return matching[-1]
