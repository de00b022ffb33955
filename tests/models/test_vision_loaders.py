"""The doors to timm and torchvision, where both are installed and can be imported."""

from __future__ import annotations

import pytest
import torch

from luce import models
from luce.errors import UserError

try:
    import timm  # noqa: F401
    import torchvision  # noqa: F401
except ImportError as error:
    pytest.skip(f"needs the extra luce[vision]: {error}", allow_module_level=True)
except RuntimeError as error:
    pytest.skip(
        f"torchvision is built for another PyTorch ({error}); run with `-p tests.vision_cure`",
        allow_module_level=True,
    )


def test_torchvision_models_classify() -> None:
    model = models.build("torchvision:resnet18", classes=7).eval()
    with torch.no_grad():
        assert models.logits_of(model(torch.randn(2, 3, 32, 32))).shape == (2, 7)
    # The ImageNet network has 11,689,512 parameters, 513 of which belong to each of its 1000 classes.
    assert models.count_parameters(model) == 11_689_512 - 513 * 993


def test_timm_models_classify_images_of_any_number_of_channels() -> None:
    model = models.build("timm:resnet18", classes=7, input_shape=(1, 32, 32)).eval()
    with torch.no_grad():
        assert models.logits_of(model(torch.randn(2, 1, 32, 32))).shape == (2, 7)
    # As above, less two of three channels in the 7x7 stem of 64 filters.
    assert models.count_parameters(model) == 11_689_512 - 513 * 993 - 2 * 64 * 49


def test_options_reach_the_library() -> None:
    vit = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = models.build("timm:vit_tiny_patch16_224", classes=3, input_shape=(3, 8, 8), **vit).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 3)
    model = models.build("torchvision:mobilenet_v2", classes=3, width_mult=0.25)
    assert model.features[0][0].out_channels == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:resnet_18", {}, r"unknown timm model `resnet_18`; did you mean .*`resnet18`"),
        ("timm:resnet18", {"flavour": "mild"}, r"timm model `resnet18` cannot be built.*'flavour'"),
        ("timm:resnet18.no_tag", {"pretrained": True}, r"cannot be built with these options.*no_tag"),
        ("torchvision:resnet_18", {}, r"unknown torchvision model `resnet_18`; did you mean .*`resnet18`"),
        (
            "torchvision:resnet18",
            {"flavour": "mild"},
            r"torchvision model `resnet18` cannot be built.*'flavour'",
        ),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, r"cannot be built with these options.*num_classes"),
        ("torchvision:fcn_resnet50", {}, r"unknown torchvision model `fcn_resnet50`"),
    ],
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build(name, classes=7, **options)


def test_torchvision_takes_three_channels() -> None:
    with pytest.raises(UserError, match=r"takes images of 3 channels, but `input_shape` is \(1, 28, 28\)"):
        models.build("torchvision:resnet18", classes=7, input_shape=(1, 28, 28))
