"""Evaluation on one rank and on several: several validation sets, the objects of `metrics`, and a checkpoint."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrainer.checkpoint import Checkpointer, CheckpointInfo
from raytrainer.config import compose
from raytrainer.config.checks import check_together
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound, ConfigError
from raytrainer.parallel import World
from raytrainer.preflight import check_objects
from raytrainer.trainer import Trainer
from raytrainer.trainer.evaluation import of_checkpoint
from tests import ranks, training
from tests.training import checkpointer, experiment, fitted, images, node

ACCURACY = "torchmetrics.classification.MulticlassAccuracy"
F1 = "torchmetrics.classification.MulticlassF1Score"
AUROC = "torchmetrics.classification.MulticlassAUROC"
SETS = {"near": node(images, rows=17, seed=1), "far": node(images, rows=31, seed=2)}


class Seen:
    """A metric that belongs to no library and ignores ranks. It counts the samples since the last reset."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        assert preds.shape[0] == target.shape[0]
        assert not preds.requires_grad
        self.count += len(target)

    def compute(self) -> int:
        return self.count

    def reset(self) -> None:
        self.count = 0


class SeenByAll(Seen):
    """The same number, summed over ranks."""

    def compute(self) -> int:
        total = torch.tensor(self.count)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return int(total)


class Odd(Seen):
    """A metric whose value is not a number."""

    def compute(self) -> Any:
        return torch.zeros(4, 4)


class Gives(Seen):
    """A metric that returns the value given in its `_target_` node. Lists become tensors."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def compute(self) -> Any:
        whole: dict[str, Any] = self.value if isinstance(self.value, dict) else {"": self.value}
        made = {key: v if isinstance(v, dict) else torch.tensor(v) for key, v in whole.items()}
        return made if whole is self.value else made[""]


class OfItsRank(Seen):
    """A metric that returns a vector of a different length on each rank."""

    def compute(self) -> Any:
        return torch.ones(2 + torch.distributed.get_rank())


class Detector(nn.Module):
    """A model like torchvision's detectors, which return losses in training and only predictions in eval()."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor, label: Tensor) -> Any:
        logits = self.head(image.flatten(1))
        return {"loss_classifier": F.cross_entropy(logits, label)} if self.training else [{"labels": x} for x in logits]


def detector_loss(model: Any, batch: Any) -> dict[str, Any]:
    """Return a loss only in training, and predictions and targets in evaluation."""
    result = model(batch["image"], batch["label"])
    if isinstance(result, dict):
        return {"loss": result["loss_classifier"]}
    return {"preds": result, "target": [{"labels": x} for x in batch["label"]]}


class Boxes(Seen):
    """A metric that counts lists of dicts, which detection metrics take."""

    def update(self, preds: Any, target: Any) -> None:
        assert {"labels"} == set(preds[0]) == set(target[0])
        self.count += len(preds)


