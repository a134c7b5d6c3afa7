"""The training loop in one process, and where its ranks must agree: what it does at each step, and how it ends.
Equality over workers and exact resume are tested in tests/test_equality.py."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from raytrainer.config import Experiment, compose
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound, ConfigError, DataError, NonFiniteLoss
from raytrainer.parallel import World
from raytrainer.trainer import FitResult, Trainer
from tests import ranks, training
from tests.training import (
    EarlyStopping,
    Profile,
    Recorder,
    checkpointer,
    differences,
    experiment,
    fitted,
    images,
    node,
    weights,
)


def test_alone_in_a_notebook(in_tmp: Path) -> None:
    result = Trainer(compose(["experiment=smoke", "optimizer.lr=0.01"]).experiment).fit()
    assert (result.step, result.epoch, result.reason) == (20, 1, "finished")
    assert set(result.metrics) == {
        "train/loss",
        "train/accuracy",
        "train/lr",
        "train/samples_per_second",
        "epoch",
        "val/loss",
        "val/accuracy",
    }
    assert result.metrics["val/accuracy"] > 0.5
    assert result.best == (result.metrics["val/loss"], 20)
    assert list(in_tmp.iterdir()) == []


# -- events and logs -------------------------------------------------------------------------------------------------


def test_hooks_in_order(tmp_path: Path) -> None:
    # An epoch has 4 batches: there is an evaluation and a checkpoint after step 4, and at the end.
    e = experiment(trainer={"max_steps": 6, "log_every_n_steps": 3}, checkpoint={"monitor": "val/accuracy"})
    trainer, recorder = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    assert [(name.removeprefix("on_"), event.step) for name, event in recorder.told] == [
        ("fit_start", 0),
        ("step_end", 1),
        ("step_end", 2),
        ("step_end", 3),
        ("log", 3),
        ("step_end", 4),
        ("eval_end", 4),
        ("checkpoint", 4),
        ("step_end", 5),
        ("step_end", 6),
        ("log", 6),
        ("eval_end", 6),
        ("checkpoint", 6),
        ("fit_end", 6),
    ]
    start = recorder.events("on_fit_start")[0]
    assert (start.total_steps, start.steps_per_epoch, start.world_size) == (6, 4, 1)
    assert start.parameters == sum(p.numel() for p in trainer.raw_model.parameters())
    assert [(event.epoch) for event in recorder.events("on_step_end")] == [0, 0, 0, 0, 1, 1]
    for event, saved in zip(recorder.events("on_eval_end"), recorder.events("on_checkpoint"), strict=True):
        assert saved.metric == event.metrics["val/accuracy"]
    end = recorder.events("on_fit_end")[0]
    assert (end.epoch, end.reason) == (1, "finished")
    assert trainer.checkpointer is not None
    assert [(info.step, info.metric) for info in trainer.checkpointer.list()] == [
        (event.step, event.metric) for event in recorder.events("on_checkpoint")
    ]


class Talkative:
    """A callback that logs after each step and once more after the last log, and that logs a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_step_end(self, trainer: Trainer, event: Any) -> None:
        trainer.log({"mine/step": event.step})

    def on_eval_end(self, trainer: Trainer, event: Any) -> None:
        trainer.log({"mine/after": 7})
        trainer.log_artifact(self.path, "plots")


def test_callbacks_log_figures_and_artifacts(tmp_path: Path) -> None:
    e = experiment(
        callbacks={"mine": node(Talkative, path=str(tmp_path)), "off": None}, trainer={"log_every_n_steps": 2}
    )
    trainer, recorder = fitted(e)
    assert recorder.series("mine/step") == {2: 2.0, 4: 4.0}
    assert recorder.series("mine/after") == {4: 7.0}
    assert [name for name, _ in recorder.told[-4:]] == ["on_eval_end", "on_artifact", "on_log", "on_fit_end"]
    assert [(a.path, a.folder) for a in recorder.events("on_artifact")] == [(str(tmp_path), "plots")]
    assert trainer.metrics["mine/after"] == 7.0
    assert list(trainer.callbacks) == ["mine"]


def test_a_log_is_the_mean_since_the_last_one() -> None:
    e = experiment(trainer={"max_steps": 8})
    each = fitted(e)[1].series("train/loss")
    e.trainer.log_every_n_steps = 3
    assert fitted(e)[1].series("train/loss") == pytest.approx(
        {3: sum(each[s] for s in (1, 2, 3)) / 3, 6: sum(each[s] for s in (4, 5, 6)) / 3, 8: (each[7] + each[8]) / 2}
    )


