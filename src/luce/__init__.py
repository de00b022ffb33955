"""Luce: knowledge distillation as choice.

Losses are imported with the package. Its other submodules are imported on first use: ``luce.models``,
``luce.data`` and all others can be named after ``import luce`` alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from .losses import (
    UNLABELLED,
    LinearLogits,
    TopKLogits,
    functional,
    modules,
    pld_error_bound,
    suggest_temperature,
    teacher_order,
)
from .losses.functional import *
from .losses.modules import *
from .ops.softmax import log_softmax, softmax

if TYPE_CHECKING:
    from .runs.distill import distill

__version__ = "0.1.0"

__all__ = sorted(
    [
        *functional.__all__,
        *modules.__all__,
        "UNLABELLED",
        "LinearLogits",
        "TopKLogits",
        "distill",
        "log_softmax",
        "pld_error_bound",
        "softmax",
        "suggest_temperature",
        "teacher_order",
    ]
)
del functional, modules

_SUBMODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def __getattr__(name: str) -> Any:
    if name == "distill":
        from .runs.distill import distill

        return distill
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'luce' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, "__version__"})
