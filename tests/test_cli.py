"""The command line: verbs, Hydra's own options and exit codes. A wrong command starts nothing.

Few tests launch whole runs: a sweep inline with its resume, and one batch of debug.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import raytrainer
from raytrainer import attempt, cli
from raytrainer.config import Composition
from raytrainer.errors import ConfigError, Stopped, StorageError, WorkerError
from raytrainer.preflight import FirstBatch, Verdict
from tests import forkserver
from tests.promises import Within

pytestmark = pytest.mark.usefixtures("in_tmp")


EXPERIMENTS = sorted(
    file.stem for file in (Path(__file__).resolve().parents[1] / "configs" / "experiment").glob("*.yaml")
)


class Output(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Output]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in this process."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "argv", ["/somewhere/raytrainer/__main__.py"])
    # The first-batch probe is a process that takes seconds: tests/test_first_batch.py tests it.
    passed = Verdict("passed", "loss 1.0")
    monkeypatch.setattr(FirstBatch, "run", lambda self: passed)

    def call(*arguments: str) -> Output:
        code = cli.main(arguments)
        assert "HYDRA_FULL_ERROR" not in os.environ
        return Output(code, *capsys.readouterr())

    return call


def process(*arguments: str, timeout_s: float = 120, module: bool = True) -> Output:
    program = [sys.executable, "-m", "raytrainer"] if module else [str(Path(sys.executable).with_name("raytrainer"))]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)
    return Output(done.returncode, done.stdout, done.stderr)


def forked(*arguments: str, timeout_s: float = 120) -> Output:
    """Run a command line in a forked process, which needs no imports. Its output files are not in the current directory."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        program = ("-m", "raytrainer")
        code = forkserver.server().start(program, arguments, Path.cwd(), out, err, os.environ).wait(timeout_s)
        return Output(code, out.read_text(), err.read_text())


