"""A Ray cluster of one CPU that grows, with Ray's own autoscaler and fake machines (processes on this one).

`python autoscaling.py RAY GATE [PORT]` prints the cluster's address, then a JSON line with its nodes and placement
groups for each line on stdin. RAY is a JSON list of the words of the command `ray`. With PORT there is a dashboard.

A node is added only while the file GATE exists. A line `hold` takes everything that the cluster can have, in the name
of another run; `release` frees it. The script ends when stdin closes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import psutil
import ray
from ports import free_port  # type: ignore[import-not-found]  # beside this script
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.cluster_utils import AutoscalingCluster
from ray.job_config import JobConfig

NODE_TYPES = {
    "small": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 2},
    "big": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 1},
}
# The keys that Ray's own defaults have for a provider that it knows.
LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


class GatedProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """A cloud that has no machine until the file GATE exists."""

    def create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        while not Path(os.environ["GATE"]).exists():
            time.sleep(0.05)
        super().create_node_with_resources_and_labels(*arguments)


class Cluster(AutoscalingCluster):  # type: ignore[misc]
    """Ray's `AutoscalingCluster` without `ray stop --force`, which ends every Ray on the machine, whoever owns it.
    Ray's default config is written here, because its file is not in Ray's wheel."""

    def __init__(self, ray_command: list[str], gate: Path, dashboard_port: str | None = None) -> None:
        super().__init__({"CPU": 1}, dict(NODE_TYPES), autoscaler_v2=True, max_workers=3, idle_timeout_minutes=0.05)
        self.ray_command, self.gate, self.dashboard_port = ray_command, gate, dashboard_port
        self.address = f"{ray.util.get_node_ip_address()}:{free_port()}"

    def _generate_config(
        self, head_resources: dict[str, Any], worker_node_types: dict[str, Any], autoscaler_v2: bool, **more: Any
    ) -> dict[str, Any]:
        return {
            "cluster_name": "tests",
            "provider": {
                "type": "external",
                "module": "autoscaling.GatedProvider",
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                **worker_node_types,
                "ray.head.default": {"resources": head_resources, "node_config": {}, "max_workers": 0},
            },
            "head_node_type": "ray.head.default",
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in LISTS},
            "file_mounts_sync_continuously": False,
            "upscaling_speed": 1.0,
            **more,
        }

    def start(self, _system_config: Any = None, override_env: Any = None) -> None:
        config = self._config
        config["provider"]["gcs_address"] = self.address
        # A short path, because of its sockets. It is our own, so that `ray.init("auto")` on this machine does not find
        # the cluster.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        file = self.folder / "autoscaling.yaml"
        file.write_text(json.dumps(config))
        options = {
            "temp-dir": self.folder,
            "port": self.address.rpartition(":")[2],
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": 0,
            "autoscaling-config": file,
            "num-cpus": 1,
            "object-store-memory": 100 * 2**20,
            "include-dashboard": "false" if self.dashboard_port is None else "true",
        }
        if self.dashboard_port is not None:
            options["dashboard-port"] = self.dashboard_port
        environment = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "GATE": str(self.gate),
        }
        self.process = subprocess.Popen(
            [*self.ray_command, "start", "--head", "--block"]
            + [f"--{name}={value}" for name, value in options.items()],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )

    def shutdown(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        self._end_monitors()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_monitors(self) -> None:
        """Kill the log monitors of removed nodes, which Ray leaves running. They have the variable GATE."""
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("GATE") == str(self.gate):
                    process.kill()
            except psutil.Error:
                continue


def connect(address: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        host, port = address.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    ray.init(
        address=address,
        job_config=JobConfig(metadata={"raytrainer.name": "somebody-elses"}),
        logging_level="ERROR",
        log_to_driver=False,
    )


def own_output() -> TextIO:
    """Reserve standard output for the answers; whatever Ray or a library prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main(ray_command: list[str], gate: Path, dashboard_port: str | None = None) -> None:
    answers = own_output()
    cluster = Cluster(ray_command, gate, dashboard_port)
    cluster.start()
    connect(cluster.address, 60)
    print(cluster.address, file=answers, flush=True)
    held = None
    for line in sys.stdin:
        if line.strip() == "hold":
            held = ray.util.placement_group([{"CPU": 1}] * 3 + [{"CPU": 2}])
            held.wait(60)
        if line.strip() == "release":
            ray.util.remove_placement_group(held)
        groups = [g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        nodes = sorted(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        print(json.dumps({"nodes": nodes, "placement_groups": groups}), file=answers, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
