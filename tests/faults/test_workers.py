"""Faults 2, 3, 20, 23 and 32: failures in a worker, and how the driver handles them."""

from __future__ import annotations

import math
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.launches import Launch, Runs, checkpoints, launch, launched, observed, record, restarts, steps_of

pytestmark = pytest.mark.slow

SHORT = ["experiment=mlp", "name=run", "tracking.log_model=false", "trainer.log_every_n_steps=5"]
TWO = "scaling.num_workers=2"


def partial_checkpoint(folder: Path) -> Path | None:
    """Return the directory of a checkpoint that is being written, if there is one."""
    found = (folder / "runs" / "run" / "checkpoints").glob("step-*")
    return next((path for path in found if any(path.iterdir()) and not (path / "manifest.json").exists()), None)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Fault 2: an uncommitted checkpoint is never resumed from, and the next commit deletes it."""
    large = ["model.width=1200", "model.depth=3", "checkpoint.every_n_steps=10", "trainer.max_epochs=6"]
    with launch(tmp_path, *SHORT, *large, TWO, *observed(0.02)) as run:
        run.until("a checkpoint", lambda: list((tmp_path / "runs" / "run" / "checkpoints").glob("*/manifest.json")))
        partial = run.until("another is being written", lambda: partial_checkpoint(tmp_path))
        before = checkpoints(tmp_path, "run")[-1].step
        os.kill(steps_of(run.steps, 0)[-1].pid, signal.SIGKILL)
        run.wait().exits(0)
        run.nothing_left()
    assert not (partial / "manifest.json").exists()
    # Only the checkpoint that was being written is missing; training continued after the one before it.
    ((_, after),) = restarts(steps_of(run.steps))
    assert after == before + 1
    assert not partial.exists()
    assert partial_checkpoint(tmp_path) is None
    assert checkpoints(tmp_path, "run")[-1].step == 66


def test_killed_once_too_often(tmp_path: Path) -> None:
    """Fault 3: the run is FAILED with rank, node and cause, and its last checkpoint can be resumed from."""
    arguments = [*SHORT, TWO, "trainer.max_epochs=100", "failure.max_failures=1", *observed(0.02)]
    with launch(tmp_path, *arguments) as run:
        gone = frozenset({kill_rank(run, 1, 15)})
        kill_rank(run, 1, 30, gone)
        ended = run.wait().exits(1)
        run.nothing_left()
    assert "restarting the workers (1 of 1)" in ended.err
    cause = Runs(tmp_path).tags("run")["raytrainer.cause"]
    assert "rank 1" in cause
    assert socket.gethostname() in cause
    assert "the process died" in cause
    assert cause in ended.out
    assert Runs(tmp_path).status("run") == record(tmp_path, "run")["status"] == "FAILED"
    assert checkpoints(tmp_path, "run")[-1].step >= 22


def kill_rank(run: Launch, rank: int, step: int, but: frozenset[int] = frozenset()) -> int:
    pid = run.reaches(step, rank, but=but).pid
    os.kill(pid, signal.SIGKILL)
    return pid


def test_only_one_rank_raises(tmp_path: Path) -> None:
    """Fault 23: the output has that rank's traceback, not that of the collective in which the other waits; a bug is not
    retried."""
    bad = ["+callbacks.bad._target_=probes.Misbehaves", "+callbacks.bad.step=13", "+callbacks.bad.rank=1"]
    ended = launched(tmp_path, *SHORT, TWO, *bad, "+callbacks.bad.raises=bad luck", *observed()).exits(1)
    assert "ValueError: bad luck" in ended.err
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert "gloo" not in ended.err.lower()
    assert "restarting" not in ended.err
    cause = Runs(tmp_path).tags("run")["raytrainer.cause"]
    assert cause == f"rank 1 on node {socket.gethostname()}: ValueError: bad luck"
    assert Runs(tmp_path).status("run") == "FAILED"


NAN = ["cluster=inline", "trainer.max_epochs=4", "loss._target_=probes.NanAfter", "+loss.calls=15"]


def test_nan_stops(tmp_path: Path) -> None:
    """Fault 20: training stops at the next log step, and the last checkpoint is from before the first NaN."""
    ended = launched(tmp_path, *SHORT, *NAN).exits(1)
    assert "loss became nan" in ended.out
    assert Runs(tmp_path).status("run") == "FAILED"
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path, "run")] == [11]
    assert Runs(tmp_path).tags("run")["raytrainer.checkpoint.best"].endswith("step-000000011")


def test_nan_is_never_best(tmp_path: Path) -> None:
    """Fault 20, `trainer.nonfinite=warn`: training continues with a warning, and the best checkpoint has a finite
    value."""
    monitor = ["checkpoint.monitor=val/loss", "checkpoint.mode=min"]
    ended = launched(tmp_path, *SHORT, *NAN, *monitor, "trainer.nonfinite=warn").exits(0)
    assert "at step 11" in ended.out
    rows = dict(Runs(tmp_path).rows("run")["train/loss"])
    assert math.isfinite(rows[15])
    assert math.isnan(rows[20])
    assert math.isnan(dict(Runs(tmp_path).rows("run")["val/loss"])[22])
    assert Runs(tmp_path).tags("run")["raytrainer.checkpoint.best"].endswith("step-000000011")


def test_truncated_parquet_file(tmp_path: Path) -> None:
    """Fault 32: the message names the file, and the workers are not restarted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [[0.5] * 64] * 2000, "label": [1] * 2000})
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(table, tmp_path / name)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-200])
    data = ["data.train._target_=raytrainer.data.ParquetDataset", "~data.train.split", "+data.train.path='*.parquet'"]
    ended = launched(tmp_path, *SHORT, *data)
    assert ended.code in {1, 2}, str(ended)
    assert "b.parquet" in ended.err + ended.out
    assert "restarting" not in ended.err
