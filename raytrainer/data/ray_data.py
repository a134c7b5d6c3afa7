"""Rows of a Ray Data pipeline, split over the ranks as they stream, for preprocessing that needs more than one machine.

The order of samples is not reproducible, because Ray decides which rows a batch holds.
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
    """Return the `ray` module, in a process that has a cluster: a Ray Train worker or a trial of a sweep."""
    import ray
    import ray.data

    if not ray.is_initialized():
        raise ConfigError(
            "reads through a Ray cluster, and this process has none: use cluster=local, or existing", key="RayDataset"
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


class RayDataset:
    """An iterable over the rows of a `ray.data.Dataset`: dicts of tensors (for numbers) and of Ray's other values.

    The ranks share one execution per epoch, and each gets the same number of rows. At most as many rows as there are
    ranks are left out. A resumed run continues in the epoch in which it stopped, after as many rows as it had read.
    Which rows these are depends on the pipeline.

    Args:
        dataset: The pipeline, or a function that makes it (`_partial_: true`; only rank 0 calls it).
        path: Instead of `dataset`: Parquet files, as `ray.data.read_parquet` accepts them.
        shuffle_rows: The size of each rank's buffer from which the next rows are drawn at random; 0 for no shuffling. A
            larger buffer shuffles better, but delays the first batch.
        seed: The seed of these draws.
        reshape: By column, the shape of one row's value, `{"image": [1, 8, 8]}`.
        transform: See `raytrainer.data.ColumnDataset`.

    Raises:
        ConfigError: Both or neither of `dataset` and `path` are set, or there is no Ray cluster.
        DataError: (when read) `dataset` is not a `ray.data.Dataset`.
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
            raise ConfigError("and path are alternatives: RayDataset needs exactly one of them", key="dataset")
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
        """Return the rows of one rank. All ranks call it and read from one execution, which rank 0 starts."""
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
            batches: Iterator[dict[str, Any]] = iter(
                rows.iter_batches(batch_format="numpy", **(shuffle if self._shuffle_rows else {}))
            )
            return batches

        return _Shard(read, world_size, self._shapes)

    def _pipeline(self) -> Any:
        data = self._ray.data
        if self._path is not None:
            return data.read_parquet(self._path)
        made = self._dataset() if callable(self._dataset) else self._dataset
        if not isinstance(made, data.Dataset):
            raise DataError(f"RayDataset: dataset is a {type(made).__name__}, not a ray.data.Dataset")
        return made


class _Shard:
    """The rows that one rank reads. Its state is the number of rows yielded on all ranks in this epoch.

    Args:
        read: Returns the batches of an epoch, each a dict of arrays.
        world_size: The number of ranks, which all read the same number of rows.
        shapes: By column, the shape of one row's value.
    """

    def __init__(
        self,
        read: Callable[[int], Iterator[dict[str, Any]]],
        world_size: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._read, self._world_size, self._shapes = read, world_size, shapes
        self._epoch = self._yielded = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped = self._yielded
        for batch in self._read(self._epoch):
            count = len(next(iter(batch.values())))
            first = min(skipped, count)
            skipped -= first
            columns = {name: self._column(name, values) for name, values in batch.items()}
            for row in range(first, count):
                self._yielded += 1
                yield {name: column[row] for name, column in columns.items()}
        self._yielded = 0  # the next epoch starts from the beginning

    def _column(self, name: str, values: Any) -> Any:
        """Convert numbers to a tensor `[rows, ...]`; return anything else unchanged."""
        if values.dtype == object and isinstance(values[0], np.ndarray | list) and name in self._shapes:
            values = np.stack(values)
        if values.dtype.kind not in "biuf":
            return values
        column = torch.from_numpy(values if values.flags.writeable else values.copy())
        return column.view(-1, *self._shapes[name]) if name in self._shapes else column

    def state_dict(self) -> dict[str, int]:
        return {"rows": self._yielded * self._world_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._yielded = state["rows"] // self._world_size
