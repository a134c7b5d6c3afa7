"""RayDataset without Ray: a rank's rows and its position. tests/integration/test_ray_data.py trains a run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from raytrainer.config import compose
from raytrainer.data import Loader, RayDataset
from raytrainer.data.ray_data import _Shard
from raytrainer.errors import ConfigError
from raytrainer.preflight import Resources, check_objects, check_resources


class Rows:
    """A dataset with a shard for each rank, whose epochs differ."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.read: list[int] = []

    def __iter__(self) -> Any:
        raise NotImplementedError

    def shard(self, rank: int, world_size: int) -> _Shard:
        def read(epoch: int) -> Iterator[dict[str, Any]]:
            self.read.append(epoch)
            numbers = np.arange(rank, self.rows, world_size) + 1000 * epoch
            for part in np.array_split(numbers, 3):
                images = np.empty(len(part), object)
                images[:] = [np.full(4, n, np.float32) for n in part]
                yield {"n": part, "image": images, "name": np.array([f"row {n}" for n in part], object)}

        return _Shard(read, world_size, {"image": (2, 2)})


def numbers(loader: Loader, start: int, stop: int) -> list[list[int]]:
    return [batch.micro[0].data["n"].tolist() for batch in loader.batches(start, stop)]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("place", range(1, 9))
def test_it_goes_on_in_its_epoch(place: int, prefetch: int) -> None:
    def loader(rows: Rows) -> Loader:
        return Loader(rows, global_batch_size=8, rank=1, world_size=2, prefetch=prefetch)

    expected = numbers(loader(Rows(50)), 0, 12)
    assert expected[0] == [1, 3, 5, 7]
    assert expected[6] == [1001, 1003, 1005, 1007]  # 25 rows make 6 batches
    first, rows = loader(Rows(50)), Rows(50)
    state: dict[str, Any] = {}
    for batch in first.batches():
        if batch.index == place - 1:
            state = first.state_dict()
            break
    second = loader(rows)
    second.load_state_dict(state)
    assert numbers(second, place, 12) == expected[place:]
    assert min(rows.read) == place // 6  # earlier epochs are not read again


def test_rows_become_tensors() -> None:
    batch = next(Loader(Rows(50), global_batch_size=5).batches()).micro[0].data
    assert batch["image"].shape == (5, 2, 2)
    assert batch["n"].dtype == torch.int64
    assert batch["name"] == [f"row {n}" for n in range(5)]


def test_an_evaluation_starts_no_second_epoch() -> None:
    rows = Rows(20)
    loader = Loader(rows, global_batch_size=5)
    for _ in range(2):
        assert [batch.ends_epoch for batch in islice(loader.one_epoch(), 6)] == [False, False, False, True]
    assert rows.read == [0, 0]


def test_without_a_cluster_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="use cluster=local, or existing"):
        RayDataset(path="x")
    with pytest.raises(ConfigError, match="RayDataset needs exactly one of them"):
        RayDataset()
    with pytest.raises(ConfigError, match="RayDataset needs exactly one of them"):
        RayDataset(path="x", dataset=1)


def experiment(*overrides: str) -> Any:
    target = "data.{}._target_=raytrainer.data.RayDataset"
    path = ["~data.train.split", "+data.train.path=rows.parquet"]
    return compose(["experiment=mlp", target.format("train"), *path, *overrides]).experiment


@pytest.mark.parametrize("where", ["cluster=inline", "debug=default"])
def test_inline_is_refused_before_anything_starts(where: str, in_tmp: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train=RayDataset .*cluster=inline"):
        check_objects(experiment(where))
    check_objects(experiment())


def test_workers_that_take_every_cpu_are_refused(in_tmp: Any) -> None:
    two = experiment("scaling.num_workers=2")
    (problem,) = check_resources(two, Resources(2), "here")
    assert problem is not None
    assert problem.startswith("data.train needs a CPU ")
    assert "2 CPUs for 2 workers of 1 CPU" in problem
    assert "use fewer workers" in problem
    assert check_resources(two, Resources(3), "here") == []
    half = experiment("scaling.num_workers=2", "+scaling.resources_per_worker={CPU: 0.5}")
    assert check_resources(half, Resources(2), "here") == []
