"""The training loop: one student, one method, one folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import Progress
from torch import Tensor, nn

from .. import data, files, log, stops
from ..data import Examples
from ..errors import UserError
from ..methods import Method
from ..models import Classifier
from ..signals import Teacher
from . import checkpoint, metrics
from .batches import TrainingBatches
from .networks import check_networks, report_parameters
from .progress import Bar
from .session import Session, TrainingError
from .settings import TrainingOptions
from .setup import (
    allow_unused_parameters,
    build,
    check_own_steps,
    check_smallest_batch,
    divide,
    new_accelerator,
)

__all__ = ["Fit", "TrainingError", "fit"]


@dataclass
class Fit:
    """The result of a training.

    Attributes:
        student: With the weights after the last epoch, or their average if one is kept.
        accelerator: Of the training; evaluates the student on the same devices.
        history: One record per epoch, as in ``metrics.jsonl``.
        best_epoch: The epoch with the highest validation accuracy, and of equal ones the one with the lowest
            loss; the last epoch without validation rows.
        best_weights: Of the student's network after that epoch, under the names that it has uncompiled.
        prepared: Values that the method measured before training, by name.
        co_trained: Other networks that the method trained, by name.
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

    With a folder, metrics and checkpoints are written there, and an interrupted training resumes from its
    last checkpoint; on a CPU its results equal those of an uninterrupted one bit for bit.

    Ctrl-C ends a training after the current batch. SIGTERM loses no finished epoch: during validation, and if
    the last epoch has no checkpoint because of `checkpoint_every`, it first finishes the epoch and saves.

    Args:
        student: Trained in place.
        method: Computes the loss of a step. Its parameters, if it has any, are trained too.
        train: Training rows. For a method that cannot use unlabelled rows, labelled rows are repeated in
            their place, so that all methods make equally many steps. Rows of the label -100 are left out.
        validation: Rows that choose the best epoch.
        teacher: Answers the method's batches.
        options: How to train.
        augment: Applied to each training batch before teacher and student see it.
        strong_augment: Makes the second view for a method of two views; see `luce.data.loader`.
        workers: Processes that read data.
        folder: Of the run; None keeps everything in memory.
        accelerator: From `new_accelerator`, for these options and this folder; made unless given.
        progress: Display that the training adds its bars to.
    Raises:
        UserError: On settings that cannot work, before training starts.
        TrainingError: If the loss stops being finite; it names the term, and the last checkpoint is kept.
    """
    if method.two_views != (strong_augment is not None):
        raise UserError("expected `strong_augment` for a method of two views, and for no other")
    if method.two_views and method.needs_teacher and teacher and not teacher.answers_new_inputs:
        raise UserError(f"expected a teacher that answers a second view, got {teacher.description}")
    if options.trackers and folder is None:
        raise UserError("expected a folder to track the training in, got none; give one or no `trackers`")
    check_own_steps(method, options)
    check_networks(student, teacher)
    rows, held_out = divide(method, train.counted, options.seed)
    train = rows if method.uses_unlabelled else rows.labelled.repeat_to(len(rows))

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
    sample = build(method, student, teacher, rows, accelerator.device, options.seed)
    if accelerator.num_processes == 1:  # Accelerate fills up the last batch of several processes
        check_smallest_batch(method, student, teacher, sample, rows, len(train), options.batch_size)
    else:
        allow_unused_parameters(accelerator, method, student, sample)
    report_parameters(student, options.precision)
    session = Session(accelerator, student, method, teacher, batches, held_out, options, rows.targets)
    if validation is not None:
        validation_batches = accelerator.prepare(
            data.loader(validation, batch_size=4 * options.batch_size, seed=None, workers=workers)
        )

    state = State() if folder is None else resume(folder, session) or State()

    def save() -> None:
        if folder is not None:
            checkpoint.save(folder, accelerator, state.best.epoch, state.as_saved(session))
            state.saved = state.best.epoch

    if not state.started and teacher is not None and method.capabilities.prepares is not None:
        seen = TrainingBatches(rows, accelerator.device, options.seed, augment, workers, progress)
        state.prepared = session.prepare(teacher, seen)
        save()
    metrics_log = MetricsLog(folder if accelerator.is_main_process else None, state.history)
    if options.trackers:
        accelerator.init_trackers("luce", config={"lr": options.lr, "batch_size": options.batch_size})

    best, steps = state.best, len(session.batches)
    bars = Bar(progress, "training", options.epochs * steps, best.epoch * steps)
    with stops.noted(), bars as bar, method.hooks(student, session.teacher):
        while best.epoch < options.epochs and not best.exhausted(options.patience):
            started = time.perf_counter()
            # SIGTERM ends an epoch at once, unless the one before it is not on the disk.
            unsaved = folder is not None and state.saved < best.epoch
            best.epoch += 1
            losses = session.epoch(best.epoch, bar, finish=unsaved)
            record: dict[str, Any] = {"epoch": best.epoch, "train": losses}
            record |= {"step": session.step, "lr": session.optimizer.param_groups[0]["lr"], "validation": {}}
            if validation is not None:
                logits, _, target = metrics.collect(
                    session.evaluated, validation_batches, accelerator, finish=folder is not None
                )
                record["validation"] = metrics.brief(logits, target)
                bar.note(f"validation {record['validation']['accuracy']:.1%}")
            if best.is_best(record["validation"]):
                weights = session.evaluated.plain.state_dict()
                state.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
            record["seconds"] = time.perf_counter() - started
            metrics_log.append(record)
            accelerator.log(flat(record), step=session.step)
            due = best.epoch % options.checkpoint_every == 0 or best.epoch == options.epochs
            if session.any_process(stops.terminating()) or due:
                save()
            stops.check()
    for tracker in accelerator.trackers:  # end_training() would also end the group of processes
        tracker.finish()
    co_trains = method.capabilities.co_trains
    return Fit(
        session.evaluated,
        accelerator,
        state.history,
        best.best_epoch,
        state.best_weights,
        state.prepared,
        {} if co_trains is None else co_trains.co_trained,
    )


@dataclass
class BestEpoch:
    """The current epoch and the best one so far."""

    epoch: int = 0
    best_epoch: int = 0
    best_accuracy: float = -math.inf
    best_loss: float = math.inf

    def is_best(self, validation: Mapping[str, float]) -> bool:
        """Compare the current epoch with the best one and keep the better; without figures each is better."""
        if validation:
            accuracy, loss = validation["accuracy"], validation["loss"]
            if (accuracy, -loss) <= (self.best_accuracy, -self.best_loss):
                return False
            self.best_accuracy, self.best_loss = accuracy, loss
        self.best_epoch = self.epoch
        return True

    def exhausted(self, patience: int | None) -> bool:
        """Return whether `patience` epochs have passed without a better one."""
        return patience is not None and self.epoch - self.best_epoch >= patience


@dataclass
class State:
    """The part of a training that neither the accelerator nor the session keeps.

    Attributes:
        best: The current epoch and the best one.
        history: One record per epoch.
        prepared: Values that the method measured before training.
        best_weights: Of the student's body after the best epoch.
        started: Whether it comes from a checkpoint.
        saved: The last epoch with a checkpoint.
    """

    best: BestEpoch = field(default_factory=BestEpoch)
    history: list[dict[str, Any]] = field(default_factory=list)
    prepared: dict[str, float] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    started: bool = False
    saved: int = 0

    def as_saved(self, session: Session) -> dict[str, Any]:
        """Return plain values and tensors for `checkpoint.save`."""
        return {
            "best": vars(self.best),
            "history": self.history,
            "prepared": self.prepared,
            "best_weights": self.best_weights,
            "session": session.state_dict(),
        }


def resume(folder: Path, session: Session) -> State | None:
    """Load the last checkpoint of a folder into a session; None if there is none.

    Raises:
        UserError: If it cannot be read or belongs to another method.
    """
    saved = checkpoint.restore(folder, session.accelerator)
    if saved is None:
        return None
    try:
        session.load_state_dict(saved["session"])
        best = BestEpoch(**saved["best"])
        log.info(f"resumes in {folder} after epoch {best.epoch}")
        return State(best, saved["history"], saved["prepared"], saved["best_weights"], True, saved=best.epoch)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot resume in {folder} ({files.reason(error)}): its checkpoint is of another method or "
            "another version of Luce; choose another folder, or delete it"
        ) from error


class MetricsLog:
    """``metrics.jsonl``: one line per epoch, rewritten from the checkpoint's history on a resume."""

    def __init__(self, folder: Path | None, history: list[dict[str, Any]]) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.history = history
        if self.path is not None:
            files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in history))

    def append(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); free some space") from error


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a record of the history for trackers.

    >>> flat({"epoch": 1, "train": {"loss": 0.5}})
    {'epoch': 1, 'train/loss': 0.5}
    """
    result: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            result.update({f"{key}/{name}": inner for name, inner in value.items()})
        else:
            result[key] = value
    return result
