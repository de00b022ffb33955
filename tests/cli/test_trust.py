"""Folders of others run no code and read nothing but weights, whichever command reads them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luce import manifest, models
from luce.errors import UserError
from luce.runs.export import read_packed, write_packed
from luce.training import checkpoint

COMMAND = {"cmd": "touch marker"}
CODE = "python:subprocess.getoutput"
READERS: dict[str, list[str]] = {
    "export": ["export", "runs/teacher"],
    "export packed": ["export", "runs/teacher", "--format", "packed"],
    "serve": ["serve", "runs/teacher"],
    "evaluate": ["evaluate", "runs/teacher"],
    "spike": ["spike", "runs/teacher"],
    "diagnose": ["diagnose", "runs/teacher", "sklearn:iris"],
    "diagnose a student": ["diagnose", "mlp", "sklearn:iris", "--student", "runs/teacher"],
    "distill from it": ["distill", "recipe.yaml", "--teacher.checkpoint", "runs/teacher", "--out", "out"],
    "train on": ["train", "recipe.yaml", "--student.checkpoint", "runs/teacher", "--out", "out"],
}


def describe_as(folder: Path, **changes: Any) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest.write(folder, ("student.json", "student.safetensors"))  # whoever forges one can forge the other


def change_recipe(folder: Path, **changes: Any) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("reader", "name"),
    [*((reader, CODE) for reader in READERS)]
    + [("evaluate", f"{outer}:{CODE}") for outer in ("binary", "simkd", "binary:simkd", "binary:binary")],
)
def test_a_network_that_is_code(reader: str, name: str, teacher: Path, write, refuses, place: Path) -> None:
    describe_as(teacher, model=name, options=COMMAND)
    write()
    words = READERS[reader]
    if reader == "diagnose a student":
        (place / "weights").mkdir()
        checkpoint.export(place / "weights/mlp.safetensors", network().state_dict())
        words = [*words, "--checkpoint", "weights/mlp.safetensors", "--teacher.options.hidden", "[8]"]
    assert f"names `{name}`, which runs code" in refuses(*words)
    assert not (place / "marker").exists()


def network() -> torch.nn.Module:
    return models.build("mlp", classes=3, input_shape=(4,), hidden=[8])


def test_the_command_of_these_tests_does_run_when_it_is_trusted(teacher: Path, luce, place: Path) -> None:
    describe_as(teacher, model=CODE, options=COMMAND)
    assert luce("export", "runs/teacher", "--trusted").status == 2  # getoutput returns no network
    assert (place / "marker").exists()


def test_the_user_s_own_recipe_may_name_the_same_code(teacher: Path, write, luce, place: Path) -> None:
    import sys

    calls = []
    toy: Any = sys.modules["toy"]
    toy.mine = lambda: calls.append(1) or network()
    describe_as(teacher, model="python:toy.mine", options={})
    recipe = write(teacher={"checkpoint": "runs/teacher", "name": "python:toy.mine"}, training={"epochs": 1})
    assert luce("distill", recipe, "--out", "out").status == 0
    assert calls


@pytest.mark.parametrize("command", ["evaluate", "spike"])
def test_data_that_is_code(command: str, teacher: Path, refuses, place: Path) -> None:
    change_recipe(teacher, data={"name": CODE, "options": COMMAND})
    assert f"recipe.yaml names `{CODE}`, which runs code" in refuses(command, "runs/teacher")
    assert not (place / "marker").exists()


def test_data_of_a_run_is_its_own_only_under_the_name_that_the_user_gives(teacher: Path, luce, place) -> None:
    change_recipe(teacher, data={"name": CODE, "options": COMMAND})
    assert luce("diagnose", "runs/teacher", "sklearn:iris").status == 0
    assert not (place / "marker").exists()


@pytest.mark.parametrize(
    ("network", "what"),
    [
        ({"name": CODE, "options": COMMAND}, "which runs code"),
        ({"name": f"binary:{CODE}", "options": COMMAND}, "which runs code"),
        ({"name": "timm:hf-hub:someone/network"}, "may run code"),
        ({"name": "timm:local-dir:evil"}, "may run code"),
        ({"name": "timm:resnet18", "options": {"checkpoint_path": "evil.pth"}}, "may read other files"),
        ({"name": "timm:resnet18", "options": {"pretrained_cfg": {"file": "evil.pth"}}}, "may read other"),
        ({"name": "torchvision:resnet18", "options": {"weights": "/evil.pth"}}, "may read other files"),
        ({"name": "hf:someone/network", "options": {"attn_implementation": "evil/kernel"}}, "may read other"),
        ({"url": "http://127.0.0.1:9", "test": True, "token_file": "secret"}, "would receive the test rows"),
    ],
)
def test_teachers_of_a_stored_recipe(network: dict[str, Any], what: str, teacher: Path, refuses) -> None:
    change_recipe(teacher, teacher=network)
    assert what in refuses("evaluate", "runs/teacher")


def test_a_stored_recipe_whose_teacher_is_another_bad_folder(teacher: Path, refuses, place: Path) -> None:
    other = place / "other"
    other.mkdir()
    for name in ("student.json", "student.safetensors"):
        (other / name).write_bytes((teacher / name).read_bytes())
    describe_as(other, model=CODE, options=COMMAND)
    change_recipe(teacher, teacher={"checkpoint": "runs/../other"})
    assert "other/student.json names" in refuses("evaluate", "runs/teacher")
    assert not (place / "marker").exists()


def test_options_of_the_command_line_are_the_user_s(teacher: Path, luce, place: Path) -> None:
    words = ["--data.name", CODE, "--data.options", json.dumps(COMMAND)]
    assert luce("evaluate", "runs/teacher", *words).status == 2  # getoutput returns no data
    assert (place / "marker").exists()


def test_tags_of_yaml_are_not_objects(teacher: Path, refuses, place: Path) -> None:
    (teacher / "recipe.yaml").write_text("data: !!python/object/apply:os.system ['touch marker']\n")
    for command in ("evaluate", "report", "spike"):
        refuses(command, "runs/teacher")
    assert not (place / "marker").exists()


@pytest.mark.parametrize("name", [CODE, f"binary:{CODE}"])
def test_packed_files_name_no_code(name: str, place: Path) -> None:
    student = models.Classifier(network(), [0.0], [1.0])
    described = {"model": name, "options": COMMAND, "classes": ["a"], "input_shape": [4]}
    write_packed(place / "x.safetensors", student, described | {"mean": [0.0], "std": [1.0]})
    with pytest.raises(UserError, match="which runs code"):
        read_packed(place / "x.safetensors")
    assert not (place / "marker").exists()


class Bomb:
    """Leaves the marker when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("marker"),)


