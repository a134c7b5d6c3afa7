"""Faults 26 and 27: Ctrl-C and SIGTERM at every stage of a launch, and a terminal that is closed.

Within seconds the launch exits with 130, 143 or 129 and status KILLED. If training had begun, it leaves a checkpoint.
It leaves no process.
"""

from __future__ import annotations

import functools
import os
import pty
import re
import select
import signal
import threading
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from tests.launches import (
    Ended,
    Launch,
    Runs,
    checkpoints,
    empty_store,
    launch,
    observed,
    record,
    seeded,
    steps_of,
    summary,
)
from tests.promises import Within

pytestmark = pytest.mark.slow

END_S = 20.0  # twice the promised time, because a machine may be busy
CODES = {SIGINT: 130, SIGTERM: 143, SIGHUP: 129}
# Where both signals take the same path, SIGTERM runs only nightly; other tests here and in test_cluster_faults.py send
# it.
BOTH = [(SIGINT, True), pytest.param(SIGTERM, False, marks=pytest.mark.nightly)]
LONG = [
    "experiment=mlp",
    "name=run",
    "trainer.max_epochs=1000",
    "trainer.log_every_n_steps=5",
    "tracking.log_model=false",
]
TWO = "scaling.num_workers=2"


def stopped(run: Launch, number: signal.Signals, *, group: bool = False) -> Ended:
    """Send the signal. Check that the launch ends in time with its exit code, and leaves nothing."""
    within = Within(END_S)
    run.signal(number, group=group)
    ended = run.wait(3 * END_S)
    run.nothing_left(END_S)
    within.check(ended)
    # A signal while Python itself starts kills the process. A shell reports the same exit code for that.
    code = 128 - ended.code if ended.code < 0 else ended.code
    assert code == CODES[number], str(ended)
    assert "Traceback" not in ended.err or ended.code < 0, str(ended)
    return ended


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has its own handler for a signal."""
    (line,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(line, 16) >> (number - 1) & 1)


def assert_killed(folder: Path, name: str = "run") -> None:
    assert Runs(folder).status(name) == "KILLED"
    assert record(folder, name)["status"] == "KILLED"
    assert Runs(folder).tags(name)["raytrainer.exit_code"] in {"129", "130", "143"}


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_while_composing(number: signal.Signals, tmp_path: Path) -> None:
    """A signal while the config is composed leaves nothing, because nothing was started."""
    draw = seeded(f"composing, {number.name}")
    for _ in range(3):
        with launch(tmp_path, *LONG, store=False, fresh=True) as run:
            # Before that Python itself starts, which takes longer on a slow machine.
            run.until("it answers signals", functools.partial(catches, run.pid, SIGTERM))
            time.sleep(draw.uniform(0, 0.4))
            stopped(run, number, group=number == SIGINT)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "group"), BOTH)
def test_while_ray_starts(number: signal.Signals, group: bool, tmp_path: Path) -> None:
    draw = seeded(f"starting, {number.name}, {group}")
    with launch(tmp_path, *LONG, TWO, *observed(), store=False) as run:
        run.said("local Ray")
        time.sleep(draw.uniform(0, 8))
        stopped(run, number, group=group)
    assert record(tmp_path, "run")["status"] == "KILLED"
    if (tmp_path / "mlflow.db").exists():
        assert_killed(tmp_path)


@pytest.mark.parametrize(("number", "group"), BOTH)
def test_in_a_step(number: signal.Signals, group: bool, tmp_path: Path) -> None:
    """Both ranks end after the same step, which is in a checkpoint, and the output suggests `resume`."""
    with launch(tmp_path, *LONG, TWO, "checkpoint.every_n_steps=100000", *observed(0.02)) as run:
        run.reaches(23)
        ended = stopped(run, number, group=group)
    last = [steps_of(run.steps, rank)[-1].step for rank in range(2)]
    assert last[0] == last[1]
    assert checkpoints(tmp_path, "run")[-1].step == last[0]
    assert_killed(tmp_path)
    assert Runs(tmp_path).rows("run")["train/loss"][-1][0] == last[0]
    said = summary(ended.out)
    assert said["outcome"].startswith(f"stopped, {last[0]} steps")
    assert "resume run" in ended.out


@pytest.mark.parametrize(("number", "group"), BOTH)
def test_inline(number: signal.Signals, group: bool, tmp_path: Path) -> None:
    with launch(tmp_path, *LONG, "cluster=inline", *observed(0.02)) as run:
        run.reaches(12)
        stopped(run, number, group=group)
    assert checkpoints(tmp_path, "run")[-1].step == steps_of(run.steps)[-1].step
    assert_killed(tmp_path)


# Takes the terminal, as a shell does for its foreground program.
ON_TERMINAL = """
import os, runpy, sys
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
sys.stdout.reconfigure(line_buffering=True)
sys.path.insert(0, os.getcwd())
runpy.run_module("raytrainer", run_name="__main__", alter_sys=True)
"""


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """The hangup also reaches Ray's processes, and nothing reads the output any more; the last checkpoint is still
    saved."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    ours, its = pty.openpty()
    shown, gone = bytearray(), threading.Event()

    def show() -> None:
        while not gone.is_set():
            if select.select([ours], [], [], 0.1)[0]:
                shown.extend(os.read(ours, 65536))

    reading = threading.Thread(target=show)
    reading.start()
    arguments = [os.ttyname(its), *LONG, TWO, "checkpoint.every_n_steps=100000", *observed(0.02)]
    with launch(tmp_path, *arguments, program=("-c", ON_TERMINAL)) as run:
        try:
            run.reaches(23)
        except AssertionError as error:
            raise AssertionError(shown.decode(errors="replace")) from error
        finally:
            gone.set()
            reading.join()
            os.close(its)
            within = Within(END_S)
            os.close(ours)  # the kernel sends SIGHUP, and every write fails from now on
        ended = run.wait(3 * END_S)
        run.nothing_left(END_S)
        within.check(shown.decode(errors="replace"))
    assert ended.code == CODES[SIGHUP], shown.decode(errors="replace")
    last = [steps_of(run.steps, rank)[-1].step for rank in range(2)]
    assert last[0] == last[1] == checkpoints(tmp_path, "run")[-1].step
    assert_killed(tmp_path)


