"""The trial journal: append-only JSON lines with each trial's parameters, reports and end.
A sweep resumes from it, and its tables show it. This module imports neither Ray nor torch.

    {"kind": "begin", "version": 1, "time": …, "info": {…}}                        an attempt of the sweep
    {"kind": "start", "id": "0001", "time": …, "parameters": {…}, "overrides": […]}
    {"kind": "report", "id": "0001", "evaluation": 1, "step": 100, "value": 0.5, "time": …, "seconds": 1.5, "metrics": {…}}
    {"kind": "inherit", "id": "0001", "from": "0002", "evaluation": 1, "time": …, "parameters": {…}, "overrides": […]}
    {"kind": "run", "id": "0001", "run_id": "…"}
    {"kind": "end", "id": "0001", "time": …, "status": "finished", "cause": null}      and "error", a file name, if it failed
    {"kind": "reopen", "id": "0001", "time": …}

NaN and infinity are written as `"nan"`, `"inf"` and `"-inf"` for numbers, and as `{"float": "nan"}` for parameters.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytrainer.errors import StorageError
from raytrainer.storage import Storage
from raytrainer.sweep.journal_file import JournalFile, open_file
from raytrainer.sweep.trial_state import Status, check_transition, is_divergence

FILE = "ledger.jsonl"
ERROR = "error.txt"
FORMAT = 1
WORST = 1e30

Mode = Literal["min", "max"]

_log = logging.getLogger("raytrainer.sweep")


@dataclass(frozen=True)
class Report:
    """The report of a trial after one evaluation.

    Attributes:
        evaluation: The number of the evaluation, from 1.
        step: Optimizer steps done.
        value: The sweep's metric; NaN or infinite if the trial diverged.
        metrics: All metrics of the evaluation, by name.
        time: Seconds since the epoch.
        interim: Whether the value is for the scheduler only. A function of a Hydra application reports such values before
            it returns its final value.
        seconds: Training time since the previous report, or since the trial started or continued; None if unknown.
    """

    evaluation: int
    step: int
    value: float
    metrics: Mapping[str, float]
    time: float
    interim: bool = False
    seconds: float | None = None


@dataclass
class Trial:
    """A trial of a sweep.

    Attributes:
        id: `0001`, `0002`, … in the order in which trials are sampled; also the name of the trial's directory.
        parameters: Key → value, as sampled or as the last exploit set them.
        overrides: The parameters as Hydra overrides.
        started, ended: Seconds since the epoch.
        run_id: The MLflow run, or a local id while the server has not created one.
        reports: In the order of evaluations.
        cause: One line that says why the trial failed, was pruned or was stopped.
        error: The file with a failed trial's traceback, relative to the sweep's directory.
        seconds: Training time up to the last report or the end, without the time in which the trial was paused or the sweep
            was stopped; None if unknown.
        since: Start of the training time that is not in `seconds` yet, in seconds since the epoch.
        inherited: What population based training copied into the trial: `evaluation`, `from` and `parameters`.
        before: For each entry of `inherited`, the number of reports and the parameters before it.
    """

    id: str
    parameters: dict[str, Any]
    overrides: list[str]
    started: float
    run_id: str | None = None
    reports: list[Report] = field(default_factory=list)
    status: Status = Status.RUNNING
    cause: str | None = None
    ended: float | None = None
    error: str | None = None
    inherited: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    since: float | None = None
    before: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether the trial failed because its loss or its value became NaN or infinite."""
        if self.status is not Status.FAILED:
            return False
        return bool(self.reports and not math.isfinite(self.reports[-1].value)) or is_divergence(self.cause)

    def took(self, now: float | None = None) -> float | None:
        """Return the training time in seconds. For a running trial, or if no training time is known, add the wall time up to
        the end or up to `now`."""
        if self.status is not Status.RUNNING and self.seconds is not None:
            return self.seconds
        until = now if self.ended is None else self.ended
        if until is None:
            return self.seconds
        since = self.started if self.since is None else self.since
        return (self.seconds or 0.0) + max(0.0, until - since)

    def best(self, mode: Mode) -> Report | None:
        """Return the report with the best value, the earliest if several are equal; None if no final value is finite."""
        finite = [report for report in self.reports if math.isfinite(report.value) and not report.interim]
        if not finite:
            return None
        return min(finite, key=lambda report: report.value if mode == "min" else -report.value)


def worst(mode: Mode) -> float:
    """Return the number that a scheduler gets for NaN or infinity. It is worse than every other value."""
    return WORST if mode == "min" else -WORST


