"""Searchers: all get the same space, counts are exact, a resumed sweep draws what it would have drawn, and a searcher
learns of every trial. No Ray is started."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from raytrainer.config import Parameter
from raytrainer.errors import ConfigError
from raytrainer.ray_internals import METRIC
from raytrainer.storage import Storage
from raytrainer.sweep import RandomSearch
from raytrainer.sweep.journal import WORST, Mode, Report, Trial, TrialJournal
from raytrainer.sweep.sampling import grid_size
from raytrainer.sweep.search import TranslatedSearch, check_search, make_search, total_of
from raytrainer.sweep.suggestions import Suggestions, warm_start
from raytrainer.sweep.trial_state import Status
from raytrainer.sweep.tune_space import RUN, TRIAL, decoded, domain, encoded, nearest, tune_space

LR = Parameter("optimizer.lr", "interval", low=1e-4, high=1e-1, log=True)
WIDTH = Parameter("model.width", "choice", values=(64, 128), texts=("64", "128"))
MODEL = Parameter("net/model", "choice", values=("mlp", "resnet"), texts=("mlp", "resnet"), group=True)
MIXED = Parameter("x", "choice", values=(1, True, None, "1", "[1,2]"), texts=("1", "true", "null", "'1'", "[1,2]"))
DEPTH = Parameter("depth", "range", low=2, high=11, step=3, integer=True)
DOWN = Parameter("down", "range", low=0.5 - 4 * 0.1, high=0.5, step=-0.1)
LAYERS = Parameter("layers", "interval", low=3, high=9, integer=True)
UNITS = Parameter("units", "interval", low=1, high=1000, integer=True, log=True)
STEPS = Parameter("steps", "range", low=1, high=100, step=1, integer=True, log=True)
ONE = Parameter("one", "interval", low=4, high=4, integer=True)
ALL = [LR, WIDTH, MODEL, MIXED, DEPTH, DOWN, LAYERS, UNITS, STEPS, ONE]
OPTUNA = {"_target_": "ray.tune.search.optuna.OptunaSearch"}
BOHB = {"_target_": "ray.tune.search.bohb.TuneBOHB"}
OTHERS = [
    pytest.param(OPTUNA, marks=pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="no optuna")),
    pytest.param(
        BOHB, marks=pytest.mark.skipif(importlib.util.find_spec("hpbandster") is None, reason="no hpbandster")
    ),
]
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="no optuna")


class Sweep:
    """Suggestions with a journal, driven by hand as Tune drives them."""

    def __init__(
        self,
        path: Path,
        node: dict[str, Any] | Searcher | None = None,
        *,
        parameters: list[Parameter] | None = None,
        total: int | None = None,
        mode: Mode = "min",
        seed: int = 7,
    ) -> None:
        self.parameters = [LR, WIDTH] if parameters is None else parameters
        self.mode = mode
        self.journal = TrialJournal.open(Storage(path))
        self.journal.begin({})
        trials = list(self.journal.trials.values())
        if isinstance(node, Searcher):
            self.search = TranslatedSearch(node, self.parameters)
        else:
            self.search = make_search(node, self.parameters, seed=seed, sampled=len(trials))
        self.lost = warm_start(self.search, trials, mode)
        self.handed_out: list[str] = []
        self.suggestions = Suggestions(
            self.search,
            mode=mode,
            total=total,
            journal=self.journal,
            overrides_of=lambda values: [p.override(values[p.key]) for p in self.parameters],
            on_suggest=lambda trial: self.handed_out.append(trial.id),
        )
        self.suggestions.set_search_properties(METRIC, mode, {})

    def suggest(self, n: int) -> list[dict[str, Any]]:
        found = []
        for _ in range(n):
            config = self.suggestions.suggest(f"tune-{len(self.handed_out)}")
            if config == Searcher.FINISHED:
                break
            found.append(config)
        return found

    def tune_id(self, id: str) -> str:  # noqa: A002
        return f"tune-{self.handed_out.index(id)}"

    def report(self, id: str, value: float, evaluation: int = 1) -> None:  # noqa: A002
        """Report in Tune's order: first to the searcher, then to the callback that writes the journal."""
        mode = self.mode
        told = value if math.isfinite(value) else (WORST if mode == "min" else -WORST)
        self.suggestions.on_trial_result(self.tune_id(id), {METRIC: told, "training_iteration": evaluation})
        self.journal.report(id, Report(evaluation, evaluation, value, {}, 0.0))

    def end(
        self,
        id: str,  # noqa: A002
        status: Status = Status.FINISHED,
        *,
        cause: str | None = None,
        diverged: bool = False,
    ) -> None:
        last = self.journal.trials[id].reports[-1:]
        result: dict[str, Any] = {METRIC: WORST, "training_iteration": 1}
        if last:
            result = {METRIC: last[0].value, "training_iteration": last[0].evaluation}
        if status != "pruned":
            result["end"] = json.dumps({"status": status, "cause": cause, "diverged": diverged})
        self.suggestions.on_trial_complete(self.tune_id(id), result)
        self.journal.end(id, status, cause)

    def close(self) -> None:
        self.journal.close()


