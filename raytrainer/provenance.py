"""Where a run comes from: git commit and dirty patch, versions, command line. Reads, never changes anything."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

FILE = "provenance.json"  # in a run's directory
_PACKAGES = ("raytrainer", "torch", "ray", "mlflow", "hydra-core", "omegaconf", "pyarrow", "numpy")
_PATCH_LIMIT = 5 * 2**20
_CUT = f"# cut at {_PATCH_LIMIT} bytes\n"
_UNTRACKED, _SECRET = "# not tracked, and not in this patch: ", "# left out, since it may hold secrets: "
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
        commit, branch: Of the git repository that holds the launching directory; None outside one.
        patch: What the commit lacks, for `git apply`, with the names of untracked files on top; empty when clean.
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
        return [line.removeprefix(_UNTRACKED) for line in lines if line.startswith(_UNTRACKED)]

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
    commit = (_git(folder, "rev-parse", "HEAD") or "").strip() or None
    if commit is None:
        return Provenance(command, versions, user=user())
    branch = (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None
    prefix = (_git(folder, "rev-parse", "--show-prefix") or "").strip("\n")
    return Provenance(command, versions, commit, branch, _patch(folder), prefix, user())


def _patch(folder: Path) -> str:
    changed = (_git(folder, "diff", "--name-only", "-z", "HEAD", "--", ":/") or "").split("\0")
    secret = [name for name in changed if may_hold_secrets(name)]
    # As `git apply` takes it, whatever the user's settings of diff are; untracked files are only named.
    options = ("--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    without = [f":(top,exclude,literal){name}" for name in secret]
    patch = _git(folder, "diff", *options, "HEAD", "--", ":/", *without) or ""
    if len(patch) > _PATCH_LIMIT:
        patch = patch[:_PATCH_LIMIT] + "\n" + _CUT
    untracked = (_git(folder, "ls-files", "--others", "--exclude-standard", "--full-name", ":/") or "").splitlines()
    notes = [*(f"{_UNTRACKED}{name}\n" for name in untracked[:200]), *(f"{_SECRET}{name}\n" for name in secret)]
    return "".join(notes) + patch


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.quotepath=off", *arguments],
            capture_output=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a repository on a disk that does not answer
        return None
    # Byte for byte, whatever encoding and line ends the files have: a patch of anything else would not apply.
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None


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
