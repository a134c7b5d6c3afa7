"""The search space of a sweep: Hydra's sweep grammar → typed `Parameter`s, and a value of one → the override that sets it.

The command line and `sweep.space` are written alike. Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import contextlib
import decimal
import math
import numbers
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config.compose import searching
from raytrainer.config.explain import explain
from raytrainer.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

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
_HYDRAS_OWN = {"hydra": "it is Hydra's own, once for all trials"}
# A grid of more trials, or a range of more floats, is a mistake.
MOST_VALUES = 1_000_000
_MOST_REFERENCES = 16  # one after the other: more are a circle
_HOW = (
    "a sweep is a list a,b or choice(a,b), range(1,10), interval(0,1), int(interval(1,9)), tag(log,interval(1e-4,0.1))"
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Attributes:
        key: As on the command line: `optimizer.lr`, `model` (a group), `+model.dropout`, `model@pkg`.
        kind: `choice`, `range` (equally spaced numbers) or `interval` (every number between two).
        values: Of a choice: int, float, bool, None or str each; a list or dict is its text.
        texts: Of a choice: what stands after the `=` for each value.
        low: Of a range or interval: the least value.
        high: The greatest. It is itself a value of a range and of an integer interval; one of floats may end before it.
        step: Of a range: the distance of two values, negative where the grid goes down from `high`.
        log: To be searched in the logarithm; then `low` is above 0, and the step of a range is 1 or -1.
        integer: Whether all values of a range or interval are integers.
        group: Whether it chooses a group's config instead of setting a value.
    """

    key: str
    kind: str
    values: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    integer: bool = False
    group: bool = False

    def override(self, value: Any) -> str:
        """The override that sets a value, which Hydra reads as the very same one, e.g. `optimizer.lr=0.01`.

        Bounds are not checked: a scheduler may leave them.

        Raises:
            ConfigError: A value that a choice does not have; no number, or no integer where only those are.
        """
        value = _plain(value)
        if self.kind == "choice":
            place = self._place(value)
            if place is None:
                raise ConfigError("is not a value of the sweep", key=self.key, value=value, choices=self.texts)
            return f"{self.key}={self.texts[place]}"
        number = self._number(value)
        if number is None:
            raise ConfigError(
                f"must be {'a whole number' if self.integer else 'a number'}, as every value of the sweep",
                key=self.key,
                value=value,
            )
        return f"{self.key}={number!r}"

    def contains(self, value: Any) -> bool:
        """Whether the sweep may take a value; one of a range of floats may be off by rounding."""
        value = _plain(value)
        if self.kind == "choice":
            return self._place(value) is not None
        number = self._number(value)
        if number is None or not math.isfinite(number):
            return False
        low, high, step = self._bounds()
        if self.kind == "interval":
            return low <= number <= high
        if self.integer:
            return low <= number <= high and (number - low) % int(step) == 0
        slack = 1e-6 * step + 4 * math.ulp(max(abs(low), abs(high)))
        if not low - slack <= number <= high + slack:
            return False
        return abs(low + round((number - low) / step) * step - number) <= slack

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid, in the order in which they were written.

        Raises:
            ConfigError: For an interval, and for more than `MOST_VALUES`.
        """
        if self.kind == "choice":
            return self.values
        low, high, step = self._bounds()
        if self.kind == "interval":
            raise ConfigError(
                "is an interval, which has no grid: list values, as 0.1,0.01, or choose sweep=random",
                key=self.key,
                value=f"interval({low!r},{high!r})",
            )
        down = self.step is not None and self.step < 0
        if not self.integer:
            return tuple(_floats(high, low, -step) if down else _floats(low, high, step))
        count = (int(high) - int(low)) // int(step) + 1
        if count > MOST_VALUES:
            raise ConfigError(f"has {count} values, too many for a grid; choose sweep=random", key=self.key)
        first, last, stride = int(low), int(high), int(step)
        return tuple(range(last, first - 1, -stride) if down else range(first, last + 1, stride))

    def probes(self) -> tuple[Any, ...]:
        """The values worth checking before a sweep starts: all of a choice, both ends of a range or an interval."""
        if self.kind == "choice":
            return self.values
        return (self.low,) if self.low == self.high else (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, also strictly so: a float that is not finite is `{"float": "inf"}`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["values"] = [
            {"float": repr(v)} if isinstance(v, float) and not math.isfinite(v) else v for v in self.values
        ]
        return {**found, "texts": list(self.texts)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Parameter:
        """The parameter of a `to_dict`."""
        values = tuple(float(v["float"]) if isinstance(v, Mapping) else v for v in saved["values"])
        return cls(**{**saved, "values": values, "texts": tuple(saved["texts"])})

    def _bounds(self) -> tuple[float, float, float]:
        """low, high and the step's size."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high, abs(self.step or 0)

    def _number(self, value: Any) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            if not self.integer:
                return float(value)
            return int(value) if value == int(value) else None
        except (OverflowError, ValueError):  # no float that large; no integer of inf or nan
            return None

    def _place(self, value: Any) -> int | None:
        """The place of a value in `values`: of its very type (1, 1.0 and true differ), else an equal number's."""
        for place, one in enumerate(self.values):
            if repr(one) == repr(value):
                return place
        for place, one in enumerate(self.values):
            if one == value and not isinstance(one, bool) and not isinstance(value, bool):
                return place
        return None


