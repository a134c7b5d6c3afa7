"""The sizes of files as people read them: the largest files or folders of a package, and numbers with units."""

from __future__ import annotations

from collections.abc import Iterable


def largest(files: Iterable[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """Return the largest files, or their directory if each is small compared to it, and `…` for the rest."""
    files = list(files)
    entries: dict[str, tuple[int, list[tuple[str, int]]]] = {}

    def split(below: Iterable[tuple[str, int]], prefix: str) -> dict[str, tuple[int, list[tuple[str, int]]]]:
        parts: dict[str, list[tuple[str, int]]] = {}
        for name, size in below:
            head, slash, _ = name[len(prefix) :].partition("/")
            parts.setdefault(f"{prefix}{head}{slash}", []).append((name, size))
        return {name: (sum(size for _, size in inner), inner) for name, inner in parts.items()}

    entries = split(files, "")
    tried = set[str]()
    while True:
        ordered = sorted(entries, key=lambda name: (-entries[name][0], name))[:most]
        folder = next((name for name in ordered if name.endswith("/") and name not in tried), None)
        if folder is None:
            break
        tried.add(folder)
        size, inner = entries[folder]
        parts = split(inner, folder)
        if len(parts) <= most or 2 * max(part for part, _ in parts.values()) >= size:
            del entries[folder]
            entries |= parts
    rest = set(entries) - set(ordered)
    shown = [(name, entries[name][0]) for name in ordered]
    return [*shown, (f"… {counted(len(rest), 'other')}", sum(entries[name][0] for name in rest))] if rest else shown


def in_bytes(count: int) -> str:
    """Return a number of bytes with its unit: `1.5 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 file`, `2,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
