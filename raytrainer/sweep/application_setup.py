"""The parts of a sweep over any Hydra application, their checks before the start, and the keys in its messages."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from ray import cloudpickle
from ray.tune.schedulers import TrialScheduler

from raytrainer.config import Parameter, locate
from raytrainer.config.checks import seconds
from raytrainer.config.schema import SweepConfig
from raytrainer.errors import ConfigError
from raytrainer.storage import Storage
from raytrainer.sweep import schedule
from raytrainer.sweep.function import FunctionSetup
from raytrainer.sweep.journal import Mode, TrialJournal
from raytrainer.sweep.settings import DIRECTIONS, KEY, Settings

_DEFAULT_TRIALS = 20  # if neither their number nor a time budget is set
_ENDLESS = 1_000_000  # calls of `report`: their number is unknown beforehand
_MOST_EXAMPLES = 100  # jobs composed before Ray starts
_DIFFERENCES = {"parameters": "other parameters", "fixed": "other overrides", "direction": "another direction"}


class ApplicationJobs(Protocol):
    """The task function of an application. It can be pickled, except for the objects that `keeping` drops."""

    @property
    def name(self) -> str:
        """The name of the function."""

    def __call__(self, number: int, overrides: Sequence[str]) -> Any:
        """Run the job of a trial in this process and return the value of the function."""

    def check(self, overrides: Sequence[str]) -> None:
        """Compose a job without running it. Raises Hydra's error if it cannot be composed."""

    def keeping(self, wanted: Callable[[Any], bool]) -> ApplicationJobs:
        """Return a copy that carries only the wanted ones of its objects."""


@dataclass(frozen=True)
class Application:
    """A sweep over an application: its jobs, settings and search space.

    Attributes:
        jobs: The jobs of the trials.
        settings: The section `hydra.sweeper`.
        parameters: The search space.
        fixed: The overrides that all trials have.
        subfolder: Returns a trial's directory below that of the sweep, from its number and overrides.
        verbose: Whether to show what the trials print. It is written to a file in any case.
    """

    jobs: ApplicationJobs
    settings: Settings
    parameters: Sequence[Parameter]
    fixed: Sequence[str]
    subfolder: Callable[[int, Sequence[str]], str]
    verbose: bool

    @property
    def mode(self) -> Mode:
        return cast(Mode, DIRECTIONS[self.settings.direction])

    def overrides_of(self, values: Mapping[str, Any]) -> list[str]:
        """Return a trial's parameters as overrides."""
        return [p.override(values[p.key]) for p in self.parameters if p.key in values]

    def sweep_config(self) -> SweepConfig:
        """Return the settings as an experiment's section `sweep`."""
        settings = self.settings
        budget = seconds(settings.time_budget_s, f"{KEY}.time_budget_s")
        searcher, count = settings.search_node, settings.num_samples
        if count is None and budget is None and not str((searcher or {}).get("_target_")).endswith("GridSearch"):
            count = _DEFAULT_TRIALS
        return SweepConfig(
            num_samples=count,
            scheduler=scheduler_for_functions(settings.scheduler_node),
            search_alg=searcher,
            time_budget_s=budget,
            seed=settings.seed,
            max_trial_failures=settings.max_trial_failures,
        )

    def make_scheduler(self, config: SweepConfig) -> TrialScheduler:
        """Build the scheduler.

        Raises:
            ConfigError: It cannot be built, or needs checkpoints.
        """
        scheduler = schedule.make_scheduler(
            config.scheduler, self.parameters, mode=self.mode, evaluations=_ENDLESS, search=config.search_alg
        )
        if schedule.pauses(scheduler):
            raise ConfigError(
                "pauses or copies trials, which needs checkpoints, and a function has none: use asha or median, which "
                "only stop the worse trials",
                key="sweep.scheduler",
                value=type(scheduler).__name__,
            )
        return scheduler

    def shared(self) -> FunctionSetup:
        """Return what every trial process gets."""
        return FunctionSetup(
            job=pickled(self.jobs),
            name=self.jobs.name,
            parameters=self.parameters,
            fixed=self.fixed,
            mode=self.mode,
            path=[entry or str(Path.cwd()) for entry in sys.path],
            folder=str(Path.cwd()),
            retries=self.settings.max_trial_failures > 0,
        )


