"""The time to the first batch, and the memory, of two data processes: for each `data.start_method`.

Each measurement is a program of its own, which has imported torch and raytrainer before its clock starts. The ways
alternate (A B C …). With `ready`, the program waits for the forkserver first, as a run does while it builds its model.

    python -m benchmarks.bench_data_processes --runs 5
    python -m benchmarks.bench_data_processes --runs 1 --dry-run       # does it work
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from benchmarks import report
from raytrainer.data import Loader

WAYS = ("fork", "forkserver ready", "forkserver", "spawn")
_READY_S = 30.0  # longer than a server needs to import torch


class Rows:
    """4,096 samples, each made by a slow function."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((64,), float(index))}


def measure(way: str) -> dict[str, float]:
    """Return the seconds to the first batch, its sum, and the PSS of this program and its processes in MB."""
    from benchmarks import bench_data_processes as importable  # data processes do not import `__main__`

    method, _, ready = way.partition(" ")
    loader = Loader(importable.Rows(), global_batch_size=64, num_workers=2, start_method=method, seed=1)
    if ready:
        _wait_for_server()
    begin = time.perf_counter()
    batches = loader.batches()
    first = next(iter(batches))
    seconds = time.perf_counter() - begin
    me = psutil.Process()
    memory = sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True)))
    return {"seconds": seconds, "sum": float(first.micro[0].data["x"].sum()), "pss_mb": memory / 1e6}


def _wait_for_server() -> None:
    """Wait until the processor time of this program's children no longer grows: the server has imported everything."""
    deadline, last = time.monotonic() + _READY_S, -1.0
    while time.monotonic() < deadline:
        time.sleep(1.0)
        used = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
        if used == last:
            return
        last = used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="write no result")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.bench_data_processes", "--one", way]
            root = Path(__file__).resolve().parent.parent
            output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
            rows[way].append(json.loads(output))
    assert len({row["sum"] for measured in rows.values() for row in measured}) == 1, "the ways made different batches"
    figures = {
        way: {name: report.spread([row[name] for row in measured]) for name in ("seconds", "pss_mb")}
        for way, measured in rows.items()
    }
    if options.dry_run:
        print(json.dumps(figures, indent=1))
        return
    what = "seconds to the first batch of two data processes, and the PSS of the program and its processes in MB"
    report.write("data_processes", {"what": what, **figures})


if __name__ == "__main__":
    main()
