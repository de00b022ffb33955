"""Mutual learning: two networks trained together, each the other's teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import UserError
from ..signals import LearningTeacher, Signal, Teacher
from ._processes import mean_over_processes, share_weights
from .base import Batch, Method
from .features import FeatureMethod, without_side_effects
from .simkd import SimKD


class MutualLearning(Method):
    r"""Two networks trained together on the same batches, each the other's teacher.

    On each batch the student :math:`s` takes a step, then its peer :math:`p` takes one, by the same losses
    with the roles exchanged. With cross-entropy and KD at temperature 1 that is Deep Mutual Learning:

    .. math::

        L_s = \mathrm{CE}(s, y) + \mathrm{KL}(p \,\|\, s), \qquad
        L_p = \mathrm{CE}(p, y) + \mathrm{KL}(s \,\|\, p)

    The peer answers as it is before its step, and the student, asked anew, as it is after its own. Neither
    sends a gradient into the other. Both answer in training mode, with dropout and the statistics of the
    batch, but a network's running statistics count a batch once, when it learns from it. All this is as in
    the authors' code, except that there each network's step draws a batch of its own.

    What a loss on features learns exists twice, once for each direction: what teaches the student is trained
    with the student's optimizer, what teaches the peer with the peer's. A term's paths ``student`` and
    ``teacher`` are those of the student and of the peer, in both directions.

    With ``IEKDLoss(autoencoder="online")`` on features beside them, this is our reading of IE-DML (Huang et
    al., CVPR 2021, arXiv 2107.00181), of which no code is published. That the auto-encoders of networks that
    are themselves changing are trained along, that codes are made anew for each network's step, and the
    weights are reconstructed.

    Args:
        method: What teaches the student, a `LogitMethod` or `FeatureMethod`; a copy of it teaches the peer.
        peer: From inputs to logits: a network, or what makes one, called once when the parts are built. It
            starts from weights of its own.
        optimizer: Makes the peer's optimizer from a list of its parameters. A training lays the factor of the
            student's learning rate on it too. An average of weights is kept of the student alone.
        clip_norm: Largest norm of the peer's gradient; None for no limit.
    Raises:
        UserError: If the losses compare with no teacher or want one that is trained already, or the method
            has two views or steps of its own.
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
    manual_optimization = True

    def __init__(
        self,
        method: Method,
        peer: nn.Module | Callable[[], nn.Module],
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        clip_norm: float | None = None,
    ) -> None:
        super().__init__()
        if method.manual_optimization or method.two_views:
            raise UserError(
                "expected a method of one view and without steps of its own for mutual learning, got "
                f"{type(method).__name__}"
            )
        if not method.needs_teacher:
            raise UserError(
                "expected a loss that compares with a teacher for mutual learning, such as KDLoss"
            )
        if method.needs_preparation or any(isinstance(part, SimKD) for part in method.modules()):
            raise UserError(
                "expected losses that can do without a trained teacher for mutual learning, whose networks "
                "start together; give no `teacher_temperature: auto`, no SimKDLoss, no IEKDLoss but with "
                "`autoencoder: online`, and nothing else that is prepared before training"
            )
        if clip_norm is not None:
            checks.check_positive(clip_norm=clip_norm)
        self.method, self.peer_method = method, exchanged(method)
        self.peer: nn.Module | None = peer if isinstance(peer, nn.Module) else None
        self.new_peer = None if isinstance(peer, nn.Module) else peer
        self.new_optimizer, self.clip_norm = optimizer, clip_norm
        self.uses_unlabelled = method.uses_unlabelled
        self.optimizer: torch.optim.Optimizer | None = None
        self._sources: tuple[Teacher, Teacher] | None = None

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {} if self.optimizer is None else {"peer": self.optimizer}

    @property
    def co_trained(self) -> Mapping[str, nn.Module]:
        return {} if self.peer is None else {"peer": self.peer}

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        """Make the peer, what the losses learn in each direction, and the peer's optimizer; see `Method`."""
        device = sample["input"].device
        with without_side_effects(student, device):
            if self.new_peer is not None and self.peer is None:
                # The student's weights may have been drawn from this very seed.
                torch.manual_seed(int(torch.randint(2**62, ())))
                self.peer = self.new_peer()
            assert self.peer is not None
            share_weights(self.peer.to(device))
            ours, theirs = [*student.parameters()], [*self.peer.parameters()]
            if len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)):
                raise UserError(
                    "expected a peer that starts from other weights than the student's, or the two have "
                    "nothing to tell each other; name another network, checkpoint or seed for it"
                )
            with without_side_effects(self.peer, device):
                self.method.build(student, LearningTeacher(self.peer), sample, rows)
                self.peer_method.build(self.peer, LearningTeacher(student), sample, rows)
        self.optimizer = self.new_optimizer([*self.peer.parameters(), *self.peer_method.parameters()])

    @contextmanager
    def hooks(self, student: nn.Module, teacher: Teacher | None) -> Iterator[None]:
        assert self.peer is not None
        ours, theirs = LearningTeacher(student), LearningTeacher(self.peer)
        with self.method.hooks(student, theirs), self.peer_method.hooks(self.peer, ours):
            self._sources = ours, theirs
            try:
                yield
            finally:
                self._sources = None

    def set_epoch(self, epoch: int) -> None:
        self.method.set_epoch(epoch)
        self.peer_method.set_epoch(epoch)

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """The terms of the student's loss; a given signal is not looked at, the peer is asked."""
        if self._sources is None:
            raise RuntimeError("expected a step within `with method.hooks(student, teacher)`")
        return self.method.step(student, batch, self._sources[1].signal(batch))

    def after_step(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The peer's step; the terms of its loss are called ``peer.NAME``."""
        assert self._sources is not None
        assert self.peer is not None
        assert self.optimizer is not None
        terms = self.peer_method.step(self.peer, batch, self._sources[0].signal(batch))
        with torch.autocast(terms["loss"].device.type, enabled=False):  # as the student's is made
            terms["loss"].backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        means = mean_over_processes([parameter.grad for parameter in learning])
        for parameter, mean in zip(learning, means, strict=True):
            parameter.grad = mean
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(learning, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {f"peer.{name}": value.detach() for name, value in terms.items()}


def exchanged(method: Method) -> Method:
    """A copy for the other direction, in which student and teacher have changed places."""
    other = copy.deepcopy(method)
    for part in other.modules():
        if isinstance(part, FeatureMethod):
            part.terms = {
                name: term._replace(student=term.teacher, teacher=term.student)
                for name, term in part.terms.items()
            }
            part.student_paths, part.teacher_paths = part.teacher_paths, part.student_paths
    return other
