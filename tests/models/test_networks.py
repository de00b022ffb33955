"""The native networks: sizes against the literature, wiring, gradients, shapes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luce import models
from luce.errors import UserError
from luce.models.mobilenet import InvertedResidual
from luce.models.network import Network
from luce.models.resnet import basic_block, bottleneck
from luce.models.shufflenet import DownUnit, GroupedUnit, SplitUnit
from luce.models.wide_resnet import PreActivationBlock


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2


def bn(channels: int) -> int:
    return 2 * channels


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def resnet(blocks: int, stem: int, *widths: int) -> int:
    total, inputs = conv(3, stem, 3) + bn(stem), stem
    for width in widths:
        total += conv(inputs, width, 3) + (2 * blocks - 1) * conv(width, width, 3) + 2 * blocks * bn(width)
        if inputs != width:
            total += conv(inputs, width, 1) + bn(width)
        inputs = width
    return total + linear(inputs, 100)


def resnet50() -> int:
    total, inputs = conv(3, 64, 3) + bn(64), 64
    for middle, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * middle
        total += conv(inputs, outputs, 1) + bn(outputs)  # the projection
        for _ in range(blocks):
            total += conv(inputs, middle, 1) + conv(middle, middle, 3) + conv(middle, outputs, 1)
            total += 2 * bn(middle) + bn(outputs)
            inputs = outputs
    return total + linear(2048, 100)


def wide_resnet(blocks: int, factor: int) -> int:
    total, inputs = conv(3, 16, 3), 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        total += bn(inputs) + conv(inputs, width, 3) + bn(width) + conv(width, width, 3)
        total += conv(inputs, width, 1) if inputs != width else 0
        total += (blocks - 1) * 2 * (bn(width) + conv(width, width, 3))
        inputs = width
    return total + bn(inputs) + linear(inputs, 100)


def vgg(*depths: int) -> int:
    total, inputs = 0, 3
    for width, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
        for _ in range(depth):
            total += conv(inputs, width, 3) + width + bn(width)  # with a bias
            inputs = width
    return total + linear(512, 100)


def mobilenetv2() -> int:
    def block(inputs: int, middle: int, outputs: int) -> int:
        pointwise = conv(inputs, middle, 1) + bn(middle) + conv(middle, outputs, 1) + bn(outputs)
        return pointwise + 9 * middle + bn(middle)

    total, inputs = conv(3, 16, 3) + bn(16) + block(16, 16, 8), 8
    for outputs, depth in ((12, 2), (16, 3), (32, 4), (48, 3), (80, 3), (160, 1)):
        for _ in range(depth):
            total += block(inputs, 6 * inputs, outputs)
            inputs = outputs
    return total + conv(160, 1280, 1) + bn(1280) + linear(1280, 100)


def shufflenetv1() -> int:
    def unit(inputs: int, new: int, groups: int) -> int:
        middle = new // 4
        grouped = conv(inputs, middle, 1) // groups + bn(middle) + conv(middle, new, 1) // 3 + bn(new)
        return grouped + 9 * middle + bn(middle)

    total = conv(3, 24, 1) + bn(24) + unit(24, 240 - 24, 1) + 3 * unit(240, 240, 3)
    total += unit(240, 480 - 240, 3) + 7 * unit(480, 480, 3)
    total += unit(480, 960 - 480, 3) + 3 * unit(960, 960, 3)
    return total + linear(960, 100)


def shufflenetv2() -> int:
    def branch(inputs: int, half: int) -> int:
        return conv(inputs, half, 1) + conv(half, half, 1) + 9 * half + 3 * bn(half)

    total, inputs = conv(3, 24, 1) + bn(24), 24
    for outputs, depth in ((116, 4), (232, 8), (464, 4)):
        half = outputs // 2
        total += branch(inputs, half) + 9 * inputs + bn(inputs) + conv(inputs, half, 1) + bn(half)
        total += (depth - 1) * branch(half, half)
        inputs = outputs
    return total + conv(464, 1024, 1) + bn(1024) + linear(1024, 100)


# Name, the sum over its layers, and the millions that papers print for CIFAR-100, where they do.
SIZES = [
    ("resnet8", resnet(1, 16, 16, 32, 64), None),
    ("resnet14", resnet(2, 16, 16, 32, 64), None),
    ("resnet20", resnet(3, 16, 16, 32, 64), "0.28"),
    ("resnet32", resnet(5, 16, 16, 32, 64), "0.47"),
    ("resnet44", resnet(7, 16, 16, 32, 64), None),
    ("resnet56", resnet(9, 16, 16, 32, 64), "0.86"),
    ("resnet110", resnet(18, 16, 16, 32, 64), "1.74"),
    ("resnet8x4", resnet(1, 32, 64, 128, 256), "1.23"),
    ("resnet32x4", resnet(5, 32, 64, 128, 256), "7.43"),
    ("resnet50", resnet50(), "23.71"),
    ("wrn_16_1", wide_resnet(2, 1), None),
    ("wrn_16_2", wide_resnet(2, 2), "0.70"),
    ("wrn_40_1", wide_resnet(6, 1), "0.57"),
    ("wrn_40_2", wide_resnet(6, 2), "2.26"),
    ("vgg8", vgg(1, 1, 1, 1, 1), "3.97"),
    ("vgg11", vgg(1, 1, 2, 2, 2), None),
    ("vgg13", vgg(2, 2, 2, 2, 2), "9.46"),
    ("vgg16", vgg(2, 2, 3, 3, 3), None),
    ("vgg19", vgg(2, 2, 4, 4, 4), None),
    ("vgg_pool", sum(conv(*widths, 3) for widths in pairwise((3, 64, 128, 256, 512, 512))) + 512 * 100, None),
    ("mobilenetv2", mobilenetv2(), "0.81"),
    ("shufflenetv1", shufflenetv1(), "0.95"),
    ("shufflenetv2", shufflenetv2(), "1.36"),
    ("mlp", linear(3 * 32 * 32, 128) + linear(128, 100), None),
    ("cnn", conv(3, 32, 3) + bn(32) + conv(32, 64, 3) + bn(64) + linear(64, 100), None),
    ("conv_stride", conv(3, 8, 3) + bn(8) + conv(8, 16, 3) + bn(16) + linear(16 * 8 * 8, 100), None),
]


@pytest.mark.parametrize(("name", "expected", "millions"), SIZES)
def test_number_of_parameters_is_that_of_the_literature(
    name: str, expected: int, millions: str | None
) -> None:
    with torch.device("meta"):
        count = models.count_parameters(models.build(name, classes=100))
    assert count == expected
    assert millions is None or f"{count / 1e6:.2f}" == millions


def test_every_network_has_its_size_checked() -> None:
    assert {name for name, *_ in SIZES} == set(models.names())


def test_resnet20_counted_by_eye() -> None:
    stem = 3 * 16 * 9 + 32
    first = 3 * 2 * (16 * 16 * 9 + 32)
    second = (16 * 32 * 9 + 5 * 32 * 32 * 9) + 6 * 64 + (16 * 32 + 64)
    third = (32 * 64 * 9 + 5 * 64 * 64 * 9) + 6 * 128 + (32 * 64 + 128)
    head = 64 * 100 + 100
    model = models.build("resnet20", classes=100)
    assert models.count_parameters(model) == stem + first + second + third + head


@pytest.fixture(scope="module", params=models.names())
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)  # a fixture of the module comes before the seed of the test
    return models.build(request.param, classes=7, input_shape=(3, 16, 16))


def test_gradient_reaches_every_parameter(model: nn.Module) -> None:
    model.train()
    logits = model(torch.randn(4, 3, 16, 16))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    # A bias in front of batch normalisation cancels out, so its gradient is zero by nature.
    idle = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name in idle or parameter.grad.any(), name


def test_evaluation_is_deterministic_and_treats_examples_alone(model: nn.Module) -> None:
    model.eval()
    batch = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        together = model(batch)
        assert torch.equal(model(batch), together)
        alone = torch.cat([model(example[None]) for example in batch])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_parts_have_the_same_names_in_every_family(model: nn.Module) -> None:
    assert [name for name, _ in model.named_children()] == ["stem", "stages", "neck", "pool", "head"]
    assert model.get_submodule("stages.0") is next(model.get_submodule("stages").children())
    seen: list[Tensor] = []
    handle = model.get_submodule("pool").register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        logits = model.eval()(torch.randn(2, 3, 16, 16))
    handle.remove()
    torch.testing.assert_close(model.get_submodule("head")(seen[0]), logits)
    assert seen[0].ndim == 2


def test_no_module_overwrites_what_a_hook_has_seen(model: nn.Module) -> None:
    assert not any(getattr(module, "inplace", False) for module in model.modules())


MAPS = {
    "resnet8": [(16, 32), (16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(32, 32), (64, 32), (128, 16), (256, 8)],
    "resnet50": [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_16_2": [(16, 32), (32, 32), (64, 16), (128, 8)],
    "vgg8": [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)],
    "vgg_pool": [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)],
    "mobilenetv2": [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(24, 32), (240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(24, 32), (116, 16), (232, 8), (464, 4)],
    "cnn": [(32, 32), (64, 16)],
    "conv_stride": [(8, 16), (16, 8)],
}


def feature_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the stem and the stages return."""
    seen: list[Tensor] = []
    parts = [model.get_submodule("stem"), *model.get_submodule("stages").children()]
    handles = [part.register_forward_hook(lambda _m, _i, output: seen.append(output)) for part in parts]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MAPS)
