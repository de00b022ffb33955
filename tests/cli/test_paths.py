"""A home folder is meant wherever a path is taken, and the recipe keeps what the user wrote."""

from __future__ import annotations

import getpass
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from luce import data
from luce.config import as_path, name_or_path, parse
from luce.errors import UserError
from luce.recipes import Recipe
from luce.recipes.teacher import _token
from luce.remote.cache import AnswerCache
from luce.reports import read_run, write_html


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "the home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_what_a_path_may_be(home: Path) -> None:
    assert as_path("~") == home
    assert as_path("~/a b") == home / "a b"
    assert as_path(f"~{getpass.getuser()}/a").is_absolute()
    assert as_path("a/~") == Path("a/~")
    assert as_path(Path("runs")) == Path("runs")
    assert name_or_path("~/bert") == str(home / "bert")
    assert [name_or_path(name) for name in ("org/bert", "./bert", "hf://a//b")] == [
        *("org/bert", "./bert", "hf://a//b")
    ]


def test_a_folder_may_have_a_dollar_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a$b").mkdir()
    assert as_path(tmp_path / "a$b") == tmp_path / "a$b"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "expected a path, got ''"),
        ("a\0b", "expected a path, got"),
        ("$DATA/x", r"expected a path without variables, got `\$DATA/x`"),
        ("a/${DATA}", "expected a path without variables"),
        ("~nobody-of-this-name/x", "there is no such home folder"),
    ],
)
def test_what_a_path_may_not_be(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_path(path)


def test_commands_and_recipes_take_home_folders(
    home: Path, place: Path, teacher: Path, write: Any, luce: Any
) -> None:
    shutil.move(teacher, home / "teacher")
    write(teacher={"checkpoint": "~/teacher"}, loss={"kd": {"loss": "KDLoss"}})
    shutil.move(place / "recipe.yaml", home / "r.yaml")
    assert luce("distill", "~/r.yaml", "--out=~/runs/a", "--student.checkpoint", "~/teacher").status == 0
    assert (home / "runs" / "a" / "result.json").exists()
    written = (home / "runs" / "a" / "recipe.yaml").read_text()
    assert written.count("checkpoint: ~/teacher") == 2
    assert luce("evaluate", "~/runs/a").status == 0
    assert luce("report", "~/runs/a").status == 0
    answer = luce("diagnose", "~/teacher", "sklearn:iris", "--student", "~/runs/a", "--out=~/d")
    assert answer.status == 0, answer.err
    assert (home / "d" / "diagnose.html").exists()
    assert not (place / "~").exists()


def test_a_missing_checkpoint_is_named_in_full(home: Path, write: Any, refuses: Any) -> None:
    assert f"{home}/nowhere" in refuses("train", write(), "--student.checkpoint", "~/nowhere")
    assert "without variables, got `$HOME/x`" in refuses("train", write(), "--student.checkpoint", "$HOME/x")
    assert "without variables, got `$HOME/x`" in refuses("train", write(), "--out", "$HOME/x")


def test_data_folders(home: Path) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (home / "photos" / part / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(home / "photos" / part / label / "0.png")
    assert list(data.load("imagefolder:~/photos").classes) == ["cat", "dog"]
    assert list(data.load("imagefolder:photos", root="~").classes) == ["cat", "dog"]
    for name, root in (("imagefolder:$NONE/photos", None), ("imagefolder:photos", "$NONE")):
        with pytest.raises(UserError, match="without variables"):
            data.load(name, root=root)


def test_tokens_caches_and_reports(home: Path, trained_teacher: Path) -> None:
    (home / "token").write_text("secret\n")
    recipe = parse(Recipe, {"teacher": {"url": "http://localhost", "token_file": "~/token"}})
    assert recipe.teacher is not None
    assert _token(recipe.teacher) == "secret"
    AnswerCache("~/answers/a.sqlite", "teacher").save({b"row": torch.zeros(1).numpy().tobytes()})
    assert (home / "answers" / "a.sqlite").exists()
    shutil.copytree(trained_teacher, home / "run")
    assert read_run("~/run").method == "teacher"
    assert write_html("~/run", "~/page.html") == home / "page.html"
