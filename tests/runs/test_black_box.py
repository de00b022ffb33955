"""Recipes whose teacher is a black box, at hand or behind a URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luce.config import parse
from luce.errors import UserError
from luce.methods import LogitMethod
from luce.recipes import ComparisonRecipe, Recipe, prepare
from luce.remote import RemoteError, transport
from luce.reports import markdown_table, runs, write_html
from luce.runs import compare, evaluate, run
from luce.signals import BudgetError

from ..servers import TOKEN, good, puppet, serving

Make = Callable[..., Recipe]
KD = {"pld": {"loss": "KDLoss"}}
ROWS = 72
"""Of training; 18 more choose the epoch, 30 are for the test."""


class Counting(nn.Module):
    """The toy network, whose questions are counted."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.asked = network, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked += len(inputs)
        return self.network(inputs)


@pytest.fixture
def network(toy: Any) -> Counting:
    return Counting(toy.network(4, (1, 8, 8), seed=5))


DESCRIPTION = {"model": "toy", "classes": ["0", "1", "2", "3"], "input_shape": [1, 8, 8]}


@pytest.fixture
def url(network: Counting, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TOY_TOKEN", TOKEN)
    with serving(network, description=DESCRIPTION) as url:
        yield url


@pytest.fixture
def remote(make_recipe: Make, url: str, tmp_path: Path) -> Make:
    """A recipe with the teacher behind the URL."""

    def make(teacher: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        recipe = make_recipe(loss=KD, **changes)
        given = {
            "url": url,
            "token_env": "TOY_TOKEN",
            "cache": str(tmp_path / "answers.sqlite"),
            **(teacher or {}),
        }
        recipe.teacher = parse(Recipe, {"teacher": given}).teacher
        return recipe

    return make


# At hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize(
    "kind", [{"answers": "probs"}, {"answers": "topk", "top_k": 2}, {"answers": "label"}], ids=str
)
def test_a_network_that_tells_less(kind: Any, remember: bool, make_recipe: Make, tmp_path: Path) -> None:
    seen: set[str] = set()
    step = LogitMethod.step

    def spy(self: Any, student: Any, batch: Any, signal: Any) -> Any:
        seen.add(signal.kind)
        return step(self, student, batch, signal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogitMethod, "step", spy)
        result = run(make_recipe(loss=KD, teacher={"cache_outputs": remember, **kind}), tmp_path / "box")
    plain = run(make_recipe(loss=KD), tmp_path / "plain")
    assert seen == {kind["answers"]}
    teacher = result["teacher"]
    assert teacher["test"] == plain["teacher"]["test"]  # the network itself is at hand
    assert teacher["queries"] == (ROWS if remember else 4 * ROWS)
    assert (teacher["answers"], teacher["budget"]) == (kind["answers"], None)
    same = result["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-3)
    assert same == (kind["answers"] == "probs")  # from probabilities KD learns the same


def test_a_local_budget(make_recipe: Make, tmp_path: Path) -> None:
    enough = make_recipe(loss=KD, teacher={"answers": "label", "cache_outputs": True, "budget": ROWS})
    assert run(enough, tmp_path / "enough")["teacher"]["budget"] == ROWS
    small = make_recipe(loss=KD, teacher={"answers": "label", "cache_outputs": True, "budget": ROWS - 1})
    with pytest.raises(BudgetError, match=f"expected at most {ROWS - 1} rows .* got {ROWS} more after 0"):
        run(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_studies_of_what_is_told(make_recipe: Make, tmp_path: Path) -> None:
    one = make_recipe()
    recipe = parse(
        ComparisonRecipe,
        {
            "baseline": "KD",
            "seeds": [0, 1],
            "data": {"name": one.data.name, "validation": 0.2},
            "student": {"name": one.student.name},
            "teacher": {"name": "mlp", "answers": "label", "budget": 2 * ROWS},
            "teacher_training": {"epochs": 1},
            "training": {"epochs": 2, "batch_size": 16},
            "settings": {"labels": {}, "best two": {"teacher": {"answers": "topk", "top_k": 2}}},
            "methods": {"KD": KD, "PLD": {"pld": {"loss": "PLDLoss", "top_k": 2}}},
        },
    )
    assert compare(recipe, tmp_path) == (8, 0)
    for path in tmp_path.glob("*/*/seed-*/result.json"):
        teacher = json.loads(path.read_text())["teacher"]
        assert teacher["queries"] == 2 * ROWS, path  # each run has the whole budget
        assert teacher["answers"] == ("label" if "labels" in path.parts else "topk")
    assert len(list(tmp_path.glob("*/*/seed-*/result.json"))) == 8


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"answers": "topk"}, r"expected `top_k` in 1 \.\. 4"),
        ({"answers": "probs", "top_k": 2}, "expected `top_k` only with `answers: topk`"),
        ({"answers": "labels"}, "label"),
        ({"budget": 3}, "expected `teacher.budget` with `teacher.answers` or `teacher.url` alone"),
        ({"floor": 0.1}, "expected `teacher.floor` with"),
        ({"answers": "label", "floor": 2.0}, r"expected `teacher.floor` in \(0, 1\)"),
        ({"url": "http://127.0.0.1:1", "checkpoint": "x"}, "expected `teacher.url` or a network"),
    ],
)
def test_what_a_teacher_may_not_be(teacher: Any, message: str, make_recipe: Make) -> None:
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(loss=KD, teacher=teacher))


