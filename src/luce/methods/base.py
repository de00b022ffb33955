"""What a distillation method is to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..signals import Signal, Teacher

Batch = Mapping[str, Tensor]


class Samples(NamedTuple):
    """Images that a method has made, to be looked at.

    Attributes:
        images: ``(N, channels, height, width)``, from 0 to 1.
        answers: What the teacher said about them, logits ``(N, C)``.
    """

    images: Tensor
    answers: Tensor


class TrainingRows(Protocol):
    """The training rows, for what a method learns before training.

    Attributes:
        trial: It is only tried whether it works: there is one batch alone, and no more should be done.
    """

    @property
    def trial(self) -> bool: ...

    def batches(
        self, batch_size: int = 256, *, epochs: int = 1, shuffle: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """``input``, ``target`` and ``index`` of all rows, as often as there are epochs, on the device.

        Args:
            batch_size: Rows at a time.
            epochs: How often.
            shuffle: In an order of their own in each epoch, and augmented as in training; otherwise in order
                and as they are.
        """


class Method(nn.Module, ABC):
    """What one training step does with the student, a batch and the teacher's signal.

    Parameters of a method are trained beside the student's, by the same optimizer, unless one of its own
    `optimizers` holds them. They stay out of the exported student.

    The loop calls, in this order: `build`; `prepare`, if it is wanted and the training was not resumed;
    then, within `hooks`, `set_epoch` before each epoch, `before_round` before every so many batches, and
    for each of them `step`, whose loss the student's optimizer descends, and `after_step`.

    What a method has learned must be in its ``state_dict`` or in that of its `optimizers`: checkpoints keep
    both.

    Attributes:
        needs_teacher: Whether a step looks at a signal.
        uses_unlabelled: Whether a row without a label can teach anything.
        needs_preparation: Whether `prepare` must be called before training.
        two_views: Whether a step looks at ``batch["strong"]``, a second view of the same rows, too.
        generates_inputs: Whether a step looks at inputs of its own, and at the batch for its size alone.
        manual_optimization: Whether it trains parts with optimizers of its own, so that each batch must be a
            step.
        batches_per_round: How many batches `before_round` looks ahead.
        quiz: Share of the labelled training rows that nobody trains on, for `before_round` to ask about.
        quiz_batches: How many batches of them each round gets.
    """

    needs_teacher: bool = True
    uses_unlabelled: bool = True
    needs_preparation: bool = False
    two_views: bool = False
    generates_inputs: bool = False
    manual_optimization: bool = False
    batches_per_round: int = 1
    quiz: float = 0.0
    quiz_batches: int = 1

    def build(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        sample: Batch,
        rows: Batch,
    ) -> None:
        """Make the parts that depend on the networks and the data, before anything is restored or trained.

        Args:
            student: On its device, as it starts. It must be left as it is, but for what the method itself
                settles, such as a classifier that it takes over.
            teacher: That will answer the batches; None without one.
            sample: A batch of a few rows.
            rows: ``index`` and ``target`` of all training rows; a target of -1 where there is none.
        Raises:
            UserError: If the networks or the data do not suit the method.
        """

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """Its own, which exist after `build`; their learning rates follow the student's schedule."""
        return {}

    @property
    def co_trained(self) -> Mapping[str, nn.Module]:
        """Networks that are trained along, for the test at the end."""
        return {}

    @property
    def samples(self) -> Samples | None:
        """Images that it has made, for the report, once it is prepared; None if it makes none."""
        return None

    def hooks(self, student: nn.Module, teacher: Teacher | None) -> AbstractContextManager[None]:
        """What must hold while steps are made, such as hooks on the networks; for a ``with`` block."""
        return nullcontext()

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        """Learn before training what a step must know; what is drawn here moves no later draw.

        Parameters that are trained here and no more later must be frozen in `build` already: a resumed
        training restores their values and never comes here.

        Args:
            teacher: Answers batches.
            rows: Those of the training.
        Returns:
            What was found, by name, as far as a reader of the run would want to know it.
        """
        return {}

    def set_epoch(self, epoch: int) -> None:
        """AnswerKind before each epoch, counted from 1."""

    def before_round(
        self, student: nn.Module, batches: Sequence[Batch], quiz: Sequence[Batch], learning_rate: float
    ) -> dict[str, Tensor]:
        """Make the method's own steps that come before the student's.

        Args:
            student: In training mode; its parameters, buffers and gradients must be left as they are.
            batches: The next `batches_per_round`, fewer at the end of an epoch.
            quiz: `quiz_batches` of the rows that are held out; none without a `quiz`.
            learning_rate: The student's for the next step.
        Returns:
            Named scalars to be noted in the run.
        """
        return {}

    @abstractmethod
    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Named scalar terms of the batch's loss, among them ``"loss"``, the one to descend."""

    def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Make the method's own steps that come after the student's, on the last batch that went into it.

        Returns:
            Named scalars to be noted in the run.
        """
        return {}
