"""The code that connects one training process with its run, without Ray: the inline path, and what it refuses."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrainer import worker
from raytrainer.attempt import Record
from raytrainer.config import compose
from raytrainer.errors import ConfigError, DataError, WorkerError
from raytrainer.events import EvalEnd, FitStart
from raytrainer.metrics import Monitor
from raytrainer.parallel import World
from raytrainer.storage import Storage
from raytrainer.tracking import NullTracker
from raytrainer.worker import recording

pytestmark = pytest.mark.usefixtures("in_tmp")


def job(tmp_path: Path, **changed: Any) -> worker.WorkerJob:
    text = compose(["experiment=smoke", "cluster=inline", "trainer.max_steps=4", "name=one"]).text
    return worker.WorkerJob(**{"text": text, "run_dir": str(tmp_path / "one"), **changed})


def test_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = []
    assert worker.run(job(tmp_path), World(), emit=messages.append)["step"] == 4
    assert {"start", "log", "eval"} <= {m["kind"] for m in messages}
    longer = compose(["experiment=smoke", "cluster=inline", "trainer.max_steps=7", "name=one"]).text
    messages.clear()
    assert worker.run(job(tmp_path, text=longer), World(), emit=messages.append)["step"] == 7
    assert next(m for m in messages if m["kind"] == "start")["step"] == 4


def test_another_place_under_the_same_path_is_refused(tmp_path: Path) -> None:
    record = Record("one", str(tmp_path / "one"), created="2026-01-01T00:00:00+00:00", attempts=1)
    with pytest.raises(ConfigError, match="is not the same place"):
        worker.run(job(tmp_path, record_mark=record.mark), World(), emit=lambda _: None)
    record.write(Storage(str(tmp_path / "one")))
    assert worker.run(job(tmp_path, record_mark=record.mark), World(), emit=lambda _: None)["step"] == 4


def test_an_error_of_a_worker_travels() -> None:
    try:
        raise DataError("sample 3 is bad")
    except DataError as error:
        found = pickle.loads(pickle.dumps(worker.described(error, 2)))
    assert isinstance(found, WorkerError)
    assert (found.rank, found.cause, found.retry) == (2, "DataError: sample 3 is bad", False)
    assert "test_worker.py" in (found.traceback or "")
    assert worker.described(RuntimeError("the network is down"), 0).retry
    assert not worker.described(RuntimeError("CUDA out of memory. Tried…"), 0).retry


def test_one_process_of_each_node_samples_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four workers run on two nodes. Rank 0 has the run's tracker, and the first worker of the second node has its
    own."""
    made: list[dict[str, Any]] = []
    tags: dict[str, str] = {}

    class Kept(NullTracker):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(options)

        def set_tags(self, given: Mapping[str, str]) -> None:
            tags.update(given)

    monkeypatch.setattr(recording, "MlflowTracker", Kept)
    places = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
    asked, experiment = job(tmp_path, run_id="r"), compose(["experiment=smoke"]).experiment
    found = [
        recording.open_trackers(asked, experiment, World(rank, 4, local_rank, node=node), "")
        for rank, local_rank, node in places
    ]
    assert [tuple(isinstance(one, Kept) for one in pair) for pair in found] == [
        (True, False),
        (False, False),
        (False, True),
        (False, False),
    ]
    assert [options.get("node", 0) for options in made] == [0, 1]
    assert list(tags) == ["raytrainer.node.1"]


def test_a_node_that_cannot_write_its_spool_trains_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = job(tmp_path, run_id="r", spool_dir=str(tmp_path / "file" / "spool"))
    found = recording.open_trackers(asked, compose(["experiment=smoke"]).experiment, World(1, 2, 0, node=1), "")
    assert all(isinstance(one, NullTracker) for one in found)


def test_what_a_list_of_runs_shows_is_told_while_it_trains() -> None:
    """The tracker gets the number of steps, the number of workers, and the best value after each evaluation."""
    tags: dict[str, str] = {}

    class Kept(NullTracker):
        def set_tags(self, given: Mapping[str, str]) -> None:
            tags.update(given)

    listener, best = recording.TrackerListener(Kept()), Monitor("val/loss", "min")
    trainer = SimpleNamespace(best=best)
    listener.on_fit_start(trainer, FitStart(0, 132, 11, 2, 1000, 1000))
    assert tags == {"raytrainer.workers": "2", "raytrainer.total_steps": "132"}
    for step, value in ((10, 0.5), (20, 0.25), (30, 0.75)):
        best.update({"val/loss": value}, step)
        listener.on_eval_end(trainer, EvalEnd(step, 1, {"val/loss": value}))
    told = {key.removeprefix("raytrainer.monitor"): value for key, value in tags.items() if "monitor" in key}
    assert told == {"": "val/loss", ".best": "0.25", ".best_step": "20"}
