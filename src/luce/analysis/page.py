"""The report of a diagnosis: sentences, a table, a page and plain values."""

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
    """The figures of a teacher on one data set.

    Attributes:
        teacher: Name of the teacher.
        data: Name of the data.
        classes: Class names.
        student: Description of the student.
        train: Diagnosis on the training rows, with the student.
        held_out: Diagnosis on rows that the teacher was not trained on, with the same student; None without.
        held_out_rows: Description of the held-out rows.
        sweep: Diagnoses on training rows at other temperatures.
        limits: KD and logit matching of student and teacher, on training rows.
        suggested_temperature: `luce.suggest_temperature` on the training rows.
        reliability: Reliability of the teacher at temperature 1, by split.
        command: Reproduces the report.
        facts: Further names and values for the end of the page.
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
        """The teacher on each split and the reference teachers on the training rows, by column name."""
        return {name: split.teacher for name, split in self.splits.items()} | {
            REFERENCES[name]: knowledge for name, knowledge in self.train.references.items()
        }

    @property
    def findings(self) -> tuple[Finding, ...]:
        return findings(self.train, self.held_out)


def answers(report: DiagnosisReport) -> list[str]:
    """Return the result in sentences."""
    teacher, shares = report.train.teacher, report.train.teacher.terms.shares
    sentences = [
        f"The teacher's departure from the labels of {teacher.rows:,} training rows at temperature "
        f"{report.train.temperature:g} consists of {number(shares['universe'])}% smoothing that is the same "
        f"for all rows, {number(shares['class_difficulty'] + shares['class_relations'])}% knowledge of "
        f"classes and {number(shares['instance_confidence'] + shares['instance_relations'])}% knowledge of "
        "single rows."
    ]
    if report.held_out is not None:
        other = report.held_out.teacher
        sentences.append(
            f"The teacher gives {number(teacher.missing)}% of its probability to wrong classes on training "
            f"rows and {number(other.missing)}% on held-out rows; its accuracy is "
            f"{number(teacher.accuracy)}% and {number(other.accuracy)}%. The gap shows how much it has "
            "memorised."
        )
    sentences.append(report.limits.verdict)
    sentences.append(
        f"Suggested teacher temperature for PLD: {report.suggested_temperature:.3g}; at this temperature the "
        "mean probability of the predicted class over the training rows is 0.9. In our study no such rule "
        "was best on all data sets (benchmarks/results/temperature): try 1 and 2 as well."
    )
    return sentences


# The table --------------------------------------------------------------------------------------------------


def table(report: DiagnosisReport) -> Table:
    """Return the figures of the teacher and the reference teachers, a column each."""
    columns = report.columns
    return Table(
        headers=("", *columns),
        sections=(
            Section("Departure from the labels", _rows(columns, _departure)),
            Section("Strength of each level", _rows(columns, _strength)),
            Section(f"Gradient of {report.student}", _rows(columns, lambda column: _pull(column.pull))),
        ),
        note=(
            "The five terms sum to E||rho - e_y||², the mean squared distance of the teacher's probabilities "
            "from the labels. Relations are KL divergences in nats of the distribution over wrong classes "
            f"from an even one, at most log(C - 1) = {math.log(report.train.teacher.classes - 1):.2f}. A "
            "row's weight is the factor by which the teacher changes the gradient of cross-entropy at the "
            "label; norms are means over the rows; cosines are with the gradient of cross-entropy. The last "
            "three columns are synthetic teachers on the training rows: label smoothing with one strength "
            "for all rows; the class mean for every row of a class; the teacher's probability of the label "
            "with an even rest."
        ),
    )


def _rows(columns: Mapping[str, Knowledge], figures: Any) -> tuple[tuple[str, ...], ...]:
    cells = [figures(column) for column in columns.values()]
    return tuple((name, *(column[name] for column in cells)) for name in cells[0])


def _departure(knowledge: Knowledge) -> dict[str, str]:
    shares = knowledge.terms.shares
    names = {
        "universe": "smoothing (universe) %",
        "class_difficulty": "class difficulty %",
        "class_relations": "class relations %",
        "instance_confidence": "instance confidence %",
        "instance_relations": "instance relations %",
    }
    return {"total": f"{knowledge.departure:.4f}"} | {
        text: number(shares[name]) for name, text in names.items()
    }


def _strength(knowledge: Knowledge) -> dict[str, str]:
    return {
        "smoothing strength": f"{knowledge.smoothing:.4f}",
        "entropy, % of log C": number(knowledge.entropy),
        "class relations, nats": f"{knowledge.class_relation_nats:.3f}",
        "instance relations, nats": f"{knowledge.instance_relation_nats:.3f}",
        "weight deviation": f"{knowledge.fresh_weight_spread:.4f}",
        "mass on wrong classes %": number(knowledge.missing),
        "accuracy %": number(knowledge.accuracy),
        "top probability %": number(knowledge.top_probability),
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
        "correlation with student loss": _figure(pull.correlation),
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
        REFERENCES[name]: knowledge.pull
        for name, knowledge in train.references.items()
        if name == "label_smoothing"
    }
    calibration = [
        draw(
            f"reliability-{index}",
            name,
            f"Reliability on {name} rows: "
            + ", ".join(f"confidence {number(b.confidence)}%, accuracy {number(b.accuracy)}%" for b in bins),
            (2.3, 2.2),
            partial(paint_reliability, bins=bins, colour=(BLUE, OTHERS[0])[index]),
        )
        for index, (name, bins) in enumerate(report.reliability.items())
    ]
    return [
        Gallery(
            "Knowledge beyond the labels",
            "Shares of the squared distance between the teacher's probabilities and the labels; the distance "
            "is on the right. Grey is the share that label smoothing has as well. Warm colours are knowledge "
            "of classes: how hard each class is and which classes it resembles. Blue colours are knowledge "
            "of single rows: how hard the row is and which classes it resembles. The lower bars are "
            "synthetic reference teachers with less knowledge.",
            [plots.shares(report.columns)],
            wide=True,
        ),
        Gallery(
            "Class relations",
            "Distribution of the probability on wrong classes, by label, in percent. An even spread would be "
            f"{number(1 / (train.teacher.classes - 1))}% in each cell. Strongest: {strongest(report)}."
            + (" Classes are ordered by similarity." if len(report.classes) > plots.MOST_NAMES else ""),
            [
                plots.relations(f"relations-{index}", f"{name} rows", split.teacher, report.classes)
                for index, (name, split) in enumerate(report.splits.items())
            ],
        ),
        Gallery(
            "Calibration at temperature 1",
            "Accuracy against confidence; larger dots hold more rows. On the dashed line confidence equals "
            "accuracy; below it the teacher is overconfident.",
            calibration,
            small=True,
        ),
        Gallery(
            "Effect on a student",
            "First, the probability of the label over the rows: a teacher that has memorised its training "
            "rows is equally confident on all of them and cannot tell which are hard. Second, the weight of "
            "each row, the factor by which the teacher changes the gradient of cross-entropy at the label, "
            f"for {report.student}, compared with label smoothing of the same strength. A weight below zero "
            "lowers the label's logit; the outermost bars include all values beyond them. Third, the norms "
            "of the gradient's parts and their cosines with the gradient of cross-entropy.",
            [
                plots.confidence(report.splits),
                plots.weights({name: pull for name, pull in pulls.items() if pull is not None}),
                *([plots.gradients(train.teacher.pull)] if train.teacher.pull is not None else []),
            ],
        ),
        Gallery(
            "Knowledge over temperatures",
            "First, the shares of the terms, in the colours of the first plot. Second, the strength of each "
            "level: the probability on wrong classes, relations as a share of their maximum, and the "
            "standard deviation of the row weights. The dashed line is the chosen temperature.",
            plots.over_temperatures(report.sweep, train.temperature),
        ),
        Gallery(
            "Between KD and logit matching",
            "As the temperature grows, T² KL tends to half the variance over the classes of the difference "
            "between the logits (the limit), which is logit matching without its penalty on different mean "
            f"logits. {report.limits.verdict}",
            plots.limit(report.limits),
        ),
    ]


def strongest(report: DiagnosisReport, count: int = 5) -> str:
    """Return the strongest class relations as text."""
    pairs = plots.strongest(report.train.teacher, report.classes, count)
    return ", ".join(f"{one} as {other} {number(share)}%" for one, other, share in pairs) or "none"


# Plain values -----------------------------------------------------------------------------------------------


def as_json(report: DiagnosisReport) -> dict[str, Any]:
    """Return all figures as plain values for JSON, with six digits; NaN and infinities become None."""
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
            {"temperature": point.temperature, **_knowledge(point.teacher)} for point in report.sweep
        ],
        "limits": {**asdict(report.limits), "verdict": report.limits.verdict},
        "reliability": {name: [asdict(b) for b in bins] for name, bins in report.reliability.items()},
        "facts": dict(report.facts),
    }
    return _plain(content)


def _diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    teacher = diagnosis.teacher
    return {
        "unlabelled": diagnosis.unlabelled,
        "teacher": {
            **_knowledge(teacher),
            "class_rows": teacher.class_rows.tolist(),
            "relation_divergence": teacher.relation_divergence.tolist(),
            "relations": teacher.relations.tolist(),
        },
        "references": {name: _knowledge(reference) for name, reference in diagnosis.references.items()},
    }


def _knowledge(knowledge: Knowledge) -> dict[str, Any]:
    names = ("rows", "departure", "smoothing", "missing", "entropy", "accuracy", "top_probability")
    more = ("class_relation_nats", "instance_relation_nats", "relation_share", "fresh_weight_spread")
    return {
        **{name: getattr(knowledge, name) for name in names + more},
        "terms": knowledge.terms.as_dict(),
        "shares": knowledge.terms.shares,
        "pull": None if knowledge.pull is None else _pull_values(knowledge.pull),
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
