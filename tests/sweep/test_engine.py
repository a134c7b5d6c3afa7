"""The loop from the first sampled trial to the last end, with Tune, its processes and trials that only count.

All tests share one Ray. What trials of experiments do is in test_trial.py; whole sweeps are in tests/integration/ and
tests/faults/.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import psutil
import pytest
from ray import tune

from raytrainer import ray_internals
from raytrainer.config import Parameter
from raytrainer.config.schema import SweepConfig
from raytrainer.errors import ConfigError, StorageError, WorkerError
from raytrainer.storage import Storage
from raytrainer.sweep import engine, schedule
from raytrainer.sweep.engine import Listener, Search
from raytrainer.sweep.journal import FILE, Trial, TrialJournal
from raytrainer.sweep.tune_space import TRIAL
from tests import forkserver
from tests.training import node

pytestmark = pytest.mark.slow

X = Parameter("x", "interval", low=0.0, high=1.0)
REPORTS = 3


class Counts(tune.Trainable):  # type: ignore[misc]
    """A trial that reports `x` times the number of the evaluation. The file COUNTS says how each trial misbehaves."""

    _own: dict[str, Any]

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        if hasattr(self, "_own"):  # the process is reused after a trial that has ended
            does = self._does()
            if does == "does not end":
                raise WorkerError(f"trial {self._own[TRIAL]} did not end")
            if does == "dies late":
                os._exit(1)
        self._own, self._done = dict(config), 0
        return True

    def _does(self) -> str:
        found: str = json.loads(Path(os.environ["COUNTS"]).read_text()).get(self._own[TRIAL], "")
        return found

    def step(self) -> dict[str, Any]:
        does = self._does()
        if self._done == 1 and does == "dies":
            os._exit(1)
        if self._done == 1 and does == "dies once" and not (mark := Path(os.environ["COUNTS"] + ".once")).exists():
            mark.touch()
            os._exit(1)
        if self._done == 1 and does == "raises":
            raise WorkerError("OSError: no\nspace", traceback="the whole\ntraceback")
        if self._done == 1 and does == "ends by an error":
            failed = {"status": "failed", "cause": "ValueError: two\n  lines", "traceback": "its\ntraceback"}
            return {"objective": -1e30, "training_iteration": 1, "end": json.dumps(failed), "done": True}
        if self._done == 1 and does == "exits":
            sys.exit(4)
        while does == "hangs":
            time.sleep(0.05)
        self._done += 1
        value = math.nan if does == "diverges" else self._own["x"] * self._done
        report = {"evaluation": self._done, "step": self._done, "value": value, "metrics": {"pid": float(os.getpid())}}
        result = {
            "objective": value if math.isfinite(value) else -1e30,
            "training_iteration": self._done,
            "report": json.dumps(report),
            "done": False,
        }
        if does == "non_retryable":
            end = {"status": "failed", "cause": "ConfigError: sweep.metric=x is not logged", "non_retryable": True}
            return {"objective": value, "training_iteration": self._done, "end": json.dumps(end), "done": True}
        if self._done == REPORTS:
            return {**result, "end": json.dumps({"status": "finished"}), "done": True}
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "done").write_text(str(self._done))

    def load_checkpoint(self, checkpoint: str) -> None:
        self._done = int(Path(checkpoint, "done").read_text())


@pytest.fixture(scope="module", autouse=True)
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start Ray with two CPUs, and yield the file that tells its processes how to misbehave."""
    told = tmp_path_factory.mktemp("engine") / "does.json"
    told.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTS", str(told))
        cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
        ray_internals.prepare(embedded=True)
        forkserver.fork_rays_processes(forkserver.server().python)
        ray_internals.start_embedded(2, 0)
        try:
            yield told
        finally:
            ray_internals.stop()


@dataclass
class Sweep:
    """One attempt, and what its callbacks recorded."""

    folder: Path
    config: SweepConfig
    limit: int = 2
    lines: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most: int = 0
    between: Callable[[], None] = lambda: None
    waits: Callable[[bool], None] = lambda found: None
    on_start: Callable[[], None] = lambda: None
    on_end: Callable[[], None] = lambda: None

    def run(self) -> str:
        self.journal = TrialJournal.open(Storage(self.folder))
        self.journal.begin({})
        search = Search(
            self.config,
            schedule.make_scheduler(self.config.scheduler, [X], mode="max", evaluations=REPORTS),
            parameters=[X],
            mode="max",
            seed=3,
            journal=self.journal,
            overrides_of=lambda values: [X.override(values["x"])],
            listener=Listener(self._start, self._end, self.lines.append),
            needs_value=True,
        )
        try:
            return search.run(
                Counts,
                storage_path=str(self.folder),
                resources=ray_internals.trial_resources({"CPU": 1}, 1, "PACK"),
                limit=self.limit,
                between=self._between,
            )
        finally:
            self.journal.close()

    def _between(self, waits: bool) -> None:
        self.between()
        self.waits(waits)

    def _start(self, trial: Trial) -> None:
        self.started.append(trial.id)
        self.running.add(trial.id)
        self.most = max(self.most, len(self.running))
        self.on_start()

    def _end(self, trial: Trial) -> None:
        self.running.discard(trial.id)
        self.on_end()

    @property
    def trials(self) -> dict[str, Trial]:
        return TrialJournal.open(Storage(self.folder)).trials

    @property
    def pids(self) -> set[int]:
        return {int(report.metrics["pid"]) for trial in self.trials.values() for report in trial.reports}


