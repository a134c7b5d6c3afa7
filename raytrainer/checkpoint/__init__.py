"""Save a nested state to a directory and read it back: sharded, checksummed, and committed by a manifest.
A checkpoint has no pickles: tensors are in safetensors files, everything else is JSON."""

from __future__ import annotations

from raytrainer.checkpoint.checkpoint_files import unread
from raytrainer.checkpoint.checkpointer import Checkpointer
from raytrainer.checkpoint.manifest import CheckpointInfo
from raytrainer.checkpoint.moving import copy_out, import_checkpoint, import_note
from raytrainer.checkpoint.tree import as_read
from raytrainer.checkpoint.weights import EXTRA_STATE, Weights, find_weights, fit, take

__all__ = [
    "EXTRA_STATE",
    "CheckpointInfo",
    "Checkpointer",
    "Weights",
    "as_read",
    "copy_out",
    "find_weights",
    "fit",
    "import_checkpoint",
    "import_note",
    "take",
    "unread",
]
