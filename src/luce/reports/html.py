"""One self-contained HTML page for a run or a comparison: no network, no scripts, no fonts to fetch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from . import plots
from .canvas import Plot, colours
from .runs import Comparison, Network, Run, read_comparison, read_run
from .statistics import number, summarise, verdict
from .table import table

# The order in which a reader asks; whatever else an environment holds follows.
ENVIRONMENT = (
    "luce",
    "commit",
    "python",
    "torch",
    "accelerate",
    "platform",
    "processor",
    "threads",
    "device",
)
FOOTER = "Written by Luce from the run folders alone. It loads nothing from the network."


@dataclass(frozen=True)
class Gallery:
    """Plots of one kind: ``small`` panels stand four in a row where there is room, ``wide`` ones alone."""

    heading: str
    caption: str
    plots: Sequence[Plot]
    small: bool = False
    wide: bool = False


def write_html(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run folder or a comparison folder.

    Args:
        folder: Holds ``comparison.yaml`` or the files of a single run.
        out: Where the page goes; ``report.html`` in the folder by default. A page that exists is replaced
            only once the new one is complete.

    Returns:
        The path of the page.

    Raises:
        UserError: If the folder is of neither kind or a file in it cannot be read.
    """
    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    if (folder / "comparison.yaml").exists():
        page = _comparison_page(read_comparison(folder))
    elif (folder / "recipe.yaml").exists() or (folder / "result.json").exists():
        page = _run_page(read_run(folder))
    else:
        raise UserError(f"{folder} holds neither comparison.yaml nor a run; name a folder that Luce wrote")
    return write_page(page, out)


def write_page(page: Mapping[str, Any], out: Path) -> Path:
    """Fill the template and put the page in its place once it is complete; returns the path.

    Raises:
        UserError: If it cannot be written.
    """
    # Under a hidden name beside its goal: on one file system, so the last step cannot stop half way.
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(_render(page), encoding="utf-8")
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error}); name another place for the report") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return out


def _render(page: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("luce.reports").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(page)


def _comparison_page(comparison: Comparison) -> dict[str, Any]:
    runs = comparison.finished()
    calibration = [
        Gallery(
            f"Calibration, {label}",
            "Accuracy against confidence, pooled over seeds; larger dots hold more examples. "
            "On the dashed line confidence is earned, below it the student is too sure.",
            found,
            small=True,
        )
        for label, found in plots.reliability(comparison).items()
    ]
    galleries = [
        Gallery(
            "Learning curves",
            "Mean over seeds, band of one standard deviation; dashed, the teacher on the test set. "
            "Look for who climbs sooner and who ends higher.",
            plots.accuracy_curves(comparison),
        ),
        Gallery(
            f"Gain over {comparison.baseline}",
            "Small dots are seeds, bars 95% intervals. Right of zero is better; "
            "a filled circle is beyond noise after Holm's correction, a hollow one is not.",
            plots.differences(comparison),
        ),
        Gallery(
            "Accuracy against queries",
            "Test accuracy at the last epoch against the images that the teacher was asked about, mean over "
            "seeds, band of one standard deviation. Further left is cheaper, higher is better.",
            plots.queries(comparison),
        ),
        Gallery(
            "Distance from the teacher",
            "How often student and teacher choose differently, and the KL divergence from the teacher to the "
            "student. Shorter is closer.",
            plots.fidelity(comparison),
        ),
        *calibration,
    ]
    return {
        "title": comparison.title,
        "kind": "Comparison",
        "question": comparison.question,
        "answers": list(verdict(summarise(comparison)).values()),
        "table": table(comparison),
        "colours": colours(comparison),
        "galleries": [gallery for gallery in galleries if gallery.plots],
        "warnings": [("Incomplete.", _missing(comparison))] if comparison.missing else [],
        "command": comparison.command,
        "recipe": yaml.safe_dump(dict(comparison.recipe), sort_keys=False, allow_unicode=True),
        "facts": _facts(runs),
        "footer": FOOTER,
    }


def _told_of(teacher: Network) -> str:
    """The teacher in half a sentence, as far as it is known."""
    score = "" if teacher.accuracy is None else f"{number(teacher.accuracy)}% for "
    size = "" if teacher.parameters is None else f" with {teacher.parameters:,} parameters"
    asked = "" if teacher.queries is None else f", a black box that was asked about {teacher.queries:,} rows"
    return f", {'against' if score else 'with'} {score}its teacher, {teacher.model}{size}{asked}"


def _run_page(run: Run) -> dict[str, Any]:
    last = run.last.test
    teacher = "" if run.teacher is None else _told_of(run.teacher)
    answer = (
        f"{run.student.model} with {run.student.parameters:,} parameters reached {number(last.accuracy)}% "
        f"test accuracy at the last epoch{teacher}. "
        "One run cannot say how much of this is chance."
    )
    calibration = [plot for found in plots.reliability(run).values() for plot in found]
    galleries = [
        Gallery(
            "Learning curves",
            "Validation accuracy, with the teacher's test accuracy dashed, and the terms of the loss.",
            [*plots.accuracy_curves(run), *plots.loss_curves(run)],
        ),
        Gallery(
            "What the teacher was asked",
            "Some of the images, with the class that the teacher sees in each and its probability, which is "
            "100% where the teacher tells a class alone.",
            plots.samples(run),
            wide=True,
        ),
        Gallery(
            "Calibration",
            "Larger dots hold more examples. "
            "On the dashed line confidence is earned, below it the student is too sure.",
            calibration,
            small=True,
        ),
    ]
    command = "train" if run.teacher is None else "distill"
    return {
        "title": f"{run.method}, seed {run.seed}",
        "kind": "Run",
        "question": "",
        "answers": [answer],
        "table": table(run),
        "colours": {},
        "galleries": [gallery for gallery in galleries if gallery.plots],
        "warnings": [],
        "command": f"luce {command} {shlex.quote(str(run.folder / 'recipe.yaml'))}",
        "recipe": yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True),
        "facts": _facts([run]),
        "footer": FOOTER,
    }


def _missing(comparison: Comparison) -> str:
    names = ", ".join(path.relative_to(comparison.folder).as_posix() for path in comparison.missing)
    return f"Not run or not finished, and so not in any figure below: {names}."


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the runs ran on; a value that changed between runs shows every value it had."""
    known = dict.fromkeys([*ENVIRONMENT, *(name for run in runs for name in run.environment)])
    known.pop("started", None)
    facts = [("runs", str(len(runs))), ("training time", f"{sum(run.seconds for run in runs):,.1f} s")]
    started = sorted(str(run.environment["started"]) for run in runs if run.environment.get("started"))
    if started:
        facts.append(("started", " to ".join(dict.fromkeys([started[0], started[-1]]))))
    for name in known:
        values = [run.environment[name] for run in runs if run.environment.get(name) is not None]
        facts.append((name, ", ".join(dict.fromkeys(map(str, values))) or "not recorded"))
    return facts
