"""A network and data that number the same classes differently."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import TensorDataset

from luce import data
from luce.config import parse
from luce.errors import UserError
from luce.recipes import ComparisonRecipe, Recipe, prepare
from luce.recipes.build import build_network
from luce.runs import compare, diagnose, evaluate, run
from luce.runs.diagnose import DiagnoseOptions
from luce.runs.export import read_packed, write_packed
from luce.runs.spike import SpikeOptions, spike
from luce.training import checkpoint

from ..servers import TOKEN, serving

ABC, CAB = ("ant", "bee", "cat"), ("cat", "ant", "bee")
XYZ, ZXY = ("x-ray", "yak", "zoo"), ("zoo", "x-ray", "yak")
THERE = [2, 0, 1]
"""The places of CAB's names in ABC."""


def animals(names: tuple[str, ...]) -> data.Data:
    """Patterns of three animals, easily told apart, whose labels number the names as they come."""
    generator = torch.Generator().manual_seed(2)
    kind = torch.arange(90) % 3
    patterns = torch.rand(3, 1, 8, 8, generator=generator)
    pixels = (patterns[kind] + 0.1 * torch.randn(90, 1, 8, 8, generator=generator)).clamp(0, 1)
    order = sorted(range(3), key=lambda place: names[place])  # the first kind has the first name
    labels = torch.tensor(order)[kind]
    train, test = TensorDataset(pixels[:60], labels[:60]), TensorDataset(pixels[60:], labels[60:])
    return data.from_datasets(train, test, classes=names)


TOY = {"".join(name[0] for name in names): partial(animals, names) for names in (ABC, CAB, XYZ, ZXY)}


@pytest.fixture(autouse=True)
def _animals(toy: ModuleType) -> None:
    for name, rows in TOY.items():
        setattr(toy, name, rows)


