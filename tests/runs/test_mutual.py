"""Mutual learning, from recipes to run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luce import models
from luce.cli import main
from luce.config import parse
from luce.errors import UserError
from luce.methods import MutualLearning
from luce.recipes import ComparisonRecipe, Recipe
from luce.runs import compare, run
from luce.training import TrainingError

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]

TASK = {"task": {"loss": "CrossEntropyLoss"}}
DML = {"dml": {"method": "MutualLearning"}, **TASK, "kl": {"loss": "KDLoss", "temperature": 1.0}}
CNN = {"name": "cnn", "options": {"widths": [4, 6, 6]}}
OTHER = {"name": "cnn", "options": {"widths": [6, 8, 10]}}
IE = {
    "loss": "IEKDLoss",
    "autoencoder": "online",
    "inheritance_weight": 50,
    "exploration_weight": 50,
    "student": "stages.1",
}
HINT = {"loss": "FitNetLoss", "weight": 10.0, "student": "stages.0", "teacher": "stages.1"}


@pytest.fixture
def make(make_recipe: Make) -> Make:
    """Recipes without a teacher."""

    def recipe(**changes: Any) -> Recipe:
        made = make_recipe(**{"loss": DML, "student": CNN, **changes})
        made.teacher = None
        return made

    return recipe


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MutualLearning, nn.Module]]:
    """Every method that a training builds, with its student."""
    found: list[tuple[MutualLearning, nn.Module]] = []
    build = MutualLearning.build

    def keep(self: MutualLearning, student: nn.Module, *arguments: Any) -> None:
        found.append((self, student))
        build(self, student, *arguments)

    monkeypatch.setattr(MutualLearning, "build", keep)
    return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_students_learn_the_digits(tmp_path: Path) -> None:
    """The recipe of the repository, from the command line, with fewer epochs."""
    path = Path(__file__).parents[2] / "recipes/digits-mutual.yaml"
    words = ["--out", str(tmp_path / "run"), "--training.epochs", "8"]
    assert main(["train", str(path), *words]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["teacher"] is None
    assert result["co_trained"].keys() == {"peer"}
    assert result["last"]["test"]["accuracy"] > 0.9
    assert result["co_trained"]["peer"]["test"]["accuracy"] > 0.9
    first, *_, last = (line["train"] for line in lines_of(tmp_path / "run"))
    for term in ("task", "peer.task", "loss", "peer.loss"):
        assert last[term] < 0.5 * first[term]
    for prefix in ("", "peer."):
        assert last[f"{prefix}loss"] == pytest.approx(last[f"{prefix}task"] + last[f"{prefix}kl"])
    student = models.build("mlp", classes=10, input_shape=(1, 8, 8), hidden=[16])
    student.load_state_dict(load_file(tmp_path / "run/student.safetensors"))  # and nothing of the peer


@pytest.mark.parametrize(
    "training",
    [{}, {"precision": "bf16"}, {"optimizer": "sgd", "lr": 0.1, "schedule": "step", "milestones": [2]}],
    ids=["adamw", "bf16", "sgd"],
)
def test_without_a_mutual_term_two_students_train_as_if_alone(
    training: dict[str, Any], make: Make, built: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits; the peer's plain training starts from the weights that the peer started from."""
    training = {**training, "batch_size": 24, "clip_norm": 0.5, "warmup_epochs": 1}
    starts: list[dict[str, Tensor]] = []
    build = MutualLearning.build

    def keep(self: MutualLearning, *arguments: Any) -> None:
        build(self, *arguments)
        starts.append(weights_of(self.peer))

    monkeypatch.setattr(MutualLearning, "build", keep)
    off = {**DML, "kl": {**DML["kl"], "weight": 0.0}}
    run(make(loss=off, training=training), tmp_path / "mutual")
    run(make(loss=TASK, training=training), tmp_path / "alone")
    alone = load_file(tmp_path / "alone/student-last.safetensors")
    assert same(load_file(tmp_path / "mutual/student-last.safetensors"), alone)

    start = {name.removeprefix("body."): value for name, value in starts[0].items() if "body." in name}
    torch.save(start, tmp_path / "start.pt")
    plain = make(loss=TASK, training=training, student={**CNN, "checkpoint": str(tmp_path / "start.pt")})
    run(plain, tmp_path / "other")
    peer = weights_of(built[0][0].peer.body)
    assert same(peer, load_file(tmp_path / "other/student-last.safetensors"))
    assert not same(peer, alone)
    for ours, theirs in zip(lines_of(tmp_path / "mutual"), lines_of(tmp_path / "other"), strict=True):
        assert ours["train"]["peer.task"] == theirs["train"]["task"]


