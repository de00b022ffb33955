"""The look at the first batches: what cannot teach is refused or said, and nothing else is."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import luce
from luce.data import Examples
from luce.errors import UserError
from luce.methods import FeatureMethod, LogitMethod, MetaDistil, Method, MutualLearning
from luce.models import Classifier
from luce.signals import LiveTeacher, LocalBlackBox
from luce.training import TrainingError, TrainingOptions, fit
from luce.training.networks import at_most, judge_accuracy

ROWS, FEATURES, CLASSES = 64, 8, 3


@pytest.fixture
def rule() -> nn.Linear:
    """A teacher that knows the labels of `rows`."""
    layer = nn.Linear(FEATURES, CLASSES)
    layer.weight.data *= 4
    return layer


@pytest.fixture
def rows(rule: nn.Linear) -> TensorDataset:
    inputs = torch.randn(ROWS, FEATURES)
    return TensorDataset(inputs, rule(inputs).argmax(-1))


def relabelled(rows: TensorDataset, change: Callable[[Tensor], Tensor]) -> TensorDataset:
    inputs, labels = rows.tensors
    return TensorDataset(inputs, change(labels.clone()))


def said(caplog: pytest.LogCaptureFixture) -> str:
    """All messages but the one that describes the data."""
    return "\n".join(line for line in caplog.messages if not line.startswith("`train_data`"))


def student() -> nn.Linear:
    return nn.Linear(FEATURES, CLASSES)


def distill(network: nn.Module, teacher: Any, rows: TensorDataset, **options: Any) -> Any:
    settings = {"epochs": 1, "lr": 0.01, "cpu": True, "show_progress": False, "loss": luce.KDLoss()}
    return luce.distill(network, teacher, rows, **{**settings, **options})


def train(network: nn.Module, teacher: nn.Module, rows: TensorDataset, loss: Any, **options: Any) -> None:
    """As `distill`, without its own look at the data."""
    fit(
        Classifier(network),
        LogitMethod(loss),
        Examples(rows, range(ROWS)),
        teacher=LiveTeacher(Classifier(teacher)),
        options=TrainingOptions(epochs=1, cpu=True),
        **options,
    )


class Then(nn.Module):
    """A layer and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = student() if layer is None else layer, function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self.layer(inputs))


BOTH = {"task": (1.0, luce.CrossEntropyLoss()), "kd": (1.0, luce.KDLoss())}


# Answers that cannot teach ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [luce.KDLoss(), luce.PLDLoss(), luce.WeightedSum(BOTH)])
def test_a_good_teacher_and_student_cause_no_message(loss: Any, rule, rows, caplog) -> None:
    distill(student(), rule, rows, loss=loss, batch_size=16)
    distill(student(), rule, relabelled(rows, lambda labels: labels.fill_(-1)), batch_size=16)
    assert said(caplog) == ""


@pytest.mark.parametrize("shape", ["(64, 1)", "(64,)"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_one_logit_is_refused(role: str, shape: str, rule, rows) -> None:
    narrow = Then((lambda x: x[:, 0]) if shape == "(64,)" else lambda x: x[:, :1])
    networks = (narrow, rule) if role == "student" else (student(), narrow)
    message = f"a {role} with at least two logits per row"
    with pytest.raises(UserError, match=message + f".*{re.escape(shape)}"):
        train(*networks, rows, lambda s, t, y: (s - t).square().mean())
    with pytest.raises(UserError, match=message):
        distill(*networks, rows)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.softmax(-1), "the teacher gives probabilities, each row of which sums to 1"),
        (lambda x: x.softmax(-1).bfloat16(), "the teacher gives probabilities"),
        (lambda x: x.sigmoid(), "all answers of the teacher to the first batch lie in [0, 1]"),
        (lambda x: 0 * x, "the teacher gives all classes the same logit"),
        (lambda x: x[:, :1].expand(-1, CLASSES), "the teacher gives all classes the same logit"),
        (lambda x: x[:1].expand(len(x), -1), "the teacher gives every row of the first batch the same"),
        (lambda x: x.log_softmax(-1), ""),  # valid logits: softmax(log p) = p
        (lambda x: x.masked_fill(torch.arange(CLASSES) == 2, -math.inf), ""),  # a class that is excluded
    ],
)
def test_answers_of_a_teacher(function: Any, message: str, rule, rows, caplog) -> None:
    without_labels = relabelled(rows, lambda labels: labels.fill_(-1))
    distill(student(), Then(function, rule), without_labels)
    assert caplog.text.count("WARNING") == bool(message)
    assert message in caplog.text


