"""The laws that bind a loss which claims them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from .adapters import TEMPERATURES
from .draw import Batch, Draw
from .law import IGNORED, Broken, NotApplicable, Subject, classes, gradient_of, law, same, same_gradient


@law("overflow of an exp without its maximum", claimed=True)
def shift_invariant(subject: Subject, draw: Draw) -> None:
    """A constant added to all logits of a row, of either network, changes neither value nor gradient."""
    batch = draw.batch()
    which = draw.choice(["student", "teacher"] if subject.loss.adapter.takes_teacher else ["student"])
    offset = draw.integer(-800, 800) / 8
    draw.note(shifted=which, offset=offset)
    shifted = Batch(**{**vars(batch), which: getattr(batch, which) + offset})
    value, slope = subject.both(batch)
    got, got_slope = subject.both(shifted)
    tolerance = 100 * subject.exactness
    same(f"value with {offset:g} added to the {which}", got, value, tolerance)
    same_gradient(f"gradient with {offset:g} added to the {which}", got_slope, slope, tolerance)


@law("class indices mixed up between student and teacher", claimed=True)
def class_order(subject: Subject, draw: Draw) -> None:
    """The numbering of the classes does not matter, if it is the same for student, teacher and labels."""
    batch = draw.batch()
    order = draw.permutation(batch.classes)
    draw.note(order=order)
    renamed = Batch(batch.student[:, order], batch.teacher[:, order], order.argsort()[batch.target])
    value, slope = subject.both(batch)
    got, got_slope = subject.both(renamed)
    same("value with the classes renumbered", got, value, subject.exactness)
    same_gradient("gradient with the classes renumbered", got_slope, slope[:, order], subject.exactness)


@law("LD#74", "deit#61", "pytorch#6622", claimed=True)
def vanishing_classes(subject: Subject, draw: Draw) -> None:
    """Further classes to which both networks give no probability change nothing; a mean over the elements
    instead of the rows becomes smaller with each of them."""
    batch = draw.batch()
    extra = draw.integer(1, 4)
    draw.note(extra_classes=extra, their_logits=-1e4)
    _appended(subject, batch, extra, -1e4)


@law("LD#74", "sentence-transformers#3827", claimed=True, infinity=True)
def impossible_classes(subject: Subject, draw: Draw) -> None:
    """Further classes at -inf in both networks, which is how padding is masked, change nothing and get no
    gradient."""
    batch = draw.batch()
    extra = draw.integer(1, 4)
    draw.note(extra_classes=extra, their_logits="-inf")
    _appended(subject, batch, extra, -math.inf)


def _appended(subject: Subject, batch: Batch, extra: int, logit: float) -> None:
    student, teacher = (F.pad(x, (0, extra), value=logit) for x in (batch.student, batch.teacher))
    value, slope = subject.both(batch)
    got, got_slope = subject.both(Batch(student, teacher, batch.target))
    how = f"with {classes(extra)} at {logit:g} appended"
    same(f"value {how}", got, value, subject.exactness)
    same_gradient(f"gradient {how}", got_slope, F.pad(slope, (0, extra)), subject.exactness)


@law("DistillKit `num_items_in_batch`", "Automodel#3776", claimed=True)
def micro_batches(subject: Subject, draw: Draw) -> None:
    """The value is the mean over the rows, each on its own: micro-batches weighted by their rows add up to
    one batch, in value and gradient."""
    batch = draw.batch(rows=(2, 4))
    cut = draw.integer(1, len(batch) - 1)
    draw.note(cut=cut)
    value, slope = subject.both(batch)
    parts = [(share / len(batch), subject.both(batch.rows(rows))) for rows, share in _parts(len(batch), cut)]
    same("sum of the micro-batches", sum(w * part for w, (part, _) in parts), value, subject.exactness)
    together = torch.cat([weight * part for weight, (_, part) in parts])
    same_gradient("gradient of the micro-batches", together, slope, subject.exactness)


def _parts(rows: int, cut: int) -> list[tuple[slice, int]]:
    return [(slice(0, cut), cut), (slice(cut, rows), rows - cut)]


@law("ms-swift#8436", "sentence-transformers#3827", claimed=True, labels=True)
def ignored_rows(subject: Subject, draw: Draw) -> None:
    """Rows labelled -100 do not count, wherever they stand: value and gradient are those without them, and
    they get no gradient."""
    _ignored(subject, draw, junk=None)


@law("ms-swift#8436", claimed=True, labels=True)
def ignored_nan(subject: Subject, draw: Draw) -> None:
    """What stands in a row labelled -100 does not matter, not even a NaN."""
    _ignored(subject, draw, junk=math.nan)


def _ignored(subject: Subject, draw: Draw, junk: float | None) -> None:
    batch = draw.batch(rows=(2, 4))
    place = draw.integer(0, len(batch) - 1)
    keep = torch.arange(len(batch)) != place
    student, teacher = batch.student, batch.teacher
    if junk is not None:
        student, teacher = (x.masked_fill(~keep[:, None], junk) for x in (student, teacher))
    masked = Batch(student, teacher, batch.target.where(keep, IGNORED))
    draw.note(student_logits=student, teacher_logits=teacher, target=masked.target)
    value, slope = subject.both(batch.rows(keep))
    got, got_slope = subject.both(masked)
    same("value with an ignored row", got, value, subject.exactness)
    expected = torch.zeros_like(got_slope)
    expected[keep] = slope
    same_gradient("gradient with an ignored row", got_slope, expected, subject.exactness)


@law("ms-swift#8436", claimed=True, labels=True)
def all_ignored(subject: Subject, draw: Draw) -> None:
    """A batch in which every row is labelled -100 gives the value 0 and the gradient 0, no NaN."""
    batch = draw.batch()
    masked = Batch(batch.student, batch.teacher, torch.full_like(batch.target, IGNORED))
    draw.note(target=masked.target)
    value, slope = subject.both(masked)
    same("value of a batch without a row that counts", value, 0.0, subject.exactness)
    expected = torch.zeros_like(slope)
    same_gradient("gradient of a batch without a row that counts", slope, expected, subject.exactness)


@law("the last batch of a process that got no row", claimed=True)
def empty_batch(subject: Subject, draw: Draw) -> None:
    """A batch of no rows gives the value 0 and a gradient of its shape."""
    batch = draw.batch().rows(slice(0, 0))
    draw.note(student_logits=[], teacher_logits=[], target=[])
    value, slope = subject.both(batch)
    same("value of no rows", value, 0.0, subject.exactness)
    if slope.shape != batch.student.shape:
        raise Broken(f"gradient of shape {tuple(slope.shape)} instead of {tuple(batch.student.shape)}")


@law("keras-io#869", "image_classification_sota#19", claimed=True)
def temperature_scaled(subject: Subject, draw: Draw) -> None:
    """The distillation term is multiplied by T²: at small logits the size of the gradient does not depend on
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
        # Beside a cross-entropy the teacher's part of the gradient is small: here that one cancels.
        parts.append(slopes[-1] - tempered.gradient(without))
    for what, (one, other) in {"gradient": slopes, "teacher's part of the gradient": parts}.items():
        size, expected = other.norm().item(), one.norm().item()
        same(f"size of the {what} at T = {temperature:g}, by T = 1", size, expected, 0.1, 1e-7)


