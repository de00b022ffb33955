"""The state of a training, and one epoch of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from .. import data, stops
from ..data import Examples
from ..errors import UserError
from ..methods import Method, strong_view
from ..methods.observation import observe
from ..models import Classifier
from ..models.copies import copy_of
from ..models.modes import rest, resting
from ..signals import Signal, Teacher
from .batches import TrainingBatches
from .inspection import FirstLook
from .progress import Bar
from .settings import TrainingOptions

FINITE_CHECK_STEPS = 50
"""Steps between checks of the loss on a GPU, each of which makes the host wait for the device."""

ONE_ROW = "more than 1 value per channel"
"""Part of the message with which batch normalisation refuses a batch of one row."""

UNEQUAL_STEPS = ("find_unused_parameters", "mark a variable ready only once")
"""Parts of the messages with which DDP refuses a step that used other parameters than it expected."""

LAPS = 2**20
"""Upper bound of the passes over the held-out rows in one epoch, so that no pass repeats an order."""

T = TypeVar("T")


class TrainingError(UserError):
    """A training that cannot continue."""


class Session:
    """Student, method, optimizers and schedules of one training.

    Attributes:
        evaluated: The student to validate and to export: itself, or the average of its weights.
        batches: Training batches of this process.
        step: Number of optimizer steps so far.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Classifier,
        method: Method,
        teacher: Teacher | None,
        batches: DataLoader[Any],
        held_out: Examples | None,
        options: TrainingOptions,
        targets: Tensor,
    ) -> None:
        self.accelerator = accelerator
        self.method = method.to(accelerator.device)
        self.capabilities = method.capabilities
        manually = self.capabilities.optimizes_manually
        self.method_optimizers = {} if manually is None else manually.optimizers
        self.source = teacher  # a method may ask it in its preparation only
        self.teacher = teacher if method.needs_teacher else None
        if self.teacher is not None:
            self.teacher.to(accelerator.device)
        self.clip_norm = options.clip_norm
        self.batch_size = options.batch_size
        self.seed = options.seed
        self.held_out = held_out
        # A parameter in two optimizers would be moved twice in each step.
        with_own_optimizer = {
            parameter
            for optimizer in self.method_optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.method_parameters = [
            parameter for parameter in method.parameters() if parameter not in with_own_optimizer
        ]
        self.parameters = [*student.parameters(), *self.method_parameters]
        self.unwrapped_student = student
        self.resting = resting(student)
        self.student, self.optimizer, self.batches = accelerator.prepare(
            student, make_optimizer(options, self.parameters), batches
        )
        self.optimizer.zero_grad()  # gradients of an earlier backward pass would go into the first step
        # Rounded up: Accelerate also steps at the end of an epoch, on an incomplete group of batches.
        steps = math.ceil(len(self.batches) / options.accumulate)
        self.schedules = [
            LambdaLR(optimizer, learning_rate(options, steps))
            for optimizer in (self.optimizer.optimizer, *self.method_optimizers.values())
        ]
        self.average: AveragedModel | None = None
        self.evaluated: Classifier = student
        if options.ema is not None:
            # With buffers: running statistics of the last step belong to other weights than the average.
            self.average = AveragedModel(
                copy_of(student, "`training.ema`, an average of its weights"),
                multi_avg_fn=get_ema_multi_avg_fn(options.ema),
                use_buffers=True,
            )
            self.evaluated = cast(Classifier, self.average.module)
        self.step = self.number = 0
        self.look = FirstLook(student, self.method_parameters, targets)

    def prepare(self, teacher: Teacher, rows: TrainingBatches) -> dict[str, float]:
        """Let the method prepare itself, without moving the random draws of the training."""
        device, prepares = self.accelerator.device, self.capabilities.prepares
        assert prepares is not None
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            with refusals():
                results = prepares.prepare(teacher, rows)
        self.method.zero_grad()  # gradients that are left would go into the student's first step
        self.share_state(*self.method.parameters(), *self.method.buffers())
        return results

    def epoch(self, number: int, bar: Bar, *, finish: bool = False) -> dict[str, float]:
        """Train for one epoch.

        Args:
            number: Of the epoch, from 1.
            bar: Advances with every batch.
            finish: Whether SIGTERM waits for the end of the epoch; otherwise, as Ctrl-C, for that of a batch.
        Returns:
            The mean of each named term of the loss and of each value that the method reports.
        """
        self.number = number
        self.batches.set_epoch(number)
        self.student.train()
        rest(self.resting)
        self.method.train()
        self.method.set_epoch(number)
        looks_ahead, steps_after = self.capabilities.looks_ahead, self.capabilities.steps_after
        held_out = self.held_out_batches(number)
        sums: dict[str, Tensor] = {}
        times: dict[str, int] = {}

        def note(terms: Mapping[str, Tensor]) -> None:
            for name, value in terms.items():
                # Detached, or every step's graph would be kept; `item` would stall a GPU in each step.
                sums[name] = sums.get(name, 0) + value.detach()
                times[name] = times.get(name, 0) + 1

        accumulated = 0.0
        for ahead in rounds(self.batches, 1 if looks_ahead is None else looks_ahead.batches_per_round):
            if looks_ahead is not None:
                with self.accelerator.autocast(), refusals():
                    others = list(islice(held_out, looks_ahead.held_out_batches))
                    rate = self.optimizer.param_groups[0]["lr"]
                    note(self.checked(looks_ahead.before_round(self.unwrapped_student, ahead, others, rate)))
            for batch in ahead:
                accumulated += len(batch["target"]) / self.batch_size
                note(self.train_step(batch, accumulated))
                if self.accelerator.sync_gradients:
                    accumulated = 0.0
                    self.step += 1
                    if steps_after is not None:
                        with self.accelerator.autocast(), refusals():
                            note(self.checked(steps_after.after_step(self.unwrapped_student, batch)))
                    for schedule in self.schedules:  # after the method's steps, which use the same rate
                        schedule.step()
                    if self.average is not None:
                        self.average.update_parameters(self.unwrapped_student)
                bar.advance()
                stops.check(finishing=finish)
        if not self.look.done:
            self.look.close()
        check_finite(sums, number)
        # A checkpoint holds the main process's buffers: others would differ after a resume.
        self.share_state(*self.evaluated.buffers(), *self.method.buffers())
        means = {name: total / times[name] for name, total in sums.items()}
        return {name: mean.item() for name, mean in self.accelerator.reduce(means, "mean").items()}

    def train_step(self, batch: Mapping[str, Tensor], accumulated: float) -> dict[str, Tensor]:
        """Compute the loss of one batch and its gradients, and make the student's step if it is due.

        Args:
            batch: Of this process.
            accumulated: Rows since the last step, including this batch, divided by the batch size.
        Returns:
            The terms of the loss.
        """
        accelerator = self.accelerator
        with accelerator.accumulate(self.student):
            looking = not self.look.done
            with accelerator.autocast():
                terms = self.look.step(batch, self.terms_of) if looking else self.terms_of(batch)
            # In units of full batches, so that a row of a short batch weighs as much as any other.
            with refusals():
                accelerator.backward(len(batch["target"]) / self.batch_size * terms["loss"])
            if looking:
                self.look.conclude()
            if accelerator.sync_gradients:
                # Averaged and scaled before clipping: the limit is for the norm of the mean over all rows.
                self.share_gradients()
                # `accelerator.backward` divided by the number of micro-batches, which need not be full.
                self.scale_gradients(accelerator.gradient_accumulation_steps / accumulated)
                if self.clip_norm is not None:
                    accelerator.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return terms

    def terms_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the terms of one batch of this process."""
        signal = None if self.teacher is None else signal_of(self.teacher, batch)
        observe(batch, signal, {})
        return self.checked(checked_step(self.method, self.student, batch, signal))

    def checked(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms after a check that they are finite: always on a CPU, now and then on a GPU."""
        if self.accelerator.device.type == "cpu" or self.step % FINITE_CHECK_STEPS == 0:
            check_finite(terms, self.number)
        return terms

    def held_out_batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield full batches of the held-out rows for this process, without end; none without such rows."""
        if self.held_out is None:
            return
        # Without min, few rows would make no full batch, and the remainder by 0 below would raise.
        loader = data.loader(
            self.held_out, batch_size=min(self.batch_size, len(self.held_out)), seed=self.seed, drop_last=True
        )
        sampler, device = cast(data.EpochSampler, loader.sampler), self.accelerator.device
        for lap in count():
            sampler.set_epoch(epoch * LAPS + lap)
            with torch.random.fork_rng([]):  # an iterator draws a seed when it starts
                batches = iter(loader)
            first, step = self.accelerator.process_index % len(loader), self.accelerator.num_processes
            for batch in islice(batches, first, None, step):
                yield {name: part.to(device) for name, part in batch.items()}

    def share_state(self, *tensors: Tensor) -> None:
        """Copy the values of the main process to the others."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                broadcast(tensor.detach())

    def any_process(self, answer: bool) -> bool:
        """Return whether the answer is yes in any process."""
        if self.accelerator.num_processes == 1:
            return answer
        number = torch.tensor(float(answer), device=self.accelerator.device)
        return bool(self.accelerator.reduce(number, "sum").item())

    def share_gradients(self) -> None:
        """Average the gradients of the method's parameters over the processes; DDP sees only the student."""
        if self.accelerator.num_processes > 1:
            for parameter in self.method_parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, to turn a sum over micro-batches into the mean over their rows."""
        if factor != 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the accelerator does not save."""
        return {
            "step": self.step,
            "teacher": {} if self.source is None else self.source.state_dict(),
            "method": self.method.state_dict(),
            "optimizers": {
                name: optimizer.state_dict() for name, optimizer in self.method_optimizers.items()
            },
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for schedule in self.schedules:
            # The count is all that a schedule needs: the optimizer's state contains the rate itself.
            schedule.last_epoch = self.step
        if self.source is not None:
            self.source.load_state_dict(state["teacher"])
        self.method.load_state_dict(state["method"])
        self.method.to(self.accelerator.device)  # buffers that loading made are on the device that saved them
        for name, optimizer in self.method_optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def rounds(batches: Iterable[T], size: int) -> Iterator[list[T]]:
    """Group items into lists of `size`; the last one may be shorter.

    >>> list(rounds("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    remaining = iter(batches)
    while ahead := list(islice(remaining, size)):
        yield ahead


def make_optimizer(options: TrainingOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not any(parameter.requires_grad for parameter in parameters):
        got = f"{len(parameters)} frozen ones" if parameters else "none"
        raise UserError(f"expected a student with parameters to train, got {got}")
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=options.lr,
            momentum=options.momentum,
            # SGD raises on Nesterov's method without momentum.
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)


def learning_rate(options: TrainingOptions, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the factor on the peak learning rate as a function of the optimizer step, from 0.

    Example:
        >>> half_way = learning_rate(TrainingOptions(epochs=10, schedule="cosine"), steps_per_epoch=5)(25)
        >>> round(half_way, 6)
        0.5
    """
    warmup = round(options.warmup_epochs * steps_per_epoch)
    total = options.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            # From 1 / warmup on: the first step would be lost at rate 0.
            return (step + 1) / warmup
        if options.schedule == "cosine":
            # A warm-up over the whole training leaves no steps, and 0 / 0 would raise.
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        if options.schedule == "step":
            return options.gamma ** sum(step >= epoch * steps_per_epoch for epoch in options.milestones)
        return 1.0

    return factor


def signal_of(teacher: Teacher, batch: Mapping[str, Tensor]) -> Signal:
    """Return the teacher's signal for a batch, and for its second view if it has one."""
    signal: Signal = teacher.signal(batch)
    return replace(signal, strong=teacher.signal(strong_view(batch))) if "strong" in batch else signal


@contextmanager
def refusals() -> Iterator[None]:
    """Turn ValueErrors of losses and methods, which say what they expected, into UserErrors.

    Likewise two errors of PyTorch whose cause is an option or a network.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if ONE_ROW in str(error):
            raise UserError(
                "expected at least two rows in every batch, for batch normalisation, got one; choose another "
                "`training.batch_size`"
            ) from error
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if not any(part in str(error) for part in UNEQUAL_STEPS):
            raise
        raise UserError(
            "expected a student that uses the same parameters in every step, for several processes, got one "
            "that leaves some out in some steps; freeze those, or train in one process"
        ) from error


def checked_step(
    method: Method, student: nn.Module, batch: Mapping[str, Tensor], signal: Signal | None
) -> dict[str, Tensor]:
    """Compute the terms of a batch and check that the loss can be minimised.

    Raises:
        UserError: If the loss raises a ValueError, is not one number, or does not depend on the student.
    """
    with refusals():
        terms = method.step(student, batch, signal)
    loss = terms["loss"]
    if loss.numel() != 1:
        raise UserError(
            f"expected a loss that is one number, got one of shape {tuple(loss.shape)}; give the mean"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise UserError(
            "expected a loss that depends on the student, got one without a gradient; give a term a weight "
            "above 0, and detach nothing of the student"
        )
    return terms


def check_finite(terms: Mapping[str, Tensor], epoch: int) -> None:
    """Raise a TrainingError that names all terms that are infinite or NaN."""
    bad = [f"`{name}` is {value.item()}" for name, value in terms.items() if not torch.isfinite(value)]
    if bad:
        raise TrainingError(
            f"the loss stopped being a number in epoch {epoch}: {', '.join(bad)}; the last checkpoint "
            "is kept; look for NaN or infinite logits of the teacher, or lower the learning rate"
        )