class Recorder(Searcher):  # type: ignore[misc]
    """A searcher that returns prepared draws and records what it is given."""

    def __init__(self, *draws: Any) -> None:
        super().__init__()
        self.draws, self.told = list(draws), list[Any]()

    def set_search_properties(self, metric: str, mode: str, config: Any, **spec: Any) -> bool:
        self._metric, self.space = metric, config
        return True

    def suggest(self, trial_id: str) -> Any:
        return self.draws.pop(0) if self.draws else self.FINISHED

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        self.told.append((trial_id, "result", result[METRIC]))

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.told.append((trial_id, "end", "error" if error else result and result[METRIC]))

    def on_pause(self, trial_id: str) -> None:
        self.told.append((trial_id, "pause", None))


class Learner(Recorder):
    """A recorder that also takes evaluated points."""

    def add_evaluated_point(self, parameters: Any, value: Any, error: bool = False, **more: Any) -> None:
        self.told.append((parameters, "point", "error" if error else value))


# --- the space ------------------------------------------------------------------------------------------------------


@st.composite
def parameters(draw: st.DrawFn) -> Parameter:
    kind = draw(st.sampled_from(["choice", "range", "interval"]))
    if kind == "choice":
        values = draw(st.lists(st.one_of(st.integers(-5, 5), st.floats(-2, 2)), min_size=1, max_size=5, unique_by=repr))
        return Parameter("k", kind, tuple(values), tuple(repr(v) for v in values))
    integer, log = draw(st.booleans()), draw(st.booleans())
    low: float = draw(st.integers(1, 50)) if integer else draw(st.floats(1e-6, 10))
    if kind == "range":
        steps: list[float] = [1, -1] if integer and log else [1, 2, 7, -3] if integer else [0.1, 0.25, -1.0]
        step = draw(st.sampled_from(steps))
        # Counts as Hydra does: exact sums of the step, from the bound that is written first.
        count = draw(st.integers(0, 40))
        first = low if step > 0 else low - step * count
        last = type(low)(Decimal(first) + Decimal(step) * count)
        low, high = min(first, last), max(first, last)
        return Parameter("k", kind, low=low, high=high, step=step, log=log and integer, integer=integer)
    high = low + (draw(st.integers(0, 1000)) if integer else draw(st.floats(1e-6, 100)))
    return Parameter("k", kind, low=low, high=high, log=log, integer=integer)


