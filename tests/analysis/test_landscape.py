"""The shape of losses: where they are lowest, and that each point is a loss of its own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import luce
from luce.analysis.landscape import Landscape, landscape, picture

TEACHER = torch.tensor([2.0, 0.5, -1.0])


def look(loss: torch.nn.Module, **options) -> Landscape:
    return landscape(loss, TEACHER, 0, **{"points": 11, "radius": 6.0, **options})


def at(found: Landscape, a: float, b: float) -> Tensor:
    return (found.teacher_logits + a * found.directions[0] + b * found.directions[1])[None]


@pytest.mark.parametrize("loss", [luce.PLDLoss(), luce.KDLoss(temperature=4.0), luce.DISTLoss()])
def test_every_point_is_the_loss_there(loss: torch.nn.Module) -> None:
    found = look(loss)
    for i, j in ((0, 0), (0, 10), (3, 8), (5, 5)):
        alone = loss(at(found, found.steps[j], found.steps[i]), found.teacher_logits[None], torch.tensor([0]))
        assert found.values[i, j].item() == pytest.approx(alone.item(), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_directions_are_orthonormal_and_the_teacher_is_in_the_middle(classes: int) -> None:
    teacher = torch.linspace(-1, 1, classes)
    found = landscape(luce.KDLoss(), teacher, 0, points=5)
    torch.testing.assert_close(
        found.directions @ found.directions.T, torch.eye(2).double(), atol=1e-12, rtol=0
    )
    assert found.steps[2] == 0
    assert found.radius == pytest.approx(5 * teacher.norm().item())
    assert found.values[2, 2].item() == pytest.approx(0, abs=1e-15)
    assert found.minimum[:2] == (0, 0)


def test_three_classes_leave_nothing_out() -> None:
    found = look(luce.KDLoss())
    assert found.directions.sum(-1).abs().max() < 1e-15
    # Any student is in the plane but for an offset: class 0 is up, 1 lower left, 2 lower right.
    assert found.directions[:, 0].sign().tolist() == [0, 1]
    assert found.directions[:, 1].sign().tolist() == [-1, -1]
    assert found.directions[:, 2].sign().tolist() == [1, -1]


def test_where_losses_are_lowest() -> None:
    assert look(luce.KDLoss()).minimum == (0, 0, pytest.approx(0, abs=1e-15))
    assert not look(luce.KDLoss()).minimum_on_edge
    cross_entropy = look(luce.CrossEntropyLoss())
    assert cross_entropy.minimum_on_edge  # it falls for ever towards the label
    assert cross_entropy.minimum[1] == 6
    pld = look(luce.PLDLoss())
    assert pld.values[5, 5] > pld.minimum[2]  # not lowest at the teacher


def test_ties_are_broken_towards_the_teacher_and_what_is_no_number_is_not_lowest() -> None:
    def flat(student: Tensor, *_: Tensor) -> Tensor:
        return student.new_tensor(torch.nan if student[0, 0] > 2.1 else 3.0)

    found = look(flat)
    assert found.minimum == (0, 0, 3)
    assert found.values.isnan().any()
    assert found.as_dict()["values"][-1][0] is None
    nowhere = look(lambda *_: torch.tensor(torch.nan))
    assert all(map(math.isnan, nowhere.minimum))
    assert picture([found, nowhere]).startswith(b"\x89PNG")


def test_sums_and_seeds() -> None:
    mixed = luce.WeightedSum({"ce": (0.25, luce.CrossEntropyLoss()), "kd": (0.75, luce.KDLoss())})
    expected = 0.25 * look(luce.CrossEntropyLoss()).values + 0.75 * look(luce.KDLoss()).values
    torch.testing.assert_close(look(mixed).values, expected)
    one, same, other = (landscape(luce.KDLoss(), torch.arange(4.0), 0, points=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.directions, same.directions)
    assert not torch.equal(one.directions, other.directions)


def test_plain_values_and_pictures() -> None:
    found = [
        look(luce.KDLoss(), name="KD"),
        look(luce.PLDLoss(), name="<PLD> $1"),
        look(luce.CrossEntropyLoss()),
    ]
    plain = json.loads(json.dumps(found[0].as_dict(), allow_nan=False))
    assert plain["loss"] == "KD"
    assert plain["minimum"] == {"a": 0, "b": 0, "value": pytest.approx(0, abs=1e-15), "on_edge": False}
    assert len(plain["values"]) == len(plain["values"][0]) == len(plain["steps"]) == 11
    for shown in (found[:1], found, [*found, look(lambda *_: torch.tensor(1.0))]):
        assert picture(shown).startswith(b"\x89PNG")


def test_panels_without_a_loss_stay_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), savefig(figure, *a, **k))
    )
    picture([look(luce.KDLoss(), points=3)] * 4)
    panels = [axes for axes in drawn[0].axes if axes.get_label() != "<colorbar>"]
    assert [axes.axison for axes in panels] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teacher_logits": torch.zeros(1)}, "at least 2 finite logits"),
        ({"teacher_logits": torch.zeros(1, 3)}, "one row"),
        ({"teacher_logits": torch.tensor([0.0, torch.inf])}, "finite"),
        ({"label": 3}, "`label` in [0, 3), got 3"),
        ({"label": -1}, "`label`"),
        ({"points": 10}, "odd"),
        ({"points": 1}, "at least 3"),
        ({"radius": 0.0}, "`radius`"),
    ],
)
def test_errors(changes: dict[str, object], reason: str) -> None:
    arguments = {"teacher_logits": TEACHER, "label": 0, "points": 3, **changes}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        landscape(luce.KDLoss(), arguments.pop("teacher_logits"), arguments.pop("label"), **arguments)
    assert reason in str(caught.value)
