"""The result files of a sweep: tables of its trials for other programs, the best trial as an experiment that can be
run, and two pictures. They are in the sweep's directory and in the artifacts."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer.config.standalone import as_experiment
from raytrainer.storage import Storage
from raytrainer.sweep import pictures as draw
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import best_parameters, parameter_segments, parameters_at
from raytrainer.sweep.table import ranked, schedule_text, short_names, written

if TYPE_CHECKING:
    from raytrainer.sweep.plan import Plan

PARQUET, CSV = "trials.parquet", "trials.csv"
BEST = "best/experiment/best.yaml"  # for --config-dir=…/best experiment=best
PROGRESS, PARAMETERS = "progress.png", "parameters.png"
_FOLDER = "sweep"  # the folder in the artifacts
_INT64 = 2**63


def write(
    storage: Storage, *, trials: Sequence[Trial], plan: Plan, metric: str, mode: Mode, pictures: bool = True
) -> None:
    """Write all result files into a sweep's directory, each one atomically.

    Args:
        storage: The sweep's directory.
        trials: All trials, in the order in which they were sampled.
        plan: The plan of the sweep.
        metric, mode: The metric of the trials' values, and which direction is better.
        pictures: Whether to draw the pictures, which takes a second. If False, earlier pictures are deleted.

    Raises:
        StorageError: A file cannot be written.
    """
    write_tables(storage, trials=trials, keys=[p.key for p in plan.parameters], mode=mode)
    for trial in ranked(trials, mode)[:1]:
        text = plan.composition_of(best_parameters(trial, mode)).text
        about = _about(trial, trials, plan.experiment.name, metric, mode)
        storage.write_bytes(BEST, as_experiment(text, about).encode())
    if pictures:
        storage.write_bytes(PROGRESS, draw.progress_png(trials, metric=metric, mode=mode))
        storage.write_bytes(PARAMETERS, draw.parameters_png(trials, plan.parameters, metric=metric, mode=mode))
    else:
        storage.delete(PROGRESS)
        storage.delete(PARAMETERS)


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
        "status": pa.array([t.status for t in trials], pa.string()),
        "value": pa.array([r and r.value for r in best], pa.float64()),
        "evaluation": pa.array([r and r.evaluation for r in best], pa.int64()),
        "step": pa.array([r and r.step for r in best], pa.int64()),
        "last_value": pa.array([r and r.value for r in last], pa.float64()),
        "evaluations": pa.array([r and r.evaluation for r in last], pa.int64()),
        "steps": pa.array([r and r.step for r in last], pa.int64()),
        "started": pa.array([round(t.started * 1000) for t in trials], pa.timestamp("ms", "UTC")),
        "seconds": pa.array([None if t.ended is None else t.took() for t in trials], pa.float64()),
        "cause": pa.array([t.cause for t in trials], pa.string()),
        "run_id": pa.array([t.run_id for t in trials], pa.string()),
    }
    if any(t.inherited for t in trials):
        told = [" ".join(f"{one['from']}@{one['evaluation']}" for one in t.inherited) or None for t in trials]
        columns["inherited"] = pa.array(told, pa.string())
    parameters = [best_parameters(t, mode) for t in trials]
    for key in dict.fromkeys([*keys, *(key for own in parameters for key in own)]):
        columns[f"parameter/{key.lstrip('+')}"] = _typed([own.get(key) for own in parameters])
    for name in dict.fromkeys(name for r in last if r for name in r.metrics):
        columns[f"metric/{name}"] = pa.array([r.metrics.get(name) if r else None for r in last], pa.float64())
    return pa.table(columns)


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
    return pa.array([None if value is None else _as_text(value) for value in values], pa.string())


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    told = [
        f"The best trial of the sweep {sweep}: {trial.id}, {metric} {best.value:.4g} at step {best.step}, with "
        + ", ".join(f"{names[key]} {written(value)}" for key, value in parameters.items()),
        "python -m raytrainer --config-dir=… experiment=best runs it, given the directory that holds experiment/.",
    ]
    if len(path := parameter_segments(trial, best, trials)) > 1:
        told.append(f"Trained under a schedule, of which these are the last parameters: {schedule_text(path)}.")
    return told
