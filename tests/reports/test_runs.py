"""Reading folders: every file's absence or damage is one sentence that names it."""

from __future__ import annotations

import json

import pytest

from luce.errors import UserError
from luce.reports import read_comparison, read_run


def test_a_run_holds_what_its_files_say(run_folder):
    run = read_run(run_folder)
    assert (run.method, run.seed, run.student.parameters, run.seconds) == ("PLD", 0, 12345, 2.0)
    assert (run.last.epoch, run.last.test.accuracy) == (20, 0.91)
    assert (run.best.epoch, run.best.test.accuracy) == (15, 0.93)
    assert run.teacher is not None
    assert run.teacher.accuracy == 0.98
    assert [epoch.number for epoch in run.epochs] == list(range(1, 21))
    assert run.last.test.reliability[1].count == 30
    assert run.environment["commit"] == "abc123"


def test_a_run_without_a_teacher(run_folder):
    path = run_folder / "result.json"
    result = json.loads(path.read_text())
    result["teacher"] = None
    for name in ("agreement", "kl", "kendall_tau", "topk_overlap"):
        del result["last"]["test"][name]
    path.write_text(json.dumps(result))
    run = read_run(run_folder)
    assert run.teacher is None
    assert run.last.test.agreement is None
    assert run.best.test.agreement == 0.93


def test_a_resumed_epoch_counts_once_and_the_later_line_wins(run_folder):
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    again = json.loads(lines[4]) | {"lr": 0.5}
    path.write_text("\n".join([*lines[:5], json.dumps(again), *lines[5:]]))
    run = read_run(run_folder)
    assert len(run.epochs) == 20
    assert run.epochs[4].lr == 0.5


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl", "result.json"])
def test_a_missing_file_is_named(run_folder, name):
    (run_folder / name).unlink()
    with pytest.raises(UserError, match=name):
        read_run(run_folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "a: [1"),
        ("recipe.yaml", "- a list"),
        ("environment.json", "{"),
        ("environment.json", "[]"),
        ("metrics.jsonl", '{"epoch": 1}\n'),
        ("metrics.jsonl", '{"epoch": 1, "st'),
        ("metrics.jsonl", "3\n"),
        ("result.json", "not json"),
        ("result.json", "{}"),
        ("result.json", '{"student": null, "method": "PLD", "seed": 0, "seconds": 1, "selection": ""}'),
    ],
)
def test_a_damaged_file_is_named(run_folder, name, text):
    (run_folder / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read_run(run_folder)


def test_a_line_of_metrics_is_named_by_its_number(run_folder):
    path = run_folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\nbroken\n")
    with pytest.raises(UserError, match="line 2"):
        read_run(run_folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_comparison_has_its_baseline_first_and_the_declared_order(tmp_path, write_comparison):
    accuracies = {"few": {"PLD": [0.9], "KD": [0.8], "cross-entropy": [0.7]}}
    folder = write_comparison(tmp_path, accuracies, methods=["PLD", "cross-entropy", "KD"])
    comparison = read_comparison(folder)
    assert comparison.methods == ("cross-entropy", "PLD", "KD")
    assert comparison.teacher is None
    assert comparison.teacher_accuracy("few") == 0.98
    assert [run.last.test.accuracy for run in comparison.runs["few"]["PLD"]] == [0.9]
    assert comparison.missing == ()


def test_the_teachers_own_run_is_read(tmp_path, write_comparison, write_run):
    folder = write_comparison(tmp_path, {"few": {"cross-entropy": [0.7]}})
    write_run(folder / "teacher", "cross-entropy", 0, 0.97)
    teacher = read_comparison(folder).teacher
    assert teacher is not None
    assert teacher.last.test.accuracy == 0.97


def test_unfinished_runs_and_holes_in_the_grid_are_missing_not_fatal(tmp_path, write_comparison):
    folder = write_comparison(
        tmp_path, {"few": {"cross-entropy": [0.7, 0.7], "PLD": [0.9, 0.9], "KD": [0.8]}}
    )
    (folder / "few" / "PLD" / "seed-1" / "result.json").unlink()
    (folder / "teacher").mkdir()
    comparison = read_comparison(folder)
    missing = {path.relative_to(folder).as_posix() for path in comparison.missing}
    assert missing == {"teacher", "few/PLD/seed-1", "few/KD/seed-1"}
    assert [run.seed for run in comparison.runs["few"]["PLD"]] == [0]


def test_a_comparison_without_any_finished_run_is_refused(tmp_path, write_comparison):
    folder = write_comparison(tmp_path, {"few": {"cross-entropy": [0.7]}})
    (folder / "few" / "cross-entropy" / "seed-0" / "result.json").unlink()
    with pytest.raises(UserError, match="expected a finished run"):
        read_comparison(folder)


def test_an_unknown_baseline_is_refused(tmp_path, write_comparison):
    folder = write_comparison(tmp_path, {"few": {"PLD": [0.7]}}, baseline="PDL")
    with pytest.raises(UserError, match="did you mean `PLD`"):
        read_comparison(folder)


@pytest.mark.parametrize("text", ["title: x", "baseline: KD\nsettings: [a]", "{", "3"])
def test_a_damaged_comparison_recipe_is_named(tmp_path, text):
    (tmp_path / "comparison.yaml").write_text(text)
    with pytest.raises(UserError, match=r"comparison\.yaml"):
        read_comparison(tmp_path)
