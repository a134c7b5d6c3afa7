"""`cluster=inline`: train in this process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raytrainer.errors import ConfigError
from raytrainer.plugins import Backend

if TYPE_CHECKING:
    from raytrainer.config import Experiment


class Inline(Backend):
    name = "inline"
    ray = "none"

    def validate(self, experiment: Experiment) -> Sequence[ConfigError]:
        workers = experiment.scaling.num_workers
        problem = "must be 1 with cluster=inline (this process); use cluster=local"
        problems = [ConfigError(problem, key="scaling.num_workers", value=workers)] if workers != 1 else []
        return [*problems, *super().validate(experiment)]