def test_a_trace_of_some_steps_is_an_artifact(tmp_path: Path) -> None:
    class Keep:
        def __init__(self) -> None:
            self.traces: list[tuple[str | None, Any]] = []

        def on_artifact(self, trainer: Any, event: Any) -> None:
            self.traces.append((event.folder, json.loads(Path(event.path).read_text())))

    keep = Keep()
    e = experiment(
        trainer={"max_steps": 6, "profile": Profile(start=3, steps=2), "eval_every_n_steps": 0},
        checkpoint={"every_n_steps": 2},
    )
    fitted(e, checkpointer=checkpointer(World(), tmp_path), listeners=[keep])
    [(folder, trace)] = keep.traces
    assert folder == "profile"
    steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}  # torch counts from 0
    # Resume before those steps, among them and after them.
    for step, expected in ((2, 1), (4, 0), (6, 0)):
        keep.traces.clear()
        trainer = Trainer(e, checkpointer=checkpointer(World(), tmp_path), listeners=[keep])
        assert trainer.checkpointer is not None
        trainer.restore(next(info for info in trainer.checkpointer.list() if info.step == step))
        assert trainer.fit().step == 6
        assert len(keep.traces) == expected


# -- one step --------------------------------------------------------------------------------------------------------


class HostReader(TorchFunctionMode):
    """A mode that fails if Python asks a tensor for its values."""

    ASKS = frozenset(
        ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in self.ASKS, f"a step asks the device: {func.__name__}"
        return func(*args, **(kwargs or {}))


class DeviceReader(TorchDispatchMode):
    """A mode that fails if an operation waits for the device: `item` inside torch, sizes that depend on values, and
    copies."""

    ASKS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"))

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in self.ASKS, f"a step waits for the device: {name}"
        device = (kwargs or {}).get("device")
        assert name != "_to_copy" or device in (None, args[0].device), "a step copies between devices"
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name.startswith("index") else []
        assert not masks, "a step waits for the device: a mask as index"
        return func(*args, **(kwargs or {}))


def step_without_host(e: Experiment) -> None:
    trainer = Trainer(e)
    # A weight on the CPU may be read, because there is no device to wait for. Take the code path of an accelerator.
    trainer.gradients.zero_weights.reads_cpu = False
    batches = trainer.train_loader.batches(0, 3)
    trainer.train_step(next(batches))  # creates the optimizer's state
    for batch in batches:
        with DeviceReader(), HostReader():
            trainer.train_step(batch)
            trainer.events.step_end(trainer, trainer.step, batch.epoch)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_nothing_reaches_the_host_in_a_step(optimizer: str) -> None:
    def case(**sections: Any) -> Experiment:
        made = {"optimizer": node(f"torch.optim.{optimizer}", lr=0.1, fused=True), **sections}
        return experiment(lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=2), **made)

    step_without_host(case())
    step_without_host(case(data={"micro_batch_size": 5}, trainer={"max_grad_norm": 1.0, "ema_decay": 0.9}))
    step_without_host(case(loss=node(training.counted_loss, _partial_=True), trainer={"max_grad_norm": 1.0}))
    step_without_host(case(trainer={"precision": "16-mixed", "max_grad_norm": 1.0}))
    step_without_host(case(**TOKENS, trainer={"precision": "bf16-mixed"}))


TOKENS: dict[str, Any] = {
    "model": node("torch.nn.Embedding", num_embeddings=7, embedding_dim=7),
    "loss": node("raytrainer.losses.TokenCrossEntropy"),
    "data": {"train": node(training.tokens, rows=24), "val": None},
}


def nosy_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    loss = model(batch["image"]).square().mean()
    return {"loss": loss / loss.item()}


