"""What a distillation loss must obey, each law stated once.

A law is a function ``law(subject, draw)`` that draws an example and raises `Broken` if the loss fails on it.
Its docstring is the statement that users read. Most laws bind any loss; those marked ``claimed`` bind only a
loss that says so, because a sound one may be built otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import unknown_name
from .adapters import TEMPERATURES, Loss
from .draw import Batch, Draw

IGNORED = -100
NOT_CLAIMED = "not claimed"


class Broken(Exception):
    """The loss fails on the example: what came out, and what should have."""


class NotApplicable(Exception):
    """The law says nothing about this loss, and why."""


@dataclass(frozen=True)
class Subject:
    """A loss as the laws see it: a value and a gradient, and how exact they can be.

    Attributes:
        dtype: Of the logits it is given: float64, or float32 for a loss that takes no float64.
        exactness: Relative error that rounding may cause: 1e-9 if it computes in float64, 1e-4 in float32.
        against: Another implementation of the same loss.
    """

    loss: Loss
    dtype: torch.dtype
    exactness: float
    against: Subject | None = None

    def with_options(self, **options: Any) -> Subject:
        return replace(self, loss=self.loss.with_options(**options))

    def returned(self, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        try:
            return self.loss(batch.student, batch.teacher, batch.target)
        except Exception as error:
            raise Broken(f"the loss raised {_one_line(error)}") from error

    def total(self, batch: Batch) -> Tensor:
        returned = self.returned(batch)
        value = returned["loss"] if isinstance(returned, Mapping) else returned
        if not isinstance(value, Tensor) or value.ndim:
            raise Broken(f"expected a scalar tensor, got {_describe(value)}")
        return value

    def value(self, batch: Batch) -> float:
        return self.total(batch).item()

    def both(self, batch: Batch) -> tuple[float, Tensor]:
        """The value, and its gradient towards the student's logits."""
        leaf = batch.student.detach().requires_grad_()
        value = self.total(Batch(leaf, batch.teacher, batch.target))
        return value.item(), gradient_of(value, leaf)

    def gradient(self, batch: Batch) -> Tensor:
        return self.both(batch)[1]


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor:
    """Zeros if the value does not depend on the leaf."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    try:
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=True)
    except Exception as error:
        raise Broken(f"the gradient raised {_one_line(error)}") from error
    return torch.zeros_like(leaf) if gradient is None else gradient


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def same(what: str, got: float, expected: float, tolerance: float, floor: float | None = None) -> None:
    """Equal up to a relative error, or an absolute one of `floor`: `tolerance` unless given."""
    error = abs(got - expected)
    if not error <= tolerance * abs(expected) + (tolerance if floor is None else floor):
        raise Broken(f"{what}: {got:.6g} instead of {expected:.6g}")


def same_gradient(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a relative error in the norm; the evidence names the worst entry."""
    error = (got.double() - expected.double()).abs()
    allowed = tolerance * (1 + expected.double().norm().item())
    if error.numel() and not (error <= allowed).all():
        place = int(error.nan_to_num(nan=math.inf).argmax())
        row, column = divmod(place, got.shape[-1])
        raise Broken(
            f"{what}, at row {row} and class {column}: {got[row, column].item():.6g} "
            f"instead of {expected[row, column].item():.6g}"
        )


@dataclass(frozen=True)
class Law:
    """A law with its name, its statement, and who reported what it catches.

    Attributes:
        claimed: Whether it binds only a loss that claims it.
        labels: Whether it needs a loss that is given labels.
        teacher: Whether it needs one that is given the teacher's logits.
        infinity: Whether it needs one that may be given logits of -inf.
    """

    name: str
    statement: str
    check: Callable[[Subject, Draw], None]
    reports: tuple[str, ...]
    claimed: bool
    labels: bool
    teacher: bool
    infinity: bool

    def reason_against(self, loss: Loss) -> str | None:
        """Why it says nothing about this loss."""
        if self.labels and not loss.adapter.takes_target:
            return "the loss is given no labels"
        if self.teacher and not loss.adapter.takes_teacher:
            return "the loss is given no teacher"
        if self.infinity and not loss.adapter.takes_infinity:
            return "the loss is given a product that cannot hold -inf"
        if self.claimed and self.name not in loss.claims:
            return NOT_CLAIMED
        return None


LAWS: dict[str, Law] = {}


