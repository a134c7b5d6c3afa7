"""Iterable datasets: an exact position through the dataset's own state, epochs by their ends, and slices by rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data import Loader
from raytrainer.errors import ConfigError, DataError
from raytrainer.parallel import World
from tests import ranks


class Numbers:
    """Counts up to `length` in each epoch, and adds random numbers from a generator that it keeps across epochs."""

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
    """A dataset without state."""

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
    assert [b.ends_epoch for b in batches[1]] == [False, False, True]  # 19 makes no full batch
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
    with pytest.raises(DataError, match="Plain has no samples: epoch 0"):
        next(Loader(Plain(0), global_batch_size=2).batches())
    with pytest.raises(DataError, match="epoch 0 gave 3 samples, fewer than the 4 "):
        next(Loader(Plain(3), global_batch_size=4, drop_last=True).batches())


def test_an_iterable_of_torch() -> None:
    class Torch(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(6))

    assert next(Loader(Torch(), global_batch_size=4, num_workers=2).batches()).micro[0].data.tolist() == [0, 1, 2, 3]


class Announced(torch.utils.data.IterableDataset[int]):
    """A dataset with a length, which may be wrong."""

    def __init__(self, length: int, says: int) -> None:
        self.length, self.says = length, says

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def test_a_length_that_the_iterable_announces_is_counted_in_batches(caplog: pytest.LogCaptureFixture) -> None:
    def steps(says: int, **more: Any) -> int | None:
        return Loader(Announced(10, says), global_batch_size=4, **more).steps_per_epoch

    assert (steps(10), steps(10, drop_last=True), steps(3, drop_last=True)) == (3, 2, None)

    class Unsaid(Plain):
        def __len__(self) -> int:
            raise TypeError("not known")

    assert Loader(Unsaid(10), global_batch_size=4).steps_per_epoch is None
    assert len(list(Loader(Announced(10, 10), global_batch_size=4).batches(0, 6))) == 6
    assert caplog.text == ""
    list(Loader(Announced(10, 20), global_batch_size=4).batches(0, 9))
    assert len(re.findall("Announced: __len__ .*5 batches.* 3", caplog.text)) == 1


def test_what_can_be_read_once_only_is_said_to_be() -> None:
    generator = Loader((torch.tensor(i) for i in range(10)), global_batch_size=4)
    with pytest.raises(DataError, match=r"generator: epoch 1 gave no samples.* only once"):
        list(generator.batches(0, 4))
    with pytest.raises(DataError, match="only once"):  # an evaluation reads it a second time
        list(generator.one_epoch())
    whole = list(Loader((torch.tensor(i) for i in range(10)), global_batch_size=4).batches(0, 3))
    assert [batch.ends_epoch for batch in whole] == [False, False, True]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_that_are_none_are_named(num_workers: int) -> None:
    class Nones(list[Any]):
        pass

    rows = Nones([torch.tensor(i) if i != 5 else None for i in range(8)])
    with pytest.raises(DataError, match=r"Nones, sample 5 is None, .* data.collate_fn"):
        list(Loader(rows, global_batch_size=4, num_workers=num_workers).batches(0, 2))
    kept = Loader(rows, global_batch_size=8, collate_fn=lambda found: torch.stack([x for x in found if x is not None]))
    assert len(next(kept.batches(0, 1)).micro[0].data) == 7
    with pytest.raises(DataError, match="sample 1 is None"):
        list(Loader(iter([torch.tensor(0), None]), global_batch_size=2).batches(0, 1))


def test_samples_that_make_no_batch_get_advice() -> None:
    with pytest.raises(DataError, match=r"data\.collate_fn can be a function"):
        list(Loader([object()] * 4, global_batch_size=4).batches(0, 1))
    ragged = [torch.zeros(i + 1) for i in range(4)]
    with pytest.raises(DataError, match=r"pad them in a data.collate_fn"):
        list(Loader(ragged, global_batch_size=4).batches(0, 1))


# -- ranks that disagree -----------------------------------------------------------------------------------------------


class Part(Plain):
    """A stream whose parts on the ranks have different lengths."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def shard(self, rank: int, world_size: int) -> Any:
        return Plain(self.lengths[rank])


class Raising(Plain):
    """A stream that fails on rank 1, at sample `length`."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (torch.tensor(i) for i in range(self.length))
        if torch.distributed.get_rank() == 1:
            raise OSError("gone")


def seen(world: World, dataset: Any, lengths: list[int] | None, way: dict[str, Any]) -> Any:
    """Return how many batches a rank got, and why it got no more."""
    count = 0
    try:
        own = dataset if lengths is None else dataset(lengths[world.rank])
        loader = Loader(own, rank=world.rank, world_size=world.size, **{"global_batch_size": 4, **way})
        for _ in loader.batches(0, 12):
            count += 1
        list(loader.one_epoch())
    except DataError as error:
        return count, str(error)
    return count, ""


def test_ranks_agree_on_where_a_stream_ends() -> None:
    """On two ranks, both raise the same error after the same batch, instead of waiting for each other."""

    def both(dataset: Any, lengths: list[int] | None = None, **way: Any) -> tuple[int, str]:
        answers = ranks.run(2, seen, dataset, lengths, way)
        assert answers[0] == answers[1]
        return cast(tuple[int, str], answers[0])

    for prefetch in (0, 2):
        assert both(Part(9, 9), prefetch=prefetch) == (12, "")
        count, message = both(Part(6, 20), prefetch=prefetch)
        assert count == 2
        assert re.search(r"epoch 0 .*\(rank 0: 6 samples, rank 1: 8 samples and continues\)", message)
        assert "same number of full batches" in message
    for count, message in ranks.run(2, seen, Part(1, 20), None, {}):  # in the first batch
        assert count == 0
        assert re.search(r"Part: epoch 0 gave 1 samples, fewer than the 2 .*rank \(0 of 2\)", message)
    assert message.startswith("rank 0: Part")
    assert "rank 1: 4 samples and continues" in message
    count, message = both(Plain, [9, 14])  # both ranks read whole datasets, of different lengths
    assert count == 2
    assert "rank 0: 9 samples, rank 1: 14 samples and continues" in message
    assert "shard(rank, world_size)" in message
    assert both(Plain, [9, 9]) == (12, "")


def test_one_rank_that_cannot_read_is_named_on_all() -> None:
    own, other = (ranks.run(2, seen, Raising(6), None, {}))[::-1]
    assert own == (0, "Raising, sample 6: OSError: gone")
    assert other[0] == 0
    assert other[1].startswith("rank 1: Raising, sample 6: OSError: gone")


def test_datasets_of_another_length_on_each_rank_are_refused_before_the_first_batch() -> None:
    for count, message in ranks.run(2, lengths_of, [10, 12]):
        assert count == 0
        assert re.search(r"length .*\(rank 0: 10 samples, rank 1: 12 samples\)", message)
        assert "do not split it by rank" in message


def lengths_of(world: World, lengths: list[int]) -> Any:
    return seen(world, list(range(lengths[world.rank])), None, {})
