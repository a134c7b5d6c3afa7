"""Tests of which direction of a metric is better, by its name or its object, and which `mode` is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrainer.config import (
    Experiment,
    check_modes,
    checkpoint_mode,
    compose,
    early_stopping_mode,
    from_text,
    mode_problem,
    sweep_mode,
    with_modes,
    with_values,
)
from raytrainer.config.direction import by_name, derive_modes
from raytrainer.config.schema import EarlyStopping
from raytrainer.errors import ConfigError

LOWER = """
val/loss val/error val/top5_error val/top1_err val/perplexity val/ppl val/mae val/MAE val/MSE val/rmse val/wer val/cer
val/fid val/word_error_rate val/mean_squared_error val/MeanSquaredError val/nll val/cross_entropy val/kl_divergence
val/dice_loss val/iou_loss val/set/loss val/accuracy/loss val/neg_accuracy val/bits_per_byte val/ece val/hamming_distance
val/expected_calibration_error train/loss val/l1_loss val/loss_epoch val/false_positive_rate val/CharErrorRate val/bce
val/negative_log_likelihood val/lpips val/val_loss val/total_loss val/error_rate val/rmse_macro val/brier_score val/loss1
"""
HIGHER = """
val/accuracy val/acc val/top1 val/top5 val/top_5 val/top5_accuracy val/acc@1 val/acc1 val/acc_top5 val/accuracy_top_5
val/auc val/AUROC val/roc_auc val/ROC-AUC val/f1 val/f1_macro val/macro_f1 val/F1Score val/precision val/recall
val/recall@5 val/recall_at_10 val/map val/mAP val/mAP50 val/map50-95 val/map_small val/iou val/mIoU val/mean_iou val/bleu
val/BLEU4 val/rouge1 val/rougeL val/r2 val/R2 val/psnr val/PSNR val/ssim val/set/accuracy val/loss/accuracy
val/neg_mean_squared_error val/exact_match val/average_precision val/mrr val/ndcg@10 val/hit_rate val/hits@10 val/spearman
val/cosine_similarity val/explained_variance val/dice_score val/jaccard val/matthews_corrcoef val/log_likelihood
val/mean_reward train/samples_per_second train/tokens_per_second val/MulticlassAccuracy val/true_positive_rate
val/balanced_accuracy val/digit_accuracy val/rouge1_fmeasure
"""
UNKNOWN = """
val/loss_scale val/score val/accuracy_gap val/std_accuracy val/accuracy_std val/loss_std val/lr val/x val/my_metric
val/loss_ratio_drift val/time val/entropy val/temperature val/threshold val/perfect val/losses_seen val/accurately
val/map_scale val/grad_norm val/rate val/best val/1 val/loss_accuracy val/num_errors val/
"""


@pytest.mark.parametrize(("names", "mode"), [(LOWER, "min"), (HIGHER, "max"), (UNKNOWN, None)])
def test_a_name_says_which_way_is_better(names: str, mode: str | None) -> None:
    assert {name: by_name(name) for name in names.split()} == dict.fromkeys(names.split(), mode)


def experiment(monitor: str = "val/loss", mode: str | None = None, **metrics: Any) -> Experiment:
    e = Experiment(metrics=metrics)
    e.checkpoint.monitor, e.checkpoint.mode = monitor, mode
    return e


def problem(e: Experiment, *, sweep: bool = False) -> str:
    derive_modes(e, objects=True)
    with pytest.raises(ConfigError) as caught:
        check_modes(e, objects=True, sweep=sweep)
    return str(caught.value)


def test_a_mode_that_is_left_out_is_derived() -> None:
    assert checkpoint_mode(experiment()) == "min"
    assert checkpoint_mode(experiment("val/accuracy")) == "max"
    assert checkpoint_mode(experiment("val/night/accuracy")) == "max"
    assert checkpoint_mode(experiment("val/score", "max")) == "max"


def test_a_contradiction_is_refused_with_the_fix() -> None:
    message = problem(experiment("val/loss", "max"))
    assert message.startswith("checkpoint.mode=max ")
    assert "checkpoint.monitor=val/loss" in message
    assert "set checkpoint.mode=min" in message
    assert "checkpoint.mode=min contradicts" in problem(experiment("val/accuracy", "min"))


def test_an_unknown_direction_needs_a_mode() -> None:
    message = problem(experiment("val/score"))
    assert message.startswith("checkpoint.mode is not set")
    assert "checkpoint.monitor=val/score" in message
    assert "checkpoint.mode=min or checkpoint.mode=max" in message
    with pytest.raises(ConfigError, match=r"checkpoint\.mode=min or"):
        checkpoint_mode(experiment("val/score"))
    assert mode_problem(experiment("val/score", "min")) is None


def test_early_stopping_has_its_own_metrics_direction() -> None:
    e = experiment("val/loss")
    e.trainer.early_stopping = EarlyStopping(monitor="val/accuracy")
    assert early_stopping_mode(e) == "max"
    e.trainer.early_stopping = EarlyStopping()
    assert early_stopping_mode(e) == "min"
    e = experiment("val/score", "max")
    e.trainer.early_stopping = EarlyStopping(monitor="val/score")
    assert early_stopping_mode(e) == "max"
    e.trainer.early_stopping = EarlyStopping(monitor="val/other")
    assert "trainer.early_stopping.mode=min or" in problem(e)
    e.trainer.early_stopping = EarlyStopping(mode="min")
    message = problem(e)
    assert message.startswith("trainer.early_stopping.mode=min ")
    assert "checkpoint.mode=max" in message
    assert "val/score" in message
    e.trainer.early_stopping = EarlyStopping(monitor="val/loss", mode="max")
    message = problem(e)
    assert message.startswith("trainer.early_stopping.mode=max ")
    assert "trainer.early_stopping.monitor=val/loss" in message


def test_a_sweep_has_its_own_metrics_direction() -> None:
    e = experiment("val/loss")
    assert sweep_mode(e) == "min"
    e = experiment("val/loss")
    e.sweep.metric = "train/samples_per_second"
    assert sweep_mode(e) == "max"
    e = experiment("val/loss")
    e.sweep.metric, e.sweep.mode = "val/accuracy", "min"
    assert mode_problem(e) is None  # without a sweep
    message = problem(e, sweep=True)
    assert message.startswith("sweep.mode=min ")
    assert "sweep.metric=val/accuracy" in message
    e.sweep.metric, e.sweep.mode = "val/score", None
    assert "sweep.mode=min or sweep.mode=max" in problem(e, sweep=True)


class Cost:
    """A user's metric for which lower is better, whatever its name."""

    higher_is_better = False

    def update(self, preds: Any, target: Any) -> None: ...

    def compute(self) -> float:
        return 0.0

    def reset(self) -> None: ...