def law(
    *reports: str,
    claimed: bool = False,
    labels: bool = False,
    teacher: bool = False,
    infinity: bool = False,
) -> Callable[[Callable[[Subject, Draw], None]], Callable[[Subject, Draw], None]]:
    def declare(check: Callable[[Subject, Draw], None]) -> Callable[[Subject, Draw], None]:
        statement = " ".join((check.__doc__ or "").split())
        LAWS[check.__name__] = Law(
            check.__name__, statement, check, reports, claimed, labels, teacher, infinity
        )
        return check

    return declare


# For every loss


@law("Liger-Kernel#1432", "speculators#951")
def gradient(subject: Subject, draw: Draw) -> None:
    """The gradient is the slope of the value: it agrees with finite differences."""
    batch = draw.batch()
    exact = subject.exactness < 1e-6
    step, tolerance = (1e-5, 1e-5) if exact else (2e-3, 1e-2)
    place = torch.arange(batch.student.numel(), dtype=batch.student.dtype).reshape(batch.student.shape)
    # Off the multiples of 1/8, where the kinks of a hinge are.
    batch = replace(batch, student=batch.student + torch.cos(1 + 3 * place) / 50)
    draw.note(student_logits=batch.student)
    direction = torch.sin(1 + 2 * place)
    direction = direction / direction.norm()
    up, down = (
        subject.value(replace(batch, student=batch.student + sign * step * direction)) for sign in (1, -1)
    )
    slope = (subject.gradient(batch) * direction).sum().item()
    same("slope along a direction, by autograd", slope, (up - down) / (2 * step), tolerance, tolerance / 10)


@law("Liger-Kernel#1432", "speculators#951")
def low_precision(subject: Subject, draw: Draw) -> None:
    """In float32, bfloat16 and float16 the error of the gradient, by that in float64 on the same numbers, is
    at most twice that of a KL divergence of the same temperature in plain PyTorch, and two roundings; a dtype
    of 16 bits may be refused."""
    narrow = [torch.float32] if subject.dtype == torch.float64 else []
    dtype = draw.choice([*narrow, torch.bfloat16, torch.float16])
    batch = draw.many(rows=12, classes=40).to(dtype)
    draw.note(dtype=str(dtype).removeprefix("torch."))
    wide = batch.to(subject.dtype)
    if dtype != torch.float32:
        try:
            subject.loss(batch.student, batch.teacher, batch.target)
        except Exception:
            return  # refused
    info, truth = torch.finfo(dtype), subject.gradient(wide)
    temperature = _temperature(subject.loss)
    eager = _error(_eager_kl(batch, temperature), _eager_kl(wide, temperature))
    allowed = 2 * eager + 2 * info.eps
    # A loss that computes in float32 when it is given float64 is a measure only to within that; and float16
    # has no numbers between its multiples of 6e-8, against which people scale losses.
    allowed += subject.exactness + 4 * info.tiny * info.eps * math.sqrt(truth.numel()) / _norm(truth)
    error = _error(subject.gradient(batch), truth)
    if not error <= allowed:
        name = draw.record["dtype"]
        raise Broken(f"relative error of the gradient in {name}: {error:.3g}, allowed {allowed:.2g}")


def _error(got: Tensor, truth: Tensor) -> float:
    """Relative, in the norm."""
    return _norm(got.double() - truth.double()) / _norm(truth)


def _norm(gradient: Tensor) -> float:
    return max(gradient.double().norm().item(), 1e-300)


def _temperature(loss: Loss) -> float:
    """What the loss softens by, as far as its options tell."""
    option = loss.option(*TEMPERATURES)
    value = None if option is None else loss.options.get(option.name, option.default)
    return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else 1.0


def _eager_kl(batch: Batch, temperature: float) -> Tensor:
    leaf = batch.student.detach().requires_grad_()
    log_q, p = (leaf / temperature).log_softmax(-1), (batch.teacher / temperature).softmax(-1)
    return torch.autograd.grad(F.kl_div(log_q, p, reduction="batchmean"), leaf)[0]


@law("sentence-transformers#4012", "allRank")
def huge_logits(subject: Subject, draw: Draw) -> None:
    """Logits spread over 1e3 or 1e4, or a label 120 above or below the rest, give in float32 a finite value
    and gradient, those of float64."""
    pattern = draw.choice(["label 120 above", "label 120 below", "spread 1e3", "spread 1e4"])
    batch = draw.many(rows=6, classes=12)
    draw.note(logits=pattern)
    if pattern.startswith("spread"):
        spread = float(pattern.split()[1])
        student, teacher = (spread / 2 * x.tanh() for x in (batch.student, batch.teacher))
    else:
        offset = 120.0 if pattern.endswith("above") else -120.0
        student = batch.student + offset * F.one_hot(batch.target, batch.classes)
        teacher = batch.teacher
    narrow = Batch(student, teacher, batch.target).to(torch.float32)
    value, slope = subject.both(narrow)
    if not math.isfinite(value):
        raise Broken(f"value {value}, not finite")
    if not slope.isfinite().all():
        raise Broken(f"{int((~slope.isfinite()).sum())} entries of the gradient are not finite")
    truth, true_slope = subject.both(narrow.to(subject.dtype))
    same("value in float32", value, truth, 1e-3)
    same_gradient("gradient in float32", slope, true_slope, 1e-2)