@pytest.fixture
def sweep(ray: Path, tmp_path: Path) -> Callable[..., Sweep]:
    """Return `sweep({trial: how it misbehaves}, …)`, whose options set the section `sweep`. All attempts share one
    directory."""

    def make(does: dict[str, str] | None = None, limit: int = 2, **config: Any) -> Sweep:
        ray.write_text(json.dumps(does or {}))
        Path(f"{ray}.once").unlink(missing_ok=True)
        return Sweep(tmp_path, SweepConfig(**{"num_samples": 5, **config}), limit)

    return make


def values(trials: dict[str, Trial]) -> dict[str, list[float]]:
    return {trial.id: [report.value for report in trial.reports] for trial in trials.values()}


@pytest.mark.parametrize("limit", [1, 2])
def test_trials_are_drawn_in_order_and_no_more_at_a_time_than_may_be(sweep: Callable[..., Sweep], limit: int) -> None:
    one = sweep(limit=limit)
    assert one.run() == "finished"
    assert one.started == list(one.trials) == ["0001", "0002", "0003", "0004", "0005"]
    assert one.most == limit
    assert len(one.pids) <= limit
    for trial in one.trials.values():
        assert trial.status == "finished"
        assert [report.value for report in trial.reports] == [trial.parameters["x"] * n for n in (1, 2, 3)]
        assert trial.overrides == [X.override(trial.parameters["x"])]


