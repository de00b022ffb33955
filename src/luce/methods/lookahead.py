r"""The effect of a student's steps on its loss on other rows, and the derivative of that towards the teacher.

A *pilot* takes steps of plain gradient descent with the teacher's logits :math:`z^T_k` of *K* batches,

.. math:: \theta_k = \theta_{k-1} - \lambda \nabla_\theta \ell_k\big(z^S_k(\theta_{k-1}), z^T_k\big),

and is then evaluated on a quiz: :math:`L_Q(\theta_K)`. The derivative of that towards the teacher's logits
follows the steps backwards. With :math:`a_K = \nabla L_Q(\theta_K)`, and with :math:`u_k = J_k a_k` for the
change of the student's logits of batch *k* as :math:`\theta_{k-1}` moves along :math:`a_k`,

.. math:: \frac{\partial L_Q}{\partial z^T_k} = -\lambda \frac{\partial}{\partial z^T_k}
    \Big\langle \frac{\partial \ell_k}{\partial z^S_k}, u_k \Big\rangle, \quad
    a_{k-1} = a_k - \lambda \nabla_\theta \big\langle \nabla_\theta \ell_k, a_k \big\rangle .

:math:`a_0` is not needed: the first batch takes one product :math:`J a` in forward mode, and only the loss on
logits is differentiated twice. With a single pilot step that is all; on further batches the student is
differentiated twice as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..losses import teacher_gradient
from ..losses.functional import cross_entropy_loss
from ..models.substitute import forward_with
from ._processes import mean_over_processes
from .base import Batch

LogitsLoss = Callable[[Tensor, Tensor, Batch], Tensor]
"""A scalar from the student's logits, the teacher's logits and the batch."""


@dataclass(frozen=True)
class Place:
    """Parameters, buffers and random state of a network, to repeat a forward pass with the same draws.

    Attributes:
        parameters: The trained ones, by name.
        buffers: By name.
        random: State of the generator on the CPU, and on the network's GPU if it is on one.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, network: nn.Module) -> Place:
        """Return the current state; the parameters are not copied."""
        named = network.named_parameters()
        parameters: dict[str, Tensor] = {name: value for name, value in named if value.requires_grad}
        buffers = dict(network.named_buffers())
        return cls(parameters, buffers, _random_state(next(network.parameters()).device))

    @property
    def values(self) -> list[Tensor]:
        return list(self.parameters.values())

    @property
    def device(self) -> torch.device:
        return self.values[0].device

    def forward(self, network: nn.Module, inputs: Tensor) -> tuple[Tensor, Place]:
        """Return the logits and the state after the pass; the network itself stays unchanged."""
        _set_random_state(self.random, self.device)
        # Clones: batch normalisation updates buffers in place, and this state must serve again.
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        logits = forward_with(network, {**self.parameters, **buffers}, inputs)
        return logits, Place(self.parameters, buffers, _random_state(self.device))

    def moved(self, gradient: Sequence[Tensor], step_size: float) -> Place:
        """Return the state after a step of gradient descent; the graph does not extend through the step."""
        parameters = {
            name: (value.detach() - step_size * slope).requires_grad_()
            for (name, value), slope in zip(self.parameters.items(), gradient, strict=True)
        }
        return Place(parameters, self.buffers, self.random)


