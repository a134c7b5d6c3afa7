"""Parquet files, directories, globs and URIs as a dataset of columns, read through pyarrow.

Fixed-size numeric columns are decoded once, into memory or into a memory-mapped Arrow file. A batch is then one gather
per column.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raytrainer.data.arrow import MappedTable, NumbersWriter, TableWriter, map_numbers
from raytrainer.data.cache import Cache, cache_folder
from raytrainer.data.datasets import ColumnDataset, Transform
from raytrainer.data.layout import layout_of
from raytrainer.data.source_files import check_local, find_files
from raytrainer.errors import ConfigError, DataError, nearest
from raytrainer.storage import redacted

IN_MEMORY_BYTES = 2**30
"""Up to this size, decoded, `cache="auto"` keeps the data in memory: each worker has its own copy then."""
_PEEKED_FILES = 16  # `check_source` reads the footers of at most this many files
_NUMBERS, _TABLE = "numbers.arrow", "table.arrow"


class ParquetDataset(ColumnDataset):
    """Rows of Parquet files, in the order of the files' sorted paths.

    These columns become tensors `[rows, ...]`: numbers, booleans, fixed-size lists and binaries of them (`[k]`, nested
    `[j, k]`, `arrow.fixed_shape_tensor`), and lists that `reshape` names. Unsigned 16 and 32 bit integers become the
    next larger signed type, and fixed-size binaries become uint8. Other columns (strings, binaries, lists of any
    length) stay Arrow columns. If one of them is selected, samples are read one by one and passed through
    `data.collate_fn`.

    Args:
        path: A file, a directory (all Parquet files below it, except names that begin with `.` or `_`), a glob (`*`,
            `?`, `[…]`, `**`), or a URI of one of them that pyarrow supports (`s3://`, `gs://`, `abfs://`, `file://`). A
            relative path is relative to the current directory.
        columns: The names of the columns to read; None for all.
        reshape: By column, the shape of one row's value, `{"image": [1, 8, 8]}`.
        transform: See `raytrainer.data.ColumnDataset`.
        cache: A directory for the data as Arrow files, which are made once and mapped into memory. None keeps the data
            in memory. "auto" keeps up to 1 GiB in memory, and larger data in `$XDG_CACHE_HOME/raytrainer`
            (~/.cache/raytrainer).

    Raises:
        ConfigError: The files do not have a column or a shape, or the cache cannot be used.
        DataError: There are no files or no rows, a file cannot be read or has other types, a column has nulls, or there
            is no space for the cache.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str] | None = None,
        transform: Transform | None = None,
        reshape: Mapping[str, Sequence[int]] | None = None,
        cache: str | Path | None = "auto",
    ) -> None:
        super().__init__(transform)
        source = _Source(str(path), columns, reshape or {})
        kept = None if cache is None else Cache(cache_folder(cache), source.fingerprint())
        content = kept.find() if kept else None
        if content is None:
            source.open()
            if kept and (cache != "auto" or source.bytes > IN_MEMORY_BYTES):
                content = kept.make(source.convert, source.bytes)
        counts = content["counts"] if content else source.counts
        self.path, self.files, self._ends = source.shown, source.files, list(accumulate(map(int, counts)))
        self.tensors: dict[str, Any] = {}
        self._table: pa.Table | MappedTable | None = None
        if content is None or kept is None:
            self.tensors, self._table = source.read()
        else:
            if content["numbers"]:
                self.tensors = map_numbers(kept.path / _NUMBERS, content["numbers"], len(self))
            if content["table"]:
                self._table = MappedTable(kept.path / _TABLE)
        self.columnar = self._table is None

    @staticmethod
    def check_source(
        path: str, columns: Sequence[str] | None = None, reshape: Mapping[str, Sequence[int]] | None = None
    ) -> int | None:
        """Return the number of rows, from the footers of a few files; see docs/data.md."""
        check_local(path)
        return None if "://" in path else _Source(path, columns, reshape or {}).peek()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = {name: column[index] for name, column in self.tensors.items()}
        if self._table is not None:
            values = self._table.take(pa.array([index % len(self)])).to_pydict()
            row.update({name: value for name, (value,) in values.items()})
        return row

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Any:
        if self._table is None:
            return super().__getitems__(indices)
        picked = pa.array(np.asarray(indices, dtype=np.int64))
        values = {**self._table.take(picked).to_pydict(), **super().__getitems__(indices)}
        return [{name: column[i] for name, column in values.items()} for i in range(len(picked))]

    def where(self, index: int) -> str:
        """Return the file of a sample and its row there, for messages."""
        file = bisect_right(self._ends, index)
        return f"{self.files[file]}, row {index - (self._ends[file - 1] if file else 0)}"


