"""Random crop and flip of whole batches on their device; each sample's draw depends on (seed, epoch, sample) alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import ConfigError, nearest
from raytrainer.seeds import mix

_LOW32 = 0xFFFFFFFF


def _hash32(x: Tensor) -> Tensor:
    """lowbias32 (Wellons 2018) on the low 32 bits, held in int64 so that it is the same arithmetic on every device."""
    x = ((x >> 16) ^ x) * 0x7FEB352D & _LOW32
    x = ((x >> 15) ^ x) * 0x846CA68B & _LOW32
    return (x >> 16) ^ x


def sample_bits(samples: Tensor, *key: int | str) -> Tensor:
    """32 random bits a sample, int64 `[n]` in [0, 2**32), from a hash of `key` and the sample's number alone."""
    number = mix(*key)
    low = _hash32((samples & _LOW32) ^ (number & _LOW32))
    return _hash32(low ^ (samples >> 32) ^ (number >> 32))


class RandomCropFlip:
    """Pad with zeros, crop to the old size at a random place, and mirror half of the images.

    Args:
        padding: Pixels on each side, so that the image moves by up to this many in each direction.
        flip: Mirror left and right with probability 0.5.
        key: The entry of the batch that holds the images `[n, channels, height, width]`; a position for tuples.

    Raises:
        ConfigError: A negative padding; at the first batch, a batch without `key` or of another shape.
    """

    def __init__(self, padding: int, flip: bool, key: str | int = "image") -> None:
        if padding < 0:
            raise ConfigError(f"padding={padding} is negative", key="padding", value=padding)
        self.padding, self.flip, self.key = padding, flip, key

    def __call__(self, data: Any, samples: Tensor, epoch: int, seed: int) -> Any:
        """The batch with its images replaced: a new dict, tuple or list of the same kind."""
        images = self._images(data)
        moved = self.apply(images, samples, epoch, seed)
        if isinstance(data, dict):
            return {**data, self.key: moved}
        return type(data)(moved if i == self.key else part for i, part in enumerate(data))

    def apply(self, images: Tensor, samples: Tensor, epoch: int, seed: int) -> Tensor:
        """Images `[n, c, h, w]` moved and mirrored as drawn for `samples` `[n]`; a copy of the same dtype."""
        n, channels, height, width = images.shape
        span = 2 * self.padding + 1
        bits = sample_bits(samples, "crop-flip", seed, epoch)
        # One 32-bit number holds all three draws: flip in the top bit, the two offsets below it.
        down = (bits & 0x7FFF) % span
        right = (bits >> 15 & 0x7FFF) % span
        x = torch.arange(width, device=images.device)
        columns = x.expand(n, width)
        if self.flip:
            columns = torch.where((bits >> 31).bool()[:, None], width - 1 - x, columns)
        columns = columns + right[:, None]
        rows = torch.arange(height, device=images.device) + down[:, None]
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        stride = width + 2 * self.padding
        pixel = (rows[:, :, None] * stride + columns[:, None, :]).reshape(n, 1, height * width)
        flat = padded.reshape(n, channels, -1).gather(2, pixel.expand(n, channels, height * width))
        return flat.reshape(n, channels, height, width)

    def _images(self, data: Any) -> Tensor:
        if isinstance(data, dict):
            if self.key not in data:
                near = nearest(str(self.key), map(str, data)) or list(map(str, data))
                raise ConfigError(
                    f"RandomCropFlip(key={self.key!r}): the batch has no such entry; it has {', '.join(near)}",
                    key="key",
                    value=self.key,
                    choices=map(str, data),
                )
            images = data[self.key]
        elif isinstance(data, tuple | list) and isinstance(self.key, int) and self.key < len(data):
            images = data[self.key]
        else:
            raise ConfigError(
                f"RandomCropFlip(key={self.key!r}): the batch is a {type(data).__name__}; "
                "name an entry of a dict or a position of a tuple",
                key="key",
                value=self.key,
            )
        if not isinstance(images, Tensor) or images.ndim != 4:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ConfigError(f"RandomCropFlip wants images [n, channels, height, width], and {self.key!r} is {shape}")
        return images