@given(parameters(), st.integers(0, 2**31), st.data())
def test_every_draw_is_in_the_space_and_survives_both_ways(p: Parameter, seed: int, data: st.DataObject) -> None:
    value = decoded(p, domain(p).sample(random_state=np.random.RandomState(seed)))
    assert p.contains(value)
    assert type(value) in (int, float)
    assert repr(decoded(p, encoded(p, value))) == repr(value)
    assert domain(p).is_valid(encoded(p, value))
    outside = data.draw(st.one_of(st.floats(allow_nan=False), st.integers(-(2**70), 2**70)))
    found = nearest(p, outside)
    assert p.contains(found)
    assert abs(found - outside) <= abs(value - outside) * (1 + 1e-9)
    if p.contains(outside):
        assert abs(found - outside) <= 3e-6 * max(1.0, abs(outside)), "what is in the space stays, but for rounding"


def test_both_ends_are_drawn() -> None:
    for p, ends in [(LAYERS, (3, 9)), (DEPTH, (2, 11)), (DOWN, (0.1, 0.5)), (WIDTH, (64, 128)), (ONE, (4, 4))]:
        state = np.random.RandomState(0)
        drawn = {decoded(p, domain(p).sample(random_state=state)) for _ in range(300)}
        assert (min(drawn), max(drawn)) == pytest.approx(ends)
        if p.kind == "range":
            assert len(drawn) == len(p.grid()), "every value, and no other"


def test_values_keep_their_types() -> None:
    for value, text in zip(MIXED.values, MIXED.texts, strict=True):
        assert encoded(MIXED, value) == text
        assert repr(decoded(MIXED, text)) == repr(value)
        assert repr(decoded(MIXED, np.str_(text))) == repr(value)
    assert repr(decoded(LR, np.float64(0.01))) == "0.01"
    assert repr(decoded(DEPTH, np.int64(1))) == "5"


def test_what_is_no_value_is_refused() -> None:
    for p, value in [(LR, math.nan), (LR, "fast"), (DEPTH, True), (MODEL, "vit"), (MODEL, 3), (WIDTH, None)]:
        with pytest.raises(ConfigError, match="was sampled with a value"):
            nearest(p, value)


def test_a_log_scale_is_one() -> None:
    for p in (UNITS, LR, STEPS):
        drawn = [decoded(p, domain(p).sample(random_state=np.random.RandomState(n))) for n in range(400)]
        assert p.low is not None
        assert p.high is not None
        below = sum(value < math.sqrt(p.low * p.high) for value in drawn)
        assert 140 < below < 260, "half of the draws below the geometric mean"


# --- our own searchers ----------------------------------------------------------------------------------------------


def drawn(seed: int, *numbers: int, space: list[Parameter] | None = None) -> list[dict[str, Any]]:
    search = RandomSearch(seed)
    search.set_search_properties("loss", "min", tune_space([LR, WIDTH] if space is None else space))
    return [search.draw(n) or {} for n in numbers]


def test_a_random_draw_is_a_function_of_seed_and_number() -> None:
    assert drawn(1, 0, 1, 2) == list(reversed(drawn(1, 2, 1, 0)))
    assert drawn(1, 0) != drawn(1, 1)
    assert drawn(1, 0) != drawn(2, 0)
    # This value must never change, so that a sweep that an earlier version began can continue.
    assert drawn(1, 0)[0] == {"optimizer.lr": pytest.approx(0.0005272621717328072, rel=1e-12), "model.width": "64"}


def test_a_grid_is_in_hydras_order_and_complete(tmp_path: Path) -> None:
    lower = Parameter("lower", "range", low=2, high=8, step=-3, integer=True)
    space = [WIDTH, DOWN, lower, MODEL]
    sweep = Sweep(tmp_path, {"_target_": "raytrainer.sweep.GridSearch"}, parameters=space)
    configs = sweep.suggest(100)
    expected = list(itertools.product((64, 128), DOWN.grid(), (8, 5, 2), ("mlp", "resnet")))
    assert [(c["model.width"], c["down"], c["lower"], c["net/model"]) for c in configs] == expected
    assert len(configs) == grid_size(space) == 60
    assert sweep.suggest(1) == []
    assert grid_size([]) == 1


