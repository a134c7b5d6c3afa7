"""`logs ID`: what driver and ranks printed: from the run's directory, from its cluster while it runs there, and when both
are gone from MLflow."""

from __future__ import annotations

import codecs
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from raytrainer.errors import ConfigError, RunNotFound, StorageError
from raytrainer.history.finding import RunHandle, look_up, tracking_uri_of, with_tracking
from raytrainer.history.jobs import GOING, Clusters
from raytrainer.history.reconcile import verdict_of
from raytrainer.storage import Storage
from raytrainer.tracking.server import Server

_LOOK_S = 0.3  # between two looks at a growing file
_ALIVE_S = 3.0  # between two looks at whether its run still lives
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
    """The lines of a run's log, without their ends; with `follow` also those to come, until the run has ended.

    Args:
        identifier: Which run. Of a trial the log of all its sweep's trials.
        rank: The log of one rank; None: the driver's, which has what all ranks printed.
        follow: Whether to wait for more.
        say: Told where they come from, where that is not obvious.
        clusters, sleep: For tests.

    Raises:
        RunNotFound: There is no such run, or no log of it.
        ConfigError: It has no such rank.
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
    # The disk of a run that is here has all, at once; but of an attempt that has not come so far.
    if here is not None and known.submission_id == recorded:
        if not follow:
            _there(name, _logs_of(here))

        def has_ended() -> bool:
            clusters.forget(known)  # else it would say for ever what it said first
            return not follow or verdict_of(known, clusters).life == "dead"

        yield from _text(_growing(here, name, has_ended, sleep))
        _there(name, _logs_of(here))
        return
    cluster = clusters.of(known) if job is not None else None
    if job is not None and cluster is not None and job.status in GOING:
        pieces = cluster.tail(job.submission_id) if follow else [cluster.logs(job.submission_id)]
        yield from _of_rank(_text(piece.encode() for piece in pieces), rank)
        return
    try:
        kept = _kept(known, name, say)
    except RunNotFound:
        # Its driver was killed before it could keep them.
        if job is None or cluster is None:
            raise
        kept = _of_rank(_text([cluster.logs(job.submission_id).encode()]), rank)
    yield from kept


def _text(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines; the last one also without its end."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chunks:
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from whole
    if rest:
        yield rest


def _logs_of(storage: Storage) -> list[str]:
    return [entry.name.removesuffix(".log") for entry in storage.list("logs") if entry.name.endswith(".log")]


def _there(name: str, there: Iterable[str]) -> str:
    """The name, of a log that there is."""
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
    """What a local file holds, and will, until its run has ended and nothing more comes."""
    path, read, ended, looked = storage.local_path / "logs" / f"{name}.log", 0, False, -math.inf
    while True:
        with suppress(FileNotFoundError), path.open("rb") as file:  # a rank's comes with its first line
            file.seek(read)
            while chunk := file.read(1 << 20):
                read += len(chunk)
                yield chunk
        if ended:
            return  # what came between the last look and the end is read
        if time.monotonic() - looked >= _ALIVE_S:
            looked, ended = time.monotonic(), has_ended()
        if not ended:
            sleep(_LOOK_S)


def _of_rank(found: Iterable[str], rank: int | None) -> Iterator[str]:
    """A rank's lines out of the driver's, which says whose each is; None: all."""
    for line in found:
        if rank is None:
            yield line
        elif (match := _OF_RANK.match(line)) and int(match[1]) == rank:
            yield line[match.end() :]


def _kept(known: RunHandle, name: str, say: Callable[[str], None]) -> Iterator[str]:
    """What the driver left at its end: beside the checkpoints, or in MLflow."""
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
            name = "job"  # what its cluster had, of a driver that could not keep its own
        if paths:
            return _text([server.read_artifact(run_id, paths[_there(name, paths)])])
    host = known.stored.tags.get("raytrainer.host") if known.stored is not None else None
    running = known.stored is not None and known.stored.status == "RUNNING" and host is not None
    where = f": while it runs they are on {host}, where it was launched" if running else ""
    raise RunNotFound(f"{known.record.name} has no logs here{where}")
