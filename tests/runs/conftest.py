"""An MLflow store for each test. Creating a database takes a second, so each test copies an empty one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raytrainer import tracking
from raytrainer.tracking.database import default_artifact_root
from tests.runs.past import Store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking.default_tracking_uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def store(in_tmp: Path, empty_database: Path) -> Store:
    """An MLflow store in the test's directory, which is the current directory."""
    shutil.copy(empty_database, in_tmp / "mlflow.db")
    uri = tracking.default_tracking_uri(in_tmp)
    root = default_artifact_root(uri)
    assert root is not None
    return Store(uri, root)