def test_how_many_trials_there_will_be() -> None:
    grid = {"_target_": "raytrainer.sweep.GridSearch"}
    assert [total_of(grid, [WIDTH, MODEL], n) for n in (None, 3, 9)] == [4, 3, 4]
    assert [total_of(None, [WIDTH, LR], n) for n in (None, 3)] == [None, 3]
    assert [total_of(None, [WIDTH, STEPS], n) for n in (None, 3, 999)] == [200, 3, 200]
    assert [total_of(None, [WIDTH], n, distinct=False) for n in (None, 9)] == [None, 9]
    assert [total_of(OPTUNA, [WIDTH], n) for n in (None, 9)] == [None, 9]


def test_random_draws_of_a_finite_space_are_each_combination_once(tmp_path: Path) -> None:
    space = [WIDTH, MODEL, STEPS, DOWN]
    sweep = Sweep(tmp_path / "a", parameters=space)
    configs = sweep.suggest(10_000)
    drawn = [tuple(c[p.key] for p in space) for c in configs]
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 100 * 5
    assert sweep.suggest(1) == []
    again = Sweep(tmp_path / "b", parameters=space)
    assert [tuple(c[p.key] for p in space) for c in again.suggest(50)] == drawn[:50]
    again.close()
    on = Sweep(tmp_path / "b", parameters=space)
    for trial in list(on.journal.trials):
        on.journal.end(trial, Status.FINISHED)
    on.close()
    on = Sweep(tmp_path / "b", parameters=space)
    assert [tuple(c[p.key] for p in space) for c in on.suggest(30)] == drawn[50:80]
    steps = [c["steps"] for c in configs[:200]]
    assert sorted(steps)[100] < 25  # drawn on a logarithmic scale
    other = Sweep(tmp_path / "c", parameters=space, seed=8)
    assert [tuple(c[p.key] for p in space) for c in other.suggest(50)] != drawn[:50]


def test_a_population_may_begin_alike() -> None:
    search = make_search(None, [WIDTH], seed=7, distinct=False)
    search.set_search_properties(METRIC, "min", {})
    assert {search.suggest("")["model.width"] for _ in range(50)} == {64, 128}


# --- trials ---------------------------------------------------------------------------------------------------------


def test_so_many_trials_and_no_more(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, total=3)
    configs = sweep.suggest(10)
    assert [c[TRIAL] for c in configs] == ["0001", "0002", "0003"] == sweep.handed_out
    assert sweep.suggestions.trial_of("tune-1") == "0002"
    assert sweep.suggestions.trial_of("tune-7") is None
    sweep.close()
    found = TrialJournal.open(Storage(tmp_path)).trials
    for config, trial in zip(configs, found.values(), strict=True):
        assert trial.parameters == {key: config[key] for key in ("optimizer.lr", "model.width")}
        assert trial.overrides == [f"optimizer.lr={config['optimizer.lr']!r}", f"model.width={config['model.width']}"]


@pytest.mark.parametrize("node", [None, {"_target_": "raytrainer.sweep.GridSearch"}], ids=["random", "grid"])
def test_a_sweep_that_goes_on_draws_what_it_would_have_drawn(tmp_path: Path, node: dict[str, Any] | None) -> None:
    space = [WIDTH, DEPTH] if node else [LR, WIDTH, MIXED]
    whole = Sweep(tmp_path / "whole", node, parameters=space, total=8).suggest(8)
    first = Sweep(tmp_path / "parts", node, parameters=space, total=5)
    assert first.suggest(5) == whole[:5]
    first.report("0001", 0.5)
    first.end("0001")
    first.report("0002", 0.5)
    first.journal.end("0002", Status.STOPPED, "interrupted")
    first.end("0004", Status.FAILED, cause="OSError: no")
    first.close()
    # 0002 was stopped, 0003 and 0005 were running: these three continue first.
    second = Sweep(tmp_path / "parts", node, parameters=space, total=8)
    assert second.suggest(20) == [*(whole[n] for n in (1, 2, 4)), *whole[5:]]
    assert second.handed_out == ["0002", "0003", "0005", "0006", "0007", "0008"]
    assert second.lost is None
    assert {t.status for t in second.journal.trials.values() if t.id in second.handed_out} == {"running"}
    second.close()
    assert Sweep(tmp_path / "parts", node, parameters=space, total=6).suggest(20) == whole[1:3] + whole[4:]


