"""Streams of tokens as datasets of windows, and their files: a page of JSON, then the ids, read through a memory map.

Opening a file costs the same whatever its length, because the operating system reads only the pages that batches use.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from raytrainer.data.cache import Cache, cache_folder
from raytrainer.data.source_files import find_files
from raytrainer.errors import ConfigError, DataError
from raytrainer.storage import redacted

IGNORED_LABEL = -100
"""The label of a position that does not count, as `torch.nn.functional.cross_entropy` and `TokenCrossEntropy` have it."""

_PAGE = 4096
_FORMAT = "raytrainer tokens 1"
_COPY = "copy.tokens"
_BLOCK = 16 << 20  # bytes per read from a server
_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Ids = npt.NDArray[np.unsignedinteger[Any]]


class TokenWindows:
    """A stream of token ids cut into windows. Samples: `{"input_ids": [seq_len], "labels": [seq_len]}`, int64.

    The labels are the ids that follow, so over all samples every token but the first is predicted once. The last window
    is padded with inputs of 0 and labels of -100, which do not count. Documents are not separated: a window may hold
    the end of one and the beginning of the next.

    Args:
        tokens: All ids, 1-d, of an unsigned type. A memory map is read only where a batch needs it.
        seq_len: Tokens in a window.

    Raises:
        ConfigError: `seq_len` is below 1.
        DataError: There are fewer than two tokens.
    """

    def __init__(self, tokens: Ids, seq_len: int) -> None:
        if seq_len < 1:
            raise ConfigError("must be at least 1", key="seq_len", value=seq_len)
        if len(tokens) < 2:
            raise DataError(f"at least two tokens are needed, and there are {len(tokens)}")
        self.tokens, self.seq_len = tokens, seq_len
        whole = (len(tokens) - 1) // seq_len
        step = tokens.itemsize
        self._whole: Ids = np.lib.stride_tricks.as_strided(
            tokens, (whole, seq_len + 1), (seq_len * step, step), writeable=False
        )
        # It includes the last token of the previous window, so a length of 1 means that nothing is left.
        self._rest: Ids = tokens[whole * seq_len :]

    def __len__(self) -> int:
        return len(self._whole) + (len(self._rest) > 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return {name: values[0] for name, values in self.__getitems__([index % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, Tensor]:
        rows = np.asarray(indices, dtype=np.int64)
        windows = np.empty((len(rows), self.seq_len + 1), np.int64)
        whole = rows < len(self._whole)
        windows[whole] = self._whole[rows[whole]]
        ids = torch.from_numpy(windows)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        if not whole.all():
            # Copy both, because they overlap in `ids`.
            last, rest = torch.from_numpy(~whole), torch.from_numpy(self._rest.astype(np.int64))
            batch = {name: values.clone() for name, values in batch.items()}
            batch["input_ids"][last] = torch.nn.functional.pad(rest[:-1], (0, self.seq_len - len(rest) + 1))
            batch["labels"][last] = torch.nn.functional.pad(
                rest[1:], (0, self.seq_len - len(rest) + 1), value=IGNORED_LABEL
            )
        return batch


@dataclass(frozen=True)
class TokenFile:
    """The header of a file of tokens.

    Attributes:
        dtype: The type of an id: `uint16` or `uint32`, little-endian.
        vocab_size: All ids are below it.
        separator: The id after each document; None if there is none.
        tokenizer: SHA-256 of the tokenizer's file.
        tokens, documents: The number of each.
        bytes: The size of the texts in UTF-8.
    """

    dtype: str
    vocab_size: int
    separator: int | None
    tokenizer: str
    tokens: int = 0
    documents: int = 0
    bytes: int = 0

    @property
    def bytes_per_token(self) -> float:
        """The mean, with separators counted as tokens. `TokenCrossEntropy` needs it for bits per byte."""
        return self.bytes / self.tokens


class TokenDataset(TokenWindows):
    """The windows of a file that `python -m raytrainer.data.tokenize` made, or of a part of it.

    Args:
        path: The file, on this machine or on a file system that all workers share; or its URI that pyarrow supports
            (`s3://`, `gs://`, `abfs://`), which each machine copies once.
        seq_len: Tokens in a window; for the samples, see `TokenWindows`.
        begin, end: The part of the stream, as fractions of its tokens. Training with `end: 0.99` and validation with
            `begin: 0.99` share no token.
        vocab_size: The model's vocabulary size. A file with larger ids is refused.
        cache: The directory for the copy of a URI; "auto" is `$XDG_CACHE_HOME/raytrainer` (~/.cache/raytrainer).

    Raises:
        ConfigError: The part is invalid, or the file's vocabulary is larger than the model's.
        DataError: The file does not exist, is not a file of tokens, or is incomplete.
    """

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        *,
        begin: float = 0.0,
        end: float = 1.0,
        vocab_size: int | None = None,
        cache: str | Path = "auto",
    ) -> None:
        _check_part(begin, end)
        self.path = _copied(str(path), cache) if "://" in str(path) else Path(path).expanduser().absolute()
        self.head, tokens = _mapped(self.path)
        _check_vocabulary(self.head, vocab_size, redacted(str(path)))
        super().__init__(tokens[round(begin * len(tokens)) : round(end * len(tokens))], seq_len)

    @staticmethod
    def check_source(
        path: str, seq_len: int, begin: float = 0.0, end: float = 1.0, vocab_size: int | None = None
    ) -> int | None:
        """Return the number of windows; see docs/data.md."""
        _check_part(begin, end)
        if "://" in path:
            return None
        head, tokens = _mapped(Path(path).expanduser().absolute())
        _check_vocabulary(head, vocab_size, path)
        return len(TokenWindows(tokens[round(begin * len(tokens)) : round(end * len(tokens))], seq_len))


def _check_part(begin: float, end: float) -> None:
    if not 0 <= begin < end <= 1:
        raise ConfigError("must be fractions, 0 <= begin < end <= 1", key="begin, end", value=f"{begin}, {end}")


def _check_vocabulary(head: TokenFile, vocab_size: int | None, path: str) -> None:
    if vocab_size is not None and head.vocab_size > vocab_size:
        raise ConfigError(f"is less than the {head.vocab_size} tokens of {path}", key="vocab_size", value=vocab_size)


def _copied(uri: str, cache: str | Path) -> Path:
    """Copy the file of a URI to this machine's disk, where it can be memory-mapped. Return the path."""
    filesystem, entries = find_files(uri, (), "token file")
    if len(entries) != 1:
        raise DataError(f"{redacted(uri)}: matches {len(entries)} files; expected one")
    (entry,) = entries
    kept = Cache(cache_folder(cache), {"tokens": redacted(uri), "size": entry.size, "mtime": entry.mtime_ns})

    def blocks() -> Iterator[bytes]:
        try:
            with filesystem.open_input_stream(entry.path) as source:
                while block := source.read(_BLOCK):
                    yield block
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{redacted(uri)}: {error}") from error

    def copy(folder: Path) -> dict[str, Any]:
        with (folder / _COPY).open("wb") as file:
            file.writelines(blocks())
        return {"file": _COPY}

    if kept.find() is None:
        kept.make(copy, entry.size)
    return kept.path / _COPY


