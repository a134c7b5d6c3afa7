"""The search space of a sweep: parse the sweeps of the command line and of `sweep.space` into typed `Parameter`s.

This module imports neither torch, Ray nor MLflow.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config.explain import HOW
from raytrainer.config.grammar import make_parser, target, text_of, unquoted
from raytrainer.config.parameter import Parameter
from raytrainer.config.reading import Reader
from raytrainer.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from hydra.core.override_parser.types import Override

# The sections that all trials of a sweep share, and why.
SHARED: Mapping[str, str] = {
    "name": "a trial is named by its number below the sweep's name",
    "storage_path": "all trials of a sweep are stored below one path",
    "tracking": "all trials of a sweep go to one tracking server",
    "cluster": "all trials of a sweep run on one cluster",
    "scaling": "every trial of a sweep has the same resources",
    "sweep": "a sweep has one way of searching",
    "debug": "debugging is one run, without -m",
}
_HYDRA_SECTION = {"hydra": "it is Hydra's own, once for all trials"}
_MOST_REFERENCES = 16  # in a chain; a longer chain is a cycle


def parse_space(
    overrides: Sequence[str],
    space: Mapping[str, Any],
    *,
    groups: Callable[[str], bool] | Collection[str],
    shared: Mapping[str, str] = SHARED,
    config_dir: str | Path | None = None,
) -> tuple[list[Parameter], list[str]]:
    """Return the parameters of a sweep, and the overrides that all its trials share.

    Args:
        overrides: The overrides of the command line, sweeps and others. Each takes precedence over its key in `space`.
        space: Key → a sweep as on the command line (`"tag(log,interval(1e-4,1e-1))"`, `"64,128"`) or a list of values.
            Keys may be dotted or nested.
        groups: The names of groups, or a function that returns whether a name is one.
        shared: First part of a key → why it cannot be swept; `hydra` never can.
        config_dir: As for `compose`. `glob(*)` needs it if Hydra is not running, or runs without the `hydra.searchpath`
            among the overrides.

    Returns:
        The parameters, those of `space` first, in the order in which they were written; the other overrides as they
        were written.

    Raises:
        ConfigError: A sweep cannot be parsed, is empty or is over a key that cannot be swept, or a key is given twice.
    """
    parser = make_parser()
    is_group = groups if callable(groups) else groups.__contains__
    reader = Reader(parser, is_group, {**shared, **_HYDRA_SECTION}, config_dir)
    parsed = [reader.parse(o) for o in overrides]
    reader.searchpath = [str(p) for o in parsed if o.key_or_group == "hydra.searchpath" for p in _list_of(o.value())]
    before: dict[str, Override] = {}
    for o in parsed:
        other = before.get(target(o))
        if other is not None and (o.is_sweep_override() or other.is_sweep_override()):
            raise ConfigError(
                f"is given twice, also as {other.input_line}; leave one out", key=target(o), value=text_of(o) or None
            )
        if not o.is_delete():
            before[target(o)] = o
    parameters = _of_space(reader, space, {target(o) for o in parsed})
    fixed = []
    for o in parsed:
        if o.is_sweep_override():
            parameters.append(reader.parameter(o))
        else:
            reader.refuse_nested(o, o.value())
            fixed.append(str(o.input_line))
    return parameters, fixed


def written_space(config: DictConfig, key: str = "sweep.space") -> dict[str, Any]:
    """Return the space in a composed config, for `parse_space`.

    A value `${oc.env:TOKEN}` stays a reference, which each trial resolves, so that no secret is stored with the sweep.
    `${other.key}` is replaced by the content of that key, and the numbers of an interval or a range are resolved.

    Args:
        config: The whole config, to which the references refer.
        key: The key of the space.
    """
    root = OmegaConf.to_container(config, resolve=False)
    space = _followed(root, key.split("."), f"${{{key}}}")
    if not isinstance(space, dict):
        raise ConfigError("must be a mapping of keys to sweeps, as {optimizer.lr: [0.1,0.2]}", key=key, value=space)
    return {name: _written_part(config, root, key, name, content) for name, content in space.items()}


def _written_part(config: DictConfig, root: Any, section: str, name: Any, content: Any) -> Any:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    place = [*section.split("."), str(name)]
    content = _followed(root, place, content)
    if isinstance(content, dict):
        return {key: _written_part(config, root, f"{section}.{name}", key, child) for key, child in content.items()}
    if isinstance(content, list):
        return [_followed(root, [*place, "-"], item) for item in content]
    if not isinstance(content, str) or "${" not in content or _is_readable(content):
        return content
    scratch = config.copy()
    OmegaConf.set_struct(scratch, False)
    scratch["_"] = content
    with contextlib.suppress(OmegaConfBaseException, HydraException):
        # Only the numbers of an interval or range are resolved. Anything else is refused later, as written.
        if isinstance(make_parser().parse_override(f"x={scratch['_']}").value(), IntervalSweep | RangeSweep):
            return str(scratch["_"])
    return content


def _is_readable(text: str) -> bool:
    from hydra.errors import HydraException

    try:
        make_parser().parse_override(f"x={text}")
    except HydraException:
        return False
    return True


def _followed(root: Any, place: Sequence[str], content: Any) -> Any:
    """Return the content of the key to which a reference leads, unresolved. Other content is returned unchanged.

    Args:
        root: The whole config, as plain values.
        place: The parts of the key that holds the reference.
    """
    for _ in range(_MOST_REFERENCES):
        m = re.fullmatch(r"\$\{(\.*)([\w.]+)\}", content) if isinstance(content, str) else None
        if m is None:
            return content
        dots = len(m[1])
        where = [*(place[: len(place) - dots] if dots else ()), *m[2].split(".")]
        value = root
        for part in where:
            if not isinstance(value, dict) or part not in value:
                return content
            value = value[part]
        place, content = where, value
    return content


def _of_space(reader: Reader, space: Mapping[str, Any], taken: Collection[str]) -> list[Parameter]:
    parameters: dict[str, Parameter] = {}
    for key, content in _flat(space):
        try:
            named = reader.named(key)
            if target(named) in taken:
                continue
            if target(named) in parameters:
                raise ConfigError("is given twice; leave one out", key=key)
            parameters[target(named)] = reader.of_content(key, named, content)
        except ConfigError as error:
            message = f"{error.args[0]} (in sweep.space)"
            raise ConfigError(message, key=error.key, value=error.value, choices=error.choices) from error
    return list(parameters.values())


def _flat(space: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a space with dotted keys: `+sweep.space.a.b=…` composes to `{a: {b: …}}`, which is `a.b`."""
    for name, content in space.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"has the key {name!r}, which must be a text", key="sweep.space")
        if isinstance(content, Mapping):
            if not content:
                raise ConfigError(f"is empty (in sweep.space): {HOW}", key=f"{prefix}{name}")
            yield from _flat(content, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", content


def _list_of(value: Any) -> list[Any]:
    return [unquoted(v) for v in value] if isinstance(value, list) else []