def test_widths_and_resolutions_of_the_stages(name: str) -> None:
    maps = feature_maps(models.build(name, classes=10), torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, width, side, side) for width, side in MAPS[name]]


def test_vgg_halves_the_last_stage_of_large_images_only() -> None:
    for side, last in ((28, 3), (32, 4), (64, 4)):
        model = models.build("vgg8", classes=10, input_shape=(3, side, side))
        assert feature_maps(model, torch.randn(1, 3, side, side))[-1].shape == (1, 512, last, last)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (4, 20, 36)])
@pytest.mark.parametrize(
    "name",
    ["mlp", "cnn", "conv_stride", "resnet8", "wrn_16_1", "vgg8", "vgg_pool", "mobilenetv2", "shufflenetv1"],
)
def test_any_image_shape(name: str, shape: tuple[int, int, int]) -> None:
    model = models.build(name, classes=5, input_shape=shape).eval()
    with torch.no_grad():
        assert model(torch.randn(1, *shape)).shape == (1, 5)


def test_convolutions_start_from_hes_distribution_over_outputs() -> None:
    model = models.build("vgg8", classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (3 * 3 * module.out_channels))
            # The relative standard error of a standard deviation is 1/sqrt(2n); five of them.
            assert module.weight.std().item() == pytest.approx(
                std, rel=5 / math.sqrt(2 * module.weight.numel())
            )
            assert module.bias is not None
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def silence(branch: nn.Module) -> None:
    """Make a residual branch return zero, by way of its last parameters."""
    last = [module for module in branch.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)


