"""`luce.distill` on networks and data of one's own."""

from __future__ import annotations

import copy
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import luce
from luce import log
from luce.errors import UserError
from luce.runs.distill import _examples

CLASSES, FEATURES = 3, 8


def toy(rows: int = 240, unlabelled: int = 0) -> tuple[TensorDataset, nn.Module]:
    """Rows labelled by a linear rule, and a teacher who knows that rule."""
    generator = torch.Generator().manual_seed(0)
    rule = nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():
        rule.weight.copy_(torch.randn(CLASSES, FEATURES, generator=generator))
        rule.bias.zero_()
    inputs = torch.randn(rows, FEATURES, generator=generator)
    targets = rule(inputs).argmax(-1)
    targets[:unlabelled] = -1
    return TensorDataset(inputs, targets), rule


def accuracy(network: nn.Module, dataset: TensorDataset) -> float:
    inputs, targets = dataset.tensors
    return (network(inputs).argmax(-1) == targets).float().mean().item()


def distill(*arguments: Any, **options: Any) -> Any:
    return luce.distill(*arguments, **{"epochs": 4, "lr": 0.05, "show_progress": False, **options})


def test_a_student_learns_what_its_teacher_knows() -> None:
    dataset, teacher = toy()
    student, fresh = nn.Linear(FEATURES, CLASSES), toy(rows=500)[0]
    before = accuracy(student, fresh)
    fitted = distill(student, teacher, dataset, fresh)
    assert accuracy(student, fresh) > max(0.85, before + 0.2)
    assert [line["epoch"] for line in fitted.history] == [1, 2, 3, 4]
    assert fitted.history[-1]["validation"]["accuracy"] == pytest.approx(accuracy(student, fresh))
    assert fitted.history[-1]["train"]["loss"] < fitted.history[0]["train"]["loss"]
    assert fitted.student.body is student
    assert 1 <= fitted.best_epoch <= 4
    nn.Linear(FEATURES, CLASSES).load_state_dict(fitted.best_weights)


def test_rows_without_labels_teach_through_the_teacher() -> None:
    dataset, teacher = toy(unlabelled=240)
    student = nn.Linear(FEATURES, CLASSES)
    distill(student, teacher, dataset)
    assert accuracy(student, toy()[0]) > 0.85


def test_few_labels_among_many_rows() -> None:
    dataset, teacher = toy(unlabelled=230)
    with_rows, with_labels = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    steps = [
        distill(student, teacher, dataset, loss=loss).history[-1]["step"]
        for student, loss in ((with_rows, None), (with_labels, luce.CrossEntropyLoss()))
    ]
    assert steps[0] == steps[1] == 4 * 4
    assert accuracy(with_rows, toy()[0]) > accuracy(with_labels, toy()[0]) + 0.05


def test_items_may_be_dicts() -> None:
    class Rows(Dataset[dict[str, Any]]):
        def __init__(self, pairs: TensorDataset) -> None:
            self.pairs = pairs

        def __len__(self) -> int:
            return len(self.pairs)

        def __getitem__(self, index: int) -> dict[str, Any]:
            value, label = self.pairs[index]
            return {"input": value, "target": int(label)}

    dataset, teacher = toy(60)
    students = []
    for rows in (dataset, Rows(dataset)):
        torch.manual_seed(1)
        students.append(nn.Linear(FEATURES, CLASSES))
        distill(students[-1], teacher, rows)
    assert torch.equal(students[0].weight, students[1].weight)


def test_a_loss_that_is_a_function() -> None:
    dataset, teacher = toy()
    student = nn.Linear(FEATURES, CLASSES)

    def loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        assert not teacher_logits.requires_grad
        assert set(target.tolist()) <= {0, 1, 2}
        return (student_logits - teacher_logits).square().mean()

    fitted = distill(student, teacher, dataset, loss=loss, epochs=40, lr=0.2)
    torch.testing.assert_close(student.weight, teacher.weight, rtol=0, atol=0.02)
    assert fitted.history[-1]["train"].keys() == {"loss"}


def test_the_parameters_of_a_loss_are_trained() -> None:
    class Rescaled(nn.Module):
        """The student's logits and three times the teacher's are to agree, up to a factor to be found."""

        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Any:
            loss = (self.factor * student_logits - 3 * teacher_logits).square().mean()
            return {"fit": loss, "loss": loss}

    dataset, teacher = toy()
    student = nn.Linear(FEATURES, CLASSES)
    student.load_state_dict(teacher.state_dict())
    student.requires_grad_(False)
    loss = Rescaled()
    fitted = distill(student, teacher, dataset, loss=loss, epochs=60, lr=0.2, weight_decay=0.0)
    assert loss.factor.item() == pytest.approx(3, abs=0.05)
    assert fitted.history[0]["train"].keys() == {"fit", "loss"}


