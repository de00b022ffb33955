"""Figures against hand computations, SciPy and NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, kendalltau
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from luce import data
from luce.errors import UserError
from luce.signals import LiveTeacher
from luce.training import metrics


def logits_and_targets(
    rows: int = 300, classes: int = 10, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    student = spread * torch.randn(rows, classes, generator=generator)
    teacher = student + spread * torch.randn(rows, classes, generator=generator)
    target = torch.where(
        torch.rand(rows, generator=generator) < 0.6,
        teacher.argmax(-1),
        torch.randint(classes, (rows,), generator=generator),
    )
    return student, teacher, target


def test_figures_of_four_rows_by_hand() -> None:
    """Probabilities are 0.7, 0.9, 0.9 and 0.6 for the first choice, of which the last two are wrong."""
    confidence = torch.tensor([0.7, 0.9, 0.9, 0.6], dtype=torch.float64)
    student = torch.stack([confidence, 1 - confidence], dim=1).log().float()
    result = metrics.full(student, None, torch.tensor([0, 0, 1, 1]))
    assert result["accuracy"] == 0.5
    assert result["nll"] == pytest.approx(
        -(math.log(0.7) + math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4
    )
    # Of 15 bins 0.6 and 0.7 lie in the tenth and the eleventh, both 0.9 in the fourteenth.
    assert result["calibration_error"] == pytest.approx((0.6 - 0 + 1 - 0.7) / 4 + (0.9 - 0.5) / 2)
    bars = [(bar["confidence"], bar["accuracy"], bar["count"]) for bar in result["reliability"]]
    assert bars == [pytest.approx(bar) for bar in ((0.6, 0, 1), (0.7, 1, 1), (0.9, 0.5, 2))]
    assert result.keys() == {"accuracy", "nll", "calibration_error", "reliability"}


@pytest.mark.parametrize("spread", [0.1, 2.0, 60.0], ids=["unsure", "usual", "certain"])
def test_figures_against_numpy_and_scipy(spread: float) -> None:
    student, teacher, target = logits_and_targets(spread=spread)
    result = metrics.full(student, teacher, target)
    s, t, y = (part.double().numpy() if part.is_floating_point() else part.numpy() for part in
               (student, teacher, target))  # fmt: skip
    assert result["accuracy"] == pytest.approx((s.argmax(1) == y).mean())
    assert result["nll"] == pytest.approx(-log_softmax(s, 1)[np.arange(len(y)), y].mean(), rel=1e-5)
    assert result["agreement"] == pytest.approx((s.argmax(1) == t.argmax(1)).mean())
    divergence = (softmax(t, 1) * (log_softmax(t, 1) - log_softmax(s, 1))).sum(1).mean()
    assert result["kl"] == pytest.approx(divergence, rel=1e-4)
    if spread < 10:  # where nothing underflows SciPy's own formula serves
        assert result["kl"] == pytest.approx(entropy(softmax(t, 1), softmax(s, 1), axis=1).mean(), rel=1e-4)
    taus = [kendalltau(a, b).statistic for a, b in zip(s[:256], t[:256], strict=True)]
    assert result["kendall_tau"] == pytest.approx(np.mean(taus), abs=1e-6)
    assert result["topk"] == 5
    shared = [
        len(set(np.argsort(-a)[:5].tolist()) & set(np.argsort(-b)[:5].tolist()))
        for a, b in zip(s, t, strict=True)
    ]
    assert result["topk_overlap"] == pytest.approx(np.mean(shared) / 5)


@pytest.mark.parametrize("spread", [0.1, 2.0, 60.0])
def test_calibration_error_by_hand(spread: float) -> None:
    """Also where a confidence is 1 in float32: it belongs to the last bin."""
    student, _, target = logits_and_targets(spread=spread)
    confidence, choice = student.softmax(-1).max(-1)
    if spread == 60:
        assert (confidence == 1).any()
        assert ((confidence > 14 / 15) & (confidence < 1)).any()
    error = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            gap = (choice == target)[inside].double().mean() - confidence[inside].double().mean()
            error += inside.double().mean().item() * abs(gap.item())
    result = metrics.full(student, None, target)
    assert result["calibration_error"] == pytest.approx(error, abs=1e-6)
    bars = result["reliability"]
    assert sum(bar["count"] for bar in bars) == len(target)
    assert sum(bar["count"] * abs(bar["confidence"] - bar["accuracy"]) for bar in bars) / len(
        target
    ) == pytest.approx(error, abs=1e-6)


def test_kendall_tau_with_ties() -> None:
    """Tau-b, in which ties are no pairs."""
    generator = torch.Generator().manual_seed(4)
    student = torch.randint(-2, 3, (60, 7), generator=generator).float()
    teacher = torch.randint(-2, 3, (60, 7), generator=generator).float()
    taus = [kendalltau(a, b).statistic for a, b in zip(student.numpy(), teacher.numpy(), strict=True)]
    result = metrics.full(student, teacher, torch.zeros(60, dtype=torch.long))
    assert result["kendall_tau"] == pytest.approx(np.nanmean(taus), abs=1e-6)


def test_a_row_whose_classes_all_tie_has_no_kendall_tau() -> None:
    student = torch.tensor([[3.0, 2, 1], [1, 2, 3]])
    teacher = torch.tensor([[3.0, 2, 1], [0, 0, 0]])
    assert metrics.full(student, teacher, torch.tensor([0, 1]))["kendall_tau"] == pytest.approx(1)


def test_a_student_that_equals_its_teacher() -> None:
    student, _, target = logits_and_targets()
    result = metrics.full(student, student.clone(), target)
    assert [result[name] for name in ("agreement", "kl", "kendall_tau", "topk_overlap")] == pytest.approx(
        [1, 0, 1, 1], abs=1e-6
    )
    assert result["kendall_tau_bottom"] == pytest.approx(1)
    assert result["kl_gradient_bottom"] == 0


def test_a_student_that_reverses_its_teacher() -> None:
    student, _, target = logits_and_targets(classes=6)
    result = metrics.full(student, -student, target)
    assert result["topk"] == 3
    assert [result[name] for name in ("agreement", "kendall_tau", "topk_overlap")] == pytest.approx(
        [0, -1, 0]
    )


@pytest.mark.parametrize(("classes", "size"), [(2, 2), (3, 2), (10, 2), (24, 2), (26, 3), (40, 4)])
def test_figures_of_the_ends_of_the_teachers_order(classes: int, size: int) -> None:
    student, teacher, target = logits_and_targets(rows=60, classes=classes)
    result = metrics.full(student, teacher, target)
    s, t = student.double().numpy(), teacher.double().numpy()
    slope = np.abs(softmax(s, 1) - softmax(t, 1))
    for end, ranked in (("top", np.argsort(-t, 1)[:, :size]), ("bottom", np.argsort(t, 1)[:, :size])):
        pairs = [(s[row, r], t[row, r]) for row, r in enumerate(ranked)]
        taus = [kendalltau(*pair).statistic for pair in pairs]
        assert result[f"kendall_tau_{end}"] == pytest.approx(np.mean(taus), abs=1e-6)
        share = np.take_along_axis(slope, ranked, 1).sum() / slope.sum()
        assert result[f"kl_gradient_{end}"] == pytest.approx(share, rel=1e-9)


def test_ends_that_the_student_knows_and_does_not_know() -> None:
    """It reverses the teacher's last two classes of twenty, which have next to no probability."""
    teacher = torch.arange(20.0, 0.0, -1.0).repeat(3, 1)
    student = teacher.clone()
    student[:, 18:] = teacher[:, 18:].flip(-1)
    result = metrics.full(student, teacher, torch.zeros(3, dtype=torch.long))
    assert (result["kendall_tau_top"], result["kendall_tau_bottom"]) == pytest.approx((1, -1))
    assert result["kendall_tau"] == pytest.approx(1 - 2 / 190)
    assert result["kl_gradient_bottom"] == pytest.approx(1, abs=1e-6)
    assert result["kl_gradient_top"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("classes", "topk"), [(2, 1), (3, 1), (4, 2), (9, 4), (10, 5), (40, 5)])
