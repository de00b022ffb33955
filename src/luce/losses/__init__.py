"""Distillation losses: pure functions in `functional`, their modules in `modules`.

The building blocks of losses are here: base classes, targets, and measures that are no losses themselves.
"""

from ..labels import UNLABELLED
from ..ops.linear import LinearLogits, TopKLogits
from . import functional, modules
from ._teacher import teacher_gradient
from .functional.curriculum import tempered_kd
from .functional.embeddings import linear_cka
from .functional.lipschitz import spectral_norm, transmitting_matrix
from .functional.listwise import pld_error_bound, teacher_order
from .functional.normalized import standardize
from .functional.partial import class_relations, partial_target, weight_similarity
from .modules.base import LogitLoss
from .modules.features import FeatureLoss
from .temperature import suggest_temperature

__all__ = [
    "UNLABELLED",
    "FeatureLoss",
    "LinearLogits",
    "LogitLoss",
    "TopKLogits",
    "class_relations",
    "functional",
    "linear_cka",
    "modules",
    "partial_target",
    "pld_error_bound",
    "spectral_norm",
    "standardize",
    "suggest_temperature",
    "teacher_gradient",
    "teacher_order",
    "tempered_kd",
    "transmitting_matrix",
    "weight_similarity",
]
