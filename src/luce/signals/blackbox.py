"""Teachers that reveal only part of their output, and may charge for each query."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..errors import UserError, unknown_name
from .signal import DenseSignal, Kind
from .teachers import Batch, Teacher

AnswerKind: TypeAlias = Literal["probs", "topk", "label"]
"""Form of an answer: all class probabilities, those of the best classes, or the best class.

One answer is a row of numbers: the C probabilities; the k best classes, then their probabilities; or the
class alone.
"""

FLOOR = 1e-12
"""Probabilities below it count as it, which bounds the log-probabilities at -27.6 nats."""

GAP = 1000.0
"""Nats between the class that a label names and all others: certain at temperatures up to about 20."""


class BudgetError(UserError):
    """A plan that needs more queries than the teacher's budget allows."""


def check_answers(answers: object, top_k: int | None, classes: int) -> None:
    """Refuse an unknown kind of answers, or a `top_k` that does not fit it.

    Raises:
        UserError: On either.
    """
    if answers not in get_args(AnswerKind):
        raise unknown_name("kind of `answers`", answers, get_args(AnswerKind))
    if answers != "topk" and top_k is not None:
        raise UserError(f"expected `top_k` only with `answers: topk`, got {top_k!r} with {answers}")
    if answers == "topk" and not (type(top_k) is int and 1 <= top_k <= classes):
        raise UserError(f"expected `top_k` in 1 .. {classes} with `answers: topk`, got {top_k!r}")


