"""Weights from wherever they are: a run, a checkpoint of one, a safetensors file, or a state dict saved by torch.
Nothing is unpickled but tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raytrainer.checkpoint.checkpointer import Checkpointer
from raytrainer.checkpoint.manifest import CheckpointInfo
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound
from raytrainer.storage import Storage


def read_weights(source: str, storage_path: str) -> dict[str, torch.Tensor]:
    """A model's state dict, on the CPU.

    Args:
        source: A `.safetensors`, `.pt` or `.pth` file; a run's directory or name (its best checkpoint, else its last);
            or one checkpoint's directory. The averaged weights (EMA) where a checkpoint has them.
        storage_path: Where runs are looked up by name.

    Raises:
        CheckpointNotFound: There is nothing of the kind.
        CheckpointCorrupt: It cannot be read as weights.
    """
    found = find_weights(source, storage_path)
    if isinstance(found, Path):
        return _from_file(found)
    checkpoints, info, wanted = found
    shared, _ = checkpoints.load(info)
    # What is best depends on checkpoint.mode, which only the trainer knew: the last checkpoint notes the best step.
    best = None if wanted else shared.get("best", {}).get("step")
    if (better := next((i for i in checkpoints.list() if i.step == best), info)) is not info:
        shared, _ = checkpoints.load(better)
    return dict(shared.get("ema") or shared["model"])


def find_weights(source: str, storage_path: str) -> Path | tuple[Checkpointer, CheckpointInfo, str | None]:
    """Where `read_weights` reads from, without reading: a file, or a run's checkpoints with the one to begin at.

    The last part is the name of the one checkpoint that `source` is, None where it is a run.

    Raises:
        CheckpointNotFound: There is nothing of the kind.
    """
    path = Path(source)
    if "://" not in source and path.is_file():
        return path
    if "://" not in source and not path.is_absolute():
        source = f"{storage_path.rstrip('/')}/{source}"
    place = source.rstrip("/")
    parent, _, name = place.rpartition("/")
    if Storage(place).exists("manifest.json"):
        checkpoints, wanted = Checkpointer(Storage(parent)), name
    else:
        checkpoints, wanted = Checkpointer(Storage(place).child("checkpoints")), None
    found = checkpoints.list()
    info = next((i for i in found if i.name == wanted), None) if wanted else (found[-1] if found else None)
    if info is None:
        raise CheckpointNotFound(f"init_from={source}: neither a file of weights, nor a run or checkpoint there")
    return checkpoints, info, wanted


def _from_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every library has its own, and all mean the same
        raise CheckpointCorrupt(f"{path} cannot be read as weights: {error}") from error
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise CheckpointCorrupt(f"{path} is not a state dict of tensors")
    return loaded
