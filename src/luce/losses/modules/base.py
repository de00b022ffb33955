"""The base class of the losses on logits, and the state that `prepare` fills before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import unknown_name
from .._reduce import Reduction

if TYPE_CHECKING:
    from typing_extensions import Self


class Prepared(nn.Module):
    """A module with buffers that its `prepare` fills before training and that a checkpoint restores.

    Until then a buffer is None and is not saved; loading a checkpoint fills it. So a state dict holds tensors
    only, and has no entry for a loss that needs no preparation.

    Attributes:
        prepared_buffers: The names of these buffers.
        needs_preparation: Whether they must be filled before the first batch.
    """

    prepared_buffers: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Refuse an unknown option with the nearest names, which Python's own message lacks."""
        parameters = inspect.signature(cls.__init__).parameters
        unknown = options.keys() - parameters.keys()
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            known = [name for name in parameters if name != "self"]
            raise TypeError(unknown_name(f"option of {cls.__name__}:", min(unknown), known))
        return super().__new__(cls)

    def _register_prepared_buffers(self) -> None:
        for name in self.prepared_buffers:
            self.register_buffer(name, None)

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` must be called before the first batch."""
        return False

    def _is_prepared(self) -> bool:
        return not self.needs_preparation or all(
            self._buffers[name] is not None for name in self.prepared_buffers
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        for name in self.prepared_buffers:
            saved = state_dict.get(prefix + name)
            if saved is not None and self._buffers[name] is None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *more)


@dataclass(eq=False, repr=False, kw_only=True)
class LogitLoss(Prepared):
    """A loss function with its options. Subclasses are dataclasses whose fields are the function's options.

    Every loss is called as ``loss(student_logits, teacher_logits, target)``, so that losses can be exchanged
    and summed. The constructor checks the options.
    """

    function: ClassVar[Callable[..., Tensor]]
    takes_teacher: ClassVar[bool] = True
    """Whether the loss depends on the teacher's logits; if not, they may be None."""
    uses_unlabelled: ClassVar[bool] = True
    """Whether a row without a label contributes to the loss."""

    ignore_index: int = -100
    class_dim: int = 1
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__init__()
        self._register_prepared_buffers()
        # Calling the function once, on the smallest input, applies its own checks to all options.
        logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        self._call(logits, logits, target, None, class_dim=1)

    def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
        """Compute what the loss needs from the teacher before training; does nothing for most losses.

        Args:
            teacher_logits: Of the training rows, ``(rows, C)``, without temperature.
            target: Their labels, ``(rows,)``; `UNLABELLED` in rows without one.
        Returns:
            Figures for the report of the run, by name.
        """
        return {}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 1; called before each one. Most losses do not depend on it."""

    def options(self) -> dict[str, object]:
        """The options as keyword arguments of the function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; shapes and errors are those of the function.

        Raises:
            RuntimeError: If `prepare` must be called first.
            TypeError: If labels are given in the teacher's place.
        """
        if not self._is_prepared():
            raise RuntimeError(self._how_to_prepare())
        if not self.takes_teacher and target is None and teacher_logits is not None:
            name = type(self).__name__
            raise TypeError(
                f"expected `target` as the third argument of {name}, got two tensors; "
                f"every loss is called as loss(student_logits, teacher_logits, target), "
                f"and {name} takes None for the teacher: loss(student_logits, None, target)"
            )
        return self._call(student_logits, teacher_logits, target, row_weight)

    def _call(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        **override: int,
    ) -> Tensor:
        logits = (student_logits, teacher_logits) if self.takes_teacher else (student_logits,)
        return type(self).function(*logits, target, row_weight=row_weight, **{**self.options(), **override})

    def _how_to_prepare(self) -> str:
        return "expected `prepare(teacher_logits, target)` to be called before the first batch"

    def extra_repr(self) -> str:
        return changed_options(self)


def changed_options(module: Any) -> str:
    """The fields of a dataclass that differ from their defaults, as they are written in its call."""
    changed = (f for f in fields(module) if getattr(module, f.name) != f.default)
    return ", ".join(f"{f.name}={getattr(module, f.name)!r}" for f in changed)
