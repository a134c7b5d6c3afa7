"""The common part of backends that send a run elsewhere: the request, `--dry-run`, checks, sending and following.

A backend implements `address`, `start` and `jobs`, and overrides what differs.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from raytrainer import plugins, preflight, provenance
from raytrainer.attempt import Record, probe_first_batch, tracking_uri
from raytrainer.config import Experiment
from raytrainer.errors import PreflightError
from raytrainer.plugins import Backend, Job
from raytrainer.submission import sending
from raytrainer.submission.code import checked_runtime_env
from raytrainer.submission.request import Request, Sources, build, to_yaml
from raytrainer.submission.sending import Submission
from raytrainer.submission.target import Target, compositions_of
from raytrainer.sweep import Plan


class JobBackend(Backend):
    """A backend that submits. `submit` is safe to repeat: the same request under the same name is one job.

    Attributes:
        driver: The backend that the driver of the job uses, on its own machine.
        sends_code: Whether the code that runs is that of this machine, so that objects can be checked here.
        resends: Whether a job whose driver was killed is sent again, `cluster.retries` times. Otherwise the cluster
            retries by itself.
    """

    submits = True
    driver = plugins.ON_ITS_CLUSTER
    sends_code = True
    resends = True

    @abstractmethod
    def address(self, experiment: Experiment) -> str:
        """Return the address for the records: a scheme of `schemes`, `://`, and what identifies the place."""

    @abstractmethod
    def start(self, request: Request, previous: Job | None = None) -> Job:
        """Send a request, and return its job.

        Args:
            request: What to start: `entrypoint`, with the request's `files`.
            previous: An ended attempt at the same run; None for the first.

        Raises:
            JobExists: There is a job with this id, possibly one submitted at the same moment.
            ConfigError: The request cannot be sent.
            ClusterError: The cluster cannot be reached, or denies access.
        """

    def sources(self, target: Target, argv: Sequence[str], folder: Path) -> Sources:
        """Return what a request takes from this machine. Nothing but the request's files is sent by default.

        Args:
            target: The run or sweep.
            argv: The command line, for the records.
            folder: The launching directory.
        """
        return Sources(
            address=self.address(target.experiment),
            origin=provenance.collect(list(argv), folder),
            user=provenance.user(),
            environ=os.environ,
            runtime_env=checked_runtime_env(target.experiment.cluster.runtime_env),
            driver=self.driver,
        )

    def text(self, request: Request) -> str:
        """Return what `--dry-run` prints."""
        return to_yaml(request.shown())

    def check_capacity(self, request: Request, say: Callable[[str], None]) -> None:
        """Check that the place could ever run the request.

        Raises:
            PreflightError: It could not.
        """
        problems = []
        for composition in compositions_of(request.target):
            if (offer := self.resources(composition.experiment)) is not None:
                problems += preflight.check_resources(composition.experiment, *offer)
        preflight.refuse(list(dict.fromkeys(problems)))

    def check_access(self, request: Request) -> None:
        """Check that no setting of this machine redirects a submission to another cluster.

        Raises:
            ConfigError: A setting does; the message names it.
        """

    def warnings(self, experiment: Experiment) -> list[str]:
        """Return warnings about an experiment that is submitted."""
        return []

    # --- Backend ------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        target: Target,
        argv: Sequence[str],
        *,
        record: Record | None = None,
        changed: Sequence[str] = (),
        folder: Path | None = None,
    ) -> Request:
        """Return the request for a run or sweep that is launched in a folder; by default the current one.

        Args:
            target, argv, record, changed: As for `submit`.
            folder: The launching directory, whose files may be sent.

        Raises:
            ConfigError: Something cannot be sent; the message names the fix.
        """
        sources = self.sources(target, argv, folder or Path.cwd())
        attempt = 1 if record is None else record.attempts + 1
        return build(target, argv, sources, changed=changed, resumes=record is not None, attempt=attempt)

    def problems(self, request: Request) -> tuple[list[str], list[str]]:
        """Return the reasons to refuse a submission, because the cluster cannot reach something, and the warnings."""
        refusals, warnings = list[str](), list[str]()
        sent = [name for name, _ in request.package.files] if request.package else []
        for composition in compositions_of(request.target):
            e = composition.experiment
            refusals += preflight.check_reach(e, tracking_uri(e))
            warnings += preflight.local_files(e, sent) if preflight.is_elsewhere(e) else []
            warnings += self.warnings(e)
        return list(dict.fromkeys(refusals)), list(dict.fromkeys(warnings))

    def render(
        self,
        target: Target,
        argv: Sequence[str],
        *,
        record: Record | None = None,
        changed: Sequence[str] = (),
        say: Callable[[str], None],
    ) -> str:
        request = self.prepare(target, argv, record=record, changed=changed)
        text = self.text(request)
        if table := request.table():
            say(f"would upload:\n{table}")
        refusals, warnings = self.problems(request)
        for problem in refusals:
            say(f"would be refused: {problem}")
        for warning in warnings:
            say(f"warning: {warning}")
        return text

    def check(
        self, target: Target, argv: Sequence[str], *, record: Record | None = None, say: Callable[[str], None]
    ) -> str:
        request = self._accepted(target, argv, record, (), say)
        preflight.check_objects(request.experiment)
        self.check_capacity(request, say)
        example = target.example if isinstance(target, Plan) else target
        probe_first_batch(example, request.experiment.scaling.use_gpu is not False, say)
        return f"a job at {request.address}"

    def submit(
        self,
        target: Target,
        argv: Sequence[str],
        *,
        record: Record | None = None,
        changed: Sequence[str] = (),
        say: Callable[[str], None],
        out: TextIO,
    ) -> Submission:
        request = self._accepted(target, argv, record, changed, say)
        if self.sends_code and not request.experiment.cluster.wait:
            preflight.check_objects(request.experiment)  # here, because the user does not see the job's messages
        return sending.send(self, request, record, say=say, out=out)

    def _accepted(
        self,
        target: Target,
        argv: Sequence[str],
        record: Record | None,
        changed: Sequence[str],
        say: Callable[[str], None],
    ) -> Request:
        """Return the request, unless a known problem refuses it. Show the warnings."""
        request = self.prepare(target, argv, record=record, changed=changed)
        refusals, warnings = self.problems(request)
        if refusals:
            raise PreflightError(refusals)
        for warning in warnings:
            say(f"warning: {warning}")
        self.check_access(request)
        return request
