"""The reference losses. A loss is any callable `(model, batch) -> {"loss": ..., ...}`.
These take tensors from a dict by key or from a tuple by position, and never bring a value to the host.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from raytrainer.errors import ConfigError

Model = Callable[..., Any]  # returns a tensor, or an object that has it as `logits` (Hugging Face's ModelOutput)
Field = str | int

_LARGEST_EXPONENT = math.log(sys.float_info.max)  # above it, math.exp raises


class CrossEntropy:
    """Classification: the mean cross entropy over the samples, and the accuracy.

    For `metrics`, it returns the logits as `preds` and class indices as `target`.

    Args:
        input: Where the batch has the model's input: a key of a dict, or a position if the batch is a tuple (a key then
            means the first entry).
        target: The same for the target (a key means the second entry of a tuple): class indices `[N]` (or `[N, ...]`
            for logits `[N, C, ...]`), or probabilities in the logits' shape.
        label_smoothing: The part of the target spread over all classes (Szegedy et al. 2015, arXiv:1512.00567).
        keywords: Further entries of a dict, which are passed to the model as keyword arguments (`attention_mask`).

    Raises:
        ConfigError: `label_smoothing` is not in [0, 1], or, when called, the batch lacks an entry.
    """

    def __init__(
        self,
        input: Field = "image",  # noqa: A002
        target: Field = "label",
        label_smoothing: float = 0.0,
        keywords: Sequence[str] = (),
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ConfigError(
                "must be between 0 and 1",
                key="loss.label_smoothing",
                value=label_smoothing,
            )
        self.input, self.target, self.label_smoothing, self.keywords = input, target, label_smoothing, keywords

    def __call__(self, model: Model, batch: Any) -> dict[str, Tensor]:
        target = _take(batch, "target", self.target, position=1)
        logits = _output(model, batch, self.input, self.keywords)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        classes = target.argmax(1) if target.is_floating_point() else target
        preds = logits.detach()
        accuracy = (preds.argmax(1) == classes).to(loss.dtype).mean()
        return {"loss": loss, "accuracy": accuracy, "preds": preds, "target": classes}


class MeanSquaredError:
    """Regression: the mean squared difference over all values of all samples; for `metrics`, `preds` and `target`.

    Args:
        input: Where the batch has the model's input, as in `CrossEntropy`.
        target: The same for the target: `[N, ...]`, the shape of the prediction; a last dimension of 1 may be missing.

    Raises:
        ConfigError: When called, the batch lacks an entry, or the shapes differ (which would broadcast silently).
    """

    def __init__(self, input: Field = "input", target: Field = "target") -> None:  # noqa: A002
        self.input, self.target = input, target

    def __call__(self, model: Model, batch: Any) -> dict[str, Tensor]:
        target = _take(batch, "target", self.target, position=1)
        prediction = _output(model, batch, self.input)
        if prediction.shape == (*target.shape, 1):
            prediction = prediction.squeeze(-1)
        if prediction.shape != target.shape:
            raise ConfigError(
                f"is {list(target.shape)} in a batch, but the model gives {list(prediction.shape)}",
                key="loss.target",
                value=self.target,
            )
        target = target.to(prediction.dtype)
        return {"loss": F.mse_loss(prediction, target), "preds": prediction.detach(), "target": target}


class TokenCrossEntropy:
    """Language modelling: the mean cross entropy over the tokens that count, with their number as the weight.

    The mean over micro-batches and ranks is thus the mean over all tokens, however they are distributed. For `metrics`,
    it returns the logits as `preds` `[N*T, V]` and all targets as `target` `[N*T]`: a metric needs the same
    `ignore_index`.

    Args:
        input: Where the batch has the token ids `[N, T]`, as in `CrossEntropy`.
        target: The same for the targets `[N, T]`, aligned with the logits `[N, T, V]`: the batch must already have them
            shifted by one.
        ignore_index: Targets that do not count (padding, a prompt). If none counts, the loss is 0.
        keywords: As in `CrossEntropy`.
        bytes_per_token: The mean number of bytes of text per token: 1 if tokens are bytes; for a token file,
            `raytrainer.data.tokenize` prints it. None: `bits_per_byte` is not computed.

    Raises:
        ConfigError: `bytes_per_token` is not above 0; when called, the batch lacks an entry.
    """

    def __init__(
        self,
        input: Field = "input_ids",  # noqa: A002
        target: Field = "labels",
        ignore_index: int = -100,
        keywords: Sequence[str] = (),
        bytes_per_token: float | None = None,
    ) -> None:
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise ConfigError("must be above 0", key="loss.bytes_per_token", value=bytes_per_token)
        self.input, self.target, self.ignore_index, self.keywords = input, target, ignore_index, keywords
        self.bytes_per_token = bytes_per_token

    def __call__(self, model: Model, batch: Any) -> dict[str, Tensor]:
        target = _take(batch, "target", self.target, position=1).flatten()
        logits = _output(model, batch, self.input, self.keywords).flatten(0, -2)
        counted = target != self.ignore_index
        weight = counted.sum().to(logits.dtype)
        # Computed by hand, because torch's mean is NaN if nothing counts, and checking for that would wait for the
        # device.
        mean_over = weight.clamp(min=1)
        loss = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum") / mean_over
        preds = logits.detach()
        right = ((preds.argmax(-1) == target) & counted).sum()
        return {"loss": loss, "weight": weight, "accuracy": right / mean_over, "preds": preds, "target": target}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity for the mean loss, in nats, and the bits per byte, which compare between tokenizers."""
        loss = means["loss"]
        figures = {"perplexity": math.inf if loss > _LARGEST_EXPONENT else math.exp(loss)}
        if self.bytes_per_token is not None:
            figures["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return figures


def _output(model: Model, batch: Any, input: Field, keywords: Sequence[str] = ()) -> Tensor:  # noqa: A002
    """Return the model's output for its entry of the batch, in at least single precision."""
    if keywords and not isinstance(batch, Mapping):
        raise ConfigError("needs batches that are dicts", key="loss.keywords", value=list(keywords))
    further = {name: _take(batch, "keywords", name, position=0) for name in keywords}
    output = model(_take(batch, "input", input, position=0), **further)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"returned a {type(output).__name__}, and the loss needs a tensor, or an object or dict with the tensor `logits`. "
            "For another output write a loss of your own",
            key="model",
        )
    # Softmax in half precision would be too imprecise.
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _take(batch: Any, role: str, field: Field, *, position: int) -> Tensor:
    if isinstance(batch, Mapping):
        if field in batch:
            value: Tensor = batch[field]
            return value
        raise ConfigError("is not in a batch", key=f"loss.{role}", value=field, choices=[str(key) for key in batch])
    if isinstance(field, str) and isinstance(named := getattr(batch, field, None), Tensor):  # a dataclass or a graph
        return named
    index = field if isinstance(field, int) else position
    if not isinstance(batch, Sequence) or not -len(batch) <= index < len(batch):
        kind = f"{len(batch)} entries" if isinstance(batch, Sequence) else f"a {type(batch).__name__}"
        raise ConfigError(f"wants entry {index} of a batch, which is {kind}", key=f"loss.{role}", value=field)
    entry: Tensor = batch[index]
    return entry
