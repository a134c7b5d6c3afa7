"""The `ray up` files: Ray's own schema and preparation accept them, and they are safe as they are."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raytrainer.preflight import Resources
from raytrainer.ray_internals.autoscaling import addable

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "cluster.yaml", *sorted((ROOT / "docs/clusters").glob("*.yaml"))]


@pytest.fixture(params=FILES, ids=lambda file: str(file.relative_to(ROOT)))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(request.param.read_text())
    return found


def test_there_is_one_for_each_cloud() -> None:
    assert [yaml.safe_load(file.read_text())["provider"]["type"] for file in FILES] == ["aws", "azure", "gcp"]


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    # `ray up` does this before it calls a cloud.
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert {name: kind["max_workers"] for name, kind in prepared["available_node_types"].items()} == {
        "head": 0,
        "gpu": 4,
    }
    # None of the provider's defaults is left: they install a nightly Ray and open the dashboard to the network.
    assert prepared["setup_commands"] == config["setup_commands"]
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]
    assert prepared["head_setup_commands"] == [*config["setup_commands"], *config["head_setup_commands"]]


def test_ray_refuses_a_misspelt_one(config: dict[str, Any]) -> None:
    """Ray refuses every misspelt key; otherwise the test above would prove nothing."""
    for key in config:
        wrong = prepare_config(copy.deepcopy(config))
        wrong[f"{key}x"] = wrong.pop(key)
        with pytest.raises((jsonschema.ValidationError, ValueError, RuntimeError)):
            validate_config(wrong)


def test_it_grows_from_no_gpu_to_four(config: dict[str, Any]) -> None:
    head = {"CPU": 0.0, "node:__internal_head__": 1.0}
    growth = addable(prepare_config(copy.deepcopy(config)), [head])
    assert growth is not None
    all_of_it = Resources.of_nodes([head], growth.nodes, growth.most)
    assert (all_of_it.gpus, growth.most) == (4.0, 4)
    assert config["available_node_types"]["gpu"]["min_workers"] == 0
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_it_wants_a_token_and_shows_the_dashboard_to_itself_alone(config: dict[str, Any]) -> None:
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token ray start" in command
    assert sum("ray start" in command for command in starts) == 2
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])
    # The token itself is in one of the user's own files.
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"AUTH_TOKEN=", yaml.safe_dump(config))


def test_what_it_installs_is_here_and_pinned(config: dict[str, Any]) -> None:
    ray = metadata.version("ray")
    assert f"ray=={ray}" in (ROOT / "constraints.txt").read_text().splitlines()
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{ray}-py311-")
    for there, here in config["file_mounts"].items():
        if not here.startswith("~"):
            assert (ROOT / here).exists(), here
            assert there.startswith("/home/ray/raytrainer/")
    (install,) = config["setup_commands"]
    assert "-c /home/ray/raytrainer/constraints.txt" in install


def test_what_is_copied_can_be_installed(config: dict[str, Any], tmp_path: Path) -> None:
    """The copied files can be installed as the setup command does it on a new machine, here without the
    dependencies."""
    for there, here in config["file_mounts"].items():
        if not here.startswith("~"):
            target = tmp_path / Path(there).relative_to("/home/ray")
            target.parent.mkdir(exist_ok=True)
            if (ROOT / here).is_dir():
                shutil.copytree(ROOT / here, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / here, target)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(tmp_path / "installed")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(tmp_path / "raytrainer")], check=True)
    assert (tmp_path / "installed/raytrainer/configs/train.yaml").is_file()
    assert (tmp_path / "installed/hydra_plugins/raytrainer/ray_tune.py").is_file()
