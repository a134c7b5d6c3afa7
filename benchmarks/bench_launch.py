"""Time from the shell to the first step and to the exit: `python -m raytrainer` against a minimal Ray Train script.

Both start cold, train the same model for the same steps on the same data with 2 workers, and end with the validation
accuracy. raytrainer also keeps config, metrics, checkpoints and logs in MLflow. The two alternate: A B A B …

    python -m benchmarks.bench_launch --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report

STEPS = 44
HERE = Path(__file__).resolve().parent
CALLBACK = '''
import os, time
class FirstStep:
    """Notes when rank 0's first step was done."""
    def __init__(self, path): self.path, self.seen = path, False
    def on_step_end(self, trainer, event):
        if not self.seen and trainer.world.rank == 0:
            self.seen = True
            open(self.path, "w").write(str(time.time()))
'''


def timed(command: list[str], folder: Path, first: Path) -> dict[str, Any]:
    """Run a command in `folder`, and return the seconds to the first step and to the exit, and its output."""
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{HERE.parent}", "MLFLOW_TRACKING_URI": ""}
    del env["MLFLOW_TRACKING_URI"]
    began = time.time()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return {
        "exit": ended - began,
        "first_step": float(first.read_text()) - began,
        "lines": len((done.stdout + done.stderr).strip().splitlines()),
        "output": done.stdout + done.stderr,
    }


def ours(folder: Path, log_model: bool) -> dict[str, Any]:
    (folder / "first_step.py").write_text(CALLBACK)
    first = folder / "first"
    found = timed(
        [
            sys.executable,
            "-m",
            "raytrainer",
            "experiment=resnet",
            "name=bench",
            f"trainer.max_steps={STEPS}",
            "trainer.max_epochs=null",
            "data.train.transform=null",
            f"tracking.log_model={str(log_model).lower()}",
            f"+callbacks.first={{_target_: first_step.FirstStep, path: {first}}}",
        ],
        folder,
        first,
    )
    found["marks"] = json.loads((folder / "runs/bench/logs/launch.json").read_text())
    found["steps"] = int(
        json.loads(next((folder / "runs/bench/checkpoints").glob("step-*44/manifest.json")).read_text())["step"]
    )
    return found


def minimal(folder: Path) -> dict[str, Any]:
    first = folder / "first"
    found = timed([sys.executable, str(HERE / "minimal_ray_train.py"), str(STEPS), str(first)], folder, first)
    found["steps"] = int(found["output"].rsplit("steps=", 1)[1].split()[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--log-model", action="store_true", help="with the export of the MLflow model at the end")
    options = parser.parse_args()
    kinds = {"raytrainer": lambda folder: ours(folder, options.log_model), "minimal": minimal}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for number in range(options.runs + 1):
        for name, run in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                one = run(Path(folder))
            assert one["steps"] == STEPS, one
            print(
                f"{name}: first step {one['first_step']:.2f} s, exit {one['exit']:.2f} s, {one['lines']} lines",
                flush=True,
            )
            if number:  # the first pair warms the page cache
                found[name].append(one)
    ratios = {
        what: [a[what] / b[what] for a, b in zip(found["raytrainer"], found["minimal"], strict=True)]
        for what in ("exit", "first_step")
    }
    report.write(
        "launch_with_model" if options.log_model else "launch",
        {
            "what": f"2 workers, {STEPS} steps, cold: seconds from the shell, and ratios raytrainer/minimal pair by pair",
            **{
                name: {what: report.spread([r[what] for r in runs]) for what in ("first_step", "exit", "lines")}
                for name, runs in found.items()
            },
            # Seconds since the process began, at each mark of the launch.
            "breakdown": {
                mark: report.spread([r["marks"][mark] for r in found["raytrainer"]])
                for mark in found["raytrainer"][0]["marks"]
            },
            "ratio": {what: report.spread(values) for what, values in ratios.items()},
            "goal": {"exit": 0.85},
            "holds": statistics.median(ratios["exit"]) <= 0.85,
        },
    )


if __name__ == "__main__":
    main()
