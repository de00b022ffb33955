"""Distillation methods: what one training step does."""

from .base import Method
from .logits import LogitMethod, Loss
from .views import TwoViewMethod, strong_view

__all__ = ["LogitMethod", "Loss", "Method", "TwoViewMethod", "strong_view"]
