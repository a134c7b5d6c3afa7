"""Rows a second and the time to the first batch: our loader against PyTorch's DataLoader and Ray Data.

60,000 rows of 3,073 bytes (an image of 3x32x32 and a label) in one Parquet file, shuffled, in batches of 512: from memory
and from the memory-mapped Arrow cache. The ways alternate (A B C …) in one process with one thread. Before that, each
must return every row exactly once.

    python -m benchmarks.bench_data --runs 15
    python -m benchmarks.bench_data --runs 2 --rows 6000 --dry-run      # does it work
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from benchmarks import report
from raytrainer.data import Loader, ParquetDataset

BATCH = 512
SHAPE = (3, 32, 32)
GOALS = {"best DataLoader": 1.1, "usual DataLoader": 5.0, "Ray Data": 50.0, "first batch": 0.2}

Batches = Iterable[dict[str, Any]]


def write_rows(path: Path, rows: int) -> tuple[Tensor, Tensor]:
    """Write the rows and return them. The label of a row is its number, so a batch shows which rows it contains."""
    images = np.random.default_rng(0).integers(0, 256, (rows, *SHAPE), dtype=np.uint8)
    column = pa.Array.from_buffers(pa.binary(3072), rows, [None, pa.py_buffer(images)])
    pq.write_table(pa.table({"image": column, "label": np.arange(rows)}), path, compression="none")
    return torch.from_numpy(images), torch.arange(rows)


class ByBatch:
    """Returns a whole batch in one call, the fastest dataset for a DataLoader, which then collates nothing."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        picked = torch.tensor(rows)
        return {"image": self.images.index_select(0, picked), "label": self.labels.index_select(0, picked)}

    __getitems__ = __getitem__


