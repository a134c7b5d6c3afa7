"""Hydra applications of other projects compose our configs, and keep their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

from hydra_plugins.raytrainer.searchpath import CONFIGS, RaytrainerSearchPath

APPLICATION = """
import hydra, sys
from omegaconf import OmegaConf

@hydra.main(version_base=None, config_path="conf", config_name="root")
def main(config):
    print(OmegaConf.to_yaml(config))

main()
assert "torch" not in sys.modules and "ray" not in sys.modules
"""


def test_another_application_composes_ours_and_its_own_wins(in_tmp: Path) -> None:
    (in_tmp / "app.py").write_text(APPLICATION)
    (in_tmp / "conf" / "optimizer").mkdir(parents=True)
    (in_tmp / "conf" / "root.yaml").write_text("defaults: [{model: resnet18}, {optimizer: sgd}, _self_]\n")
    (in_tmp / "conf" / "optimizer" / "sgd.yaml").write_text("lr: 7\n")
    command = [sys.executable, "app.py", "model.norm=group", "hydra.run.dir=.", "hydra.output_subdir=null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["model"]["_target_"] == "raytrainer.models.resnet18"
    assert config["model"]["norm"] == "group"
    assert config["optimizer"] == {"lr": 7}


def test_our_own_program_has_them_once() -> None:
    search_path = ConfigSearchPathImpl()
    search_path.append("main", CONFIGS)
    RaytrainerSearchPath().manipulate_search_path(search_path)
    assert [element.path for element in search_path.get_path()] == [CONFIGS]
