"""Distillation methods: what one training step does."""

from .base import Method, Samples, TrainingRows
from .features import FeatureMethod, FeatureTerm
from .logits import LogitMethod, Loss
from .mekd import MEKD
from .metadistil import MetaDistil
from .mutual import MutualLearning
from .simkd import SimKD
from .views import TwoViewMethod, strong_view

__all__ = [
    "MEKD",
    "FeatureMethod",
    "FeatureTerm",
    "LogitMethod",
    "Loss",
    "MetaDistil",
    "Method",
    "MutualLearning",
    "Samples",
    "SimKD",
    "TrainingRows",
    "TwoViewMethod",
    "strong_view",
]
