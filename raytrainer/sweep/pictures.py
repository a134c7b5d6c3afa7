"""Two pictures of a sweep: the progress of the trials, and the effect of each parameter on the objective."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import best_parameters
from raytrainer.sweep.picture_parts import (
    GREY,
    INK,
    LIMIT,
    LOOKS,
    RING,
    Scale,
    as_png,
    draw_points,
    drawing,
    is_number,
    note,
    point_size,
    put_log,
    strip_offset,
    style,
    whole_numbers,
)
from raytrainer.sweep.table import ranked, short_names, written
from raytrainer.sweep.trial_state import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from raytrainer.config import Parameter

_MOST_PANELS = 12
_MOST_STRIPS = 12  # distinct numbers that are drawn in strips; more are drawn on a scale
_MOST_RUNGS = 12


def progress_png(trials: Sequence[Trial], *, metric: str, mode: Mode) -> bytes:
    """Draw two panels as PNG. The upper one shows the best value over the trials, in the order in which they ended. The
    lower one shows each trial's value over its evaluations; a pruned trial ends at its rung."""
    with drawing(9, 8.5) as figure:
        above, below = figure.subplots(2, 1)
        best = ranked(trials, mode)[:1]
        _draw_best(above, trials, best, mode)
        _draw_curves(below, trials, best, mode)
        _frame(figure, trials, best, metric, mode, line="-")
        return as_png(figure)


def parameters_png(trials: Sequence[Trial], parameters: Sequence[Parameter], *, metric: str, mode: Mode) -> bytes:
    """Draw one panel per parameter as PNG, with the best values of the trials. Parameters with the same value in all
    trials come last, and at most twelve parameters are drawn."""
    valued = ranked(trials, mode)
    shown = sorted(parameters, key=lambda p: len({str(best_parameters(t, mode).get(p.key)) for t in valued}) < 2)[
        :_MOST_PANELS
    ]
    names = short_names(p.key for p in parameters)
    columns = min(4, max(1, math.ceil(math.sqrt(len(shown)))))
    rows = max(1, math.ceil(len(shown) / columns))
    with drawing(max(7.0, 3.2 * columns), 2.9 * rows + 1.3) as figure:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
        scale = Scale.of([b.value for t in valued if (b := t.best(mode))], mode)
        for panel, parameter in zip(panels, shown, strict=False):
            log = _draw_parameter(panel, parameter, valued, mode, scale)
            panel.set_xlabel(names[parameter.key] + (" (log)" if log else ""))
        for panel in panels[max(1, len(shown)) :]:
            panel.set_axis_off()
        if not shown:
            note(panels[0], "no parameters")
        _frame(figure, valued, valued[:1], metric, mode, line="none")
        if len(shown) < len(parameters):
            panels[0].set_title(f"{len(shown)} of {len(parameters)} parameters")
        return as_png(figure)


# --- the best value of each trial ---------------------------------------------------------------------------------------


def _draw_best(axes: Axes, trials: Sequence[Trial], best: Sequence[Trial], mode: Mode) -> None:
    ended = sorted((t for t in trials if t.status is not Status.RUNNING), key=lambda t: t.ended or t.started)
    places = {trial.id: number for number, trial in enumerate(ended, 1)}
    values = {trial.id: report.value for trial in ended if (report := trial.best(mode))}
    scale = Scale.of(list(values.values()), mode)
    for status, look in LOOKS.items():
        ids = [trial.id for trial in ended if trial.status is status]
        points = [(places[id_], values[id_]) for id_ in ids if id_ in values]
        draw_points(axes, points, look, point_size(len(ended)), scale)
        if without := [places[id_] for id_ in ids if id_ not in values]:  # at the bottom of the panel
            transform = axes.get_xaxis_transform()
            axes.plot(without, [0.03] * len(without), transform=transform, **style(look, point_size(len(ended))))
    _draw_best_so_far(axes, ended, values, mode)
    for trial in best:
        if trial.id in values:
            axes.plot([places[trial.id]], [values[trial.id]], linestyle="none", **RING)
    foot = " (at the foot: those without one)" if len(values) < len(ended) else ""
    axes.set_title(f"best value of each trial{foot}")
    axes.set_xlabel("trials, in the order of their ends")
    axes.set_xlim(0.5 - 0.015 * len(ended), max(1, len(ended)) * 1.015 + 0.5)
    whole_numbers(axes)
    scale.put_on(axes)


