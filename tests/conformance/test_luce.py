"""Every loss of the catalogue obeys the laws that it claims, and its backends agree."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest

import luce
from luce.conformance import ADAPTERS, GROUPS, LAWS, Loss, check

from ..losses.catalogue import CASES, Case

SMOOTHED = ("label_smoothing", "epsilon")
"""Options that give every class some probability."""
SOME = ("vanishing_classes", "settled_choice", "log_tail", "temperature_scaled")
"""Laws that hold for some losses only: the catalogue names them in `Loss.laws`."""
UNSCALED_WEIGHTS = {"normalize": False}
"""Options whose weights reach 2**39 at 40 classes, beyond the range of float16."""


def claims(case: Case) -> set[str]:
    """The laws that this loss must obey beyond those for every loss."""
    loss, options = case.loss, case.options
    smoothed = any(name in options for name in SMOOTHED)
    logarithmic = (
        options.get("temperature") != math.inf
    )  # the limit is a squared difference of logits, averaged over classes
    conditions = {
        "shift_invariant": loss.shift_invariant,
        "zero_at_equality": loss.zero_at_equality and not loss.couples_rows,
        "micro_batches": not loss.couples_rows,
        "temperature_scaled": options.get("scale_by_temperature", True),
        "vanishing_classes": not smoothed and logarithmic,
        "log_tail": logarithmic,
        "settled_choice": not smoothed,
    }
    return {
        name
        for name in GROUPS["all"]
        if conditions.get(name, True) and (name not in SOME or name in loss.laws)
    }


def subject(case: Case) -> Loss:
    adapter = ADAPTERS["plain" if case.loss.module.takes_teacher else "student"]
    return Loss(case.loss.function, adapter, case.options, claims(case), str(case))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.options.get("backend") != "reference"], ids=str
)
def test_luce_obeys_the_laws(case: Case) -> None:
    """The references are left to the slow test: `test_backends_agree` compares them with the kernels."""
    obeys_the_laws(case, examples=2 if case.options else 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_luce_obeys_the_laws_on_many_examples(case: Case) -> None:
    """TVD gets few: its gradient jumps where both networks agree, and many draws hit such a point."""
    obeys_the_laws(case, examples=6 if case.loss.function is luce.tvd_loss else 25)


def obeys_the_laws(case: Case, examples: int) -> None:
    without = ["low_precision"] if case.options == UNSCALED_WEIGHTS else []
    without += ["gradient"] if case.loss.detached else []  # its gradient is not that of its value, by design
    verdicts = check(subject(case), examples=examples, without=without)
    assert not [verdict for verdict in verdicts if verdict.state == "broken"]
    held = {verdict.law for verdict in verdicts if verdict.state == "held"}
    unneeded = {"terms", "top_k_limit", "implementations", "unequal_classes", *without}
    expected = {name for name, law in LAWS.items() if not law.claimed} - unneeded | claims(case)
    assert held >= expected - ({"detached_teacher"} if not case.loss.module.takes_teacher else set())


WITH_BACKENDS = [case for case in CASES if "backend" in inspect.signature(case.loss.function).parameters]


@pytest.mark.parametrize("case", WITH_BACKENDS, ids=str)
def test_backends_agree(case: Case) -> None:
    reference = partial(case.loss.function, **{**case.options, "backend": "reference"})
    adapter = subject(case).adapter
    [verdict] = check(subject(case), against=Loss(reference, adapter), laws=["implementations"], examples=10)
    assert verdict.state == "held", verdict


def test_terms_of_a_weighted_sum() -> None:
    loss = luce.WeightedSum(
        {"task": (0.1, luce.CrossEntropyLoss()), "kd": (0.9, luce.KDLoss(temperature=4.0))}
    )
    verdicts = {
        verdict.law: verdict for verdict in check(loss, adapter="plain", claims=["masking"], examples=8)
    }
    assert verdicts["terms"].state == "held"
    assert not [verdict for verdict in verdicts.values() if verdict.state == "broken"]
