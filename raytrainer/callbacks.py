"""Callbacks that come with raytrainer; any object with a hook of events.py is one."""

from __future__ import annotations

import tempfile
from typing import Any

from raytrainer.errors import ConfigError


class SavePretrained:
    """At the end of training writes the best weights (else the last) as Hugging Face's libraries keep them: a model's
    folder, which `from_pretrained` and `init_from` take, or of a PEFT model the adapter alone.

    Args:
        path: A directory on the machine of rank 0; None: the artifact `pretrained` of the run.

    Raises:
        ConfigError: When training begins: the model has no `save_pretrained`.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        if not callable(getattr(trainer.raw_model, "save_pretrained", None)):
            kind = type(trainer.raw_model).__name__
            raise ConfigError("has no save_pretrained, which callbacks.…SavePretrained needs", key="model", value=kind)

    def on_fit_end(self, trainer: Any, event: Any) -> None:
        if trainer.world.rank:
            return
        from torch import Tensor

        _, state = trainer.best_weights()
        # Their files have tensors alone: extra state of another kind is in the checkpoint.
        weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if self.path is not None:
            trainer.raw_model.save_pretrained(self.path, state_dict=weights)
            return
        with tempfile.TemporaryDirectory() as folder:
            trainer.raw_model.save_pretrained(folder, state_dict=weights)
            trainer.log_artifact(folder, "pretrained")
