"""The interfaces that other packages implement, `Backend` and `Job`, and the registry of backends.

A backend says where a run is started. The built-in ones are in `raytrainer.backends`. Another package adds its own with
an entry point of the group `raytrainer.backends`; its name is then a value of `cluster.kind`. See docs/backends.md.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO

from raytrainer.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from raytrainer.attempt import Record
    from raytrainer.config import ClusterConfig, Composition, Experiment
    from raytrainer.preflight import Resources
    from raytrainer.submission import Submission
    from raytrainer.sweep import Plan

GROUP = "raytrainer.backends"
# Entry points in a table, because a source tree that is shipped to a cluster has no metadata.
_BUILT_IN = {
    "inline": "raytrainer.backends.inline:Inline",
    "local": "raytrainer.backends.local:Local",
    "existing": "raytrainer.backends.existing:Existing",
    "ray_jobs": "raytrainer.backends.ray_jobs:RayJobs",
    "kuberay": "raytrainer.backends.kuberay:KubeRay",
}
# A backend's name → its older name, which configs, requests and records keep, so that they equal those of older
# versions.
_RECORDED = {"ray_jobs": "job"}
ON_ITS_CLUSTER = "existing"  # the backend of a driver that was sent to the cluster on which it runs
ACTIVE = ("PENDING", "RUNNING")  # the statuses of a job that has not ended


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """A driver that a backend has started elsewhere, in its state at the time of the query.

    Attributes:
        submission_id: The id under which it was submitted.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, as Ray names them.
        message: The reason for the status; for a failed job the end of its log, too.
        metadata: The metadata of the submission, such as `raytrainer.name`.
        started, ended: Seconds since the epoch; None until then.
        exit_code: The driver's exit code, once it has ended.
    """

    submission_id: str
    status: str
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether it is PENDING or RUNNING."""
        return self.status in ACTIVE

    @abstractmethod
    def refresh(self) -> Job | None:
        """Return the job in its present state; None if its backend no longer knows it.

        Raises:
            ClusterError: The backend does not answer. Every method may raise it.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask for the end of the job, and return at once. An ended job is left alone."""

    @abstractmethod
    def logs(self, follow: bool = False) -> Iterator[str]:
        """Yield what the driver has printed, in pieces of any length.

        Args:
            follow: Whether to continue until the job has ended.
        """

    def explain_waiting(self) -> str:
        """Return what a PENDING job waits for, as text."""
        return self.message or "for its start"

    def held_by(self) -> Mapping[str, float]:
        """Return what a job holds, even after its end: resources by name, and live `processes`. Empty if nothing."""
        return {}

    def wait(self, timeout_s: float = float("inf"), *, sleep: Callable[[float], None] = time.sleep) -> Job:
        """Wait for the end of the job. Return its last known state, still active after a timeout."""
        job: Job = self
        deadline = time.monotonic() + timeout_s
        while job.is_active:
            job = job.refresh() or job
            if not job.is_active or time.monotonic() >= deadline:
                break
            sleep(0.5)
        return job