@pytest.mark.parametrize("make", [basic_block, bottleneck])
def test_residual_block_ends_in_an_activation(make) -> None:
    x = torch.randn(2, 8, 4, 4)
    block = make(8, 8, 1)
    silence(block.residual)
    torch.testing.assert_close(block(x), x.clamp(min=0))


def test_blocks_with_a_linear_shortcut_return_their_input() -> None:
    x = torch.randn(2, 8, 4, 4)
    for block in (PreActivationBlock(8, 8, 1), InvertedResidual(8, 8, 1, expansion=6)):
        silence(block.residual)
        torch.testing.assert_close(block(x), x)


def test_inverted_residual_has_a_linear_bottleneck() -> None:
    block = InvertedResidual(4, 8, 2, expansion=6)
    assert (block(torch.randn(4, 4, 8, 8)) < 0).any()


def test_wide_block_projects_the_activated_input() -> None:
    x = torch.randn(2, 8, 4, 4)
    block = PreActivationBlock(8, 16, 2).eval()
    silence(block.residual)
    assert block.shortcut is not None
    activated = (x / math.sqrt(1 + 1e-5)).clamp(min=0)
    torch.testing.assert_close(block(x), F.conv2d(activated, block.shortcut.weight, stride=2))


def test_shuffle_unit_of_stride_two_sets_the_pooled_input_behind_the_branch() -> None:
    x = torch.rand(2, 24, 6, 6)
    unit = GroupedUnit(24, 60, 2)
    silence(unit.branch)
    out = unit(x)
    assert out.shape == (2, 60, 3, 3)
    assert not out[:, :36].any()
    # One padded 3x3 window, counted by hand: the corner holds 4 pixels and 5 zeros.
    torch.testing.assert_close(out[:, 36:, 0, 0], x[:, :, :2, :2].sum((2, 3)) / 9)
    torch.testing.assert_close(out[:, 36:, 1, 1], x[:, :, 1:4, 1:4].mean((2, 3)))


