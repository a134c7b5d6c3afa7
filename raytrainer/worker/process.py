"""A training process: a Ray Train worker or, inline, the launching process. It determines the rank and the device."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

from raytrainer import errors
from raytrainer.core import streams
from raytrainer.progress import to_line
from raytrainer.worker.job import WorkerJob
from raytrainer.worker.training import no_report, run

_stop = threading.Event()  # set in each worker's process by `request_stop`

# Errors that a retry cannot fix. A restart would only occupy the GPUs again.
_NON_RETRYABLE = (
    errors.Refused,
    errors.DataError,
    errors.NonFiniteLoss,
    errors.CheckpointError,
    errors.StorageFull,
    errors.StorageGone,
    errors.StorageLocked,
    TypeError,
    ValueError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    ImportError,
    NotImplementedError,
    SyntaxError,
)


def request_stop() -> None:
    """Ask this worker to end after the next log, with a checkpoint. All ranks end after the same step."""
    _stop.set()


def on_ray(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in a Ray Train worker. Ray provides the rank and the device.

    Raises:
        WorkerError: Any error of training, with rank, node, time and traceback. Any process can unpickle it.
    """
    _stop.clear()
    # Without Ray's arguments, because child processes inherit them, and a user's module may parse them on import.
    sys.argv = sys.argv[:1]
    rank = -1
    try:
        import ray.train
        import ray.train.torch

        # Otherwise Ray logs the exception of the training function. The driver shows the first error of all ranks.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        from raytrainer.parallel import World

        context = ray.train.get_context()
        rank = context.get_world_rank()
        hello(rank, job.get("label", ""))
        device, node = ray.train.torch.get_device(), context.get_node_rank()
        world = World(rank, context.get_world_size(), context.get_local_rank(), device, node)
        own = WorkerJob(**job)
        result = run(own, world, emit=_say, should_stop=_stop.is_set, report=_report if own.reports else no_report)
        _say({"kind": "end"})  # the launching process waits for this line, after which the output is complete
        return result
    except BaseException as error:  # also sys.exit() in a script, which must not end the process
        raise described(error, rank) from error


def hello(rank: int, label: str = "") -> None:
    """Announce this process's rank and label to the launching process, for the output that follows."""
    streams.take_any_text()
    _say({"kind": "hello", "rank": rank, "label": label, "pid": os.getpid(), "host": socket.gethostname()})


def _say(message: dict[str, Any]) -> None:
    # One write, so that lines of two threads do not mix.
    sys.stdout.write(to_line(message) + "\n")
    sys.stdout.flush()


def _report(trainer: Any, ends: bool) -> None:
    """Report an evaluation of a trial from all ranks to Ray Train's controller. Return when the trial may continue.

    Ray's `report` puts a report into a queue of size one, which the controller empties when it polls. After it come two
    empty reports: the first waits until the controller has taken the evaluation, the second until it has handled it and
    polls again.
    """
    import ray.train

    ray.train.report(
        {"step": trainer.step, "metrics": dict(trainer.metrics), "evaluations": trainer.evaluations, "ends": ends}
    )
    for _ in range(0 if ends else 2):
        ray.train.report({})


def described(error: BaseException, rank: int) -> errors.WorkerError:
    """Return an exception of a worker as a `WorkerError`."""
    first = str(error).strip() or "(no message)"
    return errors.WorkerError(
        f"{type(error).__name__}: {first}",
        rank=rank,
        node=socket.gethostname(),
        traceback="".join(traceback.format_exception(error)),
        when=time.time(),
        retry=not isinstance(error, _NON_RETRYABLE) and "out of memory" not in first,
    )


def inline_world(use_gpu: Any) -> Any:
    """Return the world of one process without Ray Train, on a GPU if there is one and `scaling.use_gpu` allows it."""
    import torch

    from raytrainer.parallel import World

    if use_gpu is True and not torch.cuda.is_available():
        raise errors.ConfigError("is set, and this machine has no usable GPU", key="scaling.use_gpu", value=True)
    return World(device=torch.device("cuda", 0) if use_gpu and torch.cuda.is_available() else torch.device("cpu"))
