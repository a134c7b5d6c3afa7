"""Tests of `prune`: what it deletes, what it always keeps, and that a dry run deletes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer.attempt import SUBMITTED, Record
from raytrainer.checkpoint import Checkpointer, retention
from raytrainer.cli import main
from raytrainer.config import compose
from raytrainer.errors import StorageLocked
from raytrainer.runs import prune as pruning
from raytrainer.runs import worktree
from raytrainer.runs.evaluate import to_evaluate
from raytrainer.runs.prune import Pruned
from raytrainer.runs.reconcile import check_all
from raytrainer.storage import Lock, Storage
from raytrainer.sweep import make_plan
from raytrainer.tracking.spool import Spool
from tests.runs import past
from tests.runs.past import FakeCluster, local_owner, write_lease

LONG_AGO = time.time() - 40 * 86_400


def saved(storage: Storage, *steps: int, best: int = 20) -> None:
    """Save checkpoints of these steps with the best metric at `best` (mode `max`), and add two other folders."""
    checkpoints = Checkpointer(storage.child("checkpoints"), mode="max", num_to_keep=None)
    for step in steps:
        checkpoints.save(step, {"step": step}, {}, metric=0.9 if step == best else 0.1)
    checkpoints.close()
    (storage.local_path / "checkpoints/step-000000099").mkdir()  # a save that was killed
    (storage.local_path / "checkpoints/step-000000099/shared.json").write_text("{}")
    (storage.local_path / "checkpoints/notes").mkdir()  # does not belong to raytrainer


def steps(storage: Storage) -> list[str]:
    return sorted(
        path.name.removeprefix("step-").lstrip("0") for path in (storage.local_path / "checkpoints").iterdir()
    )


def prune(identifier: str | None = None, delete: bool = True, **options: object) -> Pruned:
    return pruning.prune(identifier, delete=delete, say=lambda _: None, **options)  # type: ignore[arg-type]


@pytest.fixture
def ended(in_tmp: Path) -> Storage:
    """A finished run with five checkpoints, Ray's records and a spool that MLflow has completely."""
    _, storage = past.record("ended", status="FINISHED")
    saved(storage, 10, 20, 30, 40, 50)
    (storage.local_path / "attempt-1").mkdir()
    (storage.local_path / "attempt-1/x.json").write_text("12345")
    Spool(storage.local_path / "spool").create()
    (storage.local_path / "spool/state.json").write_text("{}")
    return storage


