"""`Checkpointer`: save, find and load the checkpoints of one run.
A save delays the training loop by one copy in memory. A thread writes the copy, coordinates the ranks, and commits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from raytrainer.checkpoint import checkpoint_files
from raytrainer.checkpoint import manifest as manifests
from raytrainer.checkpoint.manifest import CheckpointInfo, Manifest
from raytrainer.checkpoint.ranks import Ranks
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound, StorageError
from raytrainer.storage import Storage

_log = logging.getLogger("raytrainer.checkpoint")


class Checkpointer:
    """The checkpoints below `storage`: one directory per step. A directory without a manifest is ignored.

    Args:
        storage: The run's own storage for checkpoints. Nothing outside it is written or deleted.
        rank: The rank of this process among the `world_size` processes that save and load together.
        world_size: The number of these processes; more than one needs `group`.
        num_to_keep: How many of the last steps are kept, in addition to the best one. None keeps all.
        mode: `max` or `min`: which metric is the best.
        async_save: Write in a thread. If false, `save` returns when the checkpoint is committed.
        group: A gloo process group of all ranks, used only by the writing thread.
        before_commit: Called on rank 0 in the writing thread just before a commit, to make durable what belongs to the
            checkpoint, because a run that continues from the checkpoint does not repeat it. It must not raise.
        on_commit: Called on every rank in the writing thread with each checkpoint after its commit.
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
        self._snapshot = checkpoint_files.Snapshot(rank)
        self._before_commit = before_commit
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._held: tuple[int, float | None, checkpoint_files.Contents, BaseException | None] | None = None
        self._verified: set[tuple[str, str]] = set()
        self._corrupt: set[str] = set()

    # -- saving --------------------------------------------------------------------------------------------------

    def save(
        self, step: int, shared: Mapping[str, Any], local: Mapping[str, Any], *, metric: float | None = None
    ) -> float:
        """Save a state. Every rank calls it with the same step. Return the seconds for which the caller was blocked.

        A held state of another step is written and committed first. An error of the previous save's thread is raised
        here on every rank: StorageFull, StorageError or CheckpointError. Earlier checkpoints are unaffected.

        Args:
            step: Optimizer steps done.
            shared: Nested dicts, the same on every rank. Plain tensors are written once; of a DTensor, each rank writes
                its shard. Leaves are tensors or JSON values, and also tuples, int keys and non-finite floats.
            local: A state of the same form that belongs to this rank.
            metric: The monitored value; only rank 0's is used.
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
        """Copy a state as `save` does, but write it only when `write_held`, or `save` with another step, is called.

        A state that was held before is dropped. Arguments, result and errors are those of `save`.
        """
        began = time.perf_counter()
        self._held = self._take(step, shared, local, metric)
        return time.perf_counter() - began

    def drop_held(self) -> None:
        """Drop the held state, because a better one follows."""
        self._held = None

    def write_held(self) -> None:
        """Write the held state, if there is one, and wait for the commit. Every rank calls it."""
        if self._held is not None:
            held, self._held = self._held, None
            self._start(*held)
            self.wait()

    def _take(
        self, step: int, shared: Mapping[str, Any], local: Mapping[str, Any], metric: float | None
    ) -> tuple[int, float | None, checkpoint_files.Contents, BaseException | None]:
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        self.wait()
        self._held = None  # the new snapshot overwrites its memory
        try:
            return step, metric, self._snapshot.take(shared, local), None
        except Exception as exc:  # noqa: BLE001  the thread reports it to the other ranks, then raises it
            return step, metric, {}, exc

    def _start(
        self, step: int, metric: float | None, contents: checkpoint_files.Contents, failure: BaseException | None
    ) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(step, metric, contents, failure), name="raytrainer-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the commit of the current save, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Call `wait`, then free the memory. A state that is still held is lost."""
        try:
            self.wait()
        finally:
            self._held = None
            self._snapshot.clear()

    def _run(
        self, step: int, metric: float | None, contents: checkpoint_files.Contents, failure: BaseException | None
    ) -> None:
        try:
            info = self._write(step, metric, contents, failure)
            if self._on_commit is not None:
                self._on_commit(info)
        except BaseException as exc:  # noqa: BLE001  the next `save` or `wait` raises it
            self._failure = exc

    def _write(
        self, step: int, metric: float | None, contents: checkpoint_files.Contents, failure: BaseException | None
    ) -> CheckpointInfo:
        directory = self._ranks.first(lambda: self._reserve(step))
        done = False

        def write() -> dict[str, tuple[int, str]]:
            if failure is not None:
                raise failure
            return checkpoint_files.write(self._storage, directory, contents)

        def commit() -> Manifest:
            nonlocal done
            listed = {name: size_and_hash for part in written for name, size_and_hash in part.items()}
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
            # Free the space at once, unless the checkpoint was committed and only another rank was lost before it got
            # the answer.
            if self._ranks.rank == 0 and not done:
                self._tidy(lambda: checkpoint_files.delete(self._storage, directory))
            raise
        if self._ranks.rank == 0:
            self._tidy(
                lambda: checkpoint_files.retain(
                    self._storage,
                    directory,
                    num_to_keep=self._num_to_keep,
                    mode=self._mode,
                    corrupt=self._corrupt,
                )
            )
        return self._info(directory, manifest)

    def _reserve(self, step: int) -> str:
        """Create a directory to which no other process writes, not even a leftover worker of an earlier attempt."""
        again = 0
        while not self._storage.create_dir(name := manifests.directory_name(step, again)):
            again += 1
        return name

    def _tidy(self, action: Callable[[], None]) -> None:
        # The new checkpoint is already saved, so a failure to delete an old one is only logged.
        try:
            action()
        except StorageError as exc:
            _log.warning("an old checkpoint could not be deleted: %s", exc)

    # -- finding -------------------------------------------------------------------------------------------------

    def list(self) -> list[CheckpointInfo]:
        """Return the committed checkpoints by step, without reading their files. An unknown format version raises."""
        return [
            self._info(item.name, item.manifest) for item in checkpoint_files.committed(self._scan()) if item.manifest
        ]

    def latest(self, *, verify: bool = True) -> CheckpointInfo | None:
        """Return the newest checkpoint whose files match their checksums; None if there are no checkpoints.

        Corrupt checkpoints are skipped with a warning that names the file. If all are corrupt, CheckpointCorrupt is
        raised, because training must not silently start from scratch. With a group, every rank calls it, each verifies
        its share of the files, and all get the same result.
        """
        self.wait()
        problems = []
        for item in reversed(self._ranks.first(self._scan)):
            if item.manifest is None and item.problem is None:
                continue  # an unfinished save
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
        """Return the checkpoint with the best metric, including those that `import_checkpoint` has put aside.

        A checkpoint whose metric is NaN, infinite or missing is never the best.
        """
        item = checkpoint_files.best(
            [*checkpoint_files.put_aside(self._storage), *checkpoint_files.committed(self._scan())], self._mode
        )
        return self._info(item.name, item.manifest) if item is not None and item.manifest is not None else None

    def load(
        self, info: CheckpointInfo, template: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Read a checkpoint: the shared state and this rank's local state. Verify it unless `latest` has done so.

        Args:
            info: From `list`, `latest` or `best`.
            template: Nested like `shared`. Its tensors and DTensors are filled in place and returned, however the
                checkpoint was sharded. A function `(dtype, shape) -> tensor` in it makes all tensors at and below its
                position. Tensors without a template are allocated on the CPU.

        Returns:
            (shared, local). `local` is None if another number of ranks wrote the checkpoint.

        Raises:
            CheckpointNotFound: It no longer exists.
            CheckpointCorrupt: Its files do not match their checksums.
            CheckpointError: A tensor of the template has another shape or dtype.
        """
        self.wait()
        place = f"{info.name}/{manifests.NAME}"
        known = manifests.directory_order(info.name.removeprefix(f"{checkpoint_files.ASIDE}/"))
        data = self._storage.read_if_exists(place) if known else None
        if data is None:
            raise CheckpointNotFound(f"no checkpoint at {info.path}")
        manifest = manifests.decode(data, self._storage.where(place))
        mine = f"local-{self._ranks.rank:05d}"
        has_local = manifest.world_size == self._ranks.world_size and f"{mine}.json" in manifest.files
        if (info.name, manifest.digest) not in self._verified:
            others = (name for name in manifest.files if name.startswith("shared") or (has_local and mine in name))
            manifests.verify(self._storage, info.name, manifest, sorted(others))
        shared = checkpoint_files.read(self._storage, info.name, manifest, "shared", template)
        local = checkpoint_files.read(self._storage, info.name, manifest, mine, None) if has_local else None
        return shared, local

    def _scan(self) -> Sequence[checkpoint_files.CheckpointEntry]:
        checkpoints = checkpoint_files.scan(self._storage)
        for item in checkpoints:
            if isinstance(item.problem, manifests.UnknownVersion):
                raise item.problem
        return checkpoints

    def _problem(self, name: str, manifest: Manifest) -> str | None:
        """Verify the files; each rank reads its share. Return the problem, or None."""

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
