"""`prune`: show or delete old checkpoints, spools that MLflow has stored, and what killed runs and Ray have left.

A run that is or may be alive is left unchanged. Each run keeps its last and its best checkpoint, and nothing outside the
run directory is deleted. Deletion holds the run's lock, and includes only what was listed before the lock was taken.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from raytrainer.attempt import CONFIG, Record
from raytrainer.core.formatting import aligned
from raytrainer.errors import CheckpointError, RaytrainerError, StorageError, StorageLocked
from raytrainer.runs import printing, worktree
from raytrainer.runs.arguments import VerbParser, age, positive
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.jobs import Clusters
from raytrainer.runs.liveness import LIMIT_S, LOCK, Liveness, LockState
from raytrainer.runs.reconcile import check_all
from raytrainer.runs.resolve import resolve_run, runs_in, submitted_from, with_directory, with_submission
from raytrainer.storage import Storage
from raytrainer.sweep.plan import Plan
from raytrainer.tracking.spool import Spool

ABOUT = "List old checkpoints, uploaded spools and leftovers of killed runs. Only --yes deletes them."
KINDS = ("checkpoint", "unfinished save", "spool", "ray", "worktree")
_RAY_FILES = re.compile(r"attempt-[0-9a-f]+")  # Ray Train's own records of an attempt, which are not used


def add_arguments(parser: VerbParser) -> None:
    add = parser.add_argument
    add("--yes", action="store_true", help="delete it")
    add("--dry-run", action="store_true", help="delete nothing, even with --yes")
    about = "how many last checkpoints to keep, besides the best (1)"
    add("--keep", metavar="N", type=positive, default=1, help=about)
    about = "only runs that ended at least this long ago: 30d, 12h"
    add("--older-than", metavar="AGE", type=age, default=0.0, help=about)
    add("id", metavar="ID", nargs="?", help="a run or sweep; without it, all below ./runs")


def run(arguments: argparse.Namespace) -> int:
    delete, keep = arguments.yes and not arguments.dry_run, arguments.keep
    pruned = prune(arguments.id, delete=delete, keep=keep, older_than_s=arguments.older_than, say=printing.say)
    print(printing.to_json(pruned.to_json()) if arguments.json else pruned.text())
    return 1 if pruned.failed else 0


@dataclass(frozen=True)
class PruneItem:
    """Something to delete.

    Attributes:
        run: The run to which it belongs.
        kind: One of `KINDS`.
        path: Relative to the run directory, or for a worktree to ./runs.
        bytes: Its size.
    """

    run: str
    kind: str
    path: str
    bytes: int


@dataclass(frozen=True)
class Pruned:
    """The result of a prune.

    Attributes:
        items: The items that were deleted, or that can be.
        deleted: Whether they were deleted, or only shown.
        left: Run → why it is left unchanged.
        failed: Path → why it could not be deleted.
    """

    items: Sequence[PruneItem]
    deleted: bool = False
    left: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}

    def text(self) -> str:
        """Return the result as text: a line for each run, and the sum."""
        if not self.items:
            return "nothing is deleted" if self.failed else "nothing to delete"
        rows = [("RUN", "WHAT", "BYTES")]
        for run in dict.fromkeys(item.run for item in self.items):
            own = [item for item in self.items if item.run == run]
            count = {kind: sum(item.kind == kind for item in own) for kind in KINDS}
            what = ", ".join(f"{number} {kind}" for kind, number in count.items() if number)
            rows.append((run, what, f"{sum(item.bytes for item in own):,}"))
        rows.append(("in all", str(len(self.items)), f"{self.bytes:,}"))
        return f"{aligned(rows, right={2})}\n" + ("deleted" if self.deleted else "nothing is deleted; --yes deletes it")


def prune(
    identifier: str | None,
    *,
    delete: bool,
    keep: int = 1,
    older_than_s: float = 0.0,
    say: Callable[[str], None],
    clusters: Clusters | None = None,
    root: Path | None = None,
) -> Pruned:
    """Find what can be deleted of one run or of all, and delete it on request.

    Args:
        identifier: The ID of a run or sweep; None for all below ./runs and those submitted from here.
        delete: Whether to delete, or only to show.
        keep: How many of a run's last checkpoints to keep, in addition to the best.
        older_than_s: Only prune runs that ended at least this many seconds ago.
        say: Called with a message for each run that is left unchanged and each path that could not be deleted.
        clusters: The clusters that may know jobs.
        root: The directory with the runs; None for ./runs.

    Raises:
        RunNotFound: There is no such run.
    """
    root, clusters = root or Path.cwd() / "runs", clusters or Clusters()
    runs = [resolve_run(identifier, root)] if identifier is not None else list(_all(root))
    pruned = Pruned([], delete)
    for handle, liveness in check_all(runs, clusters):
        try:
            if reason := _reason_to_keep(handle, liveness, clusters, older_than_s):
                pruned.left[handle.name] = reason
                continue
            assert handle.storage is not None
            items = _items(handle.record, handle.storage, keep)
            if items and delete:
                items = _delete(handle, items, keep, pruned)
            pruned = replace(pruned, items=[*pruned.items, *items])
        except (RaytrainerError, OSError) as error:
            pruned.left[handle.name] = str(error)
    if identifier is None:
        pruned = replace(pruned, items=[*pruned.items, *_worktrees(root, delete)])
    for name, reason in pruned.left.items():
        say(f"{name} is left alone: {reason}")
    for path, reason in pruned.failed.items():
        say(f"{path} could not be deleted: {reason}")
    return pruned


def _all(root: Path) -> Iterator[RunHandle]:
    names = set()
    for handle in runs_in(root):
        names.add(handle.name)
        yield with_submission(handle, root)
    for handle in submitted_from(root):
        if handle.name not in names:
            yield with_directory(handle)


def _reason_to_keep(handle: RunHandle, liveness: Liveness, clusters: Clusters, older_than_s: float) -> str | None:
    """Return why nothing of a run may be deleted; None if the run has certainly ended."""
    if handle.trial is not None:
        return "it is a trial; its sweep is pruned as a whole"
    if handle.storage is None:
        return "its directory cannot be read from here"
    if liveness.state != "dead":
        return liveness.reason
    if handle.storage.is_local and handle.storage.local_path.is_symlink():
        return "its directory is a link to another place"
    lock = LockState.read(handle.storage)
    if not lock.readable or lock.now is None:
        return "its directory cannot be written from here"
    if (silence := clusters.query_error(handle)) and (handle.record.status == "RUNNING" or handle.next_submission_id):
        return silence
    last = max([lock.written or 0.0, *(lease.heartbeat for lease in lock.leases)])
    if handle.record.status == "RUNNING" and lock.now - last < LIMIT_S:
        return "it died a moment ago; its workers may still be there"  # workers outlive a killed driver by seconds
    if lock.now - last < older_than_s:
        return "it has not ended long enough ago"
    return None


def _items(record: Record, storage: Storage, keep: int) -> list[PruneItem]:
    """Return what can be deleted of a run, or of a sweep and its trials."""
    mode = _mode(record, storage)
    places = [""]
    # A link named `trials` would lead out of the run directory.
    if record.kind == "sweep" and any(entry.name == "trials" and entry.is_dir for entry in storage.list()):
        places += [f"trials/{entry.name}/" for entry in storage.list("trials") if entry.is_dir]
    return [item for place in places for item in _items_in(record, storage, place, mode, keep)]


def _items_in(record: Record, storage: Storage, place: str, mode: str, keep: int) -> Iterator[PruneItem]:
    from raytrainer.checkpoint import retention

    def item(kind: str, path: str) -> PruneItem:
        return PruneItem(record.name, kind, place + path, size_of(storage, place + path))

    here = {entry.name for entry in storage.list(place.rstrip("/")) if entry.is_dir}
    if "checkpoints" in here:
        surplus = retention.surplus(storage.child(f"{place}checkpoints"), mode=mode, keep=keep)
        yield from (item("checkpoint", f"checkpoints/{name}") for name in surplus.old)
        yield from (item("unfinished save", f"checkpoints/{name}") for name in surplus.unfinished)
    # The spool of a run that was created offline knows which MLflow run it became.
    offline = (record.run_id or "").startswith("offline-")
    sent = storage.is_local and not offline and not Spool(storage.local_path / place / "spool").pending()
    if "spool" in here and sent:
        yield item("spool", "spool")
    yield from (item("ray", name) for name in sorted(here) if _RAY_FILES.fullmatch(name))


def _mode(record: Record, storage: Storage) -> str:
    """Return the mode of the monitor, without which the best checkpoint is unknown."""
    if record.kind == "sweep":
        return Plan.read(storage).mode
    try:
        mode = yaml.safe_load(storage.read_if_exists(CONFIG) or b"")["checkpoint"]["mode"]
    except (yaml.YAMLError, ValueError, TypeError, KeyError):  # missing, truncated or overwritten
        mode = None
    if mode not in ("min", "max"):
        raise StorageError(f"its {CONFIG} does not say which checkpoint is the best")
    return str(mode)


def _delete(handle: RunHandle, items: Sequence[PruneItem], keep: int, pruned: Pruned) -> list[PruneItem]:
    """Delete, under the run's lock, the items that can still be deleted. Return those that were deleted."""
    storage, record = handle.storage, handle.record
    assert storage is not None
    try:
        with storage.lock(LOCK, {"run": f"{record.name}, being pruned"}) as lock:
            fresh = Record.read(storage)
            if fresh is None or (fresh.attempts, fresh.status) != (record.attempts, record.status):
                raise StorageError("another attempt has continued it")
            still = {item.path for item in _items(record, storage, keep)}
            items = [item for item in items if item.path in still]
            _check_kept(record, storage, items, keep)
            deleted = []
            for item in items:
                try:
                    lock.check()
                    if _delete_one(storage, item):
                        deleted.append(item)
                except (RaytrainerError, OSError) as error:
                    pruned.failed[f"{record.name}/{item.path}"] = str(error)
            return deleted
    except StorageLocked as error:
        raise StorageError(f"it is in use: {error}") from error


