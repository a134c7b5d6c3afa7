"""Ray's client of the Jobs API with another way to send requests. Importing this module imports Ray, but not torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import requests
from ray.job_submission import JobSubmissionClient


class JobClient(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which builds and uploads packages and submits jobs.

    Args:
        address: The address of the dashboard.
        send: Sends a request: `send(method, endpoint, data=BYTES or None, json=OBJECT or None)` returns the response.
    """

    def __init__(self, address: str, send: Callable[..., requests.Response]) -> None:
        self._send = send
        # With a header set, Ray's client does not look for a token. `send` adds its own headers instead.
        super().__init__(address, headers={"Authorization": ""})

    def _do_request(
        self, method: str, endpoint: str, *, data: bytes | None = None, json_data: Any = None, **_: Any
    ) -> requests.Response:
        return self._send(method, endpoint, data=data, json=json_data)
