"""Distillation through the features inside the networks, with or without a loss on the logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses import FeatureLoss
from ..losses.modules import WeightedSum
from ..losses.modules.weighted_sum import losses_of, warmed_up
from ..models.classifier import Classifier
from ..models.hooks import Features, find
from ..models.modes import in_evaluation
from ..signals import Signal, Teacher
from ._processes import gather_rows
from .base import Batch, Prepares, TrainingRows
from .logits import LogitMethod, Loss
from .observation import observe
from .preparation import train_by_sgd


class FeatureTerm(NamedTuple):
    """A loss on features with the modules that compute them.

    Attributes:
        weight: At least 0; a term of weight 0 is 0.
        loss: Compares the features.
        student: Paths of modules of the student; see `luce.models.hooks.Features`.
        teacher: Paths of modules of the teacher, in the order in which they are compared with the student's.
        warmup: Epochs over which the weight grows: in epoch *e* it is multiplied by ``min(e / warmup, 1)``.
    """

    weight: float
    loss: FeatureLoss
    student: Sequence[str]
    teacher: Sequence[str]
    warmup: float = 0.0


class FeatureMethod(Prepares):
    """One forward pass of the student, a loss on its logits, and losses on its features.

    In our networks ``stages.0``, ``stages.1``, ... are the maps at the end of each stage and ``pool`` is the
    vector that is classified, the *penultimate feature* of the literature; `luce.models` lists all parts.
    Modules of any other network are named likewise.

    `build` makes what a feature loss trains (projections, regressors). It belongs to this method: it is
    trained and resumed beside the student and never exported with it.

    For a loss that reuses the teacher's classifier (`luce.SimKDLoss`), `build` copies the teacher's head into
    the student and freezes it. The student is then a network ``simkd:NAME`` (`luce.models.simkd`): the
    network of that name, a projector, and pooling and head of the teacher's form. All of it is trained,
    evaluated and exported, so that its parameters and operations are counted in full.

    Args:
        loss: On the logits, as `LogitMethod` takes it; None for features alone.
        terms: Losses on features, by name.

    Raises:
        ValueError: If there is no term, a weight or a warm-up is negative, or a name cannot be used.
        TypeError: If the loss of a term is no `luce.losses.FeatureLoss`, or its paths are no lists.

    Example:
        >>> import luce
        >>> from luce import models
        >>> from luce.signals import LiveTeacher
        >>> student, network = (models.build("cnn", classes=10, input_shape=(1, 8, 8)) for _ in range(2))
        >>> method = FeatureMethod(
        ...     luce.CrossEntropyLoss(),
        ...     {"hint": FeatureTerm(100.0, luce.FitNetLoss(), ["stages.0"], ["stages.0"])},
        ... )
        >>> teacher = LiveTeacher(network)
        >>> batch = {"input": torch.rand(4, 1, 8, 8), "target": torch.arange(4), "index": torch.arange(4)}
        >>> method.build(student, teacher, batch, rows=batch)
        >>> with method.hooks(student, teacher):
        ...     terms = method.step(student, batch, teacher.signal(batch))
        >>> sorted(terms)
        ['hint', 'logits', 'loss']
    """

    def __init__(self, loss: Loss | None, terms: Mapping[str, FeatureTerm | tuple[Any, ...]]) -> None:
        super().__init__()
        self.logits = None if loss is None else LogitMethod(loss)
        self.terms = {name: FeatureTerm(*term) for name, term in terms.items()}
        on_logits = loss.weights if isinstance(loss, WeightedSum) else () if loss is None else ("logits",)
        if repeated := sorted(self.terms.keys() & set(on_logits)):
            raise ValueError(
                f"expected other names for the terms on features than for those on logits, got {repeated}"
            )
        for name, term in self.terms.items():
            if not isinstance(term.loss, FeatureLoss):
                raise TypeError(
                    f"expected a loss on features (luce.losses.FeatureLoss) for `{name}`, "
                    f"got {type(term.loss).__name__}"
                )
            if isinstance(term.student, str) or isinstance(term.teacher, str):
                raise TypeError(
                    f"expected lists of paths for `{name}`, got {term.student!r} and {term.teacher!r}"
                )
        self.losses = losses_of(
            {name: (term.weight, term.loss) for name, term in self.terms.items()},
            {name: term.warmup for name, term in self.terms.items()},
        )
        self.student_paths = [path for term in self.terms.values() for path in term.student]
        self.teacher_paths = [path for term in self.terms.values() for path in term.teacher]
        self.uses_unlabelled = any(
            term.weight and not term.loss.needs_labels for term in self.terms.values()
        ) or (self.logits is not None and self.logits.uses_unlabelled)
        self.needs_preparation = any(
            term.weight and term.loss.needs_preparation for term in self.terms.values()
        ) or (self.logits is not None and self.logits.needs_preparation)
        self.epoch: int | None = None
        self._student: Features | None = None

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        """Make what the losses train, for the feature shapes of a forward pass on a few rows."""
        if teacher is None:
            raise UserError("expected a teacher for losses on features; add `teacher` to the recipe")
        with Features(student, self.student_paths) as hooks, teacher.record_features(self.teacher_paths):
            with without_side_effects(student, sample["input"].device), hooks.capture() as student_features:
                logits = student(sample["input"])
            signal = teacher.signal(sample)
        teacher_features = signal.features
        _refuse_reordered(student, student_features, logits)
        _refuse_reordered(teacher.network, teacher_features, signal.logits)
        for name, term in self.terms.items():
            try:
                term.loss.register_rows(rows["index"], rows["target"], gather=gather_rows)
                term.loss.build(
                    [student_features[path].shape[1:] for path in term.student],
                    [teacher_features[path].shape[1:] for path in term.teacher],
                )
            except ValueError as error:
                raise UserError(f"`{name}`: {error}") from error
            if term.loss.reuses_classifier:
                reuse_classifier(student, teacher, loss=type(term.loss).__name__)

    @contextmanager
    def hooks(self, student: nn.Module, teacher: Teacher | None) -> Iterator[None]:
        assert teacher is not None
        with (
            Features(student, self.student_paths) as self._student,
            teacher.record_features(self.teacher_paths),
        ):
            try:
                yield
            finally:
                self._student = None

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        results: dict[str, float] = {}
        if self.logits is not None and self.logits.needs_preparation:
            results = self.logits.prepare(teacher, rows)
        for name, term in self.terms.items():
            if not (term.weight and term.loss.needs_preparation):
                continue

            def features(*, paths: Sequence[str] = term.teacher, **options: Any) -> Iterator[list[Tensor]]:
                with teacher.record_features(paths):
                    for batch in rows.batches(**options):
                        recorded = teacher.signal(batch).features
                        yield [recorded[path] for path in paths]

            prepared = term.loss.prepare(features, train_by_sgd)
            results |= {f"{name}.{key}": value for key, value in prepared.items()}
        return results

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.logits is not None:
            self.logits.set_epoch(epoch)

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        if self._student is None or signal is None:
            raise RuntimeError(
                "expected a step within `with method.hooks(student, teacher)`, and the teacher's signal"
            )
        with self._student.capture() as features:
            logits = student(batch["input"])
        observe(batch, signal, features)
        terms = {} if self.logits is None else self.logits.terms(logits, batch, signal)
        total = terms.pop("loss", logits.new_zeros(()))
        if self.logits is not None and not terms:
            terms = {"logits": total}
        for name, term in self.terms.items():
            weight = warmed_up(term.weight, term.warmup, self.epoch)
            # A term of weight 0 may be infinite, and 0 * inf is not 0.
            parts = _parts(term, features, batch, signal) if weight else {"loss": logits.new_zeros(())}
            value = weight * parts.pop("loss")
            terms |= {name: value, **{f"{name}.{part}": other.detach() for part, other in parts.items()}}
            total = total + value
        if total.requires_grad:
            # DDP waits for a gradient of every parameter, and losses on features alone leave the head without
            # one: the sum over no rows is 0 and gives all of them a gradient of 0.
            total = total + logits[:0].sum()
        return {**terms, "loss": total}


def _parts(term: FeatureTerm, features: Batch, batch: Batch, signal: Signal) -> dict[str, Tensor]:
    """Return the unweighted loss of a term, and what else the loss reports."""
    options = {"target": batch["target"]} if term.loss.needs_labels else {}
    options |= {"index": batch["index"]} if term.loss.needs_index else {}
    student = [features[path] for path in term.student]
    teacher = [signal.features[path] for path in term.teacher]
    value = term.loss(student, teacher, **options)
    return dict(value) if isinstance(value, Mapping) else {"loss": value}


def reuse_classifier(student: nn.Module, teacher: Teacher, *, loss: str) -> None:
    """Copy the teacher's head into the student and freeze it.

    Args:
        student: With a head of the same form.
        teacher: With a network.
        loss: Name of the loss that demands it, for the message.
    Raises:
        UserError: If the heads differ in form, or the teacher has no network.
    """
    if teacher.network is None:
        raise UserError(f"expected a teacher with a network for {loss}, got {teacher.description}")
    own, reused = find(student, "head"), find(teacher.network, "head")
    rows = {name: _in_order(value, teacher.network, student) for name, value in reused.state_dict().items()}
    try:
        own.load_state_dict(rows)
    except RuntimeError as error:
        raise UserError(
            f"expected a student with a head like the teacher's for {loss}; build it as `simkd:NAME` with "
            f"the teacher's name and options, got {own} for {reused}"
        ) from error
    own.requires_grad_(False)


def _in_order(rows: Tensor, teacher: nn.Module, student: nn.Module) -> Tensor:
    """Return rows of the teacher's head in the order that the classes have in the student's."""
    if isinstance(teacher, Classifier) and teacher.order is not None:
        rows = rows[teacher.order.to(rows.device)]
    if isinstance(student, Classifier) and student.order is not None:
        rows = rows[student.order.argsort().to(rows.device)]
    return rows


def _refuse_reordered(network: nn.Module | None, features: Batch, logits: Tensor) -> None:
    """Refuse features that are logits in the order of a network which numbers the classes differently."""
    if not isinstance(network, Classifier) or network.order is None:
        return
    for path, value in features.items():
        if value.shape == logits.shape and torch.equal(value[:, network.order.to(value.device)], logits):
            raise UserError(
                f"expected features at `{path}`, got logits, and those of this network are in another order "
                "than the classes of the data; compare them with a loss on logits"
            )


@contextmanager
def without_side_effects(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers, gradients, modes and random states unchanged by the forward passes of a block."""
    generators = [device] if device.type == "cuda" else []
    with in_evaluation(network), torch.random.fork_rng(generators), torch.no_grad():
        yield
