"""The method that a recipe describes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from .. import checks, losses
from ..config import parse
from ..data import Data
from ..errors import UserError, unknown_name
from ..losses import FeatureLoss, LogitLoss
from ..losses.modules import SimKDLoss, Standardized, WeightedSum
from ..methods import (
    MEKD,
    FeatureMethod,
    FeatureTerm,
    LogitMethod,
    MetaDistil,
    Method,
    MutualLearning,
    SimKD,
    TwoViewMethod,
)
from ..models.loaders import fresh_weights_expected
from ..training.session import make_optimizer
from .build import build_network
from .schema import ModelOptions, Recipe

Terms = dict[str, dict[str, Any]]


def method_of(recipe: Recipe, loaded: Data | None = None) -> Method:
    """The method that a recipe describes.

    Args:
        recipe: Its loss, and for networks that a method trains along, how they are trained.
        loaded: The data for such networks; None if the method is to be looked at, not used.
    Raises:
        UserError: As `build_method` does.
    """

    def mutual_learning(
        method: Method, *, peer: dict[str, Any] | None = None, peer_lr: float | None = None
    ) -> MutualLearning:
        """With a peer like the student, trained like it, but for what is given."""
        if not isinstance(peer, dict | None):
            raise UserError(f"expected a mapping for `peer`, such as {{name: resnet20}}, got {peer!r}")
        network = recipe.student if peer is None else parse(ModelOptions, peer)
        if peer is not None and "name" not in peer:
            raise UserError(
                f"expected a `name` for `peer`, or no `peer` for one like the student, got {peer!r}"
            )
        if peer_lr is not None:
            checks.check_positive(peer_lr=peer_lr)
        training = recipe.training if peer_lr is None else dataclasses.replace(recipe.training, lr=peer_lr)

        def new_peer() -> nn.Module:
            assert loaded is not None
            with fresh_weights_expected():
                return build_network(network, loaded)[0]

        return MutualLearning(
            method, new_peer, optimizer=partial(make_optimizer, training), clip_norm=training.clip_norm
        )

    method = build_method(recipe.loss, {**PROCEDURES, "MutualLearning": mutual_learning})
    if method.generates_inputs and recipe.teacher is not None and recipe.teacher.cache_outputs:
        raise UserError(
            f"expected a teacher that can be asked about the inputs that {type(method).__name__} makes, got "
            "one that remembers its answers to the rows; set `teacher.cache_outputs: false`"
        )
    return method if recipe.data.strong_augment == "none" else TwoViewMethod(method)


PROCEDURES: dict[str, Callable[..., Method]] = {
    "MEKD": MEKD,
    "MetaDistil": MetaDistil,
}
"""Methods that go around another one, by their names in recipes."""


def build_method(terms: Terms, procedures: Mapping[str, Callable[..., Method]] = PROCEDURES) -> Method:
    """The method that the loss terms of a recipe describe: on the logits, on features, or on both.

    An entry with ``method`` instead of ``loss`` names one of the procedures, which goes around the others.
    Its options are those that the procedure takes by name only.

    Raises:
        UserError: As `build_loss`, if all weights are 0, and on a term on features that does not say which
            ones.
    Example:
        >>> method = build_method(
        ...     {"task": {"loss": "CrossEntropyLoss"}, "hint": {"loss": "FitNetLoss", "student": "stages.0"}}
        ... )
        >>> method.terms["hint"].teacher
        ['stages.0']
    """
    # A loss may have an option called `method`: an entry that names a loss is never a procedure.
    around = [name for name, term in terms.items() if "method" in term and "loss" not in term]
    if len(around) > 1:
        raise UserError(f"expected one entry with `method` in `loss`, got {around}")
    for name in around:
        inner = build_method({other: term for other, term in terms.items() if other != name})
        return _around(f"loss.{name}", dict(terms[name]), inner, procedures)
    if all(term.get("weight", 1.0) == 0 for term in terms.values()):
        raise UserError(f"expected a term of a weight above 0 in `loss`, got {sorted(terms)} without one")
    known = _known(FeatureLoss)
    on_features = {name: term for name, term in terms.items() if str(term.get("loss")) in known}
    on_logits = {name: term for name, term in terms.items() if name not in on_features}
    if not on_features:
        return LogitMethod(build_loss(terms))
    features = {}
    for term, description in on_features.items():
        options = dict(description)
        student = _paths(term, "student", options.pop("student", None))
        teacher = _paths(term, "teacher", options.pop("teacher", student))
        weight, warmup = options.pop("weight", 1.0), options.pop("warmup", 0.0)
        loss = _build(f"loss.{term}", known, options, beside=("weight", "warmup", "student", "teacher"))
        features[term] = FeatureTerm(weight, loss, student, teacher, warmup)
    try:
        reuses_head = any(isinstance(term.loss, SimKDLoss) for term in features.values())
        method = SimKD if reuses_head else FeatureMethod
        return method(build_loss(on_logits) if on_logits else None, features)
    except (TypeError, ValueError) as error:
        raise UserError(f"`loss`: {error}") from error


def _around(
    place: str, options: dict[str, Any], inner: Method, procedures: Mapping[str, Callable[..., Method]]
) -> Method:
    """A method around another one, from its name and options."""
    name = str(options.pop("method"))
    if name not in procedures:
        raise unknown_name(f"method in `{place}`:", name, procedures)
    parameters = inspect.signature(procedures[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name} in `{place}`:", option, known)
    try:
        return procedures[name](inner, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{place}`: {error}") from error


def _paths(term: str, network: str, value: object) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise UserError(
            f"expected `loss.{term}.{network}` to name a module or a list of modules, such as stages.0, "
            f"pool, or body.0 for one that has but a number, got {value!r}"
        )
    return paths


def build_loss(terms: Terms) -> WeightedSum:
    """The loss that the terms on logits of a recipe describe.

    Raises:
        UserError: On an unknown loss or option, or a value that the loss refuses.
    Example:
        >>> build_loss({"kd": {"loss": "KDLoss", "weight": 0.9, "temperature": 4.0}})
        WeightedSum(
          kd: 0.9
          (losses): ModuleDict(
            (kd): KDLoss(temperature=4.0)
          )
        )
    """
    known, built, warmup = _known(LogitLoss), {}, {}
    for term, description in terms.items():
        options = dict(description)
        weight = options.pop("weight", 1.0)
        if "warmup" in options:
            warmup[term] = options.pop("warmup")
        standardize = options.pop("standardize", False)
        if not isinstance(standardize, bool):
            raise UserError(f"expected `loss.{term}.standardize` to be true or false, got {standardize!r}")
        loss = _build(f"loss.{term}", known, options, beside=("weight", "warmup", "standardize"))
        built[term] = (weight, Standardized(loss) if standardize else loss)
    try:
        return WeightedSum(built, warmup)
    except (TypeError, ValueError) as error:
        raise UserError(f"`loss`: {error}") from error


def _known(kind: type[nn.Module]) -> dict[str, type[Any]]:
    """The losses of a kind that a recipe may name."""
    everything = {name: getattr(losses.modules, name) for name in losses.modules.__all__}
    no_loss = (kind, Standardized)
    return {name: cls for name, cls in everything.items() if issubclass(cls, kind) and cls not in no_loss}


def _build(place: str, known: Mapping[str, type[Any]], options: dict[str, Any], beside: Sequence[str]) -> Any:
    """A loss from its name and options, which stand in a recipe beside others that are not its own."""
    name = str(options.pop("loss", None))
    if name not in known:
        if name in _known(FeatureLoss):
            raise UserError(f"expected a loss on logits in `{place}`, got {name}, which compares features")
        raise unknown_name(f"loss in `{place}`:", name, (*_known(LogitLoss), *_known(FeatureLoss)))
    for option in options:
        if option not in (allowed := [field.name for field in dataclasses.fields(known[name])]):
            raise unknown_name(f"option of {name} in `{place}`:", option, (*allowed, *beside))
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{place}`: {error}") from error