class _Source:
    """The files of a path. `open` reads their footers and decides how each column is converted.

    Attributes:
        shown: The path, for messages.
        files: The paths of the files.
        counts: Rows of each file (after `open`).
        bytes: The size of the decoded rows; for columns that stay Arrow columns, the size that their pages declare.
    """

    def __init__(self, path: str, columns: Sequence[str] | None, reshape: Mapping[str, Sequence[int]]) -> None:
        self.shown = redacted(path)
        self._filesystem, self._entries = find_files(path)
        self.files = [entry.path for entry in self._entries]
        self._columns = columns
        self._shapes = {name: tuple(int(n) for n in shape) for name, shape in reshape.items()}
        self.counts: list[int] = []
        self.bytes = 0

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides which data is read, without reading it."""
        return {
            "path": self.shown if "://" in self.shown else "",  # two servers may have buckets with the same name
            "files": [(entry.path, entry.size, entry.mtime_ns) for entry in self._entries],
            "columns": None if self._columns is None else list(self._columns),
            "reshape": self._shapes,
        }

    def peek(self) -> int | None:
        """Check the first files as `open` checks all. Return the number of rows; None if there are more files.

        Raises:
            ConfigError, DataError: As in `open`.
        """
        some = self.files[:_PEEKED_FILES]
        self._read_footers(some)
        return sum(self.counts) if len(some) == len(self.files) else None

    def open(self) -> None:
        self._read_footers(self.files)

    def _read_footers(self, files: Sequence[str]) -> None:
        def footer(file: str) -> tuple[pa.Schema, pq.FileMetaData]:
            with self._opened(file) as opened:
                return opened.schema_arrow, opened.metadata

        with ThreadPoolExecutor(min(16, len(files))) as pool:  # remote files need one round trip each
            schemas, footers = zip(*pool.map(footer, files), strict=True)
        names = self._selected(files, schemas)
        self.counts = [footer.num_rows for footer in footers]
        if sum(self.counts) == 0 and len(files) == len(self.files):
            raise DataError(f"{self.shown}: {len(self.files)} Parquet file(s), and no row in them")
        types = {name: schemas[0].field(name).type for name in names}
        layouts = {name: layout_of(kind, self._shapes.get(name), name) for name, kind in types.items()}
        self._layouts = {name: layout for name, layout in layouts.items() if layout is not None}
        self._others = [name for name, layout in layouts.items() if layout is None]
        self._other_bytes = sum(_bytes_of(footer, self._others) for footer in footers) if self._others else 0
        self.bytes = sum(self.counts) * sum(x.row_bytes for x in self._layouts.values()) + self._other_bytes

    def _selected(self, files: Sequence[str], schemas: Sequence[pa.Schema]) -> list[str]:
        """Return the names of the selected columns, which all files must have with the same types."""
        first = schemas[0]
        names = list(first.names if self._columns is None else self._columns)
        for name in [*names, *self._shapes]:
            _must_have(name, first.names if name not in self._shapes else names, self.shown)
        if not names:
            raise ConfigError(f"{self.shown}: columns names none", key="columns", value=self._columns)
        for file, schema in zip(files, schemas, strict=True):
            self._same_types(file, schema, first, names)
        return names

    def read(self) -> tuple[dict[str, Tensor], pa.Table | None]:
        """Read the numeric columns and the other columns into memory."""
        arrays = {name: np.empty((sum(self.counts), *x.shape), x.dtype) for name, x in self._layouts.items()}
        others, row = [], 0
        for table, where in self._tables(None):
            end = row + table.num_rows
            for name, array in arrays.items():
                self._layouts[name].fill(array[row:end], table.column(name), f"{where}, column {name!r}")
            if self._others:
                others.append(table.select(self._others))
            row = end
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors, pa.concat_tables(others) if others else None

    def convert(self, folder: Path) -> dict[str, Any]:
        """Convert the columns to Arrow files, using memory for a few record batches. Return what opening them needs."""
        numbers = NumbersWriter(folder / _NUMBERS, self._layouts) if self._layouts else None
        row_bytes = self._other_bytes / sum(self.counts)
        others = TableWriter(folder / _TABLE, row_bytes) if self._others else None
        writers = [writer for writer in (numbers, others) if writer]
        for table, where in self._tables(min(writer.per_batch for writer in writers)):
            if numbers:
                numbers.write(table, where)
            if others:
                others.write(table.select(self._others), where)
        for writer in writers:
            writer.close()
        columns = {name: (str(layout.dtype), layout.shape) for name, layout in self._layouts.items()}
        return {"counts": self.counts, "numbers": columns, "table": bool(self._others)}

    def _tables(self, rows: int | None) -> Iterator[tuple[pa.Table, str]]:
        """Yield all rows, at most `rows` at a time (None: one row group), and their location, for messages."""
        names = [*self._layouts, *self._others]
        for file in self.files:
            with self._opened(file) as opened:
                for group in range(opened.num_row_groups):
                    where = f"{file}, row group {group}"
                    try:
                        if rows is None:
                            yield opened.read_row_group(group, columns=names), where
                            continue
                        for batch in opened.iter_batches(rows, row_groups=[group], columns=names):
                            yield pa.Table.from_batches([batch]), where
                    except (pa.ArrowException, OSError) as error:
                        raise DataError(f"{where}: {error}") from error

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


def local_columns(path: str, columns: Sequence[str] | None) -> list[str]:
    """Return the column names of a `ParquetDataset` with these arguments; empty if they cannot be read now."""
    if columns is not None:
        return list(columns)
    if "://" in path:
        return []
    try:
        return list(pq.read_schema(_Source(path, None, {}).files[0]).names)
    except (DataError, OSError, pa.ArrowException):  # the dataset's own check reports the error
        return []


def _bytes_of(footer: pq.FileMetaData, names: Sequence[str]) -> int:
    """Return the decompressed size of the pages of columns in a file."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)


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
