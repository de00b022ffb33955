"""Every loss of the catalogue, with every backend, obeys the laws it should."""

from __future__ import annotations

import inspect
from functools import partial

import pytest

import luce
from luce.conformance import ADAPTERS, GROUPS, LAWS, Loss, check

from ..losses.catalogue import CASES, Case

# Whose value the classes without probability change: they count classes, or ask for an order among them.
COUNT_CLASSES = (luce.logit_matching_loss, luce.dist_loss, luce.listmle_loss, luce.p_listmle_loss)
# Bounded, or a square, where the student is sure that the label is wrong.
NO_LOG_TAIL = (luce.reverse_kl_loss, luce.jsd_loss, luce.logit_matching_loss, luce.dist_loss)
# The weights of this one reach 2^39 at 40 classes, which is no number of float16.
UNSCALED_WEIGHTS = {"normalize": False}


def claims(case: Case) -> set[str]:
    """What the catalogue promises of this loss, as laws."""
    loss, options = case.loss, case.options
    found = set(GROUPS["all"])
    smoothed = "label_smoothing" in options or "epsilon" in options
    tempered = "temperature" in inspect.signature(loss.function).parameters
    for name, promised in {
        "shift_invariant": loss.shift_invariant,
        "zero_at_equality": loss.zero_at_equality and not loss.couples_rows,
        "micro_batches": not loss.couples_rows,
        "vanishing_classes": loss.function not in COUNT_CLASSES and not smoothed,
        "settled_choice": (loss.ranks or not loss.module.takes_teacher) and not smoothed,
        "log_tail": loss.function not in NO_LOG_TAIL,
        # ListNet and DIST are no divergences, which fall as 1 / T² at small logits.
        "temperature_scaled": tempered
        and loss.zero_at_equality
        and options.get("scale_by_temperature", True),
    }.items():
        if not promised:
            found.discard(name)
    return found - ({"temperature_scaled"} if loss.couples_rows else set())


def subject(case: Case) -> Loss:
    adapter = ADAPTERS["plain" if case.loss.module.takes_teacher else "student"]
    return Loss(case.loss.function, adapter, case.options, claims(case), str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_luce_obeys_the_laws(case: Case) -> None:
    too_wide = ["low_precision"] if case.options == UNSCALED_WEIGHTS else []
    verdicts = check(subject(case), examples=6, without=too_wide)
    assert not [verdict for verdict in verdicts if verdict.state == "broken"]
    held = {verdict.law for verdict in verdicts if verdict.state == "held"}
    unneeded = {"terms", "top_k_limit", "implementations", "unequal_classes", *too_wide}
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
