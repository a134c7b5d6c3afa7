"""Random crop and flip of whole batches on their device; each sample's draw depends on (seed, epoch, sample) alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import ConfigError, DataError, nearest
from raytrainer.seeds import mix

_MULTIPLIERS = tuple(c - (c >> 63 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sample_bits(samples: Tensor, *key: int | str) -> Tensor:
    """32 random bits a sample, int64 `[n]` in [0, 2**32), from a hash of `key` and the sample's number alone.

    SplitMix64 (Steele, Lea, Flood 2014) on torch's int64, which wraps alike on every device. Its shifts are
    arithmetic, where the original's are logical: that costs one bit of 64, and the lowest 32 are what is used.
    """
    x = (samples + 1) * _MULTIPLIERS[0]
    x += mix(*key)
    x ^= x >> 30
    x *= _MULTIPLIERS[1]
    x ^= x >> 27
    x *= _MULTIPLIERS[2]
    x ^= x >> 31
    x &= 0xFFFFFFFF
    return x


class RandomCropFlip:
    """Pad with zeros, crop to the old size at a random place, and mirror half of the images.

    Args:
        padding: Pixels on each side, so that the image moves by up to this many in each direction.
        flip: Mirror left and right with probability 0.5.
        key: The entry of the batch that holds the images `[n, channels, height, width]`; a position for tuples.

    Raises:
        ConfigError: A negative padding.
        DataError: (when called) a batch without `key`, or images of another shape.
    """

    def __init__(self, padding: int, flip: bool, key: str | int = "image") -> None:
        if padding < 0:
            raise ConfigError(f"padding={padding} is negative", key="padding", value=padding)
        self.padding, self.flip, self.key = padding, flip, key
        self._kept: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

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
        across = 2 * (2 * self.padding + 1)
        row_starts, columns = self._tables(height, width, images.device)
        draw = sample_bits(samples, "crop-flip", seed, epoch) % (len(row_starts) * across)
        down = row_starts.index_select(0, draw // across)
        right = columns.index_select(0, draw % across)
        pixel = (down[:, :, None] + right[:, None, :]).view(n, 1, -1).expand(n, channels, -1)
        padded = torch.constant_pad_nd(images, [self.padding] * 4)
        return padded.view(n, channels, -1).gather(2, pixel).view(n, channels, height, width)

    def _tables(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each move down, where a padded image's rows start `[2p+1, h]`; for each move right, first as it is and
        then mirrored, the columns in it `[2 * (2p+1), w]`. Kept, since a batch is otherwise mostly these.
        """
        if (height, width, device) not in self._kept:
            moves = torch.arange(2 * self.padding + 1, device=device)[:, None]
            x = torch.arange(width, device=device)
            row_starts = (moves + torch.arange(height, device=device)) * (width + 2 * self.padding)
            self._kept[height, width, device] = (
                row_starts,
                torch.cat([moves + x, moves + (x.flip(0) if self.flip else x)]),
            )
        return self._kept[height, width, device]

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
            raise DataError(f"RandomCropFlip wants images [n, channels, height, width], and {self.key!r} is {shape}")
        return images
