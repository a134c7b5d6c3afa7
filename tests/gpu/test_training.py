"""Tests of training on a CUDA device: every precision learns, compiled and in channels_last, too; a step that does not
log never waits for the device; a resumed run is bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrainer.checkpoint import Checkpointer
from raytrainer.config import compose
from raytrainer.parallel import World
from raytrainer.storage import Storage
from raytrainer.trainer import Trainer
from tests.training import Recorder

pytestmark = pytest.mark.gpu

TINY_GPT = ["experiment=mlp", "model=gpt2_124m", "model.vocab_size=64", "model.max_seq_len=64", "model.dim=128"]
TINY_GPT += ["model.hidden_dim=256", "model.num_heads=2", "model.num_layers=2", "loss=token_cross_entropy"]
TINY_GPT += ["data.train._target_=benchmarks.gpu.data.tokens", "~data.train.split", "data.val=null"]
TINY_GPT += ["+data.train={rows: 256, length: 64, vocabulary: 64}", "data.global_batch_size=16"]
NETS = {
    "resnet": ["experiment=resnet"],
    "gpt": [*TINY_GPT, "trainer.precision=bf16-mixed"],
    "muon": [*TINY_GPT, "trainer.precision=bf16-mixed", "optimizer=muon"],
}


def world() -> World:
    return World(device=torch.device("cuda", 0))


def experiment(*overrides: str, net: str = "resnet") -> Any:
    fixed = ["cluster=inline", "scaling.num_workers=1", "trainer.max_epochs=null", "trainer.max_steps=30"]
    return compose([*NETS[net], *fixed, *overrides]).experiment


def losses(e: Any) -> dict[int, float]:
    told = Recorder()
    Trainer(e, world=world(), listeners=[told]).fit()
    return told.series("train/loss")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error for every operation that waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"])
def test_each_precision_learns(precision: str) -> None:
    result = Trainer(experiment(f"trainer.precision={precision}"), world=world()).fit()
    assert result.metrics["val/accuracy"] > 0.3


@pytest.mark.parametrize(
    "override", ["trainer.channels_last=true", "trainer.compile=true", "trainer.compile=max-autotune"]
)
def test_it_is_the_same_training(override: str) -> None:
    """Another memory layout and compiled kernels change only the rounding."""
    plain, other = (losses(experiment("trainer.log_every_n_steps=1", *more)) for more in ([], [override]))
    first = [step for step in plain if step <= 5]
    assert [other[step] for step in first] == pytest.approx([plain[step] for step in first], rel=2e-3)
    assert min(list(other.values())[-5:]) < 0.8 * other[1]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_and_micro_batches(mode: str) -> None:
    """A step's gradient is that of all its micro-batches, although a graph's replay overwrites its last outputs."""
    cut = ["trainer.log_every_n_steps=1", "model.norm=group", "data.micro_batch_size=32", "trainer.max_steps=8"]
    plain, compiled = (losses(experiment(*cut, *more)) for more in ([], [f"trainer.compile={mode}"]))
    assert compiled == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize(
    ("net", "override"),
    [
        ("resnet", "seed=0"),
        ("resnet", "trainer.max_grad_norm=1.0"),
        ("resnet", "trainer.ema_decay=0.9"),
        ("resnet", "trainer.precision=16-mixed"),
        ("resnet", "data.micro_batch_size=32"),
        ("resnet", "data.resident=false"),
        ("resnet", "trainer.compile=true"),
        ("gpt", "data.micro_batch_size=4"),
        ("gpt", "trainer.compile=true"),
        ("muon", "seed=0"),
    ],
)
def test_a_step_that_does_not_log_never_waits_for_the_device(net: str, override: str) -> None:
    trainer = Trainer(experiment(override, net=net), world=world())
    batches = trainer.train_loader.batches(0, 20)
    for _ in range(5):  # the first steps allocate memory, autotune and compile
        trainer.train_step(next(batches))
    with no_waiting():
        for batch in batches:
            trainer.train_step(batch)
    assert trainer.step == 20


@pytest.mark.parametrize(
    ("net", "precision"),
    [("resnet", "32-true"), ("resnet", "bf16-mixed"), ("resnet", "16-mixed"), ("gpt", "bf16-mixed")],
)
def test_a_resumed_run_is_the_same_to_the_bit(net: str, precision: str, tmp_path: Path) -> None:
    """The restored state includes the gradient scaler and the device's generator, which dropout uses."""
    overrides = ["trainer.deterministic=true", "checkpoint.every_n_steps=13", f"trainer.precision={precision}"]
    e = experiment(*overrides, net=net)
    whole = Trainer(e, world=world(), checkpointer=Checkpointer(Storage(str(tmp_path / "a")), num_to_keep=None))
    whole.fit()
    found = whole.checkpointer
    assert found is not None
    again = Trainer(e, world=world(), checkpointer=found)
    again.restore(next(info for info in found.list() if info.step == 13))
    again.fit()
    for name, tensor in whole.raw_model.state_dict().items():
        assert torch.equal(tensor, again.raw_model.state_dict()[name]), name


def test_a_checkpoint_of_the_cpu_goes_on_here_and_back(tmp_path: Path) -> None:
    """Only the state of the device's generator belongs to one device; a resume on another device does not need it."""
    e = experiment("checkpoint.every_n_steps=10", "trainer.max_steps=10")
    checkpointer = Checkpointer(Storage(str(tmp_path)), num_to_keep=None)
    here = Trainer(e, world=World(), checkpointer=checkpointer)
    here.fit()
    e.trainer.max_steps = 20
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        there = Trainer(e, world=World(device=device), checkpointer=checkpointer)
        latest = checkpointer.latest()
        assert latest is not None
        there.restore(latest)
        there.fit()
        e.trainer.max_steps = 30
    assert {10, 20, 30} <= {info.step for info in checkpointer.list()}


def test_utilisation_is_part_of_the_log() -> None:
    """The peak is given, so the device does not matter; no model here comes near it."""
    told = Recorder()
    e = experiment("trainer.log_every_n_steps=10", "trainer.peak_tflops=1000", net="gpt")
    Trainer(e, world=world(), listeners=[told]).fit()
    values = told.series("train/mfu").values()
    assert values
    assert all(0 < value < 1 for value in values)
