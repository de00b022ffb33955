"""Teachers: sources of signals for training batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.hooks import Features
from ..models.substitute import forward_with
from .signal import DenseSignal, Kind, Signal

if TYPE_CHECKING:
    from .blackbox import BlackBox

Batch = Mapping[str, Tensor]


class Teacher(ABC):
    """Answers a batch with a signal. It is no module: nothing trains, saves or wraps it.

    The attributes tell a method or a training loop what a teacher can do, so that neither depends on its
    class.

    Attributes:
        network: The network that answers, for methods that train a copy of it or reuse a part; None where
            only answers are available.
        answers_new_inputs: Whether it answers inputs that are no row of the data, such as a second view or a
            generated image.
        preferred_batch: Number of rows that it answers most efficiently in one call.
        budget: Largest number of rows that may be queried; None for no limit.
    """

    network: nn.Module | None = None
    answers_new_inputs: bool = True
    preferred_batch: int = 256
    budget: int | None = None

    @abstractmethod
    def signal(self, batch: Batch) -> Signal:
        """Return the teacher's answer to the rows of a batch."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Compute on this device from now on."""

    def state_dict(self) -> dict[str, Any]:
        """What a training that resumes must know of this teacher; empty for one that counts nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  most teachers have none
        """Continue from the state of `state_dict`."""

    @property
    def kind(self) -> Kind:
        """Form of the answers; see `luce.signals.DenseSignal`."""
        return "logits"

    @property
    def description(self) -> str:
        """The kind of teacher and the setting that changes it, to end an error message with."""
        return "one that gives logits only"

    @property
    def cost(self) -> dict[str, Any]:
        """Queries and their cost so far, for a report; empty for a teacher that answers free of charge."""
        return {}

    def account(self, name: str) -> BlackBox | None:
        """The same teacher with a query count of its own; None for one that answers free of charge."""
        return None

    def record_features(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Add the features at these paths to all signals of a ``with`` block; see `luce.models.hooks`.

        Raises:
            UserError: If this teacher has no features, or no such module.
        """
        raise UserError(
            f"expected a teacher whose features can be recorded, for a loss on features, got "
            f"{self.description}"
        )


class LiveTeacher(Teacher):
    """A network that is evaluated on every batch as the student sees it, augmentation included.

    Args:
        network: From inputs to logits. Set to evaluation mode for good; nothing else of it changes.
    """

    network: nn.Module
    learning = False

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()
        self._features: Features | None = None

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    @contextmanager
    def record_features(self, paths: Iterable[str]) -> Iterator[None]:
        with Features(self.network, paths) as self._features:
            try:
                yield
            finally:
                self._features = None

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        if self._features is None:
            return DenseSignal(self._answer(batch["input"]), learning=self.learning)
        with self._features.capture() as features:
            logits = self._answer(batch["input"])
        return DenseSignal(logits, features, learning=self.learning)

    def _answer(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits


class LearningTeacher(LiveTeacher):
    """A network that is being trained itself, evaluated in its current mode.

    In training mode it normalises with the batch's statistics and applies dropout, as it does when it learns,
    but its buffers (such as the running statistics of batch normalisation) stay unchanged.

    Args:
        network: From inputs to logits. Left unchanged, its mode included.
    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> rows = {"input": torch.tensor([[1.0, 5.0], [3.0, 9.0]])}
        >>> LearningTeacher(norm).signal(rows).logits.round()
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> norm.running_mean
        tensor([0., 0.])
    """

    learning = True

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._features = None

    def _answer(self, inputs: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return forward_with(self.network, buffers, inputs)


class CachedTeacher(Teacher):
    """Logits computed once for every row of a source and looked up by the ``index`` of each row.

    Correct only where a row always looks the same: without augmentation.

    Args:
        logits: ``(rows of the source, C)``; NaN in rows that were not queried.
        kind: Form of the answers that the logits were made from.
    """

    answers_new_inputs = False
    kind: Kind = "logits"

    def __init__(self, logits: Tensor, kind: Kind = "logits") -> None:
        self.logits, self.kind = logits, kind

    @classmethod
    def of(cls, teacher: Teacher, batches: Iterable[Batch], rows: int) -> CachedTeacher:
        """Query a teacher for all batches of a source with this number of rows."""
        logits: Tensor | None = None
        kind: Kind = "logits"
        for batch in batches:
            signal = teacher.signal(batch)
            kind = signal.kind
            if logits is None:
                shape = (rows, signal.logits.shape[-1])
                logits = torch.full(shape, torch.nan, dtype=signal.logits.dtype)
            logits[batch["index"].cpu()] = signal.logits.cpu()
        if logits is None:
            raise UserError("expected at least one batch to query the teacher for, got none")
        return cls(logits, kind)

    @property
    def description(self) -> str:
        return "one with cached outputs; set `teacher.cache_outputs: false`"

    def to(self, device: torch.device) -> None:
        """Leave the logits where they are: all may not fit on the device, and one batch moves quickly."""

    def signal(self, batch: Batch) -> DenseSignal:
        index = batch["index"]
        return DenseSignal(self.logits[index.to(self.logits.device)].to(index.device), kind=self.kind)
