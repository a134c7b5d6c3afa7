"""One process among many: its rank and device, and its settings that affect reproducibility."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The place of this process. The default is a single process on the CPU.

    Attributes:
        node: The number of its node; rank 0 is on node 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node: int = 0

    @property
    def distributed(self) -> bool:
        return self.size > 1

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum `tensor` over all ranks, in place; with a single rank, return it unchanged."""
        if self.distributed:
            dist.all_reduce(tensor, op)
        return tensor


def set_determinism(deterministic: bool, device: torch.device, num_threads: int | None) -> None:
    """Set the process-wide options for bit-for-bit repetition.

    The number of threads is one of them: a convolution's sums differ between 1 and 2 threads.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            # cuBLAS needs a fixed workspace for repeatable sums. It reads the variable when its first handle is
            # created.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode also fills fresh memory, which only hides bugs and costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
