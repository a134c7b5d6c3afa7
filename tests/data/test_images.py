"""Encoded images: the same pixels whichever process decodes them, draws by (seed, epoch, sample) alone, and errors that
name the file."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raytrainer.data import EncodedImages, ImageFolder, Loader, Normalize, ParquetDataset
from raytrainer.errors import ConfigError, DataError
from raytrainer.storage import Storage


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def gradient(width: int, height: int, blue: int = 0) -> np.ndarray:
    """Return an image whose red channel is the column of a pixel and whose green channel is its row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x, y, np.full_like(x, blue)], axis=2).astype(np.uint8)


def parquet(folder: Path, images: list[Any], group: int = 4) -> Path:
    folder.mkdir(parents=True)
    table = pa.table({"image": images, "label": range(len(images))})
    pq.write_table(table, folder / "part-0.parquet", row_group_size=group)
    return folder


def batches(dataset: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = Loader(dataset, **{"global_batch_size": 6, "shuffle": True, "seed": 5, **options})
    return [(m.data["image"], m.data["label"]) for b in loader.batches(0, 5) for m in b.micro if m.size]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return parquet(tmp_path / "photos", [encoded(gradient(40 + n, 30 + n, n)) for n in range(14)])


@pytest.mark.parametrize("kept", ["memory", "cache"])
def test_the_same_batches_whoever_decodes_them(photos: Path, tmp_path: Path, kept: str) -> None:
    rows = ParquetDataset(photos, cache=tmp_path / "cache" if kept == "cache" else None)
    images = EncodedImages(rows, size=16, crop="random", flip=True)
    expected = batches(images, prefetch=0)
    assert expected[0][0].shape == (6, 3, 16, 16)
    assert expected[0][0].dtype == torch.uint8
    whole = {int(label): image for image_batch in expected[:3] for image, label in zip(*image_batch, strict=True)}
    again = {int(label): image for image_batch in expected[3:] for image, label in zip(*image_batch, strict=True)}
    assert len(whole) == 14
    assert not any(torch.equal(whole[label], image) for label, image in again.items())  # the next epoch draws again
    for options in ({}, {"num_workers": 2}):
        for (one, _), (other, _) in zip(expected, batches(images, **options), strict=True):
            assert torch.equal(one, other)
    for rank in range(2):  # the rank does not matter either
        parts = batches(images, rank=rank, world_size=2, micro_batch_size=2)
        mine = [(int(label), image) for part in parts for image, label in zip(*part, strict=True)][:7]
        assert all(torch.equal(whole[label], image) for label, image in mine)


def test_the_middle_is_kept(tmp_path: Path) -> None:
    source = parquet(tmp_path / "one", [encoded(gradient(100, 60)), encoded(gradient(60, 100))])
    images = EncodedImages(ParquetDataset(source), size=[30, 40], resize=60)
    for index, (left, top) in enumerate(((30, 15), (10, 35))):
        expected = torch.from_numpy(gradient(100, 100)[top : top + 30, left : left + 40]).permute(2, 0, 1)
        assert torch.equal(images[index]["image"], expected)
    small = EncodedImages(ParquetDataset(source), size=14)  # the shorter edge becomes 16
    assert small[0]["image"][0].float().mean() == pytest.approx(49.5, abs=0.6)
    assert small[0]["image"][1, :, 7].tolist() == pytest.approx([5.6 + 3.75 * n for n in range(14)], abs=1)


@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 9))
def test_a_random_part_is_in_the_image_and_as_asked(width: int, height: int, seed: int) -> None:
    images = EncodedImages([{}], size=8, crop="random", scale=(0.2, 0.6), ratio=(0.5, 2.0))
    draws = images._draws(np.arange(50), 0, seed)
    assert draws is not None
    assert len(np.unique(draws)) == draws.size
    for row in draws:
        left, top, right, bottom = images._random_box(width, height, row[1:].reshape(-1, 4).tolist())
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) > 50 and max(width, height) < 2 * min(width, height):
            assert 0.19 < (right - left) * (bottom - top) / (width * height) < 0.62
            assert 0.48 < (right - left) / (bottom - top) < 2.08


