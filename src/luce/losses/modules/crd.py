"""CRD: contrast a row's embedding in one network with embeddings of many rows in the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...labels import has_label
from .. import _features
from .features import FeatureLoss, Shapes, Tensors, through

__all__ = ["CRDLoss"]

NOWHERE = -1


@dataclass(eq=False, repr=False, kw_only=True)
class CRDLoss(FeatureLoss):
    r"""Contrastive representation distillation: discriminate a row's counterpart from rows of other classes.

    Both networks' features are embedded linearly, :math:`v = W f + b`, and scaled to length 1. Memory banks
    hold one embedding per labelled training row for each network. For an anchor :math:`v` of one network, the
    bank of the other gives one positive :math:`m_0` and *K* negatives :math:`m_k` of other classes, and with
    :math:`h_k = \exp(\langle v, m_k \rangle / \tau) / Z` noise-contrastive estimation costs

    .. math:: \log\frac{h_0 + K/M}{h_0} + \sum_{k=1}^{K} \log\frac{h_k + K/M}{K/M},

    where *M* is the number of rows in a bank. The loss is the mean over the rows of the batch, once with the
    student and once with the teacher as the anchor, added. The first batch sets :math:`Z`, for each anchor,
    to *M* times the mean of its exponentials. After each batch in training mode the banks are updated:
    :math:`m \leftarrow` the direction of ``momentum`` :math:`m + (1 -` ``momentum`` :math:`) v`. The banks
    and :math:`Z` are buffers.

    This follows the authors' code with these differences: logarithms are taken without its constant of 1e-7;
    negatives are drawn independently (the code draws them without replacement where the classes have enough
    rows); *K* is at most the number of rows outside the largest class; a row that is in a batch twice updates
    the banks once, by the
    mean of its embeddings; and of several processes each moves its banks by the rows of all of them.

    Rows without a label and rows that were not registered do not count.

    Args:
        width: Dimensions of the embeddings.
        negatives: *K*.
        temperature: :math:`\tau`, positive.
        momentum: In [0, 1).
        positive: ``"exact"``: the positive is the row itself; ``"relax"``: a row of its class, drawn anew.

    Shape:
        One feature of each network, ``(N, D)``; the widths may differ. ``target`` and ``index``: ``(N,)``.

    Raises:
        ValueError: On options out of range, or if `build` comes before `register_rows`.

    Example:
        >>> loss = CRDLoss(negatives=4)
        >>> loss.register_rows(index=torch.arange(10), target=torch.arange(10) % 3)
        >>> loss.build([(8,)], [(16,)])
        >>> rows = torch.tensor([0, 5])
        >>> loss([torch.rand(2, 8)], [torch.rand(2, 16)], target=rows % 3, index=rows).shape
        torch.Size([])

    References:
        Tian et al., Contrastive Representation Distillation, ICLR 2020, arXiv 1910.10699.
    """

    takes = "vectors"
    stages = "one"
    needs_labels = True
    needs_index = True

    width: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    positive: Literal["exact", "relax"] = "exact"

    def _check_options(self) -> None:
        checks.check_count(most=checks.WIDEST, width=self.width, negatives=self.negatives)
        checks.check_positive(temperature=self.temperature)
        checks.check_not_negative(momentum=self.momentum)
        if self.momentum >= 1:
            raise ValueError(f"expected `momentum` below 1, or the banks never move, got {self.momentum}")
        checks.check_choice("positive", self.positive, ("exact", "relax"))

    def register_rows(
        self, index: Tensor, target: Tensor, *, gather: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Learn before `build` which training rows exist.

        Args:
            index: Numbers of the rows in the data, as in batches, ``(rows,)``.
            target: Their classes; -1 or -100 where there is none.
            gather: Concatenates the rows of a tensor over all processes that train together, which must have
                equally many; None for a single process.
        Raises:
            ValueError: If fewer than two classes have a row, or the banks were built for other rows.
        """
        self.gather = gather
        size = int(index.max()) + 1
        index, target = index[has_label(target)], target[has_label(target)]
        count = target.bincount()
        if (count > 0).sum() < 2:
            raise ValueError("expected labelled rows of at least two classes for CRDLoss, got fewer")
        # The rows of a class are contiguous in the banks, so that a draw from all other classes is an offset.
        place = torch.full((size,), NOWHERE)
        # Stable: all processes and a resumed run must give a row the same place, as banks are saved by place.
        place[index[target.argsort(stable=True)]] = torch.arange(len(index))
        if self._shapes is not None:
            known = self.get_buffer("place").cpu(), self.get_buffer("count").cpu()
            if not (torch.equal(place, known[0]) and torch.equal(count, known[1])):
                raise ValueError(
                    "expected the rows that this CRDLoss was built for, got others; make another one"
                )
            return
        # Not saved: `register_rows` makes them anew before `build`.
        self.place = nn.Buffer(place, persistent=False)
        self.count = nn.Buffer(count, persistent=False)
        self.first = nn.Buffer(count.cumsum(0) - count, persistent=False)
        self.rows = len(index)
        self.drawn = min(self.negatives, self.rows - int(count.max()))

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        if not hasattr(self, "rows"):
            raise ValueError("expected `register_rows` to be called before `build` of CRDLoss")
        self.student_embedding = nn.Linear(student_shapes[0][0], self.width)
        self.teacher_embedding = nn.Linear(teacher_shapes[0][0], self.width)
        # A uniform number in [-b, b] has the variance b**2 / 3, so rows start with a length near 1.
        bound = math.sqrt(3 / self.width)
        self.student_bank = nn.Buffer(torch.empty(self.rows, self.width).uniform_(-bound, bound))
        self.teacher_bank = nn.Buffer(torch.empty(self.rows, self.width).uniform_(-bound, bound))
        # NaN until the first batch sets Z; a buffer, so that a resumed run keeps the Z of its first batch.
        self.student_log_z = nn.Buffer(torch.tensor(torch.nan))
        self.teacher_log_z = nn.Buffer(torch.tensor(torch.nan))

    def forward(  # type: ignore[override]
        self,
        student_features: Tensors,
        teacher_features: Tensors,
        *,
        target: Tensor,
        index: Tensor,
    ) -> Tensor:
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        student, teacher = _features.vectors(student_features[0], teacher_features[0])
        with _features.full_precision(student):
            student = _features.unit(through(self.student_embedding, student), dim=1)
            teacher = _features.unit(through(self.teacher_embedding, teacher), dim=1)
            place = self._places(target, index)
            known = place != NOWHERE
            chosen = self._draw(place[known], target[known])
            loss = self._nce(student[known], self.teacher_bank, self.student_log_z, chosen)
            loss = loss + self._nce(teacher[known], self.student_bank, self.teacher_log_z, chosen)
            if self.training:
                # With rows that are in no bank: gathering needs equally many rows from each process.
                place = self._gathered(place)
                self._move(self.student_bank, place, self._gathered(student.detach()))
                self._move(self.teacher_bank, place, self._gathered(teacher.detach()))
        return loss

    def _places(self, target: Tensor, index: Tensor) -> Tensor:
        """Return the places in the banks of the rows of a batch."""
        last = len(self.place) - 1
        return torch.where(~has_label(target) | (index > last), NOWHERE, self.place[index.clamp(max=last)])

    def _draw(self, place: Tensor, target: Tensor) -> Tensor:
        """Draw places ``(n, 1 + K)``: the positive, then the negatives."""
        first, count = self.first[target, None], self.count[target, None]
        positive = place[:, None]
        if self.positive == "relax":
            # randint takes one bound for all rows; a remainder of 62 bits is uniform to within rows / 2**62.
            positive = first + torch.randint(2**62, positive.shape, device=place.device) % count
        other = torch.randint(2**62, (len(place), self.drawn), device=place.device) % (self.rows - count)
        return torch.cat([positive, torch.where(other < first, other, other + count)], dim=1)

    def _nce(self, anchor: Tensor, bank: Tensor, log_z: Tensor, chosen: Tensor) -> Tensor:
        """Return the mean cost of the anchors against a bank of the other network."""
        # The banks are updated in place before the backward pass, so the gradient is computed here.
        with torch.enable_grad():
            leaf = anchor.detach().requires_grad_()
            # All products, then a gather: a copy of K embeddings for each row would take more memory.
            scores = (leaf @ bank.T / self.temperature).gather(1, chosen)
            self._settle(log_z, scores.detach())
            # In logarithms: exp(1 / temperature) overflows float32 at temperatures below 0.0113.
            log_odds = scores - log_z - math.log(self.drawn / self.rows)
            cost = F.softplus(-log_odds[:, :1]).sum() + F.softplus(log_odds[:, 1:]).sum()
            # A batch without known rows costs 0, where 0 / 0 would be NaN.
            cost = cost / max(len(anchor), 1)
            (gradient,) = torch.autograd.grad(cost, leaf)
        # The second term is 0 and carries the gradient that was computed before the banks move.
        return cost.detach() + (gradient * (anchor - anchor.detach())).sum()

    def _settle(self, log_z: Tensor, scores: Tensor) -> None:
        """Set Z from the first scores."""
        if log_z.isnan():
            mean = scores.flatten().logsumexp(0) - math.log(max(scores.numel(), 1))
            # The same Z in each process: different ones would average gradients of different losses.
            means = self._gathered(mean[None])
            of_all = means.logsumexp(0) - math.log(len(means)) + math.log(self.rows)
            if of_all.isfinite():  # there was a row
                log_z.copy_(of_all)

    def _gathered(self, tensor: Tensor) -> Tensor:
        return tensor if self.gather is None else self.gather(tensor)

    @torch.no_grad()
    def _move(self, bank: Tensor, place: Tensor, embedding: Tensor) -> None:
        place, embedding = place[place != NOWHERE], embedding[place != NOWHERE]
        # An assignment with repeated indices keeps only one of the values, and not always the same.
        places, at, times = place.unique(return_inverse=True, return_counts=True)
        mean = bank.new_zeros(len(places), self.width).index_add_(0, at, embedding) / times[:, None]
        bank[places] = _features.unit(self.momentum * bank[places] + (1 - self.momentum) * mean, dim=1)
