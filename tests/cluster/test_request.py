"""Tests of the request: it equals the recorded one, is reproducible and complete, and holds no secrets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import yaml
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray.runtime_env import RuntimeEnv

from raytrainer import cli, provenance
from raytrainer.attempt import Record
from raytrainer.backends.jobs_api.packages import runtime_env, stage
from raytrainer.backends.kubernetes.rayjob import documents
from raytrainer.config import Composition, compose, from_text, group_names
from raytrainer.errors import ConfigError
from raytrainer.preflight import FirstBatch, Verdict
from raytrainer.provenance import Provenance
from raytrainer.storage import Storage
from raytrainer.submission import JobBackend, Sources
from raytrainer.submission.code import checked_runtime_env
from raytrainer.submission.entrypoint import REQUEST, DriverRequest
from raytrainer.submission.package import File, Module, Package
from raytrainer.submission.request import Request, build, submission_id
from raytrainer.sweep import Plan, make_plan
from tests.cluster.crd import SCHEMA
from tests.cluster.crd import problems as schema_problems

FIXTURES = SCHEMA.parent
JOB = ["cluster=job", "cluster.address=https://203.0.113.7"]
ELSEWHERE = ["storage_path=s3://bucket/runs", "tracking.tracking_uri=https://mlflow.example.com"]
TREE = Package(
    Path("/home/me/project"),
    (File("mine/__init__.py", 0, "e3" * 32), File("mine/net.py", 4096, "5a" * 32), File("run.sh", 64, "7b" * 32, True)),
    left_out=((".env", "secret"), ("weights.pt", "data")),
)
MODULE = Module("raytrainer", Package(Path("/opt/raytrainer"), (File("__init__.py", 1401, "9c" * 32),)))
ORIGIN = Provenance(
    "python -m raytrainer …", {"raytrainer": "0.1.0", "python": "3.11.7"}, "0" * 40, "main", "diff\n", ""
)

pytestmark = pytest.mark.usefixtures("in_tmp")


def composition(*overrides: str) -> Composition:
    return compose(["experiment=mlp", "name=one", *JOB, *ELSEWHERE, *overrides])


def plan(*overrides: str) -> Plan:
    return make_plan(
        [
            "experiment=mlp",
            "name=one",
            *JOB,
            *ELSEWHERE,
            "sweep=grid",
            "optimizer.lr=0.1,0.01",
            "model=mlp,resnet_digits",
            *overrides,
        ],
        choice="grid",
        space={},
        groups=group_names(),
    )


def built(target: Composition | Plan, argv: Sequence[str] = ("experiment=mlp", "name=one"), **fields: Any) -> Request:
    """Build a request; `fields` are those of `Sources`, and the other arguments of `build`."""
    options = {key: fields.pop(key) for key in ("changed", "resumes", "attempt") if key in fields}
    own = {"package": TREE, "modules": (MODULE,), "origin": ORIGIN, "user": "me", "environ": {}}
    sources = Sources(**{"address": backend(target).address(target.experiment), **own, **fields})
    return build(target, list(argv), sources, **options)


def prepare(target: Composition | Plan, argv: Sequence[str]) -> Request:
    return backend(target).prepare(target, argv)


def backend(target: Composition | Plan | Request) -> JobBackend:
    return cast("JobBackend", target.experiment.backend)


def to_text(request: Request) -> str:
    return backend(request).text(request)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def text_of(found: Request) -> str:
    return found.files["config.yaml"].decode()


# --- the value --------------------------------------------------------------------------------------------------------

FULL = [
    "cluster.forward_env=[WANDB_API_KEY]",
    "cluster.env_file=/etc/secrets",
    "cluster.driver_resources={CPU: 1}",
    "cluster.runtime_env={pip: ['einops==0.8.1'], env_vars: {NCCL_DEBUG: WARN}}",
    "+model.key=${oc.env:WANDB_API_KEY}",
]


def recorded(kind: str) -> Request:
    if kind == "sweep":
        return built(plan("sweep.max_concurrent_trials=2"))
    env = checked_runtime_env({"pip": ["einops==0.8.1"], "env_vars": {"NCCL_DEBUG": "WARN"}})
    return built(composition(*FULL), runtime_env=env)


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_the_request_is_the_recorded_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an intended change, run `RECORD=1 pytest tests/cluster/test_request.py` and review the diff."""
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    text, file = to_text(recorded(kind)), FIXTURES / f"request-{kind}.yaml"
    if os.environ.get("RECORD"):
        file.write_text(text)
    assert text == file.read_text(), f"another request than in {file}: {test_the_request_is_the_recorded_one.__doc__}"


