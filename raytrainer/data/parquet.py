"""Parquet files, directories, globs and URIs as a dataset of columns, through pyarrow.

Fixed-size numeric columns are decoded once into one array each; a batch is then one gather a column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch

from raytrainer.data.datasets import ColumnDataset, Transform
from raytrainer.errors import ConfigError, DataError, nearest
from raytrainer.storage.files import redacted

_SUFFIXES = (".parquet", ".parq", ".pq")
# torch has these types in name, but few of its operations take them.
_WIDER = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


class ParquetDataset(ColumnDataset):
    """Rows of Parquet files, in the order of the files' sorted paths.

    Numbers, booleans, fixed-size lists and binaries of them (`[k]`, nested `[j, k]`, `arrow.fixed_shape_tensor`), and
    lists that `reshape` names, are held in memory as tensors `[rows, ...]`: unsigned 16 and 32 bits as the next larger
    signed type, fixed-size binaries as uint8. Other columns (strings, binaries, lists of any length) stay Arrow's;
    with one of them selected, samples are read one by one and go through `data.collate_fn`.

    Args:
        path: A file, a directory (all Parquet files below it; names that begin with `.` or `_` are left out), a glob
            (`*`, `?`, `[…]`, `**`), or a URI of one of them that pyarrow knows (`s3://`, `gs://`, `abfs://`,
            `file://`). A relative path is taken from the current directory.
        columns: The names to read; None for all.
        reshape: By column, the shape of one row's value, `{"image": [1, 8, 8]}`.
        transform: See `raytrainer.data.ColumnDataset`.

    Raises:
        ConfigError: A column, or a shape, that the files do not have.
        DataError: No file, no rows, a file that cannot be read or differs in its types, a column with nulls.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str] | None = None,
        transform: Transform | None = None,
        reshape: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(transform)
        self.path = redacted(str(path))  # for messages
        self._filesystem, self.files = find_files(str(path))
        schemas, counts = self._footers()
        names = list(schemas[0].names if columns is None else columns)
        shapes = {name: tuple(int(n) for n in shape) for name, shape in (reshape or {}).items()}
        for name in [*names, *shapes]:
            _must_have(name, schemas[0].names if name not in shapes else names, self.path)
        if not names:
            raise ConfigError(f"{self.path}: columns names none", key="columns", value=columns)
        for file, schema in zip(self.files, schemas, strict=True):
            self._same_types(file, schema, schemas[0], names)
        self._length = sum(counts)
        if self._length == 0:
            raise DataError(f"{self.path}: {len(self.files)} Parquet file(s), and no row in them")
        layout = {name: _layout(schemas[0].field(name).type, shapes.get(name), name) for name in names}
        self.columnar = all(layout.values())
        self._objects: dict[str, pa.ChunkedArray] = {}
        self._read(names, layout)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = {name: column[index] for name, column in self.tensors.items()}
        row.update({name: column[index].as_py() for name, column in self._objects.items()})
        return row

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Any:
        if self.columnar:
            return super().__getitems__(indices)
        picked = pa.array(np.asarray(indices, dtype=np.int64))
        values = {name: column.take(picked).to_pylist() for name, column in self._objects.items()}
        values.update(super().__getitems__(indices))
        return [{name: column[i] for name, column in values.items()} for i in range(len(picked))]

    def _footers(self) -> tuple[list[pa.Schema], list[int]]:
        def footer(file: str) -> tuple[pa.Schema, int]:
            with self._opened(file) as opened:
                return opened.schema_arrow, opened.metadata.num_rows

        with ThreadPoolExecutor(min(16, len(self.files))) as pool:  # they are round trips, where files are far away
            found = list(pool.map(footer, self.files))
        return [schema for schema, _ in found], [rows for _, rows in found]

    def _opened(self, file: str) -> pq.ParquetFile:
        try:
            if isinstance(self._filesystem, pafs.LocalFileSystem):
                return pq.ParquetFile(file, memory_map=True)
            return pq.ParquetFile(self._filesystem.open_input_file(file), pre_buffer=True)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: {error}") from error

    def _same_types(self, file: str, schema: pa.Schema, first: pa.Schema, names: list[str]) -> None:
        for name in names:
            if name not in schema.names:
                raise DataError(f"{file}: has no column {name!r}, which {self.files[0]} has")
            if schema.field(name).type != first.field(name).type:
                raise DataError(
                    f"{file}: column {name!r} is {schema.field(name).type}, "
                    f"and {first.field(name).type} in {self.files[0]}"
                )

    def _read(self, names: list[str], layout: dict[str, _Layout | None]) -> None:
        arrays = {
            name: np.empty((self._length, *kind.shape), kind.dtype) for name, kind in layout.items() if kind is not None
        }
        chunks: dict[str, list[pa.Array]] = {name: [] for name in names if layout[name] is None}
        row = 0
        for file in self.files:
            with self._opened(file) as opened:
                for group in range(opened.num_row_groups):
                    try:
                        table = opened.read_row_group(group, columns=names)
                    except (pa.ArrowException, OSError) as error:
                        raise DataError(f"{file}, row group {group}: {error}") from error
                    begin = row
                    row += table.num_rows
                    for name, array in arrays.items():
                        kind = layout[name]
                        assert kind is not None
                        kind.fill(array[begin:row], table.column(name), f"{file}, row group {group}, column {name!r}")
                    for name, parts in chunks.items():
                        parts += table.column(name).chunks
        self.tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._objects = {name: pa.chunked_array(parts) for name, parts in chunks.items()}


