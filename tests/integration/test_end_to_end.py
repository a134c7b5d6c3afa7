"""One launch of the main experiment, as a user types it, and everything that it leaves: in MLflow, on disk, on
screen."""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launches import Ended, Runs, checkpoints, final_state, launch, record, summary
from tests.outside.ports import free_port

pytestmark = pytest.mark.slow

NAME = "digits é"  # a directory's name, not a run's: all paths in the output have a space and a non-ASCII letter
MODEL_NAME = "digits-model"
EPOCHS = 15  # half of the experiment's 30, enough for the accuracy that it promises
STEPS = 11 * EPOCHS
# Everything that a launch may print to stderr without a terminal. A new line from Ray would match none of these.
NUMBER = r"[\d.,e+-]+"
SHAPES = [
    r"resnet-\d{8}-\d{6}-[0-9a-f]{4}: local Ray, 2 workers on CPU",
    r"the highest val/accuracy is the best \(checkpoint\.mode=max\)",
    r"training 308,074 parameters",
    rf"epoch \d+/\d+  step \d+/\d+  loss {NUMBER}  lr {NUMBER}  {NUMBER} samples/s  [\d:]+ left",
    rf"epoch \d+  step \d+  val/loss {NUMBER}  val/accuracy {NUMBER}",
    rf"registered as {MODEL_NAME}, version 1",
]


@dataclass(frozen=True)
class Demo:
    folder: Path
    ended: Ended
    name: str
    commit: str

    @property
    def runs(self) -> Runs:
        return Runs(self.folder)

    @property
    def artifacts(self) -> Path:
        return self.folder / "mlartifacts" / self.runs.id_of(self.name) / "artifacts"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / NAME
    folder.mkdir()
    commit = dirty_repository(folder)
    arguments = ["experiment=resnet", f"trainer.max_epochs={EPOCHS}", f"tracking.register_model={MODEL_NAME}"]
    with launch(folder, *arguments, store=False, fresh=True) as run:
        ended = run.wait().exits(0)
        run.nothing_left()
    (name,) = (path.name for path in (folder / "runs").iterdir())
    return Demo(folder, ended, name, commit)


