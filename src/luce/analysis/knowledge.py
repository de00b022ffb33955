"""The figures of a diagnosis; *rho*, *M*, *rel* and the five terms are defined in the module `diagnose`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The five terms of the departure from the labels; each is at least 0."""

    universe: float
    class_difficulty: float
    class_relations: float
    instance_confidence: float
    instance_relations: float

    @property
    def total(self) -> float:
        # fsum: the terms span many orders of magnitude, and shares must add up to 1.
        return math.fsum(self.as_dict().values())

    @property
    def shares(self) -> dict[str, float]:
        """Each term as a share of the sum; all 0 if the teacher repeats the labels."""
        return {name: value / (self.total or 1.0) for name, value in self.as_dict().items()}

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Pull:
    """The effect of a teacher on a student's gradient under ``(1 - weight) CE + weight KD``.

    The weight of a row, ``w_y``, is the factor by which the teacher changes the gradient of cross-entropy at
    the label, and at all other classes together:
    ``w_y = (1 - weight) + weight T (rho_y - softmax(s/T)_y) / (1 - softmax(s)_y)`` (``weight / T`` in place
    of ``weight T`` if KD is not scaled by T²).

    Attributes:
        weights: ``w_y`` of each row, float64.
        floored: Number of rows whose ``1 - softmax(s)_y`` was below ``floor`` and replaced by it.
        floor: Lower bound of that divisor.
        negative: Share of the rows with a weight below 0: there training lowers the label's logit.
        correlation: Correlation of ``rho_y`` with the student's cross-entropy over the rows; None if either
            is constant.
        norms: Mean norm of the logits' gradient by part: ``cross_entropy`` (unweighted), and KD's
            ``universe``, ``domain`` and ``instance`` (weighted as in the loss).
        cosines: Cosine of each part of KD with the gradient of cross-entropy, all rows taken as one vector;
            None if a part is 0.
    """

    weights: Tensor
    floored: int
    floor: float
    negative: float
    correlation: float | None
    norms: dict[str, float]
    cosines: dict[str, float | None]


@dataclass(frozen=True)
class Knowledge:
    """The figures of one teacher on one set of rows.

    Attributes:
        rows: Number of labelled rows.
        class_rows: Number of rows of each class, ``(C,)``.
        terms: The five terms of the departure from the labels.
        departure: ``E||rho - e_y||²``, computed directly; `terms` sum to it.
        smoothing: Strength of the label smoothing with the same mean mass on wrong classes,
            ``E M * C / (C - 1)``.
        entropy: Mean entropy of the probabilities, as a share of ``log C``.
        accuracy: Share of the rows whose most probable class is the label.
        top_probability: Mean probability of the most probable class.
        label_probabilities: ``rho_y`` of each row, float64.
        class_means: ``E[rho | y]``, ``(C, C)``; rows of absent classes are 0.
        relations: R, the distribution of each class's mass on wrong classes, ``(C, C)``: the mean over rows
            of ``rho_c`` divided by the mean of ``1 - rho_y``, which weights each row by its mass. Rows sum to
            1; the diagonal is 0, and so are rows of classes that are absent or have no mass on wrong classes.
        relation_divergence: ``KL(R_y || even)`` per class, nats, ``(C,)``: from 0 (label smoothing) to
            ``log(C - 1)`` (all mass on one wrong class).
        class_relation_nats: Mean of ``relation_divergence``, weighted by each class's mass on wrong classes.
        instance_relation_nats: Mean KL divergence of a row's distribution over wrong classes from that of its
            class, weighted likewise; both sum to the divergence of the row's distribution from an even one.
        pull: The effect on a student; None without a student.
    """

    rows: int
    class_rows: Tensor
    terms: Terms
    departure: float
    smoothing: float
    entropy: float
    accuracy: float
    top_probability: float
    label_probabilities: Tensor
    class_means: Tensor
    relations: Tensor
    relation_divergence: Tensor
    class_relation_nats: float
    instance_relation_nats: float
    pull: Pull | None

    @property
    def classes(self) -> int:
        return len(self.class_rows)

    @property
    def missing(self) -> float:
        """``E M``: the mean probability mass on wrong classes."""
        return self.smoothing * (self.classes - 1) / self.classes

    @property
    def relation_share(self) -> float:
        """Relations as a share of their maximum, ``log(C - 1)`` nats; 0 with two classes, which have none."""
        most = math.log(self.classes - 1)
        return (self.class_relation_nats + self.instance_relation_nats) / most if most else 0.0

    @property
    def fresh_weight_spread(self) -> float:
        """Standard deviation within the classes of ``1 - K M``.

        Up to a factor T, these are the weights ``w_y`` that KD alone gives to a student with constant logits.
        """
        factor = self.classes / (self.classes - 1)
        return math.sqrt(factor * self.terms.instance_confidence)


@dataclass(frozen=True)
class Diagnosis:
    """A teacher and synthetic reference teachers with less knowledge, on the same rows.

    Attributes:
        temperature: Temperature of the teacher's softmax.
        unlabelled: Number of rows skipped because they have no label.
        teacher: The figures of the teacher.
        references: Figures by name: ``label_smoothing`` of the teacher's mean strength; ``class_mean``, which
            gives every row of a class the class's mean probabilities; and ``true_prob``, the teacher's
            ``rho_y`` with the rest spread evenly.
    """

    temperature: float
    unlabelled: int
    teacher: Knowledge
    references: dict[str, Knowledge]
