"""The code of one training process. It finds the last checkpoint, builds the `Trainer`, and connects it to progress,
tracking and checkpoints."""

from __future__ import annotations

from raytrainer.worker.job import WorkerJob
from raytrainer.worker.process import described, hello, inline_world, on_ray, request_stop
from raytrainer.worker.recording import MODEL_FOLDER
from raytrainer.worker.training import run

__all__ = ["MODEL_FOLDER", "WorkerJob", "described", "hello", "inline_world", "on_ray", "request_stop", "run"]
