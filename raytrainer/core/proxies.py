"""The proxies of the environment: not used for this machine's own addresses, and named if a server cannot be reached.

This module imports nothing of raytrainer.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, MutableMapping
from urllib.parse import unquote, urlsplit

# As requests, urllib and curl read them: a name includes its subdomains. curl and requests also accept networks.
_LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
_EXEMPT = ("no_proxy", "NO_PROXY")  # requests, urllib, curl and gRPC use the first that is set


def exemptions(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `no_proxy` and `NO_PROXY` with which loopback addresses use no proxy. The user's entries are kept.

    Empty if no proxy is set, or if the user exempts all addresses.
    """
    if not any(value and name.lower().endswith("_proxy") and name not in _EXEMPT for name, value in environ.items()):
        return {}
    users = next((environ[name] for name in _EXEMPT if environ.get(name)), "")
    named = [part.strip() for part in users.split(",") if part.strip()]
    if "*" in named:
        return {}
    merged = ",".join([*named, *(name for name in _LOOPBACK if name not in named)])
    return dict.fromkeys(_EXEMPT, merged)


def exempt_loopback(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set `exemptions` for this process and its children. Call it while there is only one thread."""
    environ.update(exemptions(environ))


def proxy_of(address: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Return the variable and the value of the proxy for an http(s) address, as requests and curl choose it, if any."""
    parts = urlsplit(address)
    host = (parts.hostname or "").lower()
    if parts.scheme not in ("http", "https") or is_loopback(host) or _is_exempt(host, parts.port, environ):
        return None
    names = [name for kind in (parts.scheme, "all") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]
    return next(((name, environ[name]) for name in names if environ.get(name)), None)


def hint(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return what to add to an error about a server behind a proxy, without passwords; empty if no proxy is used."""
    variable = proxy_of(address, environ)
    if variable is None:
        return ""
    name, proxy = variable
    host = urlsplit(address).hostname
    return f"; it is asked through the proxy {redacted(proxy)} of {name}: NO_PROXY={host} would ask it directly"


def redacted(proxy: str) -> str:
    """Return a proxy's address without user and password."""
    return re.sub(r"^([^/@]*//)?[^/]*@", lambda match: match[1] or "", proxy)


def passwords(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the passwords of proxies, which must not be in a message, as written and decoded."""
    secrets = []
    for name, value in environ.items():
        if name.lower().endswith("_proxy") and name not in _EXEMPT and "@" in value:
            password = urlsplit(value if "://" in value else f"//{value}").password
            secrets += [password, unquote(password)] if password else []
    return secrets


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_exempt(host: str, port: int | None, environ: Mapping[str, str]) -> bool:
    users = next((environ[name] for name in _EXEMPT if environ.get(name)), "")
    return any(_matches(host, port, part.strip().lower()) for part in users.split(",") if part.strip())


def _matches(host: str, port: int | None, pattern: str) -> bool:
    if pattern == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(pattern, strict=False)
    except (ValueError, TypeError):
        pass
    name, _, of_port = pattern.rpartition(":") if pattern.count(":") == 1 else (pattern, "", "")
    name = name.removeprefix("*").lstrip(".")
    return (not of_port or of_port == str(port)) and (host == name or host.endswith(f".{name}"))
