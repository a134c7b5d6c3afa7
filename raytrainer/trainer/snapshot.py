"""Everything of a `Trainer` that advances, taken for a checkpoint and put back: what exact resume stands on.

`shared` is the same on every rank and written once; `local` differs by rank and is written by each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raytrainer import parallel, seeds
from raytrainer.optim import mend_fused_sgd
from raytrainer.state import load_weights, named_optimizer_state, restore_optimizer_state

if TYPE_CHECKING:
    from raytrainer.trainer.loop import Trainer


def shared(t: Trainer) -> dict[str, Any]:
    """Model, optimizer, scheduler, scaler, EMA, position, metrics, best value, callbacks. Every rank calls it."""
    model = dict(t.raw_model.state_dict())
    buffers = parallel.mean_buffers(t.raw_model, t.world) if t.world.distributed else {}
    model.update({k: v for k, v in buffers.items() if k in model})
    state: dict[str, Any] = {
        "step": t.step,
        "model": model,
        "optimizer": named_optimizer_state(t.optimizer, t.raw_model),
        "scheduler": t.scheduler.state_dict() if t.scheduler is not None else None,
        "scaler": t.precision.scaler.state_dict() if t.precision.scaler is not None else None,
        "metrics": t.metrics,
        "evaluated_at": t._evaluated_at,
        "evaluations": t.evaluations,
        "logged_at": t._logged_at,
        "extra": dict(t._extra),
        # Only where it counts: it is the one value that differs between two runs of the same thing.
        "elapsed": time.monotonic() - t._began if t.experiment.trainer.max_time is not None else 0.0,
        "best": t.best.state_dict(),
        "progress": t._progress.state_dict(),
        **({"objective": t._objective.state_dict()} if t._objective is not t.best else {}),
        # Rank 0's: what a callback keeps has to be the same on every rank.
        "callbacks": {k: c.state_dict() for k, c in t.callbacks.items() if hasattr(c, "state_dict")},
    }
    if t.ema_model is not None:
        state["ema"] = {
            **t.ema_model.state_dict(),
            **{k: model[k] for k in dict(t.ema_model.named_buffers(remove_duplicate=False)) if k in model},
        }
    return state


def local(t: Trainer) -> dict[str, Any]:
    """Random states, this rank's own batch statistics, the open log window, the place in an iterable."""
    return {
        "random": seeds.random_state(),
        "buffers": dict(t.raw_model.named_buffers()),
        "window": t.window.state_dict(),
        "data": t.train_loader.state_dict(),
    }


def template(t: Trainer) -> dict[str, Any] | None:
    """For `Checkpointer.load`: what of `shared` is to be read as shards, by the ranks that hold them."""
    if not parallel.is_sharded(t.raw_model):
        return None
    from raytrainer.parallel import fsdp

    def shards(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        return {name: fsdp.like(tensor) for name, tensor in tensors if parallel.is_sharded(tensor)}

    return {
        "model": shards(t.raw_model.state_dict().items()),
        "ema": shards(t.ema_model.state_dict().items()) if t.ema_model is not None else {},
        # Of a parameter's state some tensors are of its shape, as Adam's averages.
        "optimizer": {"state": shards(t.raw_model.named_parameters())},
    }


def restore(
    t: Trainer, state: Mapping[str, Any], own: Mapping[str, Any] | None, *, source: str, changed: Iterable[str]
) -> None:
    """Puts back what `shared` and `local` gave; `own` is None where another number of ranks wrote the checkpoint."""
    load_weights(t.raw_model, state["model"], source)
    # A constructor may call a setting of some groups by a longer name: `adamw_lr` is the `lr` of Muon's other groups.
    wanted = [
        {k: v for k, v in group.items() if any(name == k or name.endswith(f"_{k}") for name in changed)}
        for group in t.optimizer.param_groups
    ]
    rates = [group.get("initial_lr", group["lr"]) for group in t.optimizer.param_groups]
    restore_optimizer_state(t.optimizer, t.raw_model, state["optimizer"])
    mend_fused_sgd(t.optimizer)
    if t.scheduler is not None:
        t.scheduler.load_state_dict(state["scheduler"])
    _change_settings(t, wanted, rates)
    if t.precision.scaler is not None and state.get("scaler"):
        t.precision.scaler.load_state_dict(state["scaler"])
    if t.ema_model is not None:
        load_weights(t.ema_model, state["ema"], source)
    for name, callback in t.callbacks.items():
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])
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
        parallel.load_buffers(t.raw_model, own["buffers"])
        t.window.load_state_dict(own["window"])
        t.train_loader.load_state_dict(own["data"])
        seeds.set_random_state(own["random"])
    else:  # the same order of samples, but draws of its own
        seeds.seed_everything("train", t.experiment.seed, t.world.rank, t.step)


def _change_settings(t: Trainer, wanted: list[dict[str, Any]], rates: list[Any]) -> None:
    """The settings that a resume was given, over the checkpoint's."""
    for number, (group, new) in enumerate(zip(t.optimizer.param_groups, wanted, strict=True)):
        if "lr" in new and group.get("initial_lr", group["lr"]) == rates[number]:
            new = {name: value for name, value in new.items() if name != "lr"}  # the same base: not a bit is to change
        if "lr" in new:
            # The checkpoint's rate is the base times the curve: the same point of the curve over the new base.
            factor = float(group["lr"]) / float(group["initial_lr"]) if group.get("initial_lr") else 1.0
            new = {**new, "lr": rates[number] * factor}
            # A scheduler made of others keeps the base in them.
            for scheduler in (t.scheduler, *getattr(t.scheduler, "_schedulers", ())):
                if hasattr(scheduler, "base_lrs"):
                    group["initial_lr"] = scheduler.base_lrs[number] = rates[number]
        group.update(new)
