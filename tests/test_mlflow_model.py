"""MLflow's form of a trained model: written in its own process from what was recorded, with the user's source and a
time limit."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from raytrainer import mlflow_model, own_code, worker
from raytrainer.config import from_text
from raytrainer.core.isolated import ProcessEnded
from raytrainer.errors import TrainingError
from raytrainer.parallel import World
from raytrainer.tracking import NullTracker
from raytrainer.trainer import Trainer
from raytrainer.trainer.example import ExampleRecorder
from raytrainer.worker.recording import log_model
from tests.training import experiment, images, node

NET = """
import torch
from torch import nn
from blocks import Block           # beside it
from . import sizes

class Net(nn.Module):
    def __init__(self, wait=0.0):
        super().__init__()
        self.block, self.wait = Block(sizes.WIDTH), wait

    def forward(self, x, extra=None):
        if self.wait:
            import time
            time.sleep(self.wait)
        return self.block(x["image"].flatten(1) if isinstance(x, dict) else x.flatten(1))

def loss(model, batch):
    return {"loss": model(batch).square().mean()}
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a user's folder: a package, a module beside it, and files that must not be copied."""
    folder = tmp_path / "user"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine/__init__.py").write_text("")
    (folder / "mine/net.py").write_text(NET)
    (folder / "mine/sizes.py").write_text("WIDTH = 16\n")
    (folder / "mine/unused.py").write_text("")
    (folder / "mine/.env").write_text("SECRET=1")
    (folder / "blocks.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Linear):\n    def __init__(self, width):\n        super().__init__(width, 4)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "blocks")]:
        del sys.modules[name]


def text_of(model: dict[str, Any], loss: Any = "mine.net.loss") -> str:
    values = {
        "name": "one",
        "storage_path": str(Path.cwd() / "runs"),
        "model": model,
        "loss": {"_target_": loss, "_partial_": True},
        "optimizer": node("torch.optim.SGD", lr=0.1),
        "data": {"train": node(images, rows=50), "val": node(images, rows=17, seed=1), "global_batch_size": 12},
        "trainer": {"max_steps": 2},
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
        "cluster": {"kind": "inline"},
    }
    return from_text(yaml.safe_dump(values)).text


def state(tmp_path: Path, weights: dict[str, Tensor], example: Any) -> str:
    file = tmp_path / "state.pt"
    torch.save({"weights": weights, "example": example}, file)
    return str(file)


def test_the_source_is_what_the_users_modules_import_and_nothing_else(user: Path, tmp_path: Path) -> None:
    importlib.import_module("mine.net")
    found = own_code.sources(["mine.net", "torch.nn", "raytrainer.models", "json", "__main__"])
    assert sorted(found) == ["blocks", "mine", "mine.net", "mine.sizes"]
    copied = own_code.copy_sources(["mine.net"], tmp_path / "code")
    assert [place.name for place in copied] == ["blocks.py", "mine"]
    assert sorted(place.name for place in (tmp_path / "code/mine").iterdir()) == ["__init__.py", "net.py", "sizes.py"]


def test_source_with_a_password_in_it_does_not_go_along(user: Path, tmp_path: Path) -> None:
    (user / "mine/sizes.py").write_text('WIDTH = 16\nDATABASE = "postgresql://user:secret@host/db"\n')
    importlib.import_module("mine.net")
    with pytest.raises(own_code.CannotCopy, match=r"sizes\.py holds a URL with a password"):
        own_code.copy_sources(["mine.net"], tmp_path / "code")


@pytest.mark.slow
def test_a_pickled_model_of_the_users_own_loads_from_another_folder(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow.pytorch")
    net = importlib.import_module("mine.net").Net()
    # Its forward takes a dictionary, so no graph can be exported.
    batch = {"image": torch.randn(3, 1, 4, 4)}
    example = {"args": (batch,), "kwargs": {}, "output": net(batch).detach()}
    model = {"_target_": "mine.net.Net"}
    request: dict[str, Any] = {
        "text": text_of(model),
        "overrides": [],
        "path": str(tmp_path / "model"),
        "step": 2,
        "graph": True,
    }
    how = mlflow_model.write(state(tmp_path, dict(net.state_dict()), example), **request)
    assert how == "pickle (its forward takes more than one tensor)"
    assert not list((tmp_path / "model").rglob("*.env"))
    assert not list((tmp_path / "model").rglob("unused.py"))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "blocks")]:
        del sys.modules[name]
    user.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(user)])
    loaded: Any = mlflow.load_model(str(tmp_path / "model"))
    assert torch.equal(loaded(batch), net(batch))
    assert str(tmp_path / "model") in str(sys.modules["mine.net"].__file__)


