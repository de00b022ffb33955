"""What the README and the docs tell a user to type works, and what they point to is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from luce.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Less of everything: what is tried is the way through, not the figures at its end.
SHORTER = {
    "train": ["--training.epochs", "2"],
    "distill": ["--training.epochs", "2"],
    "check": ["--examples", "3"],
    "compare": ["--training.epochs", "1", "--teacher_training.epochs", "1", "--seeds", "[0]"],
}


def commands() -> list[list[str]]:
    """The README's lines that begin with ``luce``, without their comments."""
    lines = re.findall(r"^    luce (.+)$", README, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readme_shows_every_command() -> None:
    from luce.cli import COMMANDS

    assert {words[0] for words in commands()} == set(COMMANDS)


def check_serves(words: list[str]) -> None:
    """A command that would not end: it says where it can be reached, and can be."""
    run = subprocess.Popen([sys.executable, "-m", "luce", *words], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    try:
        lines = [run.stdout.readline() for _ in range(3)]
        url = lines[1].removeprefix("url: ").strip()
        with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
            assert answer.status == 200
    finally:
        run.kill()
        run.communicate()


def test_readme_commands_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    for words in commands():
        if words[0] == "serve":
            check_serves(words)
            continue
        status = main([*words, *SHORTER.get(words[0], [])])
        assert status == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "runs/demo/report.html").exists()

    code = re.search(
        r"```python\n(.*?)```", (ROOT / "docs/runs.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert code is not None
    exec(code[1], {})


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing
