"""The two pictures of a sweep: what they show, and that every sweep can be drawn."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from raytrainer.config import Parameter
from raytrainer.sweep import picture_parts, pictures
from raytrainer.sweep.journal import Mode, Report, Trial
from raytrainer.sweep.pictures import parameters_png, progress_png
from raytrainer.sweep.trial_state import Status
from tests.promises import slowness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LR = Parameter("optimizer.lr", "interval", low=1e-4, high=1e-1, log=True)
WIDTH = Parameter("model.width", "choice", (64, 128, 256), ("64", "128", "256"))
MODEL = Parameter("model", "choice", ("mlp", "resnet_digits"), ("mlp", "resnet_digits"), group=True)
EPOCHS = Parameter("trainer.max_epochs", "range", low=2, high=40, step=1, integer=True)
SPACE = [LR, WIDTH, MODEL, EPOCHS]


def trial(
    number: int, values: list[float], status: Status = Status.FINISHED, parameters: dict[str, Any] | None = None
) -> Trial:
    reports = [Report(i, 10 * i, v, {}, float(i)) for i, v in enumerate(values, 1)]
    return Trial(f"{number:04d}", parameters or {}, [], float(number), None, reports, status, None, number + 0.5)


def drawn(number: int, seed: int = 0) -> list[Trial]:
    """Return trials of `SPACE`: half of them pruned at evaluation 3, some failed, some without a value."""
    dice = random.Random(seed)
    found = []
    for n in range(1, number + 1):
        given = {
            "optimizer.lr": 10 ** dice.uniform(-4, -1),
            "model.width": dice.choice(WIDTH.values),
            "model": dice.choice(MODEL.values),
            "trainer.max_epochs": dice.randint(2, 40),
        }
        values = [1 - (0.5 + 0.1 * dice.random()) ** e for e in range(1, 11)]
        status: Status = Status.FINISHED
        if n % 2:
            values, status = values[:3], Status.PRUNED
        if n % 17 == 3:
            values, status = [*values[:2], math.nan], Status.FAILED
        if n % 29 == 4:
            values, status = [], Status.FAILED
        found.append(trial(n, values, status, parameters=given))
    return found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are encoded as PNG from now on."""
    made: list[Figure] = []
    encode = picture_parts.as_png

    def kept(figure: Figure) -> bytes:
        made.append(figure)
        return encode(figure)

    monkeypatch.setattr(pictures, "as_png", kept)
    return made


def ink(png: bytes) -> float:
    """Return the fraction of a picture's pixels that are not white."""
    from matplotlib.image import imread

    return float((imread(io.BytesIO(png), format="png")[..., :3] < 0.97).any(axis=-1).mean())


def points(line: Any) -> list[list[float]]:
    return [[float(x), float(y)] for x, y in line.get_xydata()]


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_progress_shows_the_best_so_far_and_the_rungs(figures: list[Figure]) -> None:
    trials = [
        trial(1, [0.5, 0.6, 0.7]),
        trial(2, [0.4], Status.PRUNED),
        trial(3, [0.3], Status.PRUNED),
        trial(4, [0.5, 0.9, 0.8]),
        trial(5, [0.5, 0.5], Status.PRUNED),
        trial(6, [0.99, math.nan], Status.FAILED),
        trial(7, [0.8], Status.RUNNING),
    ]
    assert 0.01 < ink(progress_png(trials, metric="val/accuracy", mode="max")) < 0.5
    (figure,) = figures
    above, below = figure.axes
    steps = next(line for line in above.lines if line.get_drawstyle() == "steps-post")
    # Only ended trials count, and the 0.99 of the failed trial is not a best value.
    assert points(steps) == [[1, 0.7], [2, 0.7], [3, 0.7], [4, 0.9], [5, 0.9], [6, 0.9]]
    assert texts(below) == ["2 pruned", "1 pruned"]
    assert figure.get_suptitle() == "best val/accuracy 0.9 (trial 0004)"
    assert figure.get_supylabel() == "val/accuracy (higher is better)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("3 pruned", "1 running", "2 finished", "1 failed", "best")
    ]
    # Every trial is a point; a trial with several evaluations is also a curve.
    curves: list[Any] = list(below.collections)
    assert sum(len(c.get_segments()) for c in curves) == 3


