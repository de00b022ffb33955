"""Distillation losses: pure functions in `functional`, their modules in `modules`."""

from ..labels import UNLABELLED
from ..ops.linear import LinearLogits, TopKLogits
from . import functional, modules
from ._teacher import teacher_gradient
from .functional.listwise import pld_error_bound, teacher_order
from .temperature import suggest_temperature

__all__ = [
    "UNLABELLED",
    "LinearLogits",
    "TopKLogits",
    "functional",
    "modules",
    "pld_error_bound",
    "suggest_temperature",
    "teacher_gradient",
    "teacher_order",
]