def test_a_trial_goes_on_with_what_an_exploit_left_it(tmp_path: Path) -> None:
    first = Sweep(tmp_path, total=1)
    first.suggest(1)
    first.journal.inherit("0001", "0002", 1, {"optimizer.lr": 0.05, "model.width": 64}, ["optimizer.lr=0.05"])
    first.close()
    (config,) = Sweep(tmp_path, total=1).suggest(5)
    assert (config["optimizer.lr"], config["model.width"]) == (0.05, 64)


def test_what_a_searcher_draws_is_put_into_the_space(tmp_path: Path) -> None:
    inner = Recorder(
        {"optimizer.lr": 7.0, "model.width": "128", "__trial_index__": 3},
        {"optimizer.lr": np.float64(1e-9), "model.width": np.str_("64")},
        None,
        {"optimizer.lr": 0.01},
    )
    sweep = Sweep(tmp_path, inner, total=9)
    first, second = sweep.suggest(2)
    assert (first["optimizer.lr"], first["model.width"]) == (0.1, 128)
    assert "__trial_index__" not in first
    assert (second["optimizer.lr"], second["model.width"]) == (1e-4, 64)
    assert type(second["optimizer.lr"]) is float
    assert sweep.suggestions.suggest("later") is None, "it waits for others"
    with pytest.raises(ConfigError, match=r"^model\.width .*Recorder"):
        sweep.suggestions.suggest("later")
    assert list(sweep.journal.trials) == ["0001", "0002"]


def test_parameters_may_be_called_trial_and_run(tmp_path: Path) -> None:
    parameters = [Parameter(key, "choice", values=(7,), texts=("7",)) for key in ("trial", "run")]
    assert Sweep(tmp_path, parameters=parameters).suggestions.suggest("tune-0") == {
        TRIAL: "0001",
        RUN: "",
        "trial": 7,
        "run": 7,
    }


# --- what a searcher learns -----------------------------------------------------------------------------------------


DRAW = {"optimizer.lr": 0.01, "model.width": "64"}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_searcher_learns_the_best_value_and_of_nan_the_worst(tmp_path: Path, mode: Mode) -> None:
    inner = Recorder(*[DRAW] * 4)
    sweep = Sweep(tmp_path, inner, mode=mode)
    sweep.suggest(4)
    worst_of_all, best, worst = (WORST, 1.0, 3.0) if mode == "min" else (-WORST, 3.0, 1.0)
    sweep.report("0001", math.nan)
    sweep.report("0002", 2.0)
    sweep.report("0002", 1.0, 2)
    sweep.report("0002", 3.0, 3)
    sweep.report("0003", math.inf)
    sweep.end("0002", Status.PRUNED)
    sweep.end("0003")
    # It had a good value before it diverged, but its parameters count as bad.
    sweep.report("0004", best)
    sweep.end("0004", Status.FAILED, cause="NonFiniteLoss: the loss is nan", diverged=True)
    assert inner.told == [
        ("tune-0", "result", worst_of_all),
        ("tune-1", "result", 2.0),
        ("tune-1", "result", 1.0),
        ("tune-1", "result", 3.0),
        ("tune-2", "result", worst),
        ("tune-1", "end", best),
        ("tune-2", "end", worst),
        ("tune-3", "result", best),
        ("tune-3", "end", worst),
    ]


