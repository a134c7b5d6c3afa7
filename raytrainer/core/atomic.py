"""Write files that a reader sees whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file under a temporary name beside it and rename it. After an error, nothing is left.

    Args:
        path: The file, which may exist. Its folder must exist.
        data: The new content.
        durable: Whether to wait until file and name are on the disk. If not, a power cut may undo the write.

    Raises:
        OSError: The file cannot be written. The old content is unchanged.
    """
    # A short name, because the target's name may already have the longest length that the file system allows.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and user-space file systems cannot fsync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
