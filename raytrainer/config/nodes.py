"""`_target_` nodes: `bind` checks one against its target's signature without calling it, `build` makes the object.

Stage two of the configuration: importing the target may import its library (torch, …), nothing else is run.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raytrainer.config.schema import Experiment
from raytrainer.errors import ConfigError, nearest

# Node → the arguments that raytrainer itself supplies when it calls the target.
SUPPLIED: Mapping[str, tuple[str, ...]] = {"optimizer": ("params",), "lr_scheduler": ("optimizer",)}
_SPECIAL = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def build(node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Makes the object of a `_target_` node: the only instantiation in raytrainer.

    Args:
        node: `_target_`, `_partial_`, arguments; nested nodes are built first.
        args, kwargs: Given to the target on top.

    Raises:
        ConfigError: The target cannot be imported or refuses its arguments; the cause is chained.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(dict(node), *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ConfigError(f"could not be built: {type(cause).__name__}: {reason}", key=str(node.get("_target_"))) from cause


def factory(node: Mapping[str, Any]) -> Any:
    """The target of a node with its arguments bound, not yet called (optimizers and learning-rate curves)."""
    return build({**node, "_partial_": True})


def targets(experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    """The experiment's own nodes as (dotted key, node); those nested in them are found by `bind`."""
    for name in ("model", "loss", "optimizer", "lr_scheduler"):
        if node := getattr(experiment, name):
            yield name, node
    for name in ("train", "val", "collate_fn"):
        if node := getattr(experiment.data, name):
            yield f"data.{name}", node
    for name, node in experiment.callbacks.items():
        if node:
            yield f"callbacks.{name}", node


def check_targets(experiment: Experiment) -> None:
    """Binds every `_target_` of the experiment.

    Raises:
        ConfigError: The first that cannot be imported, is not callable, or would refuse its arguments.
    """
    for key, node in targets(experiment):
        bind(key, node, SUPPLIED.get(key, ()))


def bind(key: str, node: Any, supplied: Sequence[str] = ()) -> None:
    """Checks a node and those nested in it against their targets' signatures.

    Raises:
        ConfigError: Naming the dotted key, the value and the nearest valid arguments.
    """
    if isinstance(node, list):
        for i, item in enumerate(node):
            bind(f"{key}[{i}]", item)
        return
    if not isinstance(node, dict):
        return
    if "_target_" not in node:
        if supplied or "." not in key or key.startswith(("data.", "callbacks.")) and key.count(".") == 1:
            raise ConfigError("has no _target_", key=key)
        for name, child in node.items():
            bind(f"{key}.{name}", child)
        return
    for name, child in node.items():
        if name not in _SPECIAL:
            bind(f"{key}.{name}", child)
    target = locate(key, node["_target_"])
    arguments = {k: v for k, v in node.items() if k not in _SPECIAL}
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # built-ins without a signature
        return
    parameters = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name, value in arguments.items():
        if name not in names and not open_ended:
            valid = [n for n in names if n not in supplied]
            close = nearest(name, valid)
            rest = [n for n in valid if n not in close]
            raise ConfigError(f"is not an argument of {node['_target_']}", key=f"{key}.{name}", value=value, choices=close + rest)
    given = set(arguments) | set(supplied) | set(names[: len(node.get("_args_", []))])
    missing = [n for n in names if n not in given and parameters[n].default is inspect.Parameter.empty]
    # A partial may leave its own arguments open (a loss function's model and batch).
    if missing and not node.get("_partial_"):
        raise ConfigError(f"is a required argument of {node['_target_']}", key=f"{key}.{missing[0]}")
    hints = _hints(target)
    for name, value in arguments.items():
        if name in hints:
            _check_type(f"{key}.{name}", value, hints[name])


def locate(key: str, path: Any) -> Any:
    """The object that a `_target_` names.

    Raises:
        ConfigError: It cannot be imported, naming the nearest names of its module, or is not callable.
    """
    import importlib

    if not isinstance(path, str) or not path:
        raise ConfigError("must be a dotted path", key=f"{key}._target_", value=path)
    parts = path.split(".")
    found: Any = None
    imported = 0
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        if imported == i - 1 and (i == 1 or not hasattr(found, parts[i - 1])):
            try:
                found, imported = importlib.import_module(name), i
                continue
            except ModuleNotFoundError as error:
                if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                    raise ConfigError(f"cannot be imported: {error}", key=f"{key}._target_", value=path) from error
            except Exception as error:
                raise ConfigError(
                    f"cannot be imported: {type(error).__name__}: {error}", key=f"{key}._target_", value=path
                ) from error
        if found is None or not hasattr(found, parts[i - 1]):
            where = ".".join(parts[: i - 1])
            public = [n for n in dir(found) if not n.startswith("_")] if found is not None else []
            close = [f"{where}.{n}" for n in nearest(parts[i - 1], public)]
            reason = f"{where} has no {parts[i - 1]!r}" if where else f"there is no module {parts[0]!r}"
            raise ConfigError(f"cannot be imported: {reason}", key=f"{key}._target_", value=path, choices=close)
        found = getattr(found, parts[i - 1])
    if not callable(found):
        raise ConfigError("is not callable", key=f"{key}._target_", value=path)
    return found


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations of other people's code that do not evaluate: nothing to check against
        return {}


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuses what an annotation of plain types or a Literal surely excludes; anything else passes."""
    allowed: list[Any] = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            allowed.extend(typing.get_args(option))
        elif option in (int, float, str, bool, type(None)):
            allowed.append(option)
        else:
            return
    if isinstance(value, dict | list):
        if allowed:
            raise ConfigError(f"must be {_words(allowed)}", key=key, value=value)
        return
    for option in allowed:
        if not isinstance(option, type):
            if option == value and type(option) is type(value):
                return
        elif type(value) is option or option is float and type(value) is int:
            return
    literals = [str(o) for o in allowed if not isinstance(o, type)]
    raise ConfigError("is not a valid choice" if literals else f"must be {_words(allowed)}", key=key, value=value, choices=literals)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _words(kinds: Sequence[Any]) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(k, repr(k)) if isinstance(k, type) else repr(k) for k in kinds)