def _draw_best_so_far(axes: Axes, ended: Sequence[Trial], values: Mapping[str, float], mode: Mode) -> None:
    pick = min if mode == "min" else max
    so_far: list[tuple[int, float]] = []
    for place, trial in enumerate(ended, 1):
        # Failed trials do not count for the best value.
        if trial.id in values and trial.status is not Status.FAILED:
            value = values[trial.id]
            so_far.append((place, pick(value, so_far[-1][1] if so_far else value)))
    if so_far:
        so_far.append((len(ended), so_far[-1][1]))
        axes.step(*zip(*so_far, strict=True), where="post", color=INK, linewidth=1.6, zorder=4)
    else:
        note(axes, "no value")


# --- the values over the evaluations ------------------------------------------------------------------------------------


def _draw_curves(axes: Axes, trials: Sequence[Trial], best: Sequence[Trial], mode: Mode) -> None:
    from matplotlib.collections import LineCollection

    reported = [t for t in trials if t.reports]
    scale = Scale.of([r.value for t in reported for r in t.reports], mode)
    curves = {trial.id: _curve(trial, scale) for trial in trials}
    crowd = min(1.0, math.sqrt(20 / max(1, len(reported))))  # opacity: many lines need to be fainter
    for status, look in LOOKS.items():
        group = [t for t in reported if t.status is status]
        lines = [curves[t.id] for t in group if len(curves[t.id]) > 1]
        axes.add_collection(LineCollection(lines, colors=look.color, linewidths=1.1, alpha=max(0.12, 0.8 * crowd)))
        ends = [(t.reports[-1].evaluation, t.reports[-1].value) for t in group]
        draw_points(axes, ends, look, point_size(len(reported)), scale, alpha=max(0.35, crowd))
    for trial in best:
        axes.plot(*zip(*curves[trial.id], strict=True), color=INK, linewidth=1.8, zorder=4)
        if report := trial.best(mode):
            axes.plot([report.evaluation], [report.value], linestyle="none", **RING)
    if not any(curves.values()):
        note(axes, "no value")
    longest = max((r.evaluation for t in reported for r in t.reports), default=1)
    margin = max(0.5, 0.03 * longest)
    rungs = Counter(t.reports[-1].evaluation for t in reported if t.status is Status.PRUNED)
    _draw_rungs(axes, rungs, 0.09 * (longest - 1 + 2 * margin))
    axes.set_title("value at each evaluation", pad=18 if rungs else None)
    axes.set_xlabel("evaluation")
    axes.set_xlim(1 - margin, longest + margin)
    whole_numbers(axes)
    scale.put_on(axes)


def _curve(trial: Trial, scale: Scale) -> list[tuple[float, float]]:
    return [(r.evaluation, scale.within(r.value)) for r in trial.reports if not math.isnan(r.value)]


