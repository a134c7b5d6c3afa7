"""Sharded training gives the same run as DDP: from the same weights, with the same checkpoints and resume, in less
memory. The ranks are processes with gloo, from tests/ranks.py. Run as a program, it prints the memory table of
docs/fsdp.md."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrainer import parallel
from raytrainer.config import Experiment, FSDPConfig
from raytrainer.errors import CheckpointNotFound
from raytrainer.parallel import World
from raytrainer.state import named_optimizer_state, restore_module
from raytrainer.trainer import Trainer, snapshot
from tests import ranks, training
from tests.test_equality import TOKENS, direct, hard, killed_and_resumed
from tests.training import checkpointer, experiment, fitted, images, node


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, or a copy of another tensor."""
    whole: Any = tensor.detach()
    found: Tensor = whole.full_tensor() if parallel.is_sharded(whole) else whole.clone()
    return found


# -- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, dropout: float, inner: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # 5 is not divisible by 2 or 4: shards are uneven, and on 4 ranks one shard of the bias is empty.
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.outer(self.inner(self.norm(x)).tanh()))
        return x + hidden


class Stack(nn.Module):
    """Blocks between two layers that share their weight, with a buffer that no state dict has, and a frozen
    parameter."""

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
    """A model whose constructor reads its values, which do not exist on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_at_start = float(self.first.weight.detach().norm())


class Loose(Stack):
    """A model with a tensor that is neither a parameter nor a buffer."""

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


# -- the same curve as on one process and with DDP -------------------------------------------------------------------


def curves(world: World, cases: list[Experiment]) -> list[list[dict[int, float]]]:
    found = []
    for e in cases:
        trainer, recorder = fitted(e, world)
        assert parallel.is_sharded(trainer.raw_model) == (world.distributed and e.trainer.strategy == "fsdp")
        found.append([recorder.series(name) for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy")])
    return found


def test_it_is_equal_to_one_process_and_to_ddp() -> None:
    def exact(steps: int, **fsdp: Any) -> Experiment:
        # An epoch has 7 full batches and one of 6 samples, 1 or 2 on each of 4 ranks.
        e = stack(
            max_steps=steps, precision="64-true", max_grad_norm=0.5, ema_decay=0.9, eval_every_n_steps=20, fsdp=fsdp
        )
        e.data.global_batch_size, e.data.micro_batch_size, e.data.drop_last = 12, 2 if fsdp else 3, False
        return e

    def single(**fsdp: Any) -> Experiment:
        return stack(max_steps=10, eval_every_n_steps=5, fsdp=fsdp)

    eager = single(reshard_after_forward=True, wrap=["LayerNorm", f"{__name__}.Block"])
    cases = {
        2: [exact(20), single(), with_strategy(single(), "ddp"), eager],
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
    """Return the gradients of the first step of each case."""
    found = []
    for e in cases:
        trainer = Trainer(e, world=world)
        trainer.train_step(next(trainer.train_loader.batches(0, 1)))
        named = trainer.raw_model.named_parameters()
        found.append({name: full(p.grad) for name, p in named if p.grad is not None})
    return found


def test_a_token_weighted_gradient_is_that_of_one_process() -> None:
    # Rows 0 and 1 have no counted token, and 3 samples leave one of 4 ranks without any.
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
    """Return the model, its average and the optimizer, all with whole tensors."""
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
    """Return the state as it was loaded, and the losses after it."""
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
    """Return the scale after a step in which one rank's gradients overflow, and whether the weights are unchanged."""
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
    """Return the losses, how many values of each trained parameter this rank holds, and whether each optimizer group is
    fused."""
    saved = checkpointer(world, folder)
    recorder = training.Recorder()
    trainer = Trainer(e, world=world, checkpointer=saved, listeners=[recorder])
    if found := saved.list():
        trainer.restore(found[-1])
    trainer.fit()
    held = [part.numel() for part in parallel.local_parts(trainer.gradients.parameters)]
    return recorder.series("train/loss"), held, [group["fused"] for group in trainer.optimizer.param_groups]


