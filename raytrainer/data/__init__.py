"""Datasets and the loader: from pyarrow tables and other sources to batches on the device, at an integer position.

Public names are loaded on first use, so that a configuration pays only for the ones that it names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.data.augment import Normalize, RandomCropFlip
    from raytrainer.data.datasets import Arrays, ColumnDataset, Digits
    from raytrainer.data.images import EncodedImages, ImageFolder
    from raytrainer.data.loader import Batch, Loader, LoaderOptions, MicroBatch
    from raytrainer.data.parquet import ParquetDataset
    from raytrainer.data.ray_data import RayDataset
    from raytrainer.data.text import PythonSources
    from raytrainer.data.tokens import TokenDataset

__all__ = [
    "Arrays",
    "Batch",
    "ColumnDataset",
    "Digits",
    "EncodedImages",
    "ImageFolder",
    "Loader",
    "LoaderOptions",
    "MicroBatch",
    "Normalize",
    "ParquetDataset",
    "PythonSources",
    "RandomCropFlip",
    "RayDataset",
    "TokenDataset",
]

_MODULES = {
    "Arrays": "datasets",
    "Batch": "loader",
    "ColumnDataset": "datasets",
    "Digits": "datasets",
    "EncodedImages": "images",
    "ImageFolder": "images",
    "Loader": "loader",
    "LoaderOptions": "loader",
    "MicroBatch": "loader",
    "Normalize": "augment",
    "ParquetDataset": "parquet",
    "PythonSources": "text",
    "RandomCropFlip": "augment",
    "RayDataset": "ray_data",
    "TokenDataset": "tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
