"""The derivative of a quiz loss through pilot steps, against double back-propagation and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import luce
from luce import CrossEntropyLoss, KDLoss, PLDLoss, WeightedSum
from luce.losses import teacher_gradient
from luce.methods.base import Batch
from luce.methods.lookahead import Place, derivative_along, look_ahead, slope_on_logits

CLASSES = 4
LOSSES = {
    "kd": WeightedSum({"task": (0.1, CrossEntropyLoss()), "kd": (0.9, KDLoss(temperature=4.0))}),
    "pld": WeightedSum({"pld": (1.0, PLDLoss())}),
    "dkd": WeightedSum({"task": (1.0, CrossEntropyLoss()), "dkd": (1.0, luce.DKDLoss())}),
    "dist": WeightedSum({"task": (1.0, CrossEntropyLoss()), "dist": (1.0, luce.DISTLoss())}),
    "wsld": WeightedSum({"wsld": (1.0, luce.WSLDLoss())}),  # its slope is no gradient of any function
}


def of(name: str) -> Callable[[Tensor, Tensor, Batch], Tensor]:
    return lambda student, teacher, batch: LOSSES[name](student, teacher, batch["target"])["loss"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.Tanh(), nn.Linear(10, CLASSES))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4, momentum=None),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, CLASSES),
    )


class Attention(nn.Module):
    """A transformer's layer, whose attention is a fused kernel wherever it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


class Shared(nn.Module):
    """Of two layers with the same weight, and of one layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, CLASSES)
        self.second.weight = self.first.weight
        self.norm = self.same_norm = nn.BatchNorm1d(36)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x.flatten(1))))
        return self.last(torch.tanh(self.same_norm(self.second(x))))


class Unfollowed(nn.Module):
    """Divides by a length that it takes for constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        with torch.no_grad():
            length = x.norm(dim=-1, keepdim=True)
        return self.last(x / length)


def spectral() -> nn.Module:
    """Steps of an iteration towards its weight's norm, which no gradient follows and no evaluation takes."""
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(36, CLASSES)))


NETWORKS = {"mlp": mlp, "conv": conv, "attention": Attention, "shared": Shared, "no-grad": Unfollowed}
ALL_NETWORKS = {**NETWORKS, "spectral": spectral}


def batches(count: int, seed: int = 0, rows: int = 7) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {
            "input": torch.randn(rows, 1, 6, 6, generator=random, dtype=torch.float64),
            "target": torch.randint(CLASSES, (rows,), generator=random),
        }
        for _ in range(count)
    ]


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return ALL_NETWORKS[name]().double().train(), conv().double().eval()


def by_double_backward(
    student: nn.Module,
    teacher: nn.Module,
    loss: Callable[[Tensor, Tensor, Batch], Tensor],
    batches: Sequence[Batch],
    quiz: Sequence[Batch],
    step_size: float,
) -> tuple[Tensor, list[Tensor]]:
    """As the authors' code has it: a graph through the updates of a functional student."""
    student = copy.deepcopy(student)
    parameters = dict(student.named_parameters())
    with torch.random.fork_rng([]), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for batch in batches:
            logits = functional_call(student, parameters, (batch["input"],))
            with teacher_gradient():
                value = loss(logits, teacher(batch["input"]), batch)
            gradient = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
            parameters = {
                name: p - step_size * g for (name, p), g in zip(parameters.items(), gradient, strict=True)
            }
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        answers = [functional_call(student, parameters, (batch["input"],)) for batch in quiz]
    quiz_loss = sum(F.cross_entropy(a, b["target"]) for a, b in zip(answers, quiz, strict=True)) / len(quiz)
    return quiz_loss, list(torch.autograd.grad(quiz_loss, list(teacher.parameters())))


def by_looking_ahead(student, teacher, loss, batches, quiz, step_size):
    said = [teacher(batch["input"]) for batch in batches]
    quiz_loss, cotangents = look_ahead(student, loss, batches, said, quiz, step_size)
    return quiz_loss, torch.autograd.grad(said, list(teacher.parameters()), cotangents)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    found, expected = (torch.cat([x.reshape(-1) for x in each]) for each in (found, expected))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_teachers_gradient_is_that_of_double_back_propagation(
    network: str, loss: str, steps: int
) -> None:
    student, teacher = networks(network)
    arguments = student, teacher, of(loss), batches(steps), batches(2, seed=1, rows=5), 0.3
    expected = by_double_backward(*arguments)
    found = by_looking_ahead(*arguments)
    assert_close(found[0], expected[0].detach(), rtol=1e-12, atol=0)
    assert relative_error(found[1], expected[1]) < 1e-8


@pytest.mark.parametrize(
    ("network", "loss", "steps"),
    [("conv", "kd", 1), ("conv", "kd", 2), ("conv", "pld", 1), ("conv", "pld", 2), ("spectral", "kd", 1)],
)
def test_the_cotangents_against_differences(network: str, loss: str, steps: int) -> None:
    student, teacher = networks(network)
    rows, quiz = batches(steps), batches(1, seed=1)
    said = [teacher(batch["input"]).detach() for batch in rows]
    _, cotangents = look_ahead(student, of(loss), rows, said, quiz, 0.3)
    random = torch.Generator().manual_seed(0)
    for place in range(steps):
        v = torch.randn(said[place].shape, generator=random, dtype=torch.float64)
        around = []
        for sign in (1, -1):
            moved = [z + sign * 1e-4 * v if k == place else z for k, z in enumerate(said)]
            around.append(look_ahead(student, of(loss), rows, moved, quiz, 0.3)[0])
        difference = (around[0] - around[1]) / 2e-4
        assert_close((cotangents[place] * v).sum(), difference, rtol=1e-5, atol=1e-12)


