"""Random logits that look like those of real networks, and a pool of them to rotate through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case

POOL_BYTES = 128 * 2**20
FEWEST, MOST = 2, 64


@dataclass(frozen=True)
class Inputs:
    """What a step reads; what a case did not ask for is None."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    order: Tensor
    upstream: Tensor

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def read(self) -> None:
        """Leave the same traces in the caches before everybody's turn: logits fresh from a network are there
        too, as far as they fit."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.sum()


def make(case: Case, shape: tuple[int, int], generator: torch.Generator) -> Inputs:
    """Logits of the case's kind and of `shape`; the networks share what is not noise, as real ones do.

    ``"normal"`` is standard normal noise. ``"image"`` is noise of standard deviation 1.5 and one logit 9
    above it. ``"language"`` is -1.8 log(rank) with noise of 0.5, the ranks permuted anew in every row: the
    first 128 of 32000 classes hold about 98.6% of the mass. The label is the top class in 7 rows of 10, else
    any class.
    """
    rows, classes = shape

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator)

    top = torch.randint(classes, (rows,), generator=generator)
    if case.logits == "image":
        scale, centre = 1.5, torch.zeros(shape).index_put_((torch.arange(rows), top), torch.tensor(9.0))
    elif case.logits == "language":
        rank = torch.rand(shape, generator=generator).argsort(-1)
        scale, centre, top = 0.5, -1.8 * (rank + 1.0).log(), rank.argmin(-1)
    else:
        scale, centre = 1.0, torch.zeros(())
    dtype = getattr(torch, case.dtype)
    student = noise().mul_(scale).add_(centre).to(dtype).requires_grad_(case.backward)
    asked: dict[str, Tensor] = {}
    if "teacher" in case.inputs:
        asked["teacher"] = noise().mul_(scale).add_(centre).to(dtype)
    if "target" in case.inputs:
        elsewhere = torch.rand(rows, generator=generator) < 0.3
        asked["target"] = torch.where(elsewhere, torch.randint(classes, (rows,), generator=generator), top)
    if "order" in case.inputs:
        asked["order"] = asked["teacher"].sort(dim=-1, descending=True, stable=True).indices
    if "upstream" in case.inputs:
        asked["upstream"] = noise().to(dtype)
    return Inputs(student, *(asked.get(n) for n in ("teacher", "target", "order", "upstream")))  # type: ignore[arg-type]


def pool(case: Case, seed: int = 0) -> list[Inputs]:
    """Enough different inputs that nothing learns them: a repeated row makes a sort look 40% faster."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [make(case, case.shape, generator)]
    count = POOL_BYTES // sum(tensor.nbytes for tensor in inputs[0].tensors())
    inputs += [make(case, case.shape, generator) for _ in range(min(max(count, FEWEST), MOST) - 1)]
    return inputs
