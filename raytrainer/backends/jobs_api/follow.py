"""Follow a job's log while it grows, over the Jobs API's websocket, and continue after a lost connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

import aiohttp

from raytrainer.backends.jobs_api.connection import Connection
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable

_CONNECT_S = 10.0
_HEARTBEAT_S = 15.0  # a connection that is silent for longer is lost; the traffic keeps a proxy from closing it
_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between two attempts
_PATIENCE_S = 120.0  # how long the cluster may not answer


def follow(
    connection: Connection,
    submission_id: str,
    has_ended: Callable[[], bool],
    whole: Callable[[], str],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yield the log in pieces, from its beginning until the job has ended, without repeating any part.

    Args:
        connection: The connection to the cluster.
        submission_id: The job's id.
        has_ended: Returns whether the job has ended; called each time a connection has ended.
        whole: Returns the whole log. It is the only source if no websocket gets through, for instance because a proxy
            does not upgrade connections.
        sleep: Replaced in tests.

    Raises:
        ClusterError: The cluster has not answered for two minutes, or refuses the request.
    """
    shown, failures, answered = 0, 0, time.monotonic()
    while True:
        try:
            position = 0  # the server sends the log from the beginning on each connection
            for piece in _pieces(connection, submission_id):
                failures = 0
                new, position = piece[max(0, shown - position) :], position + len(piece)
                shown += len(new)
                if new:
                    yield new
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # the requests below show what it means
        text = ""
        try:
            ended = has_ended()  # asked before the log is read, because a job that has ended adds nothing to its log
            try:
                text = whole()
            except (ClusterUnreachable, ClusterDenied):
                raise
            except ClusterError:  # the log was lost with its node
                pass
            answered = time.monotonic()
        except ClusterUnreachable:
            if time.monotonic() - answered > _PATIENCE_S:
                raise
        else:
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if ended:
                return
        sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
        failures += 1


def _pieces(connection: Connection, submission_id: str) -> Iterator[str]:
    """Yield the messages of one connection."""
    loop = asyncio.new_event_loop()
    try:
        session = loop.run_until_complete(_session(connection))
        try:
            socket = loop.run_until_complete(_connected(session, connection, submission_id))
            while (message := loop.run_until_complete(socket.receive())).type is aiohttp.WSMsgType.TEXT:
                yield message.data
        finally:
            loop.run_until_complete(session.close())
    finally:
        loop.close()


async def _session(connection: Connection) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers=connection.headers(), timeout=aiohttp.ClientTimeout(total=None))


async def _connected(
    session: aiohttp.ClientSession, connection: Connection, submission_id: str
) -> aiohttp.ClientWebSocketResponse:
    connecting = session.ws_connect(
        f"{connection.address}/api/jobs/{quote(submission_id, safe='')}/logs/tail",
        ssl=connection.ssl_context() or True,
        proxy=connection.proxy(),
        heartbeat=_HEARTBEAT_S,
        max_msg_size=0,  # a line may be long
    )
    return await asyncio.wait_for(connecting, _CONNECT_S)
