"""Errors of the operating system as StorageError or StorageFull, with the place in the message."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raytrainer.errors import StorageError, StorageFull


@contextmanager
def storage_errors(place: Path | Callable[[], str]) -> Iterator[None]:
    """Convert an OSError within the context.

    Args:
        place: A path, for an error that names none itself; or a function that returns the place for the message.
    """
    try:
        yield
    except OSError as error:
        where = place() if callable(place) else error.filename or place
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no space at {where}") from error
        raise StorageError(f"{where}: {error.strerror or first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
