"""Provide the environment variables that a run needs on a shared cluster, and restore the environment after a run.

Only the names of variables are sent to a cluster. The values are in the environment of its processes, or in a file
there (`cluster.env_file`) that is never logged.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from raytrainer.errors import ConfigError


def provide(names: Sequence[str], env_file: str | None) -> None:
    """Set each variable of `names` that is not set, from `env_file`.

    Raises:
        ConfigError: A variable is set nowhere, or the file cannot be read, or other users can read it.
    """
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return
    values = _read(Path(env_file).expanduser()) if env_file is not None else {}
    for name in missing:
        if name not in values:
            where = f"in the environment of this machine's Ray nor in cluster.env_file={env_file}"
            if env_file is None:
                where = "in the environment of this machine's Ray, and cluster.env_file is not set"
            raise ConfigError(f"is set neither {where}", key="cluster.forward_env", value=name)
        os.environ[name] = values[name]


def put_back(before: Mapping[str, str]) -> None:
    """Restore the environment to `before`. Only variables that differ are written: native code in other threads reads
    them without a lock, and a write moves them."""
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _read(path: Path) -> dict[str, str]:
    """Parse `NAME=value` lines. A `#` starts a comment line, and quotes around a value are removed."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"can be read by others: chmod 600 {path}", key="cluster.env_file", value=str(path))
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", key="cluster.env_file", value=str(path)) from None
    values = {}
    for line in lines:
        name, sign, value = line.strip().removeprefix("export ").partition("=")
        if sign and not name.startswith("#"):
            value = value.strip()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            values[name.strip()] = value[1:-1] if quoted else value
    return values
