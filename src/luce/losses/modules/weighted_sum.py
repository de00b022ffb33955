"""The weighted sum of losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ... import checks
from .base import LogitLoss

__all__ = ["WeightedSum"]


class WeightedSum(nn.Module):
    """A weighted sum of losses that also returns its terms; a term of weight 0 is 0 and is not computed.

    Args:
        terms: Name to ``(weight, loss)``; each loss is called as ``loss(student_logits, teacher_logits,
            target)`` and returns a scalar. Weights are at least 0.
        warmup: Name to the number of epochs over which that weight grows to its full size: in epoch *e* it
            is multiplied by ``min(e / warmup, 1)``. The training loop sets the epoch with `set_epoch`.
    Raises:
        ValueError: If there are no terms, a weight is negative, a term is called ``"loss"``, a loss is not
            reduced to a scalar, or a warm-up names no term or a negative number of epochs.
    Example:
        >>> import torch
        >>> from luce import CrossEntropyLoss, KDLoss
        >>> loss = WeightedSum({"task": (0.1, CrossEntropyLoss()), "kd": (0.9, KDLoss(temperature=4.0))})
        >>> student_logits = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
        >>> teacher_logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> loss(student_logits, teacher_logits, torch.tensor([2]))
        {'task': tensor(0.0375), 'kd': tensor(1.2792), 'loss': tensor(1.3168)}
    """

    def __init__(
        self, terms: Mapping[str, tuple[float, nn.Module]], warmup: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.warmup = dict(warmup or {})
        self.losses = losses_of(terms, self.warmup)
        for name, loss in self.losses.items():
            if getattr(loss, "reduction", None) == "none":
                raise ValueError(f"expected `reduction` of {name} to be 'mean' or 'sum', got 'none'")
        self.weights = {name: float(weight) for name, (weight, _) in terms.items()}
        self.epoch: int | None = None

    @property
    def uses_unlabelled(self) -> bool:
        """Whether a row without a label contributes to any term of a weight above 0."""
        return any(
            weight and (not isinstance(loss, LogitLoss) or loss.uses_unlabelled)
            for weight, loss in zip(self.weights.values(), self.losses.values(), strict=True)
        )

    @property
    def takes_teacher(self) -> bool:
        """Whether any term depends on the teacher's logits."""
        return any(not isinstance(loss, LogitLoss) or loss.takes_teacher for loss in self.losses.values())

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` must be called before the first batch."""
        return bool(self._to_prepare)

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        """Prepare each term that needs it; see `luce.losses.LogitLoss.prepare`."""
        return {
            f"{name}.{key}": value
            for name, loss in self._to_prepare.items()
            for key, value in loss.prepare(teacher_logits, target).items()
        }

    @property
    def _to_prepare(self) -> dict[str, LogitLoss]:
        """The terms of a weight above 0 that need preparation, by name."""
        return {
            name: loss
            for name, loss in self.losses.items()
            if self.weights[name] and isinstance(loss, LogitLoss) and loss.needs_preparation
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 1; without it every weight has its full size."""
        self.epoch = epoch
        for loss in self.losses.values():
            if isinstance(loss, LogitLoss):
                loss.set_epoch(epoch)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms by name, and their sum as ``"loss"``."""
        nothing = student_logits.new_zeros(())
        terms = {
            # A term of weight 0 is left out: it may be infinite, and 0 * inf is NaN.
            name: weight * self.losses[name](student_logits, teacher_logits, target) if weight else nothing
            for name, weight in (
                (name, warmed_up(weight, self.warmup.get(name, 0.0), self.epoch))
                for name, weight in self.weights.items()
            )
        }
        return {**terms, "loss": sum(terms.values(), start=nothing)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {weight:g}" for name, weight in self.weights.items())


def warmed_up(weight: float, warmup: float, epoch: int | None) -> float:
    """Return a weight in an epoch of its warm-up; the full weight without an epoch or a warm-up.

    >>> warmed_up(2.0, warmup=4, epoch=1)
    0.5
    """
    return weight if epoch is None or not warmup else min(epoch / warmup, 1.0) * weight


def losses_of(terms: Mapping[str, tuple[float, nn.Module]], warmup: Mapping[str, float]) -> nn.ModuleDict:
    """Return the losses of terms ``(weight, loss)`` by name, after checking names, weights and warm-ups.

    Raises:
        ValueError: If there are no terms, a name is ``"loss"`` or invalid for a module, a weight or a warm-up
            is negative, or a warm-up names no term.
    """
    if not terms or "loss" in terms:
        raise ValueError(f'expected at least one term, none of them called "loss", got {sorted(terms)}')
    for name, (weight, _) in terms.items():
        checks.check_not_negative(**{f"weight of {name}": weight})
    for name, epochs in warmup.items():
        checks.check_choice("warmup", name, tuple(terms))
        checks.check_not_negative(**{f"warmup of {name}": epochs})
    try:
        return nn.ModuleDict({name: loss for name, (_, loss) in terms.items()})
    except KeyError as error:
        raise ValueError(f"expected names of terms that can name a module, got {sorted(terms)}") from error
