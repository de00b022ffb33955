"""The interface between a distillation method and the training loop.

A method is a `Method`: it builds its parts and computes the loss of a batch. A method that does more declares
it by inheriting from a capability, a small abstract class with the attributes and hooks that belong together:

* `Prepares`: learns from the teacher before training.
* `LooksAhead`: takes steps of its own before the student's, with the next batches and perhaps held-out rows.
* `StepsAfter`: takes steps of its own after the student's.
* `OptimizesManually`: trains parts with optimizers of its own.
* `CoTrains`: trains other networks along, which are tested at the end.
* `GeneratesInputs`: trains the student on generated inputs.

The loop reads `Method.capabilities` once and depends on no class of methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..signals import Signal, Teacher

Batch = Mapping[str, Tensor]


class Samples(NamedTuple):
    """Generated images, for the report of a run.

    Attributes:
        images: ``(N, channels, height, width)``, in [0, 1].
        answers: The teacher's logits for them, ``(N, C)``.
    """

    images: Tensor
    answers: Tensor


class TrainingRows(Protocol):
    """The training rows, for what a method learns before training.

    Attributes:
        trial: Whether this is a dry run: there is one batch only, and a method should do no more than it
            needs to find out whether everything fits.
    """

    @property
    def trial(self) -> bool: ...

    def batches(
        self, batch_size: int = 256, *, epochs: int = 1, shuffle: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yield ``input``, ``target`` and ``index`` of all rows, on the device, once per epoch.

        Args:
            batch_size: Rows per batch.
            epochs: Passes over the rows.
            shuffle: Whether to draw a new order in each epoch and augment as in training; otherwise the rows
                come in order and unchanged.
        """


class Method(nn.Module, ABC):
    """One training step on the student, a batch and the teacher's signal.

    The student's optimizer trains the parameters of a method along, except those of its own optimizers (see
    `OptimizesManually`). They are not exported with the student.

    The loop calls, in this order: `build`; `Prepares.prepare`, unless the training was resumed; then, within
    `hooks`, `set_epoch` before each epoch, `LooksAhead.before_round` before each round of batches, and for
    each batch `step`, whose loss the student's optimizer minimises, and `StepsAfter.after_step`.

    Everything that a method learns must be in its ``state_dict`` or in that of its optimizers: checkpoints
    save both.

    Attributes:
        needs_teacher: Whether `step` reads the signal.
        uses_unlabelled: Whether a row without a label contributes to the loss.
        two_views: Whether `step` also reads ``batch["strong"]``, a second view of the same rows.
        inner: The method that this one wraps and whose capabilities it passes on; None for a method that
            wraps none.
    """

    needs_teacher: bool = True
    uses_unlabelled: bool = True
    two_views: bool = False

    @property
    def inner(self) -> Method | None:
        """The method that this one wraps."""
        return None

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of this method and of the methods that it wraps."""
        return Capabilities.of(self)

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        """Make the parts that depend on networks and data, before anything is restored or trained.

        Args:
            student: On its device, with its first weights. Leave it unchanged, except for what the method
                defines itself, such as a classifier that it takes over from the teacher.
            teacher: Will answer the batches; None without one.
            sample: A batch of a few rows.
            rows: ``index`` and ``target`` of all training rows; a target of -1 marks an unlabelled row.
        Raises:
            UserError: If the networks or the data do not suit the method.
        """

    def hooks(self, student: nn.Module, teacher: Teacher | None) -> AbstractContextManager[None]:
        """Return a context manager for the steps, which holds for example the hooks on both networks."""
        return nullcontext()

    def set_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, counted from 1."""

    @abstractmethod
    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Return named scalar terms of the batch's loss, among them ``"loss"``, which is minimised."""


class Prepares(Method):
    """A method that learns from the teacher before training.

    Attributes:
        needs_preparation: Whether `prepare` must be called before training.
    """

    needs_preparation: bool = True

    @abstractmethod
    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        """Learn what the steps need. The random state of the training is not affected.

        A resumed training restores what was learned and does not call this again, so `build` must already
        freeze parameters that are trained here only.

        Args:
            teacher: Answers batches.
            rows: The training rows.
        Returns:
            Results by name that a reader of the run may want to know.
        """


