"""What can be known before anything starts: pure checks over an experiment and what probes found.

Each check gives the problems it sees, as sentences with the key, the value and the way out; `PreflightError` has all.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from raytrainer.config import Experiment, build, check_targets, factory, locate, texts_of
from raytrainer.errors import CheckpointError, ConfigError, PreflightError, StorageError, TrackingError
from raytrainer.events import HOOKS
from raytrainer.storage import Storage
from raytrainer.tracking import redacted


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all: CPUs, GPUs, memory in bytes, and custom resources.

    Attributes:
        nodes: What each of its nodes has; (): it is one machine.
        more: What each node has that its autoscaler can add to them.
        most_more: How many of those at a time.
        endless: It grows, and does not say how far.
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
    def of_ray(cls, found: Mapping[str, float]) -> Resources:
        """From `ray.cluster_resources()`."""
        known = ("CPU", "GPU", "memory")
        return cls(
            found.get("CPU", 0),
            found.get("GPU", 0),
            found.get("memory"),
            {k: v for k, v in found.items() if k not in known},
        )

    @classmethod
    def of_nodes(
        cls,
        nodes: Iterable[Mapping[str, float]],
        more: Iterable[Mapping[str, float]] = (),
        most_more: int = 0,
        endless: bool = False,
    ) -> Resources:
        """From what each node has, and may have that can be added: the sums are of all that there can be."""
        nodes, more = tuple(nodes), tuple(more)
        sums: dict[str, float] = {}
        for name in {name for node in (*nodes, *more) for name in node}:
            added = sorted((node.get(name, 0.0) for node in more), reverse=True)
            sums[name] = sum(node.get(name, 0.0) for node in nodes) + sum(added[:most_more])
        found = cls.of_ray(sums)
        if any("memory" not in node for node in more):  # a node type that says nothing of it: not known
            found = replace(found, memory=None)
        return replace(found, nodes=nodes, more=more, most_more=most_more, endless=endless)

    def get(self, name: str) -> float | None:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}.get(name, (self.other or {}).get(name, 0.0))

    def places(self, each: Mapping[str, float], strategy: str = "PACK") -> int:
        """How many workers it has room for, each on one node: what two nodes have together is no room for one.

        Args:
            each: The resources of a worker.
            strategy: Ray's placement strategy.
        """
        wanted = {name: share for name, share in each.items() if share}
        # A node type that can be added says nothing of its memory, as a rule.
        added = sorted((_room(node, wanted, unknown=("memory",)) for node in self.more), reverse=True)[: self.most_more]
        rooms = [*(_room(node, wanted) for node in self.nodes), *added]
        if strategy == "STRICT_PACK":
            return max(rooms, default=0)
        return sum(min(room, 1) for room in rooms) if strategy == "STRICT_SPREAD" else sum(rooms)


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
    return Resources(cpus, float(_gpus()), float(psutil.virtual_memory().total), _gpu_kinds())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu_kinds(driver: Path = Path("/proc/driver/nvidia/gpus")) -> dict[str, float]:
    """Ray's resource of each word in the GPUs' names: `accelerator_type:H100` of "NVIDIA H100 80GB HBM3"."""
    if not _gpus():
        return {}
    told = "".join(file.read_text() for file in driver.glob("*/information"))
    names = re.findall(r"^Model:\s*(.+)$", told, re.MULTILINE)
    if not names:
        import torch

        # Asking CUDA makes a context on a GPU, which costs a second and some of the memory that the workers want.
        names = [torch.cuda.get_device_name(i) for i in range(_gpus())]
    return {f"accelerator_type:{word}": 1.0 for name in names for word in name.replace("-", " ").split()}


def _room(node: Mapping[str, float], wanted: Mapping[str, float], unknown: tuple[str, ...] = ()) -> int:
    """How many times a node has what is wanted."""
    asked = {name: share for name, share in wanted.items() if name in node or name not in unknown}
    # A hair more, since 0.3 / 0.1 is 2.9999999999999996.
    return min((int(node.get(name, 0.0) / share + 1e-9) for name, share in asked.items()), default=1_000_000)


def uses_gpu(e: Experiment, available: Resources) -> bool:
    """`scaling.use_gpu`, with `auto` decided: as `scaling.resources_per_worker.GPU` has it, else yes where every worker
    can have one."""
    wanted, share = e.scaling.use_gpu, (e.scaling.resources_per_worker or {}).get("GPU")
    if wanted != "auto":
        return bool(wanted)
    return share > 0 if share is not None else available.gpus >= least_workers(e)


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
    """More workers, GPUs or memory than there are or, where a cluster grows, than there can be."""
    if available.endless:
        return []
    problems = []
    count, gpu = least_workers(e), uses_gpu(e, available)
    each = per_worker(e, gpu)
    most_has = f"{where} has at most" if available.more else f"{where} has"
    added = ", nodes that it can add included" if available.more else ""
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
    """The keys of the data sets that a Ray cluster reads and prepares."""
    nodes = {"data.train": e.data.train}
    val = e.data.val or {}
    nodes |= {"data.val": val} if "_target_" in val else {f"data.val.{name}": node for name, node in val.items()}
    targets = ("raytrainer.data.RayDataset", "raytrainer.data.ray_data.RayDataset")
    return [key for key, node in nodes.items() if node and node.get("_target_") in targets]


def _check_ray_data(e: Experiment, each: Mapping[str, float], available: Resources, most_has: str) -> list[str]:
    """Workers that take all CPUs: the tasks that prepare their data would wait for one for ever."""
    keys, count, share = through_ray(e), least_workers(e), each.get("CPU", 0.0)
    if not keys or available.cpus - share * count >= 1:
        return []
    has = f"{most_has} {amount('CPU', available.cpus)} for {count} workers of {amount('CPU', share)}"
    return [
        f"{keys[0]} needs a CPU beside the workers' for Ray's tasks, and {has}: let there be fewer, or each with less"
    ]


def _check_nodes(e: Experiment, each: Mapping[str, float], available: Resources, where: str) -> list[str]:
    """What is enough in all, and not on any one node."""
    if not (available.nodes or available.more):
        return []
    count, kind, strategy = least_workers(e), e.scaling.accelerator_type, e.scaling.placement_strategy
    # As Ray Train asks for a kind of accelerator: a trace of it on each node.
    places = available.places({**each, **({f"accelerator_type:{kind}": 0.001} if kind else {})}, strategy)
    if places >= count:
        return []
    one = ", ".join(amount(name, share) for name, share in each.items() if share) + (f" of {kind}" if kind else "")
    of = f"{where}, nodes that it can add included," if available.more else where
    if places == 0:
        return [f"a worker asks for {one}, and no node of {of} has that; scaling.resources_per_worker says how much"]
    strictly = f" with scaling.placement_strategy={strategy}" if strategy.startswith("STRICT") else ""
    room = f"room for {places}: what two nodes have together is none; scaling.num_workers={places} fits"
    return [f"scaling.num_workers={count} × ({one}){strictly}, and {of} has {room}"]


def _no_fit(e: Experiment, name: str, has: float) -> str:
    if name == "GPU":
        asked = "GPU" in (e.scaling.resources_per_worker or {})
        return f"{'scaling.resources_per_worker without GPU' if asked else 'scaling.use_gpu=false'} trains on CPUs"
    return f"scaling.resources_per_worker.{name} must be at most {has:.0f}"


def amount(name: str, count: float) -> str:
    """A resource in words: `2 CPUs`, `1 GPU`, `18.6 GiB of memory`."""
    if name == "memory":
        return f"{count / 2**30:.1f} GiB of memory"
    return f"{count:g} {name}" + ("s" if name in ("CPU", "GPU") and count != 1 else "")


def check_objects(e: Experiment) -> None:
    """Every `_target_` against its signature; the optimizer and its curve are made for one small weight.

    Those two cost nothing to make and judge their own values (`lr=-1`), which no signature says. A model or a dataset
    may be large: theirs are told when a worker makes them. Where patterns name parameters, the model is made without
    memory, on the meta device, if it can be.

    Raises:
        ConfigError: The first that would be refused.
    """
    check_targets(e)
    if (e.debug or e.cluster.kind == "inline") and (keys := through_ray(e)):
        raise ConfigError(
            "needs a Ray cluster, which cluster=inline and debug have not; cluster=local starts one",
            key=keys[0],
            value="RayDataset",
        )
    _check_optimizer(e)
    for name, node in e.callbacks.items():
        target = locate(f"callbacks.{name}", node["_target_"]) if node else None
        # A misspelt hook would never be called. What a function returns is not known here.
        if isinstance(target, type) and not any(hasattr(target, hook) for hook in HOOKS):
            raise ConfigError("has none of the hooks", key=f"callbacks.{name}", value=target.__name__, choices=HOOKS)
    for name, node in e.metrics.items():
        target = locate(f"metrics.{name}", node["_target_"]) if node else None
        lacks = [method for method in ("update", "compute", "reset") if not hasattr(target, method)]
        if isinstance(target, type) and lacks and target.__module__.partition(".")[0] != "torchmetrics":
            raise ConfigError(f"has no {lacks[0]}(), which a metric has", key=f"metrics.{name}", value=target.__name__)
        # Their classes take any keyword, and refuse a misspelt one only when they are made.
        if node and str(node["_target_"]).startswith("torchmetrics."):
            build(node)


def _check_optimizer(e: Experiment) -> None:
    target = str((e.optimizer or {}).get("_target_"))
    model: Any = unbuilt_model(e) if e.trainer.freeze or target == _MUON else None
    if model is not None:
        from raytrainer.optim import freeze

        freeze(model, e.trainer.freeze)
    if not e.optimizer or not target.startswith(_OURS_TO_TRY) or (target == _MUON and model is None):
        return
    import torch

    from raytrainer.optim import build_optimizer, build_scheduler

    # A matrix, since torch's Muon takes nothing else; ours looks for the model's own.
    small = torch.nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(factory(e.optimizer), model if target == _MUON else small)
    if e.lr_scheduler and str(e.lr_scheduler["_target_"]).startswith(_OURS_TO_TRY):
        build_scheduler(factory(e.lr_scheduler), optimizer, e.trainer.max_steps or 1_000_000)


_OURS_TO_TRY = ("torch.optim.", "raytrainer.optim.")
_MUON = "raytrainer.optim.Muon"


def unbuilt_model(e: Experiment) -> Any:
    """The experiment's model on the meta device: its modules, names and shapes, without memory or values.

    None where it cannot be made so, as one that reads its weights in its constructor, or that asks for a value.
    """
    import torch

    try:
        with torch.device("meta"):
            return build(e.model or {})
    except Exception:  # noqa: BLE001  whether it can be built at all is told by the worker that builds it
        return None


def check_init_from(e: Experiment, look_up: Callable[[str], str | None] = lambda _: None) -> None:
    """Whether there are weights where `init_from` says, and those of this model as far as their names tell.

    Args:
        e: The experiment.
        look_up: As `checkpoint.find_weights`.

    Raises:
        ConfigError: There is nothing of the kind; or what is there does not fit.
    """
    if e.init_from is None:
        return
    from raytrainer.checkpoint import find_weights, fit

    source = e.init_from.source or ""
    try:
        weights = find_weights(source, e.storage_path or "", look_up)
        shapes = weights.shapes()
    except (CheckpointError, StorageError) as error:
        reason = re.sub(r"^init_from=.*?: ", "", str(error))
        raise ConfigError(f"cannot be used: {reason}", key="init_from", value=redacted(source)) from error
    model = unbuilt_model(e) if shapes is not None else None
    if model is None or shapes is None:
        return
    if problem := fit(model, shapes, e.init_from).problem:
        advice = (
            "; init_from.mapping, exclude or strict=false say what to do with such names" if e.init_from.strict else ""
        )
        raise ConfigError(f"{problem}{advice}", key="init_from", value=weights.place)


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
        own = f"RAY_ADDRESS={address} is set and cluster=local starts a Ray of its own on this machine; "
        return [own + "use cluster=existing for that cluster, or unset RAY_ADDRESS"]
    return []


def is_elsewhere(e: Experiment, is_here: Callable[[str], bool] | None = None) -> bool:
    """Whether a run's processes are on other machines than this one.

    Args:
        e: The experiment.
        is_here: Says whether a host is this machine; None: `is_this_machine`.
    """
    kind, address = e.cluster.kind, e.cluster.address or ""
    if kind == "kuberay":
        return True
    if kind not in ("job", "existing") or address in ("", "auto"):
        return False
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    return not (is_here or is_this_machine)(host or "")


def is_this_machine(host: str) -> bool:
    """Whether a name or address is this machine's: on loopback, or of one of its interfaces."""
    import psutil

    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    own = {a.address.partition("%")[0] for several in psutil.net_if_addrs().values() for a in several}
    return all(address in own or ipaddress.ip_address(address).is_loopback for address in found)


