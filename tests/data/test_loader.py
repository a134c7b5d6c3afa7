"""The loader: the same batches however they are made, errors that name the sample, and nothing left running."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data import Arrays, Digits, Loader, RandomCropFlip
from raytrainer.data.loader import Batch
from raytrainer.errors import ConfigError, DataError

WAYS: list[dict[str, Any]] = [
    {},
    {"resident": False},
    {"resident": False, "prefetch": 0},
    {"resident": True, "prefetch": 5},
    {"num_workers": 2},
    {"num_workers": 2, "start_method": "fork"},
    {"num_workers": 3, "prefetch": 1},
    {"prefetch": 0},
    {"prefetch": 7},
]


class Rows:
    """Single samples. With `draw` they contain numbers from the global random generators."""

    def __init__(self, length: int = 53, draw: bool = False) -> None:
        self.length, self.draw = length, draw
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        noise = [random.random(), np.random.rand(), torch.rand(1).item()] if self.draw else [0.0]
        return {"x": torch.tensor([float(index), *noise], dtype=torch.float64), "y": np.int64(index)}


class ByBatch:
    """Whole batches of numpy arrays."""

    def __len__(self) -> int:
        return 53

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"x": np.asarray(indices) * 2.0, "y": np.asarray(indices)}


def data_processes() -> list[Any]:
    """Return the running processes of loaders, because other tests of this process may keep their own."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("raytrainer-data")]


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def flat(batches: Iterator[Batch]) -> list[Any]:
    """Return everything in the batches as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), value.tolist()]
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, tuple | list) else value

    return [
        (b.index, b.epoch, b.global_size, b.ends_epoch, [(plain(m.data), m.size) for m in b.micro]) for b in batches
    ]


def columns() -> Arrays:
    images = torch.arange(53 * 4 * 6, dtype=torch.float32).reshape(53, 1, 4, 6)
    return Arrays({"image": images, "y": np.arange(53)}, transform=RandomCropFlip(1, True))


DATASETS: dict[str, Callable[[], Any]] = {
    "rows": Rows,
    "drawing rows": lambda: Rows(draw=True),
    "whole batches": ByBatch,
    "columns": columns,
    "tuples": lambda: [(torch.tensor([i]), i) for i in range(53)],
    "named tuples": lambda: [Named(torch.tensor(i), torch.tensor(-i)) for i in range(53)],
    "tensor dataset": lambda: torch.utils.data.TensorDataset(torch.arange(53), torch.arange(106).view(53, 2)),
    "subset of columns": lambda: torch.utils.data.Subset(cast(Any, columns()), list(range(0, 53, 2))),
}


@pytest.mark.parametrize("name", DATASETS)
def test_the_same_batches_however_they_are_made(name: str) -> None:
    def batches(**way: Any) -> list[Any]:
        loader = Loader(DATASETS[name](), global_batch_size=10, micro_batch_size=4, seed=3, shuffle=True, **way)
        return flat(loader.batches(4, 20))

    expected = batches()
    assert len(expected) == 16
    for way in WAYS[1:]:
        assert batches(**way) == expected, way


@given(start=st.integers(0, 200), more=st.integers(1, 6), world=st.integers(1, 5), way=st.sampled_from(range(4)))
@settings(max_examples=40, deadline=None)
def test_ranks_together_give_the_batches_of_one(start: int, more: int, world: int, way: int) -> None:
    def seen(world: int) -> list[list[tuple[float, int]]]:
        ranks = [
            Loader(
                columns(), global_batch_size=9, seed=5, shuffle=True, rank=rank, world_size=world, **WAYS[way]
            ).batches(start, start + more)
            for rank in range(world)
        ]
        return [
            [
                (row.sum().item(), int(label))
                for batch in parts
                for micro in batch.micro
                for row, label in zip(micro.data["image"][: micro.size], micro.data["y"][: micro.size], strict=True)
            ]
            for parts in zip(*ranks, strict=True)
        ]

    assert seen(world) == seen(1)


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    def by_sample(epoch: int, **arguments: Any) -> dict[int, list[float]]:
        seen: dict[int, list[float]] = {}
        for rank in range(arguments.get("world_size", 1)):
            loader = Loader(Rows(20, draw=True), **{"rank": rank, **arguments})
            steps = loader.steps_per_epoch or 0
            for batch in loader.batches(epoch * steps, (epoch + 1) * steps):
                for micro in batch.micro:
                    for row in micro.data["x"][: micro.size]:
                        seen[int(row[0])] = row.tolist()
        return seen

    one = by_sample(1, global_batch_size=6, shuffle=True)
    assert by_sample(1, global_batch_size=4, world_size=2) == one
    assert by_sample(2, global_batch_size=4) != one
    assert by_sample(1, global_batch_size=4, seed=1) != one
    assert len({row[1] for row in one.values()}) == 20


@pytest.mark.parametrize("way", [{}, {"prefetch": 0}, {"num_workers": 1}])
def test_the_models_generators_are_left_alone(way: dict[str, Any]) -> None:
    def model_draws(draw: bool) -> list[float]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        drawn = []
        for _ in Loader(Rows(20, draw=draw), global_batch_size=4, **way).batches(0, 8):
            drawn += [random.random(), np.random.rand(), torch.rand(1).item()]
        return drawn

    assert model_draws(True) == model_draws(False)


def mixed(rows: list[Any]) -> torch.Tensor:
    return torch.randperm(len(rows))


def test_collate_fn_that_draws_is_repeatable() -> None:
    def batches(**way: Any) -> list[Any]:
        return flat(Loader(Rows(40), global_batch_size=8, collate_fn=mixed, **way).batches(3, 9))

    assert batches() == batches(num_workers=2) == batches(prefetch=0)


def test_collate_fn_gets_samples_also_of_columns() -> None:
    loader = Loader(columns(), global_batch_size=3, collate_fn=lambda rows: [int(row["y"]) for row in rows])
    # The transform needs the original form of a batch, which `collate_fn` has changed.
    with pytest.raises(DataError, match="RandomCropFlip"):
        next(loader.batches())
    plain = Arrays({"y": np.arange(6)})
    loader = Loader(plain, global_batch_size=3, collate_fn=lambda rows: np.array([row["y"] for row in rows]))
    assert next(loader.batches(1)).micro[0].data.tolist() == [3, 4, 5]


@pytest.mark.parametrize("way", WAYS)
def test_a_seek_reads_nothing_before_it(way: dict[str, Any]) -> None:
    rows = Rows(53)
    batch = next(Loader(rows, global_batch_size=10, shuffle=True, **way).batches(10**12))
    assert batch.index == 10**12
    assert len(rows.asked) <= 10 * (1 + way.get("prefetch", 2) + 1)


def test_digits_shapes() -> None:
    train, val = Digits(), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    batch = next(Loader(train, global_batch_size=64, shuffle=True).batches())
    image, label = batch.micro[0].data["image"], batch.micro[0].data["label"]
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((64, 1, 8, 8), torch.float32, (64,), torch.int64)


class Bad(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 37:
            raise ValueError("broken pixel")
        return super().__getitem__(index)


@pytest.mark.parametrize("way", [{}, {"prefetch": 0}, {"num_workers": 2}])
def test_an_error_names_dataset_and_sample(way: dict[str, Any]) -> None:
    batches = Loader(Bad(), global_batch_size=10, **way).batches()
    seen: list[int] = []
    with pytest.raises(DataError, match="Bad, sample 37: ValueError: broken pixel") as caught:
        seen.extend(batch.index for batch in batches)
    assert seen == [0, 1, 2]  # the batches before it arrived
    if way.get("num_workers"):
        assert "broken pixel" in "".join(caught.value.__notes__)
        assert "__getitem__" in "".join(caught.value.__notes__)
    else:
        assert isinstance(caught.value.__cause__, ValueError)


def test_errors_of_batches_and_collating() -> None:
    class Broken(ByBatch):
        def __getitems__(self, indices: list[int]) -> dict[str, Any]:
            raise KeyError("column")

    with pytest.raises(DataError, match=r"Broken, samples 0, 1, 2, 3, … \(10 in all\): KeyError: 'column'"):
        next(Loader(Broken(), global_batch_size=10).batches())
    uneven = [torch.zeros(n) for n in (1, 2)]
    with pytest.raises(DataError, match="list, collating samples 0, 1: RuntimeError"):
        next(Loader(uneven, global_batch_size=2).batches())


def test_an_error_of_the_transform_names_the_batch() -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("no")

    dataset = Arrays({"x": np.arange(3)}, transform=broken)
    with pytest.raises(DataError, match=r"Arrays, transform_batch .*0, 1: ZeroDivisionError: no"):
        next(Loader(dataset, global_batch_size=2).batches())


class Suicidal(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 25:
            assert multiprocessing.parent_process() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_killed_process_is_an_error_that_says_so(start_method: str) -> None:
    with pytest.raises(DataError, match=r"Suicidal: .*\(SIGKILL; .*memory"):
        list(Loader(Suicidal(), global_batch_size=10, num_workers=2, start_method=start_method).batches(0, 10))
    assert data_processes() == []


def unsendable(rows: list[Any]) -> Any:
    return lambda: rows


def test_a_batch_that_cannot_be_sent_is_an_error() -> None:
    loader = Loader(Rows(), global_batch_size=4, num_workers=1, collate_fn=unsendable)
    with pytest.raises(DataError, match="local object"):
        next(loader.batches())


@pytest.mark.parametrize("way", [{}, {"num_workers": 3}, {"resident": False}])
@pytest.mark.parametrize("dataset", [Rows, columns])
def test_closing_ends_threads_and_processes(way: dict[str, Any], dataset: Callable[[], Any]) -> None:
    before = threading.active_count()
    batches = Loader(dataset(), global_batch_size=5, **way).batches()
    for _ in range(4):
        next(batches)
    batches.close()
    assert threading.active_count() == before
    assert data_processes() == []


class Slow(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index > 10:
            assert multiprocessing.parent_process() is not None
            threading.Event().wait(600)
        return super().__getitem__(index)


def test_closing_does_not_wait_for_a_slow_process() -> None:
    batches = Loader(Slow(), global_batch_size=5, num_workers=2).batches()
    next(batches)
    batches.close()
    assert data_processes() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"global_batch_size": 0}, "data.global_batch_size=0"),
        ({"global_batch_size": 2.5}, "data.global_batch_size=2.5"),
        ({"global_batch_size": 4, "micro_batch_size": 0}, "data.micro_batch_size=0"),
        ({"global_batch_size": 4, "num_workers": -1}, "data.num_workers=-1"),
        ({"global_batch_size": 4, "prefetch": -1}, "data.prefetch=-1"),
        ({"global_batch_size": 4, "resident": "always"}, "data.resident=always is not a valid choice; valid: "),
        ({"global_batch_size": 4, "start_method": "frok"}, "data.start_method=frok is not a valid choice; valid: "),
        ({"global_batch_size": 4, "rank": 2, "world_size": 2}, "rank 2"),
        ({"global_batch_size": 400, "drop_last": True}, "drop_last=true drops the only batch"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Loader(Rows(), **arguments)


def test_datasets_that_cannot_be() -> None:
    with pytest.raises(DataError, match="Rows has no samples"):
        Loader(Rows(0), global_batch_size=1)
    with pytest.raises(ConfigError, match="builds a object, which is not a dataset"):
        Loader(object(), global_batch_size=1)