@law("truncated KL: verl#7855, verl#7856", claimed=True)
def non_negative(subject: Subject, draw: Draw) -> None:
    """The value is never below zero."""
    batch = draw.batch()
    kept = draw.integer(0, batch.classes - 1)
    if kept:  # the teacher's favourites, and surer of them: where a sum that is cut off after them is below 0
        ranks = batch.teacher.argsort(-1, descending=True).argsort(-1)
        batch = replace(batch, student=batch.teacher - 4.0 * (ranks >= kept))
        draw.note(student_logits=batch.student)
    value = subject.value(batch)
    if not value >= -subject.exactness / 1e3:
        raise Broken(f"value {value:.6g}, below 0")


@law("an epsilon inside the log; a target that is no distribution", claimed=True, teacher=True)
def zero_at_equality(subject: Subject, draw: Draw) -> None:
    """A student with the teacher's logits costs nothing and learns nothing: value and gradient are 0."""
    batch = draw.batch()
    value, slope = subject.both(Batch(batch.teacher.clone(), batch.teacher, batch.target))
    draw.note(student_logits=batch.teacher)
    tolerance = subject.exactness / 1e3 if subject.exactness < 1e-6 else 1e-6
    same("value of equal networks", value, 0.0, tolerance)
    same_gradient("gradient of equal networks", slope, torch.zeros_like(slope), tolerance)


@law("allRank", "sentence-transformers#4012", claimed=True)
def settled_choice(subject: Subject, draw: Draw) -> None:
    """A first choice (the label; without labels the teacher's) that the student already puts 60 above the
    rest may as well be 120 above: what remains is the choice among the rest."""
    batch = draw.batch()
    values = [subject.value(_with_first_at(subject, batch, sign=1, offset=x)) for x in (60.0, 120.0)]
    same("value with the first choice 120 above the rest, by 60", values[1], values[0], subject.exactness)


@law("allRank", "sentence-transformers#4012", claimed=True)
def log_tail(subject: Subject, draw: Draw) -> None:
    """The loss has no floor under the log: pushing the first choice (the label; without labels the teacher's)
    from 1,000 below the rest to 2,000 costs as much as from 2,000 to 3,000, and more than nothing."""
    batch = draw.batch()
    one, two, three = (
        subject.value(_with_first_at(subject, batch, sign=-1, offset=x)) for x in (1e3, 2e3, 3e3)
    )
    if not two > one:
        raise Broken(f"value {two:.6g} at 2,000 below the rest and {one:.6g} at 1,000: no cost")
    same("cost of the third thousand, by the second", three - two, two - one, 1e-4)


def _with_first_at(subject: Subject, batch: Batch, sign: int, offset: float) -> Batch:
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
