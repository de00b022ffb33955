"""An interrupted run goes on to the very numbers of an uninterrupted one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luce.errors import UserError
from luce.methods import LogitMethod
from luce.recipes import Recipe
from luce.runs import run
from luce.training import checkpoint

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]

SETTINGS = {
    "sgd with momentum, step schedule": {
        "training": {
            "optimizer": "sgd",
            "momentum": 0.9,
            "schedule": "step",
            "milestones": [2, 3],
            "lr": 0.05,
        }
    },
    "adamw, cosine schedule with warm-up": {"training": {"schedule": "cosine", "warmup_epochs": 1.5}},
    "binary weights": {"student": {"name": "binary:vgg_pool", "options": {"widths": [4, 6], "hidden": [5]}}},
    "average of the weights": {"training": {"ema": 0.9}},
    "augmentation": {"data": {"augment": "crop_flip"}},
    "accumulation and clipping": {"training": {"accumulate": 2, "clip_norm": 0.5}},
    "a checkpoint every second epoch": {"training": {"checkpoint_every": 2}},
    "no checkpoint before the end": {"training": {"checkpoint_every": 4}},
    "early stopping": {"training": {"patience": 3, "epochs": 8}},
    "bf16": {"training": {"precision": "bf16"}},
    "few labels, two terms": {
        "data": {"labels_per_class": 3},
        "loss": {"pld": {"loss": "PLDLoss"}, "task": {"loss": "CrossEntropyLoss", "weight": 0.5}},
    },
    "labels alone": {"data": {"labels_per_class": 3}, "loss": {"pld": {"loss": "CrossEntropyLoss"}}},
    "a remembered teacher": {"teacher": {"cache_outputs": True}},
    "a teacher that counts its queries": {"teacher": {"answers": "probs"}},
    "a loss with parameters and a standardized one": {
        "loss": {
            "pld": {"loss": "CTKDLoss", "classes": 4, "curriculum_epochs": 3},
            "kd": {"loss": "KDLoss", "standardize": True},
        }
    },
    "what a loss has found out about the teacher": {
        "loss": {"pld": {"loss": "PartialKDLoss", "keep": "class_mean", "temperature": 2.0}}
    },
    "two views": {
        "data": {"augment": "crop_flip", "strong_augment": "strong"},
        "loss": {"pld": {"loss": "MLLDLoss"}, "task": {"loss": "CrossEntropyLoss", "weight": 0.1}},
    },
}


class Interrupt(BaseException):
    """What no handler of ours may swallow."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stop the next training in its n-th batch."""
    step = LogitMethod.step

    def arm(batch: int) -> None:
        batches: Iterator[int] = iter(range(1, batch + 1))

        def counted(*arguments: Any) -> Any:
            if next(batches) == batch:
                monkeypatch.setattr(LogitMethod, "step", step)
                raise Interrupt
            return step(*arguments)

        monkeypatch.setattr(LogitMethod, "step", counted)

    return arm


def run_interrupted(recipe: Recipe, folder: Path, interrupt: Callable[[int], None], *batches: int) -> None:
    for batch in batches:
        interrupt(batch)
        with pytest.raises(Interrupt):
            run(recipe, folder)
        assert not (folder / "result.json").exists()
        assert not list(folder.glob("student*"))
    run(recipe, folder)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupted_run_ends_in_the_same_numbers(
    setting: str, make_recipe: Make, outcome: Outcome, interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    recipe = make_recipe(**SETTINGS[setting])
    run(recipe, tmp_path / "whole")
    # 72 training rows are 5 batches of 16: the third epoch is cut in its second batch.
    run_interrupted(recipe, tmp_path / "cut", interrupt, 12)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("*checkpoint*"))


def test_a_run_interrupted_again_and_again(
    make_recipe: Make, outcome: Outcome, interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    recipe = make_recipe(training={"ema": 0.8})
    run(recipe, tmp_path / "whole")
    run_interrupted(recipe, tmp_path / "cut", interrupt, 1, 6, 7, 3)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_interrupted_after_its_last_epoch(
    make_recipe: Make, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: Any) -> None:
        raise Interrupt

    recipe = make_recipe(training={"ema": 0.8})
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", stop)
        with pytest.raises(Interrupt):
            run(recipe, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(LogitMethod, "step", stop)  # nothing is left to train
        run(recipe, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_two_runs_differ_only_by_their_seed(make_recipe: Make, outcome: Outcome, tmp_path: Path) -> None:
    outcomes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(make_recipe(training={"seed": seed}), tmp_path / name)
        outcomes.append(outcome(tmp_path / name))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["lines"] != outcomes[2]["lines"]
    assert outcomes[0]["student.safetensors"] != outcomes[2]["student.safetensors"]


def test_the_metrics_do_not_need_their_file_to_go_on(
    make_recipe: Make, outcome: Outcome, interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    recipe = make_recipe()
    run(recipe, tmp_path / "whole")
    for name, damage in (("lost", ""), ("half a line", '{"epoch": 1, "tra')):
        interrupt(12)
        with pytest.raises(Interrupt):
            run(recipe, tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text(damage)
        run(recipe, tmp_path / name)
        assert outcome(tmp_path / name) == outcome(tmp_path / "whole")


@pytest.fixture
def cut_folder(make_recipe: Make, interrupt: Callable[[int], None], tmp_path: Path) -> Path:
    interrupt(12)
    with pytest.raises(Interrupt):
        run(make_recipe(), tmp_path / "cut")
    return tmp_path / "cut"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "luce.pt"])
@pytest.mark.parametrize("damage", ["cut short", "garbage", "missing"])
def test_a_damaged_checkpoint_is_refused(name: str, damage: str, make_recipe: Make, cut_folder: Path) -> None:
    file = cut_folder / "checkpoint-2" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if damage == "cut short" else b"no checkpoint")
    with pytest.raises(
        UserError, match=r"cannot resume from .*checkpoint-2 \(.*\); delete this folder to start again"
    ):
        run(make_recipe(), cut_folder)
    assert not (cut_folder / "result.json").exists()


def test_what_the_message_about_a_damaged_checkpoint_advises_works(
    make_recipe: Make, outcome: Outcome, cut_folder: Path, tmp_path: Path
) -> None:
    shutil.rmtree(cut_folder / "checkpoint-2")
    run(make_recipe(), cut_folder)
    run(make_recipe(), tmp_path / "whole")
    assert outcome(cut_folder) == outcome(tmp_path / "whole")


def test_a_checkpoint_half_written_when_the_machine_stopped_does_not_count(
    make_recipe: Make, outcome: Outcome, cut_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut_folder / "checkpoint-2", cut_folder / ".checkpoint.part")
    (cut_folder / ".checkpoint.part" / "luce.pt").unlink()
    run(make_recipe(), cut_folder)
    run(make_recipe(), tmp_path / "whole")
    assert outcome(cut_folder) == outcome(tmp_path / "whole")
    assert not (cut_folder / ".checkpoint.part").exists()


def test_of_two_checkpoints_the_latest_by_number_counts(make_recipe: Make, cut_folder: Path) -> None:
    """A checkpoint is renamed before the one before it goes; 10 comes after 9."""
    (cut_folder / "checkpoint-2").rename(cut_folder / "checkpoint-10")
    (cut_folder / "checkpoint-9").mkdir()
    run(make_recipe(), cut_folder)  # the empty checkpoint-9 would be refused


def test_a_finished_run_is_not_made_again(make_recipe: Make, tmp_path: Path, monkeypatch) -> None:
    result = run(make_recipe(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(LogitMethod, "step", None)
    assert run(make_recipe(), tmp_path) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
