from __future__ import annotations

import numpy as np
import pytest
import torch

from luce.data.transforms import evaluation_view, random_box, to_tensor, training_view

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def gradient(width: int, height: int):
    """Red grows from left to right by one a pixel, green from top to bottom."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8))


def test_to_tensor_puts_channels_first_and_divides_by_255():
    image = gradient(3, 2)
    values = to_tensor(image)
    assert values.shape == (3, 2, 3)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0, 1], torch.tensor([0.0, 1.0, 2.0]) / 255)
    torch.testing.assert_close(values[1, :, 0], torch.tensor([0.0, 1.0]) / 255)
    assert to_tensor(image.convert("L")).shape == (1, 2, 3)


def test_evaluation_shows_the_middle():
    # A short side of int(19 / 0.95) = 20 is the image's own: no resampling, and the crop starts at
    # (40 - 19) // 2 = 10 and (20 - 19) // 2 = 0.
    values = evaluation_view(gradient(40, 20), 19) * 255
    torch.testing.assert_close(values[0, 0], torch.arange(10.0, 29.0))
    torch.testing.assert_close(values[1, :, 0], torch.arange(0.0, 19.0))


@pytest.mark.parametrize("size", [(7, 301), (301, 7), (32, 32), (1, 1)])
def test_evaluation_has_one_shape(size):
    assert evaluation_view(Image.new("RGB", size), 32).shape == (3, 32, 32)


def test_training_view_is_a_scaled_crop_and_sometimes_mirrored():
    torch.manual_seed(0)
    views = [training_view(gradient(200, 100), 16)[0] for _ in range(60)]
    rises = [bool(view[0, -1] > view[0, 0]) for view in views]
    assert 10 < sum(rises) < 50  # Binomial(60, 1/2), five standard deviations
    widths = torch.stack([(view[0, -1] - view[0, 0]).abs() for view in views])
    assert float(widths.max() - widths.min()) > 0.1  # crops of several sizes


def test_training_view_follows_the_global_generator():
    state = torch.get_rng_state()
    first = training_view(gradient(50, 40), 16)
    torch.set_rng_state(state)
    assert training_view(gradient(50, 40), 16).equal(first)


def test_boxes_lie_within_the_stated_area_and_aspect():
    torch.manual_seed(0)
    shares = []
    for _ in range(300):
        left, top, right, bottom = random_box(400, 300)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        width, height = right - left, bottom - top
        # Rounding moves a side by half a pixel; the shortest one is sqrt(0.08 * 120000 * 3 / 4) = 84.9.
        assert 0.74 < width / height < 1.35
        shares.append(width * height / 120_000)
    assert min(shares) > 0.078
    assert min(shares) < 0.15
    assert max(shares) > 0.8


def test_no_box_fits_a_very_long_image_so_the_middle_is_taken():
    # Even 8% of 1000 x 10 is 800 pixels, at least sqrt(800 * 3 / 4) = 24 high. The middle is 10 * 4/3 wide.
    assert random_box(1000, 10) == (493, 0, 506, 10)
    assert random_box(10, 1000) == (0, 493, 10, 506)
