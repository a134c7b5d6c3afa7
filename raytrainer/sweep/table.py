"""What a person sees of a sweep: a live table of its trials on a terminal, a line a trial elsewhere; at the end the
best of them, and the best as a command."""

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

_DRAW_S = 0.25  # between two drawings of the live table
_SUMMARY_S = 30.0  # without a terminal: between two lines on the sweep as a whole
_MOST_ROWS = 24  # of the live table; in a tall window, what was said before stays in sight
_WIDEST = 16  # characters of a parameter's value
_LONGEST = 120  # characters of a cause in a line; the last words have all of it
_KNOWN_FROM = 3  # ended trials, before their durations say how long the others take


class Board:
    """Tells how a sweep goes, on a `Display`. Trials are read where they are, so that what is appended to their
    reports is seen; `start` and `end` alone must be told, and `tick` called often.

    Args:
        display: Where it is shown.
        name: Of the sweep, in the first line.
        metric: What the trials' values are.
        keys: The parameters, as they stand in `Trial.parameters`.
        total: How many trials there will be; None where only time ends the sweep.
        at_once: How many can run at a time.
        trials: Those of a sweep that goes on, ended or not.
        time_budget_s: After so many seconds the sweep ends in any case.
        elapsed_s: What of them has passed already.
        clock: Seconds since the epoch.

    Attributes:
        total, at_once: As given; both may be changed while it runs.
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
        self._running: dict[str, tuple[Trial, float]] = {}  # with when we were told
        # An ended trial is looked at once, however many there are: the finished are in the order of their values, the
        # others in that of their ends.
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
        """A trial runs (or runs again)."""
        self._running[trial.id] = (trial, self._clock())
        last = f"goes on after evaluation {trial.reports[-1].evaluation}" if trial.reports else "begins"
        self._display.note(f"trial {trial.id} {last}: {_settings(trial.parameters, self._names)}")
        self.tick()

    def end(self, trial: Trial) -> None:
        """A trial has ended for good: its status, cause and end are set."""
        _, began = self._running.pop(trial.id, (trial, trial.started))
        self._take(trial, self._clock() - began if trial.seconds is None else trial.seconds)
        line = trial_line(trial, self._metric, self._mode, self._names)
        if trial.status == "failed":
            self._display.say(line)  # for good, also above a table
        else:
            self._display.note(line)
        self.tick()

    def tick(self) -> None:
        """Shows what is new if it is time to; costs nothing otherwise."""
        now = self._clock()
        # A clock that was put back must not silence us.
        if self._display.live and not 0 <= now - self._drawn < _DRAW_S:
            self._drawn = now
            self._display.draw(self._lines(*self._display.size()))
        elif not self._display.live and not 0 <= now - self._summed < _SUMMARY_S:
            self._summed = now
            self._display.say("  ".join([", ".join(self._told_counts()), *self._told_facts(), *self._told_running()]))

    def close(self) -> None:
        """Takes the table away; `final_table` is for good."""
        self._display.close()

    def seconds_left(self) -> float | None:
        """How long the rest takes if it goes as what has ended: an estimate; None while too little has."""
        if self.total is None or len(self._durations) < min(_KNOWN_FROM, self.total):
            return None
        mean, now = sum(self._durations) / len(self._durations), self._clock()
        rests = []
        for _, began in self._running.values():
            # Whatever has run for a while is one of those that take longer than that.
            longer = [d - (now - began) for d in self._durations if d > now - began]
            rests.append(sum(longer) / len(longer) if longer else 0.0)
        waiting = max(0, self.total - self._counts.total() - len(rests))
        work = sum(rests) + waiting * mean
        return max([work / max(1, min(self.at_once, waiting + len(rests))), *rests])

    def _take(self, trial: Trial, seconds: float) -> None:
        self._counts[trial.status] += 1
        if trial.status in ("finished", "pruned"):  # others say nothing of how long a trial takes
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
        """Where the running trials are, for a log."""
        told = [
            f"{trial.id} at step {trial.reports[-1].step}" if trial.reports else f"{trial.id} begins"
            for trial, _ in list(self._running.values())[:4]
        ]
        if more := len(self._running) - len(told):
            told.append(f"{more} more")
        return [f"({', '.join(told)})"] if told else []

    def _lines(self, columns: int, rows: int) -> list[str]:
        """The table for a window of that size."""
        head = _filled(self._told_counts(), self._told_facts(), columns - 1)
        room = max(0, min(rows - 1 - len(head) - 1, _MOST_ROWS))  # a row for the cursor, and one for the names
        now = self._clock()
        # The best, what runs, and the latest of the others.
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
    """The best trials as a table, best first; a line that says so where no trial has a value."""
    best = ranked(trials, mode)[:most]
    if not best:
        return f"no trial has a {metric}"
    names = short_names(keys)
    rows = [replace(_row(trial, mode, names, trial.ended or trial.started), cause=None) for trial in best]
    return "\n".join(_aligned(list(names.values()), rows, None, {}, value=metric))


def command_line(program: str, options: Sequence[str], fixed: Sequence[str], overrides: Sequence[str]) -> str:
    """The command that trains a trial's configuration by itself, to be copied into a shell.

    Args:
        program: How the program is called, e.g. `python -m raytrainer`.
        options: What the sweep was given beside overrides: `--config-dir=…`.
        fixed: The overrides of all trials; what concerns the sweep itself, and its name, are left out.
        overrides: The trial's.
    """
    words = [word for word in (*options, *fixed, *overrides) if not _OF_SWEEP.match(word)]
    # An experiment of one's own may choose the sweep; it was not said to, or it is one of several.
    if not any(word.startswith("sweep=") for word in fixed) or any(
        word.startswith("experiment=") for word in overrides
    ):
        words.append("~sweep")
    return shlex.join([*shlex.split(program), *words])


def schedule_text(parameter_segments: Sequence[ParameterSegment]) -> str:
    """What a population's trial was trained with, one after the other, e.g. `lr 0.01 to step 22, 0.012 to step 44`."""
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
    """The trials that have a value, the best first, of equals the one drawn first; those that failed come last, since
    their configuration would fail again."""
    found = [(best, trial) for trial in trials if (best := _best(trial, mode))]
    return [trial for _, trial in sorted(found, key=lambda pair: pair[0])]


