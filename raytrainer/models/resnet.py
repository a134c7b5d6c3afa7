"""Residual networks for images (He et al. 2015, arXiv:1512.03385).

They have batch or group normalisation, and a stem for large or for small images. Parameters have torchvision's names,
so that published weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from raytrainer.errors import ConfigError

Block = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "small"]
Norm = Literal["batch", "group"]


class ResNet(nn.Module):
    """A residual network from images `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    Args:
        block: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1; the output has four times as many
            channels).
        layers: Number of blocks in each stage; each stage after the first halves the image and doubles the channels.
        num_classes: Number of logits.
        in_channels: Channels of an image.
        width: Channels of the first stage.
        stem: `imagenet` quarters the image before the first stage (7x7 convolution and pooling); `small` keeps its size
            (3x3 convolution), as for CIFAR or digits.
        norm: `batch`, or `group` (Wu and He 2018, arXiv:1803.08494), which does not mix samples, so that results do not
            depend on how a batch is split over workers.

    Raises:
        ConfigError: The block, stem or norm is unknown, or a size is out of range.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int,
        *,
        in_channels: int = 3,
        width: int = 64,
        stem: Stem = "imagenet",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        _choice("block", block, ("basic", "bottleneck"))
        _choice("stem", stem, ("imagenet", "small"))
        _choice("norm", norm, ("batch", "group"))
        if not layers or min(layers) < 1:
            raise ConfigError("needs at least one stage, and a block in each", key="model.layers", value=list(layers))
        for key, size in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if size < 1:
                raise ConfigError("must be at least 1", key=f"model.{key}", value=size)
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = normalisation(norm, width)
        self.relu = nn.ReLU(inplace=True)
        kind: type[BasicBlock | Bottleneck] = BasicBlock if block == "basic" else Bottleneck
        channels = width
        self.stages = [f"layer{i}" for i in range(1, len(layers) + 1)]
        for i, (name, depth) in enumerate(zip(self.stages, layers, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(kind(channels, width * 2**i, stride, norm))
                channels = width * 2**i * kind.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to logits `[N, num_classes]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for name in self.stages:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class _Residual(nn.Module):
    """The common part of both blocks: the shortcut, projected if the shape changes."""

    expansion: int

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), normalisation(norm, out_channels)
            )


class BasicBlock(_Residual):
    """A block from `[N, in_channels, H, W]` to `[N, channels, H/stride, W/stride]`."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__(in_channels, channels, stride, norm)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = normalisation(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = normalisation(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


class Bottleneck(_Residual):
    """A block from `[N, in_channels, H, W]` to `[N, 4 * channels, H/stride, W/stride]`, with the stride in the 3x3."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__(in_channels, channels, stride, norm)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = normalisation(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = normalisation(norm, channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = normalisation(norm, channels * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


def normalisation(norm: Norm, channels: int) -> nn.Module:
    """Return a layer over `channels`. Group norm has the most groups, up to 32, with at least two channels each."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # Groups of one channel would be instance norm, which is 0 everywhere on an image of one pixel.
    groups = max(g for g in range(1, min(32, max(1, channels // 2)) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, (BasicBlock, Bottleneck)):
        # Each block begins as the identity (Goyal et al. 2017, arXiv:1706.02677, 5.1). `apply` visits children first,
        # so this comes after the norm's own initialisation.
        last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
        assert isinstance(last, (nn.BatchNorm2d, nn.GroupNorm))
        nn.init.zeros_(last.weight)


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError("is unknown", key=f"model.{key}", value=value, choices=choices)


def resnet18(
    num_classes: int, *, in_channels: int = 3, width: int = 64, stem: Stem = "imagenet", norm: Norm = "batch"
) -> ResNet:
    """Build a ResNet with 18 layers; 11,689,512 parameters with 1,000 classes. The arguments are those of `ResNet`."""
    return ResNet("basic", (2, 2, 2, 2), num_classes, in_channels=in_channels, width=width, stem=stem, norm=norm)


def resnet34(
    num_classes: int, *, in_channels: int = 3, width: int = 64, stem: Stem = "imagenet", norm: Norm = "batch"
) -> ResNet:
    """Build a ResNet with 34 layers; 21,797,672 parameters with 1,000 classes. The arguments are those of `ResNet`."""
    return ResNet("basic", (3, 4, 6, 3), num_classes, in_channels=in_channels, width=width, stem=stem, norm=norm)


def resnet50(
    num_classes: int, *, in_channels: int = 3, width: int = 64, stem: Stem = "imagenet", norm: Norm = "batch"
) -> ResNet:
    """Build a ResNet with 50 layers; 25,557,032 parameters with 1,000 classes. The arguments are those of `ResNet`."""
    return ResNet("bottleneck", (3, 4, 6, 3), num_classes, in_channels=in_channels, width=width, stem=stem, norm=norm)


def resnet101(
    num_classes: int, *, in_channels: int = 3, width: int = 64, stem: Stem = "imagenet", norm: Norm = "batch"
) -> ResNet:
    """Build a ResNet with 101 layers; 44,549,160 parameters with 1,000 classes. The arguments are those of `ResNet`."""
    return ResNet("bottleneck", (3, 4, 23, 3), num_classes, in_channels=in_channels, width=width, stem=stem, norm=norm)


def resnet152(
    num_classes: int, *, in_channels: int = 3, width: int = 64, stem: Stem = "imagenet", norm: Norm = "batch"
) -> ResNet:
    """Build a ResNet with 152 layers; 60,192,808 parameters with 1,000 classes. The arguments are those of `ResNet`."""
    return ResNet("bottleneck", (3, 8, 36, 3), num_classes, in_channels=in_channels, width=width, stem=stem, norm=norm)
