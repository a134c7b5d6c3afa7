"""Tests of overrides of mappings whose keys are numbers, such as class weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrainer.config import compose, from_text, with_number_keys
from raytrainer.errors import ConfigError

MINE = """# @package _global_
defaults: [{override /model: mlp}]
trainer: {max_steps: 3}
loss:
  weights: {0: 1.0, 1: 2.5}
  deep: {a: {1: {x: 3}, false: 4}}
  names: {"0": 1}
  listed: [1, 2]
"""


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    path = in_tmp / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(MINE)
    return in_tmp / "conf"


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("loss.weights.1=9.0", "weights", {0: 1.0, 1: 9.0}),
        ("++loss.weights.1=9.0", "weights", {0: 1.0, 1: 9.0}),
        ("+loss.weights.2=9.0", "weights", {0: 1.0, 1: 2.5, 2: 9.0}),
        ("loss.weights={0:3.0,1:4.0}", "weights", {0: 3.0, 1: 4.0}),
        ("loss.deep.a.1.x=5", "deep", {"a": {1: {"x": 5}, False: 4}}),
        ("loss.names.0=2", "names", {"0": 2}),
    ],
)
def test_a_number_stays_a_number(folder: Path, override: str, key: str, found: dict[Any, Any]) -> None:
    loss = compose(["experiment=mine", override], folder).experiment.loss
    assert loss is not None
    assert loss[key] == found
    assert [type(k) for k in loss[key]] == [type(k) for k in found]
    saved = compose(["experiment=mine"], folder).text
    again = from_text(saved, [override]).experiment.loss
    assert again is not None
    assert again[key] == found


def test_invalid_overrides_are_refused(folder: Path) -> None:
    for override, reason in (
        ("loss.weights.2=9.0", r"^loss\.weights\.2=9\.0 is not a key .*valid: loss\.weights\.0, loss\.weights\.1"),
        ("~loss.weights.1", r"^loss\.weights\.1 has a number as its key, which ~ cannot name"),
    ):
        with pytest.raises(ConfigError, match=reason):
            compose(["experiment=mine", override], folder)


def test_a_sweep_over_one_entry(folder: Path) -> None:
    overrides = ["experiment=mine", "loss.weights.1=1.0,2.0", "seed=1"]
    assert with_number_keys(overrides, folder) == ["experiment=mine", "loss.weights={1:1.0},{1:2.0}", "seed=1"]
    assert with_number_keys(["experiment=nope", "loss.weights.1=1"], folder) == ["experiment=nope", "loss.weights.1=1"]


def test_the_saved_text_has_them_too(folder: Path) -> None:
    text = compose(["experiment=mine", "loss.weights.1=9.0"], folder).text
    assert yaml.safe_load(text)["loss"]["weights"] == {0: 1.0, 1: 9.0}
