"""Check the objects that an experiment names, as far as that is cheap.

These are targets and their arguments, the optimizer, name patterns, the initial weights, and the data on this machine.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from raytrainer.config import Experiment, build, check_targets, factory, locate
from raytrainer.errors import CheckpointError, ConfigError, RaytrainerError, StorageError
from raytrainer.events import check_hooks
from raytrainer.preflight.first_batch import targets_of
from raytrainer.preflight.resources import least_workers, through_ray
from raytrainer.tracking import redacted


def check_objects(e: Experiment) -> None:
    """Check every `_target_` against its signature, and build the optimizer and its curve for one small weight.

    Building those two costs nothing, and their constructors check values (`lr=-1`) that a signature does not show. A
    model or a dataset may be large, so its errors are reported when a worker builds it, except those that a dataset's
    `check_source` finds here. If patterns name parameters, the model is built on the meta device, without memory, if
    possible.

    Raises:
        ConfigError: The first object that would be refused.
    """
    check_targets(e)
    _check_main(e)
    if not e.uses_ray and (keys := through_ray(e)):
        raise ConfigError(
            "needs a Ray cluster, which cluster=inline and debug do not have; cluster=local starts one",
            key=keys[0],
            value="RayDataset",
        )
    _check_sources(e)
    _check_optimizer(e)
    for name, node in e.callbacks.items():
        target = locate(f"callbacks.{name}", node["_target_"]) if node else None
        if isinstance(target, type):  # a function's result is unknown here
            check_hooks(target, f"callbacks.{name}")
    for name, node in e.metrics.items():
        target = locate(f"metrics.{name}", node["_target_"]) if node else None
        lacks = [method for method in ("update", "compute", "reset") if not hasattr(target, method)]
        if isinstance(target, type) and lacks and target.__module__.partition(".")[0] != "torchmetrics":
            raise ConfigError(
                f"has no {lacks[0]}(), which a metric needs", key=f"metrics.{name}", value=target.__name__
            )
        # Classes of torchmetrics accept any keyword, and refuse a misspelt one only when they are built.
        if node and str(node["_target_"]).startswith("torchmetrics."):
            build(node)


def _check_main(e: Experiment) -> None:
    """Check that no target is in `__main__`, because no other process has what the launching program defines."""
    if not e.uses_ray:
        return
    for key, target in targets_of(e):
        if target.startswith("__main__."):
            name = target.removeprefix("__main__.")
            raise ConfigError(
                "is defined in the program that launches the run, which the worker processes cannot import: "
                f"move it to a module beside that program (my_code.py) and write my_code.{name}, or use "
                "cluster=inline",
                key=key,
                value=target,
            )


def _check_sources(e: Experiment) -> None:
    """If workers run on this machine, check that the data exist, as far as a dataset's class can tell cheaply."""
    if e.backend.location != "here" and not e.debug:
        return
    for set_key, set_node in e.data.sets.items():
        samples: dict[str, Any] = {}
        for key, node in _nodes(set_key, set_node):
            check = getattr(locate(key, node["_target_"]), "check_source", None)
            if check is None:
                continue
            try:
                samples[key] = check(
                    **{name: node[name] for name in inspect.signature(check).parameters if name in node}
                )
            except (RaytrainerError, OSError, ValueError) as error:
                raise ConfigError(f"cannot be used: {error}", key=key) from error
        # Decoding images keeps the number of samples; what other wrappers of a dataset do is unknown.
        decodes = str(set_node["_target_"]).rpartition(".")[2] == "EncodedImages"
        count = samples.get(f"{set_key}.dataset" if decodes else set_key)
        if isinstance(count, int):
            _check_samples(e, set_key, count)


def _check_samples(e: Experiment, key: str, samples: int) -> None:
    """Check the number of samples as the training loop does when it begins."""
    from raytrainer.data.order import steps_per_epoch

    if samples == 0:
        raise ConfigError("has no samples", key=key)
    if key == "data.train":
        steps_per_epoch(samples, e.data.global_batch_size, e.data.drop_last)
    elif e.metrics and samples < (workers := least_workers(e)):
        raise ConfigError(
            f"has {samples} sample{'' if samples == 1 else 's'} for {workers} workers, and each needs one for the metrics",
            key=key,
        )


