"""`Loader`: the batches of a dataset, in order, on the device, from any position.

Batches are made in the calling thread, in another thread or in processes. This choice affects only the speed; the
batches are equal bit for bit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from raytrainer.data.agreement import agree_on_length, in_group_of
from raytrainer.data.column_source import ColumnSource
from raytrainer.data.datasets import columns_of, name_of
from raytrainer.data.fetch import Collate, Fetcher, describe, wrapped
from raytrainer.data.order import Indices
from raytrainer.data.pool import START_METHODS
from raytrainer.data.row_source import RowSource
from raytrainer.data.sample_plan import Batching, SamplePlan, Step
from raytrainer.data.stream import Stream
from raytrainer.data.stream_source import StreamSource
from raytrainer.errors import ConfigError, DataError, RaytrainerError

_log = logging.getLogger("raytrainer.data")


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


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Batching):
    """The settings of a `Loader`.

    Attributes:
        global_batch_size: Samples in a batch, on all ranks together.
        micro_batch_size: The maximum number of samples in a micro-batch of one rank; None for a single micro-batch.
        seed: Determines the order, the augmentation, and what the dataset draws from global generators.
        rank, world_size: The rank whose part is loaded, and the number of ranks.
        shuffle: Use a new order in each epoch, otherwise the dataset's order. Iterables always have their own.
        drop_last: Leave out an epoch's last batch if it is not full.
        pad_empty: Give a rank without samples one sample of the batch, with size 0, so that it joins the collectives.
        collate_fn: Converts a list of samples to a batch; None for torch's `default_collate`.
        num_workers: Processes for slow Python transforms; 0 for a thread. Columns and iterables do not use them.
        prefetch: Batches to prefetch (per process); 0 makes each in the calling thread when it is requested.
        start_method: How the processes are started: `forkserver`, `spawn` or `fork`. A dataset that cannot be pickled is
            read in a thread unless it is `fork`.
        device: The device of the batches.
        resident: Whether to keep a column dataset on the device: True, False, or `auto` for up to 256 MB without memory
            maps.
        key: The config key of the dataset, for messages.

    Raises:
        ConfigError: A value is invalid.
    """

    collate_fn: Collate | None = None
    num_workers: int = 0
    prefetch: int = 2
    start_method: str = "forkserver"
    device: str | torch.device = "cpu"
    resident: bool | str = "auto"
    key: str = "data"

    def __post_init__(self) -> None:
        for name, least in (("global_batch_size", 1), ("micro_batch_size", 1), ("num_workers", 0), ("prefetch", 0)):
            value = getattr(self, name)
            if name == "micro_batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"must be a whole number of at least {least}", key=f"data.{name}", value=value)
        for name, choices in (("resident", ("auto", True, False)), ("start_method", START_METHODS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    "is not a valid choice",
                    key=f"data.{name}",
                    value=getattr(self, name),
                    choices=[str(choice).lower() for choice in choices],
                )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is not one of {self.world_size}")


class Loader:
    """Batches of a map-style dataset, an iterable, or columns.

    The samples of batch `k` depend only on `seed`, `k` and the dataset's length. Rank `r` of `w` takes samples `b*r//w`
    to `b*(r+1)//w` of a batch of `b`, cut into the same number of micro-batches on all ranks.

    Args:
        dataset: Has `__len__` and `__getitem__` or `__getitems__`; or is a column dataset of `raytrainer.data`; or is
            an iterable, preferably with `state_dict` and `load_state_dict`. docs/data.md describes what each must
            provide.
        options: The settings; or single ones as keyword arguments: `Loader(dataset, global_batch_size=64)`.

    Attributes:
        keeps_dataset_state: Whether it is a map-style dataset with a state of its own, which a checkpoint saves.

    Raises:
        ConfigError: An argument is invalid, or the dataset is neither map-style nor iterable.
        DataError: The dataset has no samples. While iterating: the dataset raised an error; the message names the
            dataset and the sample.
    """

    def __init__(self, dataset: Any, options: LoaderOptions | None = None, **settings: Any) -> None:
        self.options = o = options or LoaderOptions(**settings)
        self.dataset, self.device = dataset, torch.device(o.device)
        self._transform = getattr(dataset, "transform_batch", None)
        self._position: dict[str, Any] = {}
        self._plan: SamplePlan | None = None
        self._columns: ColumnSource | None = None
        self._rows: RowSource | None = None
        self._stream: StreamSource[Batch] | None = None
        self.keeps_dataset_state = False
        if _is_map_style(dataset, o.key):
            self._plan = self._read_by_number()
        else:
            self._stream = self._read_as_stream()

    def _read_by_number(self) -> SamplePlan:
        o, dataset, length = self.options, self.dataset, len(self.dataset)
        if length == 0:
            raise DataError(f"{o.key}: {name_of(dataset)} has no samples: its length is 0")
        plan = SamplePlan(length, o)
        if in_group_of(o.world_size):
            agree_on_length(name_of(dataset), length, False, o.world_size, self.device)
        self.keeps_dataset_state = all(
            callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict")
        )
        columns = columns_of(dataset) if o.collate_fn is None else None
        if columns is not None:
            self._columns = ColumnSource(columns, self.device, o.resident, o.prefetch)
        else:
            self._rows = RowSource(
                plan,
                Fetcher(dataset, o.collate_fn, o.seed),
                self.device,
                keeps_state=self.keeps_dataset_state,
                num_workers=o.num_workers,
                prefetch=o.prefetch,
                start_method=o.start_method,
            )
        return plan

    def _read_as_stream(self) -> StreamSource[Batch]:
        o = self.options
        stream = Stream(self.dataset, o)
        if o.num_workers:
            _log.info("%s is read in a thread: processes cannot share an iterable's position", stream.name)
        group = o.world_size if in_group_of(o.world_size) else None
        if group is not None:
            agree_on_length(stream.name, stream.announced or -1, True, group, self.device)
        return StreamSource(stream, o.collate_fn, self.device, o.prefetch, group, self._finished)

    @property
    def length(self) -> int | None:
        """Samples in an epoch; None for an iterable."""
        return self._plan.length if self._plan else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in an epoch; for an iterable, those that its `__len__` announces, or None without one."""
        if self._plan is not None:
            return self._plan.steps_per_epoch
        assert self._stream is not None
        return self._stream.announced

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
        if self._plan is None:
            yield from self._from_stream(start, stop, alone=alone)
            return
        steps = _steps(self._plan, start, stop)
        if self._rows is not None:
            source, states = self._rows.batches(steps, start, stop), self._rows.dataset_states
        else:
            assert self._columns is not None
            source, states = self._columns.batches(steps), {}
        try:
            for step, micro in source:
                batch = self._finished(step, micro)
                if step.index in states:  # prefetching has moved the dataset past this batch
                    self._position = {"dataset": states.pop(step.index)}
                yield batch
        finally:
            source.close()

    def _from_stream(
        self, start: int, stop: int | None, *, one_epoch: bool = False, alone: bool = False
    ) -> Generator[Batch, None, None]:
        assert self._stream is not None
        source = self._stream.batches(start, stop, self._position, one_epoch=one_epoch, alone=alone)
        try:
            for batch, position in source:
                self._position = position
                yield batch
        finally:
            source.close()

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
            return self._transform(data, torch.from_numpy(samples), epoch, self.options.seed)
        except RaytrainerError:
            raise
        except Exception as error:
            raise wrapped(self.dataset, f"transform_batch of {describe(samples)}", error) from error


def _steps(plan: SamplePlan, start: int, stop: int | None) -> Generator[Step, None, None]:
    index = start
    while stop is None or index < stop:
        yield plan.step(index)
        index += 1


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
