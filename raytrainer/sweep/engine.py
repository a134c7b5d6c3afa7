"""The loop of a sweep: Ray Tune decides about the trials, the journal records them, and a listener is notified.
It depends neither on experiments nor on MLflow, so it also runs the trials of any other Hydra application."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import TrialScheduler

from raytrainer import ray_internals
from raytrainer.config import Parameter, SweepConfig
from raytrainer.errors import ConfigError
from raytrainer.sweep import schedule, search
from raytrainer.sweep.journal import Mode, Report, Trial, TrialJournal
from raytrainer.sweep.suggestions import Suggestions, warm_start
from raytrainer.sweep.trial_state import Status, TrialEnd, end_by_result

TUNE_FOLDER = "tune"  # in the sweep's directory: checkpoints of paused and copied trials, which nothing else reads
_LONGEST = 500  # characters of a cause; the file in the trial's directory has the whole text

_SECONDS = "time_this_iter_s"  # key in Tune's results: the duration of the iteration


@dataclass(frozen=True)
class Listener:
    """Callbacks for the events of trials. They run in the driver's thread, between two decisions of Tune.

    Attributes:
        start: A trial was sampled, or continues. The callback opens its MLflow run.
        end: The trial has ended and will not continue.
        say: Shows a line to the user.
    """

    start: Callable[[Trial], None]
    end: Callable[[Trial], None]
    say: Callable[[str], None]


class Search:
    """The searcher, the scheduler and the loop of one attempt of a sweep.

    Args:
        config: The section `sweep`.
        scheduler: The scheduler that was made from it. It decides about the trials of this attempt only.
        parameters: The search space.
        mode: The mode of the objective.
        seed: The seed for sampling if `config.seed` is null.
        journal: The journal with the earlier attempts; this attempt appends to it.
        overrides_of: Returns the overrides that set given parameters.
        listener: The callbacks.
        needs_value: Whether a trial counts as failed if all of its values are NaN or infinite.

    Attributes:
        total: The number of trials; None if it is not limited.
        notes: Lines about what a resumed sweep cannot restore and how many trials there are.

    Raises:
        ConfigError: The searcher cannot be built, or does not support the parameters.
    """

    def __init__(
        self,
        config: SweepConfig,
        scheduler: TrialScheduler,
        *,
        parameters: Sequence[Parameter],
        mode: Mode,
        seed: int,
        journal: TrialJournal,
        overrides_of: Callable[[Mapping[str, Any]], list[str]],
        listener: Listener,
        needs_value: bool = False,
    ) -> None:
        self._config, self._scheduler, self._parameters, self._mode = config, scheduler, list(parameters), mode
        self._journal, self._overrides_of, self._listener = journal, overrides_of, listener
        self._needs_value = needs_value
        trials = list(journal.trials.values())
        seed = seed if config.seed is None else config.seed
        distinct = not schedule.changes_parameters(config.scheduler)
        searcher = search.make_search(config.search_alg, parameters, seed=seed, sampled=len(trials), distinct=distinct)
        self.total = search.total_of(config.search_alg, parameters, config.num_samples, distinct=distinct)
        notes = (warm_start(searcher, trials, mode), schedule.replay(scheduler, trials, mode)) if trials else ()
        self.notes = [note for note in notes if note is not None]
        if self.total is not None and config.num_samples is not None and self.total < config.num_samples:
            self.notes.append(
                f"sweep.num_samples={config.num_samples} is more than there are combinations: each of the {self.total} "
                "is run once"
            )
        self._suggestions = Suggestions(
            searcher,
            mode=mode,
            total=self.total,
            journal=journal,
            overrides_of=overrides_of,
            on_suggest=listener.start,
        )
        self._deaths: dict[str, tuple[str, str]] = {}  # Tune's id of a trial → cause and traceback of its last death
        self._non_retryable: ConfigError | None = None  # an error that every other trial would raise too

    def run(
        self,
        trainable: type,
        *,
        storage_path: str,
        resources: Any,
        limit: int,
        between: Callable[[bool], None],
        drain_s: float = 0.0,
        drain_stopped_s: float = 0.0,
    ) -> str:
        """Run trials until all have ended or the time is over. Return `finished` or `time budget`.

        Args:
            trainable: As for `ray_internals.make_controller`.
            storage_path: The sweep's directory. Below it, Tune writes the checkpoints that a scheduler needs.
            resources: The resources of a trial.
            limit: The maximum number of concurrent trials.
            between: Called several times a second, between two decisions. Its argument says whether all trials wait for
                resources. If it raises, the sweep ends and all trial processes are killed.
            drain_s: How long the trial processes may still write and upload when all trials have ended, in seconds.
            drain_stopped_s: The same when the time budget is over and trials are stopped at their next evaluation.

        Raises:
            ConfigError: A trial failed with an error that every other trial would raise too.
            Exception: Whatever the journal, the listener, the searcher or the scheduler raised, unchanged.
        """
        controller = ray_internals.make_controller(
            trainable,
            searcher=self._suggestions,
            scheduler=self._scheduler,
            mode=self._mode,
            events=_Events(self),
            settings=ray_internals.TrialSettings(
                TUNE_FOLDER, storage_path, resources, limit=limit, max_failures=self._config.max_trial_failures
            ),
        )
        budget, began = self._config.time_budget_s, time.monotonic()
        try:
            while not controller.is_finished():
                between(controller.waits)
                if budget is not None and time.monotonic() - began >= budget:
                    if drain_stopped_s:
                        controller.drain(drain_stopped_s)
                    return "time budget"
                controller.step()
                if self._non_retryable is not None:
                    raise self._non_retryable
            if drain_s:
                controller.drain(drain_s)
            return "finished"
        finally:
            controller.abandon()

    # --- events of Tune -------------------------------------------------------------------------------------------

    def trial_of(self, tune_id: str) -> Trial | None:
        trial_id = self._suggestions.trial_of(tune_id)
        return None if trial_id is None else self._journal.trials[trial_id]

    def reported(self, trial: Trial, result: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """Record a result in the journal. If the trial has copied another trial, that is recorded first."""
        if "report" not in result:
            return
        report = json.loads(result["report"])
        if inherited := report.get("inherited"):
            own = {p.key: parameters[p.key] for p in self._parameters if p.key in parameters}
            self._journal.inherit(trial.id, inherited["from"], inherited["evaluation"], own, self._overrides_of(own))
        self._journal.report(
            trial.id,
            Report(
                evaluation=report["evaluation"],
                step=report["step"],
                value=report["value"],
                metrics=report["metrics"],
                time=time.time(),
                interim=bool(report.get("interim")),
                seconds=result.get(_SECONDS),
            ),
        )

    def ended(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Record the end of a trial that is complete or that Tune has stopped."""
        end = end_by_result(
            result,
            [report.value for report in trial.reports],
            full_length=schedule.is_full_length(self._scheduler, result.get(schedule.TIME, 0)),
            needs_value=self._needs_value,
        )
        self._end(trial, end)
        if end.non_retryable:
            self._non_retryable = ConfigError((end.cause or "").partition(": ")[2])

    def failed(self, trial: Trial, tune_id: str) -> None:
        """Record the failure of a trial whose process died or raised and is not restarted."""
        cause, trace = self._deaths.get(tune_id, ("its process died", None))
        self._end(trial, TrialEnd(Status.FAILED, cause, trace))

    def recovered(self, trial: Trial, tune_id: str) -> None:
        cause, _ = self._deaths[tune_id]
        self._listener.say(f"trial {trial.id}: {_line(cause)}; retrying")

    def _end(self, trial: Trial, end: TrialEnd) -> None:
        cause = None if end.cause is None else _line(end.cause)
        self._journal.end(trial.id, end.status, cause, trace=end.traceback if end.status is Status.FAILED else None)
        self._listener.end(trial)

    def died(self, tune_id: str, cause: str, trace: str) -> None:
        """Remember why the process of a trial died. `failed` or `recovered` follows."""
        self._deaths[tune_id] = cause, trace

    def replaced(self, cause: str) -> None:
        self._listener.say(f"{cause}; the next trial gets another process")


def _line(text: str) -> str:
    """Return a text on one line, cut to 500 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


class _Events(ray_internals.TrialEvents):
    """Translates Tune's events into calls on `Search` with our trials."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if (own := self._search.trial_of(trial.trial_id)) is not None:
            self._search.reported(own, result, trial.config)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if (own := self._search.trial_of(trial.trial_id)) is not None:
            self._search.ended(own, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if (own := self._search.trial_of(trial.trial_id)) is not None:
            self._search.failed(own, trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if (own := self._search.trial_of(trial.trial_id)) is not None:
            self._search.recovered(own, trial.trial_id)

    def on_death(self, trial_id: str, cause: str, text: str) -> None:
        self._search.died(trial_id, cause, text)

    def on_replaced(self, cause: str) -> None:
        self._search.replaced(cause)
