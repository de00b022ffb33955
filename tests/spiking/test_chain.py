"""What a network is read as, and what cannot be read."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from luce import models
from luce.errors import UserError
from luce.spiking import Chain, obstacles, read


def test_a_chain_answers_as_its_network(source: nn.Module, chain: Chain, images: Tensor) -> None:
    torch.testing.assert_close(chain(images), source(images))
    assert obstacles(source) == []


def test_reading_changes_nothing(source: nn.Module, images: Tensor) -> None:
    before, state = source(images), copy.deepcopy(source.state_dict())
    read(source)
    assert torch.equal(source(images), before)
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items())


def test_binary_weights_stay_binary(source: nn.Module, chain: Chain) -> None:
    for layer in chain.layers:
        values = layer.weighted.weight.unique().tolist()
        assert (values == [-1, 1]) == layer.binary
        assert layer.binary == hasattr(source.get_submodule(layer.path), "parametrizations")
        assert (layer.scale > 0).all()


def test_functions_count_as_modules() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 3, 3), nn.Linear(3 * 3 * 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.adaptive_avg_pool2d(F.avg_pool2d(self.first(x), 2), 3))
            return self.second(x.flatten(1))

    model, x = Written().eval(), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(read(model)(x), model(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


class Forgotten(nn.Module):
    """A layer whose output nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.second(x).relu()
        return self.head(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


LAST = nn.Linear(4, 2)
REFUSED = {
    "max pooling": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU()), "`1` is MaxPool2d"),
    "another activation": (nn.Sequential(nn.Linear(4, 4), nn.GELU(), LAST), "`1` is GELU, and the rate"),
    "a residual block": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Residual(), LAST),
        "`2` joins several paths",
    ),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), LAST), "`1` is LayerNorm"),
    "norm behind the activation": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), LAST),
        "`2` is BatchNorm1d that does not directly follow a layer",
    ),
    "norm behind a pooling": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), LAST),
        "`2` is BatchNorm2d that does not directly follow a layer",
    ),
    "two layers in a row": (nn.Sequential(nn.Linear(4, 4), LAST), "`1` follows `0` without a ReLU"),
    "an activation at the end": (
        nn.Sequential(LAST, nn.ReLU()),
        "no layer with weights after its last ReLU",
    ),
    "two activations in a row": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), LAST),
        "no layer with weights between two activations",
    ),
    "flattened too early": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.ReLU(), LAST),
        "`1` stands between a layer and its ReLU",
    ),
    "a forward pass that branches": (nn.Sequential(nn.Linear(4, 4), Branch(), LAST), "cannot be traced"),
    "no tensor": (nn.Sequential(LAST, Pair()), "does not return the output of its last layer"),
    "no activation": (nn.Sequential(nn.Flatten(), LAST), "it has no ReLU"),
    "an output that is not read": (Forgotten(), "`head` starts a branch"),
    "statistics of the batch": (
        nn.Sequential(LAST, nn.BatchNorm1d(2, track_running_stats=False), nn.ReLU(), nn.Linear(2, 2)),
        "`1` is BatchNorm1d without running statistics",
    ),
    "weights of a parametrisation": (
        nn.Sequential(LAST, nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
        "`2` has hooks or computed weights",
    ),
    "weights that are pruned": (
        nn.Sequential(LAST, nn.ReLU(), prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)),
        "`2` has hooks or computed weights",
    ),
    "another function": (
        nn.Sequential(LAST, nn.Unflatten(1, (1, 2))),
        "`1` is Unflatten, which has no spiking",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    model, reason = REFUSED[case]
    found = obstacles(model)
    assert len(found) == 1
    assert reason in str(found[0])
    with pytest.raises(UserError, match="expected a network that converts to spikes: ") as error:
        read(model)
    assert reason in str(error.value)


@pytest.mark.parametrize("name", models.names())
def test_native_networks_convert_or_say_why(name: str) -> None:
    network = models.build(name, classes=3, input_shape=(3, 16, 16)).eval()
    images = torch.randn(2, 3, 16, 16)
    found = obstacles(network)
    assert (not found) == (name in {"mlp", "conv_stride", "vgg_pool"})
    if not found:
        torch.testing.assert_close(read(network)(images), network(images), rtol=1e-4, atol=1e-5)
    for obstacle in found:
        network.get_submodule(obstacle.path)


def test_a_long_list_is_cut() -> None:
    with pytest.raises(UserError, match="and 4 more"):
        read(nn.Sequential(*[nn.Tanh() for _ in range(8)]))
