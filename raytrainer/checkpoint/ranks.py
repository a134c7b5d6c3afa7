"""Run an action on all ranks of a checkpoint. An error on one rank is raised on all, so that no rank waits forever.
It uses its own process group, because the writing thread runs beside the training loop's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from raytrainer.errors import CheckpointCorrupt, CheckpointError, StorageError, StorageFull

T = TypeVar("T")

# The error types that are kept when the error is raised on the other ranks.
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (StorageFull, StorageError, CheckpointCorrupt)}


class Ranks:
    """Rank `rank` of `world_size`. `group` may be None if there is only one rank."""

    def __init__(self, rank: int, world_size: int, group: Any) -> None:
        if not 0 <= rank < world_size or (world_size > 1 and group is None):
            raise ValueError(f"rank {rank} of {world_size}: more than one rank needs a process group")
        self.rank, self.world_size, self._group = rank, world_size, group

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank. Values are pickled, and come only from processes of this job."""
        if self._group is None:
            return [value]
        import torch.distributed as dist

        answers: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(answers, value, group=self._group)
        except RuntimeError as exc:
            raise CheckpointError(f"rank {self.rank}: the other ranks cannot be reached: {exc}") from exc
        return answers

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank and return all results. If it fails on one rank, raise on all."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as exc:  # noqa: BLE001  raised below, after the other ranks know of it
            failure = exc
        kind = next((kind.__name__ for kind in type(failure).__mro__ if kind.__name__ in _KINDS), "CheckpointError")
        message = None if failure is None else str(failure) or type(failure).__name__
        answers = self.gather((result, kind, message))
        if failure is not None:
            raise failure
        for rank, (_, kind, message) in enumerate(answers):
            if message is not None:
                raise _KINDS.get(kind, CheckpointError)(f"rank {rank}: {message}")
        return [result for result, _, _ in answers]

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 only. Return its result, or raise its error, on all ranks."""
        results: list[Any] = self.together(lambda: action() if self.rank == 0 else None)
        answer: T = results[0]
        return answer
