"""Kill processes when this process ends, even by SIGKILL: for processes that would otherwise stay."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

# `read` returns when every writer of the pipe has ended, even by SIGKILL. A line before that cancels the kill.
_SCRIPT = 'trap "" INT TERM HUP; read -r farewell || kill -KILL "$@"'


class Reaper:
    """A shell that waits until this process ends or calls `dismiss`. It needs 1 MB of memory and no CPU.

    Args:
        pids: The processes to kill. They must live as long as this process does, because an id that another process
            reuses would be killed too.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "raytrainer-reaper", *map(str, pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def dismiss(self) -> None:
        """End the shell without killing anything."""
        self._shell.communicate(b"farewell\n")
