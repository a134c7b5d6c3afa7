"""Hydra applications of other projects can compose our configs, and keep their own."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from hydra_plugins.raytrainer._jobs import _Reference, split
from hydra_plugins.raytrainer.ray_tune import DEFAULTS, RayTuneSweeper
from raytrainer.errors import ConfigError
from tests.launches import OUTSIDE

APPLICATION = """
import hydra, sys
from omegaconf import OmegaConf

@hydra.main(version_base=None, config_path="conf", config_name="root")
def main(config):
    print(OmegaConf.to_yaml(config))

main()
assert "torch" not in sys.modules and "ray" not in sys.modules
"""


def test_another_application_composes_our_groups_and_its_own_win(in_tmp: Path) -> None:
    (in_tmp / "app.py").write_text(APPLICATION)
    (in_tmp / "conf" / "optimizer").mkdir(parents=True)
    (in_tmp / "conf" / "root.yaml").write_text(
        "defaults: [{model: resnet18}, {optimizer: sgd}, _self_]\nhydra: {searchpath: ['pkg://raytrainer.configs']}\n"
    )
    (in_tmp / "conf" / "optimizer" / "sgd.yaml").write_text("lr: 7\n")
    done = started("model.norm=group")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["model"]["_target_"] == "raytrainer.models.resnet18"
    assert config["model"]["norm"] == "group"
    assert config["optimizer"] == {"lr": 7}


def test_application_without_our_searchpath_has_none_of_our_groups(in_tmp: Path) -> None:
    """The application's `debug` stays a plain key, although we have a config group of that name."""
    (in_tmp / "app.py").write_text(APPLICATION)
    (in_tmp / "conf").mkdir()
    (in_tmp / "conf" / "root.yaml").write_text("debug: false\nmodel: small\n")
    done = started("debug=true", "model=large")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == {"debug": True, "model": "large"}


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "app.py", *arguments, "hydra.run.dir=.", "hydra.output_subdir=null"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# --- hydra/sweeper=ray_tune; whole sweeps are in tests/sweep/test_application.py ---------------------------------------


