"""Trials as text: rows of a table, a line for the log, the order from best to worst, and the command for the best one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytrainer.progress import duration
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import ParameterSegment, best_parameters, parameters_at
from raytrainer.sweep.trial_state import Status

_WIDEST = 16  # characters of a parameter's value
_FIXED_COLUMNS = ("trial", "status", "value", "eval", "step", "time")  # the others are parameters
_LONGEST = 120  # characters of a cause in a line; the summary has the whole text


def final_table(trials: Iterable[Trial], *, metric: str, mode: Mode, keys: Sequence[str], most: int = 10) -> str:
    """Return the best trials as a table, best first. If no trial has a value, return a line that says so."""
    best = ranked(trials, mode)[:most]
    if not best:
        return f"no trial has a {metric}"
    names = short_names(keys)
    rows = [replace(row_of(trial, mode, names, trial.ended or trial.started), cause=None) for trial in best]
    return "\n".join(aligned(list(names.values()), rows, None, {}, value=metric))


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
    return ", ".join(
        " ".join(f"{names[k]} {written(s.parameters.get(k))}" for k in keys) + f" to step {s.step}"
        for s in parameter_segments
    )


def ranked(trials: Iterable[Trial], mode: Mode) -> list[Trial]:
    """Return the trials that have a value, best first, in sampling order if equal. Failed trials come last, because
    their configuration would fail again."""
    valued = [(best, trial) for trial in trials if (best := best_of(trial, mode))]
    return [trial for _, trial in sorted(valued, key=lambda pair: pair[0])]


def trial_line(trial: Trial, metric: str, mode: Mode, names: Mapping[str, str]) -> str:
    """Return e.g. `trial 0007 pruned at evaluation 3 (step 33), 0:04: val/accuracy 0.8; lr 0.0123  width 64`.

    Args:
        trial: A trial that has ended.
        metric, mode: The metric of its value, and which direction is better.
        names: The displayed name of each parameter, from `short_names`.
    """
    last, best = (trial.reports[-1] if trial.reports else None), trial.best(mode)
    where = f" at evaluation {last.evaluation} (step {last.step})" if last else " before an evaluation"
    parts = [f"trial {trial.id} {trial.status}{where}"]
    if trial.ended is not None:
        parts[0] += f", {duration(trial.took() or 0.0)}"
    if trial.status is Status.FAILED and trial.cause:
        cause = _clean(trial.cause)
        parts.append(cause if len(cause) <= _LONGEST else f"{cause[: _LONGEST - 1]}…")
    elif last:
        parts.append(f"{metric} {(best or last).value:.4g}")
    settings = settings_text(best_parameters(trial, mode), names)
    return ": ".join(parts) + (f"; {settings}" if settings else "")


def settings_text(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
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
class Best:
    """A trial's best value, ordered so that the smallest object is the best."""

    failed: bool
    rank: float
    trial: str
    value: float


@dataclass(frozen=True)
class Row:
    """A row of the table: the fixed columns, then the parameters or, in their place, a cause."""

    cells: dict[str, str]
    settings: list[str]
    cause: str | None = None


def best_of(trial: Trial, mode: Mode) -> Best | None:
    report = trial.best(mode)
    if report is None:
        return None
    rank = -report.value if mode == "max" else report.value
    return Best(trial.status is Status.FAILED, rank, trial.id, report.value)


def row_of(trial: Trial, mode: Mode, names: Mapping[str, str], now: float) -> Row:
    last, best = (trial.reports[-1] if trial.reports else None), trial.best(mode)
    # A running trial shows its latest value, an ended one its best.
    shown = last if trial.status is Status.RUNNING or best is None else best
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
    return Row(cells, settings, _clean(trial.cause) if trial.status is Status.FAILED and trial.cause else None)


def aligned(
    names: Sequence[str], rows: Sequence[Row], width: int | None, widths: dict[str, int], value: str = "value"
) -> list[str]:
    """Return the rows as aligned lines below the column names, cut to a width.

    Args:
        names: The names of the parameters.
        rows: The rows.
        width: The maximum width; None for no limit.
        widths: Column → its largest width so far, which is updated, so that a redrawn table does not jump.
        value: The title of the column `value`.
    """
    columns = _columns(names, rows)
    titles = {name: name.removeprefix("=")[:_WIDEST] for name in columns} | {"value": value}
    for name, texts in columns.items():
        widths[name] = max(widths.get(name, 0), len(titles[name]), *(len(text) for text in texts), 0)
    shown = list(columns) if width is None else _fitting(list(columns), widths, width)
    to_the_left = {"trial", "status", *(n for n in shown if n[0] == "=" and not all(map(_is_number, columns[n])))}

    def line(texts: Mapping[str, str], cause: str = "") -> str:
        fields = [texts[n].ljust(widths[n]) if n in to_the_left else texts[n].rjust(widths[n]) for n in texts]
        return "  ".join([*fields, cause]).rstrip()[:width]

    lines = [line({name: titles[name] for name in shown})]
    for i, row in enumerate(rows):
        fields = {name: columns[name][i] for name in shown if row.cause is None or name[0] != "="}
        lines.append(line(fields, row.cause or ""))
    return lines


def _columns(names: Sequence[str], rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the texts of each column. The name of a parameter's column begins with `=`."""
    # A failed trial shows its cause in place of the parameters.
    columns = {name: [row.cells[name] for row in rows] for name in _FIXED_COLUMNS}
    columns |= {
        f"={name}": [row.settings[i] if row.cause is None else "" for row in rows] for i, name in enumerate(names)
    }
    return columns


def _fitting(names: list[str], widths: Mapping[str, int], width: int) -> list[str]:
    """Return the columns that fit into a width. The least important ones are dropped first, then the last parameters."""
    for name in ("eval", "time", "step"):
        if sum(widths[n] + 2 for n in names if n[0] != "=") - 2 > width:
            names.remove(name)
    while names[-1][0] == "=" and sum(widths[n] + 2 for n in names) - 2 > width:
        names.pop()
    return names


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-|nan|-?inf|", text) is not None


def _clean(text: str) -> str:
    """Return a text on one line without terminal control characters."""
    return _CONTROL.sub(" ", text).strip()
