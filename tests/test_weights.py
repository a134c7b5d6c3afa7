"""Weights from other runs and files: where they are found, and which of them a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from raytrainer.checkpoint import find_weights, fit, take
from raytrainer.config import InitFrom, compose
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound, ConfigError
from raytrainer.names import match
from raytrainer.parallel import World
from raytrainer.storage import Storage
from raytrainer.trainer import Trainer
from tests.training import checkpointer, differences, experiment, fitted, weights

OWN = {"body.weight": (4, 4), "body.bias": (4,), "head.weight": (2, 4)}


# -- names -----------------------------------------------------------------------------------------------------------


def test_the_same_names_are_taken() -> None:
    found = match(OWN, dict(reversed(OWN.items())))
    assert (found.taken, found.kept, found.unused, found.problem) == ({n: n for n in sorted(OWN)}, [], [], "")
    assert found.describe_sweep() == "3 tensors taken"


def test_the_longest_beginning_is_replaced() -> None:
    there = {"model.body.weight": (4, 4), "model.body.bias": (4,), "model.score.weight": (2, 4)}
    found = match(OWN, there, mapping={"model.": "", "model.score.": "head."})
    assert found.problem == ""
    assert found.taken["head.weight"] == "model.score.weight"
    assert match({f"net.{n}": s for n, s in OWN.items()}, OWN, mapping={"": "net."}).problem == ""


def test_what_is_excluded_is_missed_nowhere() -> None:
    there = {**OWN, "head.weight": (9, 4), "head.bias": (9,)}
    assert "shapes differ: head.weight: (9, 4) there, (2, 4) here" in match(OWN, there).problem
    found = match(OWN, there, exclude=["head.*"])
    assert (found.problem, found.kept, found.unused) == ("", ["head.weight"], ["head.bias", "head.weight"])
    assert found.describe_sweep() == "2 tensors taken; as initialised: head.weight; not used: head.bias, head.weight"


def test_strict_tells_all_that_differs_at_once() -> None:
    there = {"body.weight": (4, 3), "body.bais": (4,), "head.weight": (2, 4), "extra": ()}
    problem = match(OWN, there).problem
    assert "lacks body.bias (body.bias may be its body.bais); " in problem
    assert "unexpected body.bais, extra; " in problem
    assert problem.endswith(": body.weight: (4, 3) there, (4, 4) here")
    loose = match(OWN, there, strict=False)
    assert (loose.problem, loose.taken) == ("", {"head.weight": "head.weight"})
    assert (loose.kept, loose.unused) == (["body.bias", "body.weight"], ["body.bais", "body.weight", "extra"])


def test_nothing_that_fits_is_refused_in_any_case() -> None:
    there = {f"module.{n}": s for n, s in OWN.items()}
    problem = match(OWN, there, strict=False).problem
    assert problem.startswith("has nothing that fits: ")
    assert "module.body.bias, module.body.weight, module.head.weight, " in problem
    assert problem.endswith(" body.bias, body.weight, head.weight")


def test_one_of_tied_names_is_enough() -> None:
    tied = [{"body.weight", "head.weight"}]
    own = {**OWN, "head.weight": (4, 4)}
    assert match(own, {"body.weight": (4, 4), "body.bias": (4,)}, tied=tied).problem == ""
    assert "it lacks body.weight, head.weight" in match(own, {"body.bias": (4,)}, tied=tied).problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mapping": {"modle.": ""}},
            "init_from.mapping=modle. is not a prefix of any name in the source; valid: body",
        ),
        ({"exclude": ["haed.*"]}, r"init_from.exclude=haed.\* matches no name of the model's; valid: head.\*"),
        (
            {"mapping": {"body.w": "", "head.w": ""}},
            "init_from.mapping makes eight of both body.weight and head.weight",
        ),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        match(OWN, OWN, **options)


# -- sources ---------------------------------------------------------------------------------------------------------


def stored(seed: int = 8) -> dict[str, Tensor]:
    return weights(fitted(experiment(seed=seed, trainer={"max_steps": 1}))[0])


def folder_of(kind: str, tensors: dict[str, Tensor], place: Path) -> None:
    """Write a folder as Hugging Face's `save_pretrained` does."""
    place.mkdir()
    (place / "config.json").write_text("{}")
    names = list(tensors)
    parts = [names] if "index" not in kind else [names[:2], names[2:]]
    suffix = ".safetensors" if "safetensors" in kind else ".bin"
    files = [kind] if len(parts) == 1 else [f"model-{i}{suffix}" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        some = {name: tensors[name] for name in part}
        save_file(some, place / file) if suffix == ".safetensors" else torch.save(some, place / file)
    if len(parts) > 1:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (place / kind).write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    "kind",
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"],
)
def test_a_folder_of_hugging_faces(kind: str, tmp_path: Path) -> None:
    expected = stored()
    folder_of(kind, expected, tmp_path / "there")
    for source in (tmp_path / "there", tmp_path / "there" / kind):
        found = find_weights(str(source), str(tmp_path))
        assert found.shapes() == {name: tuple(t.shape) for name, t in expected.items()}
        assert differences(found.read(), expected) == []
        assert found.place == str(tmp_path / "there" / kind)


