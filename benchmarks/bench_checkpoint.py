"""Cost of saving a checkpoint for the training loop: `Checkpointer.save` against `torch.save` and
`torch.distributed.checkpoint`, with the weights and the Adam state of a transformer, 500 MB together.

The ways alternate (A B C D …) in one process. The stall is the time until the loop may change the state again. The
benchmark changes the state at that moment, and the loaded state must equal the saved one bit for bit. It also measures
the time until the checkpoint is durable on disk, and the time to load it from the page cache.

    python -m benchmarks.bench_checkpoint --rounds 7
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks import report
from raytrainer.checkpoint import Checkpointer
from raytrainer.storage import Storage

State = dict[str, Any]
GOALS = {"torch.save": 0.15, "dcp.async_save": 0.3}


def make_state(megabytes: float, device: str) -> State:
    """Return the fp32 weights of a decoder of width 768 with Adam's two moments, in as many layers as make the size."""
    width, generator = 768, torch.Generator(device).manual_seed(0)
    layer: dict[str, tuple[int, ...]] = {
        "qkv": (3 * width, width),
        "out": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
    }
    layer |= {f"norm_{i}": (width,) for i in (1, 2)}
    each = 12 * sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(1, round(megabytes * 1e6 / each))
    shapes = [(f"layers.{number}.{name}", shape) for number in range(layers) for name, shape in layer.items()]

    def drawn() -> Iterator[Tensor]:
        return (torch.randn(shape, device=device, generator=generator) for _, shape in shapes)

    moments = zip(drawn(), drawn(), strict=True)
    return {
        "model": {name: tensor for (name, _), tensor in zip(shapes, drawn(), strict=True)},
        "optimizer": {
            name: {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
            for (name, _), (first, second) in zip(shapes, moments, strict=True)
        },
    }


def tensors(state: State) -> list[Tensor]:
    """Return all tensors of a state, in its order."""
    return [t for value in state.values() for t in (tensors(value) if isinstance(value, dict) else [value])]


def copied(state: State, make: Callable[[Tensor], Tensor]) -> State:
    return {key: copied(value, make) if isinstance(value, dict) else make(value) for key, value in state.items()}


class Way:
    """One way of saving a checkpoint.

    Args:
        folder: The directory of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State, step: int) -> None:
        """Save the state, and return when the state may be changed."""
        raise NotImplementedError

    def wait(self) -> None:
        """Wait until the checkpoint is durable on disk."""

    def load(self, into: State, step: int) -> State:
        """Return what was saved; `into` may be filled and returned."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything that this way has started."""


class Ours(Way):
    """raytrainer: a thread writes, syncs, checksums and commits; loading verifies the checksums."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._checkpointer = Checkpointer(Storage(folder), num_to_keep=1)

    def save(self, state: State, step: int) -> None:
        self._checkpointer.save(step, state, {})

    def wait(self) -> None:
        self._checkpointer.wait()

    def load(self, into: State, step: int) -> State:
        info = Checkpointer(Storage(self.folder)).latest()
        assert info is not None
        assert info.step == step
        return self._checkpointer.load(info, into)[0]

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave(Way):
    """The usual `torch.save`. `wait` then syncs the file to disk, which is not part of the stall."""

    def _file(self, step: int) -> Path:
        return self.folder / f"{step}.pt"

    def save(self, state: State, step: int) -> None:
        torch.save(state, self._file(step))
        self._last = step

    def wait(self) -> None:
        with self._file(self._last).open("rb") as file:
            os.fsync(file.fileno())

    def load(self, into: State, step: int) -> State:
        loaded: State = torch.load(self._file(step), weights_only=True)
        return loaded


class Dcp(Way):
    """`dcp.save`, which syncs its files."""

    def save(self, state: State, step: int) -> None:
        save(state, checkpoint_id=self.folder / str(step))

    def load(self, into: State, step: int) -> State:
        load(into, checkpoint_id=self.folder / str(step))
        return into


class AsyncDcp(Dcp):
    """`dcp.async_save` as in its documentation: it copies the state into new memory."""

    stager: DefaultStager | None = None
    _future: Any = None

    def save(self, state: State, step: int) -> None:
        self._future = async_save(state, checkpoint_id=self.folder / str(step), async_stager=self.stager)

    def wait(self) -> None:
        self._future.result()


class AsyncDcpKept(AsyncDcp):
    """`dcp.async_save` at its best: its stager keeps its memory, which is pinned if there is a GPU."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        on_gpu = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))

    def close(self) -> None:
        assert self.stager is not None
        self.stager.close()


WAYS: dict[str, type[Way]] = {
    "raytrainer": Ours,
    "torch.save": TorchSave,
    "dcp.async_save": AsyncDcp,
    "dcp.async_save, kept stager": AsyncDcpKept,
    "dcp.save": Dcp,
}


def measure(way: Way, state: State, step: int) -> dict[str, float]:
    """Return the seconds of one save and one load, and check that the loaded state equals the saved one."""
    expected = copied(state, Tensor.clone)
    empty = copied(state, torch.empty_like)
    os.sync()  # so that earlier writes of others are not measured
    began = time.perf_counter()
    way.save(state, step)
    stall = time.perf_counter() - began
    for tensor in tensors(state):
        tensor.add_(1)
    way.wait()
    committed = time.perf_counter() - began
    began = time.perf_counter()
    loaded = way.load(empty, step)
    load = time.perf_counter() - began
    assert all(torch.equal(a, b) for a, b in zip(tensors(loaded), tensors(expected), strict=True))
    return {"stall_s": stall, "committed_s": committed, "load_s": load}


def compare(megabytes: float, rounds: int, device: str = "cpu", directory: Path | None = None) -> dict[str, Any]:
    """Measure all ways in turn. The first round does not count; the stalls of its saves are reported separately."""
    state = make_state(megabytes, device)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in WAYS}
    first: dict[str, float] = {}
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=directory))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    ways = {name: kind(folder / str(number)) for number, (name, kind) in enumerate(WAYS.items())}
    try:
        for step in range(rounds + 1):
            for name, way in ways.items():
                way.folder.mkdir(exist_ok=True)
                measured = measure(way, state, step)
                first.setdefault(name, measured["stall_s"])
                for key, value in measured.items() if step else ():
                    figures[name].setdefault(key, []).append(value)
                if not isinstance(way, Ours):  # ours keeps one checkpoint, as in training
                    shutil.rmtree(way.folder)
    finally:
        for way in ways.values():
            way.close()
        dist.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)
    ours = figures["raytrainer"]["stall_s"]
    ratios = {
        name: [a / b for a, b in zip(ours, figures[name]["stall_s"], strict=True)]
        for name in WAYS
        if name != "raytrainer"
    }
    return {
        "what": "seconds of one save: the loop's stall, until it is on disk, and to load; ratios of stalls round by round",
        "megabytes": sum(tensor.nbytes for tensor in tensors(state)) / 1e6,
        "tensors": len(tensors(state)),
        "device": device,
        "loaded_back_bit_for_bit": True,
        **{name: {key: report.spread(value) for key, value in found.items()} for name, found in figures.items()},
        "first_stall_s": first,
        "ratios": {name: report.spread(value) for name, value in ratios.items()},
        "goal": {"ratios": GOALS},
        "holds": {name: statistics.median(ratios[name]) <= most for name, most in GOALS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--directory", type=Path, help="where to save; default: the machine's temporary directory")
    options = parser.parse_args()
    report.write("checkpoint", compare(options.megabytes, options.rounds, directory=options.directory))


if __name__ == "__main__":
    main()
