"""A sweep over any Hydra application, for `hydra/sweeper=ray_tune`. Processes of Ray Tune call its function once per
trial. This module does not depend on Hydra: the plugin composes and runs the job of a trial.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import yaml
from ray import cloudpickle, tune

from raytrainer import preflight, ray_internals
from raytrainer.attempt import ray_session
from raytrainer.config import ClusterConfig, Experiment, Parameter, locate, parse_space
from raytrainer.config.checks import seconds
from raytrainer.config.schema import SweepConfig
from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import ClusterLost, ConfigError, StorageError, StorageLocked
from raytrainer.progress import Display, duration
from raytrainer.storage import Lock, Storage
from raytrainer.sweep import results, schedule
from raytrainer.sweep.engine import Listener, Search
from raytrainer.sweep.function import ENDS_S, PRINTED, FunctionProcess, Shared
from raytrainer.sweep.journal import Mode, Trial, TrialJournal
from raytrainer.sweep.settings import DIRECTIONS, KEY, Settings
from raytrainer.sweep.table import Board, final_table, ranked

RESULTS = "optimization_results.yaml"  # as Hydra's own Optuna sweeper calls it
MULTIRUN = "multirun.yaml"  # as every sweeper of Hydra calls it
OUTPUT = "output.log"  # everything that the trials print
_DRAWS = 20  # trials, if neither their number nor a time budget is set
_ENDLESS = 1_000_000  # calls of `report`: their number is unknown beforehand
_MOST_PROBES = 100  # jobs composed before Ray starts
_PRINTED_S = 3.0  # time at the end for the last output of the trials to arrive
_MOST_FAILED = 5  # trials whose causes are shown at the end


class Jobs(Protocol):
    """The task function of an application. It can be pickled, except for the objects that `keeping` drops."""

    @property
    def name(self) -> str:
        """The name of the function."""

    def __call__(self, number: int, overrides: Sequence[str]) -> Any:
        """Run the job of a trial in this process and return the value of the function."""

    def check(self, overrides: Sequence[str]) -> None:
        """Compose a job without running it. Raises Hydra's error if it cannot be composed."""

    def keeping(self, wanted: Callable[[Any], bool]) -> Jobs:
        """Return a copy that carries only the wanted ones of its objects."""


@dataclass(frozen=True)
class Ended:
    """How a sweep ended.

    Attributes:
        exit_code: 0; 1 if no trial has a value; 129, 130 or 143 after a signal.
        cause: Why the exit code is not 0.
        text: The summary.
        results: The content of `optimization_results.yaml`; None if no trial has a value.
    """

    exit_code: int
    cause: str | None
    text: str
    results: dict[str, Any] | None


def search(
    jobs: Jobs,
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    space: Mapping[str, Any],
    groups: Callable[[str], bool],
    folder: Path,
    subfolder: Callable[[int, Sequence[str]], str],
    config: str,
    verbose: bool,
) -> Ended:
    """Run a sweep to its end.

    Args:
        jobs: The jobs of the trials.
        settings: The section `hydra.sweeper`.
        overrides: The task overrides, including sweeps.
        space: Sweeps from the application's config.
        groups: Whether a name is a config group.
        folder: The absolute path of the sweep's directory.
        subfolder: Returns a trial's directory below `folder`, from its number and overrides.
        config: The master config as YAML, for the record.
        verbose: Whether to show what the trials print. It is written to a file in any case.

    Raises:
        Refused: The sweep was refused before anything started.
        RaytrainerError: The sweep could not continue.
    """
    with _in_its_words():
        asked = Settings.of(settings)
        parameters, fixed = parse_space(overrides, space, groups=groups, shared={})
        if not parameters:
            raise ConfigError(
                f"needs something to search: x=1,2,3, 'x=interval(0,1)', or {KEY}.params",
                key="hydra/sweeper",
                value="ray_tune",
            )
        if asked.address is None:
            preflight.refuse(preflight.check_temporary(Experiment(cluster=ClusterConfig(kind="local")), os.environ))
        _probe(jobs, parameters, fixed)
        with Interrupts() as interrupts, contextlib.ExitStack() as held:
            storage = Storage(str(folder))
            try:
                lock = held.enter_context(storage.lock("lock", {"run": str(folder)}))
            except StorageLocked as error:
                raise ConfigError(f"is in use: {error}", key="hydra.sweep.dir", value=folder) from error
            journal = _opened(storage, asked, parameters, fixed)
            storage.write_bytes(MULTIRUN, config.encode())
            output = held.enter_context(Path(folder, OUTPUT).open("a", encoding="utf-8", errors="backslashreplace"))
            sweep = _Sweep(
                jobs, asked, parameters, fixed, storage, journal, lock, interrupts, output, subfolder, verbose
            )
            return sweep.run()


