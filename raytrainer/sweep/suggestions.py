"""The source of a sweep's trials: first the unfinished ones of the journal, then new ones from a searcher, which learns
how each trial ended."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.sample import Domain

from raytrainer.errors import ConfigError
from raytrainer.ray_internals import METRIC
from raytrainer.sweep.journal import WORST, Mode, Trial, TrialJournal, worst
from raytrainer.sweep.sampling import NumberedSearch
from raytrainer.sweep.search import TranslatedSearch
from raytrainer.sweep.trial_state import Status
from raytrainer.sweep.tune_space import RUN, TRIAL


def warm_start(search: TranslatedSearch, trials: Sequence[Trial], mode: Mode) -> str | None:
    """Report the ended trials to a new searcher. Each has its best value; diverged ones have the worst of all values.

    Args:
        search: The searcher.
        trials: The trials in the journal.
        mode: The mode of the objective.

    Returns:
        A sentence that says what is lost; None if nothing is.
    """
    ended = [trial for trial in trials if not trial.status.is_open]
    if isinstance(search.inner, NumberedSearch) or not ended:
        return None
    name = type(search.inner).__name__
    if not search.takes_points:
        return f"{name} cannot learn from the {len(ended)} ended trials and starts from scratch"
    search.set_search_properties(METRIC, mode, {})
    worst_value = _worst_of((report.value for trial in trials for report in trial.reports), mode)
    refused = 0
    for trial in ended:
        value, failed = _objective_of(trial, worst_value, mode, trial.status, trial.diverged)
        if value is None and not failed:
            continue  # it ended before its first evaluation
        try:
            search.add_evaluated_point(trial.parameters, value, failed)
        except (KeyError, ValueError, ConfigError):
            refused += 1
    if not refused:
        return None
    return f"{name} cannot learn from {refused} ended trials, which are outside the current search space"


class Suggestions(Searcher):  # type: ignore[misc]
    """Gives Tune the trials of a sweep: first the unfinished ones of the journal, then new ones until there are
    `total`. It records each new trial in the journal.

    A trial's config is `{TRIAL: id, RUN: its MLflow run or "", **parameters}`. When a trial ends, the searcher gets its
    best value. For a diverged trial it gets the worst value of all, so that it learns to avoid the region. For any
    other failed trial it gets the failure.

    Args:
        search: The searcher for new trials.
        mode: The mode of the objective.
        total: The number of trials, including those of the journal; None for as many as the searcher samples.
        journal: The journal, after its `begin`.
        overrides_of: Returns the overrides that set given parameters.
        on_suggest: Called with each trial that Tune gets, after the journal has recorded it.
        clock: Returns the time in seconds since the epoch.
    """

    def __init__(
        self,
        search: TranslatedSearch,
        *,
        mode: Mode,
        total: int | None,
        journal: TrialJournal,
        overrides_of: Callable[[Mapping[str, Any]], list[str]],
        on_suggest: Callable[[Trial], None] = lambda trial: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(metric=METRIC, mode=mode)
        self.total = total
        self._search, self._objective_mode = search, mode
        self._journal, self._overrides_of, self._on_suggest, self._clock = journal, overrides_of, on_suggest, clock
        self._unfinished = deque(trial for trial in journal.trials.values() if trial.status.is_open)
        self._ids: dict[str, str] = {}  # Tune's id of a trial → our id
        self._sampled: set[str] = set()  # Tune's ids of the trials that the searcher has sampled
        if isinstance(search.inner, NumberedSearch):
            search.inner.drawn = len(journal.trials)
        values = [report.value for trial in journal.trials.values() for report in trial.reports]
        self._worst_value = _worst_of(values, mode)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Domain], **spec: Any
    ) -> bool:
        return self._search.set_search_properties(metric, mode, config)

    def trial_of(self, trial_id: str) -> str | None:
        """Return our id of a trial, from Tune's id."""
        return self._ids.get(trial_id)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config, `FINISHED`, or None if the searcher waits for other trials to end.

        Raises:
            StorageError: The journal cannot be written.
        """
        if self._unfinished:
            trial = self._unfinished.popleft()
            self._journal.reopen(trial.id)
        else:
            if self.total is not None and len(self._journal.trials) >= self.total:
                return self.FINISHED
            values = self._search.suggest(trial_id)
            if values is None or values == self.FINISHED:
                return values
            self._sampled.add(trial_id)
            number = max((int(id_) for id_ in self._journal.trials), default=0) + 1
            trial = Trial(f"{number:04d}", values, self._overrides_of(values), self._clock())
            self._journal.start(trial)
        self._ids[trial_id] = trial.id
        self._on_suggest(trial)
        return {TRIAL: trial.id, RUN: trial.run_id or "", **trial.parameters}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        finite = self._with_finite_value(result)
        if trial_id in self._sampled:
            self._search.on_trial_result(trial_id, finite)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._ids:
            return
        trial = self._journal.trials[self._ids[trial_id]]
        # Tune calls the searcher before the callback that records the end of the trial.
        end = json.loads(result["end"]) if result and "end" in result else {}
        if result:
            self._with_finite_value(result)  # updates the worst value
        status = Status.FAILED if error else Status(end.get("status", trial.status))
        diverged = end.get("diverged", trial.diverged)
        value, failed = _objective_of(trial, self._worst_value, self._objective_mode, status, diverged)
        if trial_id in self._sampled:
            last = None if value is None else {"training_iteration": 1, **(result or {}), METRIC: value}
            self._search.on_trial_complete(trial_id, result=last, error=failed)
        elif self._search.takes_points and (failed or value is not None):
            self._search.add_evaluated_point(trial.parameters, value, failed)

    def on_pause(self, trial_id: str) -> None:
        if trial_id in self._sampled:
            self._search.on_pause(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        if trial_id in self._sampled:
            self._search.on_unpause(trial_id)

    def _with_finite_value(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return a result with a finite value, which every searcher accepts, and remember the worst value."""
        value = float(result.get(METRIC, math.nan))
        if not math.isfinite(value) or abs(value) >= WORST:
            return {**result, METRIC: self._worst_value}
        self._worst_value = _worst_of((self._worst_value, value), self._objective_mode)
        return {**result, METRIC: value}


def _objective_of(
    trial: Trial, worst_value: float, mode: Mode, status: Status, diverged: bool
) -> tuple[float | None, bool]:
    """Return what a searcher gets for an ended trial: its value, or None, and whether it failed for a reason that may
    be unrelated to its parameters."""
    if status is Status.FAILED:
        return (worst_value, False) if diverged else (None, True)
    best = trial.best(mode)
    if best is not None:
        return best.value, False
    if status is Status.PRUNED and trial.reports and math.isfinite(trial.reports[-1].value):
        return trial.reports[-1].value, False  # an interim value, if there is no other
    return (worst_value, False) if trial.reports else (None, False)


def _worst_of(values: Iterable[float], mode: Mode) -> float:
    """Return the worst finite value; ±1e30 if there is none. With 1e30 in the data, a searcher's model could not tell
    the other values apart."""
    finite = [value for value in values if math.isfinite(value) and abs(value) < WORST]
    if not finite:
        return worst(mode)
    return max(finite) if mode == "min" else min(finite)
