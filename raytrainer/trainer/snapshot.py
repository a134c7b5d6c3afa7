"""Take everything of a `Trainer` that advances for a checkpoint, and restore it. Exact resume depends on it.

`shared` is the same on every rank and written once; `local` differs by rank, and each rank writes its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raytrainer import parallel, seeds
from raytrainer.errors import CheckpointCorrupt
from raytrainer.optim import mend_fused_sgd
from raytrainer.optim.protocols import evaluation_weights, has_modes
from raytrainer.sharding import placed_as
from raytrainer.state import (
    extra_state,
    named_optimizer_state,
    restore_module,
    restore_object,
    restore_optimizer_state,
    set_extra_state,
    tensors_of,
)

if TYPE_CHECKING:
    from raytrainer.data import Loader
    from raytrainer.trainer.loop import Trainer

_log = logging.getLogger("raytrainer.trainer")


def shared(t: Trainer) -> dict[str, Any]:
    """Return model, optimizer, scheduler, scaler, EMA, position, metrics, best value, … Every rank calls it."""
    # Each object's own state_dict, with its hooks; buffers as the mean over ranks.
    with parallel.holding_mean_buffers(t.system, t.world):
        ema: Any = None
        if t.ema_model is not None:
            follow(t)
            ema = t.ema_model.state_dict()
        # `model` and `loss` have the weights for evaluation and export. If the optimizer trains other weights, those
        # are saved too, because computing them from the former would change the last bits.
        with evaluation_weights(t.optimizer):
            model = t.raw_model.state_dict()
            loss = None if t.loss_state is None else t.loss_state.state_dict()
            for saved in (model, loss or {}) if has_modes(t.optimizer) else ():
                saved.update({k: v.detach().clone() for k, v in saved.items() if isinstance(v, Tensor)})
    training = {name: p.detach() for name, p in t.system.named_parameters() if p.requires_grad}
    state: dict[str, Any] = {
        "step": t.step,
        "model": model,
        "optimizer": named_optimizer_state(t.optimizer, t.system),
        "scheduler": t.scheduler.state_dict() if t.scheduler is not None else None,
        "scaler": t.precision.scaler.state_dict() if t.precision.scaler is not None else None,
        "metrics": t.metrics,
        "evaluated_at": t._evaluated_at,
        "evaluations": t.evaluations,
        "logged_at": t._logged_at,
        "extra": dict(t._extra),
        # Saved only if it is needed, because no other value differs between two identical runs.
        "elapsed": time.monotonic() - t._began if t.experiment.trainer.max_time is not None else 0.0,
        "best": t.best.state_dict(),
        "progress": t._progress.state_dict(),
        **({"objective": t._objective.state_dict()} if t._objective is not t.best else {}),
        # Rank 0's states: a callback's state has to be the same on every rank.
        "callbacks": {k: c.state_dict() for k, c in t.callbacks.items() if hasattr(c, "state_dict")},
    }
    # Entries that few runs have, also from rank 0.
    further = {
        "ema": ema,
        "loss": loss,
        "loss_object": t.loss_object.state_dict() if t.loss_object is not None else None,
        "training": training if has_modes(t.optimizer) else {},
        "metric_objects": t.val_metrics.state_dict(),
        "datasets": _datasets(t),
    }
    return {**state, **{name: value for name, value in further.items() if value}}


def _datasets(t: Trainer) -> dict[str, Any]:
    """Return the states of map-style datasets that have one, by name; the training set's as of the last batch."""
    return {name: one.state_dict() for name, one in _loaders(t).items() if one.keeps_dataset_state}


def _loaders(t: Trainer) -> dict[str, Loader]:
    return {"train": t.train_loader, **{f"val.{name}".rstrip("."): one for name, one in t.val_loaders.items()}}


def follow(t: Trainer) -> None:
    """Copy the model's buffers and extra state, which are not averaged, to the averaged model for its evaluation."""
    if t.ema_model is not None:
        parallel.load_buffers(t.ema_model, dict(t.raw_model.named_buffers()))
        set_extra_state(t.ema_model, extra_state(t.raw_model))


