"""How data processes are started: the batches are the same, the program is not imported again, and nothing is left."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from raytrainer.data import Loader, ParquetDataset
from raytrainer.data.pickling import CannotPickle, SharedPickle
from tests.data.test_cache import rows as table_rows
from tests.data.test_cache import write
from tests.data.test_loader import Rows, flat

METHODS = ("forkserver", "spawn", "fork")
# The default on each run of the suite; each start imports torch, which takes seconds.
ALL_NIGHTLY = [
    method if method == "forkserver" else pytest.param(method, marks=pytest.mark.nightly) for method in METHODS
]
ROOT = Path(__file__).resolve().parents[2]


class Origin:
    """A dataset whose samples say in which process they were read, and what that process has imported."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, int]:
        return {
            "pid": os.getpid(),
            "is_child": int(multiprocessing.parent_process() is not None),
            "wave": int("wave" in sys.modules),
        }


@pytest.mark.parametrize("draw", [False, True])
def test_the_batches_are_the_same_for_all_methods(draw: bool) -> None:
    """Order, draws from the global generators, and a start in the middle of an epoch."""

    def batches(**way: Any) -> list[Any]:
        torch.manual_seed(len(way))  # the state of this process must not matter
        loader = Loader(Rows(draw=draw), global_batch_size=10, micro_batch_size=4, seed=3, shuffle=True, **way)
        return [*flat(loader.batches(4, 9)), *flat(loader.batches(7, 12))]

    expected = batches(prefetch=0)
    assert batches() == expected
    for method in METHODS if draw else ("forkserver", "fork"):  # spawn takes seconds
        assert batches(num_workers=2, start_method=method) == expected, method


@pytest.mark.parametrize("method", ALL_NIGHTLY)
def test_processes_do_not_import_the_program_again(method: str) -> None:
    """A Ray worker's program imports ray. A script without a guard would train again."""
    program = f"""
        import json, wave
        from raytrainer.data import Loader
        from tests.data.test_start_methods import Origin
        print("this program runs")
        batch = next(Loader(Origin(), global_batch_size=4, num_workers=1, start_method={method!r}).batches())
        print(json.dumps({{name: x[0].item() for name, x in batch.micro[0].data.items() if name != "pid"}}))
        print(__file__ is not None, __spec__)
    """
    done = run_program(program)
    imported = 1 if method == "fork" else 0  # what the program has imported
    assert done == ["this program runs", f'{{"is_child": 1, "wave": {imported}}}', "True None"]


