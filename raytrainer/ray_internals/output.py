"""Capture the output of Ray's workers before Ray prints it, and sort it by rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from raytrainer.progress import from_line

# Lines of Ray in a worker's output that a user cannot act on.
_CHATTER = ("Setting up process group for: env://", "[Gloo] Rank ", "Using blocking ray.get inside async actor")


class WorkerOutput:
    """The capture of the workers' output before Ray prints it. Messages go to `on_message`, text to `on_text`.

    Both get the rank of the process; None if the process is not our worker or has not announced its rank yet. Text of a
    worker with a label (a trial of a sweep) begins with the label.
    """

    def __init__(
        self,
        on_message: Callable[[int | None, dict[str, Any]], None],
        on_text: Callable[[int | None, str], None],
    ) -> None:
        self._on_message, self._on_text = on_message, on_text
        self._ranks: dict[tuple[Any, Any], int] = {}
        self._labels: dict[tuple[Any, Any], str] = {}
        self._newest: dict[int, tuple[Any, Any]] = {}  # the process that last announced each rank
        self._ended: set[tuple[Any, Any]] = set()
        self._changed = threading.Condition()

    def __enter__(self) -> WorkerOutput:
        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("raytrainer", self._take)
        # The raylet's notices of dead workers bypass the dispatcher. `first_error` has the same in one line.
        self._ray_print = ray._private.worker.print_to_stdstream
        ray._private.worker.print_to_stdstream = lambda data, **_: self._take(data)
        return self

    def __exit__(self, *_: object) -> None:
        ray._private.worker.print_to_stdstream = self._ray_print
        global_worker_stdstream_dispatcher.remove_handler("raytrainer")

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait for the output that the ranks printed before their end. Ray's log monitor polls their files, and can be
        seconds late on a busy machine.

        Args:
            timeout_s: Time limit in seconds, after which the missing output is dropped.

        Returns:
            Whether all output has arrived.
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
