"""A backend of another package: it is found by its entry point, and a run is submitted, followed, shown and stopped."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from raytrainer import cli, plugins
from raytrainer.config import compose, group_names
from raytrainer.errors import ClusterError, ConfigError
from raytrainer.storage import Storage
from raytrainer.sweep import Plan, make_plan
from tests.cluster.test_request import ELSEWHERE, built
from tests.launches import OUTSIDE
from tests.promises import Within

MODULE = OUTSIDE / "subprocess_backend" / "raytrainer_subprocess.py"
LAUNCH = ["experiment=smoke", "cluster.kind=subprocess", "cluster.options={folder: jobs}"]


def distribution(folder: Path, name: str, target: str) -> None:
    """Write the metadata that an installed package has, with one entry point."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{target}\n")


@pytest.fixture
def installed(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package is installed in a directory that is on the path of this process and of those that it starts."""
    site = in_tmp / "site"
    distribution(site, "raytrainer-subprocess", "subprocess = raytrainer_subprocess:Subprocess")
    (site / MODULE.name).symlink_to(MODULE)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(plugins, "_loaded", {})
    return site


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line in this process: exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return (cli.main(arguments), *capsys.readouterr())

    return run


def test_it_uses_public_names_only() -> None:
    imports = [node for node in ast.walk(ast.parse(MODULE.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = {
        (node.module, alias.name) for node in imports for alias in node.names if "raytrainer" in (node.module or "")
    }
    public = {"raytrainer", "raytrainer.config", "raytrainer.errors", "raytrainer.submission"}
    assert {module for module, _ in ours} <= public
    assert not {name for _, name in ours if name.startswith("_")}


@pytest.mark.slow
def test_a_run_from_its_command_to_its_end(
    installed: Path, in_tmp: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    command = [sys.executable, "-m", "raytrainer", *LAUNCH, "name=one"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "inline, in this process" in done.stdout  # the driver's log
    assert f"one: submitted to subprocess://{in_tmp}/jobs as job one" in done.stderr
    assert "outcome  finished" in done.stdout
    code, out, _ = call("status", "one")
    assert (code, "FINISHED" in out, f"subprocess://{in_tmp}/jobs" in out) == (0, True, True)
    code, out, _ = call("logs", "one")
    assert (code, "step" in out) == (0, True)
    code, out, _ = call("list", "--json")
    assert (code, [(run["name"], run["status"]) for run in json.loads(out)]) == (0, [("one", "FINISHED")])
    # The same command again is the same job.
    code, _, err = call(*LAUNCH, "name=one")
    assert code == 0
    assert "one was submitted before: job one is SUCCEEDED" in err
    assert [path.name for path in (in_tmp / "jobs").iterdir()] == ["one"]


@pytest.mark.slow
def test_a_run_that_is_followed_and_stopped(
    installed: Path, in_tmp: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = call(*LAUNCH, "name=long", "trainer.max_steps=1000000", "cluster.wait=false")
    assert code == 0, err
    assert "outcome  submitted" in out
    within = Within(120.0)
    with subprocess.Popen(
        [sys.executable, "-m", "raytrainer", "logs", "-f", "long"], stdout=subprocess.PIPE, text=True
    ) as following:
        storage = Storage(in_tmp / "runs" / "long")
        while not storage.exists("checkpoints"):
            within.check("no checkpoint")
        code, out, err = call("stop", "long")
        assert (code, "KILLED" in out) == (0, True), (out, err)
        printed, _ = following.communicate(timeout=120)
    assert "job long on" in printed
    code, out, _ = call("status", "long")
    assert "KILLED" in out
    (job,) = plugins.backend_at(f"subprocess://{in_tmp}/jobs").jobs(
        f"subprocess://{in_tmp}/jobs", compose(LAUNCH).experiment.cluster
    )
    assert (job.status, job.exit_code, job.held_by()) == ("FAILED", 143, {})


def test_check_and_dry_run(installed: Path, in_tmp: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call(*LAUNCH, "name=one", "--dry-run")
    assert code == 0, err
    request = yaml.safe_load(out)
    assert (request["name"], request["address"]) == ("one", f"subprocess://{in_tmp}/jobs")
    assert json.loads(request["files"]["request.json"])["driver"] == "inline"
    code, out, err = call("check", *LAUNCH, "name=one", "preflight.first_batch=false")
    assert code == 0, err
    assert f"a job at subprocess://{in_tmp}/jobs" in out
    assert not (in_tmp / "jobs").exists()


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["cluster.options={foldr: x}"], "cluster.options.foldr", "folder"),
        (["cluster.options={folder: 3}"], "cluster.options.folder=3", "must be a path"),
        (["scaling.num_workers=2"], "scaling.num_workers=2", "must be 1"),
        (["cluster.address=auto"], "cluster.address=auto", "cluster=existing"),
    ],
)
def test_its_own_checks(installed: Path, overrides: list[str], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", "cluster.kind=subprocess", *overrides])
    assert str(caught.value).startswith(key)
    assert words in str(caught.value)


def test_an_unknown_backend_is_refused_with_the_valid_ones(installed: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", "cluster.kind=subproces"])
    assert (caught.value.key, caught.value.value) == ("cluster.kind", "subproces")
    assert "valid: subprocess, " in str(caught.value)
    assert set(caught.value.choices) == {"inline", "local", "existing", "ray_jobs", "job", "kuberay", "subprocess"}
    with pytest.raises(ClusterError, match=r"no installed backend .*nowhere://x"):
        plugins.backend_at("nowhere://x")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("class Broken: pass", "is not a raytrainer.Backend"),
        ("Other = 1", "AttributeError"),
    ],
)
def test_a_broken_package_is_named(installed: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(installed, "raytrainer-broken", "broken = raytrainer_broken:Broken")
    (installed / "raytrainer_broken.py").write_text(f"{source}\n")
    monkeypatch.delitem(sys.modules, "raytrainer_broken", raising=False)
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", "cluster.kind=broken"])
    said = str(caught.value)
    assert said.startswith("cluster.kind=broken ")
    assert "raytrainer_broken:Broken of raytrainer-broken 1.0" in said
    assert words in said
    # It does not get in the way of others.
    assert plugins.backend_at("subprocess:///x").name == "subprocess"


@pytest.mark.parametrize("name", ["job", "ray_jobs"])
def test_ray_jobs_has_two_names(in_tmp: Path, name: str) -> None:
    """Both are written as older versions write it, so that a request has the same content under both."""
    address = "cluster.address=https://203.0.113.7"
    by_choice = compose(["experiment=mlp", "name=one", f"cluster={name}", address])
    by_key = compose(["experiment=mlp", "name=one", f"cluster.kind={name}", address])
    for composition in (by_choice, by_key):
        assert composition.experiment.cluster.kind == "job"
        assert yaml.safe_load(composition.text)["cluster"]["kind"] == "job"
        assert composition.experiment.backend is plugins.backend_named("ray_jobs")
        assert "options" not in yaml.safe_load(composition.text)["cluster"]


def test_a_sweep_has_the_same_content_under_both_names(in_tmp: Path) -> None:
    def sweep(name: str) -> Plan:
        overrides = [f"cluster={name}", "cluster.address=https://203.0.113.7", *ELSEWHERE, "sweep=grid", "seed=1,2"]
        return make_plan(["experiment=mlp", "name=one", *overrides], choice="grid", space={}, groups=group_names())

    assert built(sweep("job")).content == built(sweep("ray_jobs")).content
