"""`rerun` with the code of the original run: its commit and patch, checked out in a temporary working tree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from raytrainer import provenance, tracking
from raytrainer.core import git
from raytrainer.errors import ConfigError, RaytrainerError
from raytrainer.provenance import Provenance
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.resolve import tracking_uri_here
from raytrainer.storage.lock import machine, process_start

PLACE = ".rerun"  # below ./runs
_VARIABLE = "RAYTRAINER_RERUN_TREE"  # set for processes in such a tree, which create no other tree
_CHECKOUT_S = 3600.0  # a large repository on a slow disk
_MOST_FILES, _MOST_BYTES = 1000, 2**26  # of an untracked directory, and an untracked file, that may be code
_NOT_CODE = {"runs", "mlruns", "mlartifacts"}  # the output of runs
_NOT_CODE |= {".git", ".venv", "venv", "__pycache__", "node_modules", ".ipynb_checkpoints"}  # tools and environments


def is_inside() -> bool:
    """Return whether this process runs in such a working tree."""
    return bool(os.environ.get(_VARIABLE))


@dataclass(frozen=True)
class WorkingTree:
    """The directory of the rerun, and its additional environment variables."""

    path: Path
    environment: dict[str, str]


@contextmanager
def checkout(handle: RunHandle, then: Provenance, say: Callable[[str], None]) -> Iterator[WorkingTree]:
    """Yield a working tree below ./runs with the original commit and patch, and remove it afterwards in any case.

    Args:
        handle: The original run.
        then: Its provenance.
        say: Called with messages about the tree and its files.

    Raises:
        ConfigError: The commit or the patch is not available here.
    """
    here, name = Path.cwd(), handle.name
    top = Path(_git(here, "rev-parse", "--show-toplevel").strip("\n"))
    assert then.commit is not None
    fix = f"rerun --here {name} uses the code in this directory"
    if then.is_cut:
        raise ConfigError(f"the patch of {name} was too large to be recorded whole; {fix}")
    try:
        _git(top, "cat-file", "-e", f"{then.commit}^{{commit}}")
    except RaytrainerError:
        raise ConfigError(f"the commit {then.commit} of {name} is not in {top}: git fetch it, or {fix}") from None
    for place in leftovers(here / "runs"):
        _remove(top, place)
    place = here / "runs" / PLACE / f"{name}-{uuid.uuid4().hex[:8]}"
    place.mkdir(parents=True)
    owner = {"pid": os.getpid(), "started": process_start(os.getpid()), "machine": machine()}
    (place / "owner.json").write_text(json.dumps(owner))
    tree = place / "tree"
    try:
        _git(top, "worktree", "add", "--quiet", "--detach", str(tree), then.commit)
        try:
            _apply(top, tree, then.diffs)
        except RaytrainerError as error:
            raise ConfigError(f"the patch of {name} does not apply to its commit ({error}); {fix}") from None
        launched_in = tree / then.prefix
        launched_in.mkdir(parents=True, exist_ok=True)
        _add_untracked(top, tree, then, say)
        if handle.storage is not None and handle.storage.is_local:
            (launched_in / "runs").mkdir(exist_ok=True)
            (launched_in / "runs" / name).symlink_to(handle.storage.local_path)
        say(f"rerun of {name}: running in {launched_in}, which is removed afterwards")
        paths = [str(launched_in), *filter(None, [os.environ.get("PYTHONPATH")])]
        uri = tracking_uri_here() or tracking.default_tracking_uri(here)
        variables = {"PYTHONPATH": os.pathsep.join(paths), "MLFLOW_TRACKING_URI": uri, _VARIABLE: str(tree)}
        yield WorkingTree(launched_in, variables)
    finally:
        _remove(top, place)


def _apply(top: Path, tree: Path, diffs: Mapping[str, str]) -> None:
    """Apply the changes of the original checkout to a tree at its commit, and add its submodules with their changes.

    Args:
        top: The checkout here, whose submodules provide the commits.
        tree: The tree, without submodules.
        diffs: As `Provenance.diffs`.
    """
    if diff := diffs.get(""):
        _git(tree, "apply", "--index", "--whitespace=nowarn", "-", stdin=diff)
    checkouts = [("", tree)]
    for prefix, folder in checkouts:  # grows, because submodules may have submodules
        for path, commit in git.submodules(folder).items():
            own, source = folder / path, top / prefix / path
            if not (source / ".git").exists():
                continue  # the checkout here does not have it either
            own.parent.mkdir(parents=True, exist_ok=True)
            _git(source, "worktree", "add", "--quiet", "--detach", str(own), commit)
            name = f"{prefix}{path}"
            if diff := diffs.get(name):
                # The paths in the diff start at the root of the checkout; here the submodule is the root.
                depth = str(1 + len(PurePosixPath(name).parts))
                _git(own, "apply", "--index", "--whitespace=nowarn", f"-p{depth}", "-", stdin=diff)
            checkouts.append((f"{name}/", own))


def _add_untracked(top: Path, tree: Path, then: Provenance, say: Callable[[str], None]) -> None:
    """Add files that git does not have, as they are now. Untracked code is copied, because a link out of the tree does
    not reach a cluster. Files that git ignores, such as data, become links."""
    code = [name for name in then.untracked if (top / name).is_file() and not (tree / name).exists()]
    for name in code:
        _copy(top / name, tree / name)
    if code:
        more = f" and {len(code) - 5} more" if len(code) > 5 else ""
        say(f"not tracked by git, so as they are now: {', '.join(code[:5])}{more}")
    new_files = _untracked(top)
    for name in _untracked(top, "--directory", "--no-empty-directory"):
        below = [path for path in new_files if path.startswith(name)] if name.endswith("/") else [name]
        if len(below) > _MOST_FILES:  # too many to be code
            _link(top / name, tree / name)
            continue
        for path in below:
            if path.endswith("/"):  # a repository of its own
                _link_folder(top / path, tree / path)
            else:
                _copy(top / path, tree / path)
    for name in _untracked(top, "--ignored", "--directory"):
        if name.endswith("/"):
            _link_folder(top / name, tree / name)
        else:
            _link(top / name, tree / name)


def _untracked(top: Path, *options: str) -> list[str]:
    """Return untracked files, and directories with a `/` at the end, without those that are not part of the code."""
    names = []
    for name in _git(top, "ls-files", "--others", "--exclude-standard", *options, "-z").split("\0"):
        parts = PurePosixPath(name).parts
        if not parts or set(parts) & _NOT_CODE or parts[-1].startswith("mlflow.db"):
            continue
        if not parts[-1].endswith((".pyc", ".egg-info")):
            names.append(name)
    return names


def _copy(source: Path, target: Path) -> None:
    is_code = source.is_file() and not source.is_symlink() and source.stat().st_size <= _MOST_BYTES
    if not is_code or provenance.may_hold_secrets(source.name):
        _link(source, target)
    elif not target.exists() and not target.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _link_folder(source: Path, target: Path) -> None:
    """Create a directory with links to the entries. A link to the directory would not match a git pattern `data/`."""
    entries = list(islice(source.iterdir(), _MOST_FILES + 1))
    if len(entries) > _MOST_FILES:
        _link(source, target)
        return
    for entry in entries:
        if entry.name not in _NOT_CODE:
            _link(entry, target / entry.name)


def _link(source: Path, target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def rerun_in(folder: WorkingTree, arguments: Sequence[str]) -> int:
    """Run `python -m raytrainer rerun …` in the folder, with this process's streams, signals and exit code."""
    child = subprocess.Popen(
        [sys.executable, "-m", "raytrainer", "rerun", *arguments],
        cwd=folder.path,
        env={**os.environ, **folder.environment},
    )
    before = {}
    if threading.current_thread() is threading.main_thread():
        # The terminal sends Ctrl-C to the child too. A signal to this process alone is passed on.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: child.send_signal(signal.SIGHUP))
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leftovers(runs: Path) -> list[Path]:
    """Return trees below `runs` whose process on this machine was killed and in which no process runs any more."""
    places = []
    for place in sorted((runs / PLACE).iterdir()) if (runs / PLACE).is_dir() else ():
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads((place / "owner.json").read_text())
            gone = owner["machine"] == machine() and process_start(int(owner["pid"])) != owner["started"]
            if gone and not _is_used(place):
                places.append(place)
    return places