def nosy_mask(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    output = model(batch["image"])
    return {"loss": output[output > 0].mean()}


@pytest.mark.parametrize("loss", [nosy_loss, nosy_mask])
def test_a_step_that_reaches_the_host_would_be_seen(loss: Any) -> None:
    with pytest.raises(AssertionError, match=r"a step (asks|waits for) the device"):
        step_without_host(experiment(loss=node(loss, _partial_=True)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"])
def test_every_precision_trains(precision: str) -> None:
    e = experiment(model=node(training.Net, dropout=0.0), trainer={"precision": precision, "max_steps": 40})
    trainer, recorder = fitted(e)
    losses = recorder.series("train/loss")
    assert losses[40] < 0.6 * losses[1]
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in trainer.raw_model.parameters()} == {dtype}
    assert (trainer.precision.scaler is not None) == (precision == "16-mixed")
    e.trainer.precision, e.trainer.max_steps = "64-true", 1
    exact = fitted(e)[1].series("train/loss")
    assert losses[1] == pytest.approx(exact[1], rel=1e-5 if precision == "32-true" else 0.02)


def test_a_scaler_that_skips_the_first_step_leaves_the_momentum_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # These gradients overflow half precision at the scaler's first scale of 65536, and at some of the next.
    e = experiment(
        loss=node(steep_loss, _partial_=True),
        optimizer=node("torch.optim.SGD", lr=1e-3, momentum=0.9, fused=True),
        trainer={"precision": "16-mixed"},
    )
    trainer = Trainer(e)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # with NaN
    before, moved = weights(trainer), 0
    for step, batch in enumerate(trainer.train_loader.batches(0, 20)):
        trainer.train_step(batch)
        change = max(float((t - before[name]).abs().max()) for name, t in weights(trainer).items())
        assert step > 0 or change == 0
        assert math.isfinite(change)
        moved += change > 0
    assert 0 < moved < 20


def test_a_checkpoint_of_a_gpu_trains_in_half_precision_on_the_cpu(tmp_path: Path) -> None:
    e, saved = experiment(trainer={"precision": "bf16-true"}), checkpointer(World(), tmp_path)
    trainer = Trainer(e, checkpointer=saved)
    for batch in trainer.train_loader.batches(0, 1):
        trainer.train_step(batch)
    for group in trainer.optimizer.param_groups:
        assert group["fused"] is False
        group["fused"] = True  # as in a checkpoint saved on a GPU
    trainer.save()
    saved.wait()
    again = Trainer(e, checkpointer=saved)
    again.restore(saved.list()[-1])
    assert [group["fused"] for group in again.optimizer.param_groups] == [False, False]


def steep_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"loss": model(batch["image"]).sum() * 10}


def test_a_buffer_of_complex_numbers_keeps_its_imaginary_part() -> None:
    for precision, dtype in (("32-true", torch.complex64), ("64-true", torch.complex128)):
        trainer = Trainer(experiment(model=node(training.Net), trainer={"precision": precision}))
        turn = dict(trainer.raw_model.named_buffers())["turn"]
        assert turn.dtype == dtype
        assert turn.imag.tolist() == pytest.approx([math.sin(0.5), math.sin(1.5)])


def test_float64_columns_train_a_float32_model() -> None:
    expected = fitted(experiment())[1].series("train/loss")
    e = experiment()
    e.data.train = node(images, rows=50, dtype="float64")
    assert fitted(e)[1].series("train/loss") == expected


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gradients_are_clipped(precision: str) -> None:
    def step(limit: float | None) -> Tensor:
        options = {"max_grad_norm": limit, "precision": precision}
        trainer = Trainer(experiment(optimizer=node("torch.optim.SGD", lr=1.0, fused=True), trainer=options))
        before = nn.utils.parameters_to_vector(trainer.raw_model.parameters()).detach().clone()
        trainer.train_step(next(trainer.train_loader.batches(0, 1)))
        return nn.utils.parameters_to_vector(trainer.raw_model.parameters()).detach() - before

    free, clipped, above = step(None), step(0.01), step(1e6)
    assert free.norm() > 0.02
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-4)
    assert float(nn.functional.cosine_similarity(free, clipped, dim=0)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(above, free)


def test_ema_is_the_running_mean_of_the_weights() -> None:
    e = experiment(model=node(training.Net), trainer={"ema_decay": 0.8, "precision": "64-true", "max_steps": 5})
    trainer = Trainer(e)
    assert trainer.ema_model is not None
    expected = {name: p.detach().clone() for name, p in trainer.raw_model.named_parameters()}
    for batch in trainer.train_loader.batches(0, 5):
        trainer.train_step(batch)
        for name, p in trainer.raw_model.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * p.detach()
    for name, p in trainer.ema_model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=1e-14)
        assert not p.requires_grad
    # Evaluation uses these weights, with the batch statistics of training.
    got = trainer.evaluate()
    trainer.raw_model.load_state_dict({**trainer.raw_model.state_dict(), **expected})
    trainer.ema_model = None
    assert got == pytest.approx(trainer.evaluate(), rel=1e-12)


