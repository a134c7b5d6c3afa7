"""Start a quiet Ray in this process or join a running cluster, and always stop or leave it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.job_config import JobConfig

from raytrainer.core.reaper import Reaper
from raytrainer.ray_internals.cluster_state import NAME

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
    # `attempt.waiting` shows those about this run.
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
    # The controller logs each error with its stack before it raises it. `attempt` shows it once.
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)


def start_embedded(num_cpus: float, num_gpus: int | None, memory: float | None = None) -> None:
    """Start a Ray cluster of one node that belongs to this process. `ray.shutdown` ends all of it.

    The dashboard is off, because its processes cost seconds of a launch. Ray Train needs it only to clean up after a
    dead controller, but here the controller is in this process, and the cluster ends with it.

    Args:
        num_cpus, num_gpus: The resources of the node.
        memory: Bytes that workers may request. Ray's default, the memory that is free now, is unknown to preflight.
    """
    with _our_signals(), _private_token():
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


@contextlib.contextmanager
def _private_token() -> Iterator[None]:
    """Let only its owner read the token that Ray creates with its first local cluster. Ray writes it with mode 0644, and
    a later launch with `cluster=job` refuses such a file."""
    token = Path.home() / ".ray" / "auth_token"
    existed = token.exists()
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                token.chmod(0o600)


class VersionMismatch(ConnectionError):
    """A cluster has another version of Ray or Python, and this process therefore cannot join it."""


def _mismatch(error: BaseException) -> VersionMismatch | None:
    """Return our error for that of Ray's `check_version_info`; None for any other error."""
    if not str(error).startswith("Version mismatch"):
        return None
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(versions) != 2:
        return VersionMismatch(" ".join(str(error).split()))
    (ray_there, python_there), (ray_here, python_here) = versions
    fix = f"pip install ray=={ray_there}" if ray_there != ray_here else f"use Python {python_there} here"
    return VersionMismatch(
        f"has ray {ray_there} and Python {python_there}, and this process has ray {ray_here} and Python {python_here}. "
        "A process can join only a cluster with its own versions. Use cluster=job cluster.address=http://HOST:8265, "
        f"which runs the launch with the cluster's versions, or {fix}"
    )


def attach(address: str, runtime_env: Mapping[str, Any], name: str) -> str:
    """Connect to a running cluster and return its address.

    Args:
        address, runtime_env: As for `ray.init`.
        name: The run's name, which is shown to other runs that wait for its resources.

    Raises:
        VersionMismatch: The cluster has another version of Ray or Python.
        ConnectionError: There is no cluster.
    """
    try:
        with _our_signals():
            context = ray.init(
                address=address,
                runtime_env=dict(runtime_env) or None,
                job_config=JobConfig(metadata={NAME: name}),
                logging_level=logging.ERROR,
                log_to_driver=True,
            )
    except RuntimeError as error:
        if mismatch := _mismatch(error):
            raise mismatch from error
        raise
    return str(context.address_info.get("gcs_address") or address)
