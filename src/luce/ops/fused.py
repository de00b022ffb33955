"""Fused operators: one visit to a row computes its value and, ready to hand out, its gradient.

A fused operator takes the student's logits first and, last, whether a gradient is needed. It returns
``(values, ..., gradient)``, the gradient already multiplied by the row's weight. If the values are only
summed, as the losses do, the backward pass then costs nothing, and one multiplication otherwise.

`declare` makes an operator known to PyTorch, and `fused` calls it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._rows import wide_dtype
from .engines import LIBRARY, run_by_triton

Plain = Callable[..., Tensor]
"""An operator's values in plain PyTorch, from the operator's arguments."""

_PLAIN: dict[str, Plain] = {}
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}


def declare(op: str, plain: Plain, *, triton: str, with_bound: bool = False) -> None:
    """Declare ``luce::op`` to the dispatcher, to compilers and to autograd.

    Its arguments are the parameters of `plain` without a default, then ``bool needs_gradient``. A last
    parameter that is a NamedTuple stands for its fields.

    Args:
        op: The operator's name, without ``luce::``.
        plain: Its values in plain PyTorch. Derivatives of the gradient are taken of these; of the stored
            gradient there are none.
        triton: The module with the Triton kernels' function of the same name, for tensors on CUDA devices.
        with_bound: Whether the operator returns ``(rows, 2)`` error bounds between values and gradient.
    """
    hints = typing.get_type_hints(plain)
    names = [name for name, x in inspect.signature(plain).parameters.items() if x.default is x.empty]
    arguments = {name: hints[name] for name in names}
    last = arguments[names[-1]]
    formula = plain
    if hasattr(last, "_fields"):
        del arguments[names[-1]]
        arguments |= typing.get_type_hints(last)
        count = len(last._fields)
        formula = lambda *values: plain(*values[:-count], last(*values[-count:]))  # noqa: E731
    schema = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in arguments.items())
    bound = "Tensor bound, " if with_bound else ""
    LIBRARY.define(f"{op}({schema}, bool needs_gradient) -> (Tensor values, {bound}Tensor gradient)")
    run_by_triton(op, triton)

    def fake(student: Tensor, *others: Any) -> tuple[Tensor, ...]:
        teacher = others[0] if "teacher" in arguments else None
        values, gradient = empty_results(student, teacher, others[-1])
        return (values, values.new_empty(values.numel(), 2), gradient) if with_bound else (values, gradient)

    _PLAIN[op] = formula
    torch.library.register_fake(f"luce::{op}", fake)
    torch.library.register_autograd(
        f"luce::{op}",
        lambda ctx, *upstream: _backward(ctx, formula, upstream[0]),
        setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
    )


def fused(op: str, student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Call a fused operator with all arguments but the last; return all its results but the gradient."""
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    outputs: tuple[Tensor, ...]
    if torch.compiler.is_compiling():
        outputs = getattr(torch.ops.luce, op)(student, *arguments, needs_gradient)
    elif torch._C._are_functorch_transforms_active():
        outputs = _Transformable.apply(op, student, *arguments, needs_gradient)
    elif needs_gradient:
        outputs = _Eager.apply(op, student, *arguments, True)
    else:
        outputs = _below_autograd(op, student, *arguments, False)
    return outputs[:-1]


def _below_autograd(op: str, *inputs: Any) -> tuple[Tensor, ...]:
    """Call the operator without the detour through Python that its registered formula takes."""
    with torch._C._AutoDispatchBelowAutograd():
        outputs: tuple[Tensor, ...] = getattr(torch.ops.luce, op).default(*inputs)
    return outputs


class _Transformable(torch.autograd.Function):
    """The autograd formula in the form that `torch.func` accepts."""

    @staticmethod
    def forward(op: str, *inputs: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = getattr(torch.ops.luce, op)(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, *others = inputs
        _save(ctx, others, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_backward(ctx, _PLAIN[ctx.op], upstream[0]))


class _Eager(torch.autograd.Function):
    """The same formula in the cheapest form: each of the others takes longer than a small kernel."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _below_autograd(*inputs)
        _Transformable.setup_context(ctx, inputs, outputs)
        return outputs

    backward = _Transformable.backward


def _save(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradient's own gradient would be as large as the logits
    ctx.mark_non_differentiable(*output[1:])
    ctx.arguments = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(output[-1], *(inputs[place] for place in ctx.places))


def _backward(ctx: Any, plain: Plain, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(ctx.arguments) - 1)
    if upstream is None:
        return (None, *nothing)
    gradient, *tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        # `torch.func.vjp` returns a function that runs after its transform has ended: saved tensors are then
        # wrappers of a dead level, and must be unwrapped before use.
        gradient, *tensors = (torch._C._functorch.unwrap_if_dead(x) for x in (gradient, *tensors))
        if tensors[0].requires_grad:
            arguments = list(ctx.arguments)
            for place, tensor in zip(ctx.places, tensors, strict=True):
                arguments[place] = tensor
            values = plain(*arguments[:-1])  # without `needs_gradient`
            (again,) = torch.autograd.grad(values, tensors[0], upstream, create_graph=True)
            return (again, *nothing)
    return (_scaled(gradient, upstream), *nothing)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    # Handing out or overwriting the stored gradient is safe only if nothing reads it later: not if the graph
    # is kept for another backward pass, nor if an autograd, functorch or tracing layer records this one.
    if _is_plain(upstream) and _is_plain(gradient) and not torch.is_grad_enabled() and not _is_kept():
        if gradient.device.type == "cpu":
            if _is_one(upstream):
                return gradient
        else:
            # Testing for 1 here would wait for the device. The kernel tests it, and then has nothing to do.
            from .triton.multiply import multiply_rows

            return multiply_rows(gradient, upstream)
    return (gradient * upstream.unsqueeze(1)).to(gradient.dtype)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers and is not traced, batched, dispatched on or of a subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and torch._C._has_storage(tensor)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def _is_kept() -> bool:
    """Return whether this backward pass keeps its graph (``retain_graph=True``)."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is None or keeps_graph()


def _is_one(upstream: Tensor) -> bool:
    if upstream.numel() and not any(upstream.stride()):  # an expanded number, as in the gradient of a sum
        return upstream.as_strided((), ()).item() == 1
    return bool((upstream == 1).all())


def empty_results(student: Tensor, teacher: Tensor | None, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialised values and gradient of an operator."""
    wide = wide_dtype(student, teacher)
    values = student.new_empty(student.shape[:1] + student.shape[2:], dtype=wide)
    return values, torch.empty_like(student) if needs_gradient else student.new_empty(0, dtype=wide)
