"""`Checkpointer`: save, find and load the checkpoints of one run.
A save costs the training loop one copy in memory; a thread writes it, agrees with the other ranks, and commits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from raytrainer.checkpoint import files
from raytrainer.checkpoint import manifest as manifests
from raytrainer.checkpoint.manifest import CheckpointInfo, Manifest
from raytrainer.checkpoint.ranks import Ranks
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound, StorageError
from raytrainer.storage import Storage

_log = logging.getLogger("raytrainer.checkpoint")


class Checkpointer:
    """The checkpoints below `storage`, one directory a step, each committed by its manifest or ignored.

    Args:
        storage: The run's own place for checkpoints; nothing outside it is written or deleted.
        rank: This process's rank among `world_size` that save and load together.
        world_size: More than one needs `group`.
        num_to_keep: How many of the last steps stay; the best one stays besides. None: all.
        mode: `max` or `min`: which metric is the best.
        async_save: Write in a thread; False: `save` returns when it is committed.
        group: A gloo process group of all ranks that nothing else uses: the thread's own.
        before_commit: Called on rank 0 in the writing thread just before a checkpoint comes to be: for what must be as
            durable as the checkpoint, since a run that goes on from it does not do it again. It must not raise.
        on_commit: Called on every rank with each checkpoint when it is committed, in the writing thread.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_to_keep: int | None = 2,
        mode: str = "max",
        async_save: bool = True,
        group: Any = None,
        before_commit: Callable[[], None] | None = None,
        on_commit: Callable[[CheckpointInfo], None] | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r}: 'max' or 'min'")
        if num_to_keep is not None and num_to_keep < 1:
            raise ValueError(f"num_to_keep={num_to_keep}: at least 1, or None to keep all")
        self._storage, self._ranks = storage, Ranks(rank, world_size, group)
        self._num_to_keep, self._mode, self._async, self._on_commit = num_to_keep, mode, async_save, on_commit
        self._snapshot = files.Snapshot(rank)
        self._before_commit = before_commit
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._held: tuple[int, float | None, files.Contents, BaseException | None] | None = None
        self._verified: set[tuple[str, str]] = set()
        self._corrupt: set[str] = set()

    # -- saving --------------------------------------------------------------------------------------------------

    def save(
        self, step: int, shared: Mapping[str, Any], local: Mapping[str, Any], *, metric: float | None = None
    ) -> float:
        """Save a state; every rank calls it with the same step. Returns the seconds it held the caller up.

        Args:
            step: Optimizer steps done.
            shared: Nested dicts, the same on every rank: plain tensors are written once, DTensors each its shard. Leaves
                are tensors or JSON values (tuples, int keys and non-finite floats too).
            local: Such a state of this rank's own.
            metric: The monitored value; rank 0's counts.

        A state that is held is written first, and waited for, unless it is of the same step.

        What the thread of the save before ran into is raised here, on every rank: StorageFull, StorageError,
        CheckpointError. The checkpoints before that one are untouched.
        """
        began = time.perf_counter()
        if self._held is not None and self._held[0] != step:
            self.write_held()
        taken = self._take(step, shared, local, metric)
        self._start(*taken)
        if taken[-1] is not None or not self._async:
            self.wait()
        return time.perf_counter() - began

    def hold(self, step: int, shared: Mapping[str, Any], local: Mapping[str, Any], *, metric: float | None) -> float:
        """Copy a state as `save` does, but write it only when `write_held` or a `save` of another step is called. A state
        that was held before is dropped. Arguments, result and errors are those of `save`."""
        began = time.perf_counter()
        self._held = self._take(step, shared, local, metric)
        return time.perf_counter() - began

    def drop_held(self) -> None:
        """Forget the state that is held: a better one follows."""
        self._held = None

    def write_held(self) -> None:
        """Write the state that is held, if there is one, and wait until it is committed; every rank calls it."""
        if self._held is not None:
            held, self._held = self._held, None
            self._start(*held)
            self.wait()

    def _take(
        self, step: int, shared: Mapping[str, Any], local: Mapping[str, Any], metric: float | None
    ) -> tuple[int, float | None, files.Contents, BaseException | None]:
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        self.wait()
        self._held = None  # its memory is what is written to now
        try:
            return step, metric, self._snapshot.take(shared, local), None
        except Exception as exc:  # noqa: BLE001  the other ranks are told of it by the thread, then it is raised
            return step, metric, {}, exc

    def _start(self, step: int, metric: float | None, contents: files.Contents, failure: BaseException | None) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(step, metric, contents, failure), name="raytrainer-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save in flight is committed, and raise what it ran into."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """`wait`, then give the memory back. A state that is still held is lost."""
        try:
            self.wait()
        finally:
            self._held = None
            self._snapshot.clear()

    def _run(self, step: int, metric: float | None, contents: files.Contents, failure: BaseException | None) -> None:
        try:
            info = self._write(step, metric, contents, failure)
            if self._on_commit is not None:
                self._on_commit(info)
        except BaseException as exc:  # noqa: BLE001  raised by the next save or wait
            self._failure = exc

    def _write(
        self, step: int, metric: float | None, contents: files.Contents, failure: BaseException | None
    ) -> CheckpointInfo:
        directory = self._ranks.first(lambda: self._claim(step))
        done = False

        def write() -> dict[str, tuple[int, str]]:
            if failure is not None:
                raise failure
            return files.write(self._storage, directory, contents)

        def commit() -> Manifest:
            nonlocal done
            listed = {name: found for part in written for name, found in part.items()}
            created = datetime.now(UTC).isoformat(timespec="seconds")
            monitored = None if metric is None else float(metric)
            manifest = Manifest(step, monitored, self._ranks.world_size, created, listed)
            self._storage.sync_dir(directory)
            self._storage.sync_dir("")
            if self._before_commit is not None:
                self._before_commit()
            self._storage.write_bytes(f"{directory}/{manifests.NAME}", manifests.encode(manifest))
            done = True
            return manifest

        try:
            written = self._ranks.together(write)
            manifest = self._ranks.first(commit)
        except Exception:
            # Free the space at once; but what is committed stays, though another rank was lost before it heard of it.
            if self._ranks.rank == 0 and not done:
                self._tidy(lambda: files.delete(self._storage, directory))
            raise
        if self._ranks.rank == 0:
            self._tidy(
                lambda: files.retain(
                    self._storage,
                    directory,
                    num_to_keep=self._num_to_keep,
                    mode=self._mode,
                    corrupt=self._corrupt,
                )
            )
        return self._info(directory, manifest)

    def _claim(self, step: int) -> str:
        """A directory that nobody else writes to, not even a worker of an earlier attempt that is still about."""
        again = 0
        while not self._storage.create_dir(name := manifests.directory_name(step, again)):
            again += 1
        return name

    def _tidy(self, action: Callable[[], None]) -> None:
        # What is saved is saved: that something old could not be deleted is said, and does not fail the save.
        try:
            action()
        except StorageError as exc:
            _log.warning("an old checkpoint could not be deleted: %s", exc)

    # -- finding -------------------------------------------------------------------------------------------------

    def list(self) -> list[CheckpointInfo]:
        """The committed checkpoints by step, their files not read. One that an unknown format version wrote raises."""
        return [self._info(item.name, item.manifest) for item in files.committed(self._scan()) if item.manifest]

    def latest(self, *, verify: bool = True) -> CheckpointInfo | None:
        """The newest checkpoint whose files all have their checksums; None if there is none at all. Corrupt ones are
        skipped with a warning that names the file; where every one is corrupt, CheckpointCorrupt: training must not
        start from nothing in silence. With a group every rank calls it, each reads its share, all get the same answer.
        """
        self.wait()
        problems = []
        for item in reversed(self._ranks.first(self._scan)):
            if item.manifest is None and item.problem is None:
                continue  # a save that did not finish
            problem = None if item.problem is None else str(item.problem)
            if item.manifest is not None:
                problem = self._problem(item.name, item.manifest) if verify else None
                if problem is None:
                    return self._info(item.name, item.manifest)
            self._corrupt.add(item.name)
            problems.append(problem)
            if self._ranks.rank == 0:
                _log.warning("skipping a corrupt checkpoint: %s", problem)
        if problems:
            raise CheckpointCorrupt(
                f"no checkpoint in {self._storage.display} verifies: {'; '.join(map(str, problems))}"
            )
        return None

    def best(self) -> CheckpointInfo | None:
        """The one with the best metric, also among those that `take_in` has put aside; NaN, infinite or no metric is
        never the best."""
        item = files.best([*files.put_aside(self._storage), *files.committed(self._scan())], self._mode)
        return self._info(item.name, item.manifest) if item is not None and item.manifest is not None else None

    def load(
        self, info: CheckpointInfo, template: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Read a checkpoint, verified if `latest` has not done so: (shared, this rank's local).

        Args:
            info: From `list`, `latest` or `best`.
            template: Nested like `shared`: its tensors and DTensors are filled in place and returned, whatever sharding
                the checkpoint was written with. A function in it, `(dtype, shape) -> tensor`, makes those of its place
                and of all below it. What it lacks is allocated on the CPU.

        The local state is None if another number of ranks wrote the checkpoint. CheckpointNotFound if it is gone,
        CheckpointCorrupt if it does not verify, CheckpointError if a tensor of the template has another shape or type.
        """
        self.wait()
        place = f"{info.name}/{manifests.NAME}"
        known = manifests.directory_order(info.name.removeprefix(f"{files.ASIDE}/"))
        data = self._storage.read_if_exists(place) if known else None
        if data is None:
            raise CheckpointNotFound(f"no checkpoint at {info.path}")
        manifest = manifests.decode(data, self._storage.where(place))
        mine = f"local-{self._ranks.rank:05d}"
        has_local = manifest.world_size == self._ranks.world_size and f"{mine}.json" in manifest.files
        if (info.name, manifest.digest) not in self._verified:
            others = (name for name in manifest.files if name.startswith("shared") or (has_local and mine in name))
            manifests.verify(self._storage, info.name, manifest, sorted(others))
        shared = files.read(self._storage, info.name, manifest, "shared", template)
        local = files.read(self._storage, info.name, manifest, mine, None) if has_local else None
        return shared, local

    def _scan(self) -> files.Finds:
        found = files.scan(self._storage)
        for item in found:
            if isinstance(item.problem, manifests.UnknownVersion):
                raise item.problem
        return found

    def _problem(self, name: str, manifest: Manifest) -> str | None:
        """What is wrong with the files, of which each rank reads its share."""

        def check() -> str | None:
            share = sorted(manifest.files)[self._ranks.rank :: self._ranks.world_size]
            try:
                manifests.verify(self._storage, name, manifest, share)
            except CheckpointCorrupt as exc:
                return str(exc)
            return None

        problem = next((text for text in self._ranks.together(check) if text is not None), None)
        if problem is None:
            self._verified.add((name, manifest.digest))
        return problem

    def _info(self, name: str, manifest: Manifest) -> CheckpointInfo:
        path = self._storage.where(name)
        return CheckpointInfo(manifest.step, path, manifest.metric, manifest.world_size, manifest.created)
