"""What Ray's workers print, taken out of Ray's own printing and sorted by who printed it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from raytrainer.progress import from_line

# Lines of Ray's own in a worker's output that say nothing a user can act on.
_CHATTER = ("Setting up process group for: env://", "[Gloo] Rank ", "Using blocking ray.get inside async actor")


class WorkerOutput:
    """Takes what the workers print out of Ray's own printing: messages go to `on_message`, text to `on_text`.

    Each gets the rank it came from; None: a process that is no worker of ours, or one that has not said its rank yet.
    Text of a worker with a label (a trial of a sweep) begins with it.
    """

    def __init__(
        self,
        on_message: Callable[[int | None, dict[str, Any]], None],
        on_text: Callable[[int | None, str], None],
    ) -> None:
        self._on_message, self._on_text = on_message, on_text
        self._ranks: dict[tuple[Any, Any], int] = {}
        self._labels: dict[tuple[Any, Any], str] = {}
        self._newest: dict[int, tuple[Any, Any]] = {}  # the process that was the last to say that it is a rank
        self._ended: set[tuple[Any, Any]] = set()
        self._changed = threading.Condition()

    def __enter__(self) -> WorkerOutput:
        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("raytrainer", self._take)
        # The raylet's notices of dead workers are printed past the dispatcher; `first_error` says the same in a line.
        self._ray_print = ray._private.worker.print_to_stdstream
        ray._private.worker.print_to_stdstream = lambda data, **_: self._take(data)
        return self

    def __exit__(self, *_: object) -> None:
        ray._private.worker.print_to_stdstream = self._ray_print
        global_worker_stdstream_dispatcher.remove_handler("raytrainer")

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait for what the ranks printed before their end. Ray's log monitor reads their files now and then, and on a busy
        machine seconds later.

        Args:
            timeout_s: Seconds, after which the rest is left out.

        Returns:
            Whether all of it has arrived.
        """
        with self._changed:
            return self._changed.wait_for(self._is_complete, timeout_s)

    def _is_complete(self) -> bool:
        return 0 in self._newest and self._ended.issuperset(self._newest.values())

    def _take(self, data: Mapping[str, Any]) -> None:
        source = (data.get("ip"), data.get("pid"))
        for line in data.get("lines", ()):
            if (message := from_line(line)) is None:
                if line.strip() and not any(text in line for text in _CHATTER):
                    label = self._labels.get(source)
                    self._on_text(self._ranks.get(source), f"[{label}] {line}" if label else line)
                continue
            if message["kind"] == "end":
                with self._changed:
                    self._ended.add(source)
                    self._changed.notify_all()
                continue
            if message["kind"] == "hello":
                self._ranks[source], self._labels[source] = message["rank"], message["label"]
                self._newest[message["rank"]] = source
            self._on_message(self._ranks.get(source), message)
