"""What training leaves of a network as its owner made it: dtypes, modes, weights that cannot be copied."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import luce
from luce.errors import UserError
from luce.methods import LogitMethod, MutualLearning

ROWS, FEATURES, CLASSES = 24, 6, 3


@pytest.fixture
def rows() -> TensorDataset:
    return TensorDataset(torch.randn(ROWS, FEATURES), torch.arange(ROWS) % CLASSES)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def distill(student: nn.Module, rows: Any, teacher: nn.Module | None = None, **options: Any) -> Any:
    settings = {"epochs": 2, "lr": 0.05, "batch_size": 8, "cpu": True, "show_progress": False}
    return luce.distill(student, teacher or network(), rows, **{**settings, **options})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# Dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("role", ["student", "teacher", "data"])
def test_each_network_computes_in_its_own_dtype(role: str, dtype: Any, precision: str, rows) -> None:
    student, teacher = network(), network()
    if role == "data":
        rows = TensorDataset(rows.tensors[0].to(dtype), rows.tensors[1])
    else:
        (student if role == "student" else teacher).to(dtype)
    before = values(student)
    fitted = distill(student, rows, teacher, val_data=rows, precision=precision, ema=0.5)
    expected = dtype if role == "student" else torch.float32
    assert {value.dtype for value in fitted.best_weights.values()} - {torch.int64} == {expected}
    assert not torch.equal(student[0].weight, before["0.weight"])


def test_double_data_gives_what_the_same_data_in_float_gives(rows) -> None:
    students = [network(), network()]
    students[1].load_state_dict(students[0].state_dict())
    teacher = network()
    doubles = TensorDataset(rows.tensors[0].double(), rows.tensors[1])
    for student, data in zip(students, (rows, doubles), strict=True):
        distill(student, data, teacher)
    torch.testing.assert_close(values(students[0]), values(students[1]))


def test_token_ids_are_not_converted() -> None:
    ids = TensorDataset(torch.randint(9, (ROWS, 4)), torch.arange(ROWS) % CLASSES)
    text = nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, CLASSES)).bfloat16()
    distill(text, ids, nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, CLASSES)))


def test_weights_of_16_bits_are_warned_of(rows, caplog) -> None:
    distill(network().bfloat16(), rows)
    assert "the student's weights are torch.bfloat16, which loses every step below 0.004" in caplog.text
    with pytest.raises(UserError, match=r"float32 for `training\.precision` bf16, got float16"):
        distill(network().half(), rows, precision="bf16")


# Modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_frozen_normalisation_keeps_its_statistics(ema: float | None, rows) -> None:
    student = network()
    student[1].requires_grad_(False).eval()
    before = values(student[1])
    fitted = distill(student, rows, ema=ema)
    torch.testing.assert_close(values(student[1]), before, rtol=0, atol=0)
    torch.testing.assert_close(values(fitted.student.body[1]), before, rtol=0, atol=0)
    assert not student[1].training
    assert student[3].training


def test_any_other_normalisation_learns_its_statistics(rows) -> None:
    student = network().eval()
    before = values(student[1])
    distill(student, rows)
    assert not torch.equal(student[1].running_mean, before["running_mean"])


def test_a_frozen_normalisation_of_a_peer(rows) -> None:
    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    peer = network()
    peer[1].requires_grad_(False).eval()
    before = values(peer[1])
    distill(network(), rows, loss=MutualLearning(LogitMethod(luce.KDLoss()), peer, optimizer=sgd))
    torch.testing.assert_close(values(peer[1]), before, rtol=0, atol=0)


def test_gradients_of_an_earlier_pass_are_no_part_of_the_first_step(rows) -> None:
    students, teacher = [network(), network()], network()
    students[1].load_state_dict(students[0].state_dict())
    students[1][0](torch.ones(1, FEATURES)).sum().backward()
    for student in students:
        distill(student, rows, teacher)
    assert torch.equal(students[0][0].weight, students[1][0].weight)


# Copies and wrappers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_in_last_batch", [0, 1])
def test_a_weight_normed_student(rows_in_last_batch: int, rows) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        student = nn.Sequential(nn.utils.weight_norm(nn.Linear(FEATURES, CLASSES)))
    student(torch.zeros(1, FEATURES))
    some = torch.utils.data.Subset(rows, range(16 + rows_in_last_batch))
    before = student[0].weight_v.clone()
    fitted = distill(student, some, ema=0.5)
    assert not torch.equal(student[0].weight_v, before)
    assert fitted.student.body is not student


def test_a_student_with_a_lock(rows) -> None:
    student = network()
    student.lock = threading.Lock()
    distill(student, rows)
    with pytest.raises(UserError, match=r"for `training\.ema`, an average of its weights, got Sequential"):
        distill(student, rows, ema=0.5)
    one_left = torch.utils.data.Subset(rows, range(9))
    with pytest.raises(UserError, match="expected at least two rows in every batch, for batch normalisation"):
        distill(student, one_left)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_lazy_layers_must_have_run(role: str, rows) -> None:
    lazy = nn.LazyLinear(CLASSES)
    with pytest.raises(UserError, match=f"expected a {role} with weights, got one whose `weight` waits"):
        distill(*((lazy, rows) if role == "student" else (network(), rows, lazy)))


def test_tied_weights_stay_tied(rows) -> None:
    student = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES), network())
    student[1].weight = student[0].weight
    fitted = distill(student, rows, ema=0.5)
    assert student[1].weight is student[0].weight
    assert fitted.student.body[1].weight is fitted.student.body[0].weight


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, pytest.param(lambda n: torch.compile(n, backend="eager"), marks=pytest.mark.slow)],
    ids=["DataParallel", "compile"],
)
def test_weights_of_wrapped_networks_have_their_plain_names(wrap: Any, rows) -> None:
    student = network()
    teacher = copy.deepcopy(student)
    nn.init.zeros_(teacher[3].bias)
    fitted = distill(wrap(student), rows, wrap(teacher), val_data=rows)
    assert fitted.best_weights.keys() == student.state_dict().keys()
    network().load_state_dict(fitted.best_weights)