def _draw_rungs(axes: Axes, rungs: Counter[int], distance: float) -> None:
    """Draw a line where trials were pruned, with their number. Labels that are closer than `distance` would overlap. If
    there are very many rungs, only those with a label are drawn."""
    labelled: list[int] = []
    for evaluation, count in rungs.most_common():
        apart = all(abs(evaluation - other) > distance for other in labelled)
        if apart or len(rungs) <= _MOST_RUNGS:
            axes.axvline(evaluation, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if apart:
            labelled.append(evaluation)
            transform = axes.get_xaxis_transform()
            axes.text(evaluation, 1.01, f"{count} pruned", transform=transform, ha="center", va="bottom", fontsize=8)


# --- the effect of a parameter ------------------------------------------------------------------------------------------


def _draw_parameter(axes: Axes, parameter: Parameter, trials: Sequence[Trial], mode: Mode, scale: Scale) -> bool:
    """Draw the panel of a parameter and return whether its axis is logarithmic. The first trial is the best one."""
    having = [(t, p[parameter.key]) for t in trials if parameter.key in (p := best_parameters(t, mode))]
    positions, log = _positions(axes, parameter, [value for _, value in having])
    for status, look in LOOKS.items():
        points = [
            (x, report.value)
            for x, (trial, _) in zip(positions, having, strict=True)
            if trial.status is status and (report := trial.best(mode))
        ]
        draw_points(axes, points, look, point_size(len(having)), scale)
    if having and having[0][0] is trials[0] and (report := trials[0].best(mode)):
        axes.plot([positions[0]], [report.value], linestyle="none", **RING)
    if not having:
        note(axes, "no value")
    scale.put_on(axes)
    return log


def _positions(axes: Axes, parameter: Parameter, values: Sequence[Any]) -> tuple[list[float], bool]:
    """Set up the axis of a parameter, as strips or as a scale. Return the position of each value, and whether the axis is
    logarithmic."""
    numbers, listed = [float(value) for value in values if is_number(value)], _listed(parameter)
    if (listed and len({*numbers, *listed}) <= _MOST_STRIPS) or len(numbers) < len(values):
        places = _strips(axes, [*listed, *values])
        crowd = len(values) / max(1, len(places))
        return [places[written(value)] + strip_offset(i, crowd) for i, value in enumerate(values)], False
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    if low > 1 / LIMIT and (parameter.log or (parameter.kind == "choice" and high > 50 * low)):
        factor = (high / low) ** 0.06 if high > low else 2.0
        put_log(axes, "x", low / factor, high * factor)
        return numbers, True
    margin = 0.06 * (high - low) or max(0.5, 0.1 * abs(low))
    axes.set_xlim(low - margin, high + margin)
    if parameter.integer:
        whole_numbers(axes)
    return numbers, False


def _listed(parameter: Parameter) -> tuple[Any, ...]:
    """Return the values of a choice or of a short integer range; empty for any other parameter."""
    if parameter.kind == "choice":
        return parameter.values
    few = parameter.kind == "range" and (parameter.high or 0) - (parameter.low or 0) < _MOST_STRIPS
    return parameter.grid() if few and parameter.integer else ()


def _strips(axes: Axes, values: list[Any]) -> dict[str, float]:
    """Make one strip per value and return the strips' positions. Numbers are sorted; other values keep their order."""
    values = sorted(values) if all(map(is_number, values)) else values
    places = {text: float(number) for number, text in enumerate(dict.fromkeys(map(written, values)))}
    shown = list(places.items())[:: math.ceil(len(places) / 16) or 1]
    slanted = sum(len(text) + 2 for text, _ in shown) > 34
    axes.set_xticks([x for _, x in shown], [text for text, _ in shown])
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=35, rotation_mode="anchor", ha="right", fontsize=8)
    axes.set_xlim(-0.6, max(1, len(places)) - 0.4)
    axes.grid(visible=False, axis="x")
    return places


def _frame(
    figure: Figure, trials: Sequence[Trial], best: Sequence[Trial], metric: str, mode: Mode, line: Literal["-", "none"]
) -> None:
    """Add the title, the legend and the name of the metric."""
    from matplotlib.lines import Line2D

    counts = Counter[str](t.status for t in trials)
    marks = [
        Line2D([], [], label=f"{counts[status]} {status}", **style(look, 7))
        for status, look in LOOKS.items()
        if counts[status]
    ]
    title = f"no trial has a {metric}"
    if best:
        report = best[0].best(mode)
        assert report is not None
        title = f"best {metric} {report.value:.4g} (trial {best[0].id})"
        marks.append(Line2D([], [], color=INK, linewidth=1.6, linestyle=line, **RING, label="best"))
    figure.suptitle(title, x=0.01, ha="left")
    figure.supylabel(f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)", fontsize=9.5)
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
