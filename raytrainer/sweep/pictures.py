"""Two pictures of a sweep: the progress of the trials, and the effect of each parameter on the objective.
They use matplotlib without pyplot, whose state is global, and without the user's matplotlib settings."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import best_parameters
from raytrainer.sweep.table import ranked, short_names, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from raytrainer.config import Parameter

_DPI = 120
_MOST_PANELS = 12
_MOST_STRIPS = 12  # distinct numbers that are drawn in strips; more are drawn on a scale
_MOST_RUNGS = 12
_FAR = 3.0  # interquartile ranges beyond the middle half, from which a bad value is drawn at the edge
_LIMIT = 1e100  # the largest value for matplotlib's axes
_GREY, _INK = "#8c8c8c", "#262626"


@dataclass(frozen=True)
class _Look:
    color: str
    marker: str


# Okabe and Ito's colours, which are safe for colour blindness; each status also has its own shape. Rarer and more
# important statuses come later, so that they are drawn on top.
_LOOKS = {
    "pruned": _Look("#e69f00", "v"),
    "stopped": _Look("#cc79a7", "s"),
    "running": _Look("#009e73", "D"),
    "finished": _Look("#0072b2", "o"),
    "failed": _Look("#d55e00", "X"),
}
_SETTINGS: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "figure.titlesize": 12,
    "text.color": _INK,
    "text.parse_math": False,  # a name may contain a dollar sign
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_one_at_a_time = threading.Lock()


def progress_png(trials: Sequence[Trial], *, metric: str, mode: Mode) -> bytes:
    """Draw two panels as PNG. The upper one shows the best value over the trials, in the order in which they ended. The
    lower one shows each trial's value over its evaluations; a pruned trial ends at its rung."""
    with _drawing(9, 8.5) as figure:
        above, below = figure.subplots(2, 1)
        best = ranked(trials, mode)[:1]
        _draw_best(above, trials, best, mode)
        _draw_curves(below, trials, best, mode)
        _frame(figure, trials, best, metric, mode, line="-")
        return _png(figure)


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
    with _drawing(max(7.0, 3.2 * columns), 2.9 * rows + 1.3) as figure:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
        scale = _Scale.of([b.value for t in valued if (b := t.best(mode))], mode)
        for panel, parameter in zip(panels, shown, strict=False):
            log = _draw_parameter(panel, parameter, valued, mode, scale)
            panel.set_xlabel(names[parameter.key] + (" (log)" if log else ""))
        for panel in panels[max(1, len(shown)) :]:
            panel.set_axis_off()
        if not shown:
            _say(panels[0], "no parameters")
        _frame(figure, valued, valued[:1], metric, mode, line="none")
        if len(shown) < len(parameters):
            panels[0].set_title(f"{len(shown)} of {len(parameters)} parameters")
        return _png(figure)


# --- the panels ---------------------------------------------------------------------------------------------------------


def _draw_best(axes: Axes, trials: Sequence[Trial], best: Sequence[Trial], mode: Mode) -> None:
    ended = sorted((t for t in trials if t.status != "running"), key=lambda t: t.ended or t.started)
    places = {trial.id: number for number, trial in enumerate(ended, 1)}
    scale = _Scale.of([b.value for t in ended if (b := t.best(mode))], mode)
    for status, look in _LOOKS.items():
        those = [t for t in ended if t.status == status]
        points = [(places[t.id], b.value) for t in those if (b := t.best(mode))]
        _draw_points(axes, points, look, _size(len(ended)), scale)
        if bare := [places[t.id] for t in those if t.best(mode) is None]:  # at the bottom of the panel
            place = axes.get_xaxis_transform()
            axes.plot(bare, [0.03] * len(bare), transform=place, **_style(look, _size(len(ended))))
    so_far: list[tuple[int, float]] = []
    for trial in ended:
        # Failed trials do not count for the best value.
        if (report := trial.best(mode)) is not None and trial.status != "failed":
            pick = min if mode == "min" else max
            so_far.append((places[trial.id], pick(report.value, so_far[-1][1] if so_far else report.value)))
    if so_far:
        so_far.append((len(ended), so_far[-1][1]))
        axes.step(*zip(*so_far, strict=True), where="post", color=_INK, linewidth=1.6, zorder=4)
    else:
        _say(axes, "no value")
    for trial in best:
        if trial.id in places and (report := trial.best(mode)):
            axes.plot([places[trial.id]], [report.value], linestyle="none", **_RING)
    bare_too = any(t.best(mode) is None for t in ended)
    axes.set_title("best value of each trial" + (" (at the foot: those without one)" if bare_too else ""))
    axes.set_xlabel("trials, in the order of their ends")
    axes.set_xlim(0.5 - 0.015 * len(ended), max(1, len(ended)) * 1.015 + 0.5)
    _whole_numbers(axes)
    scale.put_on(axes)


