"""Plain nested values → a typed `Experiment`: every key known, every value of its type, or an error that says which.

Our own, so that a key is checked the same way wherever it comes from: the command line (`+` or not) or anybody's YAML.
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

# Sections whose keys are the arguments of somebody's target.
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
# Mappings whose keys are anybody's.
OPEN = (
    *("scaling.resources_per_worker", "scaling.label_selector", "sweep.space"),
    *("cluster.runtime_env", "cluster.driver_resources", "cluster.pod_resources"),
)
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}


def defaults() -> dict[str, Any]:
    """The schema as plain values: what Hydra composes on top of."""
    return dataclasses.asdict(Experiment())


def typed(values: Mapping[str, Any], groups: Sequence[str] = ()) -> Experiment:
    """The experiment of composed and resolved values; what they leave out has its default.

    Args:
        values: Nested.
        groups: The groups chosen from, which tell a file that misses its `# @package` line.

    Raises:
        ConfigError: Naming the first key that is not ours, or whose value is not of its type.
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
    found = _section(Experiment, values, "", list(_paths(values)))
    assert isinstance(found, Experiment)
    return found


def is_below_node(name: str) -> bool:
    """Whether a key is an argument of a `_target_` (or may be one, below a dict in it)."""
    return any(name.startswith(node + ".") for node in NODES)


def unknown_key(name: str, value: Any, known: Sequence[str]) -> ConfigError:
    """The error for a key that is not one: another framework's name is answered with ours, else the nearest are told."""
    if ours := answer(name):
        return ConfigError(f"is another framework's name; here it is {ours}", key=name, value=value)
    section, _, last = name.rpartition(".")
    tails = {k: k.rpartition(".")[2] for k in known}
    beside = [k for k in known if k.rpartition(".")[0] == section]
    # The same key of another section, then a similar one of this section, then whatever looks alike as a whole.
    close = [k for k in known if tails[k] == last and k != name]
    close += [k for t in nearest(last, [tails[k] for k in beside]) for k in beside if tails[k] == t]
    close = close or (beside if is_below_node(name) else nearest(name, known))
    reason = (
        "is not a key (with a + in front it is given to the _target_ as a further argument)"
        if is_below_node(name)
        else "is not a key"
    )
    valid = close or beside or [k for k in known if "." not in k]
    # In this order: what is near to the value is no better a key.
    return ConfigError(reason, key=name, value=value, choices=dict.fromkeys(valid), ranked=True)


def _is_key(name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(Experiment)}


def _paths(values: Mapping[str, Any], prefix: str = "") -> typing.Iterator[str]:
    """The keys of the schema and those of the composed nodes: what a wrong key may have been meant to be."""
    if not prefix:
        yield from known_keys()
        yield "experiment"  # a group that is no section
    for name, child in values.items():
        path = f"{prefix}{name}"
        if is_below_node(path):
            yield path
        if isinstance(child, Mapping):
            yield from _paths(child, f"{path}.")


def _section(kind: type, values: Any, prefix: str, known: Sequence[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise ConfigError("must be a section of keys", key=prefix.rstrip("."), value=values, choices=list(fields))
    given = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in fields:
            while isinstance(value, Mapping) and value and "_target_" not in value:
                inner, value = next(iter(value.items()))
                path = f"{path}.{inner}"
            raise unknown_key(path, None if isinstance(value, Mapping) else value, known)
        section = section_of(fields[name])
        if isinstance(value, str) and (main := fields[name].metadata.get("text")):
            value = {main: value}  # a text stands for the section with that one key
        if section is not None and value is not None:
            given[name] = _section(section, value, f"{path}.", known)
        elif section is not None and "None" not in str(fields[name].type):
            raise ConfigError("must be a section of keys, not null", key=path)
        else:
            given[name] = _converted(path, value, _hints(kind)[name])
    return kind(**given)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _converted(path: str, value: Any, hint: Any) -> Any:
    """The value as its type; text of a number or truth value counts (it comes from `${oc.env:…}`)."""
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
        if number == int(number):  # 1e3 is a thousand steps
            return int(number)
    raise ValueError


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