def test_the_teacher_is_left_as_it_was() -> None:
    dataset, _ = toy()
    teacher = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distill(nn.Linear(FEATURES, CLASSES), teacher, dataset)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher[0].training


def test_a_folder_goes_on_where_the_first_call_stopped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, teacher = toy(64)

    def call(folder: Any, **options: Any) -> Any:
        torch.manual_seed(3)
        student = nn.Sequential(nn.Dropout(0.2), nn.Linear(FEATURES, CLASSES))
        return student, distill(student, teacher, dataset, folder=folder, **options)

    forward, calls = luce.PLDLoss.forward, itertools.count(1)

    def impatient(*arguments: Any) -> Tensor:
        if next(calls) == 4:  # one batch an epoch: within the fourth
            raise KeyboardInterrupt
        return forward(*arguments)

    whole, fitted = call(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(luce.PLDLoss, "forward", impatient)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "cut")
    resumed, again = call(str(tmp_path / "cut"))
    assert torch.equal(resumed[1].weight, whole[1].weight)
    assert len(again.history) == 4
    third, finished = call(tmp_path / "cut")  # nothing is left to do
    assert torch.equal(third[1].weight, whole[1].weight)
    assert finished.history == again.history
    written = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == again.history
    assert fitted.history[-1]["train"] == again.history[-1]["train"]


def test_a_folder_is_not_taken_for_another_training(tmp_path) -> None:
    dataset, teacher = toy(64)
    distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, folder=tmp_path)
    assert (tmp_path / "environment.json").is_file()
    with pytest.raises(UserError, match="already holds another"):
        distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, folder=tmp_path, lr=0.5)


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path) -> None:
    for name in ("film", ".film.part"):
        (tmp_path / name).write_text("mine")
    dataset, teacher = toy(64)
    with pytest.raises(UserError, match="already holds other files"):
        distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"film", ".film.part"}


def test_calls_repeat_themselves_whatever_was_drawn_before() -> None:
    dataset, teacher = toy(64)
    weights = []
    for _ in range(2):
        student = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES))
        nn.init.constant_(student[1].weight, 0.1)
        nn.init.zeros_(student[1].bias)
        distill(student, teacher, dataset)
        weights.append(student[1].weight)
    assert torch.equal(*weights)


def test_an_unknown_option_names_the_nearest() -> None:
    dataset, teacher = toy(8)
    with pytest.raises(UserError, match=r"unknown option of luce\.distill: `epoch`; did you mean `epochs`"):
        distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, epoch=3)
    with pytest.raises(UserError, match=r"expected `lr` as a number, got 'fast'"):
        distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, lr="fast")


def test_networks_with_different_classes() -> None:
    dataset, _ = toy(8)
    with pytest.raises(ValueError, match=r"expected `teacher_logits` of shape \(8, 3\).*, got \(8, 5\)"):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, 5), dataset)


@pytest.mark.parametrize("label", [CLASSES, -2, 10**9])
@pytest.mark.parametrize(
    "loss", [None, luce.CrossEntropyLoss(), nn.functional.mse_loss], ids=["pld", "ce", "own"]
)
def test_labels_out_of_range(label: int, loss: Any) -> None:
    inputs, labels = torch.randn(8, FEATURES), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    wrong = labels.clone()
    wrong[6] = label
    student, teacher = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    for name, parts in (("training", (wrong, labels)), ("validation", (labels, wrong))):
        with pytest.raises(UserError, match=rf"labels in \[0, 3\), .* got {label} in {name} row 6; give the"):
            distill(student, teacher, *((inputs, part) for part in parts), loss=loss)


def test_labels_that_begin_at_one() -> None:
    inputs, labels = torch.randn(6, FEATURES), torch.tensor([1, 2, 3, 1, 2, 3])
    with pytest.raises(UserError, match=r"got 3 in training row 2; they begin at 1: subtract 1"):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), (inputs, labels))


def test_labels_to_which_a_loss_gives_a_meaning() -> None:
    dataset, teacher = toy(64)
    inputs, labels = dataset.tensors
    labels[:8] = 255
    student = nn.Linear(FEATURES, CLASSES)
    fitted = distill(student, teacher, (inputs, labels), loss=luce.PLDLoss(ignore_index=255))
    assert len(fitted.history) == 4


