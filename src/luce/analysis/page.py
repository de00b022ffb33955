"""A diagnosis for people: a table, sentences and a page; and for programs: plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..reports.canvas import BLUE, OTHERS, draw
from ..reports.page import Gallery, Page, write_page
from ..reports.plots import paint_reliability
from ..reports.runs import Bin
from ..reports.statistics import number
from ..reports.table import NOTHING, Section, Table
from . import plots
from .findings import Finding, findings
from .knowledge import Diagnosis, Knowledge, Pull
from .limits import Limits

REFERENCES = {"label_smoothing": "label smoothing", "class_mean": "class_mean", "true_prob": "true_prob"}


@dataclass(frozen=True)
class DiagnosisReport:
    """Everything that is known of a teacher on some data.

    Attributes:
        teacher: Its name.
        data: Its name.
        classes: Their names.
        student: What the teacher is to pull at, in words.
        train: On the rows to learn from, with a student.
        held_out: On rows it was not trained on, with the same student; None if there are none.
        held_out_rows: Which rows these are, in words.
        sweep: On rows to learn from, at other temperatures.
        limits: Student and teacher between KD and logit matching, on rows to learn from.
        suggested_temperature: `luce.suggest_temperature` of the rows to learn from.
        reliability: Of the teacher at temperature 1, by split.
        command: That makes the report again.
        facts: Further lines for the end of the page.
    """

    teacher: str
    data: str
    classes: tuple[str, ...]
    student: str
    train: Diagnosis
    held_out: Diagnosis | None
    held_out_rows: str
    sweep: tuple[Diagnosis, ...]
    limits: Limits
    suggested_temperature: float
    reliability: Mapping[str, Sequence[Bin]]
    command: str
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def splits(self) -> dict[str, Diagnosis]:
        return {"training": self.train} | ({} if self.held_out is None else {"held out": self.held_out})

    @property
    def columns(self) -> dict[str, Knowledge]:
        """The teacher on each split, and the reference teachers on the training rows."""
        return {name: found.teacher for name, found in self.splits.items()} | {
            REFERENCES[name]: found for name, found in self.train.references.items()
        }

    @property
    def findings(self) -> tuple[Finding, ...]:
        return findings(self.train, self.held_out)


def answers(report: DiagnosisReport) -> list[str]:
    """What the figures say, a sentence each."""
    teacher, shares = report.train.teacher, report.train.teacher.terms.shares
    said = [
        f"Of what the teacher says beyond the labels of {teacher.rows:,} training rows at temperature "
        f"{report.train.temperature:g}, {number(shares['universe'])}% is the same smoothing everywhere, "
        f"{number(shares['class_difficulty'] + shares['class_relations'])}% is about classes and "
        f"{number(shares['instance_confidence'] + shares['instance_relations'])}% about single rows."
    ]
    if report.held_out is not None:
        other = report.held_out.teacher
        said.append(
            f"It leaves {number(teacher.missing)}% to wrong classes on training rows and "
            f"{number(other.missing)}% on held-out rows, and is right on {number(teacher.accuracy)}% and "
            f"{number(other.accuracy)}%: the gap shows how much it knows by heart."
        )
    said.append(report.limits.verdict)
    said.append(
        f"Suggested teacher temperature for PLD: {report.suggested_temperature:.3g}; there its first choice "
        "has a probability of 0.9 on average over the training rows. In our study no such rule was "
        "best everywhere (benchmarks/results/temperature); 1 and 2 are worth a try beside it."
    )
    return said


# The table --------------------------------------------------------------------------------------------------


def table(report: DiagnosisReport) -> Table:
    """Teacher and reference teachers side by side."""
    columns = report.columns
    return Table(
        headers=("", *columns),
        sections=(
            Section("Departure from the labels", _rows(columns, _departure)),
            Section("Strength of each level", _rows(columns, _strength)),
            Section(f"Pull on {report.student}", _rows(columns, lambda found: _pull(found.pull))),
        ),
        note=(
            "The five terms are parts of E||rho - e_y||², the squared distance of the teacher's "
            "probabilities from the labels, and add up to it. Relations count in nats how far the "
            "spread over the wrong classes is from an even one, of at most log(C - 1) = "
            f"{math.log(report.train.teacher.classes - 1):.2f}. A row's weight is the factor by which the "
            "teacher changes the cross-entropy's pull on its label; norms are means over the rows, cosines "
            "are with the gradient of cross-entropy. The last three columns are made-up teachers on the "
            "training rows: the same smoothing for all; the class mean for every row of a class; the "
            "teacher's own probability of the label with an even rest."
        ),
    )


def _rows(columns: Mapping[str, Knowledge], figures: Any) -> tuple[tuple[str, ...], ...]:
    found = [figures(column) for column in columns.values()]
    return tuple((name, *(column[name] for column in found)) for name in found[0])


def _departure(found: Knowledge) -> dict[str, str]:
    shares = found.terms.shares
    names = {
        "universe": "smoothing (universe) %",
        "class_difficulty": "class difficulty %",
        "class_relations": "class relations %",
        "instance_confidence": "instance confidence %",
        "instance_relations": "instance relations %",
    }
    return {"in all": f"{found.departure:.4f}"} | {text: number(shares[name]) for name, text in names.items()}


def _strength(found: Knowledge) -> dict[str, str]:
    return {
        "smoothing strength": f"{found.smoothing:.4f}",
        "entropy, of log C %": number(found.entropy),
        "class relations, nats": f"{found.class_relation_nats:.3f}",
        "instance relations, nats": f"{found.instance_relation_nats:.3f}",
        "weight deviation": f"{found.fresh_weight_spread:.4f}",
        "left to wrong classes %": number(found.missing),
        "accuracy %": number(found.accuracy),
        "top probability %": number(found.top_probability),
    }


def _pull(pull: Pull | None) -> dict[str, str]:
    assert pull is not None
    low, high = pull.weights.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return {
        "weight, mean": _figure(pull.weights.mean().item()),
        "weight, 5th percentile": _figure(low),
        "weight, 95th percentile": _figure(high),
        "negative weights %": number(pull.negative),
        f"rows at the floor {pull.floor:g}": f"{pull.floored}",
        "confidence ~ student's loss": _figure(pull.correlation),
        **{f"norm, {name.replace('_', '-')}": _figure(norm) for name, norm in pull.norms.items()},
        **{f"cosine, {name}": _figure(cosine) for name, cosine in pull.cosines.items()},
    }


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}".replace("-", "−")


# The page ---------------------------------------------------------------------------------------------------


def write_html(report: DiagnosisReport, path: Path) -> Path:
    """Write the page; it needs no network.

    Raises:
        UserError: If it cannot be written.
    """
    page = Page(
        title=f"{report.teacher} on {report.data}",
        kind="Diagnosis of a teacher",
        question="What does the teacher know beyond the labels, and how much of it reaches a student?",
        answers=answers(report),
        warnings=[(finding.title, finding.text) for finding in report.findings],
        table=table(report),
        galleries=_galleries(report),
        command=report.command,
        facts=[
            ("rows", ", ".join(f"{split.teacher.rows:,} {name}" for name, split in report.splits.items())),
            *([("held-out rows", report.held_out_rows)] if report.held_out is not None else []),
            ("temperature", f"{report.train.temperature:g}"),
            ("student", report.student),
            *report.facts,
        ],
    )
    return write_page(page, path)


def _galleries(report: DiagnosisReport) -> list[Gallery]:
    train = report.train
    pulls = {"teacher": train.teacher.pull} | {
        REFERENCES[name]: found.pull for name, found in train.references.items() if name == "label_smoothing"
    }
    calibration = [
        draw(
            f"reliability-{index}",
            name,
            f"Reliability on {name} rows: "
            + ", ".join(f"{number(b.confidence)}% sure, {number(b.accuracy)}% right" for b in bins),
            (2.3, 2.2),
            partial(paint_reliability, bins=bins, colour=(BLUE, OTHERS[0])[index]),
        )
        for index, (name, bins) in enumerate(report.reliability.items())
    ]
    return [
        Gallery(
            "What it says beyond the labels",
            "Shares of the squared distance between the teacher's probabilities and the labels, which stands "
            "on the right. Grey is what label smoothing gives for free; warm colours tell of classes: how "
            "hard each is, and what it resembles; blue ones of single rows: how hard this one is, and what "
            "it resembles. The lower bars are made-up teachers that each know less, to compare with.",
            [plots.shares(report.columns)],
            wide=True,
        ),
        Gallery(
            "What each class resembles",
            "Of what the teacher leaves to wrong classes on the rows of a class, the part that each of them "
            "gets, in percent. An even spread would be "
            f"{number(1 / (train.teacher.classes - 1))}% everywhere. "
            f"Strongest: {strongest(report)}."
            + (
                " Classes stand in an order that keeps relatives together."
                if len(report.classes) > plots.MOST_NAMES
                else ""
            ),
            [
                plots.relations(f"relations-{index}", f"{name} rows", found.teacher, report.classes)
                for index, (name, found) in enumerate(report.splits.items())
            ],
        ),
        Gallery(
            "Calibration at temperature 1",
            "How often it is right when it is that sure; larger dots hold more rows. On the dashed line "
            "confidence is earned, below it the teacher is too sure.",
            calibration,
            small=True,
        ),
        Gallery(
            "What it does to a student",
            "The probability of the label over the rows: a teacher that knows its training rows by heart is "
            "equally sure of all of them, and has nothing to say about which are hard. The factor by which "
            f"it changes the cross-entropy's pull on each row's label, for {report.student}: beside it, "
            "label smoothing of the same strength, whose weights vary with the student alone; below zero the "
            "label is pushed down, and the outermost bars hold all that lies further out. Last, the length "
            "of the gradient's parts and their cosine with cross-entropy's.",
            [
                plots.confidence(report.splits),
                plots.weights({name: pull for name, pull in pulls.items() if pull is not None}),
                *([plots.gradients(train.teacher.pull)] if train.teacher.pull is not None else []),
            ],
        ),
        Gallery(
            "Over temperatures",
            "Left, the shares as above; the colours are those of the first plot. Right, how strong each "
            "level is: what is left to wrong classes, how uneven its spread is (relations, of the most they "
            "could be), and how far the weights of rows deviate. The dashed line is the chosen temperature.",
            plots.over_temperatures(report.sweep, train.temperature),
        ),
        Gallery(
            "Between KD and logit matching",
            "As the temperature grows, T² KL tends to half the variance over the classes of the difference "
            "of the logits (limit): logit matching, but for its wish that the mean logits be equal. "
            f"{report.limits.verdict}",
            plots.limit(report.limits),
        ),
    ]


def strongest(report: DiagnosisReport, count: int = 5) -> str:
    """The closest pairs of classes, in words."""
    pairs = plots.strongest(report.train.teacher, report.classes, count)
    return ", ".join(f"{one} as {other} {number(share)}%" for one, other, share in pairs) or "none"


# Plain values -----------------------------------------------------------------------------------------------


def as_json(report: DiagnosisReport) -> dict[str, Any]:
    """Everything as plain values; figures of six digits, what is not a number None."""
    content = {
        "teacher": report.teacher,
        "data": report.data,
        "classes": list(report.classes),
        "student": report.student,
        "command": report.command,
        "temperature": report.train.temperature,
        "suggested_temperature": report.suggested_temperature,
        "answers": answers(report),
        "findings": [asdict(finding) for finding in report.findings],
        "training": _diagnosis(report.train),
        "held_out": None
        if report.held_out is None
        else {"which": report.held_out_rows, **_diagnosis(report.held_out)},
        "over_temperatures": [
            {"temperature": found.temperature, **_knowledge(found.teacher)} for found in report.sweep
        ],
        "limits": {**asdict(report.limits), "verdict": report.limits.verdict},
        "reliability": {name: [asdict(b) for b in bins] for name, bins in report.reliability.items()},
        "facts": dict(report.facts),
    }
    return _plain(content)


def _diagnosis(found: Diagnosis) -> dict[str, Any]:
    teacher = found.teacher
    return {
        "unlabelled": found.unlabelled,
        "teacher": {
            **_knowledge(teacher),
            "class_rows": teacher.class_rows.tolist(),
            "relation_divergence": teacher.relation_divergence.tolist(),
            "relations": teacher.relations.tolist(),
        },
        "references": {name: _knowledge(reference) for name, reference in found.references.items()},
    }


def _knowledge(found: Knowledge) -> dict[str, Any]:
    names = ("rows", "departure", "smoothing", "missing", "entropy", "accuracy", "top_probability")
    more = ("class_relation_nats", "instance_relation_nats", "relation_share", "fresh_weight_spread")
    return {
        **{name: getattr(found, name) for name in names + more},
        "terms": found.terms.as_dict(),
        "shares": found.terms.shares,
        "pull": None if found.pull is None else _pull_values(found.pull),
    }


def _pull_values(pull: Pull) -> dict[str, Any]:
    at = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = pull.weights.quantile(torch.tensor(at, dtype=torch.float64)).tolist()
    return {
        "mean": pull.weights.mean().item(),
        "deviation": pull.weights.std(correction=0).item(),
        "quantiles": {f"{q:g}": value for q, value in zip(at, quantiles, strict=True)},
        "negative": pull.negative,
        "floored": pull.floored,
        "floor": pull.floor,
        "correlation": pull.correlation,
        "norms": pull.norms,
        "cosines": pull.cosines,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
