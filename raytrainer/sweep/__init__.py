"""Sweeps: many trials of one experiment, drawn by a searcher, pruned by a scheduler of Ray Tune and kept in a ledger.
Names are imported when they are first used: the ledger alone needs neither Ray nor torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.sweep.ledger import Ledger, Report, Trial
    from raytrainer.sweep.search import GridSearch, RandomSearch

__all__ = ["GridSearch", "Ledger", "RandomSearch", "Report", "Trial"]

_HOMES = {
    "GridSearch": "raytrainer.sweep.search",
    "Ledger": "raytrainer.sweep.ledger",
    "RandomSearch": "raytrainer.sweep.search",
    "Report": "raytrainer.sweep.ledger",
    "Trial": "raytrainer.sweep.ledger",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.sweep' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
