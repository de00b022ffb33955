"""Test a loss against the laws."""

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
    """The result for one law.

    Attributes:
        law: The name of the law.
        state: ``"held"``, ``"broken"`` or ``"not applicable"``.
        evidence: Actual and expected value, or why the law does not apply; empty if it held.
        example: The smallest counter-example, by name of its parts.
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
    """Test a loss against the laws of `luce.conformance.LAWS`.

    Needs hypothesis: ``pip install 'luce[check]'``.

    Args:
        loss: A callable that returns a scalar tensor, or a mapping of terms with their sum under ``"loss"``.
            A class is built first. A `Loss` has its own adapter, options and claims.
        adapter: How to call the loss: a name from `luce.conformance.ADAPTERS`, ``"auto"``, or an `Adapter`.
        options: Keyword arguments of the function, or of the class.
        claims: Laws that the loss claims beyond those that bind every loss, or groups of them.
        laws: Run only these laws; None runs all.
        without: Skip these laws.
        against: Another implementation of the same loss. It is called as its own signature suggests, with
            those of the options that it accepts.
        examples: Number of examples that hypothesis tries for each law.
        seed: Equal seeds draw equal examples.
        dtype: Dtype of the drawn logits; float32 for a loss that does not accept float64.
    Returns:
        A verdict for each law, in the order of `luce.conformance.LAWS`.
    Raises:
        UserError: If the loss cannot be called at all, or a name is unknown.
    Example:
        >>> import torch.nn.functional as F
        >>> def kd(student_logits, teacher_logits):
        ...     return F.kl_div(student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="mean")
        >>> [verdict] = check(kd, claims=["vanishing_classes"], laws=["vanishing_classes"])
        >>> verdict.state, verdict.example["extra_classes"]
        ('broken', 1)
        >>> verdict.evidence
        'value with a class at -10000 appended: ... instead of ...'
    """
    hypothesis = import_optional("hypothesis", "check")
    loss = Loss.of(loss, adapter, options=options, claims=claims)
    loss = replace(loss, claims=claimed_laws(loss.claims))
    chosen = (law_names(LAWS) if laws is None else law_names(laws)) - law_names(without)
    if not chosen:
        raise UserError("expected at least one law in `laws` that `without` does not skip, got none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = None if against is None else _subject(_other(against, loss.options), dtype)
        subject = replace(_subject(loss, dtype), against=other)
        runner = _Runner(hypothesis, examples, seed, dtype)
        return [runner.verdict(law, subject) for name, law in LAWS.items() if name in chosen]


def _other(against: Callable[..., Any] | Loss, options: Mapping[str, Any]) -> Loss:
    """Wrap the other implementation, with those of the options that it accepts."""
    if isinstance(against, Loss):
        return against
    accepted = parameters_of(against)
    return Loss.of(against, options={k: v for k, v in options.items() if accepted is None or k in accepted})


def _subject(loss: Loss, dtype: torch.dtype) -> Subject:
    """Call the loss once and find the dtype that it computes in.

    Raises:
        UserError: If it raises: then the call is wrong, and the laws would all blame the loss.
    """
    student = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.3, 0.2]], dtype=dtype)
    teacher = torch.tensor([[2.0, 1.0, 0.1], [0.0, 1.0, 0.5]], dtype=dtype)
    try:
        returned = loss(student, teacher, torch.tensor([2, 0]))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"`{loss}` called as {loss.adapter.text} raised {type(error).__name__}: {text}; "
            "name another adapter, pass options, or wrap the loss in a function"
        ) from error
    value = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(value, torch.Tensor) or value.ndim:
        what = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(
            f'expected `{loss}` to return a scalar tensor, or a mapping with one under "loss", got {what}'
        )
    # A loss that casts its inputs to float32 returns float32: judge it by what float32 can hold.
    exact = value.dtype == dtype == torch.float64
    return Subject(loss, dtype, 1e-9 if exact else 1e-4)


@dataclass(frozen=True)
class _Runner:
    """Runs one law at a time under hypothesis."""

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
                record.update(draw.record)  # hypothesis ends with the smallest failing example
                raise

        hypothesis = self.hypothesis
        settings = hypothesis.settings(
            max_examples=self.examples,
            database=None,  # stored examples would make two runs of one seed differ
            deadline=None,  # the first call of a loss may compile
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        given = hypothesis.given(hypothesis.strategies.data())
        try:
            settings(hypothesis.seed(self.seed)(given(trial)))()
        except NotApplicable as inapplicable:
            return Verdict(law.name, "not applicable", str(inapplicable))
        except Broken as broken:
            return Verdict(law.name, "broken", str(broken), record)
        except hypothesis.errors.Flaky:
            return Verdict(law.name, "broken", "equal inputs gave different values", record)
        return Verdict(law.name, "held")
