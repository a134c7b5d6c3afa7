"""One process trains one trial after another. Each trial gives what it would give in its own process.

The process is driven by hand as Tune drives it, without Ray; tests/integration/test_sweeps.py uses the real command.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # sets environment variables at import

from raytrainer.attempt import Record
from raytrainer.checkpoint import Checkpointer, import_checkpoint, import_note
from raytrainer.config import Parameter, compose, experiment_of
from raytrainer.errors import WorkerError
from raytrainer.storage import Storage
from raytrainer.sweep import stepped
from raytrainer.sweep.journal import WORST
from raytrainer.sweep.trial import TrialProcess, TrialSetup
from raytrainer.sweep.tune_space import RUN, TRIAL
from raytrainer.tracking.sender import LOCAL_ID_TAG
from tests import ranks, training
from tests.launches import OUTSIDE, assert_equal_states
from tests.promises import Within
from tests.tracking.fakes import FakeServer

pytestmark = pytest.mark.usefixtures("in_tmp", "outside")

EPOCHS = 3
LR = Parameter("optimizer.lr", "interval", low=1e-4, high=1e-1, log=True)
_CHANGES = ("nothing", "raises", "diverges", "dtype", "device", "seeds", "threads", "arithmetic", "gradients", "thread")
_RAISES = ("raises", "diverges", "gradients", "exits", "interrupts")
VALUES = (*_CHANGES, "environment", "folder", "warnings", "path", "output", "exits", "interrupts", "hooks", "debugging")
WHAT = Parameter("callbacks.changes.what", "choice", VALUES, VALUES)
CHANGES = ["+callbacks.changes._target_=probes.Changes", "+callbacks.changes.what=nothing"]
SWEEP = ["experiment=mlp", "name=sweep", f"trainer.max_epochs={EPOCHS}", "model.width=16", "model.dropout=0.2"]
SWEEP += ["trainer.log_every_n_steps=1", "checkpoint.min_interval_s=0"]


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the user's package of the tests' launches importable."""
    monkeypatch.syspath_prepend(str(OUTSIDE))


def shared(*overrides: str, parameters: tuple[Parameter, ...] = (LR,), **different: Any) -> TrialSetup:
    found = TrialSetup(
        texts={"": compose([*SWEEP, *overrides]).text},
        parameters=parameters,
        fixed=["scaling.use_gpu=false"],
        run_dir=str(Path("runs/sweep").absolute()),
        metric="val/accuracy",
        mode="max",
        tracking_uri="",
        ship=False,
        workers=1,
        resources={"CPU": 1},
        strategy="PACK",
        gpu=False,
        retries=False,
        pauses=False,
    )
    return replace(found, **different)


def config(number: int, **values: Any) -> dict[str, Any]:
    return {TRIAL: f"{number:04d}", RUN: "", "optimizer.lr": 0.01, **values}


class Process:
    """A process of Tune inside this one. `steps` returns its results until the trial ends, or `stop` of them."""

    def __init__(self, of: TrialSetup, first: Mapping[str, Any]) -> None:
        class Own(TrialProcess):
            def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
                super().setup(config, of)

            def _setup_logdir(self) -> None:
                """Do nothing: Tune's log directory would be below the home directory."""

        self.tune = Own(dict(first))

    def steps(self, stop: int | None = None) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        while len(said) != stop and not (said and said[-1]["done"]):
            said.append(self.tune.step())
        return said

    def then(self, config: Mapping[str, Any], stop: int | None = None) -> list[dict[str, Any]]:
        self.reset(config)
        return self.steps(stop)

    def reset(self, config: Mapping[str, Any]) -> None:
        assert self.tune.reset_config(dict(config))


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    """Yield `process(shared, config)`, whose processes end with the test."""
    made: list[Process] = []

    def make(of: TrialSetup, first: Mapping[str, Any]) -> Process:
        made.append(Process(of, first))
        return made[-1]

    yield make
    for one in made:
        one.tune.cleanup()
    gc.unfreeze()


