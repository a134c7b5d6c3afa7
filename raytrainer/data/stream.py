"""Batches of an iterable dataset: no order promise, but an exact position, kept as the dataset's own state.

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
from raytrainer.data.plan import Step, cut
from raytrainer.errors import ConfigError, DataError

State = dict[str, Any]


class Stream:
    """See `raytrainer.data.Loader`; `run` gives a step, the samples of each of its micro-batches, and the state."""

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        *,
        micro_batch_size: int | None,
        rank: int,
        world_size: int,
        drop_last: bool,
        pad_empty: bool,
    ) -> None:
        self.sharded = callable(getattr(dataset, "shard", None))
        self.dataset = dataset.shard(rank, world_size) if self.sharded else dataset
        if not callable(getattr(self.dataset, "__iter__", None)):
            raise ConfigError(f"{name_of(dataset)}.shard(rank, world_size) returns no iterable, but {self.dataset!r}")
        self.name = name_of(dataset)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.pad_empty = rank, world_size, pad_empty
        mine = rank_slice(global_batch_size, rank, world_size)
        # A shard's end is not known to the other ranks, so its last, short batch cannot be shared: full ones only.
        self._wanted = mine.stop - mine.start if self.sharded else global_batch_size
        self._least = self._wanted if drop_last or self.sharded else 1
        if self._wanted == 0:
            raise ConfigError(
                f"data.global_batch_size={global_batch_size} leaves nothing for rank {rank} of {world_size}, "
                f"and {self.name} is sharded: make it at least {world_size}",
                key="data.global_batch_size",
                value=global_batch_size,
            )
        self.stateful = all(callable(getattr(self.dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._initial = self._snapshot()
        self._used = self._exhausted = self._is_iterator = False
        self._whole = dataset

    @property
    def announced(self) -> int | None:
        """Batches in an epoch, from the iterable's own `__len__` (samples; of a shard its own); None without one."""
        for dataset, size in ((self.dataset, self._wanted), (self._whole, self.global_batch_size)):
            try:
                length = len(dataset)
            except (TypeError, NotImplementedError):
                continue
            return (length // size if self._least == self._wanted else -(-length // size)) or None
        return None

    def run(self, start: int, saved: State | None) -> Generator[tuple[Step, list[list[Any]], State, int], None, None]:
        """Batches from `start` on, for ever, and the samples of the epoch that this rank has read for them. `saved` is the
        state that came with batch `start - 1`; without it, what comes before `start` is read and thrown away.

        Raises:
            DataError: The dataset raised, or an epoch of it has no batch.
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
        if ended and len(rows) < self._least:  # it was restored at its end, and now found out
            stream = self._open(epoch)
            rows = self._read(stream, place)
        while True:
            if len(rows) < self._least:
                raise self._too_few(len(rows), epoch)
            state = self._snapshot()  # before reading on: to know whether an epoch ends, one batch more has to be read
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
        """Of an epoch without a batch."""
        if count == 0 and (epoch > 0 or self._exhausted or self._is_iterator):
            return DataError(
                f"{self.name}: epoch {epoch} gave no samples, though the iterable has been read before. It can be iterated "
                "only once, as a generator can; each epoch calls iter() again, so give an object whose __iter__ begins anew"
            )
        if count == 0:
            return DataError(f"{self.name} has no samples: epoch {epoch} of the iterable gave none")
        whose = f" of this rank ({self.rank} of {self.world_size})" if self.sharded else ""
        fix = "" if self.sharded else " or set data.drop_last=false"
        return DataError(
            f"{self.name}: epoch {epoch} gave {count} samples, fewer than the {self._wanted} of one full batch{whose}. Make "
            f"data.global_batch_size={self.global_batch_size} smaller{fix}"
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
        # A copy, since a dataset may well return what it goes on changing.
        return copy.deepcopy(self.dataset.state_dict()) if self.stateful else None

    def _step(self, index: int, epoch: int, place: int, rows: list[Any], ends: bool) -> tuple[Step, list[list[Any]]]:
        size = self.global_batch_size if self.sharded else len(rows)
        offset = rank_slice(size, self.rank, self.world_size).start if self.sharded else 0
        first = place * self.global_batch_size
        numbers = np.arange(first, first + size, dtype=np.int64)
        step = Step(index, epoch, size, ends, [])
        micro = []
        for begin, end in cut(size, self.rank, self.world_size, self.micro_batch_size, self.pad_empty):
            # An empty slice gets one sample of the batch as a stand-in, which counts for nothing.
            one, past = (begin, end) if end > begin else (offset, offset + 1)
            step.micro.append((numbers[one:past], end - begin))
            micro.append(rows[one - offset : past - offset])
        return step, micro
