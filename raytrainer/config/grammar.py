"""Hydra's sweep grammar: its parser with two bugs fixed, values as text, and clear errors for what it cannot parse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytrainer.config.explain import HOW, explain, why_unread
from raytrainer.config.parameter import MOST_VALUES
from raytrainer.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep


def make_parser() -> OverridesParser:
    """Return Hydra's parser, fixed: casts keep the tags and the shuffling of a range, and sorting keeps its values."""
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
    """Return a sweep over the same values in ascending or descending order."""
    from hydra.core.override_parser.types import ChoiceSweep

    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None
    if (step < 0) == down or not step:
        return sweep
    if all(isinstance(x, int) for x in (start, stop, step)):
        values = range(int(start), int(stop), int(step))
        return replace(sweep, start=values[-1], stop=start - (1 if step > 0 else -1), step=-step) if values else sweep
    if not finite(start, stop, step) or steps_between(start, stop, step) > MOST_VALUES:
        return sweep  # refused later
    # Summed from the other end, a range of floats has other values: 0.9 minus three times 0.3 is -5.6e-17.
    return ChoiceSweep(tags=sweep.tags, list=[*sweep.range()][::-1], shuffle=sweep.shuffle)


def unread(line: str, error: Exception) -> Exception:
    """Return the error for an override that Hydra's parser cannot parse."""
    key, _, text = line.partition("=")
    key = key.lstrip("+~")
    m = re.search(r"(\w+) while evaluating '(\w+).*?': (.*)", str(error), re.DOTALL)
    if m is None:
        found = explain(error)
        if isinstance(found, ConfigError) and found.key is None:
            return found  # its key cannot be parsed either
        return ConfigError(f"cannot be read: {why_unread(text)}", key=key, value=text)
    kind, function, reason = m.groups()
    if unknown := re.match(r"Unknown function '(\w+)'\s+Available: (\S+)", reason):
        return ConfigError(
            f"cannot be read: there is no {unknown[1]}()", key=key, value=text, choices=unknown[2].split(",")
        )
    reason = reason.splitlines()[0]
    if reason.startswith("empty"):
        return ConfigError(f"is an empty list: {HOW}", key=key, value=text)
    if kind == "AssertionError" or "incompatible" in reason:
        takes = re.search(r": (\w+?)(?:Sweep)? is incompatible", reason)
        what = takes[1].lower() if takes else "that"
        if what == "nonetype":
            reason = f"{function}() does not accept null, which only a plain list may have: null,1"
        else:
            reason = f"{function}() does not accept {what} there; {HOW}"
    return ConfigError(f"cannot be read: {reason}", key=key, value=text)


def key_element(override: Override) -> str:
    """Return an override's key as it is written: `+model.dropout`, `model@pkg`."""
    return override.get_key_element()


def target(override: Override) -> str:
    """Return the key that an override sets, without a `+` or `~` in front."""
    return override.get_key_element().lstrip("+~")


def text_of(override: Override) -> str:
    """Return the text after the `=`."""
    return str(override.input_line).partition("=")[2]


def steps_between(start: float, stop: float, step: float) -> float:
    """Return the number of steps from start to stop, as a float."""
    return stop / step - start / step


def finite(*bounds: float) -> bool:
    """Return whether all numbers are finite, including integers that are too large for a float."""
    return all(isinstance(x, int) or math.isfinite(x) for x in bounds)


def unquoted(value: Any) -> Any:
    """Return a parsed value as a plain value, also within lists and dicts."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, list):
        return [unquoted(v) for v in value]
    if isinstance(value, dict):
        return {unquoted(k): unquoted(v) for k, v in value.items()}
    return value.text if isinstance(value, QuotedString) else value


def is_text(value: Any) -> bool:
    """Return whether a value, parsed or plain, is text."""
    return isinstance(unquoted(value), str)


def as_text(value: Any) -> str:
    """Return a value as text that Hydra parses to the same value. Hydra's own writer loses quotes that a function
    dropped: `choice('1',2)` holds a text and a number."""
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
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, dict):
        # The grammar allows no quotes around keys.
        keys = [escape_special_characters(k) if isinstance(k, str) else as_text(k) for k in value]
        return f"{{{','.join(f'{k}:{as_text(v)}' for k, v in zip(keys, value.values(), strict=True))}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"is a {type(value).__name__}")
