"""``luce check``: the table, the exit status and the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from luce import errors

MINE = """
import torch.nn.functional as F

def kd(student_logits, teacher_logits, temperature=4.0):
    q, p = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1)
    return F.kl_div(q, p, reduction="mean")
"""


@pytest.fixture(autouse=True)
def mine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss in the working directory, which is not on the path, as for a console script."""
    (place / "mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def test_a_broken_loss_in_the_working_directory(luce) -> None:
    laws = "gradient,vanishing_classes,shift_invariant,zero_at_equality"
    answer = luce(
        "check",
        "mine:kd",
        "--laws",
        laws,
        "--claims",
        "vanishing_classes,shift_invariant",
        "--json",
        "out/found.json",
    )
    assert answer.status == 1
    assert answer.err == ""
    assert (
        "kd, called as loss(student_logits, teacher_logits); claims vanishing_classes, shift_invariant"
        in answer.out
    )
    assert "2 held, 1 broken, 1 not applicable" in answer.out
    assert "--claims NAME,..." in answer.out
    assert "student_logits=[[0.0, 0.125]]" in answer.out
    assert "Extra classes of probability 0 in both networks change nothing" in answer.out

    found = json.loads(Path("out/found.json").read_text())
    assert found["loss"] == "kd"
    assert found["claims"] == ["shift_invariant", "vanishing_classes"]
    assert set(found["versions"]) == {"luce", "torch", "hypothesis"}
    states = {verdict["law"]: verdict["state"] for verdict in found["verdicts"]}
    assert states == {
        "gradient": "held",
        "vanishing_classes": "broken",
        "shift_invariant": "held",
        "zero_at_equality": "not applicable",
    }
    [broken] = [verdict for verdict in found["verdicts"] if verdict["state"] == "broken"]
    assert broken["example"]["extra_classes"] == 1
    assert broken["evidence"].startswith("value with a class at -10000 appended")
    assert broken["statement"].startswith("Extra classes")


def test_a_sound_loss(luce) -> None:
    answer = luce(
        "check",
        "luce:KDLoss",
        "--options",
        '{"temperature": 4}',
        "--claims",
        "divergence,masking",
        "--examples",
        "5",
    )
    assert answer.status == 0
    assert 'KDLoss {"temperature": 4}, called as loss(student_logits, teacher_logits, target)' in answer.out
    assert " 0 broken" in answer.out


def test_against_another_implementation(luce) -> None:
    words = ("check", "luce:reverse_kl_loss", "--laws", "implementations", "--examples", "5")
    assert luce(*words, "--against", "luce:reverse_kl_loss").status == 0
    assert luce(*words, "--against", "luce:kd_loss").status == 1


def test_laws_can_be_left_out(luce) -> None:
    words = ("check", "mine:kd", "--claims", "divergence", "--examples", "5", "--dtype", "float32")
    assert luce(*words).status == 1
    assert luce(*words, "--without", "vanishing_classes").status == 0


def test_the_help_lists_laws_adapters_and_groups(luce) -> None:
    answer = luce("check", "--help")
    assert answer.status == 0
    for word in (
        "usage: luce check",
        "exit status",
        "runs its module's code",
        "torchdistill",
        "top_k_limit",
        "ranking",
    ):
        assert word in answer.out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "expected LOSS; luce check --help describes the arguments"),
        (["mine"], "expected `module:callable`, such as luce:kd_loss, got `mine`"),
        (["nowhere:kd"], "could not import `nowhere`"),
        (["mine:kdd"], "unknown attribute of `mine` `kdd`; did you mean `kd`"),
        (["mine:nothing"], "unknown attribute of `mine` `nothing`; known: F, kd"),
        (["quits:kd"], "could not import `quits` for `quits:kd` (SystemExit: 3)"),
        (["mine:kd", "--adapter", "x"], "unknown adapter `x`; known: auto,"),
        (["mine:kd", "--adapter", "student"], "called as loss(student_logits, target) raised"),
        (["mine:kd", "--claims", "kl"], "unknown claim `kl`; known: all,"),
        (["mine:kd", "--laws", "gradients"], "unknown law `gradients`; did you mean `gradient`"),
        (["mine:kd", "--options", "temperature=4"], "expected `--options` as a mapping, got 'temperature=4'"),
        (["mine:kd", "--options", '{"heat": 4}'], "unknown option of `kd` `heat`"),
        (["mine:kd", "--examples", "0"], "expected `--examples` of at least 1, got 0"),
        (["mine:kd", "--against", "mine:x"], "unknown attribute of `mine` `x`"),
        (["mine:kd", "--law", "gradient"], "unknown option `--law`; did you mean `--laws`"),
        (["mine:kd", "--json", "mine.py/x"], "expected a folder that can be written to"),
    ],
)
def test_what_check_refuses(words: list[str], reason: str, refuses, place: Path) -> None:
    (place / "quits.py").write_text("raise SystemExit(3)")
    assert reason in refuses("check", *words)


def test_without_hypothesis(refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert "pip install 'luce[check]'" in refuses("check", "mine:kd")
    assert errors.MissingExtra.__mro__[1] is errors.UserError


@pytest.mark.parametrize("words", [["--laws", "[]"], ["--laws", "gradient", "--without", "gradient"]])
def test_a_check_of_no_law_is_refused(words: list[str], refuses) -> None:
    assert "expected at least one law in `--laws`" in refuses("check", "luce:KDLoss", *words)
