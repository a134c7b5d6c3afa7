"""The reference models, examples for `model._target_`, which can be any importable `nn.Module`.

Each takes and returns plain tensors.
"""

from __future__ import annotations

from raytrainer.models.mlp import MLP
from raytrainer.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from raytrainer.models.transformer import Transformer

__all__ = ["MLP", "ResNet", "Transformer", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
