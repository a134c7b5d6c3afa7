"""The samples that this rank reads at a position, which is one integer. This module defines the whole sample order.

A plan has no side effects and is cheap to copy into another process, which then needs only positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytrainer.data.order import EpochOrder, Indices, epoch_order, micro_slices, rank_slice, steps_per_epoch


@dataclass(slots=True)
class Step:
    """Batch `index`. `micro` holds (samples, how many of them count) for each micro-batch of this rank."""

    index: int
    epoch: int
    global_size: int
    ends_epoch: bool
    micro: list[tuple[Indices, int]]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The settings by which samples form batches, and this rank reads its part. See `raytrainer.data.LoaderOptions`."""

    global_batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = False
    drop_last: bool = False
    pad_empty: bool = True

    def cut(self, size: int) -> list[tuple[int, int]]:
        """Return (begin, end) in a global batch of `size` samples for each micro-batch of this rank.

        Empty micro-batches are included only with `pad_empty`.
        """
        mine = rank_slice(size, self.rank, self.world_size)
        slices = micro_slices(mine.stop - mine.start, -(-size // self.world_size), self.micro_batch_size)
        return [(mine.start + s.start, mine.start + s.stop) for s in slices if self.pad_empty or s.stop > s.start]


class SamplePlan:
    """The batches of a map-style dataset of `length` samples."""

    def __init__(self, length: int, batching: Batching) -> None:
        self.length, self._batching = length, batching
        self.steps_per_epoch = steps_per_epoch(length, batching.global_batch_size, batching.drop_last)
        self._epoch = -1
        self._order: EpochOrder | None = None
        self._full = batching.cut(batching.global_batch_size)

    def step(self, index: int) -> Step:
        b = self._batching
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch or self._order is None:
            self._epoch, self._order = epoch, epoch_order(b.seed, epoch, self.length, b.shuffle)
        start = place * b.global_batch_size
        size = min(b.global_batch_size, self.length - start)
        cuts = self._full if size == b.global_batch_size else b.cut(size)
        samples = self._order.take(start, start + size)
        micro = [(samples[begin:end] if end > begin else samples[:1], end - begin) for begin, end in cuts]
        return Step(index, epoch, size, place == self.steps_per_epoch - 1, micro)
