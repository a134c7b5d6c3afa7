"""Iterables: an exact position through the dataset's own state, epochs by their ends, slices by rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data import Loader
from raytrainer.errors import ConfigError, DataError


class Numbers:
    """Counts up to `length` in each epoch, mixing in a random number of a generator that it keeps across epochs."""

    def __init__(self, length: int) -> None:
        self.length, self.place, self.read = length, 0, 0
        self.random = np.random.Generator(np.random.Philox(7))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.place < self.length:
            self.place += 1
            self.read += 1
            yield {"x": self.place - 1, "noise": self.random.random()}
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        state: Any = self.random.bit_generator.state
        words = {key: value.tolist() for key, value in state["state"].items()}
        return {"place": self.place, "words": words, "buffer": state["buffer"].tolist(), "at": state["buffer_pos"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        whole: Any = self.random.bit_generator.state
        whole["state"] = {key: np.array(value, dtype=np.uint64) for key, value in state["words"].items()}
        whole["buffer"], whole["buffer_pos"] = np.array(state["buffer"], dtype=np.uint64), state["at"]
        self.random.bit_generator.state = whole


class Plain:
    """Without state."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor(i) for i in range(self.length))


def flat(loader: Loader, start: int, stop: int) -> list[Any]:
    return [
        (b.index, b.epoch, b.global_size, b.ends_epoch, m.size, m.data["x"].tolist(), m.data["noise"].tolist())
        for b in loader.batches(start, stop)
        for m in b.micro
    ]


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 15),
    kill=st.integers(1, 30),
    drop_last=st.booleans(),
    prefetch=st.integers(0, 4),
    world=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_resumed_anywhere_it_goes_on(
    length: int, batch: int, kill: int, drop_last: bool, prefetch: int, world: int
) -> None:
    drop_last = drop_last and length >= batch

    def loader(rank: int) -> Loader:
        return Loader(
            Numbers(length),
            global_batch_size=batch,
            drop_last=drop_last,
            prefetch=prefetch,
            rank=rank,
            world_size=world,
        )

    for rank in range(world):
        expected = flat(loader(rank), 0, kill + 12)
        first = loader(rank)
        seen, state = [], {}
        for b in first.batches():
            seen += [
                (b.index, b.epoch, b.global_size, b.ends_epoch, m.size, m.data["x"].tolist(), m.data["noise"].tolist())
                for m in b.micro
            ]
            state = first.state_dict()
            if b.index == kill - 1:
                break
        second = loader(rank)
        second.load_state_dict(state)
        assert seen + flat(second, kill, kill + 12) == expected


@given(
    length=st.integers(1, 40), batch=st.integers(1, 15), world=st.integers(1, 6), micro=st.none() | st.integers(1, 4)
)
@settings(max_examples=80, deadline=None)
def test_ranks_share_out_each_batch(length: int, batch: int, world: int, micro: int | None) -> None:
    ranks = [
        Loader(Numbers(length), global_batch_size=batch, micro_batch_size=micro, rank=rank, world_size=world).batches(
            0, 8
        )
        for rank in range(world)
    ]
    seen: list[int] = []
    for parts in zip(*ranks, strict=True):
        mine = [int(x) for part in parts for m in part.micro for x in m.data["x"][: m.size]]
        assert len(mine) == parts[0].global_size
        assert len({(p.index, p.epoch, p.ends_epoch, len(p.micro)) for p in parts}) == 1
        assert all(len(m.data["x"]) == max(m.size, 1) for part in parts for m in part.micro)
        seen += mine
        if parts[0].ends_epoch:
            assert seen == list(range(length))
            seen = []


def test_each_pass_from_the_start_is_the_same() -> None:
    loader = Loader(Numbers(10), global_batch_size=4)
    assert flat(loader, 0, 3) == flat(loader, 0, 3)


def test_without_state_the_beginning_is_read_again() -> None:
    loader = Loader(Plain(10), global_batch_size=4)
    assert loader.length is None
    assert loader.steps_per_epoch is None
    assert [b.micro[0].data.tolist() for b in loader.batches(1, 4)] == [[4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    assert "dataset" not in loader.state_dict()


def test_no_more_is_read_than_asked_for_and_one_batch() -> None:
    numbers = Numbers(1000)
    list(Loader(numbers, global_batch_size=10, prefetch=0).batches(0, 5))
    assert numbers.read == 60


def test_a_sharded_stream_is_read_by_its_rank_alone() -> None:
    class Sharded(Plain):
        def shard(self, rank: int, world_size: int) -> list[torch.Tensor]:
            return [torch.tensor(i) for i in range(rank, self.length, world_size)]

    loaders = [Loader(Sharded(21), global_batch_size=5, rank=rank, world_size=2) for rank in range(2)]
    batches = [list(loader.batches(0, 3)) for loader in loaders]
    assert [b.micro[0].data.tolist() for b in batches[0]] == [[0, 2], [4, 6], [8, 10]]
    assert [b.micro[0].data.tolist() for b in batches[1]] == [[1, 3, 5], [7, 9, 11], [13, 15, 17]]
    assert [b.ends_epoch for b in batches[1]] == [False, False, True]  # 19 is of no full batch
    with pytest.raises(ConfigError, match="make it at least 2"):
        Loader(Sharded(21), global_batch_size=1, rank=0, world_size=2)


def test_set_epoch_and_transform_are_told_where_they_are() -> None:
    told: list[Any] = []

    class Told(Plain):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

        def transform_batch(self, data: Any, samples: torch.Tensor, epoch: int, seed: int) -> Any:
            told.append((samples.tolist(), epoch, seed))
            return data

    list(Loader(Told(3), global_batch_size=2, prefetch=0, seed=9).batches(0, 3))
    assert told == [0, ([0, 1], 0, 9), ([2], 0, 9), 1, ([0, 1], 1, 9)]


def test_errors() -> None:
    def broken() -> Iterator[int]:
        yield from range(5)
        raise OSError("gone")

    class Broken(Plain):
        def __iter__(self) -> Any:
            return broken()

    batches = Loader(Broken(0), global_batch_size=2).batches()
    assert next(batches).micro[0].data.tolist() == [0, 1]
    with pytest.raises(DataError, match="Broken, sample 5: OSError: gone"):
        list(batches)
    with pytest.raises(DataError, match="Plain: an epoch gave 0 samples"):
        next(Loader(Plain(0), global_batch_size=2).batches())
    with pytest.raises(DataError, match="gave 3 samples, and a batch of this rank has at least 4"):
        next(Loader(Plain(3), global_batch_size=4, drop_last=True).batches())


def test_an_iterable_of_torch() -> None:
    class Torch(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(6))

    assert next(Loader(Torch(), global_batch_size=4, num_workers=2).batches()).micro[0].data.tolist() == [0, 1, 2, 3]