COST = {"_target_": f"{__name__}.Cost"}


def test_the_class_of_a_metric_wins_over_its_name() -> None:
    assert checkpoint_mode(experiment("val/accuracy", accuracy=COST)) == "min"
    assert checkpoint_mode(experiment("val/night/mine", mine=COST)) == "min"
    e = experiment("val/accuracy", "min", accuracy=COST)
    assert mode_problem(e, objects=True) is None
    assert "contradicts checkpoint.monitor=val/accuracy" in problem(experiment("val/accuracy", "max", accuracy=COST))


def test_torchmetrics_say_it_also_where_the_class_depends_on_the_task() -> None:
    pytest.importorskip("torchmetrics")
    f1 = {"_target_": "torchmetrics.F1Score", "task": "multiclass", "num_classes": 3}
    assert checkpoint_mode(experiment("val/mine", mine=f1)) == "max"
    assert checkpoint_mode(experiment("val/mine", mine={"_target_": "torchmetrics.MeanSquaredError"})) == "min"
    mean = {"_target_": "torchmetrics.MeanMetric"}
    assert "checkpoint.mode=min or" in problem(experiment("val/mine", mine=mean))
    assert checkpoint_mode(experiment("val/accuracy", accuracy=mean)) == "max"  # the name decides


# --- composed and saved configs ---------------------------------------------------------------------------------------


def mode_in(text: str) -> Any:
    return yaml.safe_load(text)["checkpoint"]["mode"]


def test_the_derived_mode_is_part_of_the_saved_config() -> None:
    assert mode_in(compose(["experiment=mlp"]).text) == "max"
    early = ["trainer.early_stopping={monitor:val/loss,patience:2}"]
    text = compose(["experiment=mlp", *early]).text
    assert yaml.safe_load(text)["trainer"]["early_stopping"]["mode"] == "min"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["checkpoint.monitor=val/loss", "checkpoint.mode=max"], "checkpoint.mode=max contradicts"),
        (["checkpoint.mode=min"], "checkpoint.mode=min contradicts checkpoint.monitor=val/accuracy"),
        (["checkpoint.monitor=val/score"], "checkpoint.mode is not set"),
        (["trainer.early_stopping={monitor:val/score}"], "trainer.early_stopping.mode is not set"),
    ],
)
def test_a_new_experiment_is_refused_while_it_is_composed(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=mlp", *overrides])
    assert str(caught.value).startswith(reason)


def test_a_mode_by_an_object_is_written_out_before_a_start() -> None:
    composition = compose(
        ["experiment=mlp", "checkpoint.monitor=val/mine", f"+metrics.mine._target_={COST['_target_']}"]
    )
    assert mode_in(composition.text) is None
    assert mode_in(with_modes(composition).text) == "min"


def test_what_was_recorded_with_the_wrong_mode_keeps_it() -> None:
    text = with_values(compose(["experiment=mlp"]).text, {"checkpoint.mode": "min"})
    e = from_text(text, ["trainer.max_epochs=20"]).experiment
    assert e.checkpoint.mode == "min"
    assert "checkpoint.mode=min contradicts" in str(mode_problem(e))
    early = {"trainer.early_stopping": {"monitor": "val/loss", "mode": None}}
    old = from_text(with_values(text, {"checkpoint.mode": "max", **early})).experiment
    assert early_stopping_mode(old) == "max"  # older versions used the checkpoints' mode


def test_a_derived_mode_follows_another_monitor_and_a_given_one_stays() -> None:
    text = compose(["experiment=mlp"]).text
    assert from_text(text, ["checkpoint.monitor=val/loss"]).experiment.checkpoint.mode == "min"
    text = compose(["experiment=mlp", "checkpoint.monitor=val/a", "checkpoint.mode=max"]).text
    assert from_text(text, ["checkpoint.monitor=val/b"]).experiment.checkpoint.mode == "max"


def test_the_shipped_experiments_keep_the_highest_accuracy(in_tmp: Path) -> None:
    for name in ("mlp", "resnet", "imagenet"):
        e = compose([f"experiment={name}"]).experiment
        assert (e.checkpoint.monitor, e.checkpoint.mode) == ("val/accuracy", "max")
