"""Map each metric name to a unique MLflow key, because MLflow accepts fewer names than users may choose."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_LONGEST = 250


class MetricKeys:
    """The keys of all metric names. Two names never share a key: the later name gets a number at its end.

    Among names that are added together, those that MLflow accepts unchanged come first.
    """

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def add(self, names: Iterable[str]) -> list[str]:
        """Assign keys to new names. Return one sentence for each name whose key differs from it."""
        new = dict.fromkeys(name for name in names if name not in self._keys)
        return [
            sentence
            for name in sorted(new, key=lambda name: metric_key(name) != name)
            if (sentence := self._added(name))
        ]

    def _added(self, name: str) -> str:
        cleaned = key = metric_key(name)
        number = 1
        while key in self._names:
            number += 1
            key = f"{cleaned[: _LONGEST - len(str(number)) - 1]}_{number}"
        self._keys[name], self._names[key] = key, name
        if key == name:
            return ""
        why = "MLflow does not accept this name" if cleaned != name else "the name is in use"
        other = f"; {cleaned!r} is the metric {self._names[cleaned]!r}" if key != cleaned else ""
        return f"The metric {name!r} is logged to MLflow as {key!r}: {why}{other}."

    def __getitem__(self, name: str) -> str:
        return self._keys[name]


def metric_key(name: str) -> str:
    """Return the nearest name that MLflow accepts.

    It is a clean relative path of letters, digits, spaces and `_ - . : /`, with at most 250 characters.
    """
    text = str(name)
    key = re.sub(r"[^\w\-./: ]", "_", text)
    if key != text:  # compose letters and separate accents into single letters, which MLflow accepts
        key = re.sub(r"[^\w\-./: ]", "_", unicodedata.normalize("NFC", text))
    parts = [part for part in key.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:_LONGEST].rstrip("/") or "_"
