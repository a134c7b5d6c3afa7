"""Hydra → a typed `Experiment`, once: composing, fixing the name and the times, and saying what is wrong in our words.

Imports neither torch, ray nor mlflow: a config error of stage one answers in about a second.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config.foreign import FOREIGN_KEYS
from raytrainer.config.schema import NAME_PATTERN, Experiment, known_keys, validate
from raytrainer.errors import ConfigError, nearest

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

    Raises:
        ConfigError: Any key, type or choice is wrong.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        register_schema()
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            cfg = hydra_compose(CONFIG_NAME, [*overrides, *extra], return_hydra_config=True)
            return from_hydra(cfg, overrides)
    except Exception as error:
        raise explain(error, overrides) from error


def from_hydra(cfg: DictConfig, overrides: Sequence[str] = ()) -> Composition:
    """A composed Hydra config, with its `hydra` node (or with HydraConfig set), → a `Composition`."""
    from hydra.core.hydra_config import HydraConfig

    choices: dict[str, Any] = {}
    if "hydra" in cfg:
        HydraConfig.instance().set_config(cfg)
        cfg = cfg.copy()
        OmegaConf.set_struct(cfg, False)
        choices = dict(cfg.hydra.runtime.choices)
        cfg.pop("hydra")
    elif HydraConfig.initialized():
        choices = dict(HydraConfig.get().runtime.choices)
    choices = {k: str(v) for k, v in choices.items() if not k.startswith("hydra/") and v is not None}
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if cfg.get("name") is None:
        cfg.name = new_name(choices.get("experiment", "run"))
    _fix_times(cfg)
    if cfg.get("storage_path") is None:
        cfg.storage_path = "runs"
    _make_absolute(cfg)
    return _typed(cfg, tuple(overrides), tuple(sorted(choices.items())))


def from_text(text: str, overrides: Sequence[str] = ()) -> Composition:
    """The experiment of a saved `Composition.text`, with value overrides (`trainer.max_epochs=5`) on top.

    Raises:
        ConfigError: An override is not `key=value` or names a key that the saved config does not have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    cfg = OmegaConf.merge(OmegaConf.structured(Experiment), OmegaConf.create(text))
    assert isinstance(cfg, DictConfig)
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            name = override.key_or_group
            if override.is_delete():
                raise ConfigError("cannot delete here; give a value", key=name)
            if not override.is_add() and not _has(cfg, name):
                raise _unknown(name, override.value(), list(known_keys()) + _node_keys(cfg))
            OmegaConf.update(cfg, name, override.value(), force_add=override.is_add())
        return _typed(cfg, tuple(overrides), ())
    except Exception as error:
        raise explain(error, overrides) from error


def _has(cfg: DictConfig, name: str) -> bool:
    marker = object()
    return OmegaConf.select(cfg, name, default=marker, throw_on_resolution_failure=False) is not marker


def register_schema() -> None:
    """Makes the schema known to Hydra under the name that `configs/train.yaml` begins with."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="experiment_schema", node=Experiment, provider="raytrainer")


def new_name(experiment: str) -> str:
    """A run's default name: experiment, local time, 4 hex digits."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment).strip("-._") or "run"
    return f"{stem[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def flattened(text: str) -> dict[str, str]:
    """A composition's text as flat `a.b.c` → value, for tracking; empty nodes are left out."""
    found: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                walk(child, f"{prefix}.{name}" if prefix else str(name))
        elif not isinstance(node, dict):
            found[prefix] = _as_text(node)

    walk(OmegaConf.to_container(OmegaConf.create(text), resolve=False), "")
    return found


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _typed(cfg: DictConfig, overrides: tuple[str, ...], choices: tuple[tuple[str, str], ...]) -> Composition:
    experiment = OmegaConf.to_object(cfg)
    assert isinstance(experiment, Experiment)
    validate(experiment)
    _check(experiment)
    return Composition(experiment, OmegaConf.to_yaml(cfg), overrides, choices)


