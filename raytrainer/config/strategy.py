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
    f, workers = e.fsdp, e.scaling.num_workers
    f.wrap = _classes("fsdp.wrap", f.wrap, None, "null (the model's own blocks) or a list of names of classes: [Block]")
    e.trainer.activation_checkpointing = _classes(
        "trainer.activation_checkpointing",
        e.trainer.activation_checkpointing,
        (True, False),
        "true (the model's own blocks), false, or a list of names of classes: [Block]",
    )
    if e.trainer.strategy != "fsdp":
        unset = FSDPConfig()
        for field in dataclasses.fields(f):
            if (value := getattr(f, field.name)) != getattr(unset, field.name):
                raise ConfigError(
                    f"has no meaning with trainer.strategy={e.trainer.strategy}; set trainer.strategy=fsdp",
                    key=f"fsdp.{field.name}",
                    value=value,
                )
        return
    if e.debug:  # debugging uses one process, whatever the experiment says
        return
    optimizer = (e.optimizer or {}).get("_target_")
    if optimizer == "torch.optim.Adafactor" and e.max_workers > 1:
        raise ConfigError(
            "does not take shards: it needs the norms of whole rows; use adamw, sgd or muon, or trainer.strategy=ddp",
            key="optimizer._target_",
            value=optimizer,
        )
    elastic = isinstance(workers, list) and workers[0] != workers[1]
    if f.replicas > 1 and (elastic or e.max_workers % f.replicas):
        raise ConfigError(
            f"must divide every possible number of workers: scaling.num_workers={str(workers).replace(' ', '')}",
            key="fsdp.replicas",
            value=f.replicas,
        )
    among = f.reshard_after_forward
    if among is not None and not isinstance(among, bool):
        shards = e.max_workers // f.replicas
        if type(among) is not int or not 1 < among < shards or shards % among or elastic:
            raise ConfigError(
                "must be true, false, null, or a number of workers that divides those of a replica "
                f"({shards}{' at most, and it varies' if elastic else ''}) and is neither 1 nor all",
                key="fsdp.reshard_after_forward",
                value=among,
            )


def _classes(key: str, value: Any, plain: Any, wanted: str) -> Any:
    if value is plain or (isinstance(plain, tuple) and any(value is one for one in plain)):
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"must be {wanted}", key=key, value=value)
    return names
