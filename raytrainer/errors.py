"""The exceptions of raytrainer. They form the tree below, so that a caller can catch a whole kind of error.

RaytrainerError
├── Refused                  nothing was started; the command line exits with 2
│   ├── ConfigError          a key, type, choice or constructor argument of the configuration is wrong
│   ├── PreflightError       resources, storage or tracking server do not fit the experiment
│   └── RunNotFound          an ID names no run
├── TrainingError            a run started and failed; the command line exits with 1
│   ├── WorkerError          a worker raised or died: rank, node, cause and first traceback
│   ├── NonFiniteLoss        the loss is NaN or infinite
│   ├── DataError            a file, column or sample cannot be read
│   └── ClusterLost          Ray, or its controller, is gone
├── StorageError             a path or URI cannot be read or written
│   ├── StorageFull          no space is left at the path
│   ├── StorageGone          a run's directory was deleted or moved during the run
│   └── StorageLocked        another run owns the directory
├── CheckpointError          a checkpoint cannot be written or read
│   ├── CheckpointNotFound   there is no committed checkpoint
│   └── CheckpointCorrupt    a checksum, version or content is wrong
├── TrackingError            the tracking server cannot be used
│   ├── TrackingUnreachable  it does not answer
│   └── TrackingDenied       it refuses the credentials
├── ClusterError             a shared cluster cannot be used
│   ├── ClusterUnreachable   it does not answer
│   ├── ClusterDenied        it refuses the credentials, or they lack permissions
│   └── JobExists            it already has a job with this id
└── Stopped                  ended from outside; carries the exit code (129 hung up, 130 interrupted, 143 stopped)
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from typing import Any


class RaytrainerError(Exception):
    """The base class. Subclasses keep their fields as attributes and survive pickling between processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ calls the class with `args`, which fails if its constructor has other parameters.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[RaytrainerError], args: tuple[Any, ...], fields: dict[str, Any]) -> RaytrainerError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class Refused(RaytrainerError):
    """Nothing was started."""


class ConfigError(Refused):
    """A key, type, choice or argument of the configuration is wrong.

    Args:
        message: What is wrong, in one sentence.
        key: The dotted key, as it is written on the command line.
        value: The given value.
        choices: The valid values. The nearest to `value` (or to the last part of `key`) come first in the message.
        ranked: Whether the message shows the choices in the given order instead.
    """

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        value: Any = None,
        choices: Iterable[str] = (),
        ranked: bool = False,
    ) -> None:
        self.key, self.value, self.choices, self.ranked = key, value, tuple(choices), ranked
        super().__init__(message)

    def __str__(self) -> str:
        message = str(self.args[0])
        if self.key is None:
            return message
        assigned = "" if self.value is None else f"={_written(self.value)}"
        wanted = str(self.value) if self.value is not None else self.key.rpartition(".")[2]
        close = [] if self.ranked else nearest(wanted, self.choices)
        ordered = list(dict.fromkeys([*close, *self.choices]))
        shown = ", ".join(ordered[:12]) + (", …" if len(ordered) > 12 else "")
        return f"{self.key}{assigned} {message}" + (f"; valid: {shown}" if shown else "")


def _written(value: Any) -> str:
    """Return a value as it is written on the command line: `true`, `[1,2]`, `{a:1}`. A long text is cut."""
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(_written(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{_written(v)}' for k, v in value.items())}}}"
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"


class PreflightError(Refused):
    """Resources, storage or tracking server do not fit the experiment; `problems` has one sentence for each problem."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class RunNotFound(Refused):
    """An ID names no run."""


class TrainingError(RaytrainerError):
    """A run started and failed."""


class WorkerError(TrainingError):
    """A worker raised or died.

    Args:
        cause: One line: the exception's type and message, or how the process ended.
        rank: Its rank, if known.
        node: The address of its node, if known.
        traceback: The text of its traceback, if there is one.
        when: Seconds since the epoch. The first error of several workers is the cause; the others follow from it.
        retry: Whether a new attempt may succeed.
    """

    def __init__(
        self,
        cause: str,
        *,
        rank: int | None = None,
        node: str | None = None,
        traceback: str | None = None,
        when: float = 0.0,
        retry: bool = True,
    ) -> None:
        self.cause, self.rank, self.node, self.traceback = cause, rank, node, traceback
        self.when, self.retry = when, retry
        who = "a worker" if rank is None else f"rank {rank}"
        super().__init__(f"{who}{f' on node {node}' if node else ''}: {cause}")


class NonFiniteLoss(TrainingError):
    """The loss is NaN or infinite."""


class DataError(TrainingError):
    """A file, column or sample cannot be read."""


class ClusterLost(TrainingError):
    """Ray, or its controller, is gone."""


class StorageError(RaytrainerError):
    """A path or URI cannot be read or written."""


class StorageFull(StorageError):
    """No space is left at the path."""


class StorageGone(StorageError):
    """A run's directory was deleted or moved during the run."""


class StorageLocked(StorageError):
    """Another run owns the directory; the message names it."""


class CheckpointError(RaytrainerError):
    """A checkpoint cannot be written or read."""


class CheckpointNotFound(CheckpointError):
    """There is no committed checkpoint."""


class CheckpointCorrupt(CheckpointError):
    """A checksum, version or content of a checkpoint is wrong."""


class TrackingError(RaytrainerError):
    """The tracking server cannot be used."""


class TrackingUnreachable(TrackingError):
    """The tracking server does not answer."""


class TrackingDenied(TrackingError):
    """The tracking server refuses the credentials."""


class ClusterError(RaytrainerError):
    """A shared cluster cannot be used."""


class ClusterUnreachable(ClusterError):
    """A shared cluster does not answer."""


class ClusterDenied(ClusterError):
    """A shared cluster refuses the credentials, or they lack permissions."""


class JobExists(ClusterError):
    """A shared cluster already has a job with this id."""


class Stopped(RaytrainerError):
    """The run was ended from outside; `exit_code` says how (129 hung up, 130 interrupted, 143 stopped)."""

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """Return the choices that `word` was probably meant to be, those with the fewest changed letters first."""
    options = list(dict.fromkeys(choices))
    lower = word.lower()
    alike = set(get_close_matches(lower, [c.lower() for c in options], n=len(options) or 1, cutoff=0.5))
    distances = {c: _distance(lower, c.lower()) for c in options if c.lower() in alike}
    letters = sorted(lower)

    def rank(choice: str) -> tuple[int, bool, float]:
        # At equal distance, a choice with the same letters in another order comes first.
        other = choice.lower()
        return distances[choice], sorted(other) != letters, -SequenceMatcher(None, lower, other).ratio()

    return sorted(distances, key=rank)[:limit]


def _distance(a: str, b: str) -> int:
    """Return the Damerau-Levenshtein distance: how many letters to add, drop, replace or swap turn `a` into `b`."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(b, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
