"""Explanations and fixes of kubectl's error messages. The messages are those of kubectl 1.32."""

from __future__ import annotations

import re

from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError

_NO_CONTEXT = ("context was not found", 'context "[^"]*" does not exist')
_NO_OPERATOR = ("no matches for kind", "could not find the requested resource", "doesn't have a resource type")
_NO_LOGIN = ("Unauthorized", "provide credentials", "must be logged in")
_NO_ANSWER = (
    *("Unable to connect to the server", "connection refused", "was refused", "i/o timeout", "no such host"),
    *("Client.Timeout", "context deadline exceeded", "TLS handshake timeout", "x509:"),
)


class Conflict(ClusterError):
    """Another field manager has set fields that we set."""


def where(context: str | None, namespace: str) -> str:
    """Return context and namespace, for the end of a message."""
    return f" (context {context or 'of kubectl, the current one'}, namespace {namespace})"


def explained(message: str, code: int, context: str | None, namespace: str) -> ClusterError | ConfigError:
    """Return an error that explains what kubectl printed.

    Args:
        message: What it printed to standard error.
        code: Its exit code.
        context, namespace: The context and the namespace of the call.
    """
    lines = [line for line in message.splitlines() if line.strip() and not re.match(r"[EWI]\d{4} ", line)]
    first = " ".join((lines or [f"exit code {code}"])[0].removeprefix("error: ").split())[:500]
    place = where(context, namespace)
    error = _of_config(message, context, place)
    if error is not None:
        return error
    if "Apply failed with" in message and "conflict" in message:
        return Conflict(f"somebody else has changed this run{place}: {first}")
    if any(text in message for text in _NO_LOGIN):
        return ClusterDenied(
            f"Kubernetes does not accept your credentials{place}: log in again, as for any kubectl command"
        )
    if "forbidden" in message.lower():
        return ClusterDenied(
            f"Kubernetes denies permission{place}: {first}. raytrainer needs get, list, create, patch and delete of "
            f"rayjobs.ray.io and configmaps, and get and list of pods and pods/log; "
            f"kubectl auth can-i create rayjobs.ray.io --namespace={namespace} checks this"
        )
    if any(text in message for text in _NO_ANSWER):
        return ClusterUnreachable(f"Kubernetes does not answer{place}: {first}")
    return ClusterError(f"kubectl{place}: {first}")


def no_current_context() -> ConfigError:
    """Return the error of a kubectl without a current context."""
    return ConfigError(
        "is not set and kubectl has no current one; kubectl config get-contexts lists them", key="cluster.context"
    )


def _of_config(message: str, context: str | None, place: str) -> ConfigError | None:
    """Return the error if a setting, the operator or the run itself is wrong."""
    if any(re.search(pattern, message) for pattern in _NO_CONTEXT):
        return ConfigError(
            "is not a kubectl context; kubectl config get-contexts lists them", key="cluster.context", value=context
        )
    if match := re.search(r'admission webhook "([^"]+)" denied the request: (.*)', message):
        return ConfigError(f"Kubernetes does not accept the run: {match[1]} says: {match[2][:500]}")
    if match := re.search(r'strict decoding error: unknown field "([^"]+)"', message):
        return ConfigError(
            f"the KubeRay there does not know {match[1]}: raytrainer's RayJobs need 1.5.1 or later (token "
            "authentication); helm upgrade kuberay-operator kuberay/kuberay-operator, and its CRDs with it"
        )
    if any(text in message for text in _NO_OPERATOR):
        return ConfigError(
            f"needs the KubeRay operator, and Kubernetes does not know RayJob{place}: "
            "helm install kuberay-operator kuberay/kuberay-operator",
            key="cluster.kind",
            value="kuberay",
        )
    if match := re.search(r'namespaces "([^"]+)" not found', message):
        return ConfigError(
            f"does not exist: kubectl create namespace {match[1]}", key="cluster.namespace", value=match[1]
        )
    return no_current_context() if "localhost:8080" in message and context is None else None
