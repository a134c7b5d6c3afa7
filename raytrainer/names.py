"""Parameters by their names: which ones patterns mean, and which weights of one model are which of another's.
Names and shapes alone, so that what does not fit is known before anything is read or started."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Match:
    """Which tensors of a source a model takes.

    Attributes:
        taken: Name in the model → name in the source.
        kept: Names of the model's that stay as they were initialised.
        unused: Names of the source's that nothing takes.
        same: Names of the source's, several in each, that become one tensor of the model.
        problem: Why this is not what was asked for, as a sentence's end; empty if it is.
    """

    taken: dict[str, str]
    kept: list[str]
    unused: list[str]
    same: list[list[str]] = field(default_factory=list)
    problem: str = ""

    def in_words(self) -> str:
        """What was done, in a line."""
        parts = [f"{len(self.taken)} tensors taken"]
        parts += [f"as initialised: {few(self.kept)}"] if self.kept else []
        parts += [f"not used: {few(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def match(
    own: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    strict: bool = True,
    mapping: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
    tied: Sequence[Collection[str]] = (),
) -> Match:
    """Fits the tensors of a source to those of a model by their names.

    Args:
        own: The model's names and shapes.
        found: The source's.
        strict: Whether all of both must fit; else what fits is taken, and it is a problem only if nothing does.
        mapping: Beginning of a name in the source → what stands there in the model. The longest that fits counts.
        exclude: Patterns of names, as the model has them, that are not taken.
        tied: Names that are one tensor in the model: a source that has one of them has all.

    Raises:
        ConfigError: A beginning or a pattern fits no name; two names of the source become one.
    """
    theirs = _renamed(found, mapping or {})
    excluded = matching(exclude, own.keys() | theirs.keys(), "init_from.exclude")
    common = (own.keys() & theirs.keys()) - excluded
    unlike = {n for n in common if own[n] != found[theirs[n]]}
    taken = {n: theirs[n] for n in sorted(common - unlike)}
    given = {n for names in tied if taken.keys() & names for n in names}
    missing = sorted(own.keys() - theirs.keys() - excluded - given)
    surplus = sorted(theirs.keys() - own.keys() - excluded)
    kept = sorted(own.keys() - taken.keys() - given)
    unused = sorted(found.keys() - set(taken.values()))
    shapes = [f"{n}: {found[theirs[n]]} there, {own[n]} here" for n in sorted(unlike)]
    problem = ""
    if strict and (missing or surplus or shapes):
        problem = "holds another model: " + _differences(missing, surplus, shapes)
    elif not taken:
        problem = (
            f"has nothing that fits: it has {few(sorted(theirs)) or 'no tensor'}, and the model {few(sorted(own))}"
        )
    sources = [sorted({taken[n] for n in names if n in taken}) for names in tied]
    return Match(taken, kept, unused, [several for several in sources if len(several) > 1], problem)


def _differences(missing: Sequence[str], surplus: Sequence[str], shapes: Sequence[str]) -> str:
    """What of a model's names a source lacks, has too much, or has in another shape; the first few of each."""
    parts = []
    if missing:
        close = nearest(missing[0], surplus, 1)
        parts.append(f"it lacks {few(missing)}" + (f" ({missing[0]} may be its {close[0]})" if close else ""))
    if surplus:
        parts.append(f"it has {few(surplus)} too much")
    if shapes:
        parts.append(f"shapes differ: {few(shapes)}")
    return "; ".join(parts)


def is_extra_state(name: str) -> bool:
    """Whether a state dict's entry is what a module's `get_extra_state` gave: of any type, and no weight."""
    return name.rpartition(".")[2] == "_extra_state"


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """A source's name as the model would have it: the longest beginning in `mapping` that fits is replaced."""
    begin = max((b for b in mapping if name.startswith(b)), key=len, default=None)
    return name if begin is None else mapping[begin] + name[len(begin) :]


def few(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _renamed(found: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """The source's names as the model would have them → as they are."""
    renamed: dict[str, str] = {}
    used: set[str] = set()
    for name in found:
        begin = max((b for b in mapping if name.startswith(b)), key=len, default=None)
        new = name if begin is None else mapping[begin] + name[len(begin) :]
        used |= set() if begin is None else {begin}
        if new in renamed:
            raise ConfigError(f"makes {new} of both {renamed[new]} and {name}", key="init_from.mapping")
        renamed[new] = name
    if idle := sorted(mapping.keys() - used):
        raise ConfigError(
            "begins no name in the source", key="init_from.mapping", value=idle[0], choices=sorted(renamed.values())
        )
    return renamed
