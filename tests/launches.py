"""Start whole launches as processes, watch them step by step, kill them and inspect what they leave behind.
The integration and fault tests use this module. What a launch trains with is in tests/outside/.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from raytrainer.checkpoint import Checkpointer, CheckpointInfo
from raytrainer.storage import Storage
from raytrainer.sweep import Trial, TrialJournal
from tests import forkserver
from tests.promises import Within

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = Path(__file__).parent / "outside"
START_S = 120.0  # the longest that a launch may take to its first step, on a loaded machine
ENDS_S = 20.0  # the longest that anything may outlive a killed driver
# Prefixes of keys that measure time. Two runs never have equal values for them.
_MEASURED = ("system/", "checkpoint/stall_seconds", "train/samples_per_second")
_OF_SWEEP = "best/"  # the prefix of a key that a run outside a sweep does not have


class Step(NamedTuple):
    """A step that `probes.Steps` recorded: the process that did it, and the time in monotonic seconds."""

    pid: int
    step: int
    time: float


@dataclass(frozen=True)
class Ended:
    """How a launch ended, and what it wrote."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    def exits(self, code: int) -> Ended:
        """Assert the exit code. A failure shows the whole output."""
        assert self.code == code, f"not {code}: {self}"
        return self


@functools.cache
def empty_store() -> bytes:
    """Return the content of a new MLflow database: its tables exist, and it has no runs."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


class Launch:
    """`python -m raytrainer ARGUMENTS` (or another `program`) in `folder`, in its own session, like a terminal's foreground
    job.

    Args:
        environment: Variables in addition to those of the test.
        store: Put an empty MLflow database into the folder, because creating one costs each launch a second.
        fresh: Start a new interpreter. Needed for a test of what happens before the configuration is composed, or of how
            long that takes. Otherwise `tests/forkserver.py` forks the launch if this makes no other difference.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "raytrainer"),
        store: bool = True,
        fresh: bool = False,
    ) -> None:
        self.folder, self._mark = folder, uuid.uuid4().hex
        self._out, self._err = (folder / f"launch-{next(self._numbers)}.{kind}" for kind in ("out", "err"))
        self.steps = folder / "steps"
        if store and "raytrainer" in program and not (folder / "mlflow.db").exists():
            (folder / "mlflow.db").write_bytes(empty_store())
        self.began = time.monotonic()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(OUTSIDE), str(ROOT)]
            ),  # in a git worktree, another checkout is installed
            "LAUNCH_MARK": self._mark,
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | forkserver.Forked
        if not fresh and forkserver.server().can_start(environment):
            self.process = forkserver.server().start(program, arguments, folder, self._out, self._err, environment)
            return
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=environment,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> Ended:
        """Return what it has written so far. The exit code is -999 while it runs."""
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err))
        code = self.process.poll()
        return Ended(-999 if code is None else code, out, err)

    def wait(self, timeout_s: float = 180.0) -> Ended:
        """Wait until it ends, at most `timeout_s`, and return its output."""
        within = Within(timeout_s)
        while True:
            try:
                self.process.wait(timeout_s)
                return self.output()
            except subprocess.TimeoutExpired:
                within.check(f"the launch did not end\n{self.output()}")
                timeout_s = 1.0

    def until(self, what: str, found: Callable[[], Any], timeout_s: float = START_S) -> Any:
        """Wait until `found()` is true and return its value. Fail if the launch ends before that."""
        within = Within(timeout_s)
        while not (value := found()):
            assert self.process.poll() is None, f"it ended before: {what}\n{self.output()}"
            if within.took() > timeout_s:
                within.check(f"{what}\n{self.output()}")
            time.sleep(0.005)
        return value

    def said(self, text: str, timeout_s: float = START_S) -> None:
        """Wait until it has printed `text` to stderr."""
        self.until(f"it prints {text!r}", lambda: text in self._err.read_text(errors="replace"), timeout_s)

    def reaches(self, step: int, rank: int = 0, *, but: frozenset[int] = frozenset()) -> Step:
        """Wait until `rank` has done `step` in a process that is not in `but`. Return the last step that the rank has
        done."""

        def found() -> Step | None:
            steps = steps_of(self.steps, rank)
            return steps[-1] if steps and steps[-1].step >= step and steps[-1].pid not in but else None

        return self.until(f"rank {rank} does step {step}", found)  # type: ignore[no-any-return]

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the launching process only, or to its whole process group as a terminal does."""
        if group:
            os.killpg(self.pid, number)
        else:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill only the launching process, by SIGKILL."""
        self.process.kill()
        self.process.wait()

    def left(self) -> list[psutil.Process]:
        """Return the processes that it started and that still run: they are in its session, or have its mark in their
        environment."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def nothing_left(self, within_s: float = 10.0) -> float:
        """Wait until `left` is empty. Return the seconds that this took."""
        within = Within(within_s)
        while left := self.left():
            names = [f"{process.pid} {name_of(process)[:120]}" for process in left]
            within.check(f"still there: {names}\n{self.output()}")
            time.sleep(0.1)
        return within.took()

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # Ray's workers write their titles over their environment, so only the session identifies them.
            return os.getsid(process.pid) == self.pid or process.environ().get("LAUNCH_MARK") == self._mark
        except (psutil.Error, ProcessLookupError, PermissionError):
            return False

    def end(self) -> None:
        """Kill whatever is left of it. A test calls this at its end, even if it failed."""
        for process in self.left():
            with suppress(psutil.Error):
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return "gone"


@contextmanager
def launch(folder: Path, *arguments: str, **more: Any) -> Iterator[Launch]:
    """Yield a launch that does not outlive the test. `more` goes to `Launch`."""
    started = Launch(folder, *arguments, **more)
    try:
        yield started
    finally:
        started.end()


def launched(folder: Path, *arguments: str, **more: Any) -> Ended:
    """Run a launch to its end. It must leave no process behind."""
    with launch(folder, *arguments, **more) as started:
        ended = started.wait()
        started.nothing_left()
        return ended


def observed(pause_s: float = 0.0) -> list[str]:
    """Return arguments that make every rank record each step below ./steps (tests/outside/probes.py) and then pause."""
    return ["+callbacks.steps._target_=probes.Steps", f"+callbacks.steps.pause_s={pause_s}"]


def observed_trials(pause_s: float = 0.0) -> list[str]:
    """Return the same for the trials of a sweep, which record into the one file ./observed: see `seen`."""
    return ["+callbacks.observed._target_=probes.Observed", f"+callbacks.observed.pause_s={pause_s}"]


def steps_of(folder: Path, rank: int = 0) -> list[Step]:
    """Return the steps that a rank has recorded, in order."""
    try:
        lines = (folder / f"rank-{rank}").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    fields = (line.split() for line in lines if line.endswith("\n"))
    return [Step(int(pid), int(step), float(when)) for pid, step, when in fields]


def trials(folder: Path, name: str = "sweep") -> dict[str, Trial]:
    """Return the trials in a sweep's journal, by id. Empty before the journal exists."""
    return TrialJournal.open(Storage(folder / "runs" / name)).trials


