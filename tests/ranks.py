"""Run functions on 1 to 4 ranks, with gloo or NCCL. All tests share the processes, because starting them takes longer
than most of the tests. Each call gets its own process group."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
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


def run(size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", cuda: bool = False) -> list[Any]:
    """Return what `function(world, *args)` returns on each of `size` ranks. It must be importable, and its values picklable.

    With `cuda`, rank r uses GPU r. If there are fewer GPUs than ranks, they share them, which NCCL does not support.

    Raises:
        AssertionError: The function raised on some rank (the message has the tracebacks), or it took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_rank(number) for number in range(size)]
        for number, rank in enumerate(ranks):
            rank.pipe.send_bytes(pickle.dumps((function, args, number, size, f"{folder}/rendezvous", backend, cuda)))
        until = time.monotonic() + LIMIT_S
        answers: list[Any] = [None] * size
        for number, rank in enumerate(ranks):
            if rank.pipe.poll(max(0.0, until - time.monotonic())):
                answers[number] = pickle.loads(rank.pipe.recv_bytes())
        if None in answers:
            _end()
    # A rank that is late may wait for one that has failed; that rank's traceback is the reason.
    late = f"no answer in {LIMIT_S:g} s"
    failed = [f"rank {n}: {late if a is None else a[0]}" for n, a in enumerate(answers) if a is None or a[0]]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def new_processes() -> Any:
    """Return the multiprocessing context in which tests start processes. They are forked from a process that has
    imported what ranks need and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.ranks", "torch._dynamo", "torch.distributed.fsdp", "raytrainer.trainer", "raytrainer.state"]
    )
    return context


class _Rank:
    def __init__(self) -> None:
        context = new_processes()
        self.pipe, there = context.Pipe()
        # Daemonic: it ends with the process that runs the tests, however that process ends.
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
            function, args, rank, size, rendezvous, backend, cuda = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        text, value = "", None
        try:
            device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
            if cuda:
                torch.cuda.set_device(device)
            dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size)
            value = function(World(rank, size, rank, device), *args)
        except BaseException:  # noqa: BLE001  sent to the test, which fails with it
            text = traceback.format_exc()
        finally:
            dist.destroy_process_group()  # this also frees the ranks that wait for this one
            _forget_groups()
        pipe.send_bytes(pickle.dumps((text, value)))


def _forget_groups() -> None:
    """Clear DTensor's caches. They keep the groups of a mesh by name, and the next call's mesh has the same names."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _redistribute._gen_transform_infos.cache_clear()
        _redistribute.clear_redistribute_planner_cache()
