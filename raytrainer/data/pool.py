"""Processes for datasets with slow Python transforms: each makes every n-th batch and sends it through shared memory.

torch's DataLoader is not used, because data processes need only positions, are seeded by sample, and must end at once.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing  # registers how tensors are sent between processes

from raytrainer.errors import DataError


def _serve(connection: Connection, parents: list[Connection], make: Callable[[int], Any]) -> None:
    for end in parents:  # inherited by the fork; if left open here, they would hide the parent's death
        end.close()
    # Ctrl-C, and SIGHUP from a closed terminal, reach the whole process group, and the parent decides what to do. The
    # parent's own signal handlers must not run here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # a forked OpenMP pool hangs, and training needs the cores
    while True:
        try:
            index = connection.recv()
        except EOFError:  # the parent closed its end or has died
            return
        answer: tuple[Any, Exception | None, str]
        try:
            answer = (make(index), None, "")
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            answer = (None, error, traceback.format_exc())
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # noqa: BLE001 - a batch, or an exception, that cannot be pickled
            cause = answer[1] or error
            connection.send((None, DataError(f"{type(cause).__name__}: {cause}"), answer[2] or traceback.format_exc()))


class WorkerPool:
    """`num_workers` processes that call `make(index)`. Each generator of `run` starts them, and ends them on close.

    Args:
        make: Returns the data of a batch by its number. Each process has its own copy.
        num_workers: At least 1.
        depth: Batches that each process prefetches, at least 1.
        name: The name of the dataset in messages.
    """

    def __init__(self, make: Callable[[int], Any], num_workers: int, depth: int, name: str) -> None:
        self.make, self.num_workers, self.depth, self.name = make, num_workers, max(1, depth), name

    def run(self, start: int, stop: int | None) -> Generator[tuple[int, Any], None, None]:
        """Yield `(index, make(index))` in order, from `start` to `stop`.

        Raises:
            DataError: A process died.
            Exception: The error of `make`, with the process's traceback as a note.
        """
        # A fork starts in tenths of milliseconds instead of seconds, and nothing has to be pickled.
        context = multiprocessing.get_context("fork")
        workers: list[tuple[Any, Connection]] = []
        try:
            for number in range(self.num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(theirs, [ours, *(end for _, end in workers)], self.make),
                    name=f"raytrainer-data-{number}",
                    daemon=True,
                )
                process.start()
                theirs.close()  # so that the pipe ends when the process dies
                workers.append((process, ours))
            waiting: deque[int] = deque()
            upcoming = start
            while True:
                while len(waiting) < self.num_workers * self.depth and (stop is None or upcoming < stop):
                    self._send(workers[upcoming % self.num_workers], upcoming)
                    waiting.append(upcoming)
                    upcoming += 1
                if not waiting:
                    return
                index = waiting.popleft()
                yield index, self._receive(workers[index % self.num_workers])
        finally:
            for process, _ in workers:
                process.kill()  # it holds nothing that needs cleanup
            for process, connection in workers:
                process.join()
                connection.close()

    def _send(self, worker: tuple[Any, Connection], index: int) -> None:
        try:
            worker[1].send(index)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died(worker[0]) from error

    def _receive(self, worker: tuple[Any, Connection]) -> Any:
        process, connection = worker
        wait([connection, process.sentinel])
        try:
            data, error, trace = connection.recv() if connection.poll() else (None, self._died(process), "")
        except (EOFError, ConnectionResetError) as lost:
            raise self._died(process) from lost
        if error is not None:
            if trace:
                error.add_note(f"in a data process:\n{trace}")
            raise error
        return data

    def _died(self, process: Any) -> DataError:
        process.join(timeout=5)
        code = process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        hint = {
            "SIGBUS": "; /dev/shm may be too small for the batches",
            "SIGKILL": "; the machine may have run out of memory",
        }.get(how, "")
        return DataError(f"{self.name}: a data process ended by itself ({how}{hint})")
