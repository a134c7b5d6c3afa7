"""Tests of the schema: every key is typed and bounded, and an error names the wrong key at any depth."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrainer.config import Experiment, schema
from raytrainer.config.checks import seconds
from raytrainer.config.schema import validate
from raytrainer.config.typed import defaults, typed
from raytrainer.errors import ConfigError


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return a dotted key as nested mappings: `a.b`, 3 → `{"a": {"b": 3}}`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    section: dict[str, Any] = value
    return section


def refusal(name: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(typed(nested(name, value)))
    return str(caught.value)


def leaves() -> list[str]:
    sections = {k.rpartition(".")[0] for k in schema.known_keys()}
    return [k for k in schema.known_keys() if k not in sections]


def test_defaults_are_valid_and_give_the_same_experiment() -> None:
    assert typed(defaults()) == Experiment()
    validate(Experiment())


def test_known_keys_are_every_key_once() -> None:
    keys = list(schema.known_keys())
    assert len(keys) == len(set(keys))
    assert {"seed", "trainer.max_steps", "trainer.profile", "trainer.profile.start", "cluster.address"} <= set(keys)


@pytest.mark.parametrize(
    ("name", "given_", "stored"),
    [
        ("trainer.max_steps", "12", 12),  # text, as from ${oc.env:…}
        ("trainer.max_steps", 1e3, 1000),
        ("trainer.max_grad_norm", 1, 1.0),
        ("trainer.max_grad_norm", "0.5", 0.5),
        ("trainer.channels_last", "yes", True),
        ("tracking.required", "off", False),
        ("name", 123, "123"),
        ("trainer.max_steps", None, None),
        ("scaling.resources_per_worker", {"CPU": "2"}, {"CPU": 2.0}),
    ],
)
def test_values_become_their_type(name: str, given_: Any, stored: Any) -> None:
    value: Any = typed(nested(name, given_))
    for part in name.split("."):
        value = getattr(value, part)
    assert value == stored
    assert type(value) is type(stored)


@pytest.mark.parametrize(
    ("name", "value", "assigned", "fix"),
    [
        ("trainer.max_steps", "abc", "trainer.max_steps=abc", "a whole number"),
        ("trainer.max_steps", 1.5, "trainer.max_steps=1.5", "a whole number"),
        ("trainer.max_steps", True, "trainer.max_steps=true", "a whole number"),
        ("trainer.max_steps", math.inf, "trainer.max_steps=inf", "a whole number"),
        ("trainer.max_steps", 0, "trainer.max_steps=0", "at least 1"),
        ("trainer.max_grad_norm", math.nan, "trainer.max_grad_norm=nan", "at least 0"),
        ("trainer.ema_decay", 1.1, "trainer.ema_decay=1.1", "at most 1"),
        ("trainer.channels_last", 3, "trainer.channels_last=3", "true or false"),
        ("seed", None, "seed", "a whole number, not null"),
        ("seed", -1, "seed=-1", "at least 0"),
        ("storage_path", ["a"], "storage_path=[a]", "text"),
        ("scaling.label_selector", "a", "scaling.label_selector=a", "a mapping"),
        ("scaling.resources_per_worker", {"CPU": "x"}, "scaling.resources_per_worker.CPU=x", "a number"),
        ("model", "resnet", "model=resnet", "a _target_ node"),
        ("trainer", 3, "trainer=3", "a section of keys"),
        ("trainer", None, "trainer", "a section of keys, not null"),
        ("trainer.profile", 3, "trainer.profile=3", "valid: start, steps"),
        ("trainer.profile.strt", 3, "trainer.profile.strt=3", "valid: trainer.profile.start"),
        ("trainer.max_epoch", 3, "trainer.max_epoch=3", "valid: trainer.max_epochs"),
        ("trainr.max_epochs", 3, "trainr.max_epochs=3", "valid: trainer.max_epochs"),
        ("monitor", "val/loss", "monitor=val/loss", "valid: trainer.early_stopping.monitor, checkpoint.mon"),
        ("checkpoint.mode", "maximum", "checkpoint.mode=maximum", "valid: max, null, min"),
        ("trainer.precision", "bf16", "trainer.precision=bf16", "valid: bf16-true, bf16-mixed"),
        ("data.resident", 1, "data.resident=1", "valid: auto, true, false"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_fix(name: str, value: Any, assigned: str, fix: str) -> None:
    message = refusal(name, value)
    assert message.startswith(f"{assigned} ")
    assert fix in message


@pytest.mark.parametrize("name", leaves())
def test_no_key_takes_a_list_of_mappings(name: str) -> None:
    """Typed leaves refuse it. Leaves of type `Any` are checked by their choices or by `check_together`."""
    if name in {"trainer.max_time", "scaling.num_workers", "sweep.time_budget_s", "sweep.allow_failed"}:
        return
    if name in {
        "cluster.forward_env",
        "cluster.shared_paths",
        "cluster.secrets",
        "trainer.freeze",
        "trainer.activation_checkpointing",
        "fsdp.wrap",
        "fsdp.reshard_after_forward",
        "init_from.exclude",
    }:
        return
    assert refusal(name, [{"a": 1}]).startswith(name)


@given(st.sampled_from(leaves()), st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none())
def test_nothing_but_a_config_error_comes_of_a_value(name: str, value: Any) -> None:
    try:
        validate(typed(nested(name, value)))
    except ConfigError as error:
        assert error.key == name  # noqa: PT017  no other exception may occur


def test_a_file_without_its_package_line_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"^experiment .*# @package _global_"):
        typed({"experiment": {"trainer": {"max_steps": 1}}}, ["experiment"])
    with pytest.raises(ConfigError, match=r"group augment .*first line"):
        typed({"augment": {"padding": 2}}, ["augment"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (90, 90.0), ("90s", 90.0), ("1h30m", 5400.0), ("2d", 172800.0), ("01:30:05", 5405.0), (0.5, 0.5)],
)
def test_durations(value: Any, expected: float | None) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize("value", ["", "5x", "1:2", -1, 0, True, "0s", [3], math.nan])
def test_no_durations(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_time.* must be a duration"):
        seconds(value)


def test_every_section_is_strict() -> None:
    for f in dataclasses.fields(Experiment):
        if schema.section_of(f) is not None:
            assert f"{f.name}.nonsense_key=1 is not a key" in refusal(f"{f.name}.nonsense_key", 1)
