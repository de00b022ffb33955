"""As one operator; csrc/kernels/suffix_logsumexp.cpp and, for CUDA, gpu.py hold the mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engines import LIBRARY, run_by_triton
from .plain import suffix_rows

LIBRARY.define("suffix_logsumexp(Tensor x) -> Tensor")
LIBRARY.define("suffix_logsumexp_backward(Tensor upstream, Tensor x) -> Tensor")
for _name in ("suffix_logsumexp", "suffix_logsumexp_backward"):
    run_by_triton(_name, "luce.ops.suffix_logsumexp.gpu")


def suffix_logsumexp(x: Tensor) -> Tensor:
    """``(N, L)`` to ``(N, L)``, L > 0."""
    values: Tensor = torch.ops.luce.suffix_logsumexp(x)
    return values


@torch.library.register_fake("luce::suffix_logsumexp")  # type: ignore[untyped-decorator]
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("luce::suffix_logsumexp_backward")  # type: ignore[untyped-decorator]
def _fake_backward(upstream: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: plain PyTorch can
        (gradient,) = torch.autograd.grad(suffix_rows(x), x, upstream, create_graph=True)
    else:
        gradient = torch.ops.luce.suffix_logsumexp_backward(upstream, x)
    return gradient


torch.library.register_autograd("luce::suffix_logsumexp", _backward, setup_context=_setup_context)