def _is_used(place: Path) -> bool:
    """Return whether a process works in a directory: the run itself outlives the killed process that waited for it."""
    top = place.resolve()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if (process / "cwd").readlink().is_relative_to(top):
                return True
    return False


def remove(place: Path) -> None:
    """Remove a tree that `leftovers` returned, and git's record of it."""
    try:
        top = Path(_git(Path.cwd(), "rev-parse", "--show-toplevel").strip("\n"))
    except RaytrainerError:  # not a checkout any more, so git has no record
        top = Path.cwd()
    _remove(top, place)


def _remove(top: Path, place: Path) -> None:
    # Even with --force, git does not remove a tree that still has submodules.
    with suppress(RaytrainerError):
        for path in reversed(_all_submodules(place / "tree")):
            _git(top / path, "worktree", "remove", "--force", str(place / "tree" / path))
    with suppress(RaytrainerError):
        _git(top, "worktree", "remove", "--force", str(place / "tree"))
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.parent.rmdir()  # empty after the last tree
    with suppress(RaytrainerError):
        _git(top, "worktree", "prune")


def _all_submodules(tree: Path) -> list[str]:
    """Return the paths of the submodules that are checked out in a tree, including nested ones."""
    prefixes = [""] if tree.is_dir() else []
    for prefix in prefixes:  # grows meanwhile
        folder = tree / prefix
        prefixes += [f"{prefix}{path}/" for path in git.submodules(folder) if (folder / path / ".git").exists()]
    return prefixes[1:]


def _git(folder: Path, *arguments: str, stdin: str = "") -> str:
    answer = git.run(
        folder, *arguments, stdin=stdin.encode("utf-8", "surrogateescape"), time_limit_s=_CHECKOUT_S, most_bytes=2**30
    )
    if not answer.ok:
        raise RaytrainerError(answer.error)
    return answer.out.decode("utf-8", "surrogateescape")