def refused(output: Output) -> str:
    """Return the only line of a refusal."""
    assert output.code == 2
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("raytrainer: refused: ")
    return lines[0].removeprefix("raytrainer: refused: ")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("chek experiment=mlp", "'chek' is not a command; did you mean check?"),
        ("resum x", "'resum' is not a command; did you mean resume?"),
        ("frobnicate", "'frobnicate' is not a command; there are check, list, status, logs, stop, resume, rerun"),
        ("resume", "which run? resume takes ID, key=value, --json"),
        ("resume trainer.max_epochs=3", "which run? resume takes ID"),
        ("resume x --cfg job", "--cfg has no meaning here; resume takes ID, key=value, --json"),
        ("rerun", "which run? rerun takes ID, key=value, --json, --here"),
        ("status", "which run? status takes ID, --json"),
        ("stop x y", "y has no meaning here; stop takes ID, --json, --force, --timeout"),
        ("list --stats FAILED", "--stats has no meaning here (did you mean --status?); list takes --json, -a, --all"),
        ("list --status RUNING", "--status=RUNING is not a status; valid: RUNNING"),
        ("list --limit few", "argument -n/--limit: 'few' is not a whole number; list takes"),
        ("logs x --rank=-1", "argument -r/--rank: '-1' is not a whole number; logs takes"),
        ("stop x --timeout soon", "argument --timeout: 'soon' is not a number of seconds; stop takes"),
        ("status ../x", "'../x' is neither a run's name nor an MLflow run id"),
        ("resume x", "x: no run of this name, MLflow id or submission id in "),
        ("rerun ../x", "'../x' is neither a run's name nor an MLflow run id"),
        ("experiment=mlp check", "'check' is not key=value; a command comes first"),
        ("experiment=mlp trainer.max_epoch=3", "trainer.max_epoch=3 is not a key; valid: trainer.max_epochs"),
        ("experiment=resnt", "experiment=resnt is not a valid choice; valid: resnet"),
        ("check experiment=mlp optimizer.lr=fast", "optimizer.lr=fast must be a number"),
        (
            "check experiment=mlp +model.widht=3",
            "model.widht=3 is not an argument of raytrainer.models.MLP; valid: width",
        ),
        ("check experiment=mlp optimizer.lr=${x.y}", "optimizer.lr cannot be resolved: there is no key x.y"),
        (
            "check experiment=mlp optimizer.lr=${oc.env:NOT_SET_AT_ALL}",
            "optimizer.lr cannot be resolved: the environment",
        ),
        (
            "check experiment=mlp scaling.num_workers=128",
            "scaling.num_workers=128 × 1 CPU = 128 CPUs, and this machine",
        ),
        ("check experiment=mlp storage_path=/proc/runs", "storage_path=/proc/runs cannot be used: "),
        (
            "check experiment=mlp storage_path=ftp://x",
            "storage_path=ftp://x cannot be used: ftp:// is not a known scheme",
        ),
        ("check experiment=mlp init_from=nope", "init_from=nope cannot be used: no weights file, run, checkpoint"),
        (
            "check experiment=mlp tracking.tracking_uri=sqlite:////proc/x.db",
            "the tracking database /proc/x.db cannot be",
        ),
        ("--cfg", "argument --cfg/-c: expected one argument; "),
        ("--cfg foo", "argument --cfg/-c: invalid choice: 'foo'"),
        ("--nope", "unrecognized arguments: --nope"),
        ("--resolve", "The --resolve flag can only be used"),
        ("--config-dir=/not/there experiment=mlp", "--config-dir=/not/there is not a directory"),
        ("--config-name=nope", "--config-name=nope is not a config on the search path"),
        ("--cfg job trainer.max_epochs=abc", "trainer.max_epochs=abc must be a whole number"),
        ("--cfg job +trainer.max_epoch=3", "trainer.max_epoch=3 is not a key"),
        ("-m experiment=mlp,nope", "experiment=nope is not a valid choice"),
        ("-m experiment=mlp optimizer.lr=0.1,fast", "optimizer.lr=fast must be a number"),
        ("-m experiment=mlp seed=1,2 name=same", "name=same would be the name of every job; leave it out"),
        ("-m experiment=mlp optimizer.lr=interval(0,1)", "optimizer.lr=interval(0,1) has no list of values"),
        ("--multirun experiment=mlp trainer.max_epoch=1,2", "trainer.max_epoch=1 is not a key"),
        ("hydra/launcher=nope experiment=mlp", "hydra/launcher=nope is not a valid choice"),
    ],
)
def test_one_line_and_exit_code_2(here: Run, in_tmp: Path, arguments: str, reason: str) -> None:
    assert refused(here(*arguments.split(" "))).startswith(reason)
    assert list(in_tmp.iterdir()) == []  # nothing was started


def test_several_problems_of_preflight_are_one_refusal(here: Run, in_tmp: Path) -> None:
    output = here("check", "experiment=mlp", "scaling.num_workers=128", "storage_path=/proc/runs")
    assert output.code == 2
    assert [line[:30] for line in output.err.splitlines()] == [
        "raytrainer: refused: scaling.n",
        "  storage_path=/proc/runs cann",
    ]


