"""Columns from which batches are gathered: tensors in memory, or rows of a memory-mapped file."""

from __future__ import annotations

import mmap
import warnings
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor


class MappedColumn:
    """A column `[rows, ...]` of numbers in a memory-mapped file. Only the rows that are asked for are read, by `take`.

    Args:
        mapping: The whole file.
        dtype: Of the numbers, whose places are multiples of their size.
        shape: Of the column, rows first.
        first: The number at which row 0 begins.
        per_batch: Rows in a record batch.
        stride: From one record batch to the next, in numbers.
        last: The number at which the last record batch begins: it is shorter, and so its columns lie closer.
    """

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
            # A write to it would be the end of the process; nothing here hands it out.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            values = torch.from_numpy(np.frombuffer(mapping, dtype, len(mapping) // dtype.itemsize))
        self.shape, self.dtype = torch.Size(shape), values.dtype
        self._width = prod(shape[1:])
        self._first, self._per_batch, self._gap = first, per_batch, stride - per_batch * self._width
        self._log2 = per_batch.bit_length() - 1 if per_batch.bit_count() == 1 else None
        full = (shape[0] - 1) // per_batch  # record batches before the last
        self._tail, self._shift = full * per_batch, last - (first + full * stride)
        strides = [prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        # All places at which a row could begin, as rows that overlap: then one index_select gathers, as in memory.
        self._windows = values.as_strided((len(values) - first - self._width + 1, *shape[1:]), (1, *strides), first)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.take(torch.tensor([index % len(self)]))[0]

    def take(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The values of `rows` (int64 `[n]`, from 0), `[n, ...]`: a copy, into `out` where it is given."""
        return torch.index_select(self._windows, 0, self._places(rows), out=out)

    def page_in(self, rows: Tensor) -> None:
        """Asks the kernel for the pages of `rows`, all at once and no others. Without it each is waited for in its turn,
        and comes with its neighbours."""
        size = self._width * self._itemsize
        for place in ((self._places(rows) + self._first) * self._itemsize).tolist():
            start = place - place % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, start, place + size - start)

    def _places(self, rows: Tensor) -> Tensor:
        picked = rows.numpy()  # on so few numbers its operations take a third of torch's
        places = picked * self._width
        if self._gap:
            batch = picked >> self._log2 if self._log2 is not None else picked // self._per_batch
            batch *= self._gap
            places += batch
        if self._shift:
            places += (picked >= self._tail) * self._shift
        return torch.from_numpy(places)

    def load(self) -> Tensor:
        """All of it, in memory."""
        return self.take(torch.arange(len(self)))


Column = Tensor | MappedColumn


def take(column: Column, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """The values of `rows` (int64 `[n]`, on the column's device), `[n, ...]`."""
    if isinstance(column, MappedColumn):
        return column.take(rows, out)
    return torch.index_select(column, 0, rows, out=out)