def _check_kept(record: Record, storage: Storage, items: Sequence[PruneItem], keep: int) -> None:
    """Check that the remaining checkpoints are valid: if one is corrupt, resume needs an older checkpoint."""
    from raytrainer.checkpoint import retention

    mode = _mode(record, storage)
    places = {item.path.rpartition("/")[0] for item in items if item.kind == "checkpoint"}
    for place in sorted(places):
        checkpoints = storage.child(place)
        for name in retention.surplus(checkpoints, mode=mode, keep=keep).kept:
            try:
                retention.verify(checkpoints, name)
            except CheckpointError as error:
                raise StorageError(f"a checkpoint to keep is corrupt, so none is deleted: {error}") from error


def _delete_one(storage: Storage, item: PruneItem) -> bool:
    from raytrainer.checkpoint import retention

    if item.kind in ("checkpoint", "unfinished save"):
        place, _, name = item.path.rpartition("/")
        retention.delete(storage.child(place), name)
        return True
    if item.kind == "spool":
        spool = Spool(storage.local_path / item.path)
        with spool.lock() as alone:  # a late uploader may still use it
            if not alone or spool.pending():
                return False
            storage.delete(item.path)
            return True
    storage.delete(item.path)
    return True


def _worktrees(root: Path, delete: bool) -> list[PruneItem]:
    """Return the working trees of reruns whose process was killed, after deleting them on request."""
    items = []
    for place in worktree.leftovers(root):
        items.append(PruneItem("(rerun)", "worktree", f"{worktree.PLACE}/{place.name}", _bytes_below(place)))
        if delete:
            worktree.remove(place)
    return items


def size_of(storage: Storage, path: str) -> int:
    """Return the size of all files below a directory, in bytes."""
    if storage.is_local:
        return _bytes_below(storage.local_path / path)
    entries = storage.list(path)
    return sum(size_of(storage, f"{path}/{entry.name}") if entry.is_dir else entry.size for entry in entries)


def _bytes_below(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