def test_without_yes_everything_is_listed_and_nothing_deleted(
    ended: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path.cwd().rglob("*"))
    for arguments in (["prune"], ["prune", "--yes", "--dry-run"], ["prune", "ended", "--json"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert [p for p in sorted(Path.cwd().rglob("*")) if "lock" not in p.parts] == [
            p for p in before if "lock" not in p.parts
        ]
    found = json.loads(out)
    assert [item["kind"] for item in found["items"]] == ["checkpoint"] * 3 + ["unfinished save", "spool", "ray"]
    assert found["items"][-1]["bytes"] == 5
    assert found["bytes"] == sum(item["bytes"] for item in found["items"])
    assert not found["deleted"]


def test_the_last_the_best_and_foreign_files_stay(ended: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--yes"]) == 0
    assert steps(ended) == ["20", "50", "notes"]
    assert not (ended.local_path / "attempt-1").exists()
    assert not (ended.local_path / "spool").exists()
    assert sorted(p.name for p in ended.local_path.iterdir()) == ["checkpoints", "config.yaml", "lock", "run.json"]
    assert "deleted" in capsys.readouterr().out.splitlines()[-1]
    checkpoints = Checkpointer(ended.child("checkpoints"), mode="max")
    assert (latest := checkpoints.latest()) is not None
    assert latest.step == 50
    assert (best := checkpoints.best()) is not None
    assert best.step == 20
    assert main(["prune", "--yes"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_keep_more_checkpoints(ended: Storage) -> None:
    prune("ended", keep=3)
    assert steps(ended) == ["20", "30", "40", "50", "notes"]


def alive_here(storage: Storage) -> None:
    write_lease(storage, **local_owner(os.getpid()))


def alive_elsewhere(storage: Storage) -> None:
    write_lease(storage, age_s=20)


def another_machine_may_have_it(storage: Storage) -> None:
    write_lease(storage, age_s=200)


def died_a_moment_ago(storage: Storage) -> None:
    gone = {**local_owner(os.getpid()), "started": "1"}
    write_lease(storage, **gone, age_s=60)
    rewritten(storage, status="RUNNING")


def may_be_starting(storage: Storage) -> None:
    rewritten(storage, status="RUNNING")


def spool_is_waiting(storage: Storage) -> None:
    (storage.local_path / "spool/run.json").write_text(
        json.dumps({"run_id": "x", "experiment_name": "", "run_name": ""})
    )


def config_is_unreadable(storage: Storage) -> None:
    (storage.local_path / "config.yaml").write_text("checkpoint: {mode: sideways}")


def config_is_empty(storage: Storage) -> None:
    (storage.local_path / "config.yaml").write_text("")


def config_is_cut_off(storage: Storage) -> None:
    (storage.local_path / "config.yaml").write_text("checkpoint: {mode: ma")


def last_is_corrupt(storage: Storage) -> None:
    file = next((storage.local_path / "checkpoints/step-000000050").glob("shared.json"))
    file.write_bytes(b"x" * file.stat().st_size)


def is_a_link(storage: Storage) -> None:
    shutil.move(storage.local_path, Path.cwd() / "elsewhere")
    storage.local_path.symlink_to(Path.cwd() / "elsewhere")


def rewritten(storage: Storage, **fields: object) -> None:
    record = Record.read(storage)
    assert record is not None
    replace(record, **fields).write(storage)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "made",
    [
        alive_here,
        alive_elsewhere,
        another_machine_may_have_it,
        died_a_moment_ago,
        may_be_starting,
        config_is_unreadable,
        config_is_empty,
        config_is_cut_off,
        last_is_corrupt,
        is_a_link,
    ],
)
def test_a_run_that_is_or_may_be_alive_is_not_touched(ended: Storage, made: Callable[[Storage], None]) -> None:
    made(ended)
    before = steps(ended)
    found = prune()
    assert list(found.left) == ["ended"]
    assert steps(ended) == before
    assert (ended.local_path / "attempt-1").exists()


def test_a_run_that_was_killed_long_ago_is_pruned(ended: Storage) -> None:
    rewritten(ended, status="RUNNING")
    os.utime(ended.local_path / "run.json", (LONG_AGO, LONG_AGO))
    write_lease(ended, pid=1, age_s=86_400)
    prune()
    assert steps(ended) == ["20", "50", "notes"]


def test_a_spool_that_is_not_uploaded_stays(ended: Storage) -> None:
    spool_is_waiting(ended)
    prune()
    assert (ended.local_path / "spool/run.json").exists()
    assert steps(ended) == ["20", "50", "notes"]


def test_the_spool_of_an_offline_run_stays(ended: Storage) -> None:
    rewritten(ended, run_id="offline-1")
    prune()
    assert (ended.local_path / "spool/state.json").exists()


def test_older_than(ended: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--yes", "--older-than", "30d"]) == 0
    assert "ended is left alone: it has not ended long enough ago" in capsys.readouterr().err
    os.utime(ended.local_path / "run.json", (LONG_AGO, LONG_AGO))
    assert main(["prune", "--yes", "--older-than", "30d"]) == 0
    assert steps(ended) == ["20", "50", "notes"]
    assert main(["prune", "--older-than", "soon"]) == 2


def test_a_run_with_an_active_job_or_a_silent_cluster(ended: Storage) -> None:
    cluster = FakeCluster()
    cluster.add("ended", "RUNNING")
    rewritten(ended, job={"submission_id": "ended", "cluster_address": past.ADDRESS})
    assert "RUNNING" in prune(clusters=cluster.clusters()).left["ended"]
    rewritten(ended, status="RUNNING")
    os.utime(ended.local_path / "run.json", (LONG_AGO, LONG_AGO))
    cluster.down = OSError("no route")
    assert "could not be queried" in prune(clusters=cluster.clusters()).left["ended"]
    assert len(steps(ended)) == 7


def test_a_run_that_is_resumed_meanwhile_is_not_touched(ended: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume of the run starts and ends between the check and the lock."""

    def then_resumed(*arguments: object) -> object:
        found = check_all(*arguments)  # type: ignore[arg-type]
        rewritten(ended, attempts=2)
        return found

    monkeypatch.setattr(pruning, "check_all", then_resumed)
    assert prune().left == {"ended": "another attempt has continued it"}
    assert len(steps(ended)) == 7


def test_a_checkpoint_that_became_the_best_meanwhile_stays(ended: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pruning._items(past.record("other")[0], ended, 1)
    assert {item.path[-2:] for item in first if item.kind == "checkpoint"} == {"10", "30", "40"}
    real, calls = retention.surplus, []

    def changed(storage: Storage, **options: object) -> retention.Surplus:
        calls.append(1)
        found = real(storage, **options)  # type: ignore[arg-type]
        return found if len(calls) == 1 else replace(found, old=found.old[1:])

    monkeypatch.setattr(retention, "surplus", changed)
    prune("ended")
    assert steps(ended) == ["10", "20", "50", "notes"]


def test_each_trial_of_a_sweep(in_tmp: Path) -> None:
    _, storage = past.record("search", kind="sweep", status="FINISHED")
    plan = make_plan(
        ["experiment=mlp", "name=search", "sweep=random", "seed=1,2"], choice="random", space={}, groups=set()
    )
    plan.write(storage)
    for number in ("0001", "0002"):
        saved(storage.child(f"trials/{number}"), 10, 20, 30)
    found = prune("search")
    assert {item.path for item in found.items if item.kind == "checkpoint"} == {
        f"trials/{number}/checkpoints/step-000000010" for number in ("0001", "0002")
    }
    for number in ("0001", "0002"):
        assert steps(storage.child(f"trials/{number}")) == ["20", "30", "notes"]


def test_trials_behind_a_link_are_not_touched(in_tmp: Path) -> None:
    _, storage = past.record("search", kind="sweep", status="FINISHED")
    make_plan(
        ["experiment=mlp", "name=search", "sweep=random", "seed=1,2"], choice="random", space={}, groups=set()
    ).write(storage)
    saved(storage.child("trials/0001"), 10, 20, 30)
    shutil.move(storage.local_path / "trials", in_tmp / "elsewhere")
    (storage.local_path / "trials").symlink_to(in_tmp / "elsewhere")
    assert not prune("search").items
    assert steps(Storage(in_tmp / "elsewhere/0001")) == ["10", "20", "30", "99", "notes"]


def test_deleted_items_are_reported_if_the_lock_is_lost(ended: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def lost(lock: Lock) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise StorageLocked("was taken over")

    monkeypatch.setattr(Lock, "check", lost)
    found = prune("ended")
    assert [item.path[-2:] for item in found.items] == ["10", "30"]
    assert set(found.failed.values()) == {"was taken over"}
    assert steps(ended) == ["20", "40", "50", "99", "notes"]


def test_a_link_among_checkpoints_is_not_followed(ended: Storage, tmp_path: Path) -> None:
    shutil.move(ended.local_path / "checkpoints/step-000000030", tmp_path / "mine")
    (ended.local_path / "checkpoints/step-000000030").symlink_to(tmp_path / "mine")
    prune()
    assert len(list((tmp_path / "mine").iterdir())) > 1
    assert (tmp_path / "mine/manifest.json").exists()


def test_the_working_tree_of_a_killed_rerun(in_tmp: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    for name, pid in (("dead", process.pid), ("alive", os.getpid())):
        place = in_tmp / "runs" / worktree.PLACE / name
        (place / "tree").mkdir(parents=True)
        (place / "tree/code.py").write_text("1234")
        made = local_owner(pid)
        owner = {"pid": pid, "started": made["started"] or "1", "machine": made["machine"]}
        (place / "owner.json").write_text(json.dumps(owner))
    (in_tmp / "runs" / "ended").mkdir()
    # The run may outlive the process that waits for it.
    with subprocess.Popen(["sleep", "60"], cwd=in_tmp / "runs" / worktree.PLACE / "dead/tree") as run:
        assert not prune().items
        run.kill()
    found = prune()
    assert [(item.kind, item.path) for item in found.items] == [("worktree", ".rerun/dead")]
    assert [p.name for p in (in_tmp / "runs" / worktree.PLACE).iterdir()] == ["alive"]


def test_in_s3_only_the_runs_own_files(in_s3: str, in_tmp: Path) -> None:
    composition = compose(["experiment=mlp", "name=far", f"storage_path={in_s3}", "cluster=existing"])
    storage = Storage(in_s3).child("far")
    storage.write_bytes("config.yaml", composition.text.encode())
    record = Record("far", storage.display, created="2026-01-01T12:00:00+00:00", attempts=1, status="FINISHED")
    record.write(storage)
    # The run was submitted from here, so only its submission is on this machine.
    record.write(Storage(in_tmp / "runs" / SUBMITTED / "far"))
    checkpoints = Checkpointer(storage.child("checkpoints"), mode="max", num_to_keep=None)
    for step in (10, 20, 30):
        checkpoints.save(step, {"step": step}, {}, metric=1 / step)
    checkpoints.close()
    storage.write_bytes("checkpoints/step-000000099/shared.json", b"{}")
    storage.write_bytes("attempt-1/deep/er.json", b"123")
    Storage(in_s3).child("other").write_bytes("checkpoints/step-000000001/shared.json", b"{}")
    looked = prune(delete=False)
    assert [(item.kind, item.path.rpartition("/")[2]) for item in looked.items] == [
        ("checkpoint", "step-000000020"),
        ("unfinished save", "step-000000099"),
        ("ray", "attempt-1"),
    ]
    assert looked.items[-1].bytes == 3
    assert prune().items == looked.items
    assert [entry.name for entry in storage.list("checkpoints")] == ["step-000000010", "step-000000030"]
    assert not storage.exists("attempt-1")
    assert Storage(in_s3).exists("other/checkpoints/step-000000001/shared.json")
    found = to_evaluate("far", ["cluster=inline"]).experiment
    assert found.evaluate is not None
    assert (found.evaluate.run_dir, found.storage_path) == (storage.display, in_s3)
