"""Undocumented parts of MLflow. Only this module uses its private names; `tests/contracts/private_parts.py` lists them."""

from __future__ import annotations

from importlib import util
from pathlib import Path


def create_store(path: Path, artifact_root: str | None) -> None:
    """Create a SQLite database with MLflow's tables and default experiment, and close it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{path}", artifact_root)
    store._dispose_engine()


def migrations() -> Path:
    """Return the folder of the installed MLflow's migration scripts, without importing MLflow, which takes a second."""
    spec = util.find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "store" / "db_migrations" / "versions"


def status_of_search(uri: str) -> int:
    """Return the HTTP status with which a tracking server answers to a search for experiments.

    Raises:
        MlflowException: The server does not answer.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    endpoint = "/api/2.0/mlflow/experiments/search?max_results=1"
    return int(http_request(get_default_host_creds(uri), endpoint, "GET", raise_on_status=False).status_code)
