"""ResNet-50 on images of 224 pixels: `Trainer.fit` against a tuned plain loop over torchvision's, images a second.

Both use bf16 autocast, channels_last, torch.compile(mode="max-autotune"), fused SGD, cuDNN's benchmark mode and data on
the device. The plain loop has its batches ready in the right layout; the Trainer gathers them. Both begin with the same
weights, and so with the same losses.

    python -m benchmarks.gpu.bench_resnet
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.gpu import rounds
from raytrainer.models import ResNet
from raytrainer.trainer import Trainer


def peers_model(smoke: bool) -> tuple[Callable[[], nn.Module], str]:
    """Return torchvision's network and its name. Without torchvision, return our own: only the loops are compared."""
    if smoke:
        return lambda: ResNet("bottleneck", [1, 1], num_classes=10, width=8, norm="group"), "ours, tiny"
    try:
        models: Any = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        print(f"the peer's model is our own resnet50: torchvision cannot be imported ({error})")
        return lambda: ResNet("bottleneck", [3, 4, 6, 3], num_classes=1000), "ours: torchvision cannot be imported"
    version = importlib.import_module("torchvision").__version__
    return lambda: models.resnet50(), f"torchvision {version}"


class Plain(rounds.PlainLoop):
    """A plain loop written for speed."""

    def __init__(self, trainer: Trainer, make: Callable[[], nn.Module], mode: str | None) -> None:
        e, device = trainer.experiment, trainer.world.device
        self._model = make().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Our parameters have torchvision's names.
        self._model.load_state_dict(trainer.raw_model.state_dict())
        if mode:
            self._model.compile(mode=mode)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.1, momentum=0.9, fused=True)
        columns, size = trainer.train_loader.dataset.tensors, e.data.global_batch_size
        self._images = [
            part.to(device).contiguous(memory_format=torch.channels_last) for part in columns["image"].split(size)
        ]
        self._labels = [part.to(device) for part in columns["label"].split(size)]
        self._mixed = e.trainer.precision == "bf16-mixed"

    def step(self, number: int) -> Tensor:
        at = number % len(self._images)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._images[at].device.type, torch.bfloat16, enabled=self._mixed):
            loss = F.cross_entropy(self._model(self._images[at]).float(), self._labels[at])
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    smoke = options.smoke
    batch, size, classes = (4, 32, 10) if smoke else (options.batch or 256, 224, 1000)
    mode = None if smoke or options.compile == "false" else options.compile
    make, peer = peers_model(smoke)
    rows = 4 * batch
    overrides = [
        "experiment=resnet",
        "model=resnet50",
        "~data.train.split",
        "data.train._target_=benchmarks.gpu.data.images",
        f"+data.train={{rows: {rows}, size: {size}, classes: {classes}}}",
        "~data.train.transform",
        f"data.global_batch_size={batch}",
        "data.resident=true",
        "optimizer=sgd",
        "optimizer.lr=0.1",
        "optimizer.momentum=0.9",
        "optimizer.weight_decay=0",
        "optimizer.nesterov=false",
        "lr_scheduler=constant",
        "model.in_channels=3",
        f"model.num_classes={classes}",
        "scaling.num_workers=1",
        "trainer.channels_last=true",
        f"trainer.compile={mode or 'false'}",
        f"trainer.precision={'32-true' if smoke else 'bf16-mixed'}",
    ]
    if smoke:
        overrides += ["model._target_=raytrainer.models.ResNet", "+model.block=bottleneck", "+model.layers=[1,1]"]
        overrides += ["model.width=8", "model.norm=group"]
    figures = rounds.compare(
        overrides,
        lambda trainer: Plain(trainer, make, mode),
        warmup=10,
        chunk=10 if smoke else 50,
        rounds=2 if smoke else options.rounds,
        tolerance=1e-4 if smoke else 0.1,
    )
    return {
        "what": "ResNet-50, bf16-mixed, channels_last, on one GPU: Trainer.fit and a plain loop in turn; ratio of seconds",
        "peer": peer,
        "compile": mode,
        "batch": batch,
        "image": size,
        "images_per_second": {name: batch / figures[f"{name}_s_a_step"]["median"] for name in ("trainer", "plain")},
        **figures,
        "goal": {"ratio": 1.02},
        "holds": figures["ratio"]["median"] <= 1.02,
    }


if __name__ == "__main__":
    given = rounds.options(__doc__)
    found = compare(given)
    print(found) if given.smoke else report.write("gpu-resnet", found)
