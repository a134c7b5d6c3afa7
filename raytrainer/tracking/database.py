"""Create the SQLite file behind a `sqlite:///` tracking URI exactly once, and check it without importing MLflow.

MLflow creates its schema with about seventy migrations and without a lock. If several processes start in one folder for
the first time, all but one would fail. A process that is killed meanwhile would leave an incomplete database.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raytrainer.errors import ConfigError, TrackingUnreachable
from raytrainer.tracking.mlflow_internals import create_store, migrations

_LOCK_S = 60.0  # creating a database takes about 2 s; a process that holds the lock longer is stopped or hangs
_BUSY_S = 10.0  # MLflow's own writes take milliseconds
_CHANGE_S, _MIGRATION_S = 0.5, 20.0  # a schema that does not change for this long is not being migrated


@dataclass(frozen=True)
class Schema:
    """The schema of a database.

    Attributes:
        tables: The names of its tables.
        revision: The revision of MLflow's schema; None if it has none.
        runs: The number of runs in it.
    """

    tables: frozenset[str]
    revision: str | None
    runs: int

    @property
    def is_empty(self) -> bool:
        return not self.tables


def is_sqlite(tracking_uri: str) -> bool:
    """Return whether a tracking URI names a SQLite file."""
    return re.match(r"sqlite(\+\w+)?:", tracking_uri) is not None


def lost_database(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite store if it no longer exists; None if it exists or the store is not SQLite."""
    if not tracking_uri.startswith("sqlite:"):
        return None
    path = sqlite_path(tracking_uri)
    return None if path.exists() else path


def sqlite_path(tracking_uri: str) -> Path:
    """Return the absolute path of the file in a `sqlite:///` URL."""
    return Path(re.sub(r"^sqlite(\+\w+)?:///", "", tracking_uri).split("?")[0]).absolute()


def default_tracking_uri(root: Path) -> str:
    """Return the URI of the SQLite store in a directory: `sqlite:////ABS/mlflow.db`."""
    path = root.absolute() / "mlflow.db"
    # SQLAlchemy 2.1 unquotes the path, but MLflow and SQLAlchemy 2.0 do not. A quoted path would name two different
    # files.
    if re.search(r"\?|%[0-9A-Fa-f]{2}", str(path)):
        raise ConfigError(
            f"a path with a question mark or a %-escape cannot be in a database URL: {path};"
            " run in another directory, or give the address of a tracking server",
            key="tracking.tracking_uri",
        )
    return f"sqlite:///{path}"


def default_artifact_root(tracking_uri: str) -> str | None:
    """Return the file URI of `mlartifacts` beside a SQLite store; None for a server, which chooses its own root."""
    if not is_sqlite(tracking_uri):
        return None
    return (sqlite_path(tracking_uri).parent / "mlartifacts").as_uri()