def test_a_searcher_learns_of_failures_and_early_ends(tmp_path: Path) -> None:
    inner = Recorder(*[DRAW] * 5)
    sweep = Sweep(tmp_path, inner)
    sweep.suggest(5)
    sweep.report("0001", 1.0)
    sweep.end("0001", Status.FAILED, cause="OSError: disk")
    sweep.suggestions.on_trial_complete("tune-1", None, error=True)  # its process died
    sweep.suggestions.on_trial_complete("tune-2", None)  # it never began
    sweep.report("0004", 2.0)
    sweep.suggestions.on_trial_complete("tune-3", None)  # stopped while it was paused: Tune passes no result
    sweep.end("0005", Status.FAILED, cause="NonFiniteLoss: at step 1", diverged=True)
    sweep.suggestions.on_trial_complete("nobody's", None)
    ends = [told for told in inner.told if told[1] == "end"]
    assert ends == [
        ("tune-0", "end", "error"),
        ("tune-1", "end", "error"),
        ("tune-2", "end", None),
        ("tune-3", "end", 2.0),
        ("tune-4", "end", 2.0),
    ]


def history() -> list[Trial]:
    """Return one trial of each kind; 0006 and 0007 continue."""
    made = []
    for n, (status, cause, values) in enumerate(
        [
            ("finished", None, [3.0, 1.0, 2.0]),
            ("pruned", None, [4.0]),
            ("failed", "NonFiniteLoss: nan", [0.1]),
            ("failed", "OSError: disk", [0.2]),
            ("finished", None, [math.nan]),
            ("running", None, [0.3]),
            ("stopped", "interrupted", []),
            ("pruned", "by hand", []),
        ],
        start=1,
    ):
        trial = Trial(f"{n:04d}", {"optimizer.lr": 0.001 * n, "model.width": 64}, [], 0.0)
        trial.status, trial.cause = Status(status), cause
        trial.reports = [Report(e, e, value, {}, 0.0) for e, value in enumerate(values, start=1)]
        made.append(trial)
    return made


def test_history_is_told() -> None:
    inner = Learner()
    search = TranslatedSearch(inner, [LR, WIDTH])
    assert warm_start(search, history(), "min") is None
    assert [(point["optimizer.lr"], point["model.width"], told) for point, _, told in inner.told] == [
        (0.001, "64", 1.0),
        (0.002, "64", 4.0),
        (0.003, "64", 4.0),
        (0.004, "64", "error"),
        (0.005, "64", 4.0),
    ]
    assert search.metric == METRIC


def test_of_a_function_stopped_in_the_middle_its_last_value_is_told() -> None:
    trials = history()[:2]
    trials[0].reports[:2] = [replace(report, interim=True) for report in trials[0].reports[:2]]
    trials[1].reports = [Report(e, e, value, {}, 0.0, interim=True) for e, value in ((1, 0.5), (2, 4.0))]
    inner = Learner()
    warm_start(TranslatedSearch(inner, [LR, WIDTH]), trials, "min")
    assert [told for _, _, told in inner.told] == [2.0, 4.0]


def test_what_is_lost_of_a_history_is_said() -> None:
    assert warm_start(TranslatedSearch(Recorder(), [LR, WIDTH]), [], "min") is None
    said = warm_start(TranslatedSearch(Recorder(), [LR, WIDTH]), history(), "min")
    assert said == "Recorder cannot learn from the 6 ended trials and starts from scratch"
    other = Parameter("dropout", "interval", low=0.0, high=1.0)
    said = warm_start(TranslatedSearch(Learner(), [LR, other]), history(), "min")
    assert said == "Learner cannot learn from 5 ended trials, which are outside the current search space"
    assert warm_start(TranslatedSearch(RandomSearch(), [LR]), history(), "min") is None


def test_a_trial_that_goes_on_is_told_when_it_ends(tmp_path: Path) -> None:
    for n, inner in enumerate([Recorder(DRAW), Learner(DRAW)]):
        place = tmp_path / str(n)
        first = Sweep(place, Recorder(DRAW), total=2)
        first.suggest(1)
        first.report("0001", 0.5)
        first.close()
        second = Sweep(place, inner, total=2)
        second.suggest(2)
        second.report("0001", 0.7, 2)  # a searcher that did not draw the trial does not know its id
        second.suggestions.on_pause("tune-0")
        second.end("0001")
        second.report("0002", 0.9)
        second.suggestions.on_pause("tune-1")
        second.end("0002")
        points = [told for told in inner.told if told[1] == "point"]
        assert points == ([({"optimizer.lr": 0.01, "model.width": "64"}, "point", 0.5)] if n else [])
        others = [told for told in inner.told if told[1] != "point"]
        assert others == [("tune-1", "result", 0.9), ("tune-1", "pause", None), ("tune-1", "end", 0.9)]


