"""Checkpoints on one process: what is saved is loaded exactly, in spite of torn, tampered or hostile files, full disks
and kills. Tests with several ranks are in test_checkpoint_ranks.py, which also records the fixture of format version
1."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.checkpoint import Checkpointer, CheckpointInfo, checkpoint_files, manifest, tensors, tree, unread
from raytrainer.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound, StorageError, StorageFull
from raytrainer.storage import Storage
from tests.test_storage import tiny_disk


def state(value: float = 1.0, size: int = 8) -> dict[str, Any]:
    return {"model": {"weight": torch.full((size, 3), float(value)), "bias": torch.arange(3)}, "epoch": int(value)}


def checkpointer(root: Path | Storage, **options: Any) -> Checkpointer:
    return Checkpointer(root if isinstance(root, Storage) else Storage(root), **options)


def saved(root: Path | Storage, steps: int = 1, **options: Any) -> Checkpointer:
    """Save steps 1, 2, …, each with its step as the value. Return the checkpointer."""
    made = checkpointer(root, num_to_keep=None, **options)
    for step in range(1, steps + 1):
        made.save(step, state(step), {"rank": 0})
    made.wait()
    return made


def latest(made: Checkpointer) -> CheckpointInfo:
    info = made.latest()
    assert info is not None
    return info


def names_in(storage: Storage) -> list[str]:
    return [entry.name for entry in storage.list()]


def directories(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# -- saving and loading ------------------------------------------------------------------------------------------


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (16, 16), dtype=torch.uint8, generator=generator)
    shared = {
        "dtypes": {name: bits[:8].contiguous().view(dtype) for name, dtype in tensors.DTYPES.items() if name != "bool"},
        "bool": bits > 100,
        "shapes": [torch.tensor(3.0), torch.empty(0), torch.empty(2, 0, 3), torch.ones(1, 1, 1)],
        "strided": (bits.t(), bits[::2, 1::3], torch.ones(1).expand(5)),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "special": torch.tensor([math.nan, math.inf, -0.0]),
        "plain": [None, True, 7, -(10**30), 0.1, math.nan, math.inf, -math.inf, "é\ud800\0", (), (1, (2.5,)), [], {}],
        "keys": {0: "int", "0": "str", -1: torch.ones(1), "a/b": torch.zeros(1), "a": {"b": torch.ones(2)}, "~1": 1},
        "$float": "not one",
        "nested": {"$tensor": "not one", "$tuple": [1]},
    }
    local = {"random": random.Random(0).getstate(), "torch": torch.get_rng_state()}
    made = checkpointer(tmp_path)
    made.save(3, shared, local, metric=0.5)
    made.wait()
    got, got_local = made.load(latest(made))

    def same(a: Any, b: Any) -> None:
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a.detach().contiguous().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                same(a[key], b[key])
        elif isinstance(a, list | tuple):
            assert type(a) is type(b)
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                same(x, y)
        else:
            assert type(a) is type(b)
            assert a == b or (a != a and b != b)

    same(shared, got)
    same(local, got_local)


def test_what_is_not_wanted_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpointer(tmp_path)
    made.save(3, {"model": {"a": torch.ones(3)}, "optimizer": {"state": {"a": [torch.ones(4), 7]}}}, {})
    made.wait()
    pieces: list[tensors.Piece] = []
    read = tensors.read_pieces

    def noted(file: Any, begin: int, wanted: list[tensors.Piece]) -> None:
        pieces.extend(wanted)
        read(file, begin, wanted)

    monkeypatch.setattr(tensors, "read_pieces", noted)
    got, _ = made.load(latest(made), {"optimizer": unread})
    assert torch.equal(got["model"]["a"], torch.ones(3))
    assert (got["optimizer"]["state"]["a"][0].shape, got["optimizer"]["state"]["a"][1]) == ((4,), 7)
    assert [piece.nbytes for piece in pieces] == [12]


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers() | st.sampled_from(["$tuple", "$items", "$float", "$tensor"])
trees = st.recursive(
    leaves,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=3) | st.tuples(below, below),
    max_leaves=8,
)


@given(st.dictionaries(keys, trees, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_json_like_state_comes_back(value: dict[Any, Any]) -> None:
    text, none = tree.flatten(value)
    assert none == {}
    assert tree.restore(text, lambda *_: torch.empty(0)) == value


def test_what_json_lacks_comes_back_in_its_own_type(tmp_path: Path) -> None:
    value: dict[str, Any] = {
        "bytes": [b"\x00\xff", bytearray(b"ab"), b""],
        "sets": [{1, 2}, frozenset({"a", (1, 2)}), set()],
        "dicts": [OrderedDict(b=1, a=2), Counter({3: 1}), defaultdict(list, a=[1]), defaultdict(None)],
        "deque": deque([1, 2], maxlen=3),
        "numbers": [1 + 2j, np.float32(0.1), np.int64(-3), np.bool_(True), np.datetime64("2026-11-30")],
        "dates": [datetime(2026, 11, 30, 8, tzinfo=UTC), date(2026, 11, 30), timedelta(1, 2, 3)],
        "torch": [torch.Size([1, 2]), torch.bfloat16, torch.device("cpu")],
        "keys": {1: "a", "1": "b", (1, "x"): "c", 1.5: "d", None: "e", b"k": "f", np.int64(7): "g"},
    }
    arrays = {
        "columns": np.arange(6).reshape(2, 3)[:, ::-1],
        "words": np.array(["ab", "c"]),
        "big endian": np.arange(3).astype(">i4"),
        "empty": np.zeros((0, 2), dtype=np.uint16),
        "number": np.array(2.5),
    }
    tied = {"same": {1: torch.ones(1), "1": torch.zeros(1)}}  # two paths with the same text
    made = checkpointer(tmp_path)
    made.save(1, {**value, "arrays": arrays, **tied}, {})
    shared, _ = made.load(latest(made))
    got, same = shared.pop("arrays"), shared.pop("same")
    assert shared == value
    assert [type(v) for v in shared["dicts"]] == [OrderedDict, Counter, defaultdict, defaultdict]
    assert list(shared["dicts"][0]) == ["b", "a"]
    assert [v.default_factory for v in shared["dicts"][2:]] == [list, None]
    assert [type(v) for v in shared["numbers"]] == [type(v) for v in value["numbers"]]
    assert [type(v) for v in shared["bytes"]] == [bytes, bytearray, bytes]
    assert shared["deque"].maxlen == 3
    assert {name: (a.dtype, a.tolist()) for name, a in got.items()} == {
        name: (a.dtype, a.tolist()) for name, a in arrays.items()
    }
    assert (same[1].item(), same["1"].item()) == (1, 0)


def test_a_state_dict_keeps_its_versions(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model: Any = torch.nn.BatchNorm1d(2)
    made = checkpointer(tmp_path)
    made.save(1, {"model": {"net": model.state_dict()}}, {})
    shared, _ = made.load(latest(made))
    assert shared["model"]["net"]._metadata == model.state_dict()._metadata == {"": {"version": 2}}
    assert "model/net/weight" in load_file(tmp_path / "step-000000001" / "shared-00000.safetensors")


@pytest.mark.parametrize(
    "node", [{"$dtype": "load"}, {"$bytes": "*"}, {"$defaultdict": {}, "of": "eval"}, {"$date": "x"}]
)
def test_a_type_that_is_none_is_corrupt(node: Any) -> None:
    with pytest.raises(CheckpointCorrupt, match="not a state"):
        tree.restore(json.dumps({"a": node}).encode(), lambda *_: torch.empty(0))


def test_optimizers_state_comes_back_as_it_is(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    made = checkpointer(tmp_path)
    made.save(1, {"optimizer": optimizer.state_dict()}, {})
    other = torch.optim.AdamW(torch.nn.Linear(4, 2).parameters(), lr=9.0)
    other.load_state_dict(made.load(latest(made))[0]["optimizer"])
    assert str(other.state_dict()) == str(optimizer.state_dict())


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    saved(tmp_path)
    weights = load_file(tmp_path / "step-000000001" / "shared-00000.safetensors")
    assert torch.equal(weights["model/weight"], torch.ones(8, 3))
    assert torch.equal(weights["model/bias"], torch.arange(3))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ({object(): 0}, "object"),
        ({1, object()}, "object"),
        (torch.ones(2).to_sparse(), "sparse"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_path(tmp_path: Path, value: Any, kind: str) -> None:
    made = saved(tmp_path)
    with pytest.raises(CheckpointError, match=rf"callbacks/0/x.*{kind}"):
        made.save(2, {"callbacks": [{"x": value}]}, {})
    made.save(3, state(3), {})
    assert latest(made).step == 3
    assert directories(tmp_path) == ["step-000000001", "step-000000003"]


def test_templates_are_filled_in_place(tmp_path: Path) -> None:
    made = saved(tmp_path)
    weight, column = torch.zeros(8, 3), torch.zeros(3, 2, dtype=torch.int64)
    template = {"model": {"weight": weight, "bias": column[:, 0]}}
    shared, _ = made.load(latest(made), template)
    assert shared["model"]["weight"] is weight
    assert torch.equal(weight, torch.ones(8, 3))
    assert torch.equal(column, torch.tensor([[0, 0], [1, 0], [2, 0]]))
    for wrong in (torch.zeros(8, 4), torch.zeros(8, 3, dtype=torch.float64)):
        with pytest.raises(CheckpointError, match=r"model/weight is float32 \[8, 3\] .*and float"):
            made.load(latest(made), {"model": {"weight": wrong}})


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_BLOCK", 64)
    monkeypatch.setattr(tensors, "_ALONE", 200)
    monkeypatch.setattr(tensors, "_GAP", 8)
    monkeypatch.setattr(checkpoint_files, "_BLOCK", 10)
    shared = {str(i): torch.arange(i * 3, dtype=torch.int16) for i in range(60)}
    made = checkpointer(tmp_path)
    made.save(1, shared, {})
    template = {"50": torch.zeros(150, dtype=torch.int16), "7": torch.zeros(21, dtype=torch.int16)}
    got, _ = made.load(latest(made), template)
    assert all(torch.equal(got[key], shared[key]) for key in shared)
    assert torch.equal(template["50"], shared["50"])


@pytest.mark.parametrize("storage", ["pyarrow", "s3"], indirect=True)
def test_a_uri_gets_the_same(storage: Storage) -> None:
    made = checkpointer(storage.child("run"), num_to_keep=1)
    for step in (1, 2, 3):
        made.save(step, state(step), {"rank": 0}, metric=-step)
    made.wait()
    assert [info.step for info in made.list()] == [1, 3]
    assert names_in(storage.child("run")) == ["step-000000001", "step-000000003"]
    shared, local = checkpointer(storage.child("run")).load(latest(made))
    assert torch.equal(shared["model"]["weight"], torch.full((8, 3), 3.0))
    assert local == {"rank": 0}
    assert latest(made).path == f"{storage.child('run').uri}/step-000000003"


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_what_is_torn_in_a_store_is_no_checkpoint(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    saved(storage, steps=3)
    name = "step-000000003/shared-00000.safetensors"
    data = storage.read_bytes(name)
    storage.write_bytes(name, data[:-1] + bytes([data[-1] ^ 1]))
    # What a killed save leaves: files without a manifest.
    storage.write_bytes("step-000000002.1/shared.json", b"{")
    fresh = checkpointer(storage, num_to_keep=1)
    with caplog.at_level(logging.WARNING, logger="raytrainer"):
        assert latest(fresh).name == "step-000000002"
    assert f"{storage.uri}/{name} does not have the checksum" in caplog.text
    fresh.save(3, state(30), {})
    fresh.wait()
    assert names_in(storage) == ["step-000000003.1"]


# -- while training continues ------------------------------------------------------------------------------------


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make saves wait before their first byte until the block ends."""
    go, write = threading.Event(), checkpoint_files.write

    def wait_and_write(*args: Any) -> Any:
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint_files, "write", wait_and_write)
    try:
        yield
    finally:
        go.set()


