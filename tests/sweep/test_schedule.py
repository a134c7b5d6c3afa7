"""Schedulers: configured in evaluations, refused if they cannot work, and with the same decisions after a restart. They
are driven by hand; no Ray is started."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.search_generator import SearchGenerator

from raytrainer.config import Parameter
from raytrainer.errors import ConfigError
from raytrainer.ray_internals import METRIC
from raytrainer.sweep import RandomSearch
from raytrainer.sweep.journal import Mode, Report, Trial, worst
from raytrainer.sweep.schedule import make_scheduler, pauses, replay
from raytrainer.sweep.trial_state import Status
from raytrainer.sweep.tune_space import RUN, TRIAL

LR = Parameter("optimizer.lr", "interval", low=1e-4, high=1e-1, log=True)
DECAY = Parameter("decay", "interval", low=0.0, high=0.3)
DEPTH = Parameter("depth", "range", low=2, high=11, step=3, integer=True)
LONG = Parameter("long", "range", low=0, high=10**6, step=5, integer=True)
UNITS = Parameter("units", "interval", low=1, high=64, integer=True, log=True)
MOMENTUM = Parameter("momentum", "choice", values=(0.8, 0.9, 0.95), texts=("0.8", "0.9", "0.95"))
MODEL = Parameter("model", "choice", values=("mlp", "resnet"), texts=("mlp", "resnet"), group=True)
NUMBERS = [LR, DECAY, DEPTH, LONG, UNITS, MOMENTUM]

KINDS = {
    "asha": "ASHAScheduler",
    "hyperband": "HyperBandScheduler",
    "bohb": "HyperBandForBOHB",
    "median": "MedianStoppingRule",
    "pbt": "PopulationBasedTraining",
    "pb2": "pb2.PB2",
    "fifo": "FIFOScheduler",
}


def node(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"ray.tune.schedulers.{KINDS[kind]}", **arguments}


def made(
    kind: str,
    parameters: list[Parameter] | None = None,
    *,
    mode: Mode = "min",
    evaluations: int | None = 9,
    **more: Any,
) -> Any:
    return make_scheduler(node(kind, **more), parameters or [LR], mode=mode, evaluations=evaluations)


class TuneTrial:
    """What schedulers read from a trial of Tune."""

    def __init__(self, trial_id: str, id: str, parameters: dict[str, Any] | None = None) -> None:  # noqa: A002
        self.trial_id, self.experiment_tag, self.status = trial_id, "", "RUNNING"
        self.config = {TRIAL: id, RUN: f"run-{id}", **(parameters or {})}
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        )
        self.evaluated_params: dict[str, Any] = {}

    def is_finished(self) -> bool:
        return False


class Controller:
    """A controller without waiting trials."""

    search_alg = None

    def get_live_trials(self) -> list[Any]:
        return []


# --- construction ---------------------------------------------------------------------------------------------------


def test_none_lets_every_trial_go_to_its_end() -> None:
    scheduler = make_scheduler(None, [LR], mode="min", evaluations=None)
    assert type(scheduler) is FIFOScheduler
    assert not pauses(scheduler)
    assert replay(scheduler, ended([1.0]), "min") is None


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_built_with_the_sweeps_metric_and_time(kind: str) -> None:
    scheduler = made(kind, mode="max")
    assert isinstance(scheduler, TrialScheduler)
    if kind != "fifo":
        assert (scheduler._metric, scheduler._mode, scheduler._time_attr) == (METRIC, "max", "training_iteration")


def test_who_pauses_trials() -> None:
    assert {kind for kind in KINDS if pauses(made(kind))} == {"hyperband", "bohb", "pbt", "pb2"}
    assert pauses(made("median", hard_stop=False))
    assert pauses(made("median", min_time_slice=2))


@pytest.mark.parametrize("kind", ["asha", "hyperband", "bohb"])
def test_max_t_is_the_length_of_a_trial_where_it_is_open(kind: str) -> None:
    def max_t(**arguments: Any) -> int:
        scheduler = made(kind, **arguments)
        return int(scheduler._max_t if kind == "asha" else scheduler._max_t_attr)

    assert [max_t(), max_t(max_t=None), max_t(max_t=4), max_t(max_t=4, evaluations=None)] == [9, 9, 4, 4]
    with pytest.raises(ConfigError, match=r"sweep\.scheduler\.max_t must be given"):
        made(kind, evaluations=None)


def test_time_is_counted_in_evaluations() -> None:
    assert made("median")._grace_period == 1
    assert made("median", grace_period=3)._grace_period == 3
    assert made("pbt")._perturbation_interval == 1
    assert made("pbt", perturbation_interval=4)._perturbation_interval == 4
    assert not made("pbt")._log_config, "the journal has it"
    with pytest.raises(ConfigError, match=r"grace_period=10 is more than the 9 evaluations"):
        made("asha", grace_period=10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"_target_": "ray.tune.schedulers.AshaScheduler"}, "ASHAScheduler"),
        ({"_target_": "collections.OrderedDict"}, "is not a ray.tune.schedulers.TrialScheduler"),
        (node("asha", metric="val/loss"), "is given by raytrainer; leave it out"),
        (node("asha", time_attr="time_total_s"), "is given by raytrainer; leave it out"),
        (node("pbt", hyperparam_mutations={}), "is given by raytrainer; leave it out"),
        (node("asha", grace="x"), "is not an argument of .*grace_period"),
        (node("asha", reduction_factor=1), "could not be built: Reduction Factor not valid!"),
        (node("pbt", quantile_fraction=0.9), "could not be built: You must set `quantile_fraction`"),
    ],
)
def test_what_cannot_be_built_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_scheduler(wrong, [LR], mode="min", evaluations=9)


@pytest.mark.skipif(importlib.util.find_spec("hpbandster") is None, reason="no hpbandster")
def test_bohb_needs_its_brackets() -> None:
    search = {"_target_": "ray.tune.search.bohb.TuneBOHB"}
    make_scheduler(node("bohb"), [LR], mode="min", evaluations=9, search=search)
    for other in (None, node("asha"), node("hyperband")):
        with pytest.raises(ConfigError, match=r"sweep\.scheduler.* is needed by TuneBOHB"):
            make_scheduler(other, [LR], mode="min", evaluations=9, search=search)


# --- population based training --------------------------------------------------------------------------------------


def explored(kind: str, parameters: list[Parameter], seed: int, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of a trial that takes over another trial's, and the config of that other trial."""
    random.seed(seed)
    state = np.random.RandomState(seed)
    scheduler = made(kind, parameters, **more)
    values = {p.key: p.probes()[state.randint(len(p.probes()))] for p in parameters}
    worse, better = TuneTrial("t1", "0001", values), TuneTrial("t2", "0002", values)
    found, _ = scheduler._get_new_config(worse, better)
    return found, better.config