def run_program(program: str) -> list[str]:
    file = Path("program.py")
    file.write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dataset_of_the_program_itself_is_read_in_a_thread() -> None:
    program = """
        from raytrainer.data import Loader
        class Mine:
            def __len__(self): return 8
            def __getitem__(self, index): return index
        loader = Loader(Mine(), global_batch_size=4, num_workers=2)
        print([batch.micro[0].data.tolist() for batch in loader.batches(0, 2)])
    """
    first, warning = run_program(program)
    assert first == "[[0, 1, 2, 3], [4, 5, 6, 7]]"
    assert "data.start_method=forkserver" in warning
    assert "Mine belongs to the launching program" in warning


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_what_cannot_be_pickled_is_read_in_a_thread_with_one_warning(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    def double(rows: list[Any]) -> torch.Tensor:
        return torch.stack([row["x"] for row in rows]) * 2

    def loader(**way: Any) -> Loader:
        return Loader(Rows(), global_batch_size=8, shuffle=True, collate_fn=double, **way)

    expected = flat(loader().batches(0, 9))
    with caplog.at_level(logging.WARNING, "raytrainer"):
        falls_back = loader(num_workers=2, start_method=method)
        assert flat(falls_back.batches(0, 9)) == expected
        assert flat(falls_back.batches(2, 9)) == expected[2:]
    (record,) = caplog.records
    for part in (f"data.start_method={method}", "Rows", "double", "data.start_method=fork"):
        assert part in record.message
    caplog.clear()
    assert flat(loader(num_workers=2, start_method="fork").batches(0, 9)) == expected
    assert not caplog.records


def test_a_module_that_the_server_cannot_import() -> None:
    Path("odd.py").write_text(
        "import sys\n"
        "if sys.argv[0] == '-c': raise ValueError('imported in the server')\n"
        "class Odd:\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, index): return index\n"
    )
    program = """
        import sys
        sys.path.insert(0, ".")
        from raytrainer.data import Loader
        from odd import Odd
        for _ in range(2):
            loader = Loader(Odd(), global_batch_size=4, num_workers=2)
            print([batch.micro[0].data.tolist() for batch in loader.batches(0, 2)])
    """
    lines = run_program(program)
    assert lines[:2] == ["[[0, 1, 2, 3], [4, 5, 6, 7]]"] * 2
    assert "imported in the server" in lines[-1]


def test_a_fork_of_a_process_with_a_server_starts_its_own() -> None:
    program = """
        import os, sys
        from raytrainer.data import Loader
        from tests.data.test_start_methods import Origin
        loader = Loader(Origin(), global_batch_size=4, num_workers=1)
        def child_of():
            return next(loader.batches()).micro[0].data["is_child"].tolist()
        print(child_of(), flush=True)
        if os.fork() == 0:
            print(child_of(), flush=True)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    assert run_program(program) == ["[1, 1, 1, 1]"] * 2 + ["0"]


@pytest.mark.parametrize("method", ALL_NIGHTLY)
def test_nothing_is_left_of_a_killed_program(method: str) -> None:
    """A killed program cannot end its processes, so they end when its pipes are closed."""
    program = f"""
        import signal
        from raytrainer.data import Loader
        from tests.data.test_start_methods import Origin
        batches = Loader(Origin(), global_batch_size=1, num_workers=3, start_method={method!r}).batches()
        print(*{{next(batches).micro[0].data["pid"].item() for _ in range(6)}}, flush=True)
        signal.pause()
    """
    Path("program.py").write_text(textwrap.dedent(program))
    process = subprocess.Popen(
        [sys.executable, "program.py"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout is not None
        readers = {int(pid) for pid in process.stdout.readline().split()}
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        assert len(readers) == 3
        assert readers <= children  # beside them are the server and multiprocessing's resource tracker
        watched = [os.pidfd_open(pid) for pid in children]
    finally:
        process.kill()
        process.wait()
    for descriptor in watched:
        assert connection.wait([descriptor], timeout=20), "a process outlived the program"
        os.close(descriptor)


# -- SharedPickle ------------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, folder: Path) -> None:
        np.arange(100_000, dtype=np.int32).tofile(folder / "numbers")
        self.mapped = np.memmap(folder / "numbers", np.int32, "r", 4000, (90_000,))
        self.slice = self.mapped[50:60_000]
        self.array = np.arange(50_000, dtype=np.float64).reshape(2, -1)
        self.half = torch.arange(40_000).to(torch.bfloat16).reshape(4, -1)
        self.again = self.half
        self.flipped = torch.arange(30_000.0).reshape(3, -1).t()
        self.small = (np.arange(3), torch.tensor(2.5), torch.zeros(0, 4), np.array(["a", None], dtype=object))
        self.parameter = torch.nn.Parameter(torch.ones(2))


def serve(pipe: Any, holder: Holder) -> None:
    """Change the arrays of this process, and answer with their sums as they were before."""
    sums = [float(np.sum(x)) for x in (holder.mapped, holder.slice, holder.array)]
    sums += [float(x.double().sum()) for x in (holder.half, holder.flipped, holder.parameter.detach())]
    assert holder.again is holder.half
    holder.array += 1
    holder.half += 1
    array, scalar, empty, objects = holder.small
    small = (array.tolist(), scalar.item(), tuple(empty.shape), objects.tolist())
    pipe.send((sums, type(holder.slice).__name__, small, str(holder.half.dtype), tuple(holder.flipped.shape)))


def test_arrays_are_pickled_once_and_private_to_each_process(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    shared, context = SharedPickle(holder), multiprocessing.get_context("forkserver")
    assert len(shared._pickle) < 20_000  # the arrays are not in it
    assert sum(end - begin for begin, end in shared._spans) == 400_000 + 80_000 + 120_000  # nor the map's in memory
    answers = []
    for _ in range(2):  # the second process does not see the changes of the first
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, shared))
        process.start()
        answers.append(ours.recv())
        process.join()
    shared.close()
    for sums, kind, small, dtype, shape in answers:
        assert sums[:2] == [float(holder.mapped.sum()), float(holder.slice.sum())]
        assert sums[2:] == [float(holder.array.sum()), float(holder.half.double().sum()), 449985000.0, 2.0]
        assert (kind, dtype, shape) == ("memmap", "torch.bfloat16", (10_000, 3))
        assert small == ([0, 1, 2], 2.5, (0, 4), ["a", None])
    assert holder.array[0, 0] == 0


def test_a_mapped_column_is_mapped_again(tmp_path: Path) -> None:
    dataset = ParquetDataset(write(tmp_path / "source", table_rows(0, 50)), cache=tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 5000
    picked = torch.tensor([3, 49, 0])
    for name, column in dataset.tensors.items():
        assert torch.equal(copy.tensors[name].take(picked), column.take(picked))


def test_what_cannot_be_pickled_says_why() -> None:
    with pytest.raises(CannotPickle, match="lambda"):
        SharedPickle({"transform": lambda x: x})
