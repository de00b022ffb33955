"""MetaDistil: what a round does to teacher and student, and what it leaves as it was."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import luce
from luce import CrossEntropyLoss, KDLoss, PLDLoss, WeightedSum
from luce.errors import UserError
from luce.losses import teacher_gradient
from luce.methods import FeatureMethod, LogitMethod, MetaDistil, Method
from luce.methods.lookahead import look_ahead
from luce.signals import CachedTeacher, LiveTeacher

CLASSES = 4
KD = {"task": (0.1, CrossEntropyLoss()), "kd": (0.9, KDLoss(temperature=4.0))}


def network(width: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(width * 36, CLASSES),
    )


def networks(seed: int = 3) -> tuple[nn.Module, LiveTeacher]:
    torch.manual_seed(seed)
    return network().train(), LiveTeacher(network(5))


def batches(count: int, seed: int = 0, rows: int = 8) -> list[dict[str, Tensor]]:
    """Rows that can be told apart by the place of their bright quarter."""
    random = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        target = torch.randint(CLASSES, (rows,), generator=random)
        pixels = 0.5 * torch.randn(rows, 1, 6, 6, generator=random)
        for row, label in enumerate(target.tolist()):
            y, x = 3 * (label // 2), 3 * (label % 2)
            pixels[row, 0, y : y + 3, x : x + 3] += 1
        result.append({"input": pixels, "target": target, "index": torch.arange(rows)})
    return result


def taught(teacher: LiveTeacher, batch: dict[str, Tensor], epochs: int = 60) -> LiveTeacher:
    """A teacher that knows its rows."""
    optimizer = torch.optim.AdamW(teacher.network.parameters(), lr=0.01)
    teacher.network.train()
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher.network(batch["input"]), batch["target"]).backward()
        optimizer.step()
    teacher.network.eval().zero_grad()
    return teacher


def built(student: nn.Module, teacher: LiveTeacher, loss: Any = None, **options: Any) -> MetaDistil:
    method = MetaDistil(LogitMethod(loss or WeightedSum(KD)), **options)
    sample = batches(1, seed=9, rows=1)[0]
    method.build(student, teacher, sample, sample)
    return method.train()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if value is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def train(
    student: nn.Module,
    method: Method,
    optimizer: str = "sgd",
    rounds: int = 4,
    per_round: int = 1,
    teacher: LiveTeacher | None = None,
    seed: int = 0,
) -> list[dict[str, float]]:
    """What the training loop does: rounds of `per_round` steps, each with one quiz batch."""
    descent = OPTIMIZERS[optimizer](student.parameters())
    rows, quiz = batches(rounds * per_round, seed=seed), batches(rounds, seed=seed + 100)
    lines = []
    torch.manual_seed(7)
    for count in range(rounds):
        here = rows[count * per_round : (count + 1) * per_round]
        line = {}
        if isinstance(method, MetaDistil):
            line = method.before_round(student, here, quiz[count : count + 1], descent.param_groups[0]["lr"])
        for batch in here:
            terms = method.step(student, batch, None if teacher is None else teacher.signal(batch))
            terms["loss"].backward()
            descent.step()
            descent.zero_grad()
        lines.append({name: value.item() for name, value in {**line, **terms}.items()})
    return lines


# A round ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("per_round", [1, 3])
def test_a_teacher_that_does_not_learn_is_the_plain_method_bit_for_bit(
    per_round: int, optimizer: str
) -> None:
    student, teacher = networks()
    plain = copy.deepcopy(student)
    options = {"per_round": per_round, "optimizer": optimizer}
    method = built(student, teacher, teacher_lr=0.0, batches_per_round=per_round)
    lines = train(student, method, **options)
    expected = train(plain, LogitMethod(WeightedSum(KD)), teacher=teacher, **options)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert same(state(student), state(plain))
    assert all(line["teacher_gradient"] > 0 for line in lines)  # nothing was left out


@pytest.mark.parametrize("per_round", [1, 2])
def test_a_round_leaves_the_student_and_the_random_states_alone(per_round: int) -> None:
    student, teacher = networks()
    method = built(student, teacher, batches_per_round=per_round, teacher_lr=0.01)
    before, drawn, modes = state(student), torch.get_rng_state(), [m.training for m in student.modules()]
    method.before_round(student, batches(per_round), batches(2, seed=1), 0.1)
    assert same(state(student), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in (*student.parameters(), *method.parameters()))
    assert [module.training for module in student.modules()] == modes


@pytest.mark.parametrize("clip_norm", [None, 0.001])
def test_the_teachers_step_is_the_gradient_of_the_quiz_loss(clip_norm: float | None) -> None:
    student, teacher = networks()
    options = {"teacher_lr": 0.5, "teacher_weight_decay": 0.0, "pilot_rate": 2.0, "max_drop": 1.0}
    method = built(student, teacher, clip_norm=clip_norm, **options)
    rows, quiz = batches(1), batches(2, seed=1)
    line = method.before_round(student, rows, quiz, 0.1)

    twin = copy.deepcopy(teacher.network)
    said = twin(rows[0]["input"])
    quiz_loss, cotangents = look_ahead(
        student, lambda s, t, b: WeightedSum(KD)(s, t, b["target"])["loss"], rows, [said], quiz, 0.2
    )
    gradient = torch.autograd.grad(said, list(twin.parameters()), cotangents)
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()
    factor = 1 if clip_norm is None else clip_norm / norm
    assert norm > 0.001
    assert_close(line["teacher_gradient"], norm)
    assert_close(line["quiz_loss"], quiz_loss)
    for new, old, slope in zip(method.teacher.parameters(), twin.parameters(), gradient, strict=True):
        assert_close(new, old - 0.5 * factor * slope)


def test_the_real_step_follows_the_teacher_as_it_has_become() -> None:
    student, teacher = networks()
    method = built(student, teacher, teacher_lr=1.0, max_drop=1.0)
    (batch,), quiz = batches(1), batches(1, seed=1)
    method.before_round(student, [batch], quiz, 0.5)
    now, then = method.teacher(batch["input"]), teacher.network(batch["input"])
    assert not torch.equal(now, then)
    torch.manual_seed(0)
    found = method.step(student, batch, None)
    torch.manual_seed(0)
    assert_close(found, WeightedSum(KD)(student(batch["input"]), now, batch["target"]))
    found["loss"].backward()
    assert all(parameter.grad is None for parameter in method.parameters())


@pytest.mark.parametrize(("rows", "seen"), [(1.0, [8, 8, 8]), (0.5, [4, 4, 4]), (0.01, [2, 2, 2])])
def test_a_round_looks_at_a_part_of_its_rows(rows: float, seen: list[int]) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)), networks()[1]
    method = built(student, teacher, rows=rows)
    asked: list[int] = []
    student.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    train(student, method, rounds=1)
    assert asked == [*seen, 8]  # pilot, quiz, the derivative, and the student's own step


def test_the_given_teacher_and_all_statistics_of_the_copy_stay() -> None:
    student, teacher = networks()
    given = state(teacher.network)
    method = built(student, teacher, teacher_lr=0.1, max_drop=1.0)
    train(student, method)
    assert not any(module.training for module in method.teacher.modules())
    assert same(state(teacher.network), given)
    now = state(method.teacher)
    for name, value in teacher.network.named_buffers():
        assert torch.equal(now[name], value)
    for name, value in teacher.network.named_parameters():
        assert not torch.equal(now[name], value), name
    assert list(method.co_trained) == list(method.optimizers) == ["teacher"]
    held = [p for group in method.optimizers["teacher"].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in method.teacher.parameters()}
    assert {id(p) for p in method.parameters()} == {id(p) for p in held}  # the original is no part of it


def test_before_its_epoch_the_teacher_rests() -> None:
    student, teacher = networks()
    method = built(student, teacher, teacher_from_epoch=3)
    before = state(method.teacher)
    calls = []
    student.register_forward_hook(lambda *_: calls.append(1))
    for epoch, passes in ((2, 1), (3, 4)):
        calls.clear()
        method.set_epoch(epoch)
        lines = train(student, method, rounds=1)
        assert len(calls) == passes
        assert ("quiz_loss" in lines[0]) == (epoch == 3) == (not same(state(method.teacher), before))


def test_the_teacher_learns_to_lower_the_quiz_loss() -> None:
    """Through many rounds from the same student: only the teacher changes."""
    student, teacher = networks()
    method = built(student, teacher, teacher_lr=0.05, clip_norm=None, max_drop=1.0)
    rows, quiz = batches(1), batches(1, seed=1, rows=32)
    losses = [method.before_round(student, rows, quiz, 0.5)["quiz_loss"].item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.01
    assert sum(b < a for a, b in itertools.pairwise(losses)) > 25


def test_a_run_goes_on_where_its_state_was_saved() -> None:
    student, teacher = networks()
    method = built(student, teacher, teacher_lr=0.05)
    train(student, method, rounds=5)
    saved = copy.deepcopy(
        [student.state_dict(), method.state_dict(), *(o.state_dict() for o in method.optimizers.values())]
    )
    assert not any("original" in name for name in saved[1])
    expected = train(student, method, rounds=3, seed=1)

    other, _ = networks(seed=8)
    again = built(other, teacher, teacher_lr=0.05)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    again.optimizers["teacher"].load_state_dict(saved[2])
    assert train(other, again, rounds=3, seed=1) == expected
    assert same(state(again.teacher), state(method.teacher))


# The guard --------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_destroys_the_teacher_does_not_ruin_the_run() -> None:
    student, teacher = networks()
    taught(teacher, batches(1, seed=50, rows=64)[0])
    test = batches(1, seed=51, rows=256)[0]

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return (network.eval()(test["input"]).argmax(-1) == test["target"]).float().mean().item()

    assert accuracy(teacher.network) > 0.9
    figures = {}
    for max_drop in (0.02, 1.0):
        pupil = copy.deepcopy(student)
        # Adam's first step moves each weight by the learning rate, however small the gradient is.
        options = {"teacher_optimizer": "adamw", "teacher_lr": 10.0}
        method = built(pupil, teacher, max_drop=max_drop, **options)
        lines = train(pupil, method, rounds=60)
        figures[max_drop] = lines[-1]["teacher_restored"], accuracy(method.teacher), accuracy(pupil)
    restored, of_teacher, of_pupil = figures[0.02]
    assert restored >= 2
    assert of_teacher > 0.85
    assert of_pupil > 0.85
    assert figures[1.0][0] == 0
    assert figures[1.0][1] < 0.6


def test_a_restored_teacher_is_what_it_was_and_learns_more_slowly() -> None:
    student, teacher = networks()
    taught(teacher, batches(1, seed=50, rows=64)[0])
    method = built(student, teacher, teacher_optimizer="adamw", teacher_lr=10.0)
    rows, quiz = batches(1), batches(1, seed=1, rows=64)
    line = method.before_round(student, rows, quiz, 0.1)
    assert line["teacher_restored"] == 1
    assert line["teacher_drift"] == 0
    assert same(state(method.teacher), state(teacher.network))
    assert not method.optimizers["teacher"].state

    method.before_round(student, rows, quiz, 0.1)  # at a rate of 1, and so on, down to one that does no harm
    assert method.optimizers["teacher"].param_groups[0]["lr"] == 10.0  # the schedule's own is left alone
    while method.record["rounds"] == 0:
        method.before_round(student, rows, quiz, 0.1)
    assert 2 <= method.record["restored"] <= 6
    step = max(
        (new - old).abs().max()
        for new, old in zip(method.teacher.parameters(), teacher.network.parameters(), strict=True)
    )
    assert_close(step, torch.tensor(10.0 * 0.1 ** method.record["restored"]), rtol=0.1, atol=0)


def test_a_teacher_that_is_no_number_is_restored_at_once() -> None:
    student, teacher = networks()
    method = built(student, teacher, teacher_lr=1e38, clip_norm=None, max_drop=1.0)
    line = method.before_round(student, batches(1), batches(1, seed=1), 10.0)
    assert line["teacher_restored"] == 1
    assert all(value.isfinite() for value in line.values())


def test_chance_is_no_reason_to_restore() -> None:
    """One row of eight lost is more than two percent, and may be nothing."""
    student, teacher = networks()
    method = built(student, teacher)
    quiz = batches(1, seed=1)
    answers = teacher.network(quiz[0]["input"]).argmax(-1)
    quiz[0]["target"] = answers  # the original has all of them right

    def lose(count: int) -> None:
        method.record = {**method.record, "rounds": 0.0}
        wrong = torch.zeros(8, CLASSES)
        wrong[range(8), [(a + 1) % CLASSES if i < count else a for i, a in enumerate(answers.tolist())]] = 9
        method.teacher.forward = lambda _: wrong  # type: ignore[method-assign]
        method._guard(quiz)

    lose(1)
    assert method.record["restored"] == 0
    assert method.record["drift"] > 0
    for _ in range(4):  # but one of eight, again and again, is
        lose(1)
        assert method.record["restored"] == 0
    for _ in range(20):
        lose(1)
    assert method.record["restored"] >= 1
    method.record = dict.fromkeys(method.record, 0.0)
    lose(8)
    assert method.record["restored"] == 1


def test_comparisons_grow_rare() -> None:
    student, teacher = networks()
    method = built(student, teacher)
    asked = []

    def compare(quiz: object) -> dict[str, float]:
        asked.append(method.record["rounds"])
        return {"rows": 1.0, "lost": 0.0, "gained": 0.0, "drift": 0.0}

    method._compare = compare  # type: ignore[method-assign]
    for _ in range(50):
        method._guard([])
    assert asked == [1, 2, 4, 8, 16, 32, 48]


# Networks and precisions ------------------------------------------------------------------------------------


def test_under_autocast_the_taught_teacher_is_not_a_memory_of_the_old_one() -> None:
    student, teacher = networks()
    method = built(student, teacher, teacher_lr=10.0, clip_norm=None, max_drop=1.0)
    (batch,), quiz = batches(1), batches(1, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        line = method.before_round(student, [batch], quiz, 1.0)
        with torch.no_grad():
            in_the_round = method.teacher(batch["input"])
        terms = method.step(student, batch, None)
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        afresh, before = method.teacher(batch["input"]), teacher.network(batch["input"])
    assert torch.equal(in_the_round, afresh)
    assert not torch.equal(afresh, before)
    assert line["teacher_gradient"] > 0


def test_a_small_bert() -> None:
    """Its attention is a fused kernel, which has no derivative in forward mode, with dropout inside."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")

    class Text(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
            config = transformers.BertConfig(
                vocab_size=40, num_hidden_layers=layers, num_labels=CLASSES, **sizes
            )
            self.body = transformers.BertForSequenceClassification(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(input_ids=ids, attention_mask=(ids != 0).long()).logits

    torch.manual_seed(0)
    student, teacher = Text(1).double().train(), LiveTeacher(Text(2).double())
    random = torch.Generator().manual_seed(0)
    rows = [
        {
            "input": torch.randint(40, (6, 9), generator=random),
            "target": torch.randint(CLASSES, (6,), generator=random),
        }
        for _ in range(2)
    ]
    method = MetaDistil(LogitMethod(WeightedSum(KD)), clip_norm=None)
    method.build(student, teacher, rows[0], rows[0])
    torch.manual_seed(1)
    said = method.teacher(rows[0]["input"])
    _, cotangents = look_ahead(student, method._loss, rows[:1], [said], rows[1:], 0.5)

    functional, parameters = torch.func.functional_call, dict(student.named_parameters())
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_only, teacher_gradient():
        value = method._loss(student(rows[0]["input"]), said, rows[0])
        gradient = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
        moved = {n: p - 0.5 * g for (n, p), g in zip(parameters.items(), gradient, strict=True)}
        answer = functional(student.eval(), moved, (rows[1]["input"],))
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(answer, rows[1]["target"]), said)
    assert (cotangents[0] - expected).norm() / expected.norm() < 1e-8


# What is refused --------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """An operation without a derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * slope


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.last(x.flatten(1)))


