"""The output of a sweep: the live table in windows of any size, the lines of a log, and the command of the best
trial."""

from __future__ import annotations

import io
import math
import re
import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from raytrainer.progress import Display
from raytrainer.sweep.board import Board
from raytrainer.sweep.journal import Report, Trial
from raytrainer.sweep.table import command_line, final_table, ranked, short_names, trial_line, written
from raytrainer.sweep.trial_state import Status
from tests.terminal import Terminal, attach

KEYS = ["optimizer.lr", "model.width"]
T0 = 1_700_000_000.0


def trial(
    number: int,
    values: list[float] = [],  # noqa: B006  # never changed
    status: Status = Status.RUNNING,
    *,
    started: float = T0,
    seconds: float = 10.0,
    cause: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> Trial:
    """Return a trial that reported these values, one every 11 steps."""
    reports = [Report(i, 11 * i, v, {"val/accuracy": v}, started + i) for i, v in enumerate(values, 1)]
    given = parameters or {"optimizer.lr": 0.1 / number, "model.width": 64 * number}
    overrides = [f"{k}={v}" for k, v in given.items()]
    ended = None if status == "running" else started + seconds
    return Trial(f"{number:04d}", given, overrides, started, None, reports, status, cause, ended)


class Watched:
    """A board, its stream and its clock."""

    def __init__(self, stream: io.StringIO, **settings: Any) -> None:
        self.stream, self.now = stream, SimpleNamespace(seconds=T0)
        self.display = Display(stream)
        self.log = io.StringIO()
        self.display.also = self.log.write
        given = {"metric": "val/accuracy", "mode": "max", "keys": KEYS, "total": 64, "at_once": 2, **settings}
        self.board = Board(self.display, "asha", clock=lambda: self.now.seconds, **given)

    def start(self, one: Trial) -> None:
        one.started = self.now.seconds
        self.board.start(one)

    def run(self, one: Trial, seconds: float = 10.0) -> None:
        """Run a whole trial."""
        status, one.status = one.status, Status.RUNNING
        self.start(one)
        self.now.seconds += seconds
        one.status, one.ended = status, self.now.seconds
        self.board.end(one)

    def tick(self, seconds: float) -> None:
        self.now.seconds += seconds
        self.board.tick()

    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal(120, 24)
    attach(monkeypatch, terminal)
    return terminal


def mixed(watched: Watched) -> list[Trial]:
    """Run two finished, one pruned and one failed trial beside two running ones, in 40 s. Return all of them."""
    running = [trial(5, [0.5, 0.61234]), trial(6)]
    for one in running:
        watched.start(one)
    ended = [
        trial(1, [0.5, 0.8, 0.7], Status.FINISHED),
        trial(2, [0.5, 0.9, 0.97218], Status.FINISHED),
        trial(3, [0.3], Status.PRUNED),
        trial(4, [math.nan], Status.FAILED, cause="RuntimeError: out of memory\nat step 13"),
    ]
    for one in ended:
        watched.run(one)
    return [*ended, *running]


def test_the_table_has_the_best_first_then_what_runs_then_the_others(terminal: Terminal) -> None:
    watched = Watched(terminal)
    mixed(watched)
    watched.tick(1)
    assert terminal.screen() == [
        # The line of a failed trial stays on the screen.
        "trial 0004 failed at evaluation 1 (step 11), 0:10: RuntimeError: out of memory at step 13; lr 0.025  width 256",
        # 58 trials remain, 2 at a time, 10 s each. The running ones have outlasted every ended trial, so they do not
        # count.
        "sweep asha: 4 of 64 done, 2 running, 1 pruned, 1 failed  best val/accuracy 0.9722 (0002)  0:41 elapsed  4:50 left",
        "trial  status     value  eval  step  time       lr  width",
        "0002   finished  0.9722     3    33  0:10     0.05    128",
        "0001   finished     0.8     3    33  0:10      0.1     64",
        "0005   running   0.6123     2    22  0:41     0.02    320",
        "0006   running        -     -     -  0:41  0.01667    384",
        "0003   pruned       0.3     1    11  0:10  0.03333    192",
        "0004   failed       nan     1    11  0:10  RuntimeError: out of memory at step 13",
    ]
    # The lines of a log file beside the terminal.
    ends = [re.sub(" (at|before).*", "", line) for line in watched.log.getvalue().splitlines() if "after" not in line]
    assert ends == [
        "trial 0006 begins: lr 0.01667  width 384",
        "trial 0001 finished",
        "trial 0002 finished",
        "trial 0003 pruned",
        "trial 0004 failed",
    ]
    watched.board.close()
    assert [line[:10] for line in terminal.screen()] == ["trial 0004"]


def test_reports_and_the_best_are_seen_while_a_trial_runs(terminal: Terminal) -> None:
    watched = Watched(terminal, mode="min")
    mixed(watched)
    running = trial(7)
    watched.start(running)
    running.reports.append(Report(1, 11, 0.0123456, {}, T0))
    watched.tick(0.3)
    assert "best val/accuracy 0.01235 (0007)" in terminal.screen()[1]
    assert any(line.startswith("0007   running   0.01235     1    11  0:00") for line in terminal.screen())
    assert [line[:4] for line in terminal.screen()[3:5]] == ["0001", "0002"]  # lower is better; both have 0.5


def test_it_is_drawn_four_times_a_second_at_most(terminal: Terminal) -> None:
    watched = Watched(terminal)
    drawn = 0
    for _ in range(100):
        before = len(terminal.getvalue())
        watched.tick(0.05)
        drawn += len(terminal.getvalue()) > before
    assert 15 <= drawn <= 21
    watched.now.seconds -= 3600  # the clock is set back
    before = len(terminal.getvalue())
    watched.tick(0.0)
    assert len(terminal.getvalue()) > before


@pytest.mark.parametrize(("columns", "rows"), [(40, 10), (20, 5), (60, 8), (80, 24), (200, 60), (8, 3)])
@pytest.mark.parametrize("number", [0, 1, 6, 300])
def test_it_fits_every_window(terminal: Terminal, columns: int, rows: int, number: int) -> None:
    terminal.resize(columns, rows)
    watched = Watched(terminal, total=300, keys=[*KEYS, "model", "data.train.path"], at_once=16)
    for n in range(1, number + 1):
        settings = {
            "optimizer.lr": 1e-5 * n,
            "model.width": n,
            "model": "a-long-name-of-a-model",
            "data.train.path": "/x" * 40,
        }
        one = trial(n, [0.001 * n], Status.PRUNED if n % 3 else Status.FINISHED, parameters=settings)
        watched.run(one) if n % 20 else watched.start(one)
    watched.tick(1)
    assert len(terminal.screen()) <= rows - 1
    assert all(len(line) < columns for line in terminal.screen())
    assert not terminal.scrolled
    watched.board.close()
    assert terminal.screen() == []


def test_a_small_window_has_a_part_of_each_kind(terminal: Terminal) -> None:
    terminal.resize(40, 12)
    watched = Watched(terminal)
    mixed(watched)
    for n in range(10, 20):
        watched.run(trial(n, [0.5 + n / 100], Status.FINISHED))
    watched.tick(1)
    screen = terminal.screen()
    statuses = [line.split()[1] for line in screen if re.match(r"\d{4} ", line)]
    assert statuses[:2] == ["finished", "finished"]
    assert set(statuses) == {"finished", "running", "pruned", "failed"}
    assert screen[0] == "sweep asha: 14 of 64 done, 2 running"


def test_the_window_may_be_resized_at_any_time(terminal: Terminal) -> None:
    watched = Watched(terminal)
    mixed(watched)
    for columns, rows in [(60, 30), (120, 40), (45, 30), (90, 30)]:
        terminal.resize(columns, rows)
        watched.tick(1)
        heads = [line for line in terminal.screen() if line.startswith("trial  status")]
        assert len(heads) == 1
        assert len([line for line in terminal.screen() if line.startswith("sweep asha")]) == 1


def test_columns_do_not_jump_when_rows_go(terminal: Terminal) -> None:
    watched = Watched(terminal, total=2)
    running = trial(1, [0.123456])
    watched.start(running)
    watched.tick(1)
    before = terminal.screen()[1]
    running.reports.append(Report(2, 22, 0.1, {}, T0))
    watched.tick(1)
    assert terminal.screen()[1] == before


def test_time_left_is_blank_while_nothing_is_known(terminal: Terminal) -> None:
    watched = Watched(terminal, total=10, at_once=2)
    assert watched.board.seconds_left() is None
    watched.run(trial(1, [0.1], Status.FINISHED), 10)
    watched.run(trial(2, [0.1], Status.FAILED), 1)
    watched.run(trial(3, [0.1], Status.PRUNED), 4)
    watched.tick(1)
    assert watched.board.seconds_left() is None
    assert "left" not in terminal.screen()[1]
    watched.run(trial(4, [0.1], Status.PRUNED), 4)
    # Six more trials of 6 s each, two at a time.
    assert watched.board.seconds_left() == pytest.approx(18)
    watched.start(trial(5))
    watched.now.seconds += 5
    # Five more trials, and one that has outlasted the 4 s of the pruned ones, so it is expected to take 10 s.
    assert watched.board.seconds_left() == pytest.approx((5 * 6 + 5) / 2)
    watched.board.total = 5
    assert watched.board.seconds_left() == pytest.approx(5)
    watched.now.seconds += 100
    assert watched.board.seconds_left() == 0


def test_time_left_ends_with_the_budget(terminal: Terminal) -> None:
    watched = Watched(terminal, total=1000, time_budget_s=60)
    watched.tick(11)
    assert terminal.screen()[0].endswith("0:11 elapsed  at most 0:49 left")
    for n in range(1, 4):
        watched.run(trial(n, [0.1], Status.FINISHED), 5)
    watched.tick(1)
    assert terminal.screen()[0].endswith("0:27 elapsed  0:33 left")
    watched.board.close()
    endless = Watched(terminal, total=None, time_budget_s=60)
    endless.run(trial(1, [0.1], Status.FINISHED), 90)
    endless.tick(1)
    assert "1 done, 0 running" in terminal.screen()[0]
    assert terminal.screen()[0].endswith("at most 0:00 left")


def test_a_sweep_that_goes_on_begins_with_what_it_has(terminal: Terminal) -> None:
    known = [trial(n, [0.1 * n], Status.FINISHED, seconds=20) for n in range(1, 4)]
    watched = Watched(terminal, total=8, at_once=1, trials=[*known, trial(4, [0.9], Status.FAILED), trial(5, [0.2])])
    watched.tick(1)
    assert terminal.screen()[0].startswith("sweep asha: 4 of 8 done, 1 running, 1 failed  best val/accuracy 0.3 (0003)")
    assert watched.board.seconds_left() == pytest.approx(3 * 20 + 19)
    assert watched.log.getvalue() == ""  # they were logged when they ended


def test_a_trial_that_is_tried_again_counts_once(terminal: Terminal) -> None:
    watched = Watched(terminal, total=1)
    one = trial(1, [0.1], Status.FINISHED)
    watched.start(one)
    watched.now.seconds += 50
    watched.run(one, 5)
    watched.tick(1)
    assert terminal.screen()[0].startswith("sweep asha: 1 of 1 done, 0 running")


def test_a_log_gets_a_line_a_trial_and_a_summary_in_thirty_seconds() -> None:
    watched = Watched(io.StringIO())
    running = trial(9, [0.5])
    watched.start(running)
    watched.start(trial(10))
    watched.run(trial(7, [0.8, 0.7, 0.7], Status.PRUNED, parameters={"optimizer.lr": 0.0123, "model.width": 64}), 4)
    for _ in range(50):
        watched.tick(0.5)
    assert watched.lines()[:2] == [
        "trial 0009 continues after evaluation 1: lr 0.01111  width 576",
        "trial 0010 begins: lr 0.01  width 640",
    ]
    assert watched.lines()[3:] == [
        "trial 0007 pruned at evaluation 3 (step 33), 0:04: val/accuracy 0.8; lr 0.0123  width 64"
    ]
    watched.tick(2)
    summary = "sweep asha: 1 of 64 done, 2 running, 1 pruned  best val/accuracy 0.8 (0007)  0:31 elapsed"
    assert watched.lines()[4:] == [f"{summary}  (0009 at step 11, 0010 begins)"]
    for _ in range(100):
        watched.tick(1)
    assert len(watched.lines()[3:]) == 2 + 3
    assert watched.log.getvalue() == watched.stream.getvalue()
    assert not any(c in watched.stream.getvalue() for c in "\r\x1b")
    watched.board.close()
    assert len(watched.lines()[3:]) == 5


@pytest.mark.parametrize(
    ("one", "line"),
    [
        (
            trial(1, [0.5, 0.97218, 0.9], Status.FINISHED, seconds=75),
            "trial 0001 finished at evaluation 3 (step 33), 1:15: val/accuracy 0.9722; lr 0.1  width 64",
        ),
        (
            trial(2, [math.nan], Status.FINISHED),
            "trial 0002 finished at evaluation 1 (step 11), 0:10: val/accuracy nan; lr 0.05  width 128",
        ),
        (
            trial(3, [], Status.FAILED, cause="ValueError: \x1b[31mno\n  such thing"),
            "trial 0003 failed before an evaluation, 0:10: ValueError:  [31mno such thing; lr 0.03333  width 192",
        ),
        (trial(4, [], Status.STOPPED), "trial 0004 stopped before an evaluation, 0:10; lr 0.025  width 256"),
    ],
)
def test_the_line_of_a_trial(one: Trial, line: str) -> None:
    assert re.sub(" +", " ", trial_line(one, "val/accuracy", "max", short_names(KEYS))) == re.sub(" +", " ", line)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123456, "0.0001235"),
        (12345.678, "1.235e+04"),
        (1234567, "1234567"),
        (True, "true"),
        (None, "null"),
        ("resnet18", "resnet18"),
        ("[1,2,3]", "[1,2,3]"),
        ("/a/very/long/path/of/data", "/a/very/long/pa…"),
        ("two\nlines", "two lines"),
        (math.nan, "nan"),
    ],
)
def test_values_as_they_are_shown(value: Any, text: str) -> None:
    assert written(value) == text


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["optimizer.lr", "model.width", "model", "+model.dropout"], ["lr", "width", "model", "dropout"]),
        (["a.lr", "b.lr", "seed"], ["a.lr", "b.lr", "seed"]),
        (["x.a.lr", "y.a.lr", "z.b.lr"], ["x.a.lr", "y.a.lr", "b.lr"]),
        (["lr", "optimizer.lr"], ["lr", "optimizer.lr"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_they_can_be(keys: list[str], names: list[str]) -> None:
    assert short_names(keys) == dict(zip(keys, names, strict=True))


def test_the_final_table_is_of_the_ten_best() -> None:
    trials = [trial(n, [0.01 * n, math.nan], Status.FINISHED) for n in range(1, 15)]
    trials += [
        trial(15, [math.nan], Status.FINISHED),
        trial(16, [0.995, math.inf], Status.FAILED, cause="diverged"),
        trial(17, [0.14]),
    ]
    table = final_table(trials, metric="val/accuracy", mode="max", keys=KEYS).splitlines()
    assert table[:4] == [
        "trial  status    val/accuracy  eval  step  time        lr  width",
        "0014   finished          0.14     2    22  0:10  0.007143    896",
        "0017   running           0.14     1    11  0:00  0.005882   1088",
        "0013   finished          0.13     2    22  0:10  0.007692    832",
    ]
    assert len(table) == 11
    # A trial whose configuration fails ranks last, whatever value it reached.
    assert ranked(trials, "max")[-1].id == "0016"
    assert [t.id for t in ranked(trials, "min")][:3] == ["0001", "0002", "0003"]
    assert final_table(trials[14:15], metric="val/loss", mode="min", keys=KEYS) == "no trial has a val/loss"


def test_the_best_as_a_command_can_be_copied_into_a_shell() -> None:
    one = trial(3)
    one.overrides = ["model=resnet18", "optimizer.lr=0.01", 'data.path="a b\'s"', "+model.layers=[1,2]", "+x.c={a: 1}"]
    fixed = [
        "experiment=mlp",
        "sweep=asha",
        "sweep.num_samples=64",
        "+sweep.space.x=1,2",
        "-m",
        "name=s",
    ]
    fixed += ["hydra.sweeper.n=3", "hydra/sweeper=optuna", "hydra.searchpath=[pkg://mine]", "trainer.max_epochs=3"]
    command = command_line("'/a b/python' -m raytrainer", ["--config-dir=my conf"], fixed, one.overrides)
    assert shlex.split(command) == [
        *("/a b/python", "-m", "raytrainer", "--config-dir=my conf", "experiment=mlp"),
        *("hydra.searchpath=[pkg://mine]", "trainer.max_epochs=3", *one.overrides),
    ]
    assert "\n" not in command
