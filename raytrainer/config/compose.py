"""Compose a typed `Experiment` with Hydra, fix its name and times, and explain errors in raytrainer's own words.

This module imports neither torch, Ray nor MLflow, so that an error of stage one appears within about a second.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer import plugins
from raytrainer.config import hydra_internals, number_keys, resolvers
from raytrainer.config.checks import check_references, check_together
from raytrainer.config.direction import check_modes, derive_modes
from raytrainer.config.explain import explain, key_of, unresolved
from raytrainer.config.fixing import failing_key, fix_times, make_absolute
from raytrainer.config.isolation import LOCK, SCHEMA, borrowed
from raytrainer.config.saved import value_of_key, with_overrides, write_modes
from raytrainer.config.schema import Experiment, known_keys, validate
from raytrainer.config.typed import OPEN, defaults, node_keys, typed
from raytrainer.errors import ConfigError

CONFIG_MODULE = "raytrainer.configs"
CONFIG_NAME = "train"


@dataclass(frozen=True)
class Composition:
    """The result of composing one command line.

    Attributes:
        experiment: The experiment, resolved and typed.
        text: The same as YAML. Interpolations are kept, so that `${oc.env:X}` stays a reference; the name and every
            `${now:…}` and `${hydra:…}` are fixed. `from_text(text)` gives the same experiment again.
        overrides: The overrides of the command line, as they were written.
        choices: Pairs of a group and the choice taken, e.g. `("model", "resnet18")`.
    """

    experiment: Experiment
    text: str
    overrides: tuple[str, ...] = ()
    choices: tuple[tuple[str, str], ...] = ()


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Composition:
    """Compose `configs/train.yaml` with `overrides`, as the command line does. For notebooks and tests.

    Args:
        overrides: Overrides as on the command line, e.g. `["experiment=mlp", "trainer.max_epochs=3"]`.
        config_dir: A directory with your own configs and groups, as `--config-dir`.

    Raises:
        ConfigError: A key, type or choice is wrong.
    """
    from hydra import compose as hydra_compose

    try:
        with searching(config_dir), quiet():
            rewritten = number_keys.rewritten(overrides, lambda: _choices_alone(overrides))
            cfg = hydra_compose(CONFIG_NAME, rewritten, return_hydra_config=True)
            return from_hydra(cfg, overrides)
    except Exception as error:
        raise explain(error, overrides, lambda: composed_keys(overrides, config_dir)) from error


def check_keys(overrides: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Check only the keys and types of a config, before it is shown: it may be incomplete.

    Raises:
        ConfigError: A key, type or choice is wrong.
    """
    from hydra import compose as hydra_compose

    try:
        with searching(config_dir), quiet():
            cfg = hydra_compose(CONFIG_NAME, list(overrides))
        with contextlib.suppress(OmegaConfBaseException):  # a value is missing or cannot be resolved yet
            values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            validate(typed(values))  # type: ignore[arg-type]
    except Exception as error:
        raise explain(error, overrides, lambda: composed_keys(overrides, config_dir)) from error


def group_names(config_dir: str | Path | None = None, searchpath: Sequence[str] = ()) -> set[str]:
    """Return the names of all config groups, e.g. `model`, including nested groups.

    Args:
        config_dir: As for `compose`.
        searchpath: As `hydra.searchpath`.
    """
    from hydra.core.global_hydra import GlobalHydra

    groups: set[str] = set()
    with searching(config_dir, searchpath), quiet():
        loader = GlobalHydra.instance().config_loader()
        parents = [""]
        while parents:
            parent = parents.pop()
            below = {f"{parent}/{name}".lstrip("/") for name in loader.list_groups(parent)}
            new = {group for group in below - groups if not group.startswith("hydra")}
            groups |= new
            parents += new
    return groups