def reports(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a trial's reports without the metrics that measure time."""
    found = [json.loads(result["report"]) for result in said if "report" in result]
    for report in found:
        del report["metrics"]["train/samples_per_second"]
    return found


def end(said: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said[-1]["end"])
    return found


def steps(trial: str = "0001") -> list[int]:
    """Return the steps that a trial has done, as `probes.Observed` noted them."""
    lines = [json.loads(line) for line in Path("observed").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "step" and line["trial"] == trial]


def of_trial(trial: str) -> Storage:
    """Return the storage of a trial's checkpoints."""
    return Storage(Path("runs/sweep/trials", trial, "checkpoints").absolute())


SLOW = ["data.train._target_=probes.SlowToEnd", "~data.train.split", "+data.train.seconds=2.5"]
SLOW += ["+data.train.rows=800", "trainer.eval_every_n_steps=4"]
SLOW += ["data.global_batch_size=8", "data.prefetch=0", "trainer.max_epochs=null", "trainer.max_steps=8"]
OBSERVED = ["+callbacks.observed._target_=probes.Observed"]


def in_new_process(of: TrialSetup, first: dict[str, Any], backend: str | None = None) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(1, mp_context=ranks.new_processes()) as pool:
        return pool.submit(_alone, of, first, backend).result()


def _alone(of: TrialSetup, first: dict[str, Any], backend: str | None) -> list[dict[str, Any]]:
    with contextlib.nullcontext() if backend is None else training.compiling(backend):
        return Process(of, first).steps()


# --- nothing is carried over -----------------------------------------------------------------------------------------


def test_after_every_kind_of_trial_it_is_as_in_a_new_process(process: Callable[..., Process], tmp_path: Path) -> None:
    of = shared(*CHANGES, parameters=(LR, WHAT))
    measured = config(99, **{WHAT.key: "nothing", "optimizer.lr": 0.0123})
    expected = reports(in_new_process(of, measured))
    assert [report["evaluation"] for report in expected] == [1, 2, 3]
    environment, folder, path, output = dict(os.environ), Path.cwd(), list(sys.path), (sys.stdout, sys.stderr)
    flags = torch.backends.mkldnn.flags, torch.get_float32_matmul_precision(), list(warnings.filters)
    one = process(of, config(1, **{WHAT.key: "nothing"}))
    one.steps(stop=2)  # stopped in the middle
    for number, what in enumerate(VALUES[1:], start=2):
        said = one.then(config(number, **{WHAT.key: what}))
        assert end(said)["status"] == ("failed" if what in _RAISES else end(said)["status"])
        Storage(of.run_dir).delete("trials/0099")
        found = one.then(measured)
        assert end(found) == {"status": "finished"}, what
        assert reports(found) == expected, what
    one.tune.cleanup()
    assert (dict(os.environ), Path.cwd(), list(sys.path)) == (environment, folder, path)
    assert (sys.stdout, sys.stderr) == output
    assert (torch.backends.mkldnn.flags, torch.get_float32_matmul_precision(), list(warnings.filters)) == flags
    assert torch.backends.mkldnn.enabled
    assert not torch.is_anomaly_enabled()
    assert torch._dynamo.config.recompile_limit > 1
    assert gc.isenabled()
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def fewer() -> Iterator[None]:
    """Let torch give up after compiling a function twice, not eight times."""
    with torch._dynamo.config.patch(recompile_limit=2):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_what_was_compiled_for_others_is_not_seen(process: Callable[..., Process], fewer: None, backend: str) -> None:
    """A trial after many compiled ones is still compiled and trains as in a new process, although torch limits
    recompilations."""
    of = shared("trainer.compile=true", "trainer.max_epochs=1")
    expected = reports(in_new_process(of, config(99), backend))
    Storage(of.run_dir).delete("trials/0099")
    with training.compiling(backend):
        one = process(of, config(1))
        one.steps()
        for number in range(2, torch._dynamo.config.recompile_limit + 2):
            one.then(config(number))
        torch._dynamo.utils.counters.clear()
        assert reports(one.then(config(99))) == expected
    assert torch._dynamo.utils.counters["frames"]["ok"]


def test_what_a_trial_held_is_given_back(process: Callable[..., Process]) -> None:
    """A stopped or failed trial leaves neither its model in memory nor a thread."""
    of = shared(*CHANGES, parameters=(LR, WHAT))
    one = process(of, config(1, **{WHAT.key: "nothing"}))
    one.steps(stop=1)
    before = threading.active_count()
    for number, (what, stop) in enumerate([("nothing", 1), ("raises", None), ("nothing", None)] * 3, start=2):
        one.then(config(number, **{WHAT.key: what}), stop)
    one.reset(config(50, **{WHAT.key: "nothing"}))
    gc.collect()
    from raytrainer.trainer import Trainer

    assert not [found for found in gc.get_objects() if isinstance(found, Trainer)]
    assert threading.active_count() <= before


# --- a stopped trial -------------------------------------------------------------------------------------------------


def test_a_stopped_trial_ends_between_two_steps(process: Callable[..., Process]) -> None:
    """A trial that is stopped at its first evaluation does not take another step."""
    one = process(shared(*OBSERVED), config(1))
    first = one.steps(stop=1)
    assert [report["step"] for report in reports(first)] == [11]
    assert not first[-1]["done"]
    within = Within(1.0)
    one.reset(config(2))
    within.check()
    assert steps() == list(range(1, 12))
    assert reports(one.steps())[-1]["evaluation"] == EPOCHS
    assert steps("0002") == list(range(1, 34))
    assert steps() == list(range(1, 12))


def test_a_stopped_trial_that_does_not_end_takes_its_process_with_it(
    process: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepped, "ENDS_S", 0.1)
    one = process(shared(*SLOW), config(1))
    one.steps(stop=1)
    with pytest.raises(WorkerError, match=r"trial 0001 was stopped.* 0\.1 s"):
        one.reset(config(2))
    monkeypatch.setattr(stepped, "ENDS_S", 30.0)


def test_a_stopped_trial_that_takes_its_time_to_end_breaks_nothing(process: Callable[..., Process]) -> None:
    """A stopped trial may take 2.5 s to end. With Tune's own limit of 2 s, the next trial would fail."""
    one = process(shared(*SLOW), config(1))
    one.steps(stop=1)
    began = time.monotonic()
    one.reset(config(2))
    assert time.monotonic() - began >= 2.4
    assert end(one.steps())["status"] == "finished"


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_metric_that_is_not_there_is_told_with_those_that_are(process: Callable[..., Process]) -> None:
    said = process(shared(metric="val/acuracy"), config(1)).steps()
    assert len(said) == 1
    assert said[0]["objective"] == -WORST
    found = end(said)
    assert found["status"] == "failed"
    assert "sweep.metric=val/acuracy" in found["cause"]
    assert "val/accuracy" in found["cause"]
    assert found["non_retryable"]


def test_a_metric_that_is_logged_too_late_is_told_so(process: Callable[..., Process]) -> None:
    """train/loss is first logged after the first evaluation, and the cause names the setting that decides this."""
    cause = end(process(shared("trainer.log_every_n_steps=20", metric="train/loss"), config(1)).steps())["cause"]
    assert "sweep.metric=train/loss" in cause
    assert "trainer.log_every_n_steps" in cause
    assert "step 11" in cause


def test_a_value_that_is_nan_is_the_worst_and_is_recorded_as_it_is(process: Callable[..., Process]) -> None:
    of = shared(*CHANGES, "trainer.nonfinite=warn", metric="val/loss", mode="min", parameters=(LR, WHAT))
    said = process(of, config(1, **{WHAT.key: "diverges"})).steps()
    assert [result["objective"] for result in said] == [WORST] * EPOCHS
    assert all(math.isnan(report["value"]) for report in reports(said))
    assert end(said) == {"status": "finished"}


def test_one_that_raises_is_data_and_says_why(process: Callable[..., Process]) -> None:
    of = shared(*CHANGES, "+callbacks.changes.step=15", parameters=(LR, WHAT))
    said = process(of, config(1, **{WHAT.key: "raises"})).steps()
    assert reports(said) == reports(said[:1])  # the report before the exception, once
    assert [result["training_iteration"] for result in said] == [1, 1]
    assert said[-1]["objective"] == -WORST
    assert end(said)["cause"] == "ValueError: bad luck"
    assert "probes.py" in end(said)["traceback"]
    assert not end(said).get("diverged", False)


@pytest.mark.parametrize(("what", "cause"), [("exits", "SystemExit: enough"), ("interrupts", "KeyboardInterrupt")])
def test_one_that_would_end_the_process_ends_itself(process: Callable[..., Process], what: str, cause: str) -> None:
    one = process(shared(*CHANGES, parameters=(LR, WHAT)), config(1, **{WHAT.key: what}))
    found = end(one.steps())
    assert found["status"] == "failed"
    assert found["cause"].startswith(cause)
    assert "probes.py" in found["traceback"]
    assert end(one.then(config(2, **{WHAT.key: "nothing"})))["status"] == "finished"


def test_a_loss_that_is_not_finite_is_a_divergence(process: Callable[..., Process]) -> None:
    said = process(shared(*CHANGES, parameters=(LR, WHAT)), config(1, **{WHAT.key: "diverges"})).steps()
    assert end(said)["cause"].startswith("NonFiniteLoss: the loss became nan")
    assert end(said).get("diverged", False)


def test_only_what_another_try_can_mend_is_tried_again(process: Callable[..., Process]) -> None:
    """A retryable error is raised, so that Tune restarts the trial in another process; a ValueError is not retried."""
    of = shared(*CHANGES, parameters=(LR, WHAT), retries=True)
    one = process(of, config(1, **{WHAT.key: "raises"}))
    assert end(one.steps())["status"] == "failed"  # a retry cannot fix a ValueError
    once = ["+callbacks.once._target_=probes.Once", "+callbacks.once.what=raises", "+callbacks.once.step=15"]
    of = shared(*once, retries=True)
    one = process(of, config(2))
    one.steps(stop=1)
    with pytest.raises(WorkerError, match="OSError: raises, this once"):
        one.tune.step()
    again = process(of, config(2))
    assert [report["step"] for report in reports(again.steps())][-2:] == [22, 33]


# --- resuming --------------------------------------------------------------------------------------------------------


def undisturbed(process: Callable[..., Process]) -> list[dict[str, Any]]:
    return reports(process(shared(), config(7)).steps())


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_report_that_the_ledger_never_got_is_told_again(process: Callable[..., Process], lost: int) -> None:
    """A trial that is killed between the checkpoint and the report of an evaluation makes the report after the
    resume."""
    expected = undisturbed(process)
    process(shared(), config(1)).steps(stop=None if lost == EPOCHS else lost)
    checkpointer = Checkpointer(of_trial("0001"))
    while checkpointer.latest() is None or checkpointer.latest().step != 11 * lost:  # type: ignore[union-attr]
        time.sleep(0.01)
    said = process(shared(), config(1)).steps()
    assert reports(said) == expected[lost - 1 :]
    assert [result["training_iteration"] for result in said] == list(range(lost, EPOCHS + 1))
    assert end(said)["status"] == "finished"


def test_a_checkpoint_between_two_evaluations_reports_nothing_twice(process: Callable[..., Process]) -> None:
    expected = undisturbed(process)
    of = shared("checkpoint.every_n_steps=5")
    process(of, config(1)).steps(stop=1)
    one = process(shared(), config(1))
    folder = of_trial("0001")
    while not folder.exists("step-000000011/manifest.json"):  # the best is kept too
        time.sleep(0.01)
    folder.delete("step-000000011")
    assert Checkpointer(folder).latest().step == 10  # type: ignore[union-attr]
    assert reports(one.steps()) == expected


def test_a_clone_goes_on_from_the_state_of_the_other(process: Callable[..., Process], tmp_path: Path) -> None:
    """An exploit starts from exactly the state of the source's last report, with its own learning rate."""
    of = shared(*OBSERVED, pauses=True)
    source, clone = process(of, config(1)), process(of, config(2))
    source.steps(stop=2)
    clone.steps(stop=2)
    source.tune.save_checkpoint(str(tmp_path))
    clone.reset(config(2, **{"optimizer.lr": 0.002}))
    clone.tune.load_checkpoint(str(tmp_path))
    taken = {"from": "0001", "evaluation": 2, "parameters": {"optimizer.lr": 0.002}}
    assert import_note(of_trial("0002")) == taken  # before any report says so
    said = clone.steps()
    assert import_note(of_trial("0002")) == taken
    assert [report["evaluation"] for report in reports(said)] == [3]
    assert reports(said)[0]["inherited"] == {"from": "0001", "evaluation": 2}
    assert_equal_states(loaded("0001", 22), loaded("0002", 22))
    lines = [json.loads(line) for line in Path("observed").read_text().splitlines()]
    assert [line["weights"] for line in lines if line["kind"] == "start" and line["step"] == 22] == [
        line["weights"] for line in lines if line["trial"] == "0001" and line["kind"] == "evaluation"
    ][-1:]
    rates = {(line["trial"], line["step"]): line["lr"] for line in lines if line["kind"] == "step"}
    process(of, config(3)).steps()
    lines = [json.loads(line) for line in Path("observed").read_text().splitlines()]
    whole = {line["step"]: line["lr"] for line in lines if line["kind"] == "step" and line["trial"] == "0003"}
    for step in range(1, 33):  # the same curve, scaled to the new rate once it is inherited
        assert rates["0002", step] == pytest.approx(whole[step] * (0.2 if step > 22 else 1.0))


def test_a_copy_that_was_not_finished_is_none(process: Callable[..., Process], tmp_path: Path) -> None:
    source = process(shared(pauses=True), config(1))
    source.steps(stop=1)
    source.tune.save_checkpoint(str(tmp_path))
    import_checkpoint(tmp_path, of_trial("0002"), {"from": "0001"})
    assert import_note(of_trial("0002")) == {"from": "0001"}
    of_trial("0002").delete("step-000000011/manifest.json")  # it is written last
    assert import_note(of_trial("0002")) is None
    assert reports(process(shared(pauses=True), config(2)).steps())[0]["step"] == 11
    assert import_note(of_trial("0002")) is None


def test_workers_that_may_be_paused_have_a_checkpoint_of_each_evaluation() -> None:
    """Workers that may be paused write a checkpoint at each evaluation; otherwise an exploit would copy an older
    one."""
    sparse = ["checkpoint.every_n_steps=1000", "checkpoint.min_interval_s=60"]
    found = {}
    for workers, pauses in itertools.product((1, 2), (False, True)):
        job = shared(*sparse, workers=workers, pauses=pauses).job(config(1))
        found[workers, pauses] = experiment_of(job.text, job.overrides).checkpoint
    assert (found[2, True].every_n_steps, found[2, True].min_interval_s) == (None, 0)
    others = {(c.every_n_steps, c.min_interval_s) for key, c in found.items() if key != (2, True)}
    assert others == {(1000, 60)}


def test_workers_that_are_killed_with_their_trial_have_written_what_they_reported() -> None:
    one, two = (shared(workers=workers).job(config(1)) for workers in (1, 2))
    assert (one.objective, one.objective_mode, one.best_at_once, one.wait_for_commit) == (
        "val/accuracy",
        "max",
        False,
        False,
    )
    assert (two.objective, two.objective_mode, two.best_at_once, two.wait_for_commit) == (
        "val/accuracy",
        "max",
        True,
        True,
    )


def test_a_stopped_trial_keeps_its_best_weights(
    process: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights are written even if no checkpoint was due, and even if the sweep ends with the trial."""
    from raytrainer.trainer import Trainer

    values = {11: 0.5, 22: 0.9, 33: 0.7}
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"val/accuracy": values[self.step], "val/loss": 1.0})
    of = shared("checkpoint.min_interval_s=1000")
    one = process(of, config(1))
    one.steps(stop=3)
    one.reset(config(2))
    one.steps(stop=3)
    one.tune.drain()
    for name in ("0001", "0002"):
        best = Checkpointer(of_trial(name), mode="max").best()
        assert best is not None
        assert (best.step, best.metric) == (22, 0.9)


def loaded(trial: str, step: int) -> dict[str, Any]:
    checkpointer = Checkpointer(of_trial(trial))
    (info,) = [info for info in checkpointer.list() if info.step == step]
    shared, own = checkpointer.load(info)
    return dict(
        _tensors({"shared": shared["model"], "optimizer": shared["optimizer"], "own": own["random"] if own else {}})
    )


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _tensors(below, f"{path}/{key}")
    elif isinstance(value, torch.Tensor):
        yield path, value


def test_a_disk_that_is_each_nodes_own_is_refused(process: Callable[..., Process]) -> None:
    """A trial on a node-local disk fails as non-retryable, because nobody would find what it leaves there."""
    record = Record("sweep", "", created="2026-01-01T00:00:00+00:00", attempts=1)
    said = process(shared(mark=record.mark), config(1)).steps()
    assert (end(said)["status"], end(said)["non_retryable"]) == ("failed", True)
    assert f"ConfigError: storage_path={Path('runs').absolute()} is not the same place on" in end(said)["cause"]
    record.write(Storage(Path("runs/sweep").absolute()))
    assert end(process(shared(mark=record.mark), config(2)).steps())["status"] == "finished"


def test_the_last_metrics_are_sent_before_a_process_ends(
    process: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on another node than the driver uploads its trials' last metrics before it ends; nothing else can."""
    server = FakeServer()
    run_id = server.create_run(server.experiment("exp", None), "sweep.0001", {LOCAL_ID_TAG: "offline-1"}, None)
    server.before = lambda name: time.sleep(0.05)
    monkeypatch.setattr("raytrainer.tracking.uploader.Server", lambda *_, **__: server)
    fixed = ["scaling.use_gpu=false", "tracking.tracking_uri=http://tracking.example", "tracking.experiment_name=exp"]
    of = shared(ship=True, tracking_uri="http://tracking.example", fixed=fixed)
    one = process(of, config(1, **{RUN: "offline-1"}))
    assert end(one.steps())["status"] == "finished"
    one.tune.drain()
    rows = {(row.key, row.step) for row in server.runs[run_id].rows}
    assert {("val/accuracy", 11 * epoch) for epoch in range(1, EPOCHS + 1)} <= rows
    assert not one.tune._background[0].is_alive()
