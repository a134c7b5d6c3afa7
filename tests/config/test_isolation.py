"""Tests of composing inside another Hydra application and from several threads: Hydra's state stays unchanged."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf import OmegaConf

from raytrainer.config import compose, composed_keys, from_text, group_names
from raytrainer.errors import ConfigError

KINDS = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)


@pytest.fixture
def application(tmp_path: Path) -> Iterator[Any]:
    """Start another Hydra application, and yield its config."""
    (tmp_path / "app.yaml").write_text("x: 1\nname: ${hydra:job.name}\n")
    with initialize_config_dir(str(tmp_path), job_name="theirs", version_base="1.2"):
        cfg = hydra_compose("app", return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        yield HydraConfig.instance().cfg
    HydraConfig.instance().cfg = None


def state() -> dict[str, Any]:
    """Return Hydra's state and the state of this process that it could change, with objects by identity."""
    return {
        **{kind.__name__: id(Singleton._instances.get(kind)) for kind in KINDS},
        "stored": sorted(ConfigStore.instance().repo),
        "resolvers": {name: id(OmegaConf._get_resolver(name)) for name in ("now", "hydra", "python_version")},
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "argv": list(sys.argv),
        "path": list(sys.path),
        "filters": list(warnings.filters),
    }


def test_another_applications_state_is_as_it_was(application: Any) -> None:
    before = state()
    assert compose(["experiment=smoke"]).experiment.trainer.max_steps == 20
    with pytest.raises(ConfigError):
        compose(["experiment=smoke", "trainer.max_step=3"])
    with pytest.raises(ConfigError):
        compose(["experiment=nope"])
    assert "model" in group_names()
    assert "trainer.max_steps" in composed_keys([])
    after = state()
    assert after == before
    assert HydraConfig.get().job.name == "theirs"
    assert HydraConfig.instance().cfg is application
    assert OmegaConf.create({"x": "${hydra:job.name}"}).x == "theirs"
    assert hydra_compose("app", ["x=2"]).x == 2


def test_a_process_without_hydra_has_none_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ConfigStore.instance().repo, "experiment_schema.yaml", raising=False)  # from our command line
    known = {kind for kind in KINDS if kind in Singleton._instances}
    compose(["experiment=smoke"])
    assert {kind for kind in KINDS if kind in Singleton._instances} == known
    assert "experiment_schema.yaml" not in ConfigStore.instance().repo


def test_threads_compose_at_the_same_time() -> None:
    """Each thread composes its own experiments: valid, invalid and saved ones."""
    text = compose(["experiment=smoke", "name=saved"]).text
    begin, composed, failed = threading.Barrier(2), dict[int, list[Any]](), list[BaseException]()

    def work(number: int) -> None:
        try:
            begin.wait(30)
            seed = 10 * number
            overrides = ["experiment=smoke", f"seed={seed}", "model=mlp" if number % 2 else "model=resnet_digits"]
            e = compose(overrides).experiment
            with pytest.raises(ConfigError, match=rf"trainer\.max_step={seed} "):
                compose([*overrides, f"trainer.max_step={seed}"])
            again = from_text(text, [f"trainer.max_steps={seed + 1}"]).experiment
            assert e.model is not None
            composed.setdefault(number, []).append((e.seed, e.model["_target_"], again.trainer.max_steps))
        except BaseException as error:  # noqa: BLE001  the main thread reports it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for number in range(2):
        target = "raytrainer.models.MLP" if number % 2 else "raytrainer.models.ResNet"
        assert composed[number] == [(10 * number, target, 10 * number + 1)]
