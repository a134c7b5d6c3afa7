"""Tests of a parameter's values: Hydra reads the override of each value as the same value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hypothesis import assume, given
from hypothesis import strategies as st

from raytrainer.config import Parameter, compose, from_text
from raytrainer.errors import ConfigError
from tests.config.spaces import PLAIN, one, parse, read, same


@pytest.mark.parametrize(
    ("sweep", "value", "override"),
    [
        ("interval(0,1)", np.float64(0.1), "a=0.1"),
        ("interval(0,1)", np.float32(0.5), "a=0.5"),
        ("interval(0,1)", 1, "a=1.0"),
        ("interval(0,1)", 1.25, "a=1.25"),  # PBT may leave the bounds
        ("interval(0,1)", 1e-5, "a=1e-05"),
        ("int(interval(0,9))", np.int64(3), "a=3"),
        ("int(interval(0,9))", 3.0, "a=3"),
        ("range(3)", np.int32(2), "a=2"),
        ("1,2", np.int64(2), "a=2"),
        ("1.0,2.0", 2, "a=2.0"),
        ("true,1", np.bool_(True), "a=true"),
        ("x,y", np.str_("y"), "a=y"),
    ],
)
def test_what_samplers_give_is_written_as_python_does(sweep: str, value: Any, override: str) -> None:
    assert one(f"a={sweep}").override(value) == override


@pytest.mark.parametrize(
    ("sweep", "value", "reason"),
    [
        ("1,2", 3, "a=3 is not a value of the sweep; valid: 1, 2"),
        ("1,2", True, "a=true is not a value of the sweep"),
        ("true,2", 1, "a=1 is not a value of the sweep"),
        ("x,y", "z", "a=z is not a value of the sweep; valid: x, y"),
        ("interval(0,1)", "z", "a=z must be a number, as every value of the sweep"),
        ("interval(0,1)", True, "a=true must be a number"),
        ("int(interval(0,9))", 1.5, "a=1.5 must be a whole number"),
        ("int(interval(0,9))", math.nan, "a=nan must be a whole number"),
        ("range(9)", math.inf, "a=inf must be a whole number"),
        ("range(0,1,0.1)", 10**400, "a=1000"),
    ],
)
def test_a_value_of_another_kind_has_no_override(sweep: str, value: Any, reason: str) -> None:
    parameter = one(f"a={sweep}")
    assert not parameter.contains(value)
    with pytest.raises(ConfigError) as caught:
        parameter.override(value)
    assert str(caught.value).startswith(reason)


def test_a_float_of_a_range_may_be_off_by_rounding() -> None:
    parameter = one("a=range(0,1,0.1)")
    assert 0.7 not in parameter.grid()
    assert parameter.contains(0.7)
    assert not parameter.contains(0.7001)
    assert one("a=range(1000000,1000001,0.25)").contains(1000000.5)
    assert not one("a=range(1000000,1000001,0.25)").contains(1000000.6)


def test_a_range_of_integers_costs_nothing_until_it_is_a_grid() -> None:
    parameter = one(f"a=range(0,{10**30})")
    assert parameter.probes() == (0, 10**30 - 1)
    assert parameter.contains(10**29)
    with pytest.raises(ConfigError, match="has 1000000000000000000000000000000 values, too many for a grid"):
        parameter.grid()


@pytest.mark.usefixtures("in_tmp")
def test_an_override_sets_the_value_in_a_trial_and_in_hydra(in_tmp: Path) -> None:
    space = {"optimizer.lr": "tag(log,interval(1e-5,1e-1))", "+data.train.x": ["1", 1, None, "a, b", ["2", 2.0]]}
    lr, x = parse(**space)
    text = compose(["experiment=mlp"]).text
    for value in (1e-05, 0.1 + 0.2, math.nextafter(0.1, 0)):
        for listed, expected in zip(x.values, ["1", 1, None, "a, b", ["2", 2.0]], strict=True):
            overrides = [lr.override(value), x.override(listed)]
            e = from_text(text, overrides).experiment
            assert e.optimizer is not None
            assert e.data.train is not None
            assert e.optimizer["lr"] == value
            assert same(e.data.train["x"], expected)
    (in_tmp / "config.yaml").write_text("optimizer: {lr: 0}\ndata: {train: {}}\n")
    with initialize_config_dir(str(in_tmp), version_base="1.3"):
        cfg = hydra_compose("config", overrides)
    assert cfg.optimizer.lr == value
    assert cfg.data.train.x == ["2", 2.0]


# All that YAML holds and an override can write. Hydra's grammar does not quote keys, so keys are words here.
numbers = st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text() | st.text("'\"\\,${}[]()=: ae1")
words = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda w: w not in ("null", "true", "false", "inf", "nan")
)
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


@given(st.lists(nested, min_size=1, max_size=4, unique_by=repr))
def test_any_listed_value_comes_back_from_its_override(values: list[Any]) -> None:
    texts = [v for v in values if isinstance(v, str)]
    assume(not any(t[:1] in ("[", "{") for t in texts))  # a list and its text would be the same value
    (parameter,) = parse(**{"data.x": values})
    assert len(parameter.values) == len(values)
    for value, written in zip(values, parameter.values, strict=True):
        assert same(read(parameter.override(written)), value)
        assert parameter.contains(written)
    again = Parameter.from_dict(json.loads(json.dumps(parameter.to_dict(), allow_nan=False)))
    assert same(again, parameter)


@given(st.lists(scalars, min_size=2, max_size=4, unique_by=repr))
def test_any_value_of_the_command_line_comes_back(values: list[Any]) -> None:
    (listed,) = parse(a=values)
    forms = [",".join(listed.texts)]
    if None not in values:  # Hydra's choice() does not accept null
        forms.append(f"choice({forms[0]})")
    for form in forms:
        parameter = one(f"a={form}")
        assert same(parameter.values, tuple(values))
        assert same([read(parameter.override(v)) for v in parameter.values], values)


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite, finite, st.floats(0, 1), st.booleans())
def test_any_number_of_an_interval_comes_back_to_the_bit(a: float, b: float, part: float, integer: bool) -> None:
    low, high = sorted((a, b))
    assume(low < high and high - low < math.inf)
    if integer:
        parameter = one(f"a=int(interval({low!r},{high!r}))")
        value: float = min(int(low) + round(part * (int(high) - int(low))), int(high))
    else:
        parameter = one(f"a=interval({low!r},{high!r})")
        value = min(low + part * (high - low), high)
    assert parameter.contains(value)
    assert same(read(parameter.override(value)), value)
    assert same(Parameter.from_dict(json.loads(json.dumps(parameter.to_dict(), allow_nan=False))), parameter)


small = st.integers(-50, 50) | st.floats(-50, 50).map(lambda x: round(x, 3))


@given(small, small, st.integers(-9, 9) | st.floats(-9, 9).map(lambda x: round(x, 2)))
def test_a_range_has_the_values_of_hydras_own_sweep(start: float, stop: float, step: float) -> None:
    assume(step and (stop - start) / step > 0)
    override = f"a=range({start!r},{stop!r},{step!r})"
    expected: list[Any] = list(PLAIN.parse_override(override).sweep_iterator())
    parameter = one(override)
    again = Parameter.from_dict(json.loads(json.dumps(parameter.to_dict(), allow_nan=False)))
    assert same(again, parameter)
    assert same(list(again.grid()), expected)
    assert {min(expected), max(expected)} == set(parameter.probes())
    for value in expected:
        assert parameter.contains(value)
        assert same(read(parameter.override(value)), value)
