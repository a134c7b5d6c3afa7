"""What a person sees during training: messages from rank 0, one live line on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import math
import os
import struct
import termios
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from raytrainer import progress
from raytrainer.events import CheckpointSaved, EvalEnd, FitStart, Logged
from raytrainer.progress import Display, Reporter, duration, figures, from_line, progress_line, to_line
from tests.terminal import Terminal, attach

METRICS = {"train/loss": 0.21134, "train/lr": 0.0941, "train/samples_per_second": 4812.4}
LOG: dict[str, Any] = {
    "kind": "log",
    "step": 30,
    "total": 132,
    "epoch": 3,
    "epochs": 12,
    "left": 21.2,
    "metrics": METRICS,
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that the test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_a_message_survives_a_workers_output() -> None:
    assert from_line(to_line(LOG)) == LOG
    assert math.isnan(from_line(to_line({"kind": "log", "left": math.nan}))["left"])  # type: ignore[index]
    assert "\n" not in to_line({"text": "two\nlines"})


@pytest.mark.parametrize("line", ["", "plain text", "raytrainer says hello", "{}", " " + to_line(LOG)])
def test_text_of_a_person_is_not_a_message(line: str) -> None:
    assert from_line(line) is None


def test_progress_line() -> None:
    assert progress_line(LOG) == "epoch 3/12  step 30/132  loss 0.2113  lr 0.0941  4,812 samples/s  0:21 left"


def test_progress_line_of_a_language_model() -> None:
    metrics = {**METRICS, "train/tokens_per_second": 1_048_576.0}
    assert "  1,048,576 tokens/s  " in progress_line({**LOG, "metrics": metrics})


def test_progress_line_of_a_run_without_a_known_end() -> None:
    bare = progress_line({**LOG, "total": None, "epochs": None, "left": None, "metrics": {}})
    assert bare == "epoch 3  step 30  loss nan  lr nan  nan samples/s"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00"), (20.6, "0:21"), (59.7, "1:00"), (725, "12:05"), (11099, "3:04:59")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_figures() -> None:
    assert figures({"val/loss": 0.12614, "val/accuracy": 0.98333}) == "val/loss 0.1261  val/accuracy 0.9833"


def test_the_reporter_tells_what_the_loop_tells(clock: SimpleNamespace) -> None:
    told: list[dict[str, Any]] = []
    reporter = Reporter(told.append)
    reporter.on_fit_start(
        None, FitStart(step=10, total_steps=110, steps_per_epoch=11, world_size=2, parameters=99, trainable=33)
    )
    clock.seconds += 4.0
    reporter.on_log(None, Logged(step=30, epoch=2, metrics=METRICS))
    reporter.on_eval_end(None, EvalEnd(step=33, epoch=2, metrics={"val/loss": 1.0}))
    reporter.on_checkpoint(None, CheckpointSaved(step=33, metric=1.0, stall_s=0.1))
    assert [m["kind"] for m in told] == ["start", "log", "eval", "checkpoint"]
    # It continued from step 10: 20 steps took 4 s, and 80 are left.
    assert told[1]["left"] == pytest.approx(16.0)
    assert (told[1]["epoch"], told[1]["epochs"], told[1]["total"]) == (3, 10, 110)
    assert all(from_line(to_line(m)) == m for m in told)


def test_without_a_known_end_no_time_left(clock: SimpleNamespace) -> None:
    told: list[dict[str, Any]] = []
    reporter = Reporter(told.append)
    reporter.on_fit_start(
        None, FitStart(step=0, total_steps=None, steps_per_epoch=None, world_size=1, parameters=9, trainable=9)
    )
    reporter.on_log(None, Logged(step=5, epoch=0, metrics=METRICS))
    assert told[1]["left"] is None
    assert told[1]["epochs"] is None


def test_no_terminal_gets_clean_lines_one_in_five_seconds(clock: SimpleNamespace) -> None:
    stream = io.StringIO()
    display = Display(stream)
    for step in range(1, 11):
        clock.seconds += 1.0
        display.show({**LOG, "step": step, "total": 100})
    display.show({**LOG, "step": 100, "total": 100})  # the last step is always shown
    display.show({"kind": "eval", "step": 100, "epoch": 9, "metrics": {"val/loss": 0.5}})
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["step 1/100", "step 6/100", "step 100/100", "step 100"]
    assert not any(c in stream.getvalue() for c in "\r\x1b")


def test_a_terminal_gets_one_live_line(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal(columns=30)
    attach(monkeypatch, stream)
    display = Display(stream)
    display.show(LOG)
    assert stream.getvalue() == progress_line(LOG)[:29]  # it never wraps
    display.show({**LOG, "step": 31})
    assert "\n" not in stream.getvalue()
    display.say("kept")
    display.close()
    assert stream.getvalue().endswith("\r\x1b[Kkept\n")


def test_every_line_for_good_also_goes_to_the_log(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, log = Terminal(), io.StringIO()
    attach(monkeypatch, stream)
    display = Display(stream)
    display.also = log.write
    display.show({"kind": "start", "step": 0, "parameters": 308074, "trainable": 308074})
    display.show({"kind": "start", "step": 0, "parameters": 308074, "trainable": 1290})
    display.show(LOG)
    display.show({"kind": "warning", "text": "odd"})
    assert log.getvalue() == "training 308,074 parameters\ntraining 1,290 of 308,074 parameters\nwarning: odd\n"


def test_going_on_is_said_and_the_last_step_is_remembered(clock: SimpleNamespace) -> None:
    stream = io.StringIO()
    display = Display(stream)
    display.show({"kind": "start", "step": 40, "parameters": 1, "trainable": 1})
    display.show({"kind": "checkpoint", "step": 55})
    display.show({"kind": "hello", "rank": 0})
    assert stream.getvalue() == "continuing after step 40\n"
    assert display.step == 55


def test_a_block_is_drawn_in_place_below_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, log = Terminal(20, 6), io.StringIO()
    attach(monkeypatch, stream)
    display = Display(stream)
    display.also = log.write
    display.say("before")
    display.draw(["head", "one", "two"])
    display.draw(["head 2", "one"])
    assert stream.screen() == ["before", "head 2", "one"]
    display.say("for good")
    assert stream.screen() == ["before", "for good", "head 2", "one"]
    display.note("for the log")
    display.close()
    assert stream.screen() == ["before", "for good"]
    assert log.getvalue() == "before\nfor good\nfor the log\n"
    assert "\x1b[?" not in stream.getvalue()  # the cursor is never hidden


def test_a_block_takes_the_place_of_the_line(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    attach(monkeypatch, stream)
    display = Display(stream)
    display.show(LOG)
    display.draw(["a block"])
    assert stream.screen() == ["a block"]
    display.show(LOG)
    assert stream.screen() == [progress_line(LOG)]


def test_a_block_fits_the_window_whatever_its_size_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal(40, 10)
    attach(monkeypatch, stream)
    display = Display(stream)
    display.say("kept")
    block = [f"{n} " + "x" * 100 for n in range(30)]
    display.draw(block)
    assert [len(row) for row in stream.screen()] == [39] * 9
    assert stream.scrolled == ["kept"]
    display.draw(block[:4])
    for columns, rows in [(15, 20), (80, 24), (33, 12), (100, 30)]:
        stream.resize(columns, rows)  # the terminal has reflowed the old block
        display.draw(block[:3])
        assert stream.screen() == [line[: columns - 1] for line in block[:3]]
    assert stream.scrolled == ["kept"]


def test_what_is_typed_below_a_block_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal(20, 6)
    attach(monkeypatch, stream)
    display = Display(stream)
    display.draw(["x" * 19, "y" * 19])
    stream.write("^C")  # the terminal's own echo
    display.say("stopping")
    display.close()
    assert stream.screen() == ["stopping"]


def test_a_block_with_wide_characters_fits_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Chinese character takes two columns. A line that is too long would wrap, and the next block would miss its start."""
    terminal = Terminal(20, 5)
    attach(monkeypatch, terminal)
    display = Display(terminal)
    display.draw(["模" * 15, "lr 0.1 模型…"])
    drawn = [line.removesuffix("\x1b[K") for line in terminal.getvalue().removesuffix("\x1b[J").splitlines()]
    assert drawn == ["模" * 9 + " ", "lr 0.1 模型…"]
    terminal.resize(10, 5)
    display.draw(["again"])
    assert "\x1b[4A" in terminal.getvalue()  # two rows of each line in the narrow window


