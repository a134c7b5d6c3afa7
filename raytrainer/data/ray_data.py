"""Rows of a Ray Data pipeline, for preprocessing that outgrows one machine: split over the ranks as it streams.

It gives up the order promise: which rows a batch holds is Ray's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raytrainer.data.datasets import Transform
from raytrainer.errors import ConfigError, DataError
from raytrainer.seeds import mix


def _ray() -> Any:
    """Ray, in a process that has a cluster: a worker of Ray Train, a trial of a sweep."""
    import ray
    import ray.data

    if not ray.is_initialized():
        raise ConfigError(
            "reads through a Ray cluster, and this process has none: use cluster=local, or existing", key="RayDataset"
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


class RayDataset:
    """An iterable over the rows of a `ray.data.Dataset`: dicts of tensors (numbers) and of what else Ray gives.

    The ranks share one execution an epoch, and each gets as many rows (up to as many as there are ranks are left out).
    A resumed run goes on in the epoch in which it stopped, after as many rows as it had read; which those are depends on
    the pipeline.

    Args:
        dataset: The pipeline, or a function that makes it (`_partial_: true`; only rank 0 calls it).
        path: In its place, Parquet files as `ray.data.read_parquet` takes them.
        shuffle_rows: Rows of each rank from which the next are drawn at random; 0 for the order in which they come. The
            more, the better the shuffle, and the later the first batch.
        seed: Of those draws.
        reshape: By column, the shape of one row's value, `{"image": [1, 8, 8]}`.
        transform: See `raytrainer.data.ColumnDataset`.

    Raises:
        ConfigError: Not one of `dataset` and `path`; there is no Ray cluster here.
        DataError: (when read) `dataset` is no `ray.data.Dataset`.
    """

    def __init__(
        self,
        dataset: Any = None,
        path: str | Sequence[str] | None = None,
        shuffle_rows: int = 0,
        seed: int = 0,
        reshape: Mapping[str, Sequence[int]] | None = None,
        transform: Transform | None = None,
    ) -> None:
        if (dataset is None) == (path is None):
            raise ConfigError("RayDataset wants one of dataset and path", key="dataset")
        if shuffle_rows < 0:
            raise ConfigError("is negative", key="shuffle_rows", value=shuffle_rows)
        self._ray = _ray()
        self._dataset, self._path = dataset, path
        self._shuffle_rows, self._seed, self.transform = shuffle_rows, seed, transform
        self._shapes = {name: tuple(shape) for name, shape in (reshape or {}).items()}

    @property
    def transform_batch(self) -> Transform | None:
        return self.transform

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.shard(0, 1))

    def shard(self, rank: int, world_size: int) -> _Shard:
        """The rows of one rank. All ranks call it: they read from one execution, which rank 0 starts."""
        if world_size == 1:
            return self._shard(self._pipeline().iterator(), rank, world_size)
        pickle = self._ray.cloudpickle
        shared: list[Any] = [None]
        if rank == 0:
            shared[0] = pickle.dumps(self._pipeline().streaming_split(world_size, equal=True))
        dist.broadcast_object_list(shared)
        return self._shard(pickle.loads(shared[0])[rank], rank, world_size)

    def _shard(self, rows: Any, rank: int, world_size: int) -> _Shard:
        def read(epoch: int) -> Iterator[dict[str, Any]]:
            seed = mix("ray-data", self._seed, epoch, rank) % 2**32
            shuffle = {"local_shuffle_buffer_size": self._shuffle_rows, "local_shuffle_seed": seed}
            found: Iterator[dict[str, Any]] = iter(
                rows.iter_batches(batch_format="numpy", **(shuffle if self._shuffle_rows else {}))
            )
            return found

        return _Shard(read, world_size, self._shapes)

    def _pipeline(self) -> Any:
        data = self._ray.data
        if self._path is not None:
            return data.read_parquet(self._path)
        made = self._dataset() if callable(self._dataset) else self._dataset
        if not isinstance(made, data.Dataset):
            raise DataError(f"RayDataset: dataset is a {type(made).__name__}, and not a ray.data.Dataset")
        return made


class _Shard:
    """What one rank reads. Its state is the number of rows given out on all ranks, in this epoch.

    Args:
        read: From an epoch to its batches, each a dict of arrays.
        world_size: How many ranks read as much.
        shapes: By column, of one row's value.
    """

    def __init__(
        self,
        read: Callable[[int], Iterator[dict[str, Any]]],
        world_size: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._read, self._world_size, self._shapes = read, world_size, shapes
        self._epoch = self._given = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped = self._given
        for batch in self._read(self._epoch):
            count = len(next(iter(batch.values())))
            first = min(skipped, count)
            skipped -= first
            columns = {name: self._column(name, values) for name, values in batch.items()}
            for row in range(first, count):
                self._given += 1
                yield {name: column[row] for name, column in columns.items()}
        self._given = 0  # the next epoch begins at the start

    def _column(self, name: str, values: Any) -> Any:
        """A tensor `[rows, ...]` of numbers; anything else as it is."""
        if values.dtype == object and isinstance(values[0], np.ndarray | list) and name in self._shapes:
            values = np.stack(values)
        if values.dtype.kind not in "biuf":
            return values
        column = torch.from_numpy(values if values.flags.writeable else values.copy())
        return column.view(-1, *self._shapes[name]) if name in self._shapes else column

    def state_dict(self) -> dict[str, int]:
        return {"rows": self._given * self._world_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._given = state["rows"] // self._world_size
