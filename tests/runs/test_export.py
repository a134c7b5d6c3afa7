"""Tests of `export`: a checkpoint's weights and config in a folder that other programs read, complete or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytrainer.checkpoint import Checkpointer
from raytrainer.cli import main
from raytrainer.config import build, compose, with_values
from raytrainer.storage import Storage
from raytrainer.trainer import Trainer
from tests.runs import past
from tests.test_own_state import ExtraBytes, case

MLP = {"_target_": "raytrainer.models.MLP", "in_features": 64, "num_classes": 10, "width": 4, "depth": 1}
GPT2 = {
    "_target_": "transformers.GPT2LMHeadModel",
    "config": {
        "_target_": "transformers.GPT2Config",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 16,
        "n_positions": 8,
    },
}


def run_with(model: dict[str, Any], *, ema: bool = False) -> dict[int, dict[str, torch.Tensor]]:
    """Create a run `past` with checkpoints after 10 (best) and 20 steps, and return their random weights."""
    _, storage = past.record("past", run_id="0" * 32, status="FINISHED")
    text = with_values(compose(["experiment=mlp", "name=past"]).text, {"model": model})
    storage.write_bytes("config.yaml", (text + "# ${oc.env:SECRET}\n").encode())
    return {step: _saved(storage, model, step, ema) for step in (10, 20)}


def _saved(storage: Storage, model: dict[str, Any], step: int, ema: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(step)
    weights = dict(build(model).state_dict())
    checkpoints = Checkpointer(storage.child("checkpoints"), mode="max", num_to_keep=None)
    shared = {"model": {k: v + 1 for k, v in weights.items()}, "ema": weights} if ema else {"model": weights}
    checkpoints.save(step, shared, {}, metric=1.0 / step)
    checkpoints.close()
    return weights


def equal(folder: str, weights: dict[str, torch.Tensor]) -> bool:
    found = load_file(Path(folder, "model.safetensors"))
    return found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in found)


def test_the_best_the_last_and_that_of_a_step(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run_with(MLP)
    assert main(["export", "past", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["metric"], told["averaged"]) == (10, 0.1, False)
    assert told["folder"] == str(in_tmp / "past-step-10")
    assert told["files"] == ["config.yaml", "model.safetensors"]
    assert equal(told["folder"], weights[10])
    # The config is the recorded one: references stay references.
    assert (in_tmp / "past-step-10/config.yaml").read_text() == (in_tmp / "runs/past/config.yaml").read_text()
    assert main(["export", "past", "--last", "--to", "out/last"]) == 0
    assert equal("out/last", weights[20])
    assert main(["export", "past", "--step", "10", "--to", "out/ten"]) == 0
    assert equal("out/ten", weights[10])
    assert sorted(p.name for p in (in_tmp / "out").iterdir()) == ["last", "ten"]


def test_averaged_weights(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run_with(MLP, ema=True)
    assert main(["export", "past"]) == 0
    assert "averaged weights" in capsys.readouterr().out
    assert equal("past-step-10", weights[10])


def test_extra_state_is_exported_and_read_back(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, storage = past.record("past", run_id="0" * 32, status="FINISHED")
    model = {"_target_": "tests.test_own_state.ExtraBytes"}
    storage.write_bytes("config.yaml", with_values(compose(["experiment=mlp"]).text, {"model": model}).encode())
    module = build(model)
    module.seen = 7.5
    checkpoints = Checkpointer(storage.child("checkpoints"))
    checkpoints.save(10, {"model": module.state_dict()}, {})
    checkpoints.close()
    assert main(["export", "past"]) == 0
    assert "_extra_state: not a tensor, so it is in the metadata of model.safetensors" in capsys.readouterr().err
    tensors = load_file("past-step-10/model.safetensors")
    assert tensors.keys() == {name for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    trainer = Trainer(case(ExtraBytes))
    trainer.init_from("past-step-10/model.safetensors")
    assert trainer.raw_model.get_extra_state() == module.get_extra_state()


def test_what_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with(MLP)
    (in_tmp / "there").mkdir()
    (in_tmp / "file").touch()
    for arguments, reason in (
        (["--to", "there"], "exists already; nothing is overwritten"),
        (["--to", "file/below"], "cannot be made"),
        (["--to", "/proc/weights"], "cannot be made"),  # the parent exists, but nothing can be created in it
        (["--to", "s3://bucket/x"], "must be a folder of this machine"),
        (["--step", "15"], "--step=15 is not one of its checkpoints; valid: 10, 20"),
        (["--step", "ten"], "'ten' is not a whole number"),
        (["--last", "--step", "10"], "not allowed with"),
        (["--register", "net"], "needs the run in MLflow"),
    ):
        assert main(["export", "past", *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert main(["export"]) == 2
    assert sorted(p.name for p in in_tmp.iterdir()) == ["file", "runs", "there"]


def test_a_checkpoint_that_is_corrupt_leaves_no_folder(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with(MLP)
    (in_tmp / "runs/past/checkpoints/step-000000010/shared-00000.safetensors").write_bytes(b"")
    assert main(["export", "past"]) == 1
    assert "has 0 bytes instead of" in capsys.readouterr().err
    assert [p.name for p in in_tmp.iterdir()] == ["runs"]


def test_weights_of_a_model_that_is_not_installed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run_with(MLP)
    config = in_tmp / "runs/past/config.yaml"
    config.write_text(config.read_text().replace("raytrainer.models.MLP", "gone.MLP"))
    assert main(["export", "past"]) == 0
    assert (
        "without the model's own config, since it cannot be made here: model._target_=gone.MLP"
        in capsys.readouterr().err
    )
    assert equal("past-step-10", weights[10])


def test_a_hugging_face_model_is_read_by_its_own_from_pretrained(in_tmp: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = run_with(GPT2)
    assert main(["export", "past", "--to", "hf"]) == 0
    found = AutoModelForCausalLM.from_pretrained(in_tmp / "hf").state_dict()
    assert found.keys() == weights[10].keys()
    assert all(torch.equal(found[k], weights[10][k]) for k in found)


def test_a_full_disk(in_tmp: Path) -> None:
    """A failed export leaves no folder behind, whether the disk fills up within the weights or after them."""
    run_with(MLP)
    for most in (100, 2000):  # the size limit of a file, in bytes
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))"
        program = f"import raytrainer.runs.export, sys\nfrom raytrainer.cli import main\n{limited}\nsys.exit(main(sys.argv[1:]))"
        ended = subprocess.run([sys.executable, "-c", program, "export", "past"], capture_output=True, text=True)
        assert ended.returncode == 1, ended
        assert "raytrainer: failed: " in ended.stderr
        assert "Traceback" not in ended.stderr
        assert [path.name for path in in_tmp.iterdir()] == ["runs"]
