"""Losses between feature maps: of places, of channels, or of both.

Maps are ``(N, C', H, W)``; tokens ``(N, T, D)`` count as maps of T places and D channels. All losses are
scalars, and the weights that their docstrings name belong to these scalars beside a cross-entropy of weight
1. "*Benchmark code*" means the public repositories RepDistiller and mdistiller, whose weights were tuned for
CIFAR-100, 240 epochs of SGD with batches of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ... import checks
from .. import _features
from .._features import scaled, unit
from .divergence import kd_loss
from .lipschitz import transmitting_matrix

__all__ = [
    "at_loss",
    "cwd_loss",
    "fitnet_loss",
    "fsp_loss",
    "ickd_loss",
    "mgd_loss",
    "nst_loss",
    "ofd_loss",
    "vid_loss",
]


def fitnet_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""FitNet's hint: the mean squared difference of two maps of one shape.

    .. math:: \frac{1}{N C' H W} \sum (r(F_s) - F_t)^2

    The regressor *r* that maps the student's map to the teacher's shape is trained: `luce.FitNetLoss`
    provides it. A mean over all elements, as in the benchmark code, where its weight is 100.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``, after the regressor.
        teacher_features: Same shape; receives no gradient.
    Raises:
        ValueError: On shapes that differ.
        TypeError: On a wrong dtype.
    Example:
        >>> import torch
        >>> fitnet_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0))
        tensor(4.)

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550.
    """
    s, t = _features.maps(student_features, teacher_features, pooled=False)
    checks.check_like("student_features", s, t, "`luce.FitNetLoss` has the regressor for that")
    return (s - t).square().mean()


def at_loss(student_features: Tensor, teacher_features: Tensor, *, p: float = 2.0) -> Tensor:
    r"""Attention transfer: match the spatial distribution of the activations.

    .. math:: \frac{1}{N H W} \sum_{n,i} \Big(\frac{Q_s}{\|Q_s\|_2} - \frac{Q_t}{\|Q_t\|_2}\Big)^2_{ni},
        \quad Q_i = \frac{1}{C'} \sum_c |F_{ci}|^p

    with the norm over the places *i* of a row. The channels may differ. The larger map is average-pooled to
    the smaller. This is the benchmark code, whose weight is 1000 and which sums over all stages; the paper's
    formula has a norm per layer where the code has a mean.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``.
        teacher_features: Likewise, with its own C', H and W, but as many tokens; receives no gradient.
        p: Power of the activations, at least 1; the paper and the code take 2.
    Returns:
        From 0 to ``2 / (H * W)``; invariant to a positive factor on either map. The attention of a map of
        zeros is 0.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> student, teacher = torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2)
        >>> student[0, 0, 0, 0], teacher[0, :, 1, 1] = 1.0, 5.0  # different corners
        >>> at_loss(student, teacher)
        tensor(0.5000)

    References:
        Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928.
    """
    checks.check_at_least(1, p=p)
    s, t = _features.maps(student_features, teacher_features)
    return (_attention(s, p) - _attention(t, p)).square().mean()


def _attention(x: Tensor, p: float) -> Tensor:
    # One factor per map cancels in `unit`; without it |x|**4 would overflow float32 above 4e9.
    return unit(scaled(x, (1, 2, 3)).abs().pow(p).mean(1).flatten(1), dim=1)


def nst_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    form: Literal["polynomial", "linear"] = "polynomial",
) -> Tensor:
    r"""Neuron selectivity transfer: match the distributions of the channels' normalised maps.

    .. math:: \operatorname{mean}_{cc'} k(t_c, t_{c'}) + \operatorname{mean}_{cc'} k(s_c, s_{c'})
        - 2 \operatorname{mean}_{cc'} k(s_c, t_{c'})

    the squared maximum mean discrepancy between the channels' normalised maps :math:`s_c = F_c / \|F_c\|_2`,
    then the mean over rows. The polynomial kernel is :math:`(x^\top y)^2`, as in the benchmark code, whose
    weight is 50; the linear one, :math:`x^\top y`, is the paper's other choice as we know it, not verified.
    The paper's Gaussian kernel is not implemented. The channels may differ; the larger map is average-pooled
    to the smaller.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``.
        teacher_features: Likewise, with its own C', H and W, but as many tokens; receives no gradient.
        form: Of the kernel, ``"polynomial"`` or ``"linear"``.
    Returns:
        At least 0 up to rounding, and 0 where both have the same channels, in any order. The kernel of a
        channel of zeros with any other is 0.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.randn(2, 5, 4, 4)
        >>> bool(nst_loss(features, features.flip(1)).abs() < 1e-6)
        True

    References:
        Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer,
        arXiv 1707.01219.
    """
    checks.check_choice("form", form, ("polynomial", "linear"))
    power = 2 if form == "polynomial" else 1
    s, t = _features.maps(student_features, teacher_features)
    with _features.full_precision(s):
        s, t = (unit(x.flatten(2), dim=2) for x in (s, t))
        tt, ss, st = ((a @ b.mT).pow(power).mean() for a, b in ((t, t), (s, s), (s, t)))
        # tt has no gradient, but makes the loss 0 where both networks agree.
        return tt + ss - 2 * st


