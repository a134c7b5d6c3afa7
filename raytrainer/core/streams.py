"""Standard output and error that never fail, whatever their encoding is and whether anything still reads them.

A closed terminal, a pipe without a reader, a full disk or an ASCII locale must not end a run or change its exit code.
This module imports nothing of raytrainer.
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

# Replacements for streams that cannot encode these characters. All others become escapes such as \xe9.
_LOOKALIKES = {"…": "...", "→": "->", "×": "x", "±": "+-", "─": "-", "│": "|", "├": "|", "└": "`"}
_ERRORS = "raytrainer"  # the name of the handler below, for `errors=`


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    shown = (_LOOKALIKES.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in characters)
    return "".join(shown), error.end


codecs.register_error(_ERRORS, _replaced)


class _Descriptor(io.RawIOBase):
    """A file descriptor to which every write succeeds. What cannot be written is dropped.

    Attributes:
        is_lost: Whether its reader is gone for good.
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
            except BlockingIOError:  # the pipe was made non-blocking
                select.select([], [self._descriptor], [], 1.0)
            except OSError as error:
                # A full disk may have space later; a closed pipe or terminal never gets a reader again.
                self.is_lost = error.errno not in (errno.ENOSPC, errno.EDQUOT)
                break
        return size


def protect() -> None:
    """Replace the standard streams by ones that never fail. A program that owns its process calls this first."""
    # Occupy the descriptors 0 to 2: a file that is opened later must not become standard output, here or in a child.
    with contextlib.suppress(OSError):
        while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(spare)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and not _is_own(stream, descriptor):
            continue  # other code has replaced the stream
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
    """Let a `print` of any text succeed, whatever the locale is. For processes such as Ray workers, whose output is a
    file that others read as UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def write(stream: TextIO | None, text: str) -> None:
    """Write to a stream of any kind without failing."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, _ERRORS).decode(encoding))
        stream.flush()


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; False if it was closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def is_lost(stream: object) -> bool:
    """Return whether a stream from `protect` has lost its reader. Only a failed write shows it."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return isinstance(raw, _Descriptor) and raw.is_lost


def _is_own(stream: object, descriptor: int) -> bool:
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False
