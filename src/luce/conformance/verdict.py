"""Putting a loss to the laws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..errors import UserError, import_optional
from .adapters import Adapter, Loss, parameters_of
from .draw import Draw
from .law import LAWS, Broken, Law, NotApplicable, Subject
from .laws import claimed_laws, law_names

State = Literal["held", "broken", "not applicable"]


@dataclass(frozen=True)
class Verdict:
    """What became of one law.

    Attributes:
        law: Its name.
        state: ``"held"``, ``"broken"`` or ``"not applicable"``.
        evidence: What came out and what should have, or why the law says nothing; empty where it held.
        example: The smallest counter-example that was found.
    """

    law: str
    state: State
    evidence: str = ""
    example: dict[str, Any] = field(default_factory=dict)


def check(
    loss: Callable[..., Any] | Loss,
    *,
    adapter: str | Adapter = "auto",
    options: Mapping[str, Any] | None = None,
    claims: Collection[str] = (),
    laws: Collection[str] | None = None,
    without: Collection[str] = (),
    against: Callable[..., Any] | Loss | None = None,
    examples: int = 25,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Verdict]:
    """Put a loss to the laws of `luce.conformance.LAWS`; needs hypothesis, the extra ``luce[check]``.

    Args:
        loss: Any callable that gives a scalar tensor, or a mapping of terms with their sum under ``"loss"``;
            a class is built first. A `Loss` brings adapter, options and claims with it.
        adapter: How the loss is called, a name from `luce.conformance.ADAPTERS`.
        options: Keyword arguments of the function, or of the class.
        claims: Laws that it claims beyond those that bind every loss, or groups of them.
        laws: Only these; all unless given.
        without: Not these.
        against: Another implementation of the same loss, called as its own signature suggests, with those of
            the options that it has.
        examples: How many hypothesis tries for each law.
        seed: The same seed draws the same examples.
        dtype: Of the logits that are drawn; float32 for a loss that takes no float64.
    Returns:
        A verdict for each law, in their order.
    Raises:
        UserError: If the loss cannot be called at all, or a name is unknown.
    Example:
        >>> import torch.nn.functional as F
        >>> def kd(student_logits, teacher_logits):
        ...     return F.kl_div(student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="mean")
        >>> [found] = check(kd, claims=["vanishing_classes"], laws=["vanishing_classes"])
        >>> found.state, found.example["extra_classes"]
        ('broken', 1)
        >>> found.evidence
        'value with a class at -10000 appended: ... instead of ...'
    """
    hypothesis = import_optional("hypothesis", "check")
    loss = Loss.of(loss, adapter, options=options, claims=claims)
    loss = replace(loss, claims=claimed_laws(loss.claims))
    chosen = (law_names(LAWS) if laws is None else law_names(laws)) - law_names(without)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = None if against is None else _subject(_other(against, loss.options), dtype)
        subject = replace(_subject(loss, dtype), against=other)
        run = _Run(hypothesis, examples, seed, dtype)
        return [run.verdict(law, subject) for name, law in LAWS.items() if name in chosen]


def _other(against: Callable[..., Any] | Loss, options: Mapping[str, Any]) -> Loss:
    """The other implementation, with those of the options that it has."""
    if isinstance(against, Loss):
        return against
    known = parameters_of(against)
    return Loss.of(against, options={k: v for k, v in options.items() if known is None or k in known})


def _subject(loss: Loss, dtype: torch.dtype) -> Subject:
    """Call the loss once: if it cannot be called at all the request is wrong, not the loss."""
    student = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.3, 0.2]], dtype=dtype)
    teacher = torch.tensor([[2.0, 1.0, 0.1], [0.0, 1.0, 0.5]], dtype=dtype)
    try:
        found = loss(student, teacher, torch.tensor([2, 0]))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"`{loss}` called as {loss.adapter.text} raised {type(error).__name__}: {text}; "
            "name another adapter, give options, or wrap it in a function of your own"
        ) from error
    value = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(value, torch.Tensor) or value.ndim:
        what = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(
            f'expected `{loss}` to return a scalar tensor, or a mapping with one under "loss", got {what}'
        )
    # A loss that computes in float32 whatever it is given shows that by what it returns.
    exact = value.dtype == dtype == torch.float64
    return Subject(loss, dtype, 1e-9 if exact else 1e-4)


@dataclass(frozen=True)
class _Run:
    hypothesis: Any
    examples: int
    seed: int
    dtype: torch.dtype

    def verdict(self, law: Law, subject: Subject) -> Verdict:
        reason = law.reason_against(subject.loss)
        if reason is not None:
            return Verdict(law.name, "not applicable", reason)
        record: dict[str, Any] = {}

        def trial(data: Any) -> None:
            draw = Draw(data, self.dtype)
            try:
                law.check(subject, draw)
            except (Broken, NotApplicable):
                record.clear()
                record.update(draw.record)  # the last one to fail is the smallest
                raise

        hypothesis = self.hypothesis
        settings = hypothesis.settings(
            max_examples=self.examples,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        given = hypothesis.given(hypothesis.strategies.data())
        try:
            settings(hypothesis.seed(self.seed)(given(trial)))()
        except NotApplicable as reason_found:
            return Verdict(law.name, "not applicable", str(reason_found))
        except Broken as broken:
            return Verdict(law.name, "broken", str(broken), record)
        except hypothesis.errors.Flaky:
            return Verdict(law.name, "broken", "the same inputs do not always give the same value", record)
        return Verdict(law.name, "held")
