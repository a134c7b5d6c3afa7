"""HTTP to a cluster's dashboard. Each request has a time limit, and each error says what failed and how to fix it."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import certifi
import requests

from raytrainer.backends.jobs_api.auth import Token, denied
from raytrainer.core import proxies
from raytrainer.core.background import in_background
from raytrainer.core.http import Authorization, proxy_exemptions, root_cause
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError

T = TypeVar("T")

_CONNECT_S, _READ_S = 4.0, 5.0
# Added to both limits together, because socket timeouts cover neither a name lookup nor several dead addresses of a
# host.
_MORE_S = 0.5
_PROBE_S = 1.5
# OpenSSL's names for an answer that is not TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
_GONE = (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)


class NotThere(ClusterError):
    """The server answers 404."""


class Connection:
    """A connection to the dashboard at an address.

    Args:
        address: http(s)://host[:port][/path].
        ca_file: A file or directory of certificates to trust for it; None: the usual ones.
        token: Sent with each request.

    Raises:
        ConfigError: `ca_file` does not exist, holds no certificate, or is given for an http address.
    """

    def __init__(self, address: str, ca_file: str | None = None, token: Token | None = None) -> None:
        self.address = address.rstrip("/")
        self.token, self._ca_file = token, ca_file
        parts = urlsplit(self.address)
        self._host, self._is_tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._tls = _trusting(ca_file, self.address) if ca_file is not None else None
        self._verify = str(Path(ca_file).expanduser()) if ca_file is not None else True
        self._session = requests.Session()
        self._session.auth = Authorization(f"Bearer {token.value}" if token is not None else None)

    def get(self, path: str, kind: type[T], read_s: float = _READ_S, **params: Any) -> T:
        """Return the JSON of an answer.

        Args:
            path: The path, with a leading /.
            kind: The expected type: dict or list.
            read_s: The longest time without a byte, in seconds.
            params: The query.

        Raises:
            ClusterError: There is no answer, the request is refused, or the answer does not come from a dashboard.
        """
        try:
            answer = self.request("GET", path, read_s=read_s, params=params).json()
        except ValueError:
            raise self._no_dashboard() from None
        if not isinstance(answer, kind):
            raise self._no_dashboard()
        return answer

    def content(self, path: str, read_s: float = _READ_S, **params: Any) -> bytes:
        """Return the bytes of an answer. Otherwise as `get`."""
        answer = self.request("GET", path, read_s=read_s, params=params, stream=True)
        try:
            with answer:
                return answer.content
        except (requests.RequestException, OSError) as error:
            failure = error
        raise self._explained(failure, read_s)

    def state(self, what: str, **filters: str) -> list[dict[str, Any]]:
        """Return the entries of one of Ray's state tables (`actors`, `nodes`, …), at most 10,000.

        Args:
            what: The table.
            filters: Field → the value that it must have, or after a `!`, must not have.
        """
        keys, values = list(filters), [value.removeprefix("!") for value in filters.values()]
        signs = ["!=" if value.startswith("!") else "=" for value in filters.values()]
        answer = self.get(
            f"/api/v0/{what}",
            dict,
            read_s=2 * _READ_S,
            detail=1,
            limit=10_000,
            timeout=8,
            filter_keys=keys,
            filter_predicates=signs,
            filter_values=values,
        )
        try:
            return list(answer["data"]["result"]["result"])
        except (KeyError, TypeError):
            raise self._no_dashboard() from None

    def request(
        self,
        method: str,
        path: str,
        *,
        read_s: float = _READ_S,
        data: bytes | IO[bytes] | None = None,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        stream: bool = False,
        ok: Collection[int] = (),
    ) -> requests.Response:
        """Send a request and return an answer with status 2xx or a status in `ok`.

        Args:
            method: GET, PUT, POST, …
            path: The path, with a leading /.
            read_s: The longest time without a byte, in seconds.
            data: The bytes to send. For a stream, each block has a time limit, but the whole has none.
            body: An object to send as JSON.
            params: The query.
            stream: Whether the caller reads the answer's body in pieces.
            ok: Further statuses that the caller handles.

        Raises:
            NotThere: The server answers 404.
            ClusterError: There is no answer, or the request is refused.
        """
        # An upload has no limit for the whole, only the socket's limit for each block.
        bound = _CONNECT_S + read_s + _MORE_S if data is None and not stream else None

        def ask() -> requests.Response:
            return self._session.request(
                method,
                self.address + path,
                params=params,
                data=data,
                json=body,
                timeout=(_CONNECT_S, read_s),
                # Passed with each request, because environment variables take precedence over the session's value.
                verify=self._verify,
                proxies=proxy_exemptions(),
                # A redirect leads to an address that the user did not give, and the token is not meant for it.
                allow_redirects=False,
                stream=stream,
            )

        # Raised outside an except clause, because the library's error holds the request with its token header.
        answer = _answer(bound, ask, again=method == "GET")
        if isinstance(answer, Exception):
            raise self._explained(answer, read_s)
        return answer if answer.status_code in ok else self.checked(answer)

    def denied(self, status: int, text: str, scheme: str) -> ClusterDenied:
        """Return the error of `auth.denied` for this address and token."""
        return denied(self.address, status, text, scheme, self.token)

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return a TLS context for another library's connection; None for an http address."""
        if not self._is_tls:
            return None
        # The same certificates as in requests, which uses certifi and not the system's.
        usual = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or certifi.where()
        return self._tls or _trusting(usual, self.address)

    def headers(self) -> dict[str, str]:
        """Return the headers for another library's connection."""
        return {"Authorization": f"Bearer {self.token.value}"} if self.token is not None else {}

    def proxy(self) -> str | None:
        """Return the environment's proxy for this address; None if there is none."""
        proxy = proxies.proxy_of(self.address)
        return proxy[1] if proxy else None

    # --- errors ---------------------------------------------------------------------------------------------------

    def checked(self, response: requests.Response) -> requests.Response:
        """Return an answer if its status is 2xx.

        Raises:
            NotThere: The status is 404.
            ClusterError: The request is refused.
        """
        status = response.status_code
        if 200 <= status < 300:
            return response
        text = response.text[:100_000]
        if 300 <= status < 400:
            where = last_line(response.headers.get("Location", ""))
            path = urlsplit(response.request.url or "").path
            fix = f": cluster.address={where.removesuffix(path)}" if path and where.endswith(path) else f" ({where})"
            raise ClusterError(f"{self.address} redirects to another address{fix}")
        if status in (401, 403):
            raise self.denied(status, text, response.headers.get("WWW-Authenticate", ""))
        if status == 400 and "plain HTTP request was sent to HTTPS port" in text:
            raise self._speaks("https")
        if status == 413 or "Request Entity Too Large" in text:
            raise ClusterError(
                f"{self.address} does not accept so large a package: a proxy has a limit, such as nginx's "
                "client_max_body_size, and Ray's own limit is 100 MiB; .rayignore leaves files out"
            )
        if status in (502, 503, 504):
            raise ClusterUnreachable(
                f"{self.address} answers {status}: the proxy there got no answer from Ray's dashboard"
                f"{proxies.hint(self.address)}"
            )
        kind = NotThere if status == 404 else ClusterError
        # A proxy answers with an HTML page.
        words = "" if text.lstrip().startswith("<") else last_line(text)
        raise kind(f"{self.address} answers {status}: {self._without_token(words) or response.reason}")

    def _explained(self, failure: Exception, read_s: float) -> ClusterError:
        error = self._without_proxy(failure, read_s)
        if hint := proxies.hint(self.address):
            error.args = (f"{error}{hint}",)
        return error

    def _without_proxy(self, failure: Exception, read_s: float) -> ClusterError:
        """Return an error that explains a failure, without the hint about the environment's proxy."""
        root = root_cause(failure)
        name = f"{self._host}:{self._port}"
        if isinstance(failure, requests.exceptions.ProxyError):
            return ClusterUnreachable(f"{self.address} cannot be reached through its proxy")
        if isinstance(root, ssl.SSLError):
            return self._tls_explained(root)
        if isinstance(root, socket.gaierror):
            return ClusterUnreachable(f"{self.address}: no host has the name {self._host} ({root.strerror})")
        if isinstance(root, ConnectionRefusedError):
            return ClusterUnreachable(
                f"nothing listens at {name}: is the cluster up, and is that its dashboard's port (8265 by default)?"
            )
        if isinstance(failure, requests.ReadTimeout) or (isinstance(root, TimeoutError) and failure is not root):
            return ClusterUnreachable(
                f"{self.address} accepts the connection, but has not answered within {read_s:g} s"
            )
        if isinstance(failure, TimeoutError | requests.ConnectTimeout):
            return ClusterUnreachable(
                f"{self.address} does not answer within {_CONNECT_S:g} s: is the cluster up, and may this machine reach it "
                "(VPN, firewall)?"
            )
        if not self._is_tls and self._has_tls():
            return self._speaks("https")
        if isinstance(root, (*_GONE, http.client.HTTPException)):
            return ClusterUnreachable(
                f"what listens at {name} does not speak HTTP: the Jobs API is at the port of the dashboard, 8265 by "
                "default; Ray's others (6379, 10001) are for cluster=existing"
            )
        reason = getattr(root, "strerror", None) or last_line(str(root)) or type(root).__name__
        return ClusterUnreachable(f"{self.address} cannot be reached: {self._without_token(reason)}")

    def _tls_explained(self, error: ssl.SSLError) -> ClusterError:
        if not isinstance(error, ssl.SSLCertVerificationError):
            if error.reason in _NO_TLS:
                return self._speaks("http")
            return ClusterUnreachable(f"{self.address}: no TLS connection ({error.reason or error})")
        code, message = error.verify_code, error.verify_message
        known = f"cluster.ca_file={self._ca_file}" if self._ca_file is not None else "what this machine trusts"
        # The codes are OpenSSL's X509_V_ERR_….
        why = {
            9: "is not valid yet: is the clock of this machine right?",
            10: "has expired: it must be renewed there (or the clock of this machine is wrong)",
            18: f"is self-signed, and is not in {known}: cluster.ca_file=PATH of that certificate trusts it",
            62: f"is for other names than {self._host}: cluster.address must have one of those, or the certificate must be "
            "renewed",
            64: f"is for other addresses than {self._host}: cluster.address must have a name that is in it",
        }
        unknown = f"is signed by an authority that is not in {known}: cluster.ca_file=PATH of its certificate trusts it"
        why |= dict.fromkeys((2, 19, 20, 21), unknown)
        return ClusterUnreachable(f"the certificate of {self.address} {why.get(code, f'is not accepted: {message}')}")

    def _speaks(self, scheme: str) -> ClusterError:
        other = self.address.partition("://")[2]
        also = "" if scheme == "https" else " (which anybody on the way can read, the token too)"
        return ClusterUnreachable(f"{self.address} speaks {scheme}: cluster.address={scheme}://{other}{also}")

    def _has_tls(self) -> bool:
        """Return whether the server speaks TLS, with any certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # safe, because nothing is sent

        def ask() -> bool:
            with socket.create_connection((self._host, self._port), timeout=_PROBE_S) as plain:
                context.wrap_socket(plain, server_hostname=self._host).close()
            return True

        try:
            return within(_PROBE_S, ask)
        except (OSError, TimeoutError):
            return False

    def _no_dashboard(self) -> ClusterError:
        return ClusterError(f"what answers at {self.address} is not a Ray dashboard: is cluster.address right?")

    def _without_token(self, text: str) -> str:
        return text.replace(self.token.value, "***") if self.token is not None else text


def _answer(
    seconds: float | None, ask: Callable[[], requests.Response], *, again: bool
) -> requests.Response | Exception:
    """Return an answer or the failure. Try `again` if the server has closed a kept-alive connection meanwhile."""
    try:
        return within(seconds, ask)
    except (TimeoutError, requests.RequestException, OSError, http.client.HTTPException, ValueError) as error:
        if not again or not isinstance(root_cause(error), _GONE):
            return error
    return _answer(seconds, ask, again=False)


def within(seconds: float | None, ask: Callable[[], T]) -> T:
    """Return the result of `ask`, which may wait for something that no socket timeout limits.

    Raises:
        TimeoutError: There is no result after `seconds` seconds.
    """
    return in_background(ask, "ray-jobs").result(seconds)


def last_line(text: str) -> str:
    """Return the last line of a text, which in a traceback is the exception, without unprintable characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .^")]
    last = lines[-1] if lines else ""
    return "".join(c if c.isprintable() else " " for c in last)[:500]


def _trusting(ca_file: str, address: str) -> ssl.SSLContext:
    path = Path(ca_file).expanduser()
    if not address.startswith("https://"):
        raise ConfigError(
            f"is for https, and cluster.address={address} is not", key="cluster.ca_file", value=str(ca_file)
        )
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=str(path))
        return ssl.create_default_context(cafile=str(path))
    except ssl.SSLError:
        raise ConfigError("holds no certificate (PEM)", key="cluster.ca_file", value=str(ca_file)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", key="cluster.ca_file", value=str(ca_file)) from None
