r"""Levels of a teacher's knowledge beyond the labels, and their share in the gradient of a student.

Let *rho* be the teacher's softened probabilities, ``M = 1 - rho_y`` the probability mass on wrong classes,
*rel* the deviation of the wrong classes from an even spread of that mass (0 at the label, sum 0), and
``K = C / (C - 1)``; an index *y* denotes the mean over the rows of a class. Then the teacher's departure from
the labels is exactly

    E||rho - e_y||² = K (E M)²              universe: the same smoothing everywhere
                    + K Var(M_y)            class difficulty
                    + E||rel_y||²           class relations
                    + K E Var(M | y)        instance confidence: which row is hard
                    + E||rel - rel_y||²     instance relations: what each row resembles

The three levels (universe, domain, instance) are those of the paper below, known to us from its abstract and
from summaries by others. The five terms, the reference teachers and the split of the gradient are our own.
Both decompositions are orthogonal and sum to the whole without remainder.

References:
    Tang et al., Understanding and Improving Knowledge Distillation, arXiv 2002.03532.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..labels import UNLABELLED
from ._rows import check_finite, check_matrix, check_same_shape, check_temperature
from .knowledge import Diagnosis, Knowledge, Pull, Terms

CHUNK = 1 << 20
"""Probabilities per chunk of rows, so that peak memory does not grow with the number of classes."""
FLOOR = 1e-6
"""Lower bound of the divisor ``1 - p_y``, which goes to 0 on rows that the student fits perfectly."""
IGNORED = -100
NEGLIGIBLE = 1e-12
"""A norm below this share of the other norm is rounding noise, and its direction means nothing."""

Spread = Callable[[Tensor, Tensor], Tensor]
"""Maps a teacher's probabilities ``(n, C)`` and labels ``(n,)`` to the probabilities of another teacher."""


def diagnose(
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    student_logits: Tensor | None = None,
    weight: float = 0.9,
    scale_by_temperature: bool = True,
    floor: float = FLOOR,
    ignore_index: int = IGNORED,
    references: bool = True,
) -> Diagnosis:
    r"""Split a teacher's departure from the labels into levels, and compare it with simpler teachers.

    Computes in float64, one chunk of rows at a time.

    Args:
        teacher_logits: Unnormalised log-scores of the training rows, ``(N, C)``; ``-inf`` is probability 0.
        target: Class indices, ``(N,)``; rows at ``ignore_index`` or `luce.UNLABELLED` are skipped.
        temperature: Temperature of the teacher's softmax. Positive, no unit.
        student_logits: Logits of the student that learns, ``(N, C)``, for instance at its start. None leaves
            `Knowledge.pull` None.
        weight: Weight of KD in ``(1 - weight) CE + weight KD``, in [0, 1]; used only with a student.
        scale_by_temperature: As in `luce.kd_loss`; used only with a student.
        floor: Lower bound of the divisor ``1 - p_y``; used only with a student.
        ignore_index: Label of rows to skip.
        references: Whether to measure the reference teachers too.
    Raises:
        ValueError: If a shape or value is wrong, a label is not a class, or no row has a label.
        TypeError: If a dtype is wrong.
    Example:
        >>> rho = torch.tensor([[0.7, 0.2, 0.1], [0.9, 0.06, 0.04], [0.3, 0.6, 0.1],
        ...                     [0.1, 0.8, 0.1], [0.05, 0.15, 0.8], [0.02, 0.18, 0.8]])
        >>> found = diagnose(rho.log(), torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> for name, value in found.teacher.terms.as_dict().items():
        ...     print(f"{name} {value:.6f}")
        universe 0.081667
        class_difficulty 0.003333
        class_relations 0.005083
        instance_confidence 0.010000
        instance_relations 0.002083
        >>> round(found.references["class_mean"].terms.instance_confidence, 6)
        0.0

    References:
        Tang et al., Understanding and Improving Knowledge Distillation, arXiv 2002.03532.
    """
    check_temperature(temperature)
    check_matrix("teacher_logits", teacher_logits)
    if not isinstance(target, Tensor) or target.shape != teacher_logits.shape[:1]:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"expected `target` with a label for each of {len(teacher_logits)} rows, got {got}")
    checks.check_target(target, teacher_logits.shape[:1], teacher_logits)
    if student_logits is not None:
        check_finite("student_logits", student_logits)
        check_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    if not 0 <= weight <= 1:
        raise ValueError(f"expected `weight` in [0, 1], got {weight!r}")
    checks.check_positive(floor=floor)

    kept = ((target != ignore_index) & (target != UNLABELLED)).nonzero().squeeze(1)
    if not len(kept):
        raise ValueError(f"expected rows with a label in `target`, got none in {len(target)} rows")
    labels = target[kept].long()
    if int(labels.min()) < 0 or int(labels.max()) >= teacher_logits.shape[1]:
        wrong = labels[(labels < 0) | (labels >= teacher_logits.shape[1])]
        raise checks.wrong_label(int(wrong[0]), teacher_logits.shape[1])
    rows = _Rows(
        teacher_logits.detach(),
        None if student_logits is None else student_logits.detach(),
        kept,
        labels,
        temperature,
        weight,
        weight * (temperature if scale_by_temperature else 1 / temperature),
        floor,
    )
    teacher = _measure(rows, lambda rho, _: rho)
    simpler: dict[str, Spread] = {}
    if references:
        means, missing = teacher.class_means, teacher.missing
        simpler = {
            "label_smoothing": lambda rho, y: _even(torch.full_like(rho[:, 0], missing), y, rho.shape[1]),
            "class_mean": lambda _, y: means[y],
            "true_prob": lambda rho, y: _even(_missing(rho, y), y, rho.shape[1]),
        }
    return Diagnosis(
        temperature=float(temperature),
        unlabelled=len(target) - len(kept),
        teacher=teacher,
        references={name: _measure(rows, spread) for name, spread in simpler.items()},
    )


