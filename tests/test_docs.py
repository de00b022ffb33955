"""The code, the commands, the settings and the links of the documentation."""

from __future__ import annotations

import doctest
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

import luce
from luce.config import parse
from luce.conformance.laws import claimed_laws
from luce.recipes import ComparisonRecipe, Recipe, build_method
from luce.remote import wire
from luce.remote.service import Service

from . import pages

WITH_COMMANDS = [page for page in pages.DOCS if pages.commands(pages.read(page))]
# test_readme.py runs their code, beside the runs that it reads.
OF_RUNS = ["docs/compare.md", "docs/runs.md"]
WITH_PYTHON = [
    page for page in pages.DOCS if pages.blocks(pages.read(page), "python") and page not in OF_RUNS
]
WITH_YAML = [page for page in pages.DOCS if pages.blocks(pages.read(page), "yaml")]
# Of files that a page speaks of without showing them.
FILES = {"docs/conformance.md": {"mine.py": "from luce import kd_loss\n"}}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes in it."""
    pages.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another page
    return tmp_path


def write_files(page: str, folder: Path) -> None:
    """Write the files that a page shows, under the names in their titles."""
    text = pages.read(page)
    shown = [block for language in ("python", "yaml") for block in pages.blocks(text, language)]
    for name, content in [*shown, *FILES.get(page, {}).items()]:
        if name is not None:
            (folder / name).write_text(content, encoding="utf-8")


def names_of(page: str) -> dict[str, Any]:
    """Return what a page takes for given: networks, data and losses of the reader's own."""
    if page == "docs/methods.md":
        teacher = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
        data = TensorDataset(torch.randn(64, 20), torch.randint(5, (64,)))
        return {"student": nn.Linear(20, 5), "teacher": teacher, "data": data}
    if page == "docs/conformance.md":
        return {"my_loss": luce.kd_loss}
    return {}


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_code_of_a_page_runs(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names = names_of(page)
    # Three examples show that the call is right; the laws themselves have tests of their own.
    monkeypatch.setattr("luce.conformance.check", partial(luce.conformance.check, examples=3))
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for number, (_, code) in enumerate(pages.blocks(pages.read(page), "python")):
        if code.startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(code, names, f"{page}[{number}]", page, None)
            runner.run(example, clear_globs=False)
            names.update(example.globs)
        else:
            exec(compile(code, f"{page}[{number}]", "exec"), names)
    assert runner.summarize(verbose=False).failed == 0


def test_the_method_of_ones_own_trains_its_teacher() -> None:
    (_, code), *_ = pages.blocks(pages.read("docs/methods.md"), "python")
    torch.manual_seed(0)
    names = names_of("docs/methods.md")
    exec(code.replace("PLDLoss()))", "PLDLoss()), teacher_lr=0.1), epochs=3, show_progress=False"), names)
    history = names["fitted"].history
    teacher_losses = [record["train"]["teacher"] for record in history]
    assert teacher_losses[0] > teacher_losses[1] > teacher_losses[2]


@pytest.mark.parametrize("page", WITH_YAML)
def test_the_settings_of_a_page_are_known(page: str) -> None:
    for _, text in pages.blocks(pages.read(page), "yaml"):
        content = yaml.safe_load(text)
        if "methods" in content:
            comparison = parse(ComparisonRecipe, content)
            recipes = [comparison.recipe("all-labels", method, seed=0) for method in comparison.methods]
        else:
            recipes = [parse(Recipe, content)]
        for recipe in recipes:
            build_method(recipe)


def test_the_recipe_on_the_page_of_recipes_is_that_of_the_repository() -> None:
    (_, shown), *_ = pages.blocks(pages.read("docs/recipes.md"), "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load(pages.read("recipes/digits.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page != "docs/commands.md"])
def test_the_commands_of_a_page_work(page: str, workplace: Path) -> None:
    write_files(page, workplace)
    pages.run(["train", "recipes/digits-teacher.yaml"])
    pages.run(["distill", "recipes/digits.yaml"])
    shown = [command for command in pages.commands(pages.read(page)) if pages.importable(command)]
    assert shown
    for command in shown:
        pages.run(command)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "recipes/README.md", *pages.DOCS]
)
def test_relative_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", pages.read(page))
    folder = (pages.ROOT / page).parent
    missing = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert not [link for link in missing if not link.startswith("api/")]  # written by docs/hooks.py


def test_the_claims_of_the_conformance_page_are_known() -> None:
    """Its commands need packages that are not installed, so that no other test parses them."""
    claims = re.findall(r"--claims ([a-z_,]+)", pages.read("docs/conformance.md"))
    assert len(claims) >= 15
    for names in claims:
        claimed_laws(names.split(","))


def test_the_messages_of_the_protocol_page_are_valid() -> None:
    blocks = pages.blocks(pages.read("docs/black-box.md"), "json")
    info, response, array = (json.loads(text) for _, text in blocks)
    Service.read(info)
    service = Service.read({**info, "model": response["model"]})
    assert service.read_answers(response, rows=1).tolist() == [[0.0, pytest.approx(0.979)]]
    assert array.keys() == wire.pack(np.zeros((1,), dtype=array["dtype"])).keys()
