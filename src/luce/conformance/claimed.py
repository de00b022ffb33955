"""Laws that bind a loss that claims them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from .adapters import TEMPERATURES
from .draw import Batch, Draw
from .law import (
    IGNORED,
    Broken,
    NotApplicable,
    Subject,
    classes,
    expect_close,
    expect_close_gradient,
    gradient_of,
    law,
)


@law("overflow of an exp without subtracting the maximum", claimed=True)
def shift_invariant(subject: Subject, draw: Draw) -> None:
    """Adding a constant to all logits of a row, of either network, changes neither value nor gradient."""
    batch = draw.batch()
    which = draw.choice(["student", "teacher"] if subject.loss.adapter.takes_teacher else ["student"])
    offset = draw.integer(-800, 800) / 8
    draw.note(shifted=which, offset=offset)
    shifted = Batch(**{**vars(batch), which: getattr(batch, which) + offset})
    value, slope = subject.value_and_gradient(batch)
    got, got_slope = subject.value_and_gradient(shifted)
    tolerance = 100 * subject.exactness
    expect_close(f"value with {offset:g} added to the {which}", got, value, tolerance)
    expect_close_gradient(f"gradient with {offset:g} added to the {which}", got_slope, slope, tolerance)


@law("class indices that differ between student and teacher", claimed=True)
def class_order(subject: Subject, draw: Draw) -> None:
    """Renumbering the classes, equally for student, teacher and labels, changes nothing."""
    batch = draw.batch()
    order = draw.permutation(batch.classes)
    draw.note(order=order)
    renumbered = Batch(batch.student[:, order], batch.teacher[:, order], order.argsort()[batch.target])
    value, slope = subject.value_and_gradient(batch)
    got, got_slope = subject.value_and_gradient(renumbered)
    expect_close("value with the classes renumbered", got, value, subject.exactness)
    expect_close_gradient(
        "gradient with the classes renumbered", got_slope, slope[:, order], subject.exactness
    )


@law("LD#74", "deit#61", "pytorch#6622", claimed=True)
def vanishing_classes(subject: Subject, draw: Draw) -> None:
    """Extra classes of probability 0 in both networks change nothing. A mean over elements instead of rows
    shrinks with each of them."""
    batch = draw.batch()
    extra = draw.integer(1, 4)
    draw.note(extra_classes=extra, their_logits=-1e4)
    _appended(subject, batch, extra, -1e4)


@law("LD#74", "sentence-transformers#3827", claimed=True, infinity=True)
def excluded_classes(subject: Subject, draw: Draw) -> None:
    """Extra classes at -inf in both networks, which is how padding is masked, change nothing and receive no
    gradient."""
    batch = draw.batch()
    extra = draw.integer(1, 4)
    draw.note(extra_classes=extra, their_logits="-inf")
    _appended(subject, batch, extra, -math.inf)


def _appended(subject: Subject, batch: Batch, extra: int, logit: float) -> None:
    """Compare the batch with and without extra classes at this logit in both networks."""
    student, teacher = (F.pad(x, (0, extra), value=logit) for x in (batch.student, batch.teacher))
    value, slope = subject.value_and_gradient(batch)
    got, got_slope = subject.value_and_gradient(Batch(student, teacher, batch.target))
    how = f"with {classes(extra)} at {logit:g} appended"
    expect_close(f"value {how}", got, value, subject.exactness)
    expect_close_gradient(f"gradient {how}", got_slope, F.pad(slope, (0, extra)), subject.exactness)


@law("DistillKit `num_items_in_batch`", "Automodel#3776", claimed=True)
def micro_batches(subject: Subject, draw: Draw) -> None:
    """The value is the mean of independent rows: micro-batches weighted by their number of rows sum to the
    whole batch, in value and gradient."""
    batch = draw.batch(rows=(2, 4))
    cut = draw.integer(1, len(batch) - 1)
    draw.note(cut=cut)
    value, slope = subject.value_and_gradient(batch)
    parts = [
        (count / len(batch), subject.value_and_gradient(batch.rows(rows)))
        for rows, count in ((slice(0, cut), cut), (slice(cut, None), len(batch) - cut))
    ]
    expect_close(
        "sum of the micro-batches",
        sum(weight * part for weight, (part, _) in parts),
        value,
        subject.exactness,
    )
    joined = torch.cat([weight * part for weight, (_, part) in parts])
    expect_close_gradient("gradient of the micro-batches", joined, slope, subject.exactness)


@law("ms-swift#8436", "sentence-transformers#3827", claimed=True, labels=True)
def ignored_rows(subject: Subject, draw: Draw) -> None:
    """Rows labelled -100 are ignored at any position: value and gradient are those of the other rows, and an
    ignored row receives no gradient."""
    _ignored(subject, draw, fill=None)


@law("ms-swift#8436", claimed=True, labels=True)
def ignored_nan(subject: Subject, draw: Draw) -> None:
    """The logits of a row labelled -100 do not matter, even if they are NaN."""
    _ignored(subject, draw, fill=math.nan)


def _ignored(subject: Subject, draw: Draw, fill: float | None) -> None:
    """Compare a batch with an ignored row, its logits perhaps set to `fill`, to the batch without the row."""
    batch = draw.batch(rows=(2, 4))
    ignored = draw.integer(0, len(batch) - 1)
    keep = torch.arange(len(batch)) != ignored
    student, teacher = batch.student, batch.teacher
    if fill is not None:
        student, teacher = (x.masked_fill(~keep[:, None], fill) for x in (student, teacher))
    masked = Batch(student, teacher, batch.target.where(keep, IGNORED))
    draw.note(student_logits=student, teacher_logits=teacher, target=masked.target)
    value, slope = subject.value_and_gradient(batch.rows(keep))
    got, got_slope = subject.value_and_gradient(masked)
    expect_close("value with an ignored row", got, value, subject.exactness)
    expected = torch.zeros_like(got_slope)
    expected[keep] = slope
    expect_close_gradient("gradient with an ignored row", got_slope, expected, subject.exactness)


@law("ms-swift#8436", claimed=True, labels=True)
def all_ignored(subject: Subject, draw: Draw) -> None:
    """If every row is labelled -100, value and gradient are 0, not NaN."""
    batch = draw.batch()
    masked = Batch(batch.student, batch.teacher, torch.full_like(batch.target, IGNORED))
    draw.note(target=masked.target)
    value, slope = subject.value_and_gradient(masked)
    expect_close("value of a batch of ignored rows", value, 0.0, subject.exactness)
    expected = torch.zeros_like(slope)
    expect_close_gradient("gradient of a batch of ignored rows", slope, expected, subject.exactness)


@law("a process whose last batch is empty", claimed=True)
def empty_batch(subject: Subject, draw: Draw) -> None:
    """For a batch of no rows the value is 0 and the gradient has the shape of the batch."""
    batch = draw.batch().rows(slice(0, 0))
    draw.note(student_logits=[], teacher_logits=[], target=[])
    value, slope = subject.value_and_gradient(batch)
    expect_close("value of no rows", value, 0.0, subject.exactness)
    if slope.shape != batch.student.shape:
        raise Broken(f"gradient of shape {tuple(slope.shape)} instead of {tuple(batch.student.shape)}")


@law("keras-io#869", "image_classification_sota#19", claimed=True)
def temperature_scaled(subject: Subject, draw: Draw) -> None:
    """The distillation term is multiplied by T²: for small logits the norm of the gradient does not depend on
    the temperature."""
    option = subject.loss.option(*TEMPERATURES)
    if option is None:
        raise NotApplicable(f"the loss has no option called {', '.join(TEMPERATURES)}")
    batch = draw.batch()
    small = Batch(batch.student / 100, batch.teacher / 100, batch.target)
    without = Batch(small.student, torch.zeros_like(small.teacher), small.target)
    temperature = draw.choice([2.0, 4.0, 8.0])
    draw.note(logits_times=0.01, temperature=temperature)
    slopes, parts = [], []
    for value in (1.0, temperature):
        tempered = subject.with_options(**{option.name: value})
        slopes.append(tempered.gradient(small))
        # The gradient of a cross-entropy is much larger than the teacher's part; the difference cancels it.
        parts.append(slopes[-1] - tempered.gradient(without))
    for what, (at_one, at_temperature) in {
        "gradient": slopes,
        "teacher's part of the gradient": parts,
    }.items():
        norm, expected = at_temperature.norm().item(), at_one.norm().item()
        expect_close(
            f"norm of the {what} at T = {temperature:g} (expected: that at T = 1)", norm, expected, 0.1, 1e-7
        )


@law("truncated KL: verl#7855, verl#7856", claimed=True)
def non_negative(subject: Subject, draw: Draw) -> None:
    """The value is never below zero."""
    batch = draw.batch()
    kept = draw.integer(0, batch.classes - 1)
    if kept:  # a student surer of the teacher's top classes: a sum cut off after them is negative
        ranks = batch.teacher.argsort(-1, descending=True).argsort(-1)
        batch = replace(batch, student=batch.teacher - 4.0 * (ranks >= kept))
        draw.note(student_logits=batch.student)
    value = subject.value(batch)
    if not value >= -subject.exactness / 1e3:
        raise Broken(f"value {value:.6g}, below 0")


@law("an epsilon inside the log; targets that do not sum to 1", claimed=True, teacher=True)
def zero_at_equality(subject: Subject, draw: Draw) -> None:
    """If the student has the teacher's logits, value and gradient are 0."""
    batch = draw.batch()
    value, slope = subject.value_and_gradient(Batch(batch.teacher.clone(), batch.teacher, batch.target))
    draw.note(student_logits=batch.teacher)
    tolerance = subject.exactness / 1e3 if subject.exactness < 1e-6 else 1e-6
    expect_close("value of equal networks", value, 0.0, tolerance)
    expect_close_gradient("gradient of equal networks", slope, torch.zeros_like(slope), tolerance)