class _Layout:
    """How a column of Arrow type `kind` becomes an array: the type of its numbers and the shape of a row."""

    def __init__(self, kind: pa.DataType, number: pa.DataType, shape: tuple[int, ...]) -> None:
        self.kind, self.shape = kind, shape
        dtype = str(np.dtype(number.to_pandas_dtype()))
        self.dtype = np.dtype(_WIDER.get(dtype, dtype))
        self.unsigned64 = dtype == "uint64"

    def fill(self, out: npt.NDArray[Any], column: pa.ChunkedArray, where: str) -> None:
        row, wanted = 0, prod(self.shape)
        for chunk in column.chunks:
            numbers = self._numbers(chunk, wanted, where)
            if numbers.null_count:
                raise DataError(f"{where}: {numbers.null_count} nulls, and a batch of numbers has no place for them")
            values = _view(numbers)
            if self.unsigned64 and values.size and values.max() > np.iinfo(np.int64).max:
                raise DataError(f"{where}: {values.max()} is more than int64 holds")
            out[row : row + len(chunk)] = values.reshape(len(chunk), *self.shape)
            row += len(chunk)

    def _numbers(self, chunk: pa.Array, wanted: int, where: str) -> pa.Array:
        while True:
            if chunk.null_count:
                raise DataError(f"{where}: {chunk.null_count} nulls, and a batch of numbers has no place for them")
            if isinstance(chunk, pa.ExtensionArray):
                chunk = chunk.storage
            elif pa.types.is_fixed_size_list(chunk.type):
                chunk = chunk.flatten()
            elif pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                lengths = np.diff(chunk.offsets.to_numpy())
                odd = np.flatnonzero(lengths != wanted)
                if odd.size:
                    raise DataError(f"{where}: row {odd[0]} has {lengths[odd[0]]} values, and reshape wants {wanted}")
                chunk = chunk.flatten()
            else:
                return chunk


def _view(numbers: pa.Array) -> npt.NDArray[Any]:
    if pa.types.is_fixed_size_binary(numbers.type):
        width = numbers.type.byte_width
        data = np.frombuffer(numbers.buffers()[1], dtype=np.uint8)
        return data[numbers.offset * width : (numbers.offset + len(numbers)) * width]
    values: npt.NDArray[Any] = numbers.to_numpy(zero_copy_only=False)  # only booleans are copied
    return values


def _layout(kind: pa.DataType, wanted: tuple[int, ...] | None, name: str) -> _Layout | None:
    """None for a column that stays Arrow's."""
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
    return _Layout(kind, number, tuple(shape) if wanted is None else wanted)


def _must_have(name: str, present: Sequence[str], path: str) -> None:
    if name not in present:
        near = nearest(name, present)
        raise ConfigError(
            f"{path}: no column {name!r}; "
            + (f"the nearest: {', '.join(near)}" if near else f"there are {', '.join(present)}"),
            key="columns",
            value=name,
            choices=present,
        )


def find_files(path: str) -> tuple[pafs.FileSystem, list[str]]:
    """The file system of `path` and its Parquet files, sorted.

    Raises:
        DataError: There is none, or the place cannot be read.
    """
    head, wildcard = _split_glob(path)
    shown = redacted(path)
    try:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", head):
            filesystem, base = pafs.FileSystem.from_uri(head)
        else:
            filesystem, base = pafs.LocalFileSystem(), str(Path(head).expanduser().absolute())
        info = filesystem.get_file_info(base)
        if info.type == pafs.FileType.File and not wildcard:
            return filesystem, [base]
        found = (
            filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
            if info.type == pafs.FileType.Directory
            else []
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shown}: {error}") from error
    if info.type == pafs.FileType.NotFound and not wildcard:
        raise DataError(f"{shown}: no such file or directory")
    files = []
    for entry in found:
        parts = entry.path[len(base.rstrip("/")) + 1 :].split("/")
        if entry.type != pafs.FileType.File:
            continue
        if wildcard:
            wanted = _matches(parts, wildcard)
        else:
            wanted = entry.path.endswith(_SUFFIXES) and not any(part.startswith((".", "_")) for part in parts)
        if wanted:
            files.append(entry.path)
    if not files:
        raise DataError(f"{shown}: no Parquet file {'matches' if wildcard else 'is in it'}")
    return filesystem, sorted(files)


def _split_glob(path: str) -> tuple[str, list[str]]:
    """The part of a path before its first wildcard, and the parts from there on."""
    options = ""
    if "://" in path:  # a question mark in a URI begins its options, `s3://bucket/*.parquet?region=…`
        path, mark, options = path.partition("?")
        options = mark + options
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    return ("/".join(parts[:first]) or ("/" if path.startswith("/") else ".")) + options, parts[first:]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
