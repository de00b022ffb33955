"""The training loop against arithmetic and hand-written loops."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from luce import CrossEntropyLoss, CTKDLoss, KDLoss, PLDLoss, WeightedSum, data
from luce.data import Examples
from luce.errors import MissingExtra, UserError
from luce.methods import LogitMethod, Method, TwoViewMethod
from luce.models import Classifier
from luce.signals import CachedTeacher, LiveTeacher, Teacher
from luce.training import Fit, TrainingError, TrainingOptions, fit
from luce.training.engine import BestEpoch
from luce.training.session import Session, learning_rate

FEATURES, CLASSES = 6, 5


def examples(rows: int, labelled: int | None = None) -> Examples:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES, (rows,), generator=generator)
    if labelled is not None:
        targets[labelled:] = data.UNLABELLED
    inputs = torch.randn(rows, FEATURES, generator=generator)
    return Examples(TensorDataset(inputs, targets), torch.arange(rows))


def linear(seed: int = 7) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES)


def train(
    student: nn.Module,
    rows: Examples,
    loss: Any = None,
    validation: Examples | None = None,
    teacher: nn.Module | None = None,
    **options: Any,
) -> Fit:
    settings = {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    return fit(
        Classifier(student),
        LogitMethod(PLDLoss() if loss is None else loss),
        rows,
        validation,
        teacher=LiveTeacher(linear(11) if teacher is None else teacher),
        options=TrainingOptions(**{"schedule": "constant", "lr": 0.5, **settings, **options}),
    )


def order_of(rows: Examples, epoch: int, seed: int = 0) -> list[int]:
    sampler = data.EpochSampler(len(rows), seed)
    sampler.set_epoch(epoch)
    return list(sampler)


# Gradient accumulation, clipping, averaging -----------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [PLDLoss(), KDLoss(temperature=4.0), CrossEntropyLoss()], ids=["PLD", "KD", "CE"]
)
@pytest.mark.parametrize("rows", [24, 32, 30, 26])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_three_micro_batches_equal_one_batch(loss: nn.Module, rows: int, optimizer: str) -> None:
    """Also where the last step of an epoch has fewer micro-batches, and the last of them fewer rows."""
    students = [linear(), linear()]
    fits = [
        train(student, examples(rows), loss, epochs=2, optimizer=optimizer, lr=0.1, **batches)
        for student, batches in zip(
            students, [{"batch_size": 12}, {"batch_size": 4, "accumulate": 3}], strict=True
        )
    ]
    assert fits[0].history[-1]["step"] == fits[1].history[-1]["step"] == 2 * math.ceil(rows / 12)
    torch.testing.assert_close(students[0].weight, students[1].weight, rtol=1e-5, atol=1e-6)
    assert (students[0].weight - linear().weight).abs().max() > 0.01


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_clipped_by_their_norm_over_a_whole_step(accumulate: int) -> None:
    student = linear()
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
    train(student, examples(16), batch_size=16 // accumulate, accumulate=accumulate, lr=2.0, clip_norm=0.01)
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert (after - before).norm().item() == pytest.approx(2.0 * 0.01, rel=1e-3)


def test_a_small_gradient_is_not_clipped() -> None:
    students = [linear(), linear()]
    train(students[0], examples(16), clip_norm=1e3)
    train(students[1], examples(16))
    assert torch.equal(students[0].weight, students[1].weight)


def test_one_step_is_the_step_that_pytorch_takes() -> None:
    rows, student, teacher, mine = examples(8), linear(), linear(11), linear()
    train(student, rows, KDLoss(temperature=2.0), teacher=teacher, lr=0.3, weight_decay=0.1)
    order = order_of(rows, epoch=1)
    inputs = rows.batch(order)["input"]
    log_p, log_q = (mine(inputs) / 2).log_softmax(-1), (teacher(inputs) / 2).log_softmax(-1)
    (4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()).backward()
    with torch.no_grad():
        expected = mine.weight - 0.3 * (mine.weight.grad + 0.1 * mine.weight)
    torch.testing.assert_close(student.weight, expected)


class WithWeights(LogitMethod):
    """Notes the weights of the student before each batch."""

    def __init__(self, loss: Any) -> None:
        super().__init__(loss)
        self.seen: list[dict[str, Tensor]] = []

    def step(self, student: nn.Module, batch: Any, signal: Any) -> dict[str, Tensor]:
        assert student.training
        self.seen.append({name: value.clone() for name, value in student.state_dict().items()})
        return super().step(student, batch, signal)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_average_of_the_weights_is_the_hand_written_one(accumulate: int) -> None:
    body = nn.Sequential(nn.BatchNorm1d(FEATURES), linear())
    student, method = Classifier(body), WithWeights(PLDLoss())
    options = TrainingOptions(epochs=3, batch_size=4, accumulate=accumulate, ema=0.7, lr=0.1)
    rows = examples(20)  # 5 batches an epoch: with 3 to a step, steps of 3 and 2
    fitted = fit(student, method, rows, teacher=LiveTeacher(linear(11)), options=options)

    ends = [b for b in range(1, 16) if (b % 5) % accumulate == 0 or b % 5 == 0]
    after = [*method.seen, student.state_dict()]
    assert fitted.history[-1]["step"] == len(ends)
    for name in ("body.1.weight", "body.1.bias", "body.0.running_mean", "body.0.running_var"):
        average = after[ends[0]][name].double()
        for end in ends[1:]:
            average = 0.7 * average + 0.3 * after[end][name].double()
        torch.testing.assert_close(fitted.student.state_dict()[name].double(), average, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(fitted.student.state_dict()[name], student.state_dict()[name])


def test_validation_and_export_see_the_average() -> None:
    rows, check = examples(40), examples(25)
    fitted = train(linear(), rows, validation=check, ema=0.9, epochs=3)
    inputs = check.batch(range(25))
    accuracy = (fitted.student(inputs["input"]).argmax(-1) == inputs["target"]).float().mean()
    assert fitted.history[-1]["validation"]["accuracy"] == pytest.approx(accuracy.item())
    last = train(linear(), rows, ema=0.9, epochs=3)
    for name, value in last.student.body.state_dict().items():
        assert torch.equal(last.best_weights[name], value)


# Schedules --------------------------------------------------------------------------------------------------


def test_the_cosine_schedule_with_warm_up() -> None:
    factor = learning_rate(TrainingOptions(epochs=4, warmup_epochs=0.5), steps_per_epoch=8)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 32):
        assert factor(step) == pytest.approx((1 + math.cos(math.pi * (step - 4) / 28)) / 2)
    assert factor(4) == 1
    assert factor(18) == pytest.approx(0.5)
    assert factor(32) == pytest.approx(0)


def test_the_step_schedule() -> None:
    factor = learning_rate(
        TrainingOptions(epochs=6, schedule="step", milestones=[2, 4], gamma=0.1), steps_per_epoch=3
    )
    assert [factor(step) for step in range(18)] == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 6)


def test_the_constant_schedule_with_warm_up() -> None:
    factor = learning_rate(TrainingOptions(epochs=6, schedule="constant", warmup_epochs=1), steps_per_epoch=5)
    assert [factor(step) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


class Offset(nn.Module):
    """Logits that are one number, so that the mean of the logits has the gradient 1."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.offset.expand(len(inputs), CLASSES)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_descends_by_the_scheduled_rate(accumulate: int) -> None:
    method = WithWeights(lambda student_logits, teacher_logits, target: student_logits.mean())
    options = TrainingOptions(
        epochs=3,
        batch_size=8,
        accumulate=accumulate,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        lr=0.8,
        schedule="step",
        milestones=[2],
        gamma=0.5,
        warmup_epochs=1,
    )
    student = Classifier(Offset())
    fitted = fit(student, method, examples(30), teacher=LiveTeacher(linear(11)), options=options)
    values = [seen["body.offset"].item() for seen in method.seen[::accumulate]]
    values.append(student.body.offset.item())
    rates = [before - after for before, after in itertools.pairwise(values)]
    warm = [0.2, 0.4, 0.6, 0.8] if accumulate == 1 else [0.4, 0.8]
    assert rates == pytest.approx([*warm, *[0.8] * len(warm), *[0.4] * len(warm)])
    # What an epoch's line states is the rate of the step that comes next.
    assert [line["lr"] for line in fitted.history] == pytest.approx([0.8, 0.4, 0.4])


