"""Where a run comes from: git commit and dirty patch, versions, command line. Reads, never changes anything."""

from __future__ import annotations

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

from raytrainer import git

_log = logging.getLogger("raytrainer.provenance")
FILE = "provenance.json"  # in a run's directory
_PACKAGES = ("raytrainer", "torch", "ray", "mlflow", "hydra-core", "omegaconf", "pyarrow", "numpy")
_PATCH_LIMIT = 5 * 2**20
_CUT = f"# cut at {_PATCH_LIMIT} bytes\n"
_UNTRACKED, _SECRET = "# not tracked, and not in this patch: ", "# left out, since it may hold secrets: "
_SUBMODULE = "# changes in the submodule "  # and its path, and the commit that they are of
# Files that are there to hold secrets, by their names, whatever case they are written in.
_SECRET_NAMES = re.compile(
    r"\.env(\..+)?|.+\.env|.+\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)|id_(rsa|dsa|ecdsa|ed25519)"
    r"|\.?(netrc|pypirc|npmrc|pgpass|htpasswd|git-credentials)|kubeconfig|auth_token"
    r"|(client_|aws|azure|gcp|google|application)?_?(credentials?|secrets?)(\.(json|ya?ml|toml|ini|cfg|txt|csv))?"
    r"|service[_-]account.*\.json",
    re.IGNORECASE,
)


def may_hold_secrets(path: str) -> bool:
    """Whether a file is, by its name, one for secrets: `.env`, keys, credentials. `.env.example` is none."""
    name = path.rpartition("/")[2]
    return _SECRET_NAMES.fullmatch(name) is not None and not name.lower().endswith((".example", ".sample", ".template"))


@dataclass(frozen=True)
class Provenance:
    """Facts of a launch, for tags and artifacts.

    Attributes:
        command: The command line, quoted for a shell.
        versions: Package → version, and `python`.
        commit, branch: Of the git repository that holds the launching directory; None outside one. A detached HEAD has
            no branch.
        patch: What the commit lacks, for `git apply`, with the names of untracked files on top; empty when clean. The
            changes inside of submodules come last, with paths from the repository's root.
        prefix: The launching directory below the repository's root, with a `/` behind; empty at the root.
        user: Who launched it; empty: unknown.
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
        """The patch without what it says of other files."""
        return "\n".join(line for line in self.patch.split("\n") if not line.startswith((_UNTRACKED, _SECRET)))

    @property
    def untracked(self) -> list[str]:
        """Files that were there and are not in the patch, from the repository's root."""
        lines = self.patch.split("\n")
        return [_unquoted(line.removeprefix(_UNTRACKED)) for line in lines if line.startswith(_UNTRACKED)]

    @property
    def diffs(self) -> dict[str, str]:
        """The patch of each checkout, to be applied from the root's: submodule's path → diff; "" is the root itself."""
        found, path = {"": list[str]()}, ""
        for line in self.diff.split("\n"):
            if match := re.fullmatch(rf"{re.escape(_SUBMODULE)}(.+) at [0-9a-f]+", line):
                path = _unquoted(match[1])
                found[path] = []
            else:
                found[path].append(line)
        return {path: "\n".join(lines) + ("\n" if lines and lines[-1] else "") for path, lines in found.items()}

    @property
    def is_cut(self) -> bool:
        """Whether the patch was too large, and is not all of it."""
        return self.patch.endswith(_CUT)

    def cut(self, most: int) -> Provenance:
        """The same with at most so many characters of the patch."""
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
        """What `to_json` wrote, in this version or a later one; ValueError for anything else."""
        found = json.loads(data)
        if not isinstance(found, dict) or "command" not in found:
            raise ValueError("no provenance")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


_submitted: Provenance | None = None


def adopt(origin: Provenance) -> None:
    """Makes `collect` tell, in this process, of the launch that submitted it; the versions stay this machine's."""
    global _submitted
    _submitted = origin


def user() -> str:
    """Whoever launched what runs in this process: on a shared cluster who submitted it, not whom it runs as."""
    if _submitted is not None and _submitted.user:
        return _submitted.user
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's number without a name
        return str(os.getuid())


def collect(argv: list[str], folder: Path) -> Provenance:
    """The provenance of a launch with `argv` from `folder`."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    if _submitted is not None:
        return replace(_submitted, versions=versions)
    command = shlex.join(["python", "-m", "raytrainer", *argv])
    return _of_repository(folder, Provenance(command, versions, user=user()))


def _of_repository(folder: Path, bare: Provenance) -> Provenance:
    """The same with what git says of the folder, within the time limit of one call of it."""
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
    # Of a detached HEAD there is none.
    branch = _ask(deadline, folder, "symbolic-ref", "--quiet", "--short", "HEAD").text or None
    prefix = _ask(deadline, folder, "rev-parse", "--show-prefix").text
    top = _ask(deadline, folder, "rev-parse", "--show-toplevel").text
    try:
        patch = _patch(Path(top), deadline)
    except _Unknown as error:
        # Without a patch the run would seem to be of the clean commit.
        _log.warning("git cannot tell what differs from the commit (%s): the run records none", error)
        return bare
    return replace(bare, commit=commit, branch=branch, patch=patch, prefix=prefix)


class _Unknown(Exception):
    """git did not say what a patch needs."""


def _ask(deadline: float, folder: Path, *arguments: str, most_bytes: int | None = None) -> git.Answer:
    left = max(0.1, deadline - time.monotonic())
    if most_bytes is None:
        return git.run(folder, *arguments, time_limit_s=left)
    return git.run(folder, *arguments, time_limit_s=left, most_bytes=most_bytes)


def _patch(top: Path, deadline: float) -> str:
    """What the commit lacks: notes, the changes of the repository, then those of each submodule below a line of its own."""
    notes, changes, size = list[str](), list[str](), 0
    repositories = [("", top)]
    for prefix, folder in repositories:  # grows
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
    """The changes of one repository, as `git apply` takes them from the root whatever the user's settings of diff are.

    Args:
        folder: Its root.
        prefix: Where that is, with a / behind.
        deadline: When git must have answered.
        notes: Gets the names of files that are not in it.
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
    found = _ask(deadline, folder, "diff", *options, *places, "HEAD", "--", ":/", *without, most_bytes=_PATCH_LIMIT + 1)
    if not found.ok:
        raise _Unknown(found.error)
    return found.out.decode("utf-8", "surrogateescape")


def _quoted(name: str) -> str:
    """A file's name on one line."""
    return json.dumps(name) if name.startswith('"') or any(c in name for c in "\n\r") else name


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def program() -> str:
    """How this program was called, for the commands that are printed to be copied."""
    return "raytrainer" if Path(sys.argv[0]).name == "raytrainer" else f"{interpreter()} -m raytrainer"


def interpreter() -> str:
    """This Python as one would type it here: `python` where that is it, else its path, relative where it is below."""
    path = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found) == path:
        return "python"
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
