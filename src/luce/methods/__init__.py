"""Distillation methods: what one training step does."""

from .base import Method
from .logits import LogitMethod, Loss

__all__ = ["LogitMethod", "Loss", "Method"]
