"""Hydra → a typed `Experiment`, once: composing, fixing the name and the times, and saying what is wrong in our words.

Imports neither torch, ray nor mlflow: a config error of stage one answers in about a second.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config import number_keys, resolvers
from raytrainer.config.checks import check_references, check_together
from raytrainer.config.direction import by_name, check_modes, derive_modes
from raytrainer.config.explain import explain, key_of, unresolved, value_of
from raytrainer.config.isolation import LOCK, SCHEMA, borrowed
from raytrainer.config.nodes import check_targets
from raytrainer.config.schema import Experiment, known_keys, validate
from raytrainer.config.typed import OPEN, defaults, is_below_node, typed, unknown_key
from raytrainer.errors import ConfigError

CONFIG_MODULE = "raytrainer.configs"
CONFIG_NAME = "train"


@dataclass(frozen=True)
class Composition:
    """What one command line composed.

    Attributes:
        experiment: Resolved and typed.
        text: The same as YAML with its interpolations kept (so that `${oc.env:X}` stays a reference), the name and
            every `${now:…}` and `${hydra:…}` fixed. `from_text(text)` gives the same experiment again.
        overrides: The command line's overrides, as they were written.
        choices: Group → the choice taken, e.g. `{"model": "resnet18"}`.
    """

    experiment: Experiment
    text: str
    overrides: tuple[str, ...] = ()
    choices: tuple[tuple[str, str], ...] = ()


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Composition:
    """Composes `configs/train.yaml` with `overrides`, as the command line does; for notebooks and tests.

    Args:
        overrides: As on the command line, e.g. `["experiment=mlp", "trainer.max_epochs=3"]`.
        config_dir: A directory of own configs and groups, as `--config-dir`.

    Raises:
        ConfigError: Any key, type or choice is wrong.
    """
    from hydra import compose as hydra_compose

    try:
        with searching(config_dir), quiet():
            given = number_keys.rewritten(overrides, lambda: _choices_alone(overrides))
            cfg = hydra_compose(CONFIG_NAME, given, return_hydra_config=True)
            return from_hydra(cfg, overrides)
    except Exception as error:
        raise explain(error, overrides, lambda: composed_keys(overrides, config_dir)) from error


def check_keys(overrides: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Only the keys and types of what `overrides` compose, for showing it: it may be no whole experiment yet.

    Raises:
        ConfigError: A key, type or choice is wrong.
    """
    from hydra import compose as hydra_compose

    try:
        with searching(config_dir), quiet():
            cfg = hydra_compose(CONFIG_NAME, list(overrides))
        with contextlib.suppress(OmegaConfBaseException):  # a value that is missing or that nothing resolves yet
            values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            validate(typed(values))  # type: ignore[arg-type]
    except Exception as error:
        raise explain(error, overrides, lambda: composed_keys(overrides, config_dir)) from error


