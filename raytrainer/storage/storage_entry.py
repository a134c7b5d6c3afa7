"""One name in the listing of a storage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """One name in a listing. `size` in bytes (0 for a directory), `mtime` in seconds since 1970 (0.0 if unknown)."""

    name: str
    is_dir: bool
    size: int
    mtime: float