def _check(e: Experiment) -> None:
    """What concerns more than one key."""
    if not re.fullmatch(NAME_PATTERN, e.name or ""):
        raise ConfigError(
            "must be letters, digits, '.', '_' and '-', begin with a letter or digit, at most 100", key="name", value=e.name
        )
    n = e.scaling.num_workers
    elastic = isinstance(n, list) and len(n) == 2 and all(type(x) is int for x in n) and 1 <= n[0] <= n[1]
    if not (type(n) is int and n >= 1) and not elastic:
        raise ConfigError("must be a number from 1, or [least, most] for an elastic run", key="scaling.num_workers", value=n)
    for section in ("model", "loss", "optimizer"):
        if not getattr(e, section):
            raise ConfigError("is not set; choose a group or give a _target_ node", key=section)
    if not e.data.train:
        raise ConfigError("is not set: a _target_ node that gives the training dataset", key="data.train")
    e.trainer.max_time = seconds(e.trainer.max_time)
    t = e.trainer
    if t.max_steps is None and t.max_epochs is None and t.max_time is None:
        raise ConfigError("or trainer.max_epochs or trainer.max_time must be set, or the run never ends", key="trainer.max_steps")
    if t.max_steps is not None and t.max_epochs is not None:
        raise ConfigError(
            f"and trainer.max_epochs={t.max_epochs} are both set; give one (the other =null)",
            key="trainer.max_steps",
            value=t.max_steps,
        )
    if e.data.global_batch_size < e.max_workers:
        raise ConfigError(
            f"is smaller than scaling.num_workers={e.max_workers}: a worker would have no sample",
            key="data.global_batch_size",
            value=e.data.global_batch_size,
        )
    if e.cluster.kind == "inline" and n != 1:
        raise ConfigError("must be 1 with cluster=inline (this process); use cluster=local", key="scaling.num_workers", value=n)
    if e.cluster.kind != "existing" and e.cluster.address is not None:
        raise ConfigError(
            f"has no meaning with cluster={e.cluster.kind}; use cluster=existing", key="cluster.address", value=e.cluster.address
        )
    if t.precision == "16-mixed" and not (e.optimizer or {}).get("fused"):
        raise ConfigError(
            "needs a fused optimizer, or the gradient scaler waits for the device at every step: set optimizer.fused=true",
            key="trainer.precision",
            value=t.precision,
        )
    for name in e.callbacks:
        if e.callbacks[name] is not None and not isinstance(e.callbacks[name], dict):
            raise ConfigError("must be a _target_ node", key=f"callbacks.{name}", value=e.callbacks[name])


def seconds(value: Any) -> float | None:
    """A duration → seconds: a number, `90s`, `1h30m`, `2d`, or `HH:MM:SS`.

    Raises:
        ConfigError: It is none of these, or not positive.
    """
    if value is None:
        return None
    total: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        total = float(value)
    elif isinstance(value, str):
        if match := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value.strip()):
            d, h, m, s = (int(x or 0) for x in match.groups())
            total = float(86400 * d + 3600 * h + 60 * m + s)
        elif match := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value.strip()):
            h, m, s = (int(x) for x in match.groups())
            total = float(3600 * h + 60 * m + s)
    if total is None or not total > 0:
        raise ConfigError("must be a duration: seconds, 90m, 1h30m, 2d or HH:MM:SS", key="trainer.max_time", value=value)
    return total


def _fix_times(cfg: DictConfig) -> None:
    """Resolves `${now:…}` and `${hydra:…}`, which another process would resolve otherwise or not at all."""

    def walk(node: DictConfig | ListConfig) -> None:
        names: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            raw = node._get_node(name)
            if isinstance(raw, DictConfig | ListConfig) and not raw._is_none() and not raw._is_interpolation():
                walk(raw)
            elif OmegaConf.is_interpolation(node, name) and re.search(r"\$\{(now|hydra):", str(raw._value())):  # type: ignore[union-attr]
                node[name] = node[name]

    walk(cfg)


