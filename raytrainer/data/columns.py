"""Columns from which batches are gathered: tensors in memory, or rows of a memory-mapped file."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor


class MappedColumn:
    """A column `[rows, ...]` of numbers in a memory-mapped file. `take` reads only the requested rows.

    Args:
        mapping: The whole file.
        dtype: The type of the numbers. Their positions are multiples of its size.
        shape: The shape of the column, rows first.
        first: The position of row 0, in numbers.
        per_batch: Rows in a record batch.
        stride: The distance between two record batches, in numbers.
        last: The position of the last record batch, in numbers. It is shorter, so its columns lie closer together.

    Attributes:
        reopen: A function and its arguments that map the column again in another process; None if it cannot be sent.
    """

    reopen: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def __init__(
        self,
        mapping: mmap.mmap,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        *,
        first: int,
        per_batch: int,
        stride: int,
        last: int,
    ) -> None:
        self._mapping, self._itemsize = mapping, dtype.itemsize
        with warnings.catch_warnings():
            # A write to the read-only map would crash the process, but no code outside this class gets this tensor.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            values = torch.from_numpy(np.frombuffer(mapping, dtype, len(mapping) // dtype.itemsize))
        self.shape, self.dtype = torch.Size(shape), values.dtype
        self._width = prod(shape[1:])
        self._first, self._per_batch, self._gap = first, per_batch, stride - per_batch * self._width
        self._log2 = per_batch.bit_length() - 1 if per_batch.bit_count() == 1 else None
        full = (shape[0] - 1) // per_batch  # number of record batches before the last
        self._tail, self._shift = full * per_batch, last - (first + full * stride)
        strides = [prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        # A view with one overlapping row for each possible start, so that one index_select gathers, as in memory.
        self._windows = values.as_strided((len(values) - first - self._width + 1, *shape[1:]), (1, *strides), first)

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.reopen is None else self.reopen

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.take(torch.tensor([index % len(self)]))[0]

    def take(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Return a copy of `rows` (int64 `[n]`, from 0), `[n, ...]`; written into `out` if it is passed."""
        return torch.index_select(self._windows, 0, self._places(rows), out=out)

    def page_in(self, rows: Tensor) -> None:
        """Ask the kernel to load exactly the pages of `rows`, all at once.

        Otherwise they are loaded and waited for one after the other, each with its neighbours.
        """
        size = self._width * self._itemsize
        for place in ((self._places(rows) + self._first) * self._itemsize).tolist():
            start = place - place % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, start, place + size - start)

    def _places(self, rows: Tensor) -> Tensor:
        picked = rows.numpy()  # numpy needs a third of torch's time for so few numbers
        places = picked * self._width
        if self._gap:
            batch = picked >> self._log2 if self._log2 is not None else picked // self._per_batch
            batch *= self._gap
            places += batch
        if self._shift:
            places += (picked >= self._tail) * self._shift
        return torch.from_numpy(places)

    def load(self) -> Tensor:
        """Return the whole column in memory."""
        return self.take(torch.arange(len(self)))


Column = Tensor | MappedColumn


def take(column: Column, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the values of `rows` (int64 `[n]`, on the column's device), `[n, ...]`."""
    if isinstance(column, MappedColumn):
        return column.take(rows, out)
    return torch.index_select(column, 0, rows, out=out)