@dataclass(frozen=True)
class _Rows:
    """The labelled rows, read in chunks and converted to float64."""

    teacher: Tensor
    student: Tensor | None
    kept: Tensor
    labels: Tensor
    temperature: float
    weight: float
    scale: float
    """Factor of KD's ``softmax(s/T) - rho``: ``weight * T``, or ``weight / T`` if KD is not scaled by T²."""
    floor: float

    def chunks(self, spread: Spread) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield a teacher's probabilities, the labels, and the student's logits."""
        size = max(1, CHUNK // self.teacher.shape[1])
        for at, labels in zip(self.kept.split(size), self.labels.split(size), strict=True):
            rho = (self.teacher[at].double() / self.temperature).softmax(-1)
            if bool(rho.isnan().any()):
                raise ValueError("expected `teacher_logits` to be finite or -inf, got NaN or +inf")
            yield spread(rho, labels), labels, None if self.student is None else self.student[at].double()


def _missing(rho: Tensor, labels: Tensor) -> Tensor:
    """Return ``1 - rho_y`` as the sum of the other classes.

    Subtracting from 1 would cancel to 0 where the teacher is confident.
    """
    # Rounding can carry the sum past 1, and `_even` would then give the label a negative probability.
    return rho.scatter(1, labels[:, None], 0.0).sum(-1).clamp(max=1.0)


def _even(missing: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return ``1 - missing`` at the label, and the rest in equal parts."""
    rho = (missing / (classes - 1))[:, None].expand(-1, classes)
    return rho.scatter(1, labels[:, None], (1 - missing)[:, None])


def _relation(rho: Tensor, missing: Tensor, labels: Tensor) -> Tensor:
    """Return the excess of each wrong class over an even share; 0 at the label."""
    return (rho - (missing / (rho.shape[1] - 1))[:, None]).scatter(1, labels[:, None], 0.0)


def _unevenness(rho: Tensor, missing: Tensor, labels: Tensor) -> Tensor:
    """Return ``M`` times the KL divergence of a row's spread over the wrong classes from an even one."""
    wrong = rho.scatter(1, labels[:, None], 0.0)
    share = wrong * (rho.shape[1] - 1) / torch.where(missing == 0, 1, missing)[:, None]
    return torch.special.xlogy(wrong, share).sum(-1).clamp(min=0)


