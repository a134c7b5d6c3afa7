"""A sweep over any Hydra application, for `hydra/sweeper=ray_tune`. Processes of Ray Tune call its function once per
trial. This module does not depend on Hydra: the plugin composes and runs the job of a trial.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from ray import tune

from raytrainer import preflight, ray_internals
from raytrainer.attempt.outcome import as_text
from raytrainer.attempt.session import join_cluster, ray_error, ray_session
from raytrainer.config import ClusterConfig, Experiment, parse_space
from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import ClusterLost, ConfigError, StorageError, StorageLocked
from raytrainer.progress import Display, duration
from raytrainer.storage import Lock, Storage
from raytrainer.sweep import results
from raytrainer.sweep.application_setup import (
    Application,
    ApplicationJobs,
    aim,
    compose_examples,
    named_here,
    open_journal,
    renamed_keys,
    unchangeable,
)
from raytrainer.sweep.board import Board
from raytrainer.sweep.engine import TUNE_FOLDER, Listener, Search
from raytrainer.sweep.function import PRINTED, FunctionProcess
from raytrainer.sweep.journal import Trial, TrialJournal
from raytrainer.sweep.outcome import failed_rows, trial_counts
from raytrainer.sweep.settings import KEY, Settings
from raytrainer.sweep.stepped import ENDS_S
from raytrainer.sweep.table import final_table, ranked
from raytrainer.sweep.trial_state import Status

RESULTS = "optimization_results.yaml"  # as Hydra's own Optuna sweeper calls it
MULTIRUN = "multirun.yaml"  # as every sweeper of Hydra calls it
OUTPUT = "output.log"  # everything that the trials print
_PRINTED_S = 3.0  # time at the end for the last output of the trials to arrive


@dataclass(frozen=True)
class EndedSweep:
    """The end of a sweep.

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
    jobs: ApplicationJobs,
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    space: Mapping[str, Any],
    groups: Callable[[str], bool],
    folder: Path,
    subfolder: Callable[[int, Sequence[str]], str],
    config: str,
    verbose: bool,
) -> EndedSweep:
    """Run a sweep to its end.

    Args:
        jobs, subfolder, verbose: As in `Application`.
        settings: The section `hydra.sweeper`.
        overrides: The task overrides, including sweeps.
        space: Sweeps from the application's config.
        groups: Whether a name is a config group.
        folder: The absolute path of the sweep's directory.
        config: The master config as YAML, for the record.

    Raises:
        Refused: The sweep was refused before anything started.
        RaytrainerError: The sweep could not continue.
    """
    with renamed_keys():
        checked = Settings.of(settings)
        parameters, fixed = parse_space(overrides, space, groups=groups, shared={})
        if not parameters:
            raise ConfigError(
                f"needs something to search: x=1,2,3, 'x=interval(0,1)', or {KEY}.params",
                key="hydra/sweeper",
                value="ray_tune",
            )
        if checked.address is None:
            preflight.refuse(preflight.check_temporary(Experiment(cluster=ClusterConfig(kind="local")), os.environ))
        compose_examples(jobs, parameters, fixed)
        application = Application(jobs, checked, parameters, fixed, subfolder, verbose)
        with Interrupts() as interrupts, contextlib.ExitStack() as held:
            storage = Storage(str(folder))
            try:
                lock = held.enter_context(storage.lock("lock", {"run": str(folder)}))
            except StorageLocked as error:
                raise ConfigError(f"is in use: {error}", key="hydra.sweep.dir", value=folder) from error
            journal = open_journal(storage, checked, parameters, fixed)
            storage.write_bytes(MULTIRUN, config.encode())
            output = held.enter_context(Path(folder, OUTPUT).open("a", encoding="utf-8", errors="backslashreplace"))
            return _Sweep(application, storage, journal, lock, interrupts, output).run()


