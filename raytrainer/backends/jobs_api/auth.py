"""The token of a shared cluster: where it is found, which file permissions it needs, and what a refusal means.

Its value is in a header of each request and nowhere else: not in a message, a log or another process's environment.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raytrainer.errors import ClusterDenied, ConfigError

_LEAST_TOKEN = 16  # a shorter value that is not a file is a mistyped path
_ASK = "`ray get-auth-token` on its head node prints it"


@dataclass(frozen=True)
class Token:
    """A token and the name of its source."""

    source: str
    value: str = field(repr=False)


def find_token(token_file: str | None = None, environ: Mapping[str, str] = os.environ) -> Token | None:
    """Return the token to send: from `token_file`, else the one that Ray itself would use; None if there is none.

    Ray's client sends a token only if its process has RAY_AUTH_MODE=token. This module sends a token whenever one is
    set, so the variable is not needed and child processes do not inherit it.

    Raises:
        ConfigError: The token's file is readable by others, empty or unreadable; the value is not a token; or
            RAY_AUTH_MODE=token is set and no token exists.
    """
    if token_file is not None:
        return _of_file(Path(token_file).expanduser(), "cluster.token_file")
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if value := environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked("RAY_AUTH_TOKEN", value)
    if path := environ.get("RAY_AUTH_TOKEN_PATH"):
        return _of_file(Path(path).expanduser(), "RAY_AUTH_TOKEN_PATH")
    usual = Path("~/.ray/auth_token").expanduser()
    if usual.exists():
        return _of_file(usual, None)
    if mode == "token":
        raise ConfigError(
            "RAY_AUTH_MODE=token is set, and there is no token: set cluster.token_file=PATH, RAY_AUTH_TOKEN, "
            f"RAY_AUTH_TOKEN_PATH or {usual}"
        )
    return None


def denied(
    address: str, status: int, text: str, scheme: str, token: Token | None, environ: Mapping[str, str] = os.environ
) -> ClusterDenied:
    """Return an error that explains a refusal and how to fix it.

    Args:
        address: The cluster's address.
        status: 401 or 403.
        text: The text of the answer.
        scheme: The scheme in the header `WWW-Authenticate`; empty if the header is missing, as in Ray's answers.
        token: The token that was sent.
        environ: The environment, which may be why no token was sent.
    """
    if scheme and not scheme.lower().startswith("bearer"):
        return ClusterDenied(
            f"{address} asks for {scheme.split()[0]} authentication ({status}), which is not Ray's: a proxy in front of it "
            "asks for it, and must let a Ray token through"
        )
    if token is None:
        why = "none was found"
        if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
            why = "RAY_AUTH_MODE=disabled is set, so none was sent; unset it"
        return ClusterDenied(
            f"{address} requires a token ({status}), and {why}: set cluster.token_file=PATH, RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH; {_ASK}"
        )
    # Ray's own 403 mentions the token; a 403 without it comes from a proxy.
    if status == 403 and "token" not in text.lower():
        return ClusterDenied(
            f"{address} answers 403 Forbidden, and the answer is not from Ray: a proxy in front of it denies access"
        )
    if status == 401:
        return ClusterDenied(
            f"{address} answers that it got no token (401), although that of {token.source} was sent: a proxy in front "
            "of it must pass on the header Authorization"
        )
    return ClusterDenied(
        f"{address} refuses the token of {token.source} (403): it belongs to another cluster, or the "
        f"cluster's token was changed; {_ASK}"
    )


def _of_file(path: Path, key: str | None) -> Token:
    shown = f"{key}={path}" if key else str(path)
    if key and len(path.parts) == 1 and len(path.name) >= _LEAST_TOKEN and not path.exists():
        raise ConfigError(
            f"{key} is not an existing file: give the path of a file that holds the token, not the token itself"
        )
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            # Check the open file, because the path may point to another file by now.
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                quoted = shlex.quote(str(path))
                raise ConfigError(f"{shown} is a token that others can read or change: chmod 600 {quoted}")
            value = file.read(65536).strip()
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}") from None
    if not value:
        raise ConfigError(f"{shown} is empty, and must hold a token; {_ASK}")
    return _checked(shown, value)


def _checked(source: str, value: str) -> Token:
    # An HTTP client quotes an invalid header value in its error message, and would thus print the token.
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ConfigError(f"{source} does not hold a token, which is one word of ASCII; {_ASK}")
    return Token(source, value)