def test_what_is_perturbed_stays_in_its_bounds_and_keeps_its_name() -> None:
    seen: dict[str, set[Any]] = {p.key: set() for p in NUMBERS}
    for seed in range(200):
        found, source = explored("pbt", NUMBERS, seed)
        assert (found[TRIAL], found[RUN]) == ("0001", "run-0001")
        assert source[TRIAL] == "0002"
        for p in NUMBERS:
            assert p.contains(found[p.key]), p
            assert type(found[p.key]) is type(p.probes()[0])
            seen[p.key].add(found[p.key])
    assert all(len(values) > 2 for values in seen.values()), "each of them changes"


def test_a_list_goes_to_a_neighbour_or_is_drawn_anew() -> None:
    scheduler = made("pbt", [MOMENTUM, DEPTH, LONG], resample_probability=0.0)
    assert scheduler._hyperparam_mutations["momentum"] == [0.8, 0.9, 0.95]
    assert scheduler._hyperparam_mutations["depth"] == [2, 5, 8, 11]
    worse, better = (TuneTrial(i, i, {"momentum": 0.8, "depth": 8, "long": 500}) for i in ("a", "b"))
    random.seed(0)
    found = [scheduler._get_new_config(worse, better)[0] for _ in range(50)]
    assert {config["momentum"] for config in found} == {0.8, 0.9}
    assert {config["depth"] for config in found} == {5, 11}
    assert {config["long"] for config in found} == {400, 600}


@given(st.floats(1e-4, 1e-1), st.floats(0.0, 0.3), st.integers(0, 2**31))
def test_no_perturbation_leaves_the_bounds(lr: float, decay: float, seed: int) -> None:
    random.seed(seed)
    scheduler = made("pbt", [LR, DECAY], perturbation_factors=[5.0, 0.2])
    config = TuneTrial("a", "a", {LR.key: lr, DECAY.key: decay})
    for _ in range(5):
        config.config = scheduler._get_new_config(config, config)[0]
        assert LR.contains(config.config[LR.key])
        assert DECAY.contains(config.config[DECAY.key])


def test_pb2_gets_its_bounds() -> None:
    scheduler = made("pb2", [LR, DECAY])
    assert scheduler._hyperparam_bounds == {"optimizer.lr": [1e-4, 1e-1], "decay": [0.0, 0.3]}
    with pytest.raises(ConfigError, match=r"momentum .*PB2 takes intervals"):
        made("pb2", [LR, MOMENTUM])