@law("Model-Optimizer#639")
def nothing_to_learn(subject: Subject, draw: Draw) -> None:
    """Where student and teacher are equal, or one of them is even over all classes, value and gradient are
    finite: a new student's head may well start at zero."""
    batch = draw.batch()
    kind = draw.choice(["equal networks", "an even student", "an even teacher", "both even"])
    draw.note(kind=kind)
    student = batch.teacher if kind == "equal networks" else batch.student
    even = torch.zeros_like(batch.student)
    student = even if kind in ("an even student", "both even") else student
    teacher = even if kind in ("an even teacher", "both even") else batch.teacher
    value, slope = subject.both(Batch(student, teacher, batch.target))
    if not math.isfinite(value):
        raise Broken(f"{kind}: value {value}")
    if not slope.isfinite().all():
        raise Broken(f"{kind}: gradient {slope.tolist()}")


@law("layouts that a kernel took for contiguous ones, in several projects")
def layout(subject: Subject, draw: Draw) -> None:
    """Strided, transposed and expanded tensors give what contiguous ones give."""
    batch = draw.batch(rows=(2, 3))
    kind = draw.choice(["strided", "transposed", "expanded"])
    draw.note(kind=kind)
    if kind == "strided":
        other = Batch(*(torch.stack([x, torch.full_like(x, 77)], -1)[..., 0] for x in vars(batch).values()))
    elif kind == "transposed":
        other = Batch(batch.student.T.contiguous().T, batch.teacher.T.contiguous().T, batch.target)
    else:
        other = Batch(*(x[:1].expand_as(x) for x in vars(batch).values()))
        batch = Batch(*(x.contiguous() for x in vars(other).values()))
        draw.note(student_logits=batch.student, teacher_logits=batch.teacher, target=batch.target)
    value, slope = subject.both(batch)
    got, got_slope = subject.both(other)
    same(f"value of {kind} inputs", got, value, subject.exactness)
    same_gradient(f"gradient of {kind} inputs", got_slope, slope, subject.exactness)


@law("in-place arithmetic on the caller's logits, in several projects")
def inputs_kept(subject: Subject, draw: Draw) -> None:
    """Logits and labels are as they were after the call."""
    batch = draw.batch()
    before = [x.clone() for x in vars(batch).values()]
    subject.returned(batch)
    for (name, now), then in zip(vars(batch).items(), before, strict=True):
        if not torch.equal(now, then):
            raise Broken(f"the call changed {name}: {now.tolist()}, was {then.tolist()}")


@law("a value that depends on how a batch is put together")
def row_order(subject: Subject, draw: Draw) -> None:
    """The order of the rows in a batch does not matter."""
    batch = draw.batch(rows=(2, 3))
    order = draw.permutation(len(batch))
    draw.note(order=order)
    value, slope = subject.both(batch)
    got, got_slope = subject.both(batch.rows(order))
    same("value of the reordered rows", got, value, subject.exactness)
    same_gradient("gradient of the reordered rows", got_slope, slope[order], subject.exactness)


@law("zero-padded students and copied teacher logits", teacher=True)
def unequal_classes(subject: Subject, draw: Draw) -> None:
    """Where one network has more classes than the other the call is refused, or classes that it gives no
    probability change nothing."""
    batch = draw.batch()
    extra = draw.integer(1, 3)
    which = draw.choice(["teacher", "student"])
    draw.note(extra_classes=extra, of=which, their_logits=-1e4)
    wide = {**vars(batch), which: F.pad(getattr(batch, which), (0, extra), value=-1e4)}
    try:
        found = subject.loss(wide["student"], wide["teacher"], wide["target"])
    except Exception:
        return  # refused
    got = (found["loss"] if isinstance(found, Mapping) else found).item()
    what = f"value with {_classes(extra)} of no probability more in the {which}"
    same(what, got, subject.value(batch), 1e-4)


