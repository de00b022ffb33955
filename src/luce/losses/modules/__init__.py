"""The losses as modules: options are stored and checked once, the functions do the work."""

from .base import LogitLoss
from .curriculum import CTKDLoss
from .divergence import CrossEntropyLoss, DKDLoss, JSDLoss, KDLoss, ReverseKLLoss
from .features import FeatureLoss
from .listwise import ListMLELoss, ListNetLoss, PLDLoss, PListMLELoss
from .matching import LogitMatchingLoss
from .normalized import NormDKDLoss, NormKDLoss, Standardized
from .relation import DISTLoss
from .reweighted import NKDLoss, TfKDLoss, TVDLoss, WSLDLoss
from .weighted_sum import WeightedSum

__all__ = [
    "CTKDLoss",
    "CrossEntropyLoss",
    "DISTLoss",
    "DKDLoss",
    "FeatureLoss",
    "JSDLoss",
    "KDLoss",
    "ListMLELoss",
    "ListNetLoss",
    "LogitLoss",
    "LogitMatchingLoss",
    "NKDLoss",
    "NormDKDLoss",
    "NormKDLoss",
    "PLDLoss",
    "PListMLELoss",
    "ReverseKLLoss",
    "Standardized",
    "TVDLoss",
    "TfKDLoss",
    "WSLDLoss",
    "WeightedSum",
]