def test_topk_is_at_most_half_of_the_classes(classes: int, topk: int) -> None:
    student, teacher, target = logits_and_targets(rows=20, classes=classes)
    assert metrics.full(student, teacher, target)["topk"] == topk


def test_collect_gives_all_rows_in_order_and_leaves_training_mode_off() -> None:
    inputs, targets = torch.randn(23, 4), torch.arange(23) % 3
    rows = data.Examples(TensorDataset(inputs, targets), range(23))
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(data.loader(rows, batch_size=5, seed=None))
    student, teacher = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)), nn.Linear(4, 3)
    found: Any = metrics.collect(student, loader, accelerator, LiveTeacher(teacher))
    torch.testing.assert_close(found[0], student[1](inputs).detach())
    torch.testing.assert_close(found[1], teacher(inputs).detach())
    assert torch.equal(found[2], targets)
    assert not any(part.requires_grad for part in found)
    assert metrics.collect(student, loader, accelerator)[1] is None


def test_rows_without_a_label_count_in_the_figures_of_agreement_only() -> None:
    student, teacher, target = logits_and_targets()
    hidden = target.clone()
    hidden[::3], hidden[1::7] = -1, -100
    known = hidden >= 0
    some, labelled = (metrics.full(student, teacher, labels) for labels in (hidden, target))
    alone = metrics.full(student[known], teacher[known], target[known])
    for name in ("accuracy", "nll", "calibration_error", "reliability"):
        assert some[name] == alone[name]
    for name in labelled.keys() - {"accuracy", "nll", "calibration_error", "reliability"}:
        assert some[name] == labelled[name]
    brief = metrics.brief(student, hidden)
    assert brief == metrics.brief(student[known], target[known])
    right = (student.argmax(-1) == target)[known].double().mean().item()
    assert brief["accuracy"] == pytest.approx(right)


def test_rows_without_any_label_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="rows with a label to measure accuracy on, got none in 2 rows"):
        metrics.brief(torch.zeros(2, 3), torch.tensor([-1, -100]))
