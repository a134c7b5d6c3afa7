"""Derive from a metric's name whether lower or higher values are better, and from that the mode `min` or `max`.

A mode that is not set is derived. A mode that contradicts its metric is refused. If the name of a metric says nothing,
the mode must be set.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from raytrainer.config.schema import Experiment
from raytrainer.errors import ConfigError, nearest

Mode = Literal["min", "max"]


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that decide the direction at the end of a name, whatever precedes them: `focal_loss`, `word_error_rate`.
_COSTS = _words_of(
    "loss losses error err errors cost distance divergence perplexity ppl penalty regret mae mse rmse msle rmsle mape "
    "smape wape wmape nll xent wer cer ter mer eer ece fid kid lpips brier crps fpr fnr fdr fallout latency"
)
_GAINS = _words_of(
    "accuracy acc auc auroc auprc aucpr rocauc prauc precision recall specificity sensitivity f1 fbeta map mar iou miou "
    "jaccard dice kappa mcc matthews ndcg mrr bleu sacrebleu chrf meteor rouge rougel cider r2 psnr ssim msssim snr sdr "
    "sisnr sisdr pesq stoi fmeasure likelihood elbo reward tpr tnr throughput mfu"
)
# Words that decide only if all other words of the name are in these lists too or are neutral.
_WEAK_COSTS = _words_of("ce bce kl kld bpb bpd bpc bits")
_WEAK_GAINS = _words_of(
    "ap roc similarity correlation corr corrcoef pearson spearman match em success hit hits win homogeneity completeness"
)
_NEUTRAL = _words_of(
    "val valid validation test eval train mean avg average overall total micro macro weighted balanced samples normalized "
    "norm raw ema smoothed best max min at k n per and of top class pixel token word char sentence image epoch score rate "
    "ratio value metric exact binary multiclass multilabel squared absolute log root signal cross entropy cosine "
    "small medium large"
)
# Words that turn a known quantity into another one: the scale of a loss, the spread of an accuracy.
_OTHERS = _words_of(
    "scale weight std stdev stddev var variance gap drop diff delta change difference count num number threshold "
    "coefficient coef factor ratio norm gradient grad lr time step steps"
)
_PHRASES: tuple[tuple[str, Mode], ...] = (
    ("false_positive", "min"),
    ("false_negative", "min"),
    ("true_positive", "max"),
    ("true_negative", "max"),
    ("cross_entropy", "min"),
    ("explained_variance", "max"),
    ("per_second", "max"),
    ("samples_per_sec", "max"),
    ("tokens_per_sec", "max"),
    ("bits_per", "min"),
    ("signal_to_noise", "max"),
    ("top_k", "max"),
)


def by_name(metric: str) -> Mode | None:
    """Return the better direction of a metric's values according to its name; None if the name does not say.

    Only the last part of the name counts: `NAME` in `val/SET/NAME`.
    """
    name = metric.rpartition("/")[2]
    whole = re.sub(r"[\d@:.%_\- ]+$", "", name).lower()
    words = [whole] if whole in _COSTS | _GAINS else _words(name)
    if not words:
        return None
    if words[0] in ("neg", "negative") and len(words) > 1:
        return _opposite(_of_words(words[1:]))
    return _of_words(words)


def _of_words(words: list[str]) -> Mode | None:
    text = "_".join(words)
    phrases = {mode for phrase, mode in _PHRASES if f"_{phrase}_" in f"_{text}_"}
    if len(phrases) == 1 and not (set(words) & {"std", "gap", "drop", "scale", "weight"}):
        return phrases.pop()
    # Drop what follows the word that names the quantity: `acc_top_5`, `recall_at_10`, `f1_macro`, `error_rate`.
    rest = list(words)
    while rest and rest[-1] in _NEUTRAL - _OTHERS and rest[-1] not in _COSTS | _GAINS:
        rest.pop()
    if not rest:
        return "max" if text in ("top", "val_top", "test_top") else None
    if set(words) & _OTHERS:
        return None
    if rest[-1] in _COSTS:
        return "min"
    if rest[-1] in _GAINS:
        return None if set(rest) & _COSTS else "max"
    costs, gains = set(rest) & (_COSTS | _WEAK_COSTS), set(rest) & (_GAINS | _WEAK_GAINS)
    if set(rest) - costs - gains - _NEUTRAL or bool(costs) == bool(gains):
        return None
    return "min" if costs else "max"


def _words(name: str) -> list[str]:
    """Split a name at capitals and punctuation, without numbers after words: `F1Score_macro@5` → f1 score macro at."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", name.replace("@", "_at_"))
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    known = _COSTS | _GAINS | _NEUTRAL | _OTHERS
    stripped = [word if word in known else word.rstrip("0123456789") for word in words]
    return [word for word in stripped if word]


def _opposite(mode: Mode | None) -> Mode | None:
    return None if mode is None else "max" if mode == "min" else "min"


@dataclass(frozen=True)
class _Watched:
    """A key that names a metric and the key of its mode, with the values of both."""

    metric_key: str
    metric: str
    mode_key: str
    mode: str | None
    section: Any  # the section with the attribute `mode`

    def follows(self, e: Experiment) -> Mode | None:
        """Return `checkpoint.mode` if this is another key with the same metric as `checkpoint.monitor`, else None."""
        same = self.section is not e.checkpoint and self.metric == e.checkpoint.monitor
        return e.checkpoint.mode if same else None  # type: ignore[return-value]


