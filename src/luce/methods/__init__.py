"""Distillation methods: what one training step does."""

from .base import (
    Capabilities,
    CoTrains,
    GeneratesInputs,
    LooksAhead,
    Method,
    OptimizesManually,
    Prepares,
    Samples,
    StepsAfter,
    TrainingRows,
    WrappedMethod,
)
from .features import FeatureMethod, FeatureTerm
from .logits import LogitMethod, Loss
from .mekd import MEKD
from .metadistil import MetaDistil
from .mutual import MutualLearning
from .preparation import train_by_sgd
from .views import TwoViewMethod, strong_view

__all__ = [
    "MEKD",
    "Capabilities",
    "CoTrains",
    "FeatureMethod",
    "FeatureTerm",
    "GeneratesInputs",
    "LogitMethod",
    "LooksAhead",
    "Loss",
    "MetaDistil",
    "Method",
    "MutualLearning",
    "OptimizesManually",
    "Prepares",
    "Samples",
    "StepsAfter",
    "TrainingRows",
    "TwoViewMethod",
    "WrappedMethod",
    "strong_view",
    "train_by_sgd",
]
