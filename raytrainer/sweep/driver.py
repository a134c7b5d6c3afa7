"""The driver of one attempt of a sweep. It starts Ray, runs the trials, fills the MLflow runs and sets the status."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

from raytrainer import preflight, provenance, tracking
from raytrainer.attempt import (
    Logs,
    Record,
    StopAsked,
    Waiting,
    begin_tags,
    changes_meaning,
    end_tags,
    job_tags,
    ray_session,
    selected_nodes,
    tracking_uri,
)
from raytrainer.checkpoint import import_note
from raytrainer.config import Parameter, flattened, parameters_of
from raytrainer.core.background import in_background
from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import ClusterLost, ConfigError, RaytrainerError, Stopped, StorageError, WorkerError
from raytrainer.progress import Display, duration
from raytrainer.storage import Lock, Storage
from raytrainer.sweep import results
from raytrainer.sweep.journal import ERROR, Mode, Report, Trial, TrialJournal
from raytrainer.sweep.outcome import Status, SweepOutcome
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.table import Board, ranked
from raytrainer.tracking.keys import metric_key
from raytrainer.tracking.spool import Spool, last_logged, spool_of

_OPEN_S = 30.0  # importing mlflow and making a database, on a busy machine
_CLOSE_S, _CLOSE_STOPPED_S = 60.0, 3.0  # timeouts for the tracking server at the end
_SEEN_S = 0.3  # between two checks of the spools, if another process waits for the creation of an MLflow run
_MAKE_S = 2.0  # timeout for creating the sweep's own run from its spool
# Time for the trial processes after the last trial to write the best weights that are only in memory, and to upload
# their metrics if they do so themselves.
_DRAIN_S, _DRAIN_STOPPED_S = 10.0, 3.0
_DRAW_STOPPED_S = 3.0  # time for the pictures of a stopped sweep
_OF_TUNE = "tune"  # the directory for Tune's checkpoints of paused and copied trials
_INTERVAL_S = 10  # seconds between checkpoints of a trial, if the config does not set it
_log = logging.getLogger("raytrainer.sweep")

# MLflow's status for each status of a trial. The tag raytrainer.trial_status has our own.
_IN_MLFLOW: Mapping[str, Status] = {
    "finished": "FINISHED",
    "pruned": "KILLED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


class SweepDriver:
    """The driver of one attempt of a sweep."""

    def __init__(
        self,
        plan: Plan,
        record: Record,
        storage: Storage,
        display: Display,
        logs: Logs,
        lock: Lock,
        interrupts: Interrupts,
        journal: TrialJournal,
        argv: Sequence[str],
        where: str,
    ) -> None:
        self.plan, self.e, self.record, self.storage = plan, plan.experiment, record, storage
        self.display, self.logs, self.lock, self.interrupts = display, logs, lock, interrupts
        self.journal, self.argv, self.where = journal, list(argv), where
        self.spool_dir = spool_of(storage)
        self.mode = cast(Mode, plan.mode)
        self._uri = tracking_uri(self.e, record.tracking_uri)
        self._stop_asked = StopAsked(storage, record.job.get("submission_id"))
        self._stopping = False  # whether the end was announced
        self._may_pause = False  # whether the scheduler pauses trials
        self._at_once = 1  # the maximum number of concurrent trials
        self._best_metric = metric_key(f"best/{plan.metric}")
        self._parent: str | None = None
        self._offline: str | None = None  # the local id of the sweep's run while the server is unreachable
        self._of_spool: dict[Path, str] = {}  # the trial of each spool
        self._known: set[str] = set()  # trials that the uploader knows
        # The uploader sends the spools on this machine. Trial processes on other machines upload their own.
        self._ship = not (storage.is_local or self.e.backend.location == "here")
        self._uploader: tracking.ChildRunUploader | None = None
        self._board: Board | None = None
        self._waiting: Waiting | None = None
        ended = [t for t in journal.trials.values() if t.status not in ("running", "stopped")]
        self._kept = ranked(ended, self.mode)[: self.e.sweep.num_to_keep]
        self._gone: list[Trial] = []  # trials to delete again, because a process may have written one more checkpoint
        # In a thread, because deletion on a slow disk takes long.
        self._tidy = ThreadPoolExecutor(1, thread_name_prefix="sweep-retention")

    def run(self) -> SweepOutcome:
        """Run the trials, and close everything even after an error."""
        error: BaseException | None = None
        reason: str | None = None
        self.interrupts.deferred = True  # whatever starts here must be ended below
        opening = in_background(self._open_run, "mlflow-open")
        self._uploader = tracking.ChildRunUploader(
            self._uri,
            self.record.experiment_name,
            parent=self._parent_run,
            on_created=self._run_made,
            interval_s=_SEEN_S if self._ship else 2.0,
        )
        try:
            self._adopt()
            self.interrupts.deferred = False
            self.interrupts.check()
            self._catch_up()
            with ray_session(self.e, self.interrupts, all_of_it=True) as available:
                self.logs.mark("ray_up")
                if self.e.tracking.required:
                    opening.result()  # raises before the first trial if the server refuses the sweep
                    self.interrupts.check()
                reason = self._search(available)
        except Interrupted:
            error = self.interrupts.stopped()
            self._say_stopping(self.interrupts.reason)
        except Exception as failed:  # noqa: BLE001  reported by the outcome, after the sweep is closed
            error = failed
        self.interrupts.deferred = True
        if self._board is not None:
            self._board.close()
        if error is not None and not isinstance(error, Stopped):
            self.logs.text_of("driver", "".join(traceback.format_exception(error)))
        try:
            error = self._stop_the_rest(error)
            outcome = self._outcome(reason, error)
            outcome = self._close(opening, outcome)
        except Interrupted:  # a second signal
            outcome = self._outcome(reason, error)
            self.display.say(f"Forced exit. Unsent metrics are in {self.storage.uri}; resume uploads them.")
        except (RaytrainerError, OSError) as failed:
            outcome = self._outcome(reason, error or failed)
            self.display.say(f"warning: could not write everything: {type(failed).__name__}: {failed}")
        for trial in self._gone:
            self._tidy.submit(_delete_checkpoints, self._trial_dir(trial))
        self._tidy.shutdown(wait=outcome.status != "KILLED", cancel_futures=outcome.status == "KILLED")
        if not self.record.ended:  # MLflow did not get the end, so `_close` has not closed the record
            self.record = self.record.closed(outcome.status, time.time())
        cause = outcome.cause if outcome.status != "FINISHED" else None
        self.record = replace(self.record, status=outcome.status, cause=cause or "")
        for write in (self.journal.close, lambda: self.record.write(self.storage)):
            try:
                write()
            except StorageError as failed:
                self.display.say(f"warning: could not write the final status to the sweep's record: {failed}")
        return replace(outcome, record=self.record)

    # --- trials ---------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Record in the journal what trials copied from others if the sweep was killed before they reported it."""
        for trial in self.journal.trials.values():
            if trial.status in ("running", "stopped"):
                found = import_note(self._trial_dir(trial).child("checkpoints"))
                if found is not None and found not in trial.inherited[-1:]:
                    own = found["parameters"]
                    self.journal.inherit(trial.id, found["from"], found["evaluation"], own, self.plan.overrides_of(own))

    def _search(self, available: preflight.Resources) -> str:
        import ray

        from raytrainer import ray_internals
        from raytrainer.sweep.engine import Listener, Search
        from raytrainer.sweep.schedule import pauses
        from raytrainer.sweep.trial import Shared, TrialProcess

        e, gpu = self.e, preflight.uses_gpu(self.e, available)
        each, bundle, workers = preflight.per_worker(e, gpu), preflight.bundle(e, gpu), preflight.least_workers(e)
        # Include the nodes that an autoscaler can add.
        nodes = [*ray_internals.nodes(), *available.more[: available.most_more]]
        fit = max(1, ray_internals.capacity(bundle, workers, nodes, e.scaling.placement_strategy))
        limit, note = at_once(e.sweep.max_concurrent_trials, fit, grows=available.endless)
        if note is not None:
            self.display.say(note)
        self._at_once = limit
        self.where = f"{self.where}, {limit} trial{'' if limit == 1 else 's'} at a time"
        search = Search(
            e.sweep,
            parameters=self.plan.parameters,
            mode=self.mode,
            seed=e.seed,
            evaluations=self.plan.evaluations,
            journal=self.journal,
            overrides_of=self.plan.overrides_of,
            may_change=may_change(self.plan),
            listener=Listener(self._started, self._reported, self._ended, self.display.say),
            needs_value=True,
        )
        for note in search.notes:
            self.display.say(note)
        self._may_pause = pauses(search.scheduler)
        shared = Shared(
            texts={key: c.text for key, c in self.plan.compositions.items()},
            parameters=self.plan.parameters,
            fixed=self._fixed(gpu),
            run_dir=self.storage.uri,
            metric=self.plan.metric,
            mode=self.mode,
            tracking_uri=tracking.redacted(self._uri),
            ship=self._ship,
            workers=workers,
            resources=each,
            strategy=e.scaling.placement_strategy,
            gpu=gpu,
            retries=e.sweep.max_trial_failures > 0,
            forward_env=e.cluster.forward_env,
            env_file=e.cluster.env_file,
            pauses=self._may_pause,
            mark=self.record.mark,
        )
        self._board = Board(
            self.display,
            self.record.name,
            metric=self.plan.metric,
            mode=self.mode,
            keys=[p.key for p in self.plan.parameters],
            total=search.total,
            at_once=limit,
            trials=[t for t in self.journal.trials.values() if t.status not in ("running", "stopped")],
            time_budget_s=e.sweep.time_budget_s,
        )
        wanted = {resource: share * workers for resource, share in each.items()}
        nodes_wanted = selected_nodes(e.scaling.accelerator_type, e.scaling.label_selector)
        self._waiting = Waiting(self.display, ray_internals, wanted, available, nodes_wanted)
        self.interrupts.deferred = True  # signals are handled between two steps, never inside a call to Ray
        with ray_internals.WorkerOutput(lambda rank, message: None, self._said):
            reason = search.run(
                ray.tune.with_parameters(TrialProcess, shared=shared),
                name=_OF_TUNE,
                storage_path=self.storage.uri,
                resources=ray_internals.trial_resources(
                    bundle, workers, e.scaling.placement_strategy, e.scaling.label_selector
                ),
                limit=limit,
                between=self._between,
                drain_s=_DRAIN_S,
                drain_stopped_s=_DRAIN_STOPPED_S,
            )
        if reason != "finished":
            budget = duration(self.e.sweep.time_budget_s or 0)
            self._say_stopping(f"the time budget of {budget} (sweep.time_budget_s) is used up")
        return reason

    def _between(self, waits: bool) -> None:
        from raytrainer import ray_internals

        if self._stop_asked():
            self.interrupts.ask("stopped by request")
        if self.interrupts.requested:
            self._say_stopping(self.interrupts.reason)
        self.interrupts.check()
        self.lock.check()
        if part := ray_internals.dead_part():
            raise ClusterLost(f"Ray's {part} died")
        assert self._board is not None
        assert self._waiting is not None
        self._waiting.look(lambda: waits, time.monotonic())
        if not waits:
            self._board.tick()

    def _say_stopping(self, why: str) -> None:
        if self._stopping:
            return
        self._stopping = True
        running = sum(trial.status == "running" for trial in self.journal.trials.values())
        trials = f" {running} trial{'' if running == 1 else 's'}, which can continue from the last checkpoint"
        self.display.say(f"{why}: stopping{trials if running else ''}")

    def _fixed(self, gpu: bool) -> list[str]:
        """Return the overrides that every trial gets in addition to its config."""
        found = [f"scaling.use_gpu={str(gpu).lower()}", "tracking.log_model=false"]
        if self._ship:
            found.append(f"tracking.experiment_name={json.dumps(self.record.experiment_name, ensure_ascii=False)}")
        if self.e.checkpoint.min_interval_s is None:
            found.append(f"checkpoint.min_interval_s={_INTERVAL_S}")
        return found

    def _said(self, rank: int | None, line: str) -> None:
        self.logs.text_of("ray" if rank is None else "trials", line)

    def _adopt(self) -> None:
        """Give the uploader the unsent metrics of earlier attempts, for every trial that has an MLflow run. Otherwise
        those of a trial that this attempt never reaches would not be uploaded."""
        assert self._uploader is not None
        for trial in self.journal.trials.values():
            if trial.run_id is not None:
                spool = spool_of(self._trial_dir(trial))
                self._of_spool[spool] = trial.id
                if self._uploader.adopt(spool, trial.run_id):
                    self._known.add(trial.id)

    def _started(self, trial: Trial) -> None:
        self.journal.note_run(trial.id, self._open_trial(trial))
        if self._board is not None:
            self._board.start(trial)

    def _open_trial(self, trial: Trial) -> str:
        assert self._uploader is not None
        self.storage.check_there()
        spool = spool_of(self._trial_dir(trial))
        self._of_spool[spool] = trial.id
        self._known.add(trial.id)
        return self._uploader.open(
            spool,
            f"{self.record.name}.{trial.id}",
            params={_name(key): str(value) for key, value in trial.parameters.items()},
            tags={
                "raytrainer.name": f"{self.record.name}.{trial.id}",
                "raytrainer.kind": "trial",
                "raytrainer.sweep": self.record.name,
                "raytrainer.run_dir": self._trial_dir(trial).display,
                "raytrainer.overrides": " ".join(trial.overrides),
            },
            run_id=trial.run_id,
        )

    def _reported(self, trial: Trial) -> None:
        pass

    def _ended(self, trial: Trial) -> None:
        self._finish_run(trial)
        if self._board is not None:
            self._board.end(trial)
        self._retain(trial)

    def _finish_run(self, trial: Trial) -> None:
        assert self._uploader is not None
        if trial.id not in self._known:  # this attempt did not reach the trial
            self._open_trial(trial)
        best = trial.best(self.mode)
        tags: dict[str, str] = {"raytrainer.trial_status": trial.status}
        if trial.inherited:  # the overrides are no longer those of its start
            tags["raytrainer.overrides"] = " ".join(trial.overrides)
        metrics = {}
        if best is not None:
            tags |= {"raytrainer.best_value": repr(best.value), "raytrainer.best_step": str(best.step)}
            metrics[self._best_metric] = (best.value, best.step, best.time)
        texts = {}
        if trial.error is not None:
            with contextlib.suppress(StorageError):  # the cause is recorded in any case
                texts[ERROR] = self.storage.read_bytes(trial.error).decode(errors="replace")
        spool = spool_of(self._trial_dir(trial))
        self._uploader.finish(spool, _IN_MLFLOW[trial.status], trial.cause, tags=tags, metrics=metrics, texts=texts)

    def _retain(self, ended: Trial) -> None:
        """Keep the checkpoints of the best `sweep.num_to_keep` ended trials, and delete those of the others."""
        keep = self.e.sweep.num_to_keep
        if keep is None:
            return
        self._kept.append(ended)
        while len(self._kept) > keep:
            valued = ranked(self._kept, self.mode)
            worst = next((t for t in self._kept if t not in valued), None) or valued[-1]
            self._kept.remove(worst)
            self._tidy.submit(_delete_checkpoints, self._trial_dir(worst))
            self._gone.append(worst)
        while len(self._gone) > self._at_once + 1:
            self._tidy.submit(_delete_checkpoints, self._trial_dir(self._gone.pop(0)))

    def _trial_dir(self, trial: Trial) -> Storage:
        return self.storage.child(f"trials/{trial.id}")

    def _run_made(self, spool_dir: Path, run_id: str) -> None:
        """Record the MLflow run of a trial. The uploader's thread calls this when the run is created."""
        with contextlib.suppress(
            StorageError, AssertionError, KeyError
        ):  # the disk is full or the journal is closed; the run's tag has the id too
            self.journal.note_run(self._of_spool[spool_dir], run_id)

    # --- MLflow ---------------------------------------------------------------------------------------------------

    def _open_run(self) -> tracking.Run:
        origin = provenance.collect(self.argv, Path.cwd())
        self.storage.write_bytes(provenance.FILE, origin.to_json())
        record, plan = self.record, self.plan
        swept = {p.key.lstrip("+") for p in plan.parameters}
        tags = {
            **origin.tags(),
            "raytrainer.name": record.name,
            "raytrainer.kind": "sweep",
            "raytrainer.run_dir": record.run_dir,
            "raytrainer.where": self.where,
            "raytrainer.sweep.metric": plan.metric,
            "raytrainer.sweep.mode": plan.mode,
            **job_tags(record),
            **begin_tags(record),
            **{f"raytrainer.choice.{group}": choice for group, choice in plan.first.choices if group not in swept},
        }
        if record.attempts > 1:
            tags[f"raytrainer.resume.{record.attempts - 1}"] = " ".join(self.argv)
        params = {key: value for key, value in flattened(plan.first.text).items() if key not in swept}
        run = tracking.open_run(
            self._uri,
            record.experiment_name,
            record.name,
            params={**params, **{f"space/{_name(p.key)}": _described(p) for p in plan.parameters}},
            tags=tags,
            required=self.e.tracking.required,
            run_id=record.run_id,
            started=record.launched,
            spool_dir=self.spool_dir,
        )
        self.record = replace(self.record, run_id=run.run_id)
        self.record.write(self.storage)
        if run.offline:
            self._offline = run.run_id
        else:
            self._parent = run.run_id  # from now on, the child runs can be created
        suffix = "" if record.attempts == 1 else f"-{record.attempts}"
        run.log_text(plan.first.text, f"config{suffix}.yaml")
        if origin.patch:
            run.log_text(origin.patch, f"git{suffix}.patch")
        return run

    def _parent_run(self) -> str | None:
        """Return the sweep's MLflow run, or None. The uploader's thread calls this, and creates the run here if the
        server was unreachable at first."""
        if self._parent is None and self._offline is not None:
            try:
                tracking.replay(self.spool_dir, self._offline, self._uri, timeout_s=_MAKE_S)
            finally:
                self._parent = tracking.recorded_run_id(self.spool_dir)
        return self._parent

    def _stop_the_rest(self, error: BaseException | None) -> BaseException | None:
        """Mark running trials as stopped, also in MLflow, even if the journal cannot be written. A resume continues
        them. Return the error that ended the sweep, which may come from the journal."""
        cause = str(error) if error is not None else "the sweep's time budget is used up"
        for trial in self.journal.trials.values():
            if trial.status == "running":
                try:
                    self._record_last_evaluation(trial)
                    self.journal.end(trial.id, "stopped", cause)
                except StorageError as failed:
                    trial.status, trial.cause, trial.ended = "stopped", cause, time.time()
                    error = error or failed
                if trial.run_id is not None:
                    self._finish_run(trial)
        try:
            self.journal.save()
        except StorageError as failed:
            error = error or failed
        return error

    def _record_last_evaluation(self, trial: Trial) -> None:
        """Add the evaluation that a trial logged but could not report before it was stopped, so that the journal agrees
        with MLflow. A trial waits after each report, so there is at most one.

        Skipped for a scheduler that pauses trials, because the report would also have said which weights the trial
        copied; for `train/…`, which is logged more often than it is reported; and if the spool is on another machine.
        """
        key = metric_key(self.plan.metric)
        if self._may_pause or key.startswith("train/"):
            return
        logged = None
        with contextlib.suppress(StorageError):  # the spool is a copy, so a damaged one must not fail the sweep
            logged = last_logged(Spool(spool_of(self._trial_dir(trial))), key)
        if logged is None:
            return
        at, step, metrics = logged
        last = trial.reports[-1] if trial.reports else None
        if last is None or step > last.step:
            number = 1 if last is None else last.evaluation + 1
            self.journal.report(trial.id, Report(number, step, metrics[key], metrics, at))

    def _close(self, opening: Future[tracking.Run], outcome: SweepOutcome) -> SweepOutcome:
        # The user waits for a stopped sweep to end. Metrics that are not uploaded in that time stay in the spools.
        stopped = outcome.status == "KILLED"
        patience = _CLOSE_STOPPED_S if stopped else _CLOSE_S
        assert self._uploader is not None
        with contextlib.suppress(StorageError):  # pickles that nothing reads
            self.storage.delete(_OF_TUNE)
        if outcome.trials:
            writing = in_background(lambda: self._write_results(outcome), "sweep-results")
            try:
                writing.result(_DRAW_STOPPED_S if stopped else None)
            except TimeoutError:
                self.display.say("warning: not all result files were written in time")
        outcome = replace(outcome, weights=self._weights(outcome.trials))
        run = self._opened(opening, stopped)
        if run is not None:
            if stopped:
                run.set_timeout(patience)
            for tell in (self._tell_end, self._tell_files):
                try:
                    tell(run, outcome)
                except (RaytrainerError, OSError) as failed:  # the rest is sent in any case
                    self.display.say(
                        f"warning: could not upload everything to MLflow: {type(failed).__name__}: {failed}"
                    )
        done = self._uploader.close(patience if run is not None or opening.done() else 0.0)
        if run is None:
            return outcome
        self.record = record = self.record.closed(outcome.status, time.time(), outcome.cause)
        try:
            told = run.finish(
                outcome.status, outcome.cause, tags=end_tags(record), ended=record.ended, timeout_s=patience
            )
            done = told and done
        except (RaytrainerError, OSError) as failed:
            self.display.say(f"warning: could not send the final status to MLflow: {type(failed).__name__}: {failed}")
        if not done:
            self.display.say(
                f"Could not upload everything to MLflow. Unsent metrics are in {self.storage.uri}; resume uploads them."
            )
        if run.offline and (made := tracking.recorded_run_id(self.spool_dir)):
            self.record = replace(self.record, run_id=made)
        command = run.ui_command and f"{provenance.interpreter()} -m {run.ui_command}"
        return replace(outcome, mlflow=run.url, mlflow_command=command)

    def _opened(self, opening: Future[tracking.Run], stopped: bool) -> tracking.Run | None:
        """Return the sweep's MLflow run; None if it could not be opened in time."""
        # A store on a disk may be slow but never hangs. If it created the run after this timeout, it would stay
        # RUNNING.
        hangs = self._uri.startswith(("http://", "https://"))
        try:
            return opening.result(timeout=_CLOSE_STOPPED_S if stopped and hangs else _OPEN_S)
        except TimeoutError:
            self.display.say("warning: MLflow does not answer; resume uploads the sweep's outcome")
        except (RaytrainerError, OSError) as failed:
            if not self.e.tracking.required:  # otherwise the outcome shows it
                self.display.say(f"warning: the sweep has no run in MLflow: {type(failed).__name__}: {failed}")
        return None

    def _tell_end(self, run: tracking.Run, outcome: SweepOutcome) -> None:
        tags: dict[str, str] = {"raytrainer.exit_code": str(outcome.exit_code), **_counted(outcome.trials)}
        if best := ranked(outcome.trials, self.mode)[:1]:
            report = best[0].best(self.mode)
            assert report is not None
            tags |= {
                "raytrainer.best_trial": best[0].id,
                "raytrainer.best_value": repr(report.value),
                "raytrainer.best_step": str(report.step),
                "raytrainer.best_overrides": " ".join(best[0].overrides),
            }
            # The step is the number of trials, which grows with each attempt.
            run.log_metrics({self._best_metric: report.value}, len(outcome.trials), report.time)
        run.set_tags(tags)

    def _tell_files(self, run: tracking.Run, outcome: SweepOutcome) -> None:
        self.logs.mark("ray_down")
        self.logs.write_marks()
        run.log_artifact(self.logs.folder)
        if outcome.trials:
            with results.as_folder(self.storage) as folder:
                run.log_artifact(folder)

    def _weights(self, trials: Sequence[Trial]) -> str | None:
        """Return as text where the best trial's weights are. They belong to another step than the best value only if
        the process was killed before it wrote the weights that were in memory."""
        from raytrainer.checkpoint import Checkpointer

        for trial in ranked(trials, self.mode)[:1]:
            report, c = trial.best(self.mode), self.e.checkpoint
            assert report is not None
            try:
                checkpoints = Checkpointer(self._trial_dir(trial).child("checkpoints"), mode=self.mode)
                found, best = checkpoints.list(), checkpoints.best()
            except RaytrainerError as error:
                return f"cannot be read: {error}"
            exact = [info for info in (best, *found) if info is not None and info.step == report.step]
            if exact:
                return exact[0].path
            if found:
                info = best or found[-1]
                apart = _INTERVAL_S if c.min_interval_s is None else c.min_interval_s
                return (
                    f"of step {info.step}: the trial was stopped before those of step {report.step} were written, since "
                    f"checkpoints are at least {apart:g} s apart (checkpoint.min_interval_s): {info.path}"
                )
        return None

    def _write_results(self, outcome: SweepOutcome) -> None:
        try:
            results.write(
                self.storage,
                trials=outcome.trials,
                plan=self.plan,
                metric=self.plan.metric,
                mode=self.mode,
            )
        except Exception as error:  # noqa: BLE001  drawing may fail in many ways; the journal has the results
            self.logs.text_of("driver", "".join(traceback.format_exception(error)))
            self.display.say(f"warning: could not write all result files: {type(error).__name__}: {error}")

    # --- the end --------------------------------------------------------------------------------------------------

    def _outcome(self, reason: str | None, error: BaseException | None) -> SweepOutcome:
        trials = list(self.journal.trials.values())
        base = SweepOutcome("FINISHED", 0, self.record, self.where, self.plan, trials)
        if self.interrupts.requested:
            code = self.interrupts.exit_code or 130
            return replace(base, status="KILLED", exit_code=code, cause=self.interrupts.reason)
        if error is not None:
            if type(error).__module__.partition(".")[0] == "ray":
                error = ClusterLost(f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            trace = error.traceback if isinstance(error, WorkerError) else None
            found = " ".join(str(error).split())[:500]  # errors of other libraries may have many lines
            cause = str(error) if isinstance(error, RaytrainerError) else f"{type(error).__name__}: {found}"
            non_retryable = isinstance(error, ConfigError)
            return replace(
                base, status="FAILED", exit_code=1, cause=cause, traceback=trace, resumable=not non_retryable
            )
        note = None if reason == "finished" else f"{reason} reached"
        failed = [t for t in trials if t.status == "failed"]
        allowed = self.e.sweep.allow_failed
        most = len(failed) if allowed is True else int(allowed)
        if not any(t.status == "finished" and t.best(self.mode) is not None for t in trials):
            return replace(base, status="FAILED", exit_code=1, cause=self._why_none(trials, reason), note=note)
        if len(failed) > most:
            why = f"{len(failed)} of {len(trials)} trials failed, and sweep.allow_failed={str(allowed).lower()}"
            return replace(base, status="FAILED", exit_code=1, cause=why, note=note)
        return replace(base, note=note)

    def _why_none(self, trials: Sequence[Trial], reason: str | None) -> str:
        """Return as text why no trial has finished with a value."""
        failed = [t for t in trials if t.status == "failed"]
        if failed:
            return f"no trial finished: {len(failed)} of {len(trials)} failed, the first by {failed[0].cause}"
        if any(t.status == "finished" for t in trials):
            return f"no trial has a value of {self.plan.metric} that is a number"
        if reason != "finished":
            budget = duration(self.e.sweep.time_budget_s or 0)
            return f"the time budget of {budget} (sweep.time_budget_s) ended before any trial finished"
        return "no trial finished: all were pruned" if trials else "no trial was sampled"


def at_once(asked: int | None, fit: int, *, grows: bool = False) -> tuple[int, str | None]:
    """Return how many trials run at a time, and a note for the user if that differs from the setting.

    Args:
        asked: `sweep.max_concurrent_trials`.
        fit: How many trials the cluster can place. More would only wait.
        grows: Whether the cluster can grow beyond its known size.
    """
    if asked is None or (asked > fit and not grows):
        note = None if asked is None else f"sweep.max_concurrent_trials={asked}: there is room for {fit} at a time"
        return fit, note
    return asked, None


def may_change(plan: Plan) -> Callable[[str], bool]:
    """Return a function that says whether a parameter may change during a trial, as in population based training."""

    def may(key: str) -> bool:
        key = key.lstrip("+")
        if changes_meaning(key):
            return False
        nodes = (
            [c.experiment.lr_scheduler for c in plan.compositions.values()] if key.startswith("lr_scheduler.") else []
        )
        # A scheduler with an optimizer has a state, which would restore the old values.
        return not any(node and "optimizer" in parameters_of("lr_scheduler", node) for node in nodes)

    return may


def _name(key: str) -> str:
    """Return a parameter's key with the characters that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", key.lstrip("+"))


def _described(p: Parameter) -> str:
    if p.kind == "choice":
        return ", ".join(p.texts)
    return f"{p.kind} {p.low!r} to {p.high!r}{', log' if p.log else ''}{', integers' if p.integer else ''}"


def _counted(trials: Sequence[Trial]) -> dict[str, str]:
    counts = Counter[str](t.status for t in trials)
    return {f"raytrainer.trials.{status}": str(count) for status, count in counts.items()}


def _delete_checkpoints(place: Storage) -> None:
    try:
        place.delete("checkpoints")
    except StorageError as error:
        _log.warning("the checkpoints of a trial could not be deleted: %s", error)
