"""The storage of runs: a local directory or a URI with the same interface, and a lock for the run that owns it.
Errors are StorageError with the location in the message, or StorageFull if there is no space left."""

from __future__ import annotations

from raytrainer.storage.files import Storage
from raytrainer.storage.lock import Lock
from raytrainer.storage.storage_entry import StorageEntry
from raytrainer.storage.uris import redacted

__all__ = ["Lock", "Storage", "StorageEntry", "redacted"]
