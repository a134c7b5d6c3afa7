"""The life of one attempt of a run or a sweep: its lock, its record, its MLflow run, the signals and its final status.

`Attempt` does what runs and sweeps have in common, and calls a `Work` for the rest: training, or the trials of a sweep.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TypeVar

from raytrainer import provenance, tracking
from raytrainer.attempt.log_files import Logs
from raytrainer.attempt.outcome import AttemptOutcome
from raytrainer.attempt.record import (
    CONFIG,
    Record,
    StopRequest,
    begin_tags,
    best_tags,
    end_tags,
    job_tags,
    tracking_uri,
)
from raytrainer.attempt.work import O, Result, Work
from raytrainer.config import Composition, Experiment
from raytrainer.core.background import in_background
from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import (
    ClusterLost,
    PreflightError,
    RaytrainerError,
    Stopped,
    StorageError,
    StorageGone,
    WorkerError,
)
from raytrainer.progress import Display
from raytrainer.storage import Lock, Storage
from raytrainer.tracking.database import lost_database
from raytrainer.tracking.spool import spool_of

CLOSE_STOPPED_S = 3.0  # timeout for the tracking server at the end of a stopped attempt, whose user waits for the end

T = TypeVar("T")


class Phase(Enum):
    """The phases of an attempt. `NEXT_PHASES` has the transitions."""

    LOCKED = "the directory is ours, and nothing has started"
    STARTING = "Ray starts, the first-batch probe may run, and the MLflow run is opened"
    OPENING = "Ray is up; the work waits for the MLflow run"
    RUNNING = "training, or the trials of a sweep, run"
    CLOSING = "the work has ended; everything is written and uploaded"
    CLOSED = "the record has the final status"
    REFUSED = "the first-batch probe refused the run, which is not recorded"


NEXT_PHASES: Mapping[Phase, frozenset[Phase]] = {
    Phase.LOCKED: frozenset({Phase.STARTING}),
    Phase.STARTING: frozenset({Phase.OPENING, Phase.CLOSING, Phase.REFUSED}),
    Phase.OPENING: frozenset({Phase.RUNNING, Phase.CLOSING, Phase.REFUSED}),
    Phase.RUNNING: frozenset({Phase.CLOSING}),
    Phase.CLOSING: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
    Phase.REFUSED: frozenset(),
}


class Attempt:
    """One attempt. `locked_attempt` makes it, and holds the lock and the signal handlers.

    Attributes:
        phase: Where the attempt is in its life.
        record: The record of the run or sweep, with what is known of this attempt.
        storage: The directory of the run or sweep.
        where: Where it runs, as text.
        needs_tracking: Whether the work begins only when the MLflow run is open.
        run_opened: The MLflow run as soon as it is open.
    """

    def __init__(
        self,
        e: Experiment,
        storage: Storage,
        lock: Lock,
        interrupts: Interrupts,
        display: Display,
        argv: Sequence[str],
        held: ExitStack,
    ) -> None:
        self.e, self.storage, self.lock, self.interrupts, self.display = e, storage, lock, interrupts, display
        self.argv, self.held = list(argv), held
        self.phase = Phase.LOCKED
        self.record = Record(e.name or "", storage.display)
        self.where = ""
        self.needs_tracking = True
        self.run_opened: tracking.Run | None = None
        self._refusal: PreflightError | None = None

    # --- before the start -----------------------------------------------------------------------------------------

    def prepare(self, record: Record, where: str, *, needs_tracking: bool = True) -> None:
        """Set what this attempt works on.

        Args:
            record: The record of this attempt, which may not be on disk yet.
            where: Where it runs, as text.
            needs_tracking: Whether the work begins only when the MLflow run is open.
        """
        self.record, self.where, self.needs_tracking = record, where, needs_tracking
        self.tracking_uri = tracking_uri(self.e, record.tracking_uri)

    def record_start(self, composition: Composition) -> None:
        """Write the config and the record. From now on, the run or sweep exists."""
        self.storage.write_bytes(CONFIG, composition.text.encode())
        self.record.write(self.storage)

    def open_logs(self) -> Logs:
        """Open the logs. If the directory is deleted from now on, no part of it is created again."""
        self.storage = self.storage.anchored()
        self.logs = self.held.enter_context(Logs(self.storage, self.display))
        self.logs.mark("checked")
        self.spool_dir = spool_of(self.storage)
        self.stop_asked = StopRequest(self.storage, self.record.job.get("submission_id"))
        return self.logs

    # --- while the work runs --------------------------------------------------------------------------------------

    def move(self, phase: Phase) -> None:
        """Enter the next phase.

        Raises:
            RuntimeError: The phase cannot follow the present one.
        """
        if phase not in NEXT_PHASES[self.phase]:
            raise RuntimeError(f"an attempt cannot go from {self.phase.name} to {phase.name}")
        self.phase = phase

    def run(self, work: Work[Result, O]) -> O:
        """Do the work, and close everything even after an error.

        Raises:
            PreflightError: The first-batch probe refused the run. The run is then not recorded.
        """
        self.move(Phase.STARTING)
        self.interrupts.deferred = True  # whatever starts here must be ended below
        # Importing MLflow and creating its first database take seconds, in which Ray's processes start.
        self._opening = in_background(lambda: self._open_run(work), "mlflow-open")
        result: Result | None = None
        error: BaseException | None = None
        try:
            self.interrupts.deferred = False
            self.interrupts.check()
            result = work.execute()
        except Interrupted:
            error = self.interrupts.stopped()
        except Exception as failed:  # noqa: BLE001  reported by the outcome, after the attempt is closed
            error = failed
        if self._refusal is not None:
            self.move(Phase.REFUSED)
            self.display.close()
            raise error or self._refusal
        self.move(Phase.CLOSING)
        self.interrupts.deferred = True
        self.display.close()
        if error is not None and not isinstance(error, Stopped | WorkerError):
            self.logs.text_of("driver", "".join(traceback.format_exception(error)))
        outcome = self._close(work, result, error)
        outcome = self._write_status(work, outcome)
        self.move(Phase.CLOSED)
        return outcome

    def ray_is_up(self) -> None:
        """Record that Ray is running. The attempt no longer waits for the first-batch probe."""
        self.logs.mark("ray_up")
        self.move(Phase.OPENING)

    def begin_work(self) -> None:
        """Wait for the MLflow run if the work needs it.

        Raises:
            RaytrainerError: The MLflow run could not be opened.
        """
        if self.needs_tracking:
            self._opening.result()
            self.logs.mark("mlflow_up")
        self.move(Phase.RUNNING)

    @property
    def is_opening(self) -> bool:
        """Whether the MLflow run is still being opened."""
        return not self._opening.done()

    def check_alive(self) -> None:
        """Check that the directory is still ours and that Ray is alive. Call it often while the work runs.

        Raises:
            StorageLocked: Another process took over the directory while this one had no contact.
            ClusterLost: A process of Ray has died.
        """
        from raytrainer import ray_internals

        self.lock.check()
        if part := ray_internals.dead_part():
            raise ClusterLost(f"Ray's {part} died")

    def stop_requested(self) -> bool:
        """Return whether the command `stop` asked for the end. It then counts as a signal."""
        if self.stop_asked():
            self.interrupts.ask("stopped by request")
            return True
        return False

    def killed(self, outcome: O) -> O:
        """Return the outcome of an attempt that was asked to stop."""
        code = self.interrupts.exit_code or 130
        return replace(outcome, status="KILLED", exit_code=code, cause=self.interrupts.reason)

    def _open_run(self, work: Work[Result, O]) -> tracking.Run:
        try:
            work.admit()
        except PreflightError as refusal:
            self._refusal = refusal
            raise
        origin = provenance.collect(self.argv, Path.cwd())
        self.storage.write_bytes(provenance.FILE, origin.to_json())
        record, tracked = self.record, work.tracked_run()
        tags = {
            **origin.tags(),
            "raytrainer.name": record.name,
            "raytrainer.run_dir": record.run_dir,
            "raytrainer.where": self.where,
            **job_tags(record),
            **begin_tags(record),
            **tracked.tags,
        }
        if record.attempts > 1:
            tags[f"raytrainer.resume.{record.attempts - 1}"] = tracked.resumed_with
        run = tracking.open_run(
            self.tracking_uri,
            record.experiment_name,
            record.name,
            params=tracked.params,
            tags=tags,
            required=self.e.tracking.required,
            run_id=record.run_id,
            started=record.launched,
            spool_dir=self.spool_dir,
        )
        self.record = replace(self.record, run_id=run.run_id)
        self.record.write(self.storage)
        self.run_opened = run
        suffix = "" if record.attempts == 1 else f"-{record.attempts}"
        run.log_text(tracked.text, f"config{suffix}.yaml")
        if origin.patch:
            run.log_text(origin.patch, f"git{suffix}.patch")
        return run

    # --- the end --------------------------------------------------------------------------------------------------

    def _close(self, work: Work[Result, O], result: Result | None, error: BaseException | None) -> O:
        """Write and upload how the attempt ended. A first signal cuts this short, and a second one ends it at once."""
        try:
            error = work.end_open_work(error)
        except Interrupted:  # a second signal, because the first is deferred
            return self._forced(work.outcome(result, error))
        except (RaytrainerError, OSError) as failed:
            self.display.say(f"warning: could not write everything: {type(failed).__name__}: {failed}")
            error = error or failed
        outcome = work.outcome(result, error)
        try:
            self.interrupts.deferred = outcome.status == "KILLED"
            return self._upload(work, outcome)
        except Interrupted:
            self.interrupts.deferred = True
            if outcome.status == "KILLED":
                return self._forced(outcome)
            # The first signal came after the work had ended: do not wait for a slow server any longer.
            outcome = self.killed(outcome)
            try:
                return self._upload(work, outcome)
            except Interrupted:
                return self._forced(outcome)
        finally:
            self.interrupts.deferred = True

    def _upload(self, work: Work[Result, O], outcome: O) -> O:
        """Write the result files, and upload the outcome to MLflow. Return the outcome with MLflow's address."""
        # Metrics that are not uploaded in this time stay in the spool.
        timeout_s = CLOSE_STOPPED_S if outcome.status == "KILLED" else work.closing_s
        outcome = work.write_files(outcome)
        run = self._run_at_the_end(work.opening_timeout(outcome))
        uploaded = work.upload(run, outcome, timeout_s)
        if run is None:
            return outcome
        self.record = record = self._ended(work, replace(self.record, run_id=run.run_id), outcome)
        tags = {**end_tags(record), **best_tags(record)}
        finished = False
        with self.warning("could not send the final status to MLflow"):
            finished = run.finish(outcome.status, _cause(outcome), tags=tags, ended=record.ended, timeout_s=timeout_s)
        if not (uploaded and finished):
            if self.spool_dir.is_dir() or record.kind == "sweep":
                self.display.say(
                    f"Could not upload everything to MLflow. Unsent metrics are in {self._unsent}; resume uploads them."
                )
        elif database := lost_database(run.tracking_uri):
            self.display.say(
                f"warning: MLflow's database {database} was deleted during the run; resume {record.name} "
                "continues in a new MLflow run"
            )
        if run.offline and (run_id := tracking.recorded_run_id(self.spool_dir)):
            self.record = replace(record, run_id=run_id)
        # With the path of this Python, because the environment's programs may not be on the user's PATH.
        command = run.ui_command and f"{provenance.interpreter()} -m {run.ui_command}"
        return replace(outcome, mlflow=run.url, mlflow_command=command)

    def _run_at_the_end(self, timeout_s: float) -> tracking.Run | None:
        """Return the MLflow run; None if it could not be opened in time."""
        try:
            return self._opening.result(timeout=timeout_s)
        except TimeoutError:
            self.display.say(f"warning: MLflow does not answer; resume uploads the {self.record.kind}'s outcome")
        except Exception as failed:  # noqa: BLE001  the attempt has ended, and its record must be closed
            if not self.needs_tracking:  # otherwise the outcome shows it
                self.display.say(
                    f"warning: the {self.record.kind} has no run in MLflow: {type(failed).__name__}: {failed}"
                )
        return None

    def upload_logs(self, run: tracking.Run) -> None:
        self.logs.mark("ray_down")
        self.logs.write_marks()
        if self.logs.folder.is_dir():  # otherwise the run directory is gone
            run.log_artifact(self.logs.folder)

    @contextlib.contextmanager
    def warning(self, problem: str = "could not upload everything to MLflow") -> Iterator[None]:
        """Show an error of the enclosed step as a warning. It does not change how the attempt ended."""
        try:
            yield
        except (RaytrainerError, OSError) as failed:
            self.display.say(f"warning: {problem}: {type(failed).__name__}: {failed}")

    def _write_status(self, work: Work[Result, O], outcome: O) -> O:
        if not self.record.ended:  # MLflow did not get the end, so `_upload` has not closed the record
            self.record = self._ended(work, self.record, outcome)
        # After `_upload`, a signal or a lost server may have changed the outcome.
        self.record = replace(self.record, status=outcome.status, cause=_cause(outcome) or "")
        work.close(outcome)
        try:
            self.record.write(self.storage)
        except StorageGone as error:  # the deletion also ended the run, which says so
            outcome = replace(outcome, gone=True)
            if self.record.kind == "sweep":
                self._warn_unrecorded(error)
        except StorageError as error:
            self._warn_unrecorded(error)
        return replace(outcome, record=self.record)

    def _warn_unrecorded(self, error: StorageError) -> None:
        record = "the sweep's record" if self.record.kind == "sweep" else "the run record"
        self.display.say(f"warning: could not write the final status to {record}: {error}")

    def _ended(self, work: Work[Result, O], record: Record, outcome: O) -> Record:
        """Return the record with the end of this attempt, which is now."""
        return replace(record.closed(outcome.status, time.time(), _cause(outcome)), **work.figures(outcome))

    def _forced(self, outcome: O) -> O:
        self.display.say(f"Forced exit. Unsent metrics are in {self._unsent}; resume uploads them.")
        return outcome

    @property
    def _unsent(self) -> str:
        return self.storage.uri if self.record.kind == "sweep" else str(self.spool_dir)


def _cause(outcome: AttemptOutcome) -> str | None:
    return outcome.cause if outcome.status != "FINISHED" else None
