"""Every option of every loss can be set from a recipe, whatever it is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import luce
from luce.losses import FeatureLoss, LogitLoss
from luce.methods import FeatureMethod, LogitMethod
from luce.recipes.methods import combine_terms

from ..losses import catalogue, feature_cases

NAMED = [
    cls
    for cls in (getattr(luce.losses.modules, name) for name in luce.losses.modules.__all__)
    if issubclass(cls, LogitLoss | FeatureLoss) and cls is not luce.Standardized
]
CASES = [
    *((case.loss.module, case.options) for case in catalogue.CASES),
    *((case.module, case.options) for case in feature_cases.CASES),
]


def from_recipe(cls: type, options: dict[str, Any]) -> Any:
    """The loss of a recipe with one term."""
    on_features = issubclass(cls, FeatureLoss)
    place = {"student": "stages.0"} if on_features else {}
    method = combine_terms({"term": {"loss": cls.__name__, **place, **options}})
    if on_features:
        assert isinstance(method, FeatureMethod)
        return method.terms["term"].loss
    assert isinstance(method, LogitMethod)
    return method.loss.losses["term"]  # type: ignore[union-attr]


@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_each_option_of_each_loss_reaches_it(cls: type) -> None:
    for option in dataclasses.fields(cls):
        loss = from_recipe(cls, {option.name: option.default})
        assert type(loss) is cls
        assert getattr(loss, option.name) == option.default


def test_the_options_of_the_catalogue_reach_the_loss() -> None:
    for cls, options in CASES:
        assert from_recipe(cls, options).options() == cls(**options).options()


def test_a_loss_may_have_an_option_called_method(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(eq=False, repr=False, kw_only=True)
    class Own(luce.KDLoss):
        method: str = "plain"

        def options(self) -> dict[str, object]:
            return {name: value for name, value in super().options().items() if name != "method"}

    monkeypatch.setattr(luce.losses.modules, "Own", Own, raising=False)
    monkeypatch.setattr(luce.losses.modules, "__all__", [*luce.losses.modules.__all__, "Own"])
    assert from_recipe(Own, {"method": "fine"}).method == "fine"
