"""Distillation losses: pure functions in `functional`, their modules in `modules`."""

from . import functional, modules
from ._reduce import UNLABELLED

__all__ = ["UNLABELLED", "functional", "modules"]