def test_a_time_limit_leaves_the_format_that_calls_nothing(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[dict[str, Any]] = []

    class Apart:
        def __init__(self, function: str, request: dict[str, Any], **options: Any) -> None:
            assert function == "raytrainer.mlflow_model:write"
            requests.append(request)

        def run(self, timeout_s: float) -> ProcessEnded:
            if requests[-1]["graph"]:
                return ProcessEnded(problem=f"it did not end within {timeout_s:g} s", timed_out=True)
            return ProcessEnded(f"pickle ({requests[-1]['reason']})")

    monkeypatch.setattr(mlflow_model, "Isolated", Apart)
    text = text_of({"_target_": "mine.net.Net"})
    how = mlflow_model.export(text, (), {}, tmp_path / "model", step=1, graph_s=7)
    assert how == "pickle (as a graph it did not end within 7 s)"
    assert [request["graph"] for request in requests] == [True, False]
    monkeypatch.setattr(Apart, "run", lambda self, timeout_s: ProcessEnded(problem="its process was ended by SIGKILL"))
    with pytest.raises(TrainingError, match="SIGKILL"):
        mlflow_model.export(text, (), {}, tmp_path / "model", step=1)


@pytest.mark.slow
def test_a_forward_that_hangs_is_ended_and_the_model_is_pickled_by_a_real_process(user: Path, tmp_path: Path) -> None:
    net = importlib.import_module("mine.net").Net(wait=600.0)
    example = {"args": (torch.randn(3, 1, 4, 4),), "kwargs": {}, "output": torch.randn(3, 4)}
    model = {"_target_": "mine.net.Net", "wait": 600.0}
    began = time.monotonic()
    how = mlflow_model.export(
        text_of(model), (), dict(net.state_dict()), tmp_path / "model", step=1, example=example, graph_s=1
    )
    assert how == "pickle (as a graph it did not end within 1 s)"
    assert (tmp_path / "model/MLmodel").exists()
    assert time.monotonic() - began < 600


# --- the recorded example ---------------------------------------------------------------------------------------------


class Calls:
    """A loss that counts its calls."""

    count = 0

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        Calls.count += 1
        return {"loss": model(batch["image"]).square().mean()}


@pytest.mark.parametrize("changes", [{}, {"data": {"val": None}}, {"trainer": {"ema_decay": 0.9}}])
def test_after_training_the_loss_is_not_called(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective in the loss would wait for ranks that have ended."""
    trainer = Trainer(experiment(loss=node(Calls), **changes))
    trainer.fit()
    seen = trainer.example.example
    assert seen is not None
    kept = seen.on_cpu()
    assert kept["args"][0].shape[1:] == (1, 4, 4)
    assert kept["output"].shape[1:] == (4,)
    before = Calls.count
    exported: dict[str, Any] = {}

    def export(text: str, overrides: Any, weights: Any, path: Path, **options: Any) -> str:
        exported.update(options, weights=weights)
        return "pt2"

    monkeypatch.setattr(mlflow_model, "export", export)
    tags: dict[str, str] = {}

    class Kept(NullTracker):
        def set_tags(self, given: Any) -> None:
            tags.update(given)

    log_model(trainer, worker.WorkerJob("", ""), Kept(), lambda _: None)
    assert tags["raytrainer.model_format"] == "pt2"
    assert torch.equal(exported["example"]["args"][0], kept["args"][0])
    assert Calls.count == before


def test_one_call_is_recorded_and_a_compiled_model_is_not_compiled_again() -> None:
    model, recorder, compiled = nn.Linear(4, 2), ExampleRecorder(), []

    def call(*args: Any) -> Any:
        compiled.append(args)
        return model._call_impl(*args)

    model._compiled_call_impl = call
    original = model._compiled_call_impl
    with recorder.watching(model):
        model(torch.ones(3, 4))
        model(torch.zeros(5, 4))
    assert recorder.example is not None
    assert torch.equal(recorder.example.args[0], torch.ones(3, 4))
    assert recorder.example.output.shape == (2, 2)
    assert model._compiled_call_impl is original
    assert not model._forward_hooks
    assert len(compiled) == 2


def test_inputs_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.trainer.example._MOST_BYTES", 10)
    recorder, model = ExampleRecorder(), nn.Linear(4, 2)
    with recorder.watching(model):
        model(torch.ones(3, 4))
    assert recorder.example is not None
    assert recorder.example.too_large


def test_without_a_checkpoint_one_rank_of_several_does_not_ask_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(experiment())
    object.__setattr__(trainer, "world", World(0, 2))
    trainer.checkpointer = type("Empty", (), {"list": lambda self: []})()
    monkeypatch.setattr(Trainer, "best_weights", lambda self: pytest.fail("asked"))
    told: list[dict[str, Any]] = []
    log_model(trainer, worker.WorkerJob("", ""), NullTracker(), told.append)
    assert "there is no checkpoint" in told[0]["text"]
