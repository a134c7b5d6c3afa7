"""Record what today's code writes: runs, sweeps and submissions, as small files in `tests/recorded/vN`. Restore them for a
test. `tests/test_recorded.py` proves that later code reads them.

    python -m tests.recorded.record v2        writes tests/recorded/v2, which must not exist

Record again when a file format has changed on purpose, under the next version. Earlier recordings stay, because users have
such files. A recording contains no path, host or user of the machine that made it:

    /RECORDED         the directory in which the commands were typed; `restore` replaces it
    recorded-host     the machine
    somebody          the user

Each `NAME.json` beside a recorded directory has the run's entries in MLflow, whose database is not recorded, and what the
code that recorded it said about the run.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PLACE, HOST, USER = "/RECORDED", "recorded-host", "somebody"
STORE = f"sqlite:///{PLACE}/mlflow.db"
# Nothing reads the pictures and Ray's own log. They would be most of the bytes.
LEFT_OUT = ("*.png", "ray.log", "*.lock", ".validate_storage_marker")
# Keys of `status --json` that are texts for the user. If the driver was killed, the end and all that is known of it depend on
# when somebody looks.
TEXTS = frozenset({"next", "waits"})
AFTER_A_KILL = frozenset({"ended", "seconds", "cause", "trials", "best", "best_step", "best_trial"})
_TEXT = (".json", ".jsonl", ".yaml", ".log", ".csv", ".txt")
_IP = re.compile(r"\b(?!127\.)\d{1,3}(?:\.\d{1,3}){3}\b")
_AGE_S = 3600.0  # restored files are so old that no driver can be alive


# --- restore ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """A recording in a directory of its own.

    Attributes:
        name: The name of the run, the sweep or the request.
        path: Its directory.
        about: The content of `NAME.json`, with the paths and the MLflow run ids of this restoration.
    """

    name: str
    path: Path
    about: Mapping[str, Any]

    @property
    def expected(self) -> Mapping[str, Any]:
        """What the code that recorded it said about it."""
        return self.about["expected"]  # type: ignore[no-any-return]


def versions() -> list[str]:
    """Return the versions of which there are recordings."""
    return sorted(path.name for path in HERE.glob("v*") if path.is_dir())


def restore(version: str, name: str, folder: Path, below: str = "runs") -> Restored:
    """Copy a recording to `folder/BELOW/NAME`, with the paths of `folder`, and create its runs in `folder/mlflow.db`.

    The database must exist if the recording has MLflow runs. They get new ids, which replace the recorded ones in all texts.
    """
    source = HERE / version / name
    about_text = source.with_suffix(".json").read_text()
    ids = _create_runs(json.loads(about_text.replace(PLACE, str(folder)))["mlflow"], folder)

    def now(text: str) -> str:
        text = text.replace(PLACE, str(folder))
        for old, new in ids.items():
            text = text.replace(old, new)
        return text

    target = folder / below / name
    shutil.copytree(source, target)
    when = time.time() - _AGE_S
    for path in [*target.rglob("*"), target]:
        if _is_text(path.relative_to(target)):
            path.write_text(now(path.read_text()))
        os.utime(path, (when, when))
    return Restored(name, target, json.loads(now(about_text)))


def _is_text(path: Path) -> bool:
    """Return whether a file may contain paths. The files of a checkpoint do not, and have checksums."""
    return path.suffix in _TEXT and not any(part.startswith("step-") for part in path.parts)


def _create_runs(runs: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Create the recorded MLflow runs. Return the new id of each recorded one. Parents come before their children."""
    if not runs:
        return {}
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    ids: dict[str, str] = {}
    for run in runs:
        experiment = client.get_experiment_by_name(run["experiment"])
        experiment_id = (
            client.create_experiment(run["experiment"], str(folder / "mlartifacts"))
            if experiment is None
            else experiment.experiment_id
        )
        tags = {key: ids.get(value, value) for key, value in run["tags"].items()}
        made = client.create_run(experiment_id, run["start"], tags, run["name"]).info.run_id
        rows = [Metric(key, value, when, step) for key, many in run["metrics"].items() for when, step, value in many]
        client.log_batch(made, metrics=rows, params=[Param(key, value) for key, value in run["params"].items()])
        if run["status"] != "RUNNING":
            client.set_terminated(made, run["status"], run["end"])
        ids[run["run_id"]] = made
    return ids