def _make_absolute(cfg: DictConfig) -> None:
    """Relative paths are of the launching directory; a worker has another."""
    for name in ("storage_path", "init_from"):
        value = cfg.get(name)
        if isinstance(value, str) and "://" not in value:
            path = Path(value).expanduser()
            # init_from may also be a run's name: only an existing file is a path.
            if name == "storage_path" or path.exists():
                cfg[name] = str(path.absolute())


def explain(error: Exception, overrides: Sequence[str] = ()) -> Exception:
    """Hydra's or OmegaConf's error → a `ConfigError` that names key, value and the nearest valid choices.

    An error of another kind is returned as it is.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for one in chain:
        if isinstance(one, ConfigError):
            return one
    text = "\n".join(str(x) for x in chain)
    if not any(isinstance(x, OmegaConfBaseException) or type(x).__module__.startswith("hydra") for x in chain):
        return error
    values = {o.partition("=")[0].lstrip("+~"): o.partition("=")[2] for o in overrides}
    if m := re.search(r"Could not find '([^']+)/([^'/]+)'(?:.*?Available options in '[^']*':\n((?:\t.*\n?)*))?", text, re.S):
        group, choice, listed = m.groups()
        return ConfigError("is no such choice", key=group, value=choice, choices=(listed or "").split())
    if m := re.search(r"In '[^']+': Could not find '([^']+)'", text):
        return ConfigError("names a config that does not exist", key=m[1])
    if m := re.search(r"(?:Could not (?:override|append to config|delete from config)[^']*'([^'=]+)|Key '[^']+' (?:not in|is not in struct).*?full_key: (\S+))", text, re.S):
        name = m[1] or m[2]
        return _unknown(name, values.get(name), list(known_keys()) + _composed_node_keys(overrides))
    if m := re.search(r"full_key: (\S+)", text):
        first = str(chain[-1] if not str(chain[0]).strip() else chain[0]).strip().splitlines()[0]
        return ConfigError(_as_reason(first, chain), key=m[1], value=values.get(m[1]))
    return ConfigError(str(error).strip() or type(error).__name__)


def _as_reason(first: str, chain: Sequence[BaseException]) -> str:
    if m := re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", "\n".join(map(str, chain))):
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(m[3], m[3])
        return f"must be {kind}, not {m[1]!r}"
    return first


def _unknown(name: str, value: Any, known: Sequence[str]) -> ConfigError:
    last = name.rpartition(".")[2]
    if ours := FOREIGN_KEYS.get(last):
        return ConfigError(f"is another framework's name; here it is {ours}", key=name, value=value)
    close = nearest(name, known) or [k for k in known if k.rpartition(".")[2] in nearest(last, {k.rpartition(".")[2] for k in known})]
    section = name.rpartition(".")[0]
    hint = ""
    if section.split(".")[0] in ("model", "loss", "optimizer", "lr_scheduler", "callbacks") or section in ("data.train", "data.val"):
        hint = f" (a further constructor argument is added as +{name}=…)"
    return ConfigError(f"is not a key{hint}", key=name, value=value, choices=close or [k for k in known if k.rpartition(".")[0] == section])


def _composed_node_keys(overrides: Sequence[str]) -> list[str]:
    """The keys below `_target_` nodes that the group choices alone give; the failing value overrides are left out."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    groups = [o for o in overrides if "." not in o.partition("=")[0] and not o.startswith(("+", "~"))]
    loader = GlobalHydra.instance()
    try:
        if loader.is_initialized():
            cfg = hydra_compose(CONFIG_NAME, groups)
        else:
            with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
                cfg = hydra_compose(CONFIG_NAME, groups)
    except Exception:  # only for a better message: the first error is what is told
        return []
    return _node_keys(cfg)


def _node_keys(cfg: DictConfig) -> list[str]:
    found: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                found.append(f"{prefix}{name}")
                walk(child, f"{prefix}{name}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return found