def from_hydra(cfg: DictConfig, overrides: Sequence[str] | None = None) -> Composition:
    """Return the `Composition` of a Hydra config that has its `hydra` node, or for which HydraConfig is set.

    Args:
        cfg: The config that Hydra composed.
        overrides: The overrides of the command line; None for those that Hydra recorded.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals

    own = cfg.copy()
    OmegaConf.set_struct(own, False)
    if "hydra" not in cfg:
        return _of_running(own, overrides)
    with borrowed():
        HydraConfig.instance().set_config(cfg)
        own.pop("hydra")
        setup_globals()
        return _of_running(own, overrides)


def _of_running(cfg: DictConfig, overrides: Sequence[str] | None) -> Composition:
    """Return the composition of a config whose `hydra` node is in HydraConfig. The config is changed in place."""
    from hydra.core.hydra_config import HydraConfig

    choices = _choices(HydraConfig.get().runtime)
    if overrides is None:  # unresolved: `optimizer.lr=${x}` is an override, not an interpolation in Hydra's list
        task: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        overrides = [str(o) for o in task]
    try:
        cfg.name = new_name(choices.get("experiment", "run")) if cfg.get("name") is None else cfg.name
        fix_times(cfg)
        if cfg.get("storage_path") is None:
            cfg.storage_path = "runs"
        make_absolute(cfg)
    except OmegaConfBaseException as error:
        raise unresolved(failing_key(cfg), error) from error
    composition = _composition(cfg, tuple(overrides), tuple(sorted(choices.items())))
    with _standing_in(cfg):
        resolvers.check_same(cfg, composition.text)
    check_modes(composition.experiment)  # a saved config is not checked, because it keeps the recorded modes
    return composition


def from_text(text: str, overrides: Sequence[str] = ()) -> Composition:
    """Compose a saved `Composition.text` again, with value overrides (`trainer.max_epochs=5`) on top.

    Raises:
        ConfigError: An override is not `key=value` or names a key that the saved config does not have.
    """
    try:
        with LOCK:
            return _composition(with_overrides(text, overrides), tuple(overrides), ())
    except Exception as error:
        raise explain(error, overrides) from error


def experiment_of(text: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return `from_text(text, overrides).experiment` at half the cost, for a process that trains many variants.

    Raises:
        ConfigError: As for `from_text`.
    """
    try:
        with LOCK:
            return _experiment(with_overrides(text, overrides), ())
    except Exception as error:
        raise explain(error, overrides) from error


def register_schema() -> None:
    """Register the schema with Hydra under the name with which `configs/train.yaml` begins.

    It is registered as plain values: Hydra then adds and overrides keys as usual, and only `typed` checks them.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA, node=_schema_node(), provider="raytrainer")


@functools.cache
def _schema_node() -> DictConfig:
    """Return the defaults of the schema. Hydra's store copies them, at registration and for each composition."""
    node = OmegaConf.create(defaults())
    for name in OPEN:
        section = OmegaConf.select(node, name)
        if section is not None:  # a section that is null accepts a whole mapping; one key of it needs a +
            OmegaConf.set_struct(section, False)
    assert isinstance(node, DictConfig)
    return node


def new_name(experiment: str) -> str:
    """Return a default name for a new run: the experiment, the local time and 4 hex digits."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment).strip("-._") or "run"
    return f"{stem[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def with_number_keys(overrides: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """Return the overrides in Hydra's form: `loss.weights.1=9.0` becomes `loss.weights={1:9.0}` for numeric keys."""

    def composed() -> DictConfig:
        try:
            with searching(config_dir), quiet():
                return _choices_alone(overrides)
        except Exception:  # noqa: BLE001  errors are reported when the config is composed
            return DictConfig({})

    return number_keys.rewritten(overrides, composed)


def _choices_alone(overrides: Sequence[str]) -> DictConfig:
    """Compose the group choices of a command line without its values. Hydra must be set up."""
    from hydra import compose as hydra_compose

    groups = [o for o in overrides if "." not in key_of(o) and not o.startswith(("+", "~", "hydra"))]
    # A wrong choice or key must not hide the keys of the other choices.
    valid = [o for o in groups if _composes(hydra_compose, [o])]
    searchpath = [o for o in overrides if key_of(o) == "hydra.searchpath"]
    return hydra_compose(CONFIG_NAME, [*searchpath, *valid])


