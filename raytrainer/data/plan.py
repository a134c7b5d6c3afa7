"""The samples that this rank reads at a position, which is one integer. This module defines the whole sample order.

A plan has no side effects and is cheap to copy into another process, which then needs only positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from raytrainer.data.order import EpochOrder, Indices, epoch_order, micro_slices, rank_slice, steps_per_epoch


@dataclass(slots=True)
class Step:
    """Batch `index`. `micro` holds (samples, how many of them count) for each micro-batch of this rank."""

    index: int
    epoch: int
    global_size: int
    ends_epoch: bool
    micro: list[tuple[Indices, int]]


def cut(
    size: int, rank: int, world_size: int, micro_batch_size: int | None, pad_empty: bool = True
) -> list[tuple[int, int]]:
    """Return (begin, end) in a global batch of `size` samples for each micro-batch of `rank`.

    Empty micro-batches are included only with `pad_empty`.
    """
    mine = rank_slice(size, rank, world_size)
    slices = micro_slices(mine.stop - mine.start, -(-size // world_size), micro_batch_size)
    return [(mine.start + s.start, mine.start + s.stop) for s in slices if pad_empty or s.stop > s.start]


class Plan:
    """The batches of a map-style dataset of `length` samples. For the arguments, see `raytrainer.data.Loader`."""

    def __init__(
        self,
        length: int,
        global_batch_size: int,
        *,
        micro_batch_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        pad_empty: bool = True,
    ) -> None:
        self.length, self.global_batch_size = length, global_batch_size
        self.seed, self.shuffle = seed, shuffle
        self.steps_per_epoch = steps_per_epoch(length, global_batch_size, drop_last)
        self._epoch = -1
        self._order: EpochOrder | None = None
        self._cut = partial(
            cut, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, pad_empty=pad_empty
        )
        self._full = self._cut(global_batch_size)

    def step(self, index: int) -> Step:
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch or self._order is None:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self.length, self.shuffle)
        start = place * self.global_batch_size
        size = min(self.global_batch_size, self.length - start)
        cuts = self._full if size == self.global_batch_size else self._cut(size)
        samples = self._order.take(start, start + size)
        micro = [(samples[begin:end] if end > begin else samples[:1], end - begin) for begin, end in cuts]
        return Step(index, epoch, size, place == self.steps_per_epoch - 1, micro)
