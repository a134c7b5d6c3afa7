"""The result files of a sweep: tables of its trials for other programs, the best trial as an experiment that can be
run, and two pictures. They are in the sweep's directory and in the artifacts."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from raytrainer.config.standalone import as_experiment
from raytrainer.storage import Storage
from raytrainer.sweep import pictures
from raytrainer.sweep.journal import Mode, Report, Trial
from raytrainer.sweep.lineage import best_parameters, parameter_segments, parameters_at
from raytrainer.sweep.table import ranked, schedule_text, short_names, written

if TYPE_CHECKING:
    from raytrainer.sweep.plan import Plan

PARQUET, CSV = "trials.parquet", "trials.csv"
BEST = "best/experiment/best.yaml"  # for --config-dir=…/best experiment=best
PROGRESS, PARAMETERS = "progress.png", "parameters.png"
_FOLDER = "sweep"  # the folder in the artifacts
_INT64 = 2**63


def write(storage: Storage, *, trials: Sequence[Trial], plan: Plan) -> None:
    """Write all result files into a sweep's directory, each one atomically.

    Args:
        storage: The sweep's directory.
        trials: All trials, in the order in which they were sampled.
        plan: The plan of the sweep.

    Raises:
        StorageError: A file cannot be written.
    """
    metric, mode = plan.metric, cast(Mode, plan.mode)
    write_tables(storage, trials=trials, keys=[p.key for p in plan.parameters], mode=mode)
    for trial in ranked(trials, mode)[:1]:
        text = plan.composition_of(best_parameters(trial, mode)).text
        about = _about(trial, trials, plan.experiment.name, metric, mode)
        storage.write_bytes(BEST, as_experiment(text, about).encode())
    storage.write_bytes(PROGRESS, pictures.progress_png(trials, metric=metric, mode=mode))
    storage.write_bytes(PARAMETERS, pictures.parameters_png(trials, plan.parameters, metric=metric, mode=mode))


def write_tables(storage: Storage, *, trials: Sequence[Trial], keys: Sequence[str], mode: Mode) -> None:
    """Write `trials_table` as Parquet and as CSV."""
    table = trials_table(trials, keys, mode)
    storage.write_bytes(PARQUET, _as_parquet(table))
    storage.write_bytes(CSV, _as_csv(table))


@contextlib.contextmanager
def as_folder(storage: Storage) -> Iterator[Path]:
    """Provide a temporary local folder with copies of the files that `write` has written."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, _FOLDER)
        for name in (PARQUET, CSV, BEST, PROGRESS, PARAMETERS):
            data = storage.read_if_exists(name)
            if data is not None:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        yield folder


def trials_table(trials: Sequence[Trial], keys: Sequence[str], mode: Mode) -> Any:
    """Return the trials as a `pyarrow.Table`, one per row. Missing values are null.

    Columns: `id`, `status`; `value`, `evaluation`, `step` of the best report; `last_value`, `evaluations`, `steps` of
    the last report; `started`, `seconds`, `cause`, `run_id`; `inherited` with population based training, e.g.
    `0002@4 0001@8` (after evaluation 4 the trial continued from a copy of trial 0002); `parameter/KEY` at the best
    report, as numbers, or as text if the types are mixed; `metric/NAME` of the last report.
    """
    import pyarrow as pa

    last = [trial.reports[-1] if trial.reports else None for trial in trials]
    best = [trial.best(mode) for trial in trials]
    columns: dict[str, Any] = {
        "id": pa.array([t.id for t in trials], pa.string()),
        "status": pa.array([str(t.status) for t in trials], pa.string()),
        "value": pa.array(_fields(best, "value"), pa.float64()),
        "evaluation": pa.array(_fields(best, "evaluation"), pa.int64()),
        "step": pa.array(_fields(best, "step"), pa.int64()),
        "last_value": pa.array(_fields(last, "value"), pa.float64()),
        "evaluations": pa.array(_fields(last, "evaluation"), pa.int64()),
        "steps": pa.array(_fields(last, "step"), pa.int64()),
        "started": pa.array([round(t.started * 1000) for t in trials], pa.timestamp("ms", "UTC")),
        "seconds": pa.array([None if t.ended is None else t.took() for t in trials], pa.float64()),
        "cause": pa.array([t.cause for t in trials], pa.string()),
        "run_id": pa.array([t.run_id for t in trials], pa.string()),
    }
    if any(t.inherited for t in trials):
        columns["inherited"] = pa.array([_exploits(t) for t in trials], pa.string())
    return pa.table(columns | _parameter_columns(trials, keys, mode) | _metric_columns(last))


def _fields(reports: Sequence[Report | None], field: str) -> list[Any]:
    return [report and getattr(report, field) for report in reports]


def _exploits(trial: Trial) -> str | None:
    return " ".join(f"{exploit['from']}@{exploit['evaluation']}" for exploit in trial.inherited) or None


def _parameter_columns(trials: Sequence[Trial], keys: Sequence[str], mode: Mode) -> dict[str, Any]:
    parameters = [best_parameters(trial, mode) for trial in trials]
    all_keys = dict.fromkeys([*keys, *(key for own in parameters for key in own)])
    return {f"parameter/{key.lstrip('+')}": _typed([own.get(key) for own in parameters]) for key in all_keys}


def _metric_columns(reports: Sequence[Report | None]) -> dict[str, Any]:
    import pyarrow as pa

    metrics = [report.metrics if report else {} for report in reports]
    names = dict.fromkeys(name for own in metrics for name in own)
    return {f"metric/{name}": pa.array([own.get(name) for own in metrics], pa.float64()) for name in names}


def _typed(values: Sequence[Any]) -> Any:
    """Return a column of the narrowest type for all values: bool, int64, float64, else text as on the command line."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value is None or -_INT64 <= value < _INT64 for value in values):
        return pa.array(values, pa.int64())
    if kinds in ({float}, {int, float}):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return pa.array([None if value is None else text for value, text in zip(values, texts, strict=True)], pa.string())


def _as_parquet(table: Any) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def _as_csv(table: Any) -> bytes:
    import pyarrow.csv

    out = io.BytesIO()
    pyarrow.csv.write_csv(table, out)
    return out.getvalue()


def _about(trial: Trial, trials: Sequence[Trial], sweep: str | None, metric: str, mode: Mode) -> list[str]:
    best = trial.best(mode)
    assert best is not None
    parameters = parameters_at(trial, best)
    names = short_names(parameters)
    lines = [
        f"The best trial of the sweep {sweep}: {trial.id}, {metric} {best.value:.4g} at step {best.step}, with "
        + ", ".join(f"{names[key]} {written(value)}" for key, value in parameters.items()),
        "python -m raytrainer --config-dir=… experiment=best runs it, given the directory that holds experiment/.",
    ]
    if len(path := parameter_segments(trial, best, trials)) > 1:
        lines.append(f"Trained under a schedule, of which these are the last parameters: {schedule_text(path)}.")
    return lines
