"""`preflight.first_batch`: whether the first batch of a run is tried before the start, and what the result means.

The probe (probe.py) runs in a separate process with a time limit. Only an error that the run itself would surely
raise is a refusal. A probe that takes too long, runs out of memory, crashes, or needs a GPU proves nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrainer.config import Experiment, leaves_of, texts_of
from raytrainer.core.isolated import Isolated, ProcessEnded
from raytrainer.errors import PreflightError
from raytrainer.preflight.reach import is_elsewhere
from raytrainer.preflight.resources import this_machine, through_ray

_TFLOP, _TFLOP_BESIDE_RAY = 0.5, 0.05  # about a minute, and a few seconds, of a slow core
_NICENESS_BESIDE_RAY = 10
_RAY_CORES = 2.0  # cores that are busy while Ray starts: this process, and Ray's own processes
# For other trackers and hubs: the probe records nothing there, and downloads nothing.
_ENVIRONMENT: dict[str, str | None] = {
    "MLFLOW_RUN_ID": None,
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
}


@dataclass(frozen=True)
class Verdict:
    """The result of the first-batch probe.

    Attributes:
        kind: `passed`, `refused`, `unknown` (the probe could not tell) or `skipped` (there was no probe).
        text: A sentence for the user; may be empty.
    """

    kind: str
    text: str

    def words(self) -> str:
        """Return one line for the terminal."""
        if self.kind == "passed":
            return f"first batch: {self.text}"
        what = "was not tried" if self.kind == "skipped" else "could not be judged here"
        return f"first batch {what}: {self.text}" if self.text else ""

    def refuse(self) -> None:
        """Raise the refusal, if it is one.

        Raises:
            PreflightError: The run would fail at its first step.
        """
        if self.kind == "refused":
            raise PreflightError([self.text])


class FirstBatch:
    """The first-batch probe of a run.

    Args:
        text: `Composition.text`.
        e: Its experiment.
        gpu: Whether the run will use GPUs.
        beside_ray: Whether Ray starts at the same time. The probe then uses one core at low priority, and tries only
            small models.
    """

    def __init__(self, text: str, e: Experiment, *, gpu: bool, beside_ray: bool = False) -> None:
        self._limit_s = e.preflight.first_batch_timeout_s
        tflop = _TFLOP_BESIDE_RAY if beside_ray else _TFLOP
        self._process = Isolated(
            "raytrainer.preflight.probe:try_step",
            {"text": text, "gpu": gpu, "elsewhere": is_elsewhere(e), "most_tflop": tflop},
            path=_path_of_workers(e),
            environment=_ENVIRONMENT,
            niceness=_NICENESS_BESIDE_RAY if beside_ray else 0,
            threads=1 if beside_ray else max(1, min(4, int(this_machine().cpus))),
            memory=_half_of_free_memory(),
        )
        self._process.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{self._process.folder}/mlflow.db"

    def start(self) -> None:
        self._process.start()

    def wait(self, timeout_s: float) -> Verdict | None:
        """Return the verdict; None if there is none yet after `timeout_s`."""
        ended = self._process.wait(timeout_s)
        return None if ended is None else verdict_of(ended)

    def run(self) -> Verdict:
        """Return the verdict, `unknown` after `preflight.first_batch_timeout_s`. No process is left running."""
        return verdict_of(self._process.run(self._limit_s))

    def close(self) -> None:
        """End the probe in any state."""
        self._process.close()


def verdict_of(ended: ProcessEnded) -> Verdict:
    """Return what the end of the process means. Only the probe's own answer can be a refusal."""
    if ended.problem is None and isinstance(ended.value, dict):
        return Verdict(str(ended.value["verdict"]), str(ended.value["text"]))
    hint = "; preflight.first_batch_timeout_s gives it more time" if ended.timed_out else ""
    return Verdict("unknown", f"{ended.problem}{hint}")


def why_not_tried(e: Experiment) -> str | None:
    """Return why the probe is not started: "" if the user does not want it, None if it can be started."""
    if e.preflight.first_batch is False:
        return ""
    if keys := through_ray(e):
        return f"{keys[0]} is a RayDataset, which a Ray cluster reads"
    for key, value in (pair for name, node in e.data.sets.items() for pair in leaves_of(node, name)):
        if isinstance(value, str) and "://" in value and not value.startswith("file://"):
            return f"{key} is not on this machine"
        if key.rpartition(".")[2] == "download" and value is True:
            return f"{key}=true would download the data twice at once"
    if any(target.startswith("__main__.") for _, target in targets_of(e)):
        return "a _target_ is in the launching program itself, __main__, which no other process can import"
    return None


def is_free_beside_ray() -> bool:
    """Return whether a core is free while Ray starts, so that the probe does not slow down the launch."""
    try:
        busy = os.getloadavg()[0]
    except OSError:
        return False
    return this_machine().cpus - busy >= _RAY_CORES + 1


def targets_of(e: Experiment) -> Iterator[tuple[str, str]]:
    """Yield every text in the nodes that may name a Python object, with its dotted key."""
    sections: dict[str, Any] = {name: getattr(e, name) for name in ("model", "loss", "optimizer", "lr_scheduler")}
    sections |= {"callbacks": e.callbacks, "metrics": e.metrics, "data.collate_fn": e.data.collate_fn, **e.data.sets}
    for key, node in sections.items():
        yield from texts_of(node, key)


def _path_of_workers(e: Experiment) -> list[str]:
    """Return what Ray adds to its workers' `sys.path`; inline, this process's own path."""
    if not e.uses_ray:
        return [folder for folder in sys.path if folder]
    script = str(Path(os.path.realpath(sys.argv[0])).parent)
    return [script] if script in sys.path else []


def _half_of_free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available // 2)
