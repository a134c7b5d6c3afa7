"""The trial process of a sweep over an experiment: it trains one trial after the other, each as if the process were
new. A report is an evaluation."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from raytrainer import preflight, tracking, worker
from raytrainer.attempt import Record
from raytrainer.config import Parameter
from raytrainer.errors import ConfigError
from raytrainer.storage import Storage
from raytrainer.sweep import stepped
from raytrainer.sweep.best_weights import INTERVAL_S
from raytrainer.sweep.journal import Mode
from raytrainer.sweep.plan import Plan, choices_of
from raytrainer.sweep.reuse import as_found
from raytrainer.sweep.stepped import SteppedProcess, TrialStopped
from raytrainer.sweep.tune_space import RUN, TRIAL
from raytrainer.tracking.spool import spool_of

_SOURCE = "trial.json"  # the file beside a checkpoint for Tune that names its trial and evaluation
_DRAIN_S = 10.0  # time for the remaining uploads when a process ends
# Each evaluation needs a checkpoint, because the workers of a paused or copied trial are not asked for one.
_AT_EACH_EVALUATION = ("checkpoint.every_n_steps=null", "checkpoint.min_interval_s=0")


@dataclass(frozen=True)
class TrialSetup:
    """The common settings of all trials of a sweep, which each process receives once.

    Attributes:
        texts: `Composition.text` of each combination of group choices, by `choices_of`.
        parameters: The search space.
        fixed: Overrides that every trial has in addition to its text.
        run_dir: The sweep's directory.
        metric, mode: The objective.
        tracking_uri: The tracking URI, without credentials.
        ship: Whether a trial process uploads its metrics itself.
        workers: The number of workers of a trial.
        resources: The resources of each worker.
        strategy: The placement strategy of the workers.
        gpu: Whether the workers train on GPUs.
        retries: Whether a failed trial may be tried again.
        pauses: Whether a trial may be paused, or get the checkpoint of another one.
        mark: As `worker.WorkerJob.record_mark`, for the sweep's record.
        forward_env, env_file: As for `environment.provide`.
    """

    texts: Mapping[str, str]
    parameters: Sequence[Parameter]
    fixed: Sequence[str]
    run_dir: str
    metric: str
    mode: Mode
    tracking_uri: str
    ship: bool
    workers: int
    resources: Mapping[str, float]
    strategy: str
    gpu: bool
    retries: bool
    pauses: bool
    forward_env: Sequence[str] = ()
    env_file: str | None = None
    mark: str = ""

    def job(self, config: Mapping[str, Any]) -> worker.WorkerJob:
        """Return the job of the trial with Tune's `config`."""
        run_dir = Storage(self.run_dir).child(f"trials/{config[TRIAL]}")
        own = [p.override(config[p.key]) for p in self.parameters if not p.group]
        saves = _AT_EACH_EVALUATION if self.pauses and self.workers > 1 else ()
        return worker.WorkerJob(
            text=self.texts[choices_of(self.parameters, config)],
            overrides=[*self.fixed, *own, *saves],
            run_dir=run_dir.display,
            run_id=config[RUN] or None,
            tracking_uri=self.tracking_uri,
            spool_dir=str(spool_of(run_dir)),
            ship=self.ship,
            # A trial that continues from a copied checkpoint uses its own values, not those in the checkpoint.
            changed=[p.key.removeprefix("optimizer.") for p in self.parameters if p.key.startswith("optimizer.")],
            record_mark=self.mark,
            record_dir=Storage(self.run_dir).display,
            label=str(config[TRIAL]),
            forward_env=self.forward_env,
            env_file=self.env_file,
            reports=self.workers > 1,
            # Workers are killed when their trial is stopped, so a checkpoint must be committed before the report.
            wait_for_commit=self.pauses or self.workers > 1,
            objective=self.metric,
            objective_mode=self.mode,
            best_at_once=self.workers > 1,
        )


