"""The undocumented parts of MLflow behave as `raytrainer/tracking/mlflow_internals.py` relies on."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from sqlite3 import connect

import pytest

from raytrainer.tracking import mlflow_internals
from raytrainer.tracking.database import known_revisions
from tests.contracts.private_parts import MLFLOW, PrivatePart


@pytest.mark.parametrize("part", MLFLOW, ids=lambda part: part.name)
def test_part(part: PrivatePart) -> None:
    part.check()


@pytest.mark.slow
def test_a_new_database_has_the_newest_revision(tmp_path: Path) -> None:
    """`check_schema` compares a database with the head of the migration scripts, which it reads as text."""
    path = tmp_path / "mlflow.db"
    mlflow_internals.create_store(path, (tmp_path / "artifacts").as_uri())
    with closing(connect(path)) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [(known_revisions()[0],)]
        assert database.execute("SELECT experiment_id, name FROM experiments").fetchall() == [(0, "Default")]


def test_migrations_are_found_without_importing_mlflow() -> None:
    head, revisions = known_revisions()
    assert head in revisions
    assert len(revisions) > 50
