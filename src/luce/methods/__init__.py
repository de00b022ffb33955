"""Distillation methods: what one training step does."""

from .base import Method
from .logits import LogitMethod

__all__ = ["LogitMethod", "Method"]
