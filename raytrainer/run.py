"""The driver of one run: preflight, the MLflow run, Ray Train (or this process), and the one true terminal status.

`launch` is all of it; what it keeps of a run on disk is `Record`, beside the run's config, logs and checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import psutil

from raytrainer import preflight, provenance, tracking, worker
from raytrainer.config import Composition, Experiment, flattened
from raytrainer.errors import ClusterLost, ConfigError, RaytrainerError, Stopped, StorageError, WorkerError
from raytrainer.interrupts import Interrupts
from raytrainer.progress import Display, duration
from raytrainer.storage import Storage

if TYPE_CHECKING:
    from raytrainer.supervise import SupervisedTrainer

T = TypeVar("T")
_GRACE_S = 6.0  # from a first Ctrl-C or SIGTERM until the workers are ended without a checkpoint
_CLOSE_S, _CLOSE_STOPPED_S = 30.0, 3.0  # how long the tracking server is waited for at the end
_RECORD = "run.json"
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Record:
    """What a run's directory says of it, so that a later command finds and goes on with it.

    Attributes:
        name: The run's name.
        run_dir: Its storage, a path or URI.
        run_id: In MLflow; None without tracking.
        tracking_uri: Where that is.
        experiment_name: Its MLflow experiment.
        status: RUNNING, or how it ended.
        attempts: How often it was launched, the first included.
    """

    name: str
    run_dir: str
    run_id: str | None = None
    tracking_uri: str = ""
    experiment_name: str = ""
    status: str = "RUNNING"
    attempts: int = 0
    created: str = ""

    def write(self, storage: Storage) -> None:
        storage.write_bytes(_RECORD, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, storage: Storage) -> Record | None:
        """The record in a run's directory; None where there is none.

        Raises:
            StorageError: It is there and is no record.
        """
        data = storage.read_if_exists(_RECORD)
        if data is None:
            return None
        try:
            found = json.loads(data)
            # Those of a later version may hold more.
            return cls(**{k: v for k, v in found.items() if k in cls.__dataclass_fields__})
        except (ValueError, TypeError, AttributeError) as error:
            raise StorageError(f"{storage.uri}/{_RECORD} is no record of a run: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """How a launch ended, as its summary tells it.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        exit_code: 0, 1, 130 or 143.
        record: The run.
        where: E.g. `local Ray, 2 workers on CPU`.
        result: What `FitResult` holds; None if training did not end by itself.
        cause: Why it failed, in a line.
        traceback: Of the worker that failed first.
        mlflow: The address to open; None without tracking.
        mlflow_command: The command that opens it where there is no server.
        seconds: From launch to end.
        length: The key that says how long the run is, for going on with it.
    """

    status: str
    exit_code: int
    record: Record
    where: str
    result: Mapping[str, Any] | None = None
    cause: str | None = None
    traceback: str | None = None
    mlflow: str | None = None
    mlflow_command: str | None = None
    seconds: float = 0.0
    length: str = "trainer.max_epochs"


def check(composition: Composition) -> str:
    """All that can be known before a start; starts nothing. Returns where it would run, in words.

    Raises:
        Refused: What does not hold.
    """
    e = composition.experiment
    preflight.check_objects(e)
    try:
        storage = Storage(_storage_path(e)).child(e.name or "")
        preflight.check_init_from(e, storage.uri)
    except StorageError as error:
        raise ConfigError(f"cannot be used: {error}", key="storage_path", value=e.storage_path) from error
    if e.debug:
        return "inline, one batch"
    if e.cluster.kind == "existing":
        available, where = _existing_resources(e)
    else:
        available, where = preflight.this_machine(), "this machine"
    preflight.refuse(
        [
            *preflight.check_environment(e, os.environ),
            *preflight.check_resources(e, available, where),
            *preflight.check_storage(storage.check_writable, _storage_path(e)),
            *preflight.check_tracking(tracking.check_tracking, tracking_uri(e), e.tracking.required),
        ]
    )
    return _where(e, preflight.uses_gpu(e, available))


def launch(
    composition: Composition,
    *,
    argv: Sequence[str] = (),
    record: Record | None = None,
    changed: Sequence[str] = (),
    display: Display | None = None,
) -> Outcome:
    """Trains an experiment where its `cluster` says, to the end.

    Args:
        composition: What to train.
        argv: The command line, for the run's records.
        record: The run to go on with, from its last checkpoint; None: a new one.
        changed: The `optimizer.…` keys whose new values replace those in the checkpoint.
        display: Where progress is shown.

    Raises:
        Refused: Nothing was started.
        Stopped: A signal came before anything was started.
    """
    e, began = composition.experiment, time.monotonic()
    display = display or Display()
    if e.debug:
        return _debug(composition, display, began)
    with Interrupts() as interrupts:
        where = check(composition)
        storage = Storage(_storage_path(e)).child(e.name or "")
        if record is None and storage.exists(_CONFIG):
            raise ConfigError(
                f"is the name of a run that exists in {e.storage_path}; resume {e.name} goes on with it, "
                "another name starts a new one",
                key="name",
                value=e.name,
            )
        with storage.lock("lock", {"run": e.name or ""}):
            old = record or Record(e.name or "", storage.uri, created=datetime.now(UTC).isoformat(timespec="seconds"))
            record = replace(
                old,
                tracking_uri=old.tracking_uri or tracking_uri(e),
                experiment_name=old.experiment_name or _experiment_name(composition),
                status="RUNNING",
                attempts=old.attempts + 1,
            )
            storage.write_bytes(_CONFIG, composition.text.encode())
            record.write(storage)
            with _Logs(storage, display) as logs:
                logs.mark("checked")
                display.say(f"{record.name}: {where}")
                outcome = _Driver(composition, record, storage, display, logs, interrupts, argv, changed, where).run()
    length = next(
        (k for k in ("max_steps", "max_epochs", "max_time") if getattr(e.trainer, k) is not None), "max_epochs"
    )
    return replace(outcome, seconds=time.monotonic() - began, length=f"trainer.{length}")


def tracking_uri(e: Experiment) -> str:
    """`tracking.tracking_uri` made absolute; without one the SQLite store in the current directory."""
    uri = e.tracking.tracking_uri
    if uri is None:
        return tracking.default_tracking_uri(Path.cwd())
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path.cwd() / uri.removeprefix('sqlite:///')}"
    return uri


class _Driver:
    """One attempt at a run, between its lock and its end."""

    def __init__(
        self,
        composition: Composition,
        record: Record,
        storage: Storage,
        display: Display,
        logs: _Logs,
        interrupts: Interrupts,
        argv: Sequence[str],
        changed: Sequence[str],
        where: str,
    ) -> None:
        self.composition, self.e, self.record, self.storage = composition, composition.experiment, record, storage
        self.display, self.logs, self.interrupts = display, logs, interrupts
        self.argv, self.changed, self.where = list(argv), list(changed), where
        local = storage.is_local
        # The driver sends the metrics where it reads the disk that the worker writes them to: the worker then never
        # imports mlflow, which would cost it 1.3 s.
        self.ship_here = local
        spool = (
            storage.local_path / "spool" if local else Path(tempfile.gettempdir(), "raytrainer", record.name, "spool")
        )
        self.spool_dir = spool
        self.ray_trainer: SupervisedTrainer | None = None

    def run(self) -> Outcome:
        """Trains, and closes everything whatever happens."""
        shipper: tracking.Shipper | None = None
        result: Mapping[str, Any] | None = None
        error: BaseException | None = None
        # MLflow's import and first database take seconds of their own, in which Ray's processes start.
        opening = _in_background(self._open_run, "mlflow-open")
        try:
            with self._ray() as start_training:
                self.logs.mark("ray_up")
                run = opening.result()
                self.logs.mark("mlflow_up")
                self.record = replace(self.record, run_id=run.run_id)
                self.record.write(self.storage)
                if self.ship_here:
                    shipper = tracking.Shipper(self.spool_dir, run.run_id, run.tracking_uri)
                result = start_training(self._job(run))
                self.logs.mark("trained")
        except Stopped as stopped:
            error = stopped
        except Exception as failed:  # noqa: BLE001  whatever it is, the run is closed truthfully, then it is told
            error = failed
        self.interrupts.deferred = True
        outcome = self._outcome(result, error)
        self.display.close()
        try:
            outcome = self._close(opening, shipper, outcome)
        except Stopped:
            self.display.say("forced: the run's records are kept in its directory, and sent by the next command on it")
        self.record = replace(self.record, status=outcome.status)
        self.record.write(self.storage)
        return replace(outcome, record=self.record)

    # --- the run in MLflow ----------------------------------------------------------------------------------------

    def _open_run(self) -> tracking.Run:
        origin = provenance.collect(self.argv, Path.cwd())
        e, record = self.e, self.record
        tags = {
            **origin.tags(),
            "raytrainer.name": record.name,
            "raytrainer.run_dir": record.run_dir,
            "raytrainer.where": self.where,
            **{f"raytrainer.choice.{group}": choice for group, choice in self.composition.choices},
        }
        if record.attempts > 1:
            # Parameters are written once; what a resume changes is told beside them.
            tags[f"raytrainer.resume.{record.attempts - 1}"] = " ".join(self.composition.overrides) or "(no overrides)"
        run = tracking.open_run(
            record.tracking_uri,
            record.experiment_name,
            record.name,
            params=flattened(self.composition.text),
            tags=tags,
            required=e.tracking.required,
            run_id=record.run_id,
            spool_dir=self.spool_dir,
        )
        suffix = "" if record.attempts == 1 else f"-{record.attempts}"
        run.log_text(self.composition.text, f"config{suffix}.yaml")
        if origin.patch:
            run.log_text(origin.patch, f"git{suffix}.patch")
        return run

    def _close(self, opening: Future[tracking.Run], shipper: tracking.Shipper | None, outcome: Outcome) -> Outcome:
        # Somebody waits for the end of a stopped run; what is not told in that time stays in the spool.
        patience = _CLOSE_STOPPED_S if outcome.status == "KILLED" else _CLOSE_S
        try:
            run = opening.result(timeout=patience)
        except (RaytrainerError, TimeoutError):  # it is what the outcome tells already
            return outcome
        self.record = replace(self.record, run_id=run.run_id)
        tags = {"raytrainer.exit_code": str(outcome.exit_code)}
        if outcome.result is not None:
            tags["raytrainer.reason"] = str(outcome.result["reason"])
        tags.update(self._checkpoint_tags())
        if shipper is not None:
            shipper.close(timeout_s=patience)
        run.set_tags(tags)
        if self.e.tracking.register_model and outcome.status == "FINISHED" and self.e.tracking.log_model:
            self._register(run, self.e.tracking.register_model)
        self.logs.mark("ray_down")
        self.logs.flush()
        run.log_artifact(self.logs.folder)
        if not run.finish(outcome.status, outcome.cause, timeout_s=patience):  # type: ignore[arg-type]
            self.display.say(f"MLflow does not have all of it yet; the rest is in {self.spool_dir}")
        return replace(outcome, mlflow=run.url, mlflow_command=run.ui_command)

    def _register(self, run: tracking.Run, name: str) -> None:
        try:
            version = tracking.register_model(run.tracking_uri, run.run_id, worker.MODEL_FOLDER, name)
            self.display.say(f"registered as {name}, version {version}")
        except RaytrainerError as error:
            self.display.say(f"warning: the model was not registered as {name}: {error}")

    def _checkpoint_tags(self) -> dict[str, str]:
        from raytrainer.checkpoint import Checkpointer

        checkpoints = Checkpointer(self.storage.child("checkpoints"), mode=self.e.checkpoint.mode)
        try:
            last, best = checkpoints.list(), checkpoints.best()
        except RaytrainerError as error:
            return {"raytrainer.checkpoint.last": f"unreadable: {error}"[:500]}
        tags = {"raytrainer.checkpoint.last": last[-1].path} if last else {}
        if best is not None:
            tags["raytrainer.checkpoint.best"] = best.path
        return tags

    # --- training -------------------------------------------------------------------------------------------------

    def _job(self, run: tracking.Run) -> worker.Job:
        return worker.Job(
            text=self.composition.text,
            run_dir=self.storage.uri,
            run_id=run.run_id,
            tracking_uri=run.tracking_uri,
            spool_dir=str(self.spool_dir),
            ship=not self.ship_here,
            changed=self.changed,
        )

    @contextlib.contextmanager
    def _ray(self) -> Iterator[Callable[[worker.Job], Mapping[str, Any]]]:
        """Ray, started or attached to, and ended again with everything that runs on it; yields what trains on it."""
        e = self.e
        if e.cluster.kind == "inline":
            yield self._inline
            return
        import ray

        from raytrainer import supervise

        supervise.prepare(embedded=e.cluster.kind == "local")
        machine = preflight.this_machine()
        try:
            if e.cluster.kind == "local":
                supervise.start_embedded(int(machine.cpus), int(machine.gpus), machine.memory)
                available = machine
            elif not ray.is_initialized():
                supervise.attach(e.cluster.address or "auto", e.cluster.runtime_env)
                available = preflight.Resources.of_ray(ray.cluster_resources())
            else:
                available = preflight.Resources.of_ray(ray.cluster_resources())
            self.interrupts.install()  # Ray sets a SIGTERM handler of its own
            with supervise.WorkerOutput(self.logs.message, self.logs.text):
                yield lambda job: self._on_ray(job, preflight.uses_gpu(e, available))
        finally:
            self.interrupts.deferred = True
            ray.shutdown()
            self.interrupts.deferred = False

    def _inline(self, job: worker.Job) -> Mapping[str, Any]:
        self.interrupts.deferred = True  # the first signal lets the step end; a second one raises
        self.logs.message(0, {"kind": "hello", "rank": 0, "pid": os.getpid(), "host": os.uname().nodename})
        try:
            return worker.run(
                job,
                worker.inline_world(self.e),
                emit=lambda message: self.logs.message(0, message),
                should_stop=lambda: self.interrupts.requested,
            )
        except Stopped:
            raise
        except Exception as error:
            raise worker.described(error, 0) from error

    def _on_ray(self, job: worker.Job, gpu: bool) -> Mapping[str, Any]:
        from raytrainer import supervise

        e, scaling = self.e, self.e.scaling
        n = scaling.num_workers
        trainer = self.ray_trainer = supervise.make_trainer(
            job,
            num_workers=(n[0], n[1]) if isinstance(n, list) else n,
            use_gpu=gpu,
            resources_per_worker=scaling.resources_per_worker,
            placement_strategy=scaling.placement_strategy,
            accelerator_type=scaling.accelerator_type,
            label_selector=scaling.label_selector,
            max_failures=e.failure.max_failures,
            max_preemption_failures=e.failure.max_preemption_failures,
            embedded=e.cluster.kind == "local",
            ray_storage=self.storage.uri,
            attempt=f"attempt-{self.record.attempts}",
            progress=lambda: self.display.step,
            on_retry=self.display.say,
        )
        box: dict[str, Any] = {}
        done = threading.Event()

        def fit() -> None:
            try:
                box["result"] = trainer.fit().return_value
            except BaseException as error:  # noqa: BLE001  raised in the main thread below
                box["error"] = supervise.first_error(error)
            finally:
                done.set()

        # Not in the main thread: that one waits for signals, and Ray Train's own SIGINT handler stays out.
        threading.Thread(target=fit, name="ray-train", daemon=True).start()
        try:
            while not done.wait(1.0):
                pass
        except Stopped as stopped:
            self._stop_workers(done, stopped)
        if "error" in box:
            raise box["error"]
        return box["result"]  # type: ignore[no-any-return]

    def _stop_workers(self, done: threading.Event, stopped: Stopped) -> None:
        """A first signal: the workers end after a checkpoint, or after a while without one."""
        self.display.say(f"{stopped}: saving a checkpoint, then stopping (again: at once)")
        if not (self.ray_trainer is not None and self.ray_trainer.ask_to_stop() and done.wait(_GRACE_S)):
            raise stopped

    def _outcome(self, result: Mapping[str, Any] | None, error: BaseException | None) -> Outcome:
        base = Outcome("FINISHED", 0, self.record, self.where, result)
        if error is None and not (result is not None and result["reason"] == "stopped"):
            if result is None:
                return replace(base, status="FAILED", exit_code=1, cause="training ended without a result")
            return base
        if self.interrupts.requested:
            code = self.interrupts.exit_code or 130
            return replace(base, status="KILLED", exit_code=code, cause=self.interrupts.reason)
        if isinstance(error, WorkerError):
            return replace(base, status="FAILED", exit_code=1, cause=str(error), traceback=error.traceback)
        if error is not None and type(error).__module__.startswith("ray"):
            error = ClusterLost(f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        cause = f"{type(error).__name__}: {error}" if error is not None else "stopped"
        return replace(base, status="FAILED", exit_code=1, cause=cause)


@dataclass
class _Logs:
    """The logs of driver and ranks, as files in the run's directory (or a temporary one) and on the display."""

    storage: Storage
    display: Display
    folder: Path = field(init=False)

    def __enter__(self) -> _Logs:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if self.storage.is_local:
            self.folder = self.storage.local_path / "logs"
        else:
            self._temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self._temporary.name, "logs")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {}
        self._marks: dict[str, float] = {}
        self.display.also = self._file("driver")
        return self

    def __exit__(self, *_: object) -> None:
        self.display.also = None
        for file in self._files.values():
            file.close()
        if self._temporary is not None:
            with contextlib.suppress(RaytrainerError):  # the same logs are in MLflow
                self.storage.upload_tree(self.folder, "logs")
            self._temporary.cleanup()

    def message(self, rank: int | None, message: Mapping[str, Any]) -> None:
        """A worker's message: shown, and where it says who the worker is, written to its log."""
        self.mark(
            {"hello": "worker_up", "start": "training_starts", "log": "first_log"}.get(message["kind"], "first_other")
        )
        if message["kind"] == "hello":
            self._write(f"rank-{rank}", f"rank {rank} on {message['host']}, process {message['pid']}")
        else:
            self.display.show(message)

    def text(self, rank: int | None, line: str) -> None:
        """A line that a worker printed; one of Ray's own processes (no rank) goes to `ray.log` alone."""
        if rank is None:
            self._write("ray", line)
            return
        self._write(f"rank-{rank}", line)
        self.display.say(f"[rank {rank}] {line}")

    def flush(self) -> None:
        (self.folder / "launch.json").write_text(json.dumps(self._marks, indent=1) + "\n")
        for file in self._files.values():
            file.flush()

    def _write(self, name: str, line: str) -> None:
        self._file(name).write(line + "\n")

    def mark(self, name: str) -> None:
        """Notes when the launch got so far, in seconds since its process began: `launch.json` beside the logs."""
        self._marks.setdefault(name, round(time.time() - psutil.Process().create_time(), 3))

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.log").open("a", encoding="utf-8", errors="replace", buffering=1)
        return self._files[name]