def make_shared(
    plan: Plan,
    record: Record,
    storage: Storage,
    *,
    tracking_uri: str,
    trials_upload: bool,
    gpu: bool,
    scheduler_pauses: bool,
) -> TrialSetup:
    """Return the common settings of all trials of a sweep.

    Args:
        plan: The sweep.
        record: The record of this attempt.
        storage: The sweep's directory.
        tracking_uri: The tracking URI, from which credentials are removed.
        trials_upload: As `TrialSetup.ship`.
        gpu: Whether the workers train on GPUs.
        scheduler_pauses: As `TrialSetup.pauses`.
    """
    e = plan.experiment
    fixed = [f"scaling.use_gpu={str(gpu).lower()}", "tracking.log_model=false"]
    if trials_upload:
        fixed.append(f"tracking.experiment_name={json.dumps(record.experiment_name, ensure_ascii=False)}")
    if e.checkpoint.min_interval_s is None:
        fixed.append(f"checkpoint.min_interval_s={INTERVAL_S}")
    return TrialSetup(
        texts={key: c.text for key, c in plan.compositions.items()},
        parameters=plan.parameters,
        fixed=fixed,
        run_dir=storage.uri,
        metric=plan.metric,
        mode=cast(Mode, plan.mode),
        tracking_uri=tracking.redacted(tracking_uri),
        ship=trials_upload,
        workers=preflight.least_workers(e),
        resources=preflight.per_worker(e, gpu),
        strategy=e.scaling.placement_strategy,
        gpu=gpu,
        retries=e.sweep.max_trial_failures > 0,
        forward_env=e.cluster.forward_env,
        env_file=e.cluster.env_file,
        pauses=scheduler_pauses,
        mark=record.mark,
    )


