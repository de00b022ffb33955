"""Distillation through features, from recipes to run folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from luce import CrossEntropyLoss, RKDLoss, VIDLoss, distill, losses, models
from luce.cli import main
from luce.config import parse
from luce.data import load, split
from luce.errors import UserError
from luce.losses import FeatureLoss
from luce.methods import FeatureMethod, LogitMethod
from luce.models import Classifier
from luce.recipes import ComparisonRecipe, Recipe
from luce.recipes.methods import combine_terms
from luce.runs import compare, evaluate, run
from luce.signals import LiveTeacher
from luce.training import TrainingOptions, fit

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]

MAPS = ["stages.0", "stages.1"]
TERMS: dict[str, dict[str, Any]] = {
    "AT": {"loss": "ATLoss", "weight": 100, "student": MAPS},
    "FitNet": {"loss": "FitNetLoss", "weight": 10, "student": "stages.1"},
    "VID": {"loss": "VIDLoss", "student": MAPS},
    "RKD": {"loss": "RKDLoss", "student": "pool", "teacher": "pool"},
    "OFD": {"loss": "OFDLoss", "weight": 0.01, "student": ["stages.0.-1:input"], "warmup": 2},
    "CRD": {"loss": "CRDLoss", "weight": 0.8, "student": "pool", "width": 8, "negatives": 12},
    "ReviewKD": {"loss": "ReviewKDLoss", "student": [*MAPS, "pool"], "warmup": 3},
}
"""A loss that learns nothing, and such as bring regressors, variances, counts, banks and fusions."""


WIDTHS = {"widths": [6, 8, 10]}


def teacher(classes: int, input_shape: tuple[int, ...], seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build("cnn", classes=classes, input_shape=input_shape, **WIDTHS)


@pytest.fixture
def make(make_recipe: Make, toy: ModuleType) -> Make:
    toy.teacher = teacher  # type: ignore[attr-defined]

    def recipe(name: str, **changes: Any) -> Recipe:
        student = {"name": "cnn", "options": {"widths": [4, 6, 6]}}
        terms = {"task": {"loss": "CrossEntropyLoss"}, "inside": TERMS[name]}
        base = {"student": student, "teacher": {"name": "python:toy.teacher"}, "loss": terms}
        return make_recipe(**{**base, **changes})

    return recipe


# Recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name if name in ("FitNet", "CRD") else pytest.param(name, marks=pytest.mark.slow) for name in TERMS],
)
def test_distilling_through_features(
    name: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.asdict(make(name, training={"ema": 0.5, "clip_norm": 5.0}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["train"].keys() == {"task", "inside", "loss"} for line in lines)
    for line in lines:
        assert line["train"]["loss"] == pytest.approx(line["train"]["task"] + line["train"]["inside"])
    assert lines[-1]["train"]["task"] < lines[0]["train"]["task"]

    student = models.build("cnn", classes=4, input_shape=(1, 8, 8), widths=[4, 6, 6])
    student.load_state_dict(load_file(tmp_path / "run/student.safetensors"))  # the student and nothing else
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--trusted"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["best"]["test"]["accuracy"]


@pytest.mark.parametrize("name", TERMS)
def test_the_loss_on_features_falls(name: str, make: Make, tmp_path: Path) -> None:
    recipe = make(name, training={"epochs": 12, "schedule": "constant"})
    recipe.loss["inside"] = {key: value for key, value in recipe.loss["inside"].items() if key != "warmup"}
    recipe.loss["task"]["weight"] = 0.0
    run(recipe, tmp_path)
    values = [json.loads(line)["train"]["inside"] for line in (tmp_path / "metrics.jsonl").open()]
    start = 1 if name == "CRD" else 0  # its first epoch meets banks that know nothing
    assert values[-1] < values[start] - 0.02 * abs(values[start])


def test_a_student_that_reuses_the_classifier_of_its_teacher(make: Make, tmp_path: Path) -> None:
    options = {"teacher": "cnn", "teacher_options": WIDTHS}
    changes = {
        "student": {"name": "simkd:cnn", "options": {"widths": [4, 6], **options}},
        "training": {"ema": 0.5, "epochs": 20},
    }
    recipe = make("AT", **changes)
    recipe.loss = {"simkd": {"loss": "SimKDLoss", "student": "neck"}}
    result = run(recipe, tmp_path / "run")
    lines = [json.loads(line)["train"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert lines[-1].keys() == {"simkd", "loss"}
    assert lines[-1]["simkd"] < 0.7 * lines[0]["simkd"]

    weights, head = load_file(tmp_path / "run/student.safetensors"), teacher(4, (1, 8, 8)).head
    assert torch.equal(weights["head.weight"], head.weight)
    assert torch.equal(weights["head.bias"], head.bias)
    student = models.build("simkd:cnn", classes=4, input_shape=(1, 8, 8), widths=[4, 6], **options)
    student.load_state_dict(weights)
    assert result["student"] == {"model": "simkd:cnn", "parameters": models.count_parameters(student)}
    assert evaluate(tmp_path / "run", recipe) == result["best"]["test"]


def test_every_loss_on_features_can_stand_in_a_recipe() -> None:
    for name in losses.modules.__all__:
        kind = getattr(losses.modules, name)
        if issubclass(kind, FeatureLoss) and kind is not FeatureLoss:
            method = combine_terms({"x": {"loss": name, "student": ["a", "b"], "teacher": "c", "warmup": 2}})
            assert isinstance(method, FeatureMethod)
            assert type(method.terms["x"].loss) is kind
            assert method.terms["x"][2:] == (["a", "b"], ["c"], 2)


def test_terms_on_logits_and_on_features() -> None:
    task = {"loss": "CrossEntropyLoss", "weight": 0.5}
    hint = {"loss": "FitNetLoss", "student": "stages.0", "weight": 100, "relu": False}
    both = combine_terms({"task": task, "hint": hint})
    assert isinstance(both, FeatureMethod)
    assert both.logits is not None
    assert both.logits.loss.weights == {"task": 0.5}
    assert both.terms["hint"][2:] == (["stages.0"], ["stages.0"], 0.0)
    assert both.terms["hint"].weight == 100
    assert not both.terms["hint"].loss.relu
    alone = combine_terms({"hint": hint})
    assert isinstance(alone, FeatureMethod)
    assert alone.logits is None
    assert isinstance(combine_terms({"task": task}), LogitMethod)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"loss": "FitNetLos", "student": "a"},
            r"unknown loss in `loss\.x`: `FitNetLos`; did you mean",
        ),
        ({"loss": "FeatureLoss", "student": "a"}, r"unknown loss in `loss\.x`: `FeatureLoss`"),
        ({"loss": "FitNetLoss"}, r"`loss\.x\.student` to name the modules.*got None"),
        ({"loss": "FitNetLoss", "student": []}, r"`loss\.x\.student` to name the modules.*got \[\]"),
        (
            {"loss": "FitNetLoss", "student": "a", "teacher": [3]},
            r"`loss\.x\.teacher` to name.*got \[3\]; write a module that has only a number as body\.0",
        ),
        (
            {"loss": "FitNetLoss", "student": "a", "rely": 1},
            r"option of FitNetLoss.*did you mean `relu`",
        ),
        ({"loss": "FitNetLoss", "studnt": "a"}, r"`loss\.x\.student` to name the modules"),
        ({"loss": "FitNetLoss", "student": "a", "techer": "b"}, r"`techer`; did you mean `teacher`"),
        ({"loss": "FitNetLoss", "student": "a", "weight": -1}, r"weight of x.*at least 0, got -1"),
        ({"loss": "FitNetLoss", "student": "a", "weight": "x"}, r"weight of x.*got 'x'"),
        ({"loss": "FitNetLoss", "student": "a", "weight": True}, r"weight of x.*got True"),
        ({"loss": "FitNetLoss", "student": "a", "warmup": True}, r"warmup of x.*got True"),
        ({"loss": "CRDLoss", "student": "a", "momentum": 2}, r"`loss\.x`: expected `momentum` below 1"),
        ({"loss": "KDLoss", "student": "a"}, r"unknown option of KDLoss in `loss\.x`: `student`"),
    ],
)
def test_terms_that_are_refused(term: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        combine_terms({"x": term})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "stages.9"}, "unknown module of Network `stages.9`; did you mean `stages"),
        ({"teacher": "stage.1"}, r"unknown module of Network `stage.1`; did you mean `stages\.1`"),
        ({"student": "pool"}, r"`inside`: .*take it before the pooling"),
        (
            {"student": ["stages.0", "stages.1"], "teacher": ["stages.0"]},
            "`inside`: expected as many",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_training(
    changes: dict[str, Any], message: str, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = make("FitNet")
    recipe.loss["inside"] = {**TERMS["FitNet"], **changes}
    with monkeypatch.context() as patch:
        patch.setattr(FeatureMethod, "step", None)
        with pytest.raises(UserError, match=message):
            run(recipe, tmp_path)
    run(make("FitNet"), tmp_path)  # the folder is free for a recipe that is right


def test_a_teacher_whose_answers_are_remembered_has_no_features(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set `teacher\.cache_outputs: false`"):
        run(make("AT", teacher={"name": "python:toy.teacher", "cache_outputs": True}), tmp_path)


@pytest.mark.parametrize("terms", [{"task": {"loss": "CrossEntropyLoss"}, "inside": TERMS["AT"]}, {}])
def test_a_recipe_whose_terms_are_all_switched_off(terms: dict[str, Any]) -> None:
    off = {name: {**term, "weight": 0} for name, term in terms.items()}
    with pytest.raises(UserError, match=r"expected a term of a weight above 0 in `loss`, got \["):
        combine_terms(off)


def test_a_loss_on_features_that_is_no_number_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(losses.modules.ATLoss, "_stage", lambda self, *_: torch.tensor(torch.nan))
    with pytest.raises(UserError, match="in epoch 1: `inside` is nan, `loss` is nan"):
        run(make("AT"), tmp_path)


def test_a_recipe_without_a_teacher(make: Make, tmp_path: Path) -> None:
    recipe = make("AT")
    recipe.teacher = None
    with pytest.raises(UserError, match="add `teacher` to the recipe"):
        run(recipe, tmp_path)


# Comparisons ------------------------------------------------------------------------------------------------


def comparison(**changes: Any) -> ComparisonRecipe:
    task = {"loss": "CrossEntropyLoss"}
    content = {
        "seeds": [0],
        "data": {"name": "python:toy.images", "validation": 0.2},
        "student": {"name": "cnn", "options": {"widths": [4, 6, 6]}},
        "teacher": {"name": "cnn", "options": {"widths": [6, 8, 10]}},
        "teacher_training": {"epochs": 1},
        "training": {"epochs": 2, "batch_size": 16},
        "methods": {
            "cross-entropy": {"task": task},
            "AT": {"task": task, "at": TERMS["AT"]},
            "KD": {"kd": {"loss": "KDLoss"}},
            "CRD": {"task": task, "crd": TERMS["CRD"]},
        },
    }
    return parse(ComparisonRecipe, {**content, **changes})


def test_a_comparison_of_methods_on_logits_and_on_features(toy: ModuleType, tmp_path: Path) -> None:
    assert compare(comparison(), tmp_path / "run") == (4, 0)
    for name, keys in (("AT", {"task", "at"}), ("KD", {"kd"}), ("CRD", {"task", "crd"})):
        folder = tmp_path / "run/all" / name / "seed-0"
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert line["train"].keys() == {*keys, "loss"}


@pytest.mark.parametrize(
    ("term", "changes", "message"),
    [
        ({"student": "stages.9"}, {}, "unknown module of Network `stages.9`"),
        ({"teacher": "stages.9"}, {}, "unknown module of Network `stages.9`"),
        ({}, {"teacher": {"name": "cnn", "cache_outputs": True}}, r"set `teacher\.cache_outputs: false`"),
        ({"loss": "CTKDLoss", "classes": 7}, {}, r"expected logits of `classes=7` classes, got 4"),
        ({"loss": "PartialKDLoss", "keep": "weight_sim"}, {}, r"expected `use_weight\(weight\)`.*class_mean"),
        ({"loss": "KDLoss", "class_dim": 5}, {}, r"expected `class_dim` between -2 and 1.*got 5"),
        ({"loss": "KDLoss", "reduction": "none"}, {}, r"expected `reduction` of hint.*got 'none'"),
    ],
)
def test_a_comparison_is_checked_before_its_teacher_is_trained(
    term: dict[str, Any], changes: dict[str, Any], message: str, toy: ModuleType, tmp_path: Path
) -> None:
    methods = {
        "cross-entropy": {"task": {"loss": "CrossEntropyLoss"}},
        "FitNet": {"hint": term if "loss" in term else {**TERMS["FitNet"], **term}},
    }
    with pytest.raises(UserError, match=f"^method `FitNet`: .*{message}"):
        compare(comparison(methods=methods, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_draws_nothing_that_the_training_would_draw(make: Make, tmp_path: Path) -> None:
    """A term of weight 0 with many parameters changes no figure: methods stay paired by their seed."""
    outcomes = []
    for name in ("AT", "VID", "CRD"):
        recipe = make(name, data={"augment": "crop_flip"})
        recipe.loss["inside"] = {**TERMS[name], "weight": 0.0}
        run(recipe, tmp_path / name)
        outcomes.append(load_file(tmp_path / name / "student-last.safetensors"))
    for other in outcomes[1:]:
        assert all(torch.equal(outcomes[0][key], other[key]) for key in other)


# Resuming ---------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """What no handler of ours may swallow."""


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TERMS},
    "SimKD": (
        "AT",
        {
            "loss": {"simkd": {"loss": "SimKDLoss", "student": "neck"}},
            "student": {"name": "simkd:cnn", "options": {"teacher": "cnn", "teacher_options": WIDTHS}},
        },
    ),
    "CRD, few labels": ("CRD", {"data": {"labels_per_class": 3}}),
    "VID, average, bf16": ("VID", {"training": {"ema": 0.9, "precision": "bf16"}}),
    "all that learns or remembers": (
        "OFD",
        {
            "data": {"labels_per_class": 6},
            "loss": {
                "crd": TERMS["CRD"],
                "ctkd": {"loss": "CTKDLoss", "curriculum_epochs": 3, "warmup": 2},
                "pk": {"loss": "PartialKDLoss", "keep": "class_mean"},
                "pld": {"loss": "PLDLoss", "teacher_temperature": "auto", "standardize": True},
            },
            "training": {"ema": 0.9, "accumulate": 2},
        },
    ),
    "FitNet, accumulation, augmentation": (
        "FitNet",
        {"training": {"accumulate": 2, "optimizer": "sgd"}, "data": {"augment": "crop_flip"}},
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupted_run_ends_in_the_same_numbers(
    setting: str, make: Make, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, changes = SETTINGS[setting]
    run(make(name, **changes), tmp_path / "whole")
    step, batches = FeatureMethod.step, iter(range(12))  # the third epoch is cut in its second batch

    def counted(*arguments: Any) -> Any:
        if next(batches, None) is None:
            raise Interrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureMethod, "step", counted)
        with pytest.raises(Interrupt):
            run(make(name, **changes), tmp_path / "cut")
    assert list((tmp_path / "cut").glob("checkpoint-2"))
    run(make(name, **changes), tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# In the loop ------------------------------------------------------------------------------------------------


def in_the_loop(toy: ModuleType, **options: Any) -> tuple[FeatureMethod, Classifier, LiveTeacher]:
    train, validation, _ = split(load("python:toy.images"), validation=0.2, seed=0)
    student = Classifier(models.build("cnn", classes=4, input_shape=(1, 8, 8), widths=[4, 6, 6]))
    source = LiveTeacher(Classifier(teacher(4, (1, 8, 8))))
    method = FeatureMethod(CrossEntropyLoss(), {"vid": (1.0, VIDLoss(), MAPS, MAPS)})
    settings = TrainingOptions(**{"epochs": 3, "batch_size": 16, "lr": 0.01, **options})
    fit(student, method, train, validation, teacher=source, options=settings)
    return method, student, source


def test_regressors_and_variances_learn_and_the_teacher_does_not(toy: ModuleType) -> None:
    fresh = LiveTeacher(Classifier(teacher(4, (1, 8, 8)))).network.state_dict()
    method, _, source = in_the_loop(toy)
    untrained = VIDLoss()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as the engine has it
        untrained.build([(6, 4, 4), (6, 2, 2)], [(8, 4, 4), (10, 2, 2)])
    before, after = untrained.state_dict(), method.losses["vid"].state_dict()
    assert before.keys() == after.keys()
    assert all((after[name] != before[name]).all() for name in before if name.startswith("raw_variances"))
    assert all((after[name] != before[name]).any() for name in before)
    assert all(torch.equal(value, fresh[name]) for name, value in source.network.state_dict().items())
    assert not source.network.training


def test_a_training_leaves_no_hooks(toy: ModuleType) -> None:
    _, student, source = in_the_loop(toy, ema=0.9)
    for network in (student, source.network):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert source.signal({"input": torch.zeros(1, 1, 8, 8)}).features == {}


def test_distilling_in_one_call() -> None:
    data = TensorDataset(torch.rand(40, 3), torch.arange(40) % 4)
    student, guide = (nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)) for width in (5, 7))
    method = FeatureMethod(CrossEntropyLoss(), {"pairs": (1.0, RKDLoss(), ["1"], ["1"])})
    fitted = distill(student, guide, data, loss=method, epochs=3, lr=0.01, show_progress=False)
    assert fitted.history[0]["train"].keys() == {"logits", "pairs", "loss"}
    assert fitted.history[-1]["train"]["pairs"] < fitted.history[0]["train"]["pairs"]
