"""One step on one row, before a training is started."""

from __future__ import annotations

import torch

from ..models.loaders import fresh_weights_expected
from ..recipes.build import RunInputs, build_network
from ..recipes.methods import method_of
from ..recipes.schema import Recipe
from ..recipes.teacher import CacheStandIn, local_box, stand_in
from ..signals import LiveTeacher, Teacher
from ..training.batches import TrainingBatches
from ..training.engine import build, check_own_steps, divide
from ..training.session import checked_step, refusals, signal_of


def dry_run(recipe: Recipe, materials: RunInputs) -> None:
    """Make a step on one row with networks like a recipe's own, to hear of what does not fit before training.

    Raises:
        UserError: If a path, a shape or an option of a loss does not fit.
    """
    method = method_of(recipe, materials.data)
    teacher: Teacher | None = None
    with fresh_weights_expected():  # `prepare_data` has told of the student's, and the teacher may yet learn
        student, _ = build_network(recipe.student, materials.data)
        if recipe.teacher is not None:
            options, classes = recipe.teacher, len(materials.data.classes)
            if options.url is not None:
                teacher = stand_in(options, classes)
            else:
                network, _ = build_network(options, materials.data)
                teacher = LiveTeacher(network)
                if options.answers is not None:
                    teacher = local_box(network, options, classes)
            if options.cache_outputs:
                teacher = CacheStandIn(teacher)
    cpu = torch.device("cpu")
    check_own_steps(method, recipe.training)
    train, quiz = divide(method, materials.train, recipe.training.seed)
    row = build(method, student, teacher, train, cpu, seed=0)
    if teacher is not None:
        teacher.budget = None  # a dry run pays for no query
    if method.two_views:
        row = {**row, "strong": row["input"]}
    asked = [row] * method.quiz_batches if quiz is not None else []
    with refusals():
        if method.needs_preparation and teacher is not None:
            method.prepare(teacher, TrainingBatches(train, cpu, at_most=1))
    with refusals(), method.hooks(student, teacher):
        signal = None if teacher is None or not method.needs_teacher else signal_of(teacher, row)
        method.eval().before_round(student.eval(), [row] * method.batches_per_round, asked, 0.0)
        with torch.no_grad():
            checked_step(method, student, row, signal)
