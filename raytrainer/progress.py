"""The output during training: rank 0 reports events as small messages, and the launching process shows them.

A terminal gets a live line or a live block of lines. Anything else (a file, a Ray job's log) gets only permanent lines.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from raytrainer.core import streams
from raytrainer.core.formatting import duration as duration  # also imported from here

# The start of an output line of a worker that is a message for the launching process, not text for a person.
MARK = "\x1eraytrainer "
_EVERY_S = 5.0  # without a terminal: at least this long between two progress lines


class Reporter:
    """A listener (events.py) on rank 0 that turns events into messages for `emit`."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._total: int | None = None
        self._per_epoch: int | None = None
        self._since: tuple[float, int] = (0.0, 0)

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        self._total, self._per_epoch = event.total_steps, event.steps_per_epoch
        self._since = (time.monotonic(), event.step)
        self._emit(
            {
                "kind": "start",
                "step": event.step,
                "total": event.total_steps,
                "parameters": event.parameters,
                "trainable": event.trainable,
            }
        )

    def on_log(self, trainer: Any, event: Any) -> None:
        if "train/loss" not in event.metrics:
            return  # only metrics of a callback
        began, first = self._since
        left = None
        if self._total is not None and event.step > first:
            left = (time.monotonic() - began) / (event.step - first) * (self._total - event.step)
        epochs = math.ceil(self._total / self._per_epoch) if self._total and self._per_epoch else None
        self._emit(
            {
                "kind": "log",
                "step": event.step,
                "total": self._total,
                "epoch": event.epoch + 1,
                "epochs": epochs,
                "left": left,
                "metrics": dict(event.metrics),
            }
        )

    def on_eval_end(self, trainer: Any, event: Any) -> None:
        self._emit({"kind": "eval", "step": event.step, "epoch": event.epoch + 1, "metrics": dict(event.metrics)})

    def on_checkpoint(self, trainer: Any, event: Any) -> None:
        self._emit({"kind": "checkpoint", "step": event.step})


def to_line(message: Mapping[str, Any]) -> str:
    """Return a message as one line of a worker's output."""
    return MARK + json.dumps(message)


def from_line(line: str) -> dict[str, Any] | None:
    """Return the message in a line of a worker's output; None if the line is text for a person."""
    if not line.startswith(MARK):
        return None
    message = json.loads(line[len(MARK) :])
    return message if isinstance(message, dict) else None


