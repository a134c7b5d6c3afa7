"""Check that a run can reach what it needs: storage, tracking, variables, and files that only one machine has."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from raytrainer.config import Experiment, texts_of
from raytrainer.core import proxies
from raytrainer.errors import StorageError, TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.preflight.temporary import check_temporary
from raytrainer.storage import Storage
from raytrainer.tracking import redacted


def check_storage(check_writable: Callable[[], None], path: str) -> list[str]:
    """Return a problem if `storage_path` is not writable."""
    try:
        check_writable()
    except StorageError as error:
        return [f"storage_path={path} cannot be used: {error}"]
    return []


def check_tracking(probe: Callable[[str], None], uri: str, required: bool) -> list[str]:
    """Return a problem if the tracking server is unreachable or refuses; none if `tracking.required=false`."""
    if not required:
        return []
    try:
        probe(uri)
    except (TrackingUnreachable, TrackingDenied) as error:
        return [f"{error}; tracking.required=false trains without it and keeps the metrics until it answers"]
    except TrackingError as error:  # the server refuses this run, and not requiring it would not help
        return [str(error)]
    return []


def check_environment(e: Experiment, environ: Mapping[str, str]) -> list[str]:
    """Return problems of variables that would send the run elsewhere, and of the temporary directory."""
    if e.backend.ray == "embedded" and (address := environ.get("RAY_ADDRESS")):
        own = f"RAY_ADDRESS={address} is set and cluster=local starts its own Ray on this machine; "
        return [own + "use cluster=existing for that cluster, or unset RAY_ADDRESS"]
    return check_temporary(e, environ)


def is_elsewhere(e: Experiment, is_here: Callable[[str], bool] | None = None) -> bool:
    """Return whether a run's processes are on other machines than this one.

    Args:
        e: The experiment.
        is_here: Returns whether a host is this machine; None: `is_this_machine`.
    """
    location, address = e.backend.location, e.cluster.address or ""
    if location != "address":
        return location == "elsewhere"
    if address in ("", "auto"):
        return False
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    return not (is_here or is_this_machine)(host or "")


def is_this_machine(host: str) -> bool:
    """Return whether a name or address belongs to this machine: to loopback, or to one of its interfaces."""
    import psutil

    try:
        addresses = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    own = {a.address.partition("%")[0] for interface in psutil.net_if_addrs().values() for a in interface}
    return all(address in own or ipaddress.ip_address(address).is_loopback for address in addresses)


def check_reach(e: Experiment, tracking_uri: str, is_here: Callable[[str], bool] | None = None) -> list[str]:
    """Return problems if a run on other machines uses storage, weights or tracking that only this machine has.

    Args:
        e: The experiment.
        tracking_uri: The absolute URI of its tracking server.
        is_here: As in `is_elsewhere`.
    """
    if not is_elsewhere(e, is_here):
        return []
    shared, problems = e.cluster.shared_paths, []
    where = f"cluster={e.cluster.kind} runs on other machines"
    if (path := _local_path(e.storage_path or "")) is not None and not _is_below(path, shared):
        problems.append(
            f"storage_path={path} is on this machine, and {where}: set storage_path=s3://bucket/runs (or gs://, abfs://), or "
            f"cluster.shared_paths=[{path}] if it is the same directory there"
        )
    endpoint = dict(parse_qsl(urlsplit(e.storage_path or "").query)).get("endpoint_override", "")
    if endpoint and _is_loopback(endpoint):
        problems.append(
            f"storage_path={Storage(e.storage_path or '').display} has an endpoint_override={endpoint} that is on "
            f"this machine, and {where}: give the address that they reach"
        )
    # The name of a run is not a path: only an existing file was made absolute.
    source = e.init_from.source if e.init_from else None
    if source and (path := _local_path(source)) and path.startswith("/") and not _is_below(path, shared):
        problems.append(
            f"init_from={path} is on this machine, and {where}: copy it to the storage (s3://…), or give the name of a run "
            "that is there, or list a directory that both share in cluster.shared_paths"
        )
    uri, fix = redacted(tracking_uri), "tracking.tracking_uri=https://… of an MLflow server that they reach"
    path = re.sub(r"^(sqlite(\+\w+)?:///|file://)", "", tracking_uri)
    if "://" not in path:
        if not _is_below(path, shared):
            problems.append(f"tracking.tracking_uri={uri} is a file on this machine, and {where}: {fix}")
    elif _is_loopback(tracking_uri):
        problems.append(f"tracking.tracking_uri={uri} is a loopback address of this machine, and {where}: {fix}")
    return problems


def local_files(e: Experiment, sent: Collection[str] = ()) -> list[str]:
    """Return a sentence for each local file that a node names and that a run on other machines may lack.

    Args:
        e: The experiment.
        sent: Relative paths of the files that are sent.
    """
    problems = []
    sections = {name: getattr(e, name) for name in ("model", "loss", "optimizer", "lr_scheduler", "callbacks")}
    sections |= {f"data.{name}": getattr(e.data, name) for name in ("train", "val", "collate_fn")}
    for key, value in (pair for name, node in sections.items() for pair in texts_of(node, name)):
        path = Path(value)
        try:
            there = (path.is_absolute() or "/" in value or "." in value) and path.exists()
        except (OSError, ValueError):  # a text that is too long or has a NUL is not a path
            continue
        relative = os.path.normpath(value)
        goes = any(name == relative or name.startswith(f"{relative}/") for name in sent)
        if there and not (goes if not path.is_absolute() else _is_below(value, e.cluster.shared_paths)):
            problems.append(
                f"{key}={value} is on this machine and is not uploaded; it must also be on the workers' machines"
            )
    return problems


def _local_path(text: str) -> str | None:
    """Return a path or `file://` URI as a path; None for any other URI."""
    try:
        return str(Storage(text).local_path)
    except StorageError:
        return None if "://" in text or not text.startswith("/") else text


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)) for folder in folders)


def _is_loopback(address: str) -> bool:
    return proxies.is_loopback(urlsplit(address if "://" in address else f"http://{address}").hostname or "")
