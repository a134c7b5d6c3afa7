"""Kubernetes through `kubectl`, which handles every cluster's login: send, inspect, read and delete runs.

Every call has a time limit, and kubectl's errors are explained.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytrainer.backends.kubernetes.kubectl_errors import Conflict, explained, no_current_context, where
from raytrainer.backends.kubernetes.pods import Document, quantity
from raytrainer.backends.kubernetes.rayjob import CONTENT, JOB, MANAGED, NAME, SUBMISSION
from raytrainer.errors import ClusterError, ClusterUnreachable, ConfigError
from raytrainer.submission.request import to_yaml

_ANSWER_S = 30.0


@dataclass(frozen=True)
class Kubectl:
    """One namespace of one Kubernetes cluster.

    Attributes:
        context: A context of kubectl's configuration; None: its current one.
        namespace: The namespace of the runs.
    """

    context: str | None
    namespace: str

    def apply(self, config_map: Document, job: Document) -> bool:
        """Send a run. Return False if the same run exists already, possibly sent at the same moment.

        Raises:
            ConfigError: Another run has this name, or Kubernetes rejects the run.
            ClusterError: Kubernetes cannot be reached, or denies access.
        """
        name, content = job["metadata"]["name"], job["metadata"]["annotations"][CONTENT]
        if self._is_there(name, content):
            return False
        # Each content has its own field manager, so the server accepts the same content again without a change and
        # reports a conflict for other content, whichever comes first.
        manager = f"raytrainer-{config_map['metadata']['name'].rpartition('-')[2]}"
        try:
            answer = self._run(
                *("apply", "--server-side", f"--field-manager={manager}", "--validate=strict", "-o", "json", "-f", "-"),
                send=to_yaml(config_map, job),
            )
        except (ClusterError, ConfigError) as error:
            with contextlib.suppress(ClusterError):
                existing = self.rayjob(name)
                # Our ConfigMap may have been created, but its job was not.
                if existing is None or content_of(existing) != content:
                    self._run("delete", "configmap", config_map["metadata"]["name"], "--ignore-not-found")
            if isinstance(error, Conflict) and self._is_there(name, content):
                return False
            raise
        self._own(json.loads(answer), config_map, job)
        return True

    def rayjob(self, name: str) -> Document | None:
        """Return a RayJob; None if it does not exist."""
        answer = self._run("get", "rayjob", name, "--ignore-not-found", "-o", "json")
        return dict(json.loads(answer)) if answer.strip() else None

    def rayjobs(self) -> list[Document]:
        """Return the RayJobs of all of raytrainer's runs in the namespace."""
        return self._items("rayjobs", _selector(MANAGED))

    def waiting(self, name: str) -> list[str]:
        """Return why pods of a run do not run: `POD: ImagePullBackOff: …`, one line for each reason."""
        reasons: dict[str, str] = {}
        for pod in self._items("pods", f"{JOB}={name}"):
            for reason in _reasons(pod.get("status") or {}):
                reasons.setdefault(reason, pod["metadata"]["name"])
        return [f"{pod}: {' '.join(reason.split())[:300].rstrip(': ')}" for reason, pod in reasons.items()]

    def held(self, submission_id: str) -> dict[str, float]:
        """Return what the pods of a run that have not ended hold: CPU, GPU, memory in bytes."""
        held: dict[str, float] = {}
        for pod in self._items("pods", _selector(MANAGED)):
            mine = (pod["metadata"].get("annotations") or {}).get(SUBMISSION) == submission_id
            if not mine or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
                continue
            for container in (pod.get("spec") or {}).get("containers") or []:
                for key, amount in ((container.get("resources") or {}).get("limits") or {}).items():
                    resource = {"cpu": "CPU", "memory": "memory"}.get(key, "GPU" if key.endswith("gpu") else key)
                    held[resource] = held.get(resource, 0.0) + quantity(str(amount))
        return held

    def current_context(self) -> str:
        """Return kubectl's current context.

        Raises:
            ConfigError: It has none.
        """
        try:
            return self._run("config", "current-context").strip()
        except ClusterError as error:
            raise no_current_context() from error

    def delete(self, name: str, within_s: float = 120.0) -> list[str]:
        """Delete a run and wait until its RayJob and pods are gone. Return the names of those that remain."""
        self._run("delete", "rayjob", name, "--ignore-not-found", "--wait=false")
        self._run("delete", "configmap", "-l", f"{JOB}={name}", "--ignore-not-found", "--wait=false")
        deadline = time.monotonic() + within_s
        while True:
            left = [pod["metadata"]["name"] for pod in self._items("pods", f"{JOB}={name}")]
            if not left and self.rayjob(name) is not None:  # it stays until KubeRay has finished with it
                left = [f"rayjob {name}"]
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(1.0)

    def logs(self, name: str, follow: bool = False) -> Iterator[str]:
        """Yield the lines that a run's driver has printed, from the log of the pod that submitted it.

        Args:
            name: The name of the RayJob.
            follow: Whether to continue until the job ends.

        Raises:
            ClusterError: There is no log: the run has not begun, or its pods are gone.
        """
        command = [*self._command(), "logs", f"job/{name}", "--tail=-1", *(["--follow"] if follow else [])]
        with self._started(command, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            # kubectl waits forever for a server that accepts the connection and never answers.
            timer = threading.Timer(_ANSWER_S, process.kill) if not follow else None
            if timer is not None:
                timer.start()
            try:
                for line in process.stdout:
                    yield line.rstrip("\n")
                errors = process.stderr.read()
                if process.wait() != 0:
                    raise explained(errors, process.returncode, self.context, self.namespace)
            finally:
                if timer is not None:
                    timer.cancel()
                process.kill()

    # ------------------------------------------------------------------------------------------------------------------

    def _is_there(self, name: str, content: str) -> bool:
        existing = self.rayjob(name)
        if existing is None:
            return False
        if content_of(existing) == content:
            return True
        state = (existing.get("status") or {}).get("jobDeploymentStatus") or "not begun"
        raise ConfigError(
            f"is the name of a run in namespace {self.namespace} with other content ({state}); another name starts a new "
            f"one, and kubectl shows the existing one: kubectl get rayjob {name} --namespace={self.namespace} -o yaml",
            key="name",
            value=notes_of(existing).get(NAME) or name,
        )

    def _own(self, answer: Mapping[str, Any], config_map: Document, job: Document) -> None:
        """Make the RayJob the owner of the ConfigMap, so that Kubernetes always deletes both together."""
        uid = next((item["metadata"]["uid"] for item in answer.get("items", []) if item.get("kind") == "RayJob"), None)
        owner = {"apiVersion": job["apiVersion"], "kind": "RayJob", "name": job["metadata"]["name"], "uid": uid}
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        # The run was sent. A small object that outlives it is not worth a warning.
        with contextlib.suppress(ClusterError, ConfigError):
            self._run("patch", "configmap", config_map["metadata"]["name"], "--type=merge", f"--patch={patch}")

    def _items(self, kind: str, selector: str) -> list[dict[str, Any]]:
        answer = self._run("get", kind, "-l", selector, "--ignore-not-found", "-o", "json")
        return list(json.loads(answer)["items"]) if answer.strip() else []

    def _command(self) -> list[str]:
        context = [f"--context={self.context}"] if self.context else []
        return ["kubectl", *context, f"--namespace={self.namespace}"]

    def _run(self, *arguments: str, send: str | None = None) -> str:
        command = [*self._command(), f"--request-timeout={_ANSWER_S:g}s", *arguments]
        with self._started(command, stdin=subprocess.PIPE if send is not None else subprocess.DEVNULL) as process:
            try:
                # Longer than one request: kubectl makes several, and its login plugin may ask a person.
                out, errors = process.communicate(send, timeout=2 * _ANSWER_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise ClusterUnreachable(
                    f"kubectl {arguments[0]} had no answer within {2 * _ANSWER_S:g} s{self.where}"
                ) from None
        if process.returncode != 0:
            raise explained(errors, process.returncode, self.context, self.namespace)
        return out

    @contextlib.contextmanager
    def _started(self, command: list[str], stdin: int) -> Iterator[subprocess.Popen[str]]:
        try:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
            )
        except OSError as error:
            raise ConfigError(
                f"needs kubectl, which cannot be started ({error.strerror}): https://kubernetes.io/docs/tasks/tools, "
                "or write the manifest with --dry-run and send it from elsewhere",
                key="cluster.kind",
                value="kuberay",
            ) from None
        with process:
            yield process

    @property
    def where(self) -> str:
        """Context and namespace, for the end of a message."""
        return where(self.context, self.namespace)


def notes_of(rayjob: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the annotations of an object."""
    return rayjob["metadata"].get("annotations") or {}


def content_of(rayjob: Mapping[str, Any]) -> str:
    """Return the digest of the request that a RayJob was made from."""
    return notes_of(rayjob).get(CONTENT) or ""


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _reasons(status: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a pod with this status does not run."""
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            yield f"{condition.get('reason')}: {condition.get('message')}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = container.get("state") or {}
        waits, ended = state.get("waiting") or {}, state.get("terminated") or {}
        if waits.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            yield f"{waits['reason']}: {waits.get('message', '')}"
        if ended.get("reason") not in (None, "Completed"):
            yield f"{ended['reason']} (exit code {ended.get('exitCode')})"
