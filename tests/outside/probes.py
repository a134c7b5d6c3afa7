"""What the tests' launches train with: a user's package outside of ours, found by PYTHONPATH.
It notes what each rank does, and does the things that faults are made of.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrainer.losses import CrossEntropy


class Steps:
    """A callback: each rank appends `process, step, time` to steps/rank-N after every step, then pauses."""

    def __init__(self, pause_s: float = 0.0, folder: str = "steps") -> None:
        self._pause_s, self._folder = pause_s, Path(folder)
        self._file = -1

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        self._file = os.open(self._folder / f"rank-{trainer.world.rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_step_end(self, trainer: Any, event: Any) -> None:
        os.write(self._file, f"{os.getpid()} {event.step} {time.monotonic()}\n".encode())
        time.sleep(self._pause_s)


class Misbehaves:
    """A callback: after `step`, on `rank` alone, it raises, sleeps for ever, or prints `megabytes`."""

    def __init__(self, step: int, rank: int = 0, raises: str = "", sleeps: bool = False, megabytes: int = 0) -> None:
        self._step, self._rank, self._raises, self._sleeps, self._megabytes = step, rank, raises, sleeps, megabytes

    def on_step_end(self, trainer: Any, event: Any) -> None:
        if event.step != self._step or trainer.world.rank != self._rank:
            return
        for _ in range(self._megabytes * 1024):
            sys.stdout.write("x" * 1023 + "\n")
        if self._raises:
            raise ValueError(self._raises)
        while self._sleeps:
            time.sleep(1)


class NanAfter(CrossEntropy):
    """The cross entropy, and NaN from its `calls`-th evaluation in training on."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__(**options)
        self._left = calls

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        values = super().__call__(model, batch)
        if model.training:
            self._left -= 1
            if self._left < 0:
                values["loss"] = values["loss"] * torch.nan
        return values
