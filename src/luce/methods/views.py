"""Any method on two views of each batch."""

from __future__ import annotations

from torch import Tensor, nn

from .. import checks
from ..errors import UserError
from ..signals import Signal
from .base import Batch, Method, WrappedMethod


def strong_view(batch: Batch) -> dict[str, Tensor]:
    """Return a batch with its strongly augmented view as the input.

    Example:
        >>> strong_view({"input": 1, "target": 2, "strong": 3})
        {'input': 3, 'target': 2}
    """
    view = {**batch, "input": batch["strong"]}
    del view["strong"]
    return view


class TwoViewMethod(WrappedMethod[Method]):
    """A step of another method for each of two views of a batch, with the weighted sum of both losses.

    The second view, ``batch["strong"]``, shows the same rows with a strong augmentation; student and teacher
    see each view separately. `luce.data.loader` makes it, and ``data.strong_augment`` in a recipe.

    Args:
        method: Computes the loss of one view.
        weight: Of the loss of ``batch["input"]``, above 0.
        strong_weight: Of the loss of ``batch["strong"]``, above 0.
    Raises:
        ValueError: On a weight that is not positive.
        UserError: If the method optimizes manually, which looks at one view, or generates its inputs.
    Example:
        >>> from luce import KDLoss
        >>> from luce.methods import LogitMethod
        >>> TwoViewMethod(LogitMethod(KDLoss()), strong_weight=0.5).two_views
        True
    """

    two_views = True

    def __init__(self, method: Method, weight: float = 1.0, strong_weight: float = 1.0) -> None:
        super().__init__(method)
        checks.check_positive(weight=weight, strong_weight=strong_weight)
        reason = None
        if method.capabilities.optimizes_manually is not None:
            reason = "takes steps of its own on one view"
        elif method.capabilities.generates_inputs is not None:
            reason = "generates its inputs"
        if reason is not None:
            raise UserError(
                f"expected one view of each batch for {type(method).__name__}, which {reason}; "
                "leave out `data.strong_augment`"
            )
        self.weight, self.strong_weight = float(weight), float(strong_weight)
        self.needs_teacher = method.needs_teacher

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Return the terms of both views; those of the second are called ``strong.NAME``."""
        terms = self.method.step(student, batch, signal)
        strong = self.method.step(student, strong_view(batch), None if signal is None else signal.strong)
        loss = self.weight * terms.pop("loss") + self.strong_weight * strong.pop("loss")
        return {
            **{name: self.weight * value for name, value in terms.items()},
            **{f"strong.{name}": self.strong_weight * value for name, value in strong.items()},
            "loss": loss,
        }
