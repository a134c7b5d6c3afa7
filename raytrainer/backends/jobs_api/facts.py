"""The capacity of a cluster and the holders of its resources; what can never run there, and what a job waits for.

This module makes no requests. `attempt.waiting` and `ray_internals` do the same for a cluster that this process has joined.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import metadata

from raytrainer.config import Experiment
from raytrainer.preflight import Resources, amount, check_resources, least_workers, per_worker, uses_gpu

_HOLDERS = 5  # the most that a message names
_EPSILON = 1e-9  # 3 × 0.1 is 0.30000000000000004


@dataclass(frozen=True)
class Holder:
    """A job, or a driver without a job, and the resources that it holds.

    Attributes:
        name: The name of the run, else the submission id, else the driver's place.
        user: Who submitted it, if known.
        submission_id: None for a driver without a job.
        resources: All resources that it holds.
        started: Seconds since the epoch.
    """

    name: str
    user: str | None
    submission_id: str | None
    resources: Mapping[str, float]
    started: float | None


@dataclass(frozen=True)
class ClusterFacts:
    """The current state of a cluster.

    Attributes:
        address: The cluster's address.
        ray_version: The version on its head node.
        python_version: The version on its head node; None for an old Ray that does not report it.
        nodes: The resources of each live node.
        free: The free resources of each node, in the same order.
        may_grow: Whether it has an autoscaler, whose limit the Jobs API does not report.
        holders: The jobs and drivers that hold resources.
        head: The address of its head node within the cluster; None if unknown.
    """

    address: str
    ray_version: str
    python_version: str | None
    nodes: tuple[Mapping[str, float], ...]
    free: tuple[Mapping[str, float], ...] = ()
    may_grow: bool = False
    holders: tuple[Holder, ...] = ()
    head: str | None = None

    @property
    def total(self) -> dict[str, float]:
        return total_of(self.nodes)

    @property
    def available(self) -> dict[str, float]:
        return total_of(self.free)

    @property
    def resources(self) -> Resources:
        """The most that the cluster can have."""
        return Resources.of_nodes(self.nodes, endless=self.may_grow)

    def version_problem(self) -> str | None:
        """Return why raytrainer cannot run there because of the Ray or Python version; None if it can."""
        ours = metadata("raytrainer")
        ray = next(text for text in ours.get_all("Requires-Dist") or () if re.match(r"ray\b", text))
        for name, has, needs in (
            ("Python", self.python_version, ours["Requires-Python"] or ""),
            ("ray", self.ray_version, ray.partition(";")[0]),
        ):
            if has is None:
                continue
            bounds = dict(re.findall(r"(>=|<)\s*([\d.]+)", needs))
            least, end = bounds.get(">=", "0"), bounds.get("<")
            if not _numbers(least) <= _numbers(has) < (_numbers(end) if end else (math.inf,)):
                range_ = f">={least},<{end}" if end else f">={least}"
                return f"{self.address} has {name} {has}, and this raytrainer supports {name}{range_} there"
        return None

    def other_versions(self, ray: str, python: str) -> list[str]:
        """Return a sentence for each version that differs from the local one but usually works."""
        versions = [("ray", self.ray_version, ray)] if self.ray_version != ray else []
        if self.python_version is not None and _numbers(self.python_version)[:2] != _numbers(python)[:2]:
            versions.append(("Python", self.python_version, python))
        return [
            f"the cluster at {self.address} has {name} {there}, and here it is {here}" for name, there, here in versions
        ]

    def problems(self, e: Experiment) -> list[str]:
        """Return a sentence for each demand of a run that the cluster cannot meet with its present nodes."""
        now = replace(self, may_grow=False)
        problems = check_resources(e, now.resources, f"the cluster at {self.address}")
        driver = {name: share for name, share in (e.cluster.driver_resources or {}).items() if share}
        if problems or not driver:
            return problems
        workers = [per_worker(e, uses_gpu(e, now.resources))] * least_workers(e)
        key = f"cluster.driver_resources={{{', '.join(f'{name}: {share:g}' for name, share in driver.items())}}}"
        if reason := impossible([driver], now):
            return [f"{key}: {reason}"]
        if reason := impossible([driver, *workers], now):
            return [f"{key} and the workers: {reason}"]
        return []


def explain_waiting(
    demands: Sequence[Sequence[Mapping[str, float]]],
    facts: ClusterFacts,
    leave_out: str | None = None,
    now: float | None = None,
) -> str:
    """Return what a job waits for: `for 4 GPUs: 2 of 8 GPUs free; resnet-a (anna) holds 6 GPUs for 3 h`.

    Args:
        demands: Lists of bundles; the bundles of one list are requested together, each on one node.
        facts: The state of the cluster.
        leave_out: The submission id of the job that waits.
        now: Seconds since the epoch.
    """
    if reason := next(filter(None, (impossible(bundles, facts) for bundles in demands)), None):
        return reason
    bundles = [bundle for group in demands for bundle in group]
    wanted, total, free = total_of(bundles), facts.total, facts.available
    lacking = [name for name, share in wanted.items() if share > free.get(name, 0.0) + _EPSILON]
    names = lacking or [name for name, share in wanted.items() if share]
    if not lacking and _fits(bundles, facts.free):
        return f"for {_amounts(wanted, names)}: enough is free, and it is about to be placed"
    most = {name: max((node.get(name, 0.0) for node in facts.free), default=0.0) for name in names}
    parts = [f"enough is free, but at most {_amounts(most, names)} on one node"]
    if lacking:
        parts = [", ".join(_free(name, free.get(name, 0.0), total.get(name, 0.0)) for name in names)]
    parts += _holders_text(_holders_of(names, facts, leave_out), names, time.time() if now is None else now)
    if facts.may_grow:
        parts.append("the cluster can add nodes")
    return f"for {_amounts(wanted, names)}: {'; '.join(parts)}"


def _holders_text(holders: Sequence[Holder], names: Sequence[str], now: float) -> list[str]:
    parts = [_holding(holder, names, now) for holder in holders[:_HOLDERS]]
    more = len(holders) - _HOLDERS
    return [*parts, f"{more} other jobs hold the rest"] if more > 0 else parts


def _holders_of(names: Sequence[str], facts: ClusterFacts, leave_out: str | None) -> list[Holder]:
    """Return who holds some of the named resources, those with the largest shares of the cluster first."""
    others = [h for h in facts.holders if leave_out is None or h.submission_id != leave_out]
    shares = [sum(h.resources.get(n, 0.0) / (facts.total.get(n) or 1.0) for n in names) for h in others]
    pairs = sorted(zip(shares, others, strict=True), key=lambda pair: (-pair[0], pair[1].name))
    return [holder for share, holder in pairs if share]


def impossible(bundles: Sequence[Mapping[str, float]], facts: ClusterFacts) -> str | None:
    """Return why the cluster can never provide the bundles; None if it can, or if it may grow."""
    most = facts.resources
    if most.endless:
        return None
    for name, share in total_of(bundles).items():
        has = most.get(name)
        if has is not None and share > has + _EPSILON:
            return (
                f"{amount(name, share)} asked for, and {facts.address} has {amount(name, has)}: the job can never run"
            )
    for bundle, count in Counter(tuple(sorted(bundle.items())) for bundle in bundles).items():
        room = most.places(dict(bundle))
        if room < count:
            each = _amounts(dict(bundle), [name for name, share in bundle if share])
            return (
                f"{count} × ({each}), each on one node, and {facts.address} has room for {room}: the job can never run"
            )
    return None


def total_of(sets: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of several sets of resources, by name."""
    total: dict[str, float] = {}
    for resources in sets:
        for name, share in resources.items():
            total[name] = total.get(name, 0.0) + share
    return total


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _fits(bundles: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]) -> bool:
    """Return whether each bundle fits on a node if the largest are placed first."""
    left = [dict(node) for node in free]
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0.0), b.get("CPU", 0.0), sum(b.values())), reverse=True):
        for node in left:
            if all(share <= node.get(name, 0.0) + _EPSILON for name, share in bundle.items()):
                for name, share in bundle.items():
                    node[name] = node.get(name, 0.0) - share
                break
        else:
            return False
    return True


def _free(name: str, free: float, total: float) -> str:
    return (
        f"{free / 2**30:.1f} of {amount(name, total)} free"
        if name == "memory"
        else f"{free:g} of {amount(name, total)} free"
    )


def _amounts(resources: Mapping[str, float], names: Iterable[str]) -> str:
    return ", ".join(amount(name, resources[name]) for name in names)


def _holding(holder: Holder, names: Iterable[str], now: float) -> str:
    held = _amounts(holder.resources, [name for name in names if holder.resources.get(name)])
    who = f"{holder.name} ({holder.user})" if holder.user else holder.name
    return f"{who} holds {held}" + ("" if holder.started is None else f" for {_span(now - holder.started)}")


def _span(seconds: float) -> str:
    for unit, size, least in (("days", 86_400, 172_800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
