"""`logs ID`: what driver and ranks printed, from the run directory, from the cluster while it runs, or from MLflow."""

from __future__ import annotations

import codecs
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from raytrainer.errors import ConfigError, RunNotFound, StorageError
from raytrainer.runs.finding import RunHandle, look_up, tracking_uri_of, with_tracking
from raytrainer.runs.jobs import Clusters
from raytrainer.runs.reconcile import verdict_of
from raytrainer.storage import Storage
from raytrainer.tracking.server import Server

_LOOK_S = 0.3  # between two reads of a growing file
_ALIVE_S = 3.0  # between two checks whether its run is alive
_OF_RANK = re.compile(r"\[rank (\d+)\] ?")


def lines(
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
    clusters, known = clusters or Clusters(), look_up(identifier)
    name = "trials" if known.trial is not None else "driver" if rank is None else f"rank-{rank}"
    here = known.storage if known.storage is not None and known.storage.is_local else None
    if here is not None and not here.exists("logs"):
        here = None
    recorded, job = known.submission_id, None
    if follow or here is None:
        known, job = clusters.attempt(known)
        clusters.tell(say)
    # A run directory on this machine has all lines at once, except those of an attempt that has not reached it yet.
    if here is not None and known.submission_id == recorded:
        if not follow:
            _there(name, _logs_of(here))

        def has_ended() -> bool:
            clusters.forget(known)  # otherwise its first answer would be reused
            return not follow or verdict_of(known, clusters).life == "dead"

        yield from _text(_growing(here, name, has_ended, sleep))
        _there(name, _logs_of(here))
        return
    if job is not None and job.is_active:
        yield from _of_rank(_text(piece.encode() for piece in job.logs(follow)), rank)
        return
    try:
        kept = _kept(known, name, say)
    except RunNotFound:
        # The driver was killed before it could keep its logs.
        if job is None:
            raise
        kept = _of_rank(_text(piece.encode() for piece in job.logs()), rank)
    yield from kept


def _text(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield whole lines, and the last one even without a line end."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chunks:
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from whole
    if rest:
        yield rest


def _logs_of(storage: Storage) -> list[str]:
    return [entry.name.removesuffix(".log") for entry in storage.list("logs") if entry.name.endswith(".log")]


def _there(name: str, there: Iterable[str]) -> str:
    """Return the name of a log, or raise an error if it does not exist."""
    there = list(there)
    if name in there:
        return name
    if name.startswith("rank-"):
        ranks = [n.removeprefix("rank-") for n in there if n.startswith("rank-")]
        raise ConfigError("has no log", key="--rank", value=name.removeprefix("rank-"), choices=ranks)
    raise RunNotFound(f"there is no log {name}; there are {', '.join(there) or 'none'}")


def _growing(
    storage: Storage, name: str, has_ended: Callable[[], bool], sleep: Callable[[float], None]
) -> Iterator[bytes]:
    """Yield the content of a growing local file until its run has ended and everything is read."""
    path, read, ended, looked = storage.local_path / "logs" / f"{name}.log", 0, False, -math.inf
    while True:
        with suppress(FileNotFoundError), path.open("rb") as file:  # a rank's file appears with its first line
            file.seek(read)
            while chunk := file.read(1 << 20):
                read += len(chunk)
                yield chunk
        if ended:
            return  # everything that was written before the end is read
        if time.monotonic() - looked >= _ALIVE_S:
            looked, ended = time.monotonic(), has_ended()
        if not ended:
            sleep(_LOOK_S)


def _of_rank(found: Iterable[str], rank: int | None) -> Iterator[str]:
    """Yield a rank's lines of the driver's log, which names the rank of each line; None for all lines."""
    for line in found:
        if rank is None:
            yield line
        elif (match := _OF_RANK.match(line)) and int(match[1]) == rank:
            yield line[match.end() :]


def _kept(known: RunHandle, name: str, say: Callable[[str], None]) -> Iterator[str]:
    """Return the log that the driver kept when it ended, in the run directory or in MLflow."""
    if known.storage is not None:
        try:
            if there := _logs_of(known.storage):
                return _text([known.storage.read_bytes(f"logs/{_there(name, there)}.log")])
        except StorageError as error:
            say(f"{error}; looking in MLflow")
    known = with_tracking(known)
    uri, run_id = tracking_uri_of(known.record), known.record.run_id
    if uri is not None and run_id is not None:
        server = Server(uri, timeout_s=60)
        paths = {path.rpartition("/")[2].removesuffix(".log"): path for path in server.artifacts(run_id, "logs")}
        if name == "driver" and name not in paths and "job" in paths:
            name = "job"  # the cluster's log, if the driver could not keep its own
        if paths:
            return _text([server.read_artifact(run_id, paths[_there(name, paths)])])
    host = known.stored.tags.get("raytrainer.host") if known.stored is not None else None
    running = known.stored is not None and known.stored.status == "RUNNING" and host is not None
    where = f": while it runs they are on {host}, where it was launched" if running else ""
    raise RunNotFound(f"{known.record.name} has no logs here{where}")
