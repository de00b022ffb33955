"""The losses as modules: options are stored and checked once, the functions do the work."""

from .base import LogitLoss
from .crd import CRDLoss
from .curriculum import CTKDLoss
from .divergence import CrossEntropyLoss, DKDLoss, HardLabelLoss, JSDLoss, KDLoss, ReverseKLLoss
from .embeddings import CCLoss, PKTLoss, RKDLoss, SPLoss
from .features import FeatureLoss
from .iekd import IEKDLoss
from .linear import LinearKDLoss, LinearPLDLoss
from .lipschitz import LipschitzLoss, LONDONLoss
from .listwise import ListMLELoss, ListNetLoss, PLDLoss, PListMLELoss
from .maps import ATLoss, CWDLoss, FitNetLoss, FSPLoss, ICKDLoss, MGDLoss, NSTLoss, OFDLoss, VIDLoss
from .matching import LogitMatchingLoss
from .multilevel import MLLDLoss
from .normalized import NormDKDLoss, NormKDLoss, Standardized
from .pairwise import RankingHingeLoss, RankingLogisticLoss, RKKDLoss
from .partial import DecomposedKDLoss, PartialKDLoss
from .relation import DISTLoss
from .reviewkd import ReviewKDLoss
from .reweighted import NKDLoss, TfKDLoss, TVDLoss, WSLDLoss
from .sampled import RankDistilLoss
from .simkd import SimKDLoss
from .weighted_sum import WeightedSum

__all__ = [
    "ATLoss",
    "CCLoss",
    "CRDLoss",
    "CTKDLoss",
    "CWDLoss",
    "CrossEntropyLoss",
    "DISTLoss",
    "DKDLoss",
    "DecomposedKDLoss",
    "FSPLoss",
    "FeatureLoss",
    "FitNetLoss",
    "HardLabelLoss",
    "ICKDLoss",
    "IEKDLoss",
    "JSDLoss",
    "KDLoss",
    "LONDONLoss",
    "LinearKDLoss",
    "LinearPLDLoss",
    "LipschitzLoss",
    "ListMLELoss",
    "ListNetLoss",
    "LogitLoss",
    "LogitMatchingLoss",
    "MGDLoss",
    "MLLDLoss",
    "NKDLoss",
    "NSTLoss",
    "NormDKDLoss",
    "NormKDLoss",
    "OFDLoss",
    "PKTLoss",
    "PLDLoss",
    "PListMLELoss",
    "PartialKDLoss",
    "RKDLoss",
    "RKKDLoss",
    "RankDistilLoss",
    "RankingHingeLoss",
    "RankingLogisticLoss",
    "ReverseKLLoss",
    "ReviewKDLoss",
    "SPLoss",
    "SimKDLoss",
    "Standardized",
    "TVDLoss",
    "TfKDLoss",
    "VIDLoss",
    "WSLDLoss",
    "WeightedSum",
]