def command(*arguments: str) -> tuple[int, str]:
    """Run `python -m raytrainer ARGUMENTS` in this process. Return its exit code and what it printed to stdout."""
    from raytrainer import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(arguments)
    return code, out.getvalue()


def answer(*arguments: str) -> Any:
    """Return what a command answers with `--json`."""
    code, out = command(*arguments, "--json")
    assert code == 0, (arguments, code, out)
    return json.loads(out)


def stable(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an answer of `status` or `list` that is the same for the same files."""
    left_out = TEXTS | (AFTER_A_KILL if status["status"] == "FAILED" else frozenset())
    return {key: value for key, value in status.items() if key not in left_out}


def trials_of(sweep: Path) -> dict[str, Any]:
    """Return the trials in a sweep's journal, as plain JSON."""
    from raytrainer.storage import Storage
    from raytrainer.sweep import TrialJournal

    found = {trial.id: asdict(trial) for trial in TrialJournal.open(Storage(sweep)).trials.values()}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def weights_of(folder: Path) -> dict[str, str]:
    """Return a digest of the model's weights in each checkpoint of a run, or of all trials of a sweep: path → digest."""
    import safetensors.torch

    from benchmarks import compare_weights
    from raytrainer.checkpoint import Checkpointer
    from raytrainer.storage import Storage

    found = {}
    for place in sorted(folder.glob("**/checkpoints")):
        checkpointer = Checkpointer(Storage(place))
        for info in checkpointer.list():
            shared, _ = checkpointer.load(info)
            weights = safetensors.torch.save(dict(shared.get("ema") or shared["model"]))
            name = f"{place.relative_to(folder)}/step-{info.step:09d}"
            found[name] = compare_weights.digest(compare_weights.read(weights))
    return found


# --- record -----------------------------------------------------------------------------------------------------------

_SMALL = ("experiment=smoke", "model.width=4", "model.depth=1")
_LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"


def finished(root: Path) -> None:
    """A run that finished: on Ray with two workers, with averaged weights."""
    options = ["scaling.num_workers=2", "trainer.ema_decay=0.9", "checkpoint.num_to_keep=1"]
    _launch(root, *_SMALL, "name=finished", *options).wait().exits(0)


def stopped(root: Path) -> None:
    """A run that SIGTERM stopped (KILLED), while MLflow could not be reached: its spool has everything."""
    from tests.outside.ports import free_port

    nowhere = f"http://127.0.0.1:{free_port()}"
    options = ["model.dropout=0.2", "lr_scheduler.warmup_steps=50", "trainer.max_steps=1000000", "cluster=inline"]
    every = ["trainer.log_every_n_steps=50", "trainer.eval_every_n_steps=100", "checkpoint.num_to_keep=1"]
    server = [f"tracking.tracking_uri={nowhere}", "tracking.required=false"]
    run = _launch(root, *_SMALL, "name=stopped", *options, *every, *server)
    run.until("two evaluations", lambda: [*root.glob("runs/stopped/checkpoints/step-*200/manifest.json")])
    run.signal(SIGTERM)
    run.wait().exits(143)
    _replace(root / "runs/stopped", nowhere, f"sqlite:///{root}/mlflow.db")


def sweep(root: Path) -> None:
    """A sweep that finished: population based training, in which trials continue from copies of others."""
    options = ["sweep.num_samples=3", "sweep.num_to_keep=1", "sweep.scheduler.perturbation_interval=1"]
    every = ["trainer.eval_every_n_steps=10", "trainer.log_every_n_steps=10", "checkpoint.num_to_keep=1"]
    _launch(root, "-m", *_SMALL, "name=sweep", "sweep=pbt", _LR, *options, *every).wait().exits(0)


def interrupted(root: Path) -> None:
    """A sweep whose driver was killed. Of five trials one failed, one finished, one was pruned, one was running."""
    from tests.launches import trials

    scheduler = (
        "+sweep.scheduler={_target_:ray.tune.schedulers.ASHAScheduler,grace_period:1,reduction_factor:2,max_t:null}"
    )
    options = ["sweep=grid", scheduler, "sweep.max_concurrent_trials=1", "sweep.num_to_keep=1"]
    every = ["trainer.max_steps=200", "trainer.eval_every_n_steps=40", "trainer.log_every_n_steps=40"]
    keep = ["checkpoint.num_to_keep=1", "checkpoint.min_interval_s=0"]
    rates = "optimizer.lr=1e30,0.001,0.0001,0.01,0.02"
    run = _launch(root, "-m", *_SMALL, "name=interrupted", rates, *options, *every, *keep)

    def is_in_the_middle() -> bool:
        found = trials(root, "interrupted")
        return "0004" in found and len(found["0004"].reports) >= 2

    run.until("the fourth trial", is_in_the_middle)
    run.kill()
    run.nothing_left(60)
    # The driver deletes the checkpoints of a pruned trial while its process may write one more, and then deletes again.
    shutil.rmtree(root / "runs/interrupted/trials/0003/checkpoints", ignore_errors=True)
    statuses = [trial.status for trial in trials(root, "interrupted").values()]
    assert statuses == ["failed", "finished", "pruned", "running"], f"record it again: the trials are {statuses}"


def submitted(root: Path) -> None:
    """The record of a run that was sent to a cluster, and its request as the job's driver reads it."""
    _submit(root, "submitted", "")


def submitted_sweep(root: Path) -> None:
    """The same for a sweep."""
    _submit(root, "submitted-sweep", "grid", "sweep=grid", "optimizer.lr=0.1,0.01")


RECORDINGS: Mapping[str, Callable[[Path], None]] = {
    "finished": finished,
    "stopped": stopped,
    "sweep": sweep,
    "interrupted": interrupted,
    "submitted": submitted,
    "submitted-sweep": submitted_sweep,
}


def record(version: str) -> None:
    """Write `tests/recorded/VERSION`."""
    target = HERE / version
    if target.exists():
        raise SystemExit(f"{target} exists. Recordings are kept, because users have such files: give the next version.")
    partial = Path(tempfile.mkdtemp(prefix=f"{version}-", dir=HERE))
    try:
        for name, make in RECORDINGS.items():
            print(f"{name}: {(make.__doc__ or '').splitlines()[0]}", flush=True)
            with tempfile.TemporaryDirectory(prefix="recording-") as folder, _in_repository(Path(folder)) as root:
                make(root)
                _keep(root, name, partial)
            partial.joinpath(f"{name}.json").write_text(_as_lines(_expected(partial, name)))
        _check(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _launch(root: Path, *arguments: str) -> Any:
    from tests.launches import Launch

    return Launch(root, *arguments, fresh=True)


@contextlib.contextmanager
def _in_repository(root: Path) -> Iterator[Path]:
    """Make `root` a git repository with a commit and a change, and the current directory."""
    root = root.resolve()
    (root / "notes.txt").write_text("one\n")
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "notes.txt"], [*identity, "commit", "-q", "-m", "notes"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    (root / "notes.txt").write_text("one\ntwo\n")
    (root / ".git/info/exclude").write_text("*\n")
    with contextlib.chdir(root):
        yield root


def _submit(root: Path, name: str, choice: str, *overrides: str) -> None:
    """Submit to a cluster in memory. Keep the submission record and the files of the request."""
    from unittest import mock

    from raytrainer.backends import ray_jobs
    from raytrainer.config import compose, group_names
    from raytrainer.sweep import make_plan
    from tests.cluster.test_submit import ADDRESS, Cluster

    (root / "shared").mkdir()
    argv = [
        *(*_SMALL, f"name={name}", *overrides, "cluster=job", f"cluster.address={ADDRESS}", "cluster.wait=false"),
        *(f"cluster.shared_paths=[{root}/shared]", f"storage_path={root}/shared/runs"),
        f"tracking.tracking_uri=sqlite:///{root}/shared/mlflow.db",
    ]
    target = make_plan(argv, choice=choice, space={}, groups=group_names()) if choice else compose(argv)
    cluster = Cluster()
    with mock.patch.object(ray_jobs, "_client", return_value=cluster):
        target.experiment.backend.submit(target, argv, say=lambda text: print(f"  {text}"), out=io.StringIO())
    (request,) = cluster.requests
    folder = root / "runs" / name
    shutil.copytree(root / "runs/.submitted" / name, folder / "record")
    (folder / "request").mkdir()
    for file, content in request.files.items():
        (folder / "request" / file).write_bytes(content)


def _keep(root: Path, name: str, target: Path) -> None:
    """Copy a run directory without what belongs to this machine, and dump its MLflow runs."""
    shutil.copytree(root / "runs" / name, target / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in [path for path in (target / name).rglob("*") if _is_text(path.relative_to(target / name))]:
        path.write_text(_clean(path.read_text(), root))
    for path in (target / name).glob("lock/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "recorded boot pid:[1]"}, indent=1))
    (target / f"{name}.json").write_text(_clean(json.dumps({"mlflow": _dump_runs(root)}), root))


def _clean(text: str, root: Path) -> str:
    """Replace paths, addresses, and names of host and user."""
    for path, placeholder in ((root, PLACE), (REPOSITORY, "/raytrainer"), (sys.prefix, "/python")):
        text = text.replace(str(path), placeholder)
    host = re.escape(platform.node())
    return _IP.sub("203.0.113.1", re.sub(rf"(?<![\w.-]){host}(?![\w.-])", HOST, text))


def _replace(folder: Path, old: str, new: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and _is_text(path.relative_to(folder)):
            path.write_text(path.read_text().replace(old, new))


def _dump_runs(root: Path) -> list[dict[str, Any]]:
    """Return all runs of `root/mlflow.db`, parents first."""
    if not (root / "mlflow.db").exists():
        return []
    from mlflow import MlflowClient

    client, found = MlflowClient(f"sqlite:///{root}/mlflow.db"), []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            rows = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
            found.append(
                {
                    "run_id": run.info.run_id,
                    "experiment": experiment.name,
                    "name": run.info.run_name,
                    "status": run.info.status,
                    "start": run.info.start_time,
                    "end": run.info.end_time,
                    "tags": run.data.tags,
                    "params": run.data.params,
                    "metrics": {key: [[m.timestamp, m.step, m.value] for m in many] for key, many in rows.items()},
                }
            )
    return sorted(found, key=lambda run: ("mlflow.parentRunId" in run["tags"], run["name"]))


def _expected(source: Path, name: str) -> dict[str, Any]:
    """Return the content of `NAME.json`: what this code says about the recording, after it is restored."""
    from tests.launches import empty_store

    about = json.loads((source / f"{name}.json").read_text())
    if name.startswith("submitted"):
        return {**about, "expected": {}}
    with tempfile.TemporaryDirectory(prefix="restored-") as folder, contextlib.chdir(folder):
        root = Path(folder).resolve()
        Path("mlflow.db").write_bytes(empty_store())
        restored = restore(source.name, name, root)
        ids = dict(zip(_ids(restored.about), _ids(about), strict=True))
        (listed,) = answer("list")
        expected = {
            "list": stable(listed),
            "status": stable(answer("status", name)),
            "logs": command("logs", name)[1],
            "weights": weights_of(restored.path),
        }
        if (restored.path / "ledger.jsonl").exists():
            expected["trials"] = trials_of(restored.path)
        if name == "stopped":
            expected["resumed"] = answer("resume", name, more_steps(restored))["result"]
        text = json.dumps(expected)
        for new, old in ids.items():
            text = text.replace(new, old)
        return {**about, "expected": json.loads(_clean(text, root))}


def more_steps(stopped: Restored) -> str:
    """Return the override with which the stopped run continues for 50 steps."""
    done = json.loads((stopped.path / "run.json").read_text())["step"]
    return f"trainer.max_steps={done + 50}"


def _as_lines(about: Mapping[str, Any]) -> str:
    """Return `NAME.json` with a line for each MLflow run and for each expected answer."""
    runs = ",\n".join(json.dumps(run) for run in about["mlflow"])
    answers = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about["expected"].items())
    return f'{{"mlflow": [\n{runs}\n], "expected": {{\n{answers}\n}}}}\n'


def _ids(about: Mapping[str, Any]) -> list[str]:
    return [run["run_id"] for run in about["mlflow"]]


def _check(folder: Path) -> None:
    """Check that nothing of this machine is in the files, and print how large they are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    places = (str(REPOSITORY), sys.prefix, str(Path.home()), tempfile.gettempdir() + "/")
    foreign = [re.escape(place) for place in places] + [rf"(?<![\w.-]){re.escape(platform.node())}(?![\w.-])"]
    for path in files:
        if found := re.search("|".join(foreign).encode(), path.read_bytes()):
            raise SystemExit(f"{path} contains {found[0].decode()!r}, which belongs to this machine.")
    print(f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.recorded.record", description=__doc__.partition("\n\n")[0])
    parser.add_argument("version", help="the next version, for instance v2")
    version = parser.parse_args().version
    for variable in ("LOGNAME", "USER"):
        os.environ[variable] = USER
    assert getpass.getuser() == USER
    for variable in [name for name in os.environ if name.startswith(("MLFLOW_", "RAY_", "AWS_"))]:
        del os.environ[variable]
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    record(version)


if __name__ == "__main__":
    main()
