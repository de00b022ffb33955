"""The training loop: one student, one method, one folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, set_seed
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from .. import data
from ..data import Examples
from ..errors import UserError, import_optional, unknown_name
from ..methods import Method, strong_view
from ..models import Classifier
from ..signals import RememberedTeacher, Signal, Teacher
from . import checkpoint, files, metrics
from .processes import processes
from .progress import Bar
from .recipe import TrainingOptions

TRACKERS = ("tensorboard", "wandb")
FINITE_CHECK_STEPS = 50
"""Steps between looks at the loss on an accelerator, each of which makes the host wait for it."""


PREPARATION_BATCH = 256


class TrainingError(UserError):
    """A training that cannot go on."""


@dataclass
class Fit:
    """What a training leaves behind.

    Attributes:
        student: With the weights after the last epoch (their average, if one is kept).
        accelerator: That trained it; evaluates it on the same devices.
        lines: One record per epoch, as in ``metrics.jsonl``.
        best_epoch: With the highest validation accuracy, of equals the one with the lowest loss; the last
            one without validation rows.
        best_weights: Of the student's body after that epoch.
        prepared: What the method found out about the teacher before training, by name.
    """

    student: Classifier
    accelerator: Accelerator
    lines: list[dict[str, Any]]
    best_epoch: int
    best_weights: dict[str, Tensor]
    prepared: dict[str, float]


def fit(
    student: Classifier,
    method: Method,
    train: Examples,
    validation: Examples | None = None,
    *,
    teacher: Teacher | None = None,
    options: TrainingOptions,
    augment: Callable[[Tensor], Tensor] | None = None,
    strong_augment: Callable[[Tensor], Tensor] | None = None,
    workers: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Train a student.

    With a folder, metrics and checkpoints go there, and a training that was interrupted goes on from its
    last checkpoint to the same numbers, bit for bit on a CPU.

    Args:
        student: Trained in place.
        method: What a step does. Its parameters, if it has any, are trained too.
        train: Rows to learn from. Where the method cannot use rows without a label, the labelled ones are
            repeated instead, so that every method takes as many steps.
        validation: Rows to choose the best epoch by.
        teacher: Answers the method's batches.
        options: How to train.
        augment: Applied to each training batch, before teacher and student see it.
        strong_augment: Makes the second view for a method of two views; see `luce.data.loader`.
        workers: Processes that read.
        folder: Of the run; None keeps everything in memory.
        progress: Bars to add this training to.
    Raises:
        UserError: On settings that cannot work, before training starts.
        TrainingError: If the loss stops being a number; names the term and keeps the last checkpoint.
    """
    if method.two_views != (strong_augment is not None):
        raise UserError("expected `strong_augment` for a method of two views, and for no other")
    if method.two_views and method.needs_teacher and isinstance(teacher, RememberedTeacher):
        raise UserError(
            "expected a teacher that can be asked about a second view, got one that remembers its answers"
        )
    if options.trackers and folder is None:
        raise UserError("expected a folder to track the training in, got none; give one or no `trackers`")
    known = train
    if not method.uses_unlabelled:
        train = train.labelled.repeat_to(len(train))

    accelerator = new_accelerator(options, folder)
    set_seed(options.seed, device_specific=True)
    batches = data.loader(
        train,
        batch_size=options.batch_size,
        seed=options.seed,
        augment=augment,
        strong_augment=strong_augment,
        workers=workers,
    )
    build(method, student, teacher, known, accelerator.device, options.seed)
    session = Session(accelerator, student, method, teacher, batches, options)
    prepared: dict[str, float] = {}
    if method.wants_preparation and teacher is not None:
        prepared = method.prepare(*what_the_teacher_says(teacher, known, accelerator.device))
    if validation is not None:
        validation_batches = accelerator.prepare(
            data.loader(validation, batch_size=4 * options.batch_size, seed=None, workers=workers)
        )

    book, lines, best_weights = Bookkeeping(), [], {}
    if folder is not None and (saved := checkpoint.restore(folder, accelerator)) is not None:
        book, best_weights = Bookkeeping(**saved["bookkeeping"]), saved["best_weights"]
        lines = saved["lines"]
        session.load_state_dict(saved["session"])
    log = MetricsLog(folder if accelerator.is_main_process else None, lines)
    if options.trackers:
        accelerator.init_trackers("luce", config={"lr": options.lr, "batch_size": options.batch_size})

    steps = len(session.batches)
    bars = Bar(progress, "training", options.epochs * steps, book.epoch * steps)
    with bars as bar, method.attached(student, session.teacher):
        while book.epoch < options.epochs and not book.exhausted(options.patience):
            started = time.perf_counter()
            book.epoch += 1
            line: dict[str, Any] = {"epoch": book.epoch, "train": session.epoch(book.epoch, bar)}
            line |= {"step": session.step, "lr": session.optimizer.param_groups[0]["lr"], "validation": {}}
            if validation is not None:
                logits, _, target = metrics.collect(session.evaluated, validation_batches, accelerator)
                line["validation"] = metrics.brief(logits, target)
                bar.note(f"validation {line['validation']['accuracy']:.1%}")
            if book.is_best(line["validation"]):
                weights = session.evaluated.body.state_dict()
                best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
            line["seconds"] = time.perf_counter() - started
            log.append(line)
            accelerator.log(flat(line), step=session.step)
            if folder is not None and (
                book.epoch % options.checkpoint_every == 0 or book.epoch == options.epochs
            ):
                extra = {
                    "bookkeeping": vars(book),
                    "lines": log.lines,
                    "session": session.state_dict(),
                    "best_weights": best_weights,
                }
                checkpoint.save(folder, accelerator, book.epoch, extra)
    for tracker in accelerator.trackers:  # not end_training(), which would part processes that go on together
        tracker.finish()
    return Fit(session.evaluated, accelerator, log.lines, book.best_epoch, best_weights, prepared)