class _Sweep:
    """One attempt of a sweep. The caller holds the lock on its folder."""

    def __init__(
        self,
        jobs: Jobs,
        settings: Settings,
        parameters: Sequence[Parameter],
        fixed: Sequence[str],
        storage: Storage,
        journal: TrialJournal,
        lock: Lock,
        interrupts: Interrupts,
        output: TextIO,
        subfolder: Callable[[int, Sequence[str]], str],
        verbose: bool,
    ) -> None:
        self._settings, self._parameters, self._fixed = settings, parameters, fixed
        self._storage, self._journal, self._lock, self._interrupts = storage, journal, lock, interrupts
        self._output, self._subfolder, self._verbose = output, subfolder, verbose
        self._mode = cast(Mode, DIRECTIONS[settings.direction])
        self._display = Display()
        self._began = time.monotonic()
        self._board: Board | None = None
        self._unprinted: set[str] = set()  # ended trials whose output may still be on its way
        self._printed: set[str] = set()
        scheduler = _for_functions(settings.scheduler_node)
        budget = seconds(settings.time_budget_s, f"{KEY}.time_budget_s")
        node, count = settings.search_node, settings.num_samples
        if count is None and budget is None and not str((node or {}).get("_target_")).endswith("GridSearch"):
            count = _DRAWS
        self._config = SweepConfig(
            num_samples=count,
            scheduler=scheduler,
            search_alg=node,
            time_budget_s=budget,
            seed=settings.seed,
            max_trial_failures=settings.max_trial_failures,
        )
        self._search = Search(
            self._config,
            parameters=parameters,
            mode=self._mode,
            seed=settings.seed,
            evaluations=_ENDLESS,
            journal=journal,
            overrides_of=lambda values: [p.override(values[p.key]) for p in parameters if p.key in values],
            may_change=lambda key: True,
            listener=Listener(self._started, lambda trial: None, self._ended, self._display.say),
        )
        if schedule.pauses(self._search.scheduler):
            raise ConfigError(
                "pauses or copies trials, which needs checkpoints, and a function has none: use asha or median, which "
                "only stop the worse trials",
                key="sweep.scheduler",
                value=type(self._search.scheduler).__name__,
            )
        self._shared = Shared(
            job=_packed(jobs),
            name=jobs.name,
            parameters=parameters,
            fixed=fixed,
            mode=self._mode,
            path=[entry or str(Path.cwd()) for entry in sys.path],
            folder=str(Path.cwd()),
            retries=settings.max_trial_failures > 0,
        )

    def run(self) -> Ended:
        """Run the trials, and close everything even after an error.

        Raises:
            RaytrainerError: The sweep could not continue; its results so far are kept.
        """
        self._journal.begin({**_about(self._settings, self._parameters, self._fixed), "argv": sys.argv})
        error: BaseException | None = None
        reason = "finished"
        try:
            with ray_session(self._where(), self._interrupts):
                reason = self._trials()
        except Interrupted:
            pass
        except Exception as failed:  # noqa: BLE001  raised below, after the sweep is closed
            error = failed
        self._interrupts.deferred = True
        if self._board is not None:
            self._board.close()
        for trial in self._journal.trials.values():
            if trial.status == "running":
                self._journal.end(trial.id, "stopped", self._interrupts.reason or "the sweep ended before the trial")
        with contextlib.suppress(StorageError):  # Tune's own files, which nothing reads
            self._storage.delete("tune")
        found = self._results()
        if self._journal.trials:
            results.write_tables(
                self._storage,
                trials=list(self._journal.trials.values()),
                keys=[p.key for p in self._parameters],
                mode=self._mode,
            )
        self._journal.close()
        if error is not None:
            if type(error).__module__.partition(".")[0] == "ray":
                error = ClusterLost(f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            raise error
        return self._told(reason, found)

    def _where(self) -> Experiment:
        """Return an experiment whose `cluster` makes `ray_session` start Ray, or connect to a running cluster."""
        address = self._settings.address
        if address is None:
            return Experiment(cluster=ClusterConfig(kind="local"))
        ray_internals.prepare(embedded=False)
        try:
            if address != "auto":
                ray_internals.find_cluster(address)
            ray_internals.attach(address, {}, f"sweep {self._storage.uri.rsplit('/', 1)[-1]}")
        except ray_internals.VersionMismatch as error:
            raise ConfigError(str(error), key=f"{KEY}.address", value=address) from error
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"is not a running Ray cluster: {first}", key=f"{KEY}.address", value=address) from error
        return Experiment(cluster=ClusterConfig(kind="existing", address=address))

    def _trials(self) -> str:
        import ray

        each = {name: float(amount) for name, amount in self._settings.resources_per_trial.items() if amount}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = ray_internals.capacity(each, 1, nodes, "PACK")
        if most < 1:
            has = ", ".join(
                f"{k}: {v:g}" for k, v in sorted(ray.cluster_resources().items()) if k in {"CPU", "GPU", *each}
            )
            raise ConfigError(
                f"does not fit on any machine; there is {{{has}}} in all", key=f"{KEY}.resources_per_trial", value=each
            )
        limit = self._settings.max_concurrent_trials or most
        total = self._search.total
        count = "trials" if total is None else f"{total} trials"
        self._display.say(
            f"{self._shared.name}: {count} over {', '.join(p.key for p in self._parameters)}, {limit} at a time; "
            f"their output: {self._storage.where(OUTPUT)}"
        )
        self._display.say(_aim(self._settings.direction, self._shared.name))
        for note in self._search.notes:
            self._display.say(_named_here(note))
        self._board = Board(
            self._display,
            self._shared.name,
            metric="value",
            mode=self._mode,
            keys=[p.key for p in self._parameters],
            total=total,
            at_once=limit,
            trials=[t for t in self._journal.trials.values() if t.status not in ("running", "stopped")],
            time_budget_s=self._config.time_budget_s,
        )
        self._interrupts.deferred = True  # signals are handled between two steps, never inside a call to Ray
        with ray_internals.WorkerOutput(self._take_message, self._take_line):
            reason = self._search.run(
                tune.with_parameters(FunctionProcess, shared=self._shared),
                name="tune",
                storage_path=self._storage.uri,
                resources=ray_internals.trial_resources(each, 1, "PACK"),
                limit=limit,
                between=self._between,
                drain_s=ENDS_S,
            )
            deadline = time.monotonic() + _PRINTED_S
            while not self._unprinted <= self._printed and time.monotonic() < deadline:
                time.sleep(0.02)
            return reason

    def _between(self, waits: bool) -> None:
        self._interrupts.check()
        self._lock.check()
        if part := ray_internals.dead_part():
            raise ClusterLost(f"Ray's {part} died")
        assert self._board is not None
        self._board.tick()

    def _started(self, trial: Trial) -> None:
        if self._board is not None:
            self._board.start(trial)

    def _ended(self, trial: Trial) -> None:
        if trial.status != "pruned":
            self._unprinted.add(trial.id)
        if self._board is not None:
            self._board.end(trial)

    def _take_message(self, rank: int | None, message: Mapping[str, Any]) -> None:
        if message["kind"] == PRINTED:
            self._printed.add(message["label"])

    def _take_line(self, rank: int | None, line: str) -> None:
        print(line, file=self._output, flush=True)
        if self._verbose:
            self._display.say(line)

    # --- the end --------------------------------------------------------------------------------------------------

    def _best(self) -> Trial | None:
        finished = [t for t in self._journal.trials.values() if t.status == "finished"]
        return next(iter(ranked(finished, self._mode)), None)

    def _results(self) -> dict[str, Any] | None:
        """Write the best finished trial to `optimization_results.yaml`. Return the content; None if there is none."""
        best = self._best()
        if best is None:
            return None
        report = best.best(self._mode)
        assert report is not None
        found = {"name": "ray_tune", "best_params": dict(best.parameters), "best_value": report.value}
        self._storage.write_bytes(RESULTS, yaml.safe_dump(found, sort_keys=False, allow_unicode=True).encode())
        return found

    def _told(self, reason: str, found: dict[str, Any] | None) -> Ended:
        trials, killed = list(self._journal.trials.values()), self._interrupts.requested
        counts, best = Counter(t.status for t in trials), self._best()
        told = ", ".join(f"{counts[s]} {s}" for s in ("finished", "pruned", "failed", "stopped") if counts[s])
        word = "stopped" if killed else "failed" if best is None else "finished"
        took = duration(time.monotonic() - self._began)
        rows = [("outcome", f"{word}: {len(trials)} trials ({told or 'none ended'}) in {took}")]
        if reason != "finished":
            rows.append(("", f"{reason} reached"))
        failed = [t for t in trials if t.status == "failed"]
        for trial in failed[:_MOST_FAILED]:
            rows.append(("failed", f"{trial.id}: {trial.cause}"))
            if trial.error is not None:
                rows.append(("", str(self._storage.local_path / trial.error)))
        if len(failed) > _MOST_FAILED:
            rows.append(("", f"and {len(failed) - _MOST_FAILED} more"))
        rows.append(("output", str(self._storage.local_path)))
        if best is not None and found is not None:
            where = self._subfolder(int(best.id) - 1, [*self._fixed, *best.overrides])
            rows.append(("best", f"value {found['best_value']:.6g} of trial {best.id}, in {where}"))
            rows.append(("", " ".join(best.overrides)))
        if killed:
            rows.append(("next", f"the same command with hydra.sweep.dir={self._storage.local_path} {KEY}.resume=true"))
        lines = [f"{name:<8} {text}" for name, text in rows]
        if best is not None and len(trials) > 1:
            keys = [p.key for p in self._parameters]
            lines = [final_table(trials, metric="value", mode=self._mode, keys=keys), "", *lines]
        cause = None
        if killed:
            cause = self._interrupts.reason
        elif best is None:
            first = f", the first by {failed[0].cause}" if failed else ""
            nan = f", {counts['finished']} returned NaN or an infinity" if counts["finished"] else ""
            cause = f"no trial has a value: {counts['failed']} of {len(trials)} failed{first}{nan}"
        return Ended(
            (self._interrupts.exit_code or 130) if killed else int(best is None), cause, "\n".join(lines), found
        )


