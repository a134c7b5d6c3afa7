"""What runs in a trial's process: one trial after the other, each as if the process were new.

Tune asks for one result at a time; training goes on in a thread of its own, which waits at each evaluation until Tune
has decided. So a stopped trial ends at once, between two steps, and the process is free for the next.
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
from raytrainer.sweep.search import RUN, TRIAL
from raytrainer.tracking.spool import spool_of

# By these every other trial would fail, too.
_NON_RETRYABLE = ("ConfigError: sweep.metric=", "ConfigError: storage_path=")
_SOURCE = "trial.json"  # beside a checkpoint that Tune carries: whose it is
_DRAIN_S = 10.0  # for what is still to be sent when a process ends
_ENDS_S = 30.0  # a stopped trial has so long for its own cleaning up; its workers are killed in so long
# Workers are not asked for a checkpoint when a trial is paused or copied: there is one of each evaluation.
_AT_EACH_EVALUATION = ("checkpoint.every_n_steps=null", "checkpoint.min_interval_s=0")


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common; sent to each process once.

    Attributes:
        texts: `Composition.text` of each combination of group choices, by `choices_of`.
        parameters: What is swept.
        fixed: Values that every trial has on top of its text.
        run_dir: The sweep's own storage.
        metric, mode: The objective.
        tracking_uri: Without credentials.
        ship: Whether a trial's process sends its metrics itself.
        workers: Training processes of a trial.
        resources: Of each of them.
        strategy: Where they are placed.
        gpu: Whether they train on GPUs.
        retries: Whether a failed trial may be tried again.
        pauses: Whether a trial may be paused, or get another's checkpoint.
        mark: As `worker.Job`'s, of the sweep's own record.
        forward_env, env_file: As `environment.provide`.
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
        """What the trial of Tune's `config` trains."""
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
            # A checkpoint that population based training copied in goes on with this trial's own values.
            changed=[p.key.removeprefix("optimizer.") for p in self.parameters if p.key.startswith("optimizer.")],
            mark=self.mark,
            marked=Storage(self.run_dir).display,
            label=str(config[TRIAL]),
            forward_env=self.forward_env,
            env_file=self.env_file,
            reports=self.workers > 1,
            # Workers are killed when their trial is stopped: what is reported must be committed.
            wait_for_commit=self.pauses or self.workers > 1,
            objective=self.metric,
            objective_mode=self.mode,
            best_at_once=self.workers > 1,
        )


class _Ended(BaseException):
    """Raised in the training thread where it waits: Tune has stopped the trial."""


