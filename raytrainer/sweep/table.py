"""The display of a sweep: a live table of its trials on a terminal, or one line per trial elsewhere; at the end, the
best trials and the command for the best one."""

from __future__ import annotations

import bisect
import math
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytrainer.progress import Display, duration
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import ParameterSegment, best_parameters, parameters_at

_DRAW_S = 0.25  # between two updates of the live table
_SUMMARY_S = 30.0  # without a terminal: between two lines about the whole sweep
_MOST_ROWS = 24  # rows of the live table, so that a tall window still shows earlier lines
_WIDEST = 16  # characters of a parameter's value
_LONGEST = 120  # characters of a cause in a line; the summary has the whole text
_KNOWN_FROM = 3  # ended trials that are needed to estimate the duration of the others


class Board:
    """Shows the progress of a sweep on a `Display`. It reads the trials in place, so it sees new reports by itself. The
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
        elapsed_s: How many of these seconds have passed already.
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
        elapsed_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.total, self.at_once = total, at_once
        self._display, self._name, self._metric, self._mode = display, name, metric, mode
        self._names = short_names(keys)
        self._budget, self._clock = time_budget_s, clock
        now = clock()
        self._began = now - elapsed_s
        self._drawn, self._summed = -math.inf, now
        self._running: dict[str, tuple[Trial, float]] = {}  # with the time of `start`
        # Each ended trial is formatted only once. Finished trials are sorted by value, the others by their ends.
        self._finished: list[tuple[float, str, _Row]] = []
        self._pruned: list[_Row] = []
        self._failed: list[_Row] = []
        self._counts: Counter[str] = Counter()
        self._best: _Best | None = None
        self._durations: list[float] = []
        self._widths: dict[str, int] = {}
        for trial in trials:
            if trial.status == "running":
                self._running[trial.id] = (trial, now)
            else:
                self._take(trial, trial.took() or 0.0)

    def start(self, trial: Trial) -> None:
        """Show that a trial starts or continues."""
        self._running[trial.id] = (trial, self._clock())
        last = f"continues after evaluation {trial.reports[-1].evaluation}" if trial.reports else "begins"
        self._display.note(f"trial {trial.id} {last}: {_settings(trial.parameters, self._names)}")
        self.tick()

    def end(self, trial: Trial) -> None:
        """Show that a trial has ended. Its status, cause and end must be set."""
        _, began = self._running.pop(trial.id, (trial, trial.started))
        self._take(trial, self._clock() - began if trial.seconds is None else trial.seconds)
        line = trial_line(trial, self._metric, self._mode, self._names)
        if trial.status == "failed":
            self._display.say(line)  # stays visible, above the table
        else:
            self._display.note(line)
        self.tick()

    def tick(self) -> None:
        """Update the display if it is due. Otherwise the call costs almost nothing."""
        now = self._clock()
        # A negative difference, after the clock was set back, also counts as due.
        if self._display.live and not 0 <= now - self._drawn < _DRAW_S:
            self._drawn = now
            self._display.draw(self._lines(*self._display.size()))
        elif not self._display.live and not 0 <= now - self._summed < _SUMMARY_S:
            self._summed = now
            self._display.say("  ".join([", ".join(self._told_counts()), *self._told_facts(), *self._told_running()]))

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
        if trial.status in ("finished", "pruned"):  # the duration of other trials is not typical
            self._durations.append(seconds)
        row, best = _row(trial, self._mode, self._names, self._clock()), _best(trial, self._mode)
        if trial.status == "finished":
            bisect.insort(self._finished, (best.rank if best else math.inf, trial.id, row))
        else:
            (self._failed if trial.status == "failed" else self._pruned).append(row)
        self._best = min(filter(None, (self._best, best)), default=None)

    def _told_counts(self) -> list[str]:
        of = f" of {self.total}" if self.total is not None else ""
        told = [f"sweep {self._name}: {self._counts.total()}{of} done", f"{len(self._running)} running"]
        return told + [f"{self._counts[s]} {s}" for s in ("pruned", "failed", "stopped") if self._counts[s]]

    def _told_facts(self) -> list[str]:
        running = [_best(trial, self._mode) for trial, _ in self._running.values()]
        best = min(filter(None, (self._best, *running)), default=None)
        told = [f"best {self._metric} {best.value:.4g} ({best.trial})"] if best else []
        elapsed = max(0.0, self._clock() - self._began)
        told.append(f"{duration(elapsed)} elapsed")
        left = self.seconds_left()
        if self._budget is not None:
            most = max(0.0, self._budget - elapsed)
            told.append(f"at most {duration(most)} left" if left is None else f"{duration(min(left, most))} left")
        elif left is not None:
            told.append(f"{duration(left)} left")
        return told

    def _told_running(self) -> list[str]:
        """Return the steps of the running trials, for a log."""
        told = [
            f"{trial.id} at step {trial.reports[-1].step}" if trial.reports else f"{trial.id} begins"
            for trial, _ in list(self._running.values())[:4]
        ]
        if more := len(self._running) - len(told):
            told.append(f"{more} more")
        return [f"({', '.join(told)})"] if told else []

    def _lines(self, columns: int, rows: int) -> list[str]:
        """Return the lines of the live table for a window of this size."""
        head = _filled(self._told_counts(), self._told_facts(), columns - 1)
        room = max(0, min(rows - 1 - len(head) - 1, _MOST_ROWS))  # one row for the cursor, one for the column names
        now = self._clock()
        # The best finished trials, the running ones, and the latest of the others.
        kinds = (
            [row for _, _, row in self._finished[:room]],
            [_row(trial, self._mode, self._names, now) for trial, _ in self._running.values()],
            self._pruned[: -room - 1 : -1],
            self._failed[: -room - 1 : -1],
        )
        shares = _shares([len(kind) for kind in kinds], (2, 2, 1, 1), room)
        shown = [row for kind, share in zip(kinds, shares, strict=True) for row in kind[:share]]
        return [*head, *_aligned(list(self._names.values()), shown, columns - 1, self._widths)]


def final_table(trials: Iterable[Trial], *, metric: str, mode: Mode, keys: Sequence[str], most: int = 10) -> str:
    """Return the best trials as a table, best first. If no trial has a value, return a line that says so."""
    best = ranked(trials, mode)[:most]
    if not best:
        return f"no trial has a {metric}"
    names = short_names(keys)
    rows = [replace(_row(trial, mode, names, trial.ended or trial.started), cause=None) for trial in best]
    return "\n".join(_aligned(list(names.values()), rows, None, {}, value=metric))


def command_line(program: str, options: Sequence[str], fixed: Sequence[str], overrides: Sequence[str]) -> str:
    """Return the command that trains a trial's configuration as a run of its own, quoted for a shell.

    Args:
        program: The command of the program, e.g. `python -m raytrainer`.
        options: The options of the sweep's command: `--config-dir=…`.
        fixed: The overrides of all trials. Overrides of the sweep itself and its name are left out.
        overrides: The trial's overrides.
    """
    words = [word for word in (*options, *fixed, *overrides) if not _OF_SWEEP.match(word)]
    # An experiment's config may choose the sweep, if the command line did not or if the sweep is over experiments.
    if not any(word.startswith("sweep=") for word in fixed) or any(
        word.startswith("experiment=") for word in overrides
    ):
        words.append("~sweep")
    return shlex.join([*shlex.split(program), *words])


def schedule_text(parameter_segments: Sequence[ParameterSegment]) -> str:
    """Return the parameter schedule of a population's trial, e.g. `lr 0.01 to step 22, lr 0.012 to step 44`."""
    keys = [
        k for k in parameter_segments[-1].parameters if len({repr(s.parameters.get(k)) for s in parameter_segments}) > 1
    ]
    names = short_names(parameter_segments[-1].parameters)
    told = [
        " ".join(f"{names[k]} {written(s.parameters.get(k))}" for k in keys) + f" to step {s.step}"
        for s in parameter_segments
    ]
    return ", ".join(told)