def answer(logits: Tensor, answers: AnswerKind, top_k: int | None = None) -> Tensor:
    """Reduce logits to the answer of a black box.

    Args:
        logits: ``(N, C)``.
        answers: See `AnswerKind`.
        top_k: Number of classes in an answer of kind ``"topk"``, best first.
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


def logits_from(answers: Tensor, kind: AnswerKind, classes: int, *, floor: float = FLOOR) -> Tensor:
    r"""Convert the answers of a black box to logits with mean 0 in every row.

    * Probabilities become :math:`\log p_c - \frac1C \sum_i \log p_i`: the true logits up to their mean, which
      no softmax sees.
    * Probabilities of the best classes likewise; the remaining probability, at least `floor`, is spread
      evenly over the other classes, none of which gets more than the last class of the answer.
      ``PLDLoss(top_k=k)`` uses only the classes of the answer, except for the probability of a label that is
      not among them.
    * A label becomes a teacher that is certain of it: all other classes are `GAP` nats below, so that KD
      equals cross-entropy with the label at any usual temperature, and all logits are finite.

    Args:
        answers: See `answer`.
        kind: Of the answers.
        classes: C, of the teacher.
        floor: Smaller probabilities in an answer count as it; half of the last decimal where the teacher
            rounds.
    Returns:
        ``(N, C)``.
    Example:
        >>> logits = torch.tensor([[2.0, -0.5, 0.5, 1.0]])
        >>> logits_from(answer(logits, "probs"), "probs", classes=4)
        tensor([[ 1.2500, -1.2500, -0.2500,  0.2500]])
    """
    if kind == "label":
        log_probs = answers.new_full((len(answers), classes), -GAP).scatter(1, answers.long(), 0.0)
    elif kind == "probs":
        log_probs = answers.clamp(min=floor).log()
    else:
        best, probs = answers.chunk(2, dim=-1)
        others = max(1, classes - probs.shape[-1])
        probs = probs.clamp(min=floor)
        rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=floor) / others
        # Rounded answers may sum to less than 1; without the minimum an unnamed class could beat a named one.
        each = torch.minimum(rest, probs.amin(-1, keepdim=True)).clamp(min=min(floor, FLOOR))
        log_probs = each.expand(-1, classes).scatter(1, best.long(), probs).log()
    return log_probs - log_probs.mean(-1, keepdim=True)


class BlackBox(Teacher):
    """A teacher that answers queries and reveals nothing else: no logits, no features, no gradient.

    Attributes:
        answers: Form of the answers; see `AnswerKind`.
        top_k: Number of classes in an answer of kind ``"topk"``.
        classes: C.
        queries: Rows that were queried and paid for on this account.
        budget: Largest number of queries; None for no limit.
        floor: See `logits_from`.
        repeats_are_free: Whether a row that was answered once is never paid for again.
        address: Where the answers come from, for messages.
        order: The class of its answers behind each logit of a signal, ``(C,)``; None for their own order.
    """

    answers: AnswerKind
    top_k: int | None
    classes: int
    queries: int
    floor: float
    repeats_are_free: bool = False
    address: str = "at hand"
    order: Tensor | None = None

    def signal(self, batch: Batch) -> DenseSignal:
        """Query the rows of a batch and convert the answers to logits; see `logits_from`.

        Raises:
            BudgetError: If this would exceed the budget; no row has been queried then.
        """
        inputs = batch["input"]
        logits = logits_from(self.query(inputs), self.answers, self.classes, floor=self.floor)
        if self.order is not None:
            logits = logits.index_select(1, self.order.to(logits.device))
        return DenseSignal(logits.to(inputs.device), kind=self.answers)

    @abstractmethod
    def query(self, inputs: Tensor) -> Tensor:
        """Return the unconverted answers, ``(N, ...)``; see `answer`."""

    @abstractmethod
    def account(self, name: str) -> BlackBox:
        """The same teacher with a query count of its own."""

    @abstractmethod
    def price(self, batches: Iterable[Batch]) -> int:
        """Count the rows that querying these batches would cost, without querying any."""

    @property
    def kind(self) -> Kind:
        return self.answers

    @property
    def description(self) -> str:
        return (
            f"a black box that answers with {self.answers} only; leave out `teacher.answers` or `teacher.url`"
        )

    @property
    def cost(self) -> dict[str, Any]:
        return {"answers": self.answers, "top_k": self.top_k, "queries": self.queries, "budget": self.budget}

    def check_budget(self, rows: int) -> None:
        """Refuse to query this number of further rows.

        Raises:
            BudgetError: If the budget does not allow it.
        """
        if self.budget is not None and self.queries + rows > self.budget:
            raise BudgetError(
                f"expected at most {self.budget} rows to query the teacher for, its `budget`, got {rows} "
                f"more after {self.queries}; raise `teacher.budget`, or query fewer rows"
            )


def check_limits(budget: int | None, floor: float | None) -> None:
    if budget is not None and budget < 0:
        raise UserError(f"expected a `budget` of at least 0 rows, or none, got {budget}")
    if floor is not None and not 0 < floor < 1:
        raise UserError(f"expected a `floor` in (0, 1), got {floor}")


class LocalBlackBox(BlackBox):
    """A network in this process that answers like a black box, for studies and tests.

    Args:
        model: From inputs to logits ``(N, C)``. Set to evaluation mode for good.
        answers: Form of the answers; see `AnswerKind`.
        classes: C.
        top_k: Number of classes in an answer of kind ``"topk"``.
        budget: Rows that it answers in total; None for no limit. A repeated row counts again.
        floor: See `logits_from`.
    Raises:
        UserError: On an option out of range.
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

    def state_dict(self) -> dict[str, Any]:
        return {"queries": self.queries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.queries = int(state["queries"])

    def account(self, name: str) -> LocalBlackBox:
        other = copy.copy(self)
        other.queries = 0
        return other

    def price(self, batches: Iterable[Batch]) -> int:
        return sum(len(batch["input"]) for batch in batches)

    @torch.no_grad()
    def query(self, inputs: Tensor) -> Tensor:
        self.check_budget(len(inputs))
        logits: Tensor = self.model(inputs)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # 16-bit probabilities of many classes would not sum to 1
        self.queries += len(inputs)
        return answer(logits, self.answers, self.top_k)
