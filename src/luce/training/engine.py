"""The training loop: one student, one method, one folder."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.progress import Progress
from torch import Tensor, nn

from .. import data, files
from ..data import Examples
from ..errors import UserError, import_optional, unknown_name
from ..methods import Method
from ..models import Classifier
from ..signals import Teacher
from . import checkpoint, metrics
from .batches import TrainingBatches
from .processes import processes
from .progress import Bar
from .session import Session, TrainingError, refusals, signal_of
from .settings import TrainingOptions

TRACKERS = ("tensorboard", "wandb")

__all__ = ["Fit", "TrainingError", "fit"]


@dataclass
class Fit:
    """What a training leaves behind.

    Attributes:
        student: With the weights after the last epoch (their average, if one is kept).
        accelerator: That trained it; evaluates it on the same devices.
        history: One record per epoch, as in ``metrics.jsonl``.
        best_epoch: With the highest validation accuracy, of equals the one with the lowest loss; the last
            one without validation rows.
        best_weights: Of the student's body after that epoch.
        prepared: What the method found out about the teacher before training, by name.
        co_trained: Other networks that the method has trained along, by name.
    """

    student: Classifier
    accelerator: Accelerator
    history: list[dict[str, Any]]
    best_epoch: int
    best_weights: dict[str, Tensor]
    prepared: dict[str, float]
    co_trained: Mapping[str, nn.Module] = field(default_factory=dict)


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
    accelerator: Accelerator | None = None,
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
        accelerator: From `new_accelerator` for these options and this folder; made unless given.
        progress: Bars to add this training to.
    Raises:
        UserError: On settings that cannot work, before training starts.
        TrainingError: If the loss stops being a number; names the term and keeps the last checkpoint.
    """
    if method.two_views != (strong_augment is not None):
        raise UserError("expected `strong_augment` for a method of two views, and for no other")
    if method.two_views and method.needs_teacher and teacher and not teacher.answers_new_inputs:
        raise UserError(f"expected a teacher that answers a second view, got {teacher.description}")
    if options.trackers and folder is None:
        raise UserError("expected a folder to track the training in, got none; give one or no `trackers`")
    check_own_steps(method, options)
    train, held_out = divide(method, train, options.seed)
    known = train
    if not method.uses_unlabelled:
        train = train.labelled.repeat_to(len(train))

    accelerator = accelerator or new_accelerator(options, folder)
    set_seed(options.seed, device_specific=True)
    batches = data.loader(
        train,
        batch_size=options.batch_size,
        seed=options.seed,
        augment=augment,
        strong_augment=strong_augment,
        workers=workers,
    )
    sample = build(method, student, teacher, known, accelerator.device, options.seed)
    if accelerator.num_processes == 1:  # otherwise all batches are filled up
        check_smallest_batch(method, student, teacher, sample, known, len(train), options.batch_size)
    session = Session(accelerator, student, method, teacher, batches, held_out, options)
    if validation is not None:
        validation_batches = accelerator.prepare(
            data.loader(validation, batch_size=4 * options.batch_size, seed=None, workers=workers)
        )

    book, lines, best_weights, prepared = BestEpoch(), [], {}, {}
    saved = None if folder is None else checkpoint.restore(folder, accelerator)
    if saved is not None:
        try:
            book, best_weights = BestEpoch(**saved["bookkeeping"]), saved["best_weights"]
            lines, prepared = saved["lines"], saved["prepared"]
            session.load_state_dict(saved["session"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot go on in {folder} ({files.reason(error)}): its checkpoint is of another method or "
                "another version of Luce; choose another folder, or delete it"
            ) from error

    def save() -> None:
        extra = {
            "bookkeeping": vars(book),
            "lines": lines,
            "prepared": prepared,
            "session": session.state_dict(),
            "best_weights": best_weights,
        }
        if folder is not None:
            checkpoint.save(folder, accelerator, book.epoch, extra)

    if saved is None and teacher is not None and method.capabilities.prepares is not None:
        rows = TrainingBatches(known, accelerator.device, options.seed, augment, workers, progress)
        prepared = session.prepare(teacher, rows)
        save()
    log = MetricsLog(folder if accelerator.is_main_process else None, lines)
    if options.trackers:
        accelerator.init_trackers("luce", config={"lr": options.lr, "batch_size": options.batch_size})

    steps = len(session.batches)
    bars = Bar(progress, "training", options.epochs * steps, book.epoch * steps)
    with bars as bar, method.hooks(student, session.teacher):
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
            if book.epoch % options.checkpoint_every == 0 or book.epoch == options.epochs:
                save()
    for tracker in accelerator.trackers:  # not end_training(), which would part processes that go on together
        tracker.finish()
    co_trains = method.capabilities.co_trains
    return Fit(
        session.evaluated,
        accelerator,
        log.lines,
        book.best_epoch,
        best_weights,
        prepared,
        {} if co_trains is None else co_trains.co_trained,
    )


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
        with refusals():
            method.build(student, teacher, sample, {"index": rows.indices, "target": rows.targets})
    return sample


def divide(method: Method, train: Examples, seed: int) -> tuple[Examples, Examples | None]:
    """Split the rows into those to train on and those that the method holds out; None without any.

    Raises:
        UserError: If that leaves a class without a row on either side.
    """
    looks_ahead = method.capabilities.looks_ahead
    if looks_ahead is None or not looks_ahead.held_out:
        return train, None
    try:
        return data.hold_out(train, looks_ahead.held_out, seed)
    except UserError as error:
        raise UserError(f"no rows to hold out for {type(looks_ahead).__name__}: {error}") from error


def check_own_steps(method: Method, options: TrainingOptions) -> None:
    """Refuse options that do not suit a method with optimizers of its own, or one that looks ahead."""
    name, capabilities = type(method).__name__, method.capabilities
    optimizes, looks_ahead = capabilities.optimizes_manually, capabilities.looks_ahead
    rounds = 1
    if looks_ahead is not None:
        rounds = looks_ahead.batches_per_round
        for count in ("batches_per_round", "held_out_batches"):
            if getattr(looks_ahead, count) < 1:
                raise UserError(
                    f"expected `{count}` of {name} to be at least 1, got {getattr(looks_ahead, count)}"
                )
    # The last batches of an epoch make a step, however few, and a round of several hides where they begin.
    if (optimizes is not None or rounds > 1) and options.accumulate > 1:
        raise UserError(
            f"expected `training.accumulate: 1` for {name}, which takes steps of its own between batches, "
            f"got {options.accumulate}; raise `training.batch_size` instead"
        )
    if optimizes is not None and options.precision == "fp16":
        raise UserError(
            f"expected `training.precision` bf16 or no for {name}, whose steps scale no gradient, got fp16"
        )


def check_smallest_batch(
    method: Method,
    student: nn.Module,
    teacher: Teacher | None,
    sample: Mapping[str, Tensor],
    known: Examples,
    rows: int,
    batch_size: int,
) -> None:
    """Refuse a batch of one row where batch normalisation cannot do with one: a step is tried.

    Args:
        method: Left as it is.
        student: Left as it is.
        teacher: Answers the method's batches.
        sample: A batch of one row.
        known: For a preparation.
        rows: Of an epoch.
        batch_size: Of all batches but perhaps the last.
    """
    if method.capabilities.generates_inputs is not None or (rows % batch_size or batch_size) > 1:
        return
    device = sample["input"].device
    method, student = copy.deepcopy((method, student))
    method.to(device).train()
    if method.two_views:
        sample = {**sample, "strong": sample["input"]}
    teacher = teacher if method.needs_teacher else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []), refusals():
        if teacher is not None and (prepares := method.capabilities.prepares) is not None:
            prepares.prepare(teacher, TrainingBatches(known, device, at_most=1))
        with method.hooks(student.train(), teacher):
            signal = None if teacher is None else signal_of(teacher, sample)
            try:
                method.step(student, sample, signal)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UserError(
                    "expected at least two rows in every batch, for batch normalisation, but "
                    f"{rows} training rows in batches of {batch_size} end with one of a single row; choose "
                    "another `training.batch_size`"
                ) from error


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


@dataclass
class BestEpoch:
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
