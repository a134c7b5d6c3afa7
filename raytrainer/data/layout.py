"""The conversion of an Arrow column of fixed-size numbers to an array: its type, the shape of a row, and the copy."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raytrainer.errors import ConfigError, DataError

# torch defines these types, but few of its operations support them.
_WIDER = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


class ColumnLayout:
    """The conversion of a column of Arrow type `kind` to an array: the type of its numbers and the shape of a row."""

    def __init__(self, kind: pa.DataType, number: pa.DataType, shape: tuple[int, ...]) -> None:
        self.kind, self.shape = kind, shape
        dtype = str(np.dtype(number.to_pandas_dtype()))
        self.dtype = np.dtype(_WIDER.get(dtype, dtype))
        self.unsigned64 = dtype == "uint64"

    @property
    def row_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def fill(self, out: npt.NDArray[Any], column: pa.ChunkedArray, where: str) -> None:
        row, wanted = 0, prod(self.shape)
        for chunk in column.chunks:
            numbers = self._numbers(chunk, wanted, where)
            if numbers.null_count:
                raise DataError(f"{where}: {numbers.null_count} nulls, and a batch of numbers cannot hold them")
            values = _view(numbers)
            if self.unsigned64 and values.size and values.max() > np.iinfo(np.int64).max:
                raise DataError(f"{where}: {values.max()} is more than int64 holds")
            out[row : row + len(chunk)] = values.reshape(len(chunk), *self.shape)
            row += len(chunk)

    def _numbers(self, chunk: pa.Array, wanted: int, where: str) -> pa.Array:
        while True:
            if chunk.null_count:
                raise DataError(f"{where}: {chunk.null_count} nulls, and a batch of numbers cannot hold them")
            if isinstance(chunk, pa.ExtensionArray):
                chunk = chunk.storage
            elif pa.types.is_fixed_size_list(chunk.type):
                chunk = chunk.flatten()
            elif pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                lengths = np.diff(chunk.offsets.to_numpy())
                odd = np.flatnonzero(lengths != wanted)
                if odd.size:
                    raise DataError(f"{where}: row {odd[0]} has {lengths[odd[0]]} values, but reshape expects {wanted}")
                chunk = chunk.flatten()
            else:
                return chunk


def _view(numbers: pa.Array) -> npt.NDArray[Any]:
    if pa.types.is_fixed_size_binary(numbers.type):
        width = numbers.type.byte_width
        data = np.frombuffer(numbers.buffers()[1], dtype=np.uint8)
        return data[numbers.offset * width : (numbers.offset + len(numbers)) * width]
    values: npt.NDArray[Any] = numbers.to_numpy(zero_copy_only=False)  # only booleans are copied here
    return values


def layout_of(kind: pa.DataType, wanted: tuple[int, ...] | None, name: str) -> ColumnLayout | None:
    """Return the layout of a column; None if the column stays an Arrow column."""
    shape: list[int] = []
    number, free = kind, False
    while True:
        if isinstance(number, pa.FixedShapeTensorType):
            shape += number.shape
            number = number.value_type
        elif isinstance(number, pa.ExtensionType):
            number = number.storage_type
        elif pa.types.is_fixed_size_list(number):
            shape.append(number.list_size)
            number = number.value_type
        elif (pa.types.is_list(number) or pa.types.is_large_list(number)) and wanted is not None and not shape:
            number, free = number.value_type, True
        elif pa.types.is_fixed_size_binary(number) and not pa.types.is_decimal(number):
            shape.append(number.byte_width)
            number = pa.uint8()
        else:
            break
    if not (pa.types.is_integer(number) or pa.types.is_floating(number) or pa.types.is_boolean(number)):
        if wanted is None:
            return None
        raise ConfigError(
            f"reshape.{name}: the column is {kind}, and only numbers can be shaped", key=f"reshape.{name}"
        )
    if wanted is not None and not free and prod(wanted) != prod(shape):
        raise ConfigError(
            f"reshape.{name}={list(wanted)}: the column is {kind}, {prod(shape)} values a row and not {prod(wanted)}",
            key=f"reshape.{name}",
            value=list(wanted),
        )
    return ColumnLayout(kind, number, tuple(shape) if wanted is None else wanted)
