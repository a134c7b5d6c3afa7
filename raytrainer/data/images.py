"""Encoded images (JPEG, PNG, …) from Parquet files or folders, decoded by Pillow in threads or in data processes.

A batch is uint8, a quarter of the size of its float32 numbers on the device.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from math import exp, log, sqrt
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import default_collate

from raytrainer.data.augment import sample_bits
from raytrainer.data.datasets import Transform, name_of
from raytrainer.data.order import Indices
from raytrainer.data.source_files import check_local, find_files
from raytrainer.errors import ConfigError, DataError, RaytrainerError
from raytrainer.storage import redacted

T = TypeVar("T")
R = TypeVar("R")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_THREADS = 16
_TRIES = 10  # attempts to find a random crop that fits


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `function` to each item, in as many threads as there are CPUs. Return the results in order.

    A data process uses only its own thread, because the user chose the number of data processes.
    """
    if multiprocessing.parent_process() is not None:
        return [function(item) for item in items]
    return list(_thread_pool(os.getpid()).map(function, items))


@functools.cache
def _thread_pool(pid: int) -> ThreadPoolExecutor:
    """Return the pool of the process `pid`, because a fork has none of its parent's threads."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(_MOST_THREADS, cpus), "raytrainer-images")


class ImageFolder:
    """Images in one folder per class: samples `{"image": bytes, "label": int}`, for `EncodedImages`.

    The label of an image is the index of its folder's name in the sorted names (`classes`).

    Args:
        path: A directory, a glob or a URI, as in `raytrainer.data.ParquetDataset`.

    Raises:
        DataError: There are no images. On reading: a file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._filesystem, entries = find_files(str(path), SUFFIXES, "image")
        self.path = redacted(str(path))
        # An Arrow array takes a tenth of the memory of Python strings.
        self._files = pa.array([entry.path for entry in entries], pa.large_string())
        folders = [entry.path.rpartition("/")[0].rpartition("/")[2] for entry in entries]
        names, labels = np.unique(np.array(folders), return_inverse=True)
        self.classes: list[str] = names.tolist()
        self._labels = labels.astype(np.int64)

    @staticmethod
    def check_source(path: str) -> None:
        """Check the source before the run starts; see docs/data.md."""
        check_local(path, SUFFIXES, "image")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        file = self.where(index)
        try:
            with self._filesystem.open_input_file(file) as opened:
                return {"image": opened.read(), "label": int(self._labels[index])}
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: {error}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return in_threads(self.__getitem__, indices)  # remote files need one round trip each

    def where(self, index: int) -> str:
        """Return the file of a sample, for messages."""
        return str(self._files[index % len(self)])