@law("axolotl#3660", "axolotl#3206")
def terms(subject: Subject, draw: Draw) -> None:
    """Of a loss that returns named terms, each has a gradient, and value and gradient are the sums of the
    terms'."""
    batch = draw.many(rows=3, classes=4).to(subject.dtype)  # a drawn one may have nothing to learn
    leaf = batch.student.detach().requires_grad_()
    found = subject.returned(Batch(leaf, batch.teacher, batch.target))
    if not isinstance(found, Mapping):
        raise NotApplicable("the loss returns a tensor, no named terms")
    named = {name: term for name, term in found.items() if name != "loss"}
    slopes = {name: gradient_of(term, leaf) for name, term in named.items()}
    for name, slope in slopes.items():
        if not slope.any():
            raise Broken(f"the term `{name}` is {named[name].item():.6g} and has no gradient")
    total = sum(term.item() for term in named.values())
    same("the value, by the sum of the terms", found["loss"].item(), total, subject.exactness)
    slope = sum(slopes.values(), torch.zeros_like(leaf))
    same_gradient(
        "the gradient, by the sum of the terms", gradient_of(found["loss"], leaf), slope, subject.exactness
    )


@law("verl#7855", "verl#7856")
def top_k_limit(subject: Subject, draw: Draw) -> None:
    """With `top_k` as large as the number of classes, a truncated loss is the full one."""
    option = subject.loss.option("top_k")
    if option is None or option.default not in (None, 0, -1):
        raise NotApplicable("the loss has no option `top_k` that is off by default")
    batch = draw.batch()
    full, cut = (subject.with_options(top_k=k) for k in (option.default, batch.classes))
    for one in (full, cut):
        try:
            one.loss(batch.student, batch.teacher, batch.target)
        except (TypeError, ValueError) as error:  # as an argument, not as an accident inside
            raise NotApplicable(f"the loss refuses `top_k` beside its other options: {error}") from error
    value, slope = full.both(batch)
    got, got_slope = cut.both(batch)
    # Some keep a tail of the mass outside, which is nothing here, at a floor of 1e-7.
    same(f"value with top_k={batch.classes}", got, value, 1e-5)
    same_gradient(f"gradient with top_k={batch.classes}", got_slope, slope, 1e-5)


@law("trl#5731", "trl#6629")
def implementations(subject: Subject, draw: Draw) -> None:
    """Two implementations of one loss, named by --against, agree in value and gradient."""
    if subject.against is None:
        raise NotApplicable("no other implementation given; name one with --against")
    batch = draw.batch()
    if "ignored_rows" in subject.loss.claims and draw.choice([False, True]):
        batch.target[0] = IGNORED
        draw.note(target=batch.target)
    tolerance = 10 * max(subject.exactness, subject.against.exactness)
    value, slope = subject.against.both(batch)
    got, got_slope = subject.both(batch)
    same("value, by the other implementation's", got, value, tolerance)
    same_gradient("gradient, by the other implementation's", got_slope, slope, tolerance)


# For losses that claim it


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
    how = f"with {_classes(extra)} at {logit:g} appended"
    same(f"value {how}", got, value, subject.exactness)
    same_gradient(f"gradient {how}", got_slope, F.pad(slope, (0, extra)), subject.exactness)


def _classes(count: int) -> str:
    return "a class" if count == 1 else f"{count} classes"


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


# Several claims at once, by what a loss is.
GROUPS: dict[str, tuple[str, ...]] = {
    "divergence": (
        "shift_invariant",
        "class_order",
        "vanishing_classes",
        "micro_batches",
        "non_negative",
        "zero_at_equality",
    ),
    "masking": ("ignored_rows", "ignored_nan", "all_ignored"),
    "ranking": (
        "shift_invariant",
        "class_order",
        "micro_batches",
        "non_negative",
        "settled_choice",
        "log_tail",
    ),
}
GROUPS["all"] = tuple(name for name, one in LAWS.items() if one.claimed)


def law_names(names: Collection[str]) -> frozenset[str]:
    """The laws of these names.

    Raises:
        UserError: If one is none.
    """
    for name in names:
        if name not in LAWS:
            raise unknown_name("law", name, LAWS)
    return frozenset(names)


def claimed_laws(names: Collection[str]) -> frozenset[str]:
    """The laws of these names and groups of names.

    Raises:
        UserError: If one is neither a group nor a law to claim; those for every loss need no claim.
    """
    found: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in GROUPS["all"]:
            raise unknown_name("claim", name, [*GROUPS, *GROUPS["all"]])
        found.update(GROUPS.get(name, (name,)))
    return frozenset(found)
