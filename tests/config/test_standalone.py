"""Tests of a composed config as an experiment of its own: it composes to the same anywhere and accepts overrides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from raytrainer.config import Experiment, compose
from raytrainer.config.schema import SweepConfig
from raytrainer.config.standalone import as_experiment
from raytrainer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_tmp")


def kept(overrides: list[str], folder: Path, config_dir: Path | None = None, about: tuple[str, ...] = ()) -> Experiment:
    """Return what the overrides compose, and write it to `experiment/best.yaml` below the folder."""
    composition = compose(overrides, config_dir)
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "best.yaml").write_text(as_experiment(composition.text, about))
    return composition.experiment


def same(one: Experiment, other: Experiment) -> bool:
    return replace(one, name=None, sweep=SweepConfig()) == replace(other, name=None, sweep=SweepConfig())


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=mlp"],
        ["experiment=resnet"],
        ["experiment=smoke", "trainer.max_steps=7"],
        ["experiment=mlp", "optimizer=sgd", "optimizer.lr=1e-3", "model.width=64", "lr_scheduler=wsd", "seed=3"],
        ["experiment=mlp", "optimizer.betas=[0.8,0.95]", "~lr_scheduler", "+trainer.early_stopping={patience: 2}"],
        ["experiment=resnet", "model=resnet18", "model.num_classes=10", "model.in_channels=1", "model.norm=group"],
        ["experiment=resnet", "model.layers=[1,2]", "data.train.transform=null", "checkpoint.num_to_keep=null"],
        [
            "experiment=resnet",
            "~data.train.transform",
            "~lr_scheduler",
            "trainer.max_epochs=null",
            "trainer.max_time=90m",
        ],
        [
            "experiment=mlp",
            "+model.activation={_target_: torch.nn.Tanh}",
            "+callbacks.a={_target_: builtins.dict, x: '${seed}'}",
        ],
        [
            "experiment=mlp",
            "scaling.resources_per_worker={CPU: 2, GPU: 0.5}",
            "cluster=existing",
            "cluster.address='h:1'",
        ],
        ["experiment=mlp", "cluster=existing", "+cluster.runtime_env.env_vars={A: b}"],
        [
            "experiment=mlp",
            "cluster=inline",
            "loss.label_smoothing=0.1",
            "+loss.name='1e3'",
            "+loss.other='null'",
            "+loss.x=.inf",
        ],
        ["experiment=mlp", "~tracking.tracking_uri", "sweep.num_samples=3", "name=one"],
        ["experiment=mlp", r"+loss.text='\${seed} # : {a}'", "+loss.more='-  two\n lines'"],
    ],
)
def test_it_composes_to_the_same_experiment(
    overrides: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere.db")
    before = kept(overrides, in_tmp / "best", about=("The best trial,\nof all",))
    again = compose(["experiment=best"], in_tmp / "best")
    assert same(again.experiment, before)
    assert (again.experiment.name or "").startswith("best-")
    # The sweep's settings are gone; its mode is derived from the monitor of the checkpoints.
    assert again.experiment.sweep == SweepConfig(mode=again.experiment.checkpoint.mode)


def test_it_is_one_file_that_needs_nothing_else(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs neither the config directory of the original nor its working directory."""
    conf = in_tmp / "conf"
    (conf / "model").mkdir(parents=True)
    (conf / "cluster").mkdir()
    (conf / "experiment").mkdir()
    (conf / "model" / "net.yaml").write_text("_target_: torch.nn.Linear\nin_features: 64\nout_features: ${seed}\n")
    (conf / "cluster" / "mine.yaml").write_text("kind: existing\naddress: h:1\nruntime_env: {pip: [x]}\n")
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: net\n  - override /cluster: mine\n"
        "trainer: {max_epochs: 3}\nseed: 10\n"
    )
    before = kept(["experiment=mine"], in_tmp / "best", conf)
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    again = compose(["experiment=best"], in_tmp / "best").experiment
    assert same(replace(again, storage_path=before.storage_path), before)
    assert again.storage_path == str(in_tmp / "elsewhere" / "runs")


def test_overrides_work_on_top(in_tmp: Path) -> None:
    kept(["experiment=resnet", "optimizer.lr=0.03", "optimizer=sgd", "model.layers=[1,2]"], in_tmp)
    over = [
        "optimizer.lr=0.5",
        "model.layers=[3,3]",
        "trainer.max_epochs=null",
        "trainer.max_steps=5",
        "cluster=inline",
    ]
    e = compose(["experiment=best", *over, "scaling.num_workers=1", "name=mine", "+model.x=1"], in_tmp).experiment
    assert e.optimizer is not None
    assert e.model is not None
    assert (e.optimizer["lr"], e.optimizer["momentum"], e.model["layers"], e.model["x"]) == (0.5, 0.9, [3, 3], 1)
    assert (e.trainer.max_epochs, e.trainer.max_steps, e.name) == (None, 5, "mine")
    assert e.cluster.kind == "inline"
    with pytest.raises(ConfigError, match=r"optimizer\.lrr=1 is not a key"):
        compose(["experiment=best", "optimizer.lrr=1"], in_tmp)


def test_debugging_works_on_top(in_tmp: Path) -> None:
    kept(["experiment=resnet"], in_tmp)
    e = compose(["experiment=best", "debug=default"], in_tmp).experiment
    assert (e.debug, e.cluster.kind, e.scaling.num_workers, e.trainer.max_steps) == (True, "inline", 1, 1)


def test_where_it_runs_is_a_choice(in_tmp: Path) -> None:
    kept(["experiment=mlp", "cluster=existing"], in_tmp)
    written = (in_tmp / "experiment" / "best.yaml").read_text()
    assert "  - override /cluster: existing\n" in written
    assert "cluster" not in yaml.safe_load(written)
    assert compose(["experiment=best", "cluster=local"], in_tmp).experiment.cluster.address is None


def test_references_to_secrets_stay_references(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    before = kept(["experiment=mlp", "tracking.tracking_uri=${oc.env:A_SECRET}"], in_tmp)
    assert "hunter2" not in (in_tmp / "experiment" / "best.yaml").read_text()
    assert same(compose(["experiment=best"], in_tmp).experiment, before)


def test_it_begins_with_what_it_is(in_tmp: Path) -> None:
    kept(["experiment=mlp"], in_tmp, about=("The best\n# @package elsewhere", "lr 0.1"))
    assert (in_tmp / "experiment" / "best.yaml").read_text().splitlines()[:5] == [
        "# @package _global_",
        "# The best # @package elsewhere",
        "# lr 0.1",
        "defaults:",
        "  - override /data: null",
    ]