class EncodedImages:
    """Images of a dataset, decoded, cropped and scaled when they are read: uint8 `[3, height, width]`, RGB.

    Random choices depend only on (seed, epoch, sample). The other entries of a sample are collated unchanged.

    Args:
        dataset: Has `__len__` and `__getitems__` (or `__getitem__`) and returns dicts: `ImageFolder`, `ParquetDataset`.
        size: Height and width of the result, or one number for both.
        crop: `center`: scale the shorter edge to `resize` pixels and keep the middle. `random`: scale a random part of
            the image (Szegedy et al. 2014, arXiv:1409.4842; torchvision's RandomResizedCrop).
        resize: For `center`; None for 8/7 of `size`: 256 for 224.
        scale: For `random`: the smallest and largest part of the image's area.
        ratio: For `random`: the smallest and largest width / height.
        flip: Whether to mirror left and right with probability 0.5.
        key: The entry that holds the encoded bytes, or a dict with `bytes`, as in Hugging Face's files.
        transform: For whole batches on the device, e.g. `raytrainer.data.Normalize`; see
            `raytrainer.data.ColumnDataset`.

    Raises:
        ConfigError: A value is invalid, or Pillow is not installed.
        DataError: On reading: Pillow cannot decode an image. The message has its file and row.
    """

    def __init__(
        self,
        dataset: Any,
        size: int | Sequence[int] = 224,
        crop: str = "center",
        resize: int | None = None,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: bool = False,
        key: str = "image",
        transform: Transform | None = None,
    ) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise ConfigError("EncodedImages needs Pillow: pip install 'raytrainer[images]'") from error
        self._open, self._bilinear = Image.open, Image.Resampling.BILINEAR
        if crop not in ("center", "random"):
            raise ConfigError("is not a way to crop", key="crop", value=crop, choices=("center", "random"))
        for name, bounds in (("scale", scale), ("ratio", ratio)):
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ConfigError("must be [least, most], both above 0", key=name, value=list(bounds))
        self.height, self.width = (size, size) if isinstance(size, int) else tuple(size)
        self.resize = resize or round(min(self.height, self.width) * 8 / 7)
        if min(self.height, self.width) < 1 or self.resize < max(self.height, self.width):
            raise ConfigError(f"leaves no crop of {self.height}x{self.width}", key="resize", value=self.resize)
        self.dataset, self.crop, self.flip, self.key, self.transform = dataset, crop, flip, key, transform
        self.scale, self.ratio = (float(scale[0]), float(scale[1])), (log(ratio[0]), log(ratio[1]))

    @staticmethod
    def check_source(dataset: Any, key: str = "image") -> None:
        """Check that the dataset's config node has the entry `key`; see docs/data.md."""
        kind = str(dataset.get("_target_")).rpartition(".")[2] if isinstance(dataset, dict) else ""
        names: Sequence[str] = ("image", "label") if kind == "ImageFolder" else ()
        if kind == "ParquetDataset":
            from raytrainer.data.parquet import local_columns

            names = local_columns(str(dataset["path"]), dataset.get("columns"))
        if names and key not in names:
            raise ConfigError("is not an entry of the dataset", key="key", value=key, choices=names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample as in the first epoch with seed 0."""
        return {name: value[0] for name, value in self.read_batch(np.array([index]), 0, 0).items()}

    @property
    def transform_batch(self) -> Transform | None:
        return self.transform

    def read_batch(self, samples: Indices, epoch: int, seed: int) -> dict[str, Any]:
        """Return the samples (int64 `[n]`) as one batch; see docs/data.md."""
        numbers = samples.tolist()
        by_batch = hasattr(self.dataset, "__getitems__")
        rows = self.dataset.__getitems__(numbers) if by_batch else [self.dataset[number] for number in numbers]
        images = np.empty((len(rows), 3, self.height, self.width), np.uint8)
        draws = self._draws(samples, epoch, seed)

        def decode(place: int) -> None:
            try:
                images[place] = self._decoded(rows[place][self.key], None if draws is None else draws[place])
            except RaytrainerError:
                raise
            except Exception as error:
                raise DataError(f"{self._where(numbers[place])}: {self.key!r} cannot be decoded: {error}") from error

        in_threads(decode, range(len(rows)))
        others = [{name: value for name, value in row.items() if name != self.key} for row in rows]
        return {self.key: torch.from_numpy(images), **default_collate(others)}

    def _where(self, index: int) -> str:
        where = getattr(self.dataset, "where", None)
        return str(where(index)) if callable(where) else f"{name_of(self.dataset)}, sample {index}"

    def _draws(self, samples: Indices, epoch: int, seed: int) -> npt.NDArray[np.float64] | None:
        """Return numbers in [0, 1), one row per sample: one for mirroring, and four for each attempt at a crop."""
        if self.crop != "random" and not self.flip:
            return None
        count = 1 + (4 * _TRIES if self.crop == "random" else 0)
        numbers = torch.from_numpy(samples)
        bits = [sample_bits(numbers, "image", seed, epoch, draw) for draw in range(count)]
        return (np.stack(bits, axis=1) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _decoded(self, data: Any, draws: npt.NDArray[np.float64] | None) -> npt.NDArray[np.uint8]:
        encoded = data["bytes"] if isinstance(data, dict) else data
        if not isinstance(encoded, bytes):
            raise TypeError(f"{type(encoded).__name__} is not bytes")
        with self._open(BytesIO(encoded)) as opened:
            image = opened.convert("RGB")
        if self.crop == "random" and draws is not None:
            box = self._random_box(image.width, image.height, draws[1:].reshape(-1, 4).tolist())
        else:
            box = self._center_box(image.width, image.height)
        pixels = np.asarray(image.resize((self.width, self.height), self._bilinear, box=box))
        if self.flip and draws is not None and draws[0] < 0.5:
            pixels = pixels[:, ::-1]
        return pixels.transpose(2, 0, 1)

    def _center_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the middle of the image as left, top, right and bottom, in pixels of the image.

        In the result, the shorter edge of the image has `resize` pixels.
        """
        pixel = min(width, height) / self.resize
        left, top = (width - pixel * self.width) / 2, (height - pixel * self.height) / 2
        return left, top, left + pixel * self.width, top + pixel * self.height

    def _random_box(
        self, width: int, height: int, tries: Iterable[Sequence[float]]
    ) -> tuple[float, float, float, float]:
        for area, ratio, x, y in tries:
            wanted = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
            shape = exp(self.ratio[0] + (self.ratio[1] - self.ratio[0]) * ratio)
            w, h = round(sqrt(wanted * shape)), round(sqrt(wanted / shape))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        # No crop fits a very long image, so take the largest part in its middle with an allowed shape.
        shape = min(max(width / height, exp(self.ratio[0])), exp(self.ratio[1]))
        across, down = min(width, height * shape), min(height, width / shape)
        return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2
