"""Memory-mapped Arrow files, written in record batches of equal size so that the position of a row can be computed.

Opening a file reads the footer and the headers of three batches. The kernel pages in what a training batch needs, and
all processes of a machine share these pages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import pyarrow as pa

from raytrainer.data.columns import MappedColumn
from raytrainer.data.layout import ColumnLayout
from raytrainer.errors import DataError

BATCH_BYTES = 16 * 2**20  # size of a record batch, and therefore of the memory that a conversion needs


class MappedTable:
    """Columns of any Arrow type in a memory-mapped file, read row by row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader, _ = _open(path)
        self._per_batch = self._reader.get_batch(0).num_rows

    def __reduce__(self) -> tuple[type[MappedTable], tuple[Path]]:
        return MappedTable, (self._path,)

    def take(self, rows: pa.Array) -> pa.Table:
        """Return the rows (int64 `[n]`) as slices of the map."""
        places = (divmod(row, self._per_batch) for row in rows.to_pylist())
        return pa.Table.from_batches([self._reader.get_batch(number).slice(at, 1) for number, at in places])


def rows_per_batch(row_bytes: float) -> int:
    """Return how many rows of `row_bytes` bytes a record batch has: a power of two, at most 2**20."""
    return 1 << min(20, max(0, int(BATCH_BYTES / max(row_bytes, 1))).bit_length() - 1 if row_bytes < BATCH_BYTES else 0)


class NumbersWriter:
    """Writes columns of numbers for `map_numbers`. It needs memory for one record batch.

    Args:
        path: The file to write.
        layouts: The layout of each column, by name.
    """

    def __init__(self, path: Path, layouts: Mapping[str, ColumnLayout]) -> None:
        self._layouts = layouts
        self.per_batch = rows_per_batch(sum(layout.row_bytes for layout in layouts.values()))
        self._arrays = {name: np.empty((self.per_batch, *x.shape), x.dtype) for name, x in layouts.items()}
        self._schema = pa.schema([pa.field(name, _arrow_type(layout)) for name, layout in layouts.items()])
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._filled = 0

    def write(self, table: pa.Table, where: str) -> None:
        """Write rows of the source. `where` is their location, for messages."""
        at = 0
        while at < table.num_rows:
            part = table.slice(at, self.per_batch - self._filled)
            end = self._filled + part.num_rows
            for name, layout in self._layouts.items():
                array = self._arrays[name][self._filled : end]
                layout.fill(array, part.column(name), f"{where}, column {name!r}")
            self._filled, at = end, at + part.num_rows
            if self._filled == self.per_batch:
                self._flush()

    def _flush(self) -> None:
        columns = []
        for field in self._schema:
            values = self._arrays[field.name][: self._filled].reshape(-1)
            flat = pa.Array.from_buffers(_number(field.type), values.size, [None, pa.py_buffer(values)])
            if isinstance(field.type, pa.FixedShapeTensorType):
                lists = pa.FixedSizeListArray.from_arrays(flat, prod(field.type.shape))
                flat = pa.ExtensionArray.from_storage(field.type, lists)
            columns.append(flat)
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._filled = 0

    def close(self) -> None:
        if self._filled:
            self._flush()
        self._writer.close()
        self._sink.close()


class TableWriter:
    """Writes columns of any Arrow type for `MappedTable`.

    Args:
        path: The file to write.
        row_bytes: The approximate size of a row, in bytes.
    """

    def __init__(self, path: Path, row_bytes: float) -> None:
        self.per_batch = rows_per_batch(row_bytes)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._parts: list[pa.Table] = []
        self._filled = 0

    def write(self, table: pa.Table, where: str) -> None:
        """Write rows of the source. `where` is their location, for messages."""
        # The dictionaries of an Arrow file must not change from batch to batch, so store the values.
        for number, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):
                table = table.set_column(number, field.name, table.column(number).cast(field.type.value_type))
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._sink, table.schema)
        at = 0
        while at < table.num_rows:
            part = table.slice(at, self.per_batch - self._filled)
            self._parts.append(part)
            self._filled, at = self._filled + part.num_rows, at + part.num_rows
            if self._filled == self.per_batch:
                self._flush(where)

    def _flush(self, where: str = "the last rows") -> None:
        batches = pa.concat_tables(self._parts).combine_chunks().to_batches()
        if len(batches) != 1:
            raise DataError(f"{where}: {self._filled} rows are more than one Arrow array holds; cache=null reads them")
        assert self._writer is not None
        self._writer.write_batch(batches[0])
        self._parts, self._filled = [], 0

    def close(self) -> None:
        if self._filled:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._sink.close()


def map_numbers(path: Path, columns: Mapping[str, tuple[str, Iterable[int]]], rows: int) -> dict[str, MappedColumn]:
    """Map the columns of a file that `NumbersWriter` wrote.

    Args:
        path: The file.
        columns: By name, the numpy type and the shape of a row.
        rows: The number of rows.

    Raises:
        DataError: It is not an Arrow file.
    """
    reader, mapping = _open(path)
    count, per_batch = reader.num_record_batches, reader.get_batch(0).num_rows

    origin: int = pa.py_buffer(mapping).address

    def start(batch: int, column: str) -> int:
        # The last buffer holds the numbers. The buffers before it hold validity bits, which are unused because there
        # are no nulls.
        address: int = reader.get_batch(batch).column(column).buffers()[-1].address
        return address - origin

    mapped = {}
    for name, (kind, shape) in columns.items():
        dtype = np.dtype(kind)
        first, last = start(0, name) // dtype.itemsize, start(count - 1, name) // dtype.itemsize
        stride = start(1, name) // dtype.itemsize - first if count > 1 else 0
        mapped[name] = MappedColumn(
            mapping, dtype, (rows, *shape), first=first, per_batch=per_batch, stride=stride, last=last
        )
        mapped[name].reopen = _map_column, (path, name, kind, tuple(shape), rows)
    return mapped


def _map_column(path: Path, name: str, kind: str, shape: tuple[int, ...], rows: int) -> MappedColumn:
    return map_numbers(path, {name: (kind, shape)}, rows)[name]


def _open(path: Path) -> tuple[pa.ipc.RecordBatchFileReader, mmap.mmap]:
    try:
        # pyarrow.memory_map is not used, because it asks the kernel to page in every range that is read.
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapping))), mapping
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _arrow_type(layout: ColumnLayout) -> pa.DataType:
    # One byte per boolean, as in torch.
    number = pa.from_numpy_dtype(np.uint8 if layout.dtype == np.bool_ else layout.dtype)
    return pa.fixed_shape_tensor(number, list(layout.shape)) if layout.shape else number


def _number(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if isinstance(kind, pa.FixedShapeTensorType) else kind