class TrialJournal:
    """The journal of one sweep over all its attempts. Open it with `TrialJournal.open`.

    The process that holds the sweep's lock writes it, from any thread. On a local disk the operating system has a line
    when a method returns, so a killed process loses nothing; a power cut can lose the last second. In an object store,
    which cannot append, the whole file is uploaded. Methods that start, end or reopen a trial or set its MLflow run wait
    for the upload, so that no trial id is used twice. Reports are uploaded at most every 5 s, which a killed process can
    lose. `begin`, `save` and `close` wait until everything is stored.

    Attributes:
        trials: All trials by id, in the order in which they were sampled.
        attempts: The `info` and the `time` of each `begin`.
    """

    def __init__(self, storage: Storage, data: bytes | None, clock: Callable[[], float]) -> None:
        self.trials: dict[str, Trial] = {}
        self.attempts: list[dict[str, Any]] = []
        self._storage, self._clock, self._where = storage, clock, storage.where(FILE)
        self._sink: JournalFile | None = None
        self._lock = threading.Lock()
        self._inherited: dict[str, int] = {}  # reports of each trial from before its last exploit
        data = data or b""
        self._size, self._whole = len(data), data[: data.rfind(b"\n") + 1]
        for number, raw in enumerate(self._whole.split(b"\n")[:-1], start=1):
            self._read(raw, number)

    @classmethod
    def open(cls, storage: Storage, *, clock: Callable[[], float] = time.time) -> TrialJournal:
        """Read the journal in a sweep's directory. Nothing is written before `begin`, so a running sweep can be read.

        An incomplete last line, which a killed writer leaves behind, is dropped.

        Raises:
            StorageError: A line is invalid (the message has its number), or the format is newer than this version.
        """
        return cls(storage, storage.read_if_exists(FILE), clock)

    def begin(self, info: Mapping[str, Any]) -> None:
        """Record a new attempt of the sweep. Call it before any other method that writes.

        Args:
            info: The command line, versions and so on, as plain JSON.

        Raises:
            StorageFull: The disk is full. Every method that writes can raise it; its line is then not recorded.
            StorageError: The file cannot be written, or another process has written it since it was read.
        """
        with self._lock:
            if self._sink is None:
                self._sink = open_file(self._storage, FILE, self._size, self._whole)
                self._whole = b""
            now = self._clock()
            self._sink.append(_line({"kind": "begin", "version": FORMAT, "time": now, "info": dict(info)}))
            self._sink.sync()
            self.attempts.append({"time": now, **info})

    def start(self, trial: Trial) -> None:
        """Record a new trial. The object itself becomes `trials[id]`."""
        line = {"kind": "start", "id": trial.id, "time": trial.started, **_sampled(trial.parameters, trial.overrides)}
        with self._lock:
            self._append(line if trial.run_id is None else {**line, "run_id": trial.run_id})
            self.trials[trial.id] = trial
            self._keep()

    def report(self, id: str, report: Report) -> None:  # noqa: A002  the trial's, as everywhere
        """Record an evaluation. If the trial continued from an earlier checkpoint and repeats an evaluation, the new report
        replaces that one and those after it, but none from before the last exploit."""
        numbers = {"evaluation": report.evaluation, "step": report.step, "value": report.value, "time": report.time}
        rest: dict[str, Any] = {"interim": True} if report.interim else {}
        if report.seconds is not None:
            rest["seconds"] = round(report.seconds, 3)
        with self._lock:
            self._append({"kind": "report", "id": id, **numbers, "metrics": dict(report.metrics), **rest})
            self._report(id, report)

    def inherit(
        self,
        id: str,  # noqa: A002
        source: str,
        evaluation: int,
        parameters: Mapping[str, Any],
        overrides: list[str],
    ) -> None:
        """Record that a trial copied the weights of `source` at `evaluation` and continues with these parameters."""
        line = {"kind": "inherit", "id": id, "from": source, "evaluation": evaluation, "time": self._clock()}
        with self._lock:
            self._append({**line, **_sampled(parameters, overrides)})
            self._inherit(id, source, evaluation, dict(parameters), list(overrides))
            self._keep()

    def end(self, id: str, status: Status, cause: str | None = None, *, trace: str | None = None) -> None:  # noqa: A002
        """Record the end of a trial: its status, the cause in one line, and the traceback, which becomes a file."""
        error = None if trace is None else self._write_traceback(f"trials/{id}/{ERROR}", trace)
        with self._lock:
            check_transition(id, self.trials[id].status, status)
            now = self._clock()
            line = {"kind": "end", "id": id, "time": now, "status": status, "cause": cause}
            self._append(line if error is None else {**line, "error": error})
            self._set(id, status, cause, now, error)
            self._keep()

    def _write_traceback(self, name: str, text: str) -> str | None:
        try:
            self._storage.write_bytes(name, text.encode(errors="replace"))
        except StorageError as failed:
            _log.warning("a traceback was not kept: %s", failed)
            return None
        return name

    def note_run(self, id: str, run_id: str) -> None:  # noqa: A002
        """Record the trial's MLflow run."""
        with self._lock:
            self._append({"kind": "run", "id": id, "run_id": run_id})
            first, self.trials[id].run_id = self.trials[id].run_id is None, run_id
            if first:  # a resumed sweep finds the run by this line
                self._keep()

    def reopen(self, id: str) -> None:  # noqa: A002
        """Record that a trial continues, or that a failed one is tried again."""
        with self._lock:
            check_transition(id, self.trials[id].status, Status.RUNNING)
            now = self._clock()
            self._append({"kind": "reopen", "id": id, "time": now})
            self._reopen(id, now)
            self._keep()

    def save(self) -> None:
        """Wait until everything is on disk or uploaded."""
        with self._lock:
            if self._sink is not None:
                self._sink.sync()

    def close(self) -> None:
        """Save everything and close the file. A second call does nothing."""
        with self._lock:
            if self._sink is not None:
                sink, self._sink = self._sink, None
                sink.close()

    # The meaning of each line, for writing and for reading

    def _report(self, id: str, report: Report) -> None:  # noqa: A002
        trial, reports = self.trials[id], self.trials[id].reports
        if report.seconds is not None:
            trial.seconds = (trial.seconds or 0.0) + report.seconds
        trial.since = report.time
        while len(reports) > self._inherited.get(id, 0) and reports[-1].evaluation >= report.evaluation:
            reports.pop()
        reports.append(report)

    def _inherit(self, id: str, source: str, evaluation: int, parameters: dict[str, Any], overrides: list[str]) -> None:  # noqa: A002
        trial = self.trials[id]
        trial.before.append((len(trial.reports), trial.parameters))
        trial.parameters, trial.overrides = parameters, overrides
        trial.inherited.append({"evaluation": evaluation, "from": source, "parameters": dict(parameters)})
        self._inherited[id] = len(trial.reports)

    def _set(
        self,
        id: str,  # noqa: A002
        status: Status,
        cause: str | None,
        ended: float | None,
        error: str | None = None,
    ) -> None:
        trial = self.trials[id]
        trial.status, trial.cause, trial.ended, trial.error = status, cause, ended, error

    def _reopen(self, id: str, now: float) -> None:  # noqa: A002
        self._set(id, Status.RUNNING, None, None)
        self.trials[id].since = now

    # Lines

    def _keep(self) -> None:
        assert self._sink is not None
        self._sink.keep()

    def _append(self, line: dict[str, Any]) -> None:
        assert self._sink is not None, "begin comes first, and nothing after close"
        assert (line["id"] in self.trials) == (line["kind"] != "start"), line["id"]
        self._sink.append(_line(line))

    def _read(self, raw: bytes, number: int) -> None:
        try:
            line = json.loads(raw)
            kind = line["kind"]
            if number == 1 and kind != "begin":
                raise ValueError("the first line must be an attempt's")
            if kind == "begin":
                version, attempt = int(line["version"]), {"time": line["time"], **line["info"]}
            else:
                self._apply(kind, line)
                return
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"{self._where}, line {number}: not a line of a sweep's journal ({error!r})") from error
        if version > FORMAT:
            raise StorageError(f"{self._where} has format {version}, this version reads {FORMAT}")
        self.attempts.append(attempt)

    def _apply(self, kind: str, line: dict[str, Any]) -> None:
        if kind == "start":
            if line["id"] in self.trials:
                raise ValueError(f"trial {line['id']} starts twice")
            parameters = {str(key): _restored(value) for key, value in line["parameters"].items()}
            trial = Trial(str(line["id"]), parameters, list(line["overrides"]), line["time"], line.get("run_id"))
            self.trials[trial.id] = trial
        elif kind == "report":
            metrics = {str(key): _number(value) for key, value in line["metrics"].items()}
            numbers = int(line["evaluation"]), int(line["step"]), _number(line["value"])
            rest = bool(line.get("interim")), line.get("seconds")
            self._report(line["id"], Report(*numbers, metrics, line["time"], *rest))
        elif kind == "inherit":
            parameters = {str(key): _restored(value) for key, value in line["parameters"].items()}
            self._inherit(line["id"], line["from"], int(line["evaluation"]), parameters, list(line["overrides"]))
        elif kind == "end":
            self._set(line["id"], Status(line["status"]), line["cause"], line["time"], line.get("error"))
        elif kind == "run":
            self.trials[line["id"]].run_id = line["run_id"]
        elif kind == "reopen":
            self._reopen(line["id"], line["time"])
        # Ignore other kinds: a later version that needs them raises the format.


def _sampled(parameters: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    kept = {
        key: {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in parameters.items()
    }
    return {"parameters": kept, "overrides": overrides}


def _restored(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value


def _number(value: Any) -> Any:
    """Return a number from its JSON form. NaN and infinity are strings."""
    if isinstance(value, str):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value


def _line(fields: dict[str, Any]) -> bytes:
    try:
        text = _ENCODER.encode(fields)
    except ValueError:  # NaN or infinity. Checking every line for them would double its cost.
        text = _ENCODER.encode(_strict(fields))
    return text.encode() + b"\n"


def _scalar(value: Any) -> Any:
    """Return NumPy scalars as Python numbers, and any other object, such as a path, as text."""
    return value.item() if hasattr(value, "item") else str(value)


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_scalar)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
