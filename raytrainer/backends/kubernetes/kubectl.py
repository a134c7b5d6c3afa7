"""Kubernetes through `kubectl`, which handles every cluster's login: send, inspect, read and delete runs.

Every call has a time limit, and kubectl's errors are explained. Its messages are those of kubectl 1.32.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from raytrainer.backends.kubernetes.rayjob import (
    CONTENT,
    JOB,
    MANAGED,
    NAME,
    QUEUE,
    SUBMISSION,
    Document,
    quantity,
    to_text,
)
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError
from raytrainer.submission.ending import one_line

_ANSWER_S = 30.0
_AGAIN_S, _PATIENCE_S = 2.0, 120.0  # between two checks of a followed job; how long the server may not answer
_GOING = ("PENDING", "RUNNING")
_EXIT_CODE = re.compile(r"failed with exit code (-?\d+)")  # Ray's wording
_OLD = re.compile(r'strict decoding error: unknown field "([^"]+)"')


@dataclass(frozen=True)
class RayJobStatus:
    """The state of a run in Kubernetes.

    Attributes:
        name: The name of the run.
        object: The name of the RayJob.
        submission_id: The id of the Ray job.
        content: The digest of the request.
        deployment: KubeRay's state: Initializing, Running, Complete, Failed, Suspended, Retrying, …
        job: Ray's status: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; empty before the Ray job exists.
        message: The reason for the state, if there is one.
        suspended: Whether it waits for Kueue to admit it.
        started, ended: Seconds since the epoch; None until then.
        dashboard: The address of Ray's dashboard within Kubernetes; empty until it is known.
        queue: The Kueue queue, if it has one.
        cluster: The name of its RayCluster, which differs between KubeRay's own retries.
        exit_code: The driver's exit code, if Ray's message contains it.
        metadata: The metadata of the Ray job.
    """

    name: str
    object: str
    submission_id: str = ""
    content: str = ""
    deployment: str = ""
    job: str = ""
    message: str = ""
    suspended: bool = False
    started: float | None = None
    ended: float | None = None
    dashboard: str = ""
    queue: str | None = None
    cluster: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The status in Ray's words: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        if self.deployment == "Complete":
            return self.job or "SUCCEEDED"
        if self.deployment in ("Failed", "ValidationFailed"):
            return "FAILED"
        # Without a job status, its submitter is still starting. A retried job keeps the status of its last try.
        return "RUNNING" if self.deployment == "Running" and self.job not in ("", "PENDING") else "PENDING"

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> RayJobStatus:
        """Parse a RayJob object from Kubernetes."""
        meta, spec, status = found["metadata"], found.get("spec") or {}, found.get("status") or {}
        notes = meta.get("annotations") or {}
        reason, message = status.get("reason") or "", status.get("message") or ""
        code = _EXIT_CODE.search(message)
        return cls(
            name=notes.get(NAME) or meta["name"],
            object=meta["name"],
            submission_id=status.get("jobId") or notes.get(SUBMISSION) or spec.get("jobId") or "",
            content=notes.get(CONTENT) or "",
            deployment=status.get("jobDeploymentStatus") or "",
            job=status.get("jobStatus") or "",
            message=": ".join(text for text in (reason, message.strip()) if text),
            suspended=bool(spec.get("suspend")),
            started=_epoch(status.get("startTime")),
            ended=_epoch(status.get("endTime")),
            dashboard=status.get("dashboardURL") or "",
            queue=(meta.get("labels") or {}).get(QUEUE),
            cluster=status.get("rayClusterName") or "",
            exit_code=int(code[1]) if code else None,
            metadata=spec.get("metadata") or {},
        )


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _epoch(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


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
            said = self._run(
                *("apply", "--server-side", f"--field-manager={manager}", "--validate=strict", "-o", "json", "-f", "-"),
                send=to_text(config_map, job),
            )
        except (ClusterError, ConfigError) as error:
            with contextlib.suppress(ClusterError):
                there = self.status(name)
                if there is None or there.content != content:  # our ConfigMap was created, but its job was not
                    self._run("delete", "configmap", config_map["metadata"]["name"], "--ignore-not-found")
            if isinstance(error, _Conflict) and self._is_there(name, content):
                return False
            raise
        self._own(json.loads(said), config_map, job)
        return True

    def status(self, name: str) -> RayJobStatus | None:
        """Return the state of a RayJob; None if it does not exist."""
        found = self._run("get", "rayjob", name, "--ignore-not-found", "-o", "json")
        return RayJobStatus.of(json.loads(found)) if found.strip() else None

    def runs(self) -> list[RayJobStatus]:
        """Return all of raytrainer's runs in the namespace."""
        return [RayJobStatus.of(one) for one in self._items("rayjobs", _selector(MANAGED))]

    def waiting(self, name: str) -> list[str]:
        """Return why pods of a run do not run: `POD: ImagePullBackOff: …`, one line for each reason."""
        reasons: dict[str, str] = {}
        for pod in self._items("pods", f"{JOB}={name}"):
            status = pod.get("status") or {}
            for one in status.get("conditions") or []:
                if one.get("type") == "PodScheduled" and one.get("status") == "False":
                    reasons.setdefault(f"{one.get('reason')}: {one.get('message')}", pod["metadata"]["name"])
            for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
                state = container.get("state") or {}
                waits, ended = state.get("waiting") or {}, state.get("terminated") or {}
                if waits.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                    reasons.setdefault(f"{waits['reason']}: {waits.get('message', '')}", pod["metadata"]["name"])
                if ended.get("reason") not in (None, "Completed"):
                    code = ended.get("exitCode")
                    reasons.setdefault(f"{ended['reason']} (exit code {code})", pod["metadata"]["name"])
        return [f"{pod}: {' '.join(reason.split())[:300].rstrip(': ')}" for reason, pod in reasons.items()]

    def held(self, submission_id: str) -> dict[str, float]:
        """Return what the pods of a run that have not ended hold: CPU, GPU, memory in bytes."""
        found: dict[str, float] = {}
        for pod in self._items("pods", _selector(MANAGED)):
            mine = (pod["metadata"].get("annotations") or {}).get(SUBMISSION) == submission_id
            if not mine or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
                continue
            for container in (pod.get("spec") or {}).get("containers") or []:
                for key, amount in ((container.get("resources") or {}).get("limits") or {}).items():
                    resource = {"cpu": "CPU", "memory": "memory"}.get(key, "GPU" if key.endswith("gpu") else key)
                    found[resource] = found.get(resource, 0.0) + quantity(str(amount))
        return found

    def current_context(self) -> str:
        """Return kubectl's current context.

        Raises:
            ConfigError: It has none.
        """
        try:
            return self._run("config", "current-context").strip()
        except ClusterError as error:
            raise ConfigError(
                "is not set and kubectl has no current one; kubectl config get-contexts lists them",
                key="cluster.context",
            ) from error

    def delete(self, name: str, within_s: float = 120.0) -> list[str]:
        """Delete a run and wait until its RayJob and pods are gone. Return the names of those that remain."""
        self._run("delete", "rayjob", name, "--ignore-not-found", "--wait=false")
        self._run("delete", "configmap", "-l", f"{JOB}={name}", "--ignore-not-found", "--wait=false")
        deadline = time.monotonic() + within_s
        while True:
            left = [pod["metadata"]["name"] for pod in self._items("pods", f"{JOB}={name}")]
            if not left and self.status(name) is not None:  # it stays until KubeRay has finished with it
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
                said = process.stderr.read()
                if process.wait() != 0:
                    raise self._explained(said, process.returncode)
            finally:
                if timer is not None:
                    timer.cancel()
                process.kill()

    # ------------------------------------------------------------------------------------------------------------------

    def _is_there(self, name: str, content: str) -> bool:
        there = self.status(name)
        if there is None:
            return False
        if there.content == content:
            return True
        raise ConfigError(
            f"is the name of a run in namespace {self.namespace} with other content "
            f"({there.deployment or 'not begun'}); another name starts a new one, and kubectl shows the existing one: "
            f"kubectl get rayjob {name} --namespace={self.namespace} -o yaml",
            key="name",
            value=there.name,
        )

    def _own(self, said: Mapping[str, Any], config_map: Document, job: Document) -> None:
        """Make the RayJob the owner of the ConfigMap, so that Kubernetes always deletes both together."""
        uid = next((one["metadata"]["uid"] for one in said.get("items", []) if one.get("kind") == "RayJob"), None)
        owner = {"apiVersion": job["apiVersion"], "kind": "RayJob", "name": job["metadata"]["name"], "uid": uid}
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        # The run was sent. A small object that outlives it is not worth a warning.
        with contextlib.suppress(ClusterError, ConfigError):
            self._run("patch", "configmap", config_map["metadata"]["name"], "--type=merge", f"--patch={patch}")

    def _items(self, kind: str, selector: str) -> list[dict[str, Any]]:
        found = self._run("get", kind, "-l", selector, "--ignore-not-found", "-o", "json")
        return list(json.loads(found)["items"]) if found.strip() else []

    def _command(self) -> list[str]:
        context = [f"--context={self.context}"] if self.context else []
        return ["kubectl", *context, f"--namespace={self.namespace}"]

    def _run(self, *arguments: str, send: str | None = None) -> str:
        command = [*self._command(), f"--request-timeout={_ANSWER_S:g}s", *arguments]
        with self._started(command, stdin=subprocess.PIPE if send is not None else subprocess.DEVNULL) as process:
            try:
                # Longer than one request: kubectl makes several, and its login plugin may ask a person.
                out, said = process.communicate(send, timeout=2 * _ANSWER_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise ClusterUnreachable(
                    f"kubectl {arguments[0]} had no answer within {2 * _ANSWER_S:g} s{self.where}"
                ) from None
        if process.returncode != 0:
            raise self._explained(said, process.returncode)
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
        return f" (context {self.context or 'of kubectl, the current one'}, namespace {self.namespace})"

    def _explained(self, said: str, code: int) -> ClusterError | ConfigError:
        """Return an error that explains kubectl's message."""
        lines = [line for line in said.splitlines() if line.strip() and not re.match(r"[EWI]\d{4} ", line)]
        first = " ".join((lines or [f"exit code {code}"])[0].removeprefix("error: ").split())[:500]
        where = self.where
        if "context was not found" in said or re.search(r'context "[^"]*" does not exist', said):
            return ConfigError(
                "is not a kubectl context; kubectl config get-contexts lists them",
                key="cluster.context",
                value=self.context,
            )
        if "Apply failed with" in said and "conflict" in said:
            return _Conflict(f"somebody else has changed this run{where}: {first}")
        if match := re.search(r'admission webhook "([^"]+)" denied the request: (.*)', said):
            return ConfigError(f"Kubernetes does not accept the run: {match[1]} says: {match[2][:500]}")
        if match := _OLD.search(said):
            return ConfigError(
                f"the KubeRay there does not know {match[1]}: raytrainer's RayJobs need 1.5.1 or later (token "
                "authentication); helm upgrade kuberay-operator kuberay/kuberay-operator, and its CRDs with it"
            )
        if (
            "no matches for kind" in said
            or "could not find the requested resource" in said
            or ("doesn't have a resource type" in said)
        ):
            return ConfigError(
                f"needs the KubeRay operator, and Kubernetes does not know RayJob{where}: "
                "helm install kuberay-operator kuberay/kuberay-operator",
                key="cluster.kind",
                value="kuberay",
            )
        if match := re.search(r'namespaces "([^"]+)" not found', said):
            return ConfigError(
                f"does not exist: kubectl create namespace {match[1]}", key="cluster.namespace", value=match[1]
            )
        if "Unauthorized" in said or "provide credentials" in said or "must be logged in" in said:
            return ClusterDenied(
                f"Kubernetes does not accept your credentials{where}: log in again, as for any kubectl command"
            )
        if "(Forbidden)" in said or "forbidden" in said:
            return ClusterDenied(
                f"Kubernetes denies permission{where}: {first}. raytrainer needs get, list, create, patch and delete of "
                f"rayjobs.ray.io and configmaps, and get and list of pods and pods/log; "
                f"kubectl auth can-i create rayjobs.ray.io --namespace={self.namespace} checks this"
            )
        if "localhost:8080" in said and self.context is None:
            return ConfigError(
                "is not set and kubectl has no current one; kubectl config get-contexts lists them",
                key="cluster.context",
            )
        if any(text in said for text in _AWAY):
            return ClusterUnreachable(f"Kubernetes does not answer{where}: {first}")
        return ClusterError(f"kubectl{where}: {first}")


class RayJobs:
    """The runs of a namespace, with the interface of `Jobs`: by submission id, with Ray's statuses.

    Args:
        address: An address from `address_of`.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.kubectl = Kubectl(unquote(parts.netloc) or None, unquote(parts.path.strip("/")))

    def list(self) -> Sequence[RayJobStatus]:
        return self.kubectl.runs()

    def send(self, config_map: Document, job: Document, *, instead_of: RayJobStatus | None = None) -> bool:
        """Send a run. Return False if the same run exists already.

        Args:
            config_map, job: As `kuberay.documents` returns them.
            instead_of: An ended attempt at the run, whose object has the name; it is deleted first.

        Raises:
            ConfigError, ClusterError: As `Kubectl.apply`; or the ended attempt cannot be deleted.
        """
        if instead_of is not None and (left := self.kubectl.delete(instead_of.object)):
            raise ClusterError(
                f"the previous attempt, {instead_of.submission_id}, cannot be deleted{self.kubectl.where}: {', '.join(left)}; "
                f"kubectl describe rayjob {instead_of.object} says why"
            )
        return self.kubectl.apply(config_map, job)

    def info(self, submission_id: str) -> RayJobStatus:
        """Return the state of a run's job; STOPPED if its RayJob was deleted."""
        found = self._find(submission_id)
        gone = RayJobStatus(submission_id, "", submission_id, deployment="Complete", job="STOPPED")
        return found or replace(gone, message="its RayJob no longer exists")

    def stop(self, submission_id: str) -> None:
        """Delete the RayJob, because KubeRay offers no other way to end a job."""
        if (found := self._find(submission_id)) is not None:
            self.kubectl.delete(found.object, within_s=0)

    def held_by(self, submission_id: str) -> Mapping[str, float]:
        return self.kubectl.held(submission_id)

    def logs(self, submission_id: str) -> str:
        return "".join(f"{line}\n" for line in self.kubectl.logs(self._known(submission_id).object))

    def tail(self, submission_id: str) -> Iterator[str]:
        """Yield the lines that its driver prints, until the job has ended or is deleted.

        If KubeRay retries the job, it yields the lines of each try from its beginning.
        """
        cluster, shown, is_whole, lost = "", 0, False, None
        while True:
            try:
                job, lost = self.info(submission_id), None
            except ClusterUnreachable:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _PATIENCE_S:
                    raise
                time.sleep(_AGAIN_S)
                continue
            goes = job.status in _GOING
            if job.cluster != cluster:
                cluster, shown, is_whole = job.cluster, 0, False
            if job.status == "RUNNING" or (job.object and not goes and not is_whole):
                is_whole = False
                # There may be no log, because the submitter's pod is not running yet or is gone.
                with contextlib.suppress(ClusterError), contextlib.closing(self._lines(job, follow=goes)) as lines:
                    for line in itertools.islice(lines, shown, None):
                        shown += 1
                        yield f"{line}\n"
                    is_whole = True
            if not goes:
                return
            time.sleep(_AGAIN_S)

    def explain_waiting(self, submission_id: str) -> str:
        found = self.info(submission_id)
        if not found.object:
            return one_line(found.message)
        if found.suspended:
            return f"it waits for Kueue to admit it (queue {found.queue})"
        why = self.kubectl.waiting(found.object)
        return "; ".join(why) or one_line(found.message) or f"KubeRay: {found.deployment or 'has not started it'}"

    def _lines(self, job: RayJobStatus, follow: bool) -> Generator[str]:
        yield from self.kubectl.logs(job.object, follow)

    def _find(self, submission_id: str) -> RayJobStatus | None:
        return next((one for one in self.kubectl.runs() if one.submission_id == submission_id), None)

    def _known(self, submission_id: str) -> RayJobStatus:
        found = self._find(submission_id)
        if found is None:
            raise ClusterError(f"there is no RayJob of {submission_id}{self.kubectl.where}: it was deleted")
        return found


SCHEME = "kubernetes"


def address_of(context: str, namespace: str) -> str:
    """Return the address for the run record: `kubernetes://CONTEXT/NAMESPACE`."""
    return f"{SCHEME}://{quote(context, safe='')}/{quote(namespace, safe='')}"


_AWAY = (
    "Unable to connect to the server",
    "connection refused",
    "was refused",
    "i/o timeout",
    "no such host",
    "Client.Timeout",
    "context deadline exceeded",
    "TLS handshake timeout",
    "x509:",
)


class _Conflict(ClusterError):
    """Another field manager has set fields that we set."""
