"""Augment whole batches of images on their device: random crop and flip, and normalisation.
Random draws depend only on (seed, epoch, sample)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytrainer.data.order import hash64
from raytrainer.errors import ConfigError, DataError, nearest
from raytrainer.seeds import mix

# Up to this many pixels, one table holds all crops. For small images, the number of calls dominates the time.
_WHOLE_TABLE = 1 << 20


def sample_bits(samples: Tensor, *key: int | str) -> npt.NDArray[np.uint64]:
    """Return 64 random bits per sample, uint64 `[n]`, from a hash of `key` and the sample's number only.

    They are computed on the host, where the sample numbers are. A few numpy calls on so few numbers cost a tenth of the
    GPU kernels for the same, and the draws are equal on every device.
    """
    return hash64(samples.numpy().view(np.uint64), mix(*key))


def _on(device: torch.device, numbers: npt.NDArray[np.int64]) -> Tensor:
    host = torch.from_numpy(numbers)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


class RandomCropFlip:
    """Pad with zeros, crop to the old size at a random position, and mirror half of the images.

    Args:
        padding: Pixels on each side, so that the image moves by at most this many pixels in each direction.
        flip: Whether to mirror left and right with probability 0.5.
        key: The entry of the batch that holds the images `[n, channels, height, width]`; a position for tuples.

    Raises:
        ConfigError: The padding is negative.
        DataError: (when called) The batch has no entry `key`, or its images have another shape.
    """

    def __init__(self, padding: int, flip: bool, key: str | int = "image") -> None:
        if padding < 0:
            raise ConfigError(f"padding={padding} is negative", key="padding", value=padding)
        self.padding, self.flip, self.key = padding, flip, key
        self._kept: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor, Tensor | None]] = {}

    def __call__(self, data: Any, samples: Tensor, epoch: int, seed: int) -> Any:
        """Return the batch with its images replaced: a new dict, tuple or list of the same kind."""
        images = self._images(data)
        moved = self.apply(images, samples, epoch, seed)
        if isinstance(data, dict):
            return {**data, self.key: moved}
        return type(data)(moved if i == self.key else part for i, part in enumerate(data))

    def apply(self, images: Tensor, samples: Tensor, epoch: int, seed: int) -> Tensor:
        """Return the images `[n, c, h, w]` moved and mirrored as drawn for `samples` `[n]`; a copy of equal dtype."""
        n, channels, height, width = images.shape
        draw = (sample_bits(samples, "crop-flip", seed, epoch) >> np.uint64(33)).view(np.int64)
        pixel = self._pixels(draw, height, width, images.device).unsqueeze(1).expand(n, channels, -1)
        padded = torch.constant_pad_nd(images, [self.padding] * 4)
        return padded.view(n, channels, -1).gather(2, pixel).view(n, channels, height, width)

    def _pixels(self, draw: npt.NDArray[np.int64], height: int, width: int, device: torch.device) -> Tensor:
        """Return the index in the padded image of each pixel of the new image, int64 `[n, h * w]`."""
        span = 2 * self.padding + 1
        tables = self._kept.get((height, width, device))
        if tables is None:
            moves = torch.arange(span)[:, None]
            x = torch.arange(width)
            rows = (moves + torch.arange(height)) * (width + 2 * self.padding)
            columns = torch.cat([moves + x, moves + (x.flip(0) if self.flip else x)])
            tables = rows.to(device), columns.to(device), None
            if span * 2 * span * height * width <= _WHOLE_TABLE:
                whole = (rows[:, None, :, None] + columns[:, None, :]).reshape(span * 2 * span, height * width)
                tables = rows.to(device), columns.to(device), whole.to(device)
            self._kept[height, width, device] = tables
        rows, columns, choices = tables
        if choices is not None:
            return choices.index_select(0, _on(device, draw % (span * 2 * span)))
        down, right = np.divmod(draw % (span * 2 * span), 2 * span)
        picked = rows.index_select(0, _on(device, down)).unsqueeze(2) + columns.index_select(
            0, _on(device, right)
        ).unsqueeze(1)
        return picked.view(len(draw), -1)

    def _images(self, data: Any) -> Tensor:
        try:
            images = data[self.key]
        except (KeyError, IndexError, TypeError) as error:
            has = list(map(str, data)) if isinstance(data, dict) else [type(data).__name__]
            raise DataError(
                f"RandomCropFlip(key={self.key!r}): the batch has no such entry, "
                f"but {', '.join(nearest(str(self.key), has) or has)}"
            ) from error
        if not isinstance(images, Tensor) or images.ndim != 4:
            shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise DataError(f"RandomCropFlip needs images [n, channels, height, width], and {self.key!r} is {shape}")
        return images


class Normalize:
    """Convert uint8 images to float32 with mean 0 and variance 1, approximately: `(pixel / 255 - mean) / std`.

    Args:
        mean, std: Per channel, for pixels in [0, 1]; by default ImageNet's.
        key: The entry of the batch that holds the images `[n, channels, height, width]`.

    Raises:
        ConfigError: `mean` and `std` have different lengths, or a `std` is not above 0.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        key: str = "image",
    ) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(f"must have {len(mean)} numbers above 0, as many as mean", key="std", value=list(std))
        self.key = key
        self._mean = torch.tensor(list(mean), dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(list(std), dtype=torch.float32).view(-1, 1, 1)
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, data: Any, samples: Tensor, epoch: int, seed: int) -> Any:
        images = data[self.key]
        kept = self._kept.get(images.device)
        if kept is None:  # computed as one product and one sum
            kept = (1 / (255 * self._std)).to(images.device), (-self._mean / self._std).to(images.device)
            self._kept[images.device] = kept
        return {**data, self.key: (images * kept[0]).add_(kept[1])}
