"""Search a tracking server over plain HTTP, because importing mlflow would delay a listing by a second or more.
It only reads. Features that need MLflow (authentication by a plugin, workspaces) are left to MLflow's own client."""

from __future__ import annotations

import base64
import configparser
import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from raytrainer.core import proxies
from raytrainer.errors import TrackingUnreachable
from raytrainer.tracking.server import Rejected, StoredRun, denied, redacted, with_fix, without_secrets

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
        through = urllib.request.ProxyHandler(None if proxies.proxy_of(self._base) else {})
        self._opener = urllib.request.build_opener(through, urllib.request.HTTPSHandler(context=_tls(self._base)))
        self._headers = {"Content-Type": "application/json", **_credentials(uri)}

    def search(self, where: str, limit: int) -> list[StoredRun]:
        """Search runs as `Server.search` does."""
        experiments: list[str] = []
        token: str | None = None
        while token != "":
            page = {"max_results": 1000, **({"page_token": token} if token else {})}
            found = self._post("experiments/search", page)
            experiments += [str(e["experiment_id"]) for e in found.get("experiments", [])]
            token = str(found.get("next_page_token") or "")
        asked = {
            "experiment_ids": experiments,
            "filter": where,
            "max_results": limit,
            "order_by": ["attributes.start_time DESC"],
        }
        return [_stored(run) for run in self._post("runs/search", asked).get("runs", [])] if experiments else []

    def _post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        url, data = f"{self._base}/api/2.0/mlflow/{endpoint}", json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)  # noqa: S310  `is_plain` has checked the scheme
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403):
                    raise denied(self._uri, error.code) from None
                hint = proxies.hint(self._base)
                kind = Rejected if error.code in (400, 404, 413, 422) else TrackingUnreachable
                raise kind(f"the tracking server {self._base} answers {error.code} {error.reason}{hint}") from None
        except (OSError, ValueError) as error:  # ValueError: the answer is not JSON, or the address is invalid
            reason = with_fix(without_secrets(str(getattr(error, "reason", None) or error), self._uri))
            raise TrackingUnreachable(
                f"the tracking server {self._base} cannot be used: {reason}{proxies.hint(self._base)}"
            ) from None
        if not isinstance(found, dict):
            raise TrackingUnreachable(f"the tracking server {self._base} does not answer like an MLflow server")
        return found


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


def _credentials(uri: str) -> dict[str, str]:
    """Return the authorization header: user and password, else the token.

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
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls(base: str) -> ssl.SSLContext | None:
    if not base.startswith("https://"):
        return None
    # The variables that requests reads, and therefore MLflow.
    bundle = next(
        (
            os.environ[name]
            for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
            if os.environ.get(name)
        ),
        None,
    )
    if bundle is None:
        context = ssl.create_default_context()
    elif Path(bundle).is_dir():
        context = ssl.create_default_context(capath=bundle)
    else:
        context = ssl.create_default_context(cafile=bundle)
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