def test_what_is_shown_is_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    found = recorded("run")
    shown = yaml.safe_load(to_text(found))
    for name in ("name", "kind", "address", "submission_id", "entrypoint", "metadata", "resources"):
        assert shown[name] == getattr(found, name)
    assert shown["runtime_env"] == runtime_env(found)
    assert shown["environment"] == ["WANDB_API_KEY"]
    assert shown["files"] == {name: content.decode() for name, content in found.files.items()}
    assert shown["package"]["files"] == {"mine/__init__.py": 0, "mine/net.py": 4096, "run.sh": 64}
    assert shown["package"]["left_out"] == {".env": "secret", "weights.pt": "data"}
    assert "planted-secret" not in to_text(found)
    assert "${oc.env:WANDB_API_KEY}" in text_of(found)
    # Every user of the cluster sees these values, so they are short and show nothing of the user's but names.
    assert found.entrypoint == "python -m raytrainer.cluster.entry"
    assert all(len(value) < 200 for value in found.metadata.values())


def test_a_large_file_is_not_printed() -> None:
    found = built(composition(), origin=replace(ORIGIN, patch="x" * 100_000))
    shown = yaml.safe_load(to_text(found))["files"]["provenance.json"]
    assert shown.startswith("100,")
    assert len(shown) < 120


@pytest.mark.parametrize("make", [composition, plan])
def test_the_same_is_the_same(make: Callable[..., Composition | Plan]) -> None:
    one = built(make())
    assert built(make()) == one
    # The content does not depend on how, by whom or how often the request is sent.
    again = built(
        make("cluster.wait=false", "cluster.retries=3", "cluster.package_limit_mb=7", "cluster.ca_file=/x"),
        argv=["other", "words"],
        origin=replace(ORIGIN, commit=None, patch=""),
        user="somebody",
        environ={"A": "b"},
        attempt=2,
        resumes=True,
    )
    assert again.content == one.content
    assert again.differences(one.metadata) == []
    assert again.submission_id == "one--2"


@pytest.mark.parametrize(
    ("overrides", "other", "part"),
    [
        (["seed=1"], {}, "config"),
        (["cluster.forward_env=[A]"], {}, "config"),
        ([], {"package": replace(TREE, entries=TREE.entries[:-1])}, "package"),
        ([], {"modules": ()}, "package"),
        ([], {"modules": (replace(MODULE, name="other"),)}, "package"),
        ([], {"runtime_env": {"env_vars": {"A": "b"}}}, "runtime_env"),
    ],
)
def test_what_is_not_the_same(overrides: list[str], other: Mapping[str, Any], part: str) -> None:
    one, two = built(composition()), built(composition(*overrides), **other)
    assert one.content != two.content
    assert one.submission_id == two.submission_id
    assert two.differences(one.metadata) == [part]
    assert two.differences({}) == ["config", "package", "runtime_env", "driver"]


def test_other_resources_of_the_driver_are_another_content() -> None:
    one, two = built(composition()), built(composition("cluster.driver_resources={CPU: 1}"))
    assert two.resources == {"CPU": 1.0}
    assert two.differences(one.metadata) == ["config", "driver"]


def test_a_run_and_a_sweep_are_told_apart() -> None:
    run, sweep = built(composition()), built(plan())
    assert (run.kind, sweep.kind) == ("run", "sweep")
    assert run.content != sweep.content
    changed = replace(plan(), parameters=plan().parameters[:-1])
    assert built(changed).differences(sweep.metadata) == ["config"]


@pytest.mark.parametrize(
    ("name", "attempt", "identifier"),
    [("one", 1, "one"), ("one", 2, "one--2"), ("one", 11, "one--11"), ("o" * 97, 2, "o" * 97 + "--2")],
)
def test_ids_of_submissions(name: str, attempt: int, identifier: str) -> None:
    assert submission_id(name, attempt) == identifier


