"""The code that is sent to a shared cluster.

It consists of the files that git sees in the launching directory, without data, secrets and files in `.rayignore`. Ray
identifies a package by its contents, so workers that already have it do not download it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from raytrainer.errors import ConfigError
from raytrainer.submission.sent_files import IGNORE, Tree, git_output, refusal
from raytrainer.submission.sizes import counted, in_bytes, largest

_IMPORT = re.compile(rb"^[ \t]*(?:from[ \t]+(\w+)|import[ \t]+(\w[^#\n;(]*))", re.MULTILINE)


@dataclass(frozen=True)
class File:
    """A file of a package.

    Attributes:
        name: The path relative to the package, with `/` between parts.
        size: In bytes.
        sha256: The hash of its content, in hexadecimal.
        executable: Whether its owner may execute it.
        source: Its path on this machine.
    """

    name: str
    size: int
    sha256: str
    executable: bool = False
    source: Path = field(default=Path(), compare=False, repr=False)


@dataclass(frozen=True)
class Package:
    """Files that are sent together.

    Attributes:
        root: The directory that names are relative to.
        entries: Sorted by name.
        left_out: The names that are not sent, with the reason: `data` or `secret`.
        imports: The top-level modules that its Python files import.
    """

    root: Path
    entries: tuple[File, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    imports: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """The name and the size in bytes of each file."""
        return tuple((entry.name, entry.size) for entry in self.entries)

    @property
    def size(self) -> int:
        """The total size in bytes."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, modes and contents, but not over times and locations."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\0{'x' if entry.executable else '-'}\0{entry.sha256}\n".encode())
        return digest.hexdigest()

    def table(self, most: int = 10) -> str:
        """Return a table of the largest files or directories, the total, and what was left out and why."""
        lines = [f"{in_bytes(size):>10}  {name}" for name, size in largest(self.files, most)]
        lines.append(f"{in_bytes(self.size):>10}  in {counted(len(self.entries), 'file')} of {self.root}")
        for why, words in (("data", f"data; !NAME in {IGNORE} includes one"), ("secret", "may hold secrets")):
            names = [name for name, reason in self.left_out if reason == why]
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"  left out  {', '.join(names[:5])}{more} ({words})")
        return "\n".join(lines)

    def stage(self, folder: Path) -> None:
        """Put the files into a new folder, from which Ray makes its package.

        Raises:
            ConfigError: A file cannot be read any more.
        """
        folder.mkdir(parents=True)
        for entry in self.entries:
            target = folder / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                try:
                    os.link(entry.source, target)
                except OSError:  # another disk, or another user's file
                    shutil.copy2(entry.source, target)
            except OSError as error:
                raise ConfigError(f"{entry.source} can no longer be read: {error.strerror}") from error

    def with_files(self, more: Iterable[Path]) -> Package:
        """Return a copy of the package with further files at its root."""
        entries, imports = {entry.name: entry for entry in self.entries}, set(self.imports)
        for path in more:
            entries[path.name], names = read_file(path.name, path)
            imports |= names
        return Package(self.root, tuple(entries[name] for name in sorted(entries)), self.left_out, frozenset(imports))


@dataclass(frozen=True)
class Module:
    """Code outside the launching directory, with the name under which it is imported."""

    name: str
    package: Package


def collect(
    root: Path,
    *,
    limit_mb: float | None = None,
    leave_out: Sequence[str] = (),
    secrets: Collection[Path] = (),
) -> Package:
    """Return the files of a tree that are sent.

    Args:
        root: The tree.
        limit_mb: The largest total size, in millions of bytes; None: unlimited.
        leave_out: Further patterns beside `DATA`.
        secrets: Files that are never sent, whatever their names.

    Raises:
        ConfigError: The files exceed the limit, a link leads out of the tree and its repository, or a file cannot be
            read. The message names the files and the fix.
    """
    root = root.resolve()
    top = git_output(root, "rev-parse", "--show-toplevel")
    inside = Path(os.fsdecode(top).rstrip("\n")) if top else root
    tree = Tree(root, inside.resolve(), leave_out, {path.resolve() for path in secrets})
    tree.add_all(root, "", fall_back=True)
    tree.add_named()
    if tree.outside:
        raise refusal(sorted(tree.outside), f"is a link that leads out of {tree.inside}, or back to where it is")
    if unnamed := [name for name in tree.sent if not _is_text(name)]:
        raise refusal(unnamed, "has a name that is not UTF-8")
    sizes = {}
    for name, path in tree.sent.items():
        with contextlib.suppress(OSError):  # unreadable files are reported below, all together
            sizes[name] = path.stat().st_size
    if limit_mb is not None:
        check_limit(sizes.items(), limit_mb)
    entries, imports, unreadable = [], set[str](), []
    for name, path in sorted(tree.sent.items()):
        try:
            entry, names = read_file(name, path)
        except OSError as error:
            unreadable.append(f"{name} ({error.strerror})")
            continue
        entries.append(entry)
        imports |= names
    if unreadable:
        raise refusal(unreadable, "cannot be read")
    return Package(root, tuple(entries), tuple(sorted(tree.left_out.items())), frozenset(imports))


def check_limit(files: Iterable[tuple[str, int]], limit_mb: float) -> None:
    """Refuse more than `limit_mb` millions of bytes.

    Raises:
        ConfigError: The files exceed the limit; the message names the largest and the fix.
    """
    files = list(files)
    total = sum(size for _, size in files)
    if total > limit_mb * 1e6:
        most = ", ".join(f"{name} ({in_bytes(size)})" for name, size in largest(files, 6))
        raise ConfigError(
            f"is less than the {in_bytes(total)} that would be sent: {most}; a line of {IGNORE}, as in .gitignore, leaves "
            "out what the workers do not need",
            key="cluster.package_limit_mb",
            value=f"{limit_mb:g}",
        )


def read_file(name: str, path: Path) -> tuple[File, set[str]]:
    """Return a file as an entry, and the top-level modules that it imports."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if name.endswith(".py"):
            content = file.read()
            digest, imports = hashlib.sha256(content), _imported(content)
        else:
            digest, imports = hashlib.file_digest(file, "sha256"), set()
    return File(name, status.st_size, digest.hexdigest(), bool(status.st_mode & 0o100), path), imports


def _imported(source: bytes) -> set[str]:
    """Return the top-level modules of imports at line starts, including text that only looks like an import."""
    names = set()
    for after_from, after_import in _IMPORT.findall(source):
        for name in [after_from] if after_from else after_import.split(b","):
            names.add(name.decode(errors="replace").strip().partition(".")[0].partition(" ")[0])
    return {name for name in names if name.isidentifier()}


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
