"""Start or resume a run: check the composition, lock the run directory, write the record and run the driver."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from raytrainer import preflight, tracking, worker
from raytrainer.attempt.driver import Driver
from raytrainer.attempt.locking import locked_attempt, refuse_existing, shown, storage_path
from raytrainer.attempt.outcome import Outcome
from raytrainer.attempt.record import Record, experiment_name, next_attempt, tracking_uri
from raytrainer.config import (
    CheckpointConfig,
    Composition,
    Experiment,
    check_modes,
    checkpoint_mode,
    mode_problem,
    with_modes,
)
from raytrainer.errors import ConfigError, StorageError, TrackingError
from raytrainer.progress import Display
from raytrainer.storage import Storage
from raytrainer.storage.lock import leases_in, named


def check(
    composition: Composition,
    record: Record | None = None,
    *,
    first_batch: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Check everything that can be checked before the start. Return a description of where the run would train.

    Args:
        composition: What to train.
        record: The record of the run to resume; None for a new run.
        first_batch: Whether to run the first-batch probe, unless `preflight.first_batch=false`.
        say: Called with the result of the probe.

    Raises:
        Refused: A check failed.
    """
    where, gpu = _checked(composition, record)
    if record is not None:
        preflight.refuse(_in_use(composition.experiment))
    if first_batch:
        probe_first_batch(composition, gpu, say)
    return where


def probe_first_batch(composition: Composition, gpu: bool, say: Callable[[str], None]) -> None:
    """Run the first-batch probe and wait for its verdict.

    Args:
        composition: What to train.
        gpu: Whether the run would train on GPUs.
        say: Called with the verdict.

    Raises:
        PreflightError: The run would fail at its first step.
    """
    e = composition.experiment
    reason = preflight.why_not_tried(e)
    if reason is None:
        verdict = preflight.FirstBatch(with_modes(composition).text, e, gpu=gpu).run()
    else:
        verdict = preflight.Verdict("skipped", reason)
    verdict.refuse()
    if words := verdict.words():
        say(words)


def _checked(composition: Composition, record: Record | None) -> tuple[str, bool]:
    """Run all checks of this process. Return a description of where the run would train, and whether on GPUs."""
    e = composition.experiment
    preflight.check_objects(e)
    if record is None:
        check_modes(e, objects=True)
    try:
        storage = Storage(storage_path(e)).child(e.name or "")
    except StorageError as error:
        raise ConfigError(f"cannot be used: {error}", key="storage_path", value=shown(e)) from error
    has_own = e.evaluate is not None or (record is not None and storage.exists("checkpoints"))
    if e.init_from is not None and not has_own:  # otherwise it continues from its own checkpoints
        preflight.check_init_from(e, _runs_of(tracking_uri(e, record.tracking_uri if record else "")))
    if e.debug:
        return "inline, one batch", False
    # This check comes first: without it, another call to a storage that does not answer would wait for minutes.
    unusable = preflight.check_storage(storage.check_writable, shown(e))
    if record is None and not unusable:
        refuse_existing(e, storage)
    available, where = e.backend.resources(e) or (preflight.this_machine(), "this machine")
    uri = tracking_uri(e, record.tracking_uri if record else "")
    odd = tracking.variable_problems(os.environ, uri)
    # A resumed run has its experiment in MLflow already.
    name = experiment_name(composition) if record is None else None
    preflight.refuse(
        [
            *preflight.check_environment(e, os.environ),
            *preflight.check_resources(e, available, where),
            *preflight.check_reach(e, uri),
            *unusable,
            *(
                odd
                or preflight.check_tracking(
                    partial(tracking.check_tracking, experiment_name=name), uri, e.tracking.required
                )
            ),
        ]
    )
    gpu = preflight.uses_gpu(e, available)
    return _where(e, gpu), gpu


def launch(
    composition: Composition,
    *,
    argv: Sequence[str] = (),
    record: Record | None = None,
    changed: Sequence[str] = (),
    display: Display | None = None,
    job: Mapping[str, str] | None = None,
) -> Outcome:
    """Train an experiment to its end, on the cluster of its config.

    Args:
        composition: What to train.
        argv: The command line, for the records.
        record: The record of the run to resume from its last checkpoint; None for a new run.
        changed: The `optimizer.…` keys whose new values replace those in the checkpoint.
        display: The display for progress.
        job: The job on a shared cluster, as in `Record.job`.

    Raises:
        Refused: The run was refused before anything started.
        Stopped: A signal arrived before anything started.
    """
    e, launched = composition.experiment, time.time()
    display = display or Display()
    if e.debug:
        return _debug(composition, display)
    # This is outside `locked_attempt`, whose signal handlers could raise in the middle of a library's import. Nothing
    # has started yet, so the caller's own signal handling suffices.
    where, gpu = _checked(composition, record)
    if e.preflight.first_batch is True and e.backend.ray != "none":
        probe_first_batch(composition, gpu, display.say)
    composition = with_modes(composition)
    with locked_attempt(e, new=record is None, display=display, argv=argv, job=job) as attempt:
        record = next_attempt(record, composition, attempt.storage, launched=launched, job=job, changed=changed)
        attempt.prepare(record, where)
        probe = _probe_beside_ray(composition, record, gpu)
        if probe is None:  # otherwise the driver records the run unless the probe refuses it
            attempt.record_start(composition)
        else:
            attempt.held.callback(probe.close)
        attempt.open_logs()
        display.say(f"{record.name}: {where}")
        if best := best_words(e):
            display.say(best)
        if record.attempts > 1 and (problem := mode_problem(e, objects=True)):
            display.say(f"warning: {problem}. This run keeps the mode that it was recorded with.")
        outcome = attempt.run(Driver(composition, attempt, probe))
    seconds = max(0.0, outcome.record.ended - launched)
    return replace(outcome, seconds=seconds, length=_reached_limit(e, outcome.result))