def check_sweep(overrides: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Composes every value of every sweep (`optimizer.lr=0.1,0.2`) once, so that no job starts before a wrong one is told.

    Raises:
        ConfigError: A key, type, choice or argument is wrong, or a name is shared.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        with searching(config_dir):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
            # Only whole lists of values can be tried; an interval is up to the sweeper that understands it.
            sweeps = {
                str(o.input_line): [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
                for o in parsed
                if o.is_sweep_override() and o.is_discrete_sweep()
            }
    except Exception as error:
        raise explain(error, overrides) from error
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    first = {line: values[0] for line, values in sweeps.items()}
    if _chosen("sweep", [*fixed, *first.values()], config_dir):
        return  # an experiment that is a sweep by itself: its own check comes
    refuse_settings_of_no_sweep(overrides)
    if any(o.is_sweep_override() for o in parsed):
        for o in parsed:
            if o.is_sweep_override() and not o.is_discrete_sweep():
                raise ConfigError(
                    "has no list of values to run one after the other; sweep=random, asha or optuna draws from it",
                    key=o.key_or_group,
                    value=str(o.input_line).partition("=")[2],
                )
        for o in parsed:
            if o.key_or_group == "name" and not o.is_sweep_override():
                raise ConfigError("would be the name of every job; leave it out", key="name", value=o.value())
    seen: set[tuple[str, ...]] = set()
    for line, values in sweeps.items() or [("", [""])]:
        for value in values:
            one = tuple(v for v in {**first, line: value}.values() if v)
            if one not in seen:
                seen.add(one)
                check_targets(compose([*fixed, *one], config_dir).experiment)


def refuse_settings_of_no_sweep(overrides: Sequence[str]) -> None:
    """For what is composed without a choice of the group `sweep`: its settings would be ignored.

    Raises:
        ConfigError: One of them is among the overrides.
    """
    for override in overrides:
        if key_of(override).startswith("sweep."):
            raise ConfigError(
                "is of a sweep, and there is none: choose sweep=random, grid, asha, optuna or pbt, with -m first",
                key=key_of(override),
                value=value_of(override),
            )


def _chosen(group: str, overrides: Sequence[str], config_dir: str | Path | None) -> str | None:
    """The choice of a group; None also where nothing can be composed, which is told elsewhere."""
    from hydra import compose as hydra_compose

    try:
        with searching(config_dir), quiet():
            choices = hydra_compose(CONFIG_NAME, list(overrides), return_hydra_config=True).hydra.runtime.choices
    except Exception:  # noqa: BLE001  any reason will do
        return None
    return str(choices[group]) if choices.get(group) is not None else None


def group_names(config_dir: str | Path | None = None, searchpath: Sequence[str] = ()) -> set[str]:
    """The config groups that there are, e.g. `model`, also below others.

    Args:
        config_dir: As `compose`.
        searchpath: As `hydra.searchpath`.
    """
    from hydra.core.global_hydra import GlobalHydra

    found: set[str] = set()
    with searching(config_dir, searchpath), quiet():
        loader = GlobalHydra.instance().config_loader()
        below = [""]
        while below:
            parent = below.pop()
            for name in loader.list_groups(parent):
                group = f"{parent}/{name}" if parent else name
                if group not in found and not group.startswith("hydra"):
                    found.add(group)
                    below.append(group)
    return found


def from_hydra(cfg: DictConfig, overrides: Sequence[str] | None = None) -> Composition:
    """A composed Hydra config, with its `hydra` node (or with HydraConfig set), → a `Composition`.

    Args:
        cfg: Composed by Hydra.
        overrides: The command line's; None: those that Hydra says.
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
    """A composed config, which is changed, and whose `hydra` node HydraConfig has."""
    from hydra.core.hydra_config import HydraConfig

    choices = _choices(HydraConfig.get().runtime)
    if overrides is None:  # unresolved: `optimizer.lr=${x}` is an override, not an interpolation of Hydra's list
        task: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        overrides = [str(o) for o in task]
    try:
        cfg.name = new_name(choices.get("experiment", "run")) if cfg.get("name") is None else cfg.name
        _fix_times(cfg)
        if cfg.get("storage_path") is None:
            cfg.storage_path = "runs"
        _make_absolute(cfg)
    except OmegaConfBaseException as error:
        raise unresolved(_failing(cfg), error) from error
    composition = _composition(cfg, tuple(overrides), tuple(sorted(choices.items())))
    with _standing_in(cfg):
        resolvers.check_same(cfg, composition.text)
    check_modes(composition.experiment)  # not of a saved config: it goes on with what was recorded
    return composition


def from_text(text: str, overrides: Sequence[str] = ()) -> Composition:
    """The experiment of a saved `Composition.text`, with value overrides (`trainer.max_epochs=5`) on top.

    Raises:
        ConfigError: An override is not `key=value` or names a key that the saved config does not have.
    """
    try:
        with LOCK:
            return _composition(_with_values(text, overrides), tuple(overrides), ())
    except Exception as error:
        raise explain(error, overrides) from error


def resolved(text: str) -> str:
    """A text of a config with what its references stand for here; as it is where there is no such thing."""
    try:
        resolvers.load_for(text)
        return str(OmegaConf.create({"x": text}).x)
    except (OmegaConfBaseException, ValueError):
        return text


def experiment_of(text: str, overrides: Sequence[str] = ()) -> Experiment:
    """`from_text(text, overrides).experiment`, at half the cost: for a process that trains many variants of a text.

    Raises:
        ConfigError: As `from_text`.
    """
    try:
        with LOCK:
            return _experiment(_with_values(text, overrides), ())
    except Exception as error:
        raise explain(error, overrides) from error


def _with_values(text: str, overrides: Sequence[str]) -> DictConfig:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    saved = _saved(text)
    cfg = saved.copy()
    known: list[str] | None = None
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        if override.is_delete():
            raise ConfigError("cannot be deleted here; give it a value", key=name)
        if override.is_sweep_override():
            raise ConfigError("is a sweep; here it must be one value", key=name, value=str(override.value()))
        known = known or [*known_keys(), *_node_keys(cfg)]
        added = (override.is_add() or override.is_force_add()) and is_below_node(name)
        if name not in known and not added and not name.startswith(tuple(f"{section}." for section in OPEN)):
            raise unknown_key(name, override.value(), known)
        if isinstance(override.value(), dict | list):
            known = None  # it may bring keys of its own
        OmegaConf.update(cfg, *number_keys.nested(cfg, name, override.value()), force_add=True)
    _forget_modes(cfg, saved)
    return cfg


# The keys that name a metric, and those that say whether lower or higher values of it are better.
_MODES = (
    ("checkpoint.monitor", "checkpoint.mode"),
    ("trainer.early_stopping.monitor", "trainer.early_stopping.mode"),
    ("sweep.metric", "sweep.mode"),
)


def _forget_modes(cfg: DictConfig, saved: DictConfig) -> None:
    """A mode that followed from a metric of before does not outlive it."""
    for metric, mode in _MODES:
        before, now = _value(saved, metric), _value(cfg, metric)
        if before == now or before is None or _value(saved, mode) != _value(cfg, mode):
            continue
        if _is_own(cfg, before) or by_name(str(before)) == _value(saved, mode):
            OmegaConf.update(cfg, mode, None)


@functools.lru_cache(maxsize=8)
def _saved(text: str) -> DictConfig:
    resolvers.load_for(text)
    cfg = OmegaConf.merge(OmegaConf.create(defaults()), OmegaConf.create(text))
    assert isinstance(cfg, DictConfig)
    early = "trainer.early_stopping"
    monitor, mode = _value(cfg, f"{early}.monitor"), _value(cfg, f"{early}.mode")
    if monitor is not None and mode is None and not _is_own(cfg, monitor):
        # Recorded when a mode that was left out was always that of the checkpoints.
        OmegaConf.update(cfg, f"{early}.mode", _value(cfg, "checkpoint.mode"), force_add=True)
    return cfg


def _is_own(cfg: DictConfig, metric: Any) -> bool:
    """Whether a metric is of the section `metrics`."""
    return str(metric).rpartition("/")[2] in (_value(cfg, "metrics") or {})


def register_schema() -> None:
    """Makes the schema known to Hydra under the name that `configs/train.yaml` begins with.

    As plain values: Hydra then adds and overrides keys as it does everywhere, and `typed` alone judges them.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA, node=_schema_node(), provider="raytrainer")


@functools.cache
def _schema_node() -> DictConfig:
    """The defaults of the schema. The store copies them, here and for each composition."""
    node = OmegaConf.create(defaults())
    for name in OPEN:
        section = OmegaConf.select(node, name)
        if section is not None:  # null takes a whole mapping, and Hydra asks for a + in front of one key of it
            OmegaConf.set_struct(section, False)
    assert isinstance(node, DictConfig)
    return node


def new_name(experiment: str) -> str:
    """A run's default name: experiment, local time, 4 hex digits."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment).strip("-._") or "run"
    return f"{stem[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """A `Composition.text` with other values of some keys."""
    if not values:
        return text
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    for name, value in values.items():
        OmegaConf.update(cfg, name, value, merge=False, force_add=True)
    return OmegaConf.to_yaml(cfg)


def flattened(text: str) -> dict[str, str]:
    """A composition's text as flat `a.b.c` → value, for tracking; empty nodes are left out, and what MLflow allows in no
    name is: `sweep.space.+model.dropout` is without its `+`."""
    found: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                part = re.sub(r"[^\w./: -]", "_", str(name).lstrip("+"))
                walk(child, f"{prefix}.{part}" if prefix else part)
        elif not isinstance(node, dict):
            found[prefix] = _as_text(node)

    walk(OmegaConf.to_container(OmegaConf.create(text), resolve=False), "")
    return found


def with_number_keys(overrides: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """The overrides as Hydra is to have them: `loss.weights.1=9.0` as `loss.weights={1:9.0}` where the key is a number."""

    def composed() -> DictConfig:
        try:
            with searching(config_dir), quiet():
                return _choices_alone(overrides)
        except Exception:  # noqa: BLE001  what is wrong is told where it is composed
            return DictConfig({})

    return number_keys.rewritten(overrides, composed)


def _choices_alone(overrides: Sequence[str]) -> DictConfig:
    """What the group choices of a command line give without its values; Hydra is set up."""
    from hydra import compose as hydra_compose

    groups = [o for o in overrides if "." not in key_of(o) and not o.startswith(("+", "~", "hydra"))]
    # One wrong choice or key among them must not hide what the others give.
    valid = [o for o in groups if _composes(hydra_compose, [o])]
    searchpath = [o for o in overrides if key_of(o) == "hydra.searchpath"]
    return hydra_compose(CONFIG_NAME, [*searchpath, *valid])


def composed_keys(overrides: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """The schema's keys, the groups, and the keys that the group choices alone give to `_target_` nodes: what an error
    proposes.
    """
    try:
        with searching(config_dir), quiet():
            nodes = _node_keys(_choices_alone(overrides))
            return list(dict.fromkeys([*known_keys(), *sorted(group_names(config_dir)), *nodes]))
    except Exception:  # noqa: BLE001  only for a better message: the first error is what is told
        return [*known_keys(), "experiment"]


def _composes(hydra_compose: Any, overrides: list[str]) -> bool:
    try:
        hydra_compose(CONFIG_NAME, overrides)
    except Exception:  # noqa: BLE001  any reason will do
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out Hydra's warning of a missing search path, which is an error here (`_check_sources`)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="provider=.*is not available")
        yield


@contextlib.contextmanager
def searching(config_dir: str | Path | None, searchpath: Sequence[str] = ()) -> Iterator[None]:
    """Hydra as the command line sets it up, and afterwards whatever it was before."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    path = create_automatic_config_search_path(None, None, f"pkg://{CONFIG_MODULE}")
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
        Hydra.create_main_hydra2(task_name="raytrainer", config_search_path=path)
        yield


def _composition(cfg: DictConfig, overrides: tuple[str, ...], choices: tuple[tuple[str, str], ...]) -> Composition:
    experiment = _experiment(cfg, choices)
    _write_modes(cfg, experiment)
    return Composition(experiment, OmegaConf.to_yaml(cfg), overrides, choices)


def with_modes(composition: Composition) -> Composition:
    """The same with each mode written out that follows from an object of the section `metrics`: who reads the text later
    need not have its library.
    """
    derive_modes(composition.experiment, objects=True)
    cfg = OmegaConf.create(composition.text)
    assert isinstance(cfg, DictConfig)
    return (
        replace(composition, text=OmegaConf.to_yaml(cfg)) if _write_modes(cfg, composition.experiment) else composition
    )


def _write_modes(cfg: DictConfig, e: Experiment) -> bool:
    """Writes the derived modes into the config, since another version may derive them otherwise; whether there were any."""
    early = e.trainer.early_stopping
    given = {
        "checkpoint.mode": e.checkpoint.mode,
        "trainer.early_stopping.mode": early.mode if early is not None and early.monitor is not None else None,
        "sweep.mode": e.sweep.mode if e.sweep.metric is not None else None,
    }
    missing = {key: mode for key, mode in given.items() if mode is not None and _value(cfg, key) is None}
    for key, mode in missing.items():
        OmegaConf.update(cfg, key, mode, force_add=True)
    return bool(missing)


def _value(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)


def _experiment(cfg: DictConfig, choices: tuple[tuple[str, str], ...]) -> Experiment:
    try:
        with _standing_in(cfg):
            values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise unresolved(_failing(cfg) or error.full_key, error) from error
    assert isinstance(values, dict)
    experiment = typed({str(k): v for k, v in values.items()}, [group for group, _ in choices])
    validate(experiment)
    for name in ("tracking_uri", "experiment_name"):  # an empty variable is one that is not set
        setattr(experiment.tracking, name, (getattr(experiment.tracking, name) or "").strip() or None)
    check_together(experiment)
    derive_modes(experiment)
    if experiment.cluster.runtime_env:
        raw = OmegaConf.to_container(cfg.cluster.runtime_env, resolve=False)
        check_references(raw, experiment.cluster.forward_env)
    return experiment


@contextlib.contextmanager
def _standing_in(cfg: DictConfig) -> Iterator[None]:
    """While it is resolved here, something stands for the variables that only a shared cluster has: their names are known
    from `cluster.forward_env`, and what is sent is the text with its references."""
    shared = OmegaConf.select(cfg, "cluster.kind", throw_on_resolution_failure=False) in ("job", "kuberay")
    names = OmegaConf.select(cfg, "cluster.forward_env", throw_on_resolution_failure=False) if shared else ()
    absent = [name for name in names or () if isinstance(name, str) and name not in os.environ]
    os.environ.update({name: f"({name} of the cluster)" for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]


def _failing(cfg: DictConfig) -> str | None:
    """The first key that does not resolve, which OmegaConf's error does not say."""

    def walk(node: DictConfig | ListConfig) -> str | None:
        names: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            raw = node._get_node(name)
            if isinstance(raw, DictConfig | ListConfig) and not (
                raw._is_none() or raw._is_interpolation() or raw._is_missing()
            ):
                if found := walk(raw):
                    return found
                continue
            try:
                node[name]
            except OmegaConfBaseException:
                return str(node._get_full_key(name))
        return None

    return walk(cfg)


def _choices(runtime: Any) -> dict[str, str]:
    """Group → choice, of the config that Hydra just composed; refuses what would silently be another file's."""
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
            raise ConfigError("is not there", key="hydra.searchpath", value=f"{source.schema}://{source.path}")
        for group, choice in choices.items():
            name = f"{group.partition('@')[0]}/{choice}.yaml"
            if folder.joinpath(name).is_file() and ours.joinpath(name).is_file():
                raise ConfigError(
                    f"is in {source.path} and also a choice of raytrainer's own, which would win: give yours another name",
                    key=group,
                    value=choice,
                )
    return choices


def _node_keys(cfg: DictConfig) -> list[str]:
    found: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                if is_below_node(path := f"{prefix}{name}"):
                    found.append(path)
                walk(child, f"{path}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return found


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _fix_times(cfg: DictConfig) -> None:
    """Resolves `${now:…}` and `${hydra:…}`, which another process would resolve otherwise or not at all."""

    def walk(node: DictConfig | ListConfig) -> None:
        names: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            raw = node._get_node(name)
            if isinstance(raw, DictConfig | ListConfig) and not (
                raw._is_none() or raw._is_interpolation() or raw._is_missing()
            ):
                walk(raw)
            elif OmegaConf.is_interpolation(node, name):
                # Only those parts: `${oc.env:TOKEN}-${now:%Y}` must not put the token into what is logged.
                written = str(raw._value())  # type: ignore[union-attr]
                fixed = re.sub(r"\$\{(?:now|hydra):[^{}]*\}", lambda m: str(OmegaConf.create({"x": m[0]}).x), written)
                if fixed != written:
                    node[name] = fixed

    walk(cfg)


def _make_absolute(cfg: DictConfig) -> None:
    """Relative paths are of the launching directory; a worker has another."""
    for name in ("storage_path", "init_from", "init_from.source"):
        value = OmegaConf.select(cfg, name) if "." not in name or isinstance(cfg.get("init_from"), DictConfig) else None
        if isinstance(value, str) and "://" not in value:
            path = Path(value).expanduser()
            # init_from may also be a run's name: only an existing file is a path.
            if str(path.absolute()) != value and (name == "storage_path" or path.exists()):
                OmegaConf.update(cfg, name, str(path.absolute()))
