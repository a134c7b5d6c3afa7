"""Select the files of a tree to send: those that git tracks or does not ignore.

Data, secrets and files that .rayignore names are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from raytrainer.core import git
from raytrainer.errors import ConfigError
from raytrainer.provenance import may_hold_secrets
from raytrainer.submission.sizes import largest

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
_MOST_FILES = 100_000


class Tree:
    """The files below a root that are sent, and those that are left out."""

    def __init__(self, root: Path, inside: Path, leave_out: Sequence[str], secrets: Collection[Path]) -> None:
        self.root, self.inside, self._secrets = root, inside, secrets
        self._data = GitIgnoreSpec.from_lines([*DATA, *leave_out])
        self._ignored = _Ignored(root, IGNORE, [*DATA, *leave_out])
        self.sent: dict[str, Path] = {}
        self.left_out: dict[str, str] = {}
        self.outside: list[str] = []
        self._followed: list[Path] = []  # directories behind links whose files are being added

    def add_all(self, folder: Path, prefix: str, *, fall_back: bool = False) -> None:
        """Add the files of a folder.

        Args:
            folder: The folder.
            prefix: Text before their names: the folder's name in the package, with a trailing /.
            fall_back: Whether to list a folder that git ignores as if there were no git.
        """
        for name in _listed(folder, prefix, self._prunes, fall_back):
            self._add(f"{prefix}{name}", folder / name)

    def add_named(self) -> None:
        """Add what .rayignore includes with a leading !, even if git ignores it."""
        for line in _lines(self.root / IGNORE):
            name = line[1:].strip().strip("/")
            if line.startswith("!") and not re.search(r"[*?\[\\]|(^|/)\.\.(/|$)", name) and name not in self.sent:
                path = self.root / name
                if path.is_dir() and not path.is_symlink():
                    for below in _walked(path, f"{name}/", self._prunes):
                        self._add(f"{name}/{below}", path / below)
                elif path.exists():
                    self._add(name, path)

    def _prunes(self, name: str) -> bool:
        return self._stays(name, is_dir=True)

    def _add(self, name: str, path: Path) -> None:
        if len(self.sent) >= _MOST_FILES:
            most = ", ".join(f"{n} ({count:,})" for n, count in largest([(n, 1) for n in self.sent], 6))
            raise ConfigError(
                f"{self.root} has more than {_MOST_FILES:,} files that would be sent, in {most}; {IGNORE}, as .gitignore, "
                "leaves out what the workers do not need"
            )
        if path.is_symlink():
            self._add_link(name, path)
        elif not self._stays(name, path=path):
            self.sent[name] = path

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
            self.sent[name] = target

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
    listed = git_output(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    ignored = listed == b"" and git_output(folder, "check-ignore", "-q", ".") is not None
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
            raise refusal([f"{prefix}{within} ({error.strerror})"], "cannot be read") from error
        for entry in entries:
            name = f"{within}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if not ignored(name, is_dir=True) and not prunes(f"{prefix}{name}"):
                    left.append(f"{name}/")
            elif (entry.is_symlink() or entry.is_file()) and not ignored(name):
                if (count := count + 1) > _MOST_FILES:
                    raise refusal([f"{prefix}{within}"], f"and what is beside it are more than {_MOST_FILES:,} files")
                yield name


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def git_output(folder: Path, *arguments: str) -> bytes | None:
    """Return git's output; None if git fails or is not installed."""
    answer = git.run(folder, *arguments, time_limit_s=60)
    return answer.out if answer.ok and not answer.is_cut else None


def _is_certificate(path: Path) -> bool:
    """Return whether a PEM file holds only certificates, which are public."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return b"-----BEGIN CERTIFICATE-----" in content and b"PRIVATE KEY" not in content


def _data_of(name: str, data: GitIgnoreSpec) -> str:
    """Return the name to report for data that is left out: the top-level directory if it is all data, else the file."""
    top, slash, _ = name.partition("/")
    return f"{top}/" if slash and data.match_file(f"{top}/") else name


def refusal(names: Sequence[str], why: str) -> ConfigError:
    shown = ", ".join(name.encode(errors="replace").decode() for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ConfigError(f"{shown}{more} {why}; a line of {IGNORE}, as in .gitignore, leaves it out")
