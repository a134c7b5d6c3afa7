"""Collect everything that advances in a training for a checkpoint, and restore it. Exact resume depends on it.

`shared` is the same on every rank and written once; `local` differs by rank, and each rank writes its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from raytrainer import parallel, seeds
from raytrainer.data import Loader
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
from raytrainer.trainer.components import Components
from raytrainer.trainer.optimizer_settings import apply_changes, changes_of

_log = logging.getLogger("raytrainer.trainer")


def shared(t: Components) -> dict[str, Any]:
    """Return model, optimizer, scheduler, scaler, EMA, position, metrics, best value, … Every rank calls it."""
    model, loss, ema = _module_states(t)
    scaler = t.precision.scaler
    state: dict[str, Any] = {
        "step": t.step,
        "model": model,
        "optimizer": named_optimizer_state(t.optimizer, t.system),
        "scheduler": t.scheduler.state_dict() if t.scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        **t.state.state_dict(timed=t.experiment.trainer.max_time is not None),
        # Rank 0's states: a callback's state has to be the same on every rank.
        "callbacks": {k: c.state_dict() for k, c in t.callbacks.items() if hasattr(c, "state_dict")},
    }
    # Entries that few runs have, also from rank 0.
    optional = {
        "ema": ema,
        "loss": loss,
        "loss_object": t.loss_object.state_dict() if t.loss_object is not None else None,
        "training": _trained(t) if has_modes(t.optimizer) else {},
        "metric_objects": t.val_metrics.state_dict(),
        "datasets": _datasets(t),
    }
    return {**state, **{name: value for name, value in optional.items() if value}}


def _module_states(t: Components) -> tuple[Any, Any, Any]:
    """Return the state dicts of the model, the loss and the EMA, with their hooks; buffers as the mean over ranks."""
    ema: Any = None
    with parallel.holding_mean_buffers(t.system, t.world):
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
    return model, loss, ema


def _trained(t: Components) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in t.system.named_parameters() if p.requires_grad}


def _datasets(t: Components) -> dict[str, Any]:
    """Return the states of map-style datasets that have one, by name; the training set's as of the last batch."""
    return {name: loader.state_dict() for name, loader in _loaders(t).items() if loader.keeps_dataset_state}


def _loaders(t: Components) -> dict[str, Loader]:
    return {"train": t.train_loader, **{f"val.{name}".rstrip("."): x for name, x in t.val_loaders.items()}}


def follow(t: Components) -> None:
    """Copy the model's buffers and extra state, which are not averaged, to the averaged model for its evaluation."""
    if t.ema_model is not None:
        parallel.load_buffers(t.ema_model, dict(t.raw_model.named_buffers()))
        set_extra_state(t.ema_model, extra_state(t.raw_model))


def local(t: Components) -> dict[str, Any]:
    """Return random states, this rank's batch statistics, the open log window, and the position in an iterable."""
    state = {
        "random": seeds.random_state(),
        "buffers": dict(t.system.named_buffers()),
        "window": t.window.state_dict(),
        "data": t.train_loader.state_dict(),
    }
    # With one rank, `shared` has both already. Like buffers, extra state and datasets may differ from rank to rank.
    if not t.world.distributed:
        return state
    return {**state, "extra_state": extra_state(t.system), "datasets": _datasets(t)}


def template(t: Components) -> dict[str, Any] | None:
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
    t: Components,
    state: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    *,
    source: str,
    changed: Iterable[str] = (),
    evaluating: bool = False,
) -> None:
    """Restore what `shared` and `local` returned, each object through its own `load_state_dict`.

    Args:
        t: Components built like those that were saved.
        state: From `shared`.
        own: From `local`; None if another number of ranks wrote the checkpoint.
        source: Where they come from, for errors.
        changed: Settings of the optimizer that keep their current values.
        evaluating: Whether to skip the state of metrics and datasets, and of a loss that rejects its state, because an
            evaluation may use other ones.

    Raises:
        CheckpointCorrupt: An object rejects its state; the message names the object.
    """
    _restore_trained(t, state, source, changed)
    _restore_objects(t, state, source, evaluating=evaluating)
    if not evaluating:
        t.val_metrics.load_state_dict(state.get("metric_objects", {}), source)
        _restore_datasets(t, {**state.get("datasets", {}), **(own or {}).get("datasets", {})}, source)
    t.state.load_state_dict(state)
    if own is not None:
        parallel.load_buffers(t.system, own["buffers"])
        set_extra_state(t.system, own.get("extra_state", {}))
        t.window.load_state_dict(own["window"])
        if not t.train_loader.keeps_dataset_state:
            t.train_loader.load_state_dict(own["data"])
        seeds.set_random_state(own["random"])
    else:  # the same order of samples, but new random numbers
        seeds.seed_everything("train", t.experiment.seed, t.world.rank, t.step)


def _restore_trained(t: Components, state: Mapping[str, Any], source: str, changed: Iterable[str]) -> None:
    """Restore the weights, and the optimizer with its scheduler and scaler."""
    restore_module(t.raw_model, state["model"], source)
    optimizer_state = state["optimizer"]
    if t.loss_state is not None:
        if state.get("loss"):
            restore_module(t.loss_state, state["loss"], f"{source}: loss")
        else:
            optimizer_state = _with_untrained_loss(t, optimizer_state)
    changes = changes_of(t.optimizer, changed)
    restore_optimizer_state(t.optimizer, t.system, optimizer_state)
    mend_fused_sgd(t.optimizer)
    training = state.get("training") or {}
    for name, p in t.system.named_parameters() if training else ():
        if name in training:
            p.data.copy_(placed_as(p.data, training[name]))
    if t.scheduler is not None:
        restore_object("lr_scheduler", t.scheduler, state["scheduler"], source)
    apply_changes(t.optimizer, t.scheduler, changes)
    if t.precision.scaler is not None and state.get("scaler"):
        t.precision.scaler.load_state_dict(state["scaler"])
    if t.ema_model is not None:
        restore_module(t.ema_model, state["ema"], source)


def _with_untrained_loss(t: Components, saved: Mapping[str, Any]) -> Mapping[str, Any]:
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


def _restore_objects(t: Components, state: Mapping[str, Any], source: str, *, evaluating: bool) -> None:
    """Restore the loss's own object, and the callbacks."""
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


def _restore_datasets(t: Components, states: Mapping[str, Any], source: str) -> None:
    for name, loader in _loaders(t).items():
        if name in states and loader.keeps_dataset_state:
            restore_object(f"data.{name}", loader, states[name], source)
