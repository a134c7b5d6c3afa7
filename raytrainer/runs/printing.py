"""The output of verbs: messages on standard error, and JSON for programs on standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any


def say(text: str) -> None:
    print(f"raytrainer: {text}", file=sys.stderr, flush=True)


def to_json(value: Any) -> str:
    """Return a value as JSON. Numbers that JSON cannot express are null."""
    return json.dumps(_finite(value), indent=1, default=str)


def outcome_json(outcome: Any) -> str:
    """Return how a launch ended as JSON, for `--json`.

    Args:
        outcome: An `attempt.Outcome` or `sweep.SweepOutcome`.
    """
    record = outcome.record
    values = {key: getattr(outcome, key) for key in ("status", "exit_code", "where", "cause", "mlflow", "seconds")}
    values |= {"seconds_of_all_attempts": record.seconds, "attempts": record.attempts}
    values |= {"name": record.name, "run_id": record.run_id, "run_dir": record.run_dir}
    if hasattr(outcome, "trials"):
        keys = ("id", "status", "parameters", "overrides", "run_id", "cause")
        values["trials"] = [{**{k: getattr(t, k) for k in keys}, "reports": len(t.reports)} for t in outcome.trials]
    else:
        values["result"] = outcome.result
    return to_json(values)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
