"""Cost of a step beyond PyTorch: `Trainer.fit` against a bare loop over the same batches, model and optimizer.

The two alternate (A B A B …) in one process on a model of about 5 ms a step, and their final weights must be equal bit
for bit. The benchmark also measures the host's microseconds a step, with a model that computes almost nothing, and
counts the synchronisations with the device.

    python -m benchmarks.bench_step --rounds 15
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import report
from raytrainer import seeds
from raytrainer.config import build, compose, factory
from raytrainer.data import Loader
from raytrainer.optim import build_optimizer, build_scheduler
from raytrainer.trainer import Trainer

LOG_EVERY = 50
# Operations that read a value on the host, which makes the host wait for the device.
SYNCHRONISING = {"aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default"}


def experiment(width: int, depth: int, steps: int) -> Any:
    return compose(
        [
            "experiment=mlp",
            "cluster=inline",
            f"model.width={width}",
            f"model.depth={depth}",
            f"trainer.max_steps={steps}",
            "trainer.max_epochs=null",
            "trainer.eval_every_n_steps=0",
            f"trainer.log_every_n_steps={LOG_EVERY}",
            "trainer.num_threads=1",
            "data.val=null",
            "seed=7",
        ]
    ).experiment


class Losses:
    """Keeps the logged losses, and the seconds from the start of `fit` to its end."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.began = self.seconds = 0.0

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, trainer: Any, event: Any) -> None:
        self.values.append(event.metrics["train/loss"])

    def on_fit_end(self, trainer: Any, event: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def by_trainer(e: Any) -> tuple[float, list[float], list[torch.Tensor]]:
    losses = Losses()
    trainer = Trainer(e, listeners=[losses])
    trainer.fit()
    return losses.seconds, losses.values, list(trainer.raw_model.parameters())


def by_hand(e: Any) -> tuple[float, list[float], list[torch.Tensor]]:
    """Train with a bare loop: the batches are ready in memory, and it keeps the mean loss of every 50 steps."""
    torch.set_num_threads(1)
    seeds.seed_everything("model", e.seed)
    model, loss_function = build(e.model), build(e.loss)
    optimizer = build_optimizer(factory(e.optimizer), model)
    scheduler = build_scheduler(factory(e.lr_scheduler), optimizer, e.trainer.max_steps)
    loader = Loader(
        build(e.data.train), global_batch_size=e.data.global_batch_size, seed=e.seed, shuffle=True, drop_last=True
    )
    batches = [batch.micro[0].data for batch in loader.batches(0, e.trainer.max_steps)]
    seeds.seed_everything("train", e.seed, 0)
    losses, total = [], torch.zeros((), dtype=torch.float64)
    began = time.perf_counter()
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.detach()
        if step % LOG_EVERY == 0:
            losses.append(total.item() / LOG_EVERY)
            total.zero_()
    return time.perf_counter() - began, losses, list(model.parameters())


class Synchronisations(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in SYNCHRONISING
        return func(*args, **(kwargs or {}))


def synchronisations(e: Any) -> int:
    """Return the number of synchronisations in 20 steps of `train_step` that do not log."""
    trainer = Trainer(e)
    batches = list(trainer.train_loader.batches(0, 21))
    trainer.train_step(batches[0])
    with Synchronisations() as counted:
        for batch in batches[1:]:
            trainer.train_step(batch)
    return int(counted.count)


def compare(e: Any, rounds: int) -> dict[str, Any]:
    trainer, hand = [], []
    for number in range(rounds + 1):
        a, a_losses, a_weights = by_trainer(e)
        b, b_losses, b_weights = by_hand(e)
        # The weights are equal bit for bit. The means of the losses differ in the order of their sums.
        assert all(torch.equal(x, y) for x, y in zip(a_weights, b_weights, strict=True))
        assert all(math.isclose(x, y, rel_tol=1e-12) for x, y in zip(a_losses, b_losses, strict=True))
        if number:
            trainer.append(a / e.trainer.max_steps)
            hand.append(b / e.trainer.max_steps)
    return {
        "same_weights_bit_for_bit": True,
        "trainer_ms_a_step": report.spread([1e3 * x for x in trainer]),
        "bare_ms_a_step": report.spread([1e3 * x for x in hand]),
        "ratio": report.spread([a / b for a, b in zip(trainer, hand, strict=True)]),
        "host_us_a_step": report.spread([1e6 * (a - b) for a, b in zip(trainer, hand, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    step = compare(experiment(width=784, depth=2, steps=200), options.rounds)
    tiny = compare(experiment(width=1, depth=1, steps=1000), options.rounds)
    waits = synchronisations(experiment(width=64, depth=1, steps=100))
    report.write(
        "step",
        {
            "what": "Trainer.fit against a bare loop: milliseconds a step, ratio pair by pair; logs every 50 steps",
            "step_of_5_ms": step,
            "step_of_nothing": tiny,
            "synchronisations_in_20_steps_that_do_not_log": waits,
            "goal": {"ratio": 1.02, "synchronisations": 0},
            "holds": step["ratio"]["median"] <= 1.02 and waits == 0,
        },
    )


if __name__ == "__main__":
    main()
