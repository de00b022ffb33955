"""Training: recipes, the loop, comparisons, and what they leave in their folders."""

from .compare import ComparisonRecipe, compare
from .distill import distill
from .engine import Fit, TrainingError, fit
from .recipe import Recipe, TrainingOptions
from .run import prepare, run

__all__ = [
    "ComparisonRecipe",
    "Fit",
    "Recipe",
    "TrainingError",
    "TrainingOptions",
    "compare",
    "distill",
    "fit",
    "prepare",
    "run",
]
