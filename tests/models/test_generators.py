"""Generator and discriminator: sizes, ranges, and that images can be told apart by their mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luce.errors import UserError
from luce.models import count_parameters
from luce.models.generators import Discriminator, Generator

SHAPES = [(1, 1, 1), (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 14), (2, 33, 65), (1, 5, 1), (3, 80, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_of_any_size_in_range(shape: tuple[int, ...]) -> None:
    generator = Generator(7, shape, width=4)
    with torch.no_grad():
        generator.body[-2].weight.mul_(1e4)  # far into the tanh
        for mode in (True, False):
            images = generator.train(mode)(generator.draw(5))
            assert images.shape == (5, *shape)
            assert images.abs().max() <= 1
    assert Discriminator(shape)(images).shape == (5,)


@pytest.mark.parametrize(
    ("classes", "channels", "count"), [(10, 1, 312_705), (10, 3, 313_859), (100, 3, 1_051_139)]
)
def test_parameters_of_the_published_generator(classes: int, channels: int, count: int) -> None:
    assert count_parameters(Generator(classes, (channels, 32, 32))) == count


def test_large_images_start_from_a_small_map() -> None:
    shapes = {
        side: Generator(10, (3, side, side), width=2).body[1].unflattened_size for side in (32, 64, 224)
    }
    assert shapes == {32: (2, 8, 8), 64: (2, 8, 8), 224: (2, 7, 7)}


def test_latents_are_standard_normal_and_repeat_with_the_seed() -> None:
    generator = Generator(4, (1, 8, 8), width=4)
    torch.manual_seed(0)
    latents = generator.draw(5000)
    torch.manual_seed(0)
    assert torch.equal(latents, generator.draw(5000))
    assert latents.mean().abs() < 0.03
    assert (latents.std() - 1).abs() < 0.03


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)], ids=str)
def test_a_discriminator_learns_to_tell_batches_by_their_mean(shape: tuple[int, ...]) -> None:
    """With batch normalisation before the last layer and a single pixel there it could not."""
    torch.manual_seed(0)
    discriminator = Discriminator(shape)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in discriminator.modules())
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    for _ in range(30):
        dark, bright = (mean + 0.1 * torch.randn(16, *shape) for mean in (-0.5, 0.5))
        loss = (
            nn.functional.softplus(discriminator(dark)).mean()
            + nn.functional.softplus(-discriminator(bright)).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 0, 8), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("network", [lambda shape: Generator(10, shape), Discriminator], ids=["G", "D"])
def test_what_is_no_image(network: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="expected `input_shape` as"):
        network(shape)
