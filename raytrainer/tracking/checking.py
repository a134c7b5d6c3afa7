"""Check before a run starts that its tracking store can be used."""

from __future__ import annotations

import importlib
from urllib.parse import urlsplit

from raytrainer.core import proxies
from raytrainer.core.background import in_background
from raytrainer.errors import TrackingUnreachable
from raytrainer.tracking.database import check_writable, is_sqlite, read_experiment
from raytrainer.tracking.failures import redacted
from raytrainer.tracking.request_settings import request_settings
from raytrainer.tracking.server import Server, refuse_deleted

CHECK_SECONDS = 14  # below the 15 s that `check_tracking` promises


def check_tracking(tracking_uri: str, experiment_name: str | None = None) -> None:
    """Check within 15 seconds that runs can be logged to the store. This does not create a SQLite file.

    Args:
        tracking_uri: An http(s) address, or a database URL.
        experiment_name: The experiment of a new run, which need not exist.

    Raises:
        TrackingUnreachable: The server does not answer, or MLflow cannot use the store.
        TrackingDenied: The first answer is 401 or 403.
        TrackingError: The experiment was deleted.
    """
    if is_sqlite(tracking_uri):
        check_writable(tracking_uri)
        if experiment_name is not None and (id_and_stage := read_experiment(tracking_uri, experiment_name)):
            refuse_deleted(experiment_name, *id_and_stage)
        return
    if urlsplit(tracking_uri).scheme in ("", "file"):
        raise TrackingUnreachable(
            f"tracking.tracking_uri={tracking_uri} is a directory, that is, a file store, which MLflow no longer supports:"
            " use sqlite:////ABSOLUTE/PATH/mlflow.db or a server's http(s) address"
        )
    # Import before the time limit starts, because the import alone takes seconds on a slow machine.
    with request_settings(10):
        importlib.import_module("mlflow.tracking")
    # Use a thread, because database drivers and name lookups do not respect our timeout.
    try:
        in_background(lambda: Server(tracking_uri).probe(experiment_name), "tracking-check").result(CHECK_SECONDS)
    except TimeoutError:
        raise TrackingUnreachable(
            f"the tracking server {redacted(tracking_uri)} gave no answer in {CHECK_SECONDS} s{proxies.hint(tracking_uri)}"
        ) from None
