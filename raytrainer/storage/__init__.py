"""The storage of runs: a local directory or a URI with the same interface, and a lock for the run that owns it.
Errors are StorageError with the location in the message, or StorageFull if there is no space left."""

from __future__ import annotations

from raytrainer.storage.files import Entry, Storage, redacted
from raytrainer.storage.lock import Lock

__all__ = ["Entry", "Lock", "Storage", "redacted"]