# --- searchers of other libraries -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # BOHB's own libraries warn
@pytest.mark.parametrize("node", OTHERS, ids=["optuna", "bohb"])
def test_others_search_the_whole_space(tmp_path: Path, node: dict[str, Any]) -> None:
    sweep = Sweep(tmp_path, node, parameters=ALL, total=25)
    for n in range(25):
        (config,) = sweep.suggest(1)
        assert all(p.contains(config[p.key]) for p in ALL), config
        id_ = config[TRIAL]
        if n % 5 == 0:
            sweep.suggestions.on_pause(sweep.tune_id(id_))
            sweep.suggestions.on_unpause(sweep.tune_id(id_))
        value = math.nan if n % 7 == 3 else (math.log10(config["optimizer.lr"]) + 2) ** 2
        told = WORST if math.isnan(value) else value
        result = {METRIC: told, "training_iteration": 1, "hyperband_info": {"budget": 1}}
        sweep.suggestions.on_trial_result(sweep.tune_id(id_), result)
        sweep.journal.report(id_, Report(1, 1, value, {}, 0.0))
        sweep.suggestions.on_trial_complete(sweep.tune_id(id_), result)
        sweep.journal.end(id_, Status.FINISHED)
    assert sweep.suggest(1) == []
    assert len({config.parameters["optimizer.lr"] for config in sweep.journal.trials.values()}) > 20


@needs_optuna
def test_optuna_is_told_of_the_journal(tmp_path: Path) -> None:
    first = Sweep(tmp_path, OPTUNA, parameters=ALL, total=12)
    for config in first.suggest(12):
        value = (math.log10(config["optimizer.lr"]) + 2) ** 2
        first.report(config[TRIAL], value)
        failed = config[TRIAL] == "0003"
        first.end(config[TRIAL], Status.FAILED if failed else Status.FINISHED, cause="OSError: no" if failed else None)
    first.close()
    told, blank = Sweep(tmp_path, OPTUNA, parameters=ALL, total=20), TranslatedSearch
    assert told.lost is None
    study = told.search.inner._ot_study
    assert [t.state.name for t in study.trials].count("COMPLETE") == 11
    assert [t.state.name for t in study.trials].count("FAIL") == 1
    best = min(t.best("min").value for t in told.journal.trials.values() if t.status == "finished")  # type: ignore[union-attr]
    assert study.best_value == best
    # With these reports it draws differently than without them, and differently than at its first start.
    blank = make_search(OPTUNA, ALL, seed=7, sampled=12)
    blank.set_search_properties(METRIC, "min", {})
    configs = told.suggest(8)
    unknowing = [blank.suggest(f"t{n}") for n in range(8)]
    rates = [c["optimizer.lr"] for c in configs]
    assert rates != [c["optimizer.lr"] for c in unknowing]
    assert not set(rates) & {t.parameters["optimizer.lr"] for t in list(told.journal.trials.values())[:12]}
    assert sum(1e-3 < rate < 1e-1 for rate in rates) >= 6, "near what did well"


@needs_optuna
def test_optuna_begins_other_random_numbers_when_a_sweep_goes_on() -> None:
    def begun(seed: int, sampled: int) -> float:
        search = make_search(OPTUNA, [LR], seed=seed, sampled=sampled)
        search.set_search_properties(METRIC, "min", {})
        return float(search.suggest("t")["optimizer.lr"])

    assert begun(7, 0) == begun(7, 0)
    assert len({begun(7, 0), begun(7, 4), begun(7, 5), begun(8, 4)}) == 4