def look_ahead(
    student: nn.Module,
    loss: LogitsLoss,
    batches: Sequence[Batch],
    teacher_logits: Sequence[Tensor],
    quiz: Sequence[Batch],
    step_size: float,
) -> tuple[Tensor, list[Tensor]]:
    """Take pilot steps and differentiate the quiz loss after them towards the teacher's logits.

    The student and the random states stay unchanged, so the student's own steps draw what the pilot drew.
    That holds for PyTorch's generators: the derivative is wrong for a student that draws from Python's or
    NumPy's. Only one graph exists at a time, besides that of the teacher's logits if they have one.

    Args:
        student: In training mode; on the quiz all modules except batch normalisation are in evaluation mode,
            so that dropout adds no noise.
        loss: Of the pilot's steps.
        batches: One for each step.
        teacher_logits: Of each of them.
        quiz: Labelled batches; their mean cross-entropies are averaged.
        step_size: Of the pilot.
    Returns:
        The quiz loss of the pilot, in nats, and its derivative towards the teacher's logits of each batch.
    Raises:
        ValueError: From a loss without a gradient towards the teacher's logits.
        NotImplementedError: If an operation of the student has no derivative in forward mode.
    """
    place = Place.of(student)
    device, steps = place.device, []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch, answers in zip(batches, teacher_logits, strict=True):
            logits, after = place.forward(student, batch["input"])
            slope, teacher = slope_on_logits(loss, logits, answers, batch)
            # Detached: the pilot's step needs the slope's value, and its graph is kept for the teacher.
            gradient = _gradient(logits, place.values, slope.detach())
            steps.append((place, batch, slope, teacher))
            # The mean, as in the student's own step under DDP, so that all processes have the same pilot.
            place = after.moved(mean_over_processes(gradient), step_size)
        quiz_loss, adjoint = _quiz(student, place, quiz)

        cotangents: list[Tensor] = []
        # Backwards: each step needs the adjoint of the parameters after it.
        for place, batch, _, teacher in reversed(steps[1:]):
            with _twice_differentiable(), teacher_gradient():
                logits, _ = place.forward(student, batch["input"])
                gradient = _gradient(loss(logits, teacher, batch), place.values, create_graph=True)
            rate = torch.stack([(g * a).sum() for g, a in zip(gradient, adjoint, strict=True)]).sum()
            *change, of_teacher = _gradient(rate, [*place.values, teacher])
            cotangents.insert(0, -step_size * of_teacher)
            adjoint = [a - step_size * c for a, c in zip(adjoint, mean_over_processes(change), strict=True)]
        place, batch, slope, teacher = steps[0]
        rate = (slope * derivative_along(student, place, adjoint, batch["input"])).sum()
        cotangents.insert(0, -step_size * _gradient(rate, [teacher])[0])
    return quiz_loss, cotangents


def slope_on_logits(
    loss: LogitsLoss, student_logits: Tensor, teacher_logits: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return the derivative of a loss towards the student's logits, and the teacher's logits in its graph."""
    student, teacher = (logits.detach().requires_grad_() for logits in (student_logits, teacher_logits))
    with teacher_gradient():
        value = loss(student, teacher, batch)
    (slope,) = torch.autograd.grad(value, student, create_graph=True)
    return slope, teacher


def derivative_along(network: nn.Module, place: Place, direction: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Return the derivative of the logits along a direction of the parameters, in forward mode."""
    with forward_ad.dual_level(), _twice_differentiable(), _Constants():
        duals = {
            # Detached: forward mode carries the derivative, and a backward graph would only take memory.
            name: forward_ad.make_dual(value.detach(), change.detach())
            for (name, value), change in zip(place.parameters.items(), direction, strict=True)
        }
        logits, _ = Place(duals, place.buffers, place.random).forward(network, inputs)
        change = forward_ad.unpack_dual(logits).tangent
    # No tangent: the logits depend on no trained parameter.
    return torch.zeros_like(logits) if change is None else change


def both_ways(
    network: nn.Module, place: Place, logits: Tensor, slope: Tensor, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the squared norm of a gradient twice: by forward mode along it, and from its entries."""
    gradient = _gradient(logits, place.values, slope)
    change = derivative_along(network, place, gradient, inputs)
    return (slope * change).sum(), torch.stack([g.square().sum() for g in gradient]).sum()


def _quiz(student: nn.Module, place: Place, quiz: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Return the mean cross-entropy of the quiz batches and its gradient; one graph at a time."""
    total, gradient = (
        torch.zeros((), device=place.device),
        [torch.zeros_like(value) for value in place.values],
    )
    with _without_dropout(student):
        for batch in quiz:
            logits, _ = place.forward(student, batch["input"])
            # Divided here, so that the gradients of the batches need only be added.
            value = cross_entropy_loss(logits, batch["target"]) / len(quiz)
            gradient = [a + b for a, b in zip(gradient, _gradient(value, place.values), strict=True)]
            total = total + value.detach()
    return total, mean_over_processes(gradient)


@contextmanager
def _without_dropout(network: nn.Module) -> Iterator[None]:
    """Set evaluation mode, except that batch normalisation uses the batch's statistics.

    Its running statistics belong to other weights than the pilot's.
    """
    modes = {module: module.training for module in network.modules()}
    for module in modes:
        module.training &= isinstance(module, _BatchNorm)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Constants(TorchFunctionMode):
    """Treat values computed under `torch.no_grad` as constant in forward mode, as backward mode does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with forward_ad._set_fwd_grad_enabled(torch.is_grad_enabled()):
            return func(*args, **(kwargs or {}))


def _twice_differentiable() -> AbstractContextManager[None]:
    """Exclude fused attention, which has no derivative in forward mode and no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _gradient(
    value: Tensor, inputs: Sequence[Tensor], slope: Tensor | None = None, **options: bool
) -> list[Tensor]:
    """Return `torch.autograd.grad`, with 0 for an input that the value does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    gradients = torch.autograd.grad(value, inputs, slope, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