class TrialProcess(tune.Trainable):  # type: ignore[misc]
    """A process of Tune. `ray.tune.with_parameters(TrialProcess, shared=…)` makes the class that Tune starts.

    A result has `objective` (what schedulers compare: never NaN), `training_iteration` (evaluations since the trial's
    first step, also over restarts) and `report` or `end`, JSON for the driver.
    """

    _job: worker.Job
    _trial: str
    _values: dict[str, Any]  # the trial's parameters
    _checkpoints: Storage
    _thread: threading.Thread | None
    _messages: queue.Queue[dict[str, Any] | WorkerError]
    _trainer: Any  # the Trainer, where it is in this process and waits
    _blocked: bool  # whether the training thread waits to go on
    _last: dict[str, Any]
    _inherited: dict[str, Any] | None  # whose checkpoint the trial was given
    _heard: int  # evaluations before the checkpoint that Tune gave: it has their results
    _background: list[threading.Thread]  # what is left to do of trials that have ended
    _group: tuple[Any, threading.Event] | None  # the workers of a trial that has several, and whether they are gone

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        import torch._dynamo  # noqa: F401  imported before the freeze below; each optimizer needs it

        # What is imported by now stays: the collector need not look through it after each trial.
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
        """Tune pauses the trial, or clones it: its state of the last report goes into `checkpoint_dir`."""
        from raytrainer.checkpoint import copy_out

        if self._trainer is not None:  # its thread waits in `_report`
            self._trainer.save()
            self._trainer.checkpointer.wait()
        copy_out(self._checkpoints, Path(checkpoint_dir))
        Path(checkpoint_dir, _SOURCE).write_text(json.dumps({"trial": self._trial, "evaluation": self._evaluation}))

    def load_checkpoint(self, checkpoint: str) -> None:
        """A trial goes on, or a clone begins: with the state in the directory `checkpoint`."""
        from raytrainer.checkpoint import take_in

        source = json.loads(Path(checkpoint, _SOURCE).read_text())
        self._heard = self._evaluation = int(source["evaluation"])
        inherited = {"from": source["trial"], "evaluation": self._heard, "parameters": self._values}
        if source["trial"] == self._trial:
            take_in(Path(checkpoint), self._checkpoints)
        else:
            take_in(Path(checkpoint), self._checkpoints, inherited, mode=self._shared.mode)
            self._inherited = {"from": source["trial"], "evaluation": self._heard}

    def cleanup(self) -> None:
        self.drain()

    def drain(self) -> None:
        """Ends the trial that this process still has, whose best weights may be in memory alone. Then waits for what trials
        that have ended still do: send their last metrics, where this process sends them."""
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
        """The training thread: its last message says how the trial ended."""
        try:
            if self._shared.pauses:  # also what it took over in a process that was killed
                from raytrainer.checkpoint import taken_in

                self._job = replace(self._job, inherited=taken_in(self._checkpoints) or {})
            with as_found():
                nested = self._shared.workers > 1
                result = self._train_on_workers() if nested else self._train_here()
            self._messages.put(self._ended({"status": "finished", "reason": result["reason"]}, result))
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001  whatever a trial raises is data (sys.exit, too): its process goes on
            if self._ending:
                return
            failed = error if isinstance(error, WorkerError) else worker.described(error, 0)
            diverged = NonFiniteLoss.__name__ in failed.cause.partition(":")[0]
            if self._shared.retries and failed.retry:
                self._messages.put(failed)
            else:
                end = {"status": "failed", "cause": failed.cause, "traceback": failed.traceback, "diverged": diverged}
                # Every other trial would fail by it, too.
                end["non_retryable"] = failed.cause.startswith(_NON_RETRYABLE)
                self._messages.put(self._ended(end, None))
            traceback.clear_frames(error.__traceback__)  # they hold the model
        finally:
            self._trainer = None

    def _train_here(self) -> dict[str, Any]:
        world = worker.inline_world(self._shared.gpu)
        return worker.run(self._job, world, emit=lambda message: None, report=self._report, later=self._in_background)

    def _train_on_workers(self) -> dict[str, Any]:
        from raytrainer import supervise

        supervise.prepare(embedded=False)
        shared, done = self._shared, threading.Event()
        trainer = supervise.make_trainer(
            self._job,
            num_workers=shared.workers,
            use_gpu=shared.gpu,
            resources_per_worker=shared.resources,
            placement_strategy=shared.strategy,
            accelerator_type=None,  # of the trial's own bundles, which these workers are placed in
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
            first = supervise.first_error(error)
            raise first if isinstance(first, Exception) else error from error
        finally:
            done.set()

    def _heard_from_workers(self, found: dict[str, Any]) -> None:
        """In the training thread, where Train's controller is: the workers wait for its next look."""
        if found and self._take_report(**found):
            self._go.acquire()

    def _report(self, trainer: Any, ends: bool) -> None:
        """In the training thread, after an evaluation: waits until Tune has decided."""
        self._trainer = trainer
        if self._take_report(trainer.step, trainer.metrics, trainer.evaluations, ends):
            self._go.acquire()
            if self._ending:
                raise _Ended

    def _take_report(self, step: int, metrics: Mapping[str, float], evaluations: int, ends: bool) -> bool:
        """Hands an evaluation to Tune; whether Tune decides what becomes of the trial."""
        if 0 < evaluations <= self._heard:
            return False
        self._evaluation = max(evaluations, 1)
        self._last = self._result(step, metrics)
        if ends:  # the last one goes out with the end
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
            "report": json.dumps(report),  # a text: Tune would keep statistics of every number
            "done": False,
        }

    def _ended(self, end: Mapping[str, Any], result: Mapping[str, Any] | None) -> dict[str, Any]:
        """The trial's last result: its last report, or for one that raised the worst there is."""
        if result is not None and not self._last:  # a checkpoint of its very end was put in its place
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
        """The training thread is over when this returns, whatever it was in.

        Raises:
            WorkerError: It is not, though it was told.
        """
        thread = self._thread
        if thread is None:
            return
        self._ending = True
        if self._group is None:
            self._go.release()
        elif thread.is_alive():
            trainer, done = self._group
            trainer.kill_workers()  # before they may go on
            self._go.release()
            trainer.abandon(done, _ENDS_S)
        thread.join(_ENDS_S)
        if thread.is_alive():
            # The process ends with this, and the thread with it.
            raise WorkerError(f"trial {self._trial} was stopped, and did not end in {_ENDS_S:g} s")
        self._trainer = self._thread = self._group = None
        gc.collect()
