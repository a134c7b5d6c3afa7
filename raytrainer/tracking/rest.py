"""Search a tracking server over plain HTTP, because importing mlflow would delay a listing by a second or more.
It only reads. Features that need MLflow (authentication by a plugin, workspaces) are left to MLflow's own client."""

from __future__ import annotations

import base64
import configparser
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from raytrainer.core import proxies
from raytrainer.core.http import Authorization, proxy_exemptions
from raytrainer.errors import TrackingUnreachable
from raytrainer.tracking.failures import Rejected, denied, reason_of, redacted, unusable
from raytrainer.tracking.server import StoredRun

if TYPE_CHECKING:
    import requests

# If one of these is set, or the address has another scheme, MLflow's own client is used.
_NOT_PLAIN = (
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_WORKSPACE",
)


def is_plain(uri: str) -> bool:
    """Return whether `Rest` can query the server at this address in the same way as MLflow's client."""
    return uri.startswith(("http://", "https://")) and not any(os.environ.get(name) for name in _NOT_PLAIN)


class Rest:
    """The search part of a tracking server's REST interface. It raises the same errors as `Server`.

    Args:
        uri: An http(s) address, which may contain a user and a password.
        timeout_s: The timeout of one request, in seconds.
    """

    def __init__(self, uri: str, *, timeout_s: float = 10) -> None:
        self._uri, self._timeout_s = uri, timeout_s
        self._base = redacted(uri).rstrip("/")

    def search(self, where: str, limit: int) -> list[StoredRun]:
        """Search runs as `Server.search` does."""
        experiments: list[str] = []
        token: str | None = None
        while token != "":
            page = {"max_results": 1000, **({"page_token": token} if token else {})}
            answer = self._post("experiments/search", page)
            experiments += [str(e["experiment_id"]) for e in answer.get("experiments", [])]
            token = str(answer.get("next_page_token") or "")
        query = {
            "experiment_ids": experiments,
            "filter": where,
            "max_results": limit,
            "order_by": ["attributes.start_time DESC"],
        }
        return [_stored(run) for run in self._post("runs/search", query).get("runs", [])] if experiments else []

    def _post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self._response(f"{self._base}/api/2.0/mlflow/{endpoint}", body)
            if response.status_code in (401, 403):
                raise denied(self._uri, response.status_code)
            if response.status_code >= 400:
                kind = Rejected if response.status_code in (400, 404, 413, 422) else TrackingUnreachable
                raise kind(
                    f"the tracking server {self._base} answers {response.status_code} {response.reason}"
                    f"{proxies.hint(self._base)}"
                )
        except (OSError, ValueError) as error:  # ValueError: the address is invalid
            raise unusable(self._uri, reason_of(error, self._uri)) from None
        with suppress(ValueError):  # the answer is not JSON
            content = response.json()
            if isinstance(content, dict):
                return content
        raise TrackingUnreachable(f"the tracking server {self._base} does not answer like an MLflow server")

    def _response(self, url: str, body: dict[str, Any]) -> requests.Response:
        import requests  # 60 ms, which a listing without a server does not need

        is_insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unverified HTTPS request")  # the user has asked for it
            return requests.post(
                url,
                json=body,
                auth=_credentials(self._uri),
                timeout=self._timeout_s,
                # Without the variable, requests reads REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE.
                verify=False if is_insecure else os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True,
                proxies=proxy_exemptions(),
            )


def _stored(run: dict[str, Any]) -> StoredRun:
    info, data = run["info"], run.get("data", {})
    metrics = data.get("metrics", [])
    end = int(info.get("end_time") or 0)
    return StoredRun(
        run_id=str(info.get("run_id") or info["run_uuid"]),
        name=str(info.get("run_name", "")),
        experiment_id=str(info["experiment_id"]),
        status=str(info.get("status", "")),
        started=int(info.get("start_time") or 0) / 1e3,
        ended=end / 1e3 if end else None,
        params={str(p["key"]): str(p.get("value", "")) for p in data.get("params", [])},
        tags={str(t["key"]): str(t.get("value", "")) for t in data.get("tags", [])},
        # NaN and infinity, which JSON does not have, arrive as text.
        metrics={str(m["key"]): (float(m["value"]), int(m.get("step", 0))) for m in metrics},
        logged=max((int(m.get("timestamp", 0)) for m in metrics), default=0) / 1e3 or None,
    )


def _credentials(uri: str) -> Authorization | None:
    """Return user and password, else the token; None if there are none, so that ~/.netrc is read, as by MLflow.

    User and password come from the address, else from MLflow's variables, else from its credentials file.
    """
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    file = Path.home() / ".mlflow" / "credentials"
    if not (user and password) and file.exists():
        parser = configparser.ConfigParser()
        parser.read(file)
        user = user or parser.get("mlflow", "mlflow_tracking_username", fallback=None)
        password = password or parser.get("mlflow", "mlflow_tracking_password", fallback=None)
    parts = urlsplit(uri)
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
    if user and password:
        return Authorization("Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return Authorization(f"Bearer {token}") if token else None