def _draw_curves(axes: Axes, trials: Sequence[Trial], best: Sequence[Trial], mode: Mode) -> None:
    from matplotlib.collections import LineCollection

    reported = [t for t in trials if t.reports]
    scale = _Scale.of([r.value for t in reported for r in t.reports], mode)
    crowd = min(1.0, math.sqrt(20 / max(1, len(reported))))  # opacity: many lines need to be fainter

    def curve(trial: Trial) -> list[tuple[float, float]]:
        return [(r.evaluation, scale.within(r.value)) for r in trial.reports if not math.isnan(r.value)]

    for status, look in _LOOKS.items():
        those = [t for t in reported if t.status == status]
        lines = [line for t in those if len(line := curve(t)) > 1]
        axes.add_collection(LineCollection(lines, colors=look.color, linewidths=1.1, alpha=max(0.12, 0.8 * crowd)))
        ends = [(t.reports[-1].evaluation, t.reports[-1].value) for t in those]
        _draw_points(axes, ends, look, _size(len(reported)), scale, alpha=max(0.35, crowd))
    for trial in best:
        axes.plot(*zip(*curve(trial), strict=True), color=_INK, linewidth=1.8, zorder=4)
        if report := trial.best(mode):
            axes.plot([report.evaluation], [report.value], linestyle="none", **_RING)
    if not any(curve(t) for t in reported):
        _say(axes, "no value")
    longest = max((r.evaluation for t in reported for r in t.reports), default=1)
    margin = max(0.5, 0.03 * longest)
    rungs = Counter(t.reports[-1].evaluation for t in reported if t.status == "pruned")
    named: list[int] = []
    for evaluation, count in rungs.most_common():
        # Labels of neighbouring rungs would overlap. If there are very many rungs, only those with a label are drawn.
        apart = all(abs(evaluation - other) > 0.09 * (longest - 1 + 2 * margin) for other in named)
        if apart or len(rungs) <= _MOST_RUNGS:
            axes.axvline(evaluation, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if apart:
            named.append(evaluation)
            place = axes.get_xaxis_transform()
            axes.text(evaluation, 1.01, f"{count} pruned", transform=place, ha="center", va="bottom", fontsize=8)
    axes.set_title("value at each evaluation", pad=18 if rungs else None)
    axes.set_xlabel("evaluation")
    axes.set_xlim(1 - margin, longest + margin)
    _whole_numbers(axes)
    scale.put_on(axes)


def _draw_parameter(axes: Axes, parameter: Parameter, trials: Sequence[Trial], mode: Mode, scale: _Scale) -> bool:
    """Draw the panel of a parameter and return whether its axis is logarithmic. The first trial is the best one."""
    having = [(t, p[parameter.key]) for t in trials if parameter.key in (p := best_parameters(t, mode))]
    numbers = [float(v) for _, v in having if _is_number(v)]
    listed, log = _listed(parameter), False
    if (listed and len({*numbers, *listed}) <= _MOST_STRIPS) or len(numbers) < len(having):
        places = _strips(axes, [*listed, *(v for _, v in having)])
        crowd = len(having) / max(1, len(places))
        at = [places[written(v)] + _beside(number, crowd) for number, (_, v) in enumerate(having)]
    else:
        at = numbers
        low, high = (min(at), max(at)) if at else (0.0, 1.0)
        log = low > 1 / _LIMIT and (parameter.log or (parameter.kind == "choice" and high > 50 * low))
        if log:
            factor = (high / low) ** 0.06 if high > low else 2.0
            _put_log(axes, "x", low / factor, high * factor)
        else:
            margin = 0.06 * (high - low) or max(0.5, 0.1 * abs(low))
            axes.set_xlim(low - margin, high + margin)
            if parameter.integer:
                _whole_numbers(axes)
    for status, look in _LOOKS.items():
        points = [
            (x, b.value) for x, (t, _) in zip(at, having, strict=True) if t.status == status and (b := t.best(mode))
        ]
        _draw_points(axes, points, look, _size(len(having)), scale)
    if having and having[0][0] is trials[0] and (report := trials[0].best(mode)):
        axes.plot([at[0]], [report.value], linestyle="none", **_RING)
    if not having:
        _say(axes, "no value")
    scale.put_on(axes)
    return log


def _listed(parameter: Parameter) -> tuple[Any, ...]:
    """Return the values of a choice or of a short integer range; empty for any other parameter."""
    if parameter.kind == "choice":
        return parameter.values
    few = parameter.kind == "range" and (parameter.high or 0) - (parameter.low or 0) < _MOST_STRIPS
    return parameter.grid() if few and parameter.integer else ()


def _strips(axes: Axes, values: list[Any]) -> dict[str, float]:
    """Make one strip per value and return the strips' positions. Numbers are sorted; other values keep their order."""
    values = sorted(values) if all(map(_is_number, values)) else values
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


# --- what all panels share ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """The axis of the objective. Values that are far worse than the others (a loss of 1e9) do not stretch it. They are
    drawn at the edge, as carets that point outwards."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], mode: Mode) -> _Scale:
        finite = sorted(min(max(v, -_LIMIT), _LIMIT) for v in values if math.isfinite(v))
        if not finite:
            return cls(0.0, 1.0, log=False)
        low, high = finite[0], finite[-1]
        lower, upper = finite[len(finite) // 4], finite[(3 * len(finite)) // 4]
        log = mode == "min" and low > 1 / _LIMIT and upper > 20 * low
        if log:
            fence = upper * max(10.0, upper / lower) ** _FAR if upper < 1e20 * lower else high
            return cls(low, max(v for v in finite if v <= fence), log)
        spread = _FAR * max(upper - lower, 0.05 * (abs(lower) + abs(upper)))
        if mode == "min":
            high = max(v for v in finite if v <= upper + spread)
        else:
            low = min(v for v in finite if v >= lower - spread)
        return cls(low, high, log)

    def within(self, value: float) -> float:
        """Return the value, limited to the edges of the axis."""
        least, most = self._edges()
        return min(max(value, least), most)

    def put_on(self, axes: Axes) -> None:
        if self.log:
            _put_log(axes, "y", *self._edges())
        else:
            axes.set_ylim(*self._edges())

    def _edges(self) -> tuple[float, float]:
        if self.log:
            factor = max(1.1, (self.high / self.low) ** 0.07)
            return self.low / factor, self.high * factor
        margin = 0.07 * (self.high - self.low) or max(0.05 * abs(self.low), 1e-12)
        return self.low - margin, self.high + margin


def _frame(
    figure: Figure, trials: Sequence[Trial], best: Sequence[Trial], metric: str, mode: Mode, line: Literal["-", "none"]
) -> None:
    """Add the title, the legend and the name of the metric."""
    from matplotlib.lines import Line2D

    counts = Counter[str](t.status for t in trials)
    marks = [
        Line2D([], [], label=f"{counts[status]} {status}", **_style(look, 7))
        for status, look in _LOOKS.items()
        if counts[status]
    ]
    title = f"no trial has a {metric}"
    if best:
        report = best[0].best(mode)
        assert report is not None
        title = f"best {metric} {report.value:.4g} (trial {best[0].id})"
        marks.append(Line2D([], [], color=_INK, linewidth=1.6, linestyle=line, **_RING, label="best"))
    figure.suptitle(title, x=0.01, ha="left")
    figure.supylabel(f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)", fontsize=9.5)
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)


def _draw_points(
    axes: Axes, points: Sequence[tuple[float, float]], look: _Look, size: float, scale: _Scale, alpha: float = 0.85
) -> None:
    from matplotlib.markers import CARETDOWN, CARETUP

    near = [(x, y) for x, y in points if scale.low <= y <= scale.high]
    above = [(x, scale.within(y)) for x, y in points if y > scale.high]
    below = [(x, scale.within(y)) for x, y in points if y < scale.low]
    for those, marker in ((near, look.marker), (above, CARETUP), (below, CARETDOWN)):
        if those:
            axes.plot(*zip(*those, strict=True), **_style(look, size) | {"marker": marker, "alpha": alpha})


def _style(look: _Look, size: float) -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": look.marker,
        "markersize": size,
        "markerfacecolor": look.color,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5 if size > 4 else 0.2,
        "zorder": 3,
        "clip_on": False,  # points on the edge are drawn whole
    }