@law("allRank", "sentence-transformers#4012", claimed=True)
def settled_choice(subject: Subject, draw: Draw) -> None:
    """Raising the first choice (the label; without labels the teacher's top class) from 60 to 120 above the
    rest does not change the value: what remains is the choice among the rest."""
    batch = draw.batch()
    values = [subject.value(_with_first_at(subject, batch, sign=1, offset=x)) for x in (60.0, 120.0)]
    expect_close(
        "value with the first choice 120 above the rest, by 60", values[1], values[0], subject.exactness
    )


@law("allRank", "sentence-transformers#4012", claimed=True)
def log_tail(subject: Subject, draw: Draw) -> None:
    """The log has no floor: lowering the first choice (the label; without labels the teacher's top class)
    from 1,000 to 2,000 below the rest costs as much as from 2,000 to 3,000, and more than 0."""
    batch = draw.batch()
    at_1000, at_2000, at_3000 = (
        subject.value(_with_first_at(subject, batch, sign=-1, offset=x)) for x in (1e3, 2e3, 3e3)
    )
    if not at_2000 > at_1000:
        raise Broken(f"value {at_2000:.6g} at 2,000 below the rest and {at_1000:.6g} at 1,000: no cost")
    expect_close("cost of the third thousand, by the second", at_3000 - at_2000, at_2000 - at_1000, 1e-4)


def _with_first_at(subject: Subject, batch: Batch, sign: int, offset: float) -> Batch:
    """The batch with the student's first choice `offset` above (`sign` 1) or below (-1) its other logits."""
    first = batch.target if subject.loss.adapter.takes_target else batch.teacher.argmax(-1)
    edge = batch.student.amax(-1) if sign > 0 else batch.student.amin(-1)
    student = batch.student.scatter(1, first[:, None], (edge + sign * offset)[:, None])
    return Batch(student, batch.teacher, batch.target)


@law("lightly-train#901", claimed=True, teacher=True)
def detached_teacher(subject: Subject, draw: Draw) -> None:
    """No gradient flows to the teacher's logits, even if they require one."""
    batch = draw.batch()
    teacher = batch.teacher.requires_grad_()
    leaf = batch.student.detach().requires_grad_()
    slope = gradient_of(subject.total(Batch(leaf, teacher, batch.target)), teacher)
    if slope.any():
        raise Broken(f"gradient {slope.tolist()} at the teacher's logits")
