"""Losses in expectation over rankings drawn from the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...ops.noise import seeded_uniform
from ...ops.pld import ranking_nll, teacher_order
from ...ops.rkkd.reference import widened
from .._reduce import Reduction, Rows
from .._teacher import refuse_teacher_gradient

__all__ = ["rankdistil_loss"]


def rankdistil_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    top_k: int | None = None,
    sample_size: int = 8,
    temperature: float = 1.0,
    seed: int | None = None,
    ignore_index: int = -100,
    class_dim: int = 1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""RankDistil, coupled: the likelihood of rankings drawn from the teacher's Plackett-Luce model.

    .. math:: \mathbb{E}_{\pi \sim \mathrm{PL}(t/T)} \sum_{k=1}^{K}
        \Big(\log \sum_{l \ge k} e^{s_{\pi_l}/T} - s_{\pi_k}/T\Big)

    the cross-entropy of the two networks' choices of the first *K* places, which is minimal for a student
    with the teacher's logits, for every *K*. The expectation is estimated without bias by the mean over
    `sample_size` rankings, each a sort of the teacher's logits plus Gumbel noise. ``top_k=1`` is an
    estimate of `luce.listnet_loss`.

    The estimator is that of TensorFlow Ranking's ``CoupledRankDistilLoss`` except for the temperature, which
    divides only the student's scores there. We have not read the code of the paper's experiments.

    Args:
        student_logits: Shape ``(N, C)``, ``(N, C, ...)`` or, with ``class_dim=-1``, ``(..., C)``.
        teacher_logits: Same shape; receives no gradient.
        target: Class indices, used only to drop rows labelled `ignore_index`.
        top_k: Count only the first places *K*; None for all.
        sample_size: Rankings drawn for each row. Time and memory grow with it.
        temperature: Positive, no unit; divides both networks' logits.
        seed: None draws new rankings for each row and call from PyTorch's generator, so that
            ``torch.manual_seed`` repeats them. With an integer the loss is deterministic: every row and every
            call uses the same noise for each rank of the teacher.
        ignore_index: Rows with this label do not count.
        class_dim: Dimension of the classes.
        row_weight: One weight per row, at least 0; the mean divides by their sum.
        reduction: ``"none"``, ``"mean"`` per kept row, or ``"sum"``.
    Returns:
        Nats per list, float32 for 16-bit logits. A class excluded (``-inf``) in both networks does not exist;
        one excluded in the student alone makes the loss ``+inf`` where it is drawn; one excluded in the
        teacher alone is never drawn and remains an alternative in each choice.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> rankdistil_loss(torch.zeros(1, 4), logits)  # for every draw: log 4!
        tensor(3.1781)

    References:
        Reddi et al., RankDistil: Knowledge Distillation for Ranking, AISTATS 2021.
    """
    refuse_teacher_gradient("RankDistil", "which draws rankings from it")
    checks.check_top_k(top_k)
    checks.check_count(most=checks.WIDEST, sample_size=sample_size)
    checks.check_positive(temperature=temperature)
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"expected `seed` to be None or an integer, got {seed!r}")
    checks.check_int64(seed=seed)
    rows = Rows.of(
        student_logits, teacher_logits, target, row_weight, class_dim=class_dim, ignore_index=ignore_index
    )
    order = teacher_order(rows.teacher)
    # float32 would draw a uniform of exactly 0 once in 2**24 draws, and rank that class last.
    t = widened(rows.teacher / temperature).gather(-1, order)
    s = (rows.student / temperature).gather(-1, order)
    draws = _draws(t, sample_size, seed)
    can_be_drawn = (t != -torch.inf)[:, None].expand_as(draws).gather(-1, draws)
    undefined = ~t[:, :1].isfinite()  # a sort puts NaN first
    # Weight 0 for a class that the teacher excludes: it stays in each suffix but is no choice.
    places = can_be_drawn.to(s.dtype).masked_fill(undefined[:, None], torch.nan)
    u = s[:, None].expand_as(draws).gather(-1, draws)
    nll = ranking_nll(u.flatten(0, 1), places.flatten(0, 1), top_k)
    return rows.reduce(nll.reshape(-1, sample_size).mean(-1), reduction)


def _draws(t: Tensor, sample_size: int, seed: int | None) -> Tensor:
    """Draw rankings from a Plackett-Luce model: sorted ``(N, C)`` to places ``(N, sample_size, C)``."""
    rows, classes = t.shape
    if seed is None:
        uniform = torch.rand(rows, classes, sample_size, dtype=t.dtype, device=t.device)
    else:
        uniform = seeded_uniform(t, sample_size, seed)
    gumbel = -(-uniform.log()).log()
    # Relative to the maximum: a large common offset would absorb the digits of the noise.
    perturbed = (t - t[:, :1])[:, None] + gumbel.transpose(-2, -1)
    # Stable: excluded classes tie at -inf, and each device must order them alike.
    return perturbed.argsort(dim=-1, descending=True, stable=True)
