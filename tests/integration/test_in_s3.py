"""Runs and sweeps that keep everything in S3 and read their data there: after a kill they end with the same result.

The server is moto's. Nothing on the machines' disks is needed again.
"""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytrainer.checkpoint import Checkpointer
from raytrainer.data import Digits
from raytrainer.storage import Storage
from raytrainer.sweep import Trial, TrialJournal
from tests.launches import (
    ENDS_S,
    Runs,
    assert_equal_states,
    flat_state,
    launch,
    launched,
    observed,
    observed_trials,
    restarts,
    seen,
    steps_of,
)
from tests.outside.ports import free_port
from tests.outside.servers import S3

pytestmark = pytest.mark.slow


def digits_below(place: Storage, folder: Path) -> None:
    """Write the digits as Parquet files, two for each split."""
    for split in ("train", "val"):
        for number, part in enumerate(np.array_split(np.arange(len(Digits(split))), 2)):
            batch = Digits(split).__getitems__(part)
            images = pa.array(batch["image"].reshape(len(part), -1).tolist(), pa.list_(pa.float32(), 64))
            pq.write_table(
                pa.table({"image": images, "label": batch["label"].numpy()}), folder / f"{split}-{number}.parquet"
            )
            place.write_bytes(f"{split}/{number}.parquet", (folder / f"{split}-{number}.parquet").read_bytes())


def reads(place: str) -> list[str]:
    """Return the overrides with which an experiment reads the digits from a place."""
    return [
        override
        for split in ("train", "val")
        for override in (
            f"data.{split}._target_=raytrainer.data.ParquetDataset",
            f"~data.{split}.split",
            f"+data.{split}.path='{place}/{split}/*.parquet'",
            f"+data.{split}.reshape={{image: [1, 8, 8]}}",
        )
    ]


def test_a_run_whose_worker_and_then_driver_are_killed(in_s3: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for place in (Storage(here / "data"), Storage(f"{in_s3}/data")):
        digits_below(place, tmp_path)
    common = ["experiment=mlp", "model.dropout=0.3", "tracking.log_model=false", "trainer.max_epochs=6"]
    common += ["trainer.log_every_n_steps=5", "checkpoint.every_n_steps=7"]
    # As many threads as a worker with one CPU has, because their number decides the order of sums.
    one = ["cluster=inline", "trainer.num_threads=1"]
    launched(here, *common, "name=run", *one, *reads(str(here / "data"))).exits(0)

    # A unique name, because the spool is below the machine's temporary directory.
    name = f"run-{uuid.uuid4().hex[:8]}"
    arguments = [*common, f"name={name}", f"storage_path={in_s3}/runs", *reads(f"{in_s3}/data"), *observed(0.15)]
    with launch(there, *arguments, "failure.max_failures=1") as run:
        first = run.reaches(12)
        os.kill(first.pid, signal.SIGKILL)
        second = run.reaches(22, but=frozenset({first.pid}))
        run.kill()
        run.nothing_left(ENDS_S)
    assert Runs(there).status(name) == "RUNNING"
    ended = launched(there, "resume", name).exits(0)
    assert "continuing after step" in ended.err
    went_on = restarts(steps_of(there / "steps"))
    assert len(went_on) == 2
    for (before, after), killed in zip(went_on, (first, second), strict=True):
        assert before >= killed.step
        assert before - 14 < after <= before + 1
    assert not (there / "runs").exists()

    assert Runs(there).status(name) == "FINISHED"
    assert Runs(there).results(name) == Runs(here).results("run")
    mine, undisturbed = (
        flat_state(Checkpointer(place.child("checkpoints")))
        for place in (Storage(f"{in_s3}/runs/{name}"), Storage(here / "runs" / "run"))
    )
    assert_equal_states(mine, undisturbed)


def test_a_storage_that_is_away_is_refused(in_s3: str, tmp_path: Path) -> None:
    away = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    ended = launched(tmp_path, "experiment=smoke", f"storage_path={in_s3}", environment=away, store=False).exits(2)
    (line,) = ended.err.splitlines()
    assert line.startswith(f"raytrainer: refused: storage_path={in_s3} cannot be used: {in_s3}")
    assert "Could not connect to server" in line
    assert list(tmp_path.glob("*.db")) == []


@pytest.mark.nightly  # test_sweep_faults.py kills a driver on a local disk, and the run above uses S3
def test_a_sweep_whose_driver_is_killed(s3: S3, in_s3: str, tmp_path: Path) -> None:
    """A killed sweep resumes from a storage path that names the endpoint itself; the variables have only the keys."""
    place = f"{in_s3}?{s3.query()}"
    name = f"sweep-{uuid.uuid4().hex[:8]}"
    sweep = ["-m", "experiment=mlp", f"name={name}", f"storage_path='{place}'", "model.width=16", "sweep=random"]
    sweep += ["optimizer.lr=tag(log,interval(1e-4,1e-1))", "sweep.num_samples=3", "trainer.max_epochs=3"]
    sweep += ["trainer.log_every_n_steps=5", "checkpoint.min_interval_s=0", *observed_trials(0.05)]
    environment = {"AWS_ENDPOINT_URL": ""}

    def journal() -> dict[str, Trial]:
        return TrialJournal.open(Storage(place).child(name)).trials

    with launch(tmp_path, *sweep, environment=environment) as run:
        run.until("a trial has ended", lambda: any(t.status == "finished" for t in journal().values()))
        before = journal()
        run.kill()
        run.nothing_left(ENDS_S)
    launched(tmp_path, "resume", name, environment=environment).exits(0)
    after, runs = journal(), Runs(tmp_path)
    assert list(after) == ["0001", "0002", "0003"]
    assert {trial.status for trial in after.values()} == {"finished"}
    for trial in before.values():
        assert after[trial.id].parameters == trial.parameters
        if trial.status == "finished":
            assert after[trial.id].reports == trial.reports
            assert len(seen(tmp_path, "start", trial.id)) == 1
    for trial in after.values():
        assert runs.rows(f"{name}.{trial.id}")["val/accuracy"] == [(r.step, r.value) for r in trial.reports]
        assert len(trial.reports) == 3
    assert runs.status(name) == "FINISHED"
    best = Storage(place).child(f"{name}/trials/0001/checkpoints")
    assert Checkpointer(best).latest() is not None


def test_a_password_that_the_storage_path_refers_to_is_kept_nowhere(s3: S3, tmp_path: Path) -> None:
    """The run's files, MLflow and Ray do not keep it, and the reference is enough to find and resume the run."""
    store = f"s3://KEY-of-one:password-of-one@bucket/{uuid.uuid4().hex}?{s3.query()}"
    environment = {"STORE": store, "AWS_EC2_METADATA_DISABLED": "true"}
    arguments = ["experiment=smoke", "name=one", "storage_path=${oc.env:STORE}", "trainer.max_steps=2"]
    for verb in (arguments, ["status", "one"], ["resume", "one", "trainer.max_steps=4"]):
        told = launched(tmp_path, *verb, environment=environment).exits(0)
        assert "password-of-one" not in told.out + told.err
    place = Storage(store).child("one")
    kept = {name: place.read_bytes(name) for name in ("run.json", "config.yaml", "provenance.json")}
    kept |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [name for name, content in kept.items() if b"password-of-one" in content] == []
    assert any(name.endswith("mlflow.db") for name in kept)
