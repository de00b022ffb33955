"""The page of a run or a comparison."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config import as_path
from ..documents import dump_yaml
from ..errors import UserError
from . import plots
from .canvas import colours
from .page import Gallery, Page, write_page
from .runs import Comparison, Network, Run, read_comparison, read_run
from .statistics import number, summarise, verdict
from .table import table

# Shown first, in this order; other fields of an environment follow.
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


def write_html(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run folder or a comparison folder.

    Args:
        folder: Holds ``comparison.yaml`` or the files of a single run.
        out: Path of the page; ``report.html`` in the folder by default. An existing page is replaced
            atomically.

    Returns:
        The path of the page.

    Raises:
        UserError: If the folder is of neither kind, a file in it cannot be read, or the page not written.
    """
    folder = as_path(folder)
    out = folder / "report.html" if out is None else as_path(out)
    if (folder / "comparison.yaml").exists():
        page = _comparison_page(read_comparison(folder))
    elif (folder / "recipe.yaml").exists() or (folder / "result.json").exists():
        page = _run_page(read_run(folder))
    else:
        raise UserError(f"{folder} holds neither comparison.yaml nor a run; name a folder that Luce wrote")
    return write_page(page, out)


def _comparison_page(comparison: Comparison) -> Page:
    calibration = [
        Gallery(
            f"Calibration, {label}",
            "Accuracy against confidence, pooled over seeds; larger dots hold more examples. On the dashed "
            "line confidence equals accuracy; below it the student is overconfident.",
            panels,
            small=True,
        )
        for label, panels in plots.reliability(comparison).items()
    ]
    return Page(
        title=comparison.title,
        kind="Comparison",
        question=comparison.question,
        answers=list(verdict(summarise(comparison)).values()),
        table=table(comparison),
        colours=colours(comparison),
        galleries=[
            Gallery(
                "Learning curves",
                "Validation accuracy: mean over seeds, with a band of one standard deviation. The dashed "
                "line is the teacher's test accuracy.",
                plots.accuracy_curves(comparison),
            ),
            Gallery(
                f"Gain over {comparison.baseline}",
                "Small dots are seeds, bars 95% intervals. Right of zero is better. A filled circle marks a "
                "difference beyond noise after Holm's correction, a hollow one a difference within noise.",
                plots.differences(comparison),
            ),
            Gallery(
                "Accuracy against queries",
                "Test accuracy at the last epoch against the number of images sent to the teacher: mean over "
                "seeds, with a band of one standard deviation. Further left is cheaper, higher is better.",
                plots.queries(comparison),
            ),
            Gallery(
                "Distance from the teacher",
                "Share of test examples on which student and teacher predict different classes, and the KL "
                "divergence from the teacher to the student. A shorter bar is closer to the teacher.",
                plots.fidelity(comparison),
            ),
            *calibration,
        ],
        warnings=[("Incomplete.", _missing(comparison))] if comparison.missing else [],
        command=comparison.command,
        recipe=dump_yaml(comparison.recipe),
        facts=_facts(comparison.finished()),
    )


def _run_page(run: Run) -> Page:
    command = "train" if run.teacher is None else "distill"
    return Page(
        title=f"{run.method}, seed {run.seed}",
        kind="Run",
        answers=[
            f"{run.student.model} with {run.student.parameters:,} parameters reached "
            f"{number(run.last.test.accuracy)}% test accuracy at the last epoch"
            f"{'' if run.teacher is None else _teacher_clause(run.teacher)}. "
            "One run cannot tell how much of this is chance."
        ],
        table=table(run),
        galleries=[
            Gallery(
                "Learning curves",
                "Validation accuracy, with the teacher's test accuracy as a dashed line, and the terms of "
                "the loss.",
                [*plots.accuracy_curves(run), *plots.loss_curves(run)],
            ),
            Gallery(
                "Generated images and the teacher's answers",
                "A sample of the images sent to the teacher, each with the class that the teacher predicts "
                "and its probability. The probability is 100% if the teacher returns class labels only.",
                plots.samples(run),
                wide=True,
            ),
            Gallery(
                "Calibration",
                "Accuracy against confidence; larger dots hold more examples. On the dashed line confidence "
                "equals accuracy; below it the student is overconfident.",
                [plot for panels in plots.reliability(run).values() for plot in panels],
                small=True,
            ),
        ],
        command=f"luce {command} {shlex.quote(str(run.folder / 'recipe.yaml'))}",
        recipe=dump_yaml(run.recipe),
        facts=_facts([run]),
    )


def _teacher_clause(teacher: Network) -> str:
    """Return the end of the answer: the teacher's accuracy, model, size and queries as far as known."""
    score = "" if teacher.accuracy is None else f"{number(teacher.accuracy)}% for "
    size = "" if teacher.parameters is None else f" with {teacher.parameters:,} parameters"
    queries = "" if teacher.queries is None else f", a black box that answered {teacher.queries:,} queries"
    return f", {'against' if score else 'with'} {score}its teacher, {teacher.model}{size}{queries}"


def _missing(comparison: Comparison) -> str:
    names = ", ".join(path.relative_to(comparison.folder).as_posix() for path in comparison.missing)
    return f"These runs have not finished, so no figure below includes them: {names}."


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the runs' hardware and versions; a field that differs between runs lists all its values."""
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
