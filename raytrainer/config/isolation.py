"""Borrow Hydra's process-wide state: one thread composes at a time, and the previous state is restored afterwards.

Hydra keeps its config, its search path and its version in singletons, and its resolvers in OmegaConf. A Hydra
application that calls `raytrainer.config.compose` has its own state there, and continues to use it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from raytrainer.config import hydra_internals

LOCK = threading.RLock()  # Hydra's singletons and the caches of its parser are shared by all threads
SCHEMA = "experiment_schema"
_RESOLVERS = ("now", "hydra", "python_version")  # Hydra registers them again each time it is set up


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """Give Hydra the state of a new process, except for its plugins and stored configs. Other threads wait.

    Afterwards, also after an error, the previous objects are restored, so that references to them stay valid.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import JobRuntime
    from hydra.version import VersionBase

    kinds = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)
    with LOCK:
        instances, resolvers = hydra_internals.singletons(), hydra_internals.resolvers()
        stored = ConfigStore.instance().repo
        before = {kind: instances.pop(kind) for kind in kinds if kind in instances}
        resolved = {name: resolvers[name] for name in _RESOLVERS if name in resolvers}
        schema = stored.get(f"{SCHEMA}.yaml")
        try:
            yield
        finally:
            _put_back(hydra_internals.singletons(), kinds, before)
            _put_back(hydra_internals.resolvers(), _RESOLVERS, resolved)
            _put_back(stored, (f"{SCHEMA}.yaml",), {} if schema is None else {f"{SCHEMA}.yaml": schema})


def _put_back(entries: Any, names: Any, before: Any) -> None:
    for name in names:
        entries.pop(name, None)
    entries.update(before)
