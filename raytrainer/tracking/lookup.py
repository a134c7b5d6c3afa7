"""Queries to a tracking store that are not part of logging a run: search runs, and find the directory of a run.
It also ends the MLflow run of a dead driver and registers models.

The functions raise TrackingUnreachable or TrackingDenied if the store cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

from raytrainer.errors import TrackingDenied
from raytrainer.tracking.database import is_sqlite, read_schema, sqlite_path
from raytrainer.tracking.rest import Rest, is_plain
from raytrainer.tracking.runs import CAUSE_TAG, Status
from raytrainer.tracking.server import Server, StoredRun

RUN_DIR_TAG = "raytrainer.run_dir"
SUBMISSION_TAG = "raytrainer.submission_id"
SWEEP_TAG = "raytrainer.sweep"
_IDS_PER_QUERY = 100  # run ids in one query
# Runs and sweeps have this tag; the trials of a sweep do not.
_OWN_TAG = "raytrainer.where"


def search_runs(
    tracking_uri: str, *, limit: int, user: str | None = None, status: str | None = None, sweep: str | None = None
) -> list[StoredRun]:
    """Return runs and sweeps of raytrainer, or the trials of one sweep, newest first.

    Args:
        tracking_uri: The tracking store.
        limit: The maximum number of runs.
        user: Return only runs of this user.
        status: Return only runs with this MLflow status.
        sweep: The name of a sweep, to return its trials.
    """
    where = [f"tags.`{_OWN_TAG}` LIKE '%'" if sweep is None else f"tags.`{SWEEP_TAG}` = '{_quoted(sweep)}'"]
    if user is not None:
        where.append(f"tags.`mlflow.user` = '{_quoted(user)}'")
    if status is not None:
        where.append(f"attributes.status = '{_quoted(status)}'")
    return _search(tracking_uri, " AND ".join(where), limit)


def find_run(tracking_uri: str, identifier: str) -> StoredRun | None:
    """Return the run of raytrainer with this MLflow id, name (the newest with the name) or Ray submission id."""
    name = _quoted(identifier)
    for where in (
        f"attributes.run_id = '{name}'",
        f"attributes.run_name = '{name}'",
        f"tags.`{SUBMISSION_TAG}` = '{name}'",
    ):
        runs = [run for run in _search(tracking_uri, where, 20) if RUN_DIR_TAG in run.tags]
        if runs:
            return runs[0]
    return None


def missing(tracking_uri: str, run_ids: Iterable[str]) -> set[str]:
    """Return those of these MLflow run ids whose run was deleted or is not in the store."""
    wanted = sorted(set(run_ids))
    there = set[str]()
    for first in range(0, len(wanted), _IDS_PER_QUERY):
        part = wanted[first : first + _IDS_PER_QUERY]
        listed = ", ".join(f"'{_quoted(run_id)}'" for run_id in part)
        there |= {run.run_id for run in _search(tracking_uri, f"attributes.run_id IN ({listed})", len(part))}
    return set(wanted) - there


def find_launched(tracking_uri: str, name: str, run_dir: str, submission_id: str | None) -> StoredRun | None:
    """Return a run whose MLflow id is not known: the newest run of this job or with this name, in this directory.

    The directory must match, because a run on another cluster may have the same name and the same submission id.

    Args:
        tracking_uri: The tracking store.
        name: The name of the run.
        run_dir: The storage of the run, without options.
        submission_id: The submission id of its job, if it has one.
    """
    filters = [f"attributes.run_name = '{_quoted(name)}'"]
    if submission_id is not None:
        filters.insert(0, f"tags.`{SUBMISSION_TAG}` = '{_quoted(submission_id)}'")
    for where in filters:
        for run in _search(tracking_uri, where, 20):
            if RUN_DIR_TAG in run.tags and run_dir_of(run).partition("?")[0].rstrip("/") == run_dir:
                return run
    return None


def find_own_dir(tracking_uri: str, identifier: str) -> str | None:
    """Return the directory of the run or trial that `find_run` returns, which holds its checkpoints."""
    run = find_run(tracking_uri, identifier)
    return None if run is None else run.tags[RUN_DIR_TAG]


def run_dir_of(run: StoredRun) -> str:
    """Return the directory that holds the run record; for a trial, the sweep's directory."""
    place = run.tags[RUN_DIR_TAG]
    if SWEEP_TAG not in run.tags:
        return place
    path, mark, query = place.partition("?")
    return path.rpartition("/trials/")[0] + mark + query


def reach(tracking_uri: str) -> None:
    """Connect to the store, so that later calls need no import and no first connection."""
    Server(tracking_uri).probe()


def close_run(
    tracking_uri: str, run_id: str, status: Status, cause: str, ended: float, tags: Mapping[str, str] | None = None
) -> bool:
    """Set the final status of a run whose own driver is dead.

    Args:
        tracking_uri: The tracking store.
        run_id: The MLflow run id.
        status: The final status.
        cause: The reason, in one line.
        ended: The end, in seconds since the epoch.
        tags: Further tags to set.

    Returns:
        False if the run has already ended or does not exist.
    """
    server = Server(tracking_uri)
    # Query again: a driver that was considered dead may have ended its run in the meantime.
    runs = server.search(f"attributes.run_id = '{_quoted(run_id)}'", 1)
    if not runs or runs[0].status != "RUNNING":
        return False
    server.log_batch(run_id, [], {CAUSE_TAG: cause, **(tags or {})})
    server.set_terminated(run_id, status, int(ended * 1e3))
    return True


def register_model(tracking_uri: str, run_id: str, folder: str, name: str) -> str:
    """Register the model in `folder` of the run's artifacts as a new version of `name`. Return the version.

    Raises:
        TrackingError: The store has no such artifact, or no model registry.
    """
    return Server(tracking_uri, timeout_s=30).create_model_version(run_id, folder, name)


def _search(tracking_uri: str, where: str, limit: int) -> list[StoredRun]:
    if is_sqlite(tracking_uri):
        schema = read_schema(sqlite_path(tracking_uri))
        if schema is None or schema.is_empty:
            return []  # MLflow would create the database, but a query must not change anything
    if is_plain(tracking_uri):
        # MLflow's client may find further credentials (.netrc, headers from a plugin).
        with suppress(TrackingDenied):
            return Rest(tracking_uri).search(where, limit)
    return Server(tracking_uri).search(where, limit)


def _quoted(text: str) -> str:
    return text.replace("'", "").replace("\\", "")
