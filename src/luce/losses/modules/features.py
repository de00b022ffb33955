"""The base class of the losses on features: building, calling and checking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ... import checks
from .. import _features
from .base import Prepared, changed_options

Shapes = Sequence[torch.Size]
Tensors = Sequence[Tensor]


class TeacherFeatures(Protocol):
    """The teacher's features of the training rows, for `FeatureLoss.prepare`."""

    def __call__(
        self, *, batch_size: int = 256, epochs: int = 1, shuffle: bool = False
    ) -> Iterator[list[Tensor]]:
        """Yield a list of features per batch, without gradient; see `luce.methods.TrainingRows.batches`."""


class Train(Protocol):
    """Trains a module before the student; a method passes it to `FeatureLoss.prepare`."""

    def __call__(
        self,
        module: nn.Module,
        batches: Iterable[Tensors],
        error: Callable[[Tensors], Tensor],
        *,
        lr: float,
    ) -> None:
        """Minimise the error of the batches over the module's parameters, one step for each batch."""


@dataclass(eq=False, repr=False, kw_only=True)
class FeatureLoss(Prepared):
    """A loss between features of the student and of the teacher, with its options as dataclass fields.

    Call `build` once with the shapes of the features, then ``loss(student_features, teacher_features)`` with
    two lists of tensors, one per stage. Projections, regressors and variances that are trained with the
    student are parameters of the loss. They exist after `build`, must be passed to the optimiser, and are not
    needed once the student is trained unless the loss states otherwise. A loss without parameters works
    without `build`, which then only checks the shapes.

    Example:
        >>> import luce
        >>> loss = luce.VIDLoss()
        >>> loss.build([(8, 4, 4)], [(16, 4, 4)])
        >>> optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)  # with the student's parameters
        >>> loss([torch.zeros(2, 8, 4, 4)], [torch.zeros(2, 16, 4, 4)])  # log(5) / 2
        tensor(0.8047, grad_fn=<SumBackward0>)

    Subclasses set what they compare:

    Attributes:
        takes: ``"maps"``, features of shape ``(N, C', H, W)``, or ``(N, T, D)`` as transformers have them,
            which count as a map of T places and D channels; or ``"vectors"``, of shape ``(N, D)``.
        stages: ``"one"`` feature of each network; ``"many"``, any number, whose losses are summed;
            ``"consecutive"``, at least two, each compared with the next; or ``"pairs"``, the input and the
            output of a stage in turn: in, out, in, out, ...
        needs_labels: `forward` also takes the labels, as ``target=``.
        needs_index: `forward` also takes the number of each row in the data, as ``index=``.
        reuses_classifier: Whether the student must end in a copy of the teacher's classifier, which
            `luce.methods.FeatureMethod` makes.
    """

    takes: ClassVar[Literal["maps", "vectors"]]
    stages: ClassVar[Literal["one", "many", "consecutive", "pairs"]] = "many"
    needs_labels: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False
    reuses_classifier: ClassVar[bool] = False
    function: ClassVar[Callable[..., Tensor] | None] = None
    """The loss of one feature of each network; its options are the module's fields."""

    def __post_init__(self) -> None:
        super().__init__()
        self._register_prepared_buffers()
        self._shapes: tuple[tuple[torch.Size, ...], ...] | None = None
        self._check_options()

    def register_rows(
        self, index: Tensor, target: Tensor, *, gather: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Learn before `build` which training rows exist; most losses ignore it.

        Args:
            index: Numbers of the rows in the data, as in batches, ``(rows,)``.
            target: Their classes; `UNLABELLED` where there is none.
            gather: Concatenates the rows of a tensor over all processes that train together; None for a
                single process.
        Raises:
            ValueError: If the loss cannot use these rows.
        """

    def build(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """Make the parameters of the loss, on the CPU.

        Args:
            student_shapes: Of each feature, without the batch: ``(C', H, W)``, ``(T, D)`` or ``(D,)``.
            teacher_shapes: Likewise, as many.
        Raises:
            ValueError: On shapes that this loss cannot compare, or that differ from those of an earlier
                call; a second call with the same shapes changes nothing.
        """
        shapes = tuple(tuple(torch.Size(s) for s in group) for group in (student_shapes, teacher_shapes))
        if self._shapes is not None:
            if shapes != self._shapes:
                raise ValueError(
                    f"expected the shapes that this {type(self).__name__} was built for, "
                    f"{_as_text(self._shapes)}, got {_as_text(shapes)}; make another one"
                )
            return
        self._check_number(*map(len, shapes))
        for group, name in zip(shapes, ("student", "teacher"), strict=True):
            for shape in group:
                checks.check_feature_shape(f"a feature of the {name}", shape, self.takes)
        # Set before `_make`, whose trial pass checks it, and taken back if that fails.
        self._shapes = shapes
        try:
            self._make(*shapes)
        except ValueError:
            self._shapes = None
            raise

    def prepare(self, teacher_features: TeacherFeatures, train: Train) -> dict[str, float]:
        """Learn what must be known of the teacher before training; most losses need nothing.

        Not called again when a training is resumed: `build` must freeze the parameters that are trained here
        and no more later.

        Args:
            teacher_features: Call it for as many passes over them as it takes.
            train: Runs the optimization of a part that is trained before the student.
        Returns:
            Figures for the report of the run, by name.
        """
        return {}

    def forward(self, student_features: Tensors, teacher_features: Tensors) -> Tensor | dict[str, Tensor]:
        """The loss of a batch, a scalar; shapes and errors are those of the function.

        A loss with several parts returns a dict of scalars with the key ``"loss"``, as `luce.WeightedSum`
        does.

        Raises:
            RuntimeError: If this loss has parameters and was not built.
        """
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        pairs = zip(student_features, teacher_features, strict=True)
        return torch.stack([self._stage(i, s, t) for i, (s, t) in enumerate(pairs)]).sum()

    @property
    def learns(self) -> bool:
        """Whether `build` makes parameters."""
        return type(self)._make is not FeatureLoss._make

    def _check_options(self) -> None:
        """Check the options by calling the function once, on the smallest input."""
        if type(self).function is not None:
            one = torch.zeros(1, 1, 1, 1) if self.takes == "maps" else torch.zeros(1, 1)
            self._stage(0, one, one)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """Make the parameters; a loss without parameters only checks the shapes."""
        self._try(student_shapes, teacher_shapes)

    @torch.no_grad()
    def _try(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        """Compute the loss of one row of these shapes, so that wrong shapes raise before training."""
        features = [[torch.zeros(1, *shape) for shape in group] for group in (student_shapes, teacher_shapes)]
        # The mode is restored, since `build` may come after `train` or `eval`.
        training = self.training
        # In training mode a batch of one row of zeros would move running statistics or fail to normalise.
        self.eval()
        self.forward(*features)
        self.train(training)

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
        least = 2 if self.stages == "consecutive" else 1
        if student < least or (self.stages == "pairs" and student % 2):
            expected = {
                "consecutive": "at least two, of consecutive stages,",
                "pairs": "input and output of each stage in turn",
            }.get(self.stages, "at least one")
            raise ValueError(f"expected {expected} as features for {name}, got {student} of each network")
        if self._shapes is not None and student != len(self._shapes[0]):
            raise ValueError(
                f"expected {len(self._shapes[0])} features of each network, as {name} was built for, "
                f"got {student}"
            )

    def _check_built(self) -> None:
        if self.learns and self._shapes is None:
            raise RuntimeError(
                f"expected {type(self).__name__}.build to be called with the shapes of the features first: "
                f"it makes the parameters of the loss"
            )

    def extra_repr(self) -> str:
        return changed_options(self)


def _as_text(shapes: Sequence[Sequence[torch.Size]]) -> str:
    student, teacher = ([tuple(shape) for shape in group] for group in shapes)
    return f"{student} of the student and {teacher} of the teacher"


def through(layer: nn.Module, feature: Tensor) -> Tensor:
    """Apply a layer to a feature converted to the layer's dtype."""
    first = next(layer.parameters(), None)
    output: Tensor = layer(feature if first is None else feature.to(first.dtype))
    return output


def channels(student_shapes: Shapes, teacher_shapes: Shapes) -> list[tuple[int, int]]:
    """Return the channels of the student's and the teacher's map for each stage."""
    return [
        (_features.map_shape(s)[0], _features.map_shape(t)[0])
        for s, t in zip(student_shapes, teacher_shapes, strict=True)
    ]


def aligned(inputs: int, outputs: int) -> nn.Module:
    """Return a 1x1 convolution to the teacher's channels, or the identity if they are equal."""
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
