"""The target of a request: one run, or a sweep with a config for each combination of its group choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from raytrainer.config import Composition
from raytrainer.sweep import Plan

Target = Composition | Plan


def compositions_of(target: Target) -> list[Composition]:
    """Return the configs of a target: one for a run."""
    return [*target.compositions.values()] if isinstance(target, Plan) else [target]


def first_of(target: Target) -> Composition:
    """Return the config that represents the target in records."""
    return target.first if isinstance(target, Plan) else target


def with_texts(target: Target, change: Callable[[Composition], str]) -> Target:
    """Return the target with another text of each config."""
    if isinstance(target, Plan):
        changed = {key: replace(c, text=change(c)) for key, c in target.compositions.items()}
        return replace(target, compositions=changed)
    return replace(target, text=change(target))
