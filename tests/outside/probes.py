"""The classes with which the tests' launches train: a user's package outside raytrainer, found by PYTHONPATH. They note
what each rank does, and cause the faults."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrainer.losses import CrossEntropy


class Steps:
    """A callback: each rank appends `process, step, time` to steps/rank-N after every step, then pauses.

    The variable STEPS_PAUSE_S sets another pause for one launch of a run, without a change of the run's configuration.
    """

    def __init__(self, pause_s: float = 0.0, folder: str = "steps") -> None:
        self._pause_s, self._folder = float(os.environ.get("STEPS_PAUSE_S", pause_s)), Path(folder)
        self._file = -1

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        self._file = os.open(self._folder / f"rank-{trainer.world.rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_step_end(self, trainer: Any, event: Any) -> None:
        os.write(self._file, f"{os.getpid()} {event.step} {time.monotonic()}\n".encode())
        time.sleep(self._pause_s)


class Misbehaves:
    """A callback: after `step`, on `rank` alone, it raises, sleeps forever, or prints `megabytes` MiB."""

    def __init__(self, step: int, rank: int = 0, raises: str = "", sleeps: bool = False, megabytes: int = 0) -> None:
        self._step, self._rank, self._raises, self._sleeps, self._megabytes = step, rank, raises, sleeps, megabytes

    def on_step_end(self, trainer: Any, event: Any) -> None:
        if event.step != self._step or trainer.world.rank != self._rank:
            return
        for _ in range(self._megabytes * 1024):
            sys.stdout.write("x" * 1023 + "\n")
        if self._raises:
            raise ValueError(self._raises)
        while self._sleeps:
            time.sleep(1)


class NanAfter(CrossEntropy):
    """The cross entropy, which becomes NaN after its first `calls` evaluations in training."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__(**options)
        self._left = calls

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        values = super().__call__(model, batch)
        if model.training:
            self._left -= 1
            if self._left < 0:
                values["loss"] = values["loss"] * torch.nan
        return values


class Digest:
    """A callback that proves that a value reached rank 0 without writing it: the file `path` gets its SHA-256."""

    def __init__(self, value: str, path: str) -> None:
        self.value, self.path = value, path

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        if trainer.world.rank == 0:
            Path(self.path).write_text(hashlib.sha256(self.value.encode()).hexdigest())


class Observed:
    """A callback: rank 0 of each trial appends JSON lines to the file `path`: what it does, in which process, and when.

    The kinds are `start` (with its step and weights), `step` (with the learning rate) and `evaluation` (with the
    weights). The weights are a hash of them and of the optimizer's state.
    """

    def __init__(self, pause_s: float = 0.0, path: str = "observed") -> None:
        self._pause_s, self._path = pause_s, Path(path).absolute()
        self._trial, self._file = "", -1

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        if trainer.world.rank == 0:
            self._trial = Path(str(trainer.checkpointer._storage.uri)).parent.name
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._note("start", trainer.step, weights=_hash(trainer))

    def on_step_end(self, trainer: Any, event: Any) -> None:
        self._note("step", event.step, lr=float(trainer.optimizer.param_groups[0]["lr"]))
        time.sleep(self._pause_s)

    def on_eval_end(self, trainer: Any, event: Any) -> None:
        self._note("evaluation", event.step, weights=_hash(trainer))

    def _note(self, kind: str, step: int, **more: Any) -> None:
        if self._file >= 0:
            about = {"kind": kind, "trial": self._trial, "pid": os.getpid(), "step": step, "time": time.monotonic()}
            os.write(self._file, json.dumps({**about, **more}).encode() + b"\n")


