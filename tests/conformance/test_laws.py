"""Each law catches the loss broken against it, shows a small counter-example, and lets a sound one pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from luce.conformance import ADAPTERS, GROUPS, LAWS, check
from luce.errors import UserError

from . import broken
from .broken import MUTANTS, Mutant


def verdict(mutant: Mutant, function, **settings):
    claims = [mutant.law] if LAWS[mutant.law].claimed else []
    [found] = check(function, laws=[mutant.law], claims=claims, against=mutant.against, **settings)
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_broken_loss_is_caught_by_its_law(mutant: Mutant) -> None:
    found = verdict(mutant, mutant.broken)
    assert found.state == "broken"
    assert found.evidence
    assert found.example


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_broken_loss_is_caught_with_other_seeds(mutant: Mutant, seed: int) -> None:
    assert verdict(mutant, mutant.broken, seed=seed).state == "broken"


@pytest.mark.parametrize("law", ["ignored_nan", "low_precision"])
def test_equal_seeds_give_equal_verdicts(law: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.law == law)
    assert repr(verdict(mutant, mutant.broken)) == repr(verdict(mutant, mutant.broken))


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_sound_loss_passes(mutant: Mutant) -> None:
    assert verdict(mutant, mutant.sound).state == "held"


def test_every_law_has_its_mutant_and_its_statement() -> None:
    assert {mutant.law for mutant in MUTANTS} == set(LAWS)
    for law in LAWS.values():
        assert law.statement.endswith(".")
        assert law.reports


def test_the_page_tells_of_every_law_adapter_and_group() -> None:
    page = (Path(__file__).parents[2] / "docs/conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rows == [*ADAPTERS, *LAWS]
    for group in GROUPS:
        assert f"`{group}`" in page


def test_counter_examples_are_small_and_can_be_worked_out_by_hand() -> None:
    [found] = check(broken.mean_over_elements, laws=["vanishing_classes"], claims=["vanishing_classes"])
    example = found.example
    assert example["extra_classes"] == 1
    student, teacher = (
        torch.tensor(example[n], dtype=torch.float64) for n in ("student_logits", "teacher_logits")
    )
    assert student.shape == (1, 2)
    value = broken.kd(student, teacher).item() / 2
    # Two classes become three: the mean is two thirds.
    assert found.evidence == (
        f"value with a class at -10000 appended: {2 / 3 * value:.6g} instead of {value:.6g}"
    )


def test_a_loss_that_claims_nothing_is_held_to_the_laws_for_every_loss() -> None:
    verdicts = check(broken.kd, examples=3)
    assert [found.law for found in verdicts] == list(LAWS)
    for found in verdicts:
        if LAWS[found.law].claimed:
            assert found.state == "not applicable"
    assert {found.state for found in verdicts if found.law in ("gradient", "layout", "row_order")} == {"held"}


def test_why_a_law_does_not_apply() -> None:
    reasons = {found.law: found.evidence for found in check(broken.kd, claims=["all"], examples=3)}
    assert reasons["ignored_rows"] == "the loss receives no labels"
    assert reasons["implementations"] == "no other implementation to compare with; name one with --against"
    assert reasons["terms"] == "the loss returns a tensor, no named terms"
    assert reasons["top_k_limit"] == "the loss has no option `top_k` that is off by default"
    [found] = check(broken.listmle, laws=["temperature_scaled"], claims=["temperature_scaled"])
    assert found.evidence == "the loss has no option called temperature, T, tau, temp, kd_temperature"
    [found] = check(broken.kd, laws=["shift_invariant"])
    assert found.evidence == "not claimed"


def test_groups_are_made_of_laws_to_claim() -> None:
    assert set(GROUPS["all"]) == {name for name, law in LAWS.items() if law.claimed}
    for members in GROUPS.values():
        assert set(members) <= set(GROUPS["all"])


def test_a_loss_that_raises_breaks_the_law_with_what_it_raised() -> None:
    def picky(student_logits, teacher_logits):
        if not student_logits.is_contiguous():
            raise RuntimeError("expected contiguous logits")
        return broken.kd(student_logits, teacher_logits)

    [found] = check(picky, laws=["layout"])
    assert found.evidence == "the loss raised RuntimeError: expected contiguous logits"


def test_a_loss_that_is_not_repeatable_is_told() -> None:
    calls = iter(range(10**6))

    def moody(student_logits, teacher_logits):
        return broken.kd(student_logits, teacher_logits) * (1 + next(calls) // 3)

    [found] = check(moody, laws=["row_order"])
    assert found.state == "broken"


def test_what_is_drawn_inside_the_loss_is_drawn_alike() -> None:
    def dropping(student_logits, teacher_logits):
        return broken.kd(student_logits, teacher_logits) * torch.rand(())

    before = torch.random.get_rng_state()
    assert check(dropping, laws=["row_order"])[0].state == "held"
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"laws": ["gradients"]}, "unknown law `gradients`; did you mean `gradient`?"),
        ({"without": ["x"]}, "unknown law `x`; known: "),
        ({"claims": ["gradient"]}, "unknown claim `gradient`; known: all,"),
        ({"adapter": "plane"}, "unknown adapter `plane`; did you mean `plain`?"),
        ({"options": {"temprature": 2}}, "unknown option of `kd` `temprature`; did you mean `temperature`?"),
        ({"adapter": "student"}, "`kd` called as loss\\(student_logits, target\\) raised"),
    ],
)
def test_what_check_refuses(settings, reason) -> None:
    with pytest.raises(UserError, match=reason):
        check(broken.kd, **settings)


@pytest.mark.parametrize("returned", [torch.zeros(2), 1.0, {"kd": torch.zeros(())}, None])
def test_a_loss_must_return_a_scalar(returned) -> None:
    with pytest.raises(UserError, match="to return a scalar tensor, or a mapping with one"):
        check(lambda student_logits, teacher_logits: returned)
