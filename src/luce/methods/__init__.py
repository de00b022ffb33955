"""Distillation methods: what one training step does."""

from .base import Method, TrainingRows
from .features import FeatureMethod, FeatureTerm
from .logits import LogitMethod, Loss
from .metadistil import MetaDistil
from .mutual import MutualLearning
from .simkd import SimKD
from .views import TwoViewMethod, strong_view

__all__ = [
    "FeatureMethod",
    "FeatureTerm",
    "LogitMethod",
    "Loss",
    "MetaDistil",
    "Method",
    "MutualLearning",
    "SimKD",
    "TrainingRows",
    "TwoViewMethod",
    "strong_view",
]