def check_reach(e: Experiment, tracking_uri: str, is_here: Callable[[str], bool] | None = None) -> list[str]:
    """Storage, weights and tracking that only this machine has, of a run that is on others.

    Args:
        e: The experiment.
        tracking_uri: Where its MLflow run will be, absolute.
        is_here: As `is_elsewhere`.
    """
    if not is_elsewhere(e, is_here):
        return []
    shared, problems = e.cluster.shared_paths, []
    where = f"cluster={e.cluster.kind} runs on other machines"
    if (path := _local_path(e.storage_path or "")) is not None and not _is_below(path, shared):
        problems.append(
            f"storage_path={path} is this machine's, and {where}: storage_path=s3://bucket/runs (or gs://, abfs://), or "
            f"cluster.shared_paths=[{path}] if it is the same directory there"
        )
    endpoint = dict(parse_qsl(urlsplit(e.storage_path or "").query)).get("endpoint_override", "")
    if endpoint and _is_loopback(endpoint):
        problems.append(
            f"storage_path={Storage(e.storage_path or '').display} has an endpoint_override={endpoint} that is this "
            f"machine, and {where}: give the address that they reach"
        )
    # A run's name is none: only an existing file was made absolute.
    source = e.init_from.source if e.init_from else None
    if source and (path := _local_path(source)) and path.startswith("/") and not _is_below(path, shared):
        problems.append(
            f"init_from={path} is this machine's, and {where}: copy it to the storage (s3://…), or give the name of a run "
            "that is there, or name a directory that both have in cluster.shared_paths"
        )
    uri, fix = redacted(tracking_uri), "tracking.tracking_uri=https://… of an MLflow server that they reach"
    path = re.sub(r"^(sqlite(\+\w+)?:///|file://)", "", tracking_uri)
    if "://" not in path:
        if not _is_below(path, shared):
            problems.append(f"tracking.tracking_uri={uri} is a file of this machine, and {where}: {fix}")
    elif _is_loopback(tracking_uri):
        problems.append(f"tracking.tracking_uri={uri} is on this machine's loopback, and {where}: {fix}")
    return problems


