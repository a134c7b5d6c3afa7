"""Sharded training: the same run as DDP's, from the same weights, with the same checkpoints and resume, in less memory.
The ranks are processes with gloo, in tests/ranks.py."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrainer import parallel
from raytrainer.config import Experiment, FSDPConfig
from raytrainer.parallel import World
from raytrainer.state import load_weights, named_optimizer_state
from raytrainer.trainer import Trainer
from tests import ranks, training
from tests.test_equality import TOKENS, direct, hard, killed_and_resumed
from tests.training import checkpointer, experiment, fitted, images, node


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def full(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, a copy of another."""
    whole: Any = tensor.detach()
    found: Tensor = whole.full_tensor() if parallel.is_sharded(whole) else whole.clone()
    return found


# -- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # 5 is not divisible by 2 or 4: uneven shards, and an empty one of the bias on 4 ranks.
        self.inner, self.outer = nn.Linear(width, 5), nn.Linear(5, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.outer(self.inner(self.norm(x)).tanh()))
        return x + hidden


class Stack(nn.Module):
    """Blocks between two layers that share their weight, with a buffer that no state dict has, and a frozen part."""

    def __init__(self, depth: int = 3, width: int = 16, dropout: float = 0.0, classes: int = 4) -> None:
        super().__init__()
        self.built_on = torch.empty(0).device.type
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight
        self.head = nn.Linear(width, classes)
        self.scale = nn.Parameter(torch.rand(width), requires_grad=False)
        self.register_buffer("turn", torch.cos(torch.arange(width) / 3), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image.flatten(1) * self.get_buffer("turn")) * self.scale
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.last(x))
        return logits