def test_ids_of_submissions_of_long_names() -> None:
    one, two = submission_id("o" * 98 + "aa", 2), submission_id("o" * 98 + "bb", 2)
    assert one != two
    assert {len(one), len(two)} == {100}
    assert one.endswith("--2")
    assert re.match("name=one--2 .*attempt 2 of run 'one'", refusal(lambda: submission_id("one--2", 1)))


# --- reading the request on the cluster -------------------------------------------------------------------------------


def on_the_cluster(found: Request, folder: Path) -> DriverRequest:
    stage(found, folder)
    return DriverRequest.read(folder / REQUEST)


def test_a_run_arrives_whole(in_tmp: Path) -> None:
    sent = composition("trainer.max_epochs=2")
    asked = on_the_cluster(built(sent, changed=["lr"], resumes=True, package=None, modules=()), in_tmp / "staged")
    assert asked.kind == "run"
    assert from_text(asked.config).experiment == sent.experiment
    assert asked.choices == dict(sent.choices)
    assert asked.argv == ["experiment=mlp", "name=one"]
    assert asked.changed == ["lr"]
    assert asked.job["resumes"] == "true"
    assert asked.job["cluster_address"] == "https://203.0.113.7"
    origin = Provenance.from_json((in_tmp / "staged" / REQUEST / "provenance.json").read_bytes())
    assert origin == ORIGIN


def test_a_sweep_arrives_whole(in_tmp: Path) -> None:
    sent = plan()
    asked = on_the_cluster(built(sent, package=None, modules=()), in_tmp / "staged")
    assert asked.kind == "sweep"
    arrived = Plan.from_dict(asked.plan or {})
    assert arrived.parameters == sent.parameters
    assert len(arrived.compositions) == 2
    assert [c.experiment for c in arrived.compositions.values()] == [c.experiment for c in sent.compositions.values()]


def test_what_variables_say_here_is_what_they_say_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and names from the tools' own variables are resolved here, because the cluster may set other values."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.com/")
    monkeypatch.setenv("SOME_QUEUE", "gpus")
    given = ["experiment=mlp", "name=one", "storage_path=s3://b/runs", "cluster.env_file=${oc.env:SOME_QUEUE}"]
    for asked in (
        compose([*given, "cluster=job"]),
        make_plan([*given, "cluster=job", "sweep=grid", "seed=1,2"], choice="grid", space={}, groups=group_names()),
    ):
        found = built(asked, environ=os.environ)
        assert found.address == "https://ray.example.com"
        told = json.loads(found.files["request.json"])
        texts = [c["text"] for c in told["plan"]["compositions"]] if told["plan"] else [text_of(found)]
        with monkeypatch.context() as there:
            for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_API_SERVER_ADDRESS", "SOME_QUEUE"):
                there.delenv(name)
            for text in texts:
                assert "oc.env" not in text
                e = from_text(text).experiment
                assert e.tracking.tracking_uri == "https://mlflow.example.com"
                assert e.tracking.experiment_name == "mine"
                assert e.cluster.address == "https://ray.example.com/"


def test_a_relative_store_is_the_launching_directorys(in_tmp: Path) -> None:
    """A relative path is resolved here, because jobs on this machine's cluster have their own working directories."""
    found = built(compose(["experiment=mlp", "name=one", "cluster=job", "cluster.address=http://127.0.0.1:8265"]))
    assert from_text(text_of(found)).experiment.tracking.tracking_uri == f"sqlite:///{in_tmp}/mlflow.db"
    assert backend(found).problems(found) == ([], [])


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["+model.a=${oc.env:THERE}"],
            "model.a refers to the variable THERE of this machine, which the cluster's machines do not",
        ),
        (
            ["+model.a=${oc.env:THERE}"],
            "set cluster.forward_env=[THERE] and its value on the cluster; or write the",
        ),
        (["+model.a=${oc.env:THERE,5}"], "model.a refers to the variable THERE"),
        (["+model.a='x-${oc.env:NOT_THERE,${oc.env:THERE}}'"], "model.a refers to the variable THERE"),
        (["cluster.forward_env=[THERE]", "+model.a=${oc.env:THERE}"], ""),
        (["+model.a=${oc.env:NOT_THERE,5}"], ""),
        (["tracking.tracking_uri=${oc.env:STORE}"], "tracking.tracking_uri refers to the variable STORE"),
        (
            ["tracking.tracking_uri=${oc.env:MLFLOW_TRACKING_URI}"],
            "tracking.tracking_uri refers to the variable MLFLOW_",
        ),
        (["tracking.tracking_uri=${oc.env:MLFLOW_TRACKING_URI}", "cluster.forward_env=[MLFLOW_TRACKING_URI]"], ""),
        (["tracking.experiment_name=${oc.env:A_SECRET}"], "tracking.experiment_name refers to the variable A_SECRET"),
        (["cluster.queue=${oc.env:A_SECRET}"], "cluster.queue refers to the variable A_SECRET"),
        (
            ["tracking.tracking_uri=https://me:pw@mlflow.example.com"],
            "a URL with a password is in the config or the comm",
        ),
    ],
)
def test_references(monkeypatch: pytest.MonkeyPatch, overrides: list[str], reason: str) -> None:
    monkeypatch.setenv("THERE", "7")
    monkeypatch.setenv("A_SECRET", "planted-secret")
    monkeypatch.setenv("STORE", "https://mlflow.example.com")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:planted-secret@mlflow.example.com")
    asked = composition(*overrides)
    if reason:
        said = refusal(lambda: built(asked, environ=os.environ))
        assert reason in said
        assert "planted" not in said
    else:
        found = built(asked, environ=os.environ)
        assert "planted" not in to_text(found)
        assert "oc.env" in text_of(found)


