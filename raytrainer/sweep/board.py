"""The display of a running sweep: a live table of its trials on a terminal, or one line per trial elsewhere."""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from raytrainer.progress import Display, duration
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.table import Best, Row, aligned, best_of, row_of, settings_text, short_names, trial_line
from raytrainer.sweep.trial_state import Status

_DRAW_S = 0.25  # between two updates of the live table
_SUMMARY_S = 30.0  # without a terminal: between two lines about the whole sweep
_MOST_ROWS = 24  # rows of the live table, so that a tall window still shows earlier lines
_KNOWN_FROM = 3  # ended trials that are needed to estimate the duration of the others


class Board:
    """The display of a sweep's progress. It reads the trials in place, so it sees new reports by itself. The
    caller calls `start` and `end` for each trial, and `tick` often.

    Args:
        display: The display.
        name: The sweep's name, for the first line.
        metric: The metric of the trials' values.
        mode: Which direction of the metric is better.
        keys: The parameters, as in `Trial.parameters`.
        total: How many trials there will be; None if only the time budget ends the sweep.
        at_once: The maximum number of concurrent trials.
        trials: The trials of a resumed sweep, ended or not.
        time_budget_s: The time in seconds after which the sweep ends in any case.
        clock: Returns the time in seconds since the epoch.

    Attributes:
        total, at_once: As in the arguments. Both may be changed while the sweep runs.
    """

    def __init__(
        self,
        display: Display,
        name: str,
        *,
        metric: str,
        mode: Mode,
        keys: Sequence[str],
        total: int | None,
        at_once: int,
        trials: Iterable[Trial] = (),
        time_budget_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.total, self.at_once = total, at_once
        self._display, self._name, self._metric, self._mode = display, name, metric, mode
        self._names = short_names(keys)
        self._budget, self._clock = time_budget_s, clock
        now = clock()
        self._began = now
        self._drawn_at, self._summed_at = -math.inf, now
        self._running: dict[str, tuple[Trial, float]] = {}  # with the time of `start`
        # Each ended trial is formatted only once. Finished trials are sorted by value, the others by their ends.
        self._finished: list[tuple[float, str, Row]] = []
        self._pruned: list[Row] = []
        self._failed: list[Row] = []
        self._counts: Counter[str] = Counter()
        self._best: Best | None = None
        self._durations: list[float] = []
        self._widths: dict[str, int] = {}
        for trial in trials:
            if trial.status is Status.RUNNING:
                self._running[trial.id] = (trial, now)
            else:
                self._take(trial, trial.took() or 0.0)

    def start(self, trial: Trial) -> None:
        """Show that a trial starts or continues."""
        self._running[trial.id] = (trial, self._clock())
        last = f"continues after evaluation {trial.reports[-1].evaluation}" if trial.reports else "begins"
        self._display.note(f"trial {trial.id} {last}: {settings_text(trial.parameters, self._names)}")
        self.tick()

    def end(self, trial: Trial) -> None:
        """Show that a trial has ended. Its status, cause and end must be set."""
        _, began = self._running.pop(trial.id, (trial, trial.started))
        self._take(trial, self._clock() - began if trial.seconds is None else trial.seconds)
        line = trial_line(trial, self._metric, self._mode, self._names)
        if trial.status is Status.FAILED:
            self._display.say(line)  # stays visible, above the table
        else:
            self._display.note(line)
        self.tick()

    def tick(self) -> None:
        """Update the display if it is due. Otherwise the call costs almost nothing."""
        now = self._clock()
        # A negative difference, after the clock was set back, also counts as due.
        if self._display.live and not 0 <= now - self._drawn_at < _DRAW_S:
            self._drawn_at = now
            self._display.draw(self._lines(*self._display.size()))
        elif not self._display.live and not 0 <= now - self._summed_at < _SUMMARY_S:
            self._summed_at = now
            self._display.say("  ".join([", ".join(self._count_parts()), *self._fact_parts(), *self._running_part()]))

    def close(self) -> None:
        """Remove the live table."""
        self._display.close()

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the durations of ended trials; None if too few have ended."""
        if self.total is None or len(self._durations) < min(_KNOWN_FROM, self.total):
            return None
        mean, now = sum(self._durations) / len(self._durations), self._clock()
        rests = []
        for _, began in self._running.values():
            # Compare a running trial only with trials that took longer than it has run so far.
            longer = [d - (now - began) for d in self._durations if d > now - began]
            rests.append(sum(longer) / len(longer) if longer else 0.0)
        waiting = max(0, self.total - self._counts.total() - len(rests))
        work = sum(rests) + waiting * mean
        return max([work / max(1, min(self.at_once, waiting + len(rests))), *rests])

    def _take(self, trial: Trial, seconds: float) -> None:
        self._counts[trial.status] += 1
        if trial.status in (Status.FINISHED, Status.PRUNED):  # the duration of other trials is not typical
            self._durations.append(seconds)
        row, best = row_of(trial, self._mode, self._names, self._clock()), best_of(trial, self._mode)
        if trial.status is Status.FINISHED:
            bisect.insort(self._finished, (best.rank if best else math.inf, trial.id, row))
        else:
            (self._failed if trial.status is Status.FAILED else self._pruned).append(row)
        self._best = min(filter(None, (self._best, best)), default=None)

    def _count_parts(self) -> list[str]:
        of = f" of {self.total}" if self.total is not None else ""
        parts = [f"sweep {self._name}: {self._counts.total()}{of} done", f"{len(self._running)} running"]
        others = (Status.PRUNED, Status.FAILED, Status.STOPPED)
        return parts + [f"{self._counts[status]} {status}" for status in others if self._counts[status]]

    def _fact_parts(self) -> list[str]:
        running = [best_of(trial, self._mode) for trial, _ in self._running.values()]
        best = min(filter(None, (self._best, *running)), default=None)
        parts = [f"best {self._metric} {best.value:.4g} ({best.trial})"] if best else []
        elapsed = max(0.0, self._clock() - self._began)
        parts.append(f"{duration(elapsed)} elapsed")
        left = self.seconds_left()
        if self._budget is not None:
            most = max(0.0, self._budget - elapsed)
            parts.append(f"at most {duration(most)} left" if left is None else f"{duration(min(left, most))} left")
        elif left is not None:
            parts.append(f"{duration(left)} left")
        return parts

    def _running_part(self) -> list[str]:
        """Return the steps of the running trials, for a log."""
        parts = [
            f"{trial.id} at step {trial.reports[-1].step}" if trial.reports else f"{trial.id} begins"
            for trial, _ in list(self._running.values())[:4]
        ]
        if more := len(self._running) - len(parts):
            parts.append(f"{more} more")
        return [f"({', '.join(parts)})"] if parts else []

    def _lines(self, columns: int, rows: int) -> list[str]:
        """Return the lines of the live table for a window of this size."""
        head = _filled(self._count_parts(), self._fact_parts(), columns - 1)
        room = max(0, min(rows - 1 - len(head) - 1, _MOST_ROWS))  # one row for the cursor, one for the column names
        now = self._clock()
        # The best finished trials, the running ones, and the latest of the others.
        kinds = (
            [row for _, _, row in self._finished[:room]],
            [row_of(trial, self._mode, self._names, now) for trial, _ in self._running.values()],
            self._pruned[: -room - 1 : -1],
            self._failed[: -room - 1 : -1],
        )
        shares = _shares([len(kind) for kind in kinds], (2, 2, 1, 1), room)
        shown = [row for kind, share in zip(kinds, shares, strict=True) for row in kind[:share]]
        return [*head, *aligned(list(self._names.values()), shown, columns - 1, self._widths)]


def _filled(counts: Sequence[str], facts: Sequence[str], width: int) -> list[str]:
    """Return the header, which takes several lines in a narrow window."""
    lines: list[str] = []
    for joint, part in [*((", ", count) for count in counts), *(("  ", fact) for fact in facts)]:
        if lines and len(lines[-1] + joint + part) <= width:
            lines[-1] += joint + part
        else:
            lines.append(part)
    return lines


def _shares(sizes: Sequence[int], weights: Sequence[int], room: int) -> list[int]:
    """Return how many rows of each kind are shown, by weight. Unused rows go to the first kind that needs them."""
    shares = [min(size, room * weight // sum(weights)) for size, weight in zip(sizes, weights, strict=True)]
    for i, size in enumerate(sizes):
        shares[i] += min(size - shares[i], room - sum(shares))
    return shares