_RING: Any = {
    "marker": "o",
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgecolor": _INK,
    "markeredgewidth": 1.5,
    "zorder": 5,
    "clip_on": False,
}


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _put_log(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Make an axis logarithmic between two values, with plain numbers as labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis, decades = axes.xaxis if which == "x" else axes.yaxis, math.log10(high / low)
    few = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=few) if decades > 0.8 else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _size(number: int) -> float:
    """Return the size of a point, which is smaller if there are many, so that they stay distinguishable."""
    return max(3.2, min(7.0, 60 / math.sqrt(max(1, number))))


def _beside(number: int, crowd: float) -> float:
    """Return a point's offset from the middle of its strip, which is wider if it has many points. Multiples of the
    golden ratio spread evenly, and give the same picture every time."""
    return ((number * 0.6180339887) % 1.0 - 0.5) * min(0.5, 0.06 * max(0.0, crowd - 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT


@contextlib.contextmanager
def _drawing(width: float, height: float) -> Iterator[Figure]:
    """Provide a new figure with our settings, and keep matplotlib from writing to stderr. The size is in inches."""
    logger = logging.getLogger("matplotlib")
    # Settings, warnings and loggers are global, so only one figure is drawn at a time.
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for characters that are missing in the font
        before = logger.level
        logger.setLevel(logging.ERROR)  # it logs about its font lists, even during its import
        try:
            import matplotlib
            from matplotlib.figure import Figure

            with matplotlib.rc_context():
                matplotlib.rcdefaults()
                matplotlib.rcParams.update(_SETTINGS)
                yield Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        finally:
            logger.setLevel(before)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
