"""Small networks that convert, and images for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luce import models
from luce.models.binary import binarize_
from luce.spiking import Calibration, Chain, SpikingNetwork, convert, read


def build(name: str = "binary:vgg_pool", **options: object) -> nn.Module:
    """In evaluation mode and float64, where rounding decides nothing."""
    options = {"widths": [4, 6, 8], "hidden": [7], **options} if "vgg_pool" in name else options
    return models.build(name, classes=5, input_shape=(2, 8, 8), **options).double().eval()


def normed() -> nn.Module:
    """Batch normalisation that has learned, of either sign, behind convolutions and linear layers."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model.double().eval()


def pooled_behind() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 5)).double().eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "binary": build,
    "real": lambda: build("vgg_pool"),
    "binary, several convolutions in a block": lambda: build(widths=[4, 6], blocks=[2, 2], hidden=[]),
    "normalised": normed,
    "binary and normalised": lambda: binarize_(normed()),
    "mlp with biases": lambda: build("mlp", hidden=[9, 8]),
    "binary mlp": lambda: build("binary:mlp", hidden=[9, 8]),
    "pooled behind the activation": pooled_behind,
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 2, 8, 8, dtype=torch.float64)


@pytest.fixture(params=NETWORKS)
def source(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]()


@pytest.fixture
def chain(source: nn.Module) -> Chain:
    return read(source)


@pytest.fixture
def spiking(chain: Chain, images: Tensor) -> SpikingNetwork:
    """No activation is cut off on the images."""
    return convert(chain, Calibration(chain, [images]).scales(100.0))