def test_the_peer_is_like_the_student_unless_it_is_described(
    make: Make, built: list[Any], tmp_path: Path
) -> None:
    sgd = {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.25, "clip_norm": 2.0, "epochs": 1}
    for number, options in enumerate(({}, {"peer": OTHER}, {"peer_lr": 0.125})):
        loss = {**DML, "dml": {**DML["dml"], **options}}
        run(make(loss=loss, training=sgd), tmp_path / str(number))
        method, student = built[-1]
        assert not same(weights_of(method.peer), weights_of(student))
        (group,) = method.optimizers["peer"].param_groups
        assert (group["initial_lr"], method.clip_norm) == (options.get("peer_lr", 0.01), 2.0)
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 0.25)
        assert method.peer.body.stages[0][1].weight.shape[0] == (8 if "peer" in options else 6)


def test_starts_are_drawn_by_the_seed(make: Make, built: list[Any], tmp_path: Path) -> None:
    """Two students of two seeds and their peers are four different networks; the seed settles them."""
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(make(training={"seed": seed, "epochs": 1, "lr": 1e-12, "weight_decay": 0.0}), tmp_path / name)
        method, student = built[-1]
        found.append([network.body.head.weight.detach() for network in (student, method.peer)])
    assert all(map(torch.equal, found[0], found[1]))
    heads = [*found[0], *found[2]]
    for i, one in enumerate(heads):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in heads[:i])


def test_features_teach_both_ways(make: Make, tmp_path: Path) -> None:
    loss = {"dml": {"method": "MutualLearning", "peer": OTHER}, **TASK, "hint": HINT}
    run(make(loss=loss, training={"epochs": 8}), tmp_path / "run")
    first, *_, last = (line["train"] for line in lines_of(tmp_path / "run"))
    assert last.keys() == {"task", "hint", "loss", "peer.task", "peer.hint", "peer.loss"}
    for term in ("task", "peer.task", "hint", "peer.hint"):
        assert last[term] < first[term]


def test_plackett_luce_teaches_both_ways(make: Make, tmp_path: Path) -> None:
    loss = {"mutual": {"method": "MutualLearning"}, "pld": {"loss": "PLDLoss", "teacher_temperature": 2.0}}
    run(make(loss=loss, training={"epochs": 8}), tmp_path / "run")
    first, *_, last = (line["train"] for line in lines_of(tmp_path / "run"))
    assert last.keys() == {"pld", "loss", "peer.pld", "peer.loss"}
    for term in ("pld", "peer.pld"):
        assert last[term] < 0.9 * first[term]


def test_inheritance_and_exploration_both_ways(make: Make, built: list[Any], tmp_path: Path) -> None:
    """IE-DML: each direction has encoders and an auto-encoder of its own, which learn along."""
    run(make(loss={**DML, "ie": IE}, training={"epochs": 6}), tmp_path / "run")
    first, *_, last = (line["train"] for line in lines_of(tmp_path / "run"))
    for term in ("task", "ie.inheritance", "ie.reconstruction"):
        assert last[term] < first[term]
        assert last[f"peer.{term}"] < first[f"peer.{term}"]
    method, _ = built[-1]
    for direction in (method.method, method.peer_method):
        assert all(parameter.requires_grad for parameter in direction.losses["ie"].parameters())


# Resuming ---------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """What no handler of ours may swallow."""