# --- before anything starts -------------------------------------------------------------------------------------------


def _aim(direction: str, name: str) -> str:
    """Return a line that says which direction is better, because the name of a function does not show it."""
    other = next(d for d in DIRECTIONS if d != direction)
    better = "lowest" if DIRECTIONS[direction] == "min" else "highest"
    return f"the {better} value that {name}() returns is the best ({KEY}.direction={direction}; the other is {other})"


def _about(settings: Settings, parameters: Sequence[Parameter], fixed: Sequence[str]) -> dict[str, Any]:
    """Return the settings that must be unchanged when a sweep is resumed."""
    found = {"parameters": [p.to_dict() for p in parameters], "direction": settings.direction, "fixed": list(fixed)}
    same: dict[str, Any] = json.loads(json.dumps(found))
    return same


def _opened(
    storage: Storage, settings: Settings, parameters: Sequence[Parameter], fixed: Sequence[str]
) -> TrialJournal:
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
    for name, value in _about(settings, parameters, fixed).items():
        if journal.attempts[-1].get(name) != value:
            what = {"parameters": "other parameters", "fixed": "other overrides", "direction": "another direction"}[
                name
            ]
            raise ConfigError(
                f"has a sweep with {what}, which cannot be continued; another directory starts a new sweep",
                key="hydra.sweep.dir",
                value=place,
            )
    return journal