def test_shuffle_unit_carries_every_group_of_channels_to_every_other() -> None:
    unit = GroupedUnit(48, 48, 1).eval()
    for parameter in unit.parameters():
        parameter.data.abs_()  # so that no activation stops a change
    x = torch.rand(1, 48, 4, 4)
    for group in range(3):
        other = x.clone()
        other[:, 16 * group : 16 * (group + 1)] += 1
        changed = unit.branch(other) != unit.branch(x)
        assert all(part.any() for part in changed.split(16, dim=1))


def test_split_unit_keeps_one_half_and_interleaves() -> None:
    x = torch.randn(1, 6, 2, 2)
    unit = SplitUnit(6)
    unit.branch = nn.Identity()
    torch.testing.assert_close(unit(x), x[:, [0, 3, 1, 4, 2, 5]])
    x = torch.randn(1, 6, 2, 2).to(memory_format=torch.channels_last)
    torch.testing.assert_close(unit(x), x[:, [0, 3, 1, 4, 2, 5]])


def test_down_unit_gives_each_branch_half_of_the_output() -> None:
    unit = DownUnit(4, 10).eval()
    silence(unit.branch)
    out = unit(torch.randn(3, 4, 8, 8))
    assert out.shape == (3, 10, 4, 4)
    assert not out[:, 1::2].any()
    assert out[:, ::2].any()


def test_options_of_the_small_networks() -> None:
    deep = models.build("mlp", classes=10, input_shape=(64,), hidden=[32, 16])
    assert models.count_parameters(deep) == (64 * 32 + 32) + (32 * 16 + 16) + (16 * 10 + 10)
    assert deep(torch.randn(2, 64)).shape == (2, 10)
    softmax_regression = models.build("mlp", classes=10, input_shape=(1, 8, 8), hidden=())
    assert models.count_parameters(softmax_regression) == 64 * 10 + 10
    # 8, 4, 2, 1 and 1 pixels: the last convolution finds nothing left to halve.
    cnn = models.build("cnn", classes=10, input_shape=(1, 8, 8), widths=(4, 5, 6, 7, 8))
    maps = feature_maps(cnn, torch.randn(1, 1, 8, 8))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 8, 8), (5, 4, 4), (6, 2, 2), (7, 1, 1), (8, 1, 1)]


def test_conv_stride_is_tiny() -> None:
    model = models.build("conv_stride", classes=10, input_shape=(1, 28, 28))
    assert models.count_parameters(model) == (8 * 9 + 16) + (16 * 8 * 9 + 32) + (16 * 7 * 7 * 10 + 10)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet8", (64,), {}, r"\(channels, height, width\).*got \(64,\)"),
        ("cnn", (64,), {}, r"\(channels, height, width\).*got \(64,\)"),
        ("vgg8", (3, 4, 4), {}, r"at least 8x8 pixels, got \(3, 4, 4\)"),
        ("mlp", (64,), {"hidden": 128}, r"`hidden` as a list of positive integers, got 128"),
        ("mlp", (64,), {"hidden": (0,)}, r"`hidden` as a list of positive integers, got \(0,\)"),
        ("cnn", (1, 8, 8), {"widths": ()}, r"`widths` as a non-empty list of positive integers, got \(\)"),
        ("cnn", (1, 8, 0), {}, r"`input_shape` as a non-empty list of positive integers, got \(1, 8, 0\)"),
    ],
)
def test_shapes_and_widths_that_cannot_be(name: str, shape, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build(name, classes=10, input_shape=shape, **options)


def test_native_networks_are_all_of_one_class() -> None:
    with torch.device("meta"):
        assert all(type(models.build(name, classes=2)) is Network for name in models.names())