def test_channels_last_changes_the_layout_alone() -> None:
    e = experiment(
        model=node("raytrainer.models.ResNet", block="basic", layers=[1], num_classes=4, in_channels=1, width=8)
        | {"stem": "small"}
    )
    _, expected = fitted(e)
    e.trainer.channels_last = True
    trainer, recorder = fitted(e)
    assert dict(trainer.raw_model.named_parameters())["layer1.0.conv1.weight"].is_contiguous(
        memory_format=torch.channels_last
    )
    assert recorder.series("train/loss") == pytest.approx(expected.series("train/loss"), rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler: g++ or clang++")
    e = experiment(trainer={"max_steps": 3, "ema_decay": 0.5}, data={"global_batch_size": 17})
    plain, expected = fitted(e)
    e.trainer.compile = True
    trainer, recorder = fitted(e)
    assert recorder.series("train/loss") == pytest.approx(expected.series("train/loss"), rel=1e-4)
    assert weights(trainer).keys() == weights(plain).keys()  # no prefix: each loads checkpoints of the other


def test_a_loss_must_give_the_same_entries() -> None:
    with pytest.raises(ConfigError, match=r"^loss gave loss, late .* and loss, early for "):
        fitted(experiment(loss=node(training.Fickle), trainer={"log_every_n_steps": 4}))


def test_a_frozen_model_is_refused() -> None:
    e = experiment(callbacks={})
    e.model = node(frozen)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Trainer(e)


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


# -- the end of training ---------------------------------------------------------------------------------------------


def test_early_stopping(tmp_path: Path) -> None:
    # A learning rate of 0: the first evaluation is the best, and none after it is better.
    e = experiment(
        optimizer=node("torch.optim.SGD", lr=0.0),
        trainer={"max_steps": 100, "eval_every_n_steps": 3, "early_stopping": EarlyStopping(patience=2)},
        checkpoint={"every_n_steps": 50},
    )
    trainer = Trainer(e, checkpointer=checkpointer(World(), tmp_path))
    result = trainer.fit()
    assert (result.reason, result.step, result.best and result.best[1]) == ("early_stopping", 9, 3)
    assert trainer.checkpointer is not None
    assert [info.step for info in trainer.checkpointer.list()] == [3, 9]  # the best and the last
    # If it is killed after that, it has already reached its end.
    again = Trainer(e, checkpointer=trainer.checkpointer)
    again.restore(trainer.checkpointer.list()[-1])
    assert again.fit() == result
    assert e.trainer.early_stopping is not None
    e.trainer.early_stopping.patience = 4
    more = Trainer(e, checkpointer=trainer.checkpointer)
    more.restore(trainer.checkpointer.list()[-1])
    assert more.fit().step == 15


def test_early_stopping_needs_a_gain_of_min_delta() -> None:
    e = experiment(trainer={"max_steps": 60, "eval_every_n_steps": 2})
    assert fitted(e)[0].step == 60
    e.trainer.early_stopping = EarlyStopping(monitor="val/accuracy", mode="max", patience=1, min_delta=1.0)
    assert fitted(e)[0].step == 4


def test_max_time_ends_with_an_evaluation_and_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # read once at the start and once at each log, one second apart
    monkeypatch.setattr("raytrainer.trainer.loop.time.monotonic", lambda: float(next(clock)))
    e = experiment(trainer={"max_steps": None, "max_time": 3.0, "log_every_n_steps": 2})
    trainer, recorder = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    assert (trainer.step, recorder.told[-1][1].reason) == (6, "max_time")
    assert [event.step for event in recorder.events("on_eval_end")] == [4, 6]
    assert trainer.checkpointer is not None
    assert [info.step for info in trainer.checkpointer.list()] == [4, 6]


def stopped(world: World, folder: Path) -> tuple[FitResult, list[int]]:
    e = experiment(trainer={"max_steps": 100, "log_every_n_steps": 3, "eval_every_n_steps": 50})
    trainer: list[Trainer] = []
    asked = lambda: world.rank == world.size - 1 and trainer[0].step >= 7  # noqa: E731
    saved = checkpointer(world, folder)
    trainer.append(Trainer(e, world=world, checkpointer=saved, should_stop=asked))
    return trainer[0].fit(), [info.step for info in saved.list()]


def test_a_stop_on_one_rank_ends_both_after_the_same_step(tmp_path: Path) -> None:
    for result, saved in [stopped(World(), tmp_path / "1"), *ranks.run(2, stopped, tmp_path / "2")]:
        assert (result.step, result.reason, saved) == (9, "stopped", [9])
        assert "val/loss" not in result.metrics  # a stop skips the evaluation


def test_a_run_of_the_last_step_is_finished() -> None:
    result = Trainer(experiment(trainer={"max_steps": 3}), should_stop=lambda: True).fit()
    assert (result.step, result.reason) == (1, "stopped")
    result = Trainer(experiment(trainer={"max_steps": 1}), should_stop=lambda: True).fit()
    assert (result.step, result.reason) == (1, "finished")
    assert result.metrics["val/loss"] > 0


def test_epochs_and_the_steps_they_are() -> None:
    e = experiment(trainer={"max_steps": None, "max_epochs": 2})  # 50 samples, 12 in a batch
    assert (Trainer(e).total_steps, Trainer(e).fit().epoch) == (8, 2)
    e.data.drop_last = False
    assert Trainer(e).total_steps == 10
    e.data.train = node(training.Counting, rows=24)
    with pytest.raises(ConfigError, match=r"^trainer\.max_epochs=2 .*length; use trainer\.max_steps"):
        Trainer(e)


@pytest.mark.parametrize(
    ("limits", "step", "reason", "curve"),
    [
        ({"max_steps": 3, "max_epochs": 2}, 3, "finished", 3),  # 4 steps in an epoch
        ({"max_steps": 100, "max_epochs": 1}, 4, "finished", 4),
        ({"max_steps": 6, "max_epochs": 2, "max_time": 2.0}, 2, "max_time", 6),
        ({"max_steps": None, "max_epochs": 2, "max_time": 1e6}, 8, "finished", 8),
    ],
)
def test_the_first_limit_ends_training(
    limits: dict[str, Any], step: int, reason: str, curve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("raytrainer.trainer.loop.time.monotonic", lambda: float(next(clock)))
    e = experiment(trainer={**limits, "log_every_n_steps": 1}, lr_scheduler=node("raytrainer.optim.Linear"))
    e.data.val = None
    trainer, recorder = fitted(e)
    assert (trainer.step, recorder.told[-1][1].reason) == (step, reason)
    # The learning rate reaches its end at the first limit that is a number of steps.
    assert trainer.total_steps == curve
    assert recorder.series("train/lr")[2] == pytest.approx(0.1 * (1 - 1 / curve))


def test_a_resume_may_set_another_limit(tmp_path: Path) -> None:
    e = experiment(trainer={"max_steps": None, "max_epochs": 1})
    fitted(e, checkpointer=checkpointer(World(), tmp_path))
    more: list[tuple[dict[str, Any], int]] = [
        ({"max_steps": 6}, 4),
        ({"max_steps": 6, "max_epochs": None}, 6),
        ({"max_steps": None, "max_epochs": 2}, 8),
    ]
    for limits, step in more:
        for name, value in limits.items():
            setattr(e.trainer, name, value)
        saved = checkpointer(World(), tmp_path)
        trainer = Trainer(e, checkpointer=saved)
        latest = saved.latest()
        assert latest is not None
        trainer.restore(latest)
        assert (trainer.fit().step, trainer.total_steps) == (step, step)


def test_an_iterable_to_validate_on_ends_after_its_epoch() -> None:
    e = experiment(trainer={"max_steps": 2, "eval_every_n_steps": 1}, optimizer=node("torch.optim.SGD", lr=0.0))
    e.data.val = node(training.Counting, rows=17)
    _, recorder = fitted(e)
    first, second = recorder.series("val/loss").values()
    assert first == second


def test_nothing_to_evaluate_on_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^data.val is not set"):
        Trainer(experiment(data={"val": None})).evaluate()


def test_the_best_is_kept_between_the_regular_checkpoints(tmp_path: Path) -> None:
    e = experiment(
        trainer={"max_steps": 40, "eval_every_n_steps": 3}, checkpoint={"every_n_steps": 10, "monitor": "val/accuracy"}
    )
    e.checkpoint.mode = "max"
    trainer = Trainer(e, checkpointer=checkpointer(World(), tmp_path, num_to_keep=1, mode="max"))
    result = trainer.fit()
    assert trainer.checkpointer is not None
    best = trainer.checkpointer.best()
    assert best is not None
    assert result.best == (best.metric, best.step)
    assert [info.step for info in trainer.checkpointer.list()] == sorted({best.step, 40})
    assert trainer.best_weights()[0] == best.step


# -- values that are not finite --------------------------------------------------------------------------------------


def bad_row(world: World, folder: Path, **trainer: Any) -> tuple[str, list[int]]:
    """Train with sample 40 infinite: it is in the last of the 4 batches, and on one rank only. Return the result as
    text, and the steps with a checkpoint."""
    e = experiment(
        data={"train": node(images, rows=50, bad=40), "shuffle": False},
        trainer={"max_steps": 8, "log_every_n_steps": 100, "eval_every_n_steps": 0, **trainer},
        checkpoint={"every_n_steps": 1},
    )
    saved = checkpointer(world, folder)
    try:
        Trainer(e, world=world, checkpointer=saved).fit()
        text = "finished"
    except NonFiniteLoss as error:
        text = str(error)
    saved.close()
    return text, [info.step for info in saved.list()]


def test_a_loss_that_is_not_finite_ends_all_ranks_and_is_never_saved(tmp_path: Path) -> None:
    for log in (1, 100):
        one = bad_row(World(), tmp_path / f"1-{log}", log_every_n_steps=log)
        for text, saved in [one, *ranks.run(2, bad_row, tmp_path / f"2-{log}")]:
            assert text.startswith("the loss became ")
            assert "by step 4; the checkpoints before it are valid" in text
            assert saved == [1, 2, 3]
    info = checkpointer(World(), tmp_path / "2-1").latest()
    assert info is not None
    assert info.step == 3


def test_with_warn_it_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="raytrainer.trainer"):
        text, saved = bad_row(World(), tmp_path, nonfinite="warn", log_every_n_steps=4)
    assert (text, saved) == ("finished", [1, 2, 3])  # no run could continue from weights that are NaN
    assert "the loss is nan at step 4; the run continues (trainer.nonfinite=warn)" in caplog.text
    assert "no checkpoint after step 8: the weights are not finite" in caplog.text


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    # The loss of step 3 is still finite: only the next one would show it.
    e = experiment(
        callbacks={"poison": node(training.Poison, at=3)},
        trainer={"log_every_n_steps": 100, "eval_every_n_steps": 0, "max_steps": 8},
        checkpoint={"every_n_steps": 1},
    )
    saved = checkpointer(World(), tmp_path)
    with pytest.raises(NonFiniteLoss, match=r"^the weights .*after step 0, by step 3"):
        Trainer(e, checkpointer=saved).fit()
    saved.close()
    assert [info.step for info in saved.list()] == [1, 2]


def test_nan_is_never_best() -> None:
    e = experiment(
        callbacks={"poison": node(training.Poison, at=3)},
        trainer={"max_steps": 6, "eval_every_n_steps": 1, "nonfinite": "warn"},
    )
    result = Trainer(e).fit()
    assert math.isnan(result.metrics["val/loss"])
    assert result.best is not None
    assert result.best[1] < 3
    assert math.isfinite(result.best[0])


# -- changed settings in a resume ------------------------------------------------------------------------------------


def resumed(
    folder: Path, changed: tuple[str, ...], scheduler: dict[str, Any] | None, **optimizer: Any
) -> dict[int, float]:
    """Return the learning rates of the steps after a resume at step 4 of 10, with other settings in the experiment."""

    def case(**settings: Any) -> Experiment:
        return experiment(
            optimizer=node("torch.optim.SGD", **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **settings}),
            lr_scheduler=scheduler,
            trainer={"max_steps": 10},
            checkpoint={"every_n_steps": 4},
        )

    if not folder.exists():
        fitted(case(), checkpointer=checkpointer(World(), folder))
    recorder = Recorder()
    trainer = Trainer(case(**optimizer), checkpointer=checkpointer(World(), folder), listeners=[recorder])
    assert trainer.checkpointer is not None
    trainer.restore(trainer.checkpointer.list()[0], changed)
    assert trainer.step == 4
    trainer.checkpointer = None
    trainer.fit()
    settings = [(g["momentum"], g["weight_decay"]) for g in trainer.optimizer.param_groups]
    recorder.told.append(("settings", settings))
    found = recorder.series("train/lr")
    wanted = {"momentum": 0.9, "weight_decay": 0.01} | {
        k: v for k, v in optimizer.items() if k in changed and k != "lr"
    }
    # Vectors do not decay, whatever the settings say.
    assert settings == [(wanted["momentum"], wanted["weight_decay"]), (wanted["momentum"], 0.0)]
    return found


