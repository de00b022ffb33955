"""Distillation losses as pure functions of tensors."""

from .divergence import cross_entropy_loss, dkd_loss, jsd_loss, kd_loss, reverse_kl_loss
from .listwise import listmle_loss, listnet_loss, p_listmle_loss, pld_loss
from .matching import logit_matching_loss
from .relation import dist_loss

__all__ = [
    "cross_entropy_loss",
    "dist_loss",
    "dkd_loss",
    "jsd_loss",
    "kd_loss",
    "listmle_loss",
    "listnet_loss",
    "logit_matching_loss",
    "p_listmle_loss",
    "pld_loss",
    "reverse_kl_loss",
]