def fsp_loss(student_features: tuple[Tensor, Tensor], teacher_features: tuple[Tensor, Tensor]) -> Tensor:
    r"""FSP: match the products of a stage's input channels with its output channels.

    .. math:: \frac{1}{N C_1 C_2} \sum (G_s - G_t)^2, \quad
        G_{cd} = \frac{1}{HW} \sum_i F^{\text{in}}_{ci} F^{\text{out}}_{di}

    A mean over all entries of G, as in the benchmark code (RepDistiller), whose weight is 50; the paper as we
    know it sums over the entries and halves the size of maps by max-pooling. Here, as in that code, the
    larger of input and output is average-pooled to the smaller; the two networks' maps may differ in size.
    The benchmark first trains with this loss alone, which the training loop must do.

    Args:
        student_features: Input and output of a stage, each ``(N, C', H, W)`` or ``(N, T, D)``.
        teacher_features: Likewise, with the same channels; `luce.FSPLoss` projects others. Receives no
            gradient.
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> first, second = torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)
        >>> fsp_loss((first, second), (first, 3 * second))
        tensor(4.)

    References:
        Yim et al., A Gift from Knowledge Distillation, CVPR 2017.
    """
    checks.check_two(student_features=student_features, teacher_features=teacher_features)
    (s_in, t_in), (s_out, t_out) = (
        _features.maps(s, t, pooled=False, like_channels=True)
        for s, t in zip(student_features, teacher_features, strict=True)
    )
    return (transmitting_matrix(s_in, s_out) - transmitting_matrix(t_in, t_out)).square().mean()