def aim(direction: str, name: str) -> str:
    """Return a line that says which direction is better, because the name of a function does not show it."""
    other = next(d for d in DIRECTIONS if d != direction)
    better = "lowest" if DIRECTIONS[direction] == "min" else "highest"
    return f"the {better} value that {name}() returns is the best ({KEY}.direction={direction}; the other is {other})"


def unchangeable(settings: Settings, parameters: Sequence[Parameter], fixed: Sequence[str]) -> dict[str, Any]:
    """Return the settings that must be unchanged when a sweep is resumed."""
    about = {"parameters": [p.to_dict() for p in parameters], "direction": settings.direction, "fixed": list(fixed)}
    as_read: dict[str, Any] = json.loads(json.dumps(about))
    return as_read


def open_journal(
    storage: Storage, settings: Settings, parameters: Sequence[Parameter], fixed: Sequence[str]
) -> TrialJournal:
    """Open the journal of a new sweep, or of one that `resume` continues.

    Raises:
        ConfigError: The directory has a sweep, and `resume` is not set or the sweep differs.
    """
    journal = TrialJournal.open(storage)
    if not journal.trials:
        return journal
    place = storage.local_path
    if not settings.resume:
        raise ConfigError(
            f"has a sweep of {len(journal.trials)} trials; {KEY}.resume=true continues it, another directory starts a new sweep",
            key="hydra.sweep.dir",
            value=place,
        )
    for name, value in unchangeable(settings, parameters, fixed).items():
        if journal.attempts[-1].get(name) != value:
            raise ConfigError(
                f"has a sweep with {_DIFFERENCES[name]}, which cannot be continued; another directory starts a new sweep",
                key="hydra.sweep.dir",
                value=place,
            )
    return journal


def compose_examples(jobs: ApplicationJobs, parameters: Sequence[Parameter], fixed: Sequence[str]) -> None:
    """Compose a job for each value of a choice, and for both ends of each range or interval.

    Each job changes one parameter and takes the first value of all others.
    """
    first = {p.key: p.probes()[0] for p in parameters}
    examples = [first, *({**first, p.key: value} for p in parameters for value in p.probes()[1:])]
    for values in itertools.islice(examples, _MOST_EXAMPLES):
        jobs.check([*fixed, *(p.override(values[p.key]) for p in parameters)])


def scheduler_for_functions(node: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a scheduler's node in which `max_t` does not stop trials, because such a function is about to return."""
    if node is None:
        return None
    target = locate("sweep.scheduler", node["_target_"])
    names = inspect.signature(target).parameters
    return {**({"stop_last_trials": False} if "stop_last_trials" in names else {}), **node}


def pickled(jobs: ApplicationJobs) -> bytes:
    """Pickle the jobs. Objects of the application's script that cannot be pickled are left out.

    Raises:
        ConfigError: The function itself cannot be pickled.
    """
    with contextlib.suppress(Exception):
        return bytes(cloudpickle.dumps(jobs))
    try:
        return bytes(cloudpickle.dumps(jobs.keeping(_can_be_pickled)))
    except Exception as error:
        raise ConfigError(
            f"cannot send {jobs.name}() to another process: {type(error).__name__}: {error}; what the script itself "
            "defines is sent with the function, an imported module is not",
            key="hydra/sweeper",
            value="ray_tune",
        ) from error


def _can_be_pickled(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # noqa: BLE001  an object's own code can raise anything
        return False
    return True


@contextlib.contextmanager
def renamed_keys() -> Iterator[None]:
    """Rename keys `sweep.…` of an experiment in errors to the keys that they have here."""
    try:
        yield
    except ConfigError as error:
        renamed = ConfigError(
            named_here(str(error.args[0])),
            key=None if error.key is None else named_here(error.key),
            value=error.value,
            choices=error.choices,
        )
        raise renamed from error


def named_here(text: str) -> str:
    text = text.replace("sweep.space", f"{KEY}.params").replace("sweep=random", f"{KEY}.search_alg=random")
    text = text.replace("sweep=asha", f"{KEY}.scheduler=asha")
    return re.sub(r"(?<![\w.])sweep\.(?=\w)", f"{KEY}.", text)