def _in_background(work: Callable[[], T], name: str) -> Future[T]:
    """The result to come of `work`, done in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _debug(composition: Composition, display: Display, began: float) -> Outcome:
    """One process, no Ray, no tracking, no checkpoint, and errors as they are: for a debugger."""
    from raytrainer.progress import Reporter
    from raytrainer.trainer import Trainer

    e = composition.experiment
    check(composition)
    result = Trainer(e, world=worker.inline_world(e), listeners=[Reporter(display.show)]).fit()
    display.close()
    values = {**asdict(result), "metrics": dict(result.metrics), "monitor": e.checkpoint.monitor}
    where = "inline, one batch: no tracking, no checkpoint"
    return Outcome("FINISHED", 0, Record(e.name or "", ""), where, values, seconds=time.monotonic() - began)


def summary(outcome: Outcome, program: str) -> str:
    """The last words of a launch: what came out, where everything is, and what to type next."""
    record, result = outcome.record, outcome.result
    words = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[outcome.status]
    how = (
        f" ({result['reason'].replace('_', ' ')})" if result and result["reason"] not in ("finished", "stopped") else ""
    )
    steps = f", {result['step']} steps" if result else ""
    rows = [("outcome", f"{words}{how}{steps} in {duration(outcome.seconds)}")]
    if outcome.cause and outcome.status == "FAILED":
        rows.append(("cause", outcome.cause))
    rows.append(("where", outcome.where))
    if result and result["best"]:
        value, step = result["best"]
        rows.append(("best", f"{result['monitor']} {value:.4g} at step {step}"))
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {record.run_id}"))
    if record.run_dir:
        rows.append(("output", record.run_dir))
        if outcome.mlflow_command:
            rows.append(("next", outcome.mlflow_command))
        more = f" {outcome.length}=…" if outcome.status == "FINISHED" else ""
        rows.append(("" if outcome.mlflow_command else "next", f"{program} resume {record.name}{more}"))
    return "\n".join(f"{name:<8} {text}" for name, text in rows)


def _where(e: Experiment, gpu: bool) -> str:
    n = e.scaling.num_workers
    workers = f"{n[0]} to {n[1]} workers" if isinstance(n, list) else f"{n} worker{'' if n == 1 else 's'}"
    device = "GPU" if gpu else "CPU"
    if e.cluster.kind == "inline":
        return f"inline, in this process, on {device}"
    place = "local Ray" if e.cluster.kind == "local" else f"Ray at {e.cluster.address or 'auto'}"
    return f"{place}, {workers} on {device}"


def _storage_path(e: Experiment) -> str:
    assert e.storage_path is not None  # the configuration makes it absolute
    return e.storage_path


def _experiment_name(composition: Composition) -> str:
    chosen = dict(composition.choices).get("experiment")
    return composition.experiment.tracking.experiment_name or chosen or "raytrainer"


def _existing_resources(e: Experiment) -> tuple[preflight.Resources, str]:
    """What a running cluster has, asked without joining it for longer than the question."""
    import ray

    from raytrainer import supervise

    supervise.prepare(embedded=False)
    address = e.cluster.address or "auto"
    try:
        if address != "auto":
            supervise.find_cluster(address)
        found = supervise.attach(address, e.cluster.runtime_env)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"is no running Ray cluster: {first}", key="cluster.address", value=address) from error
    return preflight.Resources.of_ray(ray.cluster_resources()), f"the cluster at {found}"
