"""Ray itself: a quiet one of this process's own, or one that runs already; and its end, whatever it ends by."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.core.generated.gcs_pb2 import ActorTableData, JobTableData, PlacementGroupTableData
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.autoscaling import HEAD, Growth, addable
from raytrainer.reaper import Reaper

# Set before Ray starts, where the user has not; inherited by Ray's processes on this machine, and propagated by Ray
# Train to workers elsewhere.
ENVIRONMENT = {
    # The controller looks at its workers so often: an end or a death is seen after 0.1 s instead of 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Workers are waited for as long as it takes, which preflight knows to be finite: after a minute Ray would give up
    # its place in the queue and ask again, and a cloud's machine takes longer than that to come.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "604800",
    # Workers stay in the launching directory, where relative paths of a config mean the same as inline.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A second copy of every print and exception in the worker's output.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What the autoscaler says to every driver of a cluster, of other people's requests too; `run.waiting` says it.
    "RAY_SCHEDULER_EVENTS": "0",
    # Warnings that a user cannot act on: accelerators of processes without a GPU, and the metrics agent, which an
    # embedded Ray has no dashboard for.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    # Tune prints the stack of every failed trial, and adds loggers that write each result three times; the journal and
    # the table have them.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
_reaper: Reaper | None = None
_ANSWER_S = 4.0  # a cluster that does not answer in so long is not there


def prepare(embedded: bool) -> None:
    """Sets `ENVIRONMENT`; to be called before Ray starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if embedded:
        # One node that is this machine: there is nobody to preempt it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray starts a cluster for whoever calls it without one: the controller's thread would, after a forced end.
    ray._private.auto_init_hook.enable_auto_connect = False
    logging.getLogger("ray").setLevel(logging.ERROR)
    # The controller logs each error with its stack, then raises it: `run` tells it once.
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)


def start_embedded(num_cpus: float, num_gpus: int | None, memory: float | None = None) -> None:
    """Starts a Ray of this process's own on this machine; `ray.shutdown` ends all of it.

    Without the dashboard, whose processes cost seconds of a launch; what Ray Train needs it for, cleaning up after a
    dead controller, is not needed: the controller is in this process, and the cluster ends with it.

    Args:
        num_cpus, num_gpus: What its one node has.
        memory: Bytes that workers may ask for: Ray's own default is what is free now, which preflight cannot know.
    """
    with _our_signals():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            _memory=None if memory is None else int(memory),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=True,
            configure_logging=True,
        )
    _agents_end_with_us()


def dead_part() -> str | None:
    """The name of a process of an embedded Ray without which it is lost, where one has died."""
    node = ray._private.worker._global_node
    dead = {name for name, _ in node.dead_processes()} if node is not None else set()
    return next((name for name in ("gcs_server", "raylet") if name in dead), None)


def _agents_end_with_us() -> None:
    """Of a killed driver Ray's processes end at once, but its node's agents first try to report that for 60 s."""
    global _reaper
    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children()
    _reaper = Reaper(child.pid for child in children if "Agent" in " ".join(child.cmdline()))


def stop() -> None:
    """Leaves the cluster, or ends the embedded one."""
    global _reaper
    if dead_part():  # an orderly end would wait a minute for the answer of a dead process
        ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
        return
    # A collection in another thread that drops a reference of Ray's while its core ends would end the whole process.
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
    if _reaper is not None:
        _reaper.dismiss()
        _reaper = None


@contextlib.contextmanager
def _our_signals() -> Iterator[None]:
    """Keeps `ray.init` from setting a SIGTERM handler of its own, which ends the process in the middle of things.

    What it starts is in the process group of the terminal, as this process is, and has SIGHUP blocked: a terminal that is
    closed would kill the workers before their last checkpoint. One that comes meanwhile is taken afterwards.
    """
    set_handler = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_handler
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def find_cluster(address: str) -> None:
    """Whether a cluster answers at `host:port`: `ray.init` asks an address where there is none for seven minutes.

    Raises:
        ConnectionError: Nothing listens there, or it is no Ray.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers there ({error.strerror or error})") from error
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever it says, it is no answer
            GcsClient(address=address)
            answered.set()

    threading.Thread(target=ask, name="ray-probe", daemon=True).start()
    if not answered.wait(_ANSWER_S):
        raise ConnectionError(f"what listens there does not answer as Ray does within {_ANSWER_S:g} s")


def attach(address: str, runtime_env: Mapping[str, Any], name: str) -> str:
    """Connects to a running cluster; returns its address.

    Args:
        address, runtime_env: As `ray.init`'s.
        name: Of the run: whoever waits for what it holds is told.

    Raises:
        ConnectionError: There is none.
    """
    with _our_signals():
        context = ray.init(
            address=address,
            runtime_env=dict(runtime_env) or None,
            job_config=JobConfig(metadata={_NAME: name}),
            logging_level=logging.ERROR,
            log_to_driver=True,
        )
    return str(context.address_info.get("gcs_address") or address)


# --- what a cluster has, may have, and who holds it -------------------------------------------------------------------

_NAME = "raytrainer.name"  # in the metadata of a run's job
_PROBE_S = 5.0
_growths: dict[str, Growth | None] = {}  # by job: it is asked for before a launch and in it


def nodes() -> list[dict[str, float]]:
    """What each living node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def growth() -> Growth | None:
    """What its autoscaler can add to the cluster; None where it has none, or cannot be asked within five seconds."""
    job = ray.get_runtime_context().get_job_id()
    if job not in _growths:
        _growths[job] = _growth()
    return _growths[job]