def test_what_changes_after_save_is_not_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, shared = checkpointer(tmp_path), state(1)
    local: dict[str, Any] = {"counts": torch.zeros(3), "list": [1]}
    with held_back(monkeypatch):
        made.save(1, shared, local)
        shared["model"]["weight"].fill_(99)
        shared["epoch"] = 99
        local["counts"] += 1
        local["list"].append(2)
        assert made.list() == []
    got, got_local = made.load(latest(made))
    assert torch.equal(got["model"]["weight"], torch.ones(8, 3))
    assert got["epoch"] == 1
    assert got_local is not None
    assert torch.equal(got_local["counts"], torch.zeros(3))
    assert got_local["list"] == [1]


def test_memory_is_kept_and_grows(tmp_path: Path) -> None:
    made = checkpointer(tmp_path)
    for step, size in enumerate([10, 1000, 3, 3_000_000, 20]):
        made.save(step, state(step, size), {})
        assert torch.equal(made.load(latest(made))[0]["model"]["weight"], torch.full((size, 3), float(step)))


def test_commits_are_reported(tmp_path: Path) -> None:
    told: list[CheckpointInfo] = []
    made = checkpointer(tmp_path, on_commit=told.append)
    made.save(1, state(), {}, metric=math.nan)
    made.close()
    assert [(info.step, info.path, info.world_size) for info in told] == [(1, str(tmp_path / "step-000000001"), 1)]
    assert math.isnan(told[0].metric or 0)
    assert made.list()[0].created == told[0].created


