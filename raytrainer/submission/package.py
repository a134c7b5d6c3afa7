"""The code that is sent to a shared cluster.

It consists of the files that git sees in the launching directory, without data, secrets and files in `.rayignore`. Ray
identifies a package by its contents, so workers that already have it do not download it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from raytrainer.core import git
from raytrainer.errors import ConfigError
from raytrainer.provenance import may_hold_secrets

IGNORE = ".rayignore"
# Left out unless a line of .rayignore includes it with a leading !; in the syntax of .gitignore.
DATA = (
    *("*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.onnx", "*.gguf"),
    *("*.parquet", "*.arrow", "*.feather", "*.npy", "*.npz", "*.h5", "*.hdf5", "*.tfrecord", "*.lmdb"),
)
RECORDS = ("/runs/", "/mlruns/", "/mlartifacts/", "/mlflow.db*", "/wandb/")  # records of runs in a launching directory
# Always left out: Ray itself leaves out the first four; tools keep the others beside the code.
_NEVER = {
    *(".git", ".venv", "venv", "__pycache__"),
    *(".hg", ".svn", ".tox", ".nox", "node_modules", ".ipynb_checkpoints"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".DS_Store"),
}
# They are applied here. Ray would apply them again, and also to files that git tracks.
_IGNORE_FILES = {".gitignore", IGNORE}
_SECRET_FOLDERS = {".aws", ".azure", ".docker", ".gnupg", ".kube", ".ssh"}
# Never sent, even from a source checkout: they belong to the image or to cluster.runtime_env.
_OF_THE_IMAGE = {"ray", "torch", "mlflow", "hydra", "omegaconf", "pyarrow", "numpy", "sklearn", "matplotlib", "psutil"}
_MOST_FILES = 100_000
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
        return tuple((one.name, one.size) for one in self.entries)

    @property
    def size(self) -> int:
        """The total size in bytes."""
        return sum(one.size for one in self.entries)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, modes and contents, but not over times and locations."""
        found = hashlib.sha256()
        for one in self.entries:
            found.update(f"{one.name}\0{'x' if one.executable else '-'}\0{one.sha256}\n".encode())
        return found.hexdigest()

    def table(self, most: int = 10) -> str:
        """Return a table of the largest files or directories, the total, and what was left out and why."""
        lines = [f"{_bytes(size):>10}  {name}" for name, size in _largest(self.files, most)]
        lines.append(f"{_bytes(self.size):>10}  in {_count(len(self.entries), 'file')} of {self.root}")
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
        for one in self.entries:
            target = folder / one.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                try:
                    os.link(one.source, target)
                except OSError:  # another disk, or another user's file
                    shutil.copy2(one.source, target)
            except OSError as error:
                raise ConfigError(f"{one.source} can no longer be read: {error.strerror}") from error

    def with_files(self, more: Iterable[Path]) -> Package:
        """Return a copy of the package with further files at its root."""
        entries, imports = {one.name: one for one in self.entries}, set(self.imports)
        for path in more:
            entries[path.name], found = _read(path.name, path)
            imports |= found
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
    top = _git(root, "rev-parse", "--show-toplevel")
    inside = Path(os.fsdecode(top).rstrip("\n")) if top else root
    tree = _Tree(root, inside.resolve(), leave_out, {path.resolve() for path in secrets})
    tree.add_all(root, "", fall_back=True)
    tree.add_named()
    if tree.outside:
        raise _refusal(sorted(tree.outside), f"is a link that leads out of {tree.inside}, or back to where it is")
    if unnamed := [name for name in tree.found if not _is_text(name)]:
        raise _refusal(unnamed, "has a name that is not UTF-8")
    sizes = {}
    for name, path in tree.found.items():
        with contextlib.suppress(OSError):  # unreadable files are reported below, all together
            sizes[name] = path.stat().st_size
    if limit_mb is not None:
        check_limit(sizes.items(), limit_mb)
    entries, imports, unreadable = [], set[str](), []
    for name, path in sorted(tree.found.items()):
        try:
            entry, found = _read(name, path)
        except OSError as error:
            unreadable.append(f"{name} ({error.strerror})")
            continue
        entries.append(entry)
        imports |= found
    if unreadable:
        raise _refusal(unreadable, "cannot be read")
    return Package(root, tuple(entries), tuple(sorted(tree.left_out.items())), frozenset(imports))