def dirty_repository(folder: Path) -> str:
    """Make the launching directory a git repository with an uncommitted change, and return its commit."""

    def git(*arguments: str) -> str:
        author = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
        return subprocess.run(
            ["git", *author, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    (folder / "notes.txt").write_text("as committed\n")
    git("add", "notes.txt")
    git("commit", "--quiet", "-m", "Notes")
    (folder / "notes.txt").write_text("as launched\n")
    return git("rev-parse", "HEAD")


def test_every_line_is_meant(demo: Demo) -> None:
    """stderr has progress and no warning of Ray or MLflow, and stdout has only the summary."""
    unknown = [line for line in demo.ended.err.splitlines() if not any(re.fullmatch(shape, line) for shape in SHAPES)]
    assert not unknown
    lines = demo.ended.out.splitlines()
    assert [line[:9].strip() for line in lines] == ["outcome", "where", "best", "mlflow", "output", "next", ""]


def test_summary(demo: Demo) -> None:
    said = summary(demo.ended.out)
    runs = demo.runs
    assert re.fullmatch(rf"finished, {STEPS} steps in \d+:\d\d", said["outcome"])
    assert said["where"] == "local Ray, 2 workers on CPU"
    best, step = re.fullmatch(r"val/accuracy ([\d.]+) at step (\d+)", said["best"]).groups()  # type: ignore[union-attr]
    values = dict(runs.rows(demo.name)["val/accuracy"])
    assert float(best) == pytest.approx(max(values.values()), abs=5e-5)
    assert values[int(step)] == max(values.values())
    assert said["mlflow"].endswith(f"run {runs.id_of(demo.name)}")
    assert said["output"] == str(demo.folder / "runs" / demo.name)
    assert said["next2"].endswith(f" -m raytrainer resume {demo.name} trainer.max_epochs=…")


def test_it_learned(demo: Demo) -> None:
    assert max(value for _, value in demo.runs.rows(demo.name)["val/accuracy"]) >= 0.97


def test_status(demo: Demo) -> None:
    assert demo.runs.status(demo.name) == "FINISHED"
    assert record(demo.folder, demo.name)["status"] == "FINISHED"
    tags = demo.runs.tags(demo.name)
    assert tags["raytrainer.exit_code"] == "0"
    assert tags["raytrainer.reason"] == "finished"


def test_metrics_by_step(demo: Demo) -> None:
    """Every tenth step and the last are logged once, so is every epoch's evaluation, and all values are finite."""
    rows = demo.runs.rows(demo.name)
    for key in ("train/loss", "train/accuracy", "train/lr", "train/samples_per_second", "epoch"):
        assert [step for step, _ in rows[key]] == [*range(10, STEPS, 10), STEPS], key
    for key in ("val/loss", "val/accuracy"):
        assert [step for step, _ in rows[key]] == list(range(11, STEPS + 1, 11)), key
    assert all(math.isfinite(value) for found in rows.values() for _, value in found)
    losses = [value for _, value in rows["train/loss"]]
    assert losses[-1] < losses[0] / 10


def test_system_metrics(demo: Demo) -> None:
    rows = demo.runs.rows(demo.name)
    found = {key for key in rows if key.startswith("system/")}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= found
    for key in found:
        steps = [step for step, _ in rows[key]]
        assert len(steps) == len(set(steps)), key


def test_parameters(demo: Demo) -> None:
    params = demo.runs.params(demo.name)
    expected = {
        "model._target_": "raytrainer.models.ResNet",
        "model.num_classes": "10",
        "optimizer._target_": "torch.optim.SGD",
        "data.train.transform._target_": "raytrainer.data.RandomCropFlip",
        "data.global_batch_size": "128",
        "trainer.max_epochs": str(EPOCHS),
        "scaling.num_workers": "2",
        "checkpoint.monitor": "val/accuracy",
        "seed": "0",
        "name": demo.name,
    }
    assert {key: params.get(key) for key in expected} == expected


def test_provenance(demo: Demo) -> None:
    import torch

    tags = demo.runs.tags(demo.name)
    assert tags["mlflow.source.git.commit"] == demo.commit
    assert tags["mlflow.source.git.dirty"] == "true"
    patch = (demo.artifacts / "git.patch").read_text()
    assert "-as committed" in patch
    assert "+as launched" in patch
    assert tags["raytrainer.command"] == (
        f"python -m raytrainer experiment=resnet trainer.max_epochs={EPOCHS} tracking.register_model={MODEL_NAME}"
    )
    assert tags["raytrainer.version.torch"] == torch.__version__
    assert tags["raytrainer.version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {f"raytrainer.version.{name}" for name in ("ray", "mlflow", "hydra-core", "numpy")} <= tags.keys()
    assert tags["raytrainer.where"] == "local Ray, 2 workers on CPU"
    assert tags["mlflow.runName"] == demo.name


def test_whole_config(demo: Demo) -> None:
    """The artifact composes to the same experiment, and equals the file in the run directory."""
    from raytrainer.config import from_text

    text = (demo.artifacts / "config.yaml").read_text()
    assert text == (demo.folder / "runs" / demo.name / "config.yaml").read_text()
    experiment = from_text(text).experiment
    assert experiment.name == demo.name
    assert experiment.scaling.num_workers == 2


def test_logs(demo: Demo) -> None:
    """The driver's log has what was on screen, and each rank's log has its rank and host."""
    logs = demo.artifacts / "logs"
    assert {"driver.log", "rank-0.log", "rank-1.log"} <= {path.name for path in logs.iterdir()}
    driver = (logs / "driver.log").read_text().splitlines()
    said = demo.ended.err.splitlines()
    assert [line for line in driver if line.startswith("epoch")] == [line for line in said if line.startswith("epoch")]
    for rank in range(2):
        assert f"rank {rank} on {socket.gethostname()}" in (logs / f"rank-{rank}.log").read_text()


def test_checkpoint_tags(demo: Demo) -> None:
    tags = demo.runs.tags(demo.name)
    found = {checkpoint.path: checkpoint for checkpoint in checkpoints(demo.folder, demo.name)}
    assert found[tags["raytrainer.checkpoint.last"]].step == STEPS
    best = found[tags["raytrainer.checkpoint.best"]]
    assert best.metric == max(value for _, value in demo.runs.rows(demo.name)["val/accuracy"])


def test_last_checkpoint_is_the_end(demo: Demo) -> None:
    state = final_state(demo.folder, demo.name)
    assert state["/step"] == STEPS


def test_model_loads_and_predicts(demo: Demo) -> None:
    """MLflow alone loads the model. With another batch size than at export, it predicts what the best checkpoint
    predicts."""
    import mlflow
    import torch

    from raytrainer.checkpoint import Checkpointer
    from raytrainer.config import build, from_text
    from raytrainer.data import Digits
    from raytrainer.storage import Storage

    mlflow.set_tracking_uri(f"sqlite:///{demo.folder}/mlflow.db")
    try:
        loaded: Any = mlflow.pytorch.load_model(f"runs:/{demo.runs.id_of(demo.name)}/model")
    finally:
        mlflow.set_tracking_uri(None)
    tags = demo.runs.tags(demo.name)
    assert tags["raytrainer.model_format"] == "pt2"

    config = from_text((demo.artifacts / "config.yaml").read_text()).experiment
    assert config.model is not None
    model = build(config.model).eval()
    checkpointer = Checkpointer(Storage(demo.folder / "runs" / demo.name / "checkpoints"), mode="max")
    best = checkpointer.best()
    assert best is not None
    assert str(best.step) == tags["raytrainer.model_step"]
    model.load_state_dict(checkpointer.load(best)[0]["model"])

    batch = Digits(split="val").__getitems__(list(range(7)))
    with torch.no_grad():
        for size in (1, 7):
            expected = model(torch.as_tensor(batch["image"])[:size])
            torch.testing.assert_close(loaded(torch.as_tensor(batch["image"])[:size]), expected, rtol=1e-4, atol=1e-4)
    assert (expected.argmax(1) == torch.as_tensor(batch["label"])).float().mean() >= 0.8


def test_model_is_registered(demo: Demo) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{demo.folder}/mlflow.db")
    (version,) = client.search_model_versions(f"name='{MODEL_NAME}'")
    assert version.run_id == demo.runs.id_of(demo.name)


@pytest.fixture
def printed_ui(demo: Demo) -> Iterator[tuple[str, Path]]:
    """Run the printed command on a free port; yield its address and log."""
    port = free_port()
    program, *arguments = shlex.split(summary(demo.ended.out)["next"])
    assert arguments[:3] == ["-m", "mlflow", "ui"]
    log = demo.folder / "ui.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable if program == "python" else program, *arguments, "--port", str(port), "--workers", "1"],
            cwd=demo.folder.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        yield f"http://127.0.0.1:{port}", log
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_printed_mlflow_command(demo: Demo, printed_ui: tuple[str, Path]) -> None:
    """The command serves this run from any directory."""
    address, log = printed_ui
    request = f"{address}/api/2.0/mlflow/runs/get?run_id={demo.runs.id_of(demo.name)}"
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert demo.name in answer.read().decode()
                return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
