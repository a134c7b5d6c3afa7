"""The common parts of a sweep's pictures: the figure, the axis of the objective, and the marks of the trials.

matplotlib is used without pyplot, whose state is global, and without the user's settings."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raytrainer.sweep.journal import Mode
from raytrainer.sweep.trial_state import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_FAR = 3.0  # interquartile ranges beyond the middle half, from which a bad value is drawn at the edge
LIMIT = 1e100  # the largest value for matplotlib's axes
GREY, INK = "#8c8c8c", "#262626"


@dataclass(frozen=True)
class Look:
    color: str
    marker: str


# Okabe and Ito's colours, which are safe for colour blindness; each status also has its own shape. Rarer and more
# important statuses come later, so that they are drawn on top.
LOOKS: Mapping[Status, Look] = {
    Status.PRUNED: Look("#e69f00", "v"),
    Status.STOPPED: Look("#cc79a7", "s"),
    Status.RUNNING: Look("#009e73", "D"),
    Status.FINISHED: Look("#0072b2", "o"),
    Status.FAILED: Look("#d55e00", "X"),
}
_SETTINGS: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "figure.titlesize": 12,
    "text.color": INK,
    "text.parse_math": False,  # a name may contain a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}
_one_figure = threading.Lock()


@dataclass(frozen=True)
class Scale:
    """The axis of the objective. Values that are far worse than the others (a loss of 1e9) do not stretch it. They are
    drawn at the edge, as carets that point outwards."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], mode: Mode) -> Scale:
        finite = sorted(min(max(v, -LIMIT), LIMIT) for v in values if math.isfinite(v))
        if not finite:
            return cls(0.0, 1.0, log=False)
        low, high = finite[0], finite[-1]
        lower, upper = finite[len(finite) // 4], finite[(3 * len(finite)) // 4]
        log = mode == "min" and low > 1 / LIMIT and upper > 20 * low
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
            put_log(axes, "y", *self._edges())
        else:
            axes.set_ylim(*self._edges())

    def _edges(self) -> tuple[float, float]:
        if self.log:
            factor = max(1.1, (self.high / self.low) ** 0.07)
            return self.low / factor, self.high * factor
        margin = 0.07 * (self.high - self.low) or max(0.05 * abs(self.low), 1e-12)
        return self.low - margin, self.high + margin


def draw_points(
    axes: Axes, points: Sequence[tuple[float, float]], look: Look, size: float, scale: Scale, alpha: float = 0.85
) -> None:
    from matplotlib.markers import CARETDOWN, CARETUP

    inside = [(x, y) for x, y in points if scale.low <= y <= scale.high]
    above = [(x, scale.within(y)) for x, y in points if y > scale.high]
    below = [(x, scale.within(y)) for x, y in points if y < scale.low]
    for drawn, marker in ((inside, look.marker), (above, CARETUP), (below, CARETDOWN)):
        if drawn:
            axes.plot(*zip(*drawn, strict=True), **style(look, size) | {"marker": marker, "alpha": alpha})


def style(look: Look, size: float) -> dict[str, Any]:
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


RING: Any = {
    "marker": "o",
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgecolor": INK,
    "markeredgewidth": 1.5,
    "zorder": 5,
    "clip_on": False,
}


def note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def put_log(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Make an axis logarithmic between two values, with plain numbers as labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis, decades = axes.xaxis if which == "x" else axes.yaxis, math.log10(high / low)
    few = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=few) if decades > 0.8 else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def point_size(number: int) -> float:
    """Return the size of a point, which is smaller if there are many, so that they stay distinguishable."""
    return max(3.2, min(7.0, 60 / math.sqrt(max(1, number))))


def strip_offset(number: int, crowd: float) -> float:
    """Return a point's offset from the middle of its strip, which is wider if it has many points. Multiples of the
    golden ratio spread evenly, and give the same picture every time."""
    return ((number * 0.6180339887) % 1.0 - 0.5) * min(0.5, 0.06 * max(0.0, crowd - 1))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LIMIT


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Provide a new figure with our settings, and keep matplotlib from writing to stderr. The size is in inches."""
    logger = logging.getLogger("matplotlib")
    # Settings, warnings and loggers are global, so only one figure is drawn at a time.
    with _one_figure, warnings.catch_warnings():
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


def as_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
