"""A thread that prefetches batches for the training loop, and their copies to the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from raytrainer.batches import is_dense, move, moves_itself, parts, pin, tensors
from raytrainer.data.columns import Column, take
from raytrainer.data.sample_plan import Step

T = TypeVar("T")
Made = tuple[Step, list[Any]]
"""A step, and the data of each of its micro-batches."""

_END = object()
# If a batch from a memory map is slower than this, it came from a disk: a tenth of the speed of memory copies, plus the
# length of a thread's time slice.
_MEMORY_BYTES_A_S = 200e6
_HICCUP_S = 0.002


def prefetched(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield the items of `source`, made in a thread that keeps up to `depth` of them ready.

    An error of `source` is raised here. Closing this generator ends the thread: at once if it is waiting, else after
    the current item, because a thread cannot be interrupted. Closing waits for at most a second.
    """
    slots = threading.Semaphore(depth)
    ready: SimpleQueue[Any] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            while True:
                slots.acquire()
                if stop.is_set():
                    return
                item = next(source, _END)
                ready.put((item, None))
                if item is _END:
                    return
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            ready.put((None, error))
        finally:
            source.close()

    thread = threading.Thread(target=work, name="raytrainer-data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            slots.release()
            yield item
    finally:
        stop.set()
        slots.release()
        thread.join(timeout=1.0)


def on_device(source: Generator[Made, None, None], device: torch.device, depth: int) -> Generator[Made, None, None]:
    """Prefetch `depth` batches of `source` in a thread, and start their copies to the device there; 0 for no thread."""
    if device.type != "cuda":
        ready = prefetched(source, depth) if depth else source
        try:
            for made in ready:
                yield moved(made, device)
        finally:
            ready.close()
        return
    copier = DeviceCopy(device)

    def started() -> Generator[Made, None, None]:
        try:
            for step, micro in source:
                yield step, [copier.start(data) for data in micro]
        finally:
            source.close()

    moving = prefetched(started(), depth) if depth else started()
    try:
        for step, micro in moving:
            yield step, [copier.finish(*data) for data in micro]
    finally:
        moving.close()


def moved(made: Made, device: torch.device) -> Made:
    """Return a batch on the device, after the copy."""
    if device.type == "cpu":
        return made
    return made[0], [move(data, device) for data in made[1]]


def while_warm(source: Generator[Made, None, None]) -> Generator[Made, None, bool]:
    """Yield batches of `source` until three in a row were so slow that they must have been read from a disk.

    Their data are dicts or tuples of tensors. The generator returns True if `source` is
    exhausted.
    """
    slow = 0
    while slow < 3:
        began = time.perf_counter()
        batch = next(source, None)
        if batch is None:
            return True
        seconds = time.perf_counter() - began
        size = sum(x.nbytes for data in batch[1] for x in (data.values() if isinstance(data, dict) else data))
        slow = slow + 1 if seconds > _HICCUP_S + size / _MEMORY_BYTES_A_S else 0
        yield batch
    return False


class DeviceCopy:
    """Copies batches from pinned memory to a CUDA device on its own stream, in parallel with the training step.

    Call `start` where the batch is made and `finish` where it is used. The copy runs in between.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, data: Any) -> tuple[Any, torch.cuda.Event | None]:
        pinned = pin(data)
        if not _can_be_recorded(pinned):
            return pinned, None
        with torch.cuda.stream(self.stream):
            moved = move(pinned, self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return moved, event

    def finish(self, moved: Any, event: torch.cuda.Event | None) -> Any:
        if event is None:
            return move(moved, self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in tensors(moved):
            if tensor.device.type == "cuda":
                # The side stream owns the memory, which must not be reused before the current stream is done.
                tensor.record_stream(current)
        return moved


def _can_be_recorded(data: Any) -> bool:
    """Return whether all memory of a batch is in dense tensors that we can find.

    For other memory, the allocator cannot be informed that another stream uses it, so it must be copied on that stream.
    """
    return all(is_dense(part) if isinstance(part, Tensor) else not moves_itself(part) for part in parts(data))


def gather(columns: Any, rows: Tensor, pinned: bool = False) -> Any:
    """Return the `rows` (int64 `[n]`, on the columns' device) of each column, as a dict or tuple like `columns`."""

    def one(column: Column) -> Tensor:
        if not pinned:
            return take(column, rows)
        return take(column, rows, torch.empty((len(rows), *column.shape[1:]), dtype=column.dtype, pin_memory=True))

    if isinstance(columns, dict):
        return {name: one(column) for name, column in columns.items()}
    return tuple(one(column) for column in columns)