def parse_space(
    overrides: Sequence[str],
    space: Mapping[str, Any],
    *,
    groups: Callable[[str], bool] | Collection[str],
    shared: Mapping[str, str] = SHARED,
    config_dir: str | Path | None = None,
) -> tuple[list[Parameter], list[str]]:
    """The parameters of a sweep, and the overrides that all its trials have.

    Args:
        overrides: The command line's, sweeps and others. Each wins over the same key in `space`.
        space: Key → a sweep as on the command line (`"tag(log,interval(1e-4,1e-1))"`, `"64,128"`) or a list of values.
            Keys may be dotted or nested.
        groups: Which names are groups.
        shared: First part of a key → why it cannot be swept; `hydra` never can.
        config_dir: As `compose` takes it, for what `glob(*)` finds where Hydra is not running, or runs without the
            `hydra.searchpath` that is among the overrides.

    Returns:
        The parameters, those of `space` first, each in the order written; the other overrides as they were written.

    Raises:
        ConfigError: A sweep that cannot be read, is empty or over a key that cannot be swept, or a key given twice.
    """
    parser = _parser()
    is_group = groups if callable(groups) else groups.__contains__
    reader = _Reader(parser, is_group, {**shared, **_HYDRAS_OWN}, config_dir)
    given = [reader.parse(o) for o in overrides]
    reader.searchpath = [str(p) for o in given if o.key_or_group == "hydra.searchpath" for p in _list_of(o.value())]
    before: dict[str, Override] = {}
    for o in given:
        other = before.get(_target(o))
        if other is not None and (o.is_sweep_override() or other.is_sweep_override()):
            raise ConfigError(
                f"is given twice, also as {other.input_line}; leave one out", key=_target(o), value=_text_of(o) or None
            )
        if not o.is_delete():
            before[_target(o)] = o
    parameters = _of_space(reader, space, {_target(o) for o in given})
    fixed = []
    for o in given:
        if o.is_sweep_override():
            parameters.append(reader.parameter(o))
        else:
            reader.refuse_nested(o, o.value())
            fixed.append(str(o.input_line))
    return parameters, fixed


def written_space(config: DictConfig, key: str = "sweep.space") -> dict[str, Any]:
    """A space as a composed config has it, for `parse_space`.

    A value `${oc.env:TOKEN}` stays as it is written, and each trial resolves it: no secret gets into what is kept of a
    sweep. `${other.key}` is followed to what stands there, and a number of an interval or a range is resolved.

    Args:
        config: The whole config, to which the references refer.
        key: Of the space.
    """
    root = OmegaConf.to_container(config, resolve=False)
    found = _followed(root, key.split("."), f"${{{key}}}")
    if not isinstance(found, dict):
        raise ConfigError("must be keys with their sweeps", key=key, value=found)
    return {name: _written_part(config, root, key, name, content) for name, content in found.items()}


def _written_part(config: DictConfig, root: Any, section: str, name: Any, content: Any) -> Any:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    place = [*section.split("."), str(name)]
    content = _followed(root, place, content)
    if isinstance(content, dict):
        return {key: _written_part(config, root, f"{section}.{name}", key, one) for key, one in content.items()}
    if isinstance(content, list):
        return [_followed(root, [*place, "-"], one) for one in content]
    if not isinstance(content, str) or "${" not in content or _is_readable(content):
        return content
    scratch = config.copy()
    OmegaConf.set_struct(scratch, False)
    scratch["_"] = content
    with contextlib.suppress(OmegaConfBaseException, HydraException):
        # Numbers alone: anything else is refused later, as it is written.
        if isinstance(_parser().parse_override(f"x={scratch['_']}").value(), IntervalSweep | RangeSweep):
            return str(scratch["_"])
    return content