@pytest.mark.parametrize("dumb", [True, False])
def test_without_a_capable_terminal_there_is_no_block(dumb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if dumb else io.StringIO()
    monkeypatch.setenv("TERM", "dumb")
    display = Display(stream)
    display.draw(["head", "one"])
    display.note("a line instead")
    display.close()
    assert stream.getvalue() == "a line instead\n"


def test_threads_do_not_write_into_each_others_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal(60, 30)
    attach(monkeypatch, stream)
    display = Display(stream)

    def speak(name: int) -> None:
        for i in range(5):
            display.say(f"{name} says {i}")

    speakers = [threading.Thread(target=speak, args=(name,)) for name in range(4)]
    for speaker in speakers:
        speaker.start()
    for i in range(50):
        display.draw([f"drawn {i}", "=" * 50])
    for speaker in speakers:
        speaker.join()
    assert stream.screen()[-2:] == ["drawn 49", "=" * 50]
    assert sorted(stream.screen()[:-2]) == sorted(f"{n} says {i}" for n in range(4) for i in range(5))


def test_the_size_is_that_of_the_stream_whatever_else_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 17, 91, 0, 0))
        with open(theirs, "w", closefd=False) as stream:
            assert Display(stream).size() == (91, 17)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))  # how an unknown size is reported
            monkeypatch.setenv("COLUMNS", "77")
            monkeypatch.setenv("LINES", "19")
            assert Display(stream).size() == (77, 19)
    finally:
        os.close(ours)
        os.close(theirs)
