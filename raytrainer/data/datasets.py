"""Datasets held as columns, from which a batch is one gather per column, and a digits dataset without download."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytrainer.data.columns import Column, take
from raytrainer.errors import ConfigError, DataError

Transform = Callable[[Any, Tensor, int, int], Any]
"""`(data, samples, epoch, seed) -> data`: a whole micro-batch on its device; its samples, int64 `[n]`, on the host."""


class ColumnDataset:
    """A map-style dataset of dicts whose numeric columns are tensors `[length, ...]`.

    Subclasses set `tensors` (by name, all of one length). A `MappedColumn` instead of a tensor is read row by row. With
    `transform`, each micro-batch is passed through it on the device: `transform(data, samples, epoch, seed)`; see
    `raytrainer.data.RandomCropFlip`.
    """

    tensors: dict[str, Any]
    columnar = True  # False: a sample has more than `tensors`, so it is read sample by sample

    def __init__(self, transform: Transform | None = None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {name: column[index] for name, column in self.tensors.items()}

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Any:
        rows = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return {name: take(column, rows) for name, column in self.tensors.items()}

    @property
    def transform_batch(self) -> Transform | None:
        return self.transform


class Arrays(ColumnDataset):
    """Columns from numpy arrays or tensors, used without a copy.

    Args:
        columns: By name, `[length, ...]` each.
        transform: See `ColumnDataset`.

    Raises:
        ConfigError: There are no columns or no rows, the lengths differ, or a column is not numeric.
    """

    def __init__(self, columns: Mapping[str, npt.ArrayLike | Tensor], transform: Transform | None = None) -> None:
        super().__init__(transform)
        if not columns:
            raise ConfigError("Arrays needs at least one column")
        self.tensors = {name: _tensor(name, values) for name, values in columns.items()}
        lengths = {name: column.shape[0] if column.ndim else 0 for name, column in self.tensors.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"the columns differ in length: {lengths}")
        if not all(lengths.values()):
            raise ConfigError(f"the columns have no rows: {lengths}")


def _tensor(name: str, values: npt.ArrayLike | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    try:
        # Copy a read-only array, because torch would allow writes to it.
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except TypeError as error:
        raise ConfigError(f"column {name!r} has dtype {array.dtype}, and torch has no such tensors") from error


def columns_of(dataset: Any) -> dict[str, Column] | tuple[Column, ...] | None:
    """Return the columns from which whole batches are gathered; None for a dataset that is read sample by sample."""
    if isinstance(dataset, ColumnDataset):
        return dataset.tensors if dataset.columnar else None
    if type(dataset) is torch.utils.data.TensorDataset:
        return dataset.tensors
    return None


@cache
def _digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    # Find the package's file without importing it, because `import sklearn.datasets` takes more than a second.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("Digits reads scikit-learn's data file, and scikit-learn is not installed")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.float32)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    return table[:, :-1], table[:, -1].astype(np.int64)


class Digits(ColumnDataset):
    """Handwritten digits: 1,797 grey images of 8x8, from scikit-learn's installed files (UCI, Alpaydin 1998).

    Samples are `{"image": float32 [1, 8, 8], "label": int64 []}`. The pixels have mean 0 and variance 1 over the
    training split. The split is fixed and stratified: in each class, in file order, every fifth image is for
    validation.

    Args:
        split: `train` (1,437 images) or `val` (360).
        transform: See `ColumnDataset`.

    Raises:
        ConfigError: The split is unknown.
        DataError: scikit-learn or its data file is missing.
    """

    def __init__(self, split: Literal["train", "val"] = "train", transform: Transform | None = None) -> None:
        super().__init__(transform)
        if split not in ("train", "val"):
            raise ConfigError(f"split={split!r} is not one of train, val", value=split, choices=("train", "val"))
        pixels, labels = _digits()
        train, val = stratified_split(labels, len(labels) // 5 + 1)
        rows = train if split == "train" else val
        mean, std = pixels[train].mean(dtype=np.float64), pixels[train].std(dtype=np.float64)
        image = ((pixels[rows] - mean) / std).astype(np.float32).reshape(-1, 1, 8, 8)
        self.tensors = {"image": torch.from_numpy(image), "label": torch.from_numpy(labels[rows])}


def stratified_split(
    labels: npt.NDArray[np.int64], held_out: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows `(kept, held out)`, both ascending.

    The `held_out` rows are spread evenly over the classes, and evenly within each class.
    """
    by_class = np.argsort(labels, kind="stable")
    picked = by_class[(np.arange(held_out) * len(labels)) // held_out]
    return np.setdiff1d(np.arange(len(labels)), picked), np.sort(picked)


def name_of(dataset: Any) -> str:
    """Return the name of a dataset for messages."""
    return type(dataset).__qualname__
