"""Evaluate a loss on the logits of a linear head, with its gradient, a chunk of rows at a time.

No array of all rows and all classes is made. A chunk holds its logits, the teacher's logits and the gradient
towards its logits, whose products with the head and the hidden states are computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .logits import LinearLogits, TopKLogits

Teacher: TypeAlias = LinearLogits | TopKLogits | Tensor
Which: TypeAlias = slice | Tensor
Formula: TypeAlias = Callable[[Tensor, "Tensor | TopKLogits", "Tensor | None", "Tensor | None"], Tensor]
"""Maps a chunk's student logits ``(n, V)``, teacher logits, labels and weights to values ``(n,)``."""

FEWEST_ROWS = 128
"""The smallest chunk of `rows_per_chunk`: a product of fewer rows mostly waits for the head to be read."""
ROWS_TOGETHER = 1024
"""Rows of 16-bit gradients in one product, which reads and writes the head's gradient once."""

_NVIDIA = torch.version.hip is None
_MULTIPLIES = _NVIDIA and TorchVersion(torch.__version__) >= "2.8"
"""Whether PyTorch multiplies 16-bit matrices into float32 on CUDA."""
_ADDS = _NVIDIA and TorchVersion(torch.__version__) >= "2.10"
"""Whether it adds such a product to float32 in place."""


