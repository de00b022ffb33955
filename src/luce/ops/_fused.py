"""What the fused operators share: one visit gives each row's value and, ready to hand out, its gradient.

A fused operator takes the student's logits first and returns ``(values, ..., gradient)``, the gradient
already multiplied by the row's weight. Going back then costs nothing if the values are only summed, which is
how the losses use them, and one multiplication otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_gradient(op: str, again: Callable[..., Tensor]) -> None:
    """Teach autograd a fused operator.

    Args:
        op: Its qualified name.
        again: Takes the operator's arguments and gives its values in plain PyTorch, for what the stored
            gradient cannot tell: derivatives of the gradient itself.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # a gradient of zeros for the gradient would be as large as it is
        ctx.arguments = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(output[-1], *(inputs[place] for place in ctx.places))

    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.arguments) - 1)
        if upstream is None:
            return (None, *nothing)
        gradient, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            arguments = list(ctx.arguments)
            for place, tensor in zip(ctx.places, tensors, strict=True):
                arguments[place] = tensor
            (twice,) = torch.autograd.grad(again(*arguments), tensors[0], upstream, create_graph=True)
            return (twice, *nothing)
        return (_scaled(gradient, upstream), *nothing)

    torch.library.register_autograd(op, backward, setup_context=setup_context)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    # Only a plain tensor can be asked for its values: under a compiler, everything here is traced.
    if type(upstream) is Tensor and bool((upstream == 1).all()):
        return gradient
    return (gradient * upstream.unsqueeze(1)).to(gradient.dtype)


def needs_gradient(student: Tensor) -> bool:
    return torch.is_grad_enabled() and student.requires_grad
