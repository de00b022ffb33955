"""The method that the loss terms of a recipe describe."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .. import checks, losses
from ..config import parse
from ..data import Data
from ..errors import UserError, unknown_name
from ..losses import FeatureLoss, LogitLoss
from ..losses.modules import Standardized, WeightedSum
from ..methods import (
    MEKD,
    FeatureMethod,
    FeatureTerm,
    LogitMethod,
    MetaDistil,
    Method,
    MutualLearning,
    TwoViewMethod,
)
from ..models.loaders import fresh_weights_expected
from ..training.session import make_optimizer
from .build import build_network
from .schema import ModelOptions, Recipe

Terms = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Context:
    """The rest of a recipe, for procedures that build networks of their own.

    Attributes:
        recipe: Its student and training options.
        data: For which networks are built; None where the method is checked and never used.
    """

    recipe: Recipe
    data: Data | None


def mutual_learning(
    method: Method,
    *,
    context: Context,
    peer: dict[str, Any] | None = None,
    peer_lr: float | None = None,
) -> MutualLearning:
    """Build `luce.methods.MutualLearning` with a peer that is built and trained like the student.

    Args:
        method: Of both networks.
        context: Of the recipe.
        peer: Fields of the peer's `ModelOptions`, if it differs from the student.
        peer_lr: Its peak learning rate, if it differs.
    """
    if not isinstance(peer, dict | None):
        raise UserError(f"expected a mapping for `peer`, such as {{name: resnet20}}, got {peer!r}")
    network = context.recipe.student if peer is None else parse(ModelOptions, peer)
    if peer is not None and "name" not in peer:
        raise UserError(f"expected a `name` for `peer`, or no `peer` for one like the student, got {peer!r}")
    training = context.recipe.training
    if peer_lr is not None:
        checks.check_positive(peer_lr=peer_lr)
        training = dataclasses.replace(training, lr=peer_lr)

    def new_peer() -> nn.Module:
        assert context.data is not None
        with fresh_weights_expected():
            return build_network(network, context.data)[0]

    return MutualLearning(
        method, new_peer, optimizer=partial(make_optimizer, training), clip_norm=training.clip_norm
    )


PROCEDURES: dict[str, Callable[..., Method]] = {
    "MEKD": MEKD,
    "MetaDistil": MetaDistil,
    "MutualLearning": mutual_learning,
}
"""Methods that change how another one is trained, by their names in recipes.

Each is called with that other method; its keyword-only parameters are its options in a recipe, but for
`context`, a `Context`.
"""


def build_method(recipe: Recipe, data: Data | None = None) -> Method:
    """Build the method that a recipe describes.

    Args:
        recipe: Its loss terms, and all that procedures need.
        data: For networks that a method trains too; None if the method is checked and never used.
    Raises:
        UserError: As `combine_terms`, and for options of data or teacher that do not suit the method.
    """
    method = combine_terms(recipe.loss, Context(recipe, data))
    generates_inputs = method.capabilities.generates_inputs is not None
    if generates_inputs and recipe.teacher is not None and recipe.teacher.cache_outputs:
        raise UserError(
            f"expected a teacher that answers the inputs that {type(method).__name__} generates, got cached "
            "answers to the rows; set `teacher.cache_outputs: false`"
        )
    return method if recipe.data.strong_augment == "none" else TwoViewMethod(method)


def combine_terms(terms: Terms, context: Context | None = None) -> Method:
    """Build a method from loss terms: on the logits, on features, or on both.

    An entry with ``method`` and without ``loss`` names one of `PROCEDURES`, which takes the method of the
    other entries.

    Args:
        terms: By name; see `luce.recipes.Recipe`.
        context: For procedures that need it.
    Raises:
        UserError: As `build_loss`, if all weights are 0, and on a term on features that names no module.
    Example:
        >>> method = combine_terms(
        ...     {"task": {"loss": "CrossEntropyLoss"}, "hint": {"loss": "FitNetLoss", "student": "stages.0"}}
        ... )
        >>> method.terms["hint"].teacher
        ['stages.0']
    """
    # A loss may have an option called `method`: an entry that names a loss is never a procedure.
    procedures = [name for name, term in terms.items() if "method" in term and "loss" not in term]
    if len(procedures) > 1:
        raise UserError(f"expected one entry with `method` in `loss`, got {procedures}")
    for name in procedures:
        inner = combine_terms({other: term for other, term in terms.items() if other != name}, context)
        return _apply_procedure(f"loss.{name}", dict(terms[name]), inner, context)
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
        loss = _build(f"loss.{term}", known, options, other_keys=("weight", "warmup", "student", "teacher"))
        features[term] = FeatureTerm(weight, loss, student, teacher, warmup)
    try:
        return FeatureMethod(build_loss(on_logits) if on_logits else None, features)
    except (TypeError, ValueError) as error:
        raise UserError(f"`loss`: {error}") from error


def _apply_procedure(place: str, options: dict[str, Any], inner: Method, context: Context | None) -> Method:
    name = str(options.pop("method"))
    if name not in PROCEDURES:
        raise unknown_name(f"method in `{place}`:", name, PROCEDURES)
    parameters = inspect.signature(PROCEDURES[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    allowed = [option for option in known if option != "context"]
    for option in options:
        if option not in allowed:
            raise unknown_name(f"option of {name} in `{place}`:", option, allowed)
    if "context" in known:
        if context is None:
            raise ValueError(f"expected a `context` for {name}, got None")
        options["context"] = context
    try:
        return PROCEDURES[name](inner, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{place}`: {error}") from error


def _paths(term: str, network: str, value: object) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise UserError(
            f"expected `loss.{term}.{network}` to name the modules whose outputs are compared, such as pool "
            f"or [stages.0, stages.1], got {value!r}; write a module that has only a number as body.0"
        )
    return paths


def build_loss(terms: Terms) -> WeightedSum:
    """Build the weighted sum of terms on logits.

    Args:
        terms: By name; see `luce.recipes.Recipe`.
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
        loss = _build(f"loss.{term}", known, options, other_keys=("weight", "warmup", "standardize"))
        built[term] = (weight, Standardized(loss) if standardize else loss)
    try:
        return WeightedSum(built, warmup)
    except (TypeError, ValueError) as error:
        raise UserError(f"`loss`: {error}") from error


def _known(kind: type[nn.Module]) -> dict[str, type[Any]]:
    """Losses of a kind that a recipe may name."""
    modules = {name: getattr(losses.modules, name) for name in losses.modules.__all__}
    not_by_name = (kind, Standardized)
    return {name: cls for name, cls in modules.items() if issubclass(cls, kind) and cls not in not_by_name}


def _build(
    place: str, known: Mapping[str, type[Any]], options: dict[str, Any], other_keys: Sequence[str]
) -> Any:
    """Build a loss from an entry without its `other_keys`, which an error message lists too."""
    name = str(options.pop("loss", None))
    if name not in known:
        if name in _known(FeatureLoss):
            raise UserError(f"expected a loss on logits in `{place}`, got {name}, which compares features")
        raise unknown_name(f"loss in `{place}`:", name, (*_known(LogitLoss), *_known(FeatureLoss)))
    for option in options:
        if option not in (allowed := [field.name for field in dataclasses.fields(known[name])]):
            raise unknown_name(f"option of {name} in `{place}`:", option, (*allowed, *other_keys))
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{place}`: {error}") from error