def test_an_index_and_its_files_disagree(tmp_path: Path) -> None:
    folder_of("model.safetensors.index.json", stored(), tmp_path / "there")
    save_file({"x": torch.zeros(1)}, tmp_path / "there" / "model-1.safetensors")
    with pytest.raises(CheckpointCorrupt, match=r"model-1\.safetensors lacks head\.bias, head\.weight"):
        find_weights(str(tmp_path / "there"), "").shapes()
    (tmp_path / "there" / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"index\.json lists model-1\.safetensors"):
        find_weights(str(tmp_path / "there"), "").read()


def test_no_pickle_but_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Path("x")}, tmp_path / "model.bin")
    with pytest.raises(CheckpointCorrupt, match=r"model\.bin .*Weights only load failed"):
        find_weights(str(tmp_path / "model.bin"), "").read()


def test_a_run_by_name_by_id_and_a_trial(tmp_path: Path) -> None:
    saved = checkpointer(World(), tmp_path / "runs" / "one" / "checkpoints")
    trial = checkpointer(World(), tmp_path / "runs" / "many" / "trials" / "0003" / "checkpoints")
    first, second = fitted(experiment(), checkpointer=saved)[0], fitted(experiment(seed=5), checkpointer=trial)[0]
    runs = str(tmp_path / "runs")
    known = {"8c2f": str(tmp_path / "runs" / "one")}
    for source in ("one", "8c2f"):
        found = find_weights(source, runs, known.get)
        assert found.place == str(tmp_path / "runs" / "one" / "checkpoints" / "step-000000004")
        assert found.shapes() == {name: tuple(t.shape) for name, t in weights(first).items()}
        assert differences(found.read(), weights(first)) == []
    assert differences(find_weights("many.0003", runs).read(), weights(second)) == []
    with pytest.raises(CheckpointNotFound, match=r"^init_from=many: no weights file"):
        find_weights("many", runs, known.get)


def test_in_s3(in_s3: str) -> None:
    expected = stored()
    storage = Storage(in_s3)
    place = storage.uri.partition("?")[0]
    storage.write_bytes("hub/model.safetensors", save(expected))
    for source in (f"{place}/hub", f"{place}/hub/model.safetensors"):
        found = find_weights(source, in_s3)
        assert found.shapes() == {name: tuple(t.shape) for name, t in expected.items()}
        assert differences(found.read(), expected) == []


# -- a model ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_of_a_model_on_the_meta_device_too() -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tied()
        assert fit(model, {"embed.weight": (5, 3)}, InitFrom()).problem == ""
        assert fit(model, {"head.weight": (5, 3)}, InitFrom()).problem == ""
        assert "it lacks" in fit(model, {}, InitFrom(strict=True)).problem


def test_two_tensors_for_one_must_be_equal(tmp_path: Path) -> None:
    both = {"embed.weight": torch.randn(5, 3), "head.weight": torch.randn(5, 3)}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointCorrupt, match=r"different values for embed\.weight and head\.weight"):
        take(Tied(), find_weights(str(tmp_path), ""), InitFrom())
    save_file({**both, "head.weight": both["embed.weight"].clone()}, tmp_path / "model.safetensors")
    tensors, words = take(Tied(), find_weights(str(tmp_path), ""), InitFrom())
    assert torch.equal(tensors["head.weight"], both["embed.weight"])
    assert words == f"weights of {tmp_path}/model.safetensors: 2 tensors taken"


def test_a_part_is_taken_and_the_rest_stays_as_initialised(tmp_path: Path) -> None:
    expected = stored()
    save_file({f"encoder.{n}": t for n, t in expected.items()}, tmp_path / "model.safetensors")
    trainer, fresh = Trainer(experiment(trainer={"ema_decay": 0.9})), Trainer(experiment())
    before = weights(fresh)
    told = trainer.init_from(
        InitFrom(source=str(tmp_path / "model.safetensors"), mapping={"encoder.": ""}, exclude=["head.*"])
    )
    assert told == (
        f"weights of {tmp_path}/model.safetensors: 2 tensors taken; as initialised: head.bias, head.weight; "
        "not used: encoder.head.bias, encoder.head.weight"
    )
    after = weights(trainer)
    assert (
        differences({n: after[n] for n in after if "hidden" in n}, {n: expected[n] for n in after if "hidden" in n})
        == []
    )
    assert differences({n: after[n] for n in after if "head" in n}, {n: before[n] for n in after if "head" in n}) == []
    assert trainer.ema_model is not None
    assert differences(dict(trainer.ema_model.state_dict()), after) == []


def test_as_a_key(in_tmp: Path) -> None:
    (in_tmp / "hub").mkdir()
    given = "init_from={source: hub, strict: false, exclude: [head.*], mapping: {model: body}}"
    found = compose(["experiment=mlp", given]).experiment.init_from
    assert found == InitFrom(source=str(in_tmp / "hub"), strict=False, exclude=["head.*"], mapping={"model": "body"})
    assert compose(["experiment=mlp", "init_from=hub"]).experiment.init_from == InitFrom(source=str(in_tmp / "hub"))
    for wrong, message in (
        ("init_from={source: hub, stric: true}", "init_from.stric=true is not a key; valid: init_from.strict"),
        ("init_from={strict: true}", "init_from.source is not set"),
        ("init_from={source: hub, exclude: head}", "init_from.exclude=head must be a list of patterns"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose(["experiment=mlp", wrong])


def test_the_password_of_a_source_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("raytrainer.checkpoint.weights._at", lambda place, storage_path: None)
    with pytest.raises(CheckpointNotFound, match=r"^init_from=s3://bucket/run: no weights"):
        find_weights("s3://me:hidden@bucket/run", str(tmp_path))