def _mapped(path: Path) -> tuple[TokenFile, Ids]:
    try:
        # Read both from one open file, because a new file may be moved to the path in between.
        with path.open("rb") as file:
            page, size = file.read(_PAGE), file.seek(0, os.SEEK_END)
            head = _parsed(page, size, path)
            return head, np.memmap(file, _TYPES[head.dtype], "r", _PAGE, (head.tokens,))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _parsed(page: bytes, size: int, path: Path) -> TokenFile:
    try:
        values = json.loads(page)
        if values.pop("format") != _FORMAT:
            raise ValueError
        head = TokenFile(**values)
        wanted = _PAGE + head.tokens * _TYPES[head.dtype].itemsize
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: is not a token file: make one with python -m raytrainer.data.tokenize") from error
    if size != wanted:
        raise DataError(f"{path}: has {size:,} bytes, and {head.tokens:,} tokens take {wanted:,}")
    return head


class TokenWriter:
    """Writes a file of tokens under a temporary name, and renames it when it is complete.

    Use it as a context manager. After an exception it leaves no file. Two writers of the same file do not conflict; the
    last to finish replaces the other's file.

    Args:
        path: The path of the file.
        vocab_size, separator, tokenizer: See `TokenFile`. Ids are uint16 if they fit, else uint32.
    """

    def __init__(self, path: Path, *, vocab_size: int, separator: int | None, tokenizer: str) -> None:
        dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        self.path, self.head = path, TokenFile(dtype, vocab_size, separator, tokenizer)
        self._dtype = _TYPES[dtype]
        self._beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._file = self._beside.open("xb")
        self._file.write(b" " * _PAGE)

    def add(self, documents: Sequence[Sequence[int]], size: int) -> None:
        """Add documents of token ids. `size` is the total size of their texts in bytes."""
        end = [] if self.head.separator is None else [self.head.separator]
        ids = np.concatenate([np.array([*document, *end], self._dtype) for document in documents])
        self._file.write(ids.tobytes())
        head = self.head
        self.head = replace(
            head, tokens=head.tokens + len(ids), documents=head.documents + len(documents), bytes=head.bytes + size
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._file.write(json.dumps({"format": _FORMAT, **asdict(self.head)}).encode().ljust(_PAGE - 1) + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._beside.replace(self.path)
        finally:
            self._file.close()
            self._beside.unlink(missing_ok=True)
