"""Random data for the GPU benchmarks, made once in each process, so that both sides use the same."""

from __future__ import annotations

from functools import cache

import torch

from raytrainer.data import Arrays


@cache
def images(rows: int, size: int, classes: int) -> Arrays:
    """Return float32 images `[rows, 3, size, size]` and their labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(rows, 3, size, size, generator=generator)
    return Arrays({"image": image, "label": torch.randint(classes, (rows,), generator=generator)})


@cache
def tokens(rows: int, length: int, vocabulary: int) -> Arrays:
    """Return token ids `[rows, length]` and the id after each. They follow Zipf's law, so that a model can learn."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, rows * (length + 1), replacement=True, generator=generator).view(rows, length + 1)
    return Arrays({"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
