"""The benchmarks run. Those for GPUs run in a tiny size on the CPU, where both sides do the same work. Figures are not
checked."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_checkpoint, report
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