def with_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))


def with_torch(path: Path) -> None:
    torch.save({"state": Bomb()}, path)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped before it exported its student."""
    from luce.config import parse
    from luce.recipes import Recipe
    from luce.runs import run

    from .conftest import TEACHER

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr("luce.training.checkpoint.export", stop)
        with pytest.raises(KeyboardInterrupt):
            run(parse(Recipe, TEACHER), folder)
    return folder


@pytest.mark.parametrize("poison", [with_pickle, with_torch])
@pytest.mark.parametrize(
    "name",
    ["random_states_0.pkl", "optimizer.bin", "luce.pt", "pytorch_model.bin"],  # all that are unpickled
)
def test_checkpoints_run_no_code(
    name: str, poison: Callable[[Path], None], interrupted: Path, write, refuses, place: Path
) -> None:
    import shutil

    latest = Path(shutil.copytree(interrupted, place / "out")) / "checkpoint-2"
    if name == "pytorch_model.bin":
        (latest / "model.safetensors").unlink()
    poison(latest / name)
    manifest.write(latest, [path.name for path in latest.iterdir() if path.name != manifest.NAME])
    assert f"cannot resume from out/{latest.name}" in refuses("train", write(), "--out", "out")
    assert not (place / "marker").exists()


def test_descriptions_of_networks_larger_than_their_files(teacher: Path, refuses) -> None:
    for options in ({"hidden": [10**12]}, {"hidden": [10**12, 10**12]}, {"hidden": [2**63]}):
        describe_as(teacher, options=options)
        assert refuses("evaluate", "runs/teacher")
    describe_as(teacher, options={"hidden": [8]}, input_shape=[10**12])
    assert "student.safetensors can hold" in refuses("evaluate", "runs/teacher")
