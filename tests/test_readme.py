"""What the README tells a user to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luce.cli import COMMANDS

from . import pages

README = pages.read("README.md")
SYSTEMS = README[README.index("## Eleven papers") : README.index("## Results")]


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 8192


def test_the_commands_of_the_readme_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = pages.commands(README.replace(SYSTEMS, ""))
    assert [name for name, *_ in shown] == ["train", "distill", "compare", "report", "check"]
    for command in [*shown, ["info"]]:
        pages.run(command)
    assert (tmp_path / "runs/demo/report.html").exists()
    for page in ("docs/runs.md", "docs/compare.md"):
        for _, code in pages.blocks(pages.read(page), "python"):
            exec(code, {})


def test_every_system_has_a_paper_and_a_command() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| \[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/(\d{4}\.\d{5})\) \|", SYSTEMS, re.M
    )
    assert len(rows) == 11
    assert all(name == link for name, link in rows)
    assert len(pages.commands(SYSTEMS)) + len(re.findall(r"`make bench CASES=softmax`", SYSTEMS)) == 11


@pytest.mark.slow
def test_the_command_of_every_system_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    pages.run(["train", "recipes/digits-teacher.yaml"])
    for command in pages.commands(SYSTEMS):
        pages.run(command)


@pytest.mark.slow
def test_the_page_of_commands_shows_all_and_they_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = pages.commands(pages.read("docs/commands.md"))
    assert {name for name, *_ in shown} == set(COMMANDS)
    for command in shown:
        pages.run(command)
