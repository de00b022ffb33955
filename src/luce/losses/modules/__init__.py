"""The losses as modules: options are stored and checked once, the functions do the work."""

from .base import LogitLoss
from .divergence import CrossEntropyLoss, DKDLoss, JSDLoss, KDLoss, ReverseKLLoss
from .listwise import ListMLELoss, ListNetLoss, PLDLoss, PListMLELoss
from .matching import LogitMatchingLoss
from .relation import DISTLoss
from .weighted_sum import WeightedSum

__all__ = [
    "CrossEntropyLoss",
    "DISTLoss",
    "DKDLoss",
    "JSDLoss",
    "KDLoss",
    "ListMLELoss",
    "ListNetLoss",
    "LogitLoss",
    "LogitMatchingLoss",
    "PLDLoss",
    "PListMLELoss",
    "ReverseKLLoss",
    "WeightedSum",
]