class Looking(Stack):
    """A constructor that looks at its values, which the meta device has none of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_at_start = float(self.first.weight.detach().norm())


class Loose(Stack):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.full((16,), 0.5)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + self.offset.view(1, 4, 4))


def stack(**trainer: Any) -> Experiment:
    fsdp = trainer.pop("fsdp", {})
    return experiment(
        model=node(Stack),
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=3),
        data={"train": node(images, rows=90), "global_batch_size": 30},
        trainer={"strategy": "fsdp", **trainer},
        fsdp=fsdp,
    )


def with_strategy(e: Experiment, strategy: str) -> Experiment:
    return dataclasses.replace(
        e,
        trainer=dataclasses.replace(e.trainer, strategy=strategy),
        fsdp=e.fsdp if strategy == "fsdp" else FSDPConfig(),
    )


# -- the same curve as one process's, and as DDP's -------------------------------------------------------------------


def curves(world: World, cases: list[Experiment]) -> list[list[dict[int, float]]]:
    found = []
    for e in cases:
        trainer, recorder = fitted(e, world)
        assert parallel.is_sharded(trainer.raw_model) == (world.distributed and e.trainer.strategy == "fsdp")
        found.append([recorder.series(name) for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy")])
    return found


def test_it_is_equal_to_one_process_and_to_ddp() -> None:
    def exact(steps: int, **fsdp: Any) -> Experiment:
        # Epochs of 7 batches and one of 6 samples, on 4 ranks 1 or 2 of them.
        e = stack(
            max_steps=steps, precision="64-true", max_grad_norm=0.5, ema_decay=0.9, eval_every_n_steps=20, fsdp=fsdp
        )
        e.data.global_batch_size, e.data.micro_batch_size, e.data.drop_last = 12, 2 if fsdp else 3, False
        return e

    def single(**fsdp: Any) -> Experiment:
        return stack(max_steps=10, eval_every_n_steps=5, fsdp=fsdp)

    eager = single(reshard_after_forward=True, wrap=["LayerNorm", f"{__name__}.Block"])
    cases = {
        2: [exact(100), single(), with_strategy(single(), "ddp"), eager],
        4: [
            exact(100),
            single(),
            single(reshard_after_forward=False),
            single(reshard_after_forward=2),
            exact(20, replicas=2),
        ],
    }
    alone = dict(zip((10, 20, 100), curves(World(), [single(), exact(20), exact(100)]), strict=True))
    assert alone[10][0][10] < 0.9 * alone[10][0][1]
    assert alone[100][2].keys() == {20, 40, 60, 80, 100}
    for size, experiments in cases.items():
        for found in ranks.run(size, curves, experiments):
            for e, got in zip(experiments, found, strict=True):
                tolerance = 1e-9 if e.trainer.precision == "64-true" else 1e-5
                for series, expected in zip(got, alone[e.trainer.max_steps or 0], strict=True):
                    assert series == pytest.approx(expected, rel=tolerance)


def gradients(world: World, cases: list[Experiment]) -> list[dict[str, Tensor]]:
    """Of each case the gradient of its first step."""
    found = []
    for e in cases:
        trainer = Trainer(e, world=world)
        trainer.train_step(next(trainer.train_loader.batches(0, 1)))
        named = trainer.raw_model.named_parameters()
        found.append({name: full(p.grad) for name, p in named if p.grad is not None})
    return found


def test_a_token_weighted_gradient_is_that_of_one_process() -> None:
    # Rows 0 and 1 have no token that counts, and 3 samples leave one of 4 ranks without any.
    cases = [
        experiment(
            **TOKENS,
            data={
                "train": node(training.tokens, rows=8, empty=(0, 1)),
                "val": None,
                "shuffle": False,
                "global_batch_size": size,
                "micro_batch_size": micro,
            },
            trainer={"precision": "64-true", "max_steps": 1, "strategy": "fsdp"},
            fsdp={"replicas": replicas},
        )
        for size, micro, replicas in [(3, None, 1), (5, 1, 1), (6, 1, 2), (5, None, 4)]
    ]
    for found in ranks.run(4, gradients, cases):
        for e, got in zip(cases, found, strict=True):
            for name, value in direct(e, list(range(e.data.global_batch_size))).items():
                assert value.abs().max() > 1e-3
                torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14)


# -- the initial weights ---------------------------------------------------------------------------------------------


def initial(world: World, e: Experiment) -> tuple[str, bool, dict[str, Tensor], Tensor]:
    trainer = Trainer(e, world=world)
    model: Any = trainer.raw_model
    state = {name: full(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    if trainer.ema_model is not None:
        for name, t in trainer.ema_model.named_parameters():
            assert torch.equal(full(t), state[name])
            assert not t.requires_grad
    assert not model.scale.requires_grad
    return model.built_on, model.last.weight is model.first.weight, state, torch.rand(2)


@pytest.mark.parametrize("kind", [Stack, Looking, Loose])
def test_the_weights_are_those_of_a_model_built_whole(kind: type) -> None:
    e = stack(ema_decay=0.9)
    e.model = node(kind)
    _, _, expected, drawn = initial(World(), e)
    assert "turn" in expected
    for rank, (built_on, tied, state, random) in enumerate(ranks.run(3, initial, e)):
        assert built_on == ("meta" if rank and kind is Stack else "cpu")
        assert tied
        assert training.differences(state, expected) == []
        assert torch.equal(random, drawn)  # what is drawn after the model is the same too


# -- checkpoints -----------------------------------------------------------------------------------------------------


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Model, average and optimizer, whole."""
    moments = named_optimizer_state(trainer.optimizer, trainer.raw_model)
    assert trainer.ema_model is not None
    return {
        "model": {name: full(t) for name, t in trainer.raw_model.state_dict().items()},
        "ema": {name: full(t) for name, t in trainer.ema_model.state_dict().items()},
        "state": {name: {k: full(t) for k, t in values.items()} for name, values in moments["state"].items()},
        "groups": moments["groups"],
    }


def trained(world: World, e: Experiment, folder: Path) -> dict[str, Any]:
    return state_of(fitted(e, world, checkpointer=checkpointer(world, folder))[0])


def gone_on(world: World, e: Experiment, folder: Path) -> tuple[dict[str, Any], dict[int, float]]:
    """The state as it was loaded, and the losses after it."""
    saved, recorder = checkpointer(world, folder), training.Recorder()
    trainer = Trainer(e, world=world, checkpointer=saved, listeners=[recorder])
    trainer.restore(saved.list()[-1])
    loaded = state_of(trainer)
    trainer.checkpointer, trainer.total_steps = None, 8
    trainer.fit()
    return loaded, recorder.series("train/loss")


@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_a_checkpoint_goes_on_with_the_other_strategy_and_other_numbers(tmp_path: Path, first: str) -> None:
    sharded = stack(max_steps=4, precision="64-true", ema_decay=0.9)
    whole, hybrid = with_strategy(sharded, "ddp"), dataclasses.replace(sharded, fsdp=FSDPConfig(replicas=2))
    states = ranks.run(2, trained, whole if first == "ddp" else sharded, tmp_path)
    assert any(len(values) == 3 for values in states[0]["state"].values())
    others = {"ddp": [(sharded, 2), (hybrid, 4)], "fsdp": [(whole, 1), (whole, 2), (sharded, 4)]}
    curves = []
    for e, size in others[first]:
        for loaded, losses in ranks.run(size, gone_on, e, tmp_path) if size > 1 else [gone_on(World(), e, tmp_path)]:
            assert training.differences(loaded, states[0]) == []
            curves.append(losses)
    assert curves[0].keys() == {5, 6, 7, 8}
    for losses in curves:
        assert losses == pytest.approx(curves[0], rel=1e-12)


