"""Small experiments and their parts, for the tests of the training core: datasets, models, losses and callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer import parallel
from raytrainer.checkpoint import Checkpointer
from raytrainer.config import CheckpointConfig, Experiment, FSDPConfig, TrainerConfig
from raytrainer.config.schema import DataConfig, EarlyStopping, Profile, validate
from raytrainer.data import Arrays
from raytrainer.parallel import World
from raytrainer.storage import Storage
from raytrainer.trainer import Trainer

__all__ = ["EarlyStopping", "Profile"]


def node(target: Any, **arguments: Any) -> dict[str, Any]:
    """Return the `_target_` node of a class or function."""
    path = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
    return {"_target_": path, **arguments}


def experiment(
    *,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    fsdp: dict[str, Any] | None = None,
    **sections: Any,
) -> Experiment:
    """Return an experiment: a perceptron on 50 random images, 12 in a batch, logging at each step. The arguments
    replace sections and single keys."""
    made: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "model": node("raytrainer.models.MLP", in_features=16, num_classes=4, width=8, depth=1),
        "loss": node("raytrainer.losses.CrossEntropy"),
        "optimizer": node("torch.optim.SGD", lr=0.1, momentum=0.9, fused=True),
        **sections,
    }
    defaults = {"train": node(images, rows=50), "val": node(images, rows=17, seed=1), "global_batch_size": 12}
    whole = Experiment(
        data=DataConfig(**{**defaults, **(data or {})}),
        trainer=TrainerConfig(**{"num_threads": 1, "log_every_n_steps": 1, "max_steps": 4, **(trainer or {})}),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
        fsdp=FSDPConfig(**(fsdp or {})),
        **made,
    )
    validate(whole)
    return whole


def checkpointer(world: World, folder: Path, **options: Any) -> Checkpointer:
    group = dist.new_group(backend="gloo") if world.distributed else None
    options = {"num_to_keep": None, "mode": "min", **options}
    return Checkpointer(Storage(folder), rank=world.rank, world_size=world.size, group=group, **options)


class Recorder:
    """A listener that records what it receives, as (hook, event)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda trainer, event: self.told.append((name, event))

    def events(self, hook: str) -> list[Any]:
        return [event for name, event in self.told if name == hook]

    def series(self, metric: str) -> dict[int, float]:
        """Return the metric by step, from logs and evaluations."""
        told = [e for name, e in self.told if name in ("on_log", "on_eval_end")]
        return {e.step: e.metrics[metric] for e in told if metric in e.metrics}


def fitted(e: Experiment, world: World | None = None, **options: Any) -> tuple[Trainer, Recorder]:
    """Return a Trainer that has trained, and what its listener recorded."""
    recorder = Recorder()
    trainer = Trainer(e, world=world, listeners=[recorder, *options.pop("listeners", ())], **options)
    trainer.fit()
    return trainer, recorder


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.raw_model.state_dict().items()}


@contextmanager
def compiling(backend: str) -> Iterator[None]:
    """Make `trainer.compile=true` use this backend of torch.compile. "aot_eager" does everything except generating and
    compiling C++ code, which takes most of the time."""
    real = torch.compile
    with mock.patch.object(torch, "compile", lambda function, mode: real(function, backend=backend)):
        yield


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested states are not bitwise equal. Rates are left out, because they depend on the
    clock."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = parallel.local_parts([a, b])  # each rank sees its own shards
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if a.dtype == b.dtype and np.array_equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(a.keys() ^ b.keys())}"]
        return [d for key in a if "_per_second" not in str(key) for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    return [] if type(a) is type(b) and (a == b or (a != a and b != b)) else [path]


# -- data ----------------------------------------------------------------------------------------------------------


def images(rows: int, seed: int = 0, bad: int | None = None, dtype: str = "float32", transform: Any = None) -> Arrays:
    """Return random images `[1, 4, 4]` of 4 classes that can be told apart. Image `bad` is infinite."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (rows,), generator=generator)
    image = torch.randn(rows, 1, 4, 4, generator=generator)
    image[torch.arange(rows), 0, label] += 1.0
    if bad is not None:
        image[bad] = torch.inf
    return Arrays({"image": image.to(getattr(torch, dtype)), "label": label}, transform)


def tokens(rows: int, length: int = 5, seed: int = 0, empty: tuple[int, ...] = ()) -> Arrays:
    """Return token ids and targets `[length]`. The number of counted targets differs by row, and is 0 in the `empty`
    rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (rows, length), generator=generator)
    labels = torch.randint(7, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.5] = -100
    for row in empty:
        labels[row] = -100
    return Arrays({"input_ids": ids, "labels": labels})


class Counting(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """An endless or finite stream of images that keeps its position."""

    def __init__(self, rows: int) -> None:
        self.rows, self.at, self.read = rows, 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.at < self.rows:
            self.at += 1
            self.read += 1
            generator = torch.Generator().manual_seed(self.at)
            yield {"image": torch.randn(1, 4, 4, generator=generator), "label": torch.tensor(self.at % 4)}
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


# -- models and losses -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A model with everything that makes resuming hard: a convolution, batch norm, dropout, and buffers of other
    kinds."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6 * 16, 4)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.5, 1.5])), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.norm(self.conv(image)).relu()).flatten(1))
        return logits


def counted_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return a mean weighted by the labels, with their sum as the weight: an integer, and 0 for a batch of zeros."""
    count = batch["label"].sum()
    each = nn.functional.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
    return {"loss": (each * batch["label"]).sum() / count.clamp(min=1), "weight": count}


def drawing_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return a loss with noise from the generator that dropout draws from, in evaluation too."""
    noise = 0.01 * torch.rand(())
    return {"loss": nn.functional.cross_entropy(model(batch["image"]), batch["label"]) + noise}


class Fickle:
    """A loss that returns different entries from its third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        self.calls += 1
        loss = model(batch["image"]).square().mean()
        return {"loss": loss, "early" if self.calls < 3 else "late": loss}


# -- callbacks -------------------------------------------------------------------------------------------------------


class Counter:
    """A callback that counts steps, keeps the number in the checkpoint and logs it. It draws from dropout's
    generator."""

    def __init__(self, every: int = 1) -> None:
        self.every, self.steps, self.total = every, 0, torch.zeros(())

    def on_step_end(self, trainer: Any, event: Any) -> None:
        self.steps += 1
        if event.step % self.every == 0:
            torch.rand(3)
            self.total = self.total + self.steps
            trainer.log({"mine/steps": self.steps, "mine/total": float(self.total)})

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.total = state["steps"], state["total"]


class Poison:
    """A callback that makes a weight NaN after step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, trainer: Any, event: Any) -> None:
        if event.step == self.at:
            with torch.no_grad():
                next(iter(trainer.raw_model.parameters())).view(-1)[0] = torch.nan
