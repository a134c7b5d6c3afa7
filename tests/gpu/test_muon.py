"""Test that Muon on a CUDA device gives the same as on the CPU, where its definition is tested."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from raytrainer.optim import Muon

pytestmark = pytest.mark.gpu


def test_the_same_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4)).double()
    there = copy.deepcopy(here).cuda()
    x, y = torch.randn(16, 32, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
    for model in (here, there):
        device = next(model.parameters()).device
        optimizer = Muon(model, ns_dtype="float32")
        for _ in range(5):
            optimizer.zero_grad()
            (model(x.to(device)) - y.to(device)).square().mean().backward()
            optimizer.step()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-4)
