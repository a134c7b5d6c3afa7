"""Crop and flip: equal to a loop over images, with evenly spread draws that depend on the sample and not on its
batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data import RandomCropFlip, augment
from raytrainer.data.augment import sample_bits
from raytrainer.errors import ConfigError, DataError


@given(
    padding=st.integers(0, 3),
    flip=st.booleans(),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    epoch=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.uint8, torch.float64]),
)
@settings(max_examples=50, deadline=None)
def test_each_image_is_a_crop_of_its_padded_self(
    padding: int, flip: bool, height: int, width: int, epoch: int, dtype: torch.dtype
) -> None:
    images = torch.arange(1, 1 + 5 * 2 * height * width).reshape(5, 2, height, width).to(dtype)
    moved = RandomCropFlip(padding, flip).apply(images, torch.arange(5), epoch, 0)
    assert moved.dtype == dtype
    assert moved.shape == images.shape
    for image, got in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(image, [padding] * 4)
        crops = [
            padded[:, y : y + height, x : x + width] for y in range(2 * padding + 1) for x in range(2 * padding + 1)
        ]
        padded_mirrored = torch.nn.functional.pad(image.flip(2), [padding] * 4)
        if flip:
            crops += [
                padded_mirrored[:, y : y + height, x : x + width]
                for y in range(2 * padding + 1)
                for x in range(2 * padding + 1)
            ]
        assert any(torch.equal(got, crop) for crop in crops)


def test_large_images_are_cropped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    images, samples = torch.rand(50, 2, 5, 7), torch.arange(50)
    small = RandomCropFlip(2, True).apply(images, samples, 1, 2)
    monkeypatch.setattr(augment, "_WHOLE_TABLE", 0)
    assert torch.equal(RandomCropFlip(2, True).apply(images, samples, 1, 2), small)


def test_a_samples_draw_does_not_depend_on_its_batch() -> None:
    images = torch.rand(40, 3, 8, 8)
    crop = RandomCropFlip(2, True)
    samples = torch.randperm(40)
    whole = crop.apply(images, torch.arange(40), 4, 1)
    assert torch.equal(crop.apply(images[samples], samples, 4, 1), whole[samples])
    assert torch.equal(torch.cat([crop.apply(images[i : i + 1], torch.tensor([i]), 4, 1) for i in range(40)]), whole)
    assert not torch.equal(crop.apply(images, torch.arange(40), 5, 1), whole)
    assert not torch.equal(crop.apply(images, torch.arange(40), 4, 2), whole)


def test_numbers_are_what_they_were() -> None:
    """The numbers never change, because otherwise a resumed run would see other images after an upgrade."""
    samples = torch.tensor([0, 1, 2**31, 2**40 + 3])
    assert sample_bits(samples, "crop-flip", 0, 0).tolist() == [
        3020886903154918649,
        13272537141208084171,
        7261501843690860055,
        6200215894670070838,
    ]


def test_bits_are_evenly_spread() -> None:
    samples = torch.arange(1 << 16)
    bits = sample_bits(samples, "crop-flip", 3, 1)
    for position in range(64):
        assert abs((bits >> np.uint64(position) & np.uint64(1)).mean() - 0.5) < 0.01
    for cells in (18, 162):
        counts = np.bincount(((bits >> np.uint64(33)) % np.uint64(cells)).astype(np.int64), minlength=cells)
        expected = len(samples) / cells
        chi = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi - cells) < 5 * (2 * cells) ** 0.5
    following = sample_bits(samples, "crop-flip", 3, 2)
    for one, other in [(bits[:-1], bits[1:]), (bits, following)]:
        assert abs(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1]) < 0.02


def test_dicts_tuples_and_lists() -> None:
    images, labels, samples = torch.rand(3, 1, 4, 4), torch.arange(3), torch.arange(3)
    batch = {"image": images, "label": labels}
    moved = RandomCropFlip(1, False)(batch, samples, 0, 0)
    assert list(moved) == ["image", "label"]
    assert batch["image"] is images
    assert not torch.equal(moved["image"], images)
    as_tuple = RandomCropFlip(1, False, key=0)((images, labels), samples, 0, 0)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], moved["image"])
    assert isinstance(RandomCropFlip(1, False, key=0)([images, labels], samples, 0, 0), list)


@pytest.mark.parametrize(
    ("key", "batch", "says"),
    [
        ("imag", {"image": torch.zeros(1, 1, 2, 2), "label": torch.zeros(1)}, "no such entry, but image"),
        ("image", (torch.zeros(1, 1, 2, 2),), "no such entry, but tuple"),
        (3, (torch.zeros(1, 1, 2, 2),), "no such entry"),
        ("image", {"image": torch.zeros(2, 2)}, r"'image' is \[2, 2\]"),
    ],
)
def test_wrong_batches(key: Any, batch: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        RandomCropFlip(1, False, key=key)(batch, torch.arange(1), 0, 0)


def test_negative_padding() -> None:
    with pytest.raises(ConfigError, match="padding=-1"):
        RandomCropFlip(-1, False)
