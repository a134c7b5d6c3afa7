"""Questions to a tracking store that are not part of logging a run: which runs there are, where one is, what it left;
and two answers for it: a dead run's end, and a registered model."""

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
_AT_ONCE = 100  # ids in a question
# Runs and sweeps have it, the trials of a sweep have not.
_OWN_TAG = "raytrainer.where"


def search_runs(
    tracking_uri: str, *, limit: int, user: str | None = None, status: str | None = None, sweep: str | None = None
) -> list[StoredRun]:
    """Runs and sweeps of ours, or the trials of one sweep, the newest first.

    Args:
        tracking_uri: Where.
        limit: The most that are returned.
        user: Only those of this user.
        status: Only those with this status of MLflow's.
        sweep: The name of the sweep whose trials are meant.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    where = [f"tags.`{_OWN_TAG}` LIKE '%'" if sweep is None else f"tags.`{SWEEP_TAG}` = '{_quoted(sweep)}'"]
    if user is not None:
        where.append(f"tags.`mlflow.user` = '{_quoted(user)}'")
    if status is not None:
        where.append(f"attributes.status = '{_quoted(status)}'")
    return _search(tracking_uri, " AND ".join(where), limit)


def find_run(tracking_uri: str, identifier: str) -> StoredRun | None:
    """The run of ours with this MLflow id, name (the newest of it) or Ray submission id.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    name = _quoted(identifier)
    for where in (
        f"attributes.run_id = '{name}'",
        f"attributes.run_name = '{name}'",
        f"tags.`{SUBMISSION_TAG}` = '{name}'",
    ):
        found = [run for run in _search(tracking_uri, where, 20) if RUN_DIR_TAG in run.tags]
        if found:
            return found[0]
    return None


def missing(tracking_uri: str, run_ids: Iterable[str]) -> set[str]:
    """Those of these ids of MLflow's that the store has no run of any more, or only a deleted one.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    asked = sorted(set(run_ids))
    there = set[str]()
    for first in range(0, len(asked), _AT_ONCE):
        part = asked[first : first + _AT_ONCE]
        listed = ", ".join(f"'{_quoted(run_id)}'" for run_id in part)
        there |= {run.run_id for run in _search(tracking_uri, f"attributes.run_id IN ({listed})", len(part))}
    return set(asked) - there


def find_launched(tracking_uri: str, name: str, run_dir: str, submission_id: str | None) -> StoredRun | None:
    """The run of ours of which no id in MLflow is known: the newest of this name, or of this job, in this directory.

    Another's run may have both, at another cluster and in another place.

    Args:
        tracking_uri: Where.
        name: The run's.
        run_dir: Its storage, without options.
        submission_id: Of its job.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    asked = [f"attributes.run_name = '{_quoted(name)}'"]
    if submission_id is not None:
        asked.insert(0, f"tags.`{SUBMISSION_TAG}` = '{_quoted(submission_id)}'")
    for where in asked:
        for run in _search(tracking_uri, where, 20):
            if RUN_DIR_TAG in run.tags and run_dir_of(run).partition("?")[0].rstrip("/") == run_dir:
                return run
    return None


def find_run_dir(tracking_uri: str, identifier: str) -> str | None:
    """The storage of a run, found as by `find_run`; of a trial its sweep's. None: no run of ours.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    found = find_run(tracking_uri, identifier)
    return None if found is None else run_dir_of(found)


def find_own_dir(tracking_uri: str, identifier: str) -> str | None:
    """As `find_run_dir`, but of a trial its own directory, which has its checkpoints.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    found = find_run(tracking_uri, identifier)
    return None if found is None else found.tags[RUN_DIR_TAG]


def run_dir_of(run: StoredRun) -> str:
    """Where its record is: of a trial the sweep's directory."""
    place = run.tags[RUN_DIR_TAG]
    if SWEEP_TAG not in run.tags:
        return place
    path, mark, query = place.partition("?")
    return path.rpartition("/trials/")[0] + mark + query


def reach(tracking_uri: str) -> None:
    """Gets ready for telling the store something: what follows takes no import and no first connection.

    Raises:
        TrackingUnreachable, TrackingDenied: It cannot be told anything.
    """
    Server(tracking_uri).probe()


def close_run(
    tracking_uri: str, run_id: str, status: Status, cause: str, ended: float, tags: Mapping[str, str] | None = None
) -> bool:
    """Ends a run whose own process cannot any more; False: it has ended, or is gone.

    Args:
        tracking_uri: Where.
        run_id: MLflow's.
        status: How it ended.
        cause: Why, in a line.
        ended: When, in seconds since the epoch.
        tags: Further ones.

    Raises:
        TrackingError: The store cannot be told.
    """
    server = Server(tracking_uri)
    # Asked again: whoever was thought dead may have told its end in between.
    found = server.search(f"attributes.run_id = '{_quoted(run_id)}'", 1)
    if not found or found[0].status != "RUNNING":
        return False
    server.log_batch(run_id, [], {CAUSE_TAG: cause, **(tags or {})})
    server.set_terminated(run_id, status, int(ended * 1e3))
    return True


def register_model(tracking_uri: str, run_id: str, folder: str, name: str) -> str:
    """Registers the model in `folder` of the run's artifacts as a new version of `name`; returns the version.

    Raises:
        TrackingError: The store has no such artifact, or no registry.
    """
    return Server(tracking_uri, timeout_s=30).create_model_version(run_id, folder, name)


def _search(tracking_uri: str, where: str, limit: int) -> list[StoredRun]:
    if is_sqlite(tracking_uri):
        schema = read_schema(sqlite_path(tracking_uri))
        if schema is None or schema.is_empty:
            return []  # MLflow would create it, and a question leaves nothing behind
    if is_plain(tracking_uri):
        # MLflow's client may know of more ways to say who we are (.netrc, a plugin's headers).
        with suppress(TrackingDenied):
            return Rest(tracking_uri).search(where, limit)
    return Server(tracking_uri).search(where, limit)


def _quoted(text: str) -> str:
    return text.replace("'", "").replace("\\", "")
