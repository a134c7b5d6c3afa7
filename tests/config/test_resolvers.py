"""Tests of users' resolvers: use in a process that composes nothing, and errors if one is missing or not constant."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from raytrainer.config import compose, experiment_of, from_text, resolved
from raytrainer.errors import ConfigError

NAME = "test_tripled"


@pytest.fixture
def plugin(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A text that uses a resolver of a Hydra plugin in the current directory, which this process has not loaded."""
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    folder = in_tmp / "hydra_plugins" / "raytrainer_test"
    folder.mkdir(parents=True)
    folder.joinpath("__init__.py").write_text(
        "from omegaconf import OmegaConf\n"
        f"OmegaConf.register_new_resolver('{NAME}', lambda a: 3 * int(a), replace=True)\n"
    )
    monkeypatch.syspath_prepend(str(in_tmp))
    OmegaConf.register_new_resolver(NAME, lambda a: 0, replace=True)
    text = compose(["experiment=smoke", f"model.width=${{{NAME}:4}}"]).text
    OmegaConf.clear_resolver(NAME)
    loaded = Singleton._instances.pop(Plugins, None)
    yield text
    OmegaConf.clear_resolver(NAME)
    Singleton._instances.pop(Plugins, None)
    if loaded is not None:
        Singleton._instances[Plugins] = loaded
    sys.modules.pop("hydra_plugins.raytrainer_test", None)


def test_a_worker_loads_the_plugin_that_registers_it(plugin: str) -> None:
    e = experiment_of(plugin, ["trainer.max_steps=3"])
    assert e.model is not None
    assert (e.model["width"], e.trainer.max_steps) == (12, 3)
    composition = from_text(plugin)
    assert f"${{{NAME}:4}}" in composition.text  # still a reference


def test_a_reference_in_a_record_is_resolved_too(plugin: str) -> None:
    assert resolved(f"/runs/${{{NAME}:2}}") == "/runs/6"


def test_a_missing_resolver_is_named_with_the_place_where_it_belongs() -> None:
    wrong = "model.width=${absent_one:4}"
    with pytest.raises(ConfigError, match=r"^model\.width .*no resolver absent_one") as caught:
        compose(["experiment=smoke", wrong])
    assert "hydra_plugins/mine/__init__.py" in str(caught.value)
    with pytest.raises(ConfigError, match=r"^model\.width .*no resolver absent_one"):
        from_text(compose(["experiment=smoke"]).text, [wrong])
    with pytest.raises(ConfigError, match=r"oc\.evn .*oc\.env\?"):
        compose(["experiment=smoke", "model.width=${oc.evn:X}"])


def test_one_that_gives_each_worker_another_value_is_refused() -> None:
    numbers = itertools.count()
    OmegaConf.register_new_resolver("test_counted", lambda: next(numbers), replace=True)
    try:
        with pytest.raises(ConfigError, match=r"^model\.width .*another value each time"):
            compose(["experiment=smoke", "model.width=${test_counted:}"])
    finally:
        OmegaConf.clear_resolver("test_counted")
