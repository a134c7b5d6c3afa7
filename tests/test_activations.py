"""The blocks of a model and their recomputation: bitwise equal results, the same names, less memory."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrainer.config import Experiment
from raytrainer.errors import ConfigError
from raytrainer.models import ResNet
from raytrainer.parallel import World, checkpoint_activations, find_units
from raytrainer.trainer import Trainer
from tests import ranks
from tests.training import compiling, differences, experiment, fitted, node, weights


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self) -> None: ...


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(Part(), Part()), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        self.list = nn.ModuleList([nn.Sequential(Part())])
        self.single = Part()

    def forward(self) -> None: ...


class Named(Whole):
    _no_split_modules = ("Linear", "NotHere")


def names(model: nn.Module, classes: list[str] | None = None) -> list[str]:
    found = find_units(model, classes, "fsdp.wrap")
    return [name for name, module in model.named_modules() if module in found]


def test_blocks_are_those_the_model_names_or_repeats() -> None:
    # Single layers, containers, and modules that occur once outside a list are not blocks.
    assert names(Whole()) == ["stages.0.0", "stages.0.1", "list.0.0"]
    assert names(Named()) == [name for name, m in Named().named_modules() if isinstance(m, nn.Linear)]
    assert names(nn.Sequential(Whole(), Named())) == [f"{i}.{name}" for i in (0, 1) for name in names(Named())]
    resnet = ResNet(block="basic", layers=[1, 1], num_classes=4, in_channels=1, width=4, stem="small", norm="batch")
    assert len(names(resnet)) == 2
    assert names(nn.Linear(2, 2)) == []
    # Blocks that recompute are still found, so that they can be sharded.
    checkpoint_activations(find_units(resnet, None, "trainer.activation_checkpointing"))
    assert len(names(resnet)) == 2
    # Of nested blocks, only the outer ones count.
    assert names(nn.ModuleList([Whole(), Whole()])) == ["0", "1"]


def test_classes_are_named_bare_or_dotted() -> None:
    assert names(Whole(), ["Part"]) == ["stages.0.0", "stages.0.1", "list.0.0", "single"]
    assert names(Whole(), [f"{__name__}.Part"]) == names(Whole(), ["Part"])
    with pytest.raises(ConfigError, match=r"^fsdp\.wrap=Pert .*valid: Part, Linear, Seq"):
        names(Whole(), ["Part", "Pert"])
    with pytest.raises(ConfigError, match=r"^fsdp\.wrap=ModuleList .*never called"):
        names(Whole(), ["ModuleList"])


# -- recomputation ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block that draws random numbers and keeps batch statistics."""

    def __init__(self, width: int, momentum: float | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, momentum=momentum)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide: Tensor = self.dropout(self.norm(self.conv(x)).relu())
        out: Tensor = x + self.out(wide)
        return out


class Blocks(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, 0.1), Block(width, None)])
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            image = block(image)
        logits: Tensor = self.head(image.flatten(1))
        return logits


def blocks(wanted: Any, **trainer: Any) -> Experiment:
    return experiment(
        model=node(Blocks),
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        data={"micro_batch_size": 3},
        trainer={"activation_checkpointing": wanted, "max_steps": 5, "ema_decay": 0.9, **trainer},
    )


def run(world: World, e: Experiment) -> tuple[dict[int, float], dict[int, float], dict[str, Tensor]]:
    trainer, recorder = fitted(e, world)
    return recorder.series("train/loss"), recorder.series("val/loss"), weights(trainer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nothing_changes_but_the_memory(precision: str) -> None:
    expected = run(World(), blocks(False, precision=precision))
    assert expected[2]["blocks.0.norm.num_batches_tracked"] == 5 * 4
    for wanted in (True, ["Block"], ["BatchNorm2d", f"{__name__}.Block"]):
        assert differences(run(World(), blocks(wanted, precision=precision)), expected) == []


def test_nothing_changes_on_ranks() -> None:
    for got, expected in zip(ranks.run(2, run, blocks(True)), ranks.run(2, run, blocks(False)), strict=True):
        assert differences(got, expected) == []


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_it_goes_with_compile(backend: str) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler: g++ or clang++")
    plain = blocks(False, max_steps=2, ema_decay=None)
    plain.model, plain.data.micro_batch_size = node(Quiet), None
    expected = run(World(), plain)
    plain.trainer.compile = plain.trainer.activation_checkpointing = True
    with compiling(backend):
        got = run(World(), plain)
    for series, wanted in zip(got[:2], expected[:2], strict=True):
        assert series == pytest.approx(wanted, rel=1e-5)
    for name, value in expected[2].items():
        torch.testing.assert_close(got[2][name], value, rtol=1e-4, atol=1e-5)


class Quiet(Blocks):
    """Blocks without dropout, because a compiled model draws different random numbers."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def kept_bytes(model: nn.Module) -> int:
    """Return how many bytes the forward pass keeps for the backward pass."""
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.ones(64, 1, 4, 4)).sum()
    return sum(found.values())


def test_a_block_keeps_its_input_alone() -> None:
    model = Blocks(width=32)
    before = kept_bytes(model)
    checkpoint_activations(find_units(model, None, ""))
    assert kept_bytes(model) < 0.1 * before
    assert isinstance(model.blocks[0], Block)
    assert {name.split(".")[0] for name in model.state_dict()} == {"blocks", "head"}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation_checkpointing=true .*valid: ReLU, Linear, Seq"):
        Trainer(experiment(trainer={"activation_checkpointing": True}))
