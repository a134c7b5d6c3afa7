"""The order of an epoch: a permutation, equal on all ranks, different by epoch and seed, and reached at any position at
the same cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data import order
from raytrainer.data.order import epoch_order, micro_slices, rank_slice, steps_per_epoch
from raytrainer.errors import ConfigError


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1437, 65536, 65537, 100_003, 131_072, 262_145])
def test_is_a_permutation(length: int) -> None:
    taken = epoch_order(1, 0, length, True).take(0, length)
    assert taken.dtype == np.int64
    assert np.array_equal(np.sort(taken), np.arange(length))


def test_numbers_are_what_they_were() -> None:
    """The numbers never change, because otherwise a resumed run would see other batches after an upgrade."""
    assert epoch_order(0, 0, 10, True).take(0, 10).tolist() == [7, 2, 5, 1, 9, 3, 8, 0, 6, 4]
    assert epoch_order(0, 0, 10**9, True).take(5, 10).tolist() == [
        320338697,
        849329542,
        458002498,
        253969363,
        397783871,
    ]


@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
    length=st.integers(1, 3000),
    whole=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_both_ways_give_slices_of_one_permutation(
    seed: int, epoch: int, length: int, whole: bool, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_WHOLE", length if whole else 1)
        patch.setattr(order, "_BLOCK", 64)
        everything = epoch_order(seed, epoch, length, True).take(0, length)
        assert np.array_equal(np.sort(everything), np.arange(length))
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start, length))
        assert np.array_equal(epoch_order(seed, epoch, length, True).take(start, stop), everything[start:stop])


@pytest.mark.parametrize("length", [1000, 100_000])
def test_epochs_and_seeds_differ(length: int) -> None:
    first = epoch_order(0, 0, length, True).take(0, length)
    for seed, epoch in [(0, 1), (1, 0)]:
        other = epoch_order(seed, epoch, length, True).take(0, length)
        assert (first == other).mean() < 0.01


@pytest.mark.parametrize("whole", [True, False])
def test_every_sample_is_as_likely_everywhere(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Chi-square of (sample, position) over many epochs, with 99.99% bounds (normal approximation)."""
    monkeypatch.setattr(order, "_WHOLE", 1 << 16 if whole else 1)
    length, epochs = 20, 3000
    counts = np.zeros((length, length))
    follows = np.zeros((length, length))
    for epoch in range(epochs):
        taken = epoch_order(3, epoch, length, True).take(0, length)
        counts[np.arange(length), taken] += 1
        follows[taken[:-1], taken[1:]] += 1
    freedom = (length - 1) ** 2
    chi = ((counts - epochs / length) ** 2 / (epochs / length)).sum()
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5
    off = ~np.eye(length, dtype=bool)  # every pair of neighbours is equally likely
    expected = epochs / length
    chi = ((follows[off] - expected) ** 2 / expected).sum()
    assert chi < off.sum() + 5 * (2 * off.sum()) ** 0.5


def test_neighbours_in_a_large_epoch_are_unrelated() -> None:
    taken = epoch_order(0, 0, 200_000, True).take(0, 200_000).astype(np.float64)
    for lag in (1, 2, 64, 512):
        assert abs(np.corrcoef(taken[:-lag], taken[lag:])[0, 1]) < 0.01


def test_unshuffled_is_as_it_comes() -> None:
    assert epoch_order(0, 5, 10**12, False).take(10**11, 10**11 + 3).tolist() == [10**11, 10**11 + 1, 10**11 + 2]


def test_a_seek_computes_one_block_wherever_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    permute = order.EpochOrder._permute

    def counted(self: order.EpochOrder, x: Any) -> order.Indices:
        computed.append(len(x))
        return permute(self, x)

    monkeypatch.setattr(order.EpochOrder, "_permute", counted)
    for start in (0, 10**6, 10**9, 10**12 - 600):
        computed.clear()
        epoch_order(0, 3, 10**12, True).take(start, start + 512)
        assert sum(computed) <= 2 * order._BLOCK
    computed.clear()
    going = epoch_order(0, 3, 10**12, True)
    for start in range(0, 10 * order._BLOCK, 512):
        going.take(start, start + 512)
    assert len(computed) == 10
    assert len(going._blocks) <= 3


@given(length=st.integers(0, 500), world=st.integers(1, 16), micro=st.none() | st.integers(1, 50))
def test_slices_share_out_everything_in_order(length: int, world: int, micro: int | None) -> None:
    taken: list[int] = []
    counts = set()
    for rank in range(world):
        part = range(length)[rank_slice(length, rank, world)]
        cuts = micro_slices(len(part), -(-length // world), micro)
        counts.add(len(cuts))
        for cut in cuts:
            assert micro is None or cut.stop - cut.start <= micro
            taken += part[cut]
    assert taken == list(range(length))
    assert len(counts) == 1  # the same number of micro-batches on every rank


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(100, 32, False) == 4
    assert steps_per_epoch(100, 32, True) == 3
    assert steps_per_epoch(96, 32, False) == 3
    with pytest.raises(ConfigError, match=r"data.global_batch_size=101.*drop_last=false"):
        steps_per_epoch(100, 101, True)
