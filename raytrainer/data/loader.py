"""`Loader`: the batches of a dataset, in order, on the device, from any position.

Batches are made in the calling thread, in another thread or in processes. This choice affects only the speed; the
batches are equal bit for bit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytrainer.batches import move
from raytrainer.data.agreement import Agreement, Progress, agree_on_length, in_group_of
from raytrainer.data.columns import Column, MappedColumn
from raytrainer.data.datasets import columns_of, name_of
from raytrainer.data.fetch import Collate, Fetcher, collate, describe, uncollated, wrapped
from raytrainer.data.order import Indices
from raytrainer.data.plan import Plan, Step
from raytrainer.data.pool import WorkerPool
from raytrainer.data.prefetch import DeviceCopy, gather, prefetched, while_warm
from raytrainer.data.stream import Stream
from raytrainer.errors import ConfigError, DataError, RaytrainerError

log = logging.getLogger(__name__)

RESIDENT_BYTES = 256 * 2**20
"""Up to this size `resident="auto"` keeps a column dataset on the device."""


@dataclass(slots=True)
class MicroBatch:
    """`data` is on the device. `size` of its samples count; 0 if it is a placeholder for a rank without samples."""

    data: Any
    size: int


@dataclass(slots=True)
class Batch:
    """A rank's part of global batch `index`, which has `global_size` samples on all ranks together."""

    index: int
    epoch: int
    global_size: int
    micro: list[MicroBatch]
    ends_epoch: bool


_Made = tuple[Step, list[Any]]  # a step, and the data of each of its micro-batches