class TrialProcess(SteppedProcess):
    """A process that trains the trials of an experiment."""

    _trainer: Any  # the Trainer, while it waits in this process; else None
    _last: dict[str, Any]  # the last result with a report
    _inherited: dict[str, Any] | None  # the trial and evaluation of a copied checkpoint, until the next report
    _known: int  # evaluations up to the checkpoint from Tune, which has their results already
    _background: list[threading.Thread]  # remaining work of ended trials
    _group: tuple[Any, threading.Event] | None  # with several workers: their trainer, and whether it has ended

    def setup(self, config: dict[str, Any], shared: TrialSetup) -> None:
        import torch._dynamo  # noqa: F401  imported before the freeze below; each optimizer needs it

        # The modules imported so far stay, so the garbage collector need not traverse them after each trial.
        gc.collect()
        gc.freeze()
        self._shared, self._background = shared, []
        self.mode, self.retries = shared.mode, shared.retries
        self._take(config)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state of the last report to `checkpoint_dir`. Tune calls this to pause or clone the trial."""
        from raytrainer.checkpoint import copy_out

        if self._trainer is not None:  # its thread waits in `_report`
            self._trainer.save()
            self._trainer.checkpointer.wait()
        copy_out(self._checkpoints, Path(checkpoint_dir))
        Path(checkpoint_dir, _SOURCE).write_text(json.dumps({"trial": self._trial, "evaluation": self._evaluation}))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Continue from the state in the directory `checkpoint`. Tune calls this for a paused trial or a clone."""
        from raytrainer.checkpoint import import_checkpoint

        source = json.loads(Path(checkpoint, _SOURCE).read_text())
        self._known = self._evaluation = int(source["evaluation"])
        inherited = {"from": source["trial"], "evaluation": self._known, "parameters": self._values}
        if source["trial"] == self._trial:
            import_checkpoint(Path(checkpoint), self._checkpoints)
        else:
            import_checkpoint(Path(checkpoint), self._checkpoints, inherited, mode=self._shared.mode)
            self._inherited = {"from": source["trial"], "evaluation": self._known}

    def drain(self) -> None:
        """End the current trial, whose best weights may be only in memory. Then wait up to 10 s for the background work
        of ended trials, such as uploading their last metrics."""
        super().drain()
        until = time.monotonic() + _DRAIN_S
        for thread in self._background:
            thread.join(max(0.0, until - time.monotonic()))

    def _take(self, config: Mapping[str, Any]) -> None:
        super()._take(config)
        self._job = self._shared.job(config)
        self._values = {p.key: config[p.key] for p in self._shared.parameters if p.key in config}
        self._place = Storage(self._shared.run_dir).child(f"trials/{self._trial}")
        self._checkpoints = self._place.child("checkpoints")
        self._trainer = self._inherited = self._group = None
        self._last, self._known = {}, 0

    def _end(self) -> None:
        super()._end()
        self._trainer = self._group = None
        gc.collect()

    def _release(self) -> None:
        if self._group is None or not self._thread.is_alive():
            super()._release()
            return
        trainer, done = self._group
        trainer.kill_workers()  # before the release, after which they would continue
        super()._release()
        trainer.abandon(done, stepped.ENDS_S)

    # --- one trial ------------------------------------------------------------------------------------------------

    def _train(self) -> dict[str, Any]:
        if self._shared.pauses:  # the checkpoint may have been copied by an earlier process that was killed
            from raytrainer.checkpoint import import_note

            self._job = replace(self._job, inherited=import_note(self._checkpoints) or {})
        with as_found():
            result = self._train_on_workers() if self._shared.workers > 1 else self._train_here()
        if not self._last:  # it started from a checkpoint of its very end
            self._last = self._report_of(result["step"], result["metrics"])
        return self._finished(self._last)

    def _forget(self) -> None:
        self._trainer = None

    def _train_here(self) -> dict[str, Any]:
        world = worker.inline_world(self._shared.gpu)
        return worker.run(self._job, world, emit=lambda message: None, report=self._report, later=self._in_background)

    def _train_on_workers(self) -> dict[str, Any]:
        from raytrainer import ray_internals

        ray_internals.prepare(embedded=False)
        shared, done = self._shared, threading.Event()
        trainer = ray_internals.make_trainer(
            self._job,
            num_workers=shared.workers,
            use_gpu=shared.gpu,
            resources_per_worker=shared.resources,
            placement_strategy=shared.strategy,
            accelerator_type=None,  # the trial's own bundles decide where the workers are placed
            label_selector=None,
            max_failures=0,
            max_preemption_failures=-1,
            ray_storage=self._place,
            attempt=f"attempt-{uuid.uuid4().hex[:12]}",
            progress=lambda: self._evaluation,
            on_retry=lambda text: None,
            on_report=self._report_of_workers,
        )
        self._group = (trainer, done)
        try:
            result: dict[str, Any] = trainer.fit().return_value
            return result
        except Exception as error:
            first = trainer.first_error(error)
            raise first if isinstance(first, Exception) else error from error
        finally:
            done.set()

    def _report(self, trainer: Any, ends: bool) -> None:
        """Report an evaluation of this process."""
        self._trainer = trainer
        self._evaluated(trainer.step, trainer.metrics, trainer.evaluations, ends)

    def _report_of_workers(self, report: dict[str, Any]) -> None:
        """Report an evaluation of the workers. This runs in the trial's thread, as part of Train's controller, so the
        workers wait until it returns."""
        if report:
            with contextlib.suppress(TrialStopped):  # the workers are killed
                self._evaluated(**report)

    def _evaluated(self, step: int, metrics: Mapping[str, float], evaluations: int, ends: bool) -> None:
        if 0 < evaluations <= self._known:
            return
        self._evaluation = max(evaluations, 1)
        self._last = self._report_of(step, metrics)
        if not ends:  # the last report is sent together with the end
            self._send_and_wait(self._last)

    def _report_of(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        metric = self._shared.metric
        if metric not in metrics:
            raise ConfigError(
                f"is not logged by the first evaluation, at step {step} (train/… come every trainer.log_every_n_steps)",
                key="sweep.metric",
                value=metric,
                choices=metrics,
            )
        inherited, self._inherited = self._inherited, None
        more = {} if inherited is None else {"inherited": inherited}
        return self._reported(float(metrics[metric]), step=step, metrics=dict(metrics), **more)

    def _in_background(self, work: Callable[[], None]) -> None:
        self._background = [thread for thread in self._background if thread.is_alive()]
        self._background.append(threading.Thread(target=work, name="trial-end", daemon=True))
        self._background[-1].start()