def test_classes_without_a_training_row_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(8, FEATURES), torch.tensor([0, 4, 0, 4, 0, 4, 0, 4])
    distill(nn.Linear(FEATURES, 12), nn.Linear(FEATURES, 12), rows)
    assert "10 of the student's 12 classes have no training row: 1, 2, 3, 5, 6, ...;" in caplog.text
    assert "`train_data`: 8 rows, 2 classes" in caplog.text


@pytest.mark.parametrize("label", [-1, -100])
def test_validation_rows_without_a_label_count_in_no_figure(
    label: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, teacher = toy()
    inputs, labels = toy(100)[0].tensors
    hidden = labels.clone()
    hidden[:60] = label
    student = nn.Linear(FEATURES, CLASSES)
    figures = [
        distill(copy.deepcopy(student), teacher, dataset, rows).history[-1]["validation"]
        for rows in ((inputs, hidden), (inputs[60:], labels[60:]))
    ]
    assert figures[0] == pytest.approx(figures[1])
    assert "`val_data`: 100 rows, 3 classes, 60 rows without a label" in caplog.text
    with pytest.raises(UserError, match="validation rows with a label, got none in 100 rows"):
        distill(student, teacher, dataset, (inputs, torch.full_like(labels, label)))


def test_training_rows_of_which_none_counts() -> None:
    dataset, teacher = toy(8)
    inputs, labels = dataset.tensors
    student = nn.Linear(FEATURES, CLASSES)
    with pytest.raises(UserError, match="got -100 as the label of all 8"):
        distill(student, teacher, (inputs, torch.full_like(labels, -100)))
    with pytest.raises(UserError, match="at least one example with a label, got none in 8 rows"):
        distill(student, teacher, (inputs, torch.full_like(labels, -1)), loss=luce.CrossEntropyLoss())


@pytest.mark.parametrize("loss", [luce.PLDLoss(), luce.CrossEntropyLoss()], ids=["pld", "ce"])
def test_ignored_rows_change_nothing(loss: Any) -> None:
    dataset, teacher = toy(32)
    inputs, labels = dataset.tensors
    more = torch.cat([inputs, 9 * torch.randn(16, FEATURES)])
    marked = torch.cat([labels, torch.full((16,), -100)])
    start = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))
    students = []
    for rows in ((inputs, labels), (more, marked)):
        students.append(copy.deepcopy(start))
        distill(students[-1], teacher, rows, loss=loss, batch_size=8, epochs=1)
    for name, value in students[0].state_dict().items():
        assert torch.equal(value, students[1].state_dict()[name])
    assert not torch.equal(students[0][1].weight, start[1].weight)


FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("of_data", FLOATING, ids=str)
def test_every_floating_dtype_of_data_and_networks(of_data: torch.dtype) -> None:
    dataset, teacher = toy(8)
    inputs, labels = dataset.tensors
    for number, of_student in enumerate(FLOATING):
        student = nn.Linear(FEATURES, CLASSES).to(of_student)
        answers = copy.deepcopy(teacher).to(FLOATING[number - 1])
        rows = inputs.to(of_data), labels
        fitted = distill(student, answers, rows, rows, epochs=1)
        assert math.isfinite(fitted.history[0]["train"]["loss"])
        assert student.weight.dtype == of_student


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint16, torch.bool], ids=str)
def test_integers_for_a_network_of_real_numbers(dtype: torch.dtype) -> None:
    rows = torch.ones(8, FEATURES).to(dtype), torch.arange(8) % 3
    with pytest.raises(UserError, match=rf"student .*\(8,\) and {dtype}, .* fails .*convert them to float32"):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), rows)


def test_a_network_for_other_inputs_is_named() -> None:
    dataset, teacher = toy(8)
    with pytest.raises(UserError, match=r"expected a student for the data, rows of shape \(8,\)"):
        distill(nn.Linear(5, CLASSES), teacher, dataset)
    with pytest.raises(UserError, match=r"expected a teacher for the data, rows of shape \(8,\)"):
        distill(teacher, nn.Linear(5, CLASSES), dataset)
    with pytest.raises(UserError, match=r"expected a student for the data, rows of shape \(9,\)"):
        distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, (torch.zeros(3, 9), [0, 1, 2]))


def test_items_are_read_once_for_their_labels() -> None:
    class Counted(Dataset[Any]):
        reads = 0

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.reads += 1
            return torch.zeros(FEATURES), index % 3

    rows = Counted()
    _examples(rows, "train_data")
    assert rows.reads <= 9  # one more for a look at the values


def test_an_empty_dataset() -> None:
    empty = TensorDataset(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UserError, match="expected at least one example, got none"):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), empty)
    with pytest.raises(UserError, match="expected at least one example, got none"):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), [])