def test_parameters_are_on_the_axes_that_they_were_drawn_on(figures: list[Figure]) -> None:
    assert 0.01 < ink(parameters_png(drawn(64), SPACE, metric="val/loss", mode="min")) < 0.5
    panels = figures[0].axes
    assert [panel.get_xlabel() for panel in panels] == ["lr (log)", "width", "model", "max_epochs"]
    assert [panel.get_xscale() for panel in panels] == ["log", "linear", "linear", "linear"]
    assert [label.get_text() for label in panels[0].get_xticklabels()][1:-1] == ["0.0001", "0.001", "0.01", "0.1"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["64", "128", "256"]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["mlp", "resnet_digits"]
    low, high = panels[3].get_xlim()
    assert low < 5
    assert high > 38
    assert figures[0].get_supylabel() == "val/loss (lower is better)"


def test_at_most_twelve_panels_those_that_varied_first(figures: list[Figure]) -> None:
    space = [Parameter(f"a.p{n}", "interval", low=0.0, high=1.0) for n in range(15)]
    given = [{p.key: 0.5 if p.key == "a.p0" else k / 10 for p in space} for k in range(5)]
    trials = [trial(k, [0.1 * k], parameters=given[k]) for k in range(5)]
    parameters_png(trials, space, metric="m", mode="max")
    shown = [panel.get_xlabel() for panel in figures[0].axes if panel.axison]
    assert shown == [f"p{n}" for n in range(1, 13)]
    assert figures[0].axes[0].get_title(loc="left") == "12 of 15 parameters"


def test_a_value_that_is_worse_by_far_does_not_press_the_others_flat(figures: list[Figure]) -> None:
    trials = [trial(n, [1.0 + 0.01 * n], parameters={"optimizer.lr": 0.01 * n}) for n in range(1, 21)]
    trials.append(trial(21, [3e9], parameters={"optimizer.lr": 0.5}))
    parameters_png(trials, [LR], metric="val/loss", mode="min")
    progress_png(trials, metric="val/loss", mode="min")
    for panel in (*figures[0].axes, *figures[1].axes):
        assert panel.get_ylim()[1] < 1.5
        # It is still shown, at the edge.
        assert any(points(line)[-1][1] == panel.get_ylim()[1] for line in panel.lines if len(points(line)) == 1)


def test_losses_over_decades_get_a_logarithmic_axis(figures: list[Figure]) -> None:
    trials = [trial(n, [10.0**-n], parameters={"optimizer.lr": 0.01}) for n in range(6)]
    parameters_png(trials, [LR], metric="val/loss", mode="min")
    assert figures[0].axes[0].get_yscale() == "log"
    assert {"0.0001", "0.01", "1"} <= {label.get_text() for label in figures[0].axes[0].get_yticklabels()}


ODD: dict[str, Callable[[], tuple[list[Trial], list[Parameter]]]] = {
    "no trial": lambda: ([], SPACE),
    "one trial": lambda: (drawn(1), SPACE),
    "no report": lambda: ([trial(1, [], Status.FAILED, parameters={"optimizer.lr": 0.1})], [LR]),
    "all nan": lambda: (
        [trial(n, [math.nan] * 3, Status.FAILED, parameters={"optimizer.lr": 0.1}) for n in (1, 2)],
        [LR],
    ),
    "none finished": lambda: ([t for t in drawn(40) if t.status != "finished"], SPACE),
    "only running": lambda: ([trial(1, [0.5], Status.RUNNING, parameters={"optimizer.lr": 0.1})], [LR]),
    "constant": lambda: (
        [trial(n, [0.5] * 3, parameters={"optimizer.lr": 0.1, "model": "mlp"}) for n in range(1, 9)],
        [LR, MODEL],
    ),
    "constant zero": lambda: (
        [trial(n, [0.0], parameters={"a": 0}) for n in (1, 2)],
        [Parameter("a", "choice", (0,), ("0",))],
    ),
    "no parameters": lambda: (drawn(5), []),
    "a parameter that no trial has": lambda: ([trial(1, [0.5])], [LR, MODEL]),
    "infinite": lambda: (
        [trial(n, [math.inf, 0.5, -math.inf], parameters={"optimizer.lr": 0.1}) for n in (1, 2)],
        [LR],
    ),
    "the ends of floats": lambda: (
        [
            trial(n, [v, -v], parameters={"a": v, "b": n * 10**400, "c": v / 1e250})
            for n, v in enumerate([1.7e308, 1e-320, 5e-324, -1.7e308, 0.5], 1)
        ],
        [Parameter(key, "interval", low=-1.7e308, high=1.7e308) for key in "abc"],
    ),
    "decades without end": lambda: (
        [
            trial(n, [v], parameters={"optimizer.lr": v})
            for n, v in enumerate([1e300, 1e-300, 1e-90, 1.0, 2.0, 1e90], 1)
        ],
        [LR],
    ),
    "mixed values": lambda: (
        [
            trial(n, [0.1 * n], parameters={"a": v})
            for n, v in enumerate([None, True, 1, 1.5, "x", "[1,2]", "x" * 200], 1)
        ],
        [Parameter("a", "choice", (None, True, 1), ("null", "true", "1"))],
    ),
    "names to be typeset": lambda: (
        [
            trial(1, [0.1], parameters={"a.$x^{": "$\\frac{"}),
            trial(2, [0.2], parameters={"a.$x^{": "\N{SNOWMAN}\x07\n"}),
        ],
        [Parameter("a.$x^{", "choice", ("$\\frac{",), ("x",))],
    ),
    "many choices": lambda: (
        [trial(n, [0.1], parameters={"a": f"choice-number-{n}"}) for n in range(80)],
        [Parameter("a", "choice", tuple(f"choice-number-{n}" for n in range(80)), ("",) * 80)],
    ),
    "many rungs": lambda: (
        [trial(n, [0.1] * n, Status.PRUNED, parameters={"optimizer.lr": 0.1}) for n in range(1, 200)],
        [LR],
    ),
    "perturbed values": lambda: (
        [trial(n, [0.1 * n], parameters={"a": 64 * 1.2**n}) for n in range(1, 40)],
        [Parameter("a", "choice", (64, 128), ("64", "128"))],
    ),
}

NUMBERS = ("infinite", "the ends of floats", "decades without end", "constant zero")  # cases that depend on the mode


@pytest.mark.parametrize("name", ODD)
def test_no_sweep_is_too_odd(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    trials, space = ODD[name]()
    metric = "val/$loss_{" if name == "names to be typeset" else "val/loss"
    modes: tuple[Mode, ...] = ("min", "max") if name in NUMBERS else ("min",)
    for mode in modes:
        for png in (
            progress_png(trials, metric=metric, mode=mode),
            parameters_png(trials, space, metric=metric, mode=mode),
        ):
            assert png.startswith(b"\x89PNG\r\n")
            assert ink(png) > 0.002
    assert capfd.readouterr() == ("", "")


def test_without_a_value_the_pictures_say_so(figures: list[Figure]) -> None:
    trials = [trial(1, [math.nan], Status.FAILED, parameters={"optimizer.lr": 0.1})]
    progress_png(trials, metric="val/loss", mode="min")
    parameters_png(trials, [LR], metric="val/loss", mode="min")
    assert [figure.get_suptitle() for figure in figures] == ["no trial has a val/loss"] * 2
    assert [texts(axes) for figure in figures for axes in figure.axes] == [["no value"]] * 3


def test_a_thousand_trials_are_drawn_in_two_seconds() -> None:
    trials = drawn(1000)
    progress_png(trials[:2], metric="val/accuracy", mode="max")  # imports matplotlib
    began = time.process_time()
    progress_png(trials, metric="val/accuracy", mode="max")
    parameters_png(
        trials,
        [*SPACE, *(Parameter(f"x{n}", "interval", low=0.0, high=1.0) for n in range(12))],
        metric="m",
        mode="max",
    )
    took = time.process_time() - began
    assert took < 4 or took < 4 * slowness()  # 0.7 s on an idle machine


def test_the_same_sweep_gives_the_same_picture() -> None:
    assert progress_png(drawn(20), metric="m", mode="max") == progress_png(drawn(20), metric="m", mode="max")
    assert parameters_png(drawn(20), SPACE, metric="m", mode="max") == parameters_png(
        drawn(20), SPACE, metric="m", mode="max"
    )


def test_nobodys_settings_matter_and_none_are_changed(tmp_path: Path) -> None:
    """A matplotlibrc has no effect and is not changed, pyplot is not imported, and stderr is empty without a font
    cache."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nfigure.dpi: 7\naxes.facecolor: black\nbackend: TkAgg\n")
    program = (
        "import logging, sys\n"
        "from tests.sweep.test_pictures import *\n"
        "logging.basicConfig()\n"
        "first = progress_png(drawn(9), metric='m', mode='max') + parameters_png(drawn(9), SPACE, metric='m', mode='max')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "import matplotlib\n"
        "assert matplotlib.rcParams['figure.dpi'] == 7\n"
        "assert logging.getLogger('matplotlib').level == logging.NOTSET\n"
        "print(len(first))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        env={**os.environ, "MATPLOTLIBRC": str(tmp_path), "MPLCONFIGDIR": "/proc/nothing"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    ours = progress_png(drawn(9), metric="m", mode="max") + parameters_png(drawn(9), SPACE, metric="m", mode="max")
    assert int(done.stdout) == len(ours)
    assert logging.getLogger("matplotlib").level == logging.NOTSET
