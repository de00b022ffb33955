"""Operators of suffix_logsumexp and its gradient, declared for all engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engines import LIBRARY, run_by_triton
from .reference import suffix_rows

LIBRARY.define("suffix_logsumexp(Tensor x) -> Tensor")
LIBRARY.define("suffix_logsumexp_backward(Tensor upstream, Tensor x) -> Tensor")
for _name in ("suffix_logsumexp", "suffix_logsumexp_backward"):
    run_by_triton(_name, "luce.ops.suffix_logsumexp.triton")
    torch.library.register_fake(f"luce::{_name}", lambda *tensors: torch.empty_like(tensors[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient will be differentiated, for which the kernel has no formula
        (gradient,) = torch.autograd.grad(suffix_rows(x), x, upstream, create_graph=True)
    else:
        gradient = torch.ops.luce.suffix_logsumexp_backward(upstream, x)
    return gradient


torch.library.register_autograd("luce::suffix_logsumexp", _backward, setup_context=_setup_context)
