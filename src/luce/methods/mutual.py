"""Mutual learning: two networks trained together, each as the other's teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import UserError
from ..models.copies import copy_of
from ..models.modes import rest, resting
from ..signals import LearningTeacher, Signal, Teacher
from ._processes import mean_over_processes, share_weights
from .base import Batch, CoTrains, Method, OptimizesManually, StepsAfter, WrappedMethod
from .features import FeatureMethod, without_side_effects


class MutualLearning(StepsAfter, OptimizesManually, CoTrains, WrappedMethod[Method]):
    r"""Two networks trained together on the same batches, each as the other's teacher.

    On each batch the student :math:`s` takes a step, then its peer :math:`p` takes one, with the same losses
    and exchanged roles. With cross-entropy and KD at temperature 1 that is Deep Mutual Learning:

    .. math::

        L_s = \mathrm{CE}(s, y) + \mathrm{KL}(p \,\|\, s), \qquad
        L_p = \mathrm{CE}(p, y) + \mathrm{KL}(s \,\|\, p)

    The peer answers with its weights before its step, and the student, evaluated again, with its weights
    after its own step. Neither receives a gradient from the other's loss. Both answer in training mode, with
    dropout and the statistics of the batch, but a network's running statistics count a batch once, in its own
    step. All this follows the authors' code, except that there each network's step draws a batch of its own.

    The parts that a loss on features learns exist twice, once for each direction: those that teach the
    student are trained with the student's optimizer, those that teach the peer with the peer's. A term's
    paths ``student`` and ``teacher`` name modules of the student and of the peer, in both directions.

    With an added ``IEKDLoss(autoencoder="online")`` on features, this is our reading of IE-DML (Huang et al.,
    CVPR 2021, arXiv 2107.00181), of which no code is published. That the auto-encoders are trained along
    because both networks change, that codes are computed again for each network's step, and the weights are
    reconstructed.

    Args:
        method: Teaches the student, a `LogitMethod` or `FeatureMethod`; a copy of it teaches the peer.
        peer: From inputs to logits: a network, or a function that makes one, called once when the parts are
            built. It starts from weights of its own.
        optimizer: Makes the peer's optimizer from a list of its parameters. Its learning rate follows the
            student's schedule. Weights are averaged for the student only.
        clip_norm: Largest norm of the peer's gradient; None for no limit.
    Raises:
        UserError: If the losses use no teacher or need a trained one, or the method has two views or
            optimizes manually.
    Example:
        >>> from luce import CrossEntropyLoss, KDLoss, WeightedSum
        >>> from luce.methods import LogitMethod
        >>> loss = WeightedSum({"task": (1.0, CrossEntropyLoss()), "kl": (1.0, KDLoss(temperature=1.0))})
        >>> student, peer = nn.Linear(8, 3), nn.Linear(8, 3)
        >>> method = MutualLearning(LogitMethod(loss), peer, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        >>> batch = {"input": torch.rand(4, 8), "target": torch.arange(4) % 3, "index": torch.arange(4)}
        >>> method.build(student, None, batch, rows=batch)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> with method.hooks(student, None):
        ...     method.step(student, batch, None)["loss"].backward()
        ...     optimizer.step()
        ...     terms = method.after_step(student, batch)
        >>> sorted(terms)
        ['peer.kl', 'peer.loss', 'peer.task']

    References:
        Zhang et al., Deep Mutual Learning, CVPR 2018, arXiv 1706.00384.
    """

    needs_teacher = False

    def __init__(
        self,
        method: Method,
        peer: nn.Module | Callable[[], nn.Module],
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(method)
        if method.capabilities.optimizes_manually is not None or method.two_views:
            raise UserError(
                "expected a method of one view and without optimizers of its own for mutual learning, got "
                f"{type(method).__name__}"
            )
        if not method.needs_teacher:
            raise UserError(
                "expected a loss that compares with a teacher for mutual learning, such as KDLoss"
            )
        reuses_classifier = any(getattr(part, "reuses_classifier", False) for part in method.modules())
        if method.capabilities.prepares is not None or reuses_classifier:
            raise UserError(
                "expected losses that need no trained teacher for mutual learning, whose networks start "
                "together; leave out `teacher_temperature: auto`, SimKDLoss, IEKDLoss except with "
                "`autoencoder: online`, and everything else that is prepared before training"
            )
        if clip_norm is not None:
            checks.check_positive(clip_norm=clip_norm)
        self.peer_method = exchanged(method)
        self.peer: nn.Module | None = peer if isinstance(peer, nn.Module) else None
        self.new_peer = None if isinstance(peer, nn.Module) else peer
        self.new_optimizer, self.clip_norm = optimizer, clip_norm
        self.optimizer: torch.optim.Optimizer | None = None
        self._teachers: tuple[Teacher, Teacher] | None = None
        self.resting: list[nn.Module] = []

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {} if self.optimizer is None else {"peer": self.optimizer}

    @property
    def co_trained(self) -> Mapping[str, nn.Module]:
        return {} if self.peer is None else {"peer": self.peer}

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        """Make the peer, the parts that losses learn in each direction, and the peer's optimizer."""
        device = sample["input"].device
        with without_side_effects(student, device):
            if self.new_peer is not None and self.peer is None:
                # The student's weights may have been drawn from this very seed.
                torch.manual_seed(int(torch.randint(2**62, ())))
                self.peer = self.new_peer()
            assert self.peer is not None
            self.resting = resting(self.peer)
            # Processes may have drawn different weights, and only gradients are averaged later.
            share_weights(self.peer.to(device))
            weights, peer_weights = [*student.parameters()], [*self.peer.parameters()]
            if len(weights) == len(peer_weights) and all(map(torch.equal, weights, peer_weights)):
                raise UserError(
                    "expected a peer with other initial weights than the student's, or neither can learn "
                    "from the other; name another network, checkpoint or seed for it"
                )
            with without_side_effects(self.peer, device):
                self.method.build(student, LearningTeacher(self.peer), sample, rows)
                self.peer_method.build(self.peer, LearningTeacher(student), sample, rows)
        self.optimizer = self.new_optimizer([*self.peer.parameters(), *self.peer_method.parameters()])

    @contextmanager
    def hooks(self, student: nn.Module, teacher: Teacher | None) -> Iterator[None]:
        assert self.peer is not None
        as_teacher, peer_as_teacher = LearningTeacher(student), LearningTeacher(self.peer)
        with (
            self.method.hooks(student, peer_as_teacher),
            self.peer_method.hooks(self.peer, as_teacher),
        ):
            self._teachers = as_teacher, peer_as_teacher
            try:
                yield
            finally:
                self._teachers = None

    def train(self, mode: bool = True) -> MutualLearning:
        """Set the mode as for any module, except for modules of the peer that stay in evaluation mode."""
        super().train(mode)
        rest(self.resting)
        return self

    def set_epoch(self, epoch: int) -> None:
        self.method.set_epoch(epoch)
        self.peer_method.set_epoch(epoch)

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Return the terms of the student's loss; the peer answers instead of the given signal."""
        if self._teachers is None:
            raise RuntimeError("expected a step within `with method.hooks(student, teacher)`")
        return self.method.step(student, batch, self._teachers[1].signal(batch))

    def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Take the peer's step; the terms of its loss are called ``peer.NAME``."""
        assert self._teachers is not None
        assert self.peer is not None
        assert self.optimizer is not None
        terms = self.peer_method.step(self.peer, batch, self._teachers[0].signal(batch))
        with torch.autocast(terms["loss"].device.type, enabled=False):  # as the student's backward pass
            terms["loss"].backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # An unused parameter has no gradient in any process, so all of them average the same list.
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        # DDP wraps the student alone. Before clipping: the limit is for the norm of the mean.
        means = mean_over_processes([parameter.grad for parameter in learning])
        for parameter, mean in zip(learning, means, strict=True):
            parameter.grad = mean
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(learning, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {f"peer.{name}": value.detach() for name, value in terms.items()}


def exchanged(method: Method) -> Method:
    """Copy a method for the other direction, in which student and teacher exchange places."""
    # A deep copy: parts that a loss learns must not be shared between the directions.
    other = copy_of(method, "the peer's losses in mutual learning")
    for part in other.modules():
        if isinstance(part, FeatureMethod):
            part.terms = {
                name: term._replace(student=term.teacher, teacher=term.student)
                for name, term in part.terms.items()
            }
            part.student_paths, part.teacher_paths = part.teacher_paths, part.student_paths
    return other
