"""Operators of softmax, declared for all engines; csrc/kernels/softmax.cpp computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engines import LIBRARY
from .reference import wide

# Two names for one kernel, with and without a gradient: the autograd layer takes longer than the softmax of a
# small matrix.
LIBRARY.define("softmax(Tensor x, int algorithm, bool logarithm) -> Tensor")
LIBRARY.define("softmax_forward(Tensor x, int algorithm, bool logarithm) -> Tensor")

# For tests: e^x as mantissa * 2^exponent by the two-pass softmax, and as one number by the other kernels.
LIBRARY.define("exp_parts(Tensor x) -> (Tensor mantissa, Tensor exponent, Tensor value)")

# The overloads themselves: a call by name would look for one each time.
differentiable = torch.ops.luce.softmax.default
forward = torch.ops.luce.softmax_forward.default


def _fake(x: Tensor, algorithm: int, logarithm: bool) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    ctx.logarithm = inputs[2]
    ctx.save_for_backward(output)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    (output,) = ctx.saved_tensors
    # Wide: in 16 bits the sum of g * y over thousands of classes would keep two or three digits.
    g, y = wide(upstream), wide(output)
    if ctx.logarithm:
        gradient = g - y.exp() * g.sum(1, keepdim=True)
    else:
        gradient = y * (g - (g * y).sum(1, keepdim=True))
    return gradient.to(output.dtype), None, None


torch.library.register_fake("luce::softmax", _fake)
torch.library.register_fake("luce::softmax_forward", _fake)
torch.library.register_autograd("luce::softmax", _backward, setup_context=_setup_context)
