"""Test of a checkpoint of a CUDA device's state: `save` copies it before it returns, through pinned memory it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytrainer.checkpoint import Checkpointer
from raytrainer.storage import Storage

pytestmark = pytest.mark.gpu


def test_what_changes_after_the_save_is_not_in_it(tmp_path: Path) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    state = {
        "bf16": torch.randn(1 << 22, device="cuda", generator=generator).bfloat16(),
        "fp32": torch.randn(1 << 22, device="cuda", generator=generator),
        "host": torch.arange(5),
    }
    checkpointer = Checkpointer(Storage(tmp_path), num_to_keep=None)
    expected = []
    for step in (1, 2):  # the second save reuses the pinned memory
        expected.append({name: tensor.cpu().clone() for name, tensor in state.items()})
        checkpointer.save(step, state, {"of this rank": state["fp32"][:3]})
        for tensor in state.values():
            tensor.add_(1)
    checkpointer.close()
    for info, wanted in zip(checkpointer.list(), expected, strict=True):
        loaded, local = checkpointer.load(info)
        assert local is not None
        assert torch.equal(local["of this rank"], wanted["fp32"][:3])
        for name, tensor in wanted.items():
            assert torch.equal(loaded[name], tensor), name
        template = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        again, _ = checkpointer.load(info, template)
        assert again["bf16"].is_cuda
        assert torch.equal(again["bf16"].cpu(), wanted["bf16"])
