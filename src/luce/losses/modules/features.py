"""What all losses on features share: how they are built, called and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import _features

Shapes = Sequence[torch.Size]


@dataclass(eq=False, repr=False, kw_only=True)
class FeatureLoss(nn.Module):
    """A loss between features of the student and of the teacher, with its options as dataclass fields.

    All are used alike: `build` once with the shapes of the features, then
    ``loss(student_features, teacher_features)`` with two lists of tensors, one per stage. What a loss
    learns beside the student (projections, regressors, variances) are its parameters: they exist after
    `build`, must be handed to the optimiser, and are of no use once the student is trained, unless the loss
    says otherwise. A loss without parameters needs no `build`, which then only checks the shapes.

    Subclasses say what they compare:

    Attributes:
        takes: ``"maps"``, features of shape ``(N, C', H, W)``, or ``(N, T, D)`` as transformers have them,
            which count as a map of T places and D channels; or ``"vectors"``, of shape ``(N, D)``.
        stages: ``"one"`` feature of each network; ``"many"``, any number, whose losses are summed; or
            ``"pairs"``, the input and the output of a stage in turn: in, out, in, out, ...
        needs_labels: `forward` also takes the labels, as ``target=``.
        needs_index: `forward` also takes the number of each row in the data, as ``index=``.
    """

    takes: ClassVar[Literal["maps", "vectors"]]
    stages: ClassVar[Literal["one", "many", "pairs"]] = "many"
    needs_labels: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False
    function: ClassVar[Callable[..., Tensor] | None] = None
    """Of one feature of each network; its options are the module's fields."""

    def __post_init__(self) -> None:
        super().__init__()
        self._shapes: tuple[tuple[torch.Size, ...], ...] | None = None
        self._check_options()

    def build(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """Make what the loss learns, as ordinary parameters on the CPU.

        Args:
            student_shapes: Of each feature, without the batch: ``(C', H, W)``, ``(T, D)`` or ``(D,)``.
            teacher_shapes: Likewise, as many.
        Raises:
            ValueError: On shapes that this loss cannot compare, or others than those of an earlier call;
                a second call with the same shapes changes nothing.
        """
        shapes = tuple(tuple(torch.Size(s) for s in group) for group in (student_shapes, teacher_shapes))
        if self._shapes is not None:
            if shapes != self._shapes:
                raise ValueError(
                    f"expected the shapes that this {type(self).__name__} was built for, "
                    f"{_features.as_text(self._shapes)}, got {_features.as_text(shapes)}; make another one"
                )
            return
        self._check_number(*map(len, shapes))
        for group, name in zip(shapes, ("student", "teacher"), strict=True):
            for shape in group:
                _features.check_shape(f"{name}'s feature", shape, self.takes)
        self._make(*shapes)
        self._shapes = shapes

    def forward(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """The loss of a batch, a scalar; shapes and errors are those of the function."""
        self._check_number(len(student_features), len(teacher_features))
        pairs = zip(student_features, teacher_features, strict=True)
        return torch.stack([self._stage(i, s, t) for i, (s, t) in enumerate(pairs)]).sum()

    def _check_options(self) -> None:
        """The function knows its own rules: using the options once, on the smallest input, checks them."""
        if type(self).function is not None:
            one = torch.zeros(1, 1, 1, 1) if self.takes == "maps" else torch.zeros(1, 1)
            self._stage(0, one, one)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """Make the parameters; nothing for a loss without any."""

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one feature of each network."""
        function = type(self).function
        assert function is not None
        return function(student, teacher, **self.options())

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _check_number(self, student: int, teacher: int) -> None:
        name = type(self).__name__
        if student != teacher:
            raise ValueError(
                f"expected as many features of the student as of the teacher, got {student} and {teacher}"
            )
        if self.stages == "one" and student != 1:
            raise ValueError(f"expected one feature of each network, as {name} takes, got {student}")
        if student == 0 or (self.stages == "pairs" and student % 2):
            some = "input and output of each stage in turn" if self.stages == "pairs" else "at least one"
            raise ValueError(f"expected {some} as features for {name}, got {student} of each network")
        if self._shapes is not None and student != len(self._shapes[0]):
            raise ValueError(
                f"expected {len(self._shapes[0])} features of each network, as {name} was built for, "
                f"got {student}"
            )

    def extra_repr(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