def build(
    method: Method,
    student: nn.Module,
    teacher: Teacher | None,
    rows: Examples,
    device: torch.device,
    seed: int,
) -> Mapping[str, Tensor]:
    """Let a method make its parts, the same in every process, without touching the draws that follow.

    Returns:
        The batch of one row that it was shown.
    """
    if method.needs_teacher and teacher is None:
        raise UserError("expected a teacher for a loss that compares with one; add `teacher` to the recipe")
    student.to(device)
    if teacher is not None:
        teacher.to(device)
    first = next(iter(data.loader(rows.plain, batch_size=1, seed=None)))
    sample = {name: part.to(device) for name, part in first.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        method.build(student, teacher, sample, {"index": rows.indices, "target": rows.targets})
    return sample


def what_the_teacher_says(teacher: Teacher, rows: Examples, device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's logits of all rows as they look without augmentation, and their labels."""
    logits, targets = [], []
    for batch in data.loader(rows.plain, batch_size=PREPARATION_BATCH, seed=None):
        logits.append(teacher.signal({name: part.to(device) for name, part in batch.items()}).logits)
        targets.append(batch["target"].to(device))
    return torch.cat(logits), torch.cat(targets)


def new_accelerator(options: TrainingOptions, folder: Path | None = None) -> Accelerator:
    """An accelerator for one training, whatever one before it in this process was set to."""
    for tracker in options.trackers:
        if tracker not in TRACKERS:
            raise unknown_name("tracker", tracker, TRACKERS)
        import_optional(tracker, "track")
    # The device may change between trainings, the group of processes never does.
    group = processes(options.cpu)
    alone, on_cpu = group.num_processes == 1, group.device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=alone)
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=options.cpu or (on_cpu and not alone),
        log_with=(options.trackers or None) if folder is not None else None,
        project_dir=None if folder is None else str(folder),
    )
    if options.precision == "fp16" and accelerator.device.type == "cpu":  # passed over in silence otherwise
        raise UserError("expected a GPU for `training.precision` fp16; on a CPU use bf16 or no")
    return accelerator


