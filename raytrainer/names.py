"""Match parameters by name: which names a pattern selects, and which weights of a source belong to which of a model.

Only names and shapes are needed, so that a mismatch is found before anything is read or started.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from raytrainer.errors import ConfigError, nearest

Shape = tuple[int, ...]


def matching(patterns: Iterable[str], names: Collection[str], key: str) -> set[str]:
    """Return the names that a pattern matches: a name, or a shell pattern of `*`, `?`, `[...]` (`*` also matches dots).

    Args:
        patterns: The patterns.
        names: The names of parameters.
        key: The config key of the patterns, for the error.

    Raises:
        ConfigError: A pattern matches no name.
    """
    matched: set[str] = set()
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
        matched |= hits
    return matched


@dataclass(frozen=True)
class Match:
    """Which tensors of a source a model takes.

    Attributes:
        taken: Name in the model → name in the source.
        kept: Names in the model that keep their initial values.
        unused: Names in the source that the model does not take.
        same: Groups of names in the source that become one tensor of the model.
        problem: Why this is not the requested result, as the end of a sentence; empty if it is.
    """

    taken: dict[str, str]
    kept: list[str]
    unused: list[str]
    same: list[list[str]] = field(default_factory=list)
    problem: str = ""

    def describe_sweep(self) -> str:
        """Return the result as one line of text."""
        parts = [f"{len(self.taken)} tensors taken"]
        parts += [f"as initialised: {few(self.kept)}"] if self.kept else []
        parts += [f"not used: {few(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def match(
    own: Mapping[str, Shape],
    source: Mapping[str, Shape],
    *,
    strict: bool = True,
    mapping: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
    tied: Sequence[Collection[str]] = (),
) -> Match:
    """Match the tensors of a source to those of a model by their names.

    Args:
        own: The names and shapes of the model.
        source: The names and shapes of the source.
        strict: Whether all names of both must match; else matching tensors are taken, and only no match is a problem.
        mapping: Prefix in the source → prefix in the model. The longest prefix that matches counts.
        exclude: Patterns of names in the model that are not taken.
        tied: Groups of names that are one tensor in the model: a source with one of them has all.

    Raises:
        ConfigError: A prefix or pattern matches no name, or two names of the source become one.
    """
    theirs = _renamed(source, mapping or {})
    excluded = matching(exclude, own.keys() | theirs.keys(), "init_from.exclude")
    common = (own.keys() & theirs.keys()) - excluded
    unlike = {n for n in common if own[n] != source[theirs[n]]}
    taken = {n: theirs[n] for n in sorted(common - unlike)}
    covered = {n for names in tied if taken.keys() & names for n in names}
    missing = sorted(own.keys() - theirs.keys() - excluded - covered)
    surplus = sorted(theirs.keys() - own.keys() - excluded)
    kept = sorted(own.keys() - taken.keys() - covered)
    unused = sorted(source.keys() - set(taken.values()))
    shapes = [f"{n}: {source[theirs[n]]} there, {own[n]} here" for n in sorted(unlike)]
    problem = ""
    if strict and (missing or surplus or shapes):
        problem = "holds another model: " + _differences(missing, surplus, shapes)
    elif not taken:
        problem = (
            f"has nothing that fits: it has {few(sorted(theirs)) or 'no tensor'}, and the model {few(sorted(own))}"
        )
    sources = [sorted({taken[n] for n in names if n in taken}) for names in tied]
    return Match(taken, kept, unused, [group for group in sources if len(group) > 1], problem)


def _differences(missing: Sequence[str], surplus: Sequence[str], shapes: Sequence[str]) -> str:
    """Return as text which names a source lacks, has in excess, or has with another shape; the first few of each."""
    parts = []
    if missing:
        close = nearest(missing[0], surplus, 1)
        parts.append(f"it lacks {few(missing)}" + (f" ({missing[0]} may be its {close[0]})" if close else ""))
    if surplus:
        parts.append(f"it has unexpected {few(surplus)}")
    if shapes:
        parts.append(f"shapes differ: {few(shapes)}")
    return "; ".join(parts)


def is_extra_state(name: str) -> bool:
    """Return whether an entry of a state dict comes from `get_extra_state`: not a weight, and of any type."""
    return name.rpartition(".")[2] == "_extra_state"


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """Return a source's name as the model would have it: the longest prefix of it in `mapping` is replaced."""
    begin = max((b for b in mapping if name.startswith(b)), key=len, default=None)
    return name if begin is None else mapping[begin] + name[len(begin) :]


def few(names: Sequence[str]) -> str:
    """Return the first three names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _renamed(names: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Return the source's names: as the model would have them → as the source has them."""
    renamed: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        begin = max((b for b in mapping if name.startswith(b)), key=len, default=None)
        new = name if begin is None else mapping[begin] + name[len(begin) :]
        used |= set() if begin is None else {begin}
        if new in renamed:
            raise ConfigError(f"makes {new} of both {renamed[new]} and {name}", key="init_from.mapping")
        renamed[new] = name
    if idle := sorted(mapping.keys() - used):
        raise ConfigError(
            "is not a prefix of any name in the source",
            key="init_from.mapping",
            value=idle[0],
            choices=sorted(renamed.values()),
        )
    return renamed