def test_population_based_training_takes_what_draws_at_random() -> None:
    scheduler = made("pbt")
    generator = SearchGenerator(RandomSearch())
    scheduler.on_trial_add(SimpleNamespace(search_alg=generator), TuneTrial("t1", "0001", {"optimizer.lr": 0.01}))
    search: dict[str, Any]
    for search in ({"_target_": "raytrainer.sweep.GridSearch"}, {"_target_": "ray.tune.search.optuna.OptunaSearch"}):
        with pytest.raises(ConfigError, match=r"leave sweep\.search_alg null"):
            make_scheduler(node("pbt"), [LR], mode="min", evaluations=9, search=search)
    search = {"_target_": "raytrainer.sweep.RandomSearch"}
    make_scheduler(node("pbt"), [LR], mode="min", evaluations=9, search=search)


def test_what_cannot_change_in_a_trial_is_refused() -> None:
    for kind in ("pbt", "pb2"):
        with pytest.raises(ConfigError, match=r"\bmodel .*cannot change"):
            made(kind, [LR, MODEL])
        with pytest.raises(ConfigError, match="depth changes what a checkpoint means"):
            make_scheduler(
                node(kind), [LR, DEPTH], mode="min", evaluations=9, may_change=lambda key: key.startswith("optimizer.")
            )
    # Other schedulers do not change a trial's parameters.
    make_scheduler(node("asha"), [LR, MODEL], mode="min", evaluations=9, may_change=lambda key: False)


# --- resumed sweeps -------------------------------------------------------------------------------------------------


class Life:
    """Trials that report in turn to a scheduler, in Tune's order of calls, with the records that a journal would
    have."""

    def __init__(self, scheduler: Any, values: list[list[float]], mode: Mode, attempt: str) -> None:
        self.scheduler, self.values, self.mode, self.attempt = scheduler, values, mode, attempt
        self.trials = [Trial(f"{n:04d}", {}, [], 0.0) for n in range(1, len(values) + 1)]
        self.tunes: dict[int, TuneTrial] = {}
        self.decisions: list[tuple[int, int, str]] = []

    def step(self, n: int) -> None:
        """Evaluate trial n once more, if it is still running."""
        trial = self.trials[n]
        if trial.status != "running":
            return
        self._begin(n)
        evaluation = len(trial.reports) + 1
        value = self.values[n][evaluation - 1]
        told = value if math.isfinite(value) else worst(self.mode)
        result = {"training_iteration": evaluation, METRIC: told}
        trial.reports.append(Report(evaluation, evaluation, value, {}, 0.0))
        done = evaluation == len(self.values[n])
        decision = "STOP" if done else self.scheduler.on_trial_result(Controller(), self.tunes[n], dict(result))
        self.decisions.append((n, evaluation, decision))
        if decision == "STOP":
            self.scheduler.on_trial_complete(Controller(), self.tunes[n], dict(result))
            trial.status = Status.FINISHED if done else Status.PRUNED

    def fail(self, n: int) -> None:
        """Let trial n raise, so that its process reports the worst value."""
        trial = self.trials[n]
        if trial.status != "running":
            return
        self._begin(n)
        result = {"training_iteration": max(len(trial.reports), 1), METRIC: worst(self.mode)}
        self.scheduler.on_trial_complete(Controller(), self.tunes[n], result)
        trial.status, trial.cause = Status.FAILED, "OSError: disk"

    def _begin(self, n: int) -> None:
        if n not in self.tunes:
            self.tunes[n] = TuneTrial(f"{self.attempt}-{n}", self.trials[n].id)
            self.scheduler.on_trial_add(Controller(), self.tunes[n])

    def restart(self, scheduler: Any) -> str | None:
        """Continue in another process, from the journal of a driver that was killed. Trial 0002 was stopped before."""
        self.scheduler, self.attempt, self.tunes = scheduler, self.attempt + "+", {}
        running = [trial for trial in self.trials if trial.status == "running"]
        for trial in running:
            trial.status = Status.STOPPED if trial.id == "0002" else Status.RUNNING
        sentence = replay(scheduler, self.trials, self.mode)
        for trial in running:
            trial.status = Status.RUNNING
        return sentence


def ended(*values: list[float]) -> list[Trial]:
    life = Life(FIFOScheduler(), list(values), "min", "a")
    for n, found in enumerate(values):
        for _ in found:
            life.step(n)
    return life.trials