def test_ray_address_with_a_ray_of_ones_own(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:6379")
    reason = refused(here("check", "experiment=mlp"))
    assert reason.startswith("RAY_ADDRESS=10.9.9.9:6379 ")
    assert "cluster=local" in reason
    assert "use cluster=existing" in reason
    assert here("check", "experiment=mlp", "cluster=inline").code == 0


@pytest.mark.slow
def test_an_mlflow_that_does_not_answer_is_refused_in_time(here: Run, in_tmp: Path) -> None:
    """A closed port and a server that never answers are each refused within the promised 15 seconds."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (9, silent.getsockname()[1]):
            within = Within(15.0)
            reason = refused(here("check", "experiment=mlp", f"tracking.tracking_uri=http://127.0.0.1:{port}"))
            within.check()
            assert f"http://127.0.0.1:{port}" in reason
            assert "tracking.required=false" in reason
    uri = "tracking.tracking_uri=http://127.0.0.1:9"
    assert here("check", "experiment=mlp", uri, "tracking.required=false").code == 0


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_refused_in_time() -> None:
    """`ray.init` alone takes seven minutes to report this."""
    output = forked("check", "experiment=mlp", "cluster=existing", "cluster.address=127.0.0.1:9", timeout_s=30)
    assert re.match(r"cluster\.address=127\.0\.0\.1:9 .*nothing answers", refused(output))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"cluster.address=127.0.0.1:{silent.getsockname()[1]}"
        output = forked("check", "experiment=mlp", "cluster=existing", address, timeout_s=45)
    assert output.code == 2
    assert re.search(rf"{re.escape(address)} .*did not answer like a Ray cluster", output.err)


def test_stage_one_imports_no_torch_ray_or_mlflow() -> None:
    program = """
import json, sys
from raytrainer import cli
code = cli.main(sys.argv[1:])
heavy = sorted({"torch", "ray", "mlflow", "pandas", "numpy"} & set(sys.modules))
print("MODULES", json.dumps([code, heavy]))
"""
    for arguments in (
        ["experiment=resnet", "+trainer.max_epoch=3"],
        ["experiment=resnet", "optimizer.lrr=3"],
        ["experiment=resnet", "trainer.max_epochs=abc"],
        ["experiment=nope"],
        ["--cfg", "job", "experiment=resnet"],
        ["--help"],
        ["chek"],
        ["list"],
        ["list", "--help"],
        ["status", "x"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        code, heavy = json.loads(done.stdout.rpartition("MODULES ")[2])
        shows = arguments[0].startswith("--") or arguments[0] == "list"
        assert (code, heavy) == (0 if shows else 2, []), arguments


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (ConfigError("x"), 2, "refused"),
        (StorageError("x"), 1, "failed"),
        (WorkerError("x"), 1, "failed"),
        (Stopped("x", exit_code=143), 143, "stopped"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_exit_codes(
    here: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, what: str | None
) -> None:
    def launch(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(attempt, "launch", launch)
    output = here("experiment=mlp")
    assert output.code == code
    assert (f"raytrainer: {what}: " in output.err) == (what is not None)


def test_a_bug_is_raised(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "launch", lambda *_, **__: 1 / 0)
    for arguments in (["experiment=mlp"], ["-m", "experiment=mlp", "seed=1,2"]):
        with pytest.raises(ZeroDivisionError):
            here(*arguments)


def test_a_stopped_job_ends_its_sweep(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(composition: object, **_: object) -> None:
        launched.append(composition)
        raise Stopped("interrupted", exit_code=130)

    monkeypatch.setattr(attempt, "launch", launch)
    assert here("-m", "experiment=mlp", "seed=1,2,3").code == 130
    assert len(launched) == 1


def test_a_failed_job_does_not_end_its_sweep(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def launch(composition: object, **_: object) -> None:
        seeds.append(composition.experiment.seed)  # type: ignore[attr-defined]
        raise WorkerError("ValueError: x", rank=0)

    monkeypatch.setattr(attempt, "launch", launch)
    output = here("-m", "experiment=mlp", "seed=1,2,3")
    assert output.code == 1
    assert seeds == [1, 2, 3]
    assert output.err.count("raytrainer: failed: rank 0: ValueError: x") == 3


def test_a_grid_of_whole_runs_ends_with_a_table(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's exit code is the worst of the runs'."""

    def launch(composition: Composition, **_: object) -> attempt.Outcome:
        seed = composition.experiment.seed
        record = attempt.Record(f"run-{seed}", f"/runs/run-{seed}")
        if seed == 2:
            return attempt.Outcome("FAILED", 1, record, "here", cause="rank 0: ValueError: x", seconds=7)
        result = {"reason": "finished", "step": 9, "best": (0.5, 8), "monitor": "val/loss"}
        return attempt.Outcome("FINISHED", 0, record, "here", result, seconds=65)

    monkeypatch.setattr(attempt, "launch", launch)
    output = here("-m", "experiment=mlp", "seed=1,2")
    assert output.code == 1
    assert [line.split() for line in output.out.splitlines()[-3:]] == [
        ["run", "outcome", "time", "best"],
        ["run-1", "finished", "1:05", "val/loss", "0.5", "at", "step", "8"],
        ["run-2", "failed", "0:07", "rank", "0:", "ValueError:", "x"],
    ]
    assert "outcome  time" not in here("experiment=mlp").out


# --- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_sweep_without_m_is_refused_with_the_right_command(here: Run, in_tmp: Path) -> None:
    asked = ("experiment=mlp", "optimizer.lr=interval(0.1,1)", "sweep=asha")
    meant = "-m experiment=mlp 'optimizer.lr=interval(0.1,1)' sweep=asha"
    reason = refused(here(*asked))
    assert reason.startswith("sweep needs -m (multirun). Run: ")
    assert reason.endswith(f"python -m raytrainer {meant}")
    assert refused(here("check", *asked)).endswith(f"python -m raytrainer check {meant}")
    assert refused(here(*asked, "--dry-run")).endswith(f"python -m raytrainer --dry-run {meant}")
    (in_tmp / "conf" / "experiment").mkdir(parents=True)
    (in_tmp / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /sweep: random]\n"
    )
    own = refused(here("--config-dir=conf", "experiment=mine", "trainer.max_epochs=3"))
    assert own.endswith("python -m raytrainer -m --config-dir=conf experiment=mine trainer.max_epochs=3")
    assert not (in_tmp / "runs").exists()


