"""Where a run comes from: git commit, uncommitted changes, versions and command line. This module only reads."""

from __future__ import annotations

import functools
import getpass
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from raytrainer.core import git

_log = logging.getLogger("raytrainer.provenance")
FILE = "provenance.json"  # in the run directory
_SUBMITTED_BY = "RAYTRAINER_SUBMITTED_BY"
_PACKAGES = ("raytrainer", "torch", "ray", "mlflow", "hydra-core", "omegaconf", "pyarrow", "numpy")
_PATCH_LIMIT = 5 * 2**20
_CUT = f"# cut at {_PATCH_LIMIT} bytes\n"
_UNTRACKED, _SECRET = "# not tracked, and not in this patch: ", "# left out, since it may hold secrets: "
_SUBMODULE = "# changes in the submodule "  # followed by its path and its commit
# Names of files that usually hold secrets, in upper or lower case.
_SECRET_NAMES = re.compile(
    r"\.env(\..+)?|.+\.env|.+\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)|id_(rsa|dsa|ecdsa|ed25519)"
    r"|\.?(netrc|pypirc|npmrc|pgpass|htpasswd|git-credentials)|kubeconfig|auth_token"
    r"|(client_|aws|azure|gcp|google|application)?_?(credentials?|secrets?)(\.(json|ya?ml|toml|ini|cfg|txt|csv))?"
    r"|service[_-]account.*\.json",
    re.IGNORECASE,
)


def may_hold_secrets(path: str) -> bool:
    """Return whether a file's name suggests secrets: `.env`, keys, credentials. `.env.example` does not."""
    name = path.rpartition("/")[2]
    return _SECRET_NAMES.fullmatch(name) is not None and not name.lower().endswith((".example", ".sample", ".template"))


@dataclass(frozen=True)
class Provenance:
    """The origin of a launch, for tags and artifacts.

    Attributes:
        command: The command line, quoted for a shell.
        versions: Package → version, including `python`.
        commit, branch: Those of the git repository with the launching directory; None outside a repository. A detached
            HEAD has no branch.
        patch: The changes since the commit, for `git apply`, with the names of untracked files on top; empty if there
            are none. The changes inside submodules come last, with paths from the repository's root.
        prefix: The launching directory relative to the repository's root, with a `/` at the end; empty at the root.
        user: The user who launched it; empty if unknown.
    """

    command: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    branch: str | None = None
    patch: str = ""
    prefix: str = ""
    user: str = ""

    @property
    def diff(self) -> str:
        """The patch without the comments about other files."""
        return "\n".join(line for line in self.patch.split("\n") if not line.startswith((_UNTRACKED, _SECRET)))

    @property
    def untracked(self) -> list[str]:
        """Files that existed but are not in the patch, relative to the repository's root."""
        lines = self.patch.split("\n")
        return [_unquoted(line.removeprefix(_UNTRACKED)) for line in lines if line.startswith(_UNTRACKED)]

    @property
    def diffs(self) -> dict[str, str]:
        """The patch of each checkout, with paths from the root: submodule's path → diff; "" is the root itself."""
        lines_of, path = {"": list[str]()}, ""
        for line in self.diff.split("\n"):
            if match := re.fullmatch(rf"{re.escape(_SUBMODULE)}(.+) at [0-9a-f]+", line):
                path = _unquoted(match[1])
                lines_of[path] = []
            else:
                lines_of[path].append(line)
        return {path: "\n".join(lines) + ("\n" if lines and lines[-1] else "") for path, lines in lines_of.items()}

    @property
    def is_cut(self) -> bool:
        """Whether the patch was too large and is incomplete."""
        return self.patch.endswith(_CUT)

    def cut(self, most: int) -> Provenance:
        """Return the same provenance with at most `most` characters of the patch."""
        return self if len(self.patch) <= most else replace(self, patch=f"{self.patch[:most]}\n{_CUT}")

    def tags(self) -> dict[str, str]:
        tags = {"raytrainer.command": self.command, "raytrainer.host": platform.node()}
        tags.update({f"raytrainer.version.{name}": version for name, version in self.versions.items()})
        if self.commit:
            tags["mlflow.source.git.commit"] = self.commit
            tags["mlflow.source.git.dirty"] = str(bool(self.patch)).lower()
        if self.branch:
            tags["mlflow.source.git.branch"] = self.branch
        return tags

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Provenance:
        """Parse what `to_json` of this version or a later one wrote. Raise ValueError for anything else."""
        values = json.loads(data)
        if not isinstance(values, dict) or "command" not in values:
            raise ValueError("no provenance")
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def adopt(file: Path) -> None:
    """Make `collect` in this process return the launch that submitted it. The versions remain those of this machine.

    The environment variable `RAYTRAINER_SUBMITTED_BY` names the file, so call it before any thread is started.

    Args:
        file: What `to_json` of that launch wrote.

    Raises:
        ValueError: The file is no provenance.
    """
    _submission_in(str(file))
    os.environ[_SUBMITTED_BY] = str(file)


def _submission() -> Provenance | None:
    file = os.environ.get(_SUBMITTED_BY)
    return _submission_in(file) if file else None


@functools.cache
def _submission_in(file: str) -> Provenance:
    return Provenance.from_json(Path(file).read_bytes())


def user() -> str:
    """Return who launched this process's run. On a shared cluster, that is who submitted it, not the process's user."""
    if (submission := _submission()) is not None and submission.user:
        return submission.user
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container, a user id may have no name
        return str(os.getuid())


