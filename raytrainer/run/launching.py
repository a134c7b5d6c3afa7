"""From a composition to a run: what is checked, in which order, and who holds the run's directory meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from raytrainer import preflight, tracking, worker
from raytrainer.config import (
    CheckpointConfig,
    Composition,
    Experiment,
    check_modes,
    checkpoint_mode,
    mode_problem,
    with_modes,
)
from raytrainer.errors import ConfigError, PreflightError, StorageError, StorageLocked, TrackingError
from raytrainer.interrupts import Interrupts
from raytrainer.progress import Display
from raytrainer.run.driver import Driver
from raytrainer.run.logs import Logs
from raytrainer.run.record import CONFIG, Outcome, Record, resolved_nodes, tracking_uri, written_storage_path
from raytrainer.run.session import cluster_resources
from raytrainer.storage import Storage, redacted
from raytrainer.storage.lock import claims, named


def check(
    composition: Composition,
    record: Record | None = None,
    *,
    first_batch: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """All that can be known before a start; starts nothing. Returns where it would run, in words.

    Args:
        composition: What to train.
        record: The run that would go on.
        first_batch: Whether the first batch is tried, in a process of its own, unless `preflight.first_batch=false`.
        say: Told what came of that.

    Raises:
        Refused: What does not hold.
    """
    where, gpu = _checked(composition, record)
    if record is not None:
        preflight.refuse(_in_use(composition.experiment))
    if first_batch:
        try_first_batch(composition, gpu, say)
    return where


def try_first_batch(composition: Composition, gpu: bool, say: Callable[[str], None]) -> None:
    """Try the first batch in a process of its own, and wait for what it says.

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
    """All that this process can check: where the run would be, in words, and whether on GPUs."""
    e = composition.experiment
    preflight.check_objects(e)
    if record is None:
        check_modes(e, objects=True)
    try:
        storage = Storage(storage_path(e)).child(e.name or "")
    except StorageError as error:
        raise ConfigError(f"cannot be used: {error}", key="storage_path", value=shown(e)) from error
    has_own = e.evaluate is not None or (record is not None and storage.exists("checkpoints"))
    if e.init_from is not None and not has_own:  # else it goes on from those
        preflight.check_init_from(e, _runs_of(tracking_uri(e, record.tracking_uri if record else "")))
    if e.debug:
        return "inline, one batch", False
    # First: what is asked of a storage that does not answer would take its client's patience, which is minutes.
    unusable = preflight.check_storage(storage.check_writable, shown(e))
    if record is None and not unusable:
        refuse_existing(e, storage)
    if e.cluster.kind == "existing":
        available, where = _existing_resources(e)
    else:
        available, where = preflight.this_machine(), "this machine"
    uri = tracking_uri(e, record.tracking_uri if record else "")
    odd = tracking.odd_values(os.environ, uri)
    # A resumed run already has its experiment in MLflow.
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
    """Trains an experiment where its `cluster` says, to the end.

    Args:
        composition: What to train.
        argv: The command line, for the run's records.
        record: The run to go on with, from its last checkpoint; None: a new one.
        changed: The `optimizer.…` keys whose new values replace those in the checkpoint.
        display: Where progress is shown.
        job: Where on a shared cluster this is, as `Record.job`.

    Raises:
        Refused: Nothing was started.
        Stopped: A signal came before anything was started.
    """
    e, began, launched = composition.experiment, time.monotonic(), time.time()
    display = display or Display()
    if e.debug:
        return _debug(composition, display, began)
    # Outside of Interrupts: nothing is started, so the caller's own handling is right, and an exception of ours would
    # come up in the middle of a library's import.
    where, gpu = _checked(composition, record)
    if e.preflight.first_batch is True and e.cluster.kind != "inline":
        try_first_batch(composition, gpu, display.say)
    composition = with_modes(composition)
    with Interrupts() as interrupts:
        storage = Storage(storage_path(e)).child(e.name or "")
        with ExitStack() as held:
            try:
                lock = held.enter_context(storage.lock("lock", lock_owner(e.name or "", job)))
            except StorageLocked as error:
                raise PreflightError([str(error)]) from error
            if record is None:
                refuse_existing(e, storage)  # again, now that nobody else can make it
            now, written = datetime.now(UTC).isoformat(timespec="seconds"), written_storage_path(composition)
            old = record or Record(e.name or "", storage.display, created=now, storage_path=written)
            record = replace(
                old,
                # Without user and password, which stay where the config refers to.
                tracking_uri=old.tracking_uri or tracking.redacted(tracking_uri(e)),
                choices=old.choices or dict(composition.choices),
                changed=[*old.changed, *(name for name in changed if name not in old.changed)],
                experiment_name=old.experiment_name or experiment_name(composition),
                job=dict(job or {}),
                resolved=resolved_nodes(composition),
            ).begun(launched)
            trial = _trial_beside_ray(composition, record, gpu)
            if trial is None:  # else it is recorded when the trial has not refused it
                storage.write_bytes(CONFIG, composition.text.encode())
                record.write(storage)
            else:
                held.callback(trial.close)
            storage = storage.anchored()  # whoever deletes it from now on does not get a part of it back
            with Logs(storage, display) as logs:
                logs.mark("checked")
                display.say(f"{record.name}: {where}")
                if told := best_words(e):
                    display.say(told)
                if record.attempts > 1 and (problem := mode_problem(e, objects=True)):
                    display.say(f"warning: {problem}. This run keeps the mode that it was recorded with.")
                driver = Driver(composition, record, storage, display, logs, lock, interrupts, argv, where, trial)
                outcome = driver.run()
    seconds = max(0.0, outcome.record.ended - launched)
    return replace(outcome, seconds=seconds, length=_reached_limit(e, outcome.result))


