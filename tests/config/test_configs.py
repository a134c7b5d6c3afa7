"""Tests that every YAML in configs/ composes, binds and passes the parts of `check` that need no machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from raytrainer import preflight
from raytrainer.config import Composition, compose
from raytrainer.config.foreign import FOREIGN_KEYS
from raytrainer.config.typed import defaults
from raytrainer.data.tokens import TokenWriter

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))
ELSEWHERE = ["storage_path=s3://bucket/runs", "tracking.tracking_uri=https://mlflow.example.com"]
# The overrides that a choice needs to be a complete experiment.
BESIDE = {
    ("experiment", "*"): [],
    ("data", "tokens"): ["experiment=transformer", "data.train.path=train.tokens"],
    ("debug", "*"): ["experiment=mlp"],
    ("cluster", "inline"): ["experiment=mlp", "scaling.num_workers=1"],
    ("cluster", "job"): ["experiment=mlp", "cluster.address=https://ray.example.com", *ELSEWHERE],
    ("cluster", "ray_jobs"): ["experiment=mlp", "cluster.address=https://ray.example.com", *ELSEWHERE],
    ("cluster", "kuberay"): ["experiment=mlp", "cluster.image=registry.example.com/trainer:1", *ELSEWHERE],
}

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.fixture
def data_here(in_tmp: Path) -> None:
    """Create the files that the `data` choices for the user's own files look for, under the names in the configs."""
    for split in ("train", "val"):
        # At least one batch, because fewer samples are refused. Nothing is decoded before a start.
        folder = in_tmp / "images" / split / "cat"
        folder.mkdir(parents=True)
        for number in range(1024):
            (folder / f"{number}.jpg").touch()
    with TokenWriter(in_tmp / "train.tokens", vocab_size=256, separator=None, tokenizer="none") as writer:
        writer.add([[1] * 65_536], 65_536)


def composed(file: Path) -> Composition:
    group, choice = file.parent.name, file.stem
    beside = BESIDE.get((group, choice), BESIDE.get((group, "*"), ["experiment=mlp"]))
    return compose([*beside, f"{group}={choice}"])


def test_there_are_some() -> None:
    assert {"cluster", "data", "debug", "experiment", "loss", "lr_scheduler", "model", "optimizer", "sweep"} <= {
        file.parent.name for file in FILES
    }


@pytest.mark.usefixtures("data_here")
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_composes_and_passes_check(file: Path) -> None:
    composition = composed(file)
    assert dict(composition.choices)[file.parent.name] == file.stem
    e = composition.experiment
    preflight.check_objects(e)
    plenty = preflight.Resources(64.0, 8.0, 2.0**40, {"accelerator_type:H100": 8.0})
    assert preflight.check_resources(e, plenty, "here") == []
    assert preflight.check_environment(e, {}) == []
    assert preflight.check_reach(e, e.tracking.tracking_uri or "sqlite:////mlflow.db", is_here=lambda host: False) == []


@pytest.mark.parametrize("choice", ["job", "kuberay"])
def test_a_cluster_elsewhere_has_nothing_of_this_machine(choice: str) -> None:
    beside = [o for o in BESIDE["cluster", choice] if o not in ELSEWHERE]
    e = compose([*beside, f"cluster={choice}"]).experiment
    problems = preflight.check_reach(e, "sqlite:////mlflow.db", is_here=lambda host: False)
    assert [problem.partition("=")[0] for problem in problems] == ["storage_path", "tracking.tracking_uri"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_says_what_it_is(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert re.match(r"# \w.{10,}", lines[0]), "the first line says what the file is for"
    # A file that sets keys outside its group's section must declare its package.
    elsewhere = file.parent.name in ("experiment", "debug", "sweep")
    assert file.read_text().startswith("# @package _global_\n") == elsewhere


def test_every_group_is_a_package_for_wheels() -> None:
    assert all((file.parent / "__init__.py").is_file() for file in FILES)


def test_the_root_has_no_key_twice_and_repeats_no_default() -> None:
    root = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    ours = {k: v for k, v in root.items() if k not in ("defaults", "hydra")}
    assert set(ours) <= set(defaults())
    assert ours["tracking"].items() & defaults()["tracking"].items() == set()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "64-true"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_optimizer_goes_with_every_precision(optimizer: str, precision: str) -> None:
    compose(["experiment=mlp", f"optimizer={optimizer}", f"trainer.precision={precision}"])


def test_no_config_uses_a_name_that_is_answered_as_foreign() -> None:
    for file in FILES:
        for key in re.findall(r"^\s*(\w+):", file.read_text(), re.MULTILINE):
            assert key not in FOREIGN_KEYS or key in ("lr", "seq_len", "warmup_steps"), (file, key)
