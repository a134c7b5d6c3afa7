"""The program: `python -m raytrainer`, and the console script. It handles signals before it imports anything else."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from types import FrameType

from raytrainer.core import garbage, proxies, streams


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing has started yet. Do not raise an exception, which an import in progress would swallow or replace.
    with contextlib.suppress(OSError):  # standard error has no reader
        os.write(2, b"raytrainer: stopped\n")
    os._exit(128 + number)


def entry() -> None:
    """Run the command line and end the process with its exit code."""
    streams.protect()
    proxies.exempt_loopback()
    with contextlib.suppress(RuntimeError, ValueError):
        faulthandler.enable()  # show where native code crashes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, _leave)
    garbage.collect_less()
    from raytrainer.cli import main

    code = main()
    # A probe that Ray has not answered is still in native code, which would crash at the end of the interpreter.
    if any(thread.name == "ray-probe" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