def _probe(jobs: Jobs, parameters: Sequence[Parameter], fixed: Sequence[str]) -> None:
    """Compose a job for each value of a choice and for both ends of a range or interval. Each job changes one parameter
    and takes the first value of all others."""
    first = {p.key: p.probes()[0] for p in parameters}
    found = [first, *({**first, p.key: value} for p in parameters for value in p.probes()[1:])]
    for values in itertools.islice(found, _MOST_PROBES):
        jobs.check([*fixed, *(p.override(values[p.key]) for p in parameters)])


def _for_functions(node: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a scheduler's node in which `max_t` does not stop trials, because such a function is about to return."""
    if node is None:
        return None
    target = locate("sweep.scheduler", node["_target_"])
    names = inspect.signature(target).parameters
    return {**({"stop_last_trials": False} if "stop_last_trials" in names else {}), **node}


def _packed(jobs: Jobs) -> bytes:
    """Pickle the jobs. Objects of the application's script that cannot be pickled are left out.

    Raises:
        ConfigError: The function itself cannot be pickled.
    """
    with contextlib.suppress(Exception):
        return bytes(cloudpickle.dumps(jobs))
    try:
        return bytes(cloudpickle.dumps(jobs.keeping(_is_packable)))
    except Exception as error:
        raise ConfigError(
            f"cannot send {jobs.name}() to another process: {type(error).__name__}: {error}; what the script itself "
            "defines is sent with the function, an imported module is not",
            key="hydra/sweeper",
            value="ray_tune",
        ) from error


def _is_packable(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # noqa: BLE001  an object's own code can raise anything
        return False
    return True


@contextlib.contextmanager
def _in_its_words() -> Iterator[None]:
    """Rename keys `sweep.…` of an experiment in errors to the keys that they have here."""
    try:
        yield
    except ConfigError as error:
        renamed = ConfigError(
            _named_here(str(error.args[0])),
            key=None if error.key is None else _named_here(error.key),
            value=error.value,
            choices=error.choices,
        )
        raise renamed from error


def _named_here(text: str) -> str:
    text = text.replace("sweep.space", f"{KEY}.params").replace("sweep=random", f"{KEY}.search_alg=random")
    text = text.replace("sweep=asha", f"{KEY}.scheduler=asha")
    return re.sub(r"(?<![\w.])sweep\.(?=\w)", f"{KEY}.", text)
