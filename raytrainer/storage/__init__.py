"""Where runs keep their files: a local directory or a URI, read and written alike, and locked by the run that owns it.
Errors are StorageError with the place in them, StorageFull where there is no space left."""

from __future__ import annotations

from raytrainer.storage.files import Entry, Storage, redacted
from raytrainer.storage.lock import Lock

__all__ = ["Entry", "Lock", "Storage", "redacted"]