def test_features_of_a_black_box(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(
        loss={"pld": {"loss": "FitNetLoss", "student": "body.0"}}, teacher={"answers": "label"}
    )
    with pytest.raises(UserError, match="got a black box that answers with label only"):
        run(recipe, tmp_path / "run")


# Behind a URL -----------------------------------------------------------------------------------------------


def test_a_remembered_server_is_asked_once_about_each_row(
    remote: Make, network: Counting, tmp_path: Path, make_recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(remote({"cache_outputs": True, "budget": 100}), tmp_path / "one")
    assert network.asked == ROWS
    teacher = result["teacher"]
    assert (teacher["queries"], teacher["cached"], teacher["budget"]) == (ROWS, 0, 100)
    assert (teacher["test"], teacher["parameters"]) == (None, None)
    assert "agreement" not in result["last"]["test"]
    assert f"{ROWS} rows to query now (0 are cached); budget 100, 0 of it used" in caplog.text
    # KD learns from probabilities what it learns from logits.
    plain = run(make_recipe(loss=KD, teacher={"mean": [0.0], "std": [1.0]}), tmp_path / "plain")
    assert result["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-3)
    # Another run pays nothing.
    again = run(remote({"cache_outputs": True, "budget": 100}, training={"seed": 1}), tmp_path / "two")
    assert network.asked == ROWS
    assert (again["teacher"]["queries"], again["teacher"]["cached"]) == (ROWS, ROWS)


def test_a_server_that_is_asked_anew_is_asked_once_too(
    remote: Make, network: Counting, tmp_path: Path
) -> None:
    result = run(remote({"budget": ROWS}), tmp_path / "one")
    assert network.asked == ROWS
    assert (result["teacher"]["queries"], result["teacher"]["cached"]) == (ROWS, 3 * ROWS)


def test_a_finished_run_asks_no_server(remote: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(remote(training={"epochs": 1}), tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert identity["teacher"]["class"] == "RemoteTeacher"
    monkeypatch.delattr("luce.recipes.teacher.RemoteTeacher")
    assert run(remote(training={"epochs": 1}), tmp_path / "run") == result


def test_how_a_server_is_reached_makes_no_other_run(remote: Make, tmp_path: Path) -> None:
    result = run(remote({"budget": ROWS}), tmp_path / "one")
    assert run(remote({"budget": 2 * ROWS, "timeout": 9.0, "retries": 1}), tmp_path / "one") == result
    with pytest.raises(UserError, match=r"differs in teacher\.test: False there, True here"):
        run(remote({"budget": ROWS, "test": True}), tmp_path / "one")


def test_rows_that_change_cost_each_time(
    remote: Make, network: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(remote(data={"augment": "crop_flip"}, training={"epochs": 2}), tmp_path / "run")
    assert f"up to {ROWS} rows x 2 epochs, which change each time; no budget" in caplog.text
    assert ROWS < result["teacher"]["queries"] == network.asked <= 2 * ROWS


@pytest.mark.parametrize("remember", [True, False])
def test_a_pool_that_exceeds_the_budget_is_refused_before_anything_is_asked(
    remember: bool, remote: Make, network: Counting, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=f"got {ROWS} more after 0"):
        run(remote({"cache_outputs": remember, "budget": ROWS - 1}), tmp_path / "run")
    assert network.asked == 0
    assert not (tmp_path / "run").exists()


def test_a_tested_server_has_an_accuracy(remote: Make, network: Counting, tmp_path: Path) -> None:
    recipe = remote({"cache_outputs": True, "test": True})
    result = run(recipe, tmp_path / "run")
    assert network.asked == ROWS + 30
    assert 0 <= result["teacher"]["test"]["accuracy"] <= 1
    assert "agreement" in result["last"]["test"]
    assert evaluate(tmp_path / "run", recipe) == result["best"]["test"]
    assert network.asked == ROWS + 30
    elsewhere = remote(
        {"cache_outputs": True, "test": True, "cache": str(tmp_path / "elsewhere"), "budget": 30}
    )
    assert evaluate(tmp_path / "run", elsewhere) == result["best"]["test"]
    assert network.asked == ROWS + 30 + 30  # about the test rows alone
    network.asked = 0
    small = remote({"cache_outputs": True, "test": True, "budget": ROWS, "cache": str(tmp_path / "new")})
    with pytest.raises(BudgetError, match=f"got {ROWS + 30} more"):
        run(small, tmp_path / "other")
    assert network.asked == 0


def test_reports_do_without_the_teachers_figures(remote: Make, tmp_path: Path) -> None:
    run(remote({"cache_outputs": True}), tmp_path / "run")
    found = runs.read_run(tmp_path / "run")
    assert found.teacher is not None
    assert (found.teacher.accuracy, found.teacher.parameters, found.teacher.queries) == (None, None, ROWS)
    assert f"a black box that answered {ROWS} queries" in write_html(tmp_path / "run").read_text()
    assert "teacher" not in markdown_table(found)


def test_a_server_that_ends_in_the_middle_loses_nothing(
    make_recipe: Make, network: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, after an epoch with its checkpoint: the same recipe goes on and asks nothing twice."""
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("TOY_TOKEN", TOKEN)

    def recipe(url: str, name: str) -> Recipe:
        made = make_recipe(loss=KD, data={"augment": "crop_flip"})
        given = {"url": url, "token_env": "TOY_TOKEN", "cache": str(tmp_path / name), "retries": 1}
        made.teacher = parse(Recipe, {"teacher": given}).teacher
        return made

    with serving(network, description=DESCRIPTION) as url:
        whole = run(recipe(url, "whole.sqlite"), tmp_path / "whole")
        port = int(url.rpartition(":")[2])
    paid, network.asked = network.asked, 0
    step, calls = LogitMethod.step, iter(range(10**6))

    with serving(network, port, description=DESCRIPTION) as url, pytest.MonkeyPatch.context() as patch:

        def fails(*arguments: Any) -> Any:
            if next(calls) == 13:  # in the third epoch
                raise RemoteError("the server is gone; earlier answers are cached")
            return step(*arguments)

        patch.setattr(LogitMethod, "step", fails)
        with pytest.raises(RemoteError, match="earlier answers are cached"):
            run(recipe(url, "cut.sqlite"), tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    before = network.asked
    assert before > 2 * ROWS * 0.8
    with pytest.raises(RemoteError, match="no connection"):
        run(recipe(url, "cut.sqlite"), tmp_path / "cut")
    with serving(network, port, description=DESCRIPTION) as url:
        cut = run(recipe(url, "cut.sqlite"), tmp_path / "cut")
    assert network.asked == paid
    assert cut["teacher"]["queries"] == whole["teacher"]["queries"] == paid
    assert cut["teacher"]["cached"] > 0
    assert cut["last"] == whole["last"]


def test_servers_that_do_not_fit_the_data(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said, message in (
        ({"classes": 5}, "for the 4 classes .* got one for 5"),
        ({"classes": ["0", "1", "2", "7"]}, "for the classes of .*, got `7` in place of `3` from http"),
        ({"input_shape": [3]}, r"of shape \(1, 8, 8\), got one for \(3,\)"),
    ):
        with puppet(good, **{"classes": ["0", "1", "2", "3"], "input_shape": None, **said}) as server:
            recipe = make_recipe(loss=KD)
            recipe.teacher = parse(
                Recipe, {"teacher": {"url": server.url, "cache": str(tmp_path / "answers")}}
            ).teacher
            with pytest.raises(UserError, match=message):
                prepare(recipe)
            assert not server.asked


def test_where_the_token_is(remote: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    run(
        remote({"token_env": None, "token_file": str(tmp_path / "token")}, training={"epochs": 1}),
        tmp_path / "run",
    )
    everything = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"
    )
    assert TOKEN.encode() not in everything
    with pytest.raises(UserError, match="cannot read the token in nowhere"):
        prepare(remote({"token_env": None, "token_file": "nowhere"}))
    monkeypatch.delenv("TOY_TOKEN")
    with pytest.raises(UserError, match="expected the token in `TOY_TOKEN`, and there is no such variable"):
        prepare(remote())
    with pytest.raises(RemoteError, match="status 401"):
        prepare(remote({"token_env": None}))


def test_one_server_for_a_comparison(url: str, network: Counting, make_recipe: Make, tmp_path: Path) -> None:
    one = make_recipe()
    content = {
        "baseline": "KD",
        "seeds": [0, 1],
        "data": {"name": one.data.name, "validation": 0.2},
        "student": {"name": one.student.name},
        "teacher": {
            "url": url,
            "token_env": "TOY_TOKEN",
            "cache_outputs": True,
            "cache": str(tmp_path / "answers"),
        },
        "training": {"epochs": 1, "batch_size": 16},
        "methods": {"KD": KD, "PLD": {"pld": {"loss": "PLDLoss"}}},
    }
    assert compare(parse(ComparisonRecipe, content), tmp_path / "out") == (4, 0)
    assert network.asked == ROWS
    write_html(tmp_path / "out")
    table = markdown_table(runs.read_comparison(tmp_path / "out"))
    assert "PLD" in table
    assert "| teacher |" not in table
    with pytest.raises(UserError, match=r"expected no `teacher_training` with `teacher.url`"):
        parse(ComparisonRecipe, {**content, "teacher_training": {"epochs": 1}})


def test_distill_takes_any_teacher(url: str, network: Counting, tmp_path: Path) -> None:
    import luce
    from luce.remote import RemoteTeacher

    pairs = torch.utils.data.TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 4)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    teacher = RemoteTeacher(url, token=TOKEN)
    luce.distill(student, teacher, pairs, epochs=2, show_progress=False)
    assert network.asked == teacher.queries == 20
