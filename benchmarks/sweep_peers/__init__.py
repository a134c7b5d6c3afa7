"""A trial of bench_sweep in plain torch, as a careful user writes it. `python -m benchmarks.sweep_peers` runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

EPOCHS, BATCH, SEED = 10, 128, 0
Report = Callable[[dict[str, float]], None]


@functools.cache
def digits() -> dict[str, Any]:
    """Return the data, which is read once in each process."""
    from raytrainer.data import Digits

    return {split: Digits(split).tensors for split in ("train", "val")}


def train(trial: Mapping[str, Any], report: Report) -> None:
    """Run a trial. Initial weights, batch order and schedule are raytrainer's, so results can be equal bit for bit."""
    import torch
    from torch.nn import functional

    from raytrainer.data.order import epoch_order
    from raytrainer.models import MLP
    from raytrainer.optim import Cosine, parameter_groups
    from raytrainer.seeds import seed_everything

    torch.set_num_threads(1)
    image, label = digits()["train"].values()
    val_image, val_label = digits()["val"].values()
    seed_everything("model", SEED)
    model = MLP(64, 10, width=trial["width"], depth=2)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=trial["lr"], fused=True)
    steps = len(label) // BATCH
    curve = Cosine(warmup_steps=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: curve(step, EPOCHS * steps))
    for epoch in range(EPOCHS):
        order = torch.from_numpy(epoch_order(SEED, epoch, len(label), shuffle=True).take(0, steps * BATCH))
        for rows in order.split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(image[rows]), label[rows]).backward()
            optimizer.step()
            scheduler.step()
        # Like the trainer, evaluate in batches of the training size and sum in double precision.
        means, sizes = [], []
        with torch.no_grad():
            for images, labels in zip(val_image.split(BATCH), val_label.split(BATCH), strict=True):
                logits = model(images)
                right = (logits.argmax(1) == labels).float().mean()
                means.append(torch.stack([functional.cross_entropy(logits, labels), right]))
                sizes.append(len(labels))
        weights = torch.tensor(sizes, dtype=torch.float64).unsqueeze(1)
        loss, accuracy = ((torch.stack(means).double() * weights).sum(0) / weights.sum()).tolist()
        report({"val/loss": loss, "val/accuracy": accuracy})
