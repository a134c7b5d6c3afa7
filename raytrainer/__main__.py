"""The program: `python -m raytrainer`, and the console script. Answers signals before anything is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing is started yet: no exception, which an import in progress would swallow or turn into another.
    os.write(2, b"raytrainer: stopped\n")
    os._exit(128 + number)


def entry() -> None:
    """Runs the command line and ends the process with its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from raytrainer.cli import main

    sys.exit(main())


if __name__ == "__main__":
    entry()
