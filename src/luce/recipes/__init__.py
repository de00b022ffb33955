"""Recipes: what a run is made of, and the data, networks, teachers and methods that they describe."""

from .build import RunInputs
from .methods import build_loss, build_method
from .schema import ComparisonRecipe, DataOptions, ModelOptions, Recipe, TeacherOptions
from .stored import read_stored
from .teacher import prepare

__all__ = [
    "ComparisonRecipe",
    "DataOptions",
    "ModelOptions",
    "Recipe",
    "RunInputs",
    "TeacherOptions",
    "build_loss",
    "build_method",
    "prepare",
    "read_stored",
]
