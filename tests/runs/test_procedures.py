"""Methods that change the training procedure: what the loop does for them, and when."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from luce import FitNetLoss, IEKDLoss, KDLoss, PLDLoss
from luce.config import parse
from luce.data import Examples
from luce.errors import UserError
from luce.losses import FeatureLoss
from luce.methods import (
    CoTrains,
    FeatureMethod,
    LogitMethod,
    LooksAhead,
    Method,
    MutualLearning,
    OptimizesManually,
    Prepares,
    StepsAfter,
    TrainingRows,
    TwoViewMethod,
)
from luce.methods.base import Batch
from luce.models import Classifier
from luce.recipes import ComparisonRecipe, Recipe, prepare
from luce.recipes.build import build_student
from luce.recipes.methods import PROCEDURES, combine_terms
from luce.runs import compare, run
from luce.runs.dry_run import dry_run
from luce.signals import LiveTeacher, Signal, Teacher
from luce.training import TrainingError, TrainingOptions, fit
from luce.training.setup import check_own_steps

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]


class Everything(Prepares, LooksAhead, StepsAfter, OptimizesManually, CoTrains):
    """Uses all that the loop offers, and takes note of it."""

    log: ClassVar[list[tuple[str, Any]]] = []  # of all instances: recipes make them

    def __init__(self, method: Method, *, ahead: int = 2, quiz: float = 0.25, spoil: float = 0.0) -> None:
        super().__init__()
        self.method, self.batches_per_round, self.held_out, self.spoil = method, ahead, quiz, spoil
        self.held_out_batches = 2

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        width = sample["input"][0].numel()
        self.beside, self.own, self.table = (nn.Linear(width, 4) for _ in range(3))
        self.table.requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.own.parameters(), lr=0.05, momentum=0.9)
        self.log.append(("build", set(rows["index"].tolist())))

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        return {"own": self.optimizer}

    @property
    def co_trained(self) -> Mapping[str, nn.Module]:
        return {"own": nn.Sequential(nn.Flatten(), self.own)}

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        optimizer = torch.optim.SGD(self.table.requires_grad_(True).parameters(), lr=0.1)
        seen = []
        for batch in rows.batches(16, epochs=2, shuffle=True):
            loss = nn.functional.cross_entropy(
                self.table(batch["input"].flatten(1)), teacher.signal(batch).logits.argmax(1)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(batch["index"])
        self.table.requires_grad_(False)
        self.log.append(("prepare", torch.cat(seen).tolist()))
        return {"table": loss.item()}

    def before_round(
        self, student: nn.Module, batches: Sequence[Batch], held_out: Sequence[Batch], learning_rate: float
    ) -> dict[str, Tensor]:
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in student.parameters())
        loss = sum(
            nn.functional.cross_entropy(self.own(b["input"].flatten(1)), b["target"]) for b in held_out
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.log.append(("before", [b["index"].tolist() for b in batches]))
        self.log.append(("quiz", [b["index"].tolist() for b in held_out]))
        self.log.append(("rates", (learning_rate, self.optimizer.param_groups[0]["lr"])))
        return {"own": loss + self.spoil}

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        self.log.append(("step", batch["index"].tolist()))
        terms = self.method.step(student, batch, signal)
        beside = nn.functional.cross_entropy(self.beside(batch["input"].flatten(1)), batch["target"])
        fixed = self.table(batch["input"].flatten(1)).square().mean()
        return {**terms, "fixed": fixed, "loss": terms["loss"] + beside + fixed}

    def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.log.append(("after", batch["index"].tolist()))
        return {"after": torch.tensor(1.0)}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    monkeypatch.setitem(PROCEDURES, "Everything", Everything)
    Everything.log.clear()
    yield Everything.log
    Everything.log.clear()


def with_everything(make_recipe: Make, **changes: Any) -> Recipe:
    options = changes.pop("options", {})
    return make_recipe(
        loss={"all": {"method": "Everything", **options}, "pld": {"loss": "PLDLoss"}}, **changes
    )


def test_the_order_of_calls(make_recipe: Make, log: list[tuple[str, Any]], tmp_path: Path) -> None:
    run(with_everything(make_recipe, training={"epochs": 2}), tmp_path / "run")
    names = [name for name, _ in log]
    # 72 rows to train on, of which 18 are for the quiz: 54 rows are 4 batches of 16, which are 2 rounds.
    a_round = ["before", "quiz", "rates", "step", "after", "step", "after"]
    assert names == ["build", "prepare", *a_round * 4]
    said = {name: [what for other, what in log if other == name] for name in set(names)}
    kept, held = said["build"][0], {index for batches in said["quiz"] for b in batches for index in b}
    assert (len(kept), len(held), kept & held) == (54, 18, set())
    assert sorted(said["prepare"][0]) == sorted([*kept, *kept])
    assert [batch for ahead in said["before"] for batch in ahead] == said["step"] == said["after"]
    assert {index for batch in said["step"] for index in batch} == kept
    assert all(len(batch) == 16 for batches in said["quiz"] for batch in batches)
    assert len({str(batches) for batches in said["quiz"]}) == 4  # other rows each time
    student_rates, own_rates = zip(*said["rates"], strict=True)
    assert own_rates == pytest.approx([5 * rate for rate in student_rates])  # 0.05 and 0.01, one schedule
    assert own_rates[0] > own_rates[1] > own_rates[2] > own_rates[3] > 0


def test_what_a_run_tells(make_recipe: Make, log: list[tuple[str, Any]], tmp_path: Path) -> None:
    result = run(with_everything(make_recipe), tmp_path / "run")
    assert result["train"].keys() == {"own", "pld", "loss", "fixed", "after"}
    assert result["train"]["after"] == 1.0
    assert result["co_trained"]["own"]["test"]["accuracy"] >= 0  # tested like the student
    assert result["prepared"].keys() == {"table"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"] == result["train"]
    assert lines[-1]["train"]["own"] < lines[0]["train"]["own"]
    json.dumps(result)


class Interrupt(BaseException):
    """What no handler of ours may swallow."""


@pytest.mark.parametrize("batch", [*(pytest.param(cut, marks=pytest.mark.slow) for cut in (1, 10)), 7])
def test_an_interrupted_run_ends_in_the_same_numbers(
    batch: int,
    make_recipe: Make,
    log: list[tuple[str, Any]],
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = with_everything(make_recipe, data={"augment": "crop_flip"}, training={"ema": 0.9})
    run(recipe, tmp_path / "whole")
    step, left = Everything.step, iter(range(batch))

    def interrupted(*arguments: Any) -> Any:
        if next(left) == batch - 1:
            raise Interrupt
        return step(*arguments)

    monkeypatch.setattr(Everything, "step", interrupted)
    with pytest.raises(Interrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.setattr(Everything, "step", step)
    log.clear()
    run(recipe, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert "prepare" not in [name for name, _ in log]  # what was learned before training is kept


def test_a_checkpoint_of_another_method_is_told_as_such(make_recipe: Make, tmp_path: Path) -> None:
    materials, options = prepare(make_recipe()), TrainingOptions(epochs=1)
    plain = LogitMethod(KDLoss())
    mutual = MutualLearning(
        LogitMethod(KDLoss()), flat_network(normalised=False), optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    arguments: dict[str, Any] = {"teacher": LiveTeacher(flat_network(normalised=False)), "options": options}
    fit(Classifier(flat_network(normalised=False)), plain, materials.train, folder=tmp_path, **arguments)
    student = Classifier(flat_network(normalised=False))
    with pytest.raises(UserError, match="checkpoint is of another method"):
        fit(student, mutual, materials.train, folder=tmp_path, **arguments)


def test_own_parts_leave_the_student_as_it_would_be(
    make_recipe: Make, log: list[tuple[str, Any]], tmp_path: Path
) -> None:
    """Preparation and the quiz draw from generators of their own."""
    outcomes = []
    for name, wanted, ahead in (("all", True, 1), ("not prepared", False, 1), ("smaller quiz", True, 2)):
        Everything.needs_preparation = wanted
        try:
            run(with_everything(make_recipe, options={"ahead": ahead}), tmp_path / name)
        finally:
            Everything.needs_preparation = True
        outcomes.append((tmp_path / name / "student-last.safetensors").read_bytes())
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_parameters_of_own_optimizers_are_not_trained_twice(
    make_recipe: Make, log: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[int]] = []
    adamw = torch.optim.AdamW

    def spy(parameters: list[nn.Parameter], **options: Any) -> Optimizer:
        held.append({id(parameter) for parameter in parameters})
        return adamw(parameters, **options)

    methods: list[Everything] = []
    build = Everything.build

    def keep(self: Everything, *arguments: Any) -> None:
        methods.append(self)
        build(self, *arguments)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    monkeypatch.setattr(Everything, "build", keep)
    run(with_everything(make_recipe), tmp_path / "run")
    (method,), (ours,) = methods, held
    assert not ours & {id(parameter) for parameter in method.own.parameters()}
    assert {id(parameter) for parameter in method.beside.parameters()} <= ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"accumulate": 2}}, "`training.accumulate: 1` for Everything.*got 2"),
        ({"options": {"quiz": 0.01}}, "no rows to hold out for Everything: cannot hold out 1 of 72 rows"),
        ({"data": {"labels_per_class": 1}}, "no rows to hold out for Everything: cannot hold out 1 of 4"),
        ({"options": {"quiz": 1.5}}, r"expected a share in \(0, 1\)"),
        ({"options": {"quiz": "some"}}, r"a share in \(0, 1\) of the labelled rows to hold out, got 'some'"),
        ({"options": {"ahead": 0}}, "`batches_per_round` of Everything to be at least 1, got 0"),
        ({"options": {"spoil": float("nan")}}, "stopped being a number in epoch 1: `own` is nan"),
        ({"data": {"augment": "crop_flip", "strong_augment": "strong"}}, "one view of each batch"),
    ],
)
def test_what_cannot_work(
    changes: dict[str, Any], message: str, make_recipe: Make, log: list[tuple[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(with_everything(make_recipe, **changes), tmp_path / "run")
    began = any(name == "before" for name, _ in log)
    assert began == isinstance(caught.value, TrainingError)


def test_batches_that_make_one_step_are_not_looked_at_ahead() -> None:
    """The loader, read ahead, tells too early of an epoch's end, where a smaller step is due."""

    class Looking(LooksAhead, LogitMethod):
        def before_round(self, *arguments: Any) -> dict[str, Tensor]:
            return {}

    method, options = Looking(KDLoss()), TrainingOptions(accumulate=3)
    check_own_steps(method, options)
    method.batches_per_round = 2
    with pytest.raises(UserError, match=r"`training.accumulate: 1` for Looking.*got 3"):
        check_own_steps(method, options)