def check_limit(files: Iterable[tuple[str, int]], limit_mb: float) -> None:
    """Refuse more than `limit_mb` millions of bytes.

    Raises:
        ConfigError: The files exceed the limit; the message names the largest and the fix.
    """
    files = list(files)
    total = sum(size for _, size in files)
    if total > limit_mb * 1e6:
        most = ", ".join(f"{name} ({_bytes(size)})" for name, size in _largest(files, 6))
        raise ConfigError(
            f"is less than the {_bytes(total)} that would be sent: {most}; a line of {IGNORE}, as in .gitignore, leaves "
            "out what the workers do not need",
            key="cluster.package_limit_mb",
            value=f"{limit_mb:g}",
        )


def elsewhere(names: Iterable[str], root: Path, limit_mb: float | None = None) -> tuple[list[Module], list[Path]]:
    """Return the code that must be sent although it is outside the tree at `root`.

    It is imported from neither the tree nor an installation, but for instance from a checkout installed with `pip
    install -e`, or from PYTHONPATH.

    Args:
        names: Top-level modules; the modules that they import are searched, too.
        root: The tree that is sent.
        limit_mb: As in `collect`.

    Returns:
        Python packages, and single files.
    """
    modules, single, seen, left = dict[str, Module](), dict[str, Path](), set[str](), sorted(set(names))
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for place in _places(name, root.resolve()):
            if place.is_dir():
                modules[name] = Module(name, collect(place, limit_mb=limit_mb))
                left += modules[name].package.imports
            else:
                single[name] = place
                left += _read(place.name, place)[1]
    return [modules[name] for name in sorted(modules)], [single[name] for name in sorted(single)]


# --- the files of a tree ----------------------------------------------------------------------------------------------


