"""The driver of one run: preflight, the MLflow run, Ray Train (or this process), and the one true terminal status."""

from __future__ import annotations

from raytrainer.run.launching import check, launch
from raytrainer.run.record import Outcome, Record, summary, tracking_uri

__all__ = ["Outcome", "Record", "check", "launch", "summary", "tracking_uri"]
