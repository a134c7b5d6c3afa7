"""Processes for datasets with slow Python transforms: each makes every n-th batch and sends it through shared memory.

torch's DataLoader is not used, because data processes need only positions, are seeded by sample, and must end at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing  # registers how tensors are sent between processes

from raytrainer.data.pickling import SharedPickle
from raytrainer.errors import DataError

START_METHODS = ("forkserver", "spawn", "fork")
_starting = threading.Lock()


def _forget_server() -> None:
    """Make a fork of this process start its own server. Otherwise multiprocessing would wait for the parent's server."""
    forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_forget_server)


def _await_end_of_server(within_s: float = 5.0) -> None:
    """Wait until the server has ended, so that multiprocessing starts another one. Return after `within_s` seconds if it is still alive."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    deadline = time.monotonic() + within_s
    while pid is not None and time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)


def prepare_start(start_method: str, modules: Sequence[str]) -> None:
    """Start the server that forks data processes, which takes seconds and meanwhile does not delay this process.

    Args:
        start_method: One of `START_METHODS`. Only `forkserver` has a server.
        modules: Modules that the processes will need. The server imports them once for all processes.
    """
    if start_method != "forkserver":
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(name for name in modules if name != "__main__")])
    with _without_main():
        forkserver.ensure_running()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide from multiprocessing which program this is, so that a new process does not import it again.

    A Ray worker's program imports ray, and a user's script may train when it is imported.
    """
    main = sys.modules["__main__"]
    with _starting:
        spec, file = main.__spec__, main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            yield
        finally:
            main.__spec__ = spec
            if file is not None:
                main.__file__ = file


def _serve(connection: Connection, inherited: list[Connection], make: Callable[[int], Any]) -> None:
    for end in inherited:  # if left open here, they would hide the parent's death
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
        start_method: One of `START_METHODS`. Only `fork` takes a function that cannot be pickled.

    Raises:
        CannotPickle: `make` cannot be pickled.
    """

    def __init__(
        self, make: Callable[[int], Any], num_workers: int, depth: int, name: str, start_method: str = "fork"
    ) -> None:
        self.num_workers, self.depth, self.name = num_workers, max(1, depth), name
        self._context: Any = multiprocessing.get_context(start_method)
        self._forks = start_method == "fork"
        self._make = make if self._forks else SharedPickle(make)

    def run(self, start: int, stop: int | None) -> Generator[tuple[int, Any], None, None]:
        """Yield `(index, make(index))` in order, from `start` to `stop`. Call it once.

        Raises:
            DataError: A process died.
            Exception: The error of `make`, with the process's traceback as a note.
        """
        workers: list[tuple[Any, Connection]] = []
        try:
            self._start(workers)
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

    def _start(self, workers: list[tuple[Any, Connection]]) -> None:
        for number in range(self.num_workers):
            ours, theirs = self._context.Pipe()
            inherited = [ours, *(end for _, end in workers)] if self._forks else []
            start = partial(self._process, f"raytrainer-data-{number}", (theirs, inherited, self._make))
            try:
                process = start()
            except (EOFError, ConnectionError):
                # The server ends, because the dataset's module cannot be imported in it. Each process can import it.
                self._context.set_forkserver_preload([__name__])
                _await_end_of_server()
                process = start()
            theirs.close()  # so that the pipe ends when the process dies
            workers.append((process, ours))
        if isinstance(self._make, SharedPickle):
            self._make.close()

    def _process(self, name: str, arguments: tuple[Any, ...]) -> Any:
        process = self._context.Process(target=_serve, args=arguments, name=name, daemon=True)
        with contextlib.nullcontext() if self._forks else _without_main():
            process.start()
        return process

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