def _with_untrained_loss(t: Trainer, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's optimizer state from before losses were trained, with the loss's groups added."""
    _log.warning(
        "The checkpoint has no state of the loss, so the loss's parameters and buffers have their initial values."
    )
    names = {id(p): name for name, p in t.system.named_parameters()}
    groups = list(saved["groups"])
    for own in t.optimizer.param_groups[len(groups) :]:  # the loss's groups are the last ones
        settings = {key: value for key, value in own.items() if key != "params"}
        groups.append({**settings, "names": [names[id(p)] for p in own["params"]]})
    return {**saved, "groups": groups}


def local(t: Trainer) -> dict[str, Any]:
    """Return random states, this rank's batch statistics, the open log window, and the position in an iterable."""
    state = {
        "random": seeds.random_state(),
        "buffers": dict(t.system.named_buffers()),
        "window": t.window.state_dict(),
        "data": t.train_loader.state_dict(),
    }
    # With one rank, the model's state dict has it. Like buffers, it may differ from rank to rank.
    if not t.world.distributed:
        return state
    return {**state, "extra_state": extra_state(t.system), "datasets": _datasets(t)}


def template(t: Trainer) -> dict[str, Any] | None:
    """Return, for `Checkpointer.load`, which tensors of `shared` each rank reads only as its own shards."""
    if not parallel.is_sharded(t.raw_model):
        return None
    from raytrainer.parallel import fsdp

    def shards(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        return {name: fsdp.like(tensor) for name, tensor in tensors if parallel.is_sharded(tensor)}

    return {
        "model": shards(tensors_of(t.raw_model.state_dict()).items()),
        "ema": shards(tensors_of(t.ema_model.state_dict()).items()) if t.ema_model is not None else {},
        # Some tensors of a parameter's state have its shape, for instance Adam's averages.
        "optimizer": {"state": shards(t.raw_model.named_parameters())},
        "training": shards(t.raw_model.named_parameters()) if has_modes(t.optimizer) else {},
    }


def restore(
    t: Trainer,
    state: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    *,
    source: str,
    changed: Iterable[str] = (),
    evaluating: bool = False,
) -> None:
    """Restore what `shared` and `local` returned, each object through its own `load_state_dict`.

    Args:
        t: A trainer built like the one that was saved.
        state: From `shared`.
        own: From `local`; None if another number of ranks wrote the checkpoint.
        source: Where they come from, for errors.
        changed: Settings of the optimizer that keep their current values.
        evaluating: Whether to skip the state of metrics and datasets, and of a loss that rejects its state, because an
            evaluation may use other ones.

    Raises:
        CheckpointCorrupt: An object rejects its state; the message names the object.
    """
    restore_module(t.raw_model, state["model"], source)
    optimizer = state["optimizer"]
    if t.loss_state is not None:
        if state.get("loss"):
            restore_module(t.loss_state, state["loss"], f"{source}: loss")
        else:
            optimizer = _with_untrained_loss(t, optimizer)
    # A constructor may name a setting of some groups with a prefix: `adamw_lr` is the `lr` of Muon's other groups.
    wanted = [
        {k: v for k, v in group.items() if any(name == k or name.endswith(f"_{k}") for name in changed)}
        for group in t.optimizer.param_groups
    ]
    rates = [group.get("initial_lr", group["lr"]) for group in t.optimizer.param_groups]
    restore_optimizer_state(t.optimizer, t.system, optimizer)
    mend_fused_sgd(t.optimizer)
    for name, p in t.system.named_parameters() if state.get("training") else ():
        if name in state["training"]:
            p.data.copy_(placed_as(p.data, state["training"][name]))
    if t.scheduler is not None:
        restore_object("lr_scheduler", t.scheduler, state["scheduler"], source)
    _change_settings(t, wanted, rates)
    if t.precision.scaler is not None and state.get("scaler"):
        t.precision.scaler.load_state_dict(state["scaler"])
    if t.ema_model is not None:
        restore_module(t.ema_model, state["ema"], source)
    if state.get("loss_object") and t.loss_object is not None:
        try:
            restore_object("loss", t.loss_object, state["loss_object"], source)
        except CheckpointCorrupt as error:
            if not evaluating:
                raise
            _log.warning("The evaluation's loss has its initial state: %s", error)
    for name, callback in t.callbacks.items():
        if name in state["callbacks"]:
            restore_object(f"callbacks.{name}", callback, state["callbacks"][name], source)
    if not evaluating:
        t.val_metrics.load_state_dict(state.get("metric_objects", {}), source)
        _restore_datasets(t, {**state.get("datasets", {}), **(own or {}).get("datasets", {})}, source)
    t.step = t._saved_at = int(state["step"])
    t.metrics, t._extra = dict(state["metrics"]), dict(state["extra"])
    t._elapsed = float(state.get("elapsed", 0.0))
    t.evaluations = int(state.get("evaluations", 0))
    t._evaluated_at, t._logged_at = int(state["evaluated_at"]), int(state["logged_at"])
    t.best.load_state_dict(state["best"])
    t._progress.load_state_dict(state["progress"])
    if t._objective is not t.best and "objective" in state:
        t._objective.load_state_dict(state["objective"])
    if own is not None:
        parallel.load_buffers(t.system, own["buffers"])
        set_extra_state(t.system, own.get("extra_state", {}))
        t.window.load_state_dict(own["window"])
        if not t.train_loader.keeps_dataset_state:
            t.train_loader.load_state_dict(own["data"])
        seeds.set_random_state(own["random"])
    else:  # the same order of samples, but new random numbers
        seeds.seed_everything("train", t.experiment.seed, t.world.rank, t.step)


def _restore_datasets(t: Trainer, states: Mapping[str, Any], source: str) -> None:
    for name, loader in _loaders(t).items():
        if name in states and loader.keeps_dataset_state:
            restore_object(f"data.{name}", loader, states[name], source)


def _change_settings(t: Trainer, wanted: list[dict[str, Any]], rates: list[Any]) -> None:
    """Apply the settings that were given with `resume`, over the checkpoint's."""
    for number, (group, new) in enumerate(zip(t.optimizer.param_groups, wanted, strict=True)):
        if "lr" in new and group.get("initial_lr", group["lr"]) == rates[number]:
            new = {name: value for name, value in new.items() if name != "lr"}  # the same base, so no bit may change
        if "lr" in new:
            # The checkpoint's rate is its base times the curve. Use the same point of the curve with the new base.
            factor = float(group["lr"]) / float(group["initial_lr"]) if group.get("initial_lr") else 1.0
            new = {**new, "lr": rates[number] * factor}
            # A scheduler composed of others keeps the base in each of them.
            for scheduler in (t.scheduler, *getattr(t.scheduler, "_schedulers", ())):
                if hasattr(scheduler, "base_lrs"):
                    group["initial_lr"] = scheduler.base_lrs[number] = rates[number]
        group.update(new)
