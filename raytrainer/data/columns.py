"""Columns from which batches are gathered: tensors in memory, or rows of a memory-mapped file."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class MappedColumn:
    """A column `[rows, ...]` of numbers in a memory-mapped file. Only the rows that are asked for are read, by `take`.

    Args:
        values: The whole file as numbers of the column's type, `[numbers]`.
        shape: Of the column, rows first.
        first: The number at which row 0 begins.
        per_batch: Rows in a record batch.
        stride: From one record batch to the next, in numbers.
        last: The number at which the last record batch begins: it is shorter, and so its columns lie closer.
    """

    def __init__(
        self, values: Tensor, shape: tuple[int, ...], *, first: int, per_batch: int, stride: int, last: int
    ) -> None:
        self.shape, self.dtype = torch.Size(shape), values.dtype
        self._width = prod(shape[1:])
        self._first, self._per_batch, self._gap = first, per_batch, stride - per_batch * self._width
        full = (shape[0] - 1) // per_batch  # record batches before the last
        self._tail, self._shift = full * per_batch, last - (first + full * stride)
        strides = [prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        # All places at which a row could begin, as rows that overlap: then one index_select gathers, as in memory.
        self._windows = values.as_strided((len(values) - self._width + 1, *shape[1:]), (1, *strides))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.take(torch.tensor([index % len(self)]))[0]

    def take(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The values of `rows` (int64 `[n]`, from 0), `[n, ...]`: a copy, into `out` where it is given."""
        places = rows * self._width
        places += self._first
        if self._gap:
            places += rows.div(self._per_batch, rounding_mode="floor").mul_(self._gap)
        if self._shift:
            places.add_(rows >= self._tail, alpha=self._shift)
        return torch.index_select(self._windows, 0, places, out=out)

    def load(self) -> Tensor:
        """All of it, in memory."""
        return self.take(torch.arange(len(self)))


Column = Tensor | MappedColumn


def take(column: Column, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """The values of `rows` (int64 `[n]`, on the column's device), `[n, ...]`."""
    if isinstance(column, MappedColumn):
        return column.take(rows, out)
    return torch.index_select(column, 0, rows, out=out)