def test_help_of_a_sweep_helps(here: Run) -> None:
    for choice in ("sweep=", "sweep=asha"):
        output = here("--help", choice)
        assert output.code == 0
        assert "sweep: asha, grid, optuna, pbt, random" in output.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("-m experiment=mlp sweep=random", "sweep=random needs something to sweep over: optimizer.lr=0.1,0.01"),
        (
            "-m experiment=mlp sweep=random,asha seed=1,2",
            "sweep=random,asha has several choices, and a sweep has one searcher",
        ),
        ("experiment=mlp sweep.num_samples=3", "sweep.num_samples=3 needs a sweep: choose sweep="),
        ("-m experiment=mlp seed=1,2 sweep.num_samples=3", "sweep.num_samples=3 needs a sweep"),
        (
            "-m experiment=mlp sweep=random optimizer.lr=loguniform(1e-4,1)",
            "optimizer.lr=loguniform(1e-4,1) cannot be ",
        ),
        ("-m experiment=mlp sweep=random optimizer.lr=fast", "optimizer.lr=fast must be a number"),
        (
            "-m experiment=mlp sweep=random sweep.space={x:interval(0,1)}",
            "sweep.space={x:interval(0,1)} cannot be set: write a sweep inside of a value as a text, in quotes",
        ),
        (
            "-m experiment=mlp sweep=random seed=1,2 optimizer.lr=[1,2]",
            "optimizer.lr=[1,2] must be a number; optimizer.lr",
        ),
        ("-m experiment=mlp sweep=nope seed=1,2", "sweep=nope is not a valid choice; valid: "),
        ("-m experiment=mlp sweep=grid optimizer.lr=interval(0,1)", "optimizer.lr=interval("),
        ("check -m experiment=mlp sweep=random optimizer.lr=0.1,fast", "optimizer.lr=fast must be a number"),
        (
            "check -m experiment=mlp sweep=random optimizer.lr=0.1,-1",
            "optimizer is refused by its constructor: Invalid learning rate",
        ),
        ("check -m experiment=mlp sweep=random model.widht=3,4", "model.widht=3 is not "),
        ("check -m experiment=mlp,nope sweep=random", "experiment=nope is not a valid choice; valid: "),
        ("check -m experiment=mlp sweep=random seed=1,2 cluster=inline", "cluster=inline has no processes for trials"),
        ("check -m experiment=mlp sweep=random seed=1,2 debug=default", "debug=true is one batch of one run"),
        (
            "check -m experiment=mlp sweep=random seed=1,2 scaling.num_workers=[1,2]",
            "scaling.num_workers=[1,2] is elastic",
        ),
        ("check -m experiment=mlp sweep=random seed=1,2 scaling.num_workers=128", "scaling.num_workers=128 × 1 CPU ="),
        (
            "check -m experiment=mlp sweep=random seed=1,2 scaling.resources_per_worker={CPU:999}",
            "scaling.num_workers=1 × 999 CPUs = 999 CPUs, and this machine",
        ),
        (
            "check -m experiment=mlp sweep=random seed=1,2 tracking.register_model=m",
            "tracking.register_model=m registers",
        ),
        ("check -m experiment=mlp sweep=pbt model.width=16,32", "model.width "),
        ("check -m experiment=mlp sweep=random seed=1,2 sweep.num_samples=0", "sweep.num_samples=0 must be "),
        ("check -m experiment=mlp sweep=random seed=1,2 sweep.num_sample=3", "sweep.num_sample=3 is not a key"),
        (
            "check -m experiment=mlp sweep=random seed=1,2 sweep.num_samples=null",
            "sweep.num_samples is not set",
        ),
    ],
)
def test_an_impossible_sweep_is_refused_in_a_line(here: Run, in_tmp: Path, arguments: str, reason: str) -> None:
    assert refused(here(*arguments.split(" "))).startswith(reason)
    assert list(in_tmp.iterdir()) == []


