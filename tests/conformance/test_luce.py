"""Every loss of the catalogue, with every backend, obeys the laws it should."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest

import luce
from luce.conformance import ADAPTERS, GROUPS, LAWS, Loss, check

from ..losses.catalogue import CASES, Case

# With these a little probability goes to every class.
SMOOTHED = ("label_smoothing", "epsilon")
SOME = ("vanishing_classes", "settled_choice", "log_tail", "temperature_scaled")
"""Laws that hold of some losses only: the catalogue names them in `Loss.laws`."""

# The weights of this one reach 2^39 at 40 classes, which is no number of float16.
UNSCALED_WEIGHTS = {"normalize": False}


def claims(case: Case) -> set[str]:
    """What is promised of this loss, as laws."""
    loss, options = case.loss, case.options
    smoothed = any(name in options for name in SMOOTHED)
    logarithmic = options.get("temperature") != math.inf  # in the limit a square, and a mean over classes
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_luce_obeys_the_laws(case: Case) -> None:
    without = ["low_precision"] if case.options == UNSCALED_WEIGHTS else []
    without += ["gradient"] if case.loss.detached else []  # by design not the slope of the value
    verdicts = check(subject(case), examples=6, without=without)
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