@pytest.mark.parametrize(
    ("where", "other"),
    [
        ("the config", {}),
        ("the config or the command line", {"argv": ["+model.a=planted-secret"]}),
        ("the changes that git has not committed", {"origin": replace(ORIGIN, patch='+key = "planted-secret"\n')}),
        ("the runtime environment", {"runtime_env": {"env_vars": {"INNOCENT": "planted-secret"}}}),
    ],
)
def test_the_value_of_a_secret_is_never_sent(where: str, other: Mapping[str, Any]) -> None:
    asked = composition() if other else composition("+model.a=planted-secret")
    said = refusal(lambda: built(asked, environ={"WANDB_API_KEY": "planted-secret", "A": "mlp", "KEY": "mlp"}, **other))
    fix = "write ${oc.env:WANDB_API_KEY}, with cluster.forward_env=[WANDB_API_KEY], and set its value on the cluster"
    if "git" in where:
        fix = "take it out of there"
    assert said.startswith(f"the value of WANDB_API_KEY is in {where}, ")
    assert said.endswith(f": {fix}")


def test_the_clusters_token_is_never_sent() -> None:
    secrets = {"~/.ray/auth_token": "a-token-of-a-cluster"}
    said = refusal(lambda: built(composition("+model.a=a-token-of-a-cluster"), secrets=secrets))
    assert said.startswith("the value of ~/.ray/auth_token is in the config, ")


@pytest.mark.parametrize("patch", ['+s = "https://TOKEN@host"\n', "-postgresql://me:p/w@host/db\n"])
def test_a_password_in_the_changes_that_git_has_not_committed(patch: str) -> None:
    assert "git diff HEAD" in refusal(lambda: built(composition(), origin=replace(ORIGIN, patch=patch)))


def test_a_token_that_can_be_read_on_its_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-a-cluster")

    def told(address: str) -> list[str]:
        found = built(composition(f"cluster.address={address}"))
        return backend(found).problems(found)[1]

    (said,) = told("http://203.0.113.7:8265")
    assert re.match("the token of RAY_AUTH_TOKEN .*http://203.0.113.7:8265 over plain http", said)
    assert told("https://203.0.113.7") == told("http://127.0.0.1:8265") == []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # then no token is sent
    assert told("http://203.0.113.7:8265") == []


def test_what_stands_in_place_of_a_password_in_them_is_none() -> None:
    for patch in ("+f'https://{user}:{password}@{host}'\n", "+https://<TOKEN>@host and https://…@host\n"):
        built(composition(), origin=replace(ORIGIN, patch=patch))


