"""Convert plain nested values to a typed `Experiment`, or name the first unknown key or value of a wrong type.

raytrainer checks keys itself, so that the check is the same for the command line (with or without `+`) and any YAML.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from raytrainer.config.foreign import answer
from raytrainer.config.schema import Experiment, known_keys, section_of
from raytrainer.errors import ConfigError, nearest

# Sections whose keys are the arguments of a target.
NODES = (
    *(
        "model",
        "loss",
        "optimizer",
        "lr_scheduler",
        "callbacks",
        "metrics",
        "data.train",
        "data.val",
        "data.collate_fn",
    ),
    *("sweep.scheduler", "sweep.search_alg", "sweep.space"),
)
# Mappings with arbitrary keys.
OPEN = (
    *("scaling.resources_per_worker", "scaling.label_selector", "sweep.space"),
    *("cluster.runtime_env", "cluster.driver_resources", "cluster.pod_resources", "cluster.options"),
)
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}


def defaults() -> dict[str, Any]:
    """Return the schema's defaults as plain values, on top of which Hydra composes."""
    return dataclasses.asdict(Experiment())


def typed(values: Mapping[str, Any], groups: Sequence[str] = ()) -> Experiment:
    """Return the experiment with composed and resolved values. Keys that they leave out have their defaults.

    Args:
        values: Nested mappings.
        groups: The groups with a choice, to recognise a file without its `# @package` line.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type; the message names the first one.
    """
    for name in values:
        misplaced = name in ("experiment", "debug") and isinstance(values[name], Mapping)
        if name in groups and (misplaced or not _is_key(name)):
            where = "_global_" if name in ("experiment", "debug") else "data.train"
            raise ConfigError(
                f"is not a section: the chosen file of group {name} must say in its first line where its keys go, "
                f"e.g. '# @package {where}'",
                key=str(name),
            )
    # A wrong key may have been meant to be one of these. `experiment` is a group, but not a section.
    known = [*known_keys(), "experiment", *node_keys(values)]
    experiment = _section(Experiment, values, "", known)
    assert isinstance(experiment, Experiment)
    return experiment


def is_below_node(name: str) -> bool:
    """Return whether a key is an argument of a `_target_`, or may be one below a dict in it."""
    return any(name.startswith(node + ".") for node in NODES)


def unknown_key(name: str, value: Any, known: Sequence[str]) -> ConfigError:
    """Return the error for an unknown key: for another framework's name it has ours, else the nearest valid keys."""
    if ours := answer(name):
        return ConfigError(f"is another framework's name; here it is {ours}", key=name, value=value)
    section, _, last = name.rpartition(".")
    tails = {k: k.rpartition(".")[2] for k in known}
    beside = [k for k in known if k.rpartition(".")[0] == section]
    # First the same name in other sections, then similar names in this section, else keys that are similar as a whole.
    close = [k for k in known if tails[k] == last and k != name]
    close += [k for t in nearest(last, [tails[k] for k in beside]) for k in beside if tails[k] == t]
    close = close or (beside if is_below_node(name) else nearest(name, known))
    reason = (
        "is not a key (with a + in front it is given to the _target_ as a further argument)"
        if is_below_node(name)
        else "is not a key"
    )
    valid = close or beside or [k for k in known if "." not in k]
    # Keep this order: a key that resembles the value is no better suggestion.
    return ConfigError(reason, key=name, value=value, choices=dict.fromkeys(valid), ranked=True)


def _is_key(name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(Experiment)}


def node_keys(values: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of composed values that are arguments of a `_target_`, or below one."""
    keys = []
    for name, child in values.items() if isinstance(values, Mapping) else ():
        if is_below_node(path := f"{prefix}{name}"):
            keys.append(path)
        keys += node_keys(child, f"{path}.")
    return keys


def _section(kind: type, values: Any, prefix: str, known: Sequence[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise ConfigError("must be a section of keys", key=prefix.rstrip("."), value=values, choices=list(fields))
    arguments = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in fields:
            while isinstance(value, Mapping) and value and "_target_" not in value:
                inner, value = next(iter(value.items()))
                path = f"{path}.{inner}"
            raise unknown_key(path, None if isinstance(value, Mapping) else value, known)
        section = section_of(fields[name])
        if isinstance(value, str) and (main := fields[name].metadata.get("text")):
            value = {main: value}  # text is short for a section with that one key
        if section is not None and value is not None:
            arguments[name] = _section(section, value, f"{path}.", known)
        elif section is not None and "None" not in str(fields[name].type):
            raise ConfigError("must be a section of keys, not null", key=path)
        else:
            arguments[name] = _converted(path, value, _hints(kind)[name])
    return kind(**arguments)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _converted(path: str, value: Any, hint: Any) -> Any:
    """Convert a value to its type. Text is accepted for numbers and truth values, because `${oc.env:…}` gives text."""
    if hint is Any:
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ConfigError(f"must be {_WORDS.get(options[0], 'set')}, not null", key=path)
    kind = next(o for o in options if o is not type(None))
    if typing.get_origin(kind) is dict:
        return _mapping(path, value, typing.get_args(kind)[1])
    try:
        return _plain(value, kind)
    except (ValueError, OverflowError):
        raise ConfigError(f"must be {_WORDS[kind]}", key=path, value=value) from None


def _mapping(path: str, value: Any, inner: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        what = "a _target_ node" if path in NODES else "a mapping {key: value}"
        raise ConfigError(f"must be {what}", key=path, value=value)
    return {str(k): _converted(f"{path}.{k}", v, inner) for k, v in value.items()}


def _plain(value: Any, kind: Any) -> Any:
    if kind is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        number = float(value)
        if kind is float:
            return number
        if isinstance(value, int):
            return value
        if number == int(number):  # `1e3` is a float in YAML, but a whole number of steps
            return int(number)
    raise ValueError


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