def colliding(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return entries with the names of raytrainer's own metrics."""
    loss = F.cross_entropy(model(batch["image"]), batch["label"])
    one = torch.ones(())
    own = {"lr": 77 * one, "loss_lr": 78 * one, "samples_per_second": 79 * one}
    return {"loss": loss, **own, "seen": -one, "preds": batch["label"], "target": batch["label"]}


class Loud:
    """A callback that logs under the names of other metrics."""

    def on_step_end(self, trainer: Any, event: Any) -> None:
        names = ("train/lr", "epoch", "val/loss", "system/cpu", "mine")
        trainer.log({name: torch.tensor(5.0) for name in names})


def silent(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return a loss and a further entry, and no predictions."""
    loss = F.cross_entropy(model(batch["image"]), batch["label"])
    return {"loss": loss, "double": 2 * loss.detach()}


def many(**metrics: Any) -> dict[str, Any]:
    return {
        "f1": node(F1, num_classes=4),
        "auroc": node(AUROC, num_classes=4),  # keeps every prediction
        "each": node("torchmetrics.ClasswiseWrapper", metric=node(ACCURACY, num_classes=4, average=None)),
        "both": node(
            "torchmetrics.MetricCollection",
            metrics={"top1": node(ACCURACY, num_classes=4), "top2": node(ACCURACY, num_classes=4, top_k=2)},
        ),
        "seen": node(SeenByAll),
        **metrics,
    }


def evaluate(world: World, sets: Any, metrics: dict[str, Any]) -> dict[str, float]:
    e = experiment(data={"val": sets, "micro_batch_size": 2}, metrics=metrics, trainer={"precision": "64-true"})
    return Trainer(e, world=world).evaluate()


def refused(world: World, sets: Any, metrics: dict[str, Any]) -> str:
    try:
        evaluate(world, sets, metrics)
    except ConfigError as error:
        return str(error)
    return "not refused"


def test_uneven_slices_on_ranks_give_what_one_process_gives() -> None:
    alone = evaluate(World(), SETS, many())
    assert (alone["val/near/seen"], alone["val/far/seen"]) == (17, 31)
    assert {k.rpartition("/")[2] for k in alone} == {
        *("loss", "accuracy", "f1", "auroc", "seen", "both_top1", "both_top2"),
        *(f"each_multiclassaccuracy_{i}" for i in range(4)),
    }
    for found in ranks.run(2, evaluate, SETS, many()):
        assert list(found) == list(alone)
        assert found == pytest.approx(alone, abs=1e-12)


def test_a_set_alone_has_no_name_and_the_sets_do_not_mix() -> None:
    whole = evaluate(World(), SETS, many())
    for name, one in SETS.items():
        alone = evaluate(World(), one, many())
        assert {k.replace("val/", f"val/{name}/"): v for k, v in alone.items()} == {
            k: v for k, v in whole.items() if k.startswith(f"val/{name}/")
        }


def test_a_metric_is_what_its_library_says_of_all_samples() -> None:
    from torchmetrics.classification import MulticlassF1Score

    e = experiment(metrics={"f1": node(F1, num_classes=4)})
    trainer = Trainer(e)
    samples = images(rows=17, seed=1).tensors
    expected = MulticlassF1Score(num_classes=4)(trainer.raw_model(samples["image"]), samples["label"])
    assert trainer.evaluate()["val/f1"] == pytest.approx(float(expected))


def test_training_goes_on_as_if_there_were_none(tmp_path: Path) -> None:
    plain, _ = fitted(experiment(trainer={"eval_every_n_steps": 1}))
    e = experiment(trainer={"eval_every_n_steps": 1, "ema_decay": 0.5}, metrics=many(), data={"val": SETS})
    e.checkpoint.monitor, e.checkpoint.mode = "val/far/f1", "max"
    trainer, recorder = fitted(e, checkpointer=checkpointer(World(), tmp_path, mode="max"))
    assert training.differences(training.weights(plain), training.weights(trainer)) == []
    series = recorder.series("val/far/f1")
    assert trainer.best.value == max(series.values())
    assert [k for k in recorder.events("on_log")[-1].metrics if k.startswith("train/p")] == []


def test_a_loss_without_predictions_is_told() -> None:
    e = experiment(loss={**node(silent), "_partial_": True}, metrics={"f1": node(F1, num_classes=4)})
    with pytest.raises(ConfigError, match=r"^metrics .*`preds` and `target` .* loss, double$"):
        Trainer(e).evaluate()
    e.metrics = {}
    assert Trainer(e).evaluate()["val/double"] > 0


def test_what_cannot_be_a_metric_is_told_on_every_rank() -> None:
    val = node(images, rows=17)
    assert "metrics.odd gives a tensor [4, 4], not a number" in refused(World(), val, {"odd": node(Odd)})
    for said in ranks.run(2, refused, val, {"odd": node(OfItsRank)}):
        assert "metrics give each rank values of other names" in said
    for said in ranks.run(2, refused, val, {"seen": node(Seen)}):
        assert said.startswith("metrics.seen gives each rank ")
    for one in (node(images, rows=1), node(training.Counting, rows=1)):  # the latter's length is known only at its end
        for said in ranks.run(2, refused, one, {"seen": node(SeenByAll)}):
            assert said.startswith("data.val has 1 sample for 2 workers")


MAP = {
    "map": 0.4,
    "map_50": 0.6,
    "map_small": -1.0,
    "map_per_class": [0.5, 0.3],
    "mar_100_per_class": [0.7, 0.1],
    "classes": [2, 7],
    "precision": [[0.1, 0.2]],
    "ious": {"a": "no number"},
}


def test_what_is_no_scalar_is_logged_one_by_one_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def given(value: Any) -> dict[str, float]:
        found = evaluate(World(), node(images, rows=17), {"x": node(Gives, value=value)})
        return {key.removeprefix("val/"): v for key, v in found.items() if key.startswith("val/x")}

    assert given(MAP) == pytest.approx(
        {
            "x_map": 0.4,
            "x_map_50": 0.6,
            "x_map_small": -1,
            "x_map_per_class_2": 0.5,
            "x_map_per_class_7": 0.3,
            "x_mar_100_per_class_2": 0.7,
            "x_mar_100_per_class_7": 0.1,
        }
    )
    assert "metrics.x: these results are not numbers and are not logged: ['precision', 'ious']" in caplog.text
    off = {"map": 0.4, "map_per_class": -1.0, "mar_100_per_class": -1.0, "classes": 3}
    assert given(off) == pytest.approx({"x_map": 0.4})
    assert given({"map": 0.4, "map_per_class": 0.4, "classes": 3}) == pytest.approx(
        {"x_map": 0.4, "x_map_per_class_3": 0.4}
    )
    assert given([1.0, 2.0]) == {"x_0": 1.0, "x_1": 2.0}
    assert given({"top@1": 1.0, "top_1": 2.0}) == {"x_top_1": 1.0, "x_top_1_2": 2.0}
    with pytest.raises(ConfigError, match="x gives no number, but precision"):
        given({"precision": [[0.1, 0.2]]})


def test_a_detector_is_evaluated_without_a_loss(tmp_path: Path) -> None:
    e = experiment(
        model=node(Detector),
        loss={**node(detector_loss), "_partial_": True},
        metrics={"boxes": node(Boxes)},
        trainer={"eval_every_n_steps": 2},
        checkpoint={"monitor": "val/boxes", "mode": "max"},
    )
    trainer, recorder = fitted(e, checkpointer=checkpointer(World(), tmp_path, mode="max"))
    assert recorder.series("val/boxes") == {2: 17, 4: 17}
    assert "val/loss" not in trainer.metrics
    assert trainer.metrics["train/loss"] > 0
    e.metrics = {}
    with pytest.raises(ConfigError, match=r"^loss returned neither `loss` "):
        Trainer(e).evaluate()


def test_two_figures_of_one_name_are_both_logged(caplog: pytest.LogCaptureFixture) -> None:
    e = experiment(
        loss={**node(colliding), "_partial_": True},
        metrics={"seen": node(Seen)},
        callbacks={"loud": node(Loud)},
        trainer={"eval_every_n_steps": 2},
    )
    _, recorder = fitted(e)
    lr = recorder.series("train/lr")
    assert lr == dict.fromkeys(range(1, 5), pytest.approx(0.1))
    assert recorder.series("train/loss_lr_2") == dict.fromkeys(lr, 77)
    assert recorder.series("train/loss_lr") == dict.fromkeys(lr, 78)
    assert recorder.series("train/loss_samples_per_second") == dict.fromkeys(lr, 79)
    assert recorder.series("val/seen") == {2: 17, 4: 17}
    assert recorder.series("val/loss_seen") == {2: -1, 4: -1}
    assert recorder.series("val/lr") == {2: 77, 4: 77}
    for name in ("train/lr", "epoch", "system/cpu"):
        assert set(recorder.series(f"callback/{name}").values()) == {5}
    assert recorder.series("callback/val/loss") == {3: 5, 4: 5}  # before step 3, no evaluation had used the name
    assert set(recorder.series("mine").values()) == {5}
    said = "The metric name 'train/lr' is in use for another figure"
    assert caplog.text.count(said) == 2  # once for the loss and once for the callback
    assert "is logged as 'train/loss_lr_2'" in caplog.text


def test_what_a_callback_logs_is_a_number() -> None:
    trainer = Trainer(experiment())
    for value in (torch.ones(2), "high", None):
        with pytest.raises(ConfigError, match=r"Trainer.log: 'mine' is not a number"):
            trainer.log({"mine": value})  # type: ignore[dict-item]


def test_not_a_number_is_one_on_all_ranks() -> None:
    for found in ranks.run(2, evaluate, node(images, rows=17, bad=3), {"mse": node("tests.test_evaluation.Nan")}):
        assert math.isnan(found["val/mse"])


class Nan(Seen):
    def compute(self) -> Any:
        return math.nan


# -- the configuration -----------------------------------------------------------------------------------------------


def refusal(**changes: Any) -> str:
    e = experiment(data={"val": SETS}, checkpoint={"monitor": "val/far/loss"})
    for key, value in changes.items():
        target, _, name = key.rpartition("__")
        setattr(getattr(e, target) if target else e, name, value)
    try:
        check_together(e)
        check_objects(e)
    except ConfigError as error:
        return str(error)
    return "not refused"


def test_what_is_watched_must_be_of_a_set() -> None:
    message = refusal(checkpoint__monitor="val/loss")
    assert message.startswith("checkpoint.monitor=val/loss names no validation set")
    assert message.endswith("; valid: val/far/loss, val/near/loss")
    assert refusal(sweep__metric="val/near_f1").startswith("sweep.metric=val/near_f1 names no ")
    early = training.EarlyStopping(monitor="val/f1")
    assert refusal(trainer__early_stopping=early).startswith("trainer.early_stopping.monitor=val/f1 names no ")
    assert "must be a metric of the evaluation" in refusal(checkpoint__monitor="train/loss")
    e = experiment(data={"val": {**SETS, "near": None, "split": None}}, checkpoint={"monitor": "val/far/loss"})
    check_together(e)
    assert list(e.data.val_sets) == ["far"]


def test_names_and_nodes_are_checked() -> None:
    assert refusal(data__val={"a/b": SETS["far"]}).startswith("data.val.a/b becomes part of ")
    assert refusal(metrics={"loss": node(F1)}).startswith("metrics.loss becomes part of ")
    assert refusal(metrics={"f1": {}}).startswith("metrics.f1 has no _target_; null ")
    assert "metrics.f1=3 must be a _target_ node" in refusal(metrics={"f1": 3})
    assert refusal(data__val={"far": node(images, rose=1)}).startswith("data.val.far.rose=1 ")
    near = refusal(metrics={"f1": node("torchmetrics.classification.MulticlassF1Scor", num_classes=4)})
    assert "metrics.f1._target_" in near
    assert "MulticlassF1Score" in near
    assert "Unexpected keyword arguments: `classes`" in refusal(metrics={"a": node(F1, num_classes=4, classes=4)})
    assert refusal(metrics={"a": node(Calibrated)}).startswith("metrics.a=Calibrated has no compute()")


class Calibrated:
    def update(self, preds: Tensor, target: Tensor) -> None: ...


def test_from_the_command_line() -> None:
    added = [f"+data.val.far.{k}={v}" for k, v in {"_target_": "raytrainer.data.Digits", "split": "val"}.items()]
    e = compose(
        [
            *("experiment=mlp", "data.val._target_=null", "data.val.split=null", *added),
            *(f"+metrics.f1._target_={F1}", "+metrics.f1.num_classes=10", "checkpoint.monitor=val/far/f1"),
        ]
    ).experiment
    assert e.data.val_sets == {"far": {"_target_": "raytrainer.data.Digits", "split": "val"}}
    assert e.metrics == {"f1": {"_target_": F1, "num_classes": 10}}


# -- evaluation of a checkpoint ----------------------------------------------------------------------------------------


def trained(world: World, folder: Path) -> list[float]:
    """Return the validation losses of a run with batch norm that kept all its checkpoints."""
    e = experiment(model=node(training.Net), trainer={"max_steps": 4, "eval_every_n_steps": 2})
    saved = checkpointer(world, folder)
    _, recorder = fitted(e, world, checkpointer=saved)
    saved.close()
    return list(recorder.series("val/loss").values())


def evaluated(world: World, folder: Path, wanted: str, strategy: str = "ddp") -> tuple[int, float]:
    e = experiment(model=node(training.Net), trainer={"strategy": strategy})
    saved = checkpointer(world, folder)
    group = torch.distributed.new_group(backend="gloo") if world.distributed else None
    result = of_checkpoint(Trainer(e, world=world, checkpointer=saved), saved, wanted, group)
    return result["step"], result["metrics"]["val/loss"]


def test_a_checkpoint_evaluates_as_it_did_in_training(tmp_path: Path) -> None:
    for size, folder in ((1, tmp_path / "1"), (2, tmp_path / "2")):
        second, fourth = trained(World(), folder) if size == 1 else ranks.run(size, trained, folder)[0]
        best = (2, second) if second < fourth else (4, fourth)
        for wanted, expected in (("best", best), ("last", (4, fourth)), ("2", (2, second))):
            for found in [evaluated(World(), folder, wanted)] if size == 1 else ranks.run(2, evaluated, folder, wanted):
                assert found == expected
    # Two ranks wrote the checkpoint. One rank reads it, and its buffers are the mean over both. Then two ranks read it,
    # each with a shard.
    assert evaluated(World(), tmp_path / "2", "last") == pytest.approx((4, fourth), rel=1e-5)
    for found in ranks.run(2, evaluated, tmp_path / "2", "last", "fsdp"):
        assert found == pytest.approx((4, fourth), rel=1e-5)


def test_one_that_is_deleted_meanwhile_gives_way_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(World(), tmp_path)
    load = Checkpointer.load

    def gone_first(self: Checkpointer, info: CheckpointInfo, *more: Any) -> Any:
        if info.step == 4:
            shutil.rmtree(info.path)
        return load(self, info, *more)

    monkeypatch.setattr(Checkpointer, "load", gone_first)
    assert evaluated(World(), tmp_path, "last")[0] == 2
    with pytest.raises(CheckpointNotFound, match=r"^no checkpoint 4; there are 2$"):
        evaluated(World(), tmp_path, "4")
    monkeypatch.undo()
    (tmp_path / "step-000000002" / "shared-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointCorrupt, match="has 0 bytes instead of"):
        evaluated(World(), tmp_path, "best")
