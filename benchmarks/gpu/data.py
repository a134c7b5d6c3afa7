"""The data of the benchmarks for GPUs: random, made once a process, so that both sides have the very same."""

from __future__ import annotations

from functools import cache

import torch

from raytrainer.data import Arrays


@cache
def images(rows: int, size: int, classes: int) -> Arrays:
    """Float32 `[rows, 3, size, size]`, and labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(rows, 3, size, size, generator=generator)
    return Arrays({"image": image, "label": torch.randint(classes, (rows,), generator=generator)})


@cache
def tokens(rows: int, length: int, vocabulary: int) -> Arrays:
    """Ids `[rows, length]` and the next of each. They are drawn as words are: by Zipf's law, so that there is something
    to learn."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, rows * (length + 1), replacement=True, generator=generator).view(rows, length + 1)
    return Arrays({"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
