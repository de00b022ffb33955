"""MetaDistil: a teacher that learns to teach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import UserError
from ..losses.functional import kd_loss
from ..models.copies import copy_of
from ..signals import DenseSignal, Signal, Teacher
from ._processes import mean_over_processes
from .base import Batch, CoTrains, LooksAhead, OptimizesManually, WrappedMethod
from .features import without_side_effects
from .logits import LogitMethod
from .lookahead import Place, both_ways, look_ahead, slope_on_logits

LOOK_EVERY = 16
"""Rounds between comparisons of the trained teacher with the original one; the first ones come sooner."""
MEMORY = 0.9
"""Weight of all earlier comparisons at the next one."""
SLOWER = 0.1
"""Factor on the teacher's learning rate after each time that it was restored."""


@dataclass(eq=False, repr=False)
class MetaDistil(LooksAhead, OptimizesManually, CoTrains, WrappedMethod[LogitMethod]):
    r"""Another method's steps, taught by a copy of the teacher that is trained to teach.

    Before each step of the student the teacher sees the effect of that step. A *pilot* of the student takes
    the step and is evaluated on a quiz: rows held out of the training set. The gradient of its cross-entropy
    there,

    .. math:: \nabla_{\theta_T} L_Q\big(\theta_S - \lambda \nabla_{\theta_S} \ell(\theta_S, \theta_T)\big),

    updates the teacher; then the student takes its real step with the updated teacher. The gradient is exact
    and needs no second derivative of either network, but one derivative of the student in forward mode; see
    `luce.methods.lookahead`. It works with every loss on logits whose slope changes with the teacher's
    logits.

    As in the authors' code, the pilot is plain gradient descent, whatever optimizer trains the student, and
    the teacher stays in evaluation mode, so its running statistics of batch normalisation do not change. On
    the quiz there is no dropout, as in their code for text, and batch normalisation uses the batch's
    statistics, as in their code for images; a round's quiz is a small batch, not all held-out rows.

    *The guard*, which is ours. At too high a learning rate the teacher forgets. In rounds 1, 2, 4, 8 and then
    every 16th it is compared with the original teacher on quiz rows. Where its accuracy has fallen by more
    than `max_drop`, beyond two standard errors, its first weights are restored, and it learns at a tenth of
    its rate from then on. A row of a small quiz that is used again counts again, so there the guard acts
    early. A run's metrics contain ``quiz_loss``; ``teacher_gradient``, the norm of its gradient;
    ``teacher_drift``, the KL divergence of the trained teacher from the original one, in nats, on the quiz
    rows of the last comparison; and ``teacher_restored``, the number of times that it was restored.

    Args:
        method: Defines the steps; on logits and with a teacher.
        quiz: Share of the labelled training rows that is held out. The authors take 0.1.
        quiz_batches: Batches of held-out rows in each round.
        rows: Share of a batch, in (0, 1], that the pilot and the teacher use, and likewise of a quiz batch. A
            step costs four to five times one of plain KD, and two and a half to three at 0.5, an option that
            is no part of the paper. The student's own step uses the whole batch.
        batches_per_round: Steps of pilot and student between two steps of the teacher. More than one take
            second derivatives of the student.
        pilot_rate: The pilot's learning rate, in units of the student's at the time. The authors' code has 1
            and they suggest 0.4 for images. A step of AdamW is far longer than its learning rate times a
            gradient: a pilot needs a rate well above 1 to go as far.
        teacher_optimizer: ``"sgd"`` with momentum 0.9, or ``"adamw"``.
        teacher_lr: The teacher's learning rate; the student's schedule applies to it too. The authors
            searched between 1e-4 and 3e-4 for images (SGD) and use 1e-5 for text (AdamW).
        teacher_weight_decay: Of the teacher's optimizer.
        teacher_from_epoch: The first epoch, from 1, in which the teacher learns. Before it, a step costs no
            more than without this method. The authors start at 150 of 240 for images, at once for text.
        clip_norm: Largest norm of the teacher's gradient; None for no limit.
        max_drop: Accuracy on quiz rows that the teacher may lose, at least 0; 1 for no guard.
    Raises:
        ValueError: On a wrong value, or a method that does not use a teacher.
        TypeError: On a method that is no `LogitMethod`.
    Example:
        >>> import luce
        >>> from torch import nn
        >>> from luce.signals import LiveTeacher
        >>> student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> method = MetaDistil(LogitMethod(luce.KDLoss()))
        >>> batch = {"input": torch.randn(4, 3), "target": torch.tensor([0, 1, 1, 0])}
        >>> quiz = {"input": torch.randn(4, 3), "target": torch.tensor([0, 0, 1, 0])}
        >>> method.build(student, LiveTeacher(teacher), batch, batch)
        >>> sorted(method.before_round(student, [batch], [quiz], learning_rate=0.1))
        ['quiz_loss', 'teacher_drift', 'teacher_gradient', 'teacher_restored']
        >>> torch.equal(method.teacher.weight, teacher.weight)
        False
        >>> method.step(student, batch, None)["loss"].backward()

    References:
        Zhou, Xu and McAuley, BERT Learns to Teach: Knowledge Distillation with Meta Learning, ACL 2022, arXiv
        2106.04570. The defaults are those of the authors' code. Of the paper we know the abstract only; users
        of the code report that they could not reach the paper's figures.
    """

    needs_teacher = False  # the trained copy answers instead

    method: InitVar[LogitMethod]
    _: KW_ONLY
    quiz: float = 0.1
    quiz_batches: int = 1
    rows: float = 1.0
    batches_per_round: int = 1
    pilot_rate: float = 1.0
    teacher_optimizer: Literal["sgd", "adamw"] = "sgd"
    teacher_lr: float = 2e-4
    teacher_weight_decay: float = 5e-4
    teacher_from_epoch: int = 1
    clip_norm: float | None = 1.0
    max_drop: float = 0.02

    def __post_init__(self, method: LogitMethod) -> None:
        if not isinstance(method, LogitMethod):
            raise TypeError(
                f"expected a LogitMethod for MetaDistil, got {type(method).__name__}: the derivative towards "
                "the teacher is known for losses on logits only"
            )
        if not method.needs_teacher:
            raise ValueError("expected a loss that uses the teacher, got one that does not")
        super().__init__(method)
        self._check_options()
        self.held_out, self.held_out_batches = self.quiz, self.quiz_batches
        self.epoch = 1
        self.record = dict.fromkeys(("rounds", "rows", "lost", "gained", "drift", "restored"), 0.0)

    def _check_options(self) -> None:
        checks.check_between(0, 1, quiz=self.quiz)
        if not (checks.is_number(self.rows) and 0 < self.rows <= 1):
            raise ValueError(f"expected `rows` in (0, 1], got {self.rows!r}")
        checks.check_count(
            quiz_batches=self.quiz_batches,
            batches_per_round=self.batches_per_round,
            teacher_from_epoch=self.teacher_from_epoch,
        )
        checks.check_not_negative(
            pilot_rate=self.pilot_rate,
            teacher_lr=self.teacher_lr,
            teacher_weight_decay=self.teacher_weight_decay,
            max_drop=self.max_drop,
        )
        checks.check_choice("teacher_optimizer", self.teacher_optimizer, ("sgd", "adamw"))
        if self.clip_norm is not None:
            checks.check_positive(clip_norm=self.clip_norm)

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        """Copy the teacher, and look ahead once, to refuse now what cannot be differentiated."""
        if teacher is None or teacher.network is None:
            description = "none; add `teacher` to the recipe" if teacher is None else teacher.description
            raise UserError(f"expected a teacher that can be trained for MetaDistil, got {description}")
        self.method.build(student, teacher, sample, rows)
        self.original = teacher
        # A copy: the guard compares with the original and may restore its weights.
        own = copy_of(teacher.network, "the teacher that MetaDistil trains")
        self.teacher = own.requires_grad_(True).eval()
        parameters, rate, decay = self.teacher.parameters(), self.teacher_lr, self.teacher_weight_decay
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
            if self.teacher_optimizer == "sgd"
            else torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        )
        with without_side_effects(student, sample["input"].device), torch.enable_grad():
            self._try(student, sample)

    def _try(self, student: nn.Module, sample: Batch) -> None:
        teacher_logits, change = self.teacher(sample["input"]), None
        place = Place.of(student)
        if not place.parameters:
            raise UserError("expected a student with parameters to train, got none")
        logits, _ = place.forward(student, sample["input"])
        # A loss that is not prepared yet cannot be called; for the student's part any other will do.
        loss = _plain_kd if self.method.needs_preparation else self._loss
        try:
            slope, of_teacher = slope_on_logits(loss, logits, teacher_logits, sample)
        except (ValueError, RuntimeError) as error:  # of the loss, whose message says what it expected
            raise UserError(str(error)) from error
        if slope.requires_grad:
            (change,) = torch.autograd.grad(slope.sum(), of_teacher, allow_unused=True)
        if change is None:
            raise UserError(
                "expected a loss that changes smoothly with the teacher's logits for MetaDistil, got one "
                "that uses only their order or ignores them; use for example KDLoss or PLDLoss"
            )
        steps = min(self.batches_per_round, 2)
        try:
            # Step size 0: this tests only whether all derivatives exist. Two steps reach the second ones.
            look_ahead(student, loss, [sample] * steps, [teacher_logits] * steps, [sample], 0.0)
            forward, back = both_ways(student, place, logits, slope.detach(), sample["input"])
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(
                "expected a student that can be differentiated in forward mode for MetaDistil, and twice "
                f"with `batches_per_round` above 1, got one that cannot ({str(error).partition('.')[0]})"
            ) from error
        if not torch.isclose(forward, back, rtol=0.05):
            raise UserError(
                "expected a student with the same derivative in forward mode as in backward mode for "
                f"MetaDistil, got {forward.item():.3g} and {back.item():.3g}; is a part of it compiled?"
            )

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {"teacher": self.optimizer}

    @property
    def co_trained(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.method.set_epoch(epoch)

    def train(self, mode: bool = True) -> MetaDistil:
        """Set the mode as for any module, except that the teacher stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    def before_round(
        self, student: nn.Module, batches: Sequence[Batch], held_out: Sequence[Batch], learning_rate: float
    ) -> dict[str, Tensor]:
        """Take the teacher's step, before the student's steps on these batches."""
        if self.epoch < self.teacher_from_epoch:
            self.optimizer.step()  # without gradients: a schedule must not step before its optimizer
            return {}
        batches, quiz = ([self._part(batch) for batch in each] for each in (batches, held_out))
        answers = [self.teacher(batch["input"]) for batch in batches]
        step_size = self.pilot_rate * learning_rate
        quiz_loss, cotangents = look_ahead(student, self._loss, batches, answers, quiz, step_size)
        norm = self._teach(answers, cotangents)
        self._guard(quiz)
        return {
            "quiz_loss": quiz_loss,
            "teacher_gradient": norm,
            "teacher_drift": norm.new_tensor(self.record["drift"]),
            "teacher_restored": norm.new_tensor(self.record["restored"]),
        }

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Return the wrapped method's terms, with the trained teacher's signal."""
        with torch.no_grad():
            trained = DenseSignal(self.teacher(batch["input"]))
        return self.method.step(student, batch, trained)

    def _part(self, batch: Batch) -> Batch:
        """Return the first rows of a batch, whose order is random; at least two, for batch normalisation."""
        # Batch normalisation may raise on a single row in training mode.
        rows = max(2, math.ceil(self.rows * len(batch["target"])))
        return {name: value[:rows] for name, value in batch.items()}

    def _loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return self.method.terms(student_logits, batch, DenseSignal(teacher_logits))["loss"]

    def _teach(self, answers: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
        """Take a step of the teacher and return the norm of its gradient."""
        parameters = list(self.teacher.parameters())
        gradients = torch.autograd.grad(answers, parameters, cotangents, allow_unused=True)
        used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        # DDP wraps the student alone, so the teacher's gradients are averaged here.
        for (parameter, _), mean in zip(used, mean_over_processes([g for _, g in used]), strict=True):
            parameter.grad = mean
        # With a limit of inf nothing is clipped, and only the norm is computed.
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm or math.inf)
        # For this step only: the schedule sets the rate from its own base and would undo a lasting factor.
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= SLOWER ** self.record["restored"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        torch.clear_autocast_cache()  # it may hold casts of the previous weights
        return norm

    def _guard(self, quiz: Sequence[Batch]) -> None:
        """Compare the teacher with the original in some rounds, and restore it where it has forgotten."""
        self.record["rounds"] += 1
        if self.record["rounds"] not in (1, 2, 4, 8) and self.record["rounds"] % LOOK_EVERY:
            return
        counts = self._compare(quiz)
        self.record["drift"] = counts.pop("drift") / counts["rows"]
        for name, count in counts.items():
            self.record[name] = MEMORY * self.record[name] + count
        rows, lost, gained = (self.record[name] for name in ("rows", "lost", "gained"))
        # The difference of two counts of rare, independent events has their sum as its variance.
        noise = 2 * math.sqrt(lost + gained)
        # A teacher of NaN may seem right: argmax then returns the place of a NaN.
        if math.isfinite(self.record["drift"]) and lost - gained - noise <= self.max_drop * rows:
            return
        assert self.original.network is not None
        self.teacher.load_state_dict(self.original.network.state_dict())
        # Momentum of the discarded weights would drive the restored ones the same way.
        self.optimizer.state.clear()
        # The cache may hold casts of the discarded weights.
        torch.clear_autocast_cache()
        self.record |= dict.fromkeys(("rounds", "rows", "lost", "gained", "drift"), 0.0)
        self.record["restored"] += 1

    @torch.no_grad()
    def _compare(self, quiz: Sequence[Batch]) -> dict[str, float]:
        """Count the rows, and those that only the original or only this teacher gets right; sum the KL."""
        counts = torch.zeros(4)
        for batch in quiz:
            before, now = self.original.signal(batch).logits, self.teacher(batch["input"])
            was_right, is_right = (logits.argmax(-1) == batch["target"] for logits in (before, now))
            values = [len(before), (was_right & ~is_right).sum(), (is_right & ~was_right).sum()]
            drift = kd_loss(now, before, temperature=1.0, reduction="sum")
            counts += torch.tensor([float(value) for value in (*values, drift)])
        # On the model's device, since NCCL reduces no CPU tensors; all processes must decide alike.
        (counts,) = mean_over_processes([counts.to(drift.device)])
        return dict(zip(("rows", "lost", "gained", "drift"), counts.tolist(), strict=True))

    def get_extra_state(self) -> dict[str, float]:
        # A copy, saved with the checkpoint: a resumed guard must keep its counts and its slower rate.
        return dict(self.record)

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.record = dict(state)


def _plain_kd(student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
    return kd_loss(student_logits, teacher_logits)
