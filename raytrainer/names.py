"""Parameters by their names: which ones patterns mean, and which weights of one model are which of another's.
Names and shapes alone, so that what does not fit is known before anything is read or started."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from raytrainer.errors import ConfigError, nearest

Shape = tuple[int, ...]


def matching(patterns: Iterable[str], names: Collection[str], key: str) -> set[str]:
    """The names that some pattern matches: a name, or with `*`, `?` and `[...]` as in a shell (`*` also over dots).

    Args:
        patterns: What is looked for.
        names: Of parameters.
        key: Where the patterns are from, for the error.

    Raises:
        ConfigError: A pattern matches none of them.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            parts = [name.split(".") for name in names]
            modules = {".".join([*part[:i], "*"]) for part in parts for i in range(1, len(part))}
            raise ConfigError(
                "matches no name of the model's",
                key=key,
                value=pattern,
                choices=nearest(pattern, sorted({*names, *modules})) or sorted(names),
            )
        found |= hits
    return found
