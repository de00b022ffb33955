"""Luce: knowledge distillation seen as choice.

The losses are here at once; what trains, loads and reports is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .losses import UNLABELLED, pld_error_bound, suggest_temperature, teacher_order
from .losses.functional import (
    cross_entropy_loss,
    dist_loss,
    dkd_loss,
    jsd_loss,
    kd_loss,
    listmle_loss,
    listnet_loss,
    logit_matching_loss,
    nkd_loss,
    normdkd_loss,
    normkd_loss,
    p_listmle_loss,
    pld_loss,
    reverse_kl_loss,
    standardize,
    tempered_kd,
    tfkd_loss,
    tvd_loss,
    wsld_loss,
)
from .losses.modules import (
    CrossEntropyLoss,
    CTKDLoss,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    JSDLoss,
    KDLoss,
    ListMLELoss,
    ListNetLoss,
    LogitLoss,
    LogitMatchingLoss,
    NKDLoss,
    NormDKDLoss,
    NormKDLoss,
    PLDLoss,
    PListMLELoss,
    ReverseKLLoss,
    Standardized,
    TfKDLoss,
    TVDLoss,
    WeightedSum,
    WSLDLoss,
)

if TYPE_CHECKING:
    from .training import distill

__version__ = "0.1.0"

__all__ = [
    "UNLABELLED",
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
    "cross_entropy_loss",
    "dist_loss",
    "distill",
    "dkd_loss",
    "jsd_loss",
    "kd_loss",
    "listmle_loss",
    "listnet_loss",
    "logit_matching_loss",
    "nkd_loss",
    "normdkd_loss",
    "normkd_loss",
    "p_listmle_loss",
    "pld_error_bound",
    "pld_loss",
    "reverse_kl_loss",
    "standardize",
    "suggest_temperature",
    "teacher_order",
    "tempered_kd",
    "tfkd_loss",
    "tvd_loss",
    "wsld_loss",
]


def __getattr__(name: str) -> Any:
    if name == "distill":
        from .training import distill

        return distill
    raise AttributeError(f"module 'luce' has no attribute {name!r}")
