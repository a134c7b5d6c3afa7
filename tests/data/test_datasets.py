"""Columns and digits: gathered as whole batches, not copied without need, and always split the same way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from raytrainer.data import Arrays, Digits, datasets
from raytrainer.data.datasets import columns_of
from raytrainer.errors import ConfigError, DataError


def test_arrays_share_memory_with_what_was_given() -> None:
    values = np.arange(6.0)
    dataset = Arrays({"x": values, "y": torch.arange(6)})
    values[2] = 50
    assert dataset[2]["x"] == 50
    assert len(dataset) == 6
    assert dataset[-1]["y"] == 5
    with pytest.raises(IndexError, match="sample 6 of 6"):
        dataset[6]
    batch = dataset.__getitems__([4, 0, 4])
    assert {name: column.tolist() for name, column in batch.items()} == {"x": [4, 0, 4], "y": [4, 0, 4]}


def test_read_only_arrays_are_copied_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    values = np.arange(3)
    values.setflags(write=False)
    assert Arrays({"x": values})[1]["x"] == 1
    assert not recwarn.list


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "at least one column"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, "differ in length: {'x': 3, 'y': 4}"),
        ({"x": np.zeros((0, 3))}, "no rows"),
        ({"x": np.array(1.0)}, "no rows"),
        ({"x": np.array(["a"])}, "column 'x' has dtype <U1"),
    ],
)
def test_arrays_that_cannot_be(columns: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Arrays(columns)


def test_digits() -> None:
    train, val = Digits(), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    image = train.tensors["image"]
    assert image.shape == (1437, 1, 8, 8)
    assert image.dtype == torch.float32
    assert image.mean().abs() < 1e-6
    assert abs(image.std().item() - 1) < 1e-3
    shares = val.tensors["label"].bincount() / (train.tensors["label"].bincount() + val.tensors["label"].bincount())
    assert (shares - 0.2).abs().max() < 0.01  # stratified


def test_digits_agree_with_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    both = torch.cat([Digits(split).tensors["label"] for split in ("train", "val")])
    assert sorted(both.tolist()) == sorted(labels.tolist())
    rows = {tuple(row) for row in pixels.astype(int).tolist()}
    train = Digits().tensors["image"].reshape(-1, 64)
    scale = 16 / (train.max() - train.min())
    back = ((train - train.min()) * scale).round().int()
    assert all(tuple(row) in rows for row in back.tolist())


def test_digits_need_no_import_of_scikit_learn() -> None:
    code = "import sys; from raytrainer.data import Digits; Digits(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_digits_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"split='test' .*train, val"):
        Digits("test")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    datasets._digits.cache_clear()
    with pytest.raises(DataError, match="scikit-learn is not installed"):
        Digits()


def test_columns_of() -> None:
    tensors = torch.utils.data.TensorDataset(torch.arange(3), torch.arange(3))
    assert isinstance(columns_of(tensors), tuple)
    assert isinstance(columns_of(Digits()), dict)
    assert columns_of([1, 2]) is None
