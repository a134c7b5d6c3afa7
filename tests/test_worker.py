"""The glue of one training process, without a Ray: the inline path, and what it refuses."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from raytrainer import worker
from raytrainer.config import compose
from raytrainer.errors import ConfigError, DataError, WorkerError
from raytrainer.parallel import World
from raytrainer.run import Record
from raytrainer.storage import Storage

pytestmark = pytest.mark.usefixtures("in_tmp")


def job(tmp_path: Path, **changed: Any) -> worker.Job:
    text = compose(["experiment=smoke", "cluster=inline", "trainer.max_steps=4", "name=one"]).text
    return worker.Job(**{"text": text, "run_dir": str(tmp_path / "one"), **changed})


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
        worker.run(job(tmp_path, mark=record.mark), World(), emit=lambda _: None)
    record.write(Storage(str(tmp_path / "one")))
    assert worker.run(job(tmp_path, mark=record.mark), World(), emit=lambda _: None)["step"] == 4


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