def cwd_loss(student_features: Tensor, teacher_features: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Channel-wise distillation: each channel is a distribution over the places.

    .. math:: \frac{T^2}{N C'} \sum_{n,c} \mathrm{KL}\big(\operatorname{softmax}_i(F^t_{nci} / T) \,\|\,
        \operatorname{softmax}_i(F^s_{nci} / T)\big)

    It is `luce.kd_loss` with places as classes and channels as rows. Verified against the code in
    MMRazor, whose segmentation recipe applies it to the logits of all pixels with temperature 1 and weight 5.
    The larger map is average-pooled to the smaller.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``.
        teacher_features: Likewise, with the same channels (`luce.CWDLoss` projects others) and, of tokens, as
            many; receives no gradient.
        temperature: Positive, no unit.
    Returns:
        Nats times ``temperature**2``; invariant to a constant added to a channel.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.randn(2, 3, 4, 4)
        >>> cwd_loss(features, features + 1.0) < 1e-6
        tensor(True)

    References:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256.
    """
    s, t = _features.maps(student_features, teacher_features, like_channels=True)
    return kd_loss(s.flatten(2), t.flatten(2), temperature=temperature, class_dim=-1)


def ickd_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Inter-channel correlation: match the correlations between the channels of a row.

    .. math:: \frac{1}{N C'} \sum_{n} \|G^s_n - G^t_n\|_F^2

    where G is :math:`F F^\top`, channels by channels, with each of its rows divided by its L2 norm. This is
    the authors' code, whose weight on CIFAR-100 is 2.5; the paper's formula was not compared, and its variant
    over a grid of patches is not implemented. The maps may differ in size.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``.
        teacher_features: Likewise, with the same channels; `luce.ICKDLoss` projects others. Receives no
            gradient.
    Returns:
        From 0 to 4; invariant to a positive factor on either map. The correlations of a channel of zeros are
        0.
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.randn(2, 3, 4, 4)
        >>> bool(ickd_loss(features, 7 * features.flip(-1)) < 1e-6)  # the order of places has no effect
        True

    References:
        Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation,
        ICCV 2021, arXiv 2202.03680.
    """
    s, t = _features.maps(student_features, teacher_features, pooled=False, like_channels=True)
    with _features.full_precision(s):
        difference = _channel_correlation(s) - _channel_correlation(t)
        return difference.square().sum((1, 2)).mean() / s.shape[1]


def _channel_correlation(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    # The factor of a channel cancels in its own row of products, that of the whole map in all of them.
    return unit(scaled(flat, 2) @ scaled(flat, (1, 2)).mT, dim=2)


def vid_loss(student_features: Tensor, teacher_features: Tensor, *, variance: Tensor) -> Tensor:
    r"""Variational information distillation: likelihood of the teacher's map given the student's.

    .. math:: \frac{1}{N C' H W} \sum \tfrac12 \Big[\frac{(F_t - \mu)^2}{\sigma_c^2} + \log \sigma_c^2\Big]

    a Gaussian's negative log-likelihood without its constant, with one variance per channel. Mean and
    variances are trained: `luce.VIDLoss` provides them. As in the benchmark code, whose weight is 1.

    Args:
        student_features: The mean μ predicted from the student, ``(N, C', H, W)`` or ``(N, T, D)``.
        teacher_features: Same channels; receives no gradient. The larger map is average-pooled to the
            smaller.
        variance: Shape ``(C',)``, positive.
    Returns:
        Nats per element. Not zero at equality and possibly negative: it falls with the variances.
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> vid_loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4), variance=torch.ones(2))
        tensor(0.5000)

    References:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv 1904.05835.
    """
    s, t = _features.maps(student_features, teacher_features, like_channels=True)
    variance = _per_channel("variance", variance, s)
    return 0.5 * ((t - s).square() / variance + variance.log()).mean()


def ofd_loss(student_features: Tensor, teacher_features: Tensor, *, margin: Tensor) -> Tensor:
    r"""The overhaul of feature distillation: a partial distance before the activation.

    .. math:: \frac1N \sum_{n,c,i} \begin{cases} 0 & S \le T \le 0 \\ (S - T)^2 & \text{else} \end{cases},
        \quad T = \max(F_t, m_c)

    A sum over the elements of a row, as in the authors' code, whose weight is 0.001. Take both features
    *before* a ReLU: where the teacher is negative, a smaller value of the student gives the same activation.
    *m* is the mean of the teacher's negative values; `luce.OFDLoss` computes it and projects the student.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``, after the projection.
        teacher_features: Same channels; receives no gradient. The larger map is average-pooled to the
            smaller.
        margin: Shape ``(C',)``, at most 0; 0 makes T the teacher's ReLU.
    Raises:
        ValueError: On a wrong shape.
        TypeError: On a wrong dtype.
    Example:
        >>> student, teacher = torch.tensor([[[[-5.0, 0.5]]]]), torch.tensor([[[[-9.0, 2.0]]]])
        >>> ofd_loss(student, teacher, margin=torch.tensor([-1.0]))  # -5 is below the margin: no cost
        tensor(2.2500)

    References:
        Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv 1904.01866.
    """
    s, t = _features.maps(student_features, teacher_features, like_channels=True)
    t = torch.maximum(t, _per_channel("margin", margin, s))
    # Else the teacher's ReLU gives 0 and the student is already low enough: nothing to correct.
    counts = (s > t) | (t > 0)
    return torch.where(counts, s - t, 0).square().sum((1, 2, 3)).mean()


def _per_channel(name: str, values: Tensor, like: Tensor) -> Tensor:
    """``(C',)`` as ``(C', 1, 1)`` in the dtype of a map."""
    checks.check_like(name, values, like[0, :, 0, 0], "one value per channel")
    return values.to(like.dtype)[:, None, None]


def mgd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    generate: Callable[[Tensor], Tensor],
    mask_ratio: float = 0.15,
    masked: Literal["channels", "places"] = "channels",
) -> Tensor:
    r"""Masked generative distillation: generate the teacher's whole map from a part of the student's.

    .. math:: \frac1N \sum (g(M \odot F_s) - F_t)^2

    with a random mask M of zeros and ones, drawn anew at every call from PyTorch's generator of the device. A
    sum over the elements of a row, as in the authors' code. That masks channels for classification, with a
    ratio of 0.15 and weight 7e-5, and places for dense prediction, with 0.65 to 0.75 and weight 2e-5.

    Args:
        student_features: Shape ``(N, C', H, W)`` or ``(N, T, D)``, with the teacher's channels.
        teacher_features: Likewise; receives no gradient. The larger map is average-pooled to the smaller.
        generate: Maps the masked map ``(N, C', H, W)`` to one like the teacher's; `luce.MGDLoss` trains it.
        mask_ratio: Probability with which a channel or place is masked, in [0, 1).
        masked: ``"channels"`` or ``"places"``, masked for each row by itself.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> features = torch.randn(2, 3, 4, 4)
        >>> mgd_loss(features, features, generate=lambda masked: masked, mask_ratio=0.0)
        tensor(0.)

    References:
        Yang et al., Masked Generative Distillation, ECCV 2022, arXiv 2205.01529.
    """
    checks.check_choice("masked", masked, ("channels", "places"))
    if mask_ratio != 0:
        checks.check_between(0, 1, mask_ratio=mask_ratio)
    s, t = _features.maps(student_features, teacher_features, like_channels=True)
    rows, channels, height, width = s.shape
    shape = (rows, channels, 1, 1) if masked == "channels" else (rows, 1, height, width)
    # `rand` may return 0 but never 1, so that >= keeps everything at a ratio of 0.
    kept = torch.rand(shape, device=s.device) >= mask_ratio
    generated = generate(s * kept)
    checks.check_like("generate(student_features)", generated, t, "it must keep the shape of the map")
    return (generated.to(t.dtype) - t).square().sum((1, 2, 3)).mean()
