"""Tests of several ranks on GPUs, with NCCL and gloo: the curve of one rank, and a bit-identical resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrainer.config import Experiment
from raytrainer.parallel import World
from tests import ranks
from tests.training import checkpointer, experiment, fitted, node, weights

pytestmark = pytest.mark.gpu

LENGTH = {"max_steps": 12, "precision": "64-true", "max_grad_norm": 0.5, "eval_every_n_steps": 6}


def curve(world: World, e: Experiment) -> list[dict[int, float]]:
    _, told = fitted(e, world)
    return [told.series(name) for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy")]


def adamw(**more: Any) -> Experiment:
    return experiment(
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        data={"global_batch_size": 12, "micro_batch_size": 2},
        trainer={**LENGTH, **more},
    )


def sizes() -> list[tuple[int, str]]:
    """Return numbers of ranks and backends: NCCL on all GPUs and on at most two, and two ranks with gloo."""
    there = torch.cuda.device_count()
    return sorted({(there, "nccl"), (min(there, 2), "nccl"), (2, "gloo")})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_same_curve_as_alone(strategy: str) -> None:
    alone = curve(World(device=torch.device("cuda", 0)), adamw())
    for size, backend in sizes():
        if (strategy, backend) == ("fsdp", "gloo"):
            continue  # FSDP gathers with NCCL
        for curves in ranks.run(size, curve, adamw(strategy=strategy), backend=f"cpu:gloo,cuda:{backend}", cuda=True):
            for got, expected in zip(curves, alone, strict=True):
                assert got == pytest.approx(expected, rel=1e-9), (size, backend)


def resumed(world: World, e: Experiment, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of a whole run, and of a run that continued from its middle."""
    whole, _ = fitted(e, world, checkpointer=checkpointer(world, folder))
    found = whole.checkpointer
    assert found is not None
    info = next(info for info in found.list() if info.step == 6)
    again, _ = fitted_from(e, world, found, info)
    return weights(whole), weights(again)


def fitted_from(e: Experiment, world: World, found: Any, info: Any) -> tuple[Any, None]:
    from raytrainer.trainer import Trainer

    trainer = Trainer(e, world=world, checkpointer=found)
    trainer.restore(info)
    trainer.fit()
    return trainer, None


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    e = adamw(precision="bf16-mixed", deterministic=True)
    e.checkpoint.every_n_steps = 6
    for number, (size, backend) in enumerate(sizes()):
        folder = tmp_path / str(number)
        for whole, again in ranks.run(size, resumed, e, folder, backend=f"cpu:gloo,cuda:{backend}", cuda=True):
            assert whole.keys() == again.keys()
            for name, tensor in whole.items():
                assert torch.equal(tensor.cpu(), again[name].cpu()), name
