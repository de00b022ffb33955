"""One step on one row, to find what does not fit before any training or query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import Classifier
from ..models.copies import copy_of
from ..models.loaders import fresh_weights_expected
from ..recipes.build import RunInputs, build_network
from ..recipes.methods import build_method
from ..recipes.schema import Recipe, TeacherOptions
from ..recipes.teacher import local_box
from ..signals import CachedTeacher, Kind, LiveTeacher, LocalBlackBox, Signal, Teacher
from ..signals.teachers import Batch
from ..training.batches import TrainingBatches
from ..training.session import checked_step, refusals, signal_of
from ..training.setup import build, check_own_steps, divide


def dry_run(recipe: Recipe, inputs: RunInputs, student: Classifier) -> None:
    """Make one step on one row, with a teacher of the recipe's kind that costs no query.

    Args:
        recipe: To be tried.
        inputs: Its data.
        student: Its student; a copy makes the step.
    Raises:
        UserError: If a path, a shape or an option of a loss does not fit.
    """
    method = build_method(recipe, inputs.data)
    student = copy_of(student, "a dry run")
    teacher = None if recipe.teacher is None else _stand_in(recipe.teacher, inputs)
    cpu = torch.device("cpu")
    check_own_steps(method, recipe.training)
    train, held_out = divide(method, inputs.train, recipe.training.seed)
    row = build(method, student, teacher, train, cpu, seed=0)
    if teacher is not None:
        teacher.budget = None  # the method has checked it, and the stand-in charges nothing
    if method.two_views:
        row = {**row, "strong": row["input"]}
    capabilities = method.capabilities
    with refusals():
        if teacher is not None and capabilities.prepares is not None:
            capabilities.prepares.prepare(teacher, TrainingBatches(train, cpu, at_most=1))
    with refusals(), method.hooks(student, teacher):
        signal = None if teacher is None or not method.needs_teacher else signal_of(teacher, row)
        method.eval()
        student.eval()
        if (looks_ahead := capabilities.looks_ahead) is not None:
            others = [] if held_out is None else [row] * looks_ahead.held_out_batches
            looks_ahead.before_round(student, [row] * looks_ahead.batches_per_round, others, 0.0)
        with torch.no_grad():
            checked_step(method, student, row, signal)


def _stand_in(options: TeacherOptions, inputs: RunInputs) -> Teacher:
    """Build a teacher like the recipe's: fresh weights will do, and nothing is queried or cached."""
    classes = len(inputs.data.classes)
    teacher: Teacher
    if options.url is not None:
        teacher = LocalBlackBox(
            _Zeros(classes),
            answers=options.answers or "probs",
            classes=classes,
            top_k=options.top_k,
            budget=options.budget,
        )
    else:
        with fresh_weights_expected():  # a comparison may train the teacher later
            network, _ = build_network(options, inputs.data)
        teacher = LiveTeacher(network) if options.answers is None else local_box(network, options, classes)
    if not options.cache_outputs:
        return teacher
    teacher.budget = None
    return _CacheStandIn(teacher)


class _Zeros(nn.Module):
    """Returns logits of 0, in place of a network that only its server has."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.zeros(len(inputs), self.classes, device=inputs.device)


class _CacheStandIn(Teacher):
    """Answers like another teacher, with the limits of a `CachedTeacher`."""

    answers_new_inputs = False

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @property
    def kind(self) -> Kind:
        return self.teacher.kind

    @property
    def description(self) -> str:
        return CachedTeacher(torch.empty(0)).description

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)

    def signal(self, batch: Batch) -> Signal:
        return self.teacher.signal(batch)
