"""Checks of rows against the networks that are to read them, before the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import log
from ..data import Examples
from ..errors import UserError, one_line
from ..labels import IGNORED, UNLABELLED, has_label
from ..methods import Method
from ..models import Classifier
from ..models.modes import in_evaluation
from ..models.network import logits_of
from ..signals import Teacher
from .networks import check_networks, check_width

ROWS = 2
"""Rows of a trial: one alone fails under batch normalisation that keeps no statistics."""


def check_rows(
    method: Method,
    student: Classifier,
    teacher: Teacher | None,
    train: Examples,
    validation: Examples | None,
    device: torch.device,
) -> None:
    """Run both networks on the first rows, and compare all labels with the student's logits.

    Raises:
        UserError: If the networks share weights or fail on the rows, a label is no class of the student, or
            no row of a part counts.
    """
    check_networks(student, teacher)
    if validation is not None and not bool(has_label(validation.targets).any()):
        raise UserError(
            f"expected validation rows with a label, got none in {len(validation)} rows; give other rows, or "
            "no validation data"
        )
    networks = {"student": student}
    if teacher is not None and isinstance(teacher.network, Classifier):
        networks["teacher"] = teacher.network
    shapes = [
        _logits(role, network.to(device), rows, device).shape
        for role, network in networks.items()
        for rows in (train, validation)
        if rows is not None
    ]
    if len(shapes[0]) != 2:
        return
    classes = shapes[0][1]
    # Options of losses give other labels a meaning.
    names = ("ignore_index", "unlabelled_index")
    allowed = {getattr(module, name, UNLABELLED) for module in method.modules() for name in names}
    for name, rows in (("training", train), ("validation", validation)):
        if rows is not None:
            _check_labels(rows.targets, classes, f"{name} row", {UNLABELLED, IGNORED, *allowed})
    _name_absent(train.targets, classes)


def _name_absent(targets: Tensor, classes: int) -> None:
    """Warn of classes of the student without a row, unless rows without a label may be theirs."""
    absent = sorted(set(range(classes)) - set(torch.unique(targets).tolist()))
    if absent and bool(has_label(targets).all()):
        some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        log.warning(
            f"{len(absent)} of the student's {classes} classes have no training row: {some}; check the "
            "numbers of the classes, which begin at 0, and the width of the student"
        )


@torch.no_grad()
def _logits(role: str, network: Classifier, rows: Examples, device: torch.device) -> Tensor:
    inputs = rows.plain.batch(range(min(ROWS, len(rows))))["input"].to(device)
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with in_evaluation(network), torch.random.fork_rng(devices):
        try:
            output = network.plain(network.normalised(inputs))  # not compiled, which would take longer
        except UserError:
            raise
        except Exception as error:  # networks raise anything at inputs they were not made for
            way = (
                "" if inputs.is_floating_point() else "; unless these are token ids, convert them to float32"
            )
            raise UserError(
                f"expected a {role} for the data, rows of shape {tuple(inputs.shape[1:])} and "
                f"{inputs.dtype}, got one that fails on them ({type(error).__name__}: {one_line(error)}){way}"
            ) from error
    logits = logits_of(output)
    check_width(role, logits)
    return logits


def _check_labels(targets: Tensor, classes: int, name: str, allowed: set[int]) -> None:
    outside = (targets >= classes) | (targets < 0)
    for label in allowed:
        outside &= targets != label
    if not bool(outside.any()):
        return
    row = int(outside.nonzero()[0])
    labels = targets[has_label(targets)]
    way = "give the student a logit for each class, number the classes from 0, or mark the row by -1"
    if int(labels.max()) == classes and int(labels.min()) == 1:
        way = "they begin at 1: subtract 1"
    raise UserError(
        f"expected labels in [0, {classes}), one for each logit of the student, got {int(targets[row])} in "
        f"{name} {row}; {way}"
    )
