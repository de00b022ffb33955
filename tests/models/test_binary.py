"""Binary weights: the sheet's numbers, the gradient, and which layers have them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from luce import models
from luce.errors import UserError
from luce.models.binary import BinaryWeight, baked, binarize_, binary_layers, binary_parts, size_in_bits

IMAGES = {"classes": 5, "input_shape": (2, 8, 8)}
SMALL = {"widths": [4, 6, 8], "hidden": [7]}


def network(name: str = "binary:vgg_pool", **options: Any) -> nn.Module:
    return models.build(name, **IMAGES, **{**SMALL, **options})


def test_two_filters_by_hand() -> None:
    latent = torch.tensor([[0.2, -0.4, 0.6], [1.5, -0.1, 0.0]], dtype=torch.float64)
    # Less their means 0.4 / 3 and 1.4 / 3, the second's first weight clamped from 1.0333 to 1.
    first = (abs(0.2 - 0.4 / 3) + abs(-0.4 - 0.4 / 3) + abs(0.6 - 0.4 / 3)) / 3
    second = (1 + (0.1 + 1.4 / 3) + 1.4 / 3) / 3
    expected = torch.tensor([[first, -first, first], [second, -second, -second]], dtype=torch.float64)
    torch.testing.assert_close(BinaryWeight()(latent), expected)
    signs, scale = BinaryWeight().parts(latent)
    torch.testing.assert_close(scale, torch.tensor([first, second], dtype=torch.float64))
    assert signs.tolist() == [[1, -1, 1], [1, -1, -1]]
    assert (round(first, 5), round(second, 5)) == (0.35556, 0.67778)


def test_the_sign_of_zero_is_plus_one() -> None:
    signs, _ = BinaryWeight().parts(torch.tensor([[1.0, 0.0, -1.0]]))
    assert signs.tolist() == [[1, 1, -1]]
    assert BinaryWeight()(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


SHAPES = [(3, 4), (3, 4, 3), (2, 3, 3, 3), (2, 3, 1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_term_by_term(shape: tuple[int, ...]) -> None:
    """Against the formula, one weight after the other."""
    latent = 0.3 * torch.randn(shape, dtype=torch.float64)
    latent -= latent.mean(1, keepdim=True)
    gradient = torch.randn(shape, dtype=torch.float64)
    weight = latent.clone().requires_grad_()
    BinaryWeight()(weight).backward(gradient)
    channels, count = shape[1], latent[0].numel()
    for o in range(shape[0]):
        w, g = latent[o].flatten().tolist(), gradient[o].flatten().tolist()
        alpha = sum(map(abs, w)) / count
        common = sum((1 if x >= 0 else -1) * y for x, y in zip(w, g, strict=True)) / count
        expected = [
            (alpha * y + (1 if x >= 0 else -1) * common) * (1 - 1 / channels) * count
            for x, y in zip(w, g, strict=True)
        ]
        torch.testing.assert_close(weight.grad[o].flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_a_sign_taken_as_straight_through(shape: tuple[int, ...]) -> None:
    latent = 0.3 * torch.randn(shape, dtype=torch.float64)
    weight, oracle = latent.clone().requires_grad_(), (latent - latent.mean(1, keepdim=True)).requires_grad_()
    gradient = torch.randn(shape, dtype=torch.float64)
    BinaryWeight("none")(weight).backward(gradient)
    signs = oracle + (torch.where(oracle >= 0, 1.0, -1.0) - oracle).detach()
    product = oracle.abs().mean(tuple(range(1, len(shape))), keepdim=True) * signs
    product.backward(gradient)
    torch.testing.assert_close(BinaryWeight()(latent), product.detach())
    torch.testing.assert_close(weight.grad, oracle.grad)


def test_forward_mode_has_the_same_derivative() -> None:
    latent = 0.3 * torch.randn(3, 4, 2, dtype=torch.float64)
    direction, gradient = torch.randn_like(latent), torch.randn_like(latent)
    _, along = torch.func.jvp(BinaryWeight(), (latent,), (direction,))
    (back,) = torch.func.vjp(BinaryWeight(), latent)[1](gradient)
    torch.testing.assert_close((along * gradient).sum(), (back * direction).sum())


def test_no_gradient_leads_further_beyond_the_clamp() -> None:
    weight = torch.tensor([[3.0, -3.0, 0.0]], requires_grad=True)
    for gradient, blocked in (([-1.0, 1.0, 0.0], True), ([1.0, -1.0, 0.0], False)):
        weight.grad = None
        BinaryWeight("none")(weight).backward(torch.tensor([gradient]))
        assert (weight.grad[0, :2] == 0).all() == blocked
        assert BinaryWeight()(weight).abs().max().item() == pytest.approx(2 / 3)


def test_training_is_that_of_weights_written_back() -> None:
    """The procedure with centred weights stored before every step, and plain gradient descent."""
    inputs = torch.randn(64, 6, dtype=torch.float64)
    target = (inputs @ torch.randn(6, 3, dtype=torch.float64)).argmax(1)
    layer = nn.Linear(6, 3, bias=False, dtype=torch.float64)
    stored = layer.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, "weight", BinaryWeight())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(layer(inputs), target).backward()
        optimizer.step()
        stored = (stored - stored.mean(1, keepdim=True)).clamp(-1, 1)
        signs = torch.where(stored >= 0, 1.0, -1.0).double()
        alpha = stored.abs().mean(1, keepdim=True)
        binary = (alpha * signs).requires_grad_()
        F.cross_entropy(inputs @ binary.T, target).backward()
        g = binary.grad
        stored = stored - 0.02 * (alpha * g + signs * (signs * g).mean(1, keepdim=True)) * (1 - 1 / 6) * 6
    torch.testing.assert_close(layer.weight, BinaryWeight()(stored))


def test_a_forward_pass_changes_no_parameter() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 2, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_values_per_filter_but_in_the_first_and_last_layer() -> None:
    model = network()
    assert list(binary_layers(model)) == ["stages.0.0", "stages.1.0", "pool.2"]
    for layer in binary_layers(model).values():
        for row in layer.weight.detach().flatten(1):
            assert len(row.unique()) == 2
            assert row.abs().unique().numel() == 1
    for layer in (model.stem[0], model.head):
        assert binary_parts(layer) is None
        assert len(layer.weight.unique()) == layer.weight.numel()


def test_the_start_is_that_of_the_network_without_binary_weights() -> None:
    torch.manual_seed(1)
    model = network()
    torch.manual_seed(1)
    plain = network("vgg_pool")
    for ours in model.parameters():
        assert any(torch.equal(ours, theirs) for theirs in plain.parameters())


def test_a_layer_of_one_input_channel_keeps_its_weights() -> None:
    model = binarize_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)))
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert (model[1].weight != 0).all()
    assert model[1].parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "cnn"])
def test_any_network_can_have_binary_weights(name: str) -> None:
    options = {"widths": [4, 6, 8]} if name == "cnn" else {}
    model = models.build(f"binary:{name}", **IMAGES, **options)
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(binary_layers(model)) == len(weighted) - 2
    model(torch.randn(3, 2, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_copies_and_averages() -> None:
    model = network().eval()
    images = torch.randn(3, 2, 8, 8)
    expected = model(images)
    average = AveragedModel(model)
    plain = baked(model)
    assert not binary_layers(plain)
    assert list(plain.state_dict()) == list(network("vgg_pool").state_dict())
    for other in (copy.deepcopy(model), average, plain, model):  # the last one: baking leaves it alone
        assert torch.equal(other(images), expected)
    again = network()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), expected)
    with pytest.raises(RuntimeError, match="parametrizations"):  # latent weights are no weights
        network("vgg_pool").load_state_dict(model.state_dict())


def test_weights_that_autocast_narrows() -> None:
    model = network().eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 2, 8, 8))
    logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_size_in_bits() -> None:
    binary = 9 * (4 * 6 + 6 * 8) + 8 * 7
    scales = 6 + 8 + 7
    other = scales + 9 * 2 * 4 + 7 * 5
    size = size_in_bits(network())
    assert size == {
        "bits": binary + 32 * other,
        "full_precision_bits": 32 * (binary + other - scales),
        "binary_weights": binary,
        "scales": scales,
        "other": other - scales,
    }
    real = size_in_bits(network("vgg_pool"))
    assert real["bits"] == real["full_precision_bits"] == size["full_precision_bits"]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("binary:nothing", {}, "unknown model `nothing`"),
        ("binary:mlp", {"hidden": []}, "at least 3 convolutions and linear layers"),
        ("binary:mlp", {"hidden": [4, 4], "gradient_scale": "big"}, "expected `gradient_scale` to be one of"),
        ("binary:mlp", {"depth": 4}, "has no option `depth`"),
        ("vgg_pool", {"widths": [4], "blocks": [1, 2]}, "as many `blocks` as `widths`"),
        ("vgg_pool", {"dropout": 1.0}, "expected `dropout` in"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        models.build(name, **IMAGES, **options)


def test_blocks_of_the_pooled_network() -> None:
    model = network("vgg_pool", widths=[4, 6], blocks=[2, 1], hidden=[], dropout=0.0)
    kinds = [type(module).__name__ for module in model.stem]
    assert kinds == ["Conv2d", "ReLU", "Dropout", "Conv2d", "AvgPool2d", "ReLU"]
    assert all(module.bias is None for module in model.modules() if hasattr(module, "bias"))
    x = torch.randn(2, 2, 8, 8)
    expected = F.relu(F.conv2d(x, model.stem[0].weight, padding=1))
    expected = F.relu(F.avg_pool2d(F.conv2d(expected, model.stem[3].weight, padding=1), 2))
    expected = F.relu(F.avg_pool2d(F.conv2d(expected, model.stages[0][0].weight, padding=1), 2))
    torch.testing.assert_close(model.eval()(x), F.linear(expected.flatten(1), model.head.weight))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 28, 32])
def test_images_of_any_size(side: int) -> None:
    model = models.build("vgg_pool", classes=3, input_shape=(1, side, side), widths=[2, 3, 4])
    logits: Tensor = model(torch.randn(1, 1, side, side))
    assert logits.shape == (1, 3)
