from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from luce.data import augment, augmentations
from luce.data.augmentations import crop_flip, flip, strong
from luce.errors import UserError


def test_each_image_is_flipped_or_not():
    images = torch.rand(400, 2, 3, 5)
    flipped = flip(images)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    # Binomial(400, 1/2) has standard deviation 10; five of them.
    assert abs(int(mirrored.sum()) - 200) <= 50


def test_each_image_becomes_one_of_its_crops():
    images = torch.rand(300, 2, 4, 6)
    padded = F.pad(images, (4, 4, 4, 4))
    offsets = set()
    for result, canvas in zip(crop_flip(images), padded, strict=True):
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            for crop in [canvas[:, top : top + 4, left : left + 6]]
            if result.equal(crop) or result.equal(crop.flip(-1))
        ]
        assert found
        if result.any():
            assert len(found) == 1
            offsets.update(found)
    assert {top for top, _ in offsets} == set(range(1, 8))  # 0 and 8 move all four rows out of sight
    assert {left for _, left in offsets} == set(range(9))


def test_none_changes_nothing():
    features = torch.rand(2, 7)
    assert augment("none")(features) is features


def sampled(image, x, y):
    """Bilinear, in pixels counted from the middle of the first one, zeros around."""
    channels, height, width = image.shape
    left, top = math.floor(x), math.floor(y)
    value = torch.zeros(channels)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            value += image[:, row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return value


def test_strong_turns_shears_zooms_and_shifts(monkeypatch):
    """Each pixel is read where a shear, a turn and a shift in pixels around the middle take it."""
    images = torch.rand(3, 2, 5, 8)
    drawn = [
        torch.tensor(x)
        for x in ([0.0, 0.2, -0.25], [0, 0.1, -0.1], [1, 0.9, 1.1], [0, 0.2, -0.1], [0, -0.2, 0.1])
    ]
    numbers = iter(drawn)
    monkeypatch.setattr(augmentations, "_uniform", lambda *_: next(numbers))
    found = augmentations._distort(images)
    torch.testing.assert_close(found[0], images[0])  # nothing was asked of it
    for n, (turn, shear, zoom, right, down) in enumerate(torch.stack(drawn, 1).tolist()):
        for row in range(5):
            for column in range(8):
                x, y = column - 3.5, row - 2.0
                x, y = zoom * (x + shear * y), zoom * y
                x, y = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
                expected = sampled(images[n], x + 3.5 + right * 8 / 2, y + 2.0 + down * 5 / 2)
                torch.testing.assert_close(found[n, :, row, column], expected, rtol=0, atol=1e-5)


def test_strong_changes_contrast_and_brightness(monkeypatch):
    images = torch.rand(2, 3, 4, 4)
    numbers = iter([torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.25])])
    monkeypatch.setattr(augmentations, "_uniform", lambda *_: next(numbers))
    found = augmentations._recolour(images)
    torch.testing.assert_close(found[0], images[0])
    mean = images[1].mean()
    torch.testing.assert_close(found[1], (1.25 * (mean + 0.5 * (images[1] - mean))).clamp(0, 1))


@pytest.mark.parametrize(("height", "width", "side"), [(8, 12, 2), (2, 2, 1), (32, 32, 8)])
def test_strong_cuts_one_square_out_of_each_image(height, width, side):
    holes = augmentations._cut_out(torch.ones(400, 2, height, width)) == 0
    assert (holes[:, 0] == holes[:, 1]).all()
    seen = set()
    for hole in holes[:, 0]:
        rows, columns = hole.any(1).nonzero().flatten().tolist(), hole.any(0).nonzero().flatten().tolist()
        assert hole.sum() == len(rows) * len(columns) > 0
        assert rows == list(range(rows[0], rows[-1] + 1))
        assert columns == list(range(columns[0], columns[-1] + 1))
        at_an_edge = rows[0] == 0 or rows[-1] == height - 1
        assert len(rows) == side or (len(rows) < side and at_an_edge)
        seen.add((rows[0], rows[-1]))
    assert seen == {(max(top, 0), min(top + side, height) - 1) for top in range(1 - side, height)}


def test_each_image_gets_a_strong_view_of_its_own():
    x = torch.linspace(-1, 1, 16)
    blob = torch.exp(-3 * (x[:, None] ** 2 + x**2))  # a smooth picture: noise would not be known again
    images = blob.expand(50, 1, -1, -1)
    views = strong(images)
    assert views.shape == images.shape
    assert views.dtype == images.dtype
    assert ((views >= 0) & (views <= 1)).all()
    assert len({view.numpy().tobytes() for view in views}) == 50
    alike = torch.stack([torch.corrcoef(torch.stack([v.flatten(), blob.flatten()]))[0, 1] for v in views])
    assert 0.6 < alike.mean() < 0.99
    assert augment("strong")(images.double()).dtype == torch.float64


def test_strong_draws_from_the_global_generator():
    images = torch.rand(4, 1, 8, 8)
    state = torch.get_rng_state()
    first = strong(images)
    assert not strong(images).equal(first)
    torch.set_rng_state(state)
    assert strong(images).equal(first)


@pytest.mark.parametrize("limit", ["ROTATION", "SHEAR", "ZOOM", "SHIFT", "COLOUR"])
def test_each_limit_is_one_of_strong(limit, monkeypatch):
    for name in {"ROTATION", "SHEAR", "ZOOM", "SHIFT", "COLOUR"} - {limit}:
        monkeypatch.setattr(augmentations, name, 0.0)
    monkeypatch.setattr(augmentations, "_cut_out", lambda images: images)
    images = torch.rand(2, 1, 8, 8)
    assert (strong(images) - images).abs().max() > 1e-3
    monkeypatch.setattr(augmentations, limit, 0.0)
    torch.testing.assert_close(strong(images), images)


@pytest.mark.parametrize("name", ["flip", "crop_flip", "strong"])
def test_images_only(name):
    with pytest.raises(UserError, match=rf"`{name}` expects images .* got \(4, 13\)"):
        augment(name)(torch.rand(4, 13))


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(UserError, match="unknown augmentation `crop`; did you mean `crop_flip`"):
        augment("crop")
