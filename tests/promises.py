"""Time limits of tests, which a slow machine extends."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

# The time that `PEER` takes on the machine for which the limits were set (2.5-3.1 s on 2 quiet cores). `PEER` is a bare
# Python with the three imports that take most of a launch's time before its first message.
PEER_S = 3.0
PEER = "import ray, torch, mlflow"


def slowness() -> float:
    """Return how many times longer `PEER` takes on this machine now; at least 1."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PEER], check=True)
    return max(1.0, (time.monotonic() - began) / PEER_S)


class Within:
    """A time limit that starts when it is created. A slow machine extends it by the factor by which `PEER` takes longer
    there. The factor is measured once, and only if the limit has passed."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.began = limit_s, time.monotonic()

    def took(self) -> float:
        """Return the seconds since it started."""
        return time.monotonic() - self.began

    @functools.cached_property
    def _extended_s(self) -> float:
        return self.limit_s * slowness()

    def check(self, what: object = "") -> None:
        """Assert that the limit has not passed. Otherwise show `what`."""
        took = self.took()
        assert took < self.limit_s or took < self._extended_s, (
            f"{took:.1f} s, where {self.limit_s:g} are promised, and here {self._extended_s:.1f}\n{what}"
        )
