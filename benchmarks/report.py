"""Shared by all benchmarks: medians with their spread, and a result file with its origin."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the minimum, the maximum and the number of values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def versions() -> dict[str, str]:
    names = ("raytrainer", "torch", "ray", "mlflow", "hydra-core")
    found = {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["torchvision"] = importlib.metadata.version("torchvision")
    return found


def machine() -> str:
    """Return processor, cores, memory and GPUs, without the name of this host."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x.partition(":")[2].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0] if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB{_gpus()}"


def _gpus() -> str:
    """Return the GPUs and the CUDA version, if the benchmark has imported torch and the machine has GPUs."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"; {len(names)} × {names[0]}, CUDA {torch.version.cuda}"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures, and write them to `results/NAME.json` with command, machine, versions, date and commit."""
    RESULTS.mkdir(exist_ok=True)
    program = Path(sys.argv[0]).resolve().relative_to(RESULTS.parents[1]).with_suffix("")
    command = shlex.join(["python", "-m", ".".join(program.parts), *sys.argv[1:]])
    origin = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
    text = json.dumps({**origin, **figures}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