def test_files_with_the_value_of_a_secret_do_not_go_along(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FILE_KEY", str(project))  # a path is not a secret
    Path("mine/net.py").write_text(f"# {project}\nkey = 'planted-secret'\ndef net(): pass\n")
    prepare(mine(), ["x"])
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    assert "WANDB_API_KEY is in mine/net.py" in refusal(lambda: prepare(mine(), ["x"]))
    monkeypatch.delenv("WANDB_API_KEY")
    Path("token").chmod(0o600)
    said = refusal(lambda: prepare(mine("cluster.token_file=token"), ["x"]))
    assert "cluster.token_file=token is in mine/net.py" in said


def test_files_of_this_machine_may_be_referred_to(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(in_tmp / "token"))
    asked = composition("cluster.token_file=${oc.env:RAY_AUTH_TOKEN_PATH}")
    said = refusal(lambda: built(asked, environ=os.environ))
    assert said.startswith("cluster.token_file is not an existing file")
    assert "RAY_AUTH_TOKEN_PATH" in said
    (in_tmp / "token").write_text("a-token-of-a-cluster")
    assert f"token_file: {in_tmp}/token" in text_of(built(asked, environ=os.environ))


def test_the_context_that_is_current_now_is_named(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compose(["experiment=mlp", "name=one", "cluster=kuberay", "cluster.image=x", *ELSEWHERE])
    monkeypatch.setenv("PATH", str(in_tmp))
    assert prepare(asked, ["x"]).address == "kubernetes:///default"  # kubectl is not installed
    (in_tmp / "kubectl").write_text("#!/bin/sh\necho mine\n")
    (in_tmp / "kubectl").chmod(0o755)
    assert prepare(asked, ["x"]).address == "kubernetes://mine/default"
    named = replace(asked, experiment=replace(asked.experiment))
    named.experiment.cluster.context = "other"
    assert prepare(named, ["x"]).address == "kubernetes://other/default"


# --- Ray's runtime environment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"envvars": {"A": "b"}}, "cluster.runtime_env.envvars is not a field of Ray's runtime_env; valid: env_vars"),
        ({"env_vars": {"A": True}}, "cluster.runtime_env.env_vars.A must be text: put it in quotes"),
        ({"pip": 3}, "cluster.runtime_env is refused by Ray: runtime_env['pip'] must be of type str or"),
        (
            {"pip": ["x"], "conda": "y"},
            "cluster.runtime_env is refused by Ray: The 'pip' field, 'uv' field, and 'conda'",
        ),
        ({"working_dir": "not/there"}, "cluster.runtime_env is refused by Ray: not/there is not a valid path"),
        ({"py_modules": ["s3://bucket/x.tar"]}, "cluster.runtime_env is refused by Ray: Only .zip"),
        ({"pip": "missing.txt"}, "cluster.runtime_env is refused by Ray: missing.txt is not a valid file"),
    ],
)
def test_what_ray_does_not_take(given: dict[str, Any], reason: str) -> None:
    assert refusal(lambda: checked_runtime_env(given)).startswith(reason)


def test_what_ray_takes(in_tmp: Path) -> None:
    (in_tmp / "requirements.txt").write_text("einops==0.8.1\n")
    assert checked_runtime_env({}) == {}
    found = checked_runtime_env(
        {"pip": "requirements.txt", "config": {"setup_timeout_seconds": 9}, "a_plugin": {"x": 1}}
    )
    assert found["pip"]["packages"] == ["einops==0.8.1"]
    assert found["config"]["setup_timeout_seconds"] == 9
    assert set(found) == {"pip", "config", "a_plugin"}


# --- the package ------------------------------------------------------------------------------------------------------


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(package: Package | None) -> list[str]:
    assert package is not None
    return [name for name, _ in package.files]


def uri(folder: str) -> str:
    return str(get_uri_for_directory(folder, include_gitignore=True))


