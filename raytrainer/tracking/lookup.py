"""Questions to a tracking store that are not part of logging a run: where a run is, and registering its model."""

from __future__ import annotations

from raytrainer.tracking.server import Server

RUN_DIR_TAG = "raytrainer.run_dir"


def find_run_dir(tracking_uri: str, identifier: str) -> str | None:
    """The storage of the run with this MLflow id or name (the newest of the name); None: no run of ours.

    Raises:
        TrackingUnreachable, TrackingDenied: The store cannot be asked.
    """
    return Server(tracking_uri).run_tag(identifier, RUN_DIR_TAG)


def register_model(tracking_uri: str, run_id: str, folder: str, name: str) -> str:
    """Registers the model in `folder` of the run's artifacts as a new version of `name`; returns the version.

    Raises:
        TrackingError: The store has no such artifact, or no registry.
    """
    return Server(tracking_uri, timeout_s=30).create_model_version(run_id, folder, name)
