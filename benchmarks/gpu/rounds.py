"""Run a Trainer and a plain loop in turn on one device, A B A B …, inside one `fit`: each is built and compiled once.
It measures the seconds of each chunk of steps, with a device synchronisation at both ends, and the loss of each window.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from raytrainer.config import compose
from raytrainer.parallel import World
from raytrainer.trainer import Trainer

LOG_EVERY = 10


class PlainLoop:
    """A plain loop over the same batches: `step(i)` trains on batch `i` and returns the loss without waiting for it."""

    def step(self, number: int) -> Tensor:
        raise NotImplementedError


class Alternating:
    """A callback of the Trainer. After the warm-up and after each chunk of steps, the plain loop does as many steps.

    Args:
        plain: Makes the plain loop when the Trainer has its first weights, with which the loop begins.
        warmup: Steps of each that are not measured, because they compile, autotune and allocate memory.
        chunk: Steps of each in a round, including the Trainer's logging.
    """

    def __init__(self, plain: Callable[[Trainer], PlainLoop], warmup: int, chunk: int) -> None:
        self._make, self._warmup, self._chunk = plain, warmup, chunk
        self._losses: list[Tensor] = []
        self._began = 0.0
        self.ours: list[float] = []
        self.plain: list[float] = []
        self.our_losses: list[float] = []

    def on_fit_start(self, trainer: Trainer, event: Any) -> None:
        self._loop = self._make(trainer)
        self._device = trainer.world.device

    def on_step_end(self, trainer: Trainer, event: Any) -> None:
        done = event.step - self._warmup
        if done < 0 or done % self._chunk:
            return
        ended = self._now()
        if done:
            self.ours.append(ended - self._began)
        began = self._now()
        first = len(self._losses)
        for number in range(first, event.step):
            self._losses.append(self._loop.step(number))
        ended = self._now()
        if done:
            self.plain.append(ended - began)
        self._began = self._now()

    def on_log(self, trainer: Trainer, event: Any) -> None:
        self.our_losses.append(event.metrics["train/loss"])

    @property
    def plain_losses(self) -> list[float]:
        """The mean loss of each window over which the Trainer logs."""
        losses = torch.stack(self._losses).double().tolist()
        return [statistics.fmean(losses[i : i + LOG_EVERY]) for i in range(0, len(losses), LOG_EVERY)]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def options(description: str | None) -> argparse.Namespace:
    """Parse the command line of a GPU benchmark. Without a GPU it exits, unless `--smoke` is set."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, help="samples in a step; default: a size for 80 GB of memory")
    parser.add_argument("--compile", default="max-autotune", help="a mode of torch.compile for both, or false")
    parser.add_argument("--smoke", action="store_true", help="run tiny sizes, also on a CPU, and write no result file")
    found = parser.parse_args()
    if not found.smoke and not torch.cuda.is_available():
        sys.exit("No CUDA device was found. This benchmark needs a GPU; --smoke runs a tiny size on the CPU.")
    return found


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compare(
    overrides: list[str],
    plain: Callable[[Trainer], PlainLoop],
    *,
    warmup: int,
    chunk: int,
    rounds: int,
    tolerance: float,
) -> dict[str, Any]:
    """Train with the experiment of `overrides` and with `plain` in turn, and return the seconds a step of both.

    Args:
        overrides: The experiment, without its length and its logging.
        plain: As in `Alternating`.
        warmup, chunk, rounds: Steps that are not measured, steps of each in a round, and the number of rounds.
        tolerance: The largest relative difference of the losses in a window of 10 steps. Equal losses prove equal work.

    Raises:
        AssertionError: A loss is not finite, or the losses differ by more than `tolerance`.
    """
    steps = warmup + chunk * rounds
    fixed = ["cluster=inline", "data.val=null", "data.shuffle=false", "trainer.max_epochs=null", "seed=7"]
    fixed += [f"trainer.max_steps={steps}", "trainer.eval_every_n_steps=0", f"trainer.log_every_n_steps={LOG_EVERY}"]
    turns = Alternating(plain, warmup, chunk)
    Trainer(compose([*overrides, *fixed]).experiment, world=World(device=device()), listeners=[turns]).fit()
    pairs = list(zip(turns.our_losses, turns.plain_losses, strict=True))
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    assert all(math.isfinite(a) for a, _ in pairs)
    assert apart <= tolerance, f"the losses are {apart:.2g} apart: {pairs}"
    return {
        "losses_apart_at_most": apart,
        "loss_of_first_and_last_window": [pairs[0][0], pairs[-1][0]],
        "trainer_s_a_step": report.spread([seconds / chunk for seconds in turns.ours]),
        "plain_s_a_step": report.spread([seconds / chunk for seconds in turns.plain]),
        "ratio": report.spread([a / b for a, b in zip(turns.ours, turns.plain, strict=True)]),
    }