numbers = st.one_of(st.floats(-10, 10), st.sampled_from([math.nan, math.inf]))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("asha", {"reduction_factor": 2}), ("asha", {"grace_period": 2, "stop_last_trials": False}), ("median", {})],
    ids=["asha", "asha-late", "median"],
)
@given(data=st.data())
def test_after_a_restart_decisions_are_those_of_an_uninterrupted_sweep(
    kind: str, arguments: dict[str, Any], data: st.DataObject
) -> None:
    mode: Mode = data.draw(st.sampled_from(["min", "max"]))
    length = data.draw(st.integers(3, 9))
    values = data.draw(st.lists(st.lists(numbers, min_size=length, max_size=length), min_size=2, max_size=6))
    turns = data.draw(st.lists(st.tuples(st.integers(0, len(values) - 1), st.integers(0, 15)), max_size=60))
    cuts = data.draw(st.sets(st.integers(0, 60), max_size=3))

    def lived(interrupted: bool) -> list[tuple[int, int, str]]:
        life = Life(made(kind, mode=mode, evaluations=length, **arguments), values, mode, "a")
        for place, (n, luck) in enumerate([*turns, *((n, 1) for n in range(len(values)) for _ in range(length))]):
            if interrupted and place in cuts:
                assert life.restart(made(kind, mode=mode, evaluations=length, **arguments)) is None
            life.fail(n) if luck == 0 else life.step(n)
        return life.decisions

    assert lived(interrupted=True) == lived(interrupted=False)


def test_the_last_report_of_a_finished_trial_counts_once() -> None:
    for interrupted in (False, True):
        life = Life(made("median"), [[6.0, 6.0, 0.0]] * 3 + [[3.5] * 4], "min", "a")
        for n in (0, 1, 2):
            for _ in range(3):
                life.step(n)
        if interrupted:
            assert life.restart(made("median")) is None
        for _ in range(3):
            life.step(3)
        # The mean of the others is 4; if their last report counted twice, it would be 3.
        assert life.decisions[-1] == (3, 3, "CONTINUE")


def test_a_restart_without_replay_would_decide_otherwise() -> None:
    """Without a replay ASHA does not stop the trial, which shows that the test above can fail."""
    values = [[1.0] * 9, [2.0] * 9, [3.0] * 9]
    life = Life(made("asha"), values, "min", "a")
    for n in (0, 1):
        life.step(n)
    life.scheduler, life.tunes = made("asha"), {}
    life.step(2)
    assert life.decisions[-1] == (2, 1, "CONTINUE")
    life = Life(made("asha"), values, "min", "a")
    for n in (0, 1):
        life.step(n)
    assert life.restart(made("asha")) is None
    life.step(2)
    assert life.decisions[-1] == (2, 1, "STOP")


def test_a_trial_stays_in_the_bracket_that_its_reports_were_put_into() -> None:
    for seed in range(20):
        np.random.seed(seed)  # Tune draws brackets from this generator
        life = Life(made("asha", brackets=2, reduction_factor=2), [[float(n)] * 9 for n in range(4)], "min", "a")
        for n in (0, 1, 2, 3, 0, 1):
            life.step(n)
        life.restart(made("asha", brackets=2, reduction_factor=2))
        for n in range(4):
            if life.trials[n].status == "running":
                life._begin(n)
        for bracket in life.scheduler._brackets:
            recorded = {trial_id for _, rung in bracket._rungs for trial_id in rung}
            assert all(life.scheduler._trial_info[i] is bracket for i in recorded if not i.startswith("earlier"))


def test_what_a_scheduler_cannot_take_back_is_said() -> None:
    trials = ended([1.0, 2.0], [3.0, 4.0])
    said = {
        "hyperband": "HyperBandScheduler cannot restore the reports of the earlier trials: its brackets start from scratch",
        "bohb": "HyperBandForBOHB cannot restore the reports of the earlier trials: its brackets start from scratch",
        "pbt": "PopulationBasedTraining cannot restore the reports of the earlier trials: the trials that continue are "
        "compared only with each other",
    }
    for kind, sentence in said.items():
        assert replay(made(kind), trials, "min") == sentence
        assert replay(made(kind), [], "min") is None
    assert "drawn again" in str(replay(made("asha", brackets=2), trials, "min"))

    class Own(FIFOScheduler):  # type: ignore[misc]
        pass

    assert (
        replay(Own(), trials, "min") == "Own cannot restore the reports of the earlier trials: it starts from scratch"
    )


def test_configs_of_the_group_name_arguments_that_exist(in_tmp: Path) -> None:
    from raytrainer.config import compose

    for choice in ("random", "grid", "asha", "optuna", "pbt"):
        sweep = compose(["experiment=mlp", f"sweep={choice}"]).experiment.sweep
        scheduler = make_scheduler(sweep.scheduler, [LR], mode="min", evaluations=10, search=sweep.search_alg)
        assert pauses(scheduler) == (choice == "pbt")
        if choice in ("asha", "optuna"):
            assert [rung for rung, _ in scheduler._brackets[0]._rungs] == [9, 3, 1]
