"""Laws that bind every loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import TEMPERATURES, Loss
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


@law("Liger-Kernel#1432", "speculators#951")
def gradient(subject: Subject, draw: Draw) -> None:
    """The gradient agrees with finite differences of the value."""
    batch = draw.batch()
    exact = subject.exactness < 1e-6
    # Steps near the cube root of the precision: smaller ones drown in rounding, larger ones in curvature.
    step, tolerance = (1e-5, 1e-5) if exact else (2e-3, 1e-2)
    place = torch.arange(batch.student.numel(), dtype=batch.student.dtype).reshape(batch.student.shape)
    # Move off the multiples of 1/8: at the kink of a hinge the finite difference is no gradient.
    batch = replace(batch, student=batch.student + torch.cos(1 + 3 * place) / 50)
    draw.note(student_logits=batch.student)
    direction = torch.sin(1 + 2 * place)
    direction = direction / direction.norm()
    up, down = (
        subject.value(replace(batch, student=batch.student + sign * step * direction)) for sign in (1, -1)
    )
    slope = (subject.gradient(batch) * direction).sum().item()
    expect_close(
        "slope along a direction, by autograd", slope, (up - down) / (2 * step), tolerance, tolerance / 10
    )


@law("Liger-Kernel#1432", "speculators#951")
def low_precision(subject: Subject, draw: Draw) -> None:
    """In float32, bfloat16 and float16 the error of the gradient, relative to float64 on the same numbers, is
    at most twice that of a KL divergence of the same temperature in plain PyTorch, plus two roundings. A loss
    may refuse a 16-bit dtype."""
    narrow = [torch.float32] if subject.dtype == torch.float64 else []
    dtype = draw.choice([*narrow, torch.bfloat16, torch.float16])
    batch = draw.normal_batch(rows=12, classes=40).to(dtype)
    draw.note(dtype=str(dtype).removeprefix("torch."))
    wide = batch.to(subject.dtype)
    if dtype != torch.float32:
        try:
            subject.loss(batch.student, batch.teacher, batch.target)
        except Exception:
            return  # the loss refuses the dtype
    info, truth = torch.finfo(dtype), subject.gradient(wide)
    temperature = _temperature(subject.loss)
    eager = _error(_eager_kl(batch, temperature), _eager_kl(wide, temperature))
    allowed = 2 * eager + 2 * info.eps
    # A loss that computes float64 inputs in float32 gives a truth of that precision only. The last term is
    # the spacing of float16 below 6e-8: users scale the loss up to avoid it.
    allowed += subject.exactness + 4 * info.tiny * info.eps * math.sqrt(truth.numel()) / _norm(truth)
    error = _error(subject.gradient(batch), truth)
    if not error <= allowed:
        name = draw.record["dtype"]
        raise Broken(f"relative error of the gradient in {name}: {error:.3g}, allowed {allowed:.2g}")


def _error(got: Tensor, truth: Tensor) -> float:
    """Norm of the error, relative to the norm of the truth."""
    return _norm(got.double() - truth.double()) / _norm(truth)


def _norm(gradient: Tensor) -> float:
    return max(gradient.double().norm().item(), 1e-300)  # no division by zero


def _temperature(loss: Loss) -> float:
    """The temperature of the loss; 1 if its options do not name a number."""
    option = loss.option(*TEMPERATURES)
    value = None if option is None else loss.options.get(option.name, option.default)
    return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else 1.0


def _eager_kl(batch: Batch, temperature: float) -> Tensor:
    leaf = batch.student.detach().requires_grad_()
    log_q, p = (leaf / temperature).log_softmax(-1), (batch.teacher / temperature).softmax(-1)
    return torch.autograd.grad(F.kl_div(log_q, p, reduction="batchmean"), leaf)[0]


@law("sentence-transformers#4012", "allRank")
def huge_logits(subject: Subject, draw: Draw) -> None:
    """For logits spread over 1e3 or 1e4, or a label 120 above or below the rest, value and gradient in
    float32 are finite and equal those in float64."""
    pattern = draw.choice(["label 120 above", "label 120 below", "spread 1e3", "spread 1e4"])
    batch = draw.normal_batch(rows=6, classes=12)
    draw.note(logits=pattern)
    if pattern.startswith("spread"):
        spread = float(pattern.split()[1])
        student, teacher = (spread / 2 * x.tanh() for x in (batch.student, batch.teacher))
    else:
        offset = 120.0 if pattern.endswith("above") else -120.0
        student = batch.student + offset * F.one_hot(batch.target, batch.classes)
        teacher = batch.teacher
    narrow = Batch(student, teacher, batch.target).to(torch.float32)
    value, slope = subject.value_and_gradient(narrow)
    if not math.isfinite(value):
        raise Broken(f"value {value}, not finite")
    if not slope.isfinite().all():
        raise Broken(f"{int((~slope.isfinite()).sum())} entries of the gradient are not finite")
    truth, true_slope = subject.value_and_gradient(narrow.to(subject.dtype))
    expect_close("value in float32", value, truth, 1e-3)
    expect_close_gradient("gradient in float32", slope, true_slope, 1e-2)


@law("Model-Optimizer#639")
def nothing_to_learn(subject: Subject, draw: Draw) -> None:
    """Value and gradient are finite if student and teacher are equal, or if one of them is uniform over all
    classes, as a student is whose head starts at zero."""
    batch = draw.batch()
    kind = draw.choice(["equal networks", "uniform student", "uniform teacher", "both uniform"])
    draw.note(kind=kind)
    student = batch.teacher if kind == "equal networks" else batch.student
    uniform = torch.zeros_like(batch.student)
    student = uniform if kind in ("uniform student", "both uniform") else student
    teacher = uniform if kind in ("uniform teacher", "both uniform") else batch.teacher
    value, slope = subject.value_and_gradient(Batch(student, teacher, batch.target))
    if not math.isfinite(value):
        raise Broken(f"{kind}: value {value}")
    if not slope.isfinite().all():
        raise Broken(f"{kind}: gradient {slope.tolist()}")


@law("kernels that assume contiguous memory, in several projects")
def layout(subject: Subject, draw: Draw) -> None:
    """Strided, transposed and expanded tensors give the value and gradient of contiguous ones."""
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
    value, slope = subject.value_and_gradient(batch)
    got, got_slope = subject.value_and_gradient(other)
    expect_close(f"value of {kind} inputs", got, value, subject.exactness)
    expect_close_gradient(f"gradient of {kind} inputs", got_slope, slope, subject.exactness)


@law("in-place arithmetic on the caller's logits, in several projects")
def inputs_unchanged(subject: Subject, draw: Draw) -> None:
    """The call does not modify logits or labels."""
    batch = draw.batch()
    before = [x.clone() for x in vars(batch).values()]
    subject.returned(batch)
    for (name, after), copy in zip(vars(batch).items(), before, strict=True):
        if not torch.equal(after, copy):
            raise Broken(f"the call changed {name} from {copy.tolist()} to {after.tolist()}")


@law("values that depend on the order of a batch")
def row_order(subject: Subject, draw: Draw) -> None:
    """The order of the rows in a batch does not matter."""
    batch = draw.batch(rows=(2, 3))
    order = draw.permutation(len(batch))
    draw.note(order=order)
    value, slope = subject.value_and_gradient(batch)
    got, got_slope = subject.value_and_gradient(batch.rows(order))
    expect_close("value of the reordered rows", got, value, subject.exactness)
    expect_close_gradient("gradient of the reordered rows", got_slope, slope[order], subject.exactness)


@law("zero-padded students and copied teacher logits", teacher=True)
def unequal_classes(subject: Subject, draw: Draw) -> None:
    """If one network has more classes than the other, the loss raises, or extra classes of probability 0
    change nothing."""
    batch = draw.batch()
    extra = draw.integer(1, 3)
    which = draw.choice(["teacher", "student"])
    draw.note(extra_classes=extra, of=which, their_logits=-1e4)
    wide = {**vars(batch), which: F.pad(getattr(batch, which), (0, extra), value=-1e4)}
    try:
        returned = subject.loss(wide["student"], wide["teacher"], wide["target"])
    except Exception:
        return  # the loss refuses the shapes
    got = (returned["loss"] if isinstance(returned, Mapping) else returned).item()
    what = f"value with {classes(extra)} of probability 0 more in the {which}"
    expect_close(what, got, subject.value(batch), 1e-4)


@law("axolotl#3660", "axolotl#3206")
def terms(subject: Subject, draw: Draw) -> None:
    """If a loss returns named terms, each term has a gradient, and the terms sum to the loss in value and
    gradient."""
    batch = draw.normal_batch(rows=3, classes=4).to(subject.dtype)  # a small drawn batch may have gradient 0
    leaf = batch.student.detach().requires_grad_()
    returned = subject.returned(Batch(leaf, batch.teacher, batch.target))
    if not isinstance(returned, Mapping):
        raise NotApplicable("the loss returns a tensor, no named terms")
    named = {name: term for name, term in returned.items() if name != "loss"}
    slopes = {name: gradient_of(term, leaf) for name, term in named.items()}
    for name, slope in slopes.items():
        if not slope.any():
            raise Broken(f"the term `{name}` has value {named[name].item():.6g} and no gradient")
    total = sum(term.item() for term in named.values())
    expect_close("value, by the sum of the terms", returned["loss"].item(), total, subject.exactness)
    slope = sum(slopes.values(), torch.zeros_like(leaf))
    expect_close_gradient(
        "gradient, by the sum of the terms", gradient_of(returned["loss"], leaf), slope, subject.exactness
    )


@law("verl#7855", "verl#7856")
def top_k_limit(subject: Subject, draw: Draw) -> None:
    """With `top_k` equal to the number of classes, a truncated loss equals the full one."""
    option = subject.loss.option("top_k")
    if option is None or option.default not in (None, 0, -1):
        raise NotApplicable("the loss has no option `top_k` that is off by default")
    batch = draw.batch()
    full, cut = (subject.with_options(top_k=k) for k in (option.default, batch.classes))
    for variant in (full, cut):
        try:
            variant.loss(batch.student, batch.teacher, batch.target)
        except (TypeError, ValueError) as error:  # any other error would be a defect inside the loss
            raise NotApplicable(f"the loss refuses `top_k` with its other options: {error}") from error
    value, slope = full.value_and_gradient(batch)
    got, got_slope = cut.value_and_gradient(batch)
    # Several losses keep the mass outside the top k at a floor of 1e-7; here that mass is 0.
    expect_close(f"value with top_k={batch.classes}", got, value, 1e-5)
    expect_close_gradient(f"gradient with top_k={batch.classes}", got_slope, slope, 1e-5)


@law("trl#5731", "trl#6629")
def implementations(subject: Subject, draw: Draw) -> None:
    """The loss and the implementation named by --against agree in value and gradient."""
    if subject.against is None:
        raise NotApplicable("no other implementation to compare with; name one with --against")
    batch = draw.batch()
    if "ignored_rows" in subject.loss.claims and draw.choice([False, True]):
        batch.target[0] = IGNORED
        draw.note(target=batch.target)
    tolerance = 10 * max(subject.exactness, subject.against.exactness)
    value, slope = subject.against.value_and_gradient(batch)
    got, got_slope = subject.value_and_gradient(batch)
    expect_close("value, by the other implementation", got, value, tolerance)
    expect_close_gradient("gradient, by the other implementation", got_slope, slope, tolerance)