# Choosing an epoch, stopping early --------------------------------------------------------------------------


def test_patience_counts_epochs_without_a_better_one() -> None:
    fitted = train(linear(), examples(16), validation=examples(9), lr=1e-30, epochs=20, patience=3)
    assert len(fitted.history) == 4  # the first is the best, the next three are as good and no better
    assert fitted.best_epoch == 1


def test_without_patience_all_epochs_are_run() -> None:
    assert len(train(linear(), examples(16), validation=examples(9), lr=1e-30, epochs=7).history) == 7


def test_the_best_epoch_is_that_of_the_highest_accuracy() -> None:
    book = BestEpoch()
    verdicts = []
    for epoch, accuracy in enumerate([0.2, 0.5, 0.4, 0.6, 0.6], start=1):
        book.epoch = epoch
        verdicts.append(book.is_best({"accuracy": accuracy, "loss": 1.0}))
    assert verdicts == [True, True, False, True, False]
    assert book.best_epoch == 4
    assert book.is_best({"accuracy": 0.6, "loss": 0.9})  # of equals the one with the lower loss
    assert not book.is_best({"accuracy": 0.59, "loss": 0.1})


def test_patience_counts_from_the_best_epoch() -> None:
    book = BestEpoch(best_epoch=4)
    book.epoch = 6
    assert not book.exhausted(3)
    assert book.exhausted(2)
    assert not book.exhausted(None)


