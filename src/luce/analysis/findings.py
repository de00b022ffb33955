"""Findings: weaknesses of a teacher that the figures of a diagnosis suggest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .knowledge import Diagnosis

FLAT_RELATIONS = 0.1
"""A heuristic threshold: the share of the most that relations could say below which they are a finding."""
EVEN_CONFIDENCE = 0.05
"""A heuristic threshold: the deviation of an untrained student's weights below which it is a finding."""


@dataclass(frozen=True)
class Finding:
    """A weakness to look at, with the figures that suggest it."""

    title: str
    text: str


def findings(train: Diagnosis, held_out: Diagnosis | None = None) -> tuple[Finding, ...]:
    """Return the two ways in which KD fails by the paper's analysis, as far as the figures suggest them.

    No known bound separates a bad teacher from a good one. `FLAT_RELATIONS` and `EVEN_CONFIDENCE` are
    heuristics that only choose what to report; the text compares with the reference teachers.

    Args:
        train: Diagnosis on the training rows.
        held_out: Diagnosis of the same teacher on rows it was not trained on.
    Example:
        >>> import torch
        >>> from luce.analysis import diagnose
        >>> even = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]]).log()
        >>> [finding.title for finding in findings(diagnose(even, torch.tensor([0, 1])))]
        ['The teacher resembles label smoothing.', 'The teacher hardly separates hard rows from easy ones.']
    """
    result = []
    teacher, percent = train.teacher, "{:.1%}".format
    if teacher.classes > 2 and teacher.relation_share < FLAT_RELATIONS:
        nats, shares = teacher.class_relation_nats + teacher.instance_relation_nats, teacher.terms.shares
        most = math.log(teacher.classes - 1)
        result.append(
            Finding(
                "The teacher resembles label smoothing.",
                f"Its relations between wrong classes hold {nats:.3f} nats, "
                f"{percent(teacher.relation_share)} of the maximum ({most:.2f} nats: all mass on one wrong "
                f"class); label smoothing of the same strength, {teacher.smoothing:.3f}, has 0. Relations "
                f"are {percent(shares['class_relations'] + shares['instance_relations'])} of the departure "
                "from the labels; for label_smoothing and true_prob they are 0%. "
                "A teacher trained with label smoothing gives this picture, and so does any teacher at a "
                f"high temperature (here {train.temperature:g}): try a lower one. "
                f"(Reported below {percent(FLAT_RELATIONS)}, a heuristic, not a known bound.)",
            )
        )
    if teacher.fresh_weight_spread < EVEN_CONFIDENCE:
        comparison = "for label_smoothing and class_mean it is 0"
        if held_out is not None:
            comparison += f", for this teacher on held-out rows {held_out.teacher.fresh_weight_spread:.4f}"
        result.append(
            Finding(
                "The teacher hardly separates hard rows from easy ones.",
                "For an untrained student, the row weights that its confidence implies have a standard "
                f"deviation within the classes of {teacher.fresh_weight_spread:.4f}; {comparison}. On "
                f"average {percent(teacher.missing)} of its probability is on wrong classes, and its "
                f"accuracy is {percent(teacher.accuracy)}. A teacher that has memorised its training rows "
                "gives this picture, and so does one that has learned nothing; in the first case try a "
                f"higher temperature. (Reported below {EVEN_CONFIDENCE:g}, a heuristic, not a known bound.)",
            )
        )
    return tuple(result)
