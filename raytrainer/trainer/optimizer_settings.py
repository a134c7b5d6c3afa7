"""Apply settings of the optimizer that a resume changes (`resume optimizer.lr=0.1`) over those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GroupChanges:
    """The changes of one parameter group.

    Attributes:
        settings: The new values.
        base_lr: The group's learning rate before any scheduler has changed it.
    """

    settings: dict[str, Any]
    base_lr: Any


def changes_of(optimizer: Any, changed: Iterable[str]) -> list[GroupChanges]:
    """Return the current values of the `changed` settings by group. Call it before the checkpoint is restored."""
    names = list(changed)
    return [
        GroupChanges(
            # A constructor may name a setting of some groups with a prefix: `adamw_lr` is the `lr` of Muon's other groups.
            {k: v for k, v in group.items() if any(name == k or name.endswith(f"_{k}") for name in names)},
            group.get("initial_lr", group["lr"]),
        )
        for group in optimizer.param_groups
    ]


def apply_changes(optimizer: Any, scheduler: Any, changes: list[GroupChanges]) -> None:
    """Apply the result of `changes_of`, after the checkpoint is restored."""
    for number, (group, change) in enumerate(zip(optimizer.param_groups, changes, strict=True)):
        settings = dict(change.settings)
        if "lr" in settings and group.get("initial_lr", group["lr"]) == change.base_lr:
            del settings["lr"]  # the same base, so no bit may change
        if "lr" in settings:
            # The checkpoint's rate is its base times the curve. Use the same point of the curve with the new base.
            factor = float(group["lr"]) / float(group["initial_lr"]) if group.get("initial_lr") else 1.0
            settings["lr"] = change.base_lr * factor
            # A scheduler composed of others keeps the base in each of them.
            for part in (scheduler, *getattr(scheduler, "_schedulers", ())):
                if hasattr(part, "base_lrs"):
                    group["initial_lr"] = part.base_lrs[number] = change.base_lr
        group.update(settings)
