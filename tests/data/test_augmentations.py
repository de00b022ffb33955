from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luce.data import augment
from luce.data.augmentations import crop_flip, flip
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


@pytest.mark.parametrize("name", ["flip", "crop_flip"])
def test_images_only(name):
    with pytest.raises(UserError, match=rf"`{name}` expects images .* got \(4, 13\)"):
        augment(name)(torch.rand(4, 13))


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(UserError, match="unknown augmentation `crop`; did you mean `crop_flip`"):
        augment("crop")