def ranked(trials: Iterable[Trial], mode: Mode) -> list[Trial]:
    """Return the trials that have a value, best first, in sampling order if equal. Failed trials come last, because
    their configuration would fail again."""
    found = [(best, trial) for trial in trials if (best := _best(trial, mode))]
    return [trial for _, trial in sorted(found, key=lambda pair: pair[0])]


def trial_line(trial: Trial, metric: str, mode: Mode, names: Mapping[str, str]) -> str:
    """Return e.g. `trial 0007 pruned at evaluation 3 (step 33), 0:04: val/accuracy 0.8; lr 0.0123  width 64`.

    Args:
        trial: A trial that has ended.
        metric, mode: The metric of its value, and which direction is better.
        names: The displayed name of each parameter, from `short_names`.
    """
    last, best = (trial.reports[-1] if trial.reports else None), trial.best(mode)
    where = f" at evaluation {last.evaluation} (step {last.step})" if last else " before an evaluation"
    told = [f"trial {trial.id} {trial.status}{where}"]
    if trial.ended is not None:
        told[0] += f", {duration(trial.took() or 0.0)}"
    if trial.status == "failed" and trial.cause:
        cause = _clean(trial.cause)
        told.append(cause if len(cause) <= _LONGEST else f"{cause[: _LONGEST - 1]}…")
    elif last:
        told.append(f"{metric} {(best or last).value:.4g}")
    settings = _settings(best_parameters(trial, mode), names)
    return ": ".join(told) + (f"; {settings}" if settings else "")


