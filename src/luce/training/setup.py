"""Checks and preparation before the first step of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from .. import data
from ..data import Examples
from ..errors import UserError, import_optional, unknown_name
from ..methods import Method
from ..models.copies import copy_of
from ..models.hooks import Features
from ..models.modes import in_evaluation, rest, resting
from ..signals import Teacher
from .batches import TrainingBatches
from .processes import processes
from .session import ONE_ROW, refusals, signal_of
from .settings import TrainingOptions

TRACKERS = ("tensorboard", "wandb")


def new_accelerator(options: TrainingOptions, folder: Path | None = None) -> Accelerator:
    """Make an accelerator for one training, independent of others in this process.

    Args:
        options: Precision, accumulation, device and trackers.
        folder: Of the run, for the trackers; None for no tracking.
    Raises:
        UserError: On an unknown tracker, or fp16 on a CPU.
        MissingExtra: If a tracker is not installed.
    """
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
    if options.precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would ignore it
        raise UserError("expected a GPU for `training.precision` fp16; on a CPU use bf16 or no")
    return accelerator


def build(
    method: Method,
    student: nn.Module,
    teacher: Teacher | None,
    rows: Examples,
    device: torch.device,
    seed: int,
) -> Mapping[str, Tensor]:
    """Let a method build its parts, equal in every process, without moving the random draws of the training.

    Returns:
        The batch of one row that the method was given.
    Raises:
        UserError: If the method needs a teacher and there is none, or the networks do not suit it.
    """
    if method.needs_teacher and teacher is None:
        raise UserError(
            "expected a teacher for a loss that compares with one, as PLDLoss, the default, does; "
            "add `teacher` to the recipe, or name a loss without one: "
            "`loss: {task: {loss: CrossEntropyLoss}}`"
        )
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


def allow_unused_parameters(
    accelerator: Accelerator, method: Method, student: nn.Module, sample: Mapping[str, Tensor]
) -> None:
    """Tell DDP of parameters that no step uses, for which it would wait without end; it looks only if told.

    Args:
        accelerator: Of several processes; wraps the student later.
        method: With the features that it compares.
        student: Runs once, forwards and backwards, in evaluation mode.
        sample: A batch of one row.
    """
    paths: list[str] = []
    part: Method | None = method
    while part is not None:
        paths += getattr(part, "student_paths", [])
        part = part.inner
    device = sample["input"].device
    generators = [device] if device.type == "cuda" else []
    with in_evaluation(student), torch.random.fork_rng(generators), Features(student, paths) as hooks:
        with hooks.capture() as features:
            logits = student(sample["input"])
        outputs = [tensor for tensor in (logits, *features.values()) if tensor.requires_grad]
        if outputs:
            torch.stack([tensor.float().sum() for tensor in outputs]).sum().backward()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if any(parameter.grad is None for parameter in trained):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    student.zero_grad()


def divide(method: Method, train: Examples, seed: int) -> tuple[Examples, Examples | None]:
    """Split off the rows that the method holds out, if it does.

    Returns:
        The rows to train on, and the held-out rows or None.
    Raises:
        UserError: If a class is left without a row on either side.
    """
    looks_ahead = method.capabilities.looks_ahead
    if looks_ahead is None or not looks_ahead.held_out:
        return train, None
    try:
        return data.hold_out(train, looks_ahead.held_out, seed)
    except UserError as error:
        raise UserError(f"no rows to hold out for {type(looks_ahead).__name__}: {error}") from error


def check_own_steps(method: Method, options: TrainingOptions) -> None:
    """Refuse options that do not suit a method with optimizers of its own, or one that looks ahead.

    Raises:
        UserError: On such an option.
    """
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
    # The last step of an epoch accumulates fewer batches, and a round of several cannot see where it begins.
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
    """Try a step on one row if an epoch has a batch of one row, which batch normalisation may refuse.

    Args:
        method: A copy makes the step.
        student: A copy makes the step.
        teacher: Answers the method's batches.
        sample: A batch of one row.
        known: Training rows, for a preparation.
        rows: Number of rows in an epoch.
        batch_size: Of all batches but perhaps the last.
    Raises:
        UserError: If the step needs more rows.
    """
    if method.capabilities.generates_inputs is not None or (rows % batch_size or batch_size) > 1:
        return
    device = sample["input"].device
    try:
        method, student = copy_of(nn.ModuleList([method, student]), "a trial step")  # type: ignore[assignment]
    except UserError:
        return  # the step itself says the same, only later
    method.to(device).train()
    still = resting(student)
    student.train()
    rest(still)
    if method.two_views:
        sample = {**sample, "strong": sample["input"]}
    teacher = teacher if method.needs_teacher else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []), refusals():
        if teacher is not None and (prepares := method.capabilities.prepares) is not None:
            prepares.prepare(teacher, TrainingBatches(known, device, at_most=1))
        with method.hooks(student, teacher):
            signal = None if teacher is None else signal_of(teacher, sample)
            try:
                method.step(student, sample, signal)
            except ValueError as error:
                if ONE_ROW not in str(error):
                    raise
                raise UserError(
                    "expected at least two rows in every batch, for batch normalisation, but "
                    f"{rows} training rows in batches of {batch_size} end with one of a single row; choose "
                    "another `training.batch_size`"
                ) from error
