"""The display of a run that waits for resources of a cluster: what is missing, who holds it, which nodes are coming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from raytrainer.preflight import Resources, amount
from raytrainer.progress import Display, duration

_FIRST_S, _EVERY_S = 3.0, 10.0
_OFTEN_S = 60.0  # in a log, an unchanged line repeats every ten seconds in the first minute, then once a minute


class Cluster(Protocol):
    """The queries to a cluster. `raytrainer.ray_internals` implements them."""

    def free(self) -> Mapping[str, float]: ...
    def holders(self) -> Mapping[str, Mapping[str, float]]: ...
    def nodes_to_come(self) -> tuple[Mapping[str, int], list[str]]: ...


class Waiting:
    """The display, about every ten seconds, of what a run waits for.

    Args:
        display: The display.
        cluster: The cluster to query.
        wanted: The resources of all workers together.
        available: The resources that the cluster has and can add.
        nodes: Which nodes may hold them, as `selected_nodes` says; empty: all.
    """

    def __init__(
        self,
        display: Display,
        cluster: Cluster,
        wanted: Mapping[str, float],
        available: Resources,
        nodes: str = "",
    ) -> None:
        self._display, self._cluster, self._available, self._nodes = display, cluster, available, nodes
        self._wanted = {name: n for name, n in wanted.items() if n}
        self._began: float | None = None  # when the run began to wait; None if it has its resources
        self._due = self._reported_at = 0.0
        self._last = ""

    def look(self, waits: Callable[[], bool], now: float) -> None:
        """Update the display if it is due. Call this often.

        Args:
            waits: Returns whether the run waits for resources.
            now: The value of `time.monotonic()`.
        """
        try:
            if not waits():
                if self._began is not None and self._display.live:
                    self._display.draw([])
                self._began = None
                return
            if self._began is None:
                self._began, self._due, self._last = now, now + _FIRST_S, ""
            if now >= self._due:
                self._due = now + _EVERY_S
                self._say(now, self._text())
        except Exception as error:  # noqa: BLE001  an error of the display must not end a run
            self._say(now, f"the cluster does not say why ({type(error).__name__})")

    def _say(self, now: float, text: str) -> None:
        waited = 0.0 if self._began is None else now - self._began
        line = f"waiting for {_listed(self._wanted)}{self._nodes} ({duration(waited)}): {text}"
        if self._display.live:
            self._display.draw([line])
        elif waited < _OFTEN_S or text != self._last or now - self._reported_at >= _OFTEN_S:
            self._reported_at = now
            self._display.say(line)
        self._last = text

    def _text(self) -> str:
        free, held = self._cluster.free(), self._cluster.holders()
        coming, failed = self._cluster.nodes_to_come()
        parts = [", ".join(f"{amount(name, free.get(name, 0.0))} free" for name in self._wanted)]
        for who, resources in sorted(held.items()):
            of_these = {name: resources[name] for name in self._wanted if resources.get(name)}
            if of_these:
                parts.append(f"{who} holds {_listed(of_these)}")
        if coming:
            parts.append(f"the cluster adds nodes: {', '.join(f'{n} × {kind}' for kind, n in sorted(coming.items()))}")
        elif self._available.more or self._available.endless:
            parts.append("the cluster adds nodes")
        parts += [f"it could not add {why}" for why in failed[:2]]
        return "; ".join(parts)


def selected_nodes(accelerator_type: str | None, label_selector: Mapping[str, str] | None) -> str:
    """Return the nodes that `scaling` selects, as the end of a sentence: ` on nodes with A100, zone=a`."""
    selected = [accelerator_type] if accelerator_type else []
    selected += [f"{label}={value}" for label, value in (label_selector or {}).items()]
    return f" on nodes with {', '.join(selected)}" if selected else ""


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(amount(name, n) for name, n in resources.items())
