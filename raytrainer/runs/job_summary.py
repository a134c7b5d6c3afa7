"""The summary of a run with the state of its job."""

from __future__ import annotations

from dataclasses import replace

from raytrainer.runs.handle import RunHandle
from raytrainer.runs.jobs import ACTIVE, Clusters, Job, never_sent
from raytrainer.runs.summary import RunSummary, summarize
from raytrainer.submission.ending import ending_of


def summarize_job(handle: RunHandle, job: Job | None, clusters: Clusters) -> RunSummary:
    """Return the summary of a run that so far has only a job.

    Args:
        handle: The run.
        job: Its job; None if the cluster does not have it.
        clusters: The clusters that were queried.
    """
    summary = summarize(handle)
    if job is None:
        cause = (
            "unknown: its cluster does not answer" if clusters.query_error(handle) is not None else never_sent(handle)
        )
        return replace(summary, status="UNKNOWN", cause=cause)
    if job.status in ACTIVE:
        return replace(summary, status=job.status, started=job.started, cause=None)
    end = ending_of(job)
    return replace(summary, status=end.status, started=job.started, ended=job.ended, cause=end.cause)


def with_active_job(summary: RunSummary, handle: RunHandle, job: Job) -> RunSummary:
    """Return the summary of a run with its active job, which its directory and MLflow may not have yet."""
    return replace(
        summary,
        status=job.status,
        submission_id=job.submission_id,
        cluster_address=handle.cluster_address,
        where=handle.cluster_address if summary.cluster_address != handle.cluster_address else summary.where,
        started=job.started or summary.started,
        ended=None,
        cause=None,
        life="alive",
    )


def with_last_job(summary: RunSummary, job: Job) -> RunSummary:
    """Return the summary of a run with the job that should have continued it but was refused or died too early.

    The status remains that of the run. A later attempt replaces this information.
    """
    end = ending_of(job)
    if end.status not in ("REFUSED", "FAILED"):
        return summary
    cause = end.cause or ""
    last_job = {"submission_id": job.submission_id, "status": end.status, "cause": cause}
    return replace(summary, cause=f"{end.status}: job {job.submission_id}: {cause}", last_job=last_job)
