"""Random logits that look like those of real networks, and a pool of them to rotate through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases import Case

POOL_BYTES = 128 * 2**20
FEWEST, MOST = 2, 64


@dataclass(frozen=True)
class Inputs:
    """Tensors that a step reads; None where the case needs none.

    `student` and `teacher` are logits or, with the weights of heads, hidden states.
    """

    student: Tensor
    teacher: Tensor | None = None
    target: Tensor | None = None
    order: Tensor | None = None
    upstream: Tensor | None = None
    student_head: Tensor | None = None
    teacher_head: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def trained(self) -> list[Tensor]:
        """Tensors that receive a gradient."""
        return [tensor for tensor in self.tensors() if tensor.requires_grad]

    def read(self) -> None:
        """Read every tensor, so that each step finds the same in the caches, as after a network."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.sum()

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same numbers in another floating dtype, the student a leaf of its own."""
        wide = {
            n: t.detach().to(dtype) for n, t in vars(self).items() if t is not None and t.is_floating_point()
        }
        wide["student"].requires_grad_(self.student.requires_grad)
        return replace(self, **wide)


def device_of(case: Case) -> torch.device:
    return torch.device("cuda" if case.device == "gpu" else "cpu")


def make(case: Case, shape: tuple[int, int], generator: torch.Generator) -> Inputs:
    """Draw inputs of the case's kind, of `shape`; student and teacher share what is not noise.

    ``"normal"`` is standard normal noise. ``"image"`` is noise of standard deviation 1.5, one logit raised by
    9. ``"language"`` is -1.8 log(rank) with noise of 0.5, the ranks permuted anew in every row: the first
    128 of 32000 classes hold about 98.6% of the mass. The label is the top class in 7 rows of 10, else any.
    """
    rows, classes = shape
    device, dtype = generator.device, getattr(torch, case.dtype)

    def noise(*size: int) -> Tensor:
        return torch.randn(size or shape, generator=generator, device=device)

    top = torch.randint(classes, (rows,), generator=generator, device=device)
    if case.width:
        return _with_heads(case, noise, top)
    if case.logits == "image":
        peak = torch.tensor(9.0, device=device)
        place = torch.arange(rows, device=device), top
        scale, centre = 1.5, torch.zeros(shape, device=device).index_put_(place, peak)
    elif case.logits == "language":
        rank = torch.rand(shape, generator=generator, device=device).argsort(-1)
        scale, centre, top = 0.5, -1.8 * (rank + 1.0).log(), rank.argmin(-1)
    else:
        scale, centre = 1.0, torch.zeros((), device=device)

    def logits() -> Tensor:
        return noise().mul_(scale).add_(centre).to(dtype)

    inputs = Inputs(logits().requires_grad_(case.backward))
    if "teacher" in case.inputs:
        inputs = replace(inputs, teacher=logits())
    if "target" in case.inputs:
        elsewhere = torch.rand(rows, generator=generator, device=device) < 0.3
        other = torch.randint(classes, (rows,), generator=generator, device=device)
        inputs = replace(inputs, target=torch.where(elsewhere, other, top))
    if "order" in case.inputs:
        assert inputs.teacher is not None
        order = inputs.teacher.sort(dim=-1, descending=True, stable=True).indices
        inputs = replace(inputs, order=order)
    if "upstream" in case.inputs:
        inputs = replace(inputs, upstream=noise().to(dtype))
    return inputs


def _with_heads(case: Case, noise: Callable[..., Tensor], target: Tensor) -> Inputs:
    """Draw hidden states and heads whose products, the logits, have a standard deviation of 1."""
    dtype, width = getattr(torch, case.dtype), case.width

    def drawn(count: int) -> Tensor:
        return noise(count, width).div_(width**0.25).to(dtype)

    rows, classes = len(target), case.shape[1]
    student, head = (drawn(n).requires_grad_(case.backward) for n in (rows, classes))
    return Inputs(student, drawn(rows), target, student_head=head, teacher_head=drawn(classes))


def pool(case: Case, seed: int = 0) -> list[Inputs]:
    """Return enough inputs that no branch predictor learns them: repeated rows make a sort look 40% faster.

    On a GPU, where a step is timed alone after its caches were emptied, one is enough.
    """
    generator = torch.Generator(device_of(case)).manual_seed(seed)
    inputs = [make(case, case.shape, generator)]
    if case.device == "gpu":
        return inputs
    count = POOL_BYTES // sum(tensor.nbytes for tensor in inputs[0].tensors())
    inputs += [make(case, case.shape, generator) for _ in range(min(max(count, FEWEST), MOST) - 1)]
    return inputs
