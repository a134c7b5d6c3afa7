"""The driver of a sweep: what one attempt of it runs, records and uploads. `attempt.lifecycle` calls it."""

from __future__ import annotations

import contextlib
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from raytrainer import preflight, tracking
from raytrainer.attempt.lifecycle import CLOSE_STOPPED_S, Attempt
from raytrainer.attempt.session import ray_session
from raytrainer.attempt.waiting import Waiting, selected_nodes
from raytrainer.attempt.work import TrackedRun, Work
from raytrainer.core.background import in_background
from raytrainer.core.interrupts import Interrupted
from raytrainer.errors import StorageError
from raytrainer.progress import duration
from raytrainer.storage import Storage
from raytrainer.sweep import results
from raytrainer.sweep.best_weights import TrialRetention, best_weights
from raytrainer.sweep.board import Board
from raytrainer.sweep.journal import Mode, Trial, TrialJournal
from raytrainer.sweep.outcome import SweepOutcome, make_outcome
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.recovery import record_exploits, record_last_evaluation
from raytrainer.sweep.room import make_room
from raytrainer.sweep.sweep_run import tracked_run, upload_tags
from raytrainer.sweep.trial_runs import TrialRuns
from raytrainer.sweep.trial_state import Status

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


# Time for the trial processes after the last trial. They write best weights that are only in memory, and upload their
# metrics if the driver does not.
_DRAIN_S, _DRAIN_STOPPED_S = 10.0, 3.0
_DRAW_STOPPED_S = 3.0  # time for the pictures of a stopped sweep


