"""The guaranteed order, over dataset lengths, batch sizes, numbers of workers and resume points."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data.sample_plan import Batching, SamplePlan, Step

SHAPES = st.fixed_dictionaries(
    {
        "length": st.integers(1, 400),
        "global_batch_size": st.integers(1, 70),
        "micro_batch_size": st.none() | st.integers(1, 20),
        "seed": st.integers(0, 2**32),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
    }
)


def plan(shape: dict[str, Any], rank: int = 0, world: int = 1, **more: Any) -> SamplePlan:
    shape = dict(shape)
    shape["drop_last"] = shape["drop_last"] and shape["length"] >= shape["global_batch_size"]
    return SamplePlan(shape.pop("length"), Batching(rank=rank, world_size=world, **shape, **more))


def counted(step: Step) -> list[int]:
    """Return the samples of a step that count, in order."""
    return [int(sample) for samples, size in step.micro for sample in samples[:size]]


@given(shape=SHAPES, world=st.integers(1, 9), epoch=st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_an_epoch_loses_no_sample_and_gives_none_twice(shape: dict[str, Any], world: int, epoch: int) -> None:
    ranks = [plan(shape, rank, world) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    seen: list[int] = []
    for index in range(epoch * steps, (epoch + 1) * steps):
        parts = [rank.step(index) for rank in ranks]
        batch = [sample for part in parts for sample in counted(part)]
        assert {(p.index, p.epoch, p.global_size, p.ends_epoch, len(p.micro)) for p in parts} == {
            (index, epoch, len(batch), index == (epoch + 1) * steps - 1, len(parts[0].micro))
        }
        for part in parts:
            for samples, size in part.micro:
                assert len(samples) == max(size, 1)
                assert set(samples.tolist()) <= set(batch)
                assert shape["micro_batch_size"] is None or size <= shape["micro_batch_size"]
        seen += batch
    assert len(seen) == len(set(seen))
    if steps * shape["global_batch_size"] >= shape["length"]:
        assert sorted(seen) == list(range(shape["length"]))
    else:  # drop_last
        assert len(seen) == steps * shape["global_batch_size"] > shape["length"] - shape["global_batch_size"]


@given(shape=SHAPES, worlds=st.tuples(st.integers(1, 9), st.integers(1, 9)), index=st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_a_batch_is_the_same_for_any_number_of_workers(
    shape: dict[str, Any], worlds: tuple[int, int], index: int
) -> None:
    one, other = (
        [sample for rank in range(world) for sample in counted(plan(shape, rank, world).step(index))]
        for world in worlds
    )
    assert one == other


@given(
    shape=SHAPES,
    world=st.integers(1, 5),
    resumed_world=st.integers(1, 5),
    kill=st.integers(0, 60),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_resumed_anywhere_on_any_number_it_goes_on(
    shape: dict[str, Any], world: int, resumed_world: int, kill: int, data: st.DataObject
) -> None:
    """Elastic resume: the batches before and after the resume are those of the uninterrupted run."""
    last = kill + data.draw(st.integers(1, 20))
    alone = [counted(plan(shape).step(index)) for index in range(last)]
    before = [plan(shape, rank, world) for rank in range(world)]
    after = [plan(shape, rank, resumed_world) for rank in range(resumed_world)]
    seen = [[s for rank in before for s in counted(rank.step(index))] for index in range(kill)]
    seen += [[s for rank in after for s in counted(rank.step(index))] for index in range(kill, last)]
    assert seen == alone


def test_uneven_last_batch() -> None:
    ranks = [SamplePlan(10, Batching(global_batch_size=8, rank=rank, world_size=4)) for rank in range(4)]
    assert [counted(rank.step(0)) for rank in ranks] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [counted(rank.step(1)) for rank in ranks] == [[], [8], [], [9]]
    assert [(s.tolist(), n) for s, n in ranks[0].step(1).micro] == [([8], 0)]  # a placeholder that counts for nothing
    assert SamplePlan(10, Batching(global_batch_size=8, rank=0, world_size=4, pad_empty=False)).step(1).micro == []


def test_ranks_cut_into_the_same_number_of_micro_batches() -> None:
    ranks = [
        SamplePlan(13, Batching(global_batch_size=13, micro_batch_size=3, rank=rank, world_size=2)) for rank in range(2)
    ]
    assert [[size for _, size in rank.step(0).micro] for rank in ranks] == [[2, 2, 2], [2, 2, 3]]


def test_a_plan_keeps_one_epoch() -> None:
    long = SamplePlan(10**12, Batching(global_batch_size=512, shuffle=True))
    assert long.step(10**15).micro[0][0].dtype == np.int64
    assert long._order is not None
    assert sum(len(block) for block in long._order._blocks.values()) < 10**5