def rows_per_chunk(rows: int, width: int, classes: int) -> int:
    """Return a power of two near ``rows * width / classes``: a chunk is as large as all hidden states.

    Example:
        >>> rows_per_chunk(8192, 4096, 128256), rows_per_chunk(512, 64, 1000)
        (256, 128)
    """
    return max(FEWEST_ROWS, 2 ** round(math.log2(max(rows * width / classes, 1))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(of: LinearLogits, autocast: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a product's factors: 16 bits only if the product is float32, as on CUDA."""
    dtype = of.hidden.dtype if autocast is None or of.hidden.dtype == torch.float64 else autocast
    return dtype if of.hidden.device.type == "cuda" else _wide(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype for products, or None if it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, of 16 bits in float32: rounded logits would cost the gradient several percent."""
    if _MULTIPLIES and a.is_cuda and a.dtype != _wide(a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(_wide(a.dtype)) @ b.to(_wide(b.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``total += a @ b``, without an array for the product where PyTorch can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _ADDS and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)


class _Head:
    """`LinearLogits` prepared to compute chunks of rows, outside autograd."""

    def __init__(self, of: LinearLogits, autocast: torch.dtype | None) -> None:
        self.of, self.dtype = of, _product_dtype(of, autocast)
        self.hidden = of.hidden.detach()
        self.weight = of.weight.detach()[: of.classes].to(self.dtype)
        self.bias = None if of.bias is None else of.bias.detach()[: of.classes].to(_wide(self.dtype))

    def inputs(self, which: Which) -> Tensor:
        return self.hidden[which].to(self.dtype)

    def products(self, inputs: Tensor) -> Tensor:
        products = _product(inputs, self.weight.T)
        return products if self.bias is None else products.add_(self.bias)

    def __call__(self, which: Which) -> Tensor:
        return self.of.shaped(self.products(self.inputs(which)))


def _reader(teacher: Teacher, autocast: torch.dtype | None) -> Callable[[Which], Tensor | TopKLogits]:
    """Return a function from rows to the teacher's logits."""
    if isinstance(teacher, LinearLogits):
        return _Head(teacher, autocast)
    if isinstance(teacher, TopKLogits):
        return teacher.rows
    constant = teacher.detach()
    return lambda which: constant[which]


@dataclass(frozen=True, eq=False)
class Job:
    """A formula and the rows to evaluate it on.

    Attributes:
        student: Flat, ``(N, H)``.
        teacher: Flat too.
        target: ``(N,)``, as the formula takes it; None without labels.
        formula: Of a chunk.
        dtype: Of the values, float32 or float64.
        chunk_rows: Rows of a chunk, None for `rows_per_chunk`.
        autocast: `autocast_dtype` where the loss was called; the backward pass runs outside of autocast.
    """

    student: LinearLogits
    teacher: Teacher
    target: Tensor | None
    formula: Formula
    dtype: torch.dtype
    chunk_rows: int | None
    autocast: torch.dtype | None

    def values(self, weight: Tensor | None, summed: bool) -> Tensor:
        """Return each row's value times its weight, ``(N,)``; rows of weight 0 are skipped.

        Args:
            weight: ``(N,)``, constant, or None.
            summed: Whether the values will only be summed: gradients are then computed with them.
        """
        student = self.student
        if torch._C._are_functorch_transforms_active():
            return self.held(student, weight)
        ahead = summed and torch.is_grad_enabled()
        values: Tensor = _Streamed.apply(self, weight, ahead, student.hidden, student.weight, student.bias)
        return values

    def visit(
        self, student: LinearLogits, weight: Tensor | None, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the values and their sum's gradients, float32 or float64, towards the `wanted` tensors."""
        student, kept = _rows_that_count(student, weight)
        head, teacher = _Head(student, self.autocast), _reader(self.teacher, self.autocast)
        narrow, wide = head.dtype, _wide(head.dtype)
        rows, classes = student.hidden.shape[0], student.classes
        scale = None
        if narrow == torch.float16 and weight is not None and rows and any(wanted):
            # In a mean over many rows, a row's share of the gradient would underflow in float16.
            scale = weight.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)
            weight = weight / scale
        values = torch.zeros(rows, dtype=self.dtype, device=student.hidden.device)
        gradients = [
            torch.zeros_like(tensor, dtype=wide) if tensor is not None and wants else None
            for tensor, wants in zip((student.hidden, student.weight, student.bias), wanted, strict=True)
        ]
        of_hidden, of_weight, of_bias = gradients
        with torch.autocast(values.device.type, enabled=False):
            for group, chunks in self._groups(rows if kept is None else kept, narrow):
                slopes = []
                for which in chunks:
                    products = head.products(head.inputs(which)).requires_grad_(any(wanted))
                    with torch.set_grad_enabled(any(wanted)):
                        part = self._part(student.shaped(products), teacher(which), which, weight)
                        total = part.sum()
                    values[which] = part.detach()
                    if any(wanted):
                        (slope,) = torch.autograd.grad(total, products)
                        if of_bias is not None:
                            of_bias[:classes] += slope.sum(0)
                        slopes.append(slope.to(narrow))
                        del slope
                    del products, part, total
                if of_hidden is None and of_weight is None:
                    continue
                slope = slopes[0] if len(slopes) == 1 else torch.cat(slopes)
                if of_hidden is not None:
                    of_hidden[group] = _product(slope, head.weight)
                if of_weight is not None:
                    _add_product(of_weight[:classes], slope.T, head.inputs(group))
                del slope, slopes  # as large as the next group's logits
        if scale is not None:
            for result in (values, *gradients):
                if result is not None:
                    result *= scale
        return values, gradients

    def held(self, student: LinearLogits, weight: Tensor | None) -> Tensor:
        """Return the values in a form with derivatives of any order, holding all logits."""
        student, kept = _rows_that_count(student, weight)
        which = slice(None) if kept is None else kept
        wide = _wide(student.hidden.dtype)
        selected = replace(
            student,
            hidden=student.hidden[which].to(wide),
            weight=student.weight.to(wide),
            bias=None if student.bias is None else student.bias.to(wide),
        )
        with torch.autocast(student.hidden.device.type, enabled=False):
            with torch.no_grad():
                teacher = _reader(self.teacher, self.autocast)(which)
            part = self._part(selected.logits(), teacher, which, weight)
        return part if kept is None else part.new_zeros(len(student.hidden)).index_copy(0, kept, part)

    def _part(
        self, logits: Tensor, teacher: Tensor | TopKLogits, which: Which, weight: Tensor | None
    ) -> Tensor:
        weight = None if weight is None else weight[which].to(self.dtype)
        target = None if self.target is None else self.target[which]
        return self.formula(logits, teacher, target, weight)

    def _groups(self, rows: int | Tensor, narrow: torch.dtype) -> Iterator[tuple[Which, list[Which]]]:
        """Yield rows whose gradients are multiplied together, and the chunks that compute them.

        Args:
            rows: Their number, or their indices if they are not all.
            narrow: The dtype of the products' factors.
        """
        count = rows if isinstance(rows, int) else len(rows)
        step = self.chunk_rows or rows_per_chunk(count, self.student.hidden.shape[1], self.student.classes)
        together = step if narrow == _wide(narrow) else step * max(1, ROWS_TOGETHER // step)

        def between(first: int, last: int) -> Which:
            part = slice(first, min(last, count))
            return part if isinstance(rows, int) else rows[part]

        for first in range(0, count, together):
            chunks = range(first, min(first + together, count), step)
            yield between(first, first + together), [between(start, start + step) for start in chunks]


def _rows_that_count(student: LinearLogits, weight: Tensor | None) -> tuple[LinearLogits, Tensor | None]:
    """Return the indices of rows of a weight other than 0, or None for all.

    On a device the test would stall: there, rows of weight 0 keep their place and get hidden states of 0.
    """
    if weight is None:
        return student, None
    idle = weight.detach() == 0
    if _is_on_cpu(idle):
        return student, (~idle).nonzero()[:, 0] if bool(idle.any()) else None
    return replace(student, hidden=student.hidden.masked_fill(idle[:, None], 0)), None


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Streamed(torch.autograd.Function):
    """The values as one node of the graph, with their gradients if they will be summed."""

    @staticmethod
    def forward(ctx: Any, job: Job, weight: Tensor | None, ahead: bool, *tensors: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *tensors)
        ctx.job, ctx.wanted = job, ctx.needs_input_grad[3:]
        ahead = ahead and any(ctx.wanted)
        values, gradients = job.visit(job.student, weight, ctx.wanted if ahead else (False,) * 3)
        ctx.gradients = gradients if ahead else None
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        weight, *tensors = ctx.saved_tensors  # raises if one was changed in place since
        hidden, of_head, bias = tensors
        student = replace(ctx.job.student, hidden=hidden, weight=of_head, bias=bias)
        if torch.is_grad_enabled():  # the gradient will be differentiated
            leaves = [tensor for tensor, wants in zip(tensors, ctx.wanted, strict=True) if wants]
            values = ctx.job.held(student, weight)
            rest = iter(torch.autograd.grad(values, leaves, upstream, create_graph=True))
            return (None, None, None, *(next(rest) if wants else None for wants in ctx.wanted))
        gradients, ctx.gradients = (
            ctx.gradients,
            None,
        )  # returned once only: the caller may change them in place
        if gradients is None or not _is_one_number(upstream):
            share = upstream if weight is None else weight * upstream
            _, gradients = ctx.job.visit(student, share, ctx.wanted)
        elif upstream.numel():
            for gradient in gradients:
                if gradient is not None:
                    gradient *= upstream[0]
        return (
            None,
            None,
            None,
            *(
                None if gradient is None else gradient.to(tensor.dtype)
                for gradient, tensor in zip(gradients, tensors, strict=True)
            ),
        )


def _is_one_number(upstream: Tensor) -> bool:
    """Return whether all entries are one number in memory, as in the gradient of a sum."""
    return upstream.numel() < 2 or not any(upstream.stride())
