"""The samples of each batch: a function of seed, epoch and dataset length only, independent of ranks and processes.

Any position is reached at the same cost, with memory that does not grow with the dataset.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raytrainer.errors import ConfigError
from raytrainer.seeds import mix

Indices = npt.NDArray[np.int64]

_WHOLE = 1 << 16  # up to this length, an epoch is permuted at once (3 ms at most); longer ones are permuted in blocks
_BLOCK = 1 << 15  # 2 ms per block, so that no step waits long for the next block
_ROUNDS = 8
_GOLDEN, _MIX1, _MIX2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_U30, _U27, _U31 = np.uint64(30), np.uint64(27), np.uint64(31)


def hash64(x: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Hash each number of `x` to uint64: output x of SplitMix64 (Steele, Lea, Flood 2014) from the state `key`."""
    x = x * _GOLDEN
    x += np.uint64(key)
    x ^= x >> _U30
    x *= _MIX1
    x ^= x >> _U27
    x *= _MIX2
    x ^= x >> _U31
    return x


class EpochOrder:
    """The order of one epoch. `take(start, stop)` returns the samples at those positions, int64 `[stop - start]`.

    For small datasets, the positions are sorted by a 64-bit hash of (seed, epoch, position). For large ones, a keyed
    bijection of [0, length) is computed in blocks: a Feistel network over the next power of two with cycle walking
    (Black and Rogaway 2002). Both use integer arithmetic that is written out here, so that a new numpy release cannot
    change a run's order.
    """

    def __init__(self, seed: int, epoch: int, length: int, shuffle: bool) -> None:
        self.length, self.shuffle = length, shuffle
        self._keys = [mix("order", seed, epoch, number) for number in range(_ROUNDS)]
        self._whole: Indices | None = None
        self._blocks: dict[int, Indices] = {}
        if shuffle and length <= _WHOLE:
            positions = np.arange(length, dtype=np.uint64)
            # Each step of the hash is invertible, so no two hashes are equal and any sort gives the same order.
            self._whole = np.argsort(hash64(positions, self._keys[0])).astype(np.int64, copy=False)

    def __len__(self) -> int:
        return self.length

    def take(self, start: int, stop: int) -> Indices:
        if self._whole is not None:
            return self._whole[start:stop]
        stop = min(stop, self.length)
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        first, last = start // _BLOCK, max(start, stop - 1) // _BLOCK
        parts = [self._block(b)[max(start - b * _BLOCK, 0) : stop - b * _BLOCK] for b in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, block: int) -> Indices:
        if block not in self._blocks:
            if len(self._blocks) > 1:  # reading goes forward, so only the previous block can be needed again
                self._blocks = {b: kept for b, kept in self._blocks.items() if b == block - 1}
            begin = block * _BLOCK
            self._blocks[block] = self._permute(np.arange(begin, min(begin + _BLOCK, self.length), dtype=np.uint64))
        return self._blocks[block]

    def _permute(self, x: npt.NDArray[np.uint64]) -> Indices:
        x = self._feistel(x)
        outside = np.flatnonzero(x >= self.length)
        # Less than half of the domain is outside, so few rounds are needed, each on half as many as the one before.
        while outside.size:
            x[outside] = self._feistel(x[outside])
            outside = outside[x[outside] >= self.length]
        return x.astype(np.int64)

    def _feistel(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        bits = (self.length - 1).bit_length()
        low_bits = np.uint64(bits // 2)
        low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
        high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
        high, low = x >> low_bits, x & low_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= hash64(high, key) & low_mask
            else:
                high ^= hash64(low, key) & high_mask
        high <<= low_bits
        high |= low
        return high


def epoch_order(seed: int, epoch: int, length: int, shuffle: bool) -> EpochOrder:
    """Return the order of epoch `epoch` of a dataset of `length` samples."""
    return EpochOrder(seed, epoch, length, shuffle)


def rank_slice(length: int, rank: int, world_size: int) -> slice:
    """Return the part of a batch of `length` samples for `rank` of `world_size`. Parts may differ in length by one."""
    return slice(length * rank // world_size, length * (rank + 1) // world_size)


def steps_per_epoch(length: int, global_batch_size: int, drop_last: bool) -> int:
    """Return the number of batches in an epoch.

    Raises:
        ConfigError: `drop_last` leaves no batch.
    """
    if not drop_last:
        return -(-length // global_batch_size)
    if length < global_batch_size:
        raise ConfigError(
            f"is more than the dataset's {length} samples, and "
            "data.drop_last=true drops the only batch: make the batch smaller or set data.drop_last=false",
            key="data.global_batch_size",
            value=global_batch_size,
        )
    return length // global_batch_size


def micro_slices(length: int, largest: int, micro_batch_size: int | None) -> list[slice]:
    """Cut a rank's `length` samples into micro-batches of at most `micro_batch_size`, as evenly as possible.

    Args:
        length: Samples of this rank.
        largest: Samples of the rank that has the most. All ranks cut into the same number of slices, because a sharded
            model gathers its weights for each of them. The slices of a rank with fewer samples may be empty.
        micro_batch_size: None for a single micro-batch.
    """
    count = 1 if micro_batch_size is None else max(1, -(-largest // micro_batch_size))
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]
