"""Check the `MLFLOW_*` environment variables: each is used, or refused by name before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from raytrainer.tracking.failures import redacted

_URI = "MLFLOW_TRACKING_URI"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ADDRESS_FORMS = "an address http(s)://host[:port] of a server, or a database as sqlite:////ABSOLUTE/PATH/mlflow.db"
_WHOLE_NUMBERS = (
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR",
)
_BOOLEANS = ("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_TRACKING_AWS_SIGV4")
_FILES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
_VARIABLE_FORMS: tuple[tuple[tuple[str, ...], Callable[[str], object], str], ...] = (
    (_WHOLE_NUMBERS, re.compile(r"\d+").fullmatch, "must be a whole number; unset it for the default"),
    (_BOOLEANS, re.compile("true|false|1|0", re.IGNORECASE).fullmatch, "must be true or false"),
    (_FILES, os.path.exists, "is not a file on this machine"),
)
_CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_IGNORED = {
    "MLFLOW_RUN_ID": "raytrainer creates its own run; raytrainer resume ID continues one",
    "MLFLOW_EXPERIMENT_ID": "an experiment is chosen by its name: MLFLOW_EXPERIMENT_NAME or tracking.experiment_name",
}


def variable_problems(environ: Mapping[str, str], uri: str | None) -> list[str]:
    """Return what is wrong with the variables and the tracking URI: one sentence per problem, without secrets.

    Args:
        environ: The environment. An empty or blank variable counts as not set.
        uri: The resolved `tracking.tracking_uri`; None for the default store.
    """
    variables = {name: value.strip() for name, value in environ.items() if name.startswith("MLFLOW_") and value.strip()}
    problems = _of_uri(uri, variables)
    for names, is_valid, must in _VARIABLE_FORMS:
        problems += [
            f"{name}={variables[name]} {must}" for name in names if name in variables and not is_valid(variables[name])
        ]
    problems += [
        f"{name} has a line break or another control character, which no request can carry"
        for name in _CREDENTIALS
        if re.search(r"[\x00-\x1f\x7f]", environ.get(name, ""))
    ]
    if variables.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1") and _FILES[0] in variables:
        problems.append(f"MLFLOW_TRACKING_INSECURE_TLS and {_FILES[0]} are both set; MLflow accepts only one of them")
    problems += [
        f"{name}={variables[name]} is set, and would be ignored: {why}; unset {name}"
        for name, why in _IGNORED.items()
        if name in variables
    ]
    return problems


def _of_uri(uri: str | None, variables: Mapping[str, str]) -> list[str]:
    if uri is None:
        return []
    source = _URI if variables.get(_URI) == uri else "tracking.tracking_uri"
    shown = f"{source}={redacted(uri)}"
    scheme, rest = urlsplit(uri).scheme.partition("+")[0].lower(), uri.partition("://")[2]
    if re.search(r"\s", uri) and scheme != "sqlite":  # a folder's name may contain a space
        return [f"{shown} has a space in it; write {_ADDRESS_FORMS}"]
    if scheme in ("http", "https"):
        return [] if urlsplit(uri).hostname else [f"{shown} names no host; write {_ADDRESS_FORMS}"]
    if scheme in _DATABASES:
        return [] if rest.strip("/") else [f"{shown} names no database; write {_ADDRESS_FORMS}"]
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        return [f"{shown} has no scheme; write {source}=http://{uri}"]
    if uri == "databricks" or scheme in ("databricks", "uc", "databricks-uc"):
        return [f"{shown} is a Databricks store, which raytrainer cannot log to; write {_ADDRESS_FORMS}"]
    if scheme in ("", "file"):
        return [
            f"{shown} is a directory, that is, a file store, which MLflow no longer supports; write {_ADDRESS_FORMS}"
        ]
    return [f"{shown} is not an MLflow store; write {_ADDRESS_FORMS}"]
