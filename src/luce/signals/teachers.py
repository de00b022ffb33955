"""Where a teacher's signals come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.hooks import Features
from ..models.substitute import forward_with
from .signal import DenseSignal, Kind, Signal

Batch = Mapping[str, Tensor]


class Teacher(ABC):
    """Answers a batch with a signal. It is no module: nothing trains, saves or wraps it."""

    @abstractmethod
    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about the rows of a batch."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Work on this device from now on."""

    def record_features(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """In this ``with`` block signals bring the features at these paths; see `luce.models.hooks`.

        Raises:
            UserError: If this teacher has none to give, or no such module.
        """
        raise UserError(
            "expected a teacher that is asked anew for every batch, for a loss on features, which nobody "
            "remembers; set `teacher.cache_outputs: false`"
        )


class LiveTeacher(Teacher):
    """A network asked anew for every batch, as the student sees it, augmentation included.

    Args:
        model: From inputs to logits. Put into evaluation mode, where it stays; nothing else of it changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self._features: Features | None = None

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @contextmanager
    def record_features(self, paths: Iterable[str]) -> Iterator[None]:
        with Features(self.model, paths) as self._features:
            try:
                yield
            finally:
                self._features = None

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        if self._features is None:
            return DenseSignal(self._answer(batch["input"]))
        with self._features.capture() as features:
            logits = self._answer(batch["input"])
        return DenseSignal(logits, features)

    def _answer(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)
        return logits


class LearningTeacher(LiveTeacher):
    """A network that is itself being trained, asked in the mode in which it is.

    In training mode it normalises by the statistics of the batch and drops units out, as when it learns, but
    what it counts (the running statistics of batch normalisation, any buffer) stays as it was.

    Args:
        model: From inputs to logits. Unchanged, its mode too.
    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> rows = {"input": torch.tensor([[1.0, 5.0], [3.0, 9.0]])}
        >>> LearningTeacher(norm).signal(rows).logits.round()
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._features = None

    def _answer(self, inputs: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return forward_with(self.model, buffers, inputs)


class CachedTeacher(Teacher):
    """Logits computed once for a whole source and found again by the ``index`` of each row.

    Right only where a row always looks the same: without augmentation.

    Args:
        logits: ``(rows of the source, C)``; NaN in rows nobody asked about.
        kind: What they stand for.
    """

    def __init__(self, logits: Tensor, kind: Kind = "logits") -> None:
        self.logits, self.kind = logits, kind

    def to(self, device: torch.device) -> None:
        """The answers stay where they are: they may not fit elsewhere, and a batch of them moves quickly."""

    @classmethod
    def of(cls, teacher: Teacher, batches: Iterable[Batch], rows: int) -> CachedTeacher:
        """Ask a teacher about all batches of a source that has so many rows."""
        logits: Tensor | None = None
        kind: Kind = "logits"
        for batch in batches:
            signal = teacher.signal(batch)
            answer, kind = signal.logits, signal.kind
            if logits is None:
                logits = torch.full((rows, answer.shape[-1]), torch.nan, dtype=answer.dtype)
            logits[batch["index"].cpu()] = answer.cpu()
        if logits is None:
            raise UserError("expected at least one batch to ask the teacher about, got none")
        return cls(logits, kind)

    def signal(self, batch: Batch) -> DenseSignal:
        index = batch["index"]
        return DenseSignal(self.logits[index.to(self.logits.device)].to(index.device), kind=self.kind)
