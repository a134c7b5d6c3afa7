"""Everything that a team uses, at once, in `make nightly`: two nodes behind nginx with TLS and a token, MLflow with
passwords on PostgreSQL behind another nginx, and data, checkpoints and artifacts in S3. The secrets must appear
nowhere."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import pytest

from raytrainer.checkpoint import Checkpointer
from raytrainer.storage import Storage
from tests.integration.test_in_s3 import digits_below, reads
from tests.launches import launch, launched, observed, restarts, steps_of
from tests.outside.head import Head
from tests.outside.servers import S3, Certificates, Mlflow, Nginx, Postgres

pytestmark = [pytest.mark.nightly, pytest.mark.slow]

PLANTED = {"WANDB_API_KEY": "planted-5b1f0c77e2d94a"}
# The pages of Ray's dashboard, for a client with the token.
DASHBOARD = [
    "/api/jobs/",
    "/nodes?view=summary",
    "/logical/actors",
    "/api/cluster_status?format=1",
    "/api/train/v2/runs/v1",
    *(
        f"/api/v0/{table}?detail=1&limit=10000"
        for table in ("actors", "jobs", "nodes", "placement_groups", "tasks", "workers", "objects", "runtime_envs")
    ),
    "/api/v0/cluster_events?limit=10000",
]


@pytest.fixture
def secrets(mlflow_server: Mlflow, s3: S3) -> dict[str, str]:
    """Return the values that no text may contain, by description."""
    return {
        "planted": PLANTED["WANDB_API_KEY"],
        "MLflow's password": mlflow_server.password,
        "the key of S3": s3.environment["AWS_SECRET_ACCESS_KEY"],
        "the token": "a-token-of-the-night",
    }


@pytest.fixture
def variables(mlflow_behind_tls: Nginx, mlflow_server: Mlflow, certificates: Certificates, s3: S3) -> dict[str, str]:
    """Return the variables with which a run reaches MLflow and the storage from any machine."""
    return {
        **s3.environment,
        "MLFLOW_TRACKING_URI": mlflow_behind_tls.uri,
        "MLFLOW_TRACKING_USERNAME": mlflow_server.user,
        "MLFLOW_TRACKING_PASSWORD": mlflow_server.password,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificates.ca_file),
    }


@pytest.fixture
def two_nodes(tmp_path: Path, secrets: dict[str, str], variables: dict[str, str]) -> Iterator[Head]:
    """Start two nodes with one CPU each. On their side, the passwords are in a file, and everything else in their
    environment."""
    file = tmp_path / "secret.env"
    file.write_text("".join(f"{name}={variables.pop(name)}\n" for name in SECRET))
    file.chmod(0o600)
    head = Head(tmp_path / "head", secrets["the token"], cpus=1, secrets={**variables, **PLANTED})
    try:
        head.start()
        head.add_node(cpus=1)
        yield head
    finally:
        head.stop()


SECRET = ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"]


def texts(head: Head, postgres: Postgres, s3: S3, places: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield everything that Ray, MLflow and this machine hold, with its location."""
    for page in DASHBOARD:
        with suppress(HTTPError):  # a page of another Ray version
            yield page, head.ask(page).encode()
    for job in json.loads(head.ask("/api/jobs/")):
        yield f"the log of {job['submission_id']}", head.ask(f"/api/jobs/{job['submission_id']}/logs").encode()
    yield "PostgreSQL", postgres.everything().encode()
    for key, content in s3.objects().items():
        yield f"s3://bucket/{key}", content
    for path in (path for place in places for path in place.rglob("*")):
        if not path.is_file() or path.name in ("auth_token", "secret.env"):
            continue
        content = path.read_bytes()
        yield str(path), content
        if path.suffix in (".zip", ".whl"):
            with suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    yield f"{path}/{name}", archive.read(name)


