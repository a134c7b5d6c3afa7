"""The driver of a run: what one attempt of it records, trains and uploads. `attempt.lifecycle` calls it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from raytrainer import preflight, tracking, worker
from raytrainer.attempt.lifecycle import Attempt, Phase
from raytrainer.attempt.outcome import Outcome
from raytrainer.attempt.ray_training import train_on_ray
from raytrainer.attempt.session import ray_error, ray_session
from raytrainer.attempt.work import TrackedRun, Work
from raytrainer.config import Composition, checkpoint_mode, flattened
from raytrainer.errors import RaytrainerError, WorkerError

_PROBE_S = 4.0  # the longest wait for the first-batch probe; then the run is recorded without its verdict

FitResult = Mapping[str, Any]


class Driver(Work[FitResult, Outcome]):
    """The work of one attempt of a run.

    Args:
        composition: What to train.
        attempt: The attempt.
        probe: The first-batch probe, if it runs while Ray starts. The run is then recorded after its verdict.
    """

    def __init__(self, composition: Composition, attempt: Attempt, probe: preflight.FirstBatch | None = None) -> None:
        self.composition, self.e, self.attempt, self.probe = composition, composition.experiment, attempt, probe
        self._uploader: tracking.Uploader | None = None

    # --- before training ------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Record the run, unless the first-batch probe refuses it before Ray has started. Then stop the probe."""
        if self.probe is None:  # the run is recorded already
            return
        deadline, verdict = time.monotonic() + _PROBE_S, None
        while verdict is None and self.attempt.phase is Phase.STARTING and time.monotonic() < deadline:
            verdict = self.probe.wait(0.05)
        self.probe.close()
        if verdict is not None:
            verdict.refuse()
        self.attempt.record_start(self.composition)

    def tracked_run(self) -> TrackedRun:
        tags = {f"raytrainer.choice.{group}": choice for group, choice in self.composition.choices}
        if (evaluated := self.e.evaluate) is not None:
            tags["raytrainer.evaluates"] = f"{evaluated.checkpoint} of {evaluated.run_dir}"
            if evaluated.run_id is not None:
                tags["mlflow.parentRunId"] = evaluated.run_id
        overrides = " ".join(self.composition.overrides) or "(no overrides)"
        return TrackedRun(self.composition.text, flattened(self.composition.text), tags, overrides)

    # --- training -------------------------------------------------------------------------------------------------

    def execute(self) -> FitResult:
        attempt = self.attempt
        with self._trainer() as train:
            attempt.ray_is_up()
            attempt.begin_work()
            run = attempt.run_opened
            assert run is not None
            # The driver uploads the metrics if it can read the disk to which the worker writes them. The worker then
            # need not import mlflow, which takes 1.3 s.
            if attempt.storage.is_local:
                self._uploader = tracking.Uploader(attempt.spool_dir, run.run_id, run.tracking_uri)
            result = train(self._job(run))
            attempt.storage.check_there()
            attempt.logs.mark("trained")
            return result

    def _job(self, run: tracking.Run) -> worker.WorkerJob:
        attempt = self.attempt
        return worker.WorkerJob(
            text=self.composition.text,
            run_dir=attempt.storage.display,  # without a password, because Ray shows it to all users
            run_id=run.run_id,
            tracking_uri=tracking.redacted(run.tracking_uri),
            spool_dir=str(attempt.spool_dir),
            ship=not attempt.storage.is_local,
            changed=attempt.record.changed,
            record_mark=attempt.record.mark,
            forward_env=self.e.cluster.forward_env,
            env_file=self.e.cluster.env_file,
        )

    @contextlib.contextmanager
    def _trainer(self) -> Iterator[Callable[[worker.WorkerJob], FitResult]]:
        """Start or join Ray, yield the function that trains on it, and at the end stop everything that runs on it."""
        if self.e.backend.ray == "none":
            yield self._train_inline
            return
        from raytrainer import ray_internals

        logs = self.attempt.logs
        with (
            ray_session(self.e, self.attempt.interrupts) as available,
            ray_internals.WorkerOutput(logs.message, logs.text) as output,
        ):
            yield lambda job: train_on_ray(self.attempt, job, available, output)

    def _train_inline(self, job: worker.WorkerJob) -> FitResult:
        logs = self.attempt.logs
        # Training ends after the current step for a first signal; a second one raises.
        self.attempt.interrupts.deferred = True
        logs.message(0, {"kind": "hello", "rank": 0, "label": "", "pid": os.getpid(), "host": os.uname().nodename})
        try:
            return worker.run(
                job,
                worker.inline_world(self.e.scaling.use_gpu),
                emit=lambda message: logs.message(0, message),
                should_stop=self._should_stop,
            )
        except Exception as error:
            raise worker.described(error, 0) from error

    def _should_stop(self) -> bool:
        self.attempt.storage.check_there()
        self.attempt.stop_requested()
        return self.attempt.interrupts.requested

    # --- the end --------------------------------------------------------------------------------------------------

    def outcome(self, result: FitResult | None, error: BaseException | None) -> Outcome:
        attempt = self.attempt
        step = result["step"] if result is not None else attempt.display.step or None
        base = Outcome("FINISHED", 0, attempt.record, attempt.where, result, step=step)
        if attempt.interrupts.requested:
            return attempt.killed(base)
        if error is None and result is not None and result["reason"] != "stopped":
            return base
        failed = replace(base, status="FAILED", exit_code=1)
        if isinstance(error, WorkerError):
            return replace(failed, cause=str(error), traceback=error.traceback)
        if error is not None:
            error = ray_error(error)
            return replace(failed, cause=f"{type(error).__name__}: {error}")
        return replace(failed, cause="training ended without a result" if result is None else "stopped")

    def upload(self, run: tracking.Run | None, outcome: Outcome, timeout_s: float) -> bool:
        if run is None:
            return False
        attempt, t = self.attempt, self.e.tracking
        with attempt.warning():
            tags = {"raytrainer.exit_code": str(outcome.exit_code), **self._checkpoint_tags()}
            if outcome.result is not None:
                tags["raytrainer.reason"] = str(outcome.result["reason"])
            if self._uploader is not None:
                self._uploader.close(timeout_s=timeout_s)
            run.set_tags(tags)
        if t.register_model and t.log_model and outcome.status == "FINISHED":
            self._register(run, t.register_model)
        with attempt.warning():
            attempt.upload_logs(run)
        return True

    def figures(self, outcome: Outcome) -> dict[str, Any]:
        result = outcome.result or {}
        best = {}
        if result.get("best"):
            value, step = result["best"]
            best = {"monitor": result["monitor"], "value": value, "step": step}
        return {"step": outcome.step, "best": best}

    def _register(self, run: tracking.Run, name: str) -> None:
        try:
            version = tracking.register_model(run.tracking_uri, run.run_id, worker.MODEL_FOLDER, name)
            self.attempt.display.say(f"registered as {name}, version {version}")
        except RaytrainerError as error:
            self.attempt.display.say(f"warning: the model was not registered as {name}: {error}")

    def _checkpoint_tags(self) -> dict[str, str]:
        from raytrainer.checkpoint import Checkpointer

        checkpoints = Checkpointer(self.attempt.storage.child("checkpoints"), mode=checkpoint_mode(self.e))
        try:
            last, best = checkpoints.list(), checkpoints.best()
        except RaytrainerError as error:
            return {"raytrainer.checkpoint.last": f"unreadable: {error}"[:500]}
        tags = {"raytrainer.checkpoint.last": last[-1].path} if last else {}
        if best is not None:
            tags["raytrainer.checkpoint.best"] = best.path
        return tags