@pytest.mark.parametrize("where", ["build", "prepare", "before_round", "step", "after_step"])
def test_what_a_loss_refuses_is_no_traceback(
    where: str, make_recipe: Make, log: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: Any) -> None:
        raise ValueError("expected something else")

    monkeypatch.setattr(Everything, where, refuse)
    with pytest.raises(UserError, match="expected something else"):
        run(with_everything(make_recipe), tmp_path / "run")
    recipe = make_recipe()
    materials = prepare(recipe)
    student, _ = build_student(recipe, materials.data)
    if where == "after_step":  # which a dry run leaves out
        return
    with pytest.raises(UserError, match="expected something else"):
        dry_run(with_everything(make_recipe), materials, student)


def test_own_steps_scale_no_gradient() -> None:
    class Manual(OptimizesManually, LogitMethod):
        optimizers: Mapping[str, Optimizer] = {}

    options = TrainingOptions(precision="fp16")
    check_own_steps(LogitMethod(KDLoss()), options)
    with pytest.raises(UserError, match=r"bf16 or no for Manual.*got fp16"):
        check_own_steps(Manual(KDLoss()), options)


def test_a_comparison_tells_before_the_first_run(
    log: list[tuple[str, Any]], toy: object, tmp_path: Path
) -> None:
    content = {
        "data": {"name": "python:toy.images", "validation": 0.2},
        "student": {"name": "python:toy.network"},
        "teacher": {"name": "python:toy.network", "options": {"seed": 5}},
        "methods": {
            "cross-entropy": {"task": {"loss": "CrossEntropyLoss"}},
            "everything": {"all": {"method": "Everything", "quiz": 0.01}, "pld": {"loss": "PLDLoss"}},
        },
    }
    with pytest.raises(UserError, match="method `everything`: no rows to hold out for Everything"):
        compare(parse(ComparisonRecipe, content), tmp_path / "comparison")
    content["methods"]["everything"]["all"]["quiz"] = 0.25  # type: ignore[index]
    content["data"]["strong_augment"] = "strong"  # type: ignore[index]
    with pytest.raises(UserError, match="method `everything`: expected one view of each batch"):
        compare(parse(ComparisonRecipe, content), tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()
    del content["data"]["strong_augment"]  # type: ignore[attr-defined]
    content |= {"training": {"epochs": 1, "batch_size": 16}, "seeds": [0]}
    assert compare(parse(ComparisonRecipe, content), tmp_path / "comparison") == (2, 0)


def test_both_views_are_rehearsed(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(data={"strong_augment": "strong"}, loss={"kd": {"loss": "KDLoss"}})
    step, seen = TwoViewMethod.step, []

    def spy(*arguments: Any) -> dict[str, Tensor]:
        seen.append(step(*arguments))
        return seen[-1]

    monkeypatch.setattr(TwoViewMethod, "step", spy)
    inputs = prepare(recipe)
    dry_run(recipe, inputs, build_student(recipe, inputs.data)[0])
    assert seen[0].keys() == {"kd", "strong.kd", "loss"}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"a": {"method": "Nothing"}}, "unknown method in `loss.a`:"),
        (
            {"a": {"method": "Everything", 2: 2}},
            "unknown option of Everything in `loss.a`: `2`; known: ahead",
        ),
        ({"a": {"method": "Everything", "ahed": 2}}, "unknown option of Everything in `loss.a`: .*ahead"),
        ({"a": {"method": "Everything"}, "b": {"method": "Everything"}}, "one entry with `method`"),
        ({"a": {"method": "Everything"}}, "a term of a weight above 0"),
    ],
)
def test_recipes_of_methods_that_make_no_sense(
    terms: dict[str, Any], message: str, log: list[tuple[str, Any]]
) -> None:
    rest = {} if "weight above" in message else {"pld": {"loss": "PLDLoss"}}
    with pytest.raises(UserError, match=message):
        combine_terms({**terms, **rest})