def test_by_hand() -> None:
    """A linear student of two classes and one input, 1, that starts at 0; the teacher says 1 and -1."""
    student = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(student.weight)
    row = {"input": torch.ones(1, 1, dtype=torch.float64), "target": torch.tensor([0])}
    said = torch.tensor([[1.0, -1.0]], dtype=torch.float64)

    p = 1 / (1 + exp(-2))  # of the teacher's first class
    weight = 0.1 * (p - 0.5)  # after a step of 0.1
    q = 1 / (1 + exp(-2 * weight))
    expected = -log(q)
    slope = 0.1 * p * (1 - p) * 2 * -(1 - q)  # lambda (diag p - p p') u, where u = (-(1 - q), 1 - q)
    assert (round(expected, 8), round(slope, 8)) == (0.65579233, -0.01009974)

    def kd(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return luce.kd_loss(student, teacher, temperature=1.0)

    quiz_loss, cotangents = look_ahead(student, kd, [row], [said], [row], 0.1)
    assert_close(quiz_loss.item(), expected)
    assert_close(cotangents[0], torch.tensor([[slope, -slope]], dtype=torch.float64))


def test_in_closed_form() -> None:
    """lambda T^2 alpha / (T^2 B) (diag p - p p') u for alpha T^2 times the mean KL divergence at T."""
    student, teacher = networks("mlp")
    (batch,), quiz = batches(1), batches(2, seed=1)
    said = teacher(batch["input"]).detach()
    _, cotangents = look_ahead(student, of("kd"), [batch], [said], quiz, 0.2)

    place = Place.of(student)
    slope, _ = slope_on_logits(of("kd"), place.forward(student, batch["input"])[0], said, batch)
    moved = copy.deepcopy(student)
    moved(batch["input"]).backward(slope.detach())
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter -= 0.2 * parameter.grad
            parameter.grad = None
    (sum(F.cross_entropy(moved(b["input"]), b["target"]) for b in quiz) / 2).backward()
    u = derivative_along(student, place, [p.grad for p in moved.parameters()], batch["input"])
    p = (said / 4).softmax(-1)
    assert_close(cotangents[0], 0.2 * 0.9 / 7 * (p * u - p * (p * u).sum(-1, keepdim=True)))


@pytest.mark.parametrize("steps", [1, 2])
def test_no_teacher_in_the_loss_and_no_step_give_exactly_nothing(steps: int) -> None:
    student, teacher = networks("conv")
    rows, quiz = batches(steps), batches(1, seed=1)
    said = [teacher(batch["input"]) for batch in rows]
    alone = WeightedSum({"task": (1.0, CrossEntropyLoss()), "kd": (0.0, KDLoss())})
    _, cotangents = look_ahead(
        student, lambda s, t, batch: alone(s, t, batch["target"])["loss"], rows, said, quiz, 0.3
    )
    assert not any(cotangent.any() for cotangent in cotangents)
    _, cotangents = look_ahead(student, of("kd"), rows, said, quiz, 0.0)
    assert not any(cotangent.any() for cotangent in cotangents)


@pytest.mark.parametrize("network", NETWORKS)
def test_student_and_random_states_stay_as_they_were(network: str) -> None:
    student, teacher = networks(network)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    tensors = [*student.named_parameters(remove_duplicate=False), *student.named_buffers()]
    modes = {module: module.training for module in student.modules()}
    next(student.modules()).register_forward_hook(lambda *_: None)
    rows = batches(2)
    said = [teacher(batch["input"]) for batch in rows]
    state = torch.get_rng_state()
    look_ahead(student, of("kd"), rows, said, batches(2, seed=1), 0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert modes == {module: module.training for module in student.modules()}
    now = [*student.named_parameters(remove_duplicate=False), *student.named_buffers()]
    assert [(name, id(value)) for name, value in now] == [(name, id(value)) for name, value in tensors]


def test_parameters_that_stand_still_or_take_no_part() -> None:
    """Frozen ones do not move, and one that nothing depends on is no error."""
    student, teacher = networks("mlp")
    student[1].requires_grad_(False)
    student.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    arguments = student, teacher, of("kd"), batches(2), batches(1, seed=1), 0.3
    _, found = by_looking_ahead(*arguments)

    thawed = copy.deepcopy(student)
    del thawed.idle
    hidden = nn.Sequential(*thawed[:3]).requires_grad_(False)
    deep = [{**b, "input": hidden(b["input"])} for b in (*arguments[3], *arguments[4])]
    said = [teacher(b["input"]) for b in arguments[3]]
    _, cotangents = look_ahead(thawed[3], of("kd"), deep[:2], said, deep[2:], 0.3)
    expected = torch.autograd.grad(said, list(teacher.parameters()), cotangents)
    assert relative_error(found, expected) < 1e-12


def test_a_small_step_of_the_teacher_lowers_the_quiz_loss() -> None:
    student, teacher = networks("conv")
    arguments = student, teacher, of("kd"), batches(1), batches(2, seed=1), 0.3
    before, gradient = by_looking_ahead(*arguments)
    norm = sum(g.square().sum() for g in gradient).sqrt()
    with torch.no_grad():
        for parameter, slope in zip(teacher.parameters(), gradient, strict=True):
            parameter -= 0.05 * slope / norm
    after, _ = by_looking_ahead(*arguments)
    assert after < before
