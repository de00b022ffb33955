"""What a diagnosis holds; *rho*, *M*, *rel* and the five terms are those of the module `diagnose`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The five parts of the departure from the labels; each at least 0."""

    universe: float
    class_difficulty: float
    class_relations: float
    instance_confidence: float
    instance_relations: float

    @property
    def total(self) -> float:
        return math.fsum(self.as_dict().values())

    @property
    def shares(self) -> dict[str, float]:
        """Each part of the whole; all 0 where the teacher only repeats the labels."""
        return {name: value / (self.total or 1.0) for name, value in self.as_dict().items()}

    def as_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Pull:
    """What a teacher does to the gradient of a student, ``(1 - weight) CE + weight KD``.

    The weight of a row, ``w_y``, is the factor by which the teacher changes the cross-entropy's pull on the
    label, and on all other classes together:
    ``w_y = (1 - weight) + weight T (rho_y - softmax(s/T)_y) / (1 - softmax(s)_y)`` (without the factor T if
    KD is not scaled by the temperature).

    Attributes:
        weights: ``w_y`` of each row, float64.
        floored: Rows so well learnt that ``1 - softmax(s)_y`` was below `floor` and was replaced by it.
        floor: As named.
        negative: Share of the rows whose weight is below 0: there the label is pushed down.
        correlation: Between ``rho_y`` and the student's cross-entropy over the rows; None if either is
            constant.
        norms: Mean norm of the gradient of the logits by part: ``cross_entropy`` (the plain loss, without its
            share), and KD's ``universe``, ``domain`` and ``instance``, with theirs.
        cosines: Of each of KD's parts with the gradient of cross-entropy, all rows taken as one vector; None
            where a part is 0.
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
    """One teacher on some rows.

    Attributes:
        rows: That have a label.
        class_rows: How many of each class, ``(C,)``.
        terms: The five parts of the departure from the labels.
        departure: ``E||rho - e_y||²``, taken directly; `terms` add up to it.
        smoothing: Strength of the label smoothing that leaves as much to the wrong classes,
            ``E M * C / (C - 1)``.
        entropy: Mean entropy of the probabilities, as a share of ``log C``.
        accuracy: Share of the rows whose first choice is the label.
        top_probability: Mean probability of the first choice.
        label_probabilities: ``rho_y`` of each row, float64.
        class_means: ``E[rho | y]``, ``(C, C)``; rows of classes that do not occur are 0.
        relations: R, how the rows of a class spread what they leave to other classes: the mean over rows of
            ``rho_c`` over the mean of ``1 - rho_y`` (so that each row counts as much as it leaves). Rows sum
            to 1; 0 on the diagonal, and for classes that do not occur or leave nothing.
        relation_divergence: ``KL(R_y || even)`` per class, nats, ``(C,)``: between 0, label smoothing, and
            ``log(C - 1)``, a single rival.
        class_relation_nats: Their mean, each class counting as much as it leaves.
        instance_relation_nats: Mean KL from a row's own spread to that of its class, counted in the same way;
            the two add up to the KL from the row's own spread to an even one.
        pull: On a student, if there is one.
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
        """``E M``: what a row leaves to the wrong classes, on average."""
        return self.smoothing * (self.classes - 1) / self.classes

    @property
    def relation_share(self) -> float:
        """Of the most that relations could say, ``log(C - 1)`` nats; 0 with two classes, which have none."""
        most = math.log(self.classes - 1)
        return (self.class_relation_nats + self.instance_relation_nats) / most if most else 0.0

    @property
    def fresh_weight_spread(self) -> float:
        """Deviation, within the classes, of ``1 - K M``: of the weights ``w_y``, but for a factor T, that KD
        alone gives to a student that knows nothing yet."""
        factor = self.classes / (self.classes - 1)
        return math.sqrt(factor * self.terms.instance_confidence)


@dataclass(frozen=True)
class Diagnosis:
    """A teacher beside synthetic teachers that know less, on the same rows.

    Attributes:
        temperature: Of the teacher's softmax.
        unlabelled: Rows that were left out for want of a label.
        teacher: What it knows.
        references: By name: ``label_smoothing`` of the teacher's mean strength; ``class_mean``, which answers
            every row of a class alike; and ``true_prob``, the teacher's ``rho_y`` with an even rest.
    """

    temperature: float
    unlabelled: int
    teacher: Knowledge
    references: dict[str, Knowledge]
