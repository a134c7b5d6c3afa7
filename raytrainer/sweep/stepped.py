"""The part of a trial process that both kinds of trials share: one trial after the other, one result at a time.

Tune asks for one result at a time. The trial runs in a separate thread, which waits at each report until Tune has
decided. So a stopped trial ends between two steps, and the process is free for the next trial.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import traceback
from abc import abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any

from ray import tune

from raytrainer import worker
from raytrainer.errors import WorkerError
from raytrainer.ray_internals import METRIC
from raytrainer.sweep.journal import Mode, worst
from raytrainer.sweep.trial_state import Status, TrialEnd, end_by_error
from raytrainer.sweep.tune_space import TRIAL

ENDS_S = 30.0  # time for a stopped trial to clean up, and for its workers to be killed


class ThreadState(Enum):
    """The state of a trial's thread. Tune's thread starts and ends it; the trial's thread waits by itself."""

    NEW = "the thread is not started"
    WORKING = "it computes the next result"
    WAITING = "it has sent a result, and waits for Tune's decision"
    ENDING = "Tune has stopped the trial; the thread must end"


class TrialStopped(BaseException):
    """The exception in the thread of a trial that Tune has stopped. No `except Exception` of user code catches it."""


class SteppedProcess(tune.Trainable):  # type: ignore[misc]
    """A trial process. `ray.tune.with_parameters(Class, shared=…)` makes the class that Tune starts.

    A result has `objective`, the value that schedulers compare, which is never NaN. Its `training_iteration` counts the
    evaluations since the trial's first step, over all restarts. `report` or `end` is JSON for the driver.
    """

    mode: Mode  # of the objective
    retries: bool  # whether a failed trial may be tried again
    not_ended = ""  # what the message about a thread that does not end adds

    _trial: str  # the id of the trial
    _thread: threading.Thread
    _state: ThreadState
    _messages: queue.Queue[dict[str, Any] | WorkerError]
    _go: threading.Semaphore  # released when Tune has decided
    _evaluation: int  # the last evaluation that was reported

    # --- Tune's thread --------------------------------------------------------------------------------------------

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._state is ThreadState.NEW:
            self._state = ThreadState.WORKING
            self._thread.start()
        elif self._state is ThreadState.WAITING:
            self._state = ThreadState.WORKING
            self._go.release()
        message = self._messages.get()
        if isinstance(message, WorkerError):
            raise message  # Tune starts the trial again, in another process
        return message

    def cleanup(self) -> None:
        self.drain()

    def drain(self) -> None:
        """End the trial, and wait for the work that it leaves. The process is killed afterwards."""
        self._end()

    def _take(self, config: Mapping[str, Any]) -> None:
        """Prepare the next trial."""
        self._trial = str(config[TRIAL])
        worker.hello(0, self._trial)
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._state = ThreadState.NEW
        self._messages = queue.Queue()
        self._go = threading.Semaphore(0)
        self._evaluation = 0

    def _end(self) -> None:
        """Stop the trial's thread, wherever it is, and wait until it has ended.

        Raises:
            WorkerError: The thread did not end within 30 s.
        """
        if self._state is ThreadState.NEW:
            return
        self._state = ThreadState.ENDING
        self._release()
        self._thread.join(ENDS_S)
        if self._thread.is_alive():
            # This error ends the process, and the thread with it.
            raise WorkerError(f"trial {self._trial} was stopped, and did not end in {ENDS_S:g} s{self.not_ended}")

    def _release(self) -> None:
        """Let the trial's thread notice that it must end."""
        self._go.release()

    # --- the trial's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Run the trial. The last message says how it ended."""
        try:
            self._put_last(self._train())
        except TrialStopped:
            pass
        except BaseException as error:  # noqa: BLE001  any error, even sys.exit, is the result; the process continues
            if self._state is ThreadState.ENDING:
                return
            self._put_last(self._failed(error))
            traceback.clear_frames(error.__traceback__)  # they keep the trial's objects alive
        finally:
            self._forget()

    @abstractmethod
    def _train(self) -> dict[str, Any]:
        """Run the trial to its end, and return its last result."""

    def _put_last(self, message: dict[str, Any] | WorkerError) -> None:
        self._messages.put(message)

    def _forget(self) -> None:
        """Drop objects of the trial that has ended."""

    def _failed(self, error: BaseException) -> dict[str, Any] | WorkerError:
        """Return the last message of a trial that raised."""
        failure, trace = self._described(error)
        end = end_by_error(failure, retries=self.retries, trace=trace)
        return failure if end is None else {**self._result(math.nan), "end": end.to_json(), "done": True}

    def _described(self, error: BaseException) -> tuple[WorkerError, str | None]:
        """Return the error with its cause in one line, and the traceback if the error does not have it."""
        return error if isinstance(error, WorkerError) else worker.described(error, 0), None

    def _result(self, value: float) -> dict[str, Any]:
        """Return a result without a report."""
        objective = value if math.isfinite(value) else worst(self.mode)
        return {METRIC: objective, "training_iteration": max(self._evaluation, 1), "done": False}

    def _reported(self, value: float, **report: Any) -> dict[str, Any]:
        """Return a result with a report. The report is text, because Tune keeps statistics of numbers."""
        report = {"evaluation": self._evaluation, "value": value, **report}
        return {**self._result(value), "report": json.dumps(report)}

    def _finished(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """Return the last result of a trial that ended by itself."""
        return {**last, "end": TrialEnd(Status.FINISHED).to_json(), "done": True}

    def _send_and_wait(self, result: dict[str, Any]) -> None:
        """Send a result, and wait until Tune has decided.

        Raises:
            TrialStopped: Tune has stopped the trial.
        """
        self._state = ThreadState.WAITING
        self._messages.put(result)
        self._go.acquire()
        if self._state is ThreadState.ENDING:
            raise TrialStopped
