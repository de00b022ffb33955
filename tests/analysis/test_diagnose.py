"""The split of a teacher's knowledge: golden values, what must add up, and second ways to the figures."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import luce
from luce.analysis import diagnose as module_or_function
from luce.analysis.diagnose import diagnose
from luce.analysis.findings import EVEN_CONFIDENCE, FLAT_RELATIONS, findings
from luce.analysis.knowledge import Diagnosis

RHO = torch.tensor(
    [
        *[[0.7, 0.2, 0.1], [0.9, 0.06, 0.04]],
        *[[0.3, 0.6, 0.1], [0.1, 0.8, 0.1]],
        *[[0.05, 0.15, 0.8], [0.02, 0.18, 0.8]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
SAMPLE = {  # C = 4, y = 0
    "student": torch.tensor([[1.0, 0.5, -0.5, 0.0]], dtype=torch.float64),
    "teacher": torch.tensor([[4.0, 2.0, -1.0, 0.0]], dtype=torch.float64),
    "target": torch.tensor([0]),
}


def example(
    rows: int = 60, classes: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (rows,), generator=random)
    teacher, student = torch.randn(2, rows, classes, dtype=torch.float64, generator=random)
    return 2 * teacher + 3 * torch.nn.functional.one_hot(target, classes), target, student


def terms(found: Diagnosis) -> list[float]:
    return list(found.teacher.terms.as_dict().values())


def test_the_package_offers_the_function() -> None:
    assert module_or_function is diagnose


# Golden values ----------------------------------------------------------------------------------------------


def test_five_terms_by_hand() -> None:
    # M per row: .3 .1 | .4 .2 | .2 .2; class means .2, .3, .2; grand mean .7/3. K = 3/2.
    k, mean = 3 / 2, 0.7 / 3
    # rel, on the two wrong classes, is +-half their difference: .05 .01 | .1 0 | -.05 -.08.
    mean_halves = [(0.05 + 0.01) / 2, (0.1 + 0.0) / 2, (-0.05 - 0.08) / 2]
    away = [0.02, 0.05, 0.015]  # of both rows of a class from that mean
    expected = [
        k * mean**2,
        k * ((0.2 - mean) ** 2 * 2 + (0.3 - mean) ** 2) / 3,
        sum(2 * half**2 for half in mean_halves) / 3,
        k * (0.1**2 + 0.1**2 + 0) / 3,
        sum(2 * distance**2 for distance in away) / 3,
    ]
    found = diagnose(RHO.log(), LABELS)
    assert terms(found) == pytest.approx(expected, rel=1e-12)
    assert [round(value, 6) for value in expected] == [0.081667, 0.003333, 0.005083, 0.01, 0.002083]
    assert found.teacher.departure == pytest.approx(sum(expected), rel=1e-12)
    assert found.teacher.departure == pytest.approx(0.102167, abs=5e-7)
    assert sum(found.teacher.terms.shares.values()) == pytest.approx(1)


def test_relations_are_ratios_of_sums_by_hand() -> None:
    found = diagnose(RHO.log(), LABELS).teacher
    expected = torch.tensor(
        [[0, 0.26 / 0.4, 0.14 / 0.4], [0.4 / 0.6, 0, 0.2 / 0.6], [0.07 / 0.4, 0.33 / 0.4, 0]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found.relations, expected)
    first = 0.65 * math.log(0.65 * 2) + 0.35 * math.log(0.35 * 2)
    assert found.relation_divergence[0].item() == pytest.approx(first)
    assert found.smoothing == pytest.approx(0.7 / 3 * 3 / 2)
    assert found.missing == pytest.approx(0.7 / 3)
    assert found.accuracy == 1
    assert found.top_probability == pytest.approx((0.7 + 0.9 + 0.6 + 0.8 + 0.8 + 0.8) / 6)
    entropy = -sum(p * math.log(p) for p in RHO.flatten().tolist()) / 6 / math.log(3)
    assert found.entropy == pytest.approx(entropy)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.771724), (2.0, 1.027715)])
def test_the_weight_of_a_row_is_that_of_the_golden_example(temperature: float, weight: float) -> None:
    found = diagnose(
        SAMPLE["teacher"],
        SAMPLE["target"],
        temperature=temperature,
        student_logits=SAMPLE["student"],
        weight=0.9,
    )
    assert found.teacher.pull.weights.item() == pytest.approx(weight, abs=5e-7)
    smoothing = {1.0: 0.184293, 2.0: 0.492273}[temperature]
    assert found.teacher.smoothing == pytest.approx(smoothing, abs=5e-7)
    # Only rho_y matters for it, and true_prob keeps that.
    assert found.references["true_prob"].pull.weights.item() == pytest.approx(weight, abs=5e-7)


# What must add up -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 30),
    classes=st.integers(2, 7),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([0.5, 1.0, 8.0]),
)
def test_the_terms_add_up(seed: int, rows: int, classes: int, scale: float, temperature: float) -> None:
    teacher, target, _ = example(rows, classes, seed)
    found = diagnose(scale * teacher, target, temperature=temperature)
    for knowledge in (found.teacher, *found.references.values()):
        assert min(knowledge.terms.as_dict().values()) >= 0
        assert knowledge.terms.total == pytest.approx(knowledge.departure, rel=1e-9, abs=1e-300)
        assert 0 <= knowledge.relation_share <= 1 + 1e-9
        assert 0 <= knowledge.entropy <= 1 + 1e-12


def test_each_reference_teacher_knows_only_its_level() -> None:
    teacher, target, _ = example()
    found = diagnose(teacher, target, temperature=2)
    whole, of = found.teacher.terms, {name: k.terms.as_dict() for name, k in found.references.items()}
    zero, close = pytest.approx(0, abs=1e-15), {name: pytest.approx(v) for name, v in whole.as_dict().items()}
    nothing = dict.fromkeys(close, zero)
    assert of["label_smoothing"] == nothing | {"universe": close["universe"]}
    assert of["class_mean"] == close | {"instance_confidence": zero, "instance_relations": zero}
    assert of["true_prob"] == close | {"class_relations": zero, "instance_relations": zero}
    for knowledge in found.references.values():
        assert knowledge.smoothing == pytest.approx(found.teacher.smoothing)
    assert found.references["label_smoothing"].class_relation_nats == pytest.approx(0, abs=1e-14)


def test_a_teacher_that_repeats_the_labels_departs_from_nothing() -> None:
    target = torch.tensor([0, 1, 2, 1])
    found = diagnose(torch.where(torch.nn.functional.one_hot(target, 3) == 1, 0.0, -torch.inf), target)
    assert terms(found) == [0] * 5
    assert found.teacher.relations.abs().sum() == 0
    assert found.teacher.terms.shares == dict.fromkeys(found.teacher.terms.as_dict(), 0)
    assert found.teacher.smoothing == found.teacher.entropy == found.teacher.relation_share == 0


def test_label_smoothing_at_temperature_1_has_only_the_universe() -> None:
    epsilon, target = 0.3, torch.tensor([0, 1, 2, 3, 3])
    rho = torch.nn.functional.one_hot(target, 4) * (1 - epsilon) + epsilon / 4
    found = diagnose(rho.log().double(), target).teacher
    assert found.smoothing == pytest.approx(epsilon)
    assert found.terms.shares["universe"] == pytest.approx(1)


def test_relations_in_nats_add_up() -> None:
    """Class and instance relations together are the mean KL to an even spread, each row by what it leaves."""
    teacher, target, _ = example()
    found = diagnose(teacher, target).teacher
    rho = teacher.softmax(-1)
    wrong = torch.nn.functional.one_hot(target, 5) == 0
    total = missing = 0.0
    for row, mask in zip(rho, wrong, strict=True):
        left = row[mask].sum()
        spread = row[mask] / left
        total += (left * (spread * (spread * 4).log()).sum()).item()
        missing += left.item()
    assert found.class_relation_nats + found.instance_relation_nats == pytest.approx(total / missing)
    assert found.class_relation_nats > 0 < found.instance_relation_nats


# A second way -----------------------------------------------------------------------------------------------


def gradient(loss: torch.nn.Module, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor):
    student = student.clone().requires_grad_()
    value = loss(student, teacher, target)
    return torch.autograd.grad((value if isinstance(value, torch.Tensor) else value["loss"]), student)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_weights_are_ratios_of_the_losses_own_gradients(temperature: float, scaled: bool) -> None:
    teacher, target, student = example()
    plain = luce.CrossEntropyLoss(reduction="sum")
    kd = luce.KDLoss(temperature=temperature, scale_by_temperature=scaled, reduction="sum")
    mixed = luce.WeightedSum({"ce": (0.3, plain), "kd": (0.7, kd)})
    found = diagnose(
        teacher,
        target,
        temperature=temperature,
        student_logits=student,
        weight=0.7,
        scale_by_temperature=scaled,
    ).teacher.pull
    of_mixed, of_plain = (gradient(loss, student, teacher, target) for loss in (mixed, plain))
    at = target[:, None]
    torch.testing.assert_close(found.weights, (of_mixed.gather(1, at) / of_plain.gather(1, at)).squeeze(1))
    wrong = [part.scatter(1, at, 0.0).sum(-1) for part in (of_mixed, of_plain)]
    torch.testing.assert_close(found.weights, wrong[0] / wrong[1])
    assert found.negative == (found.weights < 0).double().mean().item()
    losses = luce.cross_entropy_loss(student, target, reduction="none")
    rho_y = (teacher / temperature).softmax(-1).gather(1, at).squeeze(1)
    assert found.correlation == pytest.approx(torch.corrcoef(torch.stack([rho_y, losses]))[0, 1].item())


def test_parts_of_the_gradient_are_differences_between_teachers() -> None:
    teacher, target, student = example()
    temperature, weight = 3.0, 0.6
    found = diagnose(teacher, target, temperature=temperature, student_logits=student, weight=weight).teacher
    kd = luce.KDLoss(temperature=temperature, reduction="sum")
    one_hot = torch.nn.functional.one_hot(target, 5).double()
    even = one_hot * (1 - found.missing) + (1 - one_hot) * found.missing / 4

    def of(rho: torch.Tensor) -> torch.Tensor:
        return weight * gradient(kd, student, temperature * rho.log(), target)

    by_teacher = [of(even), of(found.class_means[target]), weight * gradient(kd, student, teacher, target)]
    parts = {
        "universe": by_teacher[0],
        "domain": by_teacher[1] - by_teacher[0],
        "instance": by_teacher[2] - by_teacher[1],
    }
    plain = gradient(luce.CrossEntropyLoss(reduction="sum"), student, teacher, target)
    assert found.pull.norms["cross_entropy"] == pytest.approx(plain.norm(dim=-1).mean().item())
    for name, part in parts.items():
        assert found.pull.norms[name] == pytest.approx(part.norm(dim=-1).mean().item())
        cosine = (part * plain).sum() / part.norm() / plain.norm()
        assert found.pull.cosines[name] == pytest.approx(cosine.item())


def test_a_fresh_students_weights_have_the_named_deviation() -> None:
    teacher, target, _ = example(rows=80)
    found = diagnose(teacher, target, student_logits=torch.zeros_like(teacher), weight=1.0).teacher
    within = torch.stack([found.pull.weights[target == c].var(correction=0) for c in range(5)])
    expected = (within * found.class_rows / found.rows).sum().sqrt().item()
    assert found.fresh_weight_spread == pytest.approx(expected)
    assert found.pull.correlation is None  # every row is as hard as every other


# Rows, chunks, dtypes ---------------------------------------------------------------------------------------


def same(one: Diagnosis, other: Diagnosis) -> None:
    for field in fields(one.teacher):
        mine, others = getattr(one.teacher, field.name), getattr(other.teacher, field.name)
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, others)
        elif isinstance(mine, (int, float)):
            assert mine == pytest.approx(others)
    assert terms(one) == pytest.approx(terms(other))


def test_chunks_and_references_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, target, student = example()
    whole = diagnose(teacher, target, student_logits=student)
    monkeypatch.setattr(sys.modules["luce.analysis.diagnose"], "CHUNK", 17)
    in_parts = diagnose(teacher, target, student_logits=student, references=False)
    same(whole, in_parts)
    torch.testing.assert_close(whole.teacher.pull.weights, in_parts.teacher.pull.weights)
    assert whole.teacher.pull.norms == pytest.approx(in_parts.teacher.pull.norms)
    assert in_parts.references == {}


def test_rows_come_in_any_order() -> None:
    teacher, target, _ = example()
    order = torch.randperm(len(target))
    one, other = diagnose(teacher, target), diagnose(teacher[order], target[order])
    torch.testing.assert_close(one.teacher.relations, other.teacher.relations)
    assert terms(one) == pytest.approx(terms(other), rel=1e-12)


@pytest.mark.parametrize("unlabelled", [-1, -100, 7])
def test_rows_without_a_label_are_left_out_whatever_stands_in_them(unlabelled: int) -> None:
    teacher, target, student = example()
    more = torch.cat([teacher, torch.full_like(teacher[:3], torch.nan)])
    found = diagnose(
        more,
        torch.cat([target, torch.full((3,), unlabelled)]),
        student_logits=torch.cat([student, student[:3]]),
        ignore_index=7 if unlabelled == 7 else -100,
    )
    same(found, diagnose(teacher, target, student_logits=student))
    assert found.unlabelled == 3
    assert found.teacher.rows == len(target)


def test_a_class_without_rows_has_rows_of_zeros() -> None:
    teacher, target, _ = example(classes=5)
    found = diagnose(teacher[target != 2], target[target != 2]).teacher
    assert found.class_rows[2] == 0
    assert found.relations[2].abs().sum() == found.relation_divergence[2] == found.class_means[2].sum() == 0
    torch.testing.assert_close(found.relations.sum(-1), torch.tensor([1.0, 1, 0, 1, 1]).double())
    assert found.terms.total == pytest.approx(found.departure)


def test_two_classes_have_no_relations() -> None:
    teacher, target, student = example(classes=2)
    found = diagnose(teacher, target, student_logits=student)
    assert found.teacher.relation_share == 0
    assert found.teacher.terms.class_relations == pytest.approx(0, abs=1e-15)
    assert [f.title for f in findings(found)] == []


def test_sure_teachers_keep_their_digits() -> None:
    gap, target = 60.0, torch.tensor([0, 1, 0])
    teacher = gap * torch.nn.functional.one_hot(target, 3).double()
    found = diagnose(teacher, target, student_logits=teacher.clone()).teacher
    assert found.missing == pytest.approx(2 * math.exp(-gap))
    assert found.relation_share == pytest.approx(0, abs=1e-9)
    assert found.pull.floored == 3
    assert found.pull.weights.tolist() == pytest.approx([0.1] * 3)  # 0.1 + 0.9 * 0, and not 0 / 0
    assert diagnose(1e4 * teacher.float(), target).teacher.terms.total == 0


def test_the_floor_bounds_a_weight_and_is_counted() -> None:
    student = torch.tensor([[0.0, -20.0], [0.0, -1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -1.0], [0.0, -1.0]], dtype=torch.float64)
    found = diagnose(
        teacher, torch.zeros(2).long(), student_logits=student, weight=1.0, floor=1e-3
    ).teacher.pull
    unsure, sure = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(20))
    assert found.floored == 1
    assert found.weights.tolist() == pytest.approx([(sure - unsure) / 1e-3, 0], abs=1e-12)
    assert found.negative == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_only_data(dtype: torch.dtype) -> None:
    teacher, target, student = example()
    teacher, student = teacher.to(dtype), student.to(dtype)
    same(
        diagnose(teacher, target.int(), student_logits=student),
        diagnose(teacher.double(), target, student_logits=student.double()),
    )


def test_nothing_asks_for_a_gradient() -> None:
    teacher, target, student = example()
    found = diagnose(teacher.requires_grad_(), target, student_logits=student.requires_grad_()).teacher
    assert not found.relations.requires_grad
    assert not found.pull.weights.requires_grad


# Findings ---------------------------------------------------------------------------------------------------


def titles(teacher: torch.Tensor, target: torch.Tensor) -> list[str]:
    return [finding.title for finding in findings(diagnose(teacher, target))]


def test_findings_point_at_the_papers_two_failures_and_name_their_heuristics() -> None:
    teacher, target, _ = example()
    assert titles(teacher, target) == []
    smoothed = (torch.nn.functional.one_hot(target, 5) * 0.8 + 0.04).log().double()
    noisy = smoothed + 0.2 * torch.randn(smoothed.shape, dtype=torch.float64)
    disguise, even = findings(diagnose(noisy, target), diagnose(teacher, target))
    assert disguise.title == "The teacher resembles label smoothing."
    assert even.title == "The teacher hardly separates hard rows from easy ones."
    assert f"{FLAT_RELATIONS:.1%}, a heuristic, not a known bound" in disguise.text
    assert f"{EVEN_CONFIDENCE:g}, a heuristic, not a known bound" in even.text
    found = diagnose(noisy, target).teacher
    assert f"{found.relation_share:.1%}" in disguise.text
    assert f"{found.fresh_weight_spread:.4f}" in even.text
    assert f"{diagnose(teacher, target).teacher.fresh_weight_spread:.4f}" in even.text
    assert "held-out" not in findings(diagnose(noisy, target))[1].text


def test_findings_look_at_one_failure_at_a_time() -> None:
    target = torch.arange(4).repeat(20)
    missing = torch.linspace(0.05, 0.6, 80).double()[:, None]
    one_hot = torch.nn.functional.one_hot(target, 4)
    rival = torch.nn.functional.one_hot((target + 1) % 4, 4)
    even_rest = one_hot * (1 - missing) + (1 - one_hot) * missing / 3
    assert titles(even_rest.log(), target) == ["The teacher resembles label smoothing."]
    one_rival = one_hot * 0.8 + rival * 0.2
    assert titles(one_rival.log().double(), target) == [
        "The teacher hardly separates hard rows from easy ones."
    ]


# What cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": 0.0}, "`temperature`"),
        ({"temperature": math.inf}, "`temperature`"),
        ({"weight": 1.5}, "`weight` in"),
        ({"floor": 0.0}, "`floor`"),
        ({"teacher_logits": torch.zeros(3)}, "shape (N, C)"),
        ({"teacher_logits": torch.zeros(3, 1)}, "at least 1 row and 2 classes, got (3, 1)"),
        ({"teacher_logits": torch.zeros(0, 3), "target": torch.zeros(0).long()}, "at least 1 row"),
        ({"teacher_logits": torch.full((3, 2), torch.nan)}, "got NaN or +inf"),
        ({"teacher_logits": torch.full((3, 2), -torch.inf)}, "got NaN or +inf"),
        ({"target": None}, "a label for each of 3 rows, got NoneType"),
        ({"target": torch.zeros(2).long()}, "a label for each of 3 rows, got (2,)"),
        ({"target": torch.tensor([-1, -100, -1])}, "rows with a label in `target`, got none in 3 rows"),
        ({"target": torch.tensor([0, 2, 1])}, "[0, 2)"),
        ({"target": torch.tensor([0, -3, 1])}, "got -3"),
        ({"student_logits": torch.zeros(3, 3)}, "(3, 2) like `teacher_logits`, got (3, 3)"),
        ({"student_logits": torch.full((3, 2), torch.inf)}, "finite `student_logits`"),
    ],
)
def test_errors(changes: dict[str, object], reason: str) -> None:
    arguments = {"teacher_logits": torch.zeros(3, 2), "target": torch.tensor([0, 1, 0]), **changes}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        diagnose(arguments.pop("teacher_logits"), arguments.pop("target"), **arguments)
    assert reason in str(caught.value)


def test_dtypes_that_are_wrong() -> None:
    with pytest.raises(TypeError, match="floating dtype"):
        diagnose(torch.zeros(3, 2).long(), torch.zeros(3).long())
    with pytest.raises(TypeError, match="integer dtype"):
        diagnose(torch.zeros(3, 2), torch.zeros(3))


def test_results_cannot_be_changed() -> None:
    found = diagnose(RHO.log(), LABELS)
    with pytest.raises(AttributeError):
        found.temperature = 2.0  # type: ignore[misc]
    assert replace(found, temperature=2.0).temperature == 2.0