def test_second_forces(tmp_path: Path) -> None:
    """A second Ctrl-C does not wait for a rank that never reaches a log step and so cannot save."""
    stuck = ["+callbacks.stuck._target_=probes.Misbehaves", "+callbacks.stuck.step=13", "+callbacks.stuck.sleeps=true"]
    with launch(tmp_path, *LONG, TWO, *observed(), "+callbacks.stuck.rank=1", *stuck) as run:
        run.reaches(13, rank=1)
        run.signal(SIGINT)
        run.said("saving a checkpoint", 5)
        ended = stopped(run, SIGINT)
    assert "Traceback" not in ended.err
    assert checkpoints(tmp_path, "run")[-1].step == 11
    assert record(tmp_path, "run")["status"] == "KILLED"


def test_stuck_rank_does_not_hold_the_end_up(tmp_path: Path) -> None:
    """One Ctrl-C ends the run, although one rank does not respond."""
    stuck = ["+callbacks.stuck._target_=probes.Misbehaves", "+callbacks.stuck.step=13", "+callbacks.stuck.sleeps=true"]
    with launch(tmp_path, *LONG, TWO, *observed(), "+callbacks.stuck.rank=1", *stuck) as run:
        run.reaches(13, rank=1)
        stopped(run, SIGINT, group=True)
    assert_killed(tmp_path)


@pytest.mark.parametrize(("number", "cluster"), [(SIGINT, "local"), (SIGTERM, "inline")])
def test_at_teardown(number: signal.Signals, cluster: str, tmp_path: Path) -> None:
    """The records of a run that has finished training are still closed in order, with the status KILLED."""
    draw = seeded(f"teardown, {cluster}")
    short = ["experiment=mlp", "name=run", "trainer.max_epochs=2", f"cluster={cluster}", *observed()]
    with launch(tmp_path, *short) as run:
        run.reaches(22)
        time.sleep(draw.uniform(0, 0.3))
        stopped(run, number, group=number == SIGINT)
    assert checkpoints(tmp_path, "run")[-1].step == 22
    assert_killed(tmp_path)