class Session:
    """What moves while a student is trained: the student, the method's own parameters, and their optimizer.

    Attributes:
        evaluated: The student to validate and to export: itself, or the average of its weights.
        batches: Prepared for this process.
        step: Optimizer steps taken.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Classifier,
        method: Method,
        teacher: Teacher | None,
        batches: DataLoader[Any],
        options: TrainingOptions,
    ) -> None:
        self.accelerator = accelerator
        self.method = method.to(accelerator.device)
        self.teacher = teacher if method.needs_teacher else None
        if self.teacher is not None:
            self.teacher.to(accelerator.device)
        self.clip_norm = options.clip_norm
        self.batch_size = options.batch_size
        self.parameters = [*student.parameters(), *method.parameters()]
        self.student, self.optimizer, self.batches = accelerator.prepare(
            student, make_optimizer(options, self.parameters), batches
        )
        steps = math.ceil(len(self.batches) / options.accumulate)
        self.schedule = LambdaLR(self.optimizer.optimizer, learning_rate(options, steps))
        self.average: AveragedModel | None = None
        self.evaluated: Classifier = student
        if options.ema is not None:
            self.average = AveragedModel(
                student, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True
            )
            self.evaluated = cast(Classifier, self.average.module)
        self.step = 0

    def epoch(self, number: int, bar: Bar) -> dict[str, float]:
        """Train for one epoch; the mean of each named term of the loss."""
        accelerator, on_cpu = self.accelerator, self.accelerator.device.type == "cpu"
        self.batches.set_epoch(number)
        self.student.train()
        self.method.train()
        self.method.set_epoch(number)
        sums: dict[str, Tensor] = {}
        gathered = 0.0
        for count, batch in enumerate(self.batches, start=1):
            with accelerator.accumulate(self.student):
                with accelerator.autocast():
                    terms = checked_step(self.method, self.student, batch, self.signal(batch))
                if on_cpu or count % FINITE_CHECK_STEPS == 0:
                    check_finite(terms, number)
                share = len(batch["target"]) / self.batch_size
                gathered += share
                accelerator.backward(share * terms["loss"])
                if accelerator.sync_gradients:
                    self.share_gradients()
                    self.scale_gradients(accelerator.gradient_accumulation_steps / gathered)
                    gathered = 0.0
                    if self.clip_norm is not None:
                        accelerator.clip_grad_norm_(self.parameters, self.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                self.step += 1
                self.schedule.step()
                if self.average is not None:
                    self.average.update_parameters(accelerator.unwrap_model(self.student))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
            bar.advance()
        check_finite(sums, number)
        if accelerator.num_processes > 1:
            # As the main process, which saves them, has them.
            for buffer in (*self.evaluated.buffers(), *self.method.buffers()):
                broadcast(buffer)
        means = accelerator.reduce({name: total / count for name, total in sums.items()}, "mean")
        return {name: mean.item() for name, mean in means.items()}

    def signal(self, batch: Mapping[str, Tensor]) -> Signal | None:
        """What the teacher says about a batch, and about its second view if it has one."""
        if self.teacher is None:
            return None
        signal = self.teacher.signal(batch)
        if "strong" in batch:
            signal = replace(signal, strong=self.teacher.signal(strong_view(batch)))
        return signal

    def share_gradients(self) -> None:
        """Average the gradients of the method's parameters over the processes, as DDP does the student's."""
        if self.accelerator.num_processes > 1:
            for parameter in self.method.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def scale_gradients(self, factor: float) -> None:
        """Make a sum over micro-batches the mean over their rows, of which an epoch's last step has fewer."""
        if factor != 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """What the accelerator does not save by itself."""
        return {
            "step": self.step,
            "schedule": self.schedule.last_epoch,
            "method": self.method.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.schedule.last_epoch = state["schedule"]
        self.method.load_state_dict(state["method"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


@dataclass
class Bookkeeping:
    """How far a training has come."""

    epoch: int = 0
    best_epoch: int = 0
    best_accuracy: float = -math.inf
    best_loss: float = math.inf

    def is_best(self, validation: Mapping[str, float]) -> bool:
        """Whether the epoch that has just ended is the best so far; without validation each one is."""
        if validation:
            accuracy, loss = validation["accuracy"], validation["loss"]
            if (accuracy, -loss) <= (self.best_accuracy, -self.best_loss):
                return False
            self.best_accuracy, self.best_loss = accuracy, loss
        self.best_epoch = self.epoch
        return True

    def exhausted(self, patience: int | None) -> bool:
        """Whether the best epoch lies further back than anyone is willing to wait."""
        return patience is not None and self.epoch - self.best_epoch >= patience


class MetricsLog:
    """``metrics.jsonl``: a line per epoch, from those of the checkpoint on."""

    def __init__(self, folder: Path | None, lines: list[dict[str, Any]]) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.lines = lines
        if self.path is not None:
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); free some space") from error


def make_optimizer(options: TrainingOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not parameters:
        raise UserError("expected a student with parameters to train, got none")
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)


def learning_rate(options: TrainingOptions, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the peak learning rate, as a function of the optimizer step from 0.

    Example:
        >>> half_way = learning_rate(TrainingOptions(epochs=10, schedule="cosine"), steps_per_epoch=5)(25)
        >>> round(half_way, 6)
        0.5
    """
    warmup = round(options.warmup_epochs * steps_per_epoch)
    total = options.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        if options.schedule == "step":
            return options.gamma ** sum(step >= epoch * steps_per_epoch for epoch in options.milestones)
        return 1.0

    return factor


def checked_step(
    method: Method, student: nn.Module, batch: Mapping[str, Tensor], signal: Signal | None
) -> dict[str, Tensor]:
    """A step whose loss can be descended.

    Raises:
        UserError: If the loss refuses what it gets, is not one number, or does not depend on the student.
    """
    try:
        terms = method.step(student, batch, signal)
    except UserError:
        raise
    except ValueError as error:  # of a loss, which says what it expected
        raise UserError(str(error)) from error
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
    """Stop at a loss that is no number, and say which term it came from."""
    if torch.isfinite(terms["loss"]):
        return
    bad = [f"`{name}` is {value.item()}" for name, value in terms.items() if not torch.isfinite(value)]
    raise TrainingError(
        f"the loss stopped being a number in epoch {epoch}: {', '.join(bad)}; the last checkpoint "
        "is kept; look for NaN or infinite logits of the teacher, or lower the learning rate"
    )


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """A metrics line as the trackers want it.

    >>> flat({"epoch": 1, "train": {"loss": 0.5}})
    {'epoch': 1, 'train/loss': 0.5}
    """
    result: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            result.update({f"{key}/{name}": inner for name, inner in value.items()})
        else:
            result[key] = value
    return result
