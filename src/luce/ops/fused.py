"""What the fused operators share: one visit gives each row's value and, ready to hand out, its gradient.

A fused operator takes the student's logits first and, last, whether a gradient is needed. It returns
``(values, ..., gradient)``, the gradient already multiplied by the row's weight. Going back then costs
nothing if the values are only summed, which is how the losses use them, and one multiplication otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._rows import wide_dtype

Plain = Callable[..., Tensor]
"""Takes an operator's arguments and gives its values in plain PyTorch."""

_PLAIN: dict[str, Plain] = {}


def register_gradient(op: str, plain: Plain) -> None:
    """Teach autograd a fused operator.

    Args:
        op: Its name, without ``luce::``.
        plain: The same values in plain PyTorch, for what the stored gradient cannot tell: derivatives of the
            gradient itself.
    """
    _PLAIN[op] = plain
    torch.library.register_autograd(
        f"luce::{op}",
        lambda ctx, *upstream: _backward(ctx, plain, upstream[0]),
        setup_context=lambda ctx, inputs, output: _remember(ctx, inputs, output),
    )


def fused(op: str, student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Call a fused operator with everything but its last argument; all that it returns but the gradient."""
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
    """The operator without the detour through Python that its registered formula would take."""
    with torch._C._AutoDispatchBelowAutograd():
        outputs: tuple[Tensor, ...] = getattr(torch.ops.luce, op).default(*inputs)
    return outputs


class _Transformable(torch.autograd.Function):
    """The formula in the form that `torch.func` understands."""

    @staticmethod
    def forward(op: str, *inputs: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = getattr(torch.ops.luce, op)(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, *others = inputs
        _remember(ctx, others, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_backward(ctx, _PLAIN[ctx.op], upstream[0]))


class _Eager(torch.autograd.Function):
    """The same in the form that costs least: every other way takes longer than a small kernel itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _below_autograd(*inputs)
        _Transformable.setup_context(ctx, inputs, outputs)
        return outputs

    backward = _Transformable.backward


def _remember(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # a gradient of zeros for the gradient would be as large as it is
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
        # What `torch.func.vjp` returns is called when its transform is over, and its tensors but wrappers.
        gradient, *tensors = (torch._C._functorch.unwrap_if_dead(x) for x in (gradient, *tensors))
        if tensors[0].requires_grad:
            arguments = list(ctx.arguments)
            for place, tensor in zip(ctx.places, tensors, strict=True):
                arguments[place] = tensor
            (twice,) = torch.autograd.grad(plain(*arguments), tensors[0], upstream, create_graph=True)
            return (twice, *nothing)
    return (_scaled(gradient, upstream), *nothing)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    # Unless the graph is kept, nobody needs the gradient after this, and whoever gets it may change it.
    if _is_plain(upstream) and _is_plain(gradient) and not torch.is_grad_enabled() and not _is_kept():
        if gradient.device.type == "cpu":
            if _is_one(upstream):
                return gradient
        else:
            # Asking would stall the device. So it is multiplied in its place, by a kernel that has nothing to
            # do where the factors are 1.
            from ._triton import multiply_rows

            return multiply_rows(gradient, upstream)
    return (gradient * upstream.unsqueeze(1)).to(gradient.dtype)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it holds numbers and nobody is watching: not traced, not batched, of no subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and torch._C._has_storage(tensor)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def _is_kept() -> bool:
    """Whether the graph that is walked back may be walked again, with what it has saved."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def _is_one(upstream: Tensor) -> bool:
    if upstream.numel() and not any(upstream.stride()):  # one number for all, as the gradient of a sum is
        return upstream.as_strided((), ()).item() == 1
    return bool((upstream == 1).all())


def empty_results(student: Tensor, teacher: Tensor | None, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """Values and gradient of an operator that returns nothing else, for who only asks for their shapes."""
    wide = wide_dtype(student, teacher)
    values = student.new_empty(student.shape[:1] + student.shape[2:], dtype=wide)
    return values, torch.empty_like(student) if needs_gradient else student.new_empty(0, dtype=wide)