def _watched(e: Experiment) -> list[_Watched]:
    watched = [_Watched("checkpoint.monitor", e.checkpoint.monitor, "checkpoint.mode", e.checkpoint.mode, e.checkpoint)]
    if (early := e.trainer.early_stopping) is not None:
        key = "trainer.early_stopping"
        watched.append(
            _Watched(f"{key}.monitor", early.monitor or e.checkpoint.monitor, f"{key}.mode", early.mode, early)
        )
    metric = e.sweep.metric or e.checkpoint.monitor
    watched.append(_Watched("sweep.metric", metric, "sweep.mode", e.sweep.mode, e.sweep))
    return watched


def derive_modes(e: Experiment, *, objects: bool = False) -> None:
    """Fill in the modes that are not set, as far as they can be derived.

    A key with the same metric as `checkpoint.monitor` gets `checkpoint.mode`. Otherwise the direction of a metric of
    the section `metrics` comes from its object, which may import its library, and that of all others from their names.

    Args:
        e: The experiment, which is changed in place.
        objects: Whether objects may be inspected; if not, the modes of their metrics stay None.
    """
    for w in _watched(e):
        if w.mode is None:
            w.section.mode = w.follows(e) or direction_of(e, w.metric, objects=objects)


def direction_of(e: Experiment, metric: str, *, objects: bool) -> Mode | None:
    """Return the better direction of a metric: by `higher_is_better` of its object in `metrics`, else by its name."""
    node = _own(e, metric)
    if node is None:
        return by_name(metric)
    if not objects:
        return None
    return _by_object(f"metrics.{metric.rpartition('/')[2]}", node) or by_name(metric)


def check_modes(e: Experiment, *, objects: bool = False, sweep: bool = False) -> None:
    """Refuse modes that contradict their metrics, and metrics whose better direction is unknown.

    Args:
        e: The experiment, with its modes derived as far as possible.
        objects: As for `derive_modes`.
        sweep: Whether to check the section `sweep`, which may be set although there is no sweep.

    Raises:
        ConfigError: A mode is wrong or missing; the message names its key, its value and the fix.
    """
    if problem := mode_problem(e, objects=objects, sweep=sweep):
        raise problem


def mode_problem(e: Experiment, *, objects: bool = False, sweep: bool = False) -> ConfigError | None:
    """Return the error that `check_modes` would raise for the same arguments; None if there is none."""
    if e.evaluate is not None:
        return None
    for w in _watched(e):
        if w.section is e.sweep and not sweep:
            continue
        direction = w.follows(e) or direction_of(e, w.metric, objects=objects)
        if direction is None and w.mode is None and (objects or _own(e, w.metric) is None):
            return _unknown(w)
        if direction is not None and w.mode is not None and w.mode != direction:
            return _contradiction(e, w, direction)
    return None


def _unknown(w: _Watched) -> ConfigError:
    close = nearest(w.metric.rpartition("/")[2].lower(), _COSTS | _GAINS, 1)
    hint = f" (or was {w.metric_key}={w.metric.rpartition('/')[0]}/{close[0]} meant?)" if close else ""
    return ConfigError(
        f"is not set, and the name of {w.metric_key}={w.metric} does not say whether lower or higher values are better; "
        f"set {w.mode_key}=min or {w.mode_key}=max{hint}",
        key=w.mode_key,
    )


def _contradiction(e: Experiment, w: _Watched, direction: Mode) -> ConfigError:
    if w.follows(e) is not None:
        return ConfigError(
            f"contradicts checkpoint.mode={direction}, which is for the same metric {w.metric}; leave {w.mode_key} out",
            key=w.mode_key,
            value=w.mode,
        )
    better, worst = ("higher", "lowest") if direction == "max" else ("lower", "highest")
    return ConfigError(
        f"contradicts {w.metric_key}={w.metric}: {better} values of it are better, and the {worst} would be kept "
        f"as the best; leave {w.mode_key} out or set {w.mode_key}={direction}. If this is intended, give the metric another "
        "name, or a class in `metrics` whose `higher_is_better` says so",
        key=w.mode_key,
        value=w.mode,
    )


def _own(e: Experiment, metric: str) -> dict[str, Any] | None:
    """Return the node in the section `metrics` that computes a metric `val/NAME` or `val/SET/NAME`, else None."""
    node = e.metrics.get(metric.rpartition("/")[2]) if metric.startswith("val/") else None
    return node if isinstance(node, dict) and node.get("_target_") else None


def _by_object(key: str, node: dict[str, Any]) -> Mode | None:
    """Return the direction by `higher_is_better` of the node's class, or for torchmetrics also of the built object."""
    from raytrainer.config.nodes import build, locate

    try:
        target = locate(key, node["_target_"])
        value = getattr(target, "higher_is_better", None)
        if not isinstance(value, bool) and str(getattr(target, "__module__", "")).partition(".")[0] == "torchmetrics":
            value = getattr(build(node), "higher_is_better", None)
    except ConfigError:  # reported when the metric is built
        return None
    return None if not isinstance(value, bool) else "max" if value else "min"


def checkpoint_mode(e: Experiment) -> Mode:
    """Return `checkpoint.mode`, derived if it is not set.

    Raises:
        ConfigError: It is not set, and the metric does not determine it.
    """
    return _decided(e, "checkpoint.mode")


def early_stopping_mode(e: Experiment) -> Mode:
    """Return `trainer.early_stopping.mode` like `checkpoint_mode`; without early stopping, the checkpoints' mode."""
    return _decided(e, "checkpoint.mode" if e.trainer.early_stopping is None else "trainer.early_stopping.mode")


def sweep_mode(e: Experiment) -> Mode:
    """Return `sweep.mode` like `checkpoint_mode`."""
    return _decided(e, "sweep.mode")


def _decided(e: Experiment, key: str) -> Mode:
    derive_modes(e, objects=True)
    watched = next(w for w in _watched(e) if w.mode_key == key)
    if watched.mode is None:
        raise _unknown(watched)
    return watched.mode  # type: ignore[return-value]