def test_options_may_stand_between_overrides(here: Run) -> None:
    output = here("check", "experiment=mlp", "-m", "sweep=random", "--config-dir=.", "seed=1,2")
    assert output.code == 0, output.err
    assert "would run 2 trials" in output.out


def test_a_sweep_is_checked_and_nothing_started(here: Run, in_tmp: Path) -> None:
    output = here("check", "-m", "experiment=mlp", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "sweep=asha")
    assert output.code == 0
    assert "would run 32 trials of sweep=asha over optimizer.lr, each on local Ray, 1 worker" in output.out
    assert not (in_tmp / "runs").exists()


# --- commands that show and start nothing --------------------------------------------------------------------------


def test_check_starts_nothing(here: Run, in_tmp: Path) -> None:
    output = here("check", "experiment=mlp")
    assert output.code == 0
    assert re.fullmatch(r"ok: mlp-\d+-\d+-\w{4} would train: local Ray, 1 worker on [CG]PU\n", output.out)
    assert output.err == "raytrainer: first batch: loss 1.0\n"
    assert here("check", "experiment=mlp", "preflight.first_batch=false").err == ""
    assert list(in_tmp.iterdir()) == []
    assert "mlp" in here("check", "experiment=mlp", "cluster=inline").out
    assert "would train: inline, one batch" in here("check", "experiment=mlp", "debug=default").out


def test_cfg_job(here: Run) -> None:
    output = here("--cfg", "job", "experiment=resnet", "optimizer.lr=0.3", "+optimizer.maximize=true")
    found = yaml.safe_load(output.out)
    assert output.code == 0
    assert found["model"]["_target_"] == "raytrainer.models.ResNet"
    assert found["optimizer"]["lr"] == 0.3
    assert found["optimizer"]["maximize"] is True
    assert found["tracking"]["tracking_uri"] == "${oc.env:MLFLOW_TRACKING_URI,null}"
    assert "hydra" not in found
    assert yaml.safe_load(here("--cfg", "job", "-p", "optimizer", "optimizer=sgd").out)["nesterov"] is True
    assert here("--cfg", "job", "-p", "optimizr").code == 2


