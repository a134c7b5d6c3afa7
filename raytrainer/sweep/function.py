"""The trial process of a sweep over any Hydra application. It calls the application's function once per trial.
A report is a call of `report`; the last one is the value that the function returns."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle

from raytrainer import worker
from raytrainer.config import Parameter
from raytrainer.core.environment import put_back
from raytrainer.errors import WorkerError
from raytrainer.progress import to_line
from raytrainer.sweep.journal import Mode
from raytrainer.sweep.reporting import as_number, described, listening
from raytrainer.sweep.stepped import SteppedProcess, ThreadState, TrialStopped

PRINTED = "printed"  # kind of the message after the last line that a trial prints


@dataclass(frozen=True)
class FunctionSetup:
    """The common settings of all trials, which each process receives once.

    Attributes:
        job: A pickled function of a trial's number, from 0, and its overrides. It is loaded after `path` is set.
        name: The name of the application's function.
        parameters: The search space.
        fixed: Overrides that every trial has.
        mode: The mode of the objective.
        path: `sys.path` of the launching process.
        folder: The current directory of the launching process.
        retries: Whether a failed trial may be tried again.
    """

    job: bytes
    name: str
    parameters: Sequence[Parameter]
    fixed: Sequence[str]
    mode: Mode
    path: Sequence[str]
    folder: str
    retries: bool


class FunctionProcess(SteppedProcess):
    """A process that calls the function of an application."""

    not_ended = ": its function must not catch BaseException, and not take long in `finally`"

    def setup(self, config: dict[str, Any], shared: FunctionSetup) -> None:
        self._shared = shared
        self.mode, self.retries = shared.mode, shared.retries
        self._job: Callable[[int, Sequence[str]], Any] | None = None
        self._take(config)

    def _take(self, config: Mapping[str, Any]) -> None:
        super()._take(config)
        self._overrides = [*self._shared.fixed, *(p.override(config[p.key]) for p in self._shared.parameters)]
        self._step = 0

    def _train(self) -> dict[str, Any]:
        with _as_found(self._shared.folder), listening(self._report):
            value = self._call()
        step = max(self._step, 1)
        # Schedulers must not compare the returned value with reported values, so `training_iteration` does not count it.
        last = self._reported(value, evaluation=self._evaluation + 1, step=step, metrics={}, interim=False)
        return self._finished(last)

    def _call(self) -> float:
        if self._job is None:
            # With this path, the application's imports resolve as in the launching process.
            sys.path[:] = [*self._shared.path, *(entry for entry in sys.path if entry not in self._shared.path)]
            self._job = cloudpickle.loads(self._shared.job)
        returned = self._job(int(self._trial) - 1, self._overrides)
        value = as_number(returned)
        if value is not None:
            return value
        aim = "minimized" if self._shared.mode == "min" else "maximized"
        advice = "; several objectives cannot be searched for" if isinstance(returned, tuple | list | dict) else ""
        raise TypeError(
            f"{self._shared.name}() returned {described(returned)}, and hydra/sweeper=ray_tune needs a number: "
            f"return the value that is to be {aim}{advice}"
        )

    def _report(self, value: float, step: int | None) -> None:
        if threading.current_thread() is not self._thread:
            raise RuntimeError("report is called in the thread in which the function was called, as it may leave it")
        if self._state is ThreadState.ENDING:  # the function has caught the previous TrialStopped
            raise TrialStopped
        self._evaluation += 1
        self._step = self._evaluation if step is None else int(step)
        self._send_and_wait(self._reported(value, step=self._step, metrics={}, interim=True))

    def _put_last(self, message: dict[str, Any] | WorkerError) -> None:
        # Output and results reach the driver on different paths. This line marks the end of the output.
        print(to_line({"kind": PRINTED, "label": self._trial}), flush=True)
        super()._put_last(message)

    def _described(self, error: BaseException) -> tuple[WorkerError, str | None]:
        # `sys.exit()` ends the function, not the process.
        failure = error if isinstance(error, Exception) else RuntimeError(f"{self._shared.name}() raised {error!r}")
        return worker.described(failure, 0), "".join(traceback.format_exception(error))


@contextlib.contextmanager
def _as_found(folder: str) -> Iterator[None]:
    """Enter the directory in which the application was started. Afterwards, restore directory and environment."""
    environment = dict(os.environ)
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        put_back(environment)
        if Path(folder).is_dir():
            os.chdir(folder)
