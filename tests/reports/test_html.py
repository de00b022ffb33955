"""The page: whole, alone in the world, safe with any name, and right in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from luce.errors import UserError
from luce.reports import write_html

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory, write_comparison):
    """A page that tests read and leave alone."""
    return write_html(digits(tmp_path_factory.mktemp("report"), write_comparison))


@pytest.fixture
def folder(tmp_path, write_comparison):
    return digits(tmp_path / "comparison", write_comparison)


def digits(folder, write_comparison):
    methods = {"cross-entropy": [0.84, 0.85, 0.83], "KD": [0.88, 0.87, 0.88], "PLD": [0.91, 0.93, 0.89]}
    settings = {"few": {"description": "5 labels per class"}, "all": {"description": "all labels"}}
    return write_comparison(folder, {"few": methods, "all": methods}, settings=settings)


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_self_contained(report):
    text, page = read(report)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}:
            assert value.startswith(("#", "data:")), (name, value)
    assert "script" not in page.tags
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_page_answers_the_question(report):
    text, page = read(report)
    words = " ".join("".join(page.text).split())
    assert "Does it help?" in words
    assert "With 5 labels per class, PLD reached 91.0% test accuracy at the last epoch" in words
    assert "luce compare recipes/digits.yaml" in words
    assert "abc123" in words
    # Two settings: curves, differences and fidelity; and calibration for each of three methods.
    assert page.tags.count("svg") == 2 * (3 + 3)
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{20,}', text)) == 12


def test_ids_are_unique_and_references_resolve(report):
    _, page = read(report)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    wanted |= {value for name, value in page.attributes if name == "aria-labelledby"}
    assert wanted <= set(ids)


def test_the_page_is_the_same_every_time(report):
    first = report.read_bytes()
    assert write_html(report.parent).read_bytes() == first


def test_hostile_names_stay_text(tmp_path, write_comparison):
    hostile = "<script>alert(1)<!-- \"$x'&"
    folder = write_comparison(
        tmp_path,
        {"few": {"cross-entropy": [0.8, 0.81], hostile: [0.9, 0.92]}},
        title=hostile,
        question=hostile,
        command=hostile,
        settings={"few": {"description": hostile}},
    )
    text, page = read(write_html(folder))
    assert "script" not in page.tags
    assert "<script" not in text
    assert hostile in "".join(page.text)


def test_missing_runs_are_named(folder):
    (folder / "few" / "KD" / "seed-2" / "result.json").unlink()
    text = write_html(folder).read_text()
    assert "Incomplete." in text
    assert "few/KD/seed-2" in text


def test_a_single_run(run_folder, tmp_path):
    out = write_html(run_folder, tmp_path / "new" / "page.html")
    assert out == tmp_path / "new" / "page.html"
    text, page = read(out)
    assert "mlp with 12,345 parameters reached 91.0%" in "".join(page.text)
    assert page.tags.count("svg") == 3
    assert "luce distill" in text


def test_a_run_of_few_figures(run_folder):
    """No epochs, no teacher, nothing recorded about the machine, numbers that are not finite."""
    (run_folder / "metrics.jsonl").write_text("")
    (run_folder / "environment.json").write_text('{"commit": null}')
    path = run_folder / "result.json"
    result = json.loads(path.read_text()) | {"teacher": None}
    result["last"]["test"] |= {"nll": float("nan"), "reliability": []}
    path.write_text(json.dumps(result))
    text, page = read(write_html(run_folder))
    assert page.tags.count("svg") == 1
    assert "luce train" in text
    assert "not recorded" in text


def test_one_seed_and_one_epoch(tmp_path, write_run, write_comparison):
    folder = write_comparison(tmp_path, {"few": {"cross-entropy": [0.8]}})
    write_run(folder / "few" / "PLD" / "seed-0", "PLD", 0, 0.9, epochs=6)
    for path in folder.rglob("metrics.jsonl"):
        path.write_text(path.read_text().splitlines()[0])
    _, page = read(write_html(folder))
    assert "no interval, so no claim" in "".join(page.text)


def test_a_failed_report_leaves_the_old_one(run_folder, monkeypatch):
    folder = run_folder
    out = write_html(folder)
    before = out.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("luce.files.os.replace", full)
    with pytest.raises(UserError, match="no space left"):
        write_html(folder)
    assert out.read_bytes() == before
    assert [path.name for path in folder.glob("*.html*")] + [p.name for p in folder.glob(".*")] == [
        "report.html"
    ]


def test_a_folder_of_neither_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither comparison\.yaml nor a run"):
        write_html(tmp_path)


def browse(page, tmp_path, *options):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_every_plot(report, tmp_path):
    # A script of the test's own, in a copy without the policy that forbids scripts, measures what is drawn.
    measure = (
        "<script>addEventListener('load', () => { document.body.dataset.sizes = JSON.stringify("
        "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().width, "
        "s.getBoundingClientRect().height])); document.body.dataset.overflow = "
        "document.documentElement.scrollWidth - innerWidth })</script></body>"
    )
    text = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text(encoding="utf-8"))
    copy = tmp_path / "measured.html"
    copy.write_text(text.replace("</body>", measure), encoding="utf-8")
    done = browse(copy, tmp_path, "--dump-dom", "--window-size=500,900")
    assert "+7.0*" in done.stdout
    sizes = json.loads(re.search(r'data-sizes="([^"]*)"', done.stdout)[1])
    assert len(sizes) == 12
    assert all(width > 100 and height > 80 for width, height in sizes)
    assert int(re.search(r'data-overflow="(-?\d+)"', done.stdout)[1]) <= 0


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_has_nothing_to_complain_of(report, tmp_path):
    picture = tmp_path / "page.png"
    done = browse(report, tmp_path, f"--screenshot={picture}", "--window-size=1200,2000")
    assert "CONSOLE" not in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
