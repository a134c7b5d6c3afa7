"""Check that all ranks agree about their data: the length of a dataset, and the end of a stream's epoch.

Otherwise a rank whose data ends early would leave the others waiting in a collective until it is aborted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from raytrainer.errors import DataError


def in_group_of(world_size: int) -> bool:
    """Return whether this process is in a default process group of `world_size` processes."""
    return world_size > 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() == world_size


def agree_on_length(name: str, length: int, is_stream: bool, world_size: int, device: torch.device) -> None:
    """Compare a dataset's length over all ranks. Every rank calls it.

    Args:
        name: The name of the dataset, for messages.
        length: The samples of a map-style dataset; for a stream, the batches that it announces, or -1 for none.
        is_stream: Whether the dataset is a stream.
        world_size: The size of the default process group.
        device: The device of that group's tensors.

    Raises:
        DataError: The lengths or kinds differ.
    """
    own = torch.tensor([int(is_stream), length], device=device)
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own)
    lengths_by_rank = [tuple(one.tolist()) for one in gathered]
    if len(set(lengths_by_rank)) == 1:
        return
    if len({kind for kind, _ in lengths_by_rank}) > 1:
        kinds = ", ".join(
            f"rank {r}: {'an iterable' if kind else 'map-style'}" for r, (kind, _) in enumerate(lengths_by_rank)
        )
        raise DataError(f"{name}: the dataset is of another kind on some ranks ({kinds}). Build the same on each rank.")
    unit = "batches an epoch" if is_stream else "samples"
    lengths = ", ".join(f"rank {rank}: {count} {unit}" for rank, (_, count) in enumerate(lengths_by_rank))
    reason = (
        "The shards must hold the same number of full batches"
        if is_stream
        else "Each rank needs the whole dataset, and takes its part of each batch itself: do not split it by rank"
    )
    raise DataError(f"{name}: the length of the dataset differs between ranks ({lengths}). {reason}.")


@dataclass(frozen=True)
class Progress:
    """A batch of this rank. `samples` counts the samples of the epoch read so far; all of them if it ends the epoch."""

    epoch: int
    global_size: int
    ends_epoch: bool
    samples: int


class Agreement:
    """Compares each batch of a stream over all ranks, in training order. Every rank creates one.

    Args:
        name: The name of the dataset, for messages.
        sharded: Whether each rank reads its own part.
        world_size: The size of the default process group.
    """

    def __init__(self, name: str, sharded: bool, world_size: int) -> None:
        self._name, self._sharded, self._world_size = name, sharded, world_size
        # Use host memory, so that the comparison does not wait for the device.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def check(self, progress: Progress | None, failure: Exception | None) -> None:
        """Return if all ranks have the same batch. Every rank calls it.

        Args:
            progress: This rank's batch; None if it has none.
            failure: The error that its stream raised instead.

        Raises:
            DataError: The batches differ, or another rank failed.
            Exception: `failure`.
        """
        own = torch.tensor([-1, -1, -1, 0], dtype=torch.int64)
        if progress is not None:
            p = progress
            own = torch.tensor([p.epoch, p.global_size, int(p.ends_epoch), p.samples])
        gathered = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(gathered, own, group=self._group)
        by_rank = [row.tolist() for row in gathered]
        if all(row[:3] == by_rank[0][:3] and row[0] >= 0 for row in by_rank):
            return
        texts: list[str | None] = [None] * self._world_size
        dist.all_gather_object(texts, None if failure is None else str(failure), group=self._group)
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        counts = [
            f"rank {rank}: {samples} samples" + ("" if ends == 1 else " and continues")
            for rank, (epoch, _, ends, samples) in enumerate(by_rank)
            if epoch >= 0
        ]
        if failed:
            raise DataError(f"{'; '.join(failed)} (the other ranks continue reading: {', '.join(counts)})")
        fix = (
            "Each shard must have the same number of full batches: make them equally long, or let them end together"
            if self._sharded
            else "Each rank reads the whole stream and takes its part: it must be the same on all ranks; one that is split "
            "by rank needs a method shard(rank, world_size)"
        )
        raise DataError(
            f"{self._name}: epoch {by_rank[0][0]} does not end on all ranks alike ({', '.join(counts)}). {fix}."
        )