def test_answers_of_a_black_box_are_no_logits(rule, rows, caplog) -> None:
    box = LocalBlackBox(rule, answers="probs", classes=CLASSES)
    distill(student(), box, rows)
    assert said(caplog) == ""


def test_a_student_that_ends_in_softmax(rule, rows, caplog) -> None:
    distill(Then(lambda x: x.softmax(-1)), rule, rows)
    assert "the student gives probabilities" in caplog.text


def test_rows_that_are_all_the_same(rule, caplog) -> None:
    distill(student(), rule, TensorDataset(torch.ones(8, FEATURES), torch.zeros(8, dtype=torch.long) - 1))
    assert "all rows of the first batch are the same input" in caplog.text


@pytest.mark.parametrize("where", ["inputs", "teacher", "student"])
def test_numbers_that_are_none_name_their_origin(where: str, rule, rows) -> None:
    network = student()
    if where != "inputs":
        next((rule if where == "teacher" else network).parameters()).data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=rf"expected .*{where}.*NaN or infinity"):
        train(
            network,
            rule,
            rows,
            luce.KDLoss(),
            augment=(lambda inputs: inputs / 0) if where == "inputs" else None,
        )


# Labels and classes -----------------------------------------------------------------------------------------


def test_networks_of_different_width(rule, rows) -> None:
    with pytest.raises(UserError, match="the teacher has 3 classes, the student 5"):
        distill(nn.Linear(FEATURES, 5), rule, rows)


def test_labels_that_the_student_lacks(rule, rows) -> None:
    beyond = relabelled(rows, lambda labels: labels + 2)
    with pytest.raises(
        UserError, match=r"expected labels in \[0, 3\), one for each logit of the student, got 4"
    ):
        train(student(), rule, beyond, luce.CrossEntropyLoss())


def test_the_probability_of_few_right_answers() -> None:
    # Of 3 rows at 1/2: 1/8 for none, 4/8 for at most one, 1 for at most three.
    assert [at_most(right, 3, 0.5) for right in (-1, 0, 1, 3)] == pytest.approx([0, 1 / 8, 1 / 2, 1])


@pytest.mark.parametrize(
    ("right", "rows", "classes", "bad"),
    [
        (0, 0, 10, False),
        (0, 8, 10, False),  # 0.9 ** 8: no evidence
        (0, 70, 10, True),
        (20, 200, 10, True),  # chance
        (60, 200, 10, False),
        (0, 64, 1000, False),  # a good teacher of 1,000 classes may be below one in ten
        (100, 2000, 1000, False),
        (500, 1000, 2, True),
        (900, 1000, 2, False),
        (100, 1000, 2, True),  # classes exchanged
    ],
)
def test_accuracy_is_judged_against_chance(right: int, rows: int, classes: int, bad: bool) -> None:
    assert (judge_accuracy(right, rows, classes, "rows") is not None) == bad


@pytest.mark.parametrize("batch_size", [8, 64])
def test_a_teacher_with_classes_in_another_order(batch_size: int, rule, rows, caplog) -> None:
    turned = relabelled(rows, lambda labels: (labels + 1) % CLASSES)
    distill(student(), rule, turned, batch_size=batch_size, epochs=2)
    assert caplog.text.count("WARNING") == 1
    assert "the teacher is right on 0 of 64 labelled rows of the first batches, where chance gives 21" in (
        caplog.text
    )


# Terms without a gradient -----------------------------------------------------------------------------------


