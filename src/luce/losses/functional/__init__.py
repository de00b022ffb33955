"""Distillation losses as pure functions of tensors."""

from .curriculum import tempered_kd
from .divergence import cross_entropy_loss, dkd_loss, hard_label_loss, jsd_loss, kd_loss, reverse_kl_loss
from .embeddings import cc_loss, linear_cka, pkt_loss, rkd_loss, sp_loss
from .iekd import exploration_loss, inheritance_loss
from .linear import linear_kd_loss, linear_pld_loss
from .lipschitz import lipschitz_loss, spectral_norm, transmitting_matrix
from .listwise import listmle_loss, listnet_loss, p_listmle_loss, pld_loss
from .maps import at_loss, cwd_loss, fitnet_loss, fsp_loss, ickd_loss, mgd_loss, nst_loss, ofd_loss, vid_loss
from .matching import logit_matching_loss
from .multilevel import mlld_loss
from .normalized import normdkd_loss, normkd_loss, standardize
from .pairwise import ranking_hinge_loss, ranking_logistic_loss, rkkd_loss
from .partial import (
    class_relations,
    decomposed_kd_loss,
    partial_kd_loss,
    partial_target,
    weight_similarity,
)
from .relation import dist_loss
from .reweighted import nkd_loss, tfkd_loss, tvd_loss, wsld_loss
from .sampled import rankdistil_loss

__all__ = [
    "at_loss",
    "cc_loss",
    "class_relations",
    "cross_entropy_loss",
    "cwd_loss",
    "decomposed_kd_loss",
    "dist_loss",
    "dkd_loss",
    "exploration_loss",
    "fitnet_loss",
    "fsp_loss",
    "hard_label_loss",
    "ickd_loss",
    "inheritance_loss",
    "jsd_loss",
    "kd_loss",
    "linear_cka",
    "linear_kd_loss",
    "linear_pld_loss",
    "lipschitz_loss",
    "listmle_loss",
    "listnet_loss",
    "logit_matching_loss",
    "mgd_loss",
    "mlld_loss",
    "nkd_loss",
    "normdkd_loss",
    "normkd_loss",
    "nst_loss",
    "ofd_loss",
    "p_listmle_loss",
    "partial_kd_loss",
    "partial_target",
    "pkt_loss",
    "pld_loss",
    "rankdistil_loss",
    "ranking_hinge_loss",
    "ranking_logistic_loss",
    "reverse_kl_loss",
    "rkd_loss",
    "rkkd_loss",
    "sp_loss",
    "spectral_norm",
    "standardize",
    "tempered_kd",
    "tfkd_loss",
    "transmitting_matrix",
    "tvd_loss",
    "vid_loss",
    "weight_similarity",
    "wsld_loss",
]
