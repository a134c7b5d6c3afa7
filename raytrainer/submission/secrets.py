"""Keep secrets out of everything that is sent: values of variables and tokens, and passwords in URLs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from raytrainer import provenance
from raytrainer.attempt import tracking_uri
from raytrainer.config import ClusterConfig, Composition, holds_password, looks_secret, texts_of, with_values
from raytrainer.errors import ConfigError
from raytrainer.submission.package import Package
from raytrainer.submission.sent_files import IGNORE

_LEAST_CHARACTERS = 8  # of a secret; a shorter value may be a common word that occurs anywhere
_SEARCHED_BYTES = 2**23  # of each file that is sent
_PLACEHOLDER = re.compile(r"[{<\[][^{}<>\[\]\n]*[}>\]]|…|\*{3,}")  # stands for a password in a patch
# The tools' own variables for addresses and names. Their local values are sent, because they differ on the cluster.
_ADDRESS_VARIABLES = {"MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
_REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(,?)")


def pinned(composition: Composition) -> str:
    """Return a config's text with addresses and names from this machine's variables written out, unless they hold a
    secret. It then means the same on the cluster.

    Raises:
        ConfigError: A variable that should name a file does not.
    """
    e = composition.experiment
    raw = yaml.safe_load(composition.text)
    values: dict[str, Any] = {}
    for key, value in (("tracking_uri", tracking_uri(e)), ("experiment_name", e.tracking.experiment_name)):
        written = (raw.get("tracking") or {}).get(key)
        if set(_variables(written)) <= _ADDRESS_VARIABLES and not holds_password(str(value)):
            values[f"tracking.{key}"] = value
    for key, value in asdict(e.cluster).items():
        # Ray receives the runtime environment resolved, and the config refuses references to secrets in it.
        names = set(_variables((raw.get("cluster") or {}).get(key)))
        if names and not any(looks_secret(name) for name in names):
            values[f"cluster.{key}"] = value
        if names and key in ("token_file", "ca_file"):  # a path of this machine that is also valid there
            if not Path(value).expanduser().exists():
                raise ConfigError(
                    f"is not an existing file: {min(names)} must be the path of one", key=f"cluster.{key}"
                )
            values[f"cluster.{key}"] = value
    return with_values(composition.text, values)


def check_references(text: str, forward_env: Sequence[str], environ: Mapping[str, str]) -> None:
    """Check that the cluster has each variable to which a pinned text refers.

    Args:
        text: A text from `pinned`.
        forward_env: The variables that the cluster has.
        environ: The variables of this machine.

    Raises:
        ConfigError: The text refers to a variable of this machine that the cluster lacks.
    """
    for key, value in texts_of(yaml.safe_load(text), ""):
        for name, default in _REFERENCE.findall(value):
            if name not in forward_env and (name in environ or not default):
                raise ConfigError(
                    f"refers to the variable {name} of this machine, which the cluster's machines do not have: "
                    f"set cluster.forward_env=[{name}] and its value on the cluster; or write the value, if it is not a "
                    "secret",
                    key=key.lstrip("."),
                )


def check_passwords(config: Any, patch: str) -> None:
    """Check that neither the config and command line nor the uncommitted changes have a URL with a password.

    Raises:
        ConfigError: One of them has.
    """
    if any(holds_password(text) for _, text in texts_of(config, "")):
        raise ConfigError(
            "a URL with a password is in the config or the command line, and would be sent and logged: write it as "
            "${oc.env:NAME}, with cluster.forward_env=[NAME], and set its value on the cluster"
        )
    if holds_password(_PLACEHOLDER.sub("", patch)):
        raise ConfigError(
            "a URL with a password is in the changes that git has not committed (git diff HEAD), which would be sent and "
            "logged: take it out of them"
        )


def secrets_of(c: ClusterConfig, environ: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Return the values that must not be sent, by their source. A path is never a secret.

    Args:
        c: The section `cluster`.
        environ: The variables of this process; those with a secret's name count.
        more: Further values by their source, such as the cluster's token.
    """
    secrets = {
        name: value
        for name, value in environ.items()
        if len(value) >= _LEAST_CHARACTERS
        and looks_secret(name)
        and value not in (c.token_file, c.ca_file)
        and not (value.startswith(("/", "~")) and Path(value).expanduser().exists())
    }
    return secrets | {source: value for source, value in more.items() if value not in secrets.values()}


def check_package(package: Package, secrets: Mapping[str, str]) -> None:
    """Check that no file that is sent contains a secret's value. Only the beginning of a large file is searched.

    Raises:
        ConfigError: A file does.
    """
    wanted = {name: value.encode() for name, value in secrets.items()}
    for entry in package.entries if wanted else ():
        try:
            with entry.source.open("rb") as file:
                content = file.read(_SEARCHED_BYTES)
        except OSError:  # sending it reports the error
            continue
        for name, value in wanted.items():
            if value in content:
                raise ConfigError(
                    f"the value of {name} is in {entry.name}, which would be sent: take it out of there; a line of "
                    f"{IGNORE}, as in .gitignore, leaves a file out"
                )


_PLACES = {
    "config.yaml": "the config",
    "request.json": "the config or the command line",
    provenance.FILE: "the changes that git has not committed",
}


def check_values(texts: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    """Check that nothing that is sent contains a secret's value, wherever it came from.

    Args:
        texts: What is sent: the name of a request's file, or a description, → the text.
        secrets: As from `secrets_of`.

    Raises:
        ConfigError: A text contains one.
    """
    for name, value in secrets.items():
        escaped = json.dumps(value)[1:-1]
        for place, text in texts.items():
            if value in text or escaped in text:
                fix = f"write ${{oc.env:{name}}}, with cluster.forward_env=[{name}], and set its value on the cluster"
                if not name.isidentifier() or place == provenance.FILE:
                    fix = "take it out of there"
                raise ConfigError(f"the value of {name} is in {_PLACES.get(place, place)}, and would be sent: {fix}")


def _variables(node: Any) -> list[str]:
    return [name for _, text in texts_of({"": node}, "") for name, _ in _REFERENCE.findall(text)]
