"""A user's own project without a fork: its package, config groups and experiment, on workers and inline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.launches import Ended, launch, launched

PACKAGE = '''
"""Everything that a user brings: a model, a loss, a dataset, a callback, a collate function and a curve."""

import os

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Sums:
    """y is the sum of x; samples are tuples."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.x[i].sum()


def squared_error(model, batch, scale: float = 1.0):
    x, y = batch
    error = (model(x)[:, 0] - y).square()
    return {"loss": scale * error.mean(), "worst": error.max()}


def collate(samples):
    return torch.utils.data.default_collate(samples)


def halving(step, total_steps, every: int):
    return 0.5 ** (step // every)


class Witness:
    """Writes down where it was called, and keeps state."""

    def __init__(self, folder: str) -> None:
        self.folder, self.steps = folder, 0

    def on_step_end(self, trainer, event) -> None:
        self.steps += 1

    def on_fit_end(self, trainer, event) -> None:
        with open(f"{self.folder}/witness-{trainer.world.rank}-{trainer.world.size}.txt", "w") as file:
            print(os.getpid(), self.steps, event.step, file=file)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state) -> None:
        self.steps = state["steps"]
'''

CONF = {
    "model/net.yaml": "_target_: mine.parts.Net\nwidth: 8\n",
    "loss/squared.yaml": "_target_: mine.parts.squared_error\n_partial_: true\nscale: 1.0\n",
    "data/sums.yaml": (
        "train:\n  _target_: mine.parts.Sums\n  size: 64\nval:\n  _target_: mine.parts.Sums\n  size: 16\n  seed: 1\n"
        "collate_fn:\n  _target_: mine.parts.collate\n  _partial_: true\nglobal_batch_size: 16\n"
    ),
    "lr_scheduler/halving.yaml": "_target_: mine.parts.halving\n_partial_: true\nevery: 4\n",
    # A config group of the project, which sets its package in its first line.
    "witness/written.yaml": "# @package callbacks.witness\n_target_: mine.parts.Witness\nfolder: ${oc.env:PWD}\n",
    "experiment/mine.yaml": (
        "# @package _global_\n"
        "defaults:\n"
        "  - /witness: written\n"
        "  - override /model: net\n"
        "  - override /loss: squared\n"
        "  - override /data: sums\n"
        "  - override /lr_scheduler: halving\n"
        "loss:\n"
        "  scale: 0.5\n"
        "optimizer:\n"
        "  lr: 0.05\n"
        "trainer:\n"
        "  max_epochs: 3\n"
        "tracking:\n"
        "  log_model: false\n"
    ),
}


@pytest.fixture
def project(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "__init__.py").write_text("")
    (in_tmp / "mine" / "parts.py").write_text(PACKAGE)
    for name, text in CONF.items():
        path = in_tmp / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PWD", str(in_tmp))
    return in_tmp


def by_console_script(folder: Path, *arguments: str) -> Ended:
    with launch(folder, *arguments, program=[str(Path(sys.executable).with_name("raytrainer"))]) as started:
        return started.wait()


def witnesses(project: Path) -> dict[str, list[int]]:
    return {p.stem: [int(x) for x in p.read_text().split()] for p in project.glob("witness-*.txt")}


@pytest.mark.slow
def test_on_two_workers_with_config_dir(project: Path) -> None:
    mine = ["--config-dir=conf", "experiment=mine", "cluster=local", "scaling.num_workers=2", "name=one"]
    assert "outcome  finished, 12 steps" in launched(project, *mine).exits(0).out
    seen = witnesses(project)
    assert sorted(seen) == ["witness-0-2", "witness-1-2"]  # imported and called on both workers
    assert len({pid for pid, _, _ in seen.values()}) == 2
    assert all(counts[1:] == [12, 12] for counts in seen.values())
    saved = yaml.safe_load((project / "runs" / "one" / "config.yaml").read_text())
    assert saved["model"] == {"_target_": "mine.parts.Net", "width": 8}
    assert saved["callbacks"]["witness"]["folder"] == "${oc.env:PWD}"
    assert json.loads((project / "runs" / "one" / "run.json").read_text())["status"] == "FINISHED"


@pytest.mark.slow
def test_inline_by_searchpath_and_console_script(project: Path) -> None:
    where = f"hydra.searchpath=[file://{project}/conf]"
    done = by_console_script(project, where, "experiment=mine", "cluster=inline", "name=one", "model.width=4").exits(0)
    assert "outcome  finished, 12 steps" in done.out
    assert "raytrainer resume one trainer.max_epochs=…" in done.out
    assert list(witnesses(project)) == ["witness-0-1"]

    # A resume needs neither the search path nor the conf folder: the run has its whole config. The callback's state
    # continues.
    (project / "conf").rename(project / "moved")
    by_console_script(project, "resume", "one", "trainer.max_epochs=4").exits(0)
    assert witnesses(project)["witness-0-1"][1:] == [16, 16]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "model.widht=3",
            "model.widht=3 is not a key (with a + in front it is given to the _target_ as a further argument)",
        ),
        ("+model.widht=3", "model.widht=3 is not an argument of mine.parts.Net; valid: width"),
        ("model.width=wide", "model.width=wide must be a whole number"),
        ("model=nett", "model=nett is not a valid choice; valid: net, "),
        ("+data.train.sed=3", "data.train.sed=3 is not an argument of mine.parts.Sums; valid: seed, size"),
        ("+loss.scal=3", "loss.scal=3 is not an argument of mine.parts.squared_error; valid: scale"),
        (
            "+callbacks.witness.fold=3",
            "callbacks.witness.fold=3 is not an argument of mine.parts.Witness; valid: folder",
        ),
        (
            "model._target_=mine.parts.Nett",
            "model._target_=mine.parts.Nett cannot be imported: mine.parts has no Nett; valid:",
        ),
        (
            "model._target_=mine.part.Net",
            "model._target_=mine.part.Net cannot be imported: mine has no part; valid: mine.parts",
        ),
        ("~data.train.size", "data.train.size is a required argument of mine.parts.Sums"),
    ],
)
def test_mistakes_in_it_are_told_as_ours(
    project: Path,
    override: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from raytrainer import cli

    monkeypatch.syspath_prepend(str(project))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["check", "--config-dir=conf", "experiment=mine", override]) == 2
    assert capsys.readouterr().err.startswith(f"raytrainer: refused: {reason}")
