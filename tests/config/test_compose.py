"""Tests of composing: Hydra's command line and any YAML give one typed experiment, and errors are in our own words."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from raytrainer.config import Composition, compose, flattened, from_text, holds_password, with_values
from raytrainer.config.foreign import FOREIGN_KEYS
from raytrainer.config.schema import known_keys
from raytrainer.config.typed import unknown_key
from raytrainer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_tmp")


def refusal(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dir)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_experiment_is_typed_named_and_absolute(in_tmp: Path) -> None:
    composition = compose(["experiment=resnet", "optimizer.lr=0.05", "trainer.max_epochs=3"])
    e = composition.experiment
    assert re.fullmatch(r"resnet-\d{8}-\d{6}-[0-9a-f]{4}", e.name or "")
    assert e.storage_path == str(in_tmp / "runs")
    assert e.trainer.max_epochs == 3
    assert e.optimizer is not None
    assert e.optimizer["lr"] == 0.05
    assert dict(composition.choices)["model"] == "resnet_digits"
    assert composition.overrides == ("experiment=resnet", "optimizer.lr=0.05", "trainer.max_epochs=3")


def test_hydra_is_left_as_it_was() -> None:
    compose(["experiment=mlp"])
    refusal("experiment=nope")
    assert not GlobalHydra.instance().is_initialized()


def test_the_text_gives_the_same_experiment_again() -> None:
    composition = compose(
        ["experiment=mlp", "name=one-${now:%Y}", "+callbacks.a={_target_: builtins.dict, x: '${seed}'}"]
    )
    again = from_text(composition.text)
    assert again.experiment == composition.experiment
    assert again.text == composition.text
    assert "now:" not in composition.text


def test_references_to_secrets_stay_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    composition = compose(
        ["experiment=mlp", "+data.train.key=${oc.env:A_SECRET}", "tracking.tracking_uri=${oc.env:A_SECRET}"]
    )
    assert composition.experiment.data.train is not None
    assert composition.experiment.data.train["key"] == "hunter2"
    assert "hunter2" not in composition.text
    assert "${oc.env:A_SECRET}" in composition.text
    assert "hunter2" not in str(flattened(composition.text))
    assert "hunter2" not in str(composition.overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        # keys
        ("trainer.max_epoch=3", "trainer.max_epoch=3 is not a key; valid: trainer.max_epochs"),
        ("+trainer.max_epoch=3", "trainer.max_epoch=3 is not a key; valid: trainer.max_epochs"),
        ("++trainer.max_epoch=3", "trainer.max_epoch=3 is not a key; valid: trainer.max_epochs"),
        ("~trainer.max_epoch", "trainer.max_epoch is not a key; valid: trainer.max_epochs"),
        ("~trainer.max_steps", "trainer.max_steps is null already"),
        ("+trainr.max_epochs=3", "trainr.max_epochs=3 is not a key; valid: trainer.max_epochs"),
        ("optimizer.lrr=3", "optimizer.lrr=3 is not a key (with a + in front it is given to the _target_ as a further"),
        ("model=resnet_digits model.norms=group", "model.norms=group is not a key (with a +"),
        ("model=resnet_digits model.norms=group", r"valid: model.norm"),
        ("+optimizer.lr=3", "optimizer.lr=3 is a key already: write it without the +"),
        ("callbacks.mine=3", "callbacks.mine=3 does not exist; add a callback as +callbacks.mine={_target_: …}"),
        (
            "trainer.early_stopping.patience=3",
            "trainer.early_stopping.patience=3 is below trainer.early_stopping, which is",
        ),
        (
            "scaling.resources_per_worker.CPU=2",
            "scaling.resources_per_worker.CPU=2 is below scaling.resources_per_worker",
        ),
        ("hydra.foo=1", "hydra.foo=1 is not a key; --cfg hydra shows Hydra's own"),
        # groups
        ("optimizer=sdg", "optimizer=sdg is not a valid choice; valid: sgd, adamw"),
        ("experiment=resnt", "experiment=resnt is not a valid choice; valid: resnet, "),
        ("experiment=", "experiment= is not a valid choice; valid: "),
        ("optimizers=sgd", "optimizers=sgd is not a key; valid: optimizer"),
        ("experimnt=resnet", "experimnt=resnet is not a key; valid: experiment"),
        ("+experimnt=resnet", "experimnt=resnet is not a key; valid: experiment"),
        ("modle=mlp", "modle=mlp is not a key; valid: model"),
        ("optimzer=sgd", "optimzer=sgd is not a key; valid: optimizer"),
        ("modle.width=3", "modle.width=3 is not a key; valid: model.width"),
        ("+optimizers=sgd", "optimizers=sgd is not a key; valid: optimizer"),
        ("model=null", "model=null is a group; to choose nothing write ~model"),
        ("debug=true", "debug=true is a group: it takes the name of a choice"),
        ("~model", "model is not set; choose one of the group"),
        ("optimizer@foo=sgd", "optimizer@foo=sgd chooses from a group that no config has among its defaults"),
        ("+optimizer@foo=sgd", "foo is not a key; valid: name, seed"),
        # values that cannot be read or resolved
        ("foo", "'foo' is not key=value; a command comes first"),
        ("=3", "'=3' is not key=value"),
        ("optimizer.lr=[1", "optimizer.lr=[1 cannot be read: put text in quotes"),
        ("optimizer.lr=1,2", "optimizer.lr=1,2 is several values: as a list optimizer.lr=[1,2], as a sweep"),
        ("optimizer.lr=range(1,3)", "optimizer.lr=range(1,3) is a sweep, which needs -m first"),
        ("optimizer.lr=${x.y}", "optimizer.lr cannot be resolved: there is no key x.y"),
        (
            "name=${oc.env:NOT_SET_ANYWHERE}",
            "name cannot be resolved: the environment variable NOT_SET_ANYWHERE is not",
        ),
        ("data.train.split=${foo:3}", "data.train.split cannot be resolved: there is no resolver foo"),
        ("optimizer.lr=???", "optimizer.lr is ??? and must be given"),
        ("hydra.searchpath=[file:///not/there]", "hydra.searchpath=file:///not/there was not found"),
        ("hydra.searchpath=[pkg://not.there]", "hydra.searchpath=pkg://not.there was not found"),
        ("hydra.searchpath=3", "hydra.searchpath must be a list of strings"),
        # values that do not fit together
        (
            "trainer.max_epochs=null",
            "trainer.max_steps is not set, and neither is trainer.max_epochs nor trainer.max_time",
        ),
        ("name=../../x", "name=../../x must be letters, digits"),
        ("name=/abs", "name=/abs must be"),
        ("name=..", "name=.. must be"),
        (f"name={'x' * 101}", "name=xxx"),
        ("scaling.num_workers=[2,1]", "scaling.num_workers=[2,1] must be a number from 1, or [least, most]"),
        ("scaling.num_workers=true", "scaling.num_workers=true must be"),
        ("cluster=inline scaling.num_workers=2", "scaling.num_workers=2 must be 1 with cluster=inline"),
        (
            "data.global_batch_size=1 scaling.num_workers=2",
            "data.global_batch_size=1 is smaller than scaling.num_workers=2",
        ),
        ("cluster.address=x:1", "cluster.address=x:1 has no meaning with cluster=local; use cluster=existing"),
        ("cluster=existing cluster.address=x", "cluster.address=x must be auto or host:port (10.0.0.1:6379)"),
        ("cluster=existing cluster.address=ray://head:10001", "; cluster=job cluster.address=http://head:8265 submits"),
        ("cluster=existing cluster.address=http://x", "cluster.address=http://x must be auto or host:port"),
        ("cluster=existing cluster.address=http://x", "with cluster=existing; use cluster=job"),
        ("cluster.address=https://x", "cluster.address=https://x has no meaning with cluster=local; use cluster=job"),
        ("cluster=kuberay cluster.address=auto", "cluster.address=auto has no meaning with cluster=kuberay; use clus"),
        ("cluster=job", "cluster.address is not set: http"),
        ("cluster=job cluster.address=auto", "with cluster=job; use cluster=existing"),
        ("cluster=job cluster.address=x:8265", "; http://x:8265 or https://x:8265, or use cluster=existing"),
        ("cluster=job cluster.address=http://me:pw@x", "cluster.address=http://…@x must be http"),
        ("cluster=job cluster.address='http://x?token=pw'", "cluster.address=http://x must be http"),
        # secrets that every user of the cluster would see, and other errors
        (
            "cluster.runtime_env={env_vars:{A_TOKEN:b}}",
            "cluster.runtime_env.env_vars.A_TOKEN would be shown to everyon",
        ),
        (
            "cluster.runtime_env.env_vars.HF_KEY=b",
            "send only its name, cluster.forward_env=[HF_KEY], and set its value on the cluster",
        ),
        ("cluster.forward_env=[A] cluster.runtime_env.env_vars.A=b", "cluster.runtime_env.env_vars.A would be shown"),
        ("cluster.runtime_env={pip:[http://me:pw@x/y.whl]}", "cluster.runtime_env.pip holds a URL with a password"),
        (
            "cluster.runtime_env.env_vars.A=${oc.env:HF_TOKEN,null}",
            "cluster.runtime_env.env_vars.A would show the value of HF_TOKEN to everyone on the cluster: send only its name",
        ),
        ("trainer.precision=16-mixed optimizer.fused=false", "trainer.precision=16-mixed needs a fused optimizer"),
        ("+trainer.early_stopping.patience=3 data.val=null", "trainer.early_stopping needs data.val"),
        ("data.train=null", "data.train is not set"),
        ("data.val={path:x}", "data.val={path:x} has keys that do not exist: a + in front adds them"),
        ("~model._target_", "model has no _target_"),
        ("+callbacks.a={}", "callbacks.a has no _target_"),
    ],
)
def test_errors_are_explained(overrides: str, reason: str) -> None:
    message = refusal("experiment=mlp", *overrides.split(" "))
    assert reason in message
    assert len(message.splitlines()) == 1
    assert not re.search(r"struct|DictConfig|hydra\.cc|full_key|object_type|defaults list|OmegaConf", message)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["cluster.runtime_env={env_vars:{A:b}}"], {"env_vars": {"A": "b"}}),
        (["cluster.runtime_env.env_vars.A=b"], {"env_vars": {"A": "b"}}),
        (["+cluster.runtime_env.env_vars.A=b"], {"env_vars": {"A": "b"}}),
        (
            ["cluster.runtime_env={pip:[x]}", "cluster.runtime_env.env_vars={A:b}"],
            {"pip": ["x"], "env_vars": {"A": "b"}},
        ),
        (
            ["cluster.runtime_env.env_vars.TOKENIZERS_PARALLELISM='false'"],
            {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        ),
    ],
)
def test_a_runtime_environment_is_given_as_any_mapping(overrides: list[str], found: dict[str, Any]) -> None:
    composed = compose(["experiment=mlp", *overrides])
    assert composed.experiment.cluster.runtime_env == found
    # resume and rerun apply it to a saved config in this way.
    again = from_text(compose(["experiment=mlp"]).text, [o.lstrip("+") for o in overrides])
    assert again.experiment.cluster.runtime_env == found


def test_other_values_of_a_text() -> None:
    text = compose(["experiment=mlp", "name=one", "tracking.tracking_uri=${oc.env:NOT_SET,null}"]).text
    again = with_values(text, {"tracking.tracking_uri": "http://x", "cluster.wait": False})
    e = from_text(again).experiment
    assert (e.tracking.tracking_uri, e.cluster.wait, e.name) == ("http://x", False, "one")
    assert "NOT_SET" not in again
    assert with_values(text, {}) == text


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("postgresql://me:pw@host/db", True),
        ("--extra-index-url=https://:pw@host/simple", True),
        ("https://host:8080/a@b", False),
        ("https://TOKEN@host", True),
        ("https://${oc.env:TOKEN}@host", False),
        ("postgresql://u:p/w@h/db", True),
        ("https://host:8080/org/repository@v1", False),
        ("git+https://host/org/repository@v1", False),
        ("git+ssh://git@host/org/repository@v1", False),
        ("abfss://container@account.dfs.core.windows.net/runs", False),
        ("abfss://container:key@account.dfs.core.windows.net/runs", True),
        ("sqlite:////home/me@work/mlflow.db", False),
        ("https://${oc.env:A}:${oc.env:B}@host", False),
        ("https://me:${oc.env:B,${oc.env:C}}@host", False),
        ("a: http://x\nb: c@d", False),
    ],
)
def test_what_is_a_url_with_a_password(text: str, holds: bool) -> None:
    assert holds_password(text) is holds


def test_several_wrong_things_do_not_hide_the_choices_of_another() -> None:
    assert "valid: model.norm" in refusal("model=resnet_digits", "model.norms=group", "optimizerr=x")


@pytest.mark.parametrize("key", sorted(FOREIGN_KEYS))
def test_keys_of_other_frameworks_are_answered_with_ours(key: str) -> None:
    for name in (key, f"trainer.{key}") if "." not in key else (key,):
        message = str(unknown_key(name, 1, list(known_keys())))
        assert message.startswith(f"{name}=1 ")
        assert message.endswith(FOREIGN_KEYS[key])


@pytest.mark.parametrize(
    "override",
    ["gradient_clip_val", "+gradient_clip_val", "+trainer.gradient_clip_val", "training.steps", "+training.steps"],
)
def test_however_they_are_given(override: str) -> None:
    assert re.search(r"framework.* trainer\.max_", refusal("experiment=mlp", f"{override}=1"))


def test_the_answers_name_keys_that_exist() -> None:
    from raytrainer.config import composed_keys

    ours = {*composed_keys(["lr_scheduler=wsd"]), *composed_keys(["model=resnet_digits"]), *known_keys()}
    for key, answer in FOREIGN_KEYS.items():
        named = re.findall(
            r"\b(?:trainer|data|checkpoint|optimizer|lr_scheduler|loss|scaling|tracking|model)\.\w+(?:\.\w+)?", answer
        )
        assert set(named) <= ours, (key, set(named) - ours)
        assert named or re.match(r"(storage_path|name|seed|init_from|\w+=\w+|python -m|the dataset's)", answer), key


def test_a_key_of_ours_that_the_choice_lacks_is_not_called_foreign() -> None:
    message = refusal("experiment=mlp", "~optimizer.lr", "optimizer.lr=1")
    assert "framework" not in message


# --- a user's own project ------------------------------------------------------------------------------------------


def test_own_groups_and_experiments(in_tmp: Path) -> None:
    conf = in_tmp / "conf"
    write(conf / "model" / "tiny.yaml", "_target_: raytrainer.models.MLP\nin_features: 64\nnum_classes: 10\nwidth: 4\n")
    write(conf / "augment" / "strong.yaml", "# @package data.train\nsplit: val\n")
    write(
        conf / "experiment" / "mine.yaml",
        "# @package _global_\ndefaults:\n  - /augment: strong\n  - override /model: tiny\ntrainer:\n  max_steps: 2\n",
    )
    for e in (
        compose(["experiment=mine"], "conf").experiment,
        compose(["experiment=mine", f"hydra.searchpath=[file://{conf}]"]).experiment,
    ):
        assert e.model is not None
        assert e.model["width"] == 4
        assert e.data.train is not None
        assert e.data.train["split"] == "val"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("trainer:\n  max_stepz: 3\n", "trainer.max_stepz=3 is not a key; valid: trainer.max_steps"),
        ("trainer:\n  max_steps: abc\n", "trainer.max_steps=abc must be a whole number"),
        ("trainer:\n  gradient_clip_val: 1\n", "trainer.gradient_clip_val=1 is another framework's name; here it is"),
        ("model: 3\n", "model=3 must be a _target_ node"),
        ("trainer: {max_steps: 3\n", "mine.yaml, line 5: not valid YAML"),
        ("seed: 1\nseed: 2\n", "mine.yaml, line 5: not valid YAML: found duplicate key seed"),
        ("- a\n", "experiment is not a section"),
    ],
)
def test_their_keys_are_judged_as_ours(in_tmp: Path, text: str, reason: str) -> None:
    head = "# @package _global_\ndefaults:\n  - override /model: mlp\n"
    write(in_tmp / "conf" / "experiment" / "mine.yaml", head + text if not text.startswith("-") else text)
    message = refusal("experiment=mine", config_dir=in_tmp / "conf")
    assert reason in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("defaults", "reason"),
    [
        ("override /model: resnt", "model=resnt is not a valid choice (chosen in a config file); valid: resnet"),
        ("override /modl: mlp", "cannot be chosen: no defaults list has the group modl (in experiment/mine)"),
        ("/model: resnet18", "model is chosen twice; an experiment's file writes 'override /model: …'"),
        (
            "override /model: mlp\n  - /data: digits",
            "'override /model: …' must come last in the defaults of a config (in exper",
        ),
        (
            "override /model: on",
            "a choice in the defaults of a config is true or false (on, off, yes and no mean these, too)",
        ),
        ("/nope: x", "nope=x is not a valid choice"),
        ("/nope", "nope is not a config on the search path (chosen in experiment/mine)"),
    ],
)
def test_their_choices_are_judged_as_ours(in_tmp: Path, defaults: str, reason: str) -> None:
    write(in_tmp / "conf" / "experiment" / "mine.yaml", f"# @package _global_\ndefaults:\n  - {defaults}\n")
    assert reason in refusal("experiment=mine", config_dir=in_tmp / "conf")


def test_a_forgotten_package_line_is_explained(in_tmp: Path) -> None:
    write(in_tmp / "conf" / "experiment" / "mine.yaml", "trainer:\n  max_steps: 2\n")
    assert "must say in its first line" in refusal("experiment=mine", config_dir=in_tmp / "conf")


def test_a_choice_that_ours_would_shadow_is_refused_not_ignored(in_tmp: Path) -> None:
    write(in_tmp / "conf" / "model" / "resnet18.yaml", "_target_: mine.Net\n")
    message = refusal("experiment=mlp", "model=resnet18", config_dir=in_tmp / "conf")
    assert message.startswith("model=resnet18 is in ")
    assert "rename the file" in message
    compose(["experiment=mlp"], in_tmp / "conf")  # not chosen, so not refused


def test_no_directory(in_tmp: Path) -> None:
    assert refusal("experiment=mlp", config_dir=in_tmp / "nope").endswith("nope is not a directory")


# --- a saved config with values on top -----------------------------------------------------------------------------


@pytest.fixture
def saved() -> Composition:
    return compose(["experiment=mlp", "name=one"])


def test_values_on_a_saved_config(saved: Composition) -> None:
    e = from_text(saved.text, ["trainer.max_epochs=7", "+optimizer.amsgrad=true", "trainer.profile.start=3"]).experiment
    assert e.trainer.max_epochs == 7
    assert e.optimizer is not None
    assert e.optimizer["amsgrad"] is True
    assert e.trainer.profile is not None
    assert (e.trainer.profile.start, e.trainer.profile.steps) == (3, 5)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.max_epoch=7", "trainer.max_epoch=7 is not a key; valid: trainer.max_epochs"),
        ("+trainer.max_epoch=7", "trainer.max_epoch=7 is not a key"),
        ("optimizer.lrr=7", "optimizer.lrr=7 is not a key (with a +"),
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc must be a whole number"),
        ("trainer.max_epochs=1,2", "is a sweep; here it must be one value"),
        ("~trainer.max_epochs", "trainer.max_epochs cannot be deleted here"),
        ("abc", "'abc' is not key=value"),
        ("model=resnet18", "model=resnet18 must be a _target_ node"),
    ],
)
def test_wrong_values_on_a_saved_config(saved: Composition, override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(saved.text, [override])
    assert reason in str(caught.value)


def test_a_config_saved_before_a_key_existed_gets_its_default(saved: Composition) -> None:
    values = yaml.safe_load(saved.text)
    del values["trainer"]["nonfinite"], values["failure"]
    assert from_text(yaml.safe_dump(values)).experiment == saved.experiment


def test_flattened() -> None:
    text = "a: {b: {c: 1, d: [1, 2]}, e: {}}\nf: true\ng: null\n"
    assert flattened(text) == {"a.b.c": "1", "a.b.d": "[1, 2]", "f": "true", "g": "null"}
    # MLflow would refuse all parameters because of one such name.
    assert flattened("sweep: {space: {+model.x: '1,2', data/a@b: 3}}") == {
        "sweep.space.model.x": "1,2",
        "sweep.space.data/a_b": "3",
    }


def test_a_variable_that_only_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONLY_THERE", raising=False)
    overrides = ["experiment=mlp", "+model.key=${oc.env:ONLY_THERE}", "cluster.address=https://ray.example.com"]
    composition = compose([*overrides, "cluster=job", "cluster.forward_env=[ONLY_THERE]"])
    assert composition.experiment.model is not None
    assert composition.experiment.model["key"] == "(ONLY_THERE of the cluster)"
    assert "${oc.env:ONLY_THERE}" in composition.text
    assert "ONLY_THERE" not in os.environ
    with pytest.raises(ConfigError, match="ONLY_THERE"):
        compose([*overrides, "cluster=job"])
    with pytest.raises(ConfigError, match="ONLY_THERE"):
        compose([*overrides[:2], "cluster.forward_env=[ONLY_THERE]"])