COSINE = node("raytrainer.optim.Cosine", warmup_steps=3, min_factor=0.1)
STEPS = node("torch.optim.lr_scheduler.StepLR", step_size=3, gamma=0.5)


@pytest.mark.parametrize("scheduler", [None, COSINE, STEPS], ids=["none", "curve", "torch"])
def test_a_changed_rate_keeps_its_place_on_the_curve(tmp_path: Path, scheduler: dict[str, Any] | None) -> None:
    old = resumed(tmp_path / "run", (), scheduler, lr=0.4)
    assert sorted(old) == list(range(5, 11))
    new = resumed(tmp_path / "run", ("lr",), scheduler, lr=0.4)
    assert new == pytest.approx({step: 4 * rate for step, rate in old.items()}, rel=1e-9)
    if scheduler is not None:
        assert len(set(old.values())) > 1


def sequence(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.LinearLR(optimizer, 0.5, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 8)]
    return schedulers.SequentialLR(optimizer, parts, [6])


def test_a_changed_rate_in_a_sequence_of_schedulers(tmp_path: Path) -> None:
    old, new = (resumed(tmp_path / "run", changed, node(sequence), lr=0.2) for changed in ((), ("lr",)))
    assert len(set(old.values())) > 3
    assert new == pytest.approx({step: 2 * rate for step, rate in old.items()}, rel=1e-9)