class Constant(nn.Module):
    """A term that forgot its graph, or whose gradient is 0."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return (student_logits.detach() if self.cut else 0 * student_logits).square().mean()


@pytest.mark.parametrize("cut", [True, False])
def test_a_term_without_a_gradient_is_named(cut: bool, rule, rows, caplog) -> None:
    terms = {"kd": (1.0, luce.KDLoss()), "lost": (0.5, Constant(cut)), "off": (0.0, Constant(True))}
    distill(student(), rule, rows, loss=luce.WeightedSum(terms), epochs=2)
    assert caplog.text.count("WARNING") == 1
    assert "the term `lost` of the loss gives the student no gradient on the first batches" in caplog.text


def test_figures_that_a_loss_reports_need_no_gradient(rule, rows, caplog) -> None:
    def loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        value = luce.kd_loss(student_logits, teacher_logits)
        return {"fit": value, "largest": student_logits.detach().max(), "loss": value}

    distill(student(), rule, rows, loss=loss)
    assert said(caplog) == ""


@pytest.mark.parametrize("labelled", [0, 1])
def test_a_term_waits_for_a_batch_with_a_label(labelled: int, rule, rows, caplog) -> None:
    few = relabelled(rows, lambda labels: labels.masked_fill(torch.arange(ROWS) >= labelled, -1))
    distill(student(), rule, few, loss=luce.WeightedSum(BOTH), batch_size=4)
    assert ("the term `task` of the loss gives the student no gradient" in caplog.text) == (not labelled)
    assert caplog.text.count("WARNING") == (not labelled)


class InPlace(torch.autograd.Function):
    """Half the sum of squares, whose backward pass scales in place what it saved, as fused losses do."""

    @staticmethod
    def forward(context: Any, logits: Tensor) -> Tensor:
        context.save_for_backward(logits.clone())
        return logits.square().sum() / 2

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return context.saved_tensors[0].mul_(gradient)


def test_a_loss_whose_backward_pass_cannot_be_repeated(rule, rows, caplog) -> None:
    networks = [student(), student()]
    networks[1].load_state_dict(networks[0].state_dict())
    for network, squares in zip(networks, (InPlace.apply, lambda x: x.square().sum() / 2), strict=True):

        def loss(s: Tensor, t: Tensor, y: Tensor, squares: Any = squares) -> Tensor:
            return 0.5 * squares(s - t)

        distill(network, rule, rows, loss=loss, optimizer="sgd", lr=0.001)
    torch.testing.assert_close(networks[0].weight, networks[1].weight)
    assert said(caplog) == ""


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_loss_on_early_features_alone(scale: float, rule, rows, caplog) -> None:
    class First(luce.ATLoss):
        """Compares only the first feature; the last one has a gradient of zero."""

        def forward(self, student_features: Any, teacher_features: Any) -> Tensor:
            first, last = student_features
            return scale * first.square().mean() + 0 * last.sum()

    as_map = nn.Unflatten(1, (4, 1, 1))
    network = nn.Sequential(nn.Linear(FEATURES, 4), as_map, nn.ReLU(), nn.Flatten(), nn.Linear(4, CLASSES))
    teacher = nn.Sequential(nn.Unflatten(1, (FEATURES, 1, 1)), nn.Flatten(), rule)
    method = FeatureMethod(luce.KDLoss(), {"hint": (1.0, First(), ["1", "2"], ["0", "0"])})
    distill(network, teacher, rows, loss=method, batch_size=16)
    assert ("the term `hint` of the loss gives the student no gradient" in caplog.text) == (not scale)


def test_a_whole_loss_without_a_gradient(rule, rows, caplog) -> None:
    distill(student(), rule, rows, loss=Constant(cut=False))
    assert "the loss gives the student no gradient" in caplog.text


def test_a_dead_layer(rule, rows, caplog) -> None:
    dead = nn.Sequential(student(), nn.Threshold(1e6, 0.0))
    distill(dead, rule, rows)
    assert "gives every parameter of the student a gradient of exactly zero" in caplog.text


def test_features_behind_frozen_layers(rule, rows, caplog) -> None:
    network = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    network[0].requires_grad_(False)
    teacher = nn.Sequential(nn.Identity(), rule)
    hint = (1.0, luce.RKDLoss(), ["1"], ["0"])
    distill(network, teacher, rows, loss=FeatureMethod(luce.KDLoss(), {"hint": hint}))
    assert "the student's features at `1` carry no gradient" in caplog.text
    assert "training 15 of the student's 51 parameters; the others are frozen" in caplog.text


def test_parameters_that_are_no_part_of_the_loss(rule, rows, caplog) -> None:
    network = student()
    network.auxiliary = nn.Linear(2, 2)
    distill(network, rule, rows)
    assert "2 of the student's 4 trainable tensors are no part of the loss" in caplog.text
    assert "auxiliary.weight, auxiliary.bias" in caplog.text


def test_a_student_that_is_frozen_altogether(rule, rows) -> None:
    with pytest.raises(UserError, match="expected a student with parameters to train, got 2 frozen ones"):
        distill(student().requires_grad_(False), rule, rows)


# The teacher as the student ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda n: n, Classifier, nn.Sequential, LiveTeacher])
def test_a_student_is_not_its_own_teacher(wrap: Callable[[nn.Module], Any], rows) -> None:
    network = student()
    before = network.weight.clone()
    with pytest.raises(UserError, match=r"expected a teacher with weights of its own, got .*`(0\.)?weight`"):
        distill(network, wrap(network), rows)
    assert torch.equal(network.weight, before)


def test_a_black_box_around_the_student(rows) -> None:
    network = student()
    box = LocalBlackBox(network, answers="probs", classes=CLASSES)
    with pytest.raises(UserError, match="expected a teacher with weights of its own"):
        distill(network, box, rows)


def test_equal_memory_under_two_names_is_shared(rows) -> None:
    network, other = student(), student()
    other.weight = nn.Parameter(network.weight.data)
    with pytest.raises(UserError, match="shares `weight` with the student"):
        distill(network, other, rows)


def test_a_frozen_part_may_be_shared(rule, rows, caplog) -> None:
    backbone = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
    teacher = nn.Sequential(backbone, student())
    distill(nn.Sequential(backbone, student()), teacher, relabelled(rows, lambda y: y.fill_(-1)))
    assert "WARNING" not in caplog.text


def test_a_copy_of_the_teacher_has_nothing_to_learn(rule, rows, caplog) -> None:
    distill(copy.deepcopy(rule), rule, rows)
    assert caplog.text.count("WARNING") == 1
    assert "exactly as its teacher does, so that it has nothing to learn" in caplog.text


def test_a_copy_of_the_teacher_may_learn_from_labels(rule, rows, caplog) -> None:
    """As in learning without forgetting: the term on the teacher's answers keeps what it knew."""
    distill(copy.deepcopy(rule), rule, rows, loss=luce.WeightedSum(BOTH))
    assert "WARNING" not in caplog.text
    assert "it starts from a copy of the same weights" in caplog.text


