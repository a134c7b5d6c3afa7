"""`_target_` nodes: `bind` checks a node against its target's signature without calling it, `build` creates the object.

This is stage two of the configuration: importing a target may import its library (torch, …); nothing else runs.
"""

from __future__ import annotations

import collections.abc
import contextlib
import importlib
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from raytrainer.config.schema import Experiment
from raytrainer.errors import ConfigError, nearest

# Node → the arguments that raytrainer supplies when it calls the target.
SUPPLIED: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("params", "model", "system"),
    "lr_scheduler": ("optimizer",),
    "sweep.scheduler": ("metric", "mode", "time_attr", "hyperparam_mutations", "custom_explore_fn"),
    "sweep.search_alg": ("metric", "mode", "space"),
}
_SPECIAL = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def build(node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Create the object of a `_target_` node. All instantiation in raytrainer goes through this function.

    Args:
        node: `_target_`, `_partial_` and arguments; nested nodes are built first.
        args, kwargs: Further arguments for the target.

    Raises:
        ConfigError: The target cannot be imported or refuses its arguments; the cause is chained.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        with plain_argv():
            return instantiate(dict(node), *args, _convert_="all", **kwargs)
    except SystemExit as error:
        raise ConfigError(
            f"ended the process when it was built: {_exit(error)}", key=str(node.get("_target_"))
        ) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ConfigError(
            f"could not be built: {type(cause).__name__}: {reason}", key=str(node.get("_target_"))
        ) from cause


@contextlib.contextmanager
def plain_argv() -> Iterator[None]:
    """Reduce `sys.argv` to the program's name: a module that parses it on import would otherwise read the command line
    of raytrainer or of a Ray worker."""
    before = sys.argv
    mine = sys.argv = before[:1]
    try:
        yield
    finally:
        if sys.argv is mine:  # else the module has replaced it
            sys.argv = before


def _exit(error: SystemExit) -> str:
    return f"sys.exit({error.code!r})"


def factory(node: Mapping[str, Any]) -> Any:
    """Return the target of a node with its arguments bound, not yet called (optimizers and learning-rate curves)."""
    return build({**node, "_partial_": True})


def targets(experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the experiment's top-level nodes as (dotted key, node); `bind` finds the nodes nested in them."""
    for name in ("model", "loss", "optimizer", "lr_scheduler"):
        if node := getattr(experiment, name):
            yield name, node
    for name in ("train", "collate_fn"):
        if node := getattr(experiment.data, name):
            yield f"data.{name}", node
    for name, node in experiment.data.val_sets.items():
        yield f"data.val.{name}".rstrip("."), node
    for section in ("callbacks", "metrics"):
        for name, node in getattr(experiment, section).items():
            if node:
                yield f"{section}.{name}", node
    for name in ("scheduler", "search_alg"):
        if node := getattr(experiment.sweep, name):
            # null lets raytrainer choose an argument, such as the length of a trial or the seed.
            yield f"sweep.{name}", {k: v for k, v in node.items() if v is not None}


def check_targets(experiment: Experiment) -> None:
    """Bind every `_target_` of the experiment.

    Raises:
        ConfigError: A target cannot be imported, is not callable, or would refuse its arguments.
    """
    for key, node in targets(experiment):
        bind(key, node, SUPPLIED.get(key, ()))


def bind(key: str, node: Any, supplied: Sequence[str] = ()) -> None:
    """Check a node and those nested in it against their targets' signatures.

    Raises:
        ConfigError: An argument is wrong; the message names its dotted key, its value and the nearest valid arguments.
    """
    if isinstance(node, list):
        for i, item in enumerate(node):
            bind(f"{key}[{i}]", item)
    if not isinstance(node, dict):
        return
    for name, child in node.items():
        if name not in _SPECIAL:
            bind(f"{key}.{name}", child)
    for i, item in enumerate(node.get("_args_") or ()):
        bind(f"{key}._args_[{i}]", item)
    if "_target_" not in node:
        return  # a plain dictionary, passed on unchanged; the schema refuses a section without a target
    target = locate(key, node["_target_"])
    if not isinstance(node.get("_partial_", False), bool):
        raise ConfigError("must be true or false", key=f"{key}._partial_", value=node["_partial_"])
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # built-ins without a signature
        return
    _bind_names(key, node, target, signature, supplied)
    hints = _hints(target)
    for name, value in node.items():
        if name in hints and name not in _SPECIAL:
            _check_type(f"{key}.{name}", value, hints[name])


def _bind_names(
    key: str, node: Mapping[str, Any], target: Any, signature: inspect.Signature, supplied: Sequence[str]
) -> None:
    parameters = signature.parameters
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    valid = [n for n in names if n not in supplied]
    for name in node:
        if name in supplied:
            raise ConfigError("is given by raytrainer; leave it out", key=f"{key}.{name}")
        if name not in names and name not in _SPECIAL and not _is_accepted(name, node, target, parameters, valid):
            raise ConfigError(
                f"is not an argument of {node['_target_']}",
                key=f"{key}.{name}",
                value=None if isinstance(node[name], dict | list) else node[name],
                choices=dict.fromkeys([*nearest(name, valid), *valid]),
            )
    bound = {*node, *supplied, *names[: len(node.get("_args_") or ())]}
    missing = [n for n in names if n not in bound and parameters[n].default is inspect.Parameter.empty]
    # A partial may leave arguments open, such as the model and the batch of a loss function.
    if missing and not node.get("_partial_"):
        hint = ""
        if not inspect.isclass(target) and key in ("loss", "data.collate_fn"):
            hint = f", or with {key}._partial_=true the function itself is used"
        raise ConfigError(f"is a required argument of {node['_target_']}{hint}", key=f"{key}.{missing[0]}")


def _is_accepted(
    name: str,
    node: Mapping[str, Any],
    target: Any,
    parameters: Mapping[str, inspect.Parameter],
    valid: Sequence[str],
) -> bool:
    """Return whether a target accepts an argument that its signature does not name."""
    # `_anything_` is a misspelt keyword of Hydra, which a target with **kwargs would accept.
    is_hydras = name.startswith("_") and name.endswith("_")
    if not is_hydras and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    return _is_taken_by_wrapper(name, target, [n for n in valid if n not in node])


def _is_taken_by_wrapper(name: str, target: Any, free: Sequence[str]) -> bool:
    """Return whether a decorator may accept an argument that the decorated function lacks.

    `inspect.signature` returns the signature of the decorated function.

    A name that is close to an argument that is still free counts as a misspelling.
    """
    function = target.__init__ if inspect.isclass(target) else target
    if not hasattr(function, "__wrapped__") or name.startswith("_"):
        return False
    try:
        outer = inspect.signature(target, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return False
    if any(p.name == name and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in outer):
        return True
    if not any(p.kind is p.VAR_KEYWORD for p in outer):
        return False
    return hasattr(target, name) or not get_close_matches(name, free, n=1, cutoff=0.8)


def locate(key: str, path: Any) -> Any:
    """Return the object that a `_target_` names.

    Raises:
        ConfigError: It cannot be imported (the message has the nearest names of its module), or is not callable.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError("must be a dotted path, as in torch.optim.SGD", key=f"{key}._target_", value=path)
    parts = path.split(".")
    target: Any = None
    for i, part in enumerate(parts):
        if target is None or (inspect.ismodule(target) and not hasattr(target, part)):
            module = _import(key, path, ".".join(parts[: i + 1]))
            if module is not None:
                target = module
                continue
        if target is None or not hasattr(target, part):
            raise _missing_name(key, path, target, ".".join(parts[:i]), part)
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError("cannot be called", key=f"{key}._target_", value=path)
    return target


def _import(key: str, path: str, name: str) -> types.ModuleType | None:
    """Import a module; None if there is none of this name."""
    try:
        with plain_argv():
            return importlib.import_module(name)
    except SystemExit as error:
        cause: BaseException = error
        reason = (
            f"the module ends the process ({_exit(error)}); what it does as a program belongs "
            'below `if __name__ == "__main__":`'
        )
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        cause, reason = error, str(error)
    except Exception as error:  # noqa: BLE001  a user's module may raise anything
        cause, reason = error, f"{type(error).__name__}: {error}"
    raise ConfigError(f"cannot be imported: {reason}", key=f"{key}._target_", value=path) from cause


def _missing_name(key: str, path: str, parent: Any, place: str, missing: str) -> ConfigError:
    """Return the error for a name that a module or class, or the path of modules (None), does not have."""
    if parent is None:
        reason, close = f"there is no module {missing} (the current directory is on the path)", []
    else:
        names = {n for n in dir(parent) if not n.startswith("_")}
        if hasattr(parent, "__path__"):
            names |= {module.name for module in pkgutil.iter_modules(parent.__path__)}
        reason, close = f"{place} has no {missing}", [f"{place}.{n}" for n in nearest(missing, sorted(names))]
    return ConfigError(f"cannot be imported: {reason}", key=f"{key}._target_", value=path, choices=close)


def parameters_of(key: str, node: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the arguments of a node's target; empty if it has no signature.

    Raises:
        ConfigError: The target cannot be imported.
    """
    try:
        return frozenset(inspect.signature(locate(key, node["_target_"])).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # noqa: BLE001  annotations in user code may fail to evaluate; nothing is checked then
        return {}


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuse a value that an annotation clearly excludes.

    Raises:
        ConfigError: The message names the valid types or literals.
    """
    if _may_be(value, hint):
        return
    options = _options(hint)
    literals = [str(a) for o in options if typing.get_origin(o) is typing.Literal for a in typing.get_args(o)]
    if literals:
        raise ConfigError("is not a valid choice", key=key, value=value, choices=literals)
    raise ConfigError(f"must be {_words(options)}", key=key, value=value)


def _may_be(value: Any, hint: Any) -> bool:
    """Return whether a config value may fit an annotation. In case of doubt it may."""
    if isinstance(value, dict) and "_target_" in value:
        return True  # its object is not known yet
    options = _options(hint)
    if len(options) > 1:
        return any(_may_be(value, o) for o in options)
    return _may_be_one(value, options[0])


def _may_be_one(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _may_be(value, arguments[0])
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(a == value and type(a) is type(value) for a in arguments)
    if hint in (int, float, str, bool):
        return type(value) is hint or (hint is float and type(value) is int)
    kind = origin or hint
    if kind in (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        if isinstance(value, str):
            return kind not in (list, tuple)
        return isinstance(value, list) and _items_may_be(value, kind, arguments)
    if kind in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        return isinstance(value, dict)
    # Only a node can create a callable or a tensor.
    return not (kind is collections.abc.Callable or _is_tensor(kind))


def _items_may_be(value: list[Any], kind: Any, arguments: tuple[Any, ...]) -> bool:
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(_may_be, value, arguments))
    return not arguments or all(_may_be(v, arguments[0]) for v in value)


def _is_tensor(kind: Any) -> bool:
    # Compared by name, because this module does not import torch.
    return isinstance(kind, type) and (kind.__module__, kind.__name__) == ("torch", "Tensor")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _words(options: Sequence[Any]) -> str:
    # A config cannot contain a tensor, so it is mentioned only if nothing else is allowed.
    sayable = [o for o in options if not _is_tensor(o)] or list(options)
    return " or ".join(dict.fromkeys(_word(o) for o in sayable))


def _word(kind: Any) -> str:
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind in words:
        return words[kind]
    if origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        return "a mapping"
    if origin is collections.abc.Callable:
        return "a _target_"
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        count = len(arguments) if origin is tuple and arguments and arguments[-1] is not Ellipsis else 0
        inner = _words(_options(arguments[0])) if arguments else ""
        return f"a list of {count} ({inner})" if count else f"a list (of {inner})" if inner else "a list"
    return getattr(kind, "__name__", str(kind))
