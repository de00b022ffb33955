"""Hugging Face text classifiers, from a recipe to metrics."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

from luce import data, models
from luce.config import merge, parse
from luce.errors import UserError
from luce.methods import LogitMethod
from luce.models.loaders import FreshWeights
from luce.recipes import Recipe, prepare
from luce.runs import distill, run
from luce.training import checkpoint

datasets = pytest.importorskip("datasets", reason="needs the extra [text]")


def news(rows: int) -> dict[str, list[Any]]:
    """Texts of three topics, told by their first word, of several lengths."""
    topics = ["wheat", "bank", "oil"]
    texts = [f"{topics[i % 3]} {'falls ' * (i % 4)}{'rises' if i % 2 else 'rate'}" for i in range(rows)]
    return {"text": texts, "label": [i % 3 for i in range(rows)]}


@pytest.fixture
def content(place: Path, bert_folder: Path) -> dict[str, Any]:
    """A recipe: the tiny classifier teaches its own first layer about a folder of texts."""
    kinds = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["grain", "money", "crude"]),
    }
    for split, rows in (("train", 60), ("test", 12)):
        made = datasets.Dataset.from_dict(news(rows), features=datasets.Features(kinds))
        made.to_parquet(str(place / "news" / f"{split}.parquet"))
    tokens = {"tokenizer": str(bert_folder), "max_length": 8}
    return {
        "data": {"name": "hf:news", "root": "cache", "options": tokens, "validation": 0.2},
        "student": {"name": f"hf:{bert_folder}", "options": {"num_hidden_layers": 1}},
        "teacher": {"name": f"hf:{bert_folder}", "cache_outputs": True},
        "loss": {"pld": {"loss": "PLDLoss"}},
        "training": {"epochs": 4, "batch_size": 16, "lr": 1e-3},
    }


@pytest.fixture
def make(content: dict[str, Any]) -> Callable[..., Recipe]:
    return lambda **changes: parse(Recipe, merge(content, changes))


def test_distil_evaluate_report_diagnose(
    content: dict[str, Any], luce: Callable[..., Any], place: Path
) -> None:
    Path("text.yaml").write_text(yaml.safe_dump(content))
    answer = luce("distill", "text.yaml", "--out", "runs/text")
    assert answer.status == 0, answer.err
    result = json.loads(Path("runs/text/result.json").read_text())
    lines = [json.loads(line) for line in Path("runs/text/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["loss"] < lines[0]["train"]["loss"]
    assert result["student"]["parameters"] < result["teacher"]["parameters"]

    answer = luce("evaluate", "runs/text")
    assert answer.status == 0
    read, assumed = answer.err.splitlines()
    assert "cannot be compared by name" in assumed  # a checkpoint without names: LABEL_0, LABEL_1
    assert read.startswith(
        "luce evaluate: `hf:news`: 60 training rows, 12 test rows, 3 classes; test rows from"
    )
    assert json.loads(answer.out) == result["best"]["test"]
    assert luce("report", "runs/text").status == 0
    answer = luce("diagnose", "runs/text", "hf:news", "--student", "runs/text", "--out", "diagnosis")
    assert answer.status == 0, answer.err
    assert Path("diagnosis/diagnose.html").exists()

    student, description = checkpoint.load_student(Path("runs/text"))
    assert (description["input_shape"], description["classes"]) == ([8], ["grain", "money", "crude"])
    short, padded = torch.tensor([[2, 5, 7, 3]]), torch.tensor([[2, 5, 7, 3, 0, 0, 0]])
    torch.testing.assert_close(student(padded), student(short), rtol=1e-4, atol=1e-4)


def test_of_fresh_weights_we_hear_once_and_of_exported_ones_never(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make(student={"options": {"num_hidden_layers": 3}}, training={"epochs": 1})
    with pytest.warns(FreshWeights) as heard:
        run(recipe, tmp_path / "run")
    assert sum(issubclass(warning.category, FreshWeights) for warning in heard) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", FreshWeights)
        checkpoint.load_student(tmp_path / "run")


def test_a_teacher_whose_head_is_fresh_is_refused(make: Callable[..., Recipe], bert_folder: Path) -> None:
    recipe = make(teacher={"options": {"num_hidden_layers": 3}})
    with pytest.raises(UserError, match=r"expected a trained teacher: the checkpoint .* does not fill bert"):
        prepare(recipe)


def test_the_names_of_a_head_are_compared_with_those_of_the_data(
    make: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    def labels(*names: str) -> dict[str, Any]:
        return {"options": {"id2label": dict(enumerate(names))}}

    materials = prepare(make(teacher=labels("grain", "money", "crude")))
    assert "reordered" not in caplog.text
    batch = materials.train.batch(range(8))
    assert materials.teacher is not None
    logits = materials.teacher.train.signal(batch).logits
    moved = prepare(make(teacher=labels("Crude", "grain", "money"))).teacher
    assert moved is not None
    assert torch.equal(moved.train.signal(batch).logits, logits[:, [1, 2, 0]])
    others = labels("sport", "money", "crude")
    with pytest.raises(UserError, match="got `sport` in place of `grain` from hf:"):
        prepare(make(teacher=others))
    with pytest.raises(UserError, match="got `sport` in place of `grain` from hf:"):
        run(make(student=others), Path("student"))
    prepare(make(teacher={**others, "match_classes": "position"}))


def test_an_exported_student_does_without_the_checkpoint_it_came_from(
    make: Callable[..., Recipe], bert_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    recipe = make(student={"name": f"hf:{folder}"}, training={"epochs": 1})
    run(recipe, tmp_path / "run")
    ids = torch.tensor([[2, 5, 7, 3, 0]])
    answer = checkpoint.load_student(tmp_path / "run")[0](ids)
    (folder / "model.safetensors").unlink()
    assert torch.equal(checkpoint.load_student(tmp_path / "run")[0](ids), answer)


class Interrupt(Exception):
    """As if the process had been killed."""


def test_an_interrupted_training_ends_in_the_same_weights(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make(training={"ema": 0.9}), tmp_path / "whole")
    step, batches = LogitMethod.step, iter(range(7))  # the third epoch is cut in its second batch

    def counted(*arguments: Any) -> Any:
        if next(batches, None) is None:
            raise Interrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LogitMethod, "step", counted)
        with pytest.raises(Interrupt):
            run(make(training={"ema": 0.9}), tmp_path / "cut")
    assert list((tmp_path / "cut").glob("checkpoint-2"))
    cut = run(make(training={"ema": 0.9}), tmp_path / "cut")
    assert (cut["last"], cut["best"]) == (whole["last"], whole["best"])
    weights = [(tmp_path / name / "student-last.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "loss",
    [
        {
            "hint": {
                "loss": "FitNetLoss",
                "student": "bert.encoder.layer.0",
                "teacher": "bert.encoder.layer.1",
            }
        },
        {"rkd": {"loss": "RKDLoss", "student": "bert.pooler"}},
        {"crd": {"loss": "CRDLoss", "student": "bert.pooler"}},
    ],
    ids=["FitNet", "RKD", "CRD"],
)
def test_what_lies_inside(loss: dict[str, Any], make: Callable[..., Recipe], tmp_path: Path) -> None:
    task = {"task": {"loss": "CrossEntropyLoss"}}
    recipe = make(teacher={"cache_outputs": False}, training={"epochs": 2})
    recipe.loss = {**loss, **task}
    result = run(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {*loss, "task", "loss"} == lines[-1]["train"].keys()
    assert all(0 < value < 100 for line in lines for value in line["train"].values())
    assert checkpoint.load_student(tmp_path / "run")[1]["model"] == result["student"]["model"]


def test_distilling_in_one_call(bert_folder: Path) -> None:
    columns = news(30)
    tokenizer = data.Tokenizer(bert_folder, max_length=8)
    rows = TensorDataset(tokenizer(columns["text"]), torch.tensor(columns["label"]))
    teacher, student = (
        models.build(f"hf:{bert_folder}", classes=3, num_hidden_layers=layers) for layers in (2, 1)
    )
    fitted = distill(student, teacher, rows, epochs=4, batch_size=10, lr=1e-3, show_progress=False)
    assert fitted.history[-1]["train"]["loss"] < fitted.history[0]["train"]["loss"]
    short, padded = torch.tensor([[2, 5, 7, 3]]), torch.tensor([[2, 5, 7, 3, 0, 0, 0]])
    answers = [fitted.student.eval()(ids) for ids in (short, padded)]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"name": "cnn", "options": {}}}, r"(channels, height, width)"),
        ({"student": {"name": "mlp", "options": {}}}, "expected a network for the token ids of `hf:news`"),
        (
            {"data": {"name": "sklearn:digits", "root": None, "options": {}}},
            "expected token ids of shape (N, T)",
        ),
        (
            {"data": {"augment": "flip"}},
            "augmentation `flip` expects images of shape (N, C, H, W), got (1, 8)",
        ),
        ({"data": {"strong_augment": "strong"}}, "augmentation `strong` expects images"),
        ({"student": {"options": {"pad_token_id": 3}}}, "a network with padding token 0"),
        (
            {"student": {"options": {"vocab_size": 9}}},
            "at least the 15 tokens of the tokenizer, got 9",
        ),
        (
            {"student": {"options": {"num_hidden_layers": "two"}}},
            "cannot be built with these options: Validation error for field 'num_hidden_layers': TypeError",
        ),
        ({"student": {"mean": [1.0], "std": [2.0]}}, "expected token ids of shape (N, T)"),
        ({"data": {"options": {"tokenizer": "nowhere/at all"}}}, "got `nowhere/at all`"),
        ({"data": {"options": {"max_length": 64}}}, "expected `max_length` in 3 .. 32"),
        (
            {"student": {"options": {"max_position_embeddings": 6}}},
            "a network for the token ids of `hf:news`",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::luce.models.loaders.FreshWeights")
def test_what_does_not_fit_is_refused_before_training(
    changes: dict[str, Any], message: str, content: dict[str, Any], luce: Callable[..., Any]
) -> None:
    content = merge(content, changes)
    for part in ("student", "data"):
        if changes.get(part, {}).get("options") == {}:
            content[part]["options"] = {}
    Path("text.yaml").write_text(yaml.safe_dump(content))
    answer = luce("distill", "text.yaml", "--out", "runs/text")
    assert (answer.status, answer.out) == (2, "")
    assert message in answer.err.splitlines()[-1]
    assert not Path("runs/text").exists()


def test_rows_of_texts_are_split_and_their_labels_hidden(make: Callable[..., Recipe]) -> None:
    materials = prepare(make(data={"labels_per_class": 3}))
    assert [len(part) for part in (materials.train, materials.validation, materials.test)] == [48, 12, 12]
    assert (materials.train.targets >= 0).sum() == 9
    batch = materials.train.batch(range(4))
    assert (batch["input"].dtype, tuple(batch["input"].shape)) == (torch.int64, (4, 8))
