"""Cost of a trial of a sweep: the real command, including MLflow, against the ways in which people run sweeps.

64 trials of a 10-epoch MLP on digits, random search with successive halving, 2 at a time, with the same hyperparameters
for all ways. At each evaluation that raytrainer and a peer both reach, loss and accuracy must be equal bit for bit. The
ways alternate: A B C … A B C … Then many trials of one step show whether the thousandth trial costs as much as the
hundredth, and whether the driver's memory grows.

    python -m benchmarks.bench_sweep --rounds 5 --trials 1000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Trial, TrialJournal

ROOT = Path(__file__).resolve().parents[1]
SPACE = ["optimizer.lr=tag(log,interval(1e-4,1e-1))", "model.width=64,128"]
# For each peer: how many of the 64 trials it runs (slow peers take minutes), and raytrainer's largest relative cost.
PEERS: Mapping[str, tuple[int, float | None]] = {
    "nested": (4, 0.03),
    "fresh": (12, 0.12),
    "reused": (64, 1.5),
    "bare": (64, 1.5),
    "optuna": (64, None),
}
WHAT = {
    "raytrainer": "python -m raytrainer -m … sweep=asha, everything on",
    "nested": "TorchTrainer in a Tune function with TuneReportCallback, as documented",
    "fresh": "a Tune function, Tune's defaults",
    "reused": "the same with reuse_actors, and the files that Tune writes of each trial",
    "bare": "the same without those files",
    "optuna": "one process with Optuna and its pruner, one trial at a time",
}
BLOCK = 20  # trials between two readings of the clock


def command(arguments: Sequence[str], folder: Path, rss: list[tuple[float, float]] | None = None) -> float:
    """Run `python -m …` in `folder`, and return the seconds to its exit. `rss` receives the process's MiB over time."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("MLFLOW_TRACKING_URI", None)
    began = time.time()
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        done = threading.Event()
        if rss is not None:
            threading.Thread(target=watch, args=(process.pid, rss, done), daemon=True).start()
        try:
            code = process.wait(timeout=1800)
        finally:
            done.set()
            process.kill()
        if code:
            output.seek(0)
            raise SystemExit(f"{arguments} failed:\n{output.read()}")
    return time.time() - began


