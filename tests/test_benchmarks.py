"""The benchmarks run. Those for GPUs run in a tiny size on the CPU, where both sides do the same work. Figures are not
checked."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import bench_checkpoint, compare_weights, report
from benchmarks.gpu import bench_gpt2, bench_resnet


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("benchmark", [bench_resnet, bench_gpt2])
def test_a_trainer_and_a_plain_loop_in_turn(benchmark: Any) -> None:
    """The comparison raises if the losses differ by more than 1e-4."""
    found = benchmark.compare(Namespace(smoke=True))
    first, last = found["loss_of_first_and_last_window"]
    assert last < first
    assert found["losses_apart_at_most"] < 1e-4
    assert found["ratio"]["runs"] == 2


def test_losses_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpt2.Gpt2, "take", lambda self, state: None)
    with pytest.raises(AssertionError, match=r"the losses are .* apart"):
        bench_gpt2.compare(Namespace(smoke=True))


def test_every_way_of_saving_a_checkpoint(tmp_path: Path) -> None:
    found = bench_checkpoint.compare(megabytes=1, rounds=1, directory=tmp_path)
    assert found["loaded_back_bit_for_bit"]
    for name in bench_checkpoint.WAYS:
        stall, committed, load = (found[name][key]["median"] for key in ("stall_s", "committed_s", "load_s"))
        assert 0 < stall <= committed
        assert load > 0
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_not_a_copy_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that keeps the state itself, and writes it later, would win every comparison."""
    saved = bench_checkpoint.TorchSave.save
    monkeypatch.setattr(
        bench_checkpoint.TorchSave, "save", lambda self, state, step: setattr(self, "_late", (state, step))
    )
    monkeypatch.setattr(bench_checkpoint.TorchSave, "wait", lambda self: saved(self, *self._late))
    with pytest.raises(AssertionError):
        bench_checkpoint.compare(megabytes=1, rounds=1, directory=tmp_path)


def test_a_result_says_how_to_get_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(sys, "argv", [f"{tmp_path}/benchmarks/gpu/bench_gpt2.py", "--rounds", "3"])
    report.write("gpu-gpt2", {"ratio": 1.0})
    found = json.loads((tmp_path / "benchmarks" / "results" / "gpu-gpt2.json").read_text())
    assert found["command"] == "python -m benchmarks.gpu.bench_gpt2 --rounds 3"
    assert found["ratio"] == 1.0
    assert os.uname().nodename not in found["machine"]


# --- comparing weights ------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def checkpoint(folder: Path, **files: Tensors) -> Path:
    """Write a checkpoint's tensors into `folder`, by the name of their file."""
    step = folder / "checkpoints" / "step-000000020"
    step.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(tensors, step / f"{name.replace('_', '-')}.safetensors")
    (step / "manifest.json").write_text("{}")
    return step


def some(**other: torch.Tensor) -> Tensors:
    weight = torch.tensor([[0.5, math.nan], [0.0, -1.0]])
    return {"model/weight": weight, "optimizer/step": torch.tensor(20), "model/half": weight.bfloat16(), **other}


def test_equal_weights_are_equal_wherever_they_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own: Tensors = {"random/torch": torch.arange(4)}
    tensors = some()
    one = checkpoint(tmp_path / "one", shared_00000=tensors, local_00000=own)
    half = {"model/half": tensors.pop("model/half")}
    other = checkpoint(tmp_path / "other", shared_00000=half, shared_00001=tensors, local_00000=own)
    assert compare_weights.last_checkpoint(tmp_path / "one") == one
    assert compare_weights.compare("mlp", one, other)
    digest = compare_weights.digest(compare_weights.read_checkpoint(other))
    assert capsys.readouterr().out == (
        f"mlp          equal: 4 tensors, 64 bytes, step-000000020, sha256 {digest[:16]}\n"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model/weight": torch.tensor([[0.5, math.nan], [-0.0, -1.0]])}, "model/weight differs in 1 of 16 bytes"),
        ({"model/half": torch.zeros(2, 2, dtype=torch.float16)}, "model/half has dtype BF16 here and F16 there"),
        ({"optimizer/step": torch.tensor([20])}, "optimizer/step has shape [] here and [1] there"),
        ({"ema/weight": torch.zeros(1)}, "ema/weight exists only there"),
    ],
)
def test_weights_that_differ_are_named(
    change: Tensors, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = checkpoint(tmp_path / "one", shared_00000=some())
    other = checkpoint(tmp_path / "other", shared_00000=some(**change))
    assert not compare_weights.compare("mlp", one, other)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("mlp          DIFFERENT in 1: 3 tensors, ")
    assert second.strip() == sentence


def test_the_ranks_and_the_parts_of_a_sharded_tensor_are_kept_apart(tmp_path: Path) -> None:
    part: Tensors = {"model/weight": torch.ones(2)}
    own: Tensors = {"random/torch": torch.arange(4)}
    step = checkpoint(tmp_path, shared_00000=part, shared_00001=part, local_00000=own, local_00001=own)
    assert sorted(compare_weights.read_checkpoint(step)) == [
        "local-00000:random/torch",
        "local-00001:random/torch",
        "model/weight@shared-00000",
        "model/weight@shared-00001",
    ]


def test_nothing_is_not_equal(tmp_path: Path) -> None:
    assert not compare_weights.compare("mlp", checkpoint(tmp_path / "one"), checkpoint(tmp_path / "other"))
    with pytest.raises(SystemExit, match="no checkpoint"):
        compare_weights.last_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(("seed", "code"), [("0", 0), ("1", 1)])
def test_the_exit_code_says_whether_all_are_equal(
    seed: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(tree: Path, folder: Path, experiment: str, overrides: Sequence[str]) -> Path:
        assert overrides[:2] == ["trainer.max_steps=20", "seed=0"]
        value = float(overrides[-1].partition("=")[2]) if experiment == "mlp" else 0.0
        return checkpoint(folder, shared_00000=some(bias=torch.tensor(value)))

    monkeypatch.setattr(compare_weights, "train", train)
    monkeypatch.setattr(compare_weights, "described", lambda commit: commit)
    monkeypatch.setattr(compare_weights, "worktree", lambda commit: nullcontext(tmp_path))
    assert compare_weights.main(["seed=0", "--there", f"seed={seed}"]) == code
