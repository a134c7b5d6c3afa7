"""The delay between two attempts at the same thing, which doubles with each failure in a row."""

from __future__ import annotations

LIMITS_S = (1.0, 60.0)  # the delay after the first failure, and the longest


class Backoff:
    """A growing delay.

    Attributes:
        delay_s: The seconds to wait before the next attempt; 0 after a success.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0

    def failed(self) -> None:
        first_s, last_s = LIMITS_S
        self.delay_s = min(max(2 * self.delay_s, first_s), last_s)

    def succeeded(self) -> None:
        self.delay_s = 0.0