class ByItem:
    """Returns one row a call, as datasets usually do."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"image": self.images[row], "label": self.labels[row]}


def same(batch: Any) -> Any:
    return batch


def by_getitems(dataset: Any) -> Batches:
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, collate_fn=same)


def by_batch_sampler(dataset: Any) -> Batches:
    sampler = BatchSampler(RandomSampler(dataset), BATCH, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None, collate_fn=same)


def usual(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True)


class Ours:
    """Our loader; each pass is the next epoch."""

    def __init__(self, dataset: Any) -> None:
        self._loader = Loader(dataset, global_batch_size=BATCH, shuffle=True)
        self._epochs = itertools.count()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        steps = self._loader.steps_per_epoch or 0
        epoch = next(self._epochs)
        for batch in self._loader.batches(epoch * steps, (epoch + 1) * steps):
            yield batch.micro[0].data


class RayData:
    """Ray Data with its local shuffle over a buffer of all rows, because every other way here draws from all rows, too.

    Most of an epoch is the start of its tasks, in each epoch. The rest, after the first batch, is reported separately.
    """

    def __init__(self, path: Path, rows: int) -> None:
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        self._dataset, self._rows = ray.data.read_parquet(str(path)), rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._dataset.iter_batches(
            batch_size=BATCH, batch_format="numpy", local_shuffle_buffer_size=self._rows
        )


def timed(batches: Batches) -> tuple[float, float]:
    """Return the seconds to the first batch and to the end of the epoch."""
    gc.collect()
    began = time.perf_counter()
    first, rows = 0.0, 0
    for batch in batches:
        first = first or time.perf_counter() - began
        rows += len(batch["label"])
    return first, time.perf_counter() - began


def prove(name: str, batches: Batches, images: Tensor) -> None:
    """Check that each row comes once and unchanged, and that the order is not that of the file."""
    seen = []
    for batch in batches:
        labels = torch.as_tensor(batch["label"])
        pixels = batch["image"]
        if isinstance(pixels, np.ndarray) and pixels.dtype == object:  # Ray Data gives bytes
            pixels = np.frombuffer(b"".join(pixels), np.uint8)
        elif isinstance(pixels, np.ndarray):
            pixels = pixels.view(np.uint8)
        assert torch.equal(torch.as_tensor(pixels).reshape(-1, *SHAPE), images[labels]), name
        seen.append(labels)
    order = torch.cat(seen)
    assert torch.equal(order.sort().values, torch.arange(len(images))), name
    assert not torch.equal(order, torch.arange(len(images))), name


def first_of(make: Callable[[], Batches]) -> float:
    """Return the seconds from a dataset, without a loader, to the first batch."""
    gc.collect()
    began = time.perf_counter()
    iterator = iter(make())
    next(iterator)
    seconds = time.perf_counter() - began
    del iterator  # ends its processes
    return seconds


def measure(folder: Path, rows: int, runs: int) -> dict[str, Any]:
    path = folder / "rows.parquet"
    images, labels = write_rows(path, rows)
    shapes = {"image": SHAPE}
    memory = ParquetDataset(path, reshape=shapes, cache=None)
    mapped = ParquetDataset(path, reshape=shapes, cache=folder / "cache")
    by_batch, by_item = ByBatch(images, labels), ByItem(images, labels)
    ways: dict[str, Batches] = {
        "ours, in memory": Ours(memory),
        "ours, from the cache": Ours(mapped),
        "DataLoader, __getitems__": by_getitems(by_batch),
        "DataLoader, batch sampler": by_batch_sampler(by_batch),
        "DataLoader, 2 processes": usual(by_item),
        "Ray Data, local shuffle": RayData(path, rows),
    }
    firsts: dict[str, Callable[[], Batches]] = {
        "ours, in memory": lambda: Ours(memory),
        "ours, from the cache": lambda: Ours(mapped),
        "DataLoader, 2 processes": lambda: usual(by_item),
    }
    for name, way in ways.items():
        prove(name, way, images)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    after_first: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, list[float]] = {name: [] for name in firsts}
    for _ in range(runs):
        for name, way in ways.items():
            to_first, to_end = timed(way)
            seconds[name].append(to_end)
            after_first[name].append(to_end - to_first)
        for name, make in firsts.items():
            first[name].append(first_of(make))

    def ratio(ours: str, peer: str) -> dict[str, float]:
        return report.spread([b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)])

    fastest = min(
        ("DataLoader, __getitems__", "DataLoader, batch sampler"), key=lambda n: sorted(seconds[n])[runs // 2]
    )
    ratios = {
        ours: {
            "best DataLoader": ratio(ours, fastest),
            "usual DataLoader": ratio(ours, "DataLoader, 2 processes"),
            "Ray Data": ratio(ours, "Ray Data, local shuffle"),
            "first batch": report.spread(
                [a / b for a, b in zip(first[ours], first["DataLoader, 2 processes"], strict=True)]
            ),
        }
        for ours in ("ours, in memory", "ours, from the cache")
    }
    return {
        "rows": rows,
        "bytes_a_row": 3073,
        "batch": BATCH,
        "same_rows": True,
        "million_rows_a_second": {
            name: report.spread([rows / taken / 1e6 for taken in times]) for name, times in seconds.items()
        },
        "million_rows_a_second_after_the_first_batch": {
            name: report.spread([(rows - BATCH) / taken / 1e6 for taken in times])
            for name, times in after_first.items()
        },
        "first_batch_ms": {name: report.spread([1e3 * taken for taken in times]) for name, times in first.items()},
        "best DataLoader": fastest,
        "ratios": ratios,
        "goals": GOALS,
        "holds": {
            ours: {
                name: figures[name]["median"] <= goal if name == "first batch" else figures[name]["median"] >= goal
                for name, goal in GOALS.items()
            }
            for ours, figures in ratios.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dry-run", action="store_true", help="print the result without writing the file")
    options = parser.parse_args()
    import ray

    torch.set_num_threads(1)  # like a worker with one CPU, and like each DataLoader process
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        figures = measure(Path(folder), options.rows, options.runs)
    ray.shutdown()
    if options.dry_run:
        print(json.dumps(figures, indent=1))
    else:
        report.write("data", {"what": "epochs over shuffled rows, in batches, by several loaders", **figures})


if __name__ == "__main__":
    main()