def test_teachers_that_cannot_be_trained() -> None:
    student, _ = networks()
    sample = batches(1)[0]
    method = MetaDistil(LogitMethod(KDLoss()))
    with pytest.raises(UserError, match="got none; add `teacher`"):
        method.build(student, None, sample, sample)
    with pytest.raises(UserError, match=r"set `teacher\.cache_outputs: false`"):
        method.build(student, CachedTeacher(torch.zeros(8, CLASSES)), sample, sample)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (luce.ListMLELoss(), "changes smoothly with the teacher's logits"),
        (WeightedSum({"task": (1.0, CrossEntropyLoss()), "kd": (0.0, KDLoss())}), "changes smoothly"),
        (lambda s, t, y: luce.kd_loss(s, t.detach()), "changes smoothly"),
        (luce.RankDistilLoss(), "got RankDistil, which draws rankings"),
        (luce.CTKDLoss(classes=CLASSES), "got CTKD with `classes`"),
    ],
    ids=["ranking", "weight-0", "detached", "drawn", "learnt"],
)
def test_losses_that_teach_the_teacher_nothing(loss: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(*networks(), loss)


def test_students_that_cannot_be_differentiated() -> None:
    _, teacher = networks()
    with pytest.raises(UserError, match="differentiated in forward mode"):
        built(Stubborn(), teacher)


@pytest.mark.parametrize(
    "part", [pytest.param(slice(0, None), marks=pytest.mark.slow), slice(0, 2)], ids=["whole", "a part"]
)
def test_compiled_students_would_tell_nothing_in_forward_mode(part: slice) -> None:
    student, teacher = networks()
    hidden = torch.compile(student[part], backend="aot_eager")
    with pytest.raises(UserError, match=r"as in backward mode .* is a part of it compiled"):
        built(nn.Sequential(hidden, *student[part.stop or len(student) :]), teacher)


def test_a_student_without_parameters_to_train() -> None:
    student, teacher = networks()
    with pytest.raises(UserError, match="a student with parameters to train, got none"):
        built(student.requires_grad_(False), teacher)


def test_methods_that_cannot_be_taught_by() -> None:
    with pytest.raises(ValueError, match="a loss that uses the teacher"):
        MetaDistil(LogitMethod(CrossEntropyLoss()))
    features = FeatureMethod(KDLoss(), {"hint": (1.0, luce.FitNetLoss(), ["0"], ["0"])})
    with pytest.raises(TypeError, match="expected a LogitMethod for MetaDistil, got FeatureMethod"):
        MetaDistil(features)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("quiz", 0.0),
        ("quiz", 1.0),
        ("quiz_batches", 0),
        ("rows", 0.0),
        ("rows", 1.5),
        ("batches_per_round", 0),
        ("pilot_rate", -1.0),
        ("teacher_lr", -1.0),
        ("teacher_lr", math.inf),
        ("teacher_weight_decay", -1.0),
        ("teacher_from_epoch", 0),
        ("teacher_optimizer", "lamb"),
        ("clip_norm", 0.0),
        ("max_drop", -0.1),
    ],
)
def test_wrong_values(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{option}`"):
        MetaDistil(LogitMethod(PLDLoss()), **{option: value})
