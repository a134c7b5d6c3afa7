"""The program: `python -m raytrainer`, and the console script. Answers signals before anything is imported."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from types import FrameType

from raytrainer import garbage, proxies, streams


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing is started yet: no exception, which an import in progress would swallow or turn into another.
    with contextlib.suppress(OSError):  # nobody reads any more
        os.write(2, b"raytrainer: stopped\n")
    os._exit(128 + number)


def entry() -> None:
    """Runs the command line and ends the process with its exit code."""
    streams.protect()
    proxies.exempt_loopback()
    with contextlib.suppress(RuntimeError, ValueError):
        faulthandler.enable()  # a crash of native code says where it was
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _leave)
    garbage.collect_less()
    from raytrainer.cli import main

    code = main()
    # A question to Ray that nobody answered is still in its native code, which the end of the interpreter would crash.
    if any(thread.name == "ray-probe" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
