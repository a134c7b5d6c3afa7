"""What one process is among many: its rank and device, precision, DDP or FSDP2, and the buffers that differ by rank.

Knows torch.distributed, not Ray: whoever starts the processes has made the default process group already. `fsdp` is
imported by whom it is for: it takes half a second.
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