def app(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(OUTSIDE / "hydra_app" / "app.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_settings_are_in_the_config_of_the_application(tmp_path: Path) -> None:
    arguments = ["hydra/sweeper=ray_tune", "hydra.sweeper.resources_per_trial.GPU=0.5", "hydra.sweeper.params.x='1,2'"]
    done = app(tmp_path, *arguments, "--cfg", "hydra", "--package", "hydra.sweeper")
    assert done.returncode == 0, done.stderr
    shown = {key: value for key, value in yaml.safe_load(done.stdout).items() if not key.startswith("_")}
    assert shown == {**DEFAULTS, "resources_per_trial": {"CPU": 1, "GPU": 0.5}, "params": {"x": "1,2"}}
    # Without -m, the plugin changes nothing.
    assert app(tmp_path, "hydra/sweeper=ray_tune", "hydra.run.dir=.").returncode == 0
    assert (tmp_path / "calls").exists()


def test_unknown_setting_is_refused_with_the_valid_ones(tmp_path: Path) -> None:
    done = app(tmp_path, "-m", "hydra/sweeper=ray_tune", "hydra.sweeper.num_sample=3", "x=1,2", "hydra.sweep.dir=swept")
    assert done.returncode == 1
    first, *_ = done.stderr.splitlines()
    assert first.startswith("hydra.sweeper.num_sample ")
    assert "valid: num_samples, " in first
    assert all(name in first for name in DEFAULTS)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "swept").exists()


def sweeper(
    task: Any, launcher: str = "hydra._internal.core_plugins.basic_launcher.BasicLauncher", **settings: Any
) -> Any:
    made = RayTuneSweeper(**settings)
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": launcher}}})
    context: Any = None
    made.setup(hydra_context=context, task_function=task, config=config)
    return made


def test_another_launcher_is_refused() -> None:
    with pytest.raises(CompactHydraException, match=r"hydra/launcher=a\.b\.Launcher .*hydra/sweeper=ray_tune"):
        sweeper(print, launcher="a.b.Launcher").sweep(["x=1,2"])


def test_settings_of_an_experiment_are_below_sweep() -> None:
    def task(config: Any) -> None:
        raise AssertionError

    task.sweep = lambda arguments, config: arguments  # type: ignore[attr-defined]
    assert sweeper(task, **DEFAULTS).sweep(["x=1,2"]) == ["x=1,2"]
    with pytest.raises(ConfigError, match=r"^hydra\.sweeper\.num_samples=3 .* sweep\.num_samples"):
        sweeper(task, num_samples=3).sweep([])
    with pytest.raises(ConfigError, match=r"^hydra\.sweeper\.direction=maximize .* sweep\.mode"):
        sweeper(task, direction="maximize").sweep([])


def test_params_are_sweeps_or_values_and_the_command_line_has_precedence() -> None:
    params = {"a": "interval(0,1)", "b": [1, 2], "c": 3, "d": None, "e": True, "f": "text", "g": "1,2", "h": "range(1"}
    fixed, space = split(params, ["f=other", "+x=1"])
    assert fixed == ["c=3", "d=null", "e=true"]
    assert space == {"a": "interval(0,1)", "b": [1, 2], "g": "1,2", "h": "range(1"}, (
        "what cannot be parsed is refused later"
    )


def wrapper(inner: Any) -> Any:
    @functools.wraps(inner)
    def outer() -> Any:
        return inner

    return outer


def _bare() -> None:
    """A task function that is not wrapped."""


@wrapper
@wrapper
def _wrapped() -> None:
    """A task function below the wrapper that its module has under its name, as `hydra.main` leaves it."""


def test_function_of_a_module_is_pickled_by_name() -> None:
    module: Any = sys.modules[__name__]
    below = module._wrapped.__wrapped__
    for task, depth in ((_bare, 0), (module._wrapped, 0), (below, 1), (below.__wrapped__, 2)):
        reference = _Reference.to(task)
        assert reference is not None
        assert (reference.depth, reference.function) == (depth, task)
    assert _Reference.to(lambda: 0) is None, "it is in no module by its name"
    assert _Reference.to(functools.partial(_bare)) is None


def test_composition_error_is_that_of_hydra(tmp_path: Path) -> None:
    done = app(tmp_path, "-m", "hydra/sweeper=ray_tune", "z=1,2", "hydra.sweep.dir=swept")
    assert done.returncode == 1
    assert done.stderr.startswith("Could not override 'z'.")
    assert not list((tmp_path / "swept").glob("[0-9]*"))


def test_secret_of_the_environment_stays_a_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hydra resolves a plugin's settings, but the trials' parameters are kept and logged."""
    monkeypatch.setenv("A_SECRET", "hunter2")
    params = {
        "token": ["${oc.env:A_SECRET}", "none"],
        "key": "${oc.env:A_SECRET}",
        "x": "interval(0,${top})",
        "n": "${some}",
    }
    swept = sweeper(print, params={"token": ["hunter2", "none"], "key": "hunter2", "x": "interval(0,7)", "n": "1,2"})
    swept._config = OmegaConf.merge(
        swept._config,
        {
            "top": 7,
            "some": "1,2",
            "hydra": {"sweeper": {"params": params}, "sweep": {"dir": str(tmp_path)}, "verbose": False},
        },
    )
    passed: dict[str, Any] = {}

    def search(jobs: Any, settings: Any, arguments: list[str], *, space: dict[str, Any], **_: Any) -> Any:
        passed.update(arguments=arguments, space=space)
        raise CompactHydraException("enough")

    monkeypatch.setattr("raytrainer.sweep.application.search", search)
    with pytest.raises(CompactHydraException, match="enough"):
        swept.sweep(["y=1"])
    assert passed["arguments"] == ["key=${oc.env:A_SECRET}", "y=1"]
    assert passed["space"] == {"token": ["${oc.env:A_SECRET}", "none"], "x": "interval(0,7)", "n": "1,2"}
