"""Kills processes when this one is gone, however it ended: for those that would stay, or stay too long."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

# Reading ends when every writer of the pipe is gone, SIGKILL included; a line before that is a farewell.
_SCRIPT = 'trap "" INT TERM HUP; read -r farewell || kill -KILL "$@"'


class Reaper:
    """A shell that waits, from now on until `dismiss`, with 1 MB of memory and no CPU.

    Args:
        pids: Processes that live as long as this one does: a number that was free for another would be killed.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "raytrainer-reaper", *map(str, pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def dismiss(self) -> None:
        """It goes, and kills nobody."""
        self._shell.communicate(b"farewell\n")
