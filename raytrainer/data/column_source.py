"""`ColumnSource`: batches gathered from columns, on the device, in memory or in a memory map."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from raytrainer.data.columns import Column, MappedColumn
from raytrainer.data.prefetch import Made, gather, on_device, while_warm
from raytrainer.data.sample_plan import Step

RESIDENT_BYTES = 256 * 2**20
"""Up to this size `resident="auto"` keeps a column dataset on the device."""


class ColumnSource:
    """The source of batches from a column dataset.

    Args:
        columns: The columns, in a dict or tuple as in a batch.
        device: The device of the batches.
        resident: Whether to keep the columns on the device, as in `LoaderOptions`.
        prefetch: Batches to prefetch from memory.
    """

    def __init__(self, columns: Any, device: torch.device, resident: bool | str, prefetch: int) -> None:
        self._device, self._prefetch = device, prefetch
        values = _values(columns)
        if resident == "auto":
            # A memory map is used for data that must not be loaded into memory as a whole.
            tensors = [column for column in values if isinstance(column, Tensor)]
            small = sum(column.nbytes for column in tensors) <= RESIDENT_BYTES
            resident = len(tensors) == len(values) and small
        self._resident = bool(resident)
        self._mapped = not self._resident and any(isinstance(column, MappedColumn) for column in values)
        if self._resident:
            if isinstance(columns, dict):
                columns = {name: self._whole(column) for name, column in columns.items()}
            else:
                columns = tuple(map(self._whole, columns))
        self._columns = columns

    def _whole(self, column: Column) -> Tensor:
        return (column.load() if isinstance(column, MappedColumn) else column).to(self._device)

    def batches(self, steps: Generator[Step, None, None]) -> Generator[Made, None, None]:
        """Yield the data of each step."""
        if self._mapped:
            return self._from_map(steps)
        if self._resident or not self._prefetch:
            return self._gathered(steps)
        return on_device(self._gathered(steps), self._device, self._prefetch)

    def _gathered(self, steps: Iterator[Step]) -> Generator[Made, None, None]:
        device = self._device
        on_host = device.type == "cpu" or not self._resident
        pinned = device.type == "cuda" and not self._resident
        for step in steps:
            micro = []
            for samples, _ in step.micro:
                rows = torch.from_numpy(samples)
                if not on_host:
                    rows = rows.to(device, non_blocking=True)
                micro.append(gather(self._columns, rows, pinned))
            yield step, micro

    def _from_map(self, steps: Iterator[Step]) -> Generator[Made, None, None]:
        """Gather from a memory map.

        On the CPU, while the pages are in memory, gather in the calling thread, because a copy takes less time than a
        hand-over between threads. If pages come from a disk, gather in another thread.
        """
        if self._device.type == "cuda":

            def both() -> Generator[Made, None, None]:
                if not (yield from while_warm(self._gathered(steps))):
                    yield from self._paged_in(steps)

            yield from on_device(both(), self._device, self._prefetch)
        elif not (yield from while_warm(self._gathered(steps))):
            yield from on_device(self._paged_in(steps), self._device, self._prefetch)

    def _paged_in(self, steps: Iterator[Step]) -> Generator[Made, None, None]:
        """Gather after the kernel was asked for all pages of a batch at once."""
        mapped = [column for column in _values(self._columns) if isinstance(column, MappedColumn)]

        def requested() -> Iterator[Step]:
            for step in steps:
                for samples, _ in step.micro:
                    for column in mapped:
                        column.page_in(torch.from_numpy(samples))
                yield step

        return self._gathered(requested())


def _values(columns: Any) -> list[Column]:
    return list(columns.values() if isinstance(columns, dict) else columns)