def _nodes(key: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a `_target_` node, and those among its arguments."""
    if isinstance(node, dict) and "_target_" in node:
        yield key, node
        for name, below in node.items():
            yield from _nodes(f"{key}.{name}", below)


def _check_optimizer(e: Experiment) -> None:
    target = str((e.optimizer or {}).get("_target_"))
    model: Any = unbuilt_model(e) if e.trainer.freeze or target == _MUON else None
    if model is not None:
        from raytrainer.optim import freeze

        freeze(_with_loss(model, e), e.trainer.freeze)
    if not e.optimizer or not target.startswith(_BUILT_TARGETS) or (target == _MUON and model is None):
        return
    import torch

    from raytrainer.optim import build_optimizer, build_scheduler

    # A matrix, because torch's Muon accepts nothing else; our Muon uses the model's own parameters.
    with torch.random.fork_rng(devices=[]):  # a check must not change the caller's generator
        small = torch.nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(factory(e.optimizer), model if target == _MUON else small)
    if e.lr_scheduler and str(e.lr_scheduler["_target_"]).startswith(_BUILT_TARGETS):
        scheduler = build_scheduler(factory(e.lr_scheduler), optimizer, e.trainer.max_steps or 1_000_000)
        _check_length_of_curve(e, scheduler)


def _check_length_of_curve(e: Experiment, scheduler: Any) -> None:
    t = e.trainer
    length = getattr(scheduler, "total_steps", None)  # OneCycleLR has it, and raises when it is stepped further
    if t.max_steps is None or t.max_epochs is not None or t.max_time is not None:
        return  # the run may end earlier
    if isinstance(length, int) and length < t.max_steps:
        raise ConfigError(
            f"ends after {length} steps, and the run has trainer.max_steps={t.max_steps}; set "
            "lr_scheduler.total_steps=${trainer.max_steps}",
            key="lr_scheduler",
            value=type(scheduler).__name__,
        )


_BUILT_TARGETS = ("torch.optim.", "raytrainer.optim.")
_MUON = "raytrainer.optim.Muon"


def _with_loss(model: Any, e: Experiment) -> Any:
    """Return the model together with the loss's parameters if the loss, too, can be built on the meta device."""
    import torch

    from raytrainer.trainer.system import stateful_part, together

    try:
        with torch.device("meta"):
            loss = build(e.loss or {})
    except Exception:  # noqa: BLE001  as for the model
        return model
    return together(model, stateful_part(loss))


def unbuilt_model(e: Experiment) -> Any:
    """Return the experiment's model on the meta device: its modules, names and shapes, without memory or values.

    None if it cannot be built there, for instance because its constructor reads weights or uses a value.
    """
    import torch

    try:
        with torch.device("meta"):
            return build(e.model or {})
    except Exception:  # noqa: BLE001  the worker that builds it reports whether it can be built at all
        return None


def check_init_from(e: Experiment, look_up: Callable[[str], str | None] = lambda _: None) -> None:
    """Check that `init_from` names existing weights, and that their names and shapes fit this model.

    Args:
        e: The experiment.
        look_up: As in `checkpoint.find_weights`.

    Raises:
        ConfigError: There are no weights, or they do not fit.
    """
    if e.init_from is None:
        return
    from raytrainer.checkpoint import find_weights, fit

    source = e.init_from.source or ""
    try:
        weights = find_weights(source, e.storage_path or "", look_up)
        shapes = weights.shapes()
    except (CheckpointError, StorageError) as error:
        reason = re.sub(r"^init_from=.*?: ", "", str(error))
        raise ConfigError(f"cannot be used: {reason}", key="init_from", value=redacted(source)) from error
    model = unbuilt_model(e) if shapes is not None else None
    if model is None or shapes is None:
        return
    try:
        problem = fit(model, shapes, e.init_from).problem
    except ConfigError:
        raise
    except Exception:  # noqa: BLE001  a state dict that needs values; the worker that loads reports it
        return
    if problem:
        advice = "; init_from.mapping, exclude or strict=false handle such names" if e.init_from.strict else ""
        raise ConfigError(f"{problem}{advice}", key="init_from", value=weights.place)