def _in_use(e: Experiment) -> list[str]:
    """Return a problem for each live process on this machine that holds the lock of the run."""
    lock = Storage(storage_path(e)).child(e.name or "").child("lock")
    held = (lease for lease in leases_in(lock) if lease.held and lease.is_here and lease.lives)
    return [f"{lock.display} is in use by {named(lease.owner)}" for lease in held]


def _probe_beside_ray(composition: Composition, record: Record, gpu: bool) -> preflight.FirstBatch | None:
    """Start the first-batch probe of a new run if a core is free while Ray starts; else return None."""
    e = composition.experiment
    wanted = e.preflight.first_batch == "auto" and e.backend.ray == "embedded" and e.evaluate is None
    if (
        not wanted
        or record.attempts > 1
        or not preflight.is_free_beside_ray()
        or preflight.why_not_tried(e) is not None
    ):
        return None
    probe = preflight.FirstBatch(composition.text, e, gpu=gpu, beside_ray=True)
    probe.start()
    return probe


def _reached_limit(e: Experiment, result: Mapping[str, Any] | None) -> str:
    """Return the key of the limit that ended the run. A higher value lets the run continue."""
    t, ended = e.trainer, result or {}
    if t.max_time is not None and (ended.get("reason") == "max_time" or (t.max_steps is None and t.max_epochs is None)):
        return "trainer.max_time"
    by_steps = t.max_steps is not None and (t.max_epochs is None or ended.get("step") == t.max_steps)
    return "trainer.max_steps" if by_steps else "trainer.max_epochs"


def _debug(composition: Composition, display: Display) -> Outcome:
    """Train one batch in this process without Ray, tracking and checkpoints. Errors are not wrapped, for a debugger."""
    from raytrainer.progress import Reporter
    from raytrainer.trainer import Trainer

    e, began = composition.experiment, time.monotonic()
    _checked(composition, None)
    trainer = Trainer(e, world=worker.inline_world(e.scaling.use_gpu), listeners=[Reporter(display.show)])
    if e.init_from is not None:
        display.say(trainer.init_from(e.init_from, _runs_of(tracking_uri(e))))
    result = trainer.fit()
    display.close()
    values = {**asdict(result), "metrics": dict(result.metrics), "monitor": e.checkpoint.monitor}
    where = "inline, one batch: no tracking, no checkpoint"
    seconds = time.monotonic() - began
    return Outcome("FINISHED", 0, Record(e.name or "", ""), where, values, seconds=seconds, step=result.step)


def _runs_of(uri: str) -> Callable[[str], str | None]:
    """Return a function that finds a run's directory by its ID in the tracking store, or returns None on errors."""

    def look_up(identifier: str) -> str | None:
        with suppress(TrackingError):
            return tracking.find_own_dir(uri, identifier)
        return None

    return look_up


def best_words(e: Experiment) -> str | None:
    """Return a line that says which value of the monitor is the best, because its mode may be derived from its name.
    Return None if the monitor is the default, if there is no validation data, or if the run only evaluates."""
    if e.evaluate is not None or not e.data.val_sets or e.checkpoint.monitor == CheckpointConfig().monitor:
        return None
    highest = "highest" if checkpoint_mode(e) == "max" else "lowest"
    return f"the {highest} {e.checkpoint.monitor} is the best (checkpoint.mode={checkpoint_mode(e)})"


def _where(e: Experiment, gpu: bool) -> str:
    n = e.scaling.num_workers
    workers = f"{n[0]} to {n[1]} workers" if isinstance(n, list) else f"{n} worker{'' if n == 1 else 's'}"
    device = "GPU" if gpu else "CPU"
    if e.backend.ray == "none":
        return f"inline, in this process, on {device}"
    place = "local Ray" if e.backend.ray == "embedded" else f"Ray at {e.cluster.address or 'auto'}"
    return f"{place}, {workers} on {device}"