class SweepDriver(Work[str, SweepOutcome]):
    """The work of one attempt of a sweep. Its result is `finished` or the limit that ended the sweep.

    Args:
        plan: The sweep.
        attempt: The attempt.
        journal: The journal, after its `begin`.
        scheduler: The scheduler of this attempt.
    """

    closing_s = 60.0

    def __init__(self, plan: Plan, attempt: Attempt, journal: TrialJournal, scheduler: TrialScheduler) -> None:
        self.plan, self.e, self.attempt, self.journal = plan, plan.experiment, attempt, journal
        self.mode, self._scheduler = cast(Mode, plan.mode), scheduler
        self._where = attempt.where
        self._at_once = 1  # the maximum number of concurrent trials
        self._stop_announced = False
        # This process sends the spools on this machine. Trial processes on other machines upload their own.
        self._trials_upload = not (attempt.storage.is_local or self.e.backend.location == "here")
        self._runs: TrialRuns | None = None
        self._board: Board | None = None
        self._waiting: Waiting | None = None
        self._retention = TrialRetention(attempt.storage, self.e.sweep.num_to_keep, self.mode, self._ended_trials())

    def tracked_run(self) -> TrackedRun:
        return tracked_run(self.plan, self.attempt.argv)

    # --- the trials -----------------------------------------------------------------------------------------------

    def execute(self) -> str:
        attempt = self.attempt
        attempt.interrupts.deferred = True  # the thread that starts here must be ended in `upload`
        self._runs = TrialRuns(
            attempt,
            self.journal,
            metric=self.plan.metric,
            mode=self.mode,
            trials_upload=self._trials_upload,
        )
        self._runs.adopt_unsent()
        attempt.interrupts.deferred = False
        try:
            attempt.interrupts.check()
            record_exploits(self.journal, attempt.storage, self.plan)
            with ray_session(self.e, attempt.interrupts, all_of_it=True) as available:
                attempt.ray_is_up()
                attempt.begin_work()
                attempt.interrupts.check()
                reason = self._search(available)
        except Interrupted:
            self._announce_stop(attempt.interrupts.reason)
            raise
        if reason != "finished":
            budget = duration(self.e.sweep.time_budget_s or 0)
            self._announce_stop(f"the time budget of {budget} (sweep.time_budget_s) is used up")
        return reason

    def _search(self, available: preflight.Resources) -> str:
        import ray

        from raytrainer import ray_internals
        from raytrainer.sweep.engine import Listener, Search
        from raytrainer.sweep.schedule import pauses
        from raytrainer.sweep.trial import TrialProcess, make_shared

        attempt, e = self.attempt, self.e
        gpu = preflight.uses_gpu(e, available)
        search = Search(
            e.sweep,
            self._scheduler,
            parameters=self.plan.parameters,
            mode=self.mode,
            seed=e.seed,
            journal=self.journal,
            overrides_of=self.plan.overrides_of,
            listener=Listener(self._trial_started, self._trial_ended, attempt.display.say),
            needs_value=True,
        )
        room = make_room(e, gpu=gpu, available=available)
        self._at_once = room.at_once
        self._where = f"{attempt.where}, {room.at_once} trial{'' if room.at_once == 1 else 's'} at a time"
        for note in (*room.notes, *search.notes):
            attempt.display.say(note)
        shared = make_shared(
            self.plan,
            attempt.record,
            attempt.storage,
            tracking_uri=attempt.tracking_uri,
            trials_upload=self._trials_upload,
            gpu=gpu,
            scheduler_pauses=pauses(self._scheduler),
        )
        self._board = self._make_board(search.total)
        wanted = {resource: share * shared.workers for resource, share in shared.resources.items()}
        nodes_wanted = selected_nodes(e.scaling.accelerator_type, e.scaling.label_selector)
        self._waiting = Waiting(attempt.display, ray_internals, wanted, available, nodes_wanted)
        attempt.interrupts.deferred = True  # signals are handled between two steps, never inside a call to Ray
        with ray_internals.WorkerOutput(lambda rank, message: None, self._log_line):
            return search.run(
                ray.tune.with_parameters(TrialProcess, shared=shared),
                storage_path=attempt.storage.uri,
                resources=room.resources,
                limit=self._at_once,
                between=self._between_steps,
                drain_s=_DRAIN_S,
                drain_stopped_s=_DRAIN_STOPPED_S,
            )

    def _make_board(self, total: int | None) -> Board:
        return Board(
            self.attempt.display,
            self.attempt.record.name,
            metric=self.plan.metric,
            mode=self.mode,
            keys=[p.key for p in self.plan.parameters],
            total=total,
            at_once=self._at_once,
            trials=self._ended_trials(),
            time_budget_s=self.e.sweep.time_budget_s,
        )

    def _between_steps(self, waits: bool) -> None:
        attempt = self.attempt
        attempt.stop_requested()
        if attempt.interrupts.requested:
            self._announce_stop(attempt.interrupts.reason)
        attempt.interrupts.check()
        attempt.check_alive()
        assert self._waiting is not None
        assert self._board is not None
        self._waiting.look(lambda: waits, time.monotonic())
        if not waits:
            self._board.tick()

    def _announce_stop(self, why: str) -> None:
        """Say once why the sweep stops. It is said before the trial processes are ended, which takes seconds."""
        if self._stop_announced:
            return
        self._stop_announced = True
        running = sum(trial.status is Status.RUNNING for trial in self.journal.trials.values())
        trials = f" {running} trial{'' if running == 1 else 's'}, which can continue from the last checkpoint"
        self.attempt.display.say(f"{why}: stopping{trials if running else ''}")

    def _log_line(self, rank: int | None, line: str) -> None:
        self.attempt.logs.text_of("ray" if rank is None else "trials", line)

    def _trial_started(self, trial: Trial) -> None:
        assert self._runs is not None
        self.journal.note_run(trial.id, self._runs.open(trial))
        if self._board is not None:
            self._board.start(trial)

    def _trial_ended(self, trial: Trial) -> None:
        assert self._runs is not None
        self._runs.finish(trial)
        if self._board is not None:
            self._board.end(trial)
        self._retention.end(trial, self._at_once)

    def _directory(self, trial: Trial) -> Storage:
        return self.attempt.storage.child(f"trials/{trial.id}")

    def _ended_trials(self) -> list[Trial]:
        return [trial for trial in self.journal.trials.values() if not trial.status.is_open]

    # --- the end --------------------------------------------------------------------------------------------------

    def end_open_work(self, error: BaseException | None) -> BaseException | None:
        """Mark running trials as stopped, also in MLflow, even if the journal cannot be written. A resume continues
        them."""
        from raytrainer.sweep.schedule import pauses

        cause = str(error) if error is not None else "the sweep's time budget is used up"
        for trial in self.journal.trials.values():
            if trial.status is not Status.RUNNING:
                continue
            try:
                if not pauses(self._scheduler):
                    record_last_evaluation(self.journal, trial, self._directory(trial), self.plan.metric)
                self.journal.end(trial.id, Status.STOPPED, cause)
            except StorageError as failed:
                trial.status, trial.cause, trial.ended = Status.STOPPED, cause, time.time()
                error = error or failed
            if trial.run_id is not None and self._runs is not None:
                self._runs.finish(trial)
        try:
            self.journal.save()
        except StorageError as failed:
            error = error or failed
        return error

    def outcome(self, result: str | None, error: BaseException | None) -> SweepOutcome:
        attempt, trials = self.attempt, list(self.journal.trials.values())
        outcome = SweepOutcome("FINISHED", 0, attempt.record, self._where, self.plan, trials)
        return attempt.killed(outcome) if attempt.interrupts.requested else make_outcome(outcome, result, error)

    def write_files(self, outcome: SweepOutcome) -> SweepOutcome:
        from raytrainer.sweep.engine import TUNE_FOLDER

        storage = self.attempt.storage
        with contextlib.suppress(StorageError):  # pickles that nothing reads
            storage.delete(TUNE_FOLDER)
        if outcome.trials:
            writing = in_background(lambda: self._write_results(outcome), "sweep-results")
            try:
                writing.result(_DRAW_STOPPED_S if outcome.status == "KILLED" else None)
            except TimeoutError:
                self.attempt.display.say("warning: not all result files were written in time")
        interval_s = self.e.checkpoint.min_interval_s
        weights = best_weights(storage, outcome.trials, self.mode, min_interval_s=interval_s)
        return replace(outcome, weights=weights)

    def _write_results(self, outcome: SweepOutcome) -> None:
        try:
            results.write(self.attempt.storage, trials=outcome.trials, plan=self.plan)
        except Exception as error:  # noqa: BLE001  drawing may fail in many ways; the journal has the results
            self.attempt.logs.text_of("driver", "".join(traceback.format_exception(error)))
            self.attempt.display.say(f"warning: could not write all result files: {type(error).__name__}: {error}")

    def opening_timeout(self, outcome: SweepOutcome) -> float:
        # A store on a disk may be slow but never hangs, and a server that hangs is not waited for.
        hangs = self.attempt.tracking_uri.startswith(("http://", "https://"))
        return CLOSE_STOPPED_S if hangs and outcome.status == "KILLED" else super().opening_timeout(outcome)

    def upload(self, run: tracking.Run | None, outcome: SweepOutcome, timeout_s: float) -> bool:
        attempt = self.attempt
        if run is not None:
            if outcome.status == "KILLED":
                run.set_timeout(timeout_s)
            with attempt.warning():
                upload_tags(run, outcome)
            with attempt.warning():
                attempt.upload_logs(run)
                if outcome.trials:
                    with results.as_folder(attempt.storage) as folder:
                        run.log_artifact(folder)
        return self._runs is None or self._runs.close(0.0 if run is None and attempt.is_opening else timeout_s)

    def close(self, outcome: SweepOutcome) -> None:
        self._retention.close(wait=outcome.status != "KILLED")
        try:
            self.journal.close()
        except StorageError as failed:
            self.attempt.display.say(f"warning: could not write the final status to the sweep's record: {failed}")