SETTINGS: dict[str, dict[str, Any]] = {
    "logits, dropout": {"student": {"name": "python:toy.network"}},
    "features, average, few labels": {
        "loss": {"dml": {"method": "MutualLearning", "peer": OTHER}, **DML, "hint": {**HINT, "warmup": 2}},
        "data": {"labels_per_class": 6, "augment": "crop_flip"},
        "training": {"ema": 0.9, "clip_norm": 1.0, "optimizer": "sgd"},
    },
    "IE-DML": {"loss": {**DML, "ie": {**IE, "split": "random"}}},
    "what is counted": {
        "loss": {
            **DML,
            "ofd": {"loss": "OFDLoss", "weight": 0.01, "student": ["stages.0.-1:input"]},
            "crd": {"loss": "CRDLoss", "weight": 0.1, "student": "pool", "width": 8, "negatives": 12},
        }
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupted_run_ends_in_the_same_numbers(
    setting: str,
    make: Make,
    built: list[Any],
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = make(**SETTINGS[setting])
    run(recipe, tmp_path / "whole")
    peer = weights_of(built[-1][0])
    after_step, left = MutualLearning.after_step, iter(range(12))

    def interrupted(*arguments: Any) -> Any:
        if next(left) == 11:  # the student has made its step, the peer has not
            raise Interrupt
        return after_step(*arguments)

    monkeypatch.setattr(MutualLearning, "after_step", interrupted)
    with pytest.raises(Interrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.setattr(MutualLearning, "after_step", after_step)
    run(recipe, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert same(weights_of(built[-1][0]), peer)


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"dml": {"method": "MutualLearning"}, **TASK}}, "compares with a teacher"),
        (
            {"loss": {**DML, "pld": {"loss": "PLDLoss", "teacher_temperature": "auto"}}},
            "no trained teacher",
        ),
        ({"loss": {**DML, "ie": {**IE, "autoencoder": "prepared"}}}, "`autoencoder: online`"),
        ({"loss": {**DML, "dml": {"method": "MutualLearning", "pier": {}}}}, "did you mean `peer`"),
        ({"loss": {**DML, "dml": {"method": "MutualLearning", "peer": "cnn"}}}, "a mapping for `peer`"),
        (
            {"loss": {**DML, "dml": {"method": "MutualLearning", "peer": {"nam": "cnn"}}}},
            "unknown recipe key `nam`; did you mean `name`",
        ),
        (
            {"loss": {**DML, "dml": {"method": "MutualLearning", "peer": {"name": "cn"}}}},
            "unknown model `cn`",
        ),
        (
            {"loss": {**DML, "dml": {"method": "MutualLearning", "peer": {"options": {"widths": [4]}}}}},
            "a `name` for `peer`, or no `peer`",
        ),
        ({"loss": {**DML, "dml": {"method": "MutualLearning", "peer_lr": -1.0}}}, "`peer_lr` .* above 0"),
        ({"loss": {**DML, "dml": {"method": "MutualLearning", "peer_lr": True}}}, "above 0, got True"),
        (
            {"loss": {**DML, "hint": {**HINT, "teacher": "stages.7"}}},
            r"unknown module of Network `stages\.7`",
        ),
        (
            {"student": {"name": "python:toy.network", "options": {"seed": 3}}},
            "a peer with other initial weights",
        ),
        ({"training": {"accumulate": 2}}, "`training.accumulate: 1` for MutualLearning"),
        ({"data": {"strong_augment": "strong"}}, "one view of each batch for MutualLearning"),
    ],
)
def test_what_cannot_work_is_told_before_training(
    changes: dict[str, Any], message: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MutualLearning, "step", None)
    with pytest.raises(UserError, match=message):
        run(make(**changes), tmp_path / "run")


def test_a_loss_of_the_peer_that_is_no_number_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    after_step = MutualLearning.after_step

    def spoiled(self: MutualLearning, *arguments: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            self.peer.body.head.weight.fill_(torch.inf)
        return after_step(self, *arguments)

    monkeypatch.setattr(MutualLearning, "after_step", spoiled)
    with pytest.raises(TrainingError, match=r"in epoch 1: `peer\.task` is nan, `peer\.kl` is nan"):
        run(make(), tmp_path / "run")


# Beside other methods, and in several processes -------------------------------------------------------------


def test_a_comparison_whose_teacher_it_does_not_ask(toy: ModuleType, tmp_path: Path) -> None:
    content = {
        "seeds": [0],
        "data": {"name": "python:toy.images", "validation": 0.2},
        "student": CNN,
        "teacher": {**OTHER, "cache_outputs": True},
        "teacher_training": {"epochs": 1},
        "training": {"epochs": 2, "batch_size": 16},
        "methods": {
            "cross-entropy": TASK,
            "DML": DML,
            "hints": {**DML, "hint": {**HINT, "teacher": "stages.0"}},
        },
    }
    assert compare(parse(ComparisonRecipe, content), tmp_path / "run") == (3, 0)
    results = {
        name: json.loads((tmp_path / "run/all" / name / "seed-0/result.json").read_text())
        for name in ("cross-entropy", "DML")
    }
    assert not results["cross-entropy"]["co_trained"]
    assert results["DML"]["co_trained"]["peer"]["test"]["agreement"] >= 0  # with the teacher of the others

    bad = {
        **content,
        "methods": {**content["methods"], "bad": {**DML, "hint": {**HINT, "teacher": "stages.7"}}},
    }
    with pytest.raises(UserError, match=r"^method `bad`: .*`stages\.7`"):
        compare(parse(ComparisonRecipe, bad), tmp_path / "other")
    assert not (tmp_path / "other").exists()