def test_a_synchronous_save_is_committed_when_it_returns(tmp_path: Path) -> None:
    made = checkpointer(tmp_path, async_save=False)
    assert made.save(1, state(), {}) > 0
    assert [info.step for info in checkpointer(tmp_path).list()] == [1]


@pytest.mark.parametrize("options", [{"mode": "biggest"}, {"num_to_keep": 0}, {"world_size": 2}, {"rank": 1}])
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        checkpointer(tmp_path, **options)


# -- which checkpoints are kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "keep", "metrics", "left", "best"),
    [
        ("max", 2, [0.1, 0.9, 0.3, 0.4, 0.5], [2, 4, 5], 2),
        ("min", 1, [0.1, 0.9, 0.3, 0.4, 0.5], [1, 5], 1),
        ("max", 1, [math.nan, math.nan, math.nan], [3], None),
        ("max", 1, [0.2, math.nan, math.inf, None], [1, 4], 1),
        ("min", 1, [0.2, math.nan, -math.inf, None], [1, 4], 1),
        ("max", 1, [0.5, 0.5, 0.5], [1, 3], 1),
        ("max", None, [3, 2, 1], [1, 2, 3], 1),
    ],
)
def test_the_newest_and_the_best_stay(
    tmp_path: Path, mode: str, keep: int | None, metrics: list[float | None], left: list[int], best: int | None
) -> None:
    made = checkpointer(tmp_path, mode=mode, num_to_keep=keep)
    for step, metric in enumerate(metrics, start=1):
        made.save(step, state(step), {}, metric=metric)
    made.wait()
    assert [info.step for info in made.list()] == left
    assert len(directories(tmp_path)) == len(left)
    winner = made.best()
    assert (None if winner is None else winner.step) == best


