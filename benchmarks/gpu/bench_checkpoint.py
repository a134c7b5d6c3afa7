"""Cost of saving a checkpoint if the state is in a GPU's memory: `benchmarks.bench_checkpoint` on a GPU.

python -m benchmarks.gpu.bench_checkpoint
"""

from __future__ import annotations

from benchmarks import report
from benchmarks.bench_checkpoint import compare
from benchmarks.gpu import rounds

if __name__ == "__main__":
    given = rounds.options(__doc__)
    if given.smoke:
        print(compare(megabytes=1, rounds=1, device=rounds.device().type))
    else:
        report.write("gpu-checkpoint", compare(megabytes=1500, rounds=given.rounds, device="cuda"))
