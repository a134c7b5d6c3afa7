"""The callbacks of raytrainer. Any object with a hook of events.py is a callback."""

from __future__ import annotations

import tempfile
from typing import Any

from raytrainer.errors import ConfigError


class SavePretrained:
    """Write the best weights (else the last) at the end of training, in the format of the Hugging Face libraries.

    The result is a model folder, which `from_pretrained` and `init_from` accept, or only the adapter of a PEFT model.

    Args:
        path: A directory on the machine of rank 0; None for the artifact `pretrained` of the run.

    Raises:
        ConfigError: The model has no `save_pretrained`; raised when training starts.
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
        # These files can only hold tensors. Other extra state is in the checkpoint.
        weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if self.path is not None:
            trainer.raw_model.save_pretrained(self.path, state_dict=weights)
            return
        with tempfile.TemporaryDirectory() as folder:
            trainer.raw_model.save_pretrained(folder, state_dict=weights)
            trainer.log_artifact(folder, "pretrained")
