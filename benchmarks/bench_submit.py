"""Time from the command to the job's first log line: `python -m raytrainer cluster=job` against `ray job submit`.

Both use the same launching directory and one cluster that requires a token. Each submission is a new job that is
followed and succeeds. raytrainer also asks the cluster, the storage and MLflow whether the run is possible, and its job
trains. The two alternate: A B A B … Then the benchmark measures `list` and `status`, which also ask that cluster, and
checks whether they import torch.

    python -m benchmarks.bench_submit --runs 5
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from tests.outside.head import Head

ROOT = Path(__file__).resolve().parents[1]
GOAL, VERB_GOAL_S = 1.5, 2.0
SCRIPT = 'print("the first line", flush=True)\n'


def first_line(command: Sequence[str], folder: Path, env: dict[str, str], pattern: str) -> tuple[float, float]:
    """Run a command that follows a job, and return the seconds until a line matches `pattern` and until its end."""
    began, seen, lines = time.monotonic(), None, []
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if seen is None and re.match(pattern, line):
                seen = time.monotonic() - began
    if process.returncode or seen is None:
        raise SystemExit(f"{command} failed, or printed no such line:\n{''.join(lines)}")
    return seen, time.monotonic() - began


def ours(name: str, head: Head, folder: Path, env: dict[str, str]) -> tuple[float, float]:
    command = [sys.executable, "-m", "raytrainer", "experiment=smoke", f"name={name}", "trainer.max_steps=2"]
    command += ["cluster=job", f"cluster.address={head.address}"]
    return first_line(command, folder, env, rf"raytrainer: job {name} on ")


def bare(name: str, head: Head, folder: Path, env: dict[str, str]) -> tuple[float, float]:
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", f"--address={head.address}", f"--submission-id={name}", f"--working-dir={folder}"]
    return first_line([*command, "--", "python", "-u", "script.py"], folder, env, "the first line")


def verb(words: Sequence[str], folder: Path, env: dict[str, str]) -> tuple[float, list[str]]:
    """Return the seconds of a command and, from a second call, which of torch, ray and mlflow it imports."""
    command = [sys.executable, "-m", "raytrainer", *words]
    began = time.monotonic()
    subprocess.run(command, cwd=folder, env=env, capture_output=True, check=True, timeout=60)
    seconds = time.monotonic() - began
    told = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], cwd=folder, env=env, capture_output=True, check=True, timeout=60
    )
    imported = {line.rpartition("|")[2].strip() for line in told.stderr.decode().splitlines()}
    assert "raytrainer.cli" in imported, "importtime says nothing"
    return seconds, sorted({"torch", "ray", "mlflow"} & imported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "project")
        (folder / "mine").mkdir(parents=True)
        (folder / "script.py").write_text(SCRIPT)
        for number in range(20):
            (folder / "mine" / f"module_{number}.py").write_text(f'"""Module {number}."""\n' * 100)
        (folder / ".rayignore").write_text("/runs/\n/mlartifacts/\n/mlflow.db*\n")  # Ray then sends the same files
        head = Head(Path(place, "head"), token="a-token-of-the-benchmark", cpus=2)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
        env |= {"PYTHONPATH": str(ROOT), "HOME": place, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
        seconds: dict[str, list[float]] = {"raytrainer": [], "ray job submit": []}
        ends: dict[str, list[float]] = {"raytrainer": [], "ray job submit": []}
        verbs: dict[str, list[float]] = {"list": [], "status": []}
        imports: dict[str, list[str]] = {}
        try:
            head.start()
            for number in range(options.runs + 1):
                for who, submit in (("raytrainer", ours), ("ray job submit", bare)):
                    name = f"{who.split()[0]}-{number}"
                    seen, ended = submit(name, head, folder, env)
                    print(f"{who}: first line {seen:.2f} s, end {ended:.2f} s", flush=True)
                    if number:  # the first pair uploads the packages
                        seconds[who].append(seen)
                        ends[who].append(ended)
            jobs = {row["submission_id"]: row["status"] for row in head.table("jobs")}
            assert len(jobs) == 2 * (options.runs + 1), jobs
            assert set(jobs.values()) == {"SUCCEEDED"}, jobs
            for _ in range(options.runs):
                for words in (["list"], ["status", f"raytrainer-{options.runs}"]):
                    took, imports[words[0]] = verb(words, folder, env)
                    verbs[words[0]].append(took)
        finally:
            head.stop()
    ratio = [a / b for a, b in zip(seconds["raytrainer"], seconds["ray job submit"], strict=True)]
    report.write(
        "submit",
        {
            "what": "seconds from the command to the job's first log line, and to its end; ratios pair by pair",
            "first_line": {who: report.spread(values) for who, values in seconds.items()},
            "end": {who: report.spread(values) for who, values in ends.items()},
            "ratio": report.spread(ratio),
            "verbs": {name: report.spread(values) for name, values in verbs.items()},
            "imported": imports,
            "goal": {"ratio": GOAL, "verbs": VERB_GOAL_S},
            "holds": statistics.median(ratio) <= GOAL
            and all(statistics.median(values) < VERB_GOAL_S for values in verbs.values())
            and not any("torch" in names for names in imports.values()),
        },
    )


if __name__ == "__main__":
    main()
