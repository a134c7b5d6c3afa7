"""Model FLOP utilisation: the floating-point operations that a model needs, relative to its device's peak."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_log = logging.getLogger("raytrainer.flops")

# Dense peaks in TFLOP/s, from the vendors' data sheets (figures "with sparsity" are twice these): for bfloat16 and
# float16 on matrix units, for TF32 on them, and for float32. The first name that occurs in the device's name is used.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("H200", 989.4, 494.7, 66.9),
    ("GH200", 989.4, 494.7, 66.9),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100 PCIe", 756.0, 378.0, 51.2),
    ("H100", 989.4, 494.7, 66.9),  # SXM
    ("A100", 312.0, 156.0, 19.5),
    ("A10G", 70.0, 35.0, 35.0),
    ("A10", 125.0, 62.5, 31.2),
    ("L40S", 362.0, 183.0, 91.6),
    ("L4", 121.0, 60.0, 30.3),
    ("MI300X", 1307.4, 653.7, 163.4),
)


def peak_flops(device: torch.device, precision: str, tflops: float | None = None) -> float | None:
    """Return the peak of one device in FLOP/s; None if it is unknown.

    Args:
        device: The device of a worker.
        precision: `trainer.precision`.
        tflops: `trainer.peak_tflops`, which overrides the table; 0 disables the figure.
    """
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda" or precision == "64-true":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a GPU
        return None
    peaks_of_device = next((peaks for part, *peaks in _PEAKS if re.search(rf"\b{part}\b", name)), None)
    if peaks_of_device is None:
        return None
    half, tf32, single = peaks_of_device
    if precision == "32-true":
        return (tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else single) * 1e12
    return half * 1e12


def model_flops(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module, Any], Mapping[str, Tensor]]]], batch: Any
) -> float | None:
    """Return the floating-point operations of one forward and backward over `batch`; None if they cannot be counted.

    Matrix products, convolutions and attention are counted, a multiplication and addition as two, after Chowdhery et
    al. 2022 (arXiv:2204.02311, appendix B): attention over the whole square, and nothing for what activation
    checkpointing recomputes. The model is built again on the meta device, which needs neither computation nor memory,
    so that neither compiling nor sharding changes the figure.

    Args:
        make: Builds the model and the loss, on the device of the context.
        batch: A batch on the meta device.
    """
    try:
        with torch.device("meta"):
            model, loss = make()
        with FlopCounterMode(display=False) as counter:
            loss(model, batch)["loss"].backward()
    except Exception as error:  # noqa: BLE001  models are the user's, and this figure is not worth failing a run
        _log.info("no train/mfu: the model does not run on the meta device: %s: %s", type(error).__name__, error)
        return None
    return float(counter.get_total_flops()) or None