def test_other_settings_change_alone(tmp_path: Path) -> None:
    old = resumed(tmp_path / "run", (), COSINE)
    assert resumed(tmp_path / "run", ("momentum", "weight_decay"), COSINE, momentum=0.5, weight_decay=0.2) == old
    assert resumed(tmp_path / "run", ("momentum",), COSINE, momentum=0.5, weight_decay=0.2, lr=9.0) == old


def test_a_changed_rate_is_changed_once(tmp_path: Path) -> None:
    # If a worker dies again after the resume, it gets the same settings again, with a checkpoint that has them already.
    e = experiment(lr_scheduler=COSINE, trainer={"max_steps": 6}, checkpoint={"every_n_steps": 1})
    saved = checkpointer(World(), tmp_path)
    fitted(e, checkpointer=saved)
    assert e.optimizer is not None
    e.optimizer["lr"] = 0.3
    e.trainer.max_steps = 8
    first = Trainer(e, checkpointer=saved, listeners=[told := Recorder()])
    first.restore(saved.list()[-1], ["lr"])
    first.fit()
    second = Trainer(e, checkpointer=saved, listeners=[again := Recorder()])
    second.restore(next(info for info in saved.list() if info.step == 7), ["lr"])
    second.checkpointer = None
    second.fit()
    assert again.series("train/lr") == {8: told.series("train/lr")[8]}