def _is_readable(text: str) -> bool:
    from hydra.errors import HydraException

    try:
        _parser().parse_override(f"x={text}")
    except HydraException:
        return False
    return True


def _followed(root: Any, place: Sequence[str], content: Any) -> Any:
    """What a reference to another key leads to, unresolved; anything else is returned as it is.

    Args:
        root: The whole config, as plain values.
        place: Where the reference stands.
    """
    for _ in range(_MOST_REFERENCES):
        m = re.fullmatch(r"\$\{(\.*)([\w.]+)\}", content) if isinstance(content, str) else None
        if m is None:
            return content
        dots = len(m[1])
        where = [*(place[: len(place) - dots] if dots else ()), *m[2].split(".")]
        found = root
        for part in where:
            if not isinstance(found, dict) or part not in found:
                return content
            found = found[part]
        place, content = where, found
    return content


def _of_space(reader: _Reader, space: Mapping[str, Any], taken: Collection[str]) -> list[Parameter]:
    found: dict[str, Parameter] = {}
    for key, content in _flat(space):
        try:
            named = reader.named(key)
            if _target(named) in taken:
                continue
            if _target(named) in found:
                raise ConfigError("is given twice; leave one out", key=key)
            found[_target(named)] = reader.of_content(key, named, content)
        except ConfigError as error:
            message = f"{error.args[0]} (in sweep.space)"
            raise ConfigError(message, key=error.key, value=error.value, choices=error.choices) from error
    return list(found.values())


