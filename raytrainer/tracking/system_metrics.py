"""Sample CPU, memory, disk, network and GPU use of a node, under the names that MLflow's own page shows.
MLflow's monitors are not used, because they need `import mlflow` (1.3 s) in the worker."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

_PREFIX = "system/"
_LEAST_S = 0.2  # the kernel counts CPU time in ticks of 10 ms, so a percentage over a shorter time is noise

logger = logging.getLogger("raytrainer.tracking")


class SystemSampler:
    """A sampler of system counters. One sample takes about a millisecond. Metrics of psutil or NVML need that package.

    Args:
        node: The number of this node in the run. Node 0 is rank 0's node and uses the plain names (`system/…`). The
            other nodes use `system/node-1/`, `system/node-2/`, …
    """

    def __init__(self, node: int = 0) -> None:
        self._prefix = f"{_PREFIX}node-{node}/" if node else _PREFIX
        self._psutil = _psutil()
        self._nvml, self._devices = _nvml()
        if self._psutil is not None:
            self._cpu = (time.monotonic(), self._psutil.cpu_times())
            self._network = self._psutil.net_io_counters()

    def sample(self) -> dict[str, float]:
        """Return percentages, watts and megabytes (1e6 bytes; network traffic is counted from the start)."""
        values = {**self._host(), **self._gpus()}
        return {self._prefix + key: round(value, 1) for key, value in values.items()}

    def _host(self) -> dict[str, float]:
        if self._psutil is None:
            return {}
        memory = self._psutil.virtual_memory()
        disk = self._psutil.disk_usage(os.sep)
        values = {
            **self._cpu_utilization(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        now = self._psutil.net_io_counters()
        if now is not None and self._network is not None:
            values["network_receive_megabytes"] = (now.bytes_recv - self._network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (now.bytes_sent - self._network.bytes_sent) / 1e6
        return values

    def _cpu_utilization(self) -> dict[str, float]:
        """Return the busy share of all cores since the previous sample; nothing if that is less than `_LEAST_S` ago."""
        # psutil.cpu_percent() compares with the previous call *in the same thread* and returns 0 in a new one. The
        # thread that writes a checkpoint also takes samples, and each checkpoint starts a new thread.
        (then, before), now, times = self._cpu, time.monotonic(), self._psutil.cpu_times()
        if now - then < _LEAST_S:
            return {}
        self._cpu = (now, times)
        # A counter may decrease by one tick.
        spent = {name: max(0.0, value - getattr(before, name)) for name, value in times._asdict().items()}
        # Linux already includes the time of guests in `user` and `nice`.
        total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
        idle = spent["idle"] + spent.get("iowait", 0.0)
        return {"cpu_utilization_percentage": 100 * (total - idle) / total} if total > 0 else {}

    def _gpus(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for index, device in enumerate(self._devices):
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(device)
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
                values[f"gpu_{index}_utilization_percentage"] = self._nvml.nvmlDeviceGetUtilizationRates(device).gpu
                watts = self._nvml.nvmlDeviceGetPowerUsage(device) / 1000
                values[f"gpu_{index}_power_usage_watts"] = watts
                limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000
                values[f"gpu_{index}_power_usage_percentage"] = 100 * watts / limit
            except self._nvml.NVMLError as error:
                logger.debug("GPU %d: %s", index, error)  # some cards do not report their power
        return values


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def _nvml() -> tuple[Any, list[Any]]:
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None, []