def local_files(e: Experiment, sent: Collection[str] = ()) -> list[str]:
    """What a run that is on other machines may miss there: files of this one that its nodes name. A sentence each.

    Args:
        e: The experiment.
        sent: Relative paths of the files that go along.
    """
    found = []
    sections = {name: getattr(e, name) for name in ("model", "loss", "optimizer", "lr_scheduler", "callbacks")}
    sections |= {f"data.{name}": getattr(e.data, name) for name in ("train", "val", "collate_fn")}
    for key, value in (pair for name, node in sections.items() for pair in texts_of(node, name)):
        path = Path(value)
        try:
            there = (path.is_absolute() or "/" in value or "." in value) and path.exists()
        except (OSError, ValueError):  # too long, or with a NUL: no path
            continue
        relative = os.path.normpath(value)
        goes = any(name == relative or name.startswith(f"{relative}/") for name in sent)
        if there and not (goes if not path.is_absolute() else _is_below(value, e.cluster.shared_paths)):
            found.append(f"{key}={value} is on this machine, and does not go along; it must be on the workers' too")
    return found


def _local_path(text: str) -> str | None:
    """A path or `file://` URI as a path; None for any other URI."""
    try:
        return str(Storage(text).local_path)
    except StorageError:
        return None if "://" in text or not text.startswith("/") else text


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)) for folder in folders)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"http://{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def refuse(problems: list[str]) -> None:
    """Raises what was found.

    Raises:
        PreflightError: `problems` is not empty.
    """
    if problems:
        raise PreflightError(problems)
