"""Batches of an iterable dataset. Their order is up to the dataset, but the position is exact: the dataset's own state.

Every rank reads the same stream and keeps its slice of each batch, unless the dataset can `shard` itself.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import numpy as np

from raytrainer.data.datasets import name_of
from raytrainer.data.order import rank_slice
from raytrainer.data.sample_plan import Batching, Step
from raytrainer.errors import ConfigError, DataError

State = dict[str, Any]


class Stream:
    """The batches of an iterable."""

    def __init__(self, dataset: Any, batching: Batching) -> None:
        rank, world_size, size = batching.rank, batching.world_size, batching.global_batch_size
        self.sharded = callable(getattr(dataset, "shard", None))
        self.dataset = dataset.shard(rank, world_size) if self.sharded else dataset
        if not callable(getattr(self.dataset, "__iter__", None)):
            raise ConfigError(
                f"{name_of(dataset)}.shard(rank, world_size) returns {self.dataset!r}, which is not an iterable"
            )
        self.name = name_of(dataset)
        self._batching = batching
        mine = rank_slice(size, rank, world_size)
        # Other ranks do not know where a shard ends, so its last, short batch cannot be shared: only full batches
        # count.
        self._wanted = mine.stop - mine.start if self.sharded else size
        self._least = self._wanted if batching.drop_last or self.sharded else 1
        if self._wanted == 0:
            raise ConfigError(
                f"data.global_batch_size={size} leaves nothing for rank {rank} of {world_size}, "
                f"and {self.name} is sharded: make it at least {world_size}",
                key="data.global_batch_size",
                value=size,
            )
        self.stateful = all(callable(getattr(self.dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._initial = self._snapshot()
        self._used = self._exhausted = self._is_iterator = False
        self.whole = dataset

    @property
    def announced(self) -> int | None:
        """The batches in an epoch, from the `__len__` (in samples) of the shard or iterable; None without one."""
        for dataset, size in ((self.dataset, self._wanted), (self.whole, self._batching.global_batch_size)):
            try:
                length = len(dataset)
            except (TypeError, NotImplementedError):
                continue
            return (length // size if self._least == self._wanted else -(-length // size)) or None
        return None

    def run(self, start: int, saved: State | None) -> Generator[tuple[Step, list[list[Any]], State, int], None, None]:
        """Yield batches from `start` on, without end.

        Args:
            start: The number of the first batch.
            saved: The state that was yielded with batch `start - 1`. Without it, everything before `start` is read and
                discarded.

        Yields:
            The step, the samples of each of its micro-batches, the state after it, and the number of the epoch's
            samples that this rank has read so far.

        Raises:
            DataError: The dataset raised an error, or an epoch has no batch.
        """
        index, epoch, place, ended = 0, 0, 0, False
        if saved and saved["index"] == start and self.stateful:
            index, epoch, place, ended = start, int(saved["epoch"]), int(saved["place"]), bool(saved["ended"])
            self.dataset.load_state_dict(copy.deepcopy(saved["dataset"]))
        elif self._used and self.stateful:
            self.dataset.load_state_dict(copy.deepcopy(self._initial))
        self._used = True
        stream = self._open(epoch)
        rows = self._read(stream, place)
        if ended and len(rows) < self._least:  # the state was saved at the end of an epoch, which shows only now
            stream = self._open(epoch)
            rows = self._read(stream, place)
        while True:
            if len(rows) < self._least:
                raise self._too_few(len(rows), epoch)
            # Take the state before reading on, because one more batch must be read to know whether the epoch ends.
            state = self._snapshot()
            following = self._read(stream, place + 1)
            ends = len(following) < self._least
            if index >= start:
                step, micro = self._step(index, epoch, place, rows, ends)
                after = (epoch + 1, 0) if ends else (epoch, place + 1)
                position = {"index": index + 1, "epoch": after[0], "place": after[1], "ended": ends}
                samples = place * self._wanted + len(rows) + len(following)
                yield step, micro, {**position, "dataset": state} if self.stateful else position, samples
            index, place = index + 1, place + 1
            if ends:
                self._exhausted = True
                epoch, place = epoch + 1, 0
                stream = self._open(epoch)
                following = self._read(stream, place)
            rows = following

    def _too_few(self, count: int, epoch: int) -> DataError:
        """Return the error for an epoch without a batch."""
        if count == 0 and (epoch > 0 or self._exhausted or self._is_iterator):
            return DataError(
                f"{self.name}: epoch {epoch} gave no samples, though the iterable has been read before. It can be iterated "
                "only once, as a generator can; each epoch calls iter() again, so give an object whose __iter__ starts again"
            )
        if count == 0:
            return DataError(f"{self.name} has no samples: epoch {epoch} of the iterable gave none")
        whose = f" of this rank ({self._batching.rank} of {self._batching.world_size})" if self.sharded else ""
        fix = "" if self.sharded else " or set data.drop_last=false"
        return DataError(
            f"{self.name}: epoch {epoch} gave {count} samples, fewer than the {self._wanted} of one full batch{whose}. Make "
            f"data.global_batch_size={self._batching.global_batch_size} smaller{fix}"
        )

    def _open(self, epoch: int) -> Iterator[Any]:
        try:
            if callable(getattr(self.dataset, "set_epoch", None)):
                self.dataset.set_epoch(epoch)
            stream: Iterator[Any] = iter(self.dataset)
            self._is_iterator = stream is self.dataset
            return stream
        except Exception as error:
            raise DataError(f"{self.name}, epoch {epoch}: {type(error).__name__}: {error}") from error

    def _read(self, stream: Iterator[Any], place: int) -> list[Any]:
        rows: list[Any] = []
        try:
            rows.extend(islice(stream, self._wanted))
        except Exception as error:
            number = place * self._wanted + len(rows)
            raise DataError(f"{self.name}, sample {number}: {type(error).__name__}: {error}") from error
        return rows

    def _snapshot(self) -> Any:
        # Copy the state, because a dataset may return an object that it changes later.
        return copy.deepcopy(self.dataset.state_dict()) if self.stateful else None

    def _step(self, index: int, epoch: int, place: int, rows: list[Any], ends: bool) -> tuple[Step, list[list[Any]]]:
        b = self._batching
        size = b.global_batch_size if self.sharded else len(rows)
        offset = rank_slice(size, b.rank, b.world_size).start if self.sharded else 0
        first = place * b.global_batch_size
        numbers = np.arange(first, first + size, dtype=np.int64)
        step = Step(index, epoch, size, ends, [])
        micro = []
        for begin, end in b.cut(size):
            # An empty slice gets one sample of the batch as a placeholder, with size 0.
            first_row, end_row = (begin, end) if end > begin else (offset, offset + 1)
            step.micro.append((numbers[first_row:end_row], end - begin))
            micro.append(rows[first_row - offset : end_row - offset])
        return step, micro