def composed_keys(overrides: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """Return the keys that an error can suggest: the schema's, the groups, and those of the chosen `_target_` nodes."""
    try:
        with searching(config_dir), quiet():
            nodes = node_keys(OmegaConf.to_container(_choices_alone(overrides), resolve=False))
            return list(dict.fromkeys([*known_keys(), *sorted(group_names(config_dir)), *nodes]))
    except Exception:  # noqa: BLE001  only a message needs the keys; the caller reports its error
        return [*known_keys(), "experiment"]


def _composes(hydra_compose: Any, overrides: list[str]) -> bool:
    try:
        hydra_compose(CONFIG_NAME, overrides)
    except Exception:  # noqa: BLE001  every error means that it cannot be composed
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Hydra's warning about a missing search path, for which `_choices` raises an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="provider=.*is not available")
        yield


@contextlib.contextmanager
def searching(config_dir: str | Path | None, searchpath: Sequence[str] = ()) -> Iterator[None]:
    """Set up Hydra as the command line does, and restore its previous state afterwards."""
    from hydra import version
    from hydra.core.config_search_path import SearchPathQuery

    path = hydra_internals.search_path(CONFIG_MODULE)
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise ConfigError("is not a directory", key="--config-dir", value=config_dir)
        path.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    for place in searchpath:
        path.prepend(provider="hydra.searchpath", path=place, anchor=SearchPathQuery(provider="schema"))
    with borrowed():
        version.setbase("1.3")
        register_schema()
        hydra_internals.initialize("raytrainer", path)
        yield


def _composition(cfg: DictConfig, overrides: tuple[str, ...], choices: tuple[tuple[str, str], ...]) -> Composition:
    _write_as_before(cfg)
    experiment = _experiment(cfg, choices)
    write_modes(cfg, experiment)
    return Composition(experiment, OmegaConf.to_yaml(cfg), overrides, choices)


def with_modes(composition: Composition) -> Composition:
    """Return the composition with the modes written out that follow from objects of the section `metrics`.

    Later readers of the text then do not need the libraries of these objects.
    """
    derive_modes(composition.experiment, objects=True)
    cfg = OmegaConf.create(composition.text)
    assert isinstance(cfg, DictConfig)
    return (
        replace(composition, text=OmegaConf.to_yaml(cfg)) if write_modes(cfg, composition.experiment) else composition
    )


# Keys that later versions added, with their defaults.
_ADDED_KEYS: tuple[tuple[str, str, Any], ...] = (("cluster", "options", {}), ("data", "start_method", "forkserver"))


def _write_as_before(cfg: DictConfig) -> None:
    """Write the config as older versions write it: a request is known by the digest of its config, and the raytrainer on
    a cluster may be older. A key that they do not know is left out if it has its default."""
    kind = value_of_key(cfg, "cluster.kind")
    if isinstance(kind, str) and kind != plugins.recorded_kind(kind):
        cfg.cluster.kind = plugins.recorded_kind(kind)
    for section, key, default in _ADDED_KEYS:
        node = cfg.get(section)
        if isinstance(node, DictConfig) and key in node and node.get(key) == default:
            OmegaConf.set_struct(node, False)
            del node[key]


def _experiment(cfg: DictConfig, choices: tuple[tuple[str, str], ...]) -> Experiment:
    try:
        with _standing_in(cfg):
            values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise unresolved(failing_key(cfg) or error.full_key, error) from error
    assert isinstance(values, dict)
    experiment = typed({str(k): v for k, v in values.items()}, [group for group, _ in choices])
    validate(experiment)
    for name in ("tracking_uri", "experiment_name"):  # an empty variable counts as not set
        setattr(experiment.tracking, name, (getattr(experiment.tracking, name) or "").strip() or None)
    check_together(experiment)
    derive_modes(experiment)
    if experiment.cluster.runtime_env:
        raw = OmegaConf.to_container(cfg.cluster.runtime_env, resolve=False)
        check_references(raw, experiment.cluster.forward_env)
    return experiment


@contextlib.contextmanager
def _standing_in(cfg: DictConfig) -> Iterator[None]:
    """Set placeholders for variables that only a shared cluster has, so that the config can be resolved here. Their
    names are in `cluster.forward_env`. The text that is sent keeps its references."""
    kind = value_of_key(cfg, "cluster.kind")
    sent = isinstance(kind, str) and plugins.backend_named(kind).submits
    names = value_of_key(cfg, "cluster.forward_env") if sent else ()
    absent = [name for name in names or () if isinstance(name, str) and name not in os.environ]
    os.environ.update({name: f"({name} of the cluster)" for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]


def _choices(runtime: Any) -> dict[str, str]:
    """Return group → choice for the config that Hydra just composed. Refuse ambiguous choices and missing folders."""
    choices = {k: str(v) for k, v in runtime.choices.items() if not k.startswith("hydra/") and v is not None}
    ours = importlib.resources.files(CONFIG_MODULE)
    for source in runtime.config_sources:
        if (
            source.provider in ("hydra", "main", "schema")
            or source.schema not in ("file", "pkg")
            or source.path == CONFIG_MODULE
        ):
            continue
        try:
            folder = Path(source.path) if source.schema == "file" else importlib.resources.files(source.path)
        except ModuleNotFoundError:
            folder = None
        if folder is None or not folder.is_dir():
            raise ConfigError("was not found", key="hydra.searchpath", value=f"{source.schema}://{source.path}")
        for group, choice in choices.items():
            name = f"{group.partition('@')[0]}/{choice}.yaml"
            if folder.joinpath(name).is_file() and ours.joinpath(name).is_file():
                raise ConfigError(
                    f"is in {source.path}, but the built-in choice of this name would be used; rename the file",
                    key=group,
                    value=choice,
                )
    return choices
