"""The keys under which metrics are in MLflow, which takes fewer names than users give: one key for each name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_LONGEST = 250


class MetricKeys:
    """Gives each metric name its key. Two names never share one: the later name gets a number at its end.

    Of names that arrive together, those that MLflow takes as they are come first.
    """

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def add(self, names: Iterable[str]) -> list[str]:
        """Gives new names their keys; returns a sentence for each whose key is another."""
        new = dict.fromkeys(name for name in names if name not in self._keys)
        return [said for name in sorted(new, key=lambda name: metric_key(name) != name) if (said := self._added(name))]

    def _added(self, name: str) -> str:
        cleaned = key = metric_key(name)
        number = 1
        while key in self._names:
            number += 1
            key = f"{cleaned[: _LONGEST - len(str(number)) - 1]}_{number}"
        self._keys[name], self._names[key] = key, name
        if key == name:
            return ""
        why = "MLflow does not take this name" if cleaned != name else "the name is in use"
        other = f"; {cleaned!r} is the metric {self._names[cleaned]!r}" if key != cleaned else ""
        return f"The metric {name!r} is logged to MLflow as {key!r}: {why}{other}."

    def __getitem__(self, name: str) -> str:
        return self._keys[name]


def metric_key(name: str) -> str:
    """The nearest name that MLflow takes: letters, digits, `_ - . : /` and spaces, a clean relative path, 250 long."""
    text = str(name)
    key = re.sub(r"[^\w\-./: ]", "_", text)
    if key != text:  # letters with separate accents are one letter each, as they look
        key = re.sub(r"[^\w\-./: ]", "_", unicodedata.normalize("NFC", text))
    parts = [part for part in key.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:_LONGEST].rstrip("/") or "_"