def make(rows: str, **changes: Any) -> Recipe:
    """A recipe for the data of this name; cross-entropy without a teacher and KD with one."""
    training = {"epochs": 3, "batch_size": 16, "lr": 0.02, "cpu": True, **changes.pop("training", {})}
    name = "KDLoss" if "teacher" in changes else "CrossEntropyLoss"
    base = {"student": {"name": "mlp"}, "loss": {"logits": {"loss": name}}, "training": training}
    return parse(Recipe, {"data": {"name": f"python:toy.{rows}", "validation": 0.2}, **base, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ABC that is right about every test row."""
    folder = tmp_path_factory.mktemp("trained") / "teacher"
    toy = ModuleType("toy")
    toy.abc = TOY["abc"]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setitem(sys.modules, "toy", toy)
        recipe = make("abc", student={"name": "cnn", "options": {"widths": [4, 8]}}, training={"epochs": 8})
        assert run(recipe, folder)["best"]["test"]["accuracy"] == 1.0
    return folder


@pytest.fixture
def teacher(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "teacher"))


def expected(folder: Path, inputs: Tensor) -> Tensor:
    """The logits of a network for ABC in the order of CAB."""
    with torch.no_grad():
        return checkpoint.load_student(folder)[0](inputs)[:, THERE]


def test_a_teacher_answers_in_the_order_of_the_data(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make("cab", teacher={"checkpoint": str(teacher)})
    inputs = prepare(recipe)
    batch = inputs.train.batch(range(5))
    assert inputs.teacher is not None
    assert torch.equal(inputs.teacher.train.signal(batch).logits, expected(teacher, batch["input"]))
    assert caplog.text.count("numbers the classes of `datasets` differently") == 1
    result = run(recipe, tmp_path / "student")
    assert result["teacher"]["test"]["accuracy"] == 1.0
    assert json.loads((tmp_path / "student/student.json").read_text())["classes"] == list(CAB)


@pytest.mark.parametrize("answers", ["probs", "topk", "label"])
@pytest.mark.parametrize("remember", [True, False])
def test_a_black_box_answers_in_the_order_of_the_data(
    answers: str, remember: bool, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At hand and behind a URL; the cache keeps what the server said, whatever the order of the data."""
    top = {"top_k": 2} if answers == "topk" else {}
    given = {"answers": answers, **top, "cache_outputs": remember}
    inputs = prepare(make("cab", teacher={"checkpoint": str(teacher), **given}))
    local, batch = inputs.teacher, inputs.train.batch(range(20))
    assert local is not None
    network, description = checkpoint.load_student(teacher)
    monkeypatch.setenv("TOY_TOKEN", TOKEN)
    with serving(network, description=description, answers=answers, **top) as url:
        given |= {"url": url, "token_env": "TOY_TOKEN", "cache": str(tmp_path / "answers")}
        box = prepare(make("cab", teacher=given)).teacher
        assert box is not None
        logits = box.train.signal(batch).logits
        torch.testing.assert_close(logits, local.train.signal(batch).logits)
        assert torch.equal(logits.argmax(1), batch["target"])
        if not remember:
            again = prepare(make("abc", teacher={**given, "budget": 0})).teacher
            assert again is not None
            assert torch.equal(logits, again.train.signal(batch).logits[:, THERE])


def test_a_server_of_other_classes(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, description = checkpoint.load_student(teacher)
    monkeypatch.setenv("TOY_TOKEN", TOKEN)
    with serving(network, description=description) as url:
        given = {"url": url, "token_env": "TOY_TOKEN"}
        with pytest.raises(UserError, match="got `ant`, `bee`, `cat` in place of `x-ray`, `yak`, `zoo`"):
            prepare(make("xyz", teacher=given))
        prepare(make("xyz", teacher={**given, "match_classes": "position"}))


def test_a_run_is_evaluated_by_the_names_of_its_classes(teacher: Path) -> None:
    same, other = (evaluate(teacher, make(rows)) for rows in ("abc", "cab"))
    assert other["accuracy"] == same["accuracy"] == 1.0
    assert other["nll"] == pytest.approx(same["nll"])
    with pytest.raises(UserError, match=r"got `ant`, `bee`, `cat` in place of `x-ray`, `yak`, `zoo` from"):
        evaluate(teacher, make("xyz"))
    told = evaluate(teacher, make("xyz"), match_classes="position")
    assert told["accuracy"] == 1.0  # both have the kinds in this order


def test_a_student_goes_on_from_a_run(teacher: Path, tmp_path: Path) -> None:
    """Its export has the order of its weights, and says so."""
    still = {"epochs": 1, "lr": 1e-30, "weight_decay": 0.0}
    recipe = make("cab", student={"checkpoint": str(teacher)}, training={**still, "ema": 0.5})
    assert run(recipe, tmp_path / "run")["best"]["test"]["accuracy"] == 1.0
    assert json.loads((tmp_path / "run/student.json").read_text())["classes"] == list(ABC)
    before, after = (load_file(folder / "student.safetensors") for folder in (teacher, tmp_path / "run"))
    assert torch.equal(before["head.weight"], after["head.weight"])
    for rows in ("abc", "cab"):
        assert evaluate(tmp_path / "run", make(rows))["accuracy"] == 1.0
    student = checkpoint.load_student(tmp_path / "run")
    write_packed(tmp_path / "packed.safetensors", *student)
    network, description = read_packed(tmp_path / "packed.safetensors")
    rows = animals(ABC).test
    assert description["classes"][int(network(rows[0][0].unsqueeze(0)).argmax())] == "ant"  # the first kind


def test_a_student_of_other_classes_that_is_told_so(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`match_classes: position`"):
        run(make("xyz", student={"checkpoint": str(teacher)}), tmp_path / "run")
    told = {"checkpoint": str(teacher), "match_classes": "position"}
    run(make("xyz", student=told), tmp_path / "run")
    assert json.loads((tmp_path / "run/student.json").read_text())["classes"] == list(XYZ)
    with pytest.raises(
        UserError, match="in place of"
    ):  # it was told of the checkpoint, and not of other data
        evaluate(tmp_path / "run", make("abc", student=told))


def test_a_teacher_that_was_told_so_is_not_for_other_data(teacher: Path, tmp_path: Path) -> None:
    told = {"checkpoint": str(teacher), "match_classes": "position"}
    run(make("xyz", teacher=told), tmp_path / "run")
    assert evaluate(tmp_path / "run", make("xyz", teacher=told))["agreement"] > 0.9
    with pytest.raises(UserError, match="got `ant`, `bee`, `cat` in place of"):
        evaluate(tmp_path / "run", make("zxy", teacher=told))


def test_simkd_reuses_the_classifier_in_the_order_of_the_data(teacher: Path, tmp_path: Path) -> None:
    options = {"widths": [4], "teacher": "cnn", "teacher_options": {"widths": [4, 8]}}
    recipe = make(
        "cab",
        student={"name": "simkd:cnn", "options": options},
        teacher={"checkpoint": str(teacher)},
        loss={"simkd": {"loss": "SimKDLoss", "student": "neck", "teacher": "neck"}},
        training={"epochs": 1},
    )
    run(recipe, tmp_path / "run")
    reused, head = (load_file(path / "student.safetensors") for path in (teacher, tmp_path / "run"))
    assert torch.equal(head["head.weight"], reused["head.weight"][THERE])
    assert torch.equal(head["head.bias"], reused["head.bias"][THERE])


def test_logits_in_another_order_are_no_features(teacher: Path, tmp_path: Path) -> None:
    def recipe(rows: str) -> Recipe:
        loss = {"loss": "RKDLoss", "student": "head", "teacher": "head"}
        student = {"name": "cnn", "options": {"widths": [4]}}
        return make(
            rows,
            student=student,
            teacher={"checkpoint": str(teacher)},
            loss={"hint": loss},
            training={"epochs": 1},
        )

    run(recipe("abc"), tmp_path / "abc")
    with pytest.raises(UserError, match=r"expected features at `head`, got logits, .* in another order"):
        run(recipe("cab"), tmp_path / "cab")


def test_metadistil_trains_a_teacher_in_the_order_of_the_data(teacher: Path, tmp_path: Path) -> None:
    loss = {"kd": {"loss": "KDLoss"}, "meta": {"method": "MetaDistil"}}
    recipe = make("cab", teacher={"checkpoint": str(teacher)}, loss=loss, training={"epochs": 1})
    result = run(recipe, tmp_path / "run")
    assert result["co_trained"]["teacher"]["test"]["accuracy"] == 1.0


def test_a_comparison_matches_in_every_setting(teacher: Path, tmp_path: Path) -> None:
    content = {
        "baseline": "KD",
        "seeds": [0],
        "data": {"name": "python:toy.abc"},
        "student": {"name": "mlp"},
        "teacher": {"checkpoint": str(teacher)},
        "training": {"epochs": 1},
        "settings": {"one": {}, "other": {"data": {"name": "python:toy.cab"}}},
        "methods": {"KD": {"kd": {"loss": "KDLoss"}}},
    }
    compare(parse(ComparisonRecipe, content), tmp_path / "out")
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/KD/seed-0/result.json")]
    assert [result["teacher"]["test"]["accuracy"] for result in results] == [1.0, 1.0]


def test_a_diagnosis_is_that_of_the_matched_classes(teacher: Path) -> None:
    options = {"teacher": str(teacher), "student": str(teacher), "cpu": True}
    same, other = (
        diagnose(DiagnoseOptions(data=f"python:toy.{rows}", held_out="test", **options))
        for rows in ("abc", "cab")
    )
    assert other.reliability["held out"] == same.reliability["held out"]
    with pytest.raises(UserError, match="in place of"):
        diagnose(DiagnoseOptions(data="python:toy.xyz", **options))
    told = {"teacher": {"match_classes": "position"}}
    diagnose(DiagnoseOptions(data="python:toy.xyz", overrides=told, **options))


def test_spikes_are_counted_for_the_matched_classes(tmp_path: Path) -> None:
    options = SpikeOptions(steps=16, cpu=True, trusted=True)
    student = {"name": "binary:mlp", "options": {"hidden": [32, 16]}}
    run(make("abc", student=student, training={"epochs": 8}), tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    same = spike(tmp_path, options)
    (tmp_path / "recipe.yaml").write_text(recipe.replace("toy.abc", "toy.cab"))
    other = spike(tmp_path, options)
    assert other.test.accuracy[-1] == same.test.accuracy[-1] > 0.9
    (tmp_path / "recipe.yaml").write_text(recipe.replace("toy.abc", "toy.xyz"))
    with pytest.raises(UserError, match="in place of"):
        spike(tmp_path, options)


# What is assumed, and what a run folder replaces ------------------------------------------------------------


def test_the_order_of_a_file_of_weights_is_assumed(teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = {
        "name": "cnn",
        "options": {"widths": [4, 8]},
        "checkpoint": f"{teacher}/student.safetensors",
    }
    prepare(make("abc", teacher=file))
    assert caplog.text.count("cannot be compared by name: the same order is assumed") == 1
    caplog.clear()
    prepare(make("abc", teacher={**file, "match_classes": "position"}))
    assert "assumed" not in caplog.text


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_networks_of_python_state_their_classes(
    who: str, toy: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def named(classes: int, input_shape: tuple[int, ...], names: Any = None) -> torch.nn.Module:
        network = toy.network(classes, input_shape, seed=1)
        if names is not None:
            network.class_names = names
        return network

    toy.named = named  # type: ignore[attr-defined]
    materials = prepare(make("cab"))
    fresh = {"name": "python:toy.named"}
    recipe = make("cab", **{"teacher": fresh, who: fresh})
    build_network(recipe.student, materials.data)
    assert "assumed" not in caplog.text  # it starts fresh
    if who == "teacher":
        prepare(recipe)
        assert "python:toy.named and of `datasets` cannot be compared by name" in caplog.text
    options = getattr(recipe, who)
    options.options = {"names": list(ABC)}
    network, description = build_network(options, materials.data)
    batch = materials.test.batch(range(4))
    plain = network.eval().body(network.normalised(batch["input"]))
    assert torch.equal(network(batch["input"]), plain[:, THERE])
    assert description["classes"] == list(ABC)


def test_what_a_run_folder_replaces_is_said(teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"name": "resnet20", "options": {"widths": [9]}, "mean": [0.1], "std": [0.2]}
    prepare(make("abc", teacher={**given, "checkpoint": str(teacher)}))
    description = json.loads((teacher / "student.json").read_text())
    for field, found in (
        ("name", "cnn"),
        ("options", {"widths": [4, 8]}),
        ("std", description["std"]),
    ):
        assert f"sets `{field}` to {found}, not the {given[field]} beside `checkpoint`" in caplog.text
    caplog.clear()
    same = {"name": "cnn", "options": {"widths": [4, 8]}, "mean": description["mean"]}
    prepare(make("abc", teacher={**same, "checkpoint": str(teacher)}))
    assert "beside `checkpoint`" not in caplog.text


def test_a_teacher_for_images_of_another_size(
    toy: ModuleType, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def large() -> data.Data:
        small = animals(ABC)
        pixels = torch.nn.functional.interpolate(small.train.inputs, scale_factor=2)  # type: ignore[attr-defined]
        return data.from_datasets(TensorDataset(pixels, small.train.targets), classes=ABC)  # type: ignore[attr-defined]

    toy.large = large  # type: ignore[attr-defined]
    prepare(make("large", teacher={"checkpoint": str(teacher)}))
    assert "was trained on inputs of shape (1, 8, 8), and those of `datasets` are (1, 16, 16)" in caplog.text
    caplog.clear()
    evaluate(teacher, make("large"))
    assert "was trained on inputs of shape (1, 8, 8)" in caplog.text