class _Sweep:
    """One attempt of a sweep. The caller holds the lock on its folder."""

    def __init__(
        self,
        application: Application,
        storage: Storage,
        journal: TrialJournal,
        lock: Lock,
        interrupts: Interrupts,
        output: TextIO,
    ) -> None:
        self._application, self._settings, self._mode = application, application.settings, application.mode
        self._storage, self._journal, self._lock, self._interrupts = storage, journal, lock, interrupts
        self._output, self._display, self._began = output, Display(), time.monotonic()
        self._board: Board | None = None
        self._unprinted: set[str] = set()  # ended trials whose output may still be on its way
        self._printed: set[str] = set()
        self._config = application.sweep_config()
        self._search = Search(
            self._config,
            application.make_scheduler(self._config),
            parameters=application.parameters,
            mode=self._mode,
            seed=self._settings.seed,
            journal=journal,
            overrides_of=application.overrides_of,
            listener=Listener(self._trial_started, self._trial_ended, self._display.say),
        )
        self._shared = application.shared()

    def run(self) -> EndedSweep:
        """Run the trials, and close everything even after an error.

        Raises:
            RaytrainerError: The sweep could not continue; its results so far are kept.
        """
        application = self._application
        about = unchangeable(self._settings, application.parameters, application.fixed)
        self._journal.begin({**about, "argv": sys.argv})
        error: BaseException | None = None
        reason = "finished"
        try:
            with ray_session(self._ray(), self._interrupts):
                reason = self._run_trials()
        except Interrupted:
            pass
        except Exception as failed:  # noqa: BLE001  raised below, after the sweep is closed
            error = failed
        self._interrupts.deferred = True
        if self._board is not None:
            self._board.close()
        for trial in self._journal.trials.values():
            if trial.status is Status.RUNNING:
                cause = self._interrupts.reason or "the sweep ended before the trial"
                self._journal.end(trial.id, Status.STOPPED, cause)
        with contextlib.suppress(StorageError):  # Tune's own files, which nothing reads
            self._storage.delete(TUNE_FOLDER)
        best = self._write_results()
        self._journal.close()
        if error is not None:
            raise ray_error(error)
        return self._ended(reason, best)

    def _ray(self) -> Experiment:
        """Return an experiment whose `cluster` makes `ray_session` start Ray, or connect to a running cluster."""
        address = self._settings.address
        if address is None:
            return Experiment(cluster=ClusterConfig(kind="local"))
        join_cluster(address, {}, f"sweep {self._storage.uri.rsplit('/', 1)[-1]}", f"{KEY}.address")
        return Experiment(cluster=ClusterConfig(kind="existing", address=address))

    # --- the trials -----------------------------------------------------------------------------------------------

    def _run_trials(self) -> str:
        resources = {name: float(amount) for name, amount in self._settings.resources_per_trial.items() if amount}
        limit = self._settings.max_concurrent_trials or _fit(resources)
        self._introduce(limit)
        self._interrupts.deferred = True  # signals are handled between two steps, never inside a call to Ray
        with ray_internals.WorkerOutput(self._take_message, self._take_line):
            reason = self._search.run(
                tune.with_parameters(FunctionProcess, shared=self._shared),
                storage_path=self._storage.uri,
                resources=ray_internals.trial_resources(resources, 1, "PACK"),
                limit=limit,
                between=self._between_steps,
                drain_s=ENDS_S,
            )
            deadline = time.monotonic() + _PRINTED_S
            while not self._unprinted <= self._printed and time.monotonic() < deadline:
                time.sleep(0.02)
            return reason

    def _introduce(self, limit: int) -> None:
        """Say what is swept, and show the table of the trials."""
        name, keys, total = self._shared.name, [p.key for p in self._application.parameters], self._search.total
        count = "trials" if total is None else f"{total} trials"
        self._display.say(
            f"{name}: {count} over {', '.join(keys)}, {limit} at a time; their output: {self._storage.where(OUTPUT)}"
        )
        self._display.say(aim(self._settings.direction, name))
        for note in self._search.notes:
            self._display.say(named_here(note))
        self._board = Board(
            self._display,
            name,
            metric="value",
            mode=self._mode,
            keys=keys,
            total=total,
            at_once=limit,
            trials=[trial for trial in self._journal.trials.values() if not trial.status.is_open],
            time_budget_s=self._config.time_budget_s,
        )

    def _between_steps(self, waits: bool) -> None:
        self._interrupts.check()
        self._lock.check()
        if part := ray_internals.dead_part():
            raise ClusterLost(f"Ray's {part} died")
        assert self._board is not None
        self._board.tick()

    def _trial_started(self, trial: Trial) -> None:
        if self._board is not None:
            self._board.start(trial)

    def _trial_ended(self, trial: Trial) -> None:
        if trial.status is not Status.PRUNED:
            self._unprinted.add(trial.id)
        if self._board is not None:
            self._board.end(trial)

    def _take_message(self, rank: int | None, message: Mapping[str, Any]) -> None:
        if message["kind"] == PRINTED:
            self._printed.add(message["label"])

    def _take_line(self, rank: int | None, line: str) -> None:
        print(line, file=self._output, flush=True)
        if self._application.verbose:
            self._display.say(line)

    # --- the end --------------------------------------------------------------------------------------------------

    def _write_results(self) -> Trial | None:
        """Write the tables, and the best finished trial to `optimization_results.yaml`. Return that trial."""
        trials = list(self._journal.trials.values())
        if trials:
            keys = [p.key for p in self._application.parameters]
            results.write_tables(self._storage, trials=trials, keys=keys, mode=self._mode)
        finished = [trial for trial in trials if trial.status is Status.FINISHED]
        best = next(iter(ranked(finished, self._mode)), None)
        if best is not None:
            text = yaml.safe_dump(self._results_of(best), sort_keys=False, allow_unicode=True)
            self._storage.write_bytes(RESULTS, text.encode())
        return best

    def _results_of(self, best: Trial) -> dict[str, Any]:
        report = best.best(self._mode)
        assert report is not None
        return {"name": "ray_tune", "best_params": dict(best.parameters), "best_value": report.value}

    def _ended(self, reason: str, best: Trial | None) -> EndedSweep:
        trials, killed = list(self._journal.trials.values()), self._interrupts.requested
        text = self._summary(trials, reason, best)
        best_result = None if best is None else self._results_of(best)
        if killed:
            return EndedSweep(self._interrupts.exit_code or 130, self._interrupts.reason, text, best_result)
        return EndedSweep(int(best is None), _why_none(trials) if best is None else None, text, best_result)

    def _summary(self, trials: Sequence[Trial], reason: str, best: Trial | None) -> str:
        application, directory = self._application, str(self._storage.local_path)
        word = "stopped" if self._interrupts.requested else "failed" if best is None else "finished"
        took = duration(time.monotonic() - self._began)
        rows = [("outcome", f"{word}: {trial_counts(trials)} in {took}")]
        if reason != "finished":
            rows.append(("", f"{reason} reached"))
        rows += failed_rows([trial for trial in trials if trial.status is Status.FAILED], directory)
        rows.append(("output", directory))
        if best is not None:
            value = self._results_of(best)["best_value"]
            subfolder = application.subfolder(int(best.id) - 1, [*application.fixed, *best.overrides])
            rows.append(("best", f"value {value:.6g} of trial {best.id}, in {subfolder}"))
            rows.append(("", " ".join(best.overrides)))
        if self._interrupts.requested:
            rows.append(("next", f"the same command with hydra.sweep.dir={directory} {KEY}.resume=true"))
        if best is None or len(trials) < 2:
            return as_text(rows)
        keys = [p.key for p in application.parameters]
        return f"{final_table(trials, metric='value', mode=self._mode, keys=keys)}\n\n{as_text(rows)}"


def _fit(resources: Mapping[str, float]) -> int:
    """Return how many trials the cluster can run at a time.

    Raises:
        ConfigError: A trial does not fit on any machine.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = ray_internals.capacity(resources, 1, nodes, "PACK")
    if most < 1:
        total = sorted(ray.cluster_resources().items())
        has = ", ".join(f"{name}: {amount:g}" for name, amount in total if name in {"CPU", "GPU", *resources})
        raise ConfigError(
            f"does not fit on any machine; there is {{{has}}} in all",
            key=f"{KEY}.resources_per_trial",
            value=dict(resources),
        )
    return most


def _why_none(trials: Sequence[Trial]) -> str:
    """Return as text why no trial has a value."""
    counts = Counter(trial.status for trial in trials)
    first = next((f", the first by {trial.cause}" for trial in trials if trial.status is Status.FAILED), "")
    returned = counts[Status.FINISHED]
    nan = f", {returned} returned NaN or an infinity" if returned else ""
    return f"no trial has a value: {counts[Status.FAILED]} of {len(trials)} failed{first}{nan}"