def _settings(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return "  ".join(f"{names.get(k, k)} {written(v)}" for k, v in values.items())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return each key's last part, or as many parts as make it unique: `optimizer.lr` → `lr`."""
    parts = {key: key.lstrip("+").split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for k, other in parts.items() if k != key]
        count = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        names[key] = ".".join(own[-count:])
    return names


def written(value: Any) -> str:
    """Return a parameter's value for display: four digits of a float, and at most 16 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"{value:.4g}" if isinstance(value, float) else _clean(str(value))
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


# Options and overrides that are meaningless for a single run.
_OF_SWEEP = re.compile(
    r"-m$|--multirun$|\+{0,2}(sweep|hydra/sweeper|name)=|\+{0,2}(sweep|hydra\.sweep|hydra\.sweeper)\."
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, order=True)
class _Best:
    """A trial's best value, ordered so that the smallest object is the best."""

    failed: bool
    rank: float
    trial: str
    value: float


@dataclass(frozen=True)
class _Row:
    """A row of the table: the fixed columns, then the parameters or, in their place, a cause."""

    cells: dict[str, str]
    settings: list[str]
    cause: str | None = None


def _best(trial: Trial, mode: Mode) -> _Best | None:
    found = trial.best(mode)
    if found is None:
        return None
    return _Best(trial.status == "failed", -found.value if mode == "max" else found.value, trial.id, found.value)


def _row(trial: Trial, mode: Mode, names: Mapping[str, str], now: float) -> _Row:
    last, best = (trial.reports[-1] if trial.reports else None), trial.best(mode)
    # A running trial shows its latest value, an ended one its best.
    shown = last if trial.status == "running" or best is None else best
    cells = {
        "trial": trial.id,
        "status": trial.status,
        "value": f"{shown.value:.4g}" if shown else "-",
        "eval": str(last.evaluation) if last else "-",
        "step": str(last.step) if last else "-",
        "time": duration(trial.took(now) or 0.0),
    }
    having = parameters_at(trial, shown)
    settings = [written(having[key]) if key in having else "-" for key in names]
    return _Row(cells, settings, _clean(trial.cause) if trial.status == "failed" and trial.cause else None)


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


def _aligned(
    names: Sequence[str], rows: Sequence[_Row], width: int | None, widths: dict[str, int], value: str = "value"
) -> list[str]:
    """Return the rows as aligned lines below the column names, cut to a width.

    Args:
        names: The names of the parameters.
        rows: The rows.
        width: The maximum width; None for no limit.
        widths: Column → its largest width so far, which is updated, so that a redrawn table does not jump.
        value: The title of the column `value`.
    """
    cells = {name: [row.cells[name] for row in rows] for name in ("trial", "status", "value", "eval", "step", "time")}
    for i, name in enumerate(names):
        cells[f"={name}"] = [row.settings[i] if row.cause is None else "" for row in rows]
    titles = {name: name.removeprefix("=")[:_WIDEST] for name in cells} | {"value": value}
    for name, texts in cells.items():
        widths[name] = max(widths.get(name, 0), len(titles[name]), *(len(text) for text in texts), 0)
    shown = list(cells)
    if width is not None:
        for name in ("eval", "time", "step"):  # dropped first
            if sum(widths[n] + 2 for n in shown if n[0] != "=") - 2 > width:
                shown.remove(name)
        while shown[-1][0] == "=" and sum(widths[n] + 2 for n in shown) - 2 > width:
            shown.pop()
    left = {n for n in shown if n in ("trial", "status") or (n[0] == "=" and not all(map(_is_number, cells[n])))}

    def line(texts: Mapping[str, str], cause: str = "") -> str:
        fields = [texts[n].ljust(widths[n]) if n in left else texts[n].rjust(widths[n]) for n in shown if n in texts]
        return "  ".join([*fields, cause]).rstrip()[:width]

    lines = [line(titles)]
    for i, row in enumerate(rows):
        kept = {n: cells[n][i] for n in shown if row.cause is None or n[0] != "="}
        lines.append(line(kept, row.cause or ""))
    return lines


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-|nan|-?inf|", text) is not None


def _clean(text: str) -> str:
    """Return a text on one line without terminal control characters."""
    return _CONTROL.sub(" ", text).strip()
