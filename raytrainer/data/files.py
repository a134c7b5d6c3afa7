"""The files that a path, a directory, a glob or a URI of pyarrow's names, in the order of their paths."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from raytrainer.errors import DataError
from raytrainer.storage.files import redacted

_MOST_FOLDERS = 10_000
PARQUET = (".parquet", ".parq", ".pq")


def find_files(
    path: str, suffixes: tuple[str, ...] = PARQUET, kind: str = "Parquet file"
) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    """The file system of `path` and its files, sorted by their paths: of a directory those with one of `suffixes`.

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
            return filesystem, [info]
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
            wanted = entry.path.lower().endswith(suffixes) and not any(part.startswith((".", "_")) for part in parts)
        if wanted:
            files.append(entry)
    if not files:
        raise DataError(f"{shown}: no {kind} {'matches' if wildcard else 'is in it'}")
    return filesystem, sorted(files, key=lambda entry: entry.path)


def check_local(path: str, suffixes: tuple[str, ...] = (), kind: str = "") -> None:
    """Whether a path of this machine is there, up to its first wildcard; of a URI nothing is asked.

    With `suffixes`, whether it has a file at all: the first one that is found is enough, in a folder of millions too.

    Raises:
        DataError: It is not there, or there is no such file.
    """
    head, wildcard = _split_glob(path)
    if "://" in head:
        return
    base = Path(head).expanduser()
    if not base.exists():
        raise DataError(f"{head}: no such file or directory")
    if suffixes and not base.is_file() and not _has_file(base, wildcard, suffixes):
        raise DataError(f"{redacted(path)}: no {kind} {'matches' if wildcard else 'is in it'}")


def _has_file(base: Path, wildcard: list[str], suffixes: tuple[str, ...]) -> bool:
    for visited, (folder, below, files) in enumerate(os.walk(base, followlinks=True)):
        inside = Path(folder).relative_to(base).parts
        if wildcard:
            if any(_matches([*inside, name], wildcard) for name in files):
                return True
        else:
            below[:] = [name for name in below if not name.startswith((".", "_"))]
            if any(name.lower().endswith(suffixes) and not name.startswith((".", "_")) for name in files):
                return True
        if visited == _MOST_FOLDERS:  # links in a circle, or a place too large to be looked through before a start
            return True
    return False


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