@needs_optuna
def test_seeds_go_where_the_node_leaves_them_open() -> None:
    assert make_search(OPTUNA, [LR], seed=5).inner._seed == 5
    assert make_search({**OPTUNA, "seed": None}, [LR], seed=5).inner._seed == 5
    assert make_search({**OPTUNA, "seed": 3}, [LR], seed=5).inner._seed == 3
    assert make_search({"_target_": "raytrainer.sweep.RandomSearch"}, [LR], seed=5, sampled=9).inner.seed == 5
    assert make_search({"_target_": "raytrainer.sweep.RandomSearch", "seed": 0}, [LR], seed=5).inner.seed == 0
    assert make_search(None, [LR], seed=5).inner.seed == 5
    sampler = {"_target_": "optuna.samplers.RandomSampler"}
    one, two = (make_search({**OPTUNA, "sampler": sampler}, [LR], seed=5) for _ in range(2))
    for search in (one, two):
        search.set_search_properties(METRIC, "min", {})
    assert one.inner._seed is None
    assert one.suggest("t") == two.suggest("t")


@needs_optuna
def test_optuna_announces_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    logger, handler = logging.getLogger("optuna"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        sweep = Sweep(tmp_path, OPTUNA, total=1)
        sweep.suggest(1)
        sweep.report("0001", 1.0)
        sweep.end("0001")
    finally:
        logger.removeHandler(handler)
    assert said == []


# --- before Ray starts ----------------------------------------------------------------------------------------------


def test_a_missing_library_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("optuna", "ConfigSpace") else found(name, *a)
    )
    with pytest.raises(ConfigError, match=r"^sweep\.search_alg\._target_=ray.*OptunaSearch .*: pip install optuna$"):
        check_search(OPTUNA)
    with pytest.raises(ConfigError, match=r"pip install .*ConfigSpace$"):
        check_search(BOHB)
    with pytest.raises(ConfigError, match="pip install optuna"):
        check_search({"_target_": "raytrainer.sweep.RandomSearch", "seed": {"_target_": "optuna.samplers.TPESampler"}})
    check_search({"_target_": "raytrainer.sweep.RandomSearch"})
    check_search(None)


def test_an_invalid_searcher_is_refused() -> None:
    nodes: list[tuple[dict[str, Any], str]] = [
        ({"_target_": "collections.OrderedDict"}, "is not a ray.tune.search.Searcher$"),
        ({"_target_": "ray.tune.search.BasicVariantGenerator"}, "leave sweep.search_alg null for random draws"),
        ({"_target_": "raytrainer.sweep.RandomSerch"}, "RandomSearch"),
        ({"_target_": "raytrainer.sweep.RandomSearch", "sede": 1}, "is not an argument of .*seed"),
        ({"_target_": "raytrainer.sweep.RandomSearch", "seed": "x"}, "must be a whole number or null"),
        ({"_target_": "ray.tune.search.ConcurrencyLimiter", "metric": "x"}, "is given by raytrainer|required"),
    ]
    for node, said in nodes:
        with pytest.raises(ConfigError, match=said):
            check_search(node)
        with pytest.raises(ConfigError, match=said):
            make_search(node, [LR], seed=1)


def test_an_interval_has_no_grid() -> None:
    node = {"_target_": "raytrainer.sweep.GridSearch"}
    check_search(node, [WIDTH, DEPTH])
    with pytest.raises(ConfigError, match=r"^optimizer\.lr=interval\(0\.0001,0\.1\) .*grid"):
        check_search(node, [WIDTH, LR])


def test_a_space_that_a_searcher_cannot_have_is_refused(tmp_path: Path) -> None:
    class Narrow(Recorder):
        def set_search_properties(self, metric: str, mode: str, config: Any, **spec: Any) -> bool:
            raise ValueError("no choices here")

    with pytest.raises(ConfigError, match=r"^sweep\.search_alg .*: no choices here"):
        Sweep(tmp_path, Narrow())
