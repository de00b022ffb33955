"""The laws that bind every loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import TEMPERATURES, Loss
from .draw import Batch, Draw
from .law import IGNORED, Broken, NotApplicable, Subject, classes, gradient_of, law, same, same_gradient


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
    what = f"value with {classes(extra)} of no probability more in the {which}"
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