class Seen(NamedTuple):
    """A line of `probes.Observed`: what a trial did, in which process, after which step, and when."""

    kind: str
    trial: str
    pid: int
    step: int
    time: float
    lr: float = math.nan
    weights: str = ""


def seen(folder: Path, kind: str = "", trial: str = "") -> list[Seen]:
    """Return what trials with `+callbacks.observed._target_=probes.Observed` have recorded, in order."""
    try:
        lines = (folder / "observed").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [Seen(**json.loads(line)) for line in lines if line.endswith("\n")]
    return [line for line in found if kind in ("", line.kind) and trial in ("", line.trial)]


def restarts(steps: list[Step]) -> list[tuple[int, int]]:
    """Return (last step before, first step after) of each change of process."""
    return [(a.step, b.step) for a, b in itertools.pairwise(steps) if a.pid != b.pid]


class Runs:
    """The MLflow database of a launch directory, read without MLflow."""

    def __init__(self, folder: Path, database: Path | None = None) -> None:
        self.folder, self.path = folder, database or folder / "mlflow.db"

    def id_of(self, name: str) -> str:
        """Return the id of the run with this name. There must be exactly one."""
        ((run_id,),) = self._query("SELECT run_uuid FROM runs WHERE name = ?", name)
        return str(run_id)

    def status(self, name: str) -> str:
        ((status,),) = self._query("SELECT status FROM runs WHERE name = ?", name)
        return str(status)

    def tags(self, name: str) -> dict[str, str]:
        return dict(self._query("SELECT key, value FROM tags WHERE run_uuid = ?", self.id_of(name)))

    def params(self, name: str) -> dict[str, str]:
        return dict(self._query("SELECT key, value FROM params WHERE run_uuid = ?", self.id_of(name)))

    def rows(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """Return key → (step, value), in the order of steps. Rows that differ only in time count as two."""
        found = defaultdict(list)
        for key, step, value, is_nan in self._query(
            "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY step", self.id_of(name)
        ):
            found[str(key)].append((int(step), math.nan if is_nan else float(value)))
        return dict(found)

    def results(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """Return the rows of keys that do not measure time. Those of two equal runs are bitwise equal."""
        return {key: rows for key, rows in self.rows(name).items() if not key.startswith((*_MEASURED, _OF_SWEEP))}

    def _query(self, text: str, *values: str) -> list[Any]:
        with closing(sqlite3.connect(f"file:{quoted(self.path)}?mode=ro", uri=True, timeout=30)) as database:
            return database.execute(text, values).fetchall()


def quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(str(path))


def record(folder: Path, name: str) -> dict[str, Any]:
    """Return the run record from the run directory."""
    found: dict[str, Any] = json.loads((folder / "runs" / name / "run.json").read_text())
    return found


def checkpoints(folder: Path, name: str) -> list[CheckpointInfo]:
    """Return the committed checkpoints of a run."""
    return Checkpointer(Storage(folder / "runs" / name / "checkpoints")).list()


def final_state(folder: Path, name: str) -> dict[str, Any]:
    """Return everything in a run's last checkpoint that is the same on every rank: see `flat_state`."""
    return flat_state(Checkpointer(Storage(folder / "runs" / name / "checkpoints")))


def flat_state(checkpointer: Checkpointer) -> dict[str, Any]:
    """Return the state of the last checkpoint as a flat mapping: weights, optimizer, position and metrics."""
    info = checkpointer.latest()
    assert info is not None
    shared, _ = checkpointer.load(info)
    return {k: v for k, v in _flat(shared, "") if "samples_per_second" not in k and not k.startswith("/callbacks")}


def assert_equal_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Assert that two states are bitwise equal."""
    import torch

    assert one.keys() == other.keys()
    assert sum(isinstance(value, torch.Tensor) for value in one.values()) > 5
    different = [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key])
    ]
    assert not different


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(below, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            yield from _flat(below, f"{path}/{number}")
    else:
        yield path, value


def summary(out: str) -> dict[str, str]:
    """Return the summary's lines by their first word. The second line of a pair has the key `next2`."""
    found: dict[str, str] = {}
    for line in out.splitlines():
        if match := re.match(r"(\w*) +(\S.*)", line):
            found[match[1] or "next2"] = match[2]
    return found


def seeded(name: str) -> random.Random:
    """Return random numbers for kill points, different each time. The seed is printed, and LAUNCH_SEED sets it."""
    seed = os.environ.get("LAUNCH_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"LAUNCH_SEED={seed} repeats the kill points of {name}")
    return random.Random(f"{seed} {name}")
