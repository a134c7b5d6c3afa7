"""Train a run with Ray Train: start the workers, watch them, and end them when the run is asked to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raytrainer import preflight, worker
from raytrainer.attempt.lifecycle import Attempt
from raytrainer.attempt.waiting import Waiting, selected_nodes
from raytrainer.core.background import in_background
from raytrainer.core.interrupts import Interrupted

if TYPE_CHECKING:
    from raytrainer.ray_internals import SupervisedTrainer, WorkerOutput

_SAVE_S, _KILL_S = 5.0, 3.0  # for workers to save a checkpoint after a first Ctrl-C or SIGTERM; then to be killed
_OUTPUT_S = 5.0  # for the last lines of the workers to arrive


def train_on_ray(
    attempt: Attempt, job: worker.WorkerJob, available: preflight.Resources, output: WorkerOutput
) -> Mapping[str, Any]:
    """Train until the run ends or is asked to stop, and end all workers.

    Args:
        attempt: The attempt.
        job: The job of the workers.
        available: The resources that the cluster has and can add.
        output: Receives what the workers print.

    Returns:
        The values of `FitResult`.

    Raises:
        Stopped: The run was asked to stop, and the workers did not end in time or had not started.
        WorkerError: A worker failed, and is not restarted.
        ClusterLost: A process of Ray has died.
        StorageLocked: Another process took over the directory while this one had no contact.
    """
    from raytrainer import ray_internals

    gpu = preflight.uses_gpu(attempt.e, available)
    trainer, waiting = _make_trainer(attempt, job, gpu=gpu), _make_waiting(attempt, available, gpu=gpu)
    done = threading.Event()
    # Not in the main thread, which waits for signals, and in which Ray Train would install its own SIGINT handler.
    fit = in_background(trainer.fit, "ray-train")
    fit.add_done_callback(lambda _: done.set())
    try:
        while not done.wait(1.0):
            if attempt.stop_requested():
                _stop_workers(attempt, trainer, done)
                break
            attempt.check_alive()
            waiting.look(trainer.waits, time.monotonic())
    except Interrupted:
        _stop_workers(attempt, trainer, done)
    finally:
        if not ray_internals.dead_part():
            trainer.abandon(done, _KILL_S)
    if error := fit.exception():
        raise trainer.first_error(error)
    output.wait_for_end(_OUTPUT_S)
    result: Mapping[str, Any] = fit.result().return_value
    return result


def _make_trainer(attempt: Attempt, job: worker.WorkerJob, *, gpu: bool) -> SupervisedTrainer:
    from raytrainer import ray_internals

    e, scaling = attempt.e, attempt.e.scaling
    n = scaling.num_workers
    return ray_internals.make_trainer(
        job,
        num_workers=(n[0], n[1]) if isinstance(n, list) else n,
        use_gpu=gpu,
        resources_per_worker=scaling.resources_per_worker,
        placement_strategy=scaling.placement_strategy,
        accelerator_type=scaling.accelerator_type,
        label_selector=scaling.label_selector,
        max_failures=e.failure.max_failures,
        max_preemption_failures=e.failure.max_preemption_failures,
        ray_storage=attempt.storage,
        attempt=f"attempt-{attempt.record.attempts}",
        progress=lambda: attempt.display.step,
        on_retry=attempt.display.say,
    )


def _make_waiting(attempt: Attempt, available: preflight.Resources, *, gpu: bool) -> Waiting:
    """Return the display of what the run waits for."""
    from raytrainer import ray_internals

    e, scaling = attempt.e, attempt.e.scaling
    least = preflight.least_workers(e)
    wanted = {name: share * least for name, share in preflight.per_worker(e, gpu).items()}
    nodes_wanted = selected_nodes(scaling.accelerator_type, scaling.label_selector)
    return Waiting(attempt.display, ray_internals, wanted, available, nodes_wanted)


def _stop_workers(attempt: Attempt, trainer: SupervisedTrainer, done: threading.Event) -> None:
    """Ask the workers to save a checkpoint and end, after a first signal.

    Raises:
        Stopped: The workers have not ended within 5 s, or have not started yet.
    """
    attempt.display.say(f"{attempt.interrupts.reason}: saving a checkpoint, then stopping (again: at once)")
    if not (trainer.ask_to_stop() and done.wait(_SAVE_S)):
        raise attempt.interrupts.stopped()