def test_half_are_mirrored(tmp_path: Path) -> None:
    source = parquet(tmp_path / "one", [encoded(gradient(8, 8))] * 400, group=400)
    loader = Loader(EncodedImages(ParquetDataset(source), size=8, resize=8, flip=True), global_batch_size=400)
    image = next(loader.batches()).micro[0].data["image"]
    straight, mirrored = image[:, 0, 0, 0] == 0, image[:, 0, 0, 0] == 7
    assert (straight ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_kinds_of_images_and_of_rows(tmp_path: Path) -> None:
    grey, colour = gradient(8, 8)[:, :, 0], gradient(8, 8)
    clear = np.dstack([colour, np.full((8, 8), 128, np.uint8)])
    rows = [{"bytes": encoded(pixels), "path": None} for pixels in (grey, colour, clear)]
    images = EncodedImages(ParquetDataset(parquet(tmp_path / "a", rows)), size=8, resize=8)
    read = images.read_batch(np.arange(3), 0, 0)
    assert read["label"].tolist() == [0, 1, 2]
    assert torch.equal(read["image"][0], torch.from_numpy(grey).expand(3, 8, 8))
    assert torch.equal(read["image"][1], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(read["image"][1], read["image"][2])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [b"", b"no image", "cut", None])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, damage: Any, workers: int) -> None:
    good = encoded(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8), "JPEG")
    rows = [good] * 7
    rows[5] = good[: len(good) // 2] if damage == "cut" else damage
    images = EncodedImages(ParquetDataset(parquet(tmp_path / "a", rows)), size=8)
    with pytest.raises(DataError, match=r"part-0\.parquet, row 5: 'image' .*decoded: ") as caught:
        batches(images, num_workers=workers)
    assert str(caught.value).count("DataError") == 0


def test_folders(tmp_path: Path) -> None:
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.PNG").write_bytes(encoded(gradient(8, 8, 10 * label + number)))
    (tmp_path / "bee" / "notes.txt").touch()
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["ant", "bee", "cat"]
    read = EncodedImages(folder, size=8, resize=8).read_batch(np.arange(6), 0, 0)
    assert read["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert read["image"][:, 2, 0, 0].tolist() == [0, 1, 10, 11, 20, 21]
    (tmp_path / "cat" / "0.PNG").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cat/0\.PNG: 'image' cannot be decoded"):
        EncodedImages(folder, size=8).read_batch(np.arange(6), 0, 0)
    (tmp_path / "cat" / "0.PNG").unlink()
    with pytest.raises(DataError, match=r"cat/0\.PNG"):
        EncodedImages(folder, size=8).read_batch(np.arange(6), 0, 0)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="no image is in it"):
        ImageFolder(tmp_path / "dog")


def test_in_s3(in_s3: str) -> None:
    for name in ("a", "b"):
        Storage(in_s3).write_bytes(f"images/{name}/0.png", encoded(gradient(8, 8, ord(name))))
    read = EncodedImages(ImageFolder(f"{in_s3}/images"), size=8, resize=8).read_batch(np.arange(2), 0, 0)
    assert read["image"][:, 2, 0, 0].tolist() == [ord("a"), ord("b")]


def test_normalised_on_the_device(photos: Path) -> None:
    images = EncodedImages(ParquetDataset(photos), size=16, transform=Normalize())
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for (image, _), (pixels, _) in zip(batches(images), batches(EncodedImages(images.dataset, size=16)), strict=True):
        torch.testing.assert_close(image, (pixels / 255 - mean) / std)
    with pytest.raises(ConfigError, match=r"std=\[1\] must have 3 numbers"):
        Normalize(std=[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"crop": "middle"}, "crop=middle is not a way to crop; valid: center, random"),
        ({"resize": 100}, "resize=100 leaves no crop of 224x224"),
        ({"scale": [0, 1]}, r"scale=\[0,1\] must be \[least, most\]"),
        ({"ratio": [2.0, 1.0]}, "ratio="),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EncodedImages([{}], **arguments)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pip install 'raytrainer\[images\]'"):
        EncodedImages([{}])