def test_the_best_weights_are_those_of_the_best_epoch() -> None:
    check = examples(60)
    fitted = train(linear(), examples(24), validation=check, epochs=6, lr=20.0)
    accuracies = [line["validation"]["accuracy"] for line in fitted.history]
    assert fitted.history[fitted.best_epoch - 1]["validation"]["accuracy"] == max(accuracies)
    student = linear()
    student.load_state_dict(fitted.best_weights)
    batch = check.batch(range(60))
    accuracy = (student(batch["input"]).argmax(-1) == batch["target"]).float().mean().item()
    assert accuracy == pytest.approx(max(accuracies))


def test_without_validation_the_last_epoch_counts() -> None:
    student = linear()
    fitted = train(student, examples(24), epochs=3)
    assert fitted.best_epoch == 3
    assert [line["validation"] for line in fitted.history] == [{}, {}, {}]
    assert torch.equal(fitted.best_weights["weight"], student.weight)


# The teacher ------------------------------------------------------------------------------------------------


class Forgetful(nn.Module):
    """A teacher that would change if it were trained, or asked in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
        )
        self.modes: set[bool] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        self.modes.add(self.training)
        assert not torch.is_grad_enabled()
        return self.layers(inputs)


def test_a_teacher_is_left_as_it_was(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Forgetful()
    for parameter in teacher.parameters():
        parameter.grad = None
    before = copy.deepcopy(teacher.state_dict())
    in_optimizer: list[Tensor] = []
    adamw = torch.optim.AdamW

    def spy(parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        in_optimizer.extend(parameters)
        return adamw(parameters, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    student = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
    fit(
        Classifier(student),
        LogitMethod(WeightedSum({"kd": (1.0, KDLoss(temperature=2.0)), "pld": (1.0, PLDLoss())})),
        examples(40),
        examples(12),
        teacher=LiveTeacher(Classifier(teacher)),
        options=TrainingOptions(epochs=3, batch_size=8, ema=0.9),
        folder=tmp_path,
    )
    assert teacher.modes == {False}
    assert not any(module.training for module in teacher.modules())
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert {id(p) for p in in_optimizer} == {id(p) for p in student.parameters()}
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == {f"body.{name}" for name in student.state_dict()}
    extra = torch.load(tmp_path / "checkpoint-3" / "luce.pt", weights_only=True)
    assert extra["best_weights"].keys() == student.state_dict().keys()
    assert not any(isinstance(value, Tensor) for value in extra["session"]["method"].values())


def test_a_method_that_needs_a_teacher_asks_for_one() -> None:
    with pytest.raises(UserError, match="expected a teacher"):
        fit(Classifier(linear()), LogitMethod(KDLoss()), examples(8), options=TrainingOptions())


def test_a_method_without_use_for_a_teacher_does_not_ask_it() -> None:
    class Silent(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise AssertionError("asked")

    train(linear(), examples(8), CrossEntropyLoss(), teacher=Silent())


def test_what_a_method_owns_is_trained_and_resumed(tmp_path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
            return (self.scale * student_logits - teacher_logits).square().mean()

    def run(epochs: int, folder) -> tuple[Scaled, Fit]:
        loss, student = Scaled(), linear()
        options = TrainingOptions(epochs=epochs, batch_size=8, lr=0.05, schedule="constant")
        fitted = fit(
            Classifier(student),
            LogitMethod(loss),
            examples(24),
            teacher=LiveTeacher(linear(11)),
            options=options,
            folder=folder,
        )
        return loss, fitted

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, fitted = run(4, tmp_path / "a")
    assert whole.scale.item() != 1
    assert fitted.best_weights.keys() == {"weight", "bias"}
    run(2, tmp_path / "b")
    resumed, _ = run(4, tmp_path / "b")
    assert torch.equal(resumed.scale, whole.scale)


# Labels and rows --------------------------------------------------------------------------------------------


class Watching(LogitMethod):
    """Notes which rows each batch held."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self.rows: list[tuple[int, int]] = []
        self.batches = 0

    def step(self, student: nn.Module, batch: Any, signal: Any) -> dict[str, Tensor]:
        self.rows += zip(batch["index"].tolist(), batch["target"].tolist(), strict=True)
        self.batches += 1
        return super().step(student, batch, signal)