class Display:
    """Shows messages and text on a stream, from any thread. It is the only code that controls a terminal: a richer
    display replaces `draw`, which gets the whole live part as lines.

    It does not use `rich.live`, which hides the cursor (a killed process leaves it hidden), erases the block before it
    writes it again (which flickers), and loses lines when the window gets narrower.

    Attributes:
        live: Whether the stream is a terminal, which gets a live part below the permanent lines.
        step: The last step that a message reported.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr  # None: it was closed
        self.live = streams.is_terminal(self._stream) and os.environ.get("TERM") != "dumb"
        self._shown = ""
        self._block: list[str] = []
        self._lock = threading.RLock()
        self._last_line = -_EVERY_S
        self.also: Callable[[str], object] | None = None  # a log that also gets every permanent line
        self.step = 0

    def show(self, message: Mapping[str, Any]) -> None:
        """Show a message from rank 0."""
        self.step = max(self.step, int(message.get("step", 0)))
        if message["kind"] == "start" and message["step"]:
            self.say(f"continuing after step {message['step']}")
        elif message["kind"] == "start":
            whole, trained = message["parameters"], message["trainable"]
            of = "" if trained == whole else f" of {whole:,}"
            self.say(f"training {trained:,}{of} parameters")
        elif message["kind"] == "log":
            self._progress(progress_line(message), last=message["step"] == message["total"])
        elif message["kind"] == "eval":
            self.say(f"epoch {message['epoch']}  step {message['step']}  {figures(message['metrics'])}")
        elif message["kind"] == "note":
            self.say(str(message["text"]))
        elif message["kind"] == "warning":
            self.say(f"warning: {message['text']}")

    def say(self, text: str) -> None:
        """Print one or several permanent lines, above the live part."""
        with self._lock:
            block = self._block
            self._clear()
            streams.write(self._stream, text + "\n")
            if block:
                self.draw(block)
            if self.also is not None:
                self.also(text + "\n")

    def note(self, text: str) -> None:
        """Print a permanent line, except on a terminal, whose live block shows the same."""
        if not self.live:
            self.say(text)
        elif self.also is not None:
            self.also(text + "\n")

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the live part by a block of lines, as much of it as fits. Do nothing without a terminal."""
        if not self.live:
            return
        with self._lock:
            columns, rows = self.size()
            kept = [_cut(line, columns - 1) for line in lines[: rows - 1]]
            # Each line overwrites the old one, so that nothing flickers. The cursor stays below the block, so that
            # typed (^C) or later output is not inside it. The cursor is never hidden, so it cannot stay hidden.
            text = self._start() + "".join(f"{line}\x1b[K\n" for line in kept) + "\x1b[J"
            streams.write(self._stream, text)
            self._shown, self._block = "", kept

    def size(self) -> tuple[int, int]:
        """Return the current columns and rows of the terminal."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):  # no terminal, or a stream without a file
            size = os.terminal_size((0, 0))
        if not (size.columns and size.lines):
            size = shutil.get_terminal_size()
        return size.columns, size.lines

    def close(self) -> None:
        """Remove the live part."""
        with self._lock:
            self._clear()

    def _progress(self, line: str, last: bool) -> None:
        if self.live:
            with self._lock:
                self._clear()
                self._shown = _cut(line, self.size()[0] - 1)
                streams.write(self._stream, self._shown)
        elif last or time.monotonic() - self._last_line >= _EVERY_S:
            self._last_line = time.monotonic()
            self.say(line)

    def _start(self) -> str:
        """Return the escape sequence that moves the cursor to the start of the live part."""
        if not self._block:
            return "\r" if self._shown else ""
        # A window that was made narrower shows a line in several rows.
        columns = self.size()[0]
        return f"\r\x1b[{sum(max(1, -(-_width(line) // columns)) for line in self._block)}A"

    def _clear(self) -> None:
        if self._shown or self._block:
            streams.write(self._stream, self._start() + ("\x1b[J" if self._block else "\x1b[K"))
            self._shown, self._block = "", []


def _width(line: str) -> int:
    """Return how many columns of a terminal a line takes. Chinese characters take two, combining ones none."""
    if line.isascii():
        return len(line)
    from rich.cells import cell_len

    return cell_len(line)


def _cut(line: str, columns: int) -> str:
    """Return a line, cut to a number of columns of a terminal."""
    if _width(line) <= columns:
        return line
    from rich.cells import set_cell_size

    return set_cell_size(line, columns)


def progress_line(message: Mapping[str, Any]) -> str:
    """Return the progress as text: `epoch 3/12  step 30/132  loss 0.2113  lr 0.094  4,812 samples/s  0:21 left`."""
    metrics = message["metrics"]
    parts = [f"epoch {message['epoch']}" + (f"/{message['epochs']}" if message["epochs"] else "")]
    parts.append(f"step {message['step']}" + (f"/{message['total']}" if message["total"] else ""))
    parts.append(f"loss {metrics.get('train/loss', math.nan):.4g}")
    parts.append(f"lr {metrics.get('train/lr', math.nan):.3g}")
    unit = "tokens" if "train/tokens_per_second" in metrics else "samples"
    parts.append(f"{metrics.get(f'train/{unit}_per_second', math.nan):,.0f} {unit}/s")
    if message["left"] is not None:
        parts.append(f"{duration(message['left'])} left")
    return "  ".join(parts)


def figures(metrics: Mapping[str, float]) -> str:
    """Return metrics as text: `val/loss 0.1261  val/accuracy 0.9833`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
