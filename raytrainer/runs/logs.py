"""`logs ID`: what driver and ranks printed, from the run directory, from the cluster while it runs, or from MLflow."""

from __future__ import annotations

import argparse
import codecs
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from raytrainer import provenance
from raytrainer.core import streams
from raytrainer.errors import ConfigError, RunNotFound, StorageError
from raytrainer.runs import printing
from raytrainer.runs.arguments import VerbParser, count
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.jobs import Clusters, Job
from raytrainer.runs.reconcile import check_liveness
from raytrainer.runs.resolve import resolve_run, tracking_uri_of, with_mlflow_run
from raytrainer.storage import Storage
from raytrainer.tracking.server import Server

ABOUT = "What a run printed. Ctrl-C while following stops nothing."
_READ_S = 0.3  # between two reads of a growing file
_CHECK_S = 3.0  # between two checks whether its run is alive
_RANK = re.compile(r"\[rank (\d+)\] ?")


def add_arguments(parser: VerbParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="follow new output until the run ends")
    parser.add_argument("-r", "--rank", metavar="N", type=count, help="only the output of this rank")
    parser.add_id()


def run(arguments: argparse.Namespace) -> int:
    identifier, follow = arguments.id, arguments.follow
    try:
        for line in log_lines(identifier, rank=arguments.rank, follow=follow, say=printing.say):
            print(json.dumps({"line": line}) if arguments.json else line, flush=follow)
            if streams.is_lost(sys.stdout):  # `logs -f ID | head`
                break
    except KeyboardInterrupt:
        printing.say(f"stopped following; the run continues. {provenance.program()} stop {identifier} stops it")
        return 130
    return 0


def log_lines(
    identifier: str,
    *,
    rank: int | None = None,
    follow: bool = False,
    say: Callable[[str], None] = lambda text: None,
    clusters: Clusters | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yield the lines of a run's log, without line ends; with `follow` also new ones, until the run has ended.

    Args:
        identifier: The ID of a run. For a trial, the log of all trials of its sweep.
        rank: Whose log to read; None for the driver's, which has the output of all ranks.
        follow: Whether to wait for more lines.
        say: Called with a message if a source cannot be used.
        clusters, sleep: For tests.

    Raises:
        RunNotFound: There is no such run, or no log of it.
        ConfigError: The run has no such rank.
    """
    clusters, handle = clusters or Clusters(), resolve_run(identifier)
    name = "trials" if handle.trial is not None else "driver" if rank is None else f"rank-{rank}"
    local = handle.storage if handle.storage is not None and handle.storage.is_local else None
    if local is not None and not local.exists("logs"):
        local = None
    recorded, job = handle.submission_id, None
    if follow or local is None:
        handle, job = clusters.attempt(handle)
        clusters.report_failures(say)
    # A run directory on this machine has all lines at once, except those of an attempt that has not reached it yet.
    if local is not None and handle.submission_id == recorded:
        yield from _local_lines(handle, local, name, follow, clusters, sleep)
        return
    yield from _remote_lines(handle, name, rank, follow, job, say)


def _remote_lines(
    handle: RunHandle, name: str, rank: int | None, follow: bool, job: Job | None, say: Callable[[str], None]
) -> Iterator[str]:
    """Return the lines of a log from the run's job while that is active, else as the driver saved them."""
    if job is not None and job.is_active:
        return _of_rank(_lines(piece.encode() for piece in job.logs(follow)), rank)
    try:
        return _saved_lines(handle, name, say)
    except RunNotFound:  # the driver was killed before it could save its logs
        if job is None:
            raise
        return _of_rank(_lines(piece.encode() for piece in job.logs()), rank)


def _local_lines(
    handle: RunHandle,
    storage: Storage,
    name: str,
    follow: bool,
    clusters: Clusters,
    sleep: Callable[[float], None],
) -> Iterator[str]:
    """Yield the lines of a log in a run directory on this machine."""
    if not follow:
        _checked(name, _log_names(storage))

    def has_ended() -> bool:
        clusters.forget(handle)  # otherwise its first answer would be reused
        return not follow or check_liveness(handle, clusters).state == "dead"

    yield from _lines(_growing(storage, name, has_ended, sleep))
    _checked(name, _log_names(storage))


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield whole lines, and the last one even without a line end."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chunks:
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from whole
    if rest:
        yield rest


def _log_names(storage: Storage) -> list[str]:
    return [entry.name.removesuffix(".log") for entry in storage.list("logs") if entry.name.endswith(".log")]


def _checked(name: str, existing: Iterable[str]) -> str:
    """Return the name of a log, or raise an error if it does not exist."""
    existing = list(existing)
    if name in existing:
        return name
    if name.startswith("rank-"):
        ranks = [n.removeprefix("rank-") for n in existing if n.startswith("rank-")]
        raise ConfigError("has no log", key="--rank", value=name.removeprefix("rank-"), choices=ranks)
    raise RunNotFound(f"there is no log {name}; there are {', '.join(existing) or 'none'}")


def _growing(
    storage: Storage, name: str, has_ended: Callable[[], bool], sleep: Callable[[float], None]
) -> Iterator[bytes]:
    """Yield the content of a growing local file until its run has ended and everything is read."""
    path, position, ended, last_check = storage.local_path / "logs" / f"{name}.log", 0, False, -math.inf
    while True:
        with suppress(FileNotFoundError), path.open("rb") as file:  # a rank's file appears with its first line
            file.seek(position)
            while chunk := file.read(1 << 20):
                position += len(chunk)
                yield chunk
        if ended:
            return  # everything that was written before the end is read
        if time.monotonic() - last_check >= _CHECK_S:
            last_check, ended = time.monotonic(), has_ended()
        if not ended:
            sleep(_READ_S)


def _of_rank(lines: Iterable[str], rank: int | None) -> Iterator[str]:
    """Yield a rank's lines of the driver's log, which names the rank of each line; None for all lines."""
    for line in lines:
        if rank is None:
            yield line
        elif (match := _RANK.match(line)) and int(match[1]) == rank:
            yield line[match.end() :]


def _saved_lines(handle: RunHandle, name: str, say: Callable[[str], None]) -> Iterator[str]:
    """Return the log that the driver saved when it ended, in the run directory or in MLflow."""
    if handle.storage is not None:
        try:
            if names := _log_names(handle.storage):
                return _lines([handle.storage.read_bytes(f"logs/{_checked(name, names)}.log")])
        except StorageError as error:
            say(f"{error}; looking in MLflow")
    handle = with_mlflow_run(handle)
    uri, run_id, run = tracking_uri_of(handle.record), handle.record.run_id, handle.mlflow_run
    if uri is not None and run_id is not None:
        server = Server(uri, timeout_s=60)
        paths = {path.rpartition("/")[2].removesuffix(".log"): path for path in server.artifacts(run_id, "logs")}
        if name == "driver" and name not in paths and "job" in paths:
            name = "job"  # the cluster's log, if the driver could not save its own
        if paths:
            return _lines([server.read_artifact(run_id, paths[_checked(name, paths)])])
    host = run.tags.get("raytrainer.host") if run is not None and run.status == "RUNNING" else None
    where = "" if host is None else f": while it runs they are on {host}, where it was launched"
    raise RunNotFound(f"{handle.name} has no logs here{where}")