def _growth() -> Growth | None:
    head = next((node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head is None:
        return None
    # Ray's own question, `get_max_resources_from_cluster_config`, has an answer on Anyscale alone. The autoscaler's
    # configuration is a file on the head node, named on the command line of the process that reads it.
    asked = ray.remote(num_cpus=0)(_reader()).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(head["NodeID"], soft=False), max_retries=0
    )
    reply = asked.remote(ray.get_runtime_context().gcs_address)
    try:
        monitor, config = ray.get(reply, timeout=_PROBE_S)
    except Exception:  # noqa: BLE001  a head that is too busy, or whose files cannot be read: nothing is known
        ray.cancel(reply, force=True)
        return None
    if not monitor:
        return Growth(known=False) if _is_autoscaled() else None
    return addable(config, nodes()) if config else None


def _reader() -> Any:
    """The task for the head node. A function of its own inside one, so that it travels whole: raytrainer need not be
    installed there."""

    def read(gcs_address: str) -> tuple[bool, Any]:
        import psutil
        import yaml

        for process in psutil.process_iter():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if not any(part.endswith("/monitor.py") for part in command):
                continue
            options = dict(part.removeprefix("--").partition("=")[::2] for part in command if part.startswith("--"))
            if options.get("gcs-address", "").rpartition(":")[2] != gcs_address.rpartition(":")[2]:
                continue  # another cluster's, on the same machine
            if "autoscaling-config" not in options:
                return True, None
            with open(options["autoscaling-config"]) as file:  # noqa: PTH123
                config = yaml.safe_load(file)
            # The rest of it may hold secrets.
            return True, {
                "max_workers": config.get("max_workers"),
                "available_node_types": {
                    name: {"resources": dict(t.get("resources") or {}), "max_workers": t.get("max_workers")}
                    for name, t in (config.get("available_node_types") or {}).items()
                },
            }
        return False, None

    return read


def _is_autoscaled() -> bool:
    """Whether an autoscaler has reported to the cluster."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except Exception:  # noqa: BLE001  it is Ray's to say, and it did not
        return False
    return int(status.stats.autoscaler_version or 0) > 0


def free() -> dict[str, float]:
    """What nobody holds, of the resources of the cluster's nodes."""
    return dict(ray.available_resources())


def holders() -> dict[str, dict[str, float]]:
    """Who holds how much of CPUs, GPUs and the like, this driver left out; by the run's name, the submission id, or
    where the driver is.

    Placement groups and actors outside of them are counted; tasks are not known to the cluster's table.
    """
    state = ray._private.state.state._connect_and_get_accessor()
    held: dict[bytes, dict[str, float]] = {}

    def count(job: bytes, resources: Mapping[str, float]) -> None:
        own = held.setdefault(job, {})
        for name, amount in resources.items():
            if amount and not name.startswith("node:"):
                own[name] = own.get(name, 0.0) + amount

    for data in state.get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        if group.state == PlacementGroupTableData.CREATED:
            for bundle in group.bundles:
                count(group.creator_job_id, bundle.unit_resources)
    for data in state.get_actor_table(None, None):
        actor = ActorTableData.FromString(data)
        if actor.state == ActorTableData.ALIVE and not any("_group_" in name for name in actor.required_resources):
            count(actor.job_id, actor.required_resources)
    mine = ray.get_runtime_context().get_job_id()
    found: dict[str, dict[str, float]] = {}
    for data in state.get_job_table():
        job = JobTableData.FromString(data)
        if held.get(job.job_id) and job.job_id.hex() != mine:
            of = dict(job.config.metadata)
            # Not its command line: others' may hold secrets, and this goes into our log.
            driver = f"a driver on {job.driver_ip_address} (process {job.driver_pid})"
            found[of.get(_NAME) or of.get("job_submission_id") or driver] = held[job.job_id]
    return found


def nodes_to_come() -> tuple[dict[str, int], list[str]]:
    """What the autoscaler is about: node type → how many are on their way, and what it could not start and why.

    Empty where the cluster has none, or an old one that does not say.
    """
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except Exception:  # noqa: BLE001  only a display asks
        return {}, []
    coming: dict[str, int] = {}
    for launch in status.pending_launches:
        coming[launch.ray_node_type_name] = coming.get(launch.ray_node_type_name, 0) + launch.count
    for node in status.pending_nodes:
        coming[node.ray_node_type_name] = coming.get(node.ray_node_type_name, 0) + 1
    failed = [
        f"{launch.ray_node_type_name}: {' '.join(launch.details.split())[:200]}"
        for launch in status.failed_launches
        if launch.details
    ]
    return coming, failed
