"""Distillation in one call, for PyTorch modules and datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import files, log
from ..config import as_path, parse
from ..data import Examples
from ..data.forms import check_same_classes, stated_classes
from ..data.images import check_arrays
from ..data.sources import as_source
from ..errors import UserError
from ..labels import has_label
from ..losses.modules import PLDLoss
from ..methods import LogitMethod, Loss, Method
from ..models import Classifier
from ..models.classes import align, class_names
from ..signals import LiveTeacher, Teacher
from ..training.engine import Fit, fit
from ..training.progress import progress_bars
from ..training.rows import check_rows
from ..training.settings import TrainingOptions
from ..training.setup import new_accelerator
from .environment import environment
from .folder import claim_folder, folder_matches
from .identity import Parts, of_examples, of_parts, of_student, of_teacher, remember
from .plain import plain


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    train_data: Dataset[Any] | Sequence[Any],
    val_data: Dataset[Any] | Sequence[Any] | None = None,
    *,
    loss: Loss | Method | None = None,
    folder: Path | str | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Fit:
    """Train a student with the logits of a teacher.

    Args:
        student: From inputs to logits ``(N, C)``; trained in place and left with the last epoch's weights.
        teacher: From the same inputs to logits ``(N, C)``; set to evaluation mode and otherwise unchanged. Or
            any `luce.signals.Teacher`, such as a `luce.remote.RemoteTeacher`.
        train_data: A map-style dataset or a list with items ``(input, label)``, or dicts with ``input`` and
            ``target``; or a pair of arrays, inputs and labels. Labels are the numbers of logits; -1 marks an
            unlabelled row, and -100 one that losses skip.
        val_data: Likewise; chooses the best epoch. Rows without a label count in no figure.
        loss: Called as ``loss(student_logits, teacher_logits, target)``; `luce.PLDLoss` unless given. The
            parameters of a module are trained too. Or a method, such as `luce.methods.FeatureMethod`.
        folder: For metrics and checkpoints; a second call with the same folder, loss, networks, data and
            options resumes from the last checkpoint. None keeps everything in memory.
        show_progress: Whether to show a progress bar, and what `luce.log` says on the error stream.
        options: Fields of `luce.training.TrainingOptions`, such as ``epochs`` and ``lr``.
    Returns:
        One record per epoch in ``history``, and the best epoch with its weights.
    Raises:
        UserError: On an unknown option, data that cannot be read, a folder of another training, with the
            differing fields, or one in which another process works.
    Example:
        >>> import luce, torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(64, 8), torch.randint(4, (64,)))
        >>> student, teacher = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        >>> fitted = luce.distill(student, teacher, data, epochs=2, show_progress=False)
        >>> [line["epoch"] for line in fitted.history]
        [1, 2]
    """
    with ExitStack() as stack:
        if show_progress and not log.LOGGER.hasHandlers():  # where the program prints no messages itself
            stack.enter_context(log.on_stderr("luce.distill"))
        settings = parse(TrainingOptions, options, kind="option of luce.distill:")
        _check_network("student", student)
        if not isinstance(teacher, Teacher):
            _check_network("teacher", teacher)
        classes = stated_classes(train_data)
        check_same_classes(classes, stated_classes(val_data), "`train_data` and `val_data`")
        if val_data is train_data:
            log.warning("`val_data` is `train_data`: the best epoch is chosen by rows that were trained on")
        train = _examples(train_data, "train_data")
        validation = None if val_data is None else _examples(val_data, "val_data")
        place = None if folder is None else as_path(folder)
        loss = PLDLoss() if loss is None else loss
        method = loss if isinstance(loss, Method) else LogitMethod(loss)
        parts: Parts = {
            "loss": (loss, plain),
            "student": (student, of_student),
            "teacher": (teacher, of_teacher),
        }
        source = teacher if isinstance(teacher, Teacher) else _answering(teacher, classes)
        identity: dict[str, Any] = {}
        if place is not None:
            data = {"classes": plain(classes), "train": of_examples(train)}
            order = getattr(getattr(source, "network", None), "order", None)
            if isinstance(order, Tensor):
                data["order of the teacher's logits"] = order.tolist()
            data["validation"] = None if validation is None else of_examples(validation)
            identity = {"data": data, **of_parts(parts, place)}
            folder_matches(place, "training.yaml", settings, identity, within="training")
        network = Classifier(student)
        accelerator = new_accelerator(settings, place)
        check_rows(method, network, source, train, validation, accelerator.device)
        set_seed(settings.seed)
        if place is not None:
            stack.enter_context(files.locked(place))
            claim_folder(place, "training.yaml", settings, identity, within="training")
            files.write_json(place / "environment.json", environment())
            stack.callback(remember, parts, place, identity)
        return fit(
            network,
            method,
            train,
            validation,
            teacher=source,
            options=settings,
            folder=place,
            accelerator=accelerator,
            progress=stack.enter_context(progress_bars()) if show_progress else None,
        )


def _check_network(role: str, network: object) -> None:
    """Refuse what is no module, such as a class or a function."""
    if not isinstance(network, nn.Module):
        way = "make an instance of it" if isinstance(network, type) else "wrap it in a module"
        raise UserError(f"expected a {role} that is a torch.nn.Module, got {network!r}; {way}")


def _answering(teacher: nn.Module, classes: Sequence[str] | None) -> LiveTeacher:
    """Return a teacher that answers in the order of the data's classes, where both state names."""
    network, own = Classifier(teacher), class_names(teacher)
    stated = getattr(getattr(teacher, "config", None), "id2label", None)  # of a model of Hugging Face
    if own is None and isinstance(stated, Mapping):
        own = tuple(str(stated[number]) for number in sorted(stated))
    if own is not None and classes is not None:
        way = "correct the teacher's `class_names` or `config.id2label`"
        network.order = align(own, classes, source="the teacher", data="train_data", way=way)
    return LiveTeacher(network)


def _examples(dataset: Dataset[Any] | Sequence[Any], name: str) -> Examples:
    """Read a dataset and tell what it holds."""
    if not isinstance(dataset, Examples):
        source = as_source(dataset)
        dataset = Examples(source, torch.arange(len(source)))
        check_arrays(source, f"`{name}`")
    labels = dataset.targets[has_label(dataset.targets)]
    without = len(dataset) - len(labels)
    rest = f", {without} rows without a label" if without else ""
    log.info(f"`{name}`: {len(dataset)} rows, {len(torch.unique(labels))} classes{rest}")
    return dataset
