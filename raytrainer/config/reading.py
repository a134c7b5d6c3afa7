"""Parse one sweep, written in Hydra's grammar or as a YAML list, into a `Parameter`."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raytrainer.config.compose import searching
from raytrainer.config.explain import HOW
from raytrainer.config.grammar import (
    as_text,
    finite,
    is_text,
    key_element,
    steps_between,
    target,
    text_of,
    unquoted,
    unread,
)
from raytrainer.config.parameter import MOST_VALUES, Parameter
from raytrainer.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep


def _wrong(override: Override, message: str, choices: Sequence[str] = ()) -> ConfigError:
    """Return the error for a sweep, with its key and value as they are written."""
    return ConfigError(message, key=key_element(override), value=text_of(override), choices=choices)


class Reader:
    """A reader of single sweeps. Every method raises a ConfigError if its input is not valid.

    Args:
        parser: The parser that `make_parser` returns.
        is_group: Returns whether a name is a group.
        shared, config_dir: As for `parse_space`.

    Attributes:
        searchpath: As `hydra.searchpath`; `glob(*)` looks for choices there.
    """

    def __init__(
        self,
        parser: OverridesParser,
        is_group: Callable[[str], bool],
        shared: Mapping[str, str],
        config_dir: str | Path | None,
    ) -> None:
        self.parser, self.is_group, self.shared, self.config_dir = parser, is_group, shared, config_dir
        self.searchpath: list[str] = []

    def parse(self, line: str) -> Override:
        """Parse an override."""
        from hydra.errors import OverrideParseException

        try:
            override = self.parser.parse_overrides([line])[0]
        except OverrideParseException as error:
            raise unread(line, error) from error
        if override.is_sweep_override() and not override.key_or_group:
            raise ConfigError(f"{line!r} is not key=value")
        return override

    def named(self, key: str) -> Override:
        """Parse a key of `sweep.space`."""
        try:
            override = self.parse(f"{key}=0")
        except ConfigError as error:
            raise ConfigError("cannot be a key", key=key) from error
        if key_element(override) != key:
            raise ConfigError("cannot be a key", key=key)
        return override

    def of_content(self, key: str, named: Override, content: Any) -> Parameter:
        """Return the parameter of one entry of `sweep.space`; `named` is its parsed key."""
        if isinstance(content, str):
            text = content.strip()
            if not text:
                raise ConfigError(f"is empty: {HOW}", key=key)
            override = self.parse(f"{key}={text}")
            if override.is_sweep_override():
                return self.parameter(override)
            self.refuse_nested(override, override.value())
        elif isinstance(content, Sequence) and not isinstance(content, bytes):
            self.refuse_key(named, content)
            return self.choice(named, _listed(content), content)
        raise ConfigError(
            f"is one value, not several: {HOW}; put what all trials share outside of it", key=key, value=content
        )

    def parameter(self, override: Override) -> Parameter:
        """Return the parameter of an override that is a sweep."""
        from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

        written, sweep = text_of(override), override.value()
        self.refuse_key(override, written)
        tags: set[str] = getattr(sweep, "tags", set())
        if unknown := sorted(tags - {"log"}):
            raise _wrong(override, f"has the tag {unknown[0]!r}, which means nothing here", ["log"])
        if isinstance(sweep, Glob):
            return self.glob(override, sweep)
        if self.is_group(override.key_or_group) and isinstance(sweep, RangeSweep | IntervalSweep):
            raise _wrong(override, "is over a group, whose choices are names: list them, as a,b, or glob(*)")
        if isinstance(sweep, IntervalSweep):
            return _interval(override, sweep)
        if isinstance(sweep, RangeSweep) and not sweep.shuffle:
            return _range(override, sweep)
        if "log" in tags:
            raise _wrong(override, "is a list, which has no scale: leave out tag(log, …), or give an interval")
        if isinstance(sweep, RangeSweep):
            values: list[Any] = list(_range(override, sweep).grid())
        else:
            assert isinstance(sweep, ChoiceSweep)
            values = list(sweep.list)
        if sweep.shuffle:
            # Hydra shuffles differently each time; here the order depends only on the key.
            random.Random(key_element(override)).shuffle(values)
        return self.choice(override, values, written)

    def glob(self, override: Override, glob: Glob) -> Parameter:
        """Return the parameter with the choices of a group whose names match."""
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.object_type import ObjectType

        if not self.is_group(override.key_or_group):
            raise _wrong(override, "is not a group, and glob chooses among a group's configs")
        if not all(isinstance(pattern, str) for pattern in (*glob.include, *glob.exclude)):
            raise _wrong(override, "must have patterns of names, as glob(*) or glob([a*,b*],exclude=ab)")
        running = GlobalHydra.instance().is_initialized() and not self.searchpath
        with contextlib.nullcontext() if running else searching(self.config_dir, self.searchpath):
            loader = GlobalHydra.instance().config_loader()
            options = loader.get_group_options(override.key_or_group, results_filter=ObjectType.CONFIG)
        if not (names := glob.filter(options)):
            raise _wrong(override, "matches no choice of the group", options)
        return self.choice(override, names, text_of(override))

    def choice(self, override: Override, values: Sequence[Any], written: Any) -> Parameter:
        """Return the parameter of listed values, which are parsed or plain."""
        key = key_element(override)
        if not values:
            raise ConfigError("is an empty list: give it values", key=key, value=written)
        for value in values:
            self.refuse_nested(override, value)
        group = self.is_group(override.key_or_group) and not all(isinstance(v, dict) for v in values)
        if group and not all(is_text(v) or isinstance(v, list) for v in values):
            raise ConfigError(
                "is over a group, whose choices are names; put a name that looks like something else in quotes",
                key=key,
                value=written,
            )
        if group and override.is_force_add():
            raise ConfigError(f"is a group, which ++ cannot choose from: +{key[2:]}=…", key=key, value=written)
        texts = [self.text(key, v) for v in values]
        plain = [t if isinstance(v, list | dict) else unquoted(v) for v, t in zip(values, texts, strict=True)]
        seen: set[str] = set()
        for value, text in zip(plain, texts, strict=True):
            if repr(value) in seen:
                raise ConfigError(f"has {text} twice; leave one out", key=key, value=written)
            seen.add(repr(value))
        return Parameter(key, "choice", tuple(plain), tuple(texts), group=group)

    def text(self, key: str, value: Any) -> str:
        """Return the text after the `=` for a value. If it may be ambiguous, it is parsed again to check it."""
        try:
            text = as_text(value)
        except TypeError as error:
            raise ConfigError(f"cannot be swept over: {value!r} {error}", key=key) from error
        if isinstance(value, list | dict) or (is_text(value) and text != value):
            try:
                again = self.parser.parse_override(f"x={text}").value()
            except Exception as error:
                raise ConfigError("cannot be written as an override", key=key, value=value) from error
            if repr(again) != repr(unquoted(value)):
                raise ConfigError(f"cannot be written as an override: {text} is another value", key=key, value=value)
        return text

    def refuse_key(self, override: Override, written: Any) -> None:
        """Refuse a key that cannot be swept, whatever its values."""
        if override.is_delete():
            raise ConfigError("cannot be swept: ~ deletes the key", key=f"~{target(override)}", value=written)
        name = target(override)
        if name.startswith("sweep.space") and "sweep" in self.shared:
            meant = name.removeprefix("sweep.space").removeprefix(".")
            raise ConfigError(
                "is where an experiment's file keeps its space; here it is "
                + (f"{meant}={written}" if meant else "key=a,b for each key"),
                key=name,
                value=written,
            )
        for name in (override.key_or_group, override.package or ""):
            why = self.shared.get(re.split(r"[./]", name)[0])
            if why is not None:
                raise ConfigError(f"cannot be swept: {why}", key=target(override), value=written)

    def refuse_nested(self, override: Override, value: Any) -> None:
        """Refuse a sweep within a value, which Hydra would take for a plain value."""
        from hydra.core.override_parser.types import Glob, Sweep

        if isinstance(value, Sweep | Glob):
            raise _wrong(
                override, "has a sweep inside of a value: sweep over whole values, as [1,2],[1,3], or write one list"
            )
        for inner in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
            self.refuse_nested(override, inner)


def _interval(override: Override, sweep: IntervalSweep) -> Parameter:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    integer = isinstance(low, int) and isinstance(high, int)
    if not finite(low, high):
        raise _wrong(override, "must begin and end with finite numbers")
    if low > high or (low == high and not integer):
        ends = f"ends at {high!r}, which is not above its start {low!r}"
        swap = f": interval({high!r},{low!r})" if low > high else "; write one value without interval"
        raise _wrong(override, f"is empty: it {ends}{swap}")
    log = _is_logarithmic(override, sweep, low)
    return Parameter(key_element(override), "interval", low=low, high=high, log=log, integer=integer)


def _range(override: Override, sweep: RangeSweep) -> Parameter:
    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None
    if not finite(start, stop, step):
        raise _wrong(override, "must have finite numbers")
    if step == 0:
        raise _wrong(override, "has a step of 0: give another")
    integer = all(isinstance(x, int) for x in (start, stop, step))
    if not (start < stop if step > 0 else start > stop):
        with_step = "" if start == stop else f", with a step of {step!r}"
        raise _wrong(override, f"is empty: it goes from {start!r} to {stop!r}, which it excludes{with_step}")
    if integer:
        last: float = range(int(start), int(stop), int(step))[-1]
        start, step = int(start), int(step)
    else:
        if steps_between(start, stop, step) > MOST_VALUES:
            raise _wrong(
                override, "has more than a million values: use interval(…), which has every number between two"
            )
        *_, last = sweep.range()
        start, step = float(start), float(step)
    low, high = min(start, last), max(start, last)
    log = _is_logarithmic(override, sweep, low)
    if log and (not integer or abs(step) != 1):
        interval = f"interval({low!r},{high!r})"
        instead = f"tag(log,{f'int({interval})' if integer else interval})"
        reason = f"is both logarithmic and equally spaced: list the values, as 1,10,100, or take {instead}"
        raise _wrong(override, reason)
    return Parameter(key_element(override), "range", low=low, high=high, step=step, log=log, integer=integer)


def _is_logarithmic(override: Override, sweep: IntervalSweep | RangeSweep, low: float) -> bool:
    is_log = "log" in sweep.tags
    if is_log and low <= 0:
        fix = "begin above 0, as tag(log,interval(1e-5,0.1)), or leave out tag(log, …)"
        raise _wrong(override, f"begins at {low!r}, which has no logarithm: {fix}")
    return is_log


def _listed(content: Sequence[Any]) -> list[Any]:
    """Convert a YAML list, with the lists and mappings in it, to plain lists and dicts."""
    return [
        _listed(x)
        if isinstance(x, Sequence) and not isinstance(x, str | bytes)
        else dict(zip(x, _listed(list(x.values())), strict=True))
        if isinstance(x, Mapping)
        else x
        for x in content
    ]
