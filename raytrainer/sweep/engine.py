"""The loop of a sweep: Ray Tune decides about the trials, the journal records them, and a listener is notified.
It depends neither on experiments nor on MLflow, so it also runs the trials of any other Hydra application."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrainer import ray_internals
from raytrainer.config import Parameter, SweepConfig
from raytrainer.errors import ConfigError
from raytrainer.sweep import schedule, search
from raytrainer.sweep.journal import Mode, Report, Status, Trial, TrialJournal
from raytrainer.sweep.suggestions import Suggestions, warm_start

_LONGEST = 500  # characters of a cause; the file in the trial's directory has the whole text

_SECONDS = "time_this_iter_s"  # key in Tune's results: the duration of the iteration


@dataclass(frozen=True)
class Listener:
    """Callbacks for the events of trials. They run in the driver's thread, between two decisions of Tune.

    Attributes:
        start: A trial was sampled, or continues. The callback opens its MLflow run.
        report: The trial has reported.
        end: The trial has ended and will not continue.
        say: Shows a line to the user.
    """

    start: Callable[[Trial], None]
    report: Callable[[Trial], None]
    end: Callable[[Trial], None]
    say: Callable[[str], None]


class Search:
    """The searcher, the scheduler and the loop of one attempt of a sweep.

    Args:
        config: The section `sweep`.
        parameters: The search space.
        mode: The mode of the objective.
        seed: The seed for sampling if `config.seed` is null.
        evaluations: The number of reports of a trial; None if it is unknown.
        journal: The journal with the earlier attempts; this attempt appends to it.
        overrides_of: Returns the overrides that set given parameters.
        may_change: Whether a key may change in the middle of a trial.
        listener: The callbacks.
        needs_value: Whether a trial counts as failed if all of its values are NaN or infinite.

    Raises:
        ConfigError: The searcher or scheduler cannot be built, or does not support the parameters.
    """

    def __init__(
        self,
        config: SweepConfig,
        *,
        parameters: Sequence[Parameter],
        mode: Mode,
        seed: int,
        evaluations: int | None,
        journal: TrialJournal,
        overrides_of: Callable[[Mapping[str, Any]], list[str]],
        may_change: Callable[[str], bool],
        listener: Listener,
        needs_value: bool = False,
    ) -> None:
        self._config, self._parameters, self._mode = config, list(parameters), mode
        self._journal, self._overrides_of, self._listener = journal, overrides_of, listener
        self._needs_value = needs_value
        trials = list(journal.trials.values())
        seed = seed if config.seed is None else config.seed
        distinct = not schedule.changes_parameters(config.scheduler)
        inner = search.make_search(config.search_alg, parameters, seed=seed, sampled=len(trials), distinct=distinct)
        self.total = search.total_of(config.search_alg, parameters, config.num_samples, distinct=distinct)
        self.scheduler = schedule.make_scheduler(
            config.scheduler,
            parameters,
            mode=mode,
            evaluations=evaluations,
            may_change=may_change,
            search=config.search_alg,
        )
        notes = (warm_start(inner, trials, mode), schedule.replay(self.scheduler, trials, mode)) if trials else ()
        self.notes = [note for note in notes if note is not None]
        if self.total is not None and config.num_samples is not None and self.total < config.num_samples:
            self.notes.append(
                f"sweep.num_samples={config.num_samples} is more than there are combinations: each of the {self.total} "
                "is run once"
            )
        self._suggestions = Suggestions(
            inner,
            mode=mode,
            total=self.total,
            journal=journal,
            overrides_of=overrides_of,
            on_suggest=self._started,
        )
        self._deaths: dict[str, tuple[str, str]] = {}
        self._hopeless: ConfigError | None = None

    def run(
        self,
        trainable: type,
        *,
        name: str,
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
            name, storage_path: Where Tune writes the checkpoints that a scheduler needs.
            resources: The resources of a trial.
            limit: The maximum number of concurrent trials.
            between: Called several times a second, between two decisions. Its argument says whether all trials wait for
                resources. If it raises, the sweep ends and all trial processes are killed.
            drain_s: How long the trial processes may still write and upload when all trials have ended, in seconds.
            drain_stopped_s: The same when the time budget is over and trials are stopped at their next evaluation.

        Raises:
            ConfigError: A trial failed with an error that every other trial would raise too, or the scheduler needs a
                number of trials and there is none.
            Exception: Whatever the journal, the listener, the searcher or the scheduler raised, unchanged.
        """
        schedule.check_bounded(self.scheduler, self._config.search_alg, self._config.num_samples)
        controller = ray_internals.make_controller(
            trainable,
            searcher=self._suggestions,
            scheduler=self.scheduler,
            mode=self._mode,
            events=_Events(self),
            settings=ray_internals.TrialSettings(
                name, storage_path, resources, limit=limit, max_failures=self._config.max_trial_failures
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
                if self._hopeless is not None:
                    raise self._hopeless
            if drain_s:
                controller.drain(drain_s)
            return "finished"
        finally:
            controller.abandon()

    # --- events of Tune -------------------------------------------------------------------------------------------

    def trial_of(self, tune_id: str) -> Trial | None:
        found = self._suggestions.trial_of(tune_id)
        return None if found is None else self._journal.trials[found]

    def _started(self, trial: Trial) -> None:
        self._listener.start(trial)

    def reported(self, trial: Trial, result: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """Record a result in the journal. If the trial has copied another trial, that is recorded first."""
        if "report" not in result:
            return
        found = json.loads(result["report"])
        if inherited := found.get("inherited"):
            own = {p.key: parameters[p.key] for p in self._parameters if p.key in parameters}
            self._journal.inherit(trial.id, inherited["from"], inherited["evaluation"], own, self._overrides_of(own))
        report = Report(
            evaluation=found["evaluation"],
            step=found["step"],
            value=found["value"],
            metrics=found["metrics"],
            time=time.time(),
            interim=bool(found.get("interim")),
            seconds=result.get(_SECONDS),
        )
        self._journal.report(trial.id, report)
        self._listener.report(trial)

    def ended(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Record the end of a trial that is complete or that Tune has stopped."""
        if "end" in result:
            end: dict[str, Any] = json.loads(result["end"])
        else:  # Tune stopped it because it was worse than others, or because it reached the full length of a trial
            old = schedule.is_full_length(self.scheduler, result.get(schedule.TIME, 0))
            end = {"status": "finished" if old else "pruned"}
        values = [report.value for report in trial.reports]
        if self._needs_value and end["status"] != "failed" and values and not any(map(math.isfinite, values)):
            end = {"status": "failed", "cause": f"diverged: all of its {len(values)} values are nan or infinite"}
        self._end(trial, end["status"], end.get("cause"), end.get("traceback"))
        if end.get("non_retryable"):
            self._hopeless = ConfigError(end["cause"].partition(": ")[2])

    def failed(self, trial: Trial, tune_id: str) -> None:
        """Record the failure of a trial whose process died or raised and is not restarted."""
        self._end(trial, "failed", *self._deaths.get(tune_id, ("its process died",)))

    def recovered(self, trial: Trial, tune_id: str) -> None:
        cause, _ = self._deaths[tune_id]
        self._listener.say(f"trial {trial.id}: {_line(cause)}; retrying")

    def _end(self, trial: Trial, status: Status, cause: str | None, trace: str | None = None) -> None:
        cause = None if cause is None else _line(cause)
        self._journal.end(trial.id, status, cause, trace=trace if status == "failed" else None)
        self._listener.end(trial)

    def died(self, tune_id: str, cause: str, trace: str) -> None:
        """Remember why the process of a trial died. `failed` or `recovered` follows."""
        self._deaths[tune_id] = cause, trace

    def replaced(self, cause: str) -> None:
        self._listener.say(f"{cause}; the next trial gets another process")


def _line(text: str) -> str:
    """Return a text on one line, cut to 500 characters."""
    found = " ".join(text.split())
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…"


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
