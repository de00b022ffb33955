"""Teachers that tell only part of what they know, and charge for it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..errors import UserError, unknown_name
from .signal import DenseSignal
from .teachers import Batch, Teacher

AnswerKind: TypeAlias = Literal["probs", "topk", "label"]
"""What a black box tells of a row: every class's probability, those of its best classes, or its best class.

A row of such answers is a row of numbers: the C probabilities; the k best classes, then their
probabilities; or the class alone.
"""

FLOOR = 1e-12
"""Smallest probability that is told apart from 0: no class is put further below another than 27.6 nats."""

GAP = 1000.0
"""Nats between the class that a label names and all others: certain up to temperatures of ten and more."""


class BudgetError(UserError):
    """A teacher would have to be asked more often than it may be."""


def check_answers(answers: object, top_k: int | None, classes: int) -> None:
    """Refuse a kind of answers that there is not, or a number of classes that does not go with it.

    Raises:
        UserError: If there is anything to refuse.
    """
    if answers not in get_args(AnswerKind):
        raise unknown_name("kind of `answers`", answers, get_args(AnswerKind))
    if answers != "topk" and top_k is not None:
        raise UserError(f"expected `top_k` with `answers: topk` alone, got {top_k!r} with {answers}")
    if answers == "topk" and not (type(top_k) is int and 1 <= top_k <= classes):
        raise UserError(f"expected `top_k` in 1 .. {classes} with `answers: topk`, got {top_k!r}")


def answer(logits: Tensor, answers: AnswerKind, top_k: int | None = None) -> Tensor:
    """What a network with these logits says where it tells only this.

    Args:
        logits: ``(N, C)``.
        answers: See `AnswerKind`.
        top_k: How many classes ``"topk"`` tells, best first.
    Returns:
        ``(N, C)`` probabilities; ``(N, 2 k)``, classes and then probabilities; or ``(N, 1)`` classes.
    Example:
        >>> answer(torch.tensor([[0.0, 2.0, 1.0]]), "topk", top_k=2)
        tensor([[1.0000, 2.0000, 0.6652, 0.2447]])
    """
    if answers == "label":
        return logits.argmax(-1, keepdim=True).to(logits.dtype)
    probs = logits.softmax(-1)
    if answers == "probs":
        return probs
    assert top_k is not None
    best = probs.topk(top_k)
    return torch.cat([best.indices.to(probs.dtype), best.values], dim=-1)


def logits_from(told: Tensor, answers: AnswerKind, classes: int, *, floor: float = FLOOR) -> Tensor:
    r"""The logits that stand for what a black box has told, with mean 0 in every row.

    * Of probabilities, :math:`\log p_c - \frac1C \sum_i \log p_i`: the true logits but for their mean, which
      no softmax sees.
    * Of the best classes likewise; what is left of the probability, at least `floor`, is spread evenly over
      the others, none of which gets more than the last class that was told. ``PLDLoss(top_k=k)``
      looks at what was told alone, but for the probability of a label that is not among it.
    * Of a label, a teacher as good as certain of it: all other classes stand `GAP` nats below, so that KD is
      the cross-entropy with the label, at any usual temperature, and nothing is infinite.

    Args:
        told: See `answer`.
        answers: See `AnswerKind`.
        classes: C, of the teacher.
        floor: Probabilities that were told count as it if they are below; half of the last decimal where
            they were rounded.
    Returns:
        ``(N, C)``.
    Example:
        >>> logits = torch.tensor([[2.0, -0.5, 0.5, 1.0]])
        >>> logits_from(answer(logits, "probs"), "probs", classes=4)
        tensor([[ 1.2500, -1.2500, -0.2500,  0.2500]])
    """
    if answers == "label":
        log_probs = told.new_full((len(told), classes), -GAP).scatter(1, told.long(), 0.0)
    elif answers == "probs":
        log_probs = told.clamp(min=floor).log()
    else:
        chosen, probs = told.chunk(2, dim=-1)
        others = max(1, classes - probs.shape[-1])
        probs = probs.clamp(min=floor)
        left = (1 - probs.sum(-1, keepdim=True)).clamp(min=floor) / others
        each = torch.minimum(left, probs.amin(-1, keepdim=True)).clamp(min=min(floor, FLOOR))
        log_probs = each.expand(-1, classes).scatter(1, chosen.long(), probs).log()
    return log_probs - log_probs.mean(-1, keepdim=True)


class BlackBox(Teacher):
    """A teacher that answers questions and shows nothing else: no logits, no features, no gradient.

    Attributes:
        answers: What it tells; see `AnswerKind`.
        top_k: How many classes ``"topk"`` tells.
        classes: C.
        queries: Rows that were really asked about, and paid for, on this account.
        budget: How many there may be; None for any number.
        floor: See `logits_from`.
    """

    answers: AnswerKind
    top_k: int | None
    classes: int
    queries: int
    budget: int | None
    floor: float

    def signal(self, batch: Batch) -> DenseSignal:
        """What stands for the answers about the rows of a batch; see `logits_from`.

        Raises:
            BudgetError: If this would exceed the budget; nothing has been asked then.
        """
        inputs = batch["input"]
        logits = logits_from(self.told(inputs), self.answers, self.classes, floor=self.floor)
        return DenseSignal(logits.to(inputs.device), kind=self.answers)

    @abstractmethod
    def told(self, inputs: Tensor) -> Tensor:
        """The answers themselves, ``(N, ...)``; see `answer`."""

    @abstractmethod
    def account(self, name: str) -> BlackBox:
        """The same teacher for somebody else, whose queries are counted by themselves."""

    @abstractmethod
    def price(self, batches: Iterable[Batch]) -> int:
        """Rows that would have to be paid for to learn the answers about these batches; nobody is asked."""

    @property
    def cost(self) -> dict[str, Any]:
        """What asking has cost on this account, for a report."""
        return {"answers": self.answers, "top_k": self.top_k, "queries": self.queries, "budget": self.budget}

    def check_budget(self, rows: int) -> None:
        """Refuse to ask about so many rows more.

        Raises:
            BudgetError: If the budget does not allow it.
        """
        if self.budget is not None and self.queries + rows > self.budget:
            raise BudgetError(
                f"expected at most {self.budget} rows to ask the teacher about, its `budget`, got {rows} "
                f"more after {self.queries}; raise `teacher.budget`, or ask about fewer"
            )

    def record_features(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        raise UserError(
            f"expected a teacher whose inside can be looked at, for a loss on features, got a black box that "
            f"tells {self.answers} alone; leave out `teacher.answers` or `teacher.url`"
        )


def check_limits(budget: int | None, floor: float | None) -> None:
    if budget is not None and budget < 0:
        raise UserError(f"expected a `budget` of at least 0 rows, or none, got {budget}")
    if floor is not None and not 0 < floor < 1:
        raise UserError(f"expected a `floor` in (0, 1), got {floor}")


class LocalBlackBox(BlackBox):
    """A network at hand that answers as if it were a black box, for studies and tests.

    Args:
        model: From inputs to logits ``(N, C)``. Put into evaluation mode, where it stays.
        answers: What it tells; see `AnswerKind`.
        classes: C.
        top_k: How many classes ``"topk"`` tells.
        budget: Rows that it answers in all; None for any number. A row that comes again counts again.
        floor: See `logits_from`.
    Raises:
        UserError: On an option that makes no sense.
    Example:
        >>> teacher = LocalBlackBox(nn.Identity(), answers="label", classes=3, budget=2)
        >>> teacher.signal({"input": torch.tensor([[0.0, 2.0, 1.0]])}).logits.softmax(-1)
        tensor([[0., 1., 0.]])
        >>> teacher.queries
        1
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        answers: AnswerKind,
        classes: int,
        top_k: int | None = None,
        budget: int | None = None,
        floor: float = FLOOR,
    ) -> None:
        check_answers(answers, top_k, classes)
        check_limits(budget, floor)
        self.model = model.eval()
        self.answers, self.top_k, self.classes = answers, top_k, classes
        self.budget, self.floor, self.queries = budget, floor, 0

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def account(self, name: str) -> LocalBlackBox:
        other = copy.copy(self)
        other.queries = 0
        return other

    def price(self, batches: Iterable[Batch]) -> int:
        return sum(len(batch["input"]) for batch in batches)

    @torch.no_grad()
    def told(self, inputs: Tensor) -> Tensor:
        self.check_budget(len(inputs))
        logits: Tensor = self.model(inputs)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        self.queries += len(inputs)
        return answer(logits, self.answers, self.top_k)
