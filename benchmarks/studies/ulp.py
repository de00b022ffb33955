"""Worst error of the native exponentials, in units in the last place, over float32 numbers.

    python -m benchmarks.studies.ulp [STEP]

Tests every STEP-th number between 2^-13 and the limits; all of them, the default, take some minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import luce.ops.softmax  # noqa: F401  declares the operator

NUMBERS = 1 << 22
"""Numbers in one array."""


def floats(low: float, high: float, step: int) -> Iterator[Tensor]:
    """Yield every `step`-th float32 between two positive bounds, and their negatives."""
    first, last = torch.tensor([low, high]).view(torch.int32).tolist()
    for start in range(first, last, NUMBERS * step):
        bits = torch.arange(start, min(start + NUMBERS * step, last), step, dtype=torch.int32)
        yield bits.view(torch.float32)
        yield -bits.view(torch.float32)


def ulps(result: Tensor, exact: Tensor) -> Tensor:
    """Return the error of a float32 result in units of the last place that float32 has at the exact value."""
    _, exponent = torch.frexp(exact)
    return (result.double() - exact).abs() / torch.exp2(exponent.double() - 24)


def mantissa_error(x: Tensor) -> Tensor:
    """Return the error of e^x as mantissa * 2^exponent, where that is a normal double."""
    mantissa, exponent, _ = torch.ops.luce.exp_parts(x)
    return ulps(mantissa, x.double().exp() * torch.exp2(-exponent.double()))


def value_error(x: Tensor) -> Tensor:
    """Return the error of the other kernels' exponential."""
    return ulps(torch.ops.luce.exp_parts(x)[2], x.double().exp())


def worst(error: Callable[[Tensor], Tensor], low: float, high: float, step: int) -> tuple[float, float]:
    """Return the largest error and its place."""
    largest = (-math.inf, math.nan)
    for x in floats(low, high, step):
        errors = error(x)
        place = int(errors.argmax())
        largest = max(largest, (errors[place].item(), x[place].item()))
    return largest


if __name__ == "__main__":
    step = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for what, error, high in [
        ("two-pass mantissa", mantissa_error, 708.0),
        ("exponential", value_error, 80.0),
    ]:
        ulp, place = worst(error, 2**-13, high, step)
        print(f"{what}, |x| < {high}: {ulp:.4f} ULP at x = {place:.9g}")
