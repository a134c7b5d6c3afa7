"""MLflow as a team runs it: passwords, PostgreSQL, artifacts in S3, and TLS with a private certificate authority. What
a launch records there, and what it says if it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrainer.errors import TrackingDenied, TrackingUnreachable
from raytrainer.tracking import check_tracking
from raytrainer.tracking.rest import Rest
from tests.launches import Ended, launched
from tests.outside.servers import S3, Certificates, Mlflow, Nginx, Postgres

pytestmark = pytest.mark.slow

RUN = ["experiment=smoke", "cluster=inline", "tracking.experiment_name=behind-tls"]
WRONG = "wrong-password-of-tests"


@pytest.fixture
def environment(mlflow_behind_tls: Nginx, mlflow_server: Mlflow, certificates: Certificates) -> dict[str, str]:
    """Return the variables that a user sets."""
    return {
        "MLFLOW_TRACKING_URI": mlflow_behind_tls.uri,
        "MLFLOW_TRACKING_USERNAME": mlflow_server.user,
        "MLFLOW_TRACKING_PASSWORD": mlflow_server.password,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificates.ca_file),
    }


def everything(folder: Path, ended: Ended, postgres: Postgres, s3: S3) -> Iterator[tuple[str, bytes]]:
    """Yield everything that a launch leaves, here and on the servers, with its location."""
    yield "what it printed", (ended.out + ended.err).encode()
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()
    yield "the database", postgres.everything().encode()
    yield from s3.objects().items()


def test_a_run_is_logged_and_the_password_nowhere(
    environment: dict[str, str], mlflow_server: Mlflow, postgres: Postgres, s3: S3, tmp_path: Path
) -> None:
    ended = launched(tmp_path, *RUN, "name=logged", environment=environment).exits(0)
    assert f"mlflow   {environment['MLFLOW_TRACKING_URI']}/#/experiments/" in ended.out
    # The run also continues if the URI has user and password and the variables do not.
    uri = environment["MLFLOW_TRACKING_URI"].replace("://", f"://{mlflow_server.user}:{mlflow_server.password}@")
    other = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": environment["MLFLOW_TRACKING_SERVER_CERT_PATH"],
    }
    again = launched(tmp_path, "resume", "logged", "trainer.max_steps=30", environment=other).exits(0)

    ((run_id, status),) = postgres.rows("runs WHERE name = 'logged'", "run_uuid, status")
    assert status == "FINISHED"
    steps = postgres.rows(f"metrics WHERE run_uuid = '{run_id}' AND key = 'train/loss' ORDER BY step", "step")
    assert [step for (step,) in steps] == [5, 10, 15, 20, 25, 30]
    tags = dict(postgres.rows(f"tags WHERE run_uuid = '{run_id}'", "key, value"))
    assert tags["raytrainer.exit_code"] == "0"
    params = dict(postgres.rows(f"params WHERE run_uuid = '{run_id}'", "key, value"))
    assert params["tracking.tracking_uri"] == "${oc.env:MLFLOW_TRACKING_URI,null}"
    artifacts = {key.partition(f"{run_id}/artifacts/")[2] for key in s3.objects()}
    assert {"config.yaml", "config-2.yaml", "logs/driver.log", "logs/rank-0.log"} <= artifacts

    # `list` reads by plain HTTP, with the same settings as MLflow's client.
    listed = launched(tmp_path, "list", "--all", "--json", environment=environment).exits(0)
    assert '"logged"' in listed.out

    told = Ended(0, ended.out + again.out + listed.out, ended.err + again.err + listed.err)
    places = dict(everything(tmp_path, told, postgres, s3))
    assert len(places) > 10
    assert not [place for place, content in places.items() if mlflow_server.password.encode() in content]


def test_a_wrong_password_is_refused_before_anything_starts(
    environment: dict[str, str], mlflow_behind_tls: Nginx, postgres: Postgres, tmp_path: Path
) -> None:
    asked, before = len(mlflow_behind_tls.requests.read_text().splitlines()), len(postgres.rows("runs"))
    ended = launched(tmp_path, *RUN, environment={**environment, "MLFLOW_TRACKING_PASSWORD": WRONG}).exits(2)
    (line,) = ended.err.splitlines()
    assert "401 to the credentials given (MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_USERNAME)" in line
    assert WRONG not in ended.out + ended.err
    assert not (tmp_path / "runs").exists()
    assert len(postgres.rows("runs")) == before
    assert len(mlflow_behind_tls.requests.read_text().splitlines()) - asked <= 2  # a second request finds the status


def test_what_is_missing_is_named(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    uri = environment["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", environment["MLFLOW_TRACKING_SERVER_CERT_PATH"])
    for ask in (check_tracking, lambda uri: Rest(uri).search("", 1)):
        with pytest.raises(TrackingDenied, match="none: MLFLOW_TRACKING_TOKEN or _USERNAME and _PASSWORD are not set"):
            ask(uri)
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    for ask in (check_tracking, lambda uri: Rest(uri).search("", 1)):
        with pytest.raises(TrackingUnreachable, match="; MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names the authority"):
            ask(uri)
