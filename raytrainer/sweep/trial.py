"""The trial process: it trains one trial after the other, each as if the process were new.

Tune asks for one result at a time. Training runs in a separate thread, which waits at each evaluation until Tune has
decided. So a stopped trial ends at once, between two steps, and the process is free for the next trial.
"""

from __future__ import annotations

import gc
import json
import math
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from raytrainer import worker
from raytrainer.config import Parameter
from raytrainer.errors import ConfigError, NonFiniteLoss, WorkerError
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Mode, worst
from raytrainer.sweep.plan import choices_of
from raytrainer.sweep.reuse import as_found
from raytrainer.sweep.space import RUN, TRIAL
from raytrainer.tracking.spool import spool_of

# Causes with which every other trial would fail too.
_NON_RETRYABLE = ("ConfigError: sweep.metric=", "ConfigError: storage_path=")
_SOURCE = "trial.json"  # the file beside a checkpoint for Tune that names its trial and evaluation
_DRAIN_S = 10.0  # time for the remaining uploads when a process ends
_ENDS_S = 30.0  # time for a stopped trial to clean up, and for its workers to be killed
# Each evaluation needs a checkpoint, because the workers of a paused or copied trial are not asked for one.
_AT_EACH_EVALUATION = ("checkpoint.every_n_steps=null", "checkpoint.min_interval_s=0")


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common. It is sent to each process once.

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
        mark: As `worker.Job.record_mark`, for the sweep's record.
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

    def job(self, config: Mapping[str, Any]) -> worker.Job:
        """Return the job of the trial with Tune's `config`."""
        run_dir = Storage(self.run_dir).child(f"trials/{config[TRIAL]}")
        own = [p.override(config[p.key]) for p in self.parameters if not p.group]
        saves = _AT_EACH_EVALUATION if self.pauses and self.workers > 1 else ()
        return worker.Job(
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


class _Ended(BaseException):
    """Raised in the waiting training thread when Tune has stopped the trial."""


class TrialProcess(tune.Trainable):  # type: ignore[misc]
    """A trial process. `ray.tune.with_parameters(TrialProcess, shared=…)` makes the class that Tune starts.

    A result has `objective` (the value that schedulers compare, never NaN), `training_iteration` (the evaluations since
    the trial's first step, over all restarts) and `report` or `end`, which are JSON for the driver.
    """

    _job: worker.Job
    _trial: str
    _values: dict[str, Any]  # the trial's parameters
    _checkpoints: Storage
    _thread: threading.Thread | None
    _messages: queue.Queue[dict[str, Any] | WorkerError]
    _trainer: Any  # the Trainer, while it waits in this process; else None
    _blocked: bool  # whether the training thread waits for Tune's decision
    _last: dict[str, Any]
    _inherited: dict[str, Any] | None  # the trial and evaluation of a copied checkpoint
    _heard: int  # evaluations up to the checkpoint from Tune, which has their results already
    _background: list[threading.Thread]  # remaining work of ended trials
    _group: tuple[Any, threading.Event] | None  # with several workers: their trainer, and whether it has ended

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        import torch._dynamo  # noqa: F401  imported before the freeze below; each optimizer needs it

        # The modules imported so far stay, so the garbage collector need not traverse them after each trial.
        gc.collect()
        gc.freeze()
        self._shared, self._background = shared, []
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
        self._heard = self._evaluation = int(source["evaluation"])
        inherited = {"from": source["trial"], "evaluation": self._heard, "parameters": self._values}
        if source["trial"] == self._trial:
            import_checkpoint(Path(checkpoint), self._checkpoints)
        else:
            import_checkpoint(Path(checkpoint), self._checkpoints, inherited, mode=self._shared.mode)
            self._inherited = {"from": source["trial"], "evaluation": self._heard}

    def cleanup(self) -> None:
        self.drain()

    def drain(self) -> None:
        """End the current trial, whose best weights may be only in memory. Then wait up to 10 s for the background work
        of ended trials, such as uploading their last metrics."""
        self._end()
        until = time.monotonic() + _DRAIN_S
        for thread in self._background:
            thread.join(max(0.0, until - time.monotonic()))

    # --- one trial ------------------------------------------------------------------------------------------------

    def _take(self, config: Mapping[str, Any]) -> None:
        self._job, self._trial = self._shared.job(config), str(config[TRIAL])
        self._values = {p.key: config[p.key] for p in self._shared.parameters if p.key in config}
        worker.hello(0, self._trial)
        self._place = Storage(self._shared.run_dir).child(f"trials/{self._trial}")
        self._checkpoints = self._place.child("checkpoints")
        self._thread = self._trainer = self._inherited = self._group = None
        self._messages = queue.Queue()
        self._go = threading.Semaphore(0)
        self._blocked = self._ending = False
        self._last = {}
        self._evaluation = self._heard = 0

    def _run(self) -> None:
        """Run in the training thread. The last message says how the trial ended."""
        try:
            if self._shared.pauses:  # the checkpoint may have been copied by an earlier process that was killed
                from raytrainer.checkpoint import import_note

                self._job = replace(self._job, inherited=import_note(self._checkpoints) or {})
            with as_found():
                nested = self._shared.workers > 1
                result = self._train_on_workers() if nested else self._train_here()
            self._messages.put(self._ended({"status": "finished", "reason": result["reason"]}, result))
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001  any error, even sys.exit, is the result; the process continues
            if self._ending:
                return
            failed = error if isinstance(error, WorkerError) else worker.described(error, 0)
            diverged = NonFiniteLoss.__name__ in failed.cause.partition(":")[0]
            if self._shared.retries and failed.retry:
                self._messages.put(failed)
            else:
                end = {"status": "failed", "cause": failed.cause, "traceback": failed.traceback, "diverged": diverged}
                end["non_retryable"] = failed.cause.startswith(_NON_RETRYABLE)
                self._messages.put(self._ended(end, None))
            traceback.clear_frames(error.__traceback__)  # they keep the model alive
        finally:
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
            on_report=self._heard_from_workers,
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

    def _heard_from_workers(self, found: dict[str, Any]) -> None:
        """Handle a report of the workers. This runs in the training thread, as part of Train's controller, so the
        workers wait until it returns."""
        if found and self._take_report(**found):
            self._go.acquire()

    def _report(self, trainer: Any, ends: bool) -> None:
        """Report an evaluation and wait until Tune has decided. This runs in the training thread."""
        self._trainer = trainer
        if self._take_report(trainer.step, trainer.metrics, trainer.evaluations, ends):
            self._go.acquire()
            if self._ending:
                raise _Ended

    def _take_report(self, step: int, metrics: Mapping[str, float], evaluations: int, ends: bool) -> bool:
        """Give an evaluation to Tune. Return whether the trial must wait for Tune's decision."""
        if 0 < evaluations <= self._heard:
            return False
        self._evaluation = max(evaluations, 1)
        self._last = self._result(step, metrics)
        if ends:  # the last report is sent together with the end
            return False
        self._blocked = True
        self._messages.put(self._last)
        return True

    def _result(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        shared = self._shared
        if shared.metric not in metrics:
            raise ConfigError(
                f"is not logged by the first evaluation, at step {step} (train/… come every trainer.log_every_n_steps)",
                key="sweep.metric",
                value=shared.metric,
                choices=metrics,
            )
        value = float(metrics[shared.metric])
        report = {"evaluation": self._evaluation, "step": step, "value": value, "metrics": dict(metrics)}
        if self._inherited is not None:
            report["inherited"], self._inherited = self._inherited, None
        return {
            "objective": value if math.isfinite(value) else worst(shared.mode),
            "training_iteration": self._evaluation,
            "report": json.dumps(report),  # text, because Tune keeps statistics of numbers
            "done": False,
        }

    def _ended(self, end: Mapping[str, Any], result: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the trial's last result: its last report, or the worst possible value if it raised."""
        if result is not None and not self._last:  # it started from a checkpoint of its very end
            self._last = self._result(result["step"], result["metrics"])
        last = dict(self._last)
        if result is None:
            last.pop("report", None)
            last |= {"objective": worst(self._shared.mode), "training_iteration": max(self._evaluation, 1)}
        return last | {"end": json.dumps(end), "done": True}

    def _in_background(self, work: Callable[[], None]) -> None:
        self._background = [thread for thread in self._background if thread.is_alive()]
        self._background.append(threading.Thread(target=work, name="trial-end", daemon=True))
        self._background[-1].start()

    def _end(self) -> None:
        """Stop the training thread, wherever it is, and wait until it has ended.

        Raises:
            WorkerError: The thread did not end within 30 s.
        """
        thread = self._thread
        if thread is None:
            return
        self._ending = True
        if self._group is None:
            self._go.release()
        elif thread.is_alive():
            trainer, done = self._group
            trainer.kill_workers()  # before the release below, after which they would continue
            self._go.release()
            trainer.abandon(done, _ENDS_S)
        thread.join(_ENDS_S)
        if thread.is_alive():
            # This error ends the process, and the thread with it.
            raise WorkerError(f"trial {self._trial} was stopped, and did not end in {_ENDS_S:g} s")
        self._trainer = self._thread = self._group = None
        gc.collect()
