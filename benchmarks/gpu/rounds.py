"""A Trainer and a plain loop in turn on one device, A B A B …, inside one `fit`: each is built and compiled once.
What both measure: seconds a chunk of steps, the device waited for at its ends; and the loss of every window of steps.
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
    """`step(i)` does one step on batch `i` of the same batches, and returns the loss without waiting for the device."""

    def step(self, number: int) -> Tensor:
        raise NotImplementedError


class Alternating:
    """A callback of the Trainer: after its warm-up, and then after each chunk of steps, it lets the plain loop do as many.

    Args:
        plain: Made when the Trainer has its first weights, which it begins with.
        warmup: Steps of each that are not measured: compilation, autotuning, the first allocations.
        chunk: Steps of each in a round; the Trainer's logs are among them.
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
        """The means of the windows over which the Trainer logs."""
        losses = torch.stack(self._losses).double().tolist()
        return [statistics.fmean(losses[i : i + LOG_EVERY]) for i in range(0, len(losses), LOG_EVERY)]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def options(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark for GPUs; without one only `--smoke` goes on."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, help="samples in a step; default: what suits 80 GB of memory")
    parser.add_argument("--compile", default="max-autotune", help="a mode of torch.compile, of both; or false")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also on a CPU, no result file: does it run?")
    found = parser.parse_args()
    if not found.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark is of GPUs; --smoke tries it in a tiny size on the CPU")
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
    """Trains by the experiment of `overrides` and by `plain` in turn, and gives the seconds a step of both.

    Args:
        overrides: The experiment, without length and logs.
        plain: As `Alternating` takes it.
        warmup, chunk, rounds: Steps not measured, steps of each in a round, and how many rounds.
        tolerance: How far, relatively, the losses may be apart in a window of 10 steps: the same work is proven by them.

    Raises:
        AssertionError: They are further apart.
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