def watch(pid: int, rss: list[tuple[float, float]], done: threading.Event) -> None:
    while not done.wait(0.2):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        rss.append((time.time(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))


def ours(
    arguments: Sequence[str], folder: Path, rss: list[tuple[float, float]] | None = None
) -> tuple[float, list[Trial]]:
    """Return the seconds of the whole command, and the trials from its journal."""
    seconds = command(["raytrainer", "-m", *arguments, "sweep.max_concurrent_trials=2", "name=bench"], folder, rss)
    return seconds, list(TrialJournal.open(Storage(str(folder / "runs/bench"))).trials.values())


def by_raytrainer(folder: Path, count: int) -> dict[str, Any]:
    seconds, trials = ours(["experiment=mlp", *SPACE, "sweep=asha", f"sweep.num_samples={count}"], folder)
    assert len(trials) == count
    assert all(trial.status in ("finished", "pruned") for trial in trials)
    return {
        "trials": [{"lr": t.parameters["optimizer.lr"], "width": t.parameters["model.width"]} for t in trials],
        "trials_s": max(t.ended or 0.0 for t in trials) - min(t.started for t in trials),
        "reports": [[{k: r.metrics[k] for k in ("val/loss", "val/accuracy")} for r in t.reports] for t in trials],
        "command_s": seconds,
    }


def by_peer(kind: str, folder: Path, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    (folder / "trials.json").write_text(json.dumps(trials))
    seconds = command(["benchmarks.sweep_peers", kind, "trials.json", "result.json"], folder)
    return {**json.loads((folder / "result.json").read_text()), "command_s": seconds}


def equal(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[int, int]:
    """Check that common evaluations are equal, and return their number and how many trials both have finished."""
    evaluations = finished = 0
    for a, b in zip(ours, theirs, strict=False):
        common = min(len(a), len(b))
        assert common
        assert a[:common] == b[:common], (a, b)
        evaluations += common
        finished += common == 10
    return evaluations, finished


def against_peers(rounds: int, count: int, peers: Sequence[str]) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("raytrainer", *peers)}
    same = {name: {"evaluations": 0, "finished_trials": 0} for name in peers}
    trials: list[Any] = []
    for number in range(rounds + 1):
        # The first round warms the page cache, with few trials.
        size = count if number else 4
        for name, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                if name == "raytrainer":
                    one = by_raytrainer(Path(folder), size)
                    assert number < 2 or one["trials"] == trials
                    trials = one["trials"]
                    reference = one["reports"]
                else:
                    one = by_peer(name, Path(folder), trials[: min(size, PEERS[name][0])])
                    evaluations, finished = equal(reference, one["reports"])
                    same[name]["evaluations"] += evaluations
                    same[name]["finished_trials"] += finished
            one["each"] = one["trials_s"] / len(one["reports"])
            one["epochs"] = sum(map(len, one["reports"]))
            print(
                f"{name}: {one['each']:.3f} s a trial, {len(one['reports'])} trials, {one['epochs']} epochs,"
                f" command {one['command_s']:.1f} s",
                flush=True,
            )
            if number:
                runs.append(one)
    ratios = {
        name: [a["each"] / b["each"] for a, b in zip(found["raytrainer"], found[name], strict=True)] for name in peers
    }
    goals = {name: PEERS[name][1] for name in peers if PEERS[name][1] is not None}
    return {
        "ways": {
            name: {
                "what": WHAT[name],
                "trials": len(runs[0]["reports"]),
                "seconds_a_trial": report.spread([one["each"] for one in runs]),
                "seconds_of_the_command": report.spread([one["command_s"] for one in runs]),
                "seconds_of_tuner_fit": report.spread([one["fit_s"] for one in runs]) if "fit_s" in runs[0] else None,
                "epochs_trained": report.spread([one["epochs"] for one in runs]),
            }
            for name, runs in found.items()
        },
        "equal_bit_for_bit": same,
        "ratio": {name: report.spread(values) for name, values in ratios.items()},
        "goal": goals,
        "holds": {name: statistics.median(ratios[name]) <= goal for name, goal in goals.items() if goal is not None},
    }


def many(count: int) -> dict[str, Any]:
    """Measure trials of one step of a linear model: seconds a trial and driver memory, at the 100th and the last."""
    tiny = ["model.depth=0", "trainer.max_steps=1", "trainer.max_epochs=null", "sweep=random"]
    rss: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["experiment=mlp", SPACE[0], *tiny, f"sweep.num_samples={count}"]
        seconds, trials = ours(arguments, Path(folder), rss)
    assert [trial.status for trial in trials] == ["finished"] * count
    ends = sorted(trial.ended or 0.0 for trial in trials)

    def each(first: int, last: int) -> dict[str, float]:
        places = range(first, last - BLOCK + 1, BLOCK)
        return report.spread([(ends[place + BLOCK - 1] - ends[place - 1]) / BLOCK for place in places])

    def memory(place: int) -> float:
        return max(mib for at, mib in rss if at <= ends[place])

    early, late = each(50, 150), each(count - 100, count)
    grown = memory(count - 1) - memory(99)
    return {
        "what": f"{count} trials of one step of a linear model, everything on; medians over {BLOCK} trials each",
        "seconds_of_the_command": seconds,
        "seconds_a_trial": {"50th to 150th": early, f"{count - 100}th to {count}th": late},
        "ratio": late["median"] / early["median"],
        "driver_MiB": {str(place): round(memory(place - 1), 1) for place in (1, 100, *range(250, count + 1, 250))},
        "driver_grows_KiB_a_trial": 1024 * grown / (count - 100),
        "goal": {"ratio": 1.2, "driver_grows_KiB_a_trial": 16},
        "holds": late["median"] / early["median"] <= 1.2 and 1024 * grown / (count - 100) <= 16,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="0: only the many trials")
    parser.add_argument("--samples", type=int, default=64, help="trials of each sweep")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--trials", type=int, default=1000, help="trials that do nothing, at least 250; 0: none")
    options = parser.parse_args()
    peers = options.peers
    if "optuna" in peers and subprocess.run([sys.executable, "-c", "import optuna"], capture_output=True).returncode:
        print("optuna is not installed: pip install optuna; its sweep is skipped")
        peers = [name for name in peers if name != "optuna"]
    figures: dict[str, Any] = {"what": "seconds from the first trial's draw to the last one's end, by trials"}
    if options.rounds:
        figures |= against_peers(options.rounds, options.samples, peers)
    if options.trials:
        figures["many"] = many(options.trials)
    report.write("sweep", figures)


if __name__ == "__main__":
    main()