# -- frozen parameters ------------------------------------------------------------------------------------------------

FROZEN = {"freeze": ["conv.*", "norm.*"], "max_steps": 6, "ema_decay": 0.9}


def frozen_run(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trainer = Trainer(experiment(model=node("tests.training.Net"), trainer=FROZEN), world=world)
    before = weights(trainer)
    trainer.fit()
    return before, weights(trainer)


@pytest.mark.parametrize("size", [1, 2])
def test_frozen_parameters_and_statistics_stay(size: int) -> None:
    for before, after in [frozen_run(World())] if size == 1 else ranks.run(size, frozen_run):
        assert sorted(differences(before, after)) == ["/head.bias", "/head.weight"]


def test_what_is_frozen_has_no_state_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    e = experiment(model=node("tests.training.Net"), trainer=FROZEN, checkpoint={"every_n_steps": 3})
    whole, told = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    assert {name for p in whole.optimizer.state for name, q in whole.raw_model.named_parameters() if p is q} == {
        "head.weight",
        "head.bias",
    }
    (start,) = told.events("on_fit_start")
    assert (start.trainable, start.parameters) == (96 * 4 + 4, 96 * 4 + 4 + 6 * 9 + 6 + 12)
    assert whole.checkpointer is not None
    again = Trainer(e, checkpointer=whole.checkpointer)
    again.restore(next(i for i in whole.checkpointer.list() if i.step == 3))
    again.checkpointer = None
    again.fit()
    assert differences(weights(again), weights(whole)) == []


# -- weights from other runs and files -------------------------------------------------------------------------------


def test_init_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    expected = weights(fitted(experiment(seed=8))[0])
    save_file(expected, tmp_path / "model.safetensors")
    torch.save(expected, tmp_path / "model.pt")
    torch.save({"state_dict": expected, "epoch": 3}, tmp_path / "other.pth")
    for name in ("model.safetensors", "model.pt", "other.pth"):
        trainer = Trainer(experiment(trainer={"ema_decay": 0.9}))
        assert differences(weights(trainer), expected) != []
        trainer.init_from(str(tmp_path / name))
        assert differences(weights(trainer), expected) == []
        assert trainer.ema_model is not None
        assert differences(dict(trainer.ema_model.state_dict()), expected) == []
        assert trainer.step == 0


@pytest.mark.parametrize("ema", [None, 0.5])
def test_init_from_a_run_takes_its_best(tmp_path: Path, ema: float | None) -> None:
    class Keep:
        def __init__(self) -> None:
            self.weights: dict[int, dict[str, Tensor]] = {}

        def on_eval_end(self, trainer: Trainer, event: Any) -> None:
            model = trainer.raw_model if trainer.ema_model is None else trainer.ema_model
            self.weights[event.step] = {k: v.clone() for k, v in model.state_dict().items()}

    def learning_then_not(rate: float) -> Experiment:
        e = experiment(trainer={"eval_every_n_steps": 5, "ema_decay": ema, "max_steps": 40})
        assert e.optimizer is not None
        e.optimizer["lr"] = rate
        return e

    e, keep = learning_then_not(2.0), Keep()
    e.storage_path = str(tmp_path)
    saved = checkpointer(World(), tmp_path / "run" / "checkpoints")
    result = Trainer(e, checkpointer=saved, listeners=[keep]).fit()
    assert result.best is not None
    assert result.best[1] < 40
    for source in (str(tmp_path / "run"), "run", f"run/checkpoints/step-{result.best[1]:09d}"):
        trainer = Trainer(e)
        trainer.init_from(source)
        assert differences(weights(trainer), keep.weights[result.best[1]]) == []
    trainer = Trainer(e)
    trainer.init_from("run/checkpoints/step-000000040")
    assert differences(weights(trainer), keep.weights[40]) == []


def test_init_from_what_is_not_there_or_not_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    e = experiment()
    e.storage_path = str(tmp_path)
    trainer = Trainer(e)
    before = weights(trainer)
    with pytest.raises(CheckpointNotFound, match=r"^init_from=nowhere: no weights file"):
        trainer.init_from("nowhere")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(CheckpointCorrupt, match=r"text.pt cannot be read as weights"):
        trainer.init_from(str(tmp_path / "text.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointCorrupt, match=r"list.pt is not a state dict"):
        trainer.init_from(str(tmp_path / "list.pt"))
    other = dict(before)
    other["hidden.0.weihgt"] = other.pop("hidden.0.weight")
    other["head.bias"] = torch.zeros(5)
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointCorrupt) as caught:
        trainer.init_from(str(tmp_path / "other.safetensors"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/other.safetensors holds another model: ")
    assert "lacks hidden.0.weight (hidden.0.weight may be its hidden.0.weihgt); " in message
    assert "unexpected hidden.0.weihgt; " in message
    assert message.endswith(": head.bias: (5,) there, (4,) here")
    assert differences(weights(trainer), before) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved = checkpointer(World(), tmp_path)
    fitted(experiment(), checkpointer=saved)
    e = experiment(model=node("raytrainer.models.MLP", in_features=16, num_classes=4, width=9, depth=1))
    with pytest.raises(CheckpointCorrupt, match=r"another model: .*head\.weight: \(4, 8\) there, \(4, 9\)"):
        Trainer(e, checkpointer=saved).restore(saved.list()[-1])


def test_evaluation_leaves_each_part_in_its_own_mode() -> None:
    trainer = Trainer(experiment())
    trainer.raw_model.add_module("frozen", nn.BatchNorm1d(4).eval())
    trainer.evaluate()
    frozen = trainer.raw_model.get_submodule("frozen")
    assert not frozen.training
    assert trainer.raw_model.training


def test_a_monitor_that_no_evaluation_gives_is_refused() -> None:
    e = experiment()
    e.checkpoint.monitor, e.checkpoint.mode = "val/acuracy", "max"
    with pytest.raises(ConfigError, match=r"^checkpoint\.monitor=val/acuracy .*valid: val/"):
        Trainer(e).fit()


def test_max_time_counts_over_all_launches(tmp_path: Path) -> None:
    e = experiment(trainer={"max_time": 3600.0, "max_steps": 4})
    first = Trainer(e, checkpointer=checkpointer(World(), tmp_path))
    first.state.earlier_s = 3000.0
    first.fit()
    again = Trainer(e, checkpointer=checkpointer(World(), tmp_path))
    info = again.checkpointer.latest() if again.checkpointer else None
    assert info is not None
    again.restore(info)
    assert 3000.0 <= again.state.earlier_s < 3600.0


# -- targets that build the wrong thing --------------------------------------------------------------------------------


def nothing(**arguments: Any) -> None:
    """A function without its `return`."""


def empty() -> list[Any]:
    return []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"train": node(nothing)}}, "data.train builds nothing (None), which is not a dataset"),
        ({"data": {"val": {"far": node(nothing)}}}, "data.val.far builds nothing (None), which is not a dataset"),
        ({"data": {"collate_fn": node(nothing)}}, "data.collate_fn builds a NoneType, which cannot be called"),
        ({"metrics": {"f1": node(nothing)}}, "metrics.f1 builds a NoneType, which has no update()"),
        ({"callbacks": {"mine": node(nothing)}}, "callbacks.mine builds a NoneType, which has none of the hooks"),
        ({"data": {"train": node(empty)}}, "data.train: list has no samples: its length is 0"),
    ],
)
def test_what_a_target_builds_is_looked_at(sections: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        Trainer(experiment(**sections))
    assert says in str(refused.value)