def test_cfg_job_of_an_incomplete_experiment(here: Run) -> None:
    assert here("--cfg", "job").code == 0
    assert here("--cfg", "job", "optimizer.lr=???").code == 0
    assert here("--cfg", "job", "optimizer.lr=${oc.env:NOT_SET_AT_ALL}").code == 0


def test_help(here: Run) -> None:
    output = here("--help")
    assert output.code == 0
    for word in (
        *cli.VERBS,
        f"experiment: {', '.join(EXPERIMENTS)}",
        "optimizer: adamw, muon, sgd",
        "--config-dir",
        "debug=default",
    ):
        assert word in output.out
    for command in re.findall(
        r"^python -m raytrainer (-m .*?|--config-dir.*?|\w+ .*?)(?:  |$)", output.out, re.MULTILINE
    ):
        assert command.split()[0].lstrip("-").partition("=")[0] in {*cli.VERBS, "experiment", "m", "config-dir"}
    assert max(len(line) for line in output.out.splitlines()) <= 110


def test_version(here: Run) -> None:
    output = here("--version")
    assert output.code == 0
    assert output.out.startswith(f"raytrainer {raytrainer.__version__} (Hydra 1.3.")


def test_info_and_hydra_help(here: Run, in_tmp: Path) -> None:
    (in_tmp / "conf").mkdir()
    output = process("--info", "searchpath", "--config-dir=conf", timeout_s=30)
    assert output.code == 0
    assert "pkg://raytrainer.configs" in output.out + output.err
    assert f"file://{in_tmp}/conf" in output.out + output.err
    assert "experiment: resnet" in process("--info", "defaults-tree", "experiment=resnet", timeout_s=30).out
    assert here("--hydra-help").code == 0


