"""Find the files that a path, a directory, a glob or a pyarrow URI names, sorted by path."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from raytrainer.errors import DataError
from raytrainer.storage import redacted

_MOST_FOLDERS = 10_000
PARQUET = (".parquet", ".parq", ".pq")


def find_files(
    path: str, suffixes: tuple[str, ...] = PARQUET, kind: str = "Parquet file"
) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    """Return the file system of `path` and its files, sorted by path.

    In a directory, only files with one of `suffixes` count.

    Raises:
        DataError: There are no files, or the location cannot be read.
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
        entries = (
            filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
            if info.type == pafs.FileType.Directory
            else []
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shown}: {error}") from error
    if info.type == pafs.FileType.NotFound and not wildcard:
        raise DataError(f"{shown}: no such file or directory")
    files = []
    for entry in entries:
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
    """Check that a local path exists, up to its first wildcard. URIs are not checked.

    With `suffixes`, also check that it contains a file. The search stops at the first one, so it is fast even with
    millions of files.

    Raises:
        DataError: The path or a matching file does not exist.
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
        # Links may form a cycle, or the directory is too large to search before the run starts.
        if visited == _MOST_FOLDERS:
            return True
    return False


def _split_glob(path: str) -> tuple[str, list[str]]:
    """Split a path into the part before its first wildcard, and the remaining parts."""
    options = ""
    if "://" in path:  # in a URI, a question mark begins the options: `s3://bucket/*.parquet?region=…`
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
