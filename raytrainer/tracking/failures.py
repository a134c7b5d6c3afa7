"""The failures of a tracking server as errors that name the fix and contain no secret."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

from raytrainer.core import proxies
from raytrainer.core.http import root_cause
from raytrainer.errors import TrackingDenied, TrackingError, TrackingUnreachable

_SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


class Rejected(TrackingError):
    """The server understood the call and rejects its content."""


class RunGone(TrackingError):
    """The run was deleted or never existed."""


def redacted(uri: str) -> str:
    """Return the URI without its user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def denied(uri: str, status: int) -> TrackingDenied:
    """Return the error for an answer of 401 or 403. It names the variables that are set, never their values."""
    variables = [name for name in (*_SECRETS, "MLFLOW_TRACKING_USERNAME") if os.environ.get(name)]
    credentials = ", ".join(variables) or "none: MLFLOW_TRACKING_TOKEN or _USERNAME and _PASSWORD are not set"
    return TrackingDenied(
        f"the tracking server {redacted(uri)} answers {status} to the credentials given ({credentials}){proxies.hint(uri)}"
    )


def unusable(uri: str, reason: str) -> TrackingUnreachable:
    """Return the error for a server that does not answer as it should."""
    return TrackingUnreachable(f"the tracking server {redacted(uri)} cannot be used: {reason}{proxies.hint(uri)}")


def reason_of(error: BaseException, uri: str) -> str:
    """Return the original cause in one line, without secrets: `[Errno 111] Connection refused` instead of four wrappers.

    If a certificate's authority is unknown, the setting that makes it known is added.
    """
    cause = root_cause(error)
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    reason = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
    password = urlsplit(uri).password
    secrets = [os.environ.get(name) for name in _SECRETS]
    for secret in (*secrets, password, password and unquote(password), *proxies.passwords()):
        if secret:
            reason = reason.replace(secret, "***")
    reason = shortened(reason, 300)
    if "self-signed certificate" in reason or "unable to get local issuer certificate" in reason:
        reason += "; MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names the authority that signed its certificate"
    return reason


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
