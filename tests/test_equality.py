"""Two promises: a run has the same curve on 1, 2 and 4 workers, and is bitwise the same after a resume. The ranks are
processes with gloo, from tests/ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrainer.config import Experiment, build
from raytrainer.parallel import World
from raytrainer.trainer import Trainer, snapshot
from tests import ranks, training
from tests.training import EarlyStopping, checkpointer, differences, experiment, fitted, images, node, weights

# -- the same curve on any number of workers -------------------------------------------------------------------------


def curve(world: World, e: Experiment) -> list[dict[int, float]]:
    _, recorder = fitted(e, world)
    return [recorder.series(name) for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy")]


def assert_equal_curves(e: Experiment, steps: int, tolerance: float) -> None:
    alone = curve(World(), e)
    assert sorted(alone[0]) == list(range(1, steps + 1))
    assert len(alone[2]) > 0
    assert alone[0][steps] < 0.9 * alone[0][1]  # two curves of a model that learns nothing would be equal too
    for size in (2, 4):
        for curves in ranks.run(size, curve, e):  # on each rank
            for got, expected in zip(curves, alone, strict=True):
                assert got == pytest.approx(expected, rel=tolerance)


AUGMENTED = node(images, rows=90, transform=node("raytrainer.data.RandomCropFlip", padding=1, flip=True))


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_mlp_in_fp32(micro_batch_size: int | None) -> None:
    # On 4 workers, 30 samples are split into 7, 8, 7 and 8. An epoch has three batches.
    e = experiment(
        data={"train": AUGMENTED, "global_batch_size": 30, "micro_batch_size": micro_batch_size},
        trainer={"max_steps": 10, "eval_every_n_steps": 5},
    )
    assert_equal_curves(e, 10, 1e-5)


def test_resnet_with_group_norm_in_fp32() -> None:
    e = experiment(
        model=node("raytrainer.models.ResNet", block="basic", layers=[1, 1], num_classes=4, in_channels=1, width=8)
        | {"stem": "small", "norm": "group"},
        optimizer=node("torch.optim.SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
        lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=3),
        data={"train": AUGMENTED, "global_batch_size": 30},
        trainer={"max_steps": 10, "eval_every_n_steps": 5},
    )
    assert_equal_curves(e, 10, 1e-5)


def sources(max_bytes: int) -> dict[str, Any]:
    return node("raytrainer.data.PythonSources", split="train", seq_len=16, max_bytes=max_bytes)


LANGUAGE: dict[str, Any] = {
    "model": node("raytrainer.models.Transformer", vocab_size=256, dim=16, num_layers=2, num_heads=4, num_kv_heads=2),
    "loss": node("raytrainer.losses.TokenCrossEntropy"),
    "optimizer": node("torch.optim.AdamW", lr=0.01, fused=True),
}


def test_transformer_in_fp32() -> None:
    # An epoch has 63 windows, in batches of 30, 30 and 3 samples; 4 workers share the 3.
    e = experiment(
        **LANGUAGE,
        data={"train": sources(1000), "val": sources(300), "global_batch_size": 30, "drop_last": False},
        trainer={"max_steps": 10, "eval_every_n_steps": 5},
    )
    assert_equal_curves(e, 10, 1e-5)


def test_mlp_in_float64_over_100_steps() -> None:
    e = experiment(
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=0.1),
        # An epoch has 7 full batches and one of 6 samples: slices of 1 and 2 on 4 ranks.
        data={"train": AUGMENTED, "drop_last": False},
        trainer={"max_steps": 100, "precision": "64-true", "max_grad_norm": 0.5, "ema_decay": 0.9},
    )
    assert_equal_curves(e, 100, 1e-9)


# -- the gradient is that of the global mean -------------------------------------------------------------------------


def gradients(world: World, cases: list[Experiment], batches: int) -> list[list[dict[str, Tensor]]]:
    """Return the gradients of the first steps of each case. The learning rate is 0."""
    found = []
    for e in cases:
        trainer, steps = Trainer(e, world=world), []
        for batch in trainer.train_loader.batches(0, batches):
            trainer.train_step(batch)
            steps.append(
                {name: p.grad.clone() for name, p in trainer.raw_model.named_parameters() if p.grad is not None}
            )
        found.append(steps)
    return found


TOKENS: dict[str, Any] = {
    "model": node("torch.nn.Embedding", num_embeddings=7, embedding_dim=7),
    "loss": node("raytrainer.losses.TokenCrossEntropy"),
    "optimizer": node("torch.optim.SGD", lr=0.0),
}


def direct(e: Experiment, batch: list[int]) -> dict[str, Tensor]:
    """Return the gradient of the mean over all counted tokens of these rows, by autograd alone."""
    trainer = Trainer(e)
    model, dataset = trainer.raw_model, build(e.data.train or {})
    ids, labels = dataset.tensors["input_ids"][batch], dataset.tensors["labels"][batch]
    logits = model(ids)[labels != -100]
    torch.nn.functional.cross_entropy(logits, labels[labels != -100]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_token_weighted_gradient_is_that_of_one_process(size: int) -> None:
    # Rows 0 and 1 have no counted token: with one sample each, a rank or a micro-batch has weight 0.
    cases = [
        experiment(
            **TOKENS,
            data={
                "train": node(training.tokens, rows=8, empty=(0, 1)),
                "val": None,
                "shuffle": False,
                "drop_last": False,
                "global_batch_size": global_batch_size,
                "micro_batch_size": micro_batch_size,
            },
            trainer={"precision": "64-true", "max_steps": 2},
        )
        # 5 samples on 4 ranks are 1, 1, 1 and 2. Then 3 of the 8 rows are left, and one rank has none.
        for global_batch_size, micro_batch_size in [(5, None), (5, 1), (5, 2), (6, None), (6, 1)]
    ]
    found = gradients(World(), cases, 2) if size == 1 else ranks.run(size, gradients, cases, 2)[-1]
    for e, steps in zip(cases, found, strict=True):
        b = e.data.global_batch_size
        for got, rows in zip(steps, [list(range(b)), list(range(b, 8))], strict=True):
            expected = direct(e, rows)
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert value.abs().max() > 1e-3
                torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14)


def test_a_weight_of_whole_numbers_loses_no_digits() -> None:
    def case(micro_batch_size: int | None) -> Experiment:
        return experiment(
            loss=node(training.counted_loss, _partial_=True),
            optimizer=node("torch.optim.SGD", lr=0.0),
            data={"global_batch_size": 7, "micro_batch_size": micro_batch_size, "val": None},
            trainer={"precision": "64-true"},
        )

    [whole], [parts] = gradients(World(), [case(None)], 1)[0], gradients(World(), [case(2)], 1)[0]
    for got in [parts, *(answer[0][0] for answer in ranks.run(3, gradients, [case(2)], 1))]:
        for name, value in whole.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-15)


def test_micro_batches_and_an_empty_rank_give_the_gradient_of_whole_batches() -> None:
    def case(micro_batch_size: int | None) -> Experiment:
        # Batches have 4 samples, and the last one 2: on 4 ranks, two ranks have none of it.
        return experiment(
            optimizer=node("torch.optim.SGD", lr=0.0),
            data={
                "train": node(images, rows=6),
                "val": None,
                "global_batch_size": 4,
                "micro_batch_size": micro_batch_size,
                "drop_last": False,
            },
            trainer={"precision": "64-true"},
        )

    cases = [case(None), case(1), case(3)]
    whole = gradients(World(), cases[:1], 2)[0]
    for found in [gradients(World(), cases, 2), *ranks.run(4, gradients, cases, 2)]:
        for steps in found:
            for got, expected in zip(steps, whole, strict=True):
                for name, value in expected.items():
                    torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-15)


# -- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(world: World, e: Experiment) -> dict[str, float]:
    return Trainer(e, world=world).evaluate()


def test_evaluation_counts_each_sample_once() -> None:
    # Batches have 12 and 5 samples; on 4 ranks, the 5 are 1, 1, 1 and 2.
    e = experiment(trainer={"precision": "64-true"}, data={"micro_batch_size": 2})
    model, dataset = Trainer(e).raw_model, build(e.data.val or {})
    with torch.no_grad():
        logits = model(dataset.tensors["image"].double())
    label = dataset.tensors["label"]
    expected = {
        "val/loss": float(torch.nn.functional.cross_entropy(logits, label)),
        "val/accuracy": float((logits.argmax(1) == label).double().mean()),
    }
    for got in [evaluated(World(), e), *ranks.run(2, evaluated, e), *ranks.run(4, evaluated, e)]:
        assert got == pytest.approx(expected, rel=1e-14)


def test_evaluation_weighs_tokens() -> None:
    e = experiment(**TOKENS, trainer={"precision": "64-true"})
    e.data.val = node(training.tokens, rows=13, empty=(12,))  # alone in the last batch, so its rank has weight 0
    model, dataset = Trainer(e).raw_model, build(e.data.val)
    labels = dataset.tensors["labels"]
    kept = labels != -100
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(dataset.tensors["input_ids"])[kept], labels[kept])
    for got in [evaluated(World(), e), *ranks.run(3, evaluated, e)]:
        assert got["val/loss"] == pytest.approx(float(loss), rel=1e-14)


# -- resume ----------------------------------------------------------------------------------------------------------


def hard(**trainer: Any) -> Experiment:
    """Return an experiment in which everything that can advance does so. An epoch has 4 batches, and the last one 14
    samples, 3 or 4 on each of 4 ranks."""
    return experiment(
        model=node(training.Net),
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=3),
        callbacks={"counter": node(training.Counter, every=3)},
        data={
            "train": node(images, rows=62, transform=node("raytrainer.data.RandomCropFlip", padding=1, flip=True)),
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "drop_last": False,
        },
        trainer={
            "max_steps": 14,
            "log_every_n_steps": 5,
            "max_grad_norm": 1.0,
            "ema_decay": 0.9,
            "early_stopping": EarlyStopping(monitor="val/accuracy", mode="max", patience=50),
            **trainer,
        },
        checkpoint={"every_n_steps": 1},
    )


def killed_and_resumed(world: World, e: Experiment, folder: Path, kills: list[int]) -> list[str]:
    """Return what differs between a run and its resumes from the checkpoints after the steps `kills`."""
    whole, told = fitted(e, world, checkpointer=checkpointer(world, folder / "whole"))
    end = {"shared": snapshot.shared(whole), "local": snapshot.local(whole)}
    series = {name: told.series(name) for name in ("train/loss", "val/loss", "mine/steps")}
    assert min(map(len, series.values())) > 1
    found = []
    for kill in kills:
        torch.manual_seed(kill)  # what this process has drawn before must not matter
        again = Trainer(e, world=world, checkpointer=whole.checkpointer, listeners=[told := training.Recorder()])
        assert whole.checkpointer is not None
        again.restore(next(info for info in whole.checkpointer.list() if info.step == kill))
        again.checkpointer = checkpointer(world, folder / f"resumed-{kill}")
        assert again.fit().step == whole.step
        found += differences(
            end, {"shared": snapshot.shared(again), "local": snapshot.local(again)}, f"killed at {kill}: "
        )
        for name, values in series.items():
            expected = {step: value for step, value in values.items() if step > kill}
            assert expected
            found += differences(expected, told.series(name), f"killed at {kill}: {name}")
    return found


# After the first step, at the end of an epoch (4 steps), at the end of a log window (5 steps), and within both.
KILLS = [1, 4, 5, 7, 11]


def test_resume_is_exact_in_one_process(tmp_path: Path) -> None:
    assert killed_and_resumed(World(), hard(), tmp_path, KILLS) == []


@pytest.mark.parametrize("size", [2, 3, 4])
def test_resume_is_exact_on_ranks(tmp_path: Path, size: int) -> None:
    for found in ranks.run(size, killed_and_resumed, hard(), tmp_path, KILLS[::2] if size < 4 else [7]):
        assert found == []


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
def test_resume_is_exact_in_other_precisions(tmp_path: Path, precision: str) -> None:
    assert killed_and_resumed(World(), hard(precision=precision), tmp_path, [7]) == []


def test_resume_of_a_transformer_with_dropout_is_exact(tmp_path: Path) -> None:
    e = hard()
    e.model, e.loss = {**LANGUAGE["model"], "dropout": 0.2}, LANGUAGE["loss"]
    e.data.train, e.data.val = sources(1000), sources(300)
    assert killed_and_resumed(World(), e, tmp_path / "1", [7]) == []
    for found in ranks.run(2, killed_and_resumed, e, tmp_path / "2", [3, 7]):
        assert found == []


def test_resume_of_an_iterable_is_exact(tmp_path: Path) -> None:
    e = hard()
    e.data.train, e.data.val = node(training.Counting, rows=50), node(training.Counting, rows=20)
    assert killed_and_resumed(World(), e, tmp_path / "1", [2, 7]) == []
    for found in ranks.run(2, killed_and_resumed, e, tmp_path / "2", [7]):
        assert found == []


def test_a_stream_goes_on_where_it_was_without_reading_it_again(tmp_path: Path) -> None:
    e = experiment(data={"train": node(training.Counting, rows=1000), "val": None}, trainer={"max_steps": 20})
    saved = checkpointer(World(), tmp_path)
    whole, _ = fitted(e, checkpointer=saved)
    e.trainer.max_steps = 22
    again = Trainer(e, checkpointer=saved)
    again.restore(saved.list()[-1])
    again.fit()
    assert whole.train_loader.dataset.read >= 240
    assert again.train_loader.dataset.read < 100


def test_what_is_observed_changes_nothing() -> None:
    # Evaluation, logging and saving draw none of training's random numbers.
    e = hard(eval_every_n_steps=0)
    e.callbacks, e.loss = {}, node(training.drawing_loss, _partial_=True)
    e.checkpoint.monitor, e.trainer.early_stopping = "val/loss", None
    expected = weights(fitted(e)[0])
    for log, evaluate in ((1, 1), (3, 4), (100, None)):
        e.trainer.log_every_n_steps, e.trainer.eval_every_n_steps = log, evaluate
        assert differences(weights(fitted(e)[0]), expected) == []
    e.seed += 1
    assert differences(weights(fitted(e)[0]), expected) != []


# -- another number of workers ---------------------------------------------------------------------------------------


def plain(world: World, folder: Path) -> Experiment:
    return experiment(
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=3),
        trainer={"max_steps": 12, "precision": "64-true", "ema_decay": 0.9},
        checkpoint={"every_n_steps": 5},
    )


def first_part(world: World, folder: Path) -> dict[int, float]:
    return fitted(plain(world, folder), world, checkpointer=checkpointer(world, folder))[1].series("train/loss")


def second_part(world: World, folder: Path) -> dict[int, float]:
    recorder = training.Recorder()
    saved = checkpointer(world, folder)
    trainer = Trainer(plain(world, folder), world=world, checkpointer=saved, listeners=[recorder])
    trainer.restore(next(info for info in saved.list() if info.step == 5))
    trainer.checkpointer = None
    trainer.fit()
    return recorder.series("train/loss")


def test_a_checkpoint_of_2_workers_goes_on_with_1_and_4(tmp_path: Path) -> None:
    expected = {step: loss for step, loss in ranks.run(2, first_part, tmp_path)[0].items() if step > 5}
    assert len(expected) == 7
    for got in [second_part(World(), tmp_path), *ranks.run(4, second_part, tmp_path)]:
        assert got == pytest.approx(expected, rel=1e-12)


def buffers_of_2(world: World, folder: Path) -> dict[str, Tensor]:
    trainer, _ = fitted(hard(), world, checkpointer=checkpointer(world, folder))
    return {name: b.clone() for name, b in trainer.raw_model.named_buffers()}


def test_batch_statistics_become_the_mean_over_ranks(tmp_path: Path) -> None:
    first, second = ranks.run(2, buffers_of_2, tmp_path)
    assert not torch.equal(first["norm.running_mean"], second["norm.running_mean"])
    saved = checkpointer(World(), tmp_path)
    alone = Trainer(hard(), checkpointer=saved)
    alone.restore(saved.list()[-1])
    got = dict(alone.raw_model.named_buffers())
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(got[name], (first[name] + second[name]) / 2)
    assert got["mask"].tolist() == [True, False]
    assert alone.evaluate()["val/loss"] == pytest.approx(alone.metrics["val/loss"], rel=1e-5)