def test_a_step_saved_again_replaces_the_first_one_only_when_it_is_committed(tmp_path: Path) -> None:
    made = saved(tmp_path)
    made.save(1, state(7), {})
    made.wait()
    assert directories(tmp_path) == ["step-000000001.1"]
    assert made.load(latest(made))[0]["epoch"] == 7
    assert [info.name for info in made.list()] == ["step-000000001.1"]


def test_unfinished_saves_are_ignored_and_swept_when_passed(tmp_path: Path) -> None:
    made = saved(tmp_path, steps=1)
    for name in ("step-000000002", "step-000000009", "step-000000001.5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared.json").write_text("{")
    others = ["other", "step-7", "step-000000001-x", "manifest.json"]
    for name in others:
        (tmp_path / name).mkdir()
    assert latest(made).step == 1
    made.save(2, state(2), {})
    made.wait()
    # Step 9 is later than the last save, so it may still be in progress.
    assert directories(tmp_path) == sorted(["step-000000001", "step-000000002.1", "step-000000009", *others])


def test_a_link_is_no_checkpoint_and_nothing_behind_it_is_deleted(tmp_path: Path) -> None:
    saved(tmp_path / "other")
    made = saved(tmp_path / "mine")
    (tmp_path / "mine" / "step-000000000").symlink_to(tmp_path / "other" / "step-000000001")
    made = checkpointer(tmp_path / "mine", num_to_keep=1)
    made.save(2, state(2), {})
    made.wait()
    assert [info.step for info in made.list()] == [2]
    assert latest(checkpointer(tmp_path / "other")).step == 1
    with pytest.raises(CheckpointError):
        checkpoint_files.delete(Storage(tmp_path), "other")