def collect(argv: list[str], folder: Path) -> Provenance:
    """Return the provenance of a launch with `argv` from `folder`."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    if (submission := _submission()) is not None:
        return replace(submission, versions=versions)
    command = shlex.join(["python", "-m", "raytrainer", *argv])
    return _of_repository(folder, Provenance(command, versions, user=user()))


def _of_repository(folder: Path, bare: Provenance) -> Provenance:
    """Add what git says about the folder. All calls together have the time limit of one git call."""
    deadline = time.monotonic() + git.TIME_LIMIT_S
    inside = _ask(deadline, folder, "rev-parse", "--is-inside-work-tree")
    if inside.is_foreign:
        _log.warning(
            "git does not read the repository of %s, which belongs to another user: the run records no commit;"
            " `git config --global --add safe.directory DIR` makes git trust it",
            folder,
        )
    elif inside.code is None and shutil.which("git") is not None:
        _log.warning("%s: the run records no commit", inside.error)
    if inside.text != "true":  # no repository, a bare one, or the inside of a .git
        return bare
    commit = _ask(deadline, folder, "rev-parse", "--verify", "--quiet", "HEAD").text
    if not commit:  # nothing is committed yet
        return bare
    # A detached HEAD has no branch.
    branch = _ask(deadline, folder, "symbolic-ref", "--quiet", "--short", "HEAD").text or None
    prefix = _ask(deadline, folder, "rev-parse", "--show-prefix").text
    top = _ask(deadline, folder, "rev-parse", "--show-toplevel").text
    try:
        patch = _patch(Path(top), deadline)
    except _Unknown as error:
        # Without the patch, the run would seem to come from the clean commit.
        _log.warning("git cannot tell what differs from the commit (%s): the run records none", error)
        return bare
    return replace(bare, commit=commit, branch=branch, patch=patch, prefix=prefix)


class _Unknown(Exception):
    """Raised if git did not return what a patch needs."""


def _ask(deadline: float, folder: Path, *arguments: str, most_bytes: int = 2**28) -> git.Answer:
    return git.run(folder, *arguments, time_limit_s=max(0.1, deadline - time.monotonic()), most_bytes=most_bytes)


def _patch(top: Path, deadline: float) -> str:
    """Return the changes since the commit: notes, the repository's changes, then each submodule's with a heading."""
    notes, changes, size = list[str](), list[str](), 0
    repositories = [("", top)]
    for prefix, folder in repositories:  # grows meanwhile
        diff = _diff(folder, prefix, deadline, notes)
        if prefix and diff:
            commit = _ask(deadline, folder, "rev-parse", "HEAD").text
            diff = f"{_SUBMODULE}{_quoted(prefix.rstrip('/'))} at {commit}\n{diff}"
        changes.append(diff)
        size += len(diff)
        if size > _PATCH_LIMIT:
            break
        if (folder / ".gitmodules").is_file():
            checked_out = (name for name in git.submodules(folder) if (folder / name / ".git").exists())
            repositories += [(f"{prefix}{name}/", folder / name) for name in checked_out]
    patch = "".join(changes)
    if len(patch) > _PATCH_LIMIT:
        patch = patch[:_PATCH_LIMIT] + "\n" + _CUT
    return "".join(notes) + patch


def _diff(folder: Path, prefix: str, deadline: float, notes: list[str]) -> str:
    """Return the changes of one repository for `git apply` from the root, whatever the user's settings of diff are.

    Args:
        folder: The root of the repository.
        prefix: Its path from the outermost root, with a / at the end.
        deadline: When git must have answered, on the monotonic clock.
        notes: Receives the names of files that are not in the diff.
    """
    inside = ("--ignore-submodules=dirty", "--submodule=short")
    changed = _ask(deadline, folder, "diff", "--name-only", "-z", *inside, "HEAD")
    if not changed.ok:
        raise _Unknown(changed.error)
    secret = [name for name in changed.names if may_hold_secrets(name)]
    untracked = _ask(deadline, folder, "ls-files", "--others", "--exclude-standard", "-z")
    notes += [f"{_UNTRACKED}{_quoted(prefix + name)}\n" for name in untracked.names[:200]]
    notes += [f"{_SECRET}{_quoted(prefix + name)}\n" for name in secret]
    options = ("--binary", "--no-ext-diff", "--no-textconv", "--no-color", *inside)
    places = (f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}")
    without = [f":(top,exclude,literal){name}" for name in secret]
    diff = _ask(deadline, folder, "diff", *options, *places, "HEAD", "--", ":/", *without, most_bytes=_PATCH_LIMIT + 1)
    if not diff.ok:
        raise _Unknown(diff.error)
    return diff.out.decode("utf-8", "surrogateescape")


def _quoted(name: str) -> str:
    """Return a file's name as text without line breaks."""
    return json.dumps(name) if name.startswith('"') or any(c in name for c in "\n\r") else name


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def program() -> str:
    """Return how this program was called, for printed commands that the user can copy."""
    return "raytrainer" if Path(sys.argv[0]).name == "raytrainer" else f"{interpreter()} -m raytrainer"


def interpreter() -> str:
    """Return this Python as the user can type it: `python` if that is it, else its path, relative if possible."""
    path = Path(sys.executable)
    python = shutil.which("python")
    if python is not None and Path(python) == path:
        return "python"
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
