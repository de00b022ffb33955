"""Losses that match relations between the rows of a batch instead of the features themselves.

They couple the rows: the value depends on the rows that share a batch and on their number. The networks'
features may differ in width. "*Benchmark code*" means the public repositories RepDistiller and mdistiller.
Their weights, named in the docstrings, were tuned for CIFAR-100, 240 epochs of SGD with batches of 64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import checks
from .. import _features
from .._features import scaled, unit

__all__ = ["cc_loss", "pkt_loss", "rkd_loss", "sp_loss"]

MOST_TERMS = 100
"""Of CC's expansion, each of which holds a matrix of the pairs of rows."""


def sp_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Similarity-preserving: match the similarities between the rows of a batch.

    .. math:: \frac{1}{N^2} \|G_s - G_t\|_F^2

    where G is :math:`\Phi \Phi^\top` for the flattened features Φ, with each of its rows divided by its L2
    norm. As in the benchmark code, which takes the map of the last stage and the weight 3000.

    Args:
        student_features: Shape ``(N, ...)``, flattened row by row.
        teacher_features: Likewise, with the same N; receives no gradient.
    Returns:
        0 for a single row. Invariant to orthogonal maps of the features and to a factor on all of them. The
        similarities of a row of zeros are 0.
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> sp_loss(torch.ones(2, 3), features)  # entries 1 / sqrt(2) against 1 and 0
        tensor(0.2929)

    References:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682.
    """
    s, t = _features.rows(student_features, teacher_features)
    with _features.full_precision(s):
        return (_similarities(s) - _similarities(t)).square().mean()


def _similarities(x: Tensor) -> Tensor:
    # The factor of a row cancels in its own row of products, that of all features in all of them.
    return unit(scaled(x, 1) @ scaled(x, (0, 1)).mT, dim=1)


def pkt_loss(student_features: Tensor, teacher_features: Tensor, *, eps: float = 1e-7) -> Tensor:
    r"""Probabilistic knowledge transfer: match the probabilities that one row is a neighbour of another.

    .. math:: \frac{1}{N^2} \sum_{ij} P^t_{ij} \log \frac{P^t_{ij} + \epsilon}{P^s_{ij} + \epsilon}, \quad
        P_{ij} = \frac{\cos(f_i, f_j) + 1}{\sum_k (\cos(f_i, f_k) + 1)}

    The sums include the row itself. As in the benchmark code, which follows the authors' and has the weight
    30000 because of the mean over all pairs.

    Args:
        student_features: Shape ``(N, D)``.
        teacher_features: Likewise, with its own D; receives no gradient.
        eps: Added to both probabilities, above 0.
    Returns:
        At least 0, up to `eps`; 0 for a single row. Invariant to a positive factor on any row. A row of zeros
        has cosine 0 with every row, itself included.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.randn(4, 3)
        >>> pkt_loss(2 * features, features) < 1e-6
        tensor(True)

    References:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
        arXiv 1803.10837.
    """
    checks.check_positive(eps=eps)
    s, t = _features.vectors(student_features, teacher_features)
    with _features.full_precision(s):
        p_s, p_t = _neighbours(s), _neighbours(t)
        # With eps in both, equal probabilities cost log 1 = 0, also where both are 0.
        return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


def _neighbours(x: Tensor) -> Tensor:
    close = (_cosines(x) + 1).clamp(min=0)  # rounding may take a cosine below -1
    # Never 0: a row has cosine 1 with itself, or 0 if it is zero, and so counts at least 1.
    return close / close.sum(1, keepdim=True)


def _cosines(x: Tensor) -> Tensor:
    x = unit(x, dim=1)
    return x @ x.mT


def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    r"""Relational KD: match the distances between rows and the angles in all triangles of rows.

    .. math:: w_d \operatorname{mean}_{ij} \ell\Big(\frac{d^s_{ij}}{\bar d^s}, \frac{d^t_{ij}}{\bar d^t}\Big)
        + w_a \operatorname{mean}_{ijk} \ell(\cos \angle^s_{ijk}, \cos \angle^t_{ijk})

    with Euclidean distances, their mean over all pairs of two rows, and the smooth L1 distance ℓ, which is
    half the square up to 1. The means are over all N² pairs and N³ triples. As in the benchmark code, whose
    weight is 1, except for rows that coincide: their distance is 1e-6 there, before the division by the mean,
    and 0 here, with a gradient of 0.

    Time grows as N³ D. Memory stays below that: the middle corners of the triangles are processed in chunks,
    which are recomputed in the backward pass.

    Args:
        student_features: Shape ``(N, D)``.
        teacher_features: Likewise, with its own D; receives no gradient.
        distance_weight: Weight of the distances, at least 0.
        angle_weight: Weight of the angles, at least 0.
    Returns:
        0 for a single row. Invariant to isometries and to a positive factor on all features.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> rkd_loss(10 * corners, corners) < 1e-6
        tensor(True)

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068.
    """
    checks.check_not_negative(distance_weight=distance_weight, angle_weight=angle_weight)
    # One factor for all rows: one per row would change distances and angles.
    s, t = (scaled(x, (0, 1)) for x in _features.vectors(student_features, teacher_features))
    with _features.full_precision(s):
        loss = s.sum() * 0  # with both weights 0 the result still has a gradient
        if distance_weight:
            loss = loss + distance_weight * F.smooth_l1_loss(_distances(s), _distances(t))
        if angle_weight:
            loss = loss + angle_weight * _mean_of_angles(s, t)
        return loss


def _distances(x: Tensor) -> Tensor:
    """Return the distances in units of their mean; 0 where all rows coincide."""
    # Distances from matrix products would cancel where rows are close.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    # The N distances of rows to themselves are 0 and not counted; a single row would divide by 0.
    pairs = max(len(x) * (len(x) - 1), 1)
    mean = distances.sum() / pairs
    # If all rows coincide, 0 / 0 would be NaN.
    return distances / torch.where(mean == 0, 1, mean)


PART = 2**24
"""Entries of the largest tensor in a chunk of the angles, which bounds memory."""


def _mean_of_angles(s: Tensor, t: Tensor) -> Tensor:
    rows = len(s)
    # At least 1: `range` raises on a step of 0, which a very large batch would give.
    size = max(1, PART // (rows * max(rows, s.shape[1], t.shape[1])))
    if size >= rows:
        return _sum_of_angles(s, t, 0, rows) / rows**3
    parts = [
        # Nothing is drawn inside, so saving the generators' states would only cost time.
        checkpoint(_sum_of_angles, s, t, start, start + size, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, rows, size)
    ]
    return torch.stack(parts).sum() / rows**3


def _sum_of_angles(s: Tensor, t: Tensor, start: int, stop: int) -> Tensor:
    """Return the sum over the triangles whose middle corner is one of these rows."""
    # The side from a row to itself is 0 and stays 0 in `unit`: such triangles cost 0.
    cosines_s, cosines_t = (
        sides @ sides.mT for sides in (unit(x[None] - x[start:stop, None], dim=2) for x in (s, t))
    )
    return F.smooth_l1_loss(cosines_s, cosines_t, reduction="sum")


def cc_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    form: Literal["kernel", "consecutive"] = "kernel",
    gamma: float = 0.4,
    order: int = 2,
) -> Tensor:
    r"""Correlation congruence: match the correlations between the rows of a batch.

    .. math:: \frac{1}{N^2} \|K_s - K_t\|_F^2, \quad
        K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} \cos(f_i, f_j)^p

    The *kernel* form follows the paper: K is a Gaussian kernel :math:`e^{-\gamma \|x - y\|^2}` of normalised
    features, expanded to order P. The paper itself was not at hand; public reimplementations agree on this
    form with γ = 0.4 and P = 2.

    The benchmark code, reported to come from the authors', computes another loss: with :math:`\delta_n =
    |s_n - t_n|` of features in one space,

    .. math:: \frac{1}{N - 1} \sum_{n} \sum_d \delta_{n,d}\, \delta_{n+1,d}

    It is the *consecutive* form, kept for comparisons. It depends on the order of the rows, and a pair of
    rows contributes 0 as soon as one of the two matches. Its weight is 0.02, after trained embeddings of 128
    dimensions, which `luce.CCLoss` provides.

    Args:
        student_features: Shape ``(N, D)``.
        teacher_features: Likewise, with its own D in the kernel form; receives no gradient.
        form: ``"kernel"`` or ``"consecutive"``.
        gamma: Exponent of the Gaussian kernel, positive; kernel form only.
        order: Order of its expansion, at least 1; kernel form only.
    Returns:
        The consecutive form of a single row is 0. The cosines of a row of zeros are 0.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.randn(4, 3)
        >>> cc_loss(2 * features, features) < 1e-6
        tensor(True)

    References:
        Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv 1904.01802.
    """
    checks.check_choice("form", form, ("kernel", "consecutive"))
    checks.check_positive(gamma=gamma)
    checks.check_count(most=MOST_TERMS, order=order)
    s, t = _features.vectors(student_features, teacher_features)
    if form == "consecutive":
        checks.check_like("student_features", s, t, "`luce.CCLoss` embeds both in one space")
        return consecutive_products(s, t)
    with _features.full_precision(s):
        return (_taylor_kernel(s, gamma, order) - _taylor_kernel(t, gamma, order)).square().mean()


def _taylor_kernel(x: Tensor, gamma: float, order: int) -> Tensor:
    cosines = _cosines(x)
    # In logarithms: each factor by itself overflows or vanishes at a large gamma, and inf * 0 is NaN.
    factors = [math.exp(p * math.log(2 * gamma) - 2 * gamma - math.lgamma(p + 1)) for p in range(order + 1)]
    # At p = 0 the power is 1 also for a cosine of 0: PyTorch's 0**0 is 1.
    return torch.stack([factor * cosines**p for p, factor in enumerate(factors)]).sum(0)


def consecutive_products(s: Tensor, t: Tensor) -> Tensor:
    """Return the consecutive form of `cc_loss` on embeddings ``(N, D)``; both may have a gradient."""
    apart = (s - t).abs()
    # A single row has no pair, and would divide by 0.
    return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)


def linear_cka(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Linear centred kernel alignment, a measure of how similarly two networks relate the same rows.

    .. math:: \frac{\langle K_s, K_t \rangle_F}{\|K_s\|_F \|K_t\|_F}, \quad K = X X^\top

    for the flattened features X, with the mean over the rows subtracted from each column. With few rows of
    many entries it is biased upwards. Compare only values from batches of one size and features of one width.

    Args:
        student_features: Shape ``(N, ...)``, flattened row by row.
        teacher_features: Likewise, with the same N; receives no gradient.
    Returns:
        From 0 to 1; 1 where one is an orthogonal map of the other, with any factor and shift; 0 where all
        rows of either are equal, and for a single row.
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> linear_cka(3 * features.flip(1) + 5, features)
        tensor(1.0000)
        >>> linear_cka(features[:, :1], features)  # 4 / (2 * sqrt(8))
        tensor(0.7071)

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv 1905.00414.
    """
    s, t = _features.rows(student_features, teacher_features)
    with _features.full_precision(s):
        return (_alignment(s) * _alignment(t)).sum()


def _alignment(x: Tensor) -> Tensor:
    """Return the centred Gram matrix as a vector ``(N * N,)`` of length 1, or 0 where all rows are equal."""
    x = x - x[:1]  # exactly 0 for equal rows, where a mean may leave a rounding error
    x = unit((x - x.mean(0)).flatten(), dim=0).view_as(x)  # so that no product of two entries overflows
    return unit((x @ x.mT).flatten(), dim=0)
