"""Convert text, JSON lines or Parquet to a file of tokens: `python -m raytrainer.data.tokenize --help`.

Any tokenizer.json works. `raytrainer.data.TokenDataset` reads the file, which appears only when it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raytrainer.data.tokens import TokenFile, TokenWriter
from raytrainer.errors import ConfigError, DataError, RaytrainerError
from raytrainer.storage import redacted

FORMATS = ("text", "jsonl", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".parq": "parquet", ".pq": "parquet"}
_COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}
# The end-of-document tokens of common tokenizers.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 2_000_000, 10_000


def tokenize(
    sources: Sequence[str],
    output: str | Path,
    tokenizer: str | Path,
    *,
    column: str = "text",
    kind: str | None = None,
    separator: str | None = None,
    progress: bool = False,
) -> TokenFile:
    """Write the tokens of all documents to one file, in the order of the sources. Return the header of the file.

    Args:
        sources: Files, directories (all files below them, sorted, except hidden ones) and URIs of both that pyarrow
            supports (`s3://`, `gs://`, `abfs://`). `.gz`, `.bz2`, `.zst` and `.lz4` files are decompressed.
        output: The file to write. An existing file is replaced when the new one is complete.
        tokenizer: A `tokenizer.json` of Hugging Face's tokenizers.
        column: The field of a JSON line, or the column of a Parquet file, that holds the text.
        kind: `text` (a file is a document), `jsonl` or `parquet`. None decides by each file's suffix, `text` for
            unknown ones.
        separator: The token after each document; `none` for no token. None uses the first usual one that the tokenizer
            has.
        progress: Whether to print progress to standard error every two seconds.

    Raises:
        ConfigError: tokenizers is not installed, or the tokenizer, separator or output cannot be used.
        DataError: A source does not exist or cannot be read, a document has no text, or there are no documents.
    """
    if kind is not None and kind not in FORMATS:
        raise ConfigError("is unknown", key="--format", value=kind, choices=FORMATS)
    encoder, fingerprint = _load(Path(tokenizer))
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    end = _separator(separator, vocabulary)
    place = Path(output).expanduser().absolute()
    files = [file for source in sources for file in _files(source)]
    try:
        writer = TokenWriter(
            place, vocab_size=max(vocabulary.values()) + 1, separator=end, tokenizer=f"sha256:{fingerprint}"
        )
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", key="--output", value=str(output)) from error
    began = reported_at = time.monotonic()
    with writer:
        for number, (filesystem, path) in enumerate(files, 1):
            for texts in _batches(_documents(filesystem, path, kind or _kind(path), column)):
                encoded = encoder.encode_batch_fast(texts, add_special_tokens=False)
                writer.add([e.ids for e in encoded], sum(len(text.encode()) for text in texts))
                if progress and time.monotonic() - reported_at >= 2:
                    reported_at = time.monotonic()
                    rate = writer.head.tokens / (reported_at - began)
                    print(
                        f"file {number}/{len(files)}  {_described(writer.head)}  {rate:,.0f} tokens/s", file=sys.stderr
                    )
        if not writer.head.tokens:
            raise DataError(f"{', '.join(redacted(s) for s in sources)}: there is no text in it")
    return writer.head


def _described(head: TokenFile) -> str:
    return f"{head.tokens:,} tokens  {head.documents:,} documents"


def _load(path: Path) -> tuple[Any, str]:
    """Return the tokenizer, and the SHA-256 of its file."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "reads a tokenizer.json, and tokenizers is not installed: pip install 'raytrainer[huggingface]'",
            key="--tokenizer",
            value=str(path),
        ) from error
    try:
        data = path.expanduser().read_bytes()
        return tokenizers.Tokenizer.from_buffer(data), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", key="--tokenizer", value=str(path)) from error
    except Exception as error:  # tokenizers raises a plain Exception
        raise ConfigError(f"is not a tokenizer.json: {error}", key="--tokenizer", value=str(path)) from error


