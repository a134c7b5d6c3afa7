"""The reference models: the published sizes, every norm and stem, and errors that list the choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from raytrainer.errors import ConfigError
from raytrainer.models import MLP, ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from raytrainer.models.resnet import Stem, normalisation

# Numbers of parameters with 1,000 classes, of He et al. 2015 as implemented in torchvision.
PUBLISHED = [
    (resnet18, 11_689_512),
    (resnet34, 21_797_672),
    (resnet50, 25_557_032),
    (resnet101, 44_549_160),
    (resnet152, 60_192_808),
]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("build", "parameters"), PUBLISHED)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameter_counts_are_the_published_ones(build: Callable[..., ResNet], parameters: int, norm: str) -> None:
    with torch.device("meta"):
        assert count(build(1000, norm=norm)) == parameters


@pytest.mark.parametrize("build", [build for build, _ in PUBLISHED])
def test_every_resnet_trains_with_group_norm_and_never_mixes_samples(build: Callable[..., ResNet]) -> None:
    torch.manual_seed(0)
    model = build(7, norm="group", width=8, in_channels=1, stem="small")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    image = torch.randn(3, 1, 8, 8)
    logits = model(image)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(model(image[1:2]), logits[1:2])
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 8), ("imagenet", 64), ("small", 8), ("small", 32)])
@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_stems_take_large_and_small_images(build: Callable[..., ResNet], stem: str, size: int) -> None:
    assert build(10, stem=stem, width=4)(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_the_stem_decides_how_much_is_left_of_the_image() -> None:
    seen: list[torch.Size] = []
    stems: tuple[Stem, ...] = ("imagenet", "small")
    for stem in stems:
        model = ResNet("basic", (1,), 10, width=4, stem=stem)
        model.maxpool.register_forward_hook(lambda _module, _args, out: seen.append(out.shape))
        model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 4, 8, 8), (1, 4, 32, 32)]


def test_any_number_of_stages() -> None:
    model = ResNet("basic", (1, 1, 1), 10, in_channels=1, width=32, stem="small")
    assert count(model) == 308_074
    assert model.fc.in_features == 128


def test_parameter_names_are_torchvisions_so_that_published_weights_load() -> None:
    names = dict(resnet50(1000).named_parameters())
    assert {"conv1.weight", "bn1.bias", "layer1.0.downsample.0.weight", "layer4.2.conv3.weight", "fc.bias"} <= set(
        names
    )
    assert names["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert len(names) == 161


def test_each_block_begins_as_the_identity() -> None:
    model = resnet18(10, width=4)
    block = model.get_submodule("layer1.0")
    x = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 12, 16, 24, 48, 64, 100, 2048])
def test_group_norm_divides_any_width(channels: int) -> None:
    layer = normalisation("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert channels % layer.num_groups == 0
    assert layer.num_groups <= 32
    assert channels < 2 or channels // layer.num_groups >= 2
    if channels == 64:
        assert layer.num_groups == 32


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("norm", "grup", "group, batch"), ("stem", "imagnet", "imagenet, small"), ("block", "bottle", "bottleneck")],
)
def test_an_unknown_choice_names_the_nearest_first(key: str, value: str, expected: str) -> None:
    arguments: dict[str, object] = {"block": "basic", "layers": (1,), "num_classes": 10, key: value}
    with pytest.raises(ConfigError, match=expected) as caught:
        ResNet(**arguments)  # type: ignore[arg-type]
    assert caught.value.key == f"model.{key}"


@pytest.mark.parametrize("wrong", [{"layers": ()}, {"layers": (1, 0)}, {"num_classes": 0}, {"width": -1}])
def test_sizes_that_make_no_resnet_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        ResNet(**{"block": "basic", "layers": (1,), "num_classes": 10, **wrong})  # type: ignore[arg-type]


def test_mlp_flattens_and_counts() -> None:
    model = MLP(64, 10, width=32, depth=2)
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert count(model) == 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10


def test_mlp_of_depth_zero_is_linear() -> None:
    model = MLP(3, 2, depth=0)
    a, b = torch.randn(1, 3), torch.randn(1, 3)
    zero = model(torch.zeros(1, 3))
    torch.testing.assert_close(model(a + b), model(a) + model(b) - zero)


def test_mlp_drops_in_training_only() -> None:
    torch.manual_seed(0)
    model = MLP(16, 4, dropout=0.5)
    x = torch.randn(2, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("wrong", [{"width": 0}, {"depth": -1}, {"dropout": 1.0}, {"in_features": 0}])
def test_mlp_names_the_wrong_argument(wrong: dict[str, float]) -> None:
    (key,) = wrong
    with pytest.raises(ConfigError, match=key) as caught:
        MLP(**{"in_features": 4, "num_classes": 2, **wrong})  # type: ignore[arg-type]
    assert caught.value.key == f"model.{key}"