# -- torn, tampered or hostile files -----------------------------------------------------------------------------

FILES = ["manifest.json", "shared.json", "shared-00000.safetensors", "local-00000.json"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    made = saved(tmp_path, steps=3)
    newest = made.list()[-1]
    damage(tmp_path / "step-000000003" / name)
    fresh = checkpointer(tmp_path, num_to_keep=1)
    gone = name == "manifest.json" and damage is Path.unlink  # a kill leaves no manifest, so this is not a checkpoint
    with caplog.at_level(logging.WARNING, logger="raytrainer"):
        assert latest(fresh).step == 2
    assert (f"step-000000003/{name}" in caplog.text) == (not gone)
    if not gone:
        with pytest.raises(CheckpointCorrupt, match=name):
            checkpointer(tmp_path).load(newest)
    # A damaged checkpoint does not count among those to keep, and is deleted when training has passed it.
    fresh.save(3, state(30), {})
    fresh.wait()
    assert directories(tmp_path) == ["step-000000003.1"]


def test_where_every_checkpoint_is_corrupt_nothing_starts_anew_in_silence(tmp_path: Path) -> None:
    made = saved(tmp_path, steps=2)
    assert checkpointer(tmp_path / "none").latest() is None
    for step in (1, 2):
        flip(tmp_path / f"step-00000000{step}" / "shared.json")
    with pytest.raises(CheckpointCorrupt, match=r"no checkpoint in .*step-000000002/shared.json.*step-000000001"):
        made.latest()
    assert made.latest(verify=False) == made.list()[-1]


def test_a_checkpoint_that_is_gone_is_not_found(tmp_path: Path) -> None:
    made = saved(tmp_path)
    info = latest(made)
    (tmp_path / "step-000000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointNotFound, match="step-000000001"):
        made.load(info)
    with pytest.raises(CheckpointNotFound):
        made.load(CheckpointInfo(1, f"{tmp_path}/../etc", None, 1, ""))


def test_an_unknown_format_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    made = saved(tmp_path, steps=2)
    place = tmp_path / "step-000000001" / "manifest.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "version": 2}))
    for action in (made.list, made.latest, made.best):
        with pytest.raises(CheckpointCorrupt, match="format version 2; this raytrainer reads version 1"):
            action()
    made = checkpointer(tmp_path, num_to_keep=1)
    made.save(3, state(3), {})
    made.wait()
    assert directories(tmp_path) == ["step-000000001", "step-000000003"]


def recommit(directory: Path) -> None:
    """Do what an attacker with write access can do: fit the manifest to the files."""
    import hashlib

    old = manifest.decode((directory / "manifest.json").read_bytes(), "")
    listed = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in directory.iterdir()
        if path.name != "manifest.json"
    }
    new = manifest.Manifest(old.step, old.metric, old.world_size, old.created, listed)
    (directory / "manifest.json").write_bytes(manifest.encode(new))


class Bomb:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.flag,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("committed", [True, False])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, name: str, form: str, committed: bool) -> None:
    flag = tmp_path / "executed"
    made = saved(tmp_path / "run")
    info = latest(made)
    place = tmp_path / "run" / "step-000000001" / name
    if form == "pickle":
        place.write_bytes(pickle.dumps(Bomb(flag)))
    else:
        torch.save(Bomb(flag), place)
    if committed and name != "manifest.json":
        recommit(place.parent)
        with pytest.raises(CheckpointCorrupt, match="step-000000001"):
            checkpointer(tmp_path / "run").load(latest(checkpointer(tmp_path / "run")))
    with pytest.raises(CheckpointCorrupt):
        made.load(info) if name == "manifest.json" else checkpointer(tmp_path / "run").load(info)
    assert not flag.exists()
    pickle.loads(pickle.dumps(Bomb(flag)))
    assert flag.exists(), "the bomb is a dud, and the test with it"