def _separator(wanted: str | None, vocabulary: dict[str, int]) -> int | None:
    if wanted is None:
        return next((vocabulary[token] for token in _SEPARATORS if token in vocabulary), None)
    if wanted == "none":
        return None
    if wanted not in vocabulary:
        known = [token for token in vocabulary if token.startswith("<") and token.endswith(">")]
        raise ConfigError(
            "is not in the vocabulary", key="--separator", value=wanted, choices=(*sorted(known)[:20], "none")
        )
    return vocabulary[wanted]


def _files(source: str) -> Iterator[tuple[pafs.FileSystem, str]]:
    """Yield the files of a source with their file system, sorted by path."""
    shown = redacted(source)
    try:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
            filesystem, base = pafs.FileSystem.from_uri(source)
        else:
            filesystem, base = pafs.LocalFileSystem(), str(Path(source).expanduser().absolute())
        info = filesystem.get_file_info(base)
        if info.type == pafs.FileType.File:
            yield filesystem, base
            return
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{shown}: no such file or directory")
        below = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shown}: {error}") from error
    paths = [entry.path for entry in below if entry.type == pafs.FileType.File]
    inside = len(base.rstrip("/")) + 1
    paths = [path for path in paths if not any(part.startswith(".") for part in path[inside:].split("/"))]
    if not paths:
        raise DataError(f"{shown}: there is no file in it")
    yield from ((filesystem, path) for path in sorted(paths))


def _kind(path: str) -> str:
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in _COMPRESSED]
    return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _documents(filesystem: pafs.FileSystem, path: str, kind: str, column: str) -> Iterator[str]:
    try:
        if kind == "parquet":
            yield from _of_parquet(pq.ParquetFile(filesystem.open_input_file(path)), path, column)
            return
        with io.TextIOWrapper(filesystem.open_input_stream(path), encoding="utf-8", newline="") as file:
            if kind == "text":
                yield file.read()
            else:
                yield from _of_lines(file, path, column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def _of_parquet(file: pq.ParquetFile, path: str, column: str) -> Iterator[str]:
    if column not in file.schema_arrow.names:
        raise DataError(f"{path}: has no column {column!r}; valid: {', '.join(file.schema_arrow.names)}")
    row = 0
    for batch in file.iter_batches(batch_size=1024, columns=[column]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield _text(text, f"{path}, row {row}, column {column!r}")


def _of_lines(file: io.TextIOWrapper, path: str, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not isinstance(entry, dict) or column not in entry:
            names = f"; valid: {', '.join(entry)}" if isinstance(entry, dict) else ""
            raise DataError(f"{path}, line {number}: has no field {column!r}{names}")
        yield _text(entry[column], f"{path}, line {number}, field {column!r}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: is {type(value).__name__}, not text")
    return value


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0 success, 1 failed, 2 refused before it started."""
    parser = argparse.ArgumentParser(
        prog="python -m raytrainer.data.tokenize",
        description="Tokenizes documents into one file for raytrainer.data.TokenDataset.",
    )
    parser.add_argument("source", nargs="+", help="files, directories, or URIs (s3://…) of them")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a Hugging Face tokenizer.json")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--column", default="text", help="the field or column that holds the text (text)")
    parser.add_argument("--format", choices=FORMATS, help="the format of all sources; by default each suffix decides")
    parser.add_argument(
        "--separator", metavar="TOKEN", help="after each document; none: no token; otherwise a usual one"
    )
    a = parser.parse_args(argv)
    try:
        head = tokenize(
            a.source,
            a.output,
            a.tokenizer,
            column=a.column,
            kind=a.format,
            separator=a.separator,
            progress=True,
        )
    except RaytrainerError as error:
        print(f"raytrainer.data.tokenize: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{a.output}: {_described(head)}  {head.dtype}")
    print(f"model.vocab_size={head.vocab_size} loss.bytes_per_token={head.bytes_per_token:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
