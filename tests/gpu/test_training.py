"""On a CUDA device: every precision trains, a step that does not log never waits for the device, resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrainer.checkpoint import Checkpointer
from raytrainer.config import compose
from raytrainer.parallel import World
from raytrainer.storage import Storage
from raytrainer.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def world() -> World:
    return World(device=torch.device("cuda", 0))


def experiment(*overrides: str) -> Any:
    fixed = ["experiment=resnet", "cluster=inline", "scaling.num_workers=1", "trainer.max_epochs=null"]
    return compose([*fixed, "trainer.max_steps=30", *overrides]).experiment


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"])
def test_each_precision_learns(precision: str) -> None:
    result = Trainer(experiment(f"trainer.precision={precision}"), world=world()).fit()
    assert result.metrics["val/accuracy"] > 0.3


@pytest.mark.parametrize(
    "override", ["seed=0", "trainer.max_grad_norm=1.0", "trainer.ema_decay=0.9", "trainer.precision=16-mixed"]
)
def test_a_step_that_does_not_log_never_waits_for_the_device(override: str) -> None:
    trainer = Trainer(experiment(override), world=world())
    batches = trainer.train_loader.batches(0, 20)
    for _ in range(3):  # allocations and autotuning of the first steps
        trainer.train_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    e = experiment("trainer.deterministic=true", "checkpoint.every_n_steps=13")
    whole = Trainer(e, world=world(), checkpointer=Checkpointer(Storage(str(tmp_path / "a")), num_to_keep=None))
    whole.fit()
    found = whole.checkpointer
    assert found is not None
    again = Trainer(e, world=world(), checkpointer=found)
    again.restore(next(info for info in found.list() if info.step == 13))
    again.fit()
    for name, tensor in whole.raw_model.state_dict().items():
        assert torch.equal(tensor, again.raw_model.state_dict()[name]), name
