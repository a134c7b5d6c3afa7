"""The trials of a sweep from the first draw to the last end: Tune decides, the journal keeps, whoever listens is told.
Knows neither experiments nor MLflow: any Hydra application's trials are run by it too."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from raytrainer import supervise
from raytrainer.config import Parameter, SweepConfig
from raytrainer.errors import ConfigError
from raytrainer.sweep import schedule, search
from raytrainer.sweep.journal import Mode, Report, Status, Trial, TrialJournal

_LONGEST = 500  # characters of a cause; all of it is in the file beside the trial

_SECONDS = "time_this_iter_s"  # in Tune's results: how long the process was at it


@dataclass(frozen=True)
class Listener:
    """Who is told of trials; called in the driver's thread, between two decisions of Tune.

    Attributes:
        start: A trial was drawn, or goes on; its run in MLflow is opened here.
        report: It reported.
        end: It has ended for good.
        say: A line for a person.
    """

    start: Callable[[Trial], None]
    report: Callable[[Trial], None]
    end: Callable[[Trial], None]
    say: Callable[[str], None]


class Search:
    """One attempt at a sweep.

    Args:
        config: The section `sweep`.
        parameters: What is drawn.
        mode: Of the objective.
        seed: Of the draws, where `config.seed` is null.
        evaluations: How often a trial reports, where it is known.
        journal: What earlier attempts did, and where this one is written.
        overrides_of: Parameters → the overrides that set them.
        may_change: Whether a key may change in the middle of a trial.
        listener: Who is told.
        needs_value: Whether a trial of which every value was NaN or infinite has failed.

    Raises:
        ConfigError: A searcher or scheduler that cannot be made, or does not go with the parameters.
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
        drawn = len(trials)
        seed = seed if config.seed is None else config.seed
        distinct = not schedule.parts_ways(config.scheduler)
        inner = search.make_search(config.search_alg, parameters, seed=seed, drawn=drawn, distinct=distinct)
        self.total = search.total_of(config.search_alg, parameters, config.num_samples, distinct=distinct)
        self.scheduler = schedule.make_scheduler(
            config.scheduler,
            parameters,
            mode=mode,
            evaluations=evaluations,
            may_change=may_change,
            search=config.search_alg,
        )
        notes = (search.tell(inner, trials, mode), schedule.replay(self.scheduler, trials)) if trials else ()
        self.notes = [note for note in notes if note is not None]
        if self.total is not None and config.num_samples is not None and self.total < config.num_samples:
            self.notes.append(
                f"sweep.num_samples={config.num_samples} is more than there are combinations: each of the {self.total} "
                "is run once"
            )
        self._draws = search.Draws(
            inner,
            parameters,
            mode=mode,
            total=self.total,
            journal=journal,
            overrides_of=overrides_of,
            on_draw=self._started,
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
        """Runs trials until there are enough; returns `finished` or `time budget`.

        Args:
            trainable: As `supervise.make_controller`.
            name, storage_path: Where Tune keeps what a scheduler has it keep.
            resources: Of a trial.
            limit: The most trials at a time.
            between: Called between two decisions, several times a second, with whether all trials wait for a place;
                what it raises ends the sweep, every process of a trial killed.
            drain_s: How long, when all trials have ended, their processes have for what they still write and send.
            drain_stopped_s: How long where the time budget is over, and trials are stopped at their next evaluation.

        Raises:
            ConfigError: A trial failed by what every other would fail by, too; or the scheduler needs to know how many
                trials there will be.
            Exception: What the journal, a listener, the searcher or the scheduler raised, as it is.
        """
        schedule.check_bounded(self.scheduler, self._config.search_alg, self._config.num_samples)
        pauses = schedule.pauses(self.scheduler)
        controller = supervise.make_controller(
            trainable,
            searcher=self._draws,
            scheduler=self.scheduler,
            callbacks=[_Events(self)],
            name=name,
            storage_path=storage_path,
            resources=resources,
            mode=self._mode,
            limit=limit,
            all_drawn_early=pauses,
            max_failures=self._config.max_trial_failures,
            on_death=self._died,
            on_replaced=lambda cause: self._listener.say(f"{cause}; the next trial gets another process"),
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

    # --- what Tune tells ------------------------------------------------------------------------------------------

    def trial_of(self, tune_id: str) -> Trial | None:
        found = self._draws.trial_of(tune_id)
        return None if found is None else self._journal.trials[found]

    def _started(self, trial: Trial) -> None:
        self._listener.start(trial)

    def reported(self, trial: Trial, result: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """A result: what it says goes into the journal, what it inherited first."""
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
        """Tune has no more use for a trial: it came to its end, or was stopped before."""
        if "end" in result:
            end: dict[str, Any] = json.loads(result["end"])
        else:  # Tune stopped it: for being worse, or for being as old as a trial gets
            old = schedule.is_full_length(self.scheduler, result.get(schedule.TIME, 0))
            end = {"status": "finished" if old else "pruned"}
        values = [report.value for report in trial.reports]
        if self._needs_value and end["status"] != "failed" and values and not any(map(math.isfinite, values)):
            end = {"status": "failed", "cause": f"diverged: all of its {len(values)} values are nan or infinite"}
        self._end(trial, end["status"], end.get("cause"), end.get("traceback"))
        if end.get("non_retryable"):
            self._hopeless = ConfigError(end["cause"].partition(": ")[2])

    def failed(self, trial: Trial, tune_id: str) -> None:
        """Its process died or raised, and is not started again."""
        self._end(trial, "failed", *self._deaths.get(tune_id, ("its process died",)))

    def recovered(self, trial: Trial, tune_id: str) -> None:
        cause, _ = self._deaths[tune_id]
        self._listener.say(f"trial {trial.id}: {_line(cause)}; it is tried again")

    def _end(self, trial: Trial, status: Status, cause: str | None, trace: str | None = None) -> None:
        cause = None if cause is None else _line(cause)
        self._journal.end(trial.id, status, cause, trace=trace if status == "failed" else None)
        self._listener.end(trial)

    def _died(self, tune_id: str, cause: str, trace: str) -> None:
        self._deaths[tune_id] = cause, trace


def _line(text: str) -> str:
    """A text of several lines as one, which fits where a line does."""
    found = " ".join(text.split())
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…"


class _Events(tune.Callback):  # type: ignore[misc]
    """Tune's events, by our trials."""

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
