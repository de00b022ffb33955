"""What a method compares in a step, for a training loop that looks at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from ..signals import Signal


@dataclass
class Observation:
    """The tensors that the losses of a step receive.

    Attributes:
        features: Of the student, by module path, with their graph.
        signal: The first answer that a loss compared with, from whichever teacher; None without one.
        target: Labels of the rows of that answer.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    signal: Signal | None = None
    target: Tensor | None = None


_WANTED: ContextVar[Observation | None] = ContextVar("observation", default=None)


@contextmanager
def observing() -> Iterator[Observation]:
    """Fill an observation with what the methods pass to `observe` inside this ``with`` block."""
    observation = Observation()
    token = _WANTED.set(observation)
    try:
        yield observation
    finally:
        _WANTED.reset(token)


def observe(batch: Mapping[str, Tensor], signal: Signal | None, features: Mapping[str, Tensor]) -> None:
    """Show the tensors of a loss to `observing`; costs nothing outside of it.

    Args:
        batch: With the ``target`` of the rows that are compared.
        signal: The answer that they are compared with.
        features: Of the student, by module path; empty for a loss on logits.
    """
    observation = _WANTED.get()
    if observation is None:
        return
    observation.features |= features
    if observation.signal is None and signal is not None:
        observation.signal, observation.target = signal, batch["target"]