# Methods with teachers of their own -------------------------------------------------------------------------


def test_a_peer_need_not_know_anything(rows, caplog) -> None:
    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    peer = student()
    peer.weight.data.zero_()
    peer.bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))  # says 0, which no row is
    method: Method = MutualLearning(LogitMethod(luce.WeightedSum(BOTH)), peer, optimizer=sgd)
    distill(student(), student(), relabelled(rows, lambda labels: labels.clamp(min=1)), loss=method)
    assert "the teacher is right" not in caplog.text


def test_the_teacher_that_metadistil_trains_is_looked_at(rule, rows, caplog) -> None:
    method = MetaDistil(LogitMethod(luce.KDLoss()), quiz=0.25)
    distill(student(), Then(lambda x: x.softmax(-1), rule), rows, loss=method)
    assert "the teacher gives probabilities" in caplog.text


# Cost -------------------------------------------------------------------------------------------------------


def test_the_look_changes_nothing_and_ends(rule, rows) -> None:
    """One more forward pass of either network would be seen here, as would a draw of random numbers."""
    counts = {"student": 0, "teacher": 0}

    def count(name: str) -> Callable[[Tensor], Tensor]:
        def counted(logits: Tensor) -> Tensor:
            counts[name] += 1
            return logits

        return counted

    network = Then(count("student"), nn.Sequential(nn.Dropout(0.5), student()))
    train(network, Then(count("teacher"), rule), rows, luce.KDLoss())
    assert counts == {"student": 1, "teacher": 1}
