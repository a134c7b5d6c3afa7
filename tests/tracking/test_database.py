"""MLflow's SQLite file: created once by concurrent processes, completely or not at all, and refused with one sentence
if MLflow cannot use it."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from raytrainer.errors import TrackingUnreachable
from raytrainer.tracking import check_tracking, database, default_tracking_uri, open_run
from raytrainer.tracking.lookup import search_runs
from raytrainer.tracking.server import Server, _translated


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database of the installed MLflow with one run."""
    uri = default_tracking_uri(tmp_path_factory.mktemp("made"))
    open_run(uri, "digits", "first", params={}, tags={"raytrainer.where": "here"}).finish("FINISHED")
    return database.sqlite_path(uri)


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "mlflow.db"))


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def launch(uri: str, number: int, results: multiprocessing.Queue[str]) -> None:
    """Make a driver's first calls, in its own process."""
    try:
        check_tracking(uri)
        run = open_run(uri, "digits", f"run-{number}", params={"n": str(number)}, tags={"raytrainer.where": "here"})
        run.finish("FINISHED")
        results.put("finished")
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")
        raise


def test_six_first_launches_at_once_get_one_database_and_one_experiment(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, fresh = default_tracking_uri(tmp_path), Path(shutil.copy(made, tmp_path.parent / "fresh.db"))
    execute(fresh, *(f"DELETE FROM {table}" for table in ("tags", "params", "runs")))
    execute(fresh, "DELETE FROM experiments WHERE name = 'digits'")

    def make(path: Path, artifact_root: str | None) -> None:
        time.sleep(0.2)  # so that the others arrive meanwhile
        shutil.copy(fresh, path)  # seventy migrations in each of six processes would take a minute

    monkeypatch.setattr(database, "create_store", make)
    context = multiprocessing.get_context("fork")  # MLflow is already imported
    results = context.Queue()
    processes = [context.Process(target=launch, args=(uri, number, results)) for number in range(6)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == ["finished"] * 6
    for process in processes:
        process.join()
    assert sorted(run.name for run in search_runs(uri, limit=10)) == [f"run-{number}" for number in range(6)]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("SELECT name FROM experiments ORDER BY 1").fetchall() == [("Default",), ("digits",)]
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_threads_of_one_process_create_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, made = default_tracking_uri(tmp_path / "new"), list[Path]()

    def make(path: Path, artifact_root: str | None) -> None:
        made.append(path)
        time.sleep(0.05)  # so that the others arrive meanwhile
        execute(path, "CREATE TABLE a (x)")

    monkeypatch.setattr(database, "create_store", make)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(database.create, uri) for _ in range(4)]:
            done.result()
    assert len(made) == 1


def test_without_locks_everybody_ends_with_the_database_of_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without directory locks, as on NFS, two concurrent creations still give one complete database."""
    uri, both = default_tracking_uri(tmp_path), threading.Barrier(2)

    def make(path: Path, artifact_root: str | None) -> None:
        execute(path, f"CREATE TABLE of_{threading.get_ident()} (x)")
        both.wait(10)

    monkeypatch.setattr(database, "_locked", lambda descriptor: False)
    monkeypatch.setattr(database, "create_store", make)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(database.create, uri) for _ in range(2)]:
            done.result()
    schema = database.read_schema(tmp_path / "mlflow.db")
    assert schema is not None
    assert len(schema.tables) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_creation_that_was_killed_leaves_nothing_that_the_next_one_trips_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".mlflow.db.new-killed").write_bytes(b"half")
    (tmp_path / ".mlflow.db.new-killed-journal").write_bytes(b"half")
    monkeypatch.setattr(database, "create_store", lambda path, root: execute(path, "CREATE TABLE a (x)"))
    database.create(default_tracking_uri(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_an_empty_file_becomes_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(database, "create_store", lambda path, root: execute(path, "CREATE TABLE a (x)"))
    database.create(default_tracking_uri(tmp_path))
    assert database.read_schema(tmp_path / "mlflow.db") == database.Schema(frozenset({"a"}), None, 0)


def test_an_experiment_that_another_launch_creates_meanwhile_is_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri, theirs = f"sqlite:///{path}", list[str]()
    find = MlflowClient.get_experiment_by_name

    def overtaken(client: MlflowClient, name: str) -> object:
        experiment = find(client, name)
        if not theirs:
            theirs.append(client.create_experiment(name))
        return experiment

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", overtaken)
    assert [Server(uri).experiment("new", None)] == theirs


def test_the_expected_schema_is_what_mlflow_expects() -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    head, known = database.known_revisions()
    assert head == _get_latest_schema_revision()
    assert {head, "0584bdc529eb"} <= known


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE alembic_version SET version_num = '0584bdc529eb'", "older MLflow.*run `mlflow db upgrade sqlite:////"),
        ("UPDATE alembic_version SET version_num = 'ffffffffffff'", "newer MLflow.*install the MLflow version"),
        ("DELETE FROM alembic_version", "incomplete schema.*mlflow db upgrade"),
    ],
)
def test_another_schema_is_refused_with_the_fix_by_everything_that_opens_it(
    path: Path, statement: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(path, statement)
    monkeypatch.setattr(database, "_CHANGE_S", 0.0)
    uri = f"sqlite:///{path}"
    for ask in (check_tracking, lambda uri: search_runs(uri, limit=1), lambda uri: Server(uri).probe()):
        with pytest.raises(TrackingUnreachable, match=message) as caught:
            ask(uri)
        assert "\n" not in str(caught.value)
        assert "deleted" not in str(caught.value)  # the file holds a run


def test_a_database_without_a_run_may_also_be_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(path, "UPDATE alembic_version SET version_num = '0584bdc529eb'", "DELETE FROM tags", "DELETE FROM runs")
    monkeypatch.setattr(database, "_CHANGE_S", 0.0)
    with pytest.raises(TrackingUnreachable, match="can also be deleted"):
        check_tracking(f"sqlite:///{path}")


def test_a_migration_under_way_is_waited_for(path: Path) -> None:
    head, known = database.known_revisions()
    steps = iter([*sorted(known - {head})[:3], head])
    execute(path, f"UPDATE alembic_version SET version_num = '{next(steps)}'")

    def migrate(seconds: float) -> None:
        execute(path, f"UPDATE alembic_version SET version_num = '{next(steps)}'")

    database.check_schema(f"sqlite:///{path}", sleep=migrate)


def test_another_schema_on_a_database_server_is_named() -> None:
    from mlflow.exceptions import MlflowException

    for revision, word in (("0584bdc529eb", "older"), ("ffffffffffff", "newer"), ("None", "incomplete")):
        error = MlflowException(
            f"Detected out-of-date database schema (found version {revision}, but expected abc). Take"
        )
        assert word in str(_translated(error, "postgresql://me:hunter2@db/x"))
        assert "hunter2" not in str(_translated(error, "postgresql://me:hunter2@db/x"))


def test_what_is_no_database_of_mlflow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_CHANGE_S", 0.0)
    path = tmp_path / "mlflow.db"
    uri = default_tracking_uri(tmp_path)
    execute(path, "CREATE TABLE studies (x)", "CREATE TABLE alembic_version (version_num)")
    with pytest.raises(TrackingUnreachable, match=r"another program .*alembic_version, studies\)"):
        check_tracking(uri)
    path.unlink()
    path.mkdir()
    with pytest.raises(TrackingUnreachable, match="is a directory"):
        check_tracking(uri)


def test_a_damaged_database_is_refused_in_a_line(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:4096] = b"\xff" * 3996
    path.write_bytes(data)
    for ask in (check_tracking, lambda uri: search_runs(uri, limit=1)):
        with pytest.raises(TrackingUnreachable, match="is damaged"):
            ask(f"sqlite:///{path}")


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_database_that_another_process_locks_is_refused(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(f"BEGIN {kind}")
        with pytest.raises(TrackingUnreachable, match="locked by another process"):
            check_tracking(f"sqlite:///{path}")
    check_tracking(f"sqlite:///{path}")


def test_the_write_of_a_killed_process_is_no_reason_to_refuse(path: Path) -> None:
    program = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN EXCLUSIVE")
connection.execute("CREATE TABLE much (x)")
connection.executemany("INSERT INTO much VALUES (?)", [("x" * 5000,) for _ in range(100)])
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == 9
    assert path.with_name("mlflow.db-journal").exists()
    check_tracking(f"sqlite:///{path}")
    schema = database.read_schema(path)
    assert schema is not None
    assert "much" not in schema.tables