def test_a_checkpoint_of_another_device_is_loaded_to_that_of_the_training() -> None:
    saved, resumed = (LogitMethod(PLDLoss(teacher_temperature="auto")) for _ in range(2))
    saved.loss.prepare(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    session = object.__new__(Session)
    session.method, session.method_optimizers = resumed, {}
    session.schedules, session.average, session.source = [], None, None
    session.accelerator = SimpleNamespace(device=torch.device("meta"))
    session.load_state_dict({"step": 3, "method": saved.state_dict()})
    assert [buffer.device.type for buffer in resumed.buffers()] == ["meta"]
    assert resumed.loss.options() == saved.loss.options()


@pytest.mark.parametrize(
    ("loss", "labelled_only"),
    [
        (CrossEntropyLoss(), True),
        (WeightedSum({"task": (1.0, CrossEntropyLoss())}), True),
        (PLDLoss(), False),
        (KDLoss(), False),
        (WeightedSum({"task": (0.1, CrossEntropyLoss()), "kd": (0.9, KDLoss())}), False),
    ],
    ids=["CE", "sum of CE", "PLD", "KD", "CE + KD"],
)
def test_all_methods_take_as_many_steps_and_see_the_rows_they_can_use(
    loss: nn.Module, labelled_only: bool
) -> None:
    method, rows = Watching(loss), examples(40, labelled=6)
    fitted = fit(
        Classifier(linear()),
        method,
        rows,
        teacher=LiveTeacher(linear(11)),
        options=TrainingOptions(epochs=2, batch_size=8),
    )
    assert fitted.history[-1]["step"] == method.batches == 2 * 5
    assert len(method.rows) == 80
    if labelled_only:
        assert {index for index, _ in method.rows} == set(range(6))
        assert {target for _, target in method.rows} == set(rows.targets[:6].tolist())
        first_epoch = [index for index, _ in method.rows[:40]]
        assert {first_epoch.count(index) for index in range(6)} == {6, 7}  # 40 rows of 6
    else:
        assert [sorted(i for i, _ in half) for half in (method.rows[:40], method.rows[40:])] == [
            list(range(40))
        ] * 2
        assert method.rows[:40] != method.rows[40:]


def test_augmentation_comes_before_teacher_and_student_alike() -> None:
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    def spy(name: str, body: nn.Linear) -> nn.Module:
        body.register_forward_hook(lambda module, inputs, output: seen[name].append(inputs[0].clone()))
        return body

    fit(
        Classifier(spy("student", linear())),
        LogitMethod(PLDLoss()),
        examples(16),
        teacher=LiveTeacher(Classifier(spy("teacher", linear(11)))),
        options=TrainingOptions(epochs=1, batch_size=8),
        augment=lambda inputs: inputs + torch.rand_like(inputs),
    )
    assert len(seen["student"]) == len(seen["teacher"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def two_views(method: Method, teacher: Teacher | None, **options: Any) -> Fit:
    return fit(
        Classifier(linear()),
        method,
        examples(16),
        teacher=teacher,
        options=TrainingOptions(
            epochs=1, batch_size=8, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.5
        ),
        **options,
    )


def test_student_and_teacher_are_asked_about_both_views() -> None:
    seen: list[Tensor] = []
    body = linear(11)
    body.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    loss = KDLoss(temperature=2.0)
    two = two_views(
        TwoViewMethod(LogitMethod(loss)), LiveTeacher(Classifier(body)), strong_augment=lambda x: 2 * x + 1
    )
    # Student's and teacher's answers to the first view, to the second, and again in the second batch.
    first, second, third, fourth = seen
    assert torch.equal(second, 2 * first + 1)
    assert torch.equal(fourth, 2 * third + 1)

    by_hand, teacher = linear(), linear(11)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for step, x in enumerate((first, third)):
        optimizer.param_groups[0]["lr"] = 0.5 * (0.5 * (1 + math.cos(math.pi * step / 2)))
        value = sum(loss(by_hand(view), teacher(view).detach()) for view in (x, 2 * x + 1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    torch.testing.assert_close(two.student.body.weight, by_hand.weight)


def test_two_views_need_a_second_one_and_a_teacher_that_sees_it() -> None:
    live, method = LiveTeacher(linear(11)), LogitMethod(KDLoss())
    for wrong, options in ((TwoViewMethod(method), {}), (method, {"strong_augment": torch.neg})):
        with pytest.raises(UserError, match="expected `strong_augment` for a method of two views"):
            two_views(wrong, live, **options)
    remembered = CachedTeacher(torch.zeros(16, CLASSES))
    with pytest.raises(UserError, match="answers a second view, got one with cached outputs"):
        two_views(TwoViewMethod(method), remembered, strong_augment=torch.neg)
    alone = TwoViewMethod(LogitMethod(CrossEntropyLoss()))  # asks nobody
    assert two_views(alone, remembered, strong_augment=torch.neg).history


# Precision, devices, several trainings in one process -------------------------------------------------------


def test_bf16_computes_in_bf16_and_the_loss_in_float32() -> None:
    dtypes, losses = [], []

    def loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        value = PLDLoss()(student_logits, teacher_logits, target)
        exact = PLDLoss()(student_logits.double(), teacher_logits.double(), target)
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        losses.append(value.dtype)
        return value

    student = linear()
    student.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    fitted = train(student, examples(32), loss, examples(9), precision="bf16", epochs=2, ema=0.5)
    assert {dtype for dtype in dtypes if dtype} == {torch.bfloat16}
    assert set(losses) == {torch.float32}
    assert student.weight.dtype == torch.float32
    assert fitted.history[1]["train"]["loss"] < fitted.history[0]["train"]["loss"]


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected a GPU for `training\.precision` fp16"):
        train(linear(), examples(8), precision="fp16", cpu=True)


def test_trainings_in_one_process_do_not_disturb_one_another() -> None:
    def weights(**options: Any) -> Tensor:
        student = linear()
        train(student, examples(30), epochs=2, **options)
        return student.weight.detach()

    plain = weights()
    settings: list[dict[str, Any]] = [
        {"precision": "bf16"},
        {"accumulate": 3},
        {"accumulate": 2, "precision": "bf16", "clip_norm": 0.01},
    ]
    first = [weights(**setting) for setting in settings]
    assert torch.equal(weights(), plain)
    assert all(not torch.equal(weight, plain) for weight in first)
    assert all(torch.equal(weights(**s), w) for s, w in zip(settings, first, strict=True))


def test_a_training_broken_off_does_not_disturb_the_next() -> None:
    def broken(*_: Any) -> Tensor:
        raise ZeroDivisionError

    students = [linear(), linear()]
    train(students[0], examples(30), accumulate=2, validation=examples(7))
    with pytest.raises(UserError, match="raised ZeroDivisionError"):
        train(linear(), examples(30), broken, accumulate=4, precision="bf16")
    train(students[1], examples(30), accumulate=2, validation=examples(7))
    assert torch.equal(students[0].weight, students[1].weight)


def test_evaluating_does_not_change_a_training() -> None:
    students = [nn.Sequential(nn.Dropout(0.5), linear()) for _ in range(2)]
    for student, validation in zip(students, (examples(9), None), strict=True):
        train(student, examples(30), validation=validation, epochs=3)
    assert torch.equal(students[0][1].weight, students[1][1].weight)


# What cannot go on ------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """A teacher whose answers are numbers for so many batches."""

    def __init__(self, healthy: int, poison: float) -> None:
        super().__init__()
        self.healthy, self.poison = healthy, poison

    def forward(self, inputs: Tensor) -> Tensor:
        self.healthy -= 1
        logits = inputs[:, :CLASSES].clone()
        if self.healthy < 0:
            logits[0, 0] = self.poison
        return logits


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_term_and_keeps_the_checkpoint(poison: float, tmp_path) -> None:
    loss = WeightedSum({"task": (1.0, CrossEntropyLoss()), "kd": (1.0, KDLoss())})
    student = linear()
    with pytest.raises(TrainingError) as caught:
        fit(
            Classifier(student),
            LogitMethod(loss),
            examples(24),
            teacher=LiveTeacher(Poisoned(healthy=3 * 2 + 1, poison=poison)),
            options=TrainingOptions(epochs=5, batch_size=8),
            folder=tmp_path,
        )
    message = str(caught.value)
    assert "in epoch 3" in message
    assert "`kd` is nan" in message
    assert "`task`" not in message
    assert "teacher" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (KDLoss(reduction="none"), r"one number, got one of shape \(8,\)"),
        (WeightedSum({"kd": (0.0, KDLoss())}), "got one without a gradient; give a term a weight above 0"),
        (lambda s, t, y: s.detach().sum(), "got one without a gradient.*detach nothing"),
        (CTKDLoss(classes=3), r"expected logits of `classes=3` classes, got 5"),
    ],
    ids=["not reduced", "weight 0", "detached", "refused"],
)
def test_losses_that_cannot_be_descended(loss: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(linear(), examples(8), loss)


def test_a_student_without_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="expected a student with parameters"):
        train(nn.Identity(), examples(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`training.epochs` to be at least 1, got 0"),
        ({"batch_size": 2**62}, "`training.batch_size` to be at most 2147483647, got 4611686018427387904"),
        ({"batch_size": 0}, "`training.batch_size` to be at least 1"),
        ({"accumulate": -2}, "`training.accumulate` to be at least 1"),
        ({"checkpoint_every": 0}, "`training.checkpoint_every` to be at least 1"),
        ({"lr": 0.0}, "`training.lr` above 0, got 0.0"),
        ({"lr": math.nan}, "`training.lr` above 0, got nan"),
        ({"lr": math.inf}, "`training.lr` above 0, got inf"),
        ({"gamma": 0.0}, "`training.gamma` above 0"),
        ({"clip_norm": -1.0}, "`training.clip_norm` above 0"),
        ({"patience": 0}, "`training.patience` above 0"),
        ({"momentum": -0.1}, "`training.momentum` of at least 0"),
        ({"weight_decay": -1.0}, "`training.weight_decay` of at least 0"),
        ({"seed": -1}, "`training.seed` in 0 .."),
        ({"seed": 2**32}, "`training.seed` in 0 .."),
        ({"ema": 1.0}, "`training.ema` between 0 and 1"),
        ({"warmup_epochs": 30.0}, "`training.warmup_epochs` in .0, 30., fewer than the epochs, got 30.0"),
        ({"warmup_epochs": -1.0}, "`training.warmup_epochs` in"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingOptions(**options)


# Trackers ---------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_epoch(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted = fit(
        Classifier(linear()),
        LogitMethod(PLDLoss()),
        examples(24),
        examples(9),
        teacher=LiveTeacher(linear(11)),
        options=TrainingOptions(epochs=3, batch_size=8, trackers=["tensorboard"]),
        folder=tmp_path,
    )
    (events,) = {
        path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "luce"
    }
    record = EventAccumulator(str(events)).Reload()
    losses = record.Scalars("train/loss")
    assert [event.step for event in losses] == [3, 6, 9]
    assert [event.value for event in losses] == pytest.approx([x["train"]["loss"] for x in fitted.history])
    assert len(record.Scalars("validation/accuracy")) == 3


def test_an_unknown_tracker_is_refused(tmp_path) -> None:
    options = TrainingOptions(trackers=["tensorbord"])
    with pytest.raises(UserError, match=r"unknown tracker `tensorbord`; did you mean `tensorboard`\?"):
        fit(
            Classifier(linear()),
            LogitMethod(CrossEntropyLoss()),
            examples(8),
            options=options,
            folder=tmp_path,
        )
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, hide: Callable[[str], None]) -> None:
    hide("wandb")
    options = TrainingOptions(trackers=["wandb"])
    with pytest.raises(MissingExtra, match=r"`wandb` could not be imported .*pip install 'luce\[track\]'"):
        fit(
            Classifier(linear()),
            LogitMethod(CrossEntropyLoss()),
            examples(8),
            options=options,
            folder=tmp_path,
        )


def test_a_tracker_needs_a_folder() -> None:
    with pytest.raises(UserError, match="expected a folder to track the training in"):
        train(linear(), examples(8), trackers=["tensorboard"])
