"""Standard output and error that never fail: whatever the encoding is, and whoever still reads.

A terminal that is closed, a pipe whose reader has gone, a full disk or an ASCII locale is no reason for a run to end, or to
end with another exit code. Imports nothing of raytrainer.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

# For a stream that cannot take them; anything else becomes an escape such as \xe9.
_LOOKALIKES = {"…": "...", "→": "->", "×": "x", "±": "+-", "─": "-", "│": "|", "├": "|", "└": "`"}
_ERRORS = "raytrainer"  # the name of the handler below, as `errors=` takes it


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    shown = (_LOOKALIKES.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in characters)
    return "".join(shown), error.end


codecs.register_error(_ERRORS, _replaced)


class _Descriptor(io.RawIOBase):
    """A file descriptor to which every write succeeds; what nobody takes is dropped.

    Attributes:
        is_lost: Whether whoever read it has gone for good.
    """

    mode = "wb"

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self.name = descriptor, name
        self.is_lost = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(left)
        while left and not self.is_lost:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # a pipe that somebody has made non-blocking
                select.select([], [self._descriptor], [], 1.0)
            except OSError as error:
                # A full disk may have room another time; a closed pipe or terminal has no reader again.
                self.is_lost = error.errno not in (errno.ENOSPC, errno.EDQUOT)
                break
        return size


def protect() -> None:
    """Makes this process's standard streams ones that never fail. To be called first, by a program that owns its process."""
    # A file that is opened later must not become standard output, nor a child's.
    with contextlib.suppress(OSError):
        while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(spare)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and not _is_own(stream, descriptor):
            continue  # somebody has put another in place
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        replaced = io.TextIOWrapper(
            io.BufferedWriter(_Descriptor(descriptor, f"<{name}>")),
            encoding="utf-8" if stream is None else stream.encoding,
            errors=_ERRORS,
            line_buffering=name == "stderr" or (stream is not None and stream.line_buffering),
            write_through=stream is not None and stream.write_through,
        )
        setattr(sys, name, replaced)
        setattr(sys, f"__{name}__", replaced)


def take_any_text() -> None:
    """For a process whose output is a file that others read as UTF-8, such as a worker of Ray: a user's `print` of any text
    succeeds, whatever the locale is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def write(stream: TextIO | None, text: str) -> None:
    """Writes to a stream that may be any program's, and never fails."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, _ERRORS).decode(encoding))
        stream.flush()


def is_terminal(stream: TextIO | None) -> bool:
    """As `isatty`, also of a stream that was closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def is_lost(stream: object) -> bool:
    """Whether nobody reads a stream any more: of one that `protect` has made, as far as writing has shown it."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return isinstance(raw, _Descriptor) and raw.is_lost


def _is_own(stream: object, descriptor: int) -> bool:
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False