def _measure(rows: _Rows, spread: Spread) -> Knowledge:
    classes, count = rows.teacher.shape[1], len(rows.labels)
    device = rows.teacher.device
    class_rows = torch.bincount(rows.labels, minlength=classes)
    occurring = class_rows.clamp(min=1).double()

    # Two passes, first means, then deviations from them: E[x²] - E[x]² would cancel for small variances.
    means = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    class_missing = torch.zeros(classes, dtype=torch.float64, device=device)
    unevenness = entropy = top = right = departure = 0.0
    label_probabilities = []
    for rho, y, _ in rows.chunks(spread):
        missing = _missing(rho, y)
        means.index_add_(0, y, rho)
        class_missing.index_add_(0, y, missing)
        unevenness += _unevenness(rho, missing, y).sum().item()
        entropy -= torch.special.xlogy(rho, rho).sum().item()
        highest = rho.max(-1)
        top += highest.values.sum().item()
        right += (highest.indices == y).sum().item()
        departure += (rho.scatter(1, y[:, None], 0.0).square().sum() + missing.square().sum()).item()
        label_probabilities.append(rho.gather(1, y[:, None]).squeeze(1))
    left_over = class_missing.sum().item()
    means, class_missing = means / occurring[:, None], class_missing / occurring

    all_classes = torch.arange(classes, device=device)
    factor, share, mean_missing = classes / (classes - 1), class_rows.double() / count, left_over / count
    class_relation = _relation(means, class_missing, all_classes)
    class_unevenness = _unevenness(means, class_missing, all_classes)
    within_missing = within_relation = 0.0
    for rho, y, _ in rows.chunks(spread):
        missing = _missing(rho, y)
        within_missing += (missing - class_missing[y]).square().sum().item()
        within_relation += (_relation(rho, missing, y) - class_relation[y]).square().sum().item()

    divisor = torch.where(class_missing == 0, 1, class_missing)  # a class without mass gives 0, not NaN
    class_nats = count * (share * class_unevenness).sum().item() / (left_over or 1.0)
    return Knowledge(
        rows=count,
        class_rows=class_rows,
        terms=Terms(
            universe=factor * mean_missing**2,
            class_difficulty=factor * (share * (class_missing - mean_missing).square()).sum().item(),
            class_relations=(share * class_relation.square().sum(-1)).sum().item(),
            instance_confidence=factor * within_missing / count,
            instance_relations=within_relation / count,
        ),
        departure=departure / count,
        smoothing=factor * mean_missing,
        entropy=entropy / count / math.log(classes),
        accuracy=right / count,
        top_probability=top / count,
        label_probabilities=torch.cat(label_probabilities),
        class_means=means,
        relations=means.scatter(1, all_classes[:, None], 0.0) / divisor[:, None],
        relation_divergence=class_unevenness / divisor,
        class_relation_nats=class_nats,
        # Non-negative by convexity of the KL divergence; rounding can make it slightly negative.
        instance_relation_nats=max(unevenness / (left_over or 1.0) - class_nats, 0.0),
        pull=None if rows.student is None else _pull(rows, spread, means, mean_missing),
    )


def _pull(rows: _Rows, spread: Spread, means: Tensor, mean_missing: float) -> Pull:
    classes, count = rows.teacher.shape[1], len(rows.labels)
    weights, confidence, losses = [], [], []
    floored = 0
    norms = dict.fromkeys(("cross_entropy", "universe", "domain", "instance"), 0.0)
    squares, products = dict(norms), dict(norms)
    for rho, y, student in rows.chunks(spread):
        assert student is not None
        at = y[:, None]
        p, soft = student.softmax(-1), (student / rows.temperature).softmax(-1)
        missing = _missing(p, y)
        floored += int((missing < rows.floor).sum())
        # rho_y - soft_y as a difference of the masses on other classes: the direct one cancels near 1.
        gain = _missing(soft, y) - _missing(rho, y)
        weights.append(1 - rows.weight + rows.scale * gain / missing.clamp(min=rows.floor))
        confidence.append(rho.gather(1, at).squeeze(1))
        losses.append(-student.log_softmax(-1).gather(1, at).squeeze(1))

        plain = p.scatter(1, at, -missing[:, None])
        universe = _even(torch.full_like(missing, mean_missing), y, classes)
        domain = means[y]
        parts = {
            "cross_entropy": plain,
            "universe": rows.scale * (soft - universe),
            "domain": rows.scale * (universe - domain),
            "instance": rows.scale * (domain - rho),
        }
        for name, part in parts.items():
            norms[name] += part.norm(dim=-1).sum().item()
            squares[name] += part.square().sum().item()
            products[name] += (part * plain).sum().item()
    all_weights = torch.cat(weights)
    return Pull(
        weights=all_weights,
        floored=floored,
        floor=rows.floor,
        negative=(all_weights < 0).double().mean().item(),
        correlation=_correlation(torch.cat(confidence), torch.cat(losses)),
        norms={name: value / count for name, value in norms.items()},
        cosines={
            name: _cosine(products[name], squares[name], squares["cross_entropy"])
            for name in ("universe", "domain", "instance")
        },
    )


def _cosine(product: float, square: float, other_square: float) -> float | None:
    """Return the cosine; None if one vector is rounding noise next to the other."""
    if min(square, other_square) <= NEGLIGIBLE**2 * max(square, other_square):
        return None
    return product / math.sqrt(square * other_square)


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Return the correlation; None if the deviations of either are rounding noise next to its values."""
    deviations = [values - values.mean() for values in (one, other)]
    squares = [values.square().sum().item() for values in deviations]
    for values, square in zip((one, other), squares, strict=True):
        if square <= NEGLIGIBLE**2 * values.square().sum().item():
            return None
    return (deviations[0] * deviations[1]).sum().item() / math.sqrt(squares[0] * squares[1])
