"""Check that `trainer.strategy`, the section `fsdp` and the number of workers fit together.

The classes of a model are known only when it is built, so their names are not checked here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from raytrainer.config.schema import Experiment, FSDPConfig
from raytrainer.errors import ConfigError


def check_strategy(e: Experiment) -> None:
    """Check that keys that are each valid also fit together.

    Raises:
        ConfigError: They do not fit; the message names the first such key.
    """
    f = e.fsdp
    f.wrap = _classes(
        "fsdp.wrap", f.wrap, (None,), "null (the model's own blocks) or a list of names of classes: [Block]"
    )
    e.trainer.activation_checkpointing = _classes(
        "trainer.activation_checkpointing",
        e.trainer.activation_checkpointing,
        (True, False),
        "true (the model's own blocks), false, or a list of names of classes: [Block]",
    )
    if e.trainer.strategy != "fsdp":
        _refuse_fsdp_keys(e)
    elif not e.debug:  # debugging uses one process, whatever the experiment says
        _check_shards(e)


def _refuse_fsdp_keys(e: Experiment) -> None:
    for name, default in dataclasses.asdict(FSDPConfig()).items():
        if (value := getattr(e.fsdp, name)) != default:
            raise ConfigError(
                f"has no meaning with trainer.strategy={e.trainer.strategy}; set trainer.strategy=fsdp",
                key=f"fsdp.{name}",
                value=value,
            )


def _check_shards(e: Experiment) -> None:
    f, workers = e.fsdp, e.scaling.num_workers
    optimizer = (e.optimizer or {}).get("_target_")
    if optimizer == "torch.optim.Adafactor" and e.max_workers > 1:
        raise ConfigError(
            "does not take shards: it needs the norms of whole rows; use adamw, sgd or muon, or trainer.strategy=ddp",
            key="optimizer._target_",
            value=optimizer,
        )
    is_elastic = isinstance(workers, list) and workers[0] != workers[1]
    if f.replicas > 1 and (is_elastic or e.max_workers % f.replicas):
        raise ConfigError(
            f"must divide every possible number of workers: scaling.num_workers={str(workers).replace(' ', '')}",
            key="fsdp.replicas",
            value=f.replicas,
        )
    group = f.reshard_after_forward
    if group is None or isinstance(group, bool):
        return
    shards = e.max_workers // f.replicas
    if type(group) is not int or not 1 < group < shards or shards % group or is_elastic:
        raise ConfigError(
            "must be true, false, null, or a number of workers that divides those of a replica "
            f"({shards}{' at most, and it varies' if is_elastic else ''}) and is neither 1 nor all",
            key="fsdp.reshard_after_forward",
            value=group,
        )


def _classes(key: str, value: Any, plain: tuple[Any, ...], wanted: str) -> Any:
    """Return the names of classes in a value as a list; a value of `plain` is returned unchanged."""
    if any(value is choice for choice in plain):
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"must be {wanted}", key=key, value=value)
    return names
