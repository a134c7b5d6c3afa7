"""Ports for servers of tests. The system gives none of them to another process between the choice and the server's
start."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux uses for outgoing connections (from 32768), and above Ray's for its workers (10002-19999).
_RANGE = (20000, 32767)
_draw = random.SystemRandom()  # tests run in several processes, which must not draw the same numbers


def free_port() -> int:
    """Return a port on which nothing listens."""
    while True:
        port = _draw.randint(*_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