def _flat(space: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{a: {b: …}}` is `a.b`, which is what `+sweep.space.a.b=…` gives."""
    for name, content in space.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"has the key {name!r}, where a text must be", key="sweep.space")
        if isinstance(content, Mapping):
            if not content:
                raise ConfigError(f"is empty (in sweep.space): {_HOW}", key=f"{prefix}{name}")
            yield from _flat(content, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", content


class _Reader:
    """Reads one sweep at a time with what all of them need."""

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
        from hydra.errors import OverrideParseException

        try:
            found = self.parser.parse_overrides([line])[0]
        except OverrideParseException as error:
            raise _unread(line, error) from error
        if found.is_sweep_override() and not found.key_or_group:
            raise ConfigError(f"{line!r} is not key=value")
        return found

    def named(self, key: str) -> Override:
        """A key of `sweep.space`, parsed."""
        try:
            found = self.parse(f"{key}=0")
        except ConfigError as error:
            raise ConfigError("cannot be a key", key=key) from error
        if _key(found) != key:
            raise ConfigError("cannot be a key", key=key)
        return found

    def of_content(self, key: str, named: Override, content: Any) -> Parameter:
        """The parameter of one entry of `sweep.space`; `named` is its key, parsed."""
        if isinstance(content, str):
            text = content.strip()
            if not text:
                raise ConfigError(f"is empty: {_HOW}", key=key)
            override = self.parse(f"{key}={text}")
            if override.is_sweep_override():
                return self.parameter(override)
            self.refuse_nested(override, override.value())
        elif isinstance(content, Sequence) and not isinstance(content, bytes):
            self.refuse_key(named, content)
            return self.choice(named, _listed(content), content)
        raise ConfigError(
            f"is one value, not several: {_HOW}; what all trials share stands outside of it", key=key, value=content
        )

    def parameter(self, override: Override) -> Parameter:
        from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

        written, sweep = _text_of(override), override.value()
        self.refuse_key(override, written)
        tags: set[str] = getattr(sweep, "tags", set())
        if unknown := sorted(tags - {"log"}):
            raise ConfigError(
                f"has the tag {unknown[0]!r}, which means nothing here",
                key=_key(override),
                value=written,
                choices=["log"],
            )
        if isinstance(sweep, Glob):
            return self.glob(override, sweep)
        if self.is_group(override.key_or_group) and isinstance(sweep, RangeSweep | IntervalSweep):
            raise ConfigError(
                "is over a group, whose choices are names: list them, as a,b, or glob(*)",
                key=_key(override),
                value=written,
            )
        if isinstance(sweep, IntervalSweep):
            return _interval(override, sweep)
        if isinstance(sweep, RangeSweep) and not sweep.shuffle:
            return _range(override, sweep)
        if "log" in tags:
            raise ConfigError(
                "is a list, which has no scale: leave out tag(log, …), or give an interval",
                key=_key(override),
                value=written,
            )
        if isinstance(sweep, RangeSweep):
            values: list[Any] = list(_range(override, sweep).grid())
        else:
            assert isinstance(sweep, ChoiceSweep)
            values = list(sweep.list)
        if sweep.shuffle:
            # Hydra shuffles anew each time; here a sweep is the same again.
            random.Random(_key(override)).shuffle(values)
        return self.choice(override, values, written)

    def glob(self, override: Override, glob: Glob) -> Parameter:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.object_type import ObjectType

        key, written = _key(override), _text_of(override)
        if not self.is_group(override.key_or_group):
            raise ConfigError("is no group, and glob chooses among a group's configs", key=key, value=written)
        if not all(isinstance(pattern, str) for pattern in (*glob.include, *glob.exclude)):
            raise ConfigError(
                "must have patterns of names, as glob(*) or glob([a*,b*],exclude=ab)", key=key, value=written
            )
        running = GlobalHydra.instance().is_initialized() and not self.searchpath
        with contextlib.nullcontext() if running else searching(self.config_dir, self.searchpath):
            loader = GlobalHydra.instance().config_loader()
            options = loader.get_group_options(override.key_or_group, results_filter=ObjectType.CONFIG)
        if not (names := glob.filter(options)):
            raise ConfigError("matches no choice of the group", key=key, value=written, choices=options)
        return self.choice(override, names, written)

    def choice(self, override: Override, values: Sequence[Any], written: Any) -> Parameter:
        """The parameter of listed values, which are as the parser gives them or plain."""
        key = _key(override)
        if not values:
            raise ConfigError("is an empty list: give it values", key=key, value=written)
        for value in values:
            self.refuse_nested(override, value)
        group = self.is_group(override.key_or_group) and not all(isinstance(v, dict) for v in values)
        if group and not all(_is_text(v) or isinstance(v, list) for v in values):
            raise ConfigError(
                "is over a group, whose choices are names; a name that looks like something else is put in quotes",
                key=key,
                value=written,
            )
        if group and override.is_force_add():
            raise ConfigError(f"is a group, which ++ cannot choose from: +{key[2:]}=…", key=key, value=written)
        texts = [self.text(key, v) for v in values]
        plain = [t if isinstance(v, list | dict) else _unquoted(v) for v, t in zip(values, texts, strict=True)]
        seen: set[str] = set()
        for value, text in zip(plain, texts, strict=True):
            if repr(value) in seen:
                raise ConfigError(f"has {text} twice; leave one out", key=key, value=written)
            seen.add(repr(value))
        return Parameter(key, "choice", tuple(plain), tuple(texts), group=group)

    def text(self, key: str, value: Any) -> str:
        """What stands after the `=`, read back once where that is not obvious."""
        try:
            text = _as_text(value)
        except TypeError as error:
            raise ConfigError(f"cannot be swept over: {value!r} {error}", key=key) from error
        if isinstance(value, list | dict) or (_is_text(value) and text != value):
            try:
                again = self.parser.parse_override(f"x={text}").value()
            except Exception as error:
                raise ConfigError("cannot be written as an override", key=key, value=value) from error
            if repr(again) != repr(_unquoted(value)):
                raise ConfigError(f"cannot be written as an override: {text} is another value", key=key, value=value)
        return text

    def refuse_key(self, override: Override, written: Any) -> None:
        if override.is_delete():
            raise ConfigError("cannot be swept: ~ deletes the key", key=f"~{_target(override)}", value=written)
        for name in (override.key_or_group, override.package or ""):
            why = self.shared.get(re.split(r"[./]", name)[0])
            if why is not None:
                raise ConfigError(f"cannot be swept: {why}", key=_target(override), value=written)

    def refuse_nested(self, override: Override, value: Any) -> None:
        """A sweep within a list of values is taken by Hydra for a value."""
        from hydra.core.override_parser.types import Glob, Sweep

        if isinstance(value, Sweep | Glob):
            raise ConfigError(
                "has a sweep inside of a value: sweep over whole values, as [1,2],[1,3], or write one list",
                key=_key(override),
                value=_text_of(override),
            )
        for inner in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
            self.refuse_nested(override, inner)


def _parser() -> OverridesParser:
    """Hydra's, where a cast keeps a range's tags and shuffling and sorting a range keeps its values; Hydra's own lose them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep, Sweep

    def keeping(cast: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **named: Any) -> Any:
            found = cast(*args, **named)
            for given in (*args, *named.values()):
                if isinstance(given, Sweep) and isinstance(found, Sweep):
                    found.tags = set(given.tags)
                    if isinstance(given, ChoiceSweep | RangeSweep) and isinstance(found, ChoiceSweep | RangeSweep):
                        found.shuffle = given.shuffle
            return found

        return kept

    def sorting(sort: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **named: Any) -> Any:
            sweep = args[0] if len(args) == 1 else named.get("sweep")
            return (
                _turned(sweep, named.get("reverse", False)) if isinstance(sweep, RangeSweep) else sort(*args, **named)
            )

        return kept

    functions = create_functions()
    for name in ("int", "float", "str", "bool"):
        functions.functions[name] = keeping(functions.functions[name])
    functions.functions["sort"] = sorting(functions.functions["sort"])
    return OverridesParser(functions)


def _turned(sweep: RangeSweep, down: bool) -> RangeSweep | ChoiceSweep:
    """The same values, upwards or downwards."""
    from hydra.core.override_parser.types import ChoiceSweep

    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None
    if (step < 0) == down or not step:
        return sweep
    if all(isinstance(x, int) for x in (start, stop, step)):
        values = range(int(start), int(stop), int(step))
        return replace(sweep, start=values[-1], stop=start - (1 if step > 0 else -1), step=-step) if values else sweep
    if not _finite(start, stop, step) or _steps(start, stop, step) > MOST_VALUES:
        return sweep  # which is refused later
    # Summed from its other end a range of floats has other values: 0.3 off 0.9 thrice is -5.6e-17.
    return ChoiceSweep(tags=sweep.tags, list=[*sweep.range()][::-1], shuffle=sweep.shuffle)


def _interval(override: Override, sweep: IntervalSweep) -> Parameter:
    key, written, low, high = _key(override), _text_of(override), sweep.start, sweep.end
    assert low is not None
    assert high is not None
    integer = isinstance(low, int) and isinstance(high, int)
    if not _finite(low, high):
        raise ConfigError("must begin and end with finite numbers", key=key, value=written)
    if low > high or (low == high and not integer):
        ends = f"ends at {high!r}, which is not above its begin {low!r}"
        swap = f": interval({high!r},{low!r})" if low > high else "; one value is given without interval"
        raise ConfigError(f"is empty: it {ends}{swap}", key=key, value=written)
    log = "log" in sweep.tags
    if log:
        _check_log(key, written, low)
    return Parameter(key, "interval", low=low, high=high, log=log, integer=integer)


def _range(override: Override, sweep: RangeSweep) -> Parameter:
    key, written = _key(override), _text_of(override)
    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None
    if not _finite(start, stop, step):
        raise ConfigError("must have finite numbers", key=key, value=written)
    if step == 0:
        raise ConfigError("has a step of 0: give another", key=key, value=written)
    integer = all(isinstance(x, int) for x in (start, stop, step))
    if not (start < stop if step > 0 else start > stop):
        wrong = "" if start == stop else f", with a step of {step!r}"
        raise ConfigError(f"is empty: from {start!r} to {stop!r}, which is not in it{wrong}", key=key, value=written)
    if integer:
        last: float = range(int(start), int(stop), int(step))[-1]
        start, step = int(start), int(step)
    else:
        if _steps(start, stop, step) > MOST_VALUES:
            raise ConfigError(
                "has more than a million values: interval(…) has every number between two", key=key, value=written
            )
        *_, last = sweep.range()
        start, step = float(start), float(step)
    low, high = min(start, last), max(start, last)
    log = "log" in sweep.tags
    if log:
        _check_log(key, written, low)
        if not integer or abs(step) != 1:
            raise ConfigError(
                "is both logarithmic and equally spaced: list the values, as 1,10,100, or take "
                f"tag(log,{f'int(interval({low!r},{high!r}))' if integer else f'interval({low!r},{high!r})'})",
                key=key,
                value=written,
            )
    return Parameter(key, "range", low=low, high=high, step=step, log=log, integer=integer)


def _check_log(key: str, written: str, low: float) -> None:
    if low <= 0:
        raise ConfigError(
            f"begins at {low!r}, which has no logarithm: begin above 0, as tag(log,interval(1e-5,0.1)), or leave out tag(log, …)",
            key=key,
            value=written,
        )


def _floats(first: float, last: float, step: float) -> Iterator[float]:
    """The values of Hydra's range of floats: exact sums of the step, each then a float."""
    value, stride = decimal.Decimal(first), decimal.Decimal(step)
    while (float(value) <= last) if step > 0 else (float(value) >= last):
        yield float(value)
        value += stride


def _unread(line: str, error: Exception) -> Exception:
    """Why Hydra cannot read an override."""
    key, _, text = line.partition("=")
    key = key.lstrip("+~")
    m = re.search(r"(\w+) while evaluating '(\w+).*?': (.*)", str(error), re.DOTALL)
    if m is None:
        found = explain(error)
        if isinstance(found, ConfigError) and found.key is None:
            return found  # its key cannot be read
        return ConfigError(
            f"cannot be read: text is put in quotes, as in 'key=\"a text\"'; {_HOW}", key=key, value=text
        )
    kind, function, reason = m.groups()
    if unknown := re.match(r"Unknown function '(\w+)'\s+Available: (\S+)", reason):
        return ConfigError(
            f"cannot be read: there is no {unknown[1]}()", key=key, value=text, choices=unknown[2].split(",")
        )
    reason = reason.splitlines()[0]
    if reason.startswith("empty"):
        return ConfigError(f"is an empty list: {_HOW}", key=key, value=text)
    if kind == "AssertionError" or "incompatible" in reason:
        takes = re.search(r": (\w+?)(?:Sweep)? is incompatible", reason)
        what = takes[1].lower() if takes else "that"
        if what == "nonetype":
            reason = f"{function}() takes no null, which only a plain list may have: null,1"
        else:
            reason = f"{function}() does not take {what} there; {_HOW}"
    return ConfigError(f"cannot be read: {reason}", key=key, value=text)


def _key(override: Override) -> str:
    return override.get_key_element()


def _target(override: Override) -> str:
    """What an override sets, whether it adds it or not."""
    return override.get_key_element().lstrip("+~")


def _text_of(override: Override) -> str:
    return str(override.input_line).partition("=")[2]


def _steps(start: float, stop: float, step: float) -> float:
    """How many steps lead from start to stop."""
    return stop / step - start / step


def _finite(*bounds: float) -> bool:
    return all(isinstance(x, int) or math.isfinite(x) for x in bounds)


def _list_of(value: Any) -> list[Any]:
    return [_unquoted(v) for v in value] if isinstance(value, list) else []


def _listed(content: Sequence[Any]) -> list[Any]:
    """A list of YAML, its lists and dicts plain ones."""
    return [
        _listed(x)
        if isinstance(x, Sequence) and not isinstance(x, str | bytes)
        else dict(zip(x, _listed(list(x.values())), strict=True))
        if isinstance(x, Mapping)
        else x
        for x in content
    ]


def _plain(value: Any) -> Any:
    """A sampler's number of NumPy is written as Python's."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.item() if hasattr(value, "item") else value


def _is_text(value: Any) -> bool:
    return isinstance(_unquoted(value), str)


def _unquoted(value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, list):
        return [_unquoted(v) for v in value]
    if isinstance(value, dict):
        return {_unquoted(k): _unquoted(v) for k, v in value.items()}
    return value.text if isinstance(value, QuotedString) else value


def _as_text(value: Any) -> str:
    """As Hydra reads it. Its own writer leaves out the quotes that a function dropped: `choice('1',2)` has a text and a number."""
    from hydra._internal.grammar.utils import escape_special_characters
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, QuotedString):
        return value.with_quotes()
    if isinstance(value, str):
        words = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*(?:[./][A-Za-z0-9_-]+)*", value)
        if words and value.lower() not in ("null", "true", "false", "inf", "nan"):
            return value
        return QuotedString(value, Quote.double if "'" in value else Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(_as_text, value))}]"
    if isinstance(value, dict):
        # A key has no quotes in the grammar.
        keys = [escape_special_characters(k) if isinstance(k, str) else _as_text(k) for k in value]
        return f"{{{','.join(f'{k}:{_as_text(v)}' for k, v in zip(keys, value.values(), strict=True))}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"is a {type(value).__name__}")
