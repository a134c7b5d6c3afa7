"""`MLFLOW_*` variables with unusual values: honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrainer.attempt import check
from raytrainer.config import compose
from raytrainer.errors import PreflightError
from raytrainer.tracking import variable_problems


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("mlruns", "is a directory, that is, a file store, which MLflow no longer supports"),
        ("file:./mlruns", "is a directory"),
        ("/tmp/mlruns", "is a directory"),
        ("databricks", "is a Databricks store"),
        ("databricks://profile", "is a Databricks store"),
        ("127.0.0.1:5000", "has no scheme; write MLFLOW_TRACKING_URI=http://127.0.0.1:5000"),
        ("http://", "names no host"),
        ("http:/127.0.0.1", "names no host"),
        ("sqlite://", "names no database"),
        ("s3://bucket/x", "is not an MLflow store"),
        ("http://a b", "has a space in it"),
    ],
)
def test_a_tracking_uri_that_is_none(uri: str, reason: str) -> None:
    (problem,) = variable_problems({"MLFLOW_TRACKING_URI": uri}, uri)
    assert problem.startswith(f"MLFLOW_TRACKING_URI={uri} ")
    assert reason in problem
    (problem,) = variable_problems({}, uri)  # from the config
    assert problem.startswith("tracking.tracking_uri=")


@pytest.mark.parametrize(
    "uri",
    [None, "http://127.0.0.1:5000", "https://mlflow.example.com/x", "sqlite:////a/b.db", "postgresql+psycopg://u@h/d"],
)
def test_one_that_is_one(uri: str | None) -> None:
    assert variable_problems({"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_TRACKING_INSECURE_TLS": "TRUE"}, uri) == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "abc", "must be a whole number"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "-1", "must be a whole number"),
        ("MLFLOW_TRACKING_INSECURE_TLS", "yes", "must be true or false"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "/not/there.pem", "is not a file"),
        ("MLFLOW_TRACKING_TOKEN", "secret\nvalue", "has a line break"),
        ("MLFLOW_RUN_ID", "0123", "would be ignored: raytrainer creates its own run"),
        ("MLFLOW_EXPERIMENT_ID", "3", "MLFLOW_EXPERIMENT_NAME or tracking.experiment_name"),
    ],
)
def test_a_variable_with_an_odd_value_is_named(name: str, value: str, reason: str) -> None:
    (problem,) = variable_problems({name: value}, None)
    assert problem.startswith(name)
    assert reason in problem
    assert "secret" not in problem


def test_an_empty_variable_is_one_that_is_not_set(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "  "):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", value)
        e = compose(["experiment=smoke"]).experiment
        assert (e.tracking.tracking_uri, e.tracking.experiment_name) == (None, None)
    assert variable_problems({"MLFLOW_RUN_ID": " ", "MLFLOW_HTTP_REQUEST_TIMEOUT": ""}, None) == []


def test_they_are_refused_before_a_start(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "abc")
    with pytest.raises(PreflightError) as caught:
        check(compose(["experiment=smoke", "cluster=inline"]))
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "MLFLOW_TRACKING_URI",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
    ]


def test_a_database_in_a_folder_with_a_space_in_its_name_is_fine() -> None:
    assert variable_problems({}, "sqlite:////home/you/my runs/mlflow.db") == []
