"""Modules of partial KD and of KD in three parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ...labels import UNLABELLED
from ..functional import partial
from ..functional.partial import RELATED, Keep
from .base import LogitLoss

__all__ = ["DecomposedKDLoss", "PartialKDLoss"]


@dataclass(eq=False, repr=False, kw_only=True)
class PartialKDLoss(LogitLoss):
    """Module of `luce.partial_kd_loss`: KD from a target that keeps one kind of the teacher's knowledge.

    Where ``keep`` names ``class_mean``, the relation between the classes is `luce.losses.class_relations` of
    the training rows without augmentation, at this temperature. `luce distill` and `luce.distill` compute it;
    in a loop of your own, call `prepare` once before the first batch. Where ``keep`` names ``weight_sim``,
    call `use_weight` first. A recipe cannot call it, since not every teacher has a last linear layer; use
    ``class_mean`` there. The relation is a buffer, ``relation`` of shape ``(C, C)``, saved with the module.

    Example:
        >>> loss = PartialKDLoss(keep="class_mean", temperature=2.0)
        >>> teacher_logits, target = torch.randn(50, 3), torch.randint(3, (50,))
        >>> loss.prepare(teacher_logits, target)
        {}
        >>> loss.relation.shape
        torch.Size([3, 3])
    """

    function = staticmethod(partial.partial_kd_loss)
    uses_unlabelled = False
    prepared_buffers = ("relation",)

    keep: Keep = "true_prob"
    temperature: float = 1.0
    label_smoothing: float = 0.1
    top_k: int | float | None = None
    always_keep_true: bool = False
    scale_by_temperature: bool = True
    unlabelled_index: int = UNLABELLED

    @property
    def needs_preparation(self) -> bool:
        return "class_mean" in self.keep or ("weight_sim" in self.keep and self.relation is None)

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        if "class_mean" in self.keep:
            unlabelled = (target == self.ignore_index) | (target == self.unlabelled_index)
            # Other marks of unlabelled rows may be above -1, and would count as classes.
            labels = target.masked_fill(unlabelled, UNLABELLED)
            self.relation = partial.class_relations(teacher_logits, labels, temperature=self.temperature)
        elif self.needs_preparation:
            raise UserError(
                f"expected `use_weight(weight)` before training with `keep={self.keep!r}`, which needs the "
                "weight of the teacher's last linear layer; a recipe cannot give it, use `class_mean` there"
            )
        return {}

    def use_weight(self, weight: Tensor, *, alpha: float = 1.0) -> None:
        """Relate the classes by the weight ``(C, D)`` of the teacher's last layer; `weight_similarity`."""
        if "weight_sim" not in self.keep:
            raise ValueError(f"expected `keep` with `weight_sim` to use a weight, got {self.keep!r}")
        self.relation = partial.weight_similarity(weight, alpha=alpha)

    def options(self) -> dict[str, object]:
        """The options as keyword arguments of the function, and the relation where it needs one."""
        if self.keep not in RELATED:
            return super().options()
        # Before it is prepared, only the constructor's check of the options on two classes comes here.
        relation = self.relation if self.relation is not None else torch.eye(2)
        return {**super().options(), "relation": relation}

    def _how_to_prepare(self) -> str:
        call = "prepare(teacher_logits, target)" if "class_mean" in self.keep else "use_weight(weight)"
        return (
            f"expected `{call}` to be called before the first batch: "
            f"`keep={self.keep!r}` needs the relation between the classes"
        )


@dataclass(eq=False, repr=False, kw_only=True)
class DecomposedKDLoss(LogitLoss):
    """Module of `luce.decomposed_kd_loss`: KD in three parts, each with its own weight."""

    function = staticmethod(partial.decomposed_kd_loss)
    uses_unlabelled = False

    guidance_weight: float = 1.0
    smooth_weight: float = 1.0
    relation_weight: float = 1.0
    temperature: float = 1.0
    scale_by_temperature: bool = True
    unlabelled_index: int = UNLABELLED
