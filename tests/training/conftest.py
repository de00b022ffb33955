"""Fixtures of small recipes."""

from ..toys import _outcome, hide, make_recipe, toy

__all__ = ["_outcome", "hide", "make_recipe", "toy"]
