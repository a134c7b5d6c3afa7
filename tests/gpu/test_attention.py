"""Tests of the transformer on a CUDA device: attention can use the flash kernel, with the result of the plain one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from raytrainer.models import Transformer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_flash_attention_is_possible_and_right(positions: str, kv_heads: int | None) -> None:
    """The flash kernel needs 16-bit inputs, which autocast provides; otherwise the forward pass raises an error."""
    torch.manual_seed(0)
    sizes = {"dim": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": kv_heads, "max_seq_len": 128}
    model = Transformer(64, positions=positions, **sizes).cuda()  # type: ignore[arg-type]
    ids = torch.randint(64, (4, 128), device="cuda")
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        model.zero_grad()
        with sdpa_kernel(backend), torch.autocast("cuda", torch.bfloat16):
            logits = model(ids)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.roll(-1, 1).flatten())
        loss.backward()
        found[backend] = (loss.item(), [p.grad for p in model.parameters() if p.grad is not None])
    (flash, flash_gradients), (plain, plain_gradients) = found.values()
    assert flash == pytest.approx(plain, rel=1e-3)
    for a, b in zip(flash_gradients, plain_gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