def test_two_workers_on_two_nodes(
    secrets: dict[str, str],
    variables: dict[str, str],
    two_nodes: Head,
    certificates: Certificates,
    mlflow_behind_tls: Nginx,
    postgres: Postgres,
    s3: S3,
    in_s3: str,
    system_program: Callable[[str, str], str],
    tmp_path: Path,
) -> None:
    head, folder = two_nodes, tmp_path / "launched"
    folder.mkdir()
    digits_below(Storage(f"{in_s3}/data"), tmp_path)
    (folder / ".rayignore").write_text("/launch-*\n/steps/\n")
    proxy = Nginx(tmp_path / "proxy", system_program("nginx", "nginx"), head.port, certificates.issue())
    environment = {**s3.environment, **variables, "MLFLOW_TRACKING_PASSWORD": secrets["MLflow's password"]}
    environment["WANDB_API_KEY"] = "another-key-of-this-machine"
    arguments = ["experiment=resnet", "name=nightly", f"storage_path={in_s3}/runs", *reads(f"{in_s3}/data")]
    arguments += ["cluster=job", f"cluster.address={proxy.uri}", f"cluster.ca_file={certificates.ca_file}"]
    arguments += [f"cluster.token_file={head.token_file}", f"cluster.env_file={tmp_path / 'secret.env'}"]
    arguments += [f"cluster.forward_env=[{','.join([*SECRET, *PLANTED])}]", "failure.max_failures=1"]
    arguments += [*observed(), f"+callbacks.steps.folder={folder / 'steps'}", "checkpoint.every_n_steps=25"]
    arguments += ["+callbacks.digest._target_=probes.Digest", f"+callbacks.digest.path={tmp_path / 'digest'}"]
    arguments += ["+callbacks.digest.value=${oc.env:WANDB_API_KEY}"]
    proxy.start()
    try:
        with launch(folder, *arguments, environment=environment) as run:
            killed = run.reaches(60, rank=1)
            os.kill(killed.pid, signal.SIGKILL)
            ended = run.wait(300).exits(0)
        status = launched(folder, "status", "nightly", "--json", environment=environment).exits(0)
        logs = launched(folder, "logs", "nightly", environment=environment).exits(0)
    finally:
        proxy.stop()

    # The run trained on both nodes, continued after the kill, and learned.
    told = json.loads(status.out)
    assert (told["status"], told["job"]["status"], told["submission_id"]) == ("FINISHED", "SUCCEEDED", "nightly")
    workers = [actor for actor in head.table("actors") if "TrainWorker" in actor["class_name"]]
    assert len({actor["node_id"] for actor in workers}) == 2
    for rank in (0, 1):
        steps = steps_of(folder / "steps", rank)
        ((before, after),) = restarts(steps)
        assert (steps[-1].step, before - 50 < after <= before + 1) == (330, True)
    ((run_id, state),) = postgres.rows("runs WHERE name = 'nightly'", "run_uuid, status")
    assert state == "FINISHED"
    rows = postgres.rows(f"metrics WHERE run_uuid = '{run_id}' AND key = 'val/accuracy' ORDER BY step", "step, value")
    assert [step for step, _ in rows] == list(range(11, 331, 11))
    assert max(value for _, value in rows) >= 0.97
    latest = Checkpointer(Storage(f"{in_s3}/runs/nightly/checkpoints")).latest()
    assert latest is not None
    assert latest.step == 330
    artifacts = {key.partition(f"{run_id}/artifacts/")[2] for key in s3.objects()}
    assert {"config.yaml", "logs/driver.log", "logs/rank-1.log", "model/MLmodel"} <= artifacts
    assert "restarting the workers (1 of 1)" in ended.out
    assert "restarting the workers (1 of 1)" in logs.out

    # The secrets reached the places that need them, and appear nowhere else.
    assert (tmp_path / "digest").read_text() == hashlib.sha256(secrets["planted"].encode()).hexdigest()
    places = [
        folder,
        *(node.session for node in (head, *head.others)),
        head.folder,
        proxy.folder,
        mlflow_behind_tls.folder,
    ]
    found = dict(texts(head, postgres, s3, places))
    found |= {"what was printed": "".join(map(str, (ended, status, logs))).encode()}
    assert len(found) > 100
    named = {where for where, text in found.items() if b"nightly" in text}  # the search covers these places
    assert {"/api/jobs/", "/api/v0/jobs?detail=1&limit=10000", "PostgreSQL", "the log of nightly"} <= named
    leaks = [(what, where) for where, text in found.items() for what, s in secrets.items() if s.encode() in text]
    assert leaks == []
