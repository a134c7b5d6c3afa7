"""Text for people: durations, ages, and aligned tables."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence


def duration(seconds: float) -> str:
    """Return a duration as text: `0:21`, `12:05`, `3:04:59`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def ago(when: float | None, now: float) -> str:
    """Return a time as text: `3:04:59 ago`, or the date if it is more than two days ago; empty for None."""
    if when is None:
        return ""
    if 0 <= now - when < 2 * 86400:
        return f"{duration(now - when)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(when))


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), width: int | None = None) -> str:
    """Return rows as lines with aligned columns. The last column is not padded.

    Args:
        rows: The rows, with the column names as the first one. All have the same number of cells.
        right: The columns that are aligned to the right.
        width: The width to which each line is cut; None for no limit.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if len(widths) - 1 not in right:
        widths[-1] = 0
    lines = []
    for row in rows:
        cells = [f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip()[:width])
    return "\n".join(lines)
