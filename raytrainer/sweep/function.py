"""The trial process of a sweep over any Hydra application. It calls the application's function once per trial.

Tune asks for one result at a time. The function runs in a separate thread, which waits in each `report` until Tune has
decided.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

from raytrainer import worker
from raytrainer.config import Parameter
from raytrainer.core.environment import put_back
from raytrainer.errors import WorkerError
from raytrainer.progress import to_line
from raytrainer.sweep.journal import Mode, worst
from raytrainer.sweep.reporting import as_number, described, listening
from raytrainer.sweep.space import TRIAL

PRINTED = "printed"  # kind of the message after the last line that a trial prints
ENDS_S = 30.0  # time for a stopped function to clean up


@dataclass(frozen=True)
class Shared:
    """What all trials have in common. It is sent to each process once.

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


class _Ended(BaseException):
    """Raised in the function by `report` after Tune has stopped the trial."""


class FunctionProcess(tune.Trainable):  # type: ignore[misc]
    """A trial process. `ray.tune.with_parameters(FunctionProcess, shared=…)` makes the class that Tune starts.

    A result has `objective` (the value that schedulers compare, never NaN), `training_iteration` (the number of calls
    of `report`) and `report` or `end`, which are JSON for the driver.
    """

    _thread: threading.Thread | None
    _messages: queue.Queue[dict[str, Any] | WorkerError]
    _blocked: bool  # whether the function waits in `report`

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        self._shared = shared
        self._job: Callable[[int, Sequence[str]], Any] | None = None
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
            self._thread.start()
        elif self._blocked:
            self._blocked = False
            self._go.release()
        message = self._messages.get()
        if isinstance(message, WorkerError):
            raise message  # Tune starts the trial again, in another process
        return message

    def cleanup(self) -> None:
        self._end()

    def drain(self) -> None:
        """Wait until a stopped trial has run its `finally` blocks. The process is killed afterwards."""
        self._end()

    # --- one trial ------------------------------------------------------------------------------------------------

    def _take(self, config: Mapping[str, Any]) -> None:
        self._trial = str(config[TRIAL])
        self._overrides = [*self._shared.fixed, *(p.override(config[p.key]) for p in self._shared.parameters)]
        worker.hello(0, self._trial)
        self._thread = None
        self._messages = queue.Queue()
        self._go = threading.Semaphore(0)
        self._blocked = self._ending = False
        self._evaluation = self._step = 0

    def _run(self) -> None:
        """Run in the function's thread. The last message says how the trial ended."""
        try:
            with _as_found(self._shared.folder), listening(self._report):
                value = self._call()
            self._put_last(self._returned(value))
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001  an error of a trial is its result; the process continues
            if self._ending:
                return
            # `sys.exit()` ends the function, not the process.
            failure = error if isinstance(error, Exception) else RuntimeError(f"{self._shared.name}() raised {error!r}")
            failed = worker.described(failure, 0)
            end = {"status": "failed", "cause": failed.cause, "traceback": "".join(traceback.format_exception(error))}
            again = self._shared.retries and failed.retry
            self._put_last(failed if again else self._last(end, math.nan))
            traceback.clear_frames(error.__traceback__)  # they keep the function's objects alive

    def _call(self) -> float:
        if self._job is None:
            # The application's imports must resolve as in the launching process.
            sys.path[:] = [*self._shared.path, *(entry for entry in sys.path if entry not in self._shared.path)]
            self._job = cloudpickle.loads(self._shared.job)
        returned = self._job(int(self._trial) - 1, self._overrides)
        value = as_number(returned)
        if value is not None:
            return value
        aim = "minimized" if self._shared.mode == "min" else "maximized"
        several = "; several objectives cannot be searched for" if isinstance(returned, tuple | list | dict) else ""
        raise TypeError(
            f"{self._shared.name}() returned {described(returned)}, and hydra/sweeper=ray_tune needs a number: "
            f"return the value that is to be {aim}{several}"
        )

    def _report(self, value: float, step: int | None) -> None:
        if threading.current_thread() is not self._thread:
            raise RuntimeError("report is called in the thread in which the function was called, as it may leave it")
        if self._ending:  # the function has caught the previous _Ended
            raise _Ended
        self._evaluation += 1
        self._step = self._evaluation if step is None else int(step)
        self._blocked = True
        self._messages.put({**self._result(value, self._evaluation, interim=True), "done": False})
        self._go.acquire()
        if self._ending:
            raise _Ended

    def _put_last(self, message: dict[str, Any] | WorkerError) -> None:
        # Output and results reach the driver on different paths. This line marks the end of the output.
        print(to_line({"kind": PRINTED, "label": self._trial}), flush=True)
        self._messages.put(message)

    def _returned(self, value: float) -> dict[str, Any]:
        evaluation = self._evaluation + 1
        self._step = max(self._step, 1)
        return {**self._last({"status": "finished"}, value), **self._result(value, evaluation, interim=False)}

    def _last(self, end: Mapping[str, Any], value: float) -> dict[str, Any]:
        # The returned value is not a call of `report`, so schedulers must not compare it with reported values.
        return {**self._told(value), "end": json.dumps(end), "done": True}

    def _result(self, value: float, evaluation: int, *, interim: bool) -> dict[str, Any]:
        report = {"evaluation": evaluation, "step": self._step, "value": value, "metrics": {}, "interim": interim}
        return {**self._told(value), "report": json.dumps(report)}  # text, because Tune keeps statistics of numbers

    def _told(self, value: float) -> dict[str, Any]:
        objective = value if math.isfinite(value) else worst(self._shared.mode)
        return {"objective": objective, "training_iteration": max(self._evaluation, 1)}

    def _end(self) -> None:
        """Stop the function's thread and wait until it has ended.

        Raises:
            WorkerError: The thread did not end within 30 s.
        """
        if self._thread is None:
            return
        self._ending = True
        self._go.release()
        self._thread.join(ENDS_S)
        if self._thread.is_alive():
            # This error ends the process, and the thread with it.
            raise WorkerError(
                f"trial {self._trial} was stopped, and did not end in {ENDS_S:g} s: its function must not catch "
                "BaseException, and not take long in `finally`"
            )


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
