"""The two decoupled parts of knowledge distillation, one value per row each."""

from .reference import dkd

__all__ = ["dkd"]
