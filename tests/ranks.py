"""Functions on 1 to 4 gloo ranks, in processes that all tests share: starting them costs more than most of the tests.
Each call gets a process group of its own."""

from __future__ import annotations

import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from raytrainer.parallel import World

LIMIT_S = 150.0


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(world, *args)` returns on each of `size` ranks; it must be importable, its values picklable.

    Raises:
        AssertionError: It raised on some rank (with the tracebacks), or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_rank(number) for number in range(size)]
        for number, rank in enumerate(ranks):
            rank.pipe.send_bytes(pickle.dumps((function, args, number, size, f"{folder}/rendezvous")))
        until = time.monotonic() + LIMIT_S
        answers: list[Any] = []
        for number, rank in enumerate(ranks):
            if not rank.pipe.poll(max(0.0, until - time.monotonic())):
                _end()
                raise AssertionError(f"rank {number} of {size} did not answer in {LIMIT_S:g} s")
            answers.append(pickle.loads(rank.pipe.recv_bytes()))
    failed = [f"rank {number}: {text}" for number, (text, _) in enumerate(answers) if text]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


class _Rank:
    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        # Daemonic: it ends with the process that runs the tests, however that ends.
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()


_ranks: list[_Rank] = []


def _rank(number: int) -> _Rank:
    while len(_ranks) <= number:
        _ranks.append(_Rank())
    return _ranks[number]


def _end() -> None:
    while _ranks:
        _ranks.pop().process.kill()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, args, rank, size, rendezvous = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        text, value = "", None
        try:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
            value = function(World(rank, size, rank), *args)
        except BaseException:  # noqa: BLE001  told to the test, which fails with it
            text = traceback.format_exc()
        finally:
            dist.destroy_process_group()  # which also frees the ranks that wait for this one
        pipe.send_bytes(pickle.dumps((text, value)))
