"""The outcome of an attempt, and the text about it for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from raytrainer.attempt.record import Record
from raytrainer.progress import duration

Status = Literal["FINISHED", "FAILED", "KILLED"]
WORDS: Mapping[Status, str] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
Row = tuple[str, str]  # a row of a summary: a name, empty if it repeats the row above, and a text


@dataclass(frozen=True)
class AttemptOutcome:
    """The end of an attempt of a run or a sweep.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        exit_code: 0, 1, 129, 130 or 143.
        record: The record of the run or sweep.
        where: Where it ran, e.g. `local Ray, 2 workers on CPU`.
        cause: Why it failed, in one line.
        traceback: The traceback of the worker that failed first.
        mlflow: The address to open; None without tracking.
        mlflow_command: The command that opens MLflow if there is no server.
        seconds: The duration of this attempt, from its launch to its end. `record.seconds` has the total.
        gone: Whether the directory was deleted during the attempt.
    """

    status: Status
    exit_code: int
    record: Record
    where: str
    _: KW_ONLY
    cause: str | None = None
    traceback: str | None = field(default=None, repr=False)
    mlflow: str | None = None
    mlflow_command: str | None = None
    seconds: float = 0.0
    gone: bool = False


@dataclass(frozen=True)
class Outcome(AttemptOutcome):
    """The end of an attempt of a run.

    Attributes:
        result: The values of `FitResult`; None if training did not end by itself.
        step: Optimizer steps done, if known.
        length: The key that limits the length of the run; a higher value lets it continue.
    """

    result: Mapping[str, Any] | None = None
    _: KW_ONLY
    step: int | None = None
    length: str = "trainer.max_epochs"


def summary(outcome: Outcome, program: str) -> str:
    """Return the summary of a launch: the result, where everything is, and the next command."""
    record, result = outcome.record, outcome.result or {}
    if "checkpoint" in result:
        return _evaluation_summary(outcome, result)
    reason = result.get("reason", "finished")
    why = "" if reason in ("finished", "stopped") else f" ({reason.replace('_', ' ')})"
    steps = f", {outcome.step} steps" if outcome.step else ""
    rows = [("outcome", f"{WORDS[outcome.status]}{why}{steps} in {took(record, outcome.seconds)}")]
    if outcome.cause and outcome.status == "FAILED":
        rows.append(("cause", outcome.cause))
    rows.append(("where", outcome.where))
    if result.get("best"):
        rows.append(("best", _best(result)))
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {record.run_id}"))
    if outcome.gone:
        rows.append(("output", f"{record.run_dir} is gone, and with it the run's checkpoints"))
    elif record.run_dir:
        rows.append(("output", record.run_dir))
        more = f" {outcome.length}=…" if outcome.status == "FINISHED" else ""
        rows += next_rows([outcome.mlflow_command, f"{program} resume {record.name}{more}"])
    return as_text(rows)


def as_text(rows: Sequence[Row], width: int = 8) -> str:
    return "\n".join(f"{name:<{width}} {text}" for name, text in rows)


def next_rows(commands: Sequence[str | None]) -> list[Row]:
    """Return the rows of a summary that show which commands the user may want to type next."""
    return [("" if i else "next", text) for i, text in enumerate(command for command in commands if command)]


def _best(result: Mapping[str, Any]) -> str:
    value, step = result["best"]
    return f"{result['monitor']} {value:.4g} at step {step}"


def took(record: Record, seconds: float) -> str:
    """Return the duration of a run: `0:21`, or with several attempts `1:05 in 2 attempts, the last 0:21`."""
    if record.attempts < 2 or not record.seconds:
        return duration(seconds)
    return f"{duration(record.seconds)} in {record.attempts} attempts, the last {duration(seconds)}"


def _evaluation_summary(outcome: Outcome, result: Mapping[str, Any]) -> str:
    """Return the summary of an evaluation, with every metric."""
    rows = [("outcome", f"step {result['step']} evaluated in {duration(outcome.seconds)}"), ("where", outcome.where)]
    rows += [(name, f"{value:.6g}") for name, value in result["metrics"].items()]
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {outcome.record.run_id}"))
    rows.append(("output", outcome.record.run_dir))
    return as_text(rows, max(8, *(len(name) for name in result["metrics"])))


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of runs that were started one after the other, with the outcome of each."""
    rows = [("run", "outcome", "time", "best")]
    for outcome in outcomes:
        best = _best(outcome.result) if outcome.result and outcome.result.get("best") else "-"
        last = outcome.cause if outcome.status == "FAILED" and outcome.cause else best
        rows.append((outcome.record.name, WORDS[outcome.status], duration(outcome.seconds), last))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{wide[0]}}  {status:<{wide[1]}}  {time:>{wide[2]}}  {last}" for name, status, time, last in rows
    )