class Loader:
    """Batches of a map-style dataset, an iterable, or columns.

    The samples of batch `k` depend only on `seed`, `k` and the dataset's length. Rank `r` of `w` takes samples `b*r//w`
    to `b*(r+1)//w` of a batch of `b`, cut into the same number of micro-batches on all ranks.

    Args:
        dataset: Has `__len__` and `__getitem__` or `__getitems__`; or is a column dataset of `raytrainer.data`; or is
            an iterable, preferably with `state_dict` and `load_state_dict`. docs/data.md describes what each must
            provide.
        global_batch_size: Samples in a batch, on all ranks together.
        micro_batch_size: The maximum number of samples in a micro-batch of one rank; None for a single micro-batch.
        seed: Determines the order, the augmentation, and what the dataset draws from global generators.
        rank, world_size: The rank whose part is loaded, and the number of ranks.
        shuffle: Use a new order in each epoch, otherwise the dataset's order. Iterables always have their own.
        drop_last: Leave out an epoch's last batch if it is not full.
        collate_fn: Converts a list of samples to a batch; None for torch's `default_collate`.
        num_workers: Processes for slow Python transforms; 0 for a thread. Columns and iterables do not use them.
        prefetch: Batches to prefetch (per process); 0 makes each in the calling thread when it is requested.
        device: The device of the batches.
        resident: Whether to keep a column dataset on the device: True, False, or `auto` for up to 256 MB without memory
            maps.
        pad_empty: Give a rank without samples one sample of the batch, with size 0, so that it joins the collectives.
        key: The config key of the dataset, for messages.

    Raises:
        ConfigError: An argument is invalid, or the dataset is neither map-style nor iterable.
        DataError: The dataset has no samples. While iterating: the dataset raised an error; the message names the
            dataset and the sample.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        collate_fn: Collate | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
        resident: bool | str = "auto",
        pad_empty: bool = True,
        key: str = "data",
    ) -> None:
        _at_least("global_batch_size", global_batch_size, 1)
        if micro_batch_size is not None:
            _at_least("micro_batch_size", micro_batch_size, 1)
        _at_least("num_workers", num_workers, 0)
        _at_least("prefetch", prefetch, 0)
        if resident not in ("auto", True, False):
            raise ConfigError(
                "is not a valid choice",
                key="data.resident",
                value=resident,
                choices=("auto", "true", "false"),
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of {world_size}")
        self.dataset, self.seed, self.collate_fn = dataset, seed, collate_fn
        self.num_workers, self.prefetch = num_workers, prefetch
        self.device = torch.device(device)
        self._transform = getattr(dataset, "transform_batch", None)
        self._position: dict[str, Any] = {}
        self._dataset_states: dict[int, Any] = {}  # by step, if batches are prefetched
        self._columns = columns_of(dataset) if collate_fn is None else None
        self._stream: Stream | None = None
        self._plan: Plan | None = None
        if _is_map_style(dataset, key):
            length = len(dataset)
            if length == 0:
                raise DataError(f"{key}: {name_of(dataset)} has no samples: its length is 0")
            self._plan = Plan(
                length,
                global_batch_size,
                micro_batch_size=micro_batch_size,
                seed=seed,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                drop_last=drop_last,
                pad_empty=pad_empty,
            )
        else:
            self._stream = Stream(
                dataset,
                global_batch_size,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
                drop_last=drop_last,
                pad_empty=pad_empty,
            )
            if num_workers:
                log.info("%s is read in a thread: processes cannot share an iterable's position", name_of(dataset))
        self._announced = self._stream.announced if self._stream else None
        self._compared = False
        self._agreement: Agreement | None = None
        if in_group_of(world_size):
            length = self._plan.length if self._plan else self._announced or -1
            agree_on_length(name_of(dataset), length, self._plan is None, world_size, self.device)
            if self._stream is not None:
                self._agreement = Agreement(self._stream.name, self._stream.sharded, world_size)
        self.keeps_dataset_state = self._plan is not None and _has_state(dataset)
        if self.keeps_dataset_state and num_workers:
            log.warning(
                "data.num_workers=%d: each process changes a copy of %s, and a checkpoint has the state of none of them; "
                "with data.num_workers=0 it is restored exactly",
                num_workers,
                name_of(dataset),
            )
        self._fetcher = Fetcher(dataset, collate_fn, seed)
        self._resident = self._mapped = False
        if self._columns is not None:
            columns = list(self._columns.values() if isinstance(self._columns, dict) else self._columns)
            if resident == "auto":
                # Data in a memory map are meant to stay out of memory as a whole.
                tensors = [column for column in columns if isinstance(column, Tensor)]
                small = sum(column.nbytes for column in tensors) <= RESIDENT_BYTES
                self._resident = len(tensors) == len(columns) and small
            else:
                self._resident = bool(resident)
            self._mapped = not self._resident and any(isinstance(column, MappedColumn) for column in columns)
            if self._resident:
                if isinstance(self._columns, dict):
                    self._columns = {name: self._whole(column) for name, column in self._columns.items()}
                else:
                    self._columns = tuple(map(self._whole, self._columns))

    def _whole(self, column: Column) -> Tensor:
        return (column.load() if isinstance(column, MappedColumn) else column).to(self.device)

    @property
    def length(self) -> int | None:
        """Samples in an epoch; None for an iterable."""
        return self._plan.length if self._plan else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in an epoch; for an iterable, those that its `__len__` announces, or None without one."""
        return self._plan.steps_per_epoch if self._plan else self._announced

    def state_dict(self) -> dict[str, Any]:
        """Return the position of an iterable after the last batch that was yielded.

        For a map-style dataset with `state_dict` and `load_state_dict`, return its own state after that batch; else an
        empty dict.
        """
        if self.keeps_dataset_state and not self._position:
            return {"dataset": copy.deepcopy(self.dataset.state_dict())}
        return self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next `batches(start)` continue from this state, where `start` is the batch after it."""
        if not self.keeps_dataset_state:
            self._position = dict(state)
        elif "dataset" in state:
            self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))

    def one_epoch(self) -> Generator[Batch, None, None]:
        """Yield all samples once, from the first. Of an iterable, nothing of the next epoch is read."""
        if self._plan is not None:
            return self.batches(0, self._plan.steps_per_epoch)
        return self._from_stream(0, None, one_epoch=True)

    def batches(self, start: int = 0, stop: int | None = None, *, alone: bool = False) -> Generator[Batch, None, None]:
        """Yield batch `start`, `start + 1`, … across epochs, until `stop`. Closing it ends its thread and processes.

        A start costs the same at every position, except for an iterable without a state for that position, which is
        read from its beginning. Every rank takes the same batches of an iterable, because the ranks compare them. With
        `alone`, this rank may take batches that the others do not.
        """
        if self._stream is not None:
            yield from self._from_stream(start, stop, alone=alone)
        else:
            made = self._made(start, stop)
            try:
                for step, micro in made:
                    batch = self._finished(step, micro)
                    if step.index in self._dataset_states:  # prefetching has moved the dataset past this batch
                        self._position = {"dataset": self._dataset_states.pop(step.index)}
                    yield batch
            finally:
                made.close()

    def _made(self, start: int, stop: int | None) -> Generator[_Made, None, None]:
        """Yield the data on the device, in the way that suits the dataset."""
        if self._columns is not None:
            steps = self._steps(start, stop)
            if self._mapped:
                return self._from_map(steps)
            if self._resident or not self.prefetch:
                return self._gathered(steps)
            return self._copied(self._gathered(steps), self.prefetch)
        if self.num_workers:
            # On the CPU, the processes already prefetch, so another thread would only pass batches on.
            return self._copied(self._pooled(start, stop), 1 if self.device.type == "cuda" else 0)
        return self._read_rows(start, stop)

    def _steps(self, start: int, stop: int | None) -> Generator[Step, None, None]:
        plan, index = self._plan, start
        assert plan is not None
        while stop is None or index < stop:
            yield plan.step(index)
            index += 1

    def _gathered(self, steps: Iterator[Step]) -> Generator[_Made, None, None]:
        device = self.device
        on_host = device.type == "cpu" or not self._resident
        pinned = device.type == "cuda" and not self._resident
        for step in steps:
            micro = []
            for samples, _ in step.micro:
                rows = torch.from_numpy(samples)
                if not on_host:
                    rows = rows.to(device, non_blocking=True)
                micro.append(gather(self._columns, rows, pinned))
            yield step, micro

    def _from_map(self, steps: Iterator[Step]) -> Generator[_Made, None, None]:
        """Gather from a memory map.

        On the CPU, while the pages are in memory, gather in the calling thread, because a copy takes less time than a
        hand-over between threads. If pages come from a disk, gather in another thread.
        """
        if self.device.type == "cuda":

            def both() -> Generator[_Made, None, None]:
                if not (yield from while_warm(self._gathered(steps))):
                    yield from self._paged_in(steps)

            yield from self._copied(both(), self.prefetch)
        elif not (yield from while_warm(self._gathered(steps))):
            yield from self._copied(self._paged_in(steps), self.prefetch)

    def _paged_in(self, steps: Iterator[Step]) -> Generator[_Made, None, None]:
        assert self._columns is not None
        columns = self._columns.values() if isinstance(self._columns, dict) else self._columns

        def asked_for() -> Iterator[Step]:
            for step in steps:
                for samples, _ in step.micro:
                    for column in columns:
                        if isinstance(column, MappedColumn):
                            column.page_in(torch.from_numpy(samples))
                yield step

        return self._gathered(asked_for())

    def _read_rows(self, start: int, stop: int | None) -> Generator[_Made, None, None]:
        steps, fetcher = self._steps(start, stop), self._fetcher

        def isolated(step: Step) -> _Made:
            return read(step, fetcher.isolated)

        def read(step: Step, fetch: Callable[[Indices, int], Any]) -> _Made:
            made = step, [fetch(samples, step.epoch) for samples, _ in step.micro]
            if self.keeps_dataset_state:
                self._dataset_states[step.index] = copy.deepcopy(self.dataset.state_dict())
            return made

        def plain() -> Generator[_Made, None, None]:
            for step in steps:
                yield read(step, fetcher)

        # Read the first batch in this thread to detect whether the dataset draws from the global generators. Such a
        # dataset cannot be read in another thread, because its draws would mix with the model's.
        for step in steps:
            yield self._on_device(isolated(step))
            if self.prefetch and not fetcher.draws:
                break
        yield from self._copied(plain(), self.prefetch)

    def _pooled(self, start: int, stop: int | None) -> Generator[_Made, None, None]:
        plan, fetcher = self._plan, self._fetcher
        assert plan is not None

        def make(index: int) -> list[Any]:
            step = plan.step(index)
            return [fetcher.isolated(samples, step.epoch) for samples, _ in step.micro]

        pool = WorkerPool(make, self.num_workers, self.prefetch, name_of(self.dataset))
        results = pool.run(start, stop)
        try:
            for index, micro in results:
                yield plan.step(index), micro
        finally:
            results.close()

    def _copied(self, source: Generator[_Made, None, None], depth: int) -> Generator[_Made, None, None]:
        """Prefetch `source` in a thread (with `depth`), and start its copies to the device there."""
        if self.device.type != "cuda":
            moved = prefetched(source, depth) if depth else source
            try:
                for made in moved:
                    yield self._on_device(made)
            finally:
                moved.close()
            return
        copier = DeviceCopy(self.device)

        def started() -> Generator[tuple[Step, list[Any]], None, None]:
            try:
                for step, micro in source:
                    yield step, [copier.start(data) for data in micro]
            finally:
                source.close()

        moving = prefetched(started(), depth) if depth else started()
        try:
            for step, micro in moving:
                yield step, [copier.finish(*data) for data in micro]
        finally:
            moving.close()

    def _on_device(self, made: _Made) -> _Made:
        if self.device.type == "cpu":
            return made
        return made[0], [move(data, self.device) for data in made[1]]

    def _from_stream(
        self, start: int, stop: int | None, *, one_epoch: bool = False, alone: bool = False
    ) -> Generator[Batch, None, None]:
        assert self._stream is not None
        states: dict[int, dict[str, Any]] = {}
        counts: dict[int, int] = {}
        source = self._stream.run(start, self._position)

        def made() -> Generator[_Made, None, None]:
            try:
                for step, micro, state, samples_read in source:
                    if stop is not None and step.index >= stop:
                        return
                    states[step.index], counts[step.index] = state, samples_read
                    yield (
                        step,
                        [self._collated(rows, samples) for rows, (samples, _) in zip(micro, step.micro, strict=True)],
                    )
                    if (one_epoch and step.ends_epoch) or (stop is not None and step.index + 1 >= stop):
                        return
            finally:
                source.close()

        moved = self._copied(made(), self.prefetch)

        def following() -> Batch | None:
            if (next_made := next(moved, None)) is None:
                return None
            batch = self._finished(*next_made)
            self._check_announced(next_made[0])
            return batch

        agreement = None if alone else self._agreement
        try:
            while (batch := self._agreed(following, counts, agreement) if agreement else following()) is not None:
                self._position = states.pop(batch.index)
                del counts[batch.index]
                yield batch
        finally:
            moved.close()

    def _agreed(
        self, following: Callable[[], Batch | None], counts: dict[int, int], agreement: Agreement
    ) -> Batch | None:
        """Return the next batch if all ranks have it; None after the last one, on which they have already agreed."""
        batch, failure = None, None
        try:
            if (batch := following()) is None:
                return None
        except Exception as error:  # noqa: BLE001  the agreement raises it after the other ranks know of it
            failure = error
        progress = None
        if batch is not None:
            progress = Progress(batch.epoch, batch.global_size, batch.ends_epoch, counts[batch.index])
        agreement.check(progress, failure)
        return batch

    def _check_announced(self, step: Step) -> None:
        """Log once if an epoch's length differs from the iterable's `__len__`."""
        if step.ends_epoch and self._announced and step.epoch == 0 and not self._compared:
            self._compared = True
            if step.index + 1 != self._announced:
                log.warning(
                    "%s: __len__ announces %d batches in an epoch, and the first one had %d. trainer.max_epochs and learning-"
                    "rate curves go by __len__; trainer.max_steps does not.",
                    name_of(self.dataset),
                    self._announced,
                    step.index + 1,
                )

    def _collated(self, rows: list[Any], samples: Indices) -> Any:
        try:
            return collate(rows, self.collate_fn)
        except Exception as error:
            raise uncollated(self.dataset, rows, samples, error, self.collate_fn) from error

    def _finished(self, step: Step, micro: list[Any]) -> Batch:
        if self._transform is not None:
            micro = [
                self._transformed(data, samples, step.epoch)
                for data, (samples, _) in zip(micro, step.micro, strict=True)
            ]
        parts = [MicroBatch(data, size) for data, (_, size) in zip(micro, step.micro, strict=True)]
        return Batch(step.index, step.epoch, step.global_size, parts, step.ends_epoch)

    def _transformed(self, data: Any, samples: Indices, epoch: int) -> Any:
        assert self._transform is not None
        try:
            return self._transform(data, torch.from_numpy(samples), epoch, self.seed)
        except RaytrainerError:
            raise
        except Exception as error:
            raise wrapped(self.dataset, f"transform_batch of {describe(samples)}", error) from error


def _has_state(dataset: Any) -> bool:
    return all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"must be a whole number of at least {least}", key=f"data.{name}", value=value)


def _is_map_style(dataset: Any, key: str) -> bool:
    if isinstance(dataset, torch.utils.data.IterableDataset):  # its __getitem__ only raises
        return False
    if hasattr(dataset, "__len__") and (hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")):
        return True
    if hasattr(dataset, "__iter__"):
        return False
    made = "nothing (None)" if dataset is None else f"a {name_of(dataset)}"
    function = callable(dataset) and not isinstance(dataset, type)
    raise ConfigError(
        f"builds {made}, which is not a dataset: it has neither __len__ with __getitem__ or __getitems__, nor __iter__"
        + ("; a function is called where _partial_ is false" if function else ""),
        key=key,
    )
