"""Start a quiet Ray in this process or join a running cluster, query its resources, and always stop or leave it."""

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

from raytrainer.core.reaper import Reaper
from raytrainer.ray_internals.autoscaling import HEAD, Growth, addable

# Set before Ray starts, unless the user has set them. Ray's processes on this machine inherit them, and Ray Train
# passes them to workers on other machines.
ENVIRONMENT = {
    # How often the controller checks its workers. It sees an end or a death after 0.1 s instead of 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # A week: preflight has checked that the workers fit. By default Ray gives up its place in the queue after a minute
    # and asks again, but a machine in the cloud takes longer to start.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "604800",
    # Workers stay in the launching directory, so that relative paths in a config mean the same as inline.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # These would print every line and exception a second time in the worker's output.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise the autoscaler prints messages to every driver of a cluster, even about requests of other users.
    # `run.waiting` shows those about this run.
    "RAY_SCHEDULER_EVENTS": "0",
    # Warnings that a user cannot act on: about accelerators of processes without a GPU, and about the metrics agent,
    # which needs a dashboard.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    # Tune prints the stack of every failed trial, and its default loggers write each result three times. The journal
    # and the table have both.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
_reaper: Reaper | None = None
_ANSWER_S = 4.0  # an address that does not answer within this time has no cluster


def prepare(embedded: bool) -> None:
    """Set `ENVIRONMENT` and Ray's log levels. Call this before Ray starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if embedded:
        # The only node is this machine, which cannot be preempted.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Otherwise any call to Ray without a cluster starts one, as the controller's thread would do after a forced end.
    ray._private.auto_init_hook.enable_auto_connect = False
    logging.getLogger("ray").setLevel(logging.ERROR)
    # The controller logs each error with its stack before it raises it. `run` shows it once.
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)


def start_embedded(num_cpus: float, num_gpus: int | None, memory: float | None = None) -> None:
    """Start a Ray cluster of one node that belongs to this process. `ray.shutdown` ends all of it.

    The dashboard is off, because its processes cost seconds of a launch. Ray Train needs it only to clean up after a
    dead controller, but here the controller is in this process, and the cluster ends with it.

    Args:
        num_cpus, num_gpus: The resources of the node.
        memory: Bytes that workers may request. Ray's default, the memory that is free now, is unknown to preflight.
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
    """Return the name of an essential process of an embedded Ray that has died; None if all are alive."""
    node = ray._private.worker._global_node
    dead = {name for name, _ in node.dead_processes()} if node is not None else set()
    return next((name for name in ("gcs_server", "raylet") if name in dead), None)


def _agents_end_with_us() -> None:
    """Make the node's agents end with this process. If it is killed, they would try for 60 s to report that."""
    global _reaper
    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children()
    _reaper = Reaper(child.pid for child in children if "Agent" in " ".join(child.cmdline()))


def stop() -> None:
    """Leave the cluster, or stop the embedded one."""
    global _reaper
    if dead_part():  # an orderly shutdown would wait a minute for the dead process
        ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
        return
    # If the garbage collector drops a Ray reference in another thread while Ray's core ends, the whole process ends.
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
    """Keep `ray.init` from installing its own SIGTERM handler, which ends the process at any point.

    SIGHUP is blocked, and Ray's processes inherit that. They are in the terminal's process group, and a closed terminal
    would kill the workers before their last checkpoint. A SIGHUP that arrives meanwhile is delivered afterwards.
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
    """Check that a cluster answers at `host:port`. Without a cluster, `ray.init` would try for seven minutes.

    Raises:
        ConnectionError: Nothing listens there, or it is not a Ray cluster.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers there ({error.strerror or error})") from error
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # any error means that Ray does not answer
            GcsClient(address=address)
            answered.set()

    threading.Thread(target=ask, name="ray-probe", daemon=True).start()
    if not answered.wait(_ANSWER_S):
        raise ConnectionError(
            f"the process that listens there did not answer like a Ray cluster within {_ANSWER_S:g} s"
        )


def attach(address: str, runtime_env: Mapping[str, Any], name: str) -> str:
    """Connect to a running cluster and return its address.

    Args:
        address, runtime_env: As for `ray.init`.
        name: The run's name, which is shown to other runs that wait for its resources.

    Raises:
        ConnectionError: There is no cluster.
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


# --- the resources of a cluster ---------------------------------------------------------------------------------------

_NAME = "raytrainer.name"  # key in the metadata of a run's Ray job
_PROBE_S = 5.0
_growths: dict[str, Growth | None] = {}  # by Ray job, because it is needed before a launch and again during it


def nodes() -> list[dict[str, float]]:
    """Return the resources of each live node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def growth() -> Growth | None:
    """Return what the autoscaler can add to the cluster; None if there is none, or if it does not answer within 5 s."""
    job = ray.get_runtime_context().get_job_id()
    if job not in _growths:
        _growths[job] = _growth()
    return _growths[job]


def _growth() -> Growth | None:
    head = next((node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head is None:
        return None
    # Ray's own query, `get_max_resources_from_cluster_config`, works only on Anyscale. The autoscaler's configuration
    # is a file on the head node, and the command line of the monitor process has its path.
    asked = ray.remote(num_cpus=0)(_reader()).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(head["NodeID"], soft=False), max_retries=0
    )
    reply = asked.remote(ray.get_runtime_context().gcs_address)
    try:
        monitor, config = ray.get(reply, timeout=_PROBE_S)
    except Exception:  # noqa: BLE001  the head is too busy, or its files cannot be read
        ray.cancel(reply, force=True)
        return None
    if not monitor:
        return Growth(known=False) if _is_autoscaled() else None
    return addable(config, nodes()) if config else None


def _reader() -> Any:
    """Return the task for the head node. It is a nested function, so that it is pickled by value and raytrainer need
    not be installed there."""

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
                continue  # the monitor of another cluster on the same machine
            if "autoscaling-config" not in options:
                return True, None
            with open(options["autoscaling-config"]) as file:  # noqa: PTH123
                config = yaml.safe_load(file)
            # Only these keys, because others may contain secrets.
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
    """Return whether an autoscaler has reported to the cluster."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except Exception:  # noqa: BLE001  a cluster that gives no answer is treated as one without an autoscaler
        return False
    return int(status.stats.autoscaler_version or 0) > 0


def free() -> dict[str, float]:
    """Return the free resources of the cluster."""
    return dict(ray.available_resources())


def holders() -> dict[str, dict[str, float]]:
    """Return the resources that each other driver holds, by its run's name, submission id, or host and process id.

    Placement groups, and actors outside them, are counted. Tasks are not, because the tables do not list them.
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
            # Not its command line, which may contain secrets of other users, because this text is logged.
            driver = f"a driver on {job.driver_ip_address} (process {job.driver_pid})"
            found[of.get(_NAME) or of.get("job_submission_id") or driver] = held[job.job_id]
    return found


def nodes_to_come() -> tuple[dict[str, int], list[str]]:
    """Return what the autoscaler is adding: node type → number of nodes, and the launches that failed with the reasons.

    Both are empty if the cluster has no autoscaler, or one that is too old to report it.
    """
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except Exception:  # noqa: BLE001  the answer is only for display
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