@pytest.mark.parametrize(("size", "fsdp"), [(2, {}), (3, {"reshard_after_forward": False}), (4, {"replicas": 2})])
def test_resume_is_exact(tmp_path: Path, size: int, fsdp: dict[str, Any]) -> None:
    e = hard(strategy="fsdp")
    e.fsdp = FSDPConfig(**fsdp)
    for found in ranks.run(size, killed_and_resumed, e, tmp_path, [1, 7] if size < 4 else [7]):
        assert found == []


def three_classes(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"loss": nn.functional.cross_entropy(model(batch["image"]), batch["label"] % 3)}


def overflowing(world: World, e: Experiment) -> tuple[float, bool]:
    """The scale after a step in which one rank's gradients overflow, and whether the weights are as before."""
    trainer = Trainer(e, world=world)
    before = {name: full(t) for name, t in trainer.raw_model.named_parameters()}
    batch = next(trainer.train_loader.batches(0, 1))
    if world.rank == 0:
        batch.micro[0].data["image"].fill_(torch.inf)
    trainer.train_step(batch)
    after = {name: full(t) for name, t in trainer.raw_model.named_parameters()}
    scaler = trainer.precision.scaler
    assert scaler is not None
    return scaler.get_scale(), training.differences(before, after) == []


def head_alone(world: World, e: Experiment, folder: Path) -> tuple[dict[int, float], list[int], list[bool]]:
    """The losses, this rank's values of what is trained, and which groups of the optimizer are fused."""
    saved = checkpointer(world, folder)
    recorder = training.Recorder()
    trainer = Trainer(e, world=world, checkpointer=saved, listeners=[recorder])
    if found := saved.list():
        trainer.restore(found[-1])
    trainer.fit()
    held = [part.numel() for part in parallel.local_parts(trainer._parameters)]
    return recorder.series("train/loss"), held, [group["fused"] for group in trainer.optimizer.param_groups]


def test_a_new_head_of_fewer_classes_than_ranks_by_fused_sgd(tmp_path: Path) -> None:
    # Ranks without any value that is trained, and an optimizer that has no kernel for shards.
    e = stack(max_steps=3, freeze=["first.*", "blocks.*", "last.*"], max_grad_norm=0.5, precision="64-true")
    e.model, e.loss = node(Stack, classes=3), node(three_classes, _partial_=True)
    e.optimizer = node("torch.optim.SGD", lr=0.1, momentum=0.9, fused=True)
    found = ranks.run(4, head_alone, e, tmp_path)
    expected, _, fused = head_alone(World(), e, tmp_path / "alone")
    assert fused == [True, True]
    assert found[3][1:] == ([0, 0], [False, False])
    for losses, _, _ in found:
        assert losses == pytest.approx(expected, rel=1e-9)
    # On one process it is fused again.
    e.trainer.max_steps = 5
    losses, _, fused = head_alone(World(), e, tmp_path)
    assert fused == [True, True]
    assert losses.keys() == {4, 5}


def test_a_gradient_scaler_skips_steps_of_unfused_sgd() -> None:
    e = stack(max_steps=2, precision="16-mixed", nonfinite="warn")
    e.optimizer = node("torch.optim.SGD", lr=0.1, momentum=0.9, fused=True)
    for scale, same in ranks.run(2, overflowing, e):
        assert (scale, same) == (2.0**15, True)


def started_from(world: World, e: Experiment, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The weights after `init_from`; and, from rank 0 alone, those that a model is exported with."""
    trainer = Trainer(e, world=world, checkpointer=checkpointer(world, folder))
    trainer.init_from(str(folder.parent))
    found = {name: full(t) for name, t in trainer.raw_model.state_dict().items()}
    return found, trainer.best_weights()[1] if world.rank == 0 else None


def test_weights_come_from_a_run_and_go_out_whole(tmp_path: Path) -> None:
    e = stack(max_steps=2)
    folder = tmp_path / "run" / "checkpoints"
    trainer, _ = fitted(e, checkpointer=checkpointer(World(), folder))
    e.seed = 99
    for rank, (begun, exported) in enumerate(ranks.run(2, started_from, e, folder)):
        assert training.differences(begun, training.weights(trainer)) == []
        assert (exported is None) == (rank > 0)
        load_weights(copy.deepcopy(trainer.raw_model), exported or begun, "the checkpoint")
