"""A small run that is then evaluated and exported from the command line, with MLflow in a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from raytrainer.cli import main
from tests.launches import empty_store

pytestmark = pytest.mark.slow


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_evaluated_and_exported(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "mlflow.db").write_bytes(empty_store())
    few = ["trainer.max_epochs=2", "trainer.ema_decay=0.9", "tracking.log_model=false"]
    assert main(["experiment=mlp", "name=run", "cluster=inline", *few]) == 0
    capsys.readouterr()
    client = MlflowClient(f"sqlite:///{in_tmp}/mlflow.db")
    run_id = json.loads((in_tmp / "runs/run/run.json").read_text())["run_id"]
    before = client.get_run(run_id)

    # Two evaluations give the values of training at that step, and leave the run unchanged.
    first, again = (told(capsys, "evaluate", "run") for _ in range(2))
    step = first["result"]["step"]
    history = {m.step: m.value for m in client.get_metric_history(run_id, "val/accuracy")}
    assert first["result"]["metrics"]["val/accuracy"] == history[step] == max(history.values())
    assert first["result"] == again["result"]
    assert client.get_run(run_id).to_dictionary() == before.to_dictionary()
    children = [client.get_run(one["run_id"]) for one in (first, again)]
    for child in children:
        assert (child.info.status, child.data.tags["mlflow.parentRunId"]) == ("FINISHED", run_id)
        assert child.info.experiment_id == before.info.experiment_id
        assert client.get_metric_history(child.info.run_id, "val/accuracy")[0].step == step

    # Evaluate other data, in several sets, with a metric that the run did not have.
    digits = "{_target_:raytrainer.data.Digits,split:%s}"
    sets = f"data.val={{_target_:null,split:null,old:{digits % 'train'},new:{digits % 'val'}}}"
    f1 = ["+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score", "+metrics.f1.num_classes=10"]
    assert main(["evaluate", "run", "--last", sets, *f1]) == 0
    out = capsys.readouterr().out
    assert out.startswith("outcome")
    rows = dict(line.split()[:2] for line in out.splitlines())
    assert {"val/old/loss", "val/old/f1", "val/new/loss", "val/new/accuracy", "val/new/f1"} <= rows.keys()
    assert float(rows["val/new/accuracy"]) == pytest.approx(history[max(history)], rel=1e-5)

    # Export the weights as a file for other programs, and as a registered model that needs no code of raytrainer.
    export = told(capsys, "export", "run", "--to", "out", "--mlflow", "--register", "net")
    assert (export["step"], export["averaged"], export["version"]) == (step, True, "1")
    import mlflow.pytorch

    mlflow.set_tracking_uri(f"sqlite:///{in_tmp}/mlflow.db")
    try:
        model = mlflow.pytorch.load_model("models:/net/1")
    finally:
        mlflow.set_tracking_uri(None)  # for this process and its child processes
    from raytrainer.config import build, from_text
    from raytrainer.data import Digits
    from raytrainer.state import restore_module

    own = build(from_text((in_tmp / "out/config.yaml").read_text()).experiment.model or {})
    from safetensors.torch import load_file

    restore_module(own, load_file(in_tmp / "out/model.safetensors"), "out")
    tensors = Digits(split="val").tensors
    with torch.no_grad():
        own.eval()
        assert torch.allclose(model(tensors["image"]), own(tensors["image"]), atol=1e-5)
        right = (own(tensors["image"]).argmax(1) == tensors["label"]).double().mean()
    assert float(right) == pytest.approx(history[step], abs=1e-6)