def test_progress_bars_stay_off_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    dataset, teacher = toy(8)
    distill(nn.Linear(FEATURES, CLASSES), teacher, dataset, show_progress=True)
    assert capfd.readouterr() == ("", "")


# Losses and networks of other forms ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            nn.CrossEntropyLoss(),
            r"`CrossEntropyLoss` as loss\(student_logits, teacher_logits, target\).*wrap",
        ),
        (nn.functional.cross_entropy, r"cannot call the loss `cross_entropy` as .*RuntimeError"),
        (lambda student_logits, target: student_logits.sum(), "TypeError.* 2 positional arguments"),
        (luce.KDLoss, r"expected a loss such as luce.KDLoss\(\)"),
        (lambda s, t, y: None, "to return a tensor, or a dict .* got NoneType"),
        (lambda s, t, y: s.sum().item(), "got float"),
        (lambda s, t, y: {"kd": s.sum()}, "with the key `loss`, got a dict with 'kd'"),
    ],
    ids=["two arguments", "a function of torch", "a lambda", "a class", "None", "a number", "no total"],
)
def test_a_loss_of_another_form_is_named(loss: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), toy()[0], loss=loss)


class Output(nn.Module):
    """A network whose output is a function of logits."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(FEATURES, CLASSES), form

    def forward(self, inputs: Tensor) -> Any:
        return self.form(self.linear(inputs))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Linear, r"a {role} that is a torch.nn.Module, got <class.*make an instance"),
        (lambda inputs: inputs, "a {role} that is a torch.nn.Module, got <function.*wrap it"),
        (Output(lambda logits: (logits,)), "return its logits as a Tensor.*got tuple"),
        (Output(lambda logits: {"logits": logits}), "return its logits as a Tensor.*got dict"),
        (Output(lambda logits: logits.long()), "a {role} with logits of a floating dtype, got torch.int64"),
    ],
    ids=["a class", "a function", "a tuple", "a dict", "integers"],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_of_another_form_is_named(role: str, network: Any, message: str) -> None:
    networks = {
        "student": nn.Linear(FEATURES, CLASSES),
        "teacher": nn.Linear(FEATURES, CLASSES),
        role: network,
    }
    with pytest.raises(UserError, match=message.format(role=role)):
        distill(**networks, train_data=toy()[0])


class Named(TensorDataset):
    """Rows with the names of their classes."""

    def __init__(self, *classes: str) -> None:
        super().__init__(*toy()[0].tensors)
        self.classes = classes


def test_validation_data_that_number_the_classes_differently_are_refused() -> None:
    with pytest.raises(UserError, match=r"`train_data` and `val_data` .* got `a` and `b` for class 0"):
        distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), Named(*"abc"), Named(*"bca"))


def test_training_data_as_validation_data_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    data = toy()[0]
    distill(nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES), data, data)
    assert "`val_data` is `train_data`" in caplog.text


@pytest.mark.parametrize("form", ["class_names", "id2label"])
def test_the_teacher_answers_in_the_order_of_the_classes_of_the_data(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {}
    for names in ("abc", "cab"):
        torch.manual_seed(0)
        student, teacher = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        with torch.no_grad():  # class "c" comes first in the second
            order = ["abc".index(name) for name in names]
            teacher.weight.copy_(teacher.weight[order].clone())
            teacher.bias.copy_(teacher.bias[order].clone())
        if form == "class_names":
            teacher.class_names = tuple(names)
        else:
            teacher.config = SimpleNamespace(id2label=dict(enumerate(names)))
        distill(student, teacher, Named(*"abc"), loss=luce.KDLoss())
        weights[names] = student.weight.detach().clone()
    torch.testing.assert_close(weights["abc"], weights["cab"])
    assert "the teacher numbers the classes of `train_data` differently" in caplog.text


def test_a_teacher_of_other_classes_is_refused() -> None:
    teacher = nn.Linear(FEATURES, CLASSES)
    teacher.class_names = ("x", "y", "z")
    with pytest.raises(UserError, match=r"got `x`, `y`, `z` .* or correct the teacher's `class_names`"):
        distill(nn.Linear(FEATURES, CLASSES), teacher, Named(*"abc"))


def test_messages_appear_with_the_progress_unless_the_program_handles_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = TensorDataset(torch.randn(16, 8), torch.arange(16) % 4)
    for handled, shown, lines in ((False, True, 1), (False, False, 0), (True, True, 0)):
        monkeypatch.setattr(log.LOGGER, "hasHandlers", lambda handled=handled: handled)
        luce.distill(nn.Linear(8, 4), nn.Linear(8, 4), data, epochs=1, show_progress=shown)
        assert capsys.readouterr().err.count("luce.distill: `train_data`: 16 rows, 4 classes") == lines
