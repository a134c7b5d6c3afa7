"""The common parts of raytrainer's HTTP clients: token, proxies, and the original cause of a failed request.

This module does not import requests, which takes 60 ms. The clients import it when they send the first request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrainer.core import proxies

if TYPE_CHECKING:
    import requests


class Authorization:
    """The `auth` of a request, with a value for its header. Without an `auth`, requests would send the password for the
    host from ~/.netrc; with the value None, nothing is sent."""

    def __init__(self, value: str | None) -> None:
        self._value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value is not None:
            request.headers["Authorization"] = self._value
        return request


def proxy_exemptions() -> dict[str, str]:
    """Return the argument `proxies` of a request, with which loopback addresses use no proxy."""
    return {name: value for name, value in proxies.exemptions().items() if name == "no_proxy"}


def root_cause(error: BaseException) -> BaseException:
    """Return the original error, which requests, urllib3 and MLflow wrap as cause, reason or argument."""
    seen = set[int]()
    while id(error) not in seen:
        seen.add(id(error))
        inner = [error.__cause__, getattr(error, "reason", None), *error.args, error.__context__]
        error = next((e for e in inner if isinstance(e, BaseException)), error)
    return error
