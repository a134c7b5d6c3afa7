"""Tests of moving batches to a CUDA device: each way gives the same rows, and no batch is overwritten while in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raytrainer.data import Arrays, Loader
from raytrainer.data.prefetch import DeviceCopy

pytestmark = pytest.mark.gpu

ROWS, BATCH = 4096, 256


def device() -> torch.device:
    return torch.device("cuda", 0)


def columns() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(ROWS, 512, generator=generator), "y": torch.arange(ROWS)}


class Rows:
    """The rows of `columns()`, read one at a time."""

    def __init__(self) -> None:
        self._columns = columns()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self._columns.items()}


def loader(dataset: Any, **options: Any) -> Loader:
    return Loader(dataset, global_batch_size=BATCH, seed=1, shuffle=True, drop_last=True, device=device(), **options)


@pytest.mark.parametrize(
    "options", [{"resident": True}, {"resident": False, "prefetch": 0}, {"resident": False, "prefetch": 3}]
)
@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_each_way_gives_the_same_batches(kind: str, options: dict[str, Any]) -> None:
    """The device is busy, so a batch that is used before its copy has finished would be wrong."""
    if kind == "rows" and options["resident"]:
        pytest.skip("rows that are read one at a time are never resident")
    whole, busy = columns(), torch.randn(4096, 4096, device=device())
    dataset = Arrays(whole) if kind == "columns" else Rows()
    sums, seen = [], []
    for batch in loader(dataset, **options).batches(0, 2 * ROWS // BATCH):
        busy = torch.tanh(busy @ busy)
        data = batch.micro[0].data
        assert data["x"].device == device()
        sums.append(data["x"].double().sum(1))  # queued behind the other work of the device
        seen.append(data["y"].clone())
        del data, batch
    rows = torch.cat(seen).cpu()
    assert torch.equal(rows[:ROWS].sort()[0], torch.arange(ROWS))
    torch.testing.assert_close(torch.cat(sums).cpu(), whole["x"].double()[rows].sum(1))


def test_a_copy_on_its_way() -> None:
    copier = DeviceCopy(device())
    data: dict[str, Any] = {"x": torch.arange(1 << 22), "kept": "as it is", "pair": (torch.ones(3), [torch.zeros(2)])}
    moved = copier.finish(*copier.start(data))
    assert moved["kept"] == "as it is"
    assert moved["x"].device == device()
    assert torch.equal(moved["x"].cpu(), data["x"])
    assert torch.equal(moved["pair"][1][0].cpu(), torch.zeros(2))
