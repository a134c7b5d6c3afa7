"""Hydra's process-wide state, borrowed: one thread composes at a time, and afterwards everything is as it was.

Hydra keeps its config, its search path and its version in singletons, and its resolvers in OmegaConf. An application of
Hydra that calls `raytrainer.config.compose` has its own there, and reads them on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

LOCK = threading.RLock()  # Hydra's singletons and the caches of its parser are shared by all threads
SCHEMA = "experiment_schema"
_RESOLVERS = ("now", "hydra", "python_version")  # what Hydra registers anew each time it is set up


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """Within it Hydra is as in a fresh process but for its plugins and stored configs; after it as before, also after an
    error. The objects are the very same, so that references to them stay right. Other threads wait for their turn.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobRuntime
    from hydra.version import VersionBase
    from omegaconf.basecontainer import BaseContainer

    kinds = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)
    with LOCK:
        instances, resolvers = Singleton._instances, BaseContainer._resolvers
        stored = ConfigStore.instance().repo
        before = {kind: instances.pop(kind) for kind in kinds if kind in instances}
        resolved = {name: resolvers[name] for name in _RESOLVERS if name in resolvers}
        schema = stored.get(f"{SCHEMA}.yaml")
        try:
            yield
        finally:
            _put_back(Singleton._instances, kinds, before)
            _put_back(BaseContainer._resolvers, _RESOLVERS, resolved)
            _put_back(stored, (f"{SCHEMA}.yaml",), {} if schema is None else {f"{SCHEMA}.yaml": schema})


def _put_back(entries: Any, names: Any, before: Any) -> None:
    for name in names:
        entries.pop(name, None)
    entries.update(before)
