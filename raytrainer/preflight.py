"""What can be known before anything starts: pure checks over an experiment and what probes found.

Each check gives the problems it sees, as sentences with the key, the value and the way out; `PreflightError` has all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from raytrainer.config import Experiment
from raytrainer.errors import PreflightError, StorageError, TrackingError


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all: CPUs, GPUs, memory in bytes, and custom resources."""

    cpus: float
    gpus: float = 0.0
    memory: float | None = None
    other: Mapping[str, float] | None = None

    @classmethod
    def of_ray(cls, found: Mapping[str, float]) -> Resources:
        """From `ray.cluster_resources()`."""
        known = ("CPU", "GPU", "memory")
        return cls(found.get("CPU", 0), found.get("GPU", 0), found.get("memory"), {k: v for k, v in found.items() if k not in known})

    def get(self, name: str) -> float | None:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}.get(name, (self.other or {}).get(name, 0.0))


def this_machine() -> Resources:
    """The CPUs that this process may use (its affinity and its cgroup's quota) and the memory of the machine."""
    import psutil

    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1.0, float(int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2 here
        pass
    return Resources(cpus, float(_gpus()), float(psutil.virtual_memory().total))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def uses_gpu(e: Experiment, available: Resources) -> bool:
    """`scaling.use_gpu`, with `auto` decided: yes where every worker can have one."""
    wanted = e.scaling.use_gpu
    return bool(wanted) if wanted != "auto" else available.gpus >= least_workers(e)


def least_workers(e: Experiment) -> int:
    n = e.scaling.num_workers
    return int(n[0] if isinstance(n, list) else n)


def per_worker(e: Experiment, gpu: bool) -> dict[str, float]:
    """The resources of one worker, as Ray Train asks for them: one CPU, and a GPU, unless said otherwise."""
    asked = dict(e.scaling.resources_per_worker or {})
    if gpu:
        asked.setdefault("GPU", 1.0)
    if not any(name in asked for name in ("CPU", "GPU")):
        asked["CPU"] = 1.0
    return asked


def check_resources(e: Experiment, available: Resources, where: str) -> list[str]:
    """More workers, GPUs or memory than there are."""
    problems = []
    count, gpu = least_workers(e), uses_gpu(e, available)
    for name, each in per_worker(e, gpu).items():
        has = available.get(name)
        if has is None or each * count <= has:
            continue
        most = int(has // each) if each else 0
        fix = f"scaling.num_workers={most} fits" if most >= 1 else _no_fit(name, each, has)
        problems.append(
            f"scaling.num_workers={count} × {_amount(name, each)} = {_amount(name, each * count)}, "
            f"and {where} has {_amount(name, has)}; {fix}"
        )
    return problems


def _no_fit(name: str, each: float, has: float) -> str:
    if name == "GPU":
        return "scaling.use_gpu=false trains on CPUs"
    return f"scaling.resources_per_worker.{name} must be at most {has:g}"


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:.1f} GiB of memory"
    return f"{amount:g} {name}" + ("s" if name in ("CPU", "GPU") and amount != 1 else "")


def check_storage(check_writable: Callable[[], None], path: str) -> list[str]:
    """An unwritable `storage_path`."""
    try:
        check_writable()
    except StorageError as error:
        return [f"storage_path={path} cannot be used: {error}"]
    return []


def check_tracking(probe: Callable[[str], None], uri: str, required: bool) -> list[str]:
    """An unreachable or refusing tracking server; nothing where `tracking.required=false`."""
    if not required:
        return []
    try:
        probe(uri)
    except TrackingError as error:
        return [f"{error}; tracking.required=false trains all the same and keeps the metrics until it answers"]
    return []


def check_environment(e: Experiment, environ: Mapping[str, str]) -> list[str]:
    """Variables that would send the run elsewhere than the config says."""
    if e.cluster.kind == "local" and (address := environ.get("RAY_ADDRESS")):
        return [
            f"RAY_ADDRESS={address} is set and cluster=local starts a Ray of its own on this machine; "
            "use cluster=existing for that cluster, or unset RAY_ADDRESS"
        ]
    return []


def refuse(problems: list[str]) -> None:
    """Raises what was found.

    Raises:
        PreflightError: `problems` is not empty.
    """
    if problems:
        raise PreflightError(problems)