def test_the_time_is_over(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time budget is over, a running trial is left unchanged, and it continues when the sweep does."""
    now = [0.0]
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    one = sweep({"0003": "hangs"}, num_samples=None, time_budget_s=60.0, limit=1)

    def pass_time() -> None:
        now[0] = 60.0 if "0003" in one.running else 59.9

    one.between = pass_time
    assert one.run() == "time budget"
    assert [trial.status for trial in one.trials.values()] == ["finished", "finished", "running"]


def test_it_is_known_whether_all_of_it_waits_for_a_place(sweep: Callable[..., Sweep]) -> None:
    """`waits` reports True while another actor holds all CPUs; the test frees them after three such reports."""
    import ray

    holder = ray.remote(num_cpus=2)(type("Holder", (), {"is_there": lambda self: True})).remote()
    ray.get(holder.is_there.remote())
    one, seen = sweep(num_samples=2), list[bool]()

    def waits(found: bool) -> None:
        seen.append(found)
        if seen.count(True) == 3:
            ray.kill(holder)

    one.waits = waits
    assert one.run() == "finished"
    first = seen.index(True)
    last = len(seen) - 1 - seen[::-1].index(True)
    assert last - first + 1 == seen.count(True)
    assert not seen[-1]


def test_what_is_raised_between_two_decisions_ends_it_with_its_processes(sweep: Callable[..., Sweep]) -> None:
    one = sweep({"0004": "hangs", "0005": "hangs"})

    def between() -> None:
        if len(one.started) == 5:
            raise KeyboardInterrupt

    one.between = between
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert one.pids
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in one.pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sweep_goes_on_as_if_it_had_never_been_away(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    undisturbed = sweep()
    undisturbed.folder = tmp_path / "undisturbed"
    undisturbed.run()
    one = sweep(num_samples=3, limit=1)
    one.run()
    file = one.folder / FILE
    lines = file.read_text().splitlines(keepends=True)
    ends = [line for line in lines if '"kind":"end","id":"0002"' in line]
    assert len(ends) == 1
    file.write_text("".join(line for line in lines if line not in ends))  # as a killed driver leaves it
    again = sweep()
    assert again.run() == "finished"
    assert again.started == ["0002", "0004", "0005"]
    assert values(again.trials) == values(undisturbed.trials)


def test_a_process_that_dies_is_a_failed_trial(sweep: Callable[..., Sweep]) -> None:
    one = sweep({"0002": "dies"})
    assert one.run() == "finished"
    assert [trial.status for trial in one.trials.values()] == ["finished", "failed", "finished", "finished", "finished"]
    assert (one.trials["0002"].cause or "").startswith("the process died")
    assert len(one.trials["0002"].reports) == 1
    assert one.lines == []


def test_why_a_trial_failed_is_a_line_and_all_of_it_a_file(sweep: Callable[..., Sweep]) -> None:
    one = sweep({"0001": "raises", "0002": "ends by an error", "0003": "exits"}, num_samples=4)
    one.run()
    causes = [trial.cause for trial in one.trials.values()]
    assert causes == ["OSError: no space", "ValueError: two lines", "the process died with exit code 4", None]
    files = [trial.error for trial in one.trials.values()]
    assert files == ["trials/0001/error.txt", "trials/0002/error.txt", "trials/0003/error.txt", None]
    texts = [(one.folder / file).read_text() for file in files if file]
    assert texts[:2] == ["the whole\ntraceback", "its\ntraceback"]
    assert "ActorDiedError" in texts[2]


def test_a_process_that_dies_is_replaced(sweep: Callable[..., Sweep]) -> None:
    one = sweep({"0002": "dies once", "0003": "dies"}, max_trial_failures=1)
    assert one.run() == "finished"
    assert [trial.status for trial in one.trials.values()] == ["finished", "finished", "failed", "finished", "finished"]
    assert [report.evaluation for report in one.trials["0002"].reports] == [1, 2, 3]
    assert [line.partition(":")[0] for line in one.lines] == ["trial 0002", "trial 0003"]
    assert all(line.endswith("; retrying") for line in one.lines)


def test_a_trial_without_a_value_that_is_a_number_has_failed(sweep: Callable[..., Sweep]) -> None:
    one = sweep({"0002": "diverges"}, num_samples=3, limit=1)
    assert one.run() == "finished"
    assert [trial.status for trial in one.trials.values()] == ["finished", "failed", "finished"]
    assert one.trials["0002"].cause == "diverged: all of its 3 values are nan or infinite"
    assert one.trials["0002"].diverged


def test_what_all_would_fail_by_ends_it(sweep: Callable[..., Sweep]) -> None:
    one = sweep({"0002": "non_retryable"}, limit=1)
    with pytest.raises(ConfigError, match=r"^sweep\.metric=x is not logged$"):
        one.run()
    assert [trial.status for trial in one.trials.values()] == ["finished", "failed"]


def test_more_that_pause_than_may_run(sweep: Callable[..., Sweep]) -> None:
    """HyperBand pauses trials to compare them. All of them end, one at a time, in one process."""
    one = sweep(limit=1, scheduler=node("ray.tune.schedulers.HyperBandScheduler", max_t=REPORTS))
    assert one.run() == "finished"
    assert {trial.status for trial in one.trials.values()} == {"finished", "pruned"}
    assert len(one.pids) == 1


def test_a_signal_is_heeded_between_the_draws_of_many(sweep: Callable[..., Sweep]) -> None:
    one = sweep(num_samples=1000, scheduler=node("ray.tune.schedulers.HyperBandScheduler", max_t=REPORTS))
    one.on_start = lambda: time.sleep(0.01)

    def between() -> None:
        if one.started:
            raise KeyboardInterrupt

    one.between = between
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert 0 < len(one.started) < 100


@pytest.mark.parametrize("method", ["report", "end"])
def test_what_is_raised_while_a_trial_is_written_down_ends_it_as_what_it_is(
    sweep: Callable[..., Sweep], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StorageError("the journal is on a disk that is gone")

    one = sweep(limit=1)
    monkeypatch.setattr(TrialJournal, method, fails)
    with pytest.raises(StorageError, match="a disk that is gone"):
        one.run()
    assert one.started == ["0001"]


def test_a_trial_that_is_as_old_as_a_trial_gets_is_finished(sweep: Callable[..., Sweep]) -> None:
    """A trial that reaches `max_t` is finished, although it could train longer, because it was never worse than the
    others."""
    one = sweep(scheduler=node("ray.tune.schedulers.ASHAScheduler", max_t=2, grace_period=2), num_samples=3)
    assert one.run() == "finished"
    assert [trial.status for trial in one.trials.values()] == ["finished"] * 3
    assert all(len(trial.reports) == 2 for trial in one.trials.values())


@pytest.mark.parametrize("how", ["does not end", "dies late"])
def test_a_process_that_is_not_free_is_replaced(sweep: Callable[..., Sweep], how: str) -> None:
    """A process that does not end its trial, or that dies, is replaced, and the next trial runs in the new one."""
    one = sweep({"0001": how}, limit=1, num_samples=3)
    assert one.run() == "finished"
    assert [trial.status for trial in one.trials.values()] == ["finished"] * 3
    assert [len(trial.reports) for trial in one.trials.values()] == [3, 3, 3]
    assert len(one.pids) == 2
    (line,) = one.lines
    assert line.endswith("the next trial gets another process")
    assert how == "dies late" or line.startswith("trial 0001 did not end")