class Backend(ABC):
    """The place where runs are started. An entry point names the subclass, which is created once, without arguments.

    A backend either lets this process be the driver of the run, or sends the run elsewhere as a job (`submits`).
    `raytrainer.submission.JobBackend` implements most of the latter.

    Attributes:
        name: A value of `cluster.kind`.
        submits: Whether the driver is a job elsewhere. Otherwise it is this process.
        ray: Which Ray the driver of this process uses: none, an embedded one that ends with it, or a running one.
        location: Where the processes of a run are: `here`, on this machine; `elsewhere`, on others; or `address`, on
            the machine that `cluster.address` names.
        address_form: A pattern for `cluster.address`, and its description in errors; None: it has no address.
        schemes: What the addresses in its records begin with: `kubernetes` of `kubernetes://…`.
        options: The keys of `cluster.options` that it reads.
    """

    name: ClassVar[str]
    submits: ClassVar[bool] = False
    ray: ClassVar[Literal["none", "embedded", "running"]] = "running"
    location: ClassVar[Literal["here", "address", "elsewhere"]] = "here"
    address_form: ClassVar[tuple[str, str] | None] = None
    schemes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()

    def validate(self, experiment: Experiment) -> Sequence[ConfigError]:
        """Return the problems of an experiment with this backend that its config alone shows.

        It is called whenever a config is composed, so it makes no requests and imports nothing heavy.
        """
        return [
            ConfigError(
                f"has no meaning with cluster.kind={self.name}", key=f"cluster.options.{key}", choices=self.options
            )
            for key in experiment.cluster.options
            if key not in self.options
        ]

    def resources(self, experiment: Experiment) -> tuple[Resources, str] | None:
        """Return the most resources that a run can get, and the name of the place for messages.

        None stands for this machine's resources. For a backend that submits, it means that they are unknown.

        Raises:
            ConfigError: The place does not exist.
            ClusterError: The place does not answer.
        """
        return None

    # --- backends that submit -----------------------------------------------------------------------------------------

    def check(
        self,
        target: Composition | Plan,
        argv: Sequence[str],
        *,
        record: Record | None = None,
        say: Callable[[str], None],
    ) -> str:
        """Check all that can be checked before a submission, and send nothing. Return where it would run, as text.

        Args:
            target: The run or sweep.
            argv: The command line, for the records.
            record: The run that would be continued; None: a new one.
            say: Receives warnings and the verdict of the first-batch probe.

        Raises:
            Refused: A check has failed.
            ClusterError: The cluster cannot be reached.
        """
        raise NotImplementedError(f"cluster.kind={self.name} sends nothing")

    def render(
        self,
        target: Composition | Plan,
        argv: Sequence[str],
        *,
        record: Record | None = None,
        changed: Sequence[str] = (),
        say: Callable[[str], None],
    ) -> str:
        """Return everything that would be sent, as text for `--dry-run`.

        Args:
            target, argv, record, say: As for `check`.
            changed: As for `raytrainer.launch`.

        Raises:
            ConfigError: Something cannot be sent; the message names the fix.
        """
        raise NotImplementedError(f"cluster.kind={self.name} sends nothing")

    def submit(
        self,
        target: Composition | Plan,
        argv: Sequence[str],
        *,
        record: Record | None = None,
        changed: Sequence[str] = (),
        say: Callable[[str], None],
        out: TextIO,
    ) -> Submission:
        """Send a run or sweep and follow it to its end, unless `cluster.wait` is false.

        Args:
            target, argv, record, say: As for `check`.
            changed: As for `raytrainer.launch`.
            out: Receives what the job prints.

        Raises:
            Refused: Nothing was sent.
            ClusterError: The cluster cannot be reached any more; a job that was sent continues.
        """
        raise NotImplementedError(f"cluster.kind={self.name} sends nothing")

    def jobs(self, address: str, settings: ClusterConfig) -> Sequence[Job]:
        """Return all jobs at an address, including ended ones.

        Args:
            address: The address in a record, which begins with one of `schemes`.
            settings: The section `cluster` of the run: how to reach the address.

        Raises:
            ClusterError: The cluster cannot be reached, or denies access.
        """
        return ()

    def job(self, submission_id: str, address: str, settings: ClusterConfig) -> Job | None:
        """Return one job; None if there is none. Arguments and errors are those of `jobs`."""
        return next((job for job in self.jobs(address, settings) if job.submission_id == submission_id), None)


# --- the registry -------------------------------------------------------------------------------------------------------

_loaded: dict[str, Backend] = {}


def backend_named(kind: str) -> Backend:
    """Return the backend that a value of `cluster.kind` names.

    Raises:
        ConfigError: There is none, or its package cannot be imported.
    """
    name = next((name for name, recorded in _RECORDED.items() if recorded == kind), kind)
    if name not in _loaded:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            _loaded[name] = getattr(import_module(module), attribute)()
        elif point := _installed().get(name):
            _loaded[name] = _load(point)
        else:
            raise ConfigError("is not a backend", key="cluster.kind", value=kind, choices=backend_names())
    return _loaded[name]


def backend_at(address: str) -> Backend:
    """Return the backend to which an address in a record belongs.

    Raises:
        ClusterError: There is none, or its package cannot be imported.
    """
    scheme = address.partition("://")[0]
    installed = _installed()
    candidates = [*_BUILT_IN, *sorted(installed, key=lambda name: name != scheme)]  # its namesake first
    for name in candidates:
        try:
            backend = backend_named(name)
        except ConfigError as error:
            if name == scheme:
                raise ClusterError(f"the address {address} cannot be used: {error}") from error
            continue  # the package of another backend
        if scheme in backend.schemes:
            return backend
    raise ClusterError(f"no installed backend has addresses like {address}; there are {', '.join(backend_names())}")


def backend_names() -> list[str]:
    """Return the valid values of `cluster.kind`."""
    return list(dict.fromkeys([*_BUILT_IN, *_RECORDED.values(), *sorted(_installed())]))


def built_in() -> list[Backend]:
    """Return raytrainer's own backends."""
    return [backend_named(name) for name in _BUILT_IN]


def recorded_kind(kind: str) -> str:
    """Return the name of a backend in configs, requests and records."""
    return _RECORDED.get(kind, kind)


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> Backend:
    source = f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist is not None else point.value
    try:
        backend: Any = point.load()()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"cannot be loaded ({source}): {type(error).__name__}: {first}", key="cluster.kind", value=point.name
        ) from error
    if not isinstance(backend, Backend):
        raise ConfigError(f"is not a raytrainer.Backend ({source})", key="cluster.kind", value=point.name)
    return backend