def _hash(trainer: Any) -> str:
    found = hashlib.sha256()
    for _, tensor in sorted(trainer.raw_model.state_dict().items()):
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for state in trainer.optimizer.state.values():
        for _, value in sorted(state.items()):
            found.update(torch.as_tensor(value).detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class Changes:
    """A callback: after `step` it changes something that a process has only once, and never restores it."""

    def __init__(self, what: str, step: int = 5) -> None:
        self._change, self._step = getattr(self, f"_{what}"), step

    def on_step_end(self, trainer: Any, event: Any) -> None:
        if event.step == self._step:
            self._change(trainer)

    def _nothing(self, trainer: Any) -> None:
        pass

    _quiet = _nothing  # two values with the same meaning, for a sweep over them

    def _raises(self, trainer: Any) -> None:
        raise ValueError("bad luck")

    def _diverges(self, trainer: Any) -> None:
        with torch.no_grad():
            for parameter in trainer.raw_model.parameters():
                parameter.fill_(torch.nan)

    def _memory(self, trainer: Any) -> None:
        kept = []
        while True:  # until it is killed
            kept.append(np.ones(2**22))  # 32 MiB, each page touched
            time.sleep(0.005)

    def _dtype(self, trainer: Any) -> None:
        torch.set_default_dtype(torch.float64)

    def _device(self, trainer: Any) -> None:
        torch.set_default_device("meta")

    def _seeds(self, trainer: Any) -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    def _threads(self, trainer: Any) -> None:
        torch.set_num_threads(2)

    def _arithmetic(self, trainer: Any) -> None:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("medium")
        torch.backends.mkldnn.set_flags(_enabled=False)

    def _gradients(self, trainer: Any) -> None:
        torch.set_grad_enabled(False)

    def _exits(self, trainer: Any) -> None:
        sys.exit("enough")

    def _interrupts(self, trainer: Any) -> None:
        raise KeyboardInterrupt

    def _hooks(self, trainer: Any) -> None:
        torch.nn.modules.module.register_module_forward_hook(lambda module, given, result: result * 1.001)
        torch.optim.optimizer.register_optimizer_step_pre_hook(lambda *_: None)

    def _debugging(self, trainer: Any) -> None:
        torch.autograd.set_detect_anomaly(True)
        torch._dynamo.config.recompile_limit = 1
        gc.disable()

    def _environment(self, trainer: Any) -> None:
        os.environ["OMP_NUM_THREADS"] = "7"
        os.environ["HOME"] = "/nowhere"
        del os.environ["PATH"]

    def _folder(self, trainer: Any) -> None:
        os.chdir("/")

    def _warnings(self, trainer: Any) -> None:
        warnings.simplefilter("error")

    def _path(self, trainer: Any) -> None:
        sys.path.clear()

    def _output(self, trainer: Any) -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123

    def _thread(self, trainer: Any) -> None:
        def forever() -> None:
            kept = [parameter.detach().clone() for parameter in trainer.raw_model.parameters()]
            while kept:
                time.sleep(0.01)

        threading.Thread(target=forever, daemon=True).start()


class Once:
    """A callback: after `step` it raises or is killed, as `what` says, but only once in its working directory."""

    def __init__(self, what: str, step: int) -> None:
        self._what, self._step, self._mark = what, step, Path(f"once-{what}").absolute()

    def on_step_end(self, trainer: Any, event: Any) -> None:
        if event.step != self._step or self._what == "nothing" or self._mark.exists():
            return
        self._mark.touch()
        if self._what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(f"{self._what}, this once")


class Meets:
    """A callback: after `step` it waits until `count` trials run at the same time."""

    def __init__(self, count: int, step: int = 1, within_s: float = 60.0) -> None:
        self._count, self._step, self._within_s, self._folder = count, step, within_s, Path("meets").absolute()

    def on_step_end(self, trainer: Any, event: Any) -> None:
        if event.step != self._step:
            return
        self._folder.mkdir(exist_ok=True)
        (self._folder / str(os.getpid())).touch()
        deadline = time.monotonic() + self._within_s
        while len(list(self._folder.iterdir())) < self._count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {self._count} at a time in {self._within_s:g} s")
            time.sleep(0.01)


class SlowToEnd:
    """A dataset whose iteration takes `seconds` to close, like one with worker processes."""

    def __init__(self, seconds: float, rows: int = 64) -> None:
        self._seconds, self._rows = seconds, rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with contextlib.ExitStack() as ends:
            ends.callback(time.sleep, self._seconds)
            for number in range(self._rows):
                yield {"image": torch.full((64,), number / self._rows), "label": torch.tensor(number % 10)}


def pipeline(rows: int) -> Any:
    """Return a Ray Data pipeline of the first digits, each with its number."""
    import ray

    return ray.data.range(rows, override_num_blocks=4).map_batches(_digits)


def _digits(batch: dict[str, Any]) -> dict[str, Any]:
    from raytrainer.data import Digits

    found = Digits("train").__getitems__(batch["id"])
    return {**batch, "image": found["image"].numpy(), "label": found["label"].numpy()}


class NotesRows:
    """A transform of batches: each process appends the epoch and the row numbers to rows/PID."""

    def __call__(self, data: Any, samples: Tensor, epoch: int, seed: int) -> Any:
        Path("rows").mkdir(exist_ok=True)
        with Path("rows", str(os.getpid())).open("a") as file:
            file.write(json.dumps([epoch, data["id"].tolist()]) + "\n")
        return data
