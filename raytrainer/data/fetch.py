"""Read samples by number and collate them, for datasets that are read sample by sample in Python.

Random transforms that draw from the global generators also become a function of (seed, epoch, sample).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from raytrainer.batches import as_tensors
from raytrainer.data.datasets import columns_of, name_of
from raytrainer.data.order import Indices
from raytrainer.errors import DataError, RaytrainerError
from raytrainer.seeds import mix

Collate = Callable[[list[Any]], Any]


def collate(samples: list[Any], collate_fn: Collate | None) -> Any:
    """Collate `samples` with `collate_fn`, or with torch's `default_collate`, which here keeps tuples as tuples."""
    if collate_fn is not None:
        return as_tensors(collate_fn(samples))
    batch = default_collate(samples)
    return tuple(batch) if type(samples[0]) is tuple else batch


def describe(samples: Indices) -> str:
    numbers = samples.tolist()
    shown = ", ".join(map(str, numbers[:4]))
    return f"samples {shown}{f', … ({len(numbers)} in all)' if len(numbers) > 4 else ''}"


def wrapped(dataset: Any, where: str, error: Exception) -> DataError:
    return DataError(f"{name_of(dataset)}, {where}: {type(error).__name__}: {error}")


def uncollated(
    dataset: Any, rows: list[Any], samples: Indices, error: Exception, collate_fn: Collate | None
) -> DataError:
    """Return the error for samples that cannot be collated.

    It explains the cases in which a sample is None or the default collate function has no rule.
    """
    missing = [number for number, row in zip(samples.tolist(), rows, strict=False) if row is None]
    if missing:
        return DataError(
            f"{name_of(dataset)}, sample {missing[0]} is None, and None cannot be part of a batch. Return a sample for "
            "each number, or leave these out in a data.collate_fn of your own"
        )
    plain = wrapped(dataset, f"collating {describe(samples)}", error)
    if collate_fn is None and isinstance(error, TypeError) and "default_collate" in str(error):
        return DataError(f"{plain}. data.collate_fn can be a function of yours, from a list of samples to a batch")
    if collate_fn is None and isinstance(error, RuntimeError) and "equal size" in str(error):
        return DataError(f"{plain}. The samples differ in shape: pad them in a data.collate_fn of your own")
    return plain


class Fetcher:
    """A reader of batches from a map-style dataset.

    `isolated` detects whether the dataset or `collate_fn` draws from the global generators of Python, numpy or torch.
    If so, the dataset is from then on read sample by sample, each sample seeded with its (seed, epoch, sample). The
    draws are then the same in any process, and the generators keep their state for the model.

    Raises:
        DataError: (all methods) The dataset or `collate_fn` raised an error; the message names the sample.
    """

    def __init__(self, dataset: Any, collate_fn: Collate | None, seed: int) -> None:
        self.dataset, self.collate_fn, self.seed = dataset, collate_fn, seed
        self.draws = False
        self._read_batch = getattr(dataset, "read_batch", None)
        # A collate_fn receives samples, but column datasets return whole batches.
        whole = collate_fn is not None and columns_of(dataset) is not None
        self._by_batch = callable(getattr(dataset, "__getitems__", None)) and not whole

    def __call__(self, samples: Indices, epoch: int) -> Any:
        """Read a batch without restoring the global generators.

        This is correct only if `draws` is known to be False, or in the process or thread that owns the generators.
        """
        if self._read_batch is not None:
            return self._read_whole_batch(samples, epoch)
        if self.draws and hasattr(self.dataset, "__getitem__"):
            return self._seeded(samples, epoch)
        if self.draws:  # the dataset reads only whole batches, so its draws depend on where a batch begins
            _seed(mix("batch", self.seed, epoch, int(samples[0])))
        if not self._by_batch:
            return self._collate(self._each(samples), samples)
        try:
            batch = self.dataset.__getitems__(samples.tolist())
        except Exception as error:
            raise wrapped(self.dataset, describe(samples), error) from error
        if isinstance(batch, list) or self.collate_fn is not None:
            return self._collate(batch, samples)
        return as_tensors(batch)

    def _read_whole_batch(self, samples: Indices, epoch: int) -> Any:
        """Read from a dataset that receives epoch and seed and draws from them. Any thread may read it."""
        assert self._read_batch is not None
        try:
            batch = self._read_batch(samples, epoch, self.seed)
        except RaytrainerError:
            raise
        except Exception as error:
            raise wrapped(self.dataset, describe(samples), error) from error
        return as_tensors(batch) if self.collate_fn is None else self._collate(batch, samples)

    def isolated(self, samples: Indices, epoch: int) -> Any:
        """Read a batch and leave the global generators unchanged."""
        before = _generators()
        try:
            batch = self(samples, epoch)
            if not self.draws and _moved(before):
                self.draws = True
                batch = self(samples, epoch)
        finally:
            if self.draws:
                _put_back(before)
        return batch

    def _each(self, samples: Indices) -> list[Any]:
        dataset, rows, number = self.dataset, [], -1
        try:
            for number in samples.tolist():
                rows.append(dataset[number])  # not a comprehension, so that `number` names the sample that failed
        except Exception as error:
            raise wrapped(dataset, f"sample {number}", error) from error
        return rows

    def _seeded(self, samples: Indices, epoch: int) -> Any:
        rows = []
        for position in range(len(samples)):
            _seed(mix("sample", self.seed, epoch, int(samples[position])))
            rows += self._each(samples[position : position + 1])
        # collate_fn may also draw (to mix images of a batch). Its draws depend on the batch, and so on this rank's part
        # of it.
        _seed(mix("collate", self.seed, epoch, int(samples[0])))
        return self._collate(rows, samples)

    def _collate(self, rows: list[Any], samples: Indices) -> Any:
        try:
            return collate(rows, self.collate_fn)
        except Exception as error:
            raise uncollated(self.dataset, rows, samples, error, self.collate_fn) from error


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    # torch.manual_seed would also seed the devices, but data are prepared on the host.
    torch.default_generator.manual_seed(number)


def _generators() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _moved(before: tuple[Any, Any, Tensor]) -> bool:
    python, legacy, host = _generators()
    return bool(
        python != before[0]
        or legacy[2:] != before[1][2:]
        or not np.array_equal(legacy[1], before[1][1])
        or not torch.equal(host, before[2])
    )


def _put_back(before: tuple[Any, Any, Tensor]) -> None:
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
