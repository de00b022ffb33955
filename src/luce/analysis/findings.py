"""What to look at in a diagnosis, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .knowledge import Diagnosis

FLAT_RELATIONS = 0.1
"""A heuristic: below this part of the most that relations could say, a finding draws attention to them."""
EVEN_CONFIDENCE = 0.05
"""A heuristic: below this deviation of a fresh student's weights a finding draws attention to it."""


@dataclass(frozen=True)
class Finding:
    """Something to look at, with the figures that say so."""

    title: str
    text: str


def findings(train: Diagnosis, held_out: Diagnosis | None = None) -> tuple[Finding, ...]:
    """The two ways in which the paper's analysis lets KD fail, where the figures look like them.

    No bound is known that would tell a bad teacher from a good one. `FLAT_RELATIONS` and `EVEN_CONFIDENCE`
    are heuristics that only choose what to point at; the text compares with the reference teachers.

    Args:
        train: On the rows to learn from.
        held_out: Of the same teacher, on rows it was not trained on.
    Example:
        >>> import torch
        >>> from luce.analysis import diagnose
        >>> even = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]]).log()
        >>> [finding.title for finding in findings(diagnose(even, torch.tensor([0, 1])))]
        ['It looks like label smoothing in disguise.', 'It hardly tells hard rows from easy ones.']
    """
    found = []
    teacher, percent = train.teacher, "{:.1%}".format
    if teacher.classes > 2 and teacher.relation_share < FLAT_RELATIONS:
        nats, shares = teacher.class_relation_nats + teacher.instance_relation_nats, teacher.terms.shares
        most = math.log(teacher.classes - 1)
        found.append(
            Finding(
                "It looks like label smoothing in disguise.",
                f"How the teacher spreads what it leaves to wrong classes says {nats:.3f} nats, "
                f"{percent(teacher.relation_share)} of the most it could ({most:.2f}: a single rival); label "
                f"smoothing of the same strength, {teacher.smoothing:.3f}, says 0. Relations are "
                f"{percent(shares['class_relations'] + shares['instance_relations'])} of the departure from "
                "the labels; for label_smoothing and true_prob they are 0%. "
                "So looks a teacher that was itself trained with label smoothing, and any teacher at a high "
                f"temperature (here {train.temperature:g}): try a lower one. "
                f"(Pointed at below {percent(FLAT_RELATIONS)}, a heuristic of ours, not a known bound.)",
            )
        )
    if teacher.fresh_weight_spread < EVEN_CONFIDENCE:
        beside = "for label_smoothing and class_mean that is 0"
        if held_out is not None:
            beside += f", for this teacher on held-out rows {held_out.teacher.fresh_weight_spread:.4f}"
        found.append(
            Finding(
                "It hardly tells hard rows from easy ones.",
                "Within the classes, the weights that its confidence gives the rows in the eyes of a student "
                f"that knows nothing yet have a standard deviation of {teacher.fresh_weight_spread:.4f}; "
                f"{beside}. It leaves {percent(teacher.missing)} to wrong classes on average and is right on "
                f"{percent(teacher.accuracy)} of the rows. So looks a teacher that knows its training rows "
                "by heart, and one that knows nothing: in the first case try a higher temperature. "
                f"(Pointed at below {EVEN_CONFIDENCE:g}, a heuristic of ours, not a known bound.)",
            )
        )
    return tuple(found)
