"""The native engine of softmax; csrc/kernels/softmax.cpp holds the mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engines import LIBRARY
from .reference import wide

# Two names for one kernel: what autograd adds to a call takes longer than the softmax of a small matrix.
LIBRARY.define("softmax(Tensor x, int algorithm, bool logarithm) -> Tensor")
LIBRARY.define("softmax_forward(Tensor x, int algorithm, bool logarithm) -> Tensor")

# For tests: e^x as mantissa * 2^exponent, as the two-pass softmax has it, and as the other kernels have it.
LIBRARY.define("exp_parts(Tensor x) -> (Tensor mantissa, Tensor exponent, Tensor value)")

# Overloads are called in less time than names that have to choose one.
_differentiable = torch.ops.luce.softmax.default
_forward = torch.ops.luce.softmax_forward.default


def softmax(x: Tensor, algorithm: int, logarithm: bool) -> Tensor:
    """Over dimension 1 of ``(N, C)`` or ``(N, C, M)``."""
    op = _differentiable if x.requires_grad and torch.is_grad_enabled() else _forward
    result: Tensor = op(x, algorithm, logarithm)
    return result


def _fake(x: Tensor, algorithm: int, logarithm: bool) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    ctx.logarithm = inputs[2]
    ctx.save_for_backward(output)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    (output,) = ctx.saved_tensors
    g, y = wide(upstream), wide(output)
    if ctx.logarithm:
        gradient = g - y.exp() * g.sum(1, keepdim=True)
    else:
        gradient = y * (g - (g * y).sum(1, keepdim=True))
    return gradient.to(output.dtype), None, None


torch.library.register_fake("luce::softmax", _fake)
torch.library.register_fake("luce::softmax_forward", _fake)
torch.library.register_autograd("luce::softmax", _backward, setup_context=_setup_context)
