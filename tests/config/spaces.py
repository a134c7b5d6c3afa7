"""Search spaces for the tests of `raytrainer.config.space`, and values as Hydra's own parser reads them."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from raytrainer.config import Parameter, parse_space
from raytrainer.errors import ConfigError

GROUPS = {"model", "optimizer", "experiment", "hydra/launcher"}
PLAIN = OverridesParser.create()


def parse(*overrides: str, **space: Any) -> list[Parameter]:
    return parse_space(overrides, space, groups=GROUPS)[0]


def one(override: str) -> Parameter:
    (parameter,) = parse(override)
    return parameter


def refusal(*overrides: str, space: dict[Any, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_space(overrides, space or {}, groups=GROUPS)
    return str(caught.value)


def read(override: str) -> Any:
    """Return the value that Hydra's own parser reads."""
    return PLAIN.parse_override(override).value()


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # 1, 1.0 and true differ, and nan equals itself
