"""Ports for servers of tests. The system gives none of them to anybody else between the choice and the server's start."""

from __future__ import annotations

import random
import socket

# Below what Linux takes ports for connections from (32768), and above what Ray takes for its workers (10002-19999).
_RANGE = (20000, 32767)
_draw = random.SystemRandom()  # tests run in several processes, which must not draw the same


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = _draw.randint(*_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