def test_a_method_goes_around_what_the_other_entries_describe(log: list[tuple[str, Any]]) -> None:
    method = combine_terms(
        {"a": {"method": "Everything", "ahead": 3}, "kd": {"loss": "KDLoss", "temperature": 2.0}}
    )
    assert isinstance(method, Everything)
    assert method.batches_per_round == 3
    assert isinstance(method.method, LogitMethod)
    assert isinstance(method.method.loss.losses["kd"], KDLoss)


# A batch of one row -----------------------------------------------------------------------------------------


def flat_network(normalised: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 8)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(8)] if normalised else []), nn.Linear(8, 4))


@pytest.mark.parametrize(("batch_size", "fits"), [(71, False), (1, False), (70, True), (72, True)])
def test_a_batch_of_one_row_is_told_of_before_training(
    batch_size: int, fits: bool, make_recipe: Make, toy: Any
) -> None:
    materials = prepare(make_recipe())
    options = TrainingOptions(epochs=1, batch_size=batch_size)
    for normalised in (True, False):
        student = Classifier(flat_network(normalised))
        before = {name: value.clone() for name, value in student.state_dict().items()}
        arguments = (student, LogitMethod(PLDLoss()), materials.train)
        if fits or not normalised:
            fit(*arguments, teacher=materials.teacher.train, options=options)
            continue
        with pytest.raises(UserError, match=f"72 training rows in batches of {batch_size} end with one"):
            fit(*arguments, teacher=materials.teacher.train, options=options)
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("make_loss", [FitNetLoss, partial(IEKDLoss, epochs=1)], ids=["FitNet", "IEKD"])
def test_what_a_method_learns_is_not_shown_one_row_either(
    make_loss: Callable[[], FeatureLoss], strong: bool, make_recipe: Make
) -> None:
    """The student does without batch normalisation here, and what compares its map of one place does not."""
    materials = prepare(make_recipe())
    networks = [
        nn.Sequential(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
        for width in (4, 6)
    ]
    method: Method = FeatureMethod(None, {"maps": (1.0, make_loss(), ["1"], ["1"])})
    method = TwoViewMethod(method) if strong else method
    student, before = Classifier(networks[0]), copy.deepcopy(networks[0].state_dict())
    arguments: dict[str, Any] = {"teacher": LiveTeacher(networks[1])}
    arguments |= {"strong_augment": torch.clone} if strong else {}
    with pytest.raises(UserError, match="a single row"):
        fit(student, method, materials.train, options=TrainingOptions(epochs=1, batch_size=71), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in student.body.state_dict().items())
    fit(student, method, materials.train, options=TrainingOptions(epochs=1, batch_size=70), **arguments)


def test_nor_is_a_peer(make_recipe: Make) -> None:
    materials, student = prepare(make_recipe()), Classifier(flat_network(normalised=False))
    optimizer = partial(torch.optim.SGD, lr=0.1)
    method = MutualLearning(LogitMethod(KDLoss()), flat_network(normalised=True), optimizer=optimizer)
    with pytest.raises(UserError, match="72 training rows in batches of 71 end with one"):
        fit(student, method, materials.train, options=TrainingOptions(epochs=1, batch_size=71))


# Reading for a preparation ----------------------------------------------------------------------------------


class WhoReads(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.tensor([float(os.getpid())]), row % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_preparation_reads_with_as_many_processes(workers: int) -> None:
    readers = []

    class Learning(LogitMethod):
        def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
            readers.extend(batch["input"] for batch in rows.batches(4))
            return {}

    method = Learning(KDLoss())
    method.needs_preparation = True
    rows, teacher = Examples(WhoReads(), range(4)), LiveTeacher(nn.Linear(1, 2))
    options = TrainingOptions(epochs=1, batch_size=4, lr=1e-12)
    fit(Classifier(nn.Linear(1, 2)), method, rows, teacher=teacher, options=options, workers=workers)
    assert (readers[0] == os.getpid()).all() == (not workers)
