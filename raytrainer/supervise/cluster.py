"""Ray itself: a quiet one of this process's own, or one that runs already; and its end, whatever it ends by."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from raytrainer.reaper import Reaper

# Set before Ray starts, where the user has not; inherited by Ray's processes on this machine, and propagated by Ray
# Train to workers elsewhere.
ENVIRONMENT = {
    # The controller looks at its workers so often: an end or a death is seen after 0.1 s instead of 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Workers stay in the launching directory, where relative paths of a config mean the same as inline.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A second copy of every print and exception in the worker's output.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Warnings that a user cannot act on: accelerators of processes without a GPU, and the metrics agent, which an
    # embedded Ray has no dashboard for.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    # Tune prints the stack of every failed trial, and adds loggers that write each result three times; the ledger and
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
    """Keeps `ray.init` from setting a SIGTERM handler of its own, which ends the process in the middle of things."""
    set_handler = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_handler


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


def attach(address: str, runtime_env: Mapping[str, Any]) -> str:
    """Connects to a running cluster; returns its address.

    Raises:
        ConnectionError: There is none.
    """
    with _our_signals():
        context = ray.init(
            address=address, runtime_env=dict(runtime_env) or None, logging_level=logging.ERROR, log_to_driver=True
        )
    return str(context.address_info.get("gcs_address") or address)
