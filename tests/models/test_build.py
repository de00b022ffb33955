"""Building by name: errors, the `python:` door, Hugging Face checkpoints, missing libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luce import models
from luce.errors import MissingExtra, UserError


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model `resnet21`; did you mean .*`resnet20`"):
        models.build("resnet21", classes=10)
    with pytest.raises(UserError, match=r"`WRN-16-2`; did you mean `wrn_16_2`\?"):
        models.build("WRN-16-2", classes=10)
    with pytest.raises(UserError, match=r"unknown source of models `tim`; did you mean `timm`"):
        models.build("tim:resnet18", classes=10)


@pytest.mark.parametrize("classes", [0, -1, 2.0, "10", True])
def test_classes_is_a_positive_integer(classes) -> None:
    with pytest.raises(UserError, match="expected `classes` as a positive integer, got"):
        models.build("mlp", classes=classes)


def test_options_that_a_network_does_not_take() -> None:
    with pytest.raises(UserError, match=r"model `mlp` has no option `width`; it takes `hidden`"):
        models.build("mlp", classes=10, width=3)
    # What the name itself fixes is no option.
    with pytest.raises(UserError, match=r"model `resnet20` has no option `depth`; it takes none"):
        models.build("resnet20", classes=10, depth=32)


def test_count_parameters_counts_frozen_ones_and_shared_ones_once() -> None:
    layer = nn.Linear(4, 4)
    layer.requires_grad_(False)
    assert models.count_parameters(nn.Sequential(layer, layer)) == 4 * 4 + 4


def test_logits_of() -> None:
    logits = torch.randn(2, 3)
    assert models.logits_of(logits) is logits
    assert models.logits_of(SimpleNamespace(logits=logits)) is logits
    for output in ((logits,), SimpleNamespace(logits=None), None):
        with pytest.raises(UserError, match=rf"`\.logits`, got {type(output).__name__}"):
            models.logits_of(output)


USER_MODULE = """
from math import prod
from torch import nn

instance = nn.Linear(2, 2)
number = 3

def both(classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), classes))

def neither(width):
    return nn.Linear(width, width)

def anything(**options):
    model = nn.Identity()
    model.options = options
    return model

def no_module(classes):
    return [classes]

class Net(nn.Linear):
    def __init__(self, classes, *, width=4):
        super().__init__(width, classes)
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_models.py").write_text(USER_MODULE)
    (tmp_path / "broken_models.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "python:user_models"
    sys.modules.pop("user_models", None)


def test_python_door_hands_over_what_the_callable_takes(user_module: str) -> None:
    both = models.build(f"{user_module}.both", classes=3, input_shape=(2, 5))
    assert both(torch.randn(4, 2, 5)).shape == (4, 3)
    assert models.build(f"{user_module}.neither", classes=3, width=6).out_features == 6
    net = models.build(f"{user_module}.Net", classes=3, width=8)
    assert (net.in_features, net.out_features) == (8, 3)
    anything = models.build(f"{user_module}.anything", classes=3, input_shape=(7,), extra="yes")
    assert anything.options == {"classes": 3, "input_shape": (7,), "extra": "yes"}


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("bots", {}, r"unknown attribute of `user_models` `bots`; did you mean `both`"),
        ("number", {}, r"a function or class that builds a model, got an object of type int"),
        ("instance", {}, r"a function or class that builds a model, got an object of type Linear"),
        ("no_module", {}, r"to return a torch\.nn\.Module, got list"),
        ("neither", {}, r"cannot be built: missing a required argument: 'width'"),
        ("Net", {"depth": 2}, r"has no option `depth`; it takes `width`"),
    ],
)
def test_python_door_refuses(user_module: str, attribute: str, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build(f"{user_module}.{attribute}", classes=3, **options)


def test_python_door_says_why_an_import_failed(user_module: str) -> None:
    with pytest.raises(UserError, match=r"could not import `nowhere_models`.*PYTHONPATH"):
        models.build("python:nowhere_models.net", classes=3)
    with pytest.raises(UserError, match=r"could not import `broken_models`.*ZeroDivisionError") as caught:
        models.build("python:broken_models.net", classes=3)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(UserError, match=r"expected `python:package\.module\.attribute`, got `python:net`"):
        models.build("python:net", classes=3)


@pytest.mark.parametrize(
    ("door", "module", "extra"),
    [
        ("timm", "timm", "vision"),
        ("torchvision", "torchvision.models", "vision"),
        ("hf", "transformers", "text"),
    ],
)
def test_a_missing_library_names_its_extra(door: str, module: str, extra: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail, installed or not
    package = module.partition(".")[0]
    with pytest.raises(MissingExtra, match=rf"`{package}` could not be imported .*'luce\[{extra}\]'"):
        models.build(f"{door}:resnet18", classes=10)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the `hf:` door needs the extra luce[text]")


@pytest.fixture(scope="module")
def tiny_vit(transformers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A classifier of 1x8x8 images in 5 classes, saved in a folder."""
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=5,
    )
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_hugging_face_door_keeps_a_head_that_fits(tiny_vit, recwarn) -> None:
    folder, saved = tiny_vit
    model = models.build(f"hf:{folder}", classes=5, input_shape=(1, 8, 8)).eval()
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(models.logits_of(model(images)), saved(images).logits, rtol=0, atol=0)


def test_hugging_face_door_warns_of_a_fresh_head(tiny_vit) -> None:
    folder, saved = tiny_vit
    with pytest.warns(UserWarning, match=r"does not fill classifier\.bias, classifier\.weight for 7 classes"):
        model = models.build(f"hf:{folder}", classes=7, input_shape=(1, 8, 8))
    assert models.logits_of(model(torch.randn(3, 1, 8, 8))).shape == (3, 7)
    kept = model.state_dict()
    for name, value in saved.state_dict().items():
        assert name.startswith("classifier") or torch.equal(kept[name], value), name


def test_hugging_face_door_starts_afresh_if_asked(tiny_vit, recwarn) -> None:
    folder, saved = tiny_vit
    torch.manual_seed(1)  # the saved one was drawn with 0
    model = models.build(f"hf:{folder}", classes=5, input_shape=(1, 8, 8), pretrained=False)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert model.state_dict().keys() == saved.state_dict().keys()
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    assert models.logits_of(model(torch.randn(3, 1, 8, 8))).shape == (3, 5)


def test_hugging_face_door_reads_text_models(transformers, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=4,
    )
    saved = transformers.BertForSequenceClassification(config).eval()
    saved.save_pretrained(tmp_path)
    model = models.build(f"hf:{tmp_path}", classes=4).eval()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(models.logits_of(model(tokens)), saved(tokens).logits, rtol=0, atol=0)


def test_hugging_face_door_refuses(tiny_vit, transformers, tmp_path: Path) -> None:
    folder, _ = tiny_vit
    with pytest.raises(UserError, match=r"takes images of 1 channels, but `input_shape` is \(3, 8, 8\)"):
        models.build(f"hf:{folder}", classes=5, input_shape=(3, 8, 8))
    with pytest.raises(UserError, match=r"cannot be built with these options: .*'flavour'"):
        models.build(f"hf:{folder}", classes=5, input_shape=(1, 8, 8), flavour="mild")
    with pytest.raises(UserError, match=r"to name a model on the hub or in a local folder"):
        models.build(f"hf:{tmp_path}", classes=5)
    transformers.MimiConfig().save_pretrained(tmp_path / "codec")
    with pytest.raises(UserError, match=r"a model of type `mimi`, for which transformers has no classifier"):
        models.build(f"hf:{tmp_path / 'codec'}", classes=5)