def test_a_new_head_of_fewer_classes_than_ranks_by_fused_sgd(tmp_path: Path) -> None:
    # Some ranks hold no trained value, and the optimizer has no kernel for shards.
    e = stack(max_steps=3, freeze=["first.*", "blocks.*", "last.*"], max_grad_norm=0.5, precision="64-true")
    e.model, e.loss = node(Stack, classes=3), node(three_classes, _partial_=True)
    e.optimizer = node("torch.optim.SGD", lr=0.1, momentum=0.9, fused=True)
    found = ranks.run(4, head_alone, e, tmp_path)
    expected, _, fused = head_alone(World(), e, tmp_path / "alone")
    assert fused == [True, True]
    assert found[3][1:] == ([0, 0], [False, False])
    for losses, _, _ in found:
        assert losses == pytest.approx(expected, rel=1e-9)
    # On one process the optimizer is fused again.
    e.trainer.max_steps = 5
    losses, _, fused = head_alone(World(), e, tmp_path)
    assert fused == [True, True]
    assert losses.keys() == {4, 5}


@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "torch.optim.AdamW"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(optimizer: str) -> None:
    e = stack(max_steps=2, precision="16-mixed", nonfinite="warn")
    e.optimizer = node(optimizer, lr=0.1, fused=True)
    for scale, same in ranks.run(2, overflowing, e):
        assert (scale, same) == (2.0**15, True)


