"""The ranks of a checkpoint doing a thing together, so that what fails on one is raised on all and none waits for ever.
It goes over a process group of its own, as the writer's thread uses it beside the training loop's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from raytrainer.errors import CheckpointCorrupt, CheckpointError, StorageError, StorageFull

T = TypeVar("T")

# What keeps its kind on the ranks that are told of it.
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (StorageFull, StorageError, CheckpointCorrupt)}


class Ranks:
    """Rank `rank` of `world_size`; `group` may be None where there is only one."""

    def __init__(self, rank: int, world_size: int, group: Any) -> None:
        if not 0 <= rank < world_size or (world_size > 1 and group is None):
            raise ValueError(f"rank {rank} of {world_size}: more than one rank needs a process group")
        self.rank, self.world_size, self._group = rank, world_size, group

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Picklable; it comes from processes of this very job."""
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
        """Do something on every rank and share the results; if it fails on one, raise on all."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as exc:  # noqa: BLE001  raised below, when the others know
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
        """Do something on rank 0 alone; its result, or its failure, on all."""
        results: list[Any] = self.together(lambda: action() if self.rank == 0 else None)
        answer: T = results[0]
        return answer