class _Tree:
    """The files below a root that are sent, and those that are left out."""

    def __init__(self, root: Path, inside: Path, leave_out: Sequence[str], secrets: Collection[Path]) -> None:
        self.root, self.inside, self._secrets = root, inside, secrets
        self._data = GitIgnoreSpec.from_lines([*DATA, *leave_out])
        self._ignored = _Ignored(root, IGNORE, [*DATA, *leave_out])
        self.found: dict[str, Path] = {}
        self.left_out: dict[str, str] = {}
        self.outside: list[str] = []
        self._followed: list[Path] = []  # directories behind links whose files are being added

    def add_all(self, folder: Path, prefix: str, *, fall_back: bool = False) -> None:
        """Add the files of a folder, with `prefix` before their names."""
        for name in _listed(folder, prefix, self._prunes, fall_back):
            self._add(f"{prefix}{name}", folder / name)

    def add_named(self) -> None:
        """Add what .rayignore includes with a leading !, even if git ignores it."""
        for line in _lines(self.root / IGNORE):
            name = line[1:].strip().strip("/")
            if line.startswith("!") and not re.search(r"[*?\[\\]|(^|/)\.\.(/|$)", name) and name not in self.found:
                path = self.root / name
                if path.is_dir() and not path.is_symlink():
                    for below in _walked(path, f"{name}/", self._prunes):
                        self._add(f"{name}/{below}", path / below)
                elif path.exists():
                    self._add(name, path)

    def _prunes(self, name: str) -> bool:
        return self._stays(name, is_dir=True)

    def _add(self, name: str, path: Path) -> None:
        if len(self.found) >= _MOST_FILES:
            most = ", ".join(f"{n} ({count:,})" for n, count in _largest([(n, 1) for n in self.found], 6))
            raise ConfigError(
                f"{self.root} has more than {_MOST_FILES:,} files that would be sent, in {most}; {IGNORE}, as .gitignore, "
                "leaves out what the workers do not need"
            )
        if path.is_symlink():
            self._add_link(name, path)
        elif not self._stays(name, path=path):
            self.found[name] = path

    def _add_link(self, name: str, path: Path) -> None:
        target = Path(os.path.realpath(path))
        if not target.exists():  # a link that is broken here, too
            return
        if self._stays(name, is_dir=target.is_dir(), path=None if target.is_dir() else target):
            return
        back = path.parent.resolve().is_relative_to(target) or target in self._followed
        if back or not target.is_relative_to(self.inside):
            self.outside.append(name)
        elif target.is_dir():
            if not _NEVER & set(target.relative_to(self.inside).parts):
                self._followed.append(target)
                self.add_all(target, f"{name}/")
                self._followed.pop()
        elif self._data.match_file(target.name):
            self.left_out[name] = "data"
        else:
            self.found[name] = target

    def _stays(self, name: str, *, is_dir: bool = False, path: Path | None = None) -> bool:
        """Return whether a name is left out. The reason is recorded if the user should see it."""
        parts = PurePosixPath(name).parts
        if _NEVER & set(parts) or parts[-1] in _IGNORE_FILES or parts[-1].endswith(".pyc"):
            return True
        if path is not None and self._is_secret(parts, path):
            self.left_out[name] = "secret"
            return True
        if not self._ignored(name, is_dir):
            return False
        if self._data.match_file(f"{name}/" if is_dir else name):
            self.left_out[_data_of(f"{name}/" if is_dir else name, self._data)] = "data"
        return True

    def _is_secret(self, parts: Sequence[str], path: Path) -> bool:
        if (self._secrets and path.resolve() in self._secrets) or _SECRET_FOLDERS & set(parts[:-1]):
            return True
        if not (may_hold_secrets(parts[-1]) or may_hold_secrets(path.name)):
            return False
        return path.suffix.lower() != ".pem" or not _is_certificate(path)


class _Ignored:
    """The rules of a tree's ignore files, as git reads them.

    The last line that matches decides, a deeper file takes precedence over those above, and everything in an ignored
    directory stays ignored.

    Args:
        root: The tree.
        file: The name of the ignore files.
        first: Lines that precede all of them.
    """

    def __init__(self, root: Path, file: str, first: Sequence[str] = ()) -> None:
        self._root, self._file = root, file
        self._first = GitIgnoreSpec.from_lines(first)
        self._specs: dict[str, GitIgnoreSpec | None] = {}
        self._folders = {"": False}

    def __call__(self, name: str, is_dir: bool = False) -> bool:
        return self._folder(name) if is_dir else self._folder(name.rpartition("/")[0]) or self._fits(name)

    def _folder(self, name: str) -> bool:
        if name not in self._folders:
            self._folders[name] = self._folder(name.rpartition("/")[0]) or self._fits(f"{name}/")
        return self._folders[name]

    def _fits(self, name: str) -> bool:
        above = name.rstrip("/")
        while above:
            above = above.rpartition("/")[0]
            spec = self._spec(above)
            decided = spec.check_file(name[len(above) + 1 :] if above else name).include if spec is not None else None
            if decided is not None:
                return decided
        return bool(self._first.check_file(name).include)

    def _spec(self, folder: str) -> GitIgnoreSpec | None:
        if folder not in self._specs:
            lines = _lines(self._root / folder / self._file)
            self._specs[folder] = GitIgnoreSpec.from_lines(lines) if lines else None
        return self._specs[folder]


