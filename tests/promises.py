"""Promises in seconds, on a machine of any speed."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

# What the machine takes to which the promises were made, and its peer: a bare Python with the three imports that are
# most of what a launch does before it can say anything (2.5-3.1 s on 2 cores, quiet).
PEER_S = 3.0
PEER = "import ray, torch, mlflow"


def slowness() -> float:
    """How many times longer than there the peer takes here and now; 1 where it does not."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PEER], check=True)
    return max(1.0, (time.monotonic() - began) / PEER_S)


class Within:
    """A limit of time that begins with it. Who is over it on a slow machine has as much more as the peer takes longer
    there; that is measured when the limit is passed, once, and costs nothing where it is not."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.began = limit_s, time.monotonic()

    def took(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @functools.cached_property
    def _extended_s(self) -> float:
        return self.limit_s * slowness()

    def check(self, what: object = "") -> None:
        """Asserts that it has not passed; `what` is shown where it has."""
        took = self.took()
        assert took < self.limit_s or took < self._extended_s, (
            f"{took:.1f} s, where {self.limit_s:g} are promised, and here {self._extended_s:.1f}\n{what}"
        )