def trial_line(trial: Trial, metric: str, mode: Mode, names: Mapping[str, str]) -> str:
    """E.g. `trial 0007 pruned at evaluation 3 (step 33), 0:04: val/accuracy 0.8; lr 0.0123  width 64`.

    Args:
        trial: An ended one.
        names: Parameter → the name to show, as `short_names` gives.
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
    """Key → its last part, or as many as tell it from the others: `optimizer.lr` → `lr`."""
    parts = {key: key.lstrip("+").split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for k, other in parts.items() if k != key]
        count = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        names[key] = ".".join(own[-count:])
    return names


def written(value: Any) -> str:
    """A parameter's value as it is shown: four digits of a number, and not all of a long text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"{value:.4g}" if isinstance(value, float) else _clean(str(value))
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


# Options and overrides of the command line that make no sense for one run of its own.
_OF_SWEEP = re.compile(
    r"-m$|--multirun$|\+{0,2}(sweep|hydra/sweeper|name)=|\+{0,2}(sweep|hydra\.sweep|hydra\.sweeper)\."
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, order=True)
class _Best:
    """A trial's best value; the least is the best one."""

    failed: bool
    rank: float
    trial: str
    value: float


@dataclass(frozen=True)
class _Row:
    """A row of the table: the cells of every table, then the parameters, or a cause in their place."""

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
    # What runs is followed; what has ended is compared.
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
    """The first line, or as many as a narrow window needs."""
    lines: list[str] = []
    for joint, part in [*((", ", count) for count in counts), *(("  ", fact) for fact in facts)]:
        if lines and len(lines[-1] + joint + part) <= width:
            lines[-1] += joint + part
        else:
            lines.append(part)
    return lines


def _shares(sizes: Sequence[int], weights: Sequence[int], room: int) -> list[int]:
    """How many of each kind are shown: what is due by weight, and what one kind leaves goes to the first in need."""
    shares = [min(size, room * weight // sum(weights)) for size, weight in zip(sizes, weights, strict=True)]
    for i, size in enumerate(sizes):
        shares[i] += min(size - shares[i], room - sum(shares))
    return shares


def _aligned(
    names: Sequence[str], rows: Sequence[_Row], width: int | None, widths: dict[str, int], value: str = "value"
) -> list[str]:
    """The rows below their columns' names, cut to a width.

    Args:
        names: Of the parameters.
        width: None: however wide it gets.
        widths: Column → the widest that it was so far: what is drawn again and again should not jump.
        value: The name of that column.
    """
    cells = {name: [row.cells[name] for row in rows] for name in ("trial", "status", "value", "eval", "step", "time")}
    for i, name in enumerate(names):
        cells[f"={name}"] = [row.settings[i] if row.cause is None else "" for row in rows]
    titles = {name: name.removeprefix("=")[:_WIDEST] for name in cells} | {"value": value}
    for name, texts in cells.items():
        widths[name] = max(widths.get(name, 0), len(titles[name]), *(len(text) for text in texts), 0)
    shown = list(cells)
    if width is not None:
        for name in ("eval", "time", "step"):  # the first to go
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
    """A text in one line, without what a terminal would obey."""
    return _CONTROL.sub(" ", text).strip()