def check_writable(tracking_uri: str) -> None:
    """Check that a run can be logged into the database file. This does not create the file.

    Raises:
        TrackingUnreachable: It cannot be written; the message names the reason (permissions, another schema, a file of
            another program, or a lock).
    """
    path = sqlite_path(tracking_uri)
    if path.is_dir():
        raise TrackingUnreachable(
            f"the tracking database {path} is a directory: tracking.tracking_uri must name a file, such as"
            f" sqlite:///{path}/mlflow.db"
        )
    folder = next(parent for parent in path.parents if parent.exists())
    try:
        # SQLite writes a journal beside the file. The permissions alone are not enough: root may write to /proc, but no
        # file can be created there.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrackingUnreachable(f"the tracking database {path} cannot be written: {error.strerror}") from error
    if not path.exists():
        return
    if not os.access(path, os.W_OK):
        raise TrackingUnreachable(f"the tracking database {path} cannot be written: permission denied")
    check_schema(tracking_uri)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # needs the same permissions and locks as a write, but writes nothing
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def check_schema(tracking_uri: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Check that an existing database has the schema of the installed MLflow.

    While another process migrates the schema, wait for it, at most 20 s.

    Args:
        tracking_uri: The URI of a SQLite database.
        sleep: Waits for a number of seconds. Replaced in tests.

    Raises:
        TrackingUnreachable: The database has another schema, or the file is not an MLflow database.
    """
    path, deadline = sqlite_path(tracking_uri), time.monotonic() + _MIGRATION_S
    before: Schema | None = None
    while True:
        schema = read_schema(path)
        if schema is None or schema.is_empty or schema.revision == known_revisions()[0]:
            return
        is_mlflows = schema.revision in known_revisions()[1] or "experiments" in schema.tables
        if not is_mlflows or schema == before or time.monotonic() > deadline:
            break
        before = schema
        sleep(_CHANGE_S)
    problem = schema_problem(f"sqlite:///{path}", schema.revision) if is_mlflows else _foreign(path, schema)
    if is_mlflows and not schema.runs:
        problem += "; it holds no run, so it can also be deleted"
    raise TrackingUnreachable(problem)


def schema_problem(shown: str, revision: str | None) -> str:
    """Return one sentence that says why the installed MLflow cannot use a database with another schema, and the fix.

    Args:
        shown: The database's URI, without a password.
        revision: The revision of the database's schema; None if it has none.
    """
    head, known = known_revisions()
    installed = f"MLflow {_mlflow_version()} (schema {head})"
    if revision is None:
        return (
            f"the tracking database {shown} has an incomplete schema: its creation was interrupted, or it was created"
            f" by MLflow before 1.0; back it up, then run `mlflow db upgrade {shown}`"
        )
    if revision in known:
        return (
            f"the tracking database {shown} has the schema {revision} of an older MLflow, and {installed} is installed:"
            f" back it up, then run `mlflow db upgrade {shown}`"
        )
    return (
        f"the tracking database {shown} has the schema {revision} of a newer MLflow, which {installed} cannot read:"
        " install the MLflow version that created it, or name another database in tracking.tracking_uri"
    )


def read_schema(path: Path) -> Schema | None:
    """Return the schema of a database; None if the file does not exist.

    Raises:
        TrackingUnreachable: The file is not a SQLite database, or it is locked or unreadable.
    """
    if not path.exists():
        return None
    try:
        try:
            return _schema(path, "ro")
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or not os.access(path, os.W_OK):
                raise
            return _schema(path, "rw")  # SQLite must first roll back the transaction of a process that was killed
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def _schema(path: Path, mode: str) -> Schema:
    # Open the file only through SQLite. Closing any other descriptor of it would drop the locks that SQLite holds in
    # this process.
    connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S)
    with contextlib.closing(connection):
        tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        versioned = "alembic_version" in tables
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if versioned else None
        runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0] if "runs" in tables else 0
    return Schema(frozenset(tables), None if row is None else str(row[0]), int(runs))


def read_experiment(tracking_uri: str, name: str) -> tuple[str, str] | None:
    """Return the id and lifecycle stage (`active` or `deleted`) of an experiment; None if it does not exist.

    Raises:
        TrackingUnreachable: The database cannot be read.
    """
    path = sqlite_path(tracking_uri)
    schema = read_schema(path)
    if schema is None or "experiments" not in schema.tables:
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as connection:
            query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
            row = connection.execute(query, (name,)).fetchone()
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    return None if row is None else (str(row[0]), str(row[1]))


def create(tracking_uri: str) -> None:
    """Create the database if it does not exist. Several processes may do so at once: all get the same one.

    The file is created under a temporary name and then renamed, so that no process sees an incomplete database, even if
    this process is killed.
    """
    path = sqlite_path(tracking_uri)
    if _is_there(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.parent) as is_locked:
        if _is_there(path):
            return
        if is_locked:  # no other process is creating the database, so these files are left from one that was killed
            for leftover in path.parent.glob(f".{path.name}.new-*"):
                leftover.unlink(missing_ok=True)
        new = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
        try:
            create_store(new, default_artifact_root(tracking_uri))
            _publish(new, path)
        finally:
            for leftover in path.parent.glob(f"{new.name}*"):
                leftover.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    """Return whether the file exists and is not empty, so that it must not be replaced."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _publish(new: Path, path: Path) -> None:
    """Give a finished file its final name, unless another process was faster."""
    try:
        os.link(new, path)
        return
    except FileExistsError:
        if _is_there(path):
            return
    except OSError:  # a file system without hard links
        if _is_there(path):
            return
    new.replace(path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock the folder against other processes that create a database.

    The lock is on the folder itself and leaves no file. Yields False if the file system has no locks, or if another
    process holds the lock for too long.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        except OSError:
            # NFS needs a writable descriptor for a lock. Without the lock, `_publish` still gives the name only once.
            return False
        time.sleep(0.05)


@lru_cache(maxsize=1)
def known_revisions() -> tuple[str, frozenset[str]]:
    """Return the schema revision that the installed MLflow expects, and all revisions that it knows.

    They are read from MLflow's migration scripts, because importing MLflow takes a second.
    """
    revisions, parents = set[str](), set[str]()
    for script in migrations().glob("*.py"):
        text = script.read_text(encoding="utf-8")
        for name, kept in (("revision", revisions), ("down_revision", parents)):
            match = re.search(rf"^{name}\s*(?::[^=\n]+)?=\s*(\([^)]*\)|.*)$", text, re.MULTILINE)
            kept.update(re.findall(r"[\"'](\w+)[\"']", match[1]) if match else ())
    (head,) = revisions - parents
    return head, frozenset(revisions)


def _mlflow_version() -> str:
    try:
        return version("mlflow")
    except PackageNotFoundError:  # MLflow is installed by another distribution, such as mlflow-skinny
        return "here"


def _foreign(path: Path, schema: Schema) -> str:
    tables = ", ".join(sorted(schema.tables)[:5])
    return (
        f"the tracking database {path} is a SQLite database of another program (its tables: {tables}):"
        " name another file in tracking.tracking_uri"
    )


def _unusable(path: Path, error: sqlite3.Error) -> TrackingUnreachable:
    text = str(error)
    if "locked" in text:
        return TrackingUnreachable(
            f"the tracking database {path} has been locked by another process for more than {_BUSY_S:g} s: end that process,"
            f" which `fuser {path}` names"
        )
    if "not a database" in text or "malformed" in text:
        return TrackingUnreachable(
            f"the tracking database {path} is not a SQLite database, or is damaged ({text}): restore it from a backup,"
            " or name another file in tracking.tracking_uri"
        )
    return TrackingUnreachable(f"the tracking database {path} cannot be used: {text}")