def test_no_module_of_the_package_can_unpickle() -> None:
    for module in (checkpoint_files, manifest, tensors, tree):
        source = Path(str(module.__file__)).read_text()
        assert "import pickle" not in source
        assert "torch.load" not in source


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b", "", ".hidden", "x" * 300])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    place = tmp_path / "step-000000001" / "manifest.json"
    old = manifest.decode(place.read_bytes(), "")
    old.files[name] = (1, "0" * 64)
    place.write_bytes(manifest.encode(old))
    with pytest.raises(CheckpointCorrupt, match="is not a valid file name"):
        checkpointer(tmp_path).latest()


@pytest.mark.parametrize(
    "change",
    [
        lambda header, boxes: header["a"].update(data_offsets=[0, 10**12]),
        lambda header, boxes: header["a"].update(data_offsets=[-16, 0]),
        lambda header, boxes: header["a"].update(data_offsets=[1, 17]),
        lambda header, boxes: header.pop("a"),
        lambda header, boxes: boxes.pop("a"),
        lambda header, boxes: boxes.update(a=["float32", [4], [2], [4]]),
        lambda header, boxes: boxes.update(a=["float32", [10**12], [0], [10**12]]),
        lambda header, boxes: boxes.update(a=["float32", [4], [-1], [4]]),
        lambda header, boxes: boxes.update(a=["float32", [4.0], [0], [4]]),
        lambda header, boxes: boxes.update(a=["object", [4], [0], [4]]),
        lambda header, boxes: boxes.update(a=["float64", [2], [0], [2]]),
        lambda header, boxes: boxes.update(a=["float32", [2, 2], [0], [2, 2]]),
        lambda header, boxes: boxes.update(a="float32"),
    ],
)
def test_a_hostile_header_is_corrupt(tmp_path: Path, change: Callable[[Any, Any], Any]) -> None:
    made = checkpointer(tmp_path)
    made.save(1, {"a": torch.ones(4), "b": torch.ones(4)}, {})
    made.wait()
    place = tmp_path / "step-000000001" / "shared-00000.safetensors"
    data = place.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    boxes = json.loads(header["__metadata__"]["boxes"])
    change(header, boxes)
    header["__metadata__"]["boxes"] = json.dumps(boxes)
    text = json.dumps(header).encode()
    place.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    recommit(place.parent)
    with pytest.raises(CheckpointCorrupt, match="step-000000001"):
        made.load(latest(made))


