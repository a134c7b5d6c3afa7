"""Variables that a run needs on a shared cluster: known by name alone, their values are on the cluster's side; and those
that one run leaves to the next in the same process.

A value is in the environment of the cluster's processes, or in a file there (`cluster.env_file`) that nobody logs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from raytrainer.errors import ConfigError


def provide(names: Sequence[str], env_file: str | None) -> None:
    """Sets each variable of `names` that is not set, from `env_file`.

    Raises:
        ConfigError: One is set nowhere; or the file cannot be read, or may be read by others.
    """
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return
    found = _read(Path(env_file).expanduser()) if env_file is not None else {}
    for name in missing:
        if name not in found:
            where = f"in the environment of this machine's Ray nor in cluster.env_file={env_file}"
            if env_file is None:
                where = "in the environment of this machine's Ray, and cluster.env_file is not set"
            raise ConfigError(f"is set neither {where}", key="cluster.forward_env", value=name)
        os.environ[name] = found[name]


def put_back(before: Mapping[str, str]) -> None:
    """Makes the environment what it was. Variables that are so are not written: native code of other threads reads them
    without a lock, and a write moves them."""
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _read(path: Path) -> dict[str, str]:
    """`NAME=value` lines; a `#` begins a comment line, quotes around a value are left out."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"can be read by others: chmod 600 {path}", key="cluster.env_file", value=str(path))
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", key="cluster.env_file", value=str(path)) from None
    found = {}
    for line in lines:
        name, sign, value = line.strip().removeprefix("export ").partition("=")
        if sign and not name.startswith("#"):
            value = value.strip()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            found[name.strip()] = value[1:-1] if quoted else value
    return found
