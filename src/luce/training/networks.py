"""Checks of a student and its teacher before their first batch, and of the teacher's accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import log
from ..errors import UserError
from ..signals import Teacher

DOUBT = 1e-3
"""Probability of a count of right answers below which it is no accident."""
USEFUL = 0.1
"""Of the way from chance to certainty: accuracy that a teacher is expected to have at least."""
CAUSES = "look for classes in another order, another normalisation, or inputs in another range"


def check_networks(student: nn.Module, teacher: Teacher | None) -> None:
    """Refuse a student that is its own teacher, and networks whose lazy layers have no weights yet.

    Raises:
        UserError: If a trainable tensor of the student is the teacher's too, or a weight is not initialised.
    """
    networks = {"student": [student], "teacher": _networks_of(teacher)}
    for role, found in networks.items():
        for name, parameter in (pair for network in found for pair in network.named_parameters()):
            if is_lazy(parameter):
                raise UserError(
                    f"expected a {role} with weights, got one whose `{_plain(name)}` waits for the first "
                    f"batch, as in a lazy layer; call the {role} on a batch before"
                )
    answering = {
        storage: name
        for network in networks["teacher"]
        for name, parameter in network.named_parameters()
        if (storage := _storage(parameter))
    }
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and _storage(parameter) in answering:
            raise UserError(
                f"expected a teacher with weights of its own, got one that shares `{_plain(name)}` with the "
                "student, whose training would change both; give another network as the teacher, or a "
                "`copy.deepcopy` of this one"
            )


def check_width(role: str, logits: Tensor) -> None:
    """Refuse a single logit, and class indices.

    Raises:
        UserError: On logits of one class, which every softmax turns into 1, or of no floating dtype.
    """
    # Behind (N, C) some losses take the classes last.
    if logits.ndim < 2 or logits.shape[1] == logits.shape[-1] == 1:
        raise UserError(
            f"expected a {role} with at least two logits per row, one for each class, got an output of "
            f"shape {tuple(logits.shape)}, whose softmax is always 1; give a binary choice two logits, such "
            "as 0 and the single one"
        )
    if not logits.is_floating_point():
        raise UserError(
            f"expected a {role} with logits of a floating dtype, got {logits.dtype}; return the scores of "
            "all classes, not class indices"
        )


def report_parameters(student: nn.Module, precision: str) -> None:
    """State how many parameters are trained, if some are frozen, and warn of weights of 16 bits.

    Raises:
        UserError: On weights in float16 under mixed precision, for which layers have no kernels.
    """
    parameters = list(student.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if trained < total:
        log.info(f"training {trained} of the student's {total} parameters; the others are frozen")
    narrow = {p.dtype for p in parameters if p.requires_grad} & {torch.bfloat16, torch.float16}
    if torch.float16 in narrow and precision != "no":
        raise UserError(
            f"expected a student with weights in float32 for `training.precision` {precision}, got float16; "
            "call `student.float()`"
        )
    for dtype in narrow:
        log.warning(
            f"the student's weights are {dtype}, which loses every step below "
            f"{torch.finfo(dtype).eps / 2:.1g} of a weight; keep them in float32 and set `precision` instead"
        )


def judge_accuracy(right: int, rows: int, classes: int, where: str) -> str | None:
    """Return what is wrong with a teacher's accuracy: below chance, or no better; None if it may be fine.

    Args:
        right: Rows whose label is the teacher's first choice.
        rows: Labelled rows.
        classes: Number of classes, at least 2.
        where: The rows, for the message.
    Example:
        >>> judge_accuracy(0, 200, 10, "test rows")[:66]
        'the teacher is right on 0 of 200 test rows, where chance gives 20;'
        >>> judge_accuracy(60, 200, 10, "test rows")
    """
    if not rows:
        return None
    chance = 1 / classes
    useful = chance + USEFUL * (1 - chance)
    better = 1 - at_most(right - 1, rows, chance) < DOUBT
    if better or at_most(right, rows, useful) >= DOUBT:
        return None
    expected = f"where chance gives {round(rows * chance)}"
    return f"the teacher is right on {right} of {rows} {where}, {expected}; {CAUSES}"


def at_most(right: int, rows: int, probability: float) -> float:
    """Return the probability of at most this many successes among independent rows."""
    if right < 0:
        return 0.0
    counts = torch.arange(right + 1, dtype=torch.float64)
    chances = torch.distributions.Binomial(rows, torch.tensor(probability, dtype=torch.float64))
    return min(1.0, float(chances.log_prob(counts).logsumexp(0).exp()))


def _networks_of(teacher: Teacher | None) -> list[nn.Module]:
    """Return the modules that a teacher holds, whether it shows them as its network or not."""
    held = [] if teacher is None else vars(teacher).values()
    return [value for value in held if isinstance(value, nn.Module)]


def _storage(parameter: Tensor) -> int:
    """Return the address of a parameter's memory; 0 for none."""
    return 0 if is_lazy(parameter) else parameter.untyped_storage().data_ptr()


def _plain(name: str) -> str:
    return name.removeprefix("body.")