def test_a_state_that_claims_a_huge_tensor_is_corrupt(tmp_path: Path) -> None:
    saved(tmp_path)
    place = tmp_path / "step-000000001" / "shared.json"
    for claim in ({"shape": [10**12]}, {"shape": [-1]}, {"shape": ["x"]}, {"dtype": "object"}, {"$tensor": "nowhere"}):
        text = json.loads(place.read_text())
        text["model"]["weight"].update(claim)
        place.write_text(json.dumps(text))
        recommit(place.parent)
        with pytest.raises(CheckpointCorrupt):
            checkpointer(tmp_path).load(latest(checkpointer(tmp_path)))
    place.write_text("[" * 100_000)
    recommit(place.parent)
    with pytest.raises(CheckpointCorrupt):
        checkpointer(tmp_path).load(latest(checkpointer(tmp_path)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_the_bytes_is_corrupt_or_harmless(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        saved(Path(root))
        directory = Path(root) / "step-000000001"
        place = directory / data.draw(st.sampled_from(FILES[1:]))
        content = bytearray(place.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        place.write_bytes(content)
        recommit(directory)
        made = checkpointer(Path(root))
        with suppress(CheckpointCorrupt):
            made.load(latest(made))


# -- errors and kills --------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_at_the_next_save_and_costs_no_older_checkpoint(tmp_path: Path) -> None:
    with tiny_disk(tmp_path, kib=1024) as place:
        made = checkpointer(place)
        made.save(1, state(1), {})
        made.save(2, state(2, size=200_000), {})
        with pytest.raises(StorageFull, match=f"no space at {place}/step-000000002"):
            made.save(3, state(3), {})
        assert directories(place) == ["step-000000001"]  # the space is freed at once
        assert latest(made).step == 1
        made.save(4, state(4), {})
        assert latest(made).step == 4
        made.save(5, state(5, size=200_000), {})
        with pytest.raises(StorageFull):
            made.close()


def test_an_error_of_the_thread_is_raised_once_by_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path)

    @contextmanager
    def fails(storage: Storage, rel: str) -> Iterator[BinaryIO]:
        raise StorageError(f"{storage.where(rel)}: gone")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open_write", fails)
        made.save(2, state(2), {})
        with pytest.raises(StorageError, match=r"step-000000002/.*: gone"):
            made.wait()
    made.wait()
    assert latest(made).step == 1


def test_what_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, steps=2)
    made = checkpointer(tmp_path, num_to_keep=1)

    def refuse(storage: Storage, rel: str) -> None:
        raise StorageError(f"{storage.where(rel)}: not permitted")

    monkeypatch.setattr(Storage, "delete", refuse)
    made.save(3, state(3), {})
    made.wait()
    assert latest(made).step == 3
    assert "not permitted" in caplog.text


_KILLED_AT_EACH_CALL = """
    # Forks a child for each call that touches the disk, which kills itself there in the middle of its second save.
    import os, signal, sys
    from pathlib import Path
    import torch
    from raytrainer.checkpoint import Checkpointer
    from raytrainer.storage import Storage
    torch.set_num_threads(1)
    CALLS = ("fsync", "replace", "mkdir", "unlink", "rmdir", "open", "scandir")

    def save(root, kill_at):
        made = Checkpointer(Storage(root), num_to_keep=1, async_save=False)
        calls = 0
        def counted(call):
            def count(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return count
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        made.save(2, {"weight": torch.full((1000,), 2.0)}, {"rank": 0})
        return calls

    root = Path(sys.argv[1])
    kill_at, done, seen = 0, False, set()
    while not done:
        kill_at += 1
        place = root / str(kill_at)
        first = Checkpointer(Storage(place), num_to_keep=1, async_save=False)
        first.save(1, {"weight": torch.full((1000,), 1.0)}, {"rank": 0})
        pid = os.fork()
        if pid == 0:
            save(place, kill_at)
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        made = Checkpointer(Storage(place), num_to_keep=1, async_save=False)
        info = made.latest()
        shared, _ = made.load(info)
        assert info.step in (1, 2) and torch.equal(shared["weight"], torch.full((1000,), float(info.step))), kill_at
        seen.add(info.step)
        made.save(3, shared, {"rank": 0})
        assert [path.name for path in place.iterdir()] == ["step-000000003"], (kill_at, list(place.iterdir()))
    assert seen == {1, 2}
    print(kill_at)
"""


def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_KILLED_AT_EACH_CALL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


_SAVES_FOR_EVER = """
    import sys, itertools, torch
    from raytrainer.checkpoint import Checkpointer
    from raytrainer.storage import Storage
    made = Checkpointer(Storage(sys.argv[1]), num_to_keep=2)
    for step in itertools.count(1):
        made.save(step, {"weight": torch.full((100_000,), float(step))}, {"rank": torch.tensor(step)})
        print(step, flush=True)
"""


@pytest.mark.parametrize(("storage", "attempts"), [("local", 3), ("s3", 2)], indirect=["storage"])
def test_a_kill_at_a_random_moment_leaves_whole_checkpoints(storage: Storage, attempts: int) -> None:
    for attempt in range(attempts):
        place = storage.child(str(attempt))
        command = [sys.executable, "-c", textwrap.dedent(_SAVES_FOR_EVER), place.uri]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(random.randint(3, 20)):
                told = int(process.stdout.readline())
            threading.Event().wait(random.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            told = max([told, *map(int, process.stdout.read().split())])
        made = checkpointer(place)
        info = latest(made)
        assert info.step >= told - 1  # all but the one in progress
        for item in made.list():
            shared, local = made.load(item)
            assert torch.equal(shared["weight"], torch.full((100_000,), float(item.step)))
            assert local is not None
            assert local["rank"] == item.step