def _listed(folder: Path, prefix: str, prunes: Callable[[str], bool], fall_back: bool) -> Iterator[str]:
    """Yield the files of a folder that git tracks or does not ignore; without git, those that .gitignore does not name.

    Args:
        folder: The folder.
        prefix: The folder's name in the package, with a trailing /.
        prunes: Returns for a directory's full name whether none of its files are wanted.
        fall_back: Whether to list a folder that git ignores as if there were no git.
    """
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    ignored = listed == b"" and _git(folder, "check-ignore", "-q", ".") is not None
    if listed is None or (ignored and fall_back):
        yield from _walked(folder, prefix, prunes)
        return
    for name in sorted({os.fsdecode(name).rstrip("/") for name in listed.split(b"\0") if name}):
        path = folder / name
        if path.is_symlink() or path.is_file():
            yield name
        elif (path / ".git").exists() and not prunes(f"{prefix}{name}"):  # a submodule, or a repository of its own
            yield from (f"{name}/{below}" for below in _listed(path, f"{prefix}{name}/", prunes, fall_back=False))


def _walked(folder: Path, prefix: str, prunes: Callable[[str], bool]) -> Iterator[str]:
    ignored, left, count = _Ignored(folder, ".gitignore"), [""], 0
    while left:
        within = left.pop()
        try:
            entries = sorted(os.scandir(folder / within), key=lambda entry: entry.name)
        except OSError as error:
            raise _refusal([f"{prefix}{within} ({error.strerror})"], "cannot be read") from error
        for entry in entries:
            name = f"{within}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if not ignored(name, is_dir=True) and not prunes(f"{prefix}{name}"):
                    left.append(f"{name}/")
            elif (entry.is_symlink() or entry.is_file()) and not ignored(name):
                if (count := count + 1) > _MOST_FILES:
                    raise _refusal([f"{prefix}{within}"], f"and what is beside it are more than {_MOST_FILES:,} files")
                yield name


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Return git's output; None if git fails or is not installed."""
    answer = git.run(folder, *arguments, time_limit_s=60)
    return answer.out if answer.ok and not answer.is_cut else None


def _read(name: str, path: Path) -> tuple[File, set[str]]:
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
    found = set()
    for after_from, after_import in _IMPORT.findall(source):
        for name in [after_from] if after_from else after_import.split(b","):
            found.add(name.decode(errors="replace").strip().partition(".")[0].partition(" ")[0])
    return {name for name in found if name.isidentifier()}


def _places(name: str, root: Path) -> Iterator[Path]:
    """Yield where a top-level module is imported from, unless that is the tree, an installation or the image."""
    if name in sys.stdlib_module_names or name in _OF_THE_IMAGE or name in ("__main__", "__future__"):
        return
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin in ("built-in", "frozen"):
        return
    for place in spec.submodule_search_locations or [spec.origin or ""]:
        path = Path(place).resolve()
        # Text that only looks like an import can name any directory.
        if spec.origin is None and not any(path.glob("*.py")):
            continue
        of_the_tree = path in ((root / name).resolve(), (root / path.name).resolve())
        if path.exists() and not of_the_tree and not {"site-packages", "dist-packages"} & set(path.parts):
            yield path


def _is_certificate(path: Path) -> bool:
    """Return whether a PEM file holds only certificates, which are public."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return b"-----BEGIN CERTIFICATE-----" in content and b"PRIVATE KEY" not in content


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _data_of(name: str, data: GitIgnoreSpec) -> str:
    """Return the name to report for data that is left out: the top-level directory if it is all data, else the file."""
    top, slash, _ = name.partition("/")
    return f"{top}/" if slash and data.match_file(f"{top}/") else name


def _refusal(names: Sequence[str], why: str) -> ConfigError:
    shown = ", ".join(name.encode(errors="replace").decode() for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ConfigError(f"{shown}{more} {why}; a line of {IGNORE}, as in .gitignore, leaves it out")


def _largest(files: Iterable[tuple[str, int]], most: int) -> list[tuple[str, int]]:
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
    found = [(name, entries[name][0]) for name in ordered]
    return [*found, (f"… {_count(len(rest), 'other')}", sum(entries[name][0] for name in rest))] if rest else found


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