def started_from(world: World, e: Experiment, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the weights after `init_from`, and on rank 0 also the weights with which a model is exported."""
    trainer = Trainer(e, world=world, checkpointer=checkpointer(world, folder))
    with pytest.raises(CheckpointNotFound, match=r"init_from=/nowhere: no weights file"):
        trainer.init_from("/nowhere")
    # Only the first rank looks for the weights and holds all of them in its memory.
    trainer.init_from(str(folder.parent if world.rank == 0 else "/nowhere"))
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
        restore_module(copy.deepcopy(trainer.raw_model), exported or begun, "the checkpoint")


# -- memory ----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """8 blocks of 33,280 parameters each, and a head of 516."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(128, 0.0, inner=128) for _ in range(8))
        self.head = nn.Linear(128, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(1).repeat(1, 8)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def peak(world: World, e: Experiment) -> dict[str, int]:
    """Return the bytes that this rank holds at the peak of its second step, by what they are for."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    trainer = Trainer(e, world=world)
    batch = next(trainer.train_loader.batches(0, 1))
    trainer.train_step(batch)
    if parallel.is_sharded(trainer.raw_model):
        tracker: MemTracker = FSDPMemTracker(trainer.raw_model, trainer.optimizer)
    else:
        tracker = MemTracker()
        tracker.track_external(trainer.raw_model, trainer.optimizer)
    with tracker:
        trainer.train_step(batch)
    return {str(k): v for k, v in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}


def wide(strategy: str, *, recompute: bool = False) -> Experiment:
    return experiment(
        model=node(Wide),
        optimizer=node("torch.optim.AdamW", lr=0.01, foreach=False),
        data={"train": node(images, rows=512), "val": None, "global_batch_size": 512},
        trainer={"strategy": strategy, "activation_checkpointing": recompute},
    )


def test_memory_falls_with_the_number_of_ranks() -> None:
    whole, block = 4 * (8 * 33280 + 516), 4 * (33280 + 516)
    ddp = ranks.run(4, peak, wide("ddp"))[0]["Total"]
    for size in (2, 4):
        found, recomputed = (ranks.run(size, peak, wide("fsdp", recompute=r))[0] for r in (False, True))
        for memory in (found, recomputed):
            assert memory["_FSDPRefType.SHARDED_PARAM"] == whole / size
            assert memory["_FSDPRefType.OPT"] == pytest.approx(2 * whole / size, rel=0.01)
            assert memory["_FSDPRefType.UNSHARDED_PARAM"] <= block
        assert recomputed["_FSDPRefType.ACT"] < 0.4 * found["_FSDPRefType.ACT"]
    assert found["Total"] < 0.6 * ddp
    assert recomputed["Total"] < 0.35 * ddp


# -- other parts of training -----------------------------------------------------------------------------------------


def losses(world: World, cases: list[Experiment]) -> list[dict[int, float]]:
    return [fitted(e, world)[1].series("train/loss") for e in cases]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_half_precision_trains_as_with_ddp(precision: str) -> None:
    def case(optimizer: str, **options: Any) -> Experiment:
        return experiment(
            model=node(training.Net, dropout=0.0),  # with a batch norm
            optimizer=node(optimizer, fused=True, **options),
            data={"micro_batch_size": 3},
            trainer={"precision": precision, "max_steps": 20, "max_grad_norm": 1.0, "strategy": "fsdp"},
        )

    cases = [case("torch.optim.SGD", lr=0.1, momentum=0.9), case("torch.optim.AdamW", lr=0.01)]
    first, second = ranks.run(2, losses, [*cases, *(with_strategy(e, "ddp") for e in cases)])
    assert first == second
    for got, expected in zip(first[:2], first[2:], strict=True):
        assert got[20] < 0.6 * got[1]
        assert got == pytest.approx(expected, rel=0.05)


def policies(world: World) -> list[Any]:
    from raytrainer.parallel import fsdp

    made = [
        fsdp.precision_policy(
            precision,
            FSDPConfig(param_dtype=options.get("param_dtype"), reduce_dtype=options.get("reduce_dtype")),
            dtype,
        )
        for precision, options, dtype in [
            ("bf16-mixed", {}, torch.float32),
            ("16-mixed", {}, torch.float32),
            ("bf16-mixed", {"param_dtype": "float32", "reduce_dtype": "bfloat16"}, torch.float32),
            ("bf16-true", {}, torch.bfloat16),
            ("bf16-true", {"reduce_dtype": "float32"}, torch.bfloat16),
            ("32-true", {}, torch.float32),
        ]
    ]
    return [(policy.param_dtype, policy.reduce_dtype) for policy in made]


def test_types_are_those_of_the_precision() -> None:
    assert policies(World()) == [
        (torch.bfloat16, None),
        (torch.float16, None),
        (None, torch.bfloat16),
        (None, None),
        (None, torch.float32),
        (None, None),
    ]


class Choosy(nn.Module):
    """A unit with two halves. Each rank uses its own half."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.halves[torch.distributed.get_rank()](image.flatten(1))
        return logits


def test_ranks_may_use_different_parts_of_a_unit() -> None:
    e = stack(find_unused_parameters=True, max_steps=5)
    e.model, e.data.val = node(Choosy), None
    for got, expected in ranks.run(2, losses, [e, with_strategy(e, "ddp")]):
        assert got == pytest.approx(expected, rel=1e-5)


def compiled(world: World, e: Experiment, backend: str) -> tuple[dict[int, float], dict[int, float], int]:
    """Return the losses without and with torch.compile, and how many graphs it made."""
    from torch._dynamo.utils import counters

    plain = losses(world, [e])[0]
    counters.clear()
    e.trainer.compile = True
    with training.compiling(backend):
        return plain, losses(world, [e])[0], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_it_compiles_unit_by_unit(backend: str) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler: g++ or clang++")
    for plain, got, graphs in ranks.run(2, compiled, stack(max_steps=3, activation_checkpointing=True), backend):
        assert got == pytest.approx(plain, rel=1e-5)
        assert graphs > 0


class Scalar(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("model", "wrap", "message"),
    [
        (Stack, ["Linear"], r"fsdp.wrap puts first.weight and last.weight, which are one parameter, into different"),
        (Stack, ["Blok"], r"fsdp.wrap=Blok is not a class of the model's modules; valid: Block, "),
        (Scalar, None, r"trainer.strategy=fsdp cannot shard this model: .*scalar parameters"),
    ],
)
def test_what_cannot_be_sharded_is_refused(model: type, wrap: list[str] | None, message: str) -> None:
    e = stack(fsdp={"wrap": wrap})
    e.model = node(model)
    with pytest.raises(AssertionError, match=rf"ConfigError: {message}"):
        ranks.run(2, initial, e)


class Twice(nn.Module):
    """A model in which one batch norm has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.again, self.head = self.norm, nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(image.flatten(1)))
        return logits


def statistics(world: World, e: Experiment) -> dict[str, Tensor]:
    state = snapshot.shared(fitted(e, world)[0])
    return {f"{of}/{k}": t for of in ("model", "ema") for k, t in state[of].items() if "running" in k}


def test_statistics_of_a_module_with_two_names_are_the_mean_under_both() -> None:
    e = experiment(model=node(Twice), trainer={"strategy": "fsdp", "ema_decay": 0.9, "max_steps": 2})
    first, second = ranks.run(2, statistics, e)
    assert training.differences(first, second) == []
    assert torch.equal(first["model/norm.running_mean"], first["model/again.running_mean"])
    assert torch.equal(first["ema/norm.running_mean"], first["ema/again.running_mean"])


if __name__ == "__main__":
    for strategy in ("ddp", "fsdp"):
        for recompute in (False, True):
            row = [ranks.run(size, peak, wide(strategy, recompute=recompute))[0]["Total"] / 1e6 for size in (2, 4)]
            print(f"| {strategy}{', recomputing' if recompute else ''} |" + "".join(f" {mb:.2f} |" for mb in row))