def imports(staged: Mapping[str, Any], *modules: str) -> list[str]:
    """Return the files from which a process of the job imports modules, with the import paths that Ray sets."""
    program = f"import sys, {', '.join(modules)}\nfor m in {modules!r}: print(sys.modules[m].__file__)"
    paths = [str(Path(path).parent) for path in staged["py_modules"]]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=staged["working_dir"],
        env={"PYTHONPATH": os.pathsep.join([*paths, staged["working_dir"]])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def project(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package in a subdirectory, which is the launching directory, and libraries beside it."""
    root = write(
        in_tmp / "repository",
        {
            "projects/vision/mine/__init__.py": "",
            "projects/vision/mine/net.py": "import shared.parts\ndef net(): pass\n",
            "projects/vision/weights.pt": "",
            "projects/vision/token": "planted-secret",
            "libraries/src/shared/__init__.py": "",
            "libraries/src/shared/parts.py": "",
            "libraries/src/single.py": "",
            "other/unused.py": "",
        },
    )
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    monkeypatch.chdir(root / "projects/vision")
    # `pip install -e libraries` has the same effect.
    monkeypatch.syspath_prepend(str(root / "libraries/src"))
    monkeypatch.syspath_prepend(str(root / "projects/vision"))
    return root


def mine(*overrides: str) -> Composition:
    return composition("model={_target_: mine.net.net}", *overrides)


def test_the_users_own_code_is_importable_there_as_here(project: Path) -> None:
    asked = mine("cluster.token_file=token", "+loss.extra={_target_: single.nothing}")
    found = prepare(asked, ["x"])
    assert found.package is not None
    assert found.package.root == project / "projects/vision"
    assert names(found.package) == ["mine/__init__.py", "mine/net.py", "single.py"]
    assert dict(found.package.left_out) == {"weights.pt": "data", "token": "secret"}
    own = [one.name for one in found.modules if one.name != "raytrainer"]
    assert own == ["shared"]
    staged = stage(found, project / "staged")
    tree = project / "staged/tree"
    assert imports(staged, "mine", "mine.net", "single", "shared.parts", REQUEST) == [
        str(tree / "mine/__init__.py"),
        str(tree / "mine/net.py"),
        str(tree / "single.py"),
        str(project / "staged/modules/shared/parts.py"),
        str(project / f"staged/{REQUEST}/__init__.py"),
    ]
    assert "mine/net.py" in found.table()
    assert "planted-secret" not in to_text(found)
    RuntimeEnv(**staged)  # Ray accepts it


def test_a_second_submission_of_the_same_tree_uploads_nothing_of_it(project: Path) -> None:
    first, second = prepare(mine(), ["x"]), prepare(mine("seed=1", "name=two"), ["y"])
    one, two = stage(first, project / "one"), stage(second, project / "two")
    assert uri(one["working_dir"]) == uri(two["working_dir"])
    changed = {uri(path) for path in one["py_modules"]} ^ {uri(path) for path in two["py_modules"]}
    # Only the modules that hold the requests differ.
    assert changed == {uri(one["py_modules"][0]), uri(two["py_modules"][0])}
    assert Path(one["py_modules"][0]).name == REQUEST


def test_the_runs_themselves_stay_here(project: Path) -> None:
    write(project / "projects/vision", {"out [1]/one/run.json": "{}", "runs/two/run.json": "{}", "mlflow.db": ""})
    local = ["cluster.address=http://127.0.0.1:8265", "storage_path='out [1]'"]
    assert names(prepare(mine(*local), ["x"]).package) == ["mine/__init__.py", "mine/net.py", "token"]


def test_code_that_a_target_names_and_that_stays_here(project: Path) -> None:
    write(project, {".gitignore": "net.py\n"})
    message = refusal(lambda: prepare(mine(), ["x"]))
    assert message.startswith("model._target_=mine.net.net is in mine/net.py, ")
    assert "a line !/mine/net.py in .rayignore" in message
    write(project, {"projects/vision/.rayignore": "!/mine/net.py\n"})
    assert "mine/net.py" in names(prepare(mine(), ["x"]).package)


def test_more_than_the_limit(project: Path) -> None:
    write(project, {"projects/vision/big.csv": "x" * 3_000_000, "libraries/src/shared/big.csv": "x" * 2_000_000})
    said = refusal(lambda: prepare(mine("cluster.package_limit_mb=4.5"), ["x"]))
    assert said.startswith("cluster.package_limit_mb=4.5 is less than the ")
    assert "big.csv (3.0 MB), shared/big.csv (2.0 MB)" in said


def with_env(**env: Any) -> Composition:
    """Return `mine` with a runtime environment."""
    asked = mine()
    asked.experiment.cluster.runtime_env = env
    return asked


def test_a_runtime_environment_of_the_users_own(project: Path) -> None:
    write(project, {"libraries/more/__init__.py": "", "libraries/more/.env": "", "wheels/x-1-py3-none-any.whl": ""})
    wheel = str(project / "wheels/x-1-py3-none-any.whl")
    env = {"py_modules": ["../../libraries/more", wheel, "s3://bucket/y.zip"], "excludes": ["mine/data/"]}
    write(project, {"projects/vision/mine/data/x": ""})
    found = prepare(with_env(**env, env_vars={"A": "b"}), ["x"])
    assert "excludes" not in found.runtime_env
    assert "mine/data/x" not in names(found.package)
    assert found.runtime_env["env_vars"] == {"A": "b"}
    assert {one.name: names(one.package) for one in found.modules}["more"] == ["__init__.py"]
    staged = stage(found, project / "staged")
    assert staged["py_modules"][-2:] == [wheel, "s3://bucket/y.zip"]
    assert str(project / "staged/modules/more") in staged["py_modules"]


def test_a_working_directory_of_the_users_own(project: Path) -> None:
    found = prepare(with_env(working_dir="../../other"), ["x"])
    assert names(found.package) == ["unused.py"]
    assert {"mine", "shared"} <= {one.name for one in found.modules}
    there = prepare(with_env(working_dir="s3://bucket/code.zip"), ["x"])
    assert there.package is None
    assert there.runtime_env["working_dir"] == "s3://bucket/code.zip"
    assert stage(there, project / "staged")["working_dir"] == "s3://bucket/code.zip"
    assert found.content != there.content
    said = refusal(lambda: prepare(with_env(image_uri="registry.example.com/x:1"), ["x"]))
    assert said.startswith("cluster.runtime_env.image_uri=registry.example.com/x:1 ")


# --- Kubernetes -------------------------------------------------------------------------------------------------------

KUBERAY = ["experiment=mlp", "name=one", "cluster=kuberay", "cluster.image=registry.example.com/x:1", *ELSEWHERE]


def test_on_kubernetes_nothing_is_uploaded() -> None:
    found = prepare(compose([*KUBERAY, "cluster.context=a/b", "cluster.namespace=research"]), ["x"])
    assert found.package is None
    assert found.runtime_env == {}
    assert found.address == "kubernetes://a%2Fb/research"
    config_map, job = yaml.safe_load_all(to_text(found))
    assert schema_problems(job, json.loads(SCHEMA.read_text())) == []
    assert config_map["data"]["config.yaml"] == text_of(found)
    assert job["spec"]["jobId"] == "one"
    assert found.content in job["spec"]["metadata"].values()


def test_a_large_patch_does_not_keep_a_run_from_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "collect", lambda argv, folder: replace(ORIGIN, patch="x" * 3_000_000))
    found = prepare(compose(KUBERAY), [])
    documents(found)
    assert Provenance.from_json(found.files["provenance.json"]).is_cut


@pytest.mark.parametrize(("overrides", "pods"), [([], (1, 4)), (["sweep.max_concurrent_trials=2"], (1, 2))])
def test_a_sweep_on_kubernetes_grows_to_its_trials(overrides: list[str], pods: tuple[int, int]) -> None:
    asked = make_plan(
        [*KUBERAY, "seed=1,2,3,4", "sweep.num_samples=4", *overrides], choice="grid", space={}, groups=group_names()
    )
    found = built(asked, package=None, modules=())
    group = documents(found)[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"]) == pods


# --- --dry-run --------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Return a function that runs a command line in this process."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/raytrainer/__main__.py"])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])

    def call(*arguments: str) -> Said:
        return Said(cli.main(arguments), *capsys.readouterr())

    return call


def test_dry_run_prints_the_request_and_sends_nothing(project: Path, here: Callable[..., Said]) -> None:
    before = sorted(project.rglob("*"))
    said = here("experiment=resnet", *JOB, "name=x", "--dry-run")
    assert said.code == 0, said.err
    shown = yaml.safe_load(said.out)
    assert (shown["name"], shown["kind"], shown["address"]) == ("x", "run", "https://203.0.113.7")
    assert json.loads(shown["files"]["request.json"])["argv"] == ["experiment=resnet", *JOB, "name=x"]
    assert "mine/net.py" in shown["package"]["files"]
    assert "mine/net.py" in said.err  # the table of files
    assert [line.partition("=")[0] for line in said.err.splitlines() if "would be refused" in line] == [
        "raytrainer: would be refused: storage_path",
        "raytrainer: would be refused: tracking.tracking_uri",
    ]
    assert sorted(project.rglob("*")) == before
    # The same arguments give the same content, wherever --dry-run stands.
    again = yaml.safe_load(here("--dry-run", "experiment=resnet", *JOB, "name=x").out)
    assert again["metadata"] == shown["metadata"]


def test_dry_run_warns_of_files_of_this_machine(project: Path, here: Callable[..., Said]) -> None:
    said = here("experiment=mlp", *JOB, *ELSEWHERE, f"+data.train.words={project}/other/unused.py", "--dry-run")
    assert said.code == 0
    assert "would be refused" not in said.err
    assert f"raytrainer: warning: data.train.words={project}/other/unused.py is on this machine and is not" in said.err


def test_dry_run_of_a_sweep(project: Path, here: Callable[..., Said]) -> None:
    said = here("-m", "experiment=mlp", *JOB, *ELSEWHERE, "sweep=grid", "optimizer.lr=0.1,0.01", "--dry-run")
    assert said.code == 0, said.err
    shown = yaml.safe_load(said.out)
    assert shown["kind"] == "sweep"
    (parameter,) = json.loads(shown["files"]["request.json"])["plan"]["parameters"]
    assert parameter["key"] == "optimizer.lr"


def test_dry_run_of_several_runs(project: Path, here: Callable[..., Said]) -> None:
    said = here("-m", "experiment=mlp", *JOB, *ELSEWHERE, "seed=1,2", "--dry-run")
    assert [yaml.safe_load(one["files"]["config.yaml"])["seed"] for one in yaml.safe_load_all(said.out)] == [1, 2]


def test_dry_run_of_what_was_run_before(project: Path, here: Callable[..., Said]) -> None:
    run = compose(["experiment=mlp", "name=one", "cluster=job", "cluster.address=http://127.0.0.1:8265"])
    storage = Storage(run.experiment.storage_path or "").child("one")
    storage.write_bytes("config.yaml", run.text.encode())
    storage.write_bytes("checkpoints/x", b"")
    Record("one", storage.uri, status="FAILED", attempts=1, choices=dict(run.choices)).write(storage)
    said = here("resume", "one", "trainer.max_epochs=20", "optimizer.lr=0.5", "--dry-run")
    assert said.code == 0, said.err
    shown = yaml.safe_load(said.out)
    told = json.loads(shown["files"]["request.json"])
    assert shown["submission_id"] == "one--2"
    assert (told["job"]["resumes"], told["changed"]) == ("true", ["lr"])
    assert told["argv"] == ["resume", "one", "trainer.max_epochs=20", "optimizer.lr=0.5"]
    assert yaml.safe_load(shown["files"]["config.yaml"])["trainer"]["max_epochs"] == 20

    said = here("rerun", "one", "--dry-run", "--here", "name=again")
    assert said.code == 0, said.err
    shown = yaml.safe_load(said.out)
    assert (shown["name"], shown["submission_id"]) == ("again", "again")
    assert "resumes" not in json.loads(shown["files"]["request.json"])["job"]
    assert [path.name for path in (project / "projects/vision/runs").iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=mlp", "name=x"], "ok: x would train: local Ray, 1 worker on "),
        (["experiment=mlp", "name=x", "cluster=inline"], "ok: x would train: inline, in this process, on "),
        (
            ["-m", "experiment=mlp", "name=x", "sweep=grid", "seed=1,2"],
            "ok: x would run 2 trials of sweep=grid over seed, each on local",
        ),
    ],
)
def test_dry_run_of_what_runs_here(
    here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    # The first-batch probe is a process that takes seconds. tests/test_first_batch.py tests it.
    monkeypatch.setattr(FirstBatch, "run", lambda self: Verdict("passed", "loss 1.0"))
    said = here(*arguments, "--dry-run")
    assert said.code == 0, said.err
    assert said.out.startswith(words)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["list", "--dry-run"], "--dry-run is for experiment=…, resume, rerun"),
        (["experiment=mlp", "cluster=job", "--dry-run"], "cluster.address is not set"),
        (["experiment=mlp", "cluster=kuberay", "--dry-run"], "cluster.image is not set"),
        (
            ["experiment=mlp", *JOB, "cluster.package_limit_mb=0", "--dry-run"],
            "cluster.package_limit_mb=0 is less than",
        ),
    ],
)
def test_dry_run_of_what_cannot_be_sent(
    project: Path, here: Callable[..., Said], arguments: Sequence[str], reason: str
) -> None:
    said = here(*arguments)
    assert said.code == 2
    assert said.err.startswith(f"raytrainer: refused: {reason}")
    assert said.out == ""
