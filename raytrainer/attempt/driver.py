"""The driver of one attempt of a run. It opens the MLflow run, trains on Ray or in this process, and sets the final
status."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer import preflight, provenance, tracking, worker
from raytrainer.attempt.logs import Logs
from raytrainer.attempt.record import CONFIG, Outcome, Record, StopAsked, begin_tags, end_tags, job_tags, tracking_uri
from raytrainer.attempt.session import ray_session
from raytrainer.attempt.waiting import Waiting, selected_nodes
from raytrainer.config import Composition, checkpoint_mode, flattened
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

if TYPE_CHECKING:
    from raytrainer.ray_internals import SupervisedTrainer, WorkerOutput

_GRACE_S, _ABANDON_S = 5.0, 3.0  # for workers to save a checkpoint after a first Ctrl-C or SIGTERM; then to be killed
_OUTPUT_S = 5.0  # for the last lines of the workers to arrive
_TRIAL_S = 4.0  # the longest wait for the first-batch probe; then the run is recorded without its verdict
_OPEN_S = 30.0  # importing mlflow and making a database, on a busy machine
_CLOSE_S, _CLOSE_STOPPED_S = 30.0, 3.0  # timeouts for the tracking server at the end


class Driver:
    """The driver of one attempt of a run. The caller holds the run's lock."""

    def __init__(
        self,
        composition: Composition,
        record: Record,
        storage: Storage,
        display: Display,
        logs: Logs,
        lock: Lock,
        interrupts: Interrupts,
        argv: Sequence[str],
        where: str,
        trial: preflight.FirstBatch | None = None,
    ) -> None:
        self.composition, self.e, self.record, self.storage = composition, composition.experiment, record, storage
        self.display, self.logs, self.lock, self.interrupts = display, logs, lock, interrupts
        self.argv, self.where = list(argv), where
        self.trial, self._ray_is_up = trial, threading.Event()
        # The driver uploads the metrics if it can read the disk to which the worker writes them. The worker then need
        # not import mlflow, which takes 1.3 s.
        self.upload_here = storage.is_local
        self.spool_dir = spool_of(storage)
        self.ray_trainer: SupervisedTrainer | None = None
        self.stop_asked = StopAsked(storage, record.job.get("submission_id"))

    def run(self) -> Outcome:
        """Train, and close everything even after an error.

        Raises:
            PreflightError: The first-batch probe refused the run. The run is then not recorded.
        """
        shipper: tracking.Uploader | None = None
        result: Mapping[str, Any] | None = None
        error: BaseException | None = None
        # Importing MLflow and creating its first database take seconds, in which Ray's processes start.
        opening = in_background(self._open_run, "mlflow-open")
        try:
            with self._ray() as start_training:
                self.logs.mark("ray_up")
                self._ray_is_up.set()
                run = opening.result()
                self.logs.mark("mlflow_up")
                self.record = replace(self.record, run_id=run.run_id)
                self.record.write(self.storage)
                if self.upload_here:
                    shipper = tracking.Uploader(self.spool_dir, run.run_id, run.tracking_uri)
                result = start_training(self._job(run))
                self.storage.check_there()
                self.logs.mark("trained")
        except Interrupted:
            error = self.interrupts.stopped()
        except Exception as failed:  # noqa: BLE001  reported by the outcome, after the run is closed
            error = failed
        self._ray_is_up.set()
        if self._is_refused(opening):
            self.display.close()
            assert error is not None
            raise error
        self.interrupts.deferred = True
        outcome = self._outcome(result, error)
        self.display.close()
        if error is not None and not isinstance(error, Stopped | WorkerError):
            self.logs.text_of("driver", "".join(traceback.format_exception(error)))
        try:
            try:
                self.interrupts.deferred = outcome.status == "KILLED"
                outcome = self._close(opening, shipper, outcome)
            except Interrupted:
                # The first signal came after training had ended: do not wait for a slow server any longer.
                self.interrupts.deferred = True
                outcome = self._close(opening, shipper, self._killed(outcome))
            finally:
                self.interrupts.deferred = True
        except Interrupted:
            self.display.say(f"Forced exit. Unsent metrics are in {self.spool_dir}; resume uploads them.")
        except (RaytrainerError, OSError) as failed:
            # Only the upload failed. The outcome is unchanged, and the record below gets the status.
            self.display.say(f"warning: could not upload everything to MLflow: {type(failed).__name__}: {failed}")
        if not self.record.ended:  # MLflow did not get the end, so `_close` has not closed the record
            self.record = self._ended(outcome)
        # Since then, a signal or a lost server may have changed the outcome.
        self.record = replace(self.record, status=outcome.status, cause=self._cause(outcome) or "")
        try:
            self.record.write(self.storage)
        except StorageGone:  # this is also why the run ended
            outcome = replace(outcome, gone=True)
        except StorageError as failed:
            self.display.say(f"warning: could not write the final status to the run record: {failed}")
        return replace(outcome, record=self.record)

    # --- the first-batch probe ------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Record the run, unless the first-batch probe refuses it before Ray has started. Then stop the probe.

        Raises:
            PreflightError: The run would fail at its first step.
        """
        if self.trial is None:  # the run is recorded already
            return
        deadline, verdict = time.monotonic() + _TRIAL_S, None
        while verdict is None and not self._ray_is_up.is_set() and time.monotonic() < deadline:
            verdict = self.trial.wait(0.05)
        self.trial.close()
        if verdict is not None:
            verdict.refuse()
        self.storage.write_bytes(CONFIG, self.composition.text.encode())
        self.record.write(self.storage)

    def _is_refused(self, opening: Future[tracking.Run]) -> bool:
        return self.trial is not None and opening.done() and isinstance(opening.exception(), PreflightError)

    # --- the run in MLflow ----------------------------------------------------------------------------------------

    def _open_run(self) -> tracking.Run:
        self._admit()
        origin = provenance.collect(self.argv, Path.cwd())
        self.storage.write_bytes(provenance.FILE, origin.to_json())
        e, record = self.e, self.record
        tags = {
            **origin.tags(),
            "raytrainer.name": record.name,
            "raytrainer.run_dir": record.run_dir,
            "raytrainer.where": self.where,
            **{f"raytrainer.choice.{group}": choice for group, choice in self.composition.choices},
            **job_tags(record),
            **begin_tags(record),
        }
        if e.evaluate is not None:
            tags["raytrainer.evaluates"] = f"{e.evaluate.checkpoint} of {e.evaluate.run_dir}"
            if e.evaluate.run_id is not None:
                tags["mlflow.parentRunId"] = e.evaluate.run_id
        if record.attempts > 1:
            # MLflow's parameters cannot be changed, so the overrides of a resume become a tag.
            tags[f"raytrainer.resume.{record.attempts - 1}"] = " ".join(self.composition.overrides) or "(no overrides)"
        run = tracking.open_run(
            tracking_uri(e, record.tracking_uri),
            record.experiment_name,
            record.name,
            params=flattened(self.composition.text),
            tags=tags,
            required=e.tracking.required,
            run_id=record.run_id,
            started=record.launched,
            spool_dir=self.spool_dir,
        )
        suffix = "" if record.attempts == 1 else f"-{record.attempts}"
        run.log_text(self.composition.text, f"config{suffix}.yaml")
        if origin.patch:
            run.log_text(origin.patch, f"git{suffix}.patch")
        return run

    def _close(self, opening: Future[tracking.Run], shipper: tracking.Uploader | None, outcome: Outcome) -> Outcome:
        # The user waits for a stopped run to end. Metrics that are not uploaded in that time stay in the spool.
        patience = _CLOSE_STOPPED_S if outcome.status == "KILLED" else _CLOSE_S
        try:
            # No shorter timeout for a stopped run: an MLflow run that is created after it would stay RUNNING forever.
            run = opening.result(timeout=_OPEN_S)
        except (RaytrainerError, TimeoutError):  # the outcome has this error already
            return outcome
        self.record = replace(self.record, run_id=run.run_id)
        tags = {"raytrainer.exit_code": str(outcome.exit_code)}
        if outcome.result is not None:
            tags["raytrainer.reason"] = str(outcome.result["reason"])
        tags.update(self._checkpoint_tags())
        if shipper is not None:
            shipper.close(timeout_s=patience)
        run.set_tags(tags)
        if self.e.tracking.register_model and outcome.status == "FINISHED" and self.e.tracking.log_model:
            self._register(run, self.e.tracking.register_model)
        self.logs.mark("ray_down")
        self.logs.write_marks()
        if self.logs.folder.is_dir():  # otherwise the run directory is gone
            run.log_artifact(self.logs.folder)
        self.record = record = self._ended(outcome)
        tags = {**end_tags(record), **_best_tags(record)}
        if not run.finish(outcome.status, outcome.cause, tags=tags, ended=record.ended, timeout_s=patience):  # type: ignore[arg-type]
            if self.spool_dir.is_dir():
                self.display.say(
                    f"Could not upload everything to MLflow. Unsent metrics are in {self.spool_dir}; resume uploads them."
                )
        elif gone := lost_database(run.tracking_uri):
            self.display.say(
                f"warning: MLflow's database {gone} was deleted during the run; resume {self.record.name} "
                "continues in a new MLflow run"
            )
        # With the path of this Python, because the environment's programs may not be on the user's PATH.
        command = run.ui_command and f"{provenance.interpreter()} -m {run.ui_command}"
        return replace(outcome, mlflow=run.url, mlflow_command=command)

    def _ended(self, outcome: Outcome) -> Record:
        """Return the record with the end of this attempt, which is now."""
        result = outcome.result or {}
        best = (
            dict(zip(("monitor", "value", "step"), (result["monitor"], *result["best"]), strict=True))
            if result.get("best")
            else {}
        )
        return replace(
            self.record.closed(outcome.status, time.time(), self._cause(outcome)), step=outcome.step, best=best
        )

    @staticmethod
    def _cause(outcome: Outcome) -> str | None:
        return outcome.cause if outcome.status != "FINISHED" else None

    def _register(self, run: tracking.Run, name: str) -> None:
        try:
            version = tracking.register_model(run.tracking_uri, run.run_id, worker.MODEL_FOLDER, name)
            self.display.say(f"registered as {name}, version {version}")
        except RaytrainerError as error:
            self.display.say(f"warning: the model was not registered as {name}: {error}")

    def _checkpoint_tags(self) -> dict[str, str]:
        from raytrainer.checkpoint import Checkpointer

        checkpoints = Checkpointer(self.storage.child("checkpoints"), mode=checkpoint_mode(self.e))
        try:
            last, best = checkpoints.list(), checkpoints.best()
        except RaytrainerError as error:
            return {"raytrainer.checkpoint.last": f"unreadable: {error}"[:500]}
        tags = {"raytrainer.checkpoint.last": last[-1].path} if last else {}
        if best is not None:
            tags["raytrainer.checkpoint.best"] = best.path
        return tags

    # --- training -------------------------------------------------------------------------------------------------

    def _job(self, run: tracking.Run) -> worker.Job:
        return worker.Job(
            text=self.composition.text,
            run_dir=self.storage.display,  # without a password, because Ray shows it to all users
            run_id=run.run_id,
            tracking_uri=tracking.redacted(run.tracking_uri),
            spool_dir=str(self.spool_dir),
            ship=not self.upload_here,
            changed=self.record.changed,
            mark=self.record.mark,
            forward_env=self.e.cluster.forward_env,
            env_file=self.e.cluster.env_file,
        )

    @contextlib.contextmanager
    def _ray(self) -> Iterator[Callable[[worker.Job], Mapping[str, Any]]]:
        """Start or join Ray, yield the function that trains on it, and at the end stop everything that runs on it."""
        e = self.e
        if e.backend.ray == "none":
            yield self._inline
            return
        from raytrainer import ray_internals

        with (
            ray_session(e, self.interrupts) as available,
            ray_internals.WorkerOutput(self.logs.message, self.logs.text) as output,
        ):
            yield lambda job: self._on_ray(job, available, output)

    def _inline(self, job: worker.Job) -> Mapping[str, Any]:
        self.interrupts.deferred = True  # training ends after the current step for a first signal; a second one raises
        self.logs.message(0, {"kind": "hello", "rank": 0, "label": "", "pid": os.getpid(), "host": os.uname().nodename})
        try:
            return worker.run(
                job,
                worker.inline_world(self.e.scaling.use_gpu),
                emit=lambda message: self.logs.message(0, message),
                should_stop=self._inline_should_stop,
            )
        except Exception as error:
            raise worker.described(error, 0) from error

    def _inline_should_stop(self) -> bool:
        self.storage.check_there()
        if self.stop_asked():
            self.interrupts.ask("stopped by request")
        return self.interrupts.requested

    def _on_ray(self, job: worker.Job, available: preflight.Resources, output: WorkerOutput) -> Mapping[str, Any]:
        from raytrainer import ray_internals

        e, scaling, gpu = self.e, self.e.scaling, preflight.uses_gpu(self.e, available)
        n = scaling.num_workers
        trainer = self.ray_trainer = ray_internals.make_trainer(
            job,
            num_workers=(n[0], n[1]) if isinstance(n, list) else n,
            use_gpu=gpu,
            resources_per_worker=scaling.resources_per_worker,
            placement_strategy=scaling.placement_strategy,
            accelerator_type=scaling.accelerator_type,
            label_selector=scaling.label_selector,
            max_failures=e.failure.max_failures,
            max_preemption_failures=e.failure.max_preemption_failures,
            ray_storage=self.storage,
            attempt=f"attempt-{self.record.attempts}",
            progress=lambda: self.display.step,
            on_retry=self.display.say,
        )
        box: dict[str, Any] = {}
        done = threading.Event()

        def fit() -> None:
            try:
                box["result"] = trainer.fit().return_value
            except BaseException as error:  # noqa: BLE001  raised in the main thread below
                box["error"] = ray_internals.first_error(error)
            finally:
                done.set()

        least = preflight.least_workers(e)
        wanted = {name: share * least for name, share in preflight.per_worker(e, gpu).items()}
        nodes_wanted = selected_nodes(scaling.accelerator_type, scaling.label_selector)
        waiting = Waiting(self.display, ray_internals, wanted, available, nodes_wanted)
        # Not in the main thread, which waits for signals, and in which Ray Train would install its own SIGINT handler.
        threading.Thread(target=fit, name="ray-train", daemon=True).start()
        try:
            while not done.wait(1.0):
                if self.stop_asked():
                    self.interrupts.ask("stopped by request")
                    self._stop_workers(done)
                    break
                self.lock.check()  # raises if another process took over the directory while this one had no contact
                if part := ray_internals.dead_part():
                    raise ClusterLost(f"Ray's {part} died")
                waiting.look(trainer.waits, time.monotonic())
        except Interrupted:
            self._stop_workers(done)
        finally:
            if not ray_internals.dead_part():
                trainer.abandon(done, _ABANDON_S)
        if "error" in box:
            raise box["error"]
        output.wait_for_end(_OUTPUT_S)
        return box["result"]  # type: ignore[no-any-return]

    def _stop_workers(self, done: threading.Event) -> None:
        """Ask the workers to save a checkpoint and end, after a first signal.

        Raises:
            Stopped: The workers have not ended within 5 s, or have not started yet.
        """
        self.display.say(f"{self.interrupts.reason}: saving a checkpoint, then stopping (again: at once)")
        assert self.ray_trainer is not None
        if not (self.ray_trainer.ask_to_stop() and done.wait(_GRACE_S)):
            raise self.interrupts.stopped()

    def _outcome(self, result: Mapping[str, Any] | None, error: BaseException | None) -> Outcome:
        step = result["step"] if result is not None else self.display.step or None
        base = Outcome("FINISHED", 0, self.record, self.where, result, step=step)
        if self.interrupts.requested:
            return self._killed(base)
        if error is None and not (result is not None and result["reason"] == "stopped"):
            if result is None:
                return replace(base, status="FAILED", exit_code=1, cause="training ended without a result")
            return base
        if isinstance(error, WorkerError):
            return replace(base, status="FAILED", exit_code=1, cause=str(error), traceback=error.traceback)
        if error is not None and type(error).__module__.partition(".")[0] == "ray":
            error = ClusterLost(f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        cause = f"{type(error).__name__}: {error}" if error is not None else "stopped"
        return replace(base, status="FAILED", exit_code=1, cause=cause)

    def _killed(self, outcome: Outcome) -> Outcome:
        """Return the outcome of a run that was asked to stop. It keeps `result` if training had ended already."""
        code = self.interrupts.exit_code or 130
        return replace(outcome, status="KILLED", exit_code=code, cause=self.interrupts.reason)


def _best_tags(record: Record) -> dict[str, str]:
    best = record.best
    if not best:
        return {}
    value, step = repr(float(best["value"])), str(best["step"])
    return {
        "raytrainer.monitor": best["monitor"],
        "raytrainer.monitor.best": value,
        "raytrainer.monitor.best_step": step,
    }
