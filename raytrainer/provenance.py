"""Where a run comes from: git commit and dirty patch, versions, command line. Reads, never changes anything."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

_PACKAGES = ("raytrainer", "torch", "ray", "mlflow", "hydra-core", "omegaconf", "pyarrow", "numpy")
_PATCH_LIMIT = 5 * 2**20


@dataclass(frozen=True)
class Provenance:
    """Facts of a launch, for tags and artifacts.

    Attributes:
        command: The command line, quoted for a shell.
        versions: Package → version, and `python`.
        commit, branch: Of the git repository that holds the launching directory; None outside one.
        patch: What the commit lacks, for `git apply`, with the names of untracked files on top; empty when clean.
    """

    command: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    branch: str | None = None
    patch: str = ""

    def tags(self) -> dict[str, str]:
        tags = {"raytrainer.command": self.command, "raytrainer.host": platform.node()}
        tags.update({f"raytrainer.version.{name}": version for name, version in self.versions.items()})
        if self.commit:
            tags["mlflow.source.git.commit"] = self.commit
            tags["mlflow.source.git.dirty"] = str(bool(self.patch)).lower()
        if self.branch:
            tags["mlflow.source.git.branch"] = self.branch
        return tags


def collect(argv: list[str], folder: Path) -> Provenance:
    """The provenance of a launch with `argv` from `folder`."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    commit = (_git(folder, "rev-parse", "HEAD") or "").strip() or None
    patch = ""
    if commit is not None:
        # As `git apply` takes it, whatever the user's settings of diff are; untracked files are only named.
        patch = (
            _git(
                folder, "diff", "--binary", "--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "HEAD"
            )
            or ""
        )
        if len(patch) > _PATCH_LIMIT:
            patch = patch[:_PATCH_LIMIT] + f"\n# cut at {_PATCH_LIMIT} bytes\n"
        untracked = (_git(folder, "ls-files", "--others", "--exclude-standard") or "").splitlines()
        patch = "".join(f"# not tracked, and not in this patch: {name}\n" for name in untracked[:200]) + patch
    return Provenance(
        shlex.join(["python", "-m", "raytrainer", *argv]),
        versions,
        commit,
        (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None if commit else None,
        patch,
    )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.quotepath=off", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a repository on a disk that does not answer
        return None
    return done.stdout if done.returncode == 0 else None


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