class LooksAhead(Method):
    """A method that takes steps of its own before the student's.

    Attributes:
        held_out: Share of the labelled training rows that no step trains on.
        held_out_batches: Full batches of held-out rows in each round.
        batches_per_round: Batches in each round.
    """

    held_out: float = 0.0
    held_out_batches: int = 1
    batches_per_round: int = 1

    @abstractmethod
    def before_round(
        self, student: nn.Module, batches: Sequence[Batch], held_out: Sequence[Batch], learning_rate: float
    ) -> dict[str, Tensor]:
        """Take the method's steps that precede the student's steps on these batches.

        Args:
            student: In training mode. Leave its parameters, buffers and gradients unchanged.
            batches: The next `batches_per_round` batches, fewer at the end of an epoch.
            held_out: `held_out_batches` batches of held-out rows; empty without any.
            learning_rate: Of the student's next step.
        Returns:
            Named scalars to log.
        """


class StepsAfter(Method):
    """A method that takes steps of its own after the student's."""

    @abstractmethod
    def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Take the method's steps that follow a step of the student.

        Args:
            student: As the step left it.
            batch: The last batch that went into the step.
        Returns:
            Named scalars to log.
        """


class OptimizesManually(Method):
    """A method that trains parts with optimizers of its own, so that each batch must be one step."""

    @property
    @abstractmethod
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers by name, once built; their learning rates follow the student's schedule."""


class CoTrains(Method):
    """A method that trains other networks beside the student."""

    @property
    @abstractmethod
    def co_trained(self) -> Mapping[str, nn.Module]:
        """The networks by name, once built; they are tested at the end of a run."""


class GeneratesInputs(Method):
    """A method that trains the student on generated inputs and reads of a batch only its size."""

    @property
    @abstractmethod
    def samples(self) -> Samples:
        """Some of the generated images, once prepared; for the report of a run."""


M = TypeVar("M", bound=Method)


@dataclass(frozen=True)
class Capabilities:
    """For each capability the outermost of nested methods that has it; None where none has it.

    Attributes:
        prepares: None also where nothing needs preparation.
    """

    prepares: Prepares | None
    looks_ahead: LooksAhead | None
    steps_after: StepsAfter | None
    optimizes_manually: OptimizesManually | None
    co_trains: CoTrains | None
    generates_inputs: GeneratesInputs | None

    @classmethod
    def of(cls, method: Method) -> Capabilities:
        """Find the capabilities of a method and of those that it wraps."""
        nested = [method]
        while (inner := nested[-1].inner) is not None:
            nested.append(inner)
        prepares = next((part for part in nested if isinstance(part, Prepares)), None)
        return cls(
            prepares=prepares if prepares is not None and prepares.needs_preparation else None,
            looks_ahead=next((part for part in nested if isinstance(part, LooksAhead)), None),
            steps_after=next((part for part in nested if isinstance(part, StepsAfter)), None),
            optimizes_manually=next((part for part in nested if isinstance(part, OptimizesManually)), None),
            co_trains=next((part for part in nested if isinstance(part, CoTrains)), None),
            generates_inputs=next((part for part in nested if isinstance(part, GeneratesInputs)), None),
        )


class WrappedMethod(Method, Generic[M]):
    """A method that changes how another one is used and otherwise behaves like it.

    Subclasses override what they change; building, hooks, epochs and capabilities are those of the wrapped
    method.

    Attributes:
        method: The wrapped method.
    """

    method: M

    def __init__(self, method: M) -> None:
        super().__init__()
        self.method = method
        self.uses_unlabelled = method.uses_unlabelled

    @property
    def inner(self) -> Method | None:
        return self.method

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        self.method.build(student, teacher, sample, rows)

    def hooks(self, student: nn.Module, teacher: Teacher | None) -> AbstractContextManager[None]:
        return self.method.hooks(student, teacher)

    def set_epoch(self, epoch: int) -> None:
        self.method.set_epoch(epoch)
