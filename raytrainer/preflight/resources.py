"""What a run needs, and what a machine or a cluster has: CPUs, GPUs, memory, and whether each worker fits on a node."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raytrainer.config import Experiment


@dataclass(frozen=True)
class Resources:
    """The total resources of a cluster: CPUs, GPUs, memory in bytes, and custom resources.

    Attributes:
        nodes: The resources of each node; () for one machine.
        more: The resources of each node that its autoscaler can add.
        most_more: How many of those nodes it can have at a time.
        endless: Whether it grows without a known limit.
    """

    cpus: float
    gpus: float = 0.0
    memory: float | None = None
    other: Mapping[str, float] | None = None
    nodes: tuple[Mapping[str, float], ...] = ()
    more: tuple[Mapping[str, float], ...] = ()
    most_more: int = 0
    endless: bool = False

    @classmethod
    def of_ray(cls, resources: Mapping[str, float]) -> Resources:
        """Return the resources in the result of `ray.cluster_resources()`."""
        known = ("CPU", "GPU", "memory")
        return cls(
            resources.get("CPU", 0),
            resources.get("GPU", 0),
            resources.get("memory"),
            {k: v for k, v in resources.items() if k not in known},
        )

    @classmethod
    def of_nodes(
        cls,
        nodes: Iterable[Mapping[str, float]],
        more: Iterable[Mapping[str, float]] = (),
        most_more: int = 0,
        endless: bool = False,
    ) -> Resources:
        """Return the resources of nodes and of nodes that can be added. The sums include the latter."""
        nodes, more = tuple(nodes), tuple(more)
        sums: dict[str, float] = {}
        for name in {name for node in (*nodes, *more) for name in node}:
            added = sorted((node.get(name, 0.0) for node in more), reverse=True)
            sums[name] = sum(node.get(name, 0.0) for node in nodes) + sum(added[:most_more])
        total = cls.of_ray(sums)
        if any("memory" not in node for node in more):  # a node type that does not state its memory
            total = replace(total, memory=None)
        return replace(total, nodes=nodes, more=more, most_more=most_more, endless=endless)

    def get(self, name: str) -> float | None:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}.get(name, (self.other or {}).get(name, 0.0))

    def places(self, each: Mapping[str, float], strategy: str = "PACK") -> int:
        """Return how many workers it has room for, each on one node; resources of two nodes cannot be combined.

        Args:
            each: The resources of a worker.
            strategy: Ray's placement strategy.
        """
        wanted = {name: share for name, share in each.items() if share}
        # A node type that can be added usually does not state its memory.
        added = sorted((_room(node, wanted, unknown=("memory",)) for node in self.more), reverse=True)[: self.most_more]
        rooms = [*(_room(node, wanted) for node in self.nodes), *added]
        if strategy == "STRICT_PACK":
            return max(rooms, default=0)
        return sum(min(room, 1) for room in rooms) if strategy == "STRICT_SPREAD" else sum(rooms)


def this_machine() -> Resources:
    """Return the CPUs that this process may use (affinity and cgroup quota), and the machine's GPUs and memory."""
    import psutil

    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1.0, float(int(quota) // int(period))))
    except (OSError, ValueError):  # there is no cgroup v2
        pass
    return Resources(cpus, float(_gpus()), float(psutil.virtual_memory().total), _gpu_kinds())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu_kinds(driver: Path = Path("/proc/driver/nvidia/gpus")) -> dict[str, float]:
    """Return Ray's resource for each word in the GPUs' names: `accelerator_type:H100` for "NVIDIA H100 80GB HBM3"."""
    if not _gpus():
        return {}
    information = "".join(file.read_text() for file in driver.glob("*/information"))
    names = re.findall(r"^Model:\s*(.+)$", information, re.MULTILINE)
    if not names:
        import torch

        # Asking CUDA creates a context on a GPU, which takes a second and some of the memory that the workers need.
        names = [torch.cuda.get_device_name(i) for i in range(_gpus())]
    return {f"accelerator_type:{word}": 1.0 for name in names for word in name.replace("-", " ").split()}


def _room(node: Mapping[str, float], wanted: Mapping[str, float], unknown: tuple[str, ...] = ()) -> int:
    """Return how many times a node has the wanted resources."""
    shares = {name: share for name, share in wanted.items() if name in node or name not in unknown}
    # A small tolerance, because 0.3 / 0.1 is 2.9999999999999996.
    return min((int(node.get(name, 0.0) / share + 1e-9) for name, share in shares.items()), default=1_000_000)


def uses_gpu(e: Experiment, available: Resources) -> bool:
    """Return whether the workers use GPUs.

    `scaling.use_gpu=auto` follows `scaling.resources_per_worker.GPU` if it is set; otherwise it is true if every worker
    can have a GPU.
    """
    wanted, share = e.scaling.use_gpu, (e.scaling.resources_per_worker or {}).get("GPU")
    if wanted != "auto":
        return bool(wanted)
    return share > 0 if share is not None else available.gpus >= least_workers(e)


def least_workers(e: Experiment) -> int:
    n = e.scaling.num_workers
    return int(n[0] if isinstance(n, list) else n)


def per_worker(e: Experiment, gpu: bool) -> dict[str, float]:
    """Return the resources of one worker, as Ray Train requests them.

    The default is one GPU if GPUs are used, else one CPU.
    """
    resources = dict(e.scaling.resources_per_worker or {})
    if gpu:
        resources.setdefault("GPU", 1.0)
    if not any(name in resources for name in ("CPU", "GPU")):
        resources["CPU"] = 1.0
    return resources


def bundle(e: Experiment, gpu: bool) -> dict[str, float]:
    """Return `per_worker` and the accelerator type, which Ray requests as a tiny amount on each node."""
    kind = e.scaling.accelerator_type
    return {**per_worker(e, gpu), **({f"accelerator_type:{kind}": 0.001} if kind else {})}


def check_resources(e: Experiment, available: Resources, where: str) -> list[str]:
    """Return problems if the run needs more workers, GPUs or memory than the cluster has or can add."""
    if available.endless:
        return []
    problems = []
    count, gpu = least_workers(e), uses_gpu(e, available)
    each = per_worker(e, gpu)
    most_has = f"{where} has at most" if available.more else f"{where} has"
    added = ", including nodes that it can add" if available.more else ""
    for name, share in each.items():
        has = available.get(name)
        if has is None or share * count <= has + 1e-9:  # 3 × 0.1 is 0.30000000000000004
            continue
        most = int(has // share) if share else 0
        fix = f"scaling.num_workers={most} fits" if most >= 1 else _no_fit(e, name, has)
        problems.append(
            f"scaling.num_workers={count} × {amount(name, share)} = {amount(name, share * count)}, "
            f"and {most_has} {amount(name, has)}{added}; {fix}"
        )
    kind = e.scaling.accelerator_type
    if kind is not None and not available.get(f"accelerator_type:{kind}"):
        prefix = "accelerator_type:"
        there = sorted(name.removeprefix(prefix) for name in available.other or {} if name.startswith(prefix))
        problems.append(
            f"scaling.accelerator_type={kind}, and {most_has} {', '.join(there) or 'no accelerator'}{added}"
        )
    return problems or _check_nodes(e, each, available, where) or _check_ray_data(e, each, available, most_has)


def through_ray(e: Experiment) -> list[str]:
    """Return the keys of the data sets that a Ray cluster reads and prepares."""
    targets = ("raytrainer.data.RayDataset", "raytrainer.data.ray_data.RayDataset")
    return [key for key, node in e.data.sets.items() if node.get("_target_") in targets]


def _check_ray_data(e: Experiment, each: Mapping[str, float], available: Resources, most_has: str) -> list[str]:
    """Check that workers leave a CPU free; otherwise the tasks that prepare their data would wait forever."""
    keys, count, share = through_ray(e), least_workers(e), each.get("CPU", 0.0)
    if not keys or available.cpus - share * count >= 1:
        return []
    has = f"{most_has} {amount('CPU', available.cpus)} for {count} workers of {amount('CPU', share)}"
    return [
        f"{keys[0]} needs a CPU beside the workers' for Ray's tasks, and {has}: use fewer workers, or fewer CPUs for each"
    ]


def _check_nodes(e: Experiment, each: Mapping[str, float], available: Resources, where: str) -> list[str]:
    """Check that the workers fit on single nodes, because a total that suffices may be spread over several."""
    if not (available.nodes or available.more):
        return []
    count, kind, strategy = least_workers(e), e.scaling.accelerator_type, e.scaling.placement_strategy
    places = available.places(bundle(e, uses_gpu(e, available)), strategy)
    if places >= count:
        return []
    share_of_one = ", ".join(amount(name, share) for name, share in each.items() if share) + (
        f" of {kind}" if kind else ""
    )
    of = f"{where}, including nodes that it can add," if available.more else where
    if places == 0:
        return [
            f"a worker asks for {share_of_one}, and no node of {of} has that; scaling.resources_per_worker sets how much"
        ]
    strictly = f" with scaling.placement_strategy={strategy}" if strategy.startswith("STRICT") else ""
    room = f"room for {places}: each worker must fit on one node; scaling.num_workers={places} fits"
    return [f"scaling.num_workers={count} × ({share_of_one}){strictly}, and {of} has {room}"]


def _no_fit(e: Experiment, name: str, has: float) -> str:
    if name == "GPU":
        is_set = "GPU" in (e.scaling.resources_per_worker or {})
        return f"{'scaling.resources_per_worker without GPU' if is_set else 'scaling.use_gpu=false'} trains on CPUs"
    return f"scaling.resources_per_worker.{name} must be at most {has:.0f}"


def amount(name: str, count: float) -> str:
    """Return a resource as text: `2 CPUs`, `1 GPU`, `18.6 GiB of memory`."""
    if name == "memory":
        return f"{count / 2**30:.1f} GiB of memory"
    return f"{count:g} {name}" + ("s" if name in ("CPU", "GPU") and count != 1 else "")
