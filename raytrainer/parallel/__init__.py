"""Distributed training in one process of many: rank, device, precision, DDP or FSDP2, and buffers that differ by rank.

It uses torch.distributed, not Ray, and expects that the default process group exists. Import `fsdp` only where it is
needed, because that takes half a second.
"""

from __future__ import annotations

from raytrainer.parallel.activations import checkpoint_activations
from raytrainer.parallel.buffers import (
    averaged_buffers,
    broadcast_state,
    holding_mean_buffers,
    load_buffers,
    mean_buffers,
)
from raytrainer.parallel.ddp import check_reduced, replicate, synchronise
from raytrainer.parallel.masking import ZeroWeights
from raytrainer.parallel.precision import Precision
from raytrainer.parallel.reduction import MeanGradients
from raytrainer.parallel.units import find_units
from raytrainer.parallel.world import World, set_determinism
from raytrainer.sharding import is_sharded, local_parts, reshard

__all__ = [
    "MeanGradients",
    "Precision",
    "World",
    "ZeroWeights",
    "averaged_buffers",
    "broadcast_state",
    "check_reduced",
    "checkpoint_activations",
    "find_units",
    "holding_mean_buffers",
    "is_sharded",
    "load_buffers",
    "local_parts",
    "mean_buffers",
    "replicate",
    "reshard",
    "set_determinism",
    "synchronise",
]
