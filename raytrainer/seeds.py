"""Derive every random state from a key: the same (purpose, seed, epoch, step, rank) gives the same numbers anywhere.

The hash (BLAKE2b over a canonical text) is computed here, so that an upgrade of numpy or torch cannot change it.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np

Key = int | str


def _digest(key: tuple[Key, ...], size: int) -> int:
    # With the type, length and value of each part, no two tuples have the same text.
    text = "".join(f"s{len(part)}:{part};" if isinstance(part, str) else f"i{int(part)};" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def mix(*key: Key) -> int:
    """Return a stable integer in [0, 2**63): the lowest 63 bits of BLAKE2b-64 of the parts' types, lengths and values.

    The parts are strings and integers of any size. `True` counts as 1, and a numpy integer as Python's.
    """
    return _digest(key, 8) & (2**63 - 1)


def numpy_generator(*key: Key) -> np.random.Generator:
    """Return a new generator for `key`: Philox (Salmon et al. 2011), keyed with the 128 bits of BLAKE2b of `key`."""
    return np.random.Generator(np.random.Philox(key=_digest(key, 16)))


def seed_everything(*key: Key) -> None:
    """Seed Python's, numpy's global and torch's generators (CPU and every device) with `mix(*key)`."""
    import torch

    number = mix(*key)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)


def random_state() -> dict[str, Any]:
    """Return the state of all global generators as tensors and JSON values, so that a checkpoint needs no pickle.

    Keys: `python`, `numpy`, `torch`, and `cuda` (of the current device, if CUDA is in use).

    Raises:
        TypeError: numpy's global generator is not its MT19937.
    """
    import torch

    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    if legacy["bit_generator"] != "MT19937":
        raise TypeError(f"numpy's global generator is {legacy['bit_generator']}, and only MT19937 can be kept")
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    # Only the current device: a process trains on one device, whose number may change when the run is resumed.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned. A `cuda` part is ignored if there is no CUDA device."""
    import torch

    python, legacy = state["python"], state["numpy"]
    random.setstate((int(python["version"]), tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            "MT19937",
            legacy["words"].numpy().astype(np.uint32),
            int(legacy["position"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        )
    )
    torch.set_rng_state(state["torch"].to(device="cpu", dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].to(device="cpu", dtype=torch.uint8))