@pytest.mark.parametrize(
    ("line", "suggested"),
    [
        ("raytrainer experiment=", [f"experiment={name}" for name in EXPERIMENTS]),
        ("raytrainer optimizer=s", ["optimizer=sgd"]),
        ("raytrainer check experiment=r", ["experiment=resnet"]),
        (
            "raytrainer trainer.max_",
            ["trainer.max_epochs=", "trainer.max_grad_norm=", "trainer.max_steps=", "trainer.max_time="],
        ),
        ("raytrainer experiment=resnet optimizer.nest", ["optimizer.nesterov="]),
        ("python -m raytrainer experiment=s", ["experiment=smoke"]),
        ("raytrainer st", ["status", "stop", "storage_path="]),
        ("raytrainer resume tw", ["two", "two-more"]),
        ("raytrainer logs -f o", ["one"]),
        ("raytrainer stop --f", ["--force"]),
        ("raytrainer status one ", []),
        ("raytrainer rerun two optimizer=s", ["optimizer=sgd"]),
        ("raytrainer evaluate two cluster=j", ["cluster=job"]),
        ("raytrainer export --m", ["--mlflow"]),
        ("raytrainer prune t", ["two", "two-more"]),
        # sweeps
        ("raytrainer -m experiment=mlp sweep=", [f"sweep={x}" for x in ("asha", "grid", "optuna", "pbt", "random")]),
        ("raytrainer check -m sweep=asha sweep.scheduler.g", ["sweep.scheduler.grace_period="]),
        ("raytrainer -m 'optimizer.lr=interval(0,1)' sweep.num", ["sweep.num_samples=", "sweep.num_to_keep="]),
        ("raytrainer -m experiment=mlp,r", ["experiment=mlp,resnet"]),
        (
            "raytrainer -m model=mlp,resnet_digits,r",
            ["model=mlp,resnet_digits,resnet18", "model=mlp,resnet_digits,resnet50"],
        ),
        ("raytrainer -m optimizer=adamw,s", ["optimizer=adamw,sgd"]),
        ("raytrainer -m optimizer=sgd,adamw optimizer.nest", ["optimizer.nesterov="]),
        ("raytrainer resume one sweep.num_s", ["sweep.num_samples="]),
        ("raytrainer rerun one.", ["one.0001", "one.0002"]),
        ("raytrainer --config-dir=conf experiment=mi", ["experiment=mine"]),
        ("raytrainer -m -cd conf experiment=mlp,mi", ["experiment=mlp,mine"]),
        ("raytrainer check --config-dir conf experiment=mi", ["experiment=mine"]),
    ],
)
def test_completion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, suggested: list[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setattr(sys, "argv", ["/somewhere/raytrainer"])
    for name in ("one", "two", "two-more", ".rerun"):
        Path("runs", name).mkdir(parents=True)
    for number in ("0001", "0002"):
        Path("runs", "one", "trials", number).mkdir(parents=True)
    Path("conf", "experiment").mkdir(parents=True)
    Path("conf", "experiment", "mine.yaml").write_text("# @package _global_\n")
    assert cli.main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == suggested


def test_completion_is_installed_for_the_console_script(in_tmp: Path) -> None:
    output = process("-sc", "install=bash", module=False)
    assert output.code == 0
    assert output.out.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion raytrainer")


# --- whole launches ------------------------------------------------------------------------------------------------


def rows(database: Path, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.slow
def test_a_sweep_inline_and_a_resume(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    quick = ["experiment=smoke", "cluster=inline", "trainer.max_steps=4", "tracking.log_model=false"]
    output = forked("-m", *quick, "optimizer.lr=0.1,0.01", "tracking.experiment_name=${oc.env:A_SECRET}")
    assert output.code == 0, output.err
    assert output.out.count("outcome  finished, 4 steps") == 2
    assert "Traceback" not in output.err
    runs = sorted((in_tmp / "runs").glob("smoke-*"))
    configs = [(path / "config.yaml").read_text() for path in runs]
    assert sorted(yaml.safe_load(text)["optimizer"]["lr"] for text in configs) == [0.01, 0.1]
    for text in configs:
        assert "hunter2" not in text
        assert "${oc.env:A_SECRET}" in text
    assert sorted(path.name for path in in_tmp.iterdir()) == ["mlartifacts", "mlflow.db", "runs"]
    assert rows(in_tmp / "mlflow.db", "SELECT status FROM runs") == [("FINISHED",), ("FINISHED",)]

    # The summary's own next command, as it is printed, continues the last of the two runs.
    command = re.findall(r"python -m raytrainer (resume \S+ \S+)=…", output.out)[-1]
    assert command.endswith("trainer.max_steps")
    output = forked(*command.split()[:2], f"{command.split()[2]}=6")
    assert output.code == 0, output.err
    assert "continuing after step 4" in output.err
    assert "outcome  finished, 6 steps" in output.out
    assert rows(in_tmp / "mlflow.db", "SELECT count(*), min(status) FROM runs") == [(2, "FINISHED")]


def test_debug_is_one_batch_in_this_process_and_leaves_nothing(in_tmp: Path) -> None:
    output = forked("experiment=resnet", "debug=default")
    assert output.code == 0, output.err
    assert "outcome  finished, 1 steps" in output.out
    assert "no tracking, no checkpoint" in output.out
    assert list(in_tmp.iterdir()) == []


def test_a_name_is_used_once(in_tmp: Path, here: Run) -> None:
    (in_tmp / "runs" / "one").mkdir(parents=True)
    (in_tmp / "runs" / "one" / "config.yaml").write_text("")
    reason = refused(here("experiment=smoke", "cluster=inline", "name=one"))
    assert reason.startswith("name=one is the name of an existing run ")
    assert "resume one continues it" in reason


def test_a_crash_of_native_code_shows_where() -> None:
    crash = "import ctypes, raytrainer.cli\nraytrainer.cli.main = lambda: ctypes.string_at(0)\n"
    program = f"{crash}from raytrainer.__main__ import entry\nentry()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "__main__.py" in done.stderr


def test_it_runs_without_a_stderr() -> None:
    program = f"exec {sys.executable} -m raytrainer --version 2>&-"
    done = subprocess.run(["/bin/sh", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("raytrainer ")
