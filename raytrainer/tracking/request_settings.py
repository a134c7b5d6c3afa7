"""The environment variables that MLflow reads at each call, set while one of our calls runs in this process.

Only Python's view of the environment is changed. Calls are made by threads, and `putenv` may move the C environment
while native code reads it. A start of Ray, for example, reads hundreds of variables. With glibc before 2.41 that can
cause a segmentation fault.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raytrainer.core import proxies

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # 7 by default, about 4 minutes; the uploader retries
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow reads this once, on import. Its telemetry would write to the C environment.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_KEPT_IF_SET = (_TIMEOUT, "MLFLOW_DISABLE_TELEMETRY")  # the user's values take precedence

_lock = threading.Lock()
_timeouts: list[int] = []  # of the calls that run now
_saved: dict[str, str | None] = {}  # the values before the first of them


@contextmanager
def request_settings(timeout_s: int) -> Iterator[None]:
    """Set the variables within the context. Of several calls at once, the longest timeout counts."""
    with _lock:
        _timeouts.append(timeout_s)
        _apply()
    try:
        yield
    finally:
        with _lock:
            _timeouts.remove(timeout_s)
            _apply()


def _apply() -> None:
    if not _timeouts:
        for name, value in _saved.items():
            _show(name, value)
        _saved.clear()
        return
    # A worker of another cluster, whose environment we do not set, needs the exempted addresses too.
    values = {**_SETTINGS, _TIMEOUT: str(max(_timeouts)), **proxies.exemptions()}
    if not _saved:
        _saved.update({name: os.environ.get(name) for name in values})
    for name, value in values.items():
        if name not in _KEPT_IF_SET or _saved[name] is None:
            _show(name, value)


def _show(name: str, value: str | None) -> None:
    """Set what Python code in this process finds in `os.environ`; None removes the variable. `putenv` is not called."""
    python: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    if value is None:
        python.pop(os.fsencode(name), None)
    else:
        python[os.fsencode(name)] = os.fsencode(value)