def _in_use(e: Experiment) -> list[str]:
    """The problem that another process of this machine is running the run, in the words of the lock."""
    lock = Storage(storage_path(e)).child(e.name or "").child("lock")
    held = (claim for claim in claims(lock) if claim.held and claim.is_here and claim.lives)
    return [f"{lock.display} is in use by {named(claim.owner)}" for claim in held]


def _trial_beside_ray(composition: Composition, record: Record, gpu: bool) -> preflight.FirstBatch | None:
    """The trial of a new run's first batch, started where a core is free while Ray starts; None elsewhere."""
    e = composition.experiment
    wanted = e.preflight.first_batch == "auto" and e.cluster.kind == "local" and e.evaluate is None
    if (
        not wanted
        or record.attempts > 1
        or not preflight.is_free_beside_ray()
        or preflight.why_not_tried(e) is not None
    ):
        return None
    trial = preflight.FirstBatch(composition.text, e, gpu=gpu, beside_ray=True)
    trial.start()
    return trial


def _reached_limit(e: Experiment, result: Mapping[str, Any] | None) -> str:
    """The key of the limit that ended the run: a higher value of it lets the run continue."""
    t, ended = e.trainer, result or {}
    if t.max_time is not None and (ended.get("reason") == "max_time" or (t.max_steps is None and t.max_epochs is None)):
        return "trainer.max_time"
    by_steps = t.max_steps is not None and (t.max_epochs is None or ended.get("step") == t.max_steps)
    return "trainer.max_steps" if by_steps else "trainer.max_epochs"


def _debug(composition: Composition, display: Display, began: float) -> Outcome:
    """One process, no Ray, no tracking, no checkpoint, and errors as they are: for a debugger."""
    from raytrainer.progress import Reporter
    from raytrainer.trainer import Trainer

    e = composition.experiment
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
    """Finds a run's directory by its ID in the tracking store; one that cannot be asked knows none."""

    def look_up(identifier: str) -> str | None:
        with suppress(TrackingError):
            return tracking.find_own_dir(uri, identifier)
        return None

    return look_up


def best_words(e: Experiment) -> str | None:
    """Which value is kept as the best, of a metric that somebody has chosen: its mode may be derived from its name."""
    if e.evaluate is not None or not e.data.val_sets or e.checkpoint.monitor == CheckpointConfig().monitor:
        return None
    highest = "highest" if checkpoint_mode(e) == "max" else "lowest"
    return f"the {highest} {e.checkpoint.monitor} is the best (checkpoint.mode={checkpoint_mode(e)})"


def refuse_existing(e: Experiment, storage: Storage) -> None:
    """A new run never goes on with an old one by accident."""
    if storage.exists(CONFIG) or storage.exists("checkpoints"):
        raise ConfigError(
            f"is the name of a run that exists in {shown(e)}; resume {e.name} goes on with it, "
            "another name starts a new one",
            key="name",
            value=e.name,
        )


def lock_owner(name: str, job: Mapping[str, str] | None) -> dict[str, str]:
    """What the claim on a run's directory says of its owner: whoever finds it knows which job must be asked for."""
    submission = (job or {}).get("submission_id")
    return {"run": name} if submission is None else {"run": name, "job": submission}


def _where(e: Experiment, gpu: bool) -> str:
    n = e.scaling.num_workers
    workers = f"{n[0]} to {n[1]} workers" if isinstance(n, list) else f"{n} worker{'' if n == 1 else 's'}"
    device = "GPU" if gpu else "CPU"
    if e.cluster.kind == "inline":
        return f"inline, in this process, on {device}"
    place = "local Ray" if e.cluster.kind == "local" else f"Ray at {e.cluster.address or 'auto'}"
    return f"{place}, {workers} on {device}"


def storage_path(e: Experiment) -> str:
    assert e.storage_path is not None  # the configuration makes it absolute
    return e.storage_path


def shown(e: Experiment) -> str:
    """`storage_path` without a password, for messages."""
    return redacted(storage_path(e))


def experiment_name(composition: Composition) -> str:
    chosen = dict(composition.choices).get("experiment")
    return composition.experiment.tracking.experiment_name or chosen or "raytrainer"


def _existing_resources(e: Experiment) -> tuple[preflight.Resources, str]:
    """What a running cluster has, and may have when it grows; it is joined from now on."""
    from raytrainer import supervise

    supervise.prepare(embedded=False)
    address = e.cluster.address or "auto"
    try:
        if address != "auto":
            supervise.find_cluster(address)
        found = supervise.attach(address, e.cluster.runtime_env, e.name or "")
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"is no running Ray cluster: {first}", key="cluster.address", value=address) from error
    return cluster_resources(e), f"the cluster at {found}"
