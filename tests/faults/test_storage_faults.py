"""Faults 12, 13, 14, 24 and 33: full disks, truncated files, directories in use, and unusual names."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrainer import cli
from raytrainer.checkpoint import Checkpointer
from raytrainer.storage import Storage
from tests.launches import Runs, checkpoints, launch, launched, observed, record, restarts, steps_of
from tests.test_storage import tiny_disk

pytestmark = pytest.mark.slow

INLINE = ["experiment=mlp", "name=run", "cluster=inline", "tracking.log_model=false"]


def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    """Fault 12: the message names the directory, earlier checkpoints stay valid, and the status is recorded."""
    with tiny_disk(tmp_path, kib=2048) as disk:
        options = [
            f"storage_path={disk}",
            "model.width=64",
            "checkpoint.every_n_steps=4",
            "checkpoint.num_to_keep=null",
        ]
        ended = launched(tmp_path, *INLINE, *options).exits(1)
        assert f"no space at {disk}/run/checkpoints" in ended.out
        assert Runs(tmp_path).status("run") == "FAILED"
        checkpointer = Checkpointer(Storage(disk / "run" / "checkpoints"))
        latest = checkpointer.latest()
        assert latest is not None
        assert latest == checkpointer.list()[-1]
        checkpointer.load(latest)


def test_no_space_for_logs(tmp_path: Path) -> None:
    """Fault 13: a worker prints more than the disk can hold. A message names the directory, and training ends as
    usual."""
    chatty = [
        "+callbacks.chatty._target_=probes.Misbehaves",
        "+callbacks.chatty.step=5",
        "+callbacks.chatty.megabytes=3",
    ]
    with tiny_disk(tmp_path, kib=2048) as disk:
        options = [f"storage_path={disk}", "model.width=64", "trainer.max_epochs=2", "cluster=local"]
        ended = launched(tmp_path, *INLINE, *options, *chatty)
        assert f"no space at {disk}/run/logs" in ended.err
        assert ended.code == {"FINISHED": 0, "FAILED": 1}[Runs(tmp_path).status("run")]


def test_no_space_for_the_spool(tmp_path: Path) -> None:
    """Fault 13: metrics wait in memory while the disk is full, and none is lost."""
    with tiny_disk(tmp_path, kib=4096) as disk:
        options = [f"storage_path={disk}", "model.width=64", "checkpoint.every_n_steps=100000", "trainer.max_epochs=12"]
        arguments = [*INLINE, *options, "trainer.log_every_n_steps=1", "trainer.eval_every_n_steps=0", *observed(0.03)]
        with launch(tmp_path, *arguments) as run:
            run.reaches(30)
            fill(disk / "filler")
            run.said(f"no space at {disk}/run/spool")
            (disk / "filler").unlink()
            run.wait().exits(0)
        assert [step for step, _ in Runs(tmp_path).rows("run")["train/loss"]] == list(range(1, 133))


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_truncated_checkpoint(tmp_path: Path) -> None:
    """Fault 14: the checksum finds the damage, the run continues from the checkpoint before, and a message says so."""
    launched(tmp_path, *INLINE, "trainer.max_epochs=3", *observed()).exits(0)
    last = tmp_path / "runs" / "run" / "checkpoints" / "step-000000033" / "shared-00000.safetensors"
    last.write_bytes(last.read_bytes()[:-1000])
    ended = launched(tmp_path, "resume", "run", "trainer.max_epochs=4").exits(0)
    assert "skipping a corrupt checkpoint" in ended.err
    assert str(last) in ended.err
    assert "continuing after step 22" in ended.err
    assert restarts(steps_of(tmp_path / "steps")) == [(33, 23)]
    assert checkpoints(tmp_path, "run")[-1].step == 44
    rows = Runs(tmp_path).rows("run")["val/loss"]
    assert [step for step, _ in rows] == [11, 22, 33, 44]


def test_two_runs_one_directory(tmp_path: Path) -> None:
    """Fault 24: the second launch is refused, and the message names the owner. A killed owner does not block
    `resume`."""
    arguments = [*INLINE, "trainer.max_epochs=6", *observed(0.1)]
    with launch(tmp_path, *arguments) as first:
        first.reaches(12)
        again = launched(tmp_path, *arguments).exits(2)
        assert "resume run" in again.err
        resumed = launched(tmp_path, "resume", "run").exits(2)
        assert "in use by run (host " in resumed.err
        assert f"pid {first.pid}" in resumed.err
        assert first.process.poll() is None
        first.kill()
    ended = launched(tmp_path, "resume", "run").exits(0)
    assert "taking over the stale lock of run" in ended.err
    ((_, after),) = restarts(steps_of(tmp_path / "steps"))
    assert after > 11
    assert Runs(tmp_path).status("run") == record(tmp_path, "run")["status"] == "FINISHED"


def test_names_of_all_kinds(tmp_path: Path) -> None:
    """Fault 33: everything works below a directory with spaces, quotes, `#`, `%`, non-ASCII and 200 characters, Ray
    included."""
    folder = tmp_path / "with spaces, é, #hash, 100% and 'quotes'" / ("long-" * 40)
    folder.mkdir(parents=True)
    arguments = ["experiment=smoke", "name=run"]
    launched(folder, *arguments).exits(0)
    assert Runs(folder).status("run") == "FINISHED"
    assert checkpoints(folder, "run")[-1].step == 20
    assert [step for step, _ in Runs(folder).rows("run")["train/loss"]] == [5, 10, 15, 20]


def test_a_name_that_a_database_url_cannot_have(tmp_path: Path) -> None:
    """Fault 33: `%41` and `?` have a meaning in a database URL, so a directory with such a name is refused at once."""
    for name in ("%41", "why?"):
        (tmp_path / name).mkdir()
        ended = launched(tmp_path / name, "experiment=smoke").exits(2)
        assert name in ended.err
        assert not (tmp_path / name / "runs").exists()


@pytest.mark.parametrize("name", ["a b", "é", "a#b", "a%b", "a" * 200, "../../x", "/x"])
def test_names_of_runs(name: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 33: a run's name has letters, digits, `.`, `_` and `-`; any other name is refused before anything is
    done."""
    assert cli.main(["experiment=smoke", f"name='{name}'"]) == 2
    assert "name" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []
