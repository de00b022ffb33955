"""Every loss with the options and properties that the battery holds it to. A new loss is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, inf, log, tanh
from statistics import correlation, stdev
from typing import Any

import torch
from torch import Tensor

import luce
from luce.losses import LogitLoss

from .formulas import divergence, dot, softmax, split

UNLABELLED = luce.UNLABELLED
IGNORED = -100


S, T = (log(2), 0.0, 0.0), (0.0, log(4), log(3))
Q, P = (1 / 2, 1 / 4, 1 / 4), (1 / 8, 1 / 2, 3 / 8)
"""The example of the golden values: logits of student and teacher, and their softmax. The label is 0."""


@dataclass(frozen=True)
class Golden:
    """A value of the example, as arithmetic: of logits S and T, or Q and P, and label 0."""

    value: float
    options: dict[str, Any] = field(default_factory=dict)
    student: tuple[float, ...] = S


@dataclass(frozen=True)
class Loss:
    """One loss function, its module and what is promised about it.

    Attributes:
        golden: One value by hand.
        laws: The laws of `luce check` that hold of this loss beyond those of every loss.
        inf_if_student_excludes: Infinite where the label is at -inf in the student alone.
        inf_if_teacher_excludes: Infinite where another class is at -inf in the teacher alone.
        options: Sets of options; the battery runs every one of them.
        bad_options: Option to a value that must be refused.
        needs_label: Rows without a label do not count.
        uses_label: The value depends on the label.
        couples_rows: A row's value depends on the other rows.
        grows_with_rows: And is a sum over them, not a mean.
        shift_invariant: Blind to a constant added to a row, of either network.
        zero_at_equality: 0 when the student has the teacher's logits.
        has_margin: 0 for other students too: those that have the teacher's order by a margin.
        ranks: Sees the teacher's logits as a ranking, so that a rounding may reorder near ties.
        scale_blind: Sees each row in units of its spread, and so not the scale of the student's logits.
        detached: Weighs by something of the student's that gets no gradient, so that differences of the
            value are not the gradient.
    """

    function: Callable[..., Tensor]
    module: type[LogitLoss]
    golden: Golden = field(kw_only=True)
    options: tuple[dict[str, Any], ...] = ({},)
    bad_options: tuple[tuple[str, Any], ...] = ()
    needs_label: bool = False
    uses_label: bool = False
    couples_rows: bool = False
    grows_with_rows: bool = False
    shift_invariant: bool = True
    zero_at_equality: bool = False
    has_margin: bool = False
    ranks: bool = False
    scale_blind: bool = False
    detached: bool = False
    laws: tuple[str, ...] = ()
    inf_if_student_excludes: bool = False
    inf_if_teacher_excludes: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__


TEMPERATURES = (("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan")))
SOFTENED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 4.0},
    {"temperature": 2.5, "scale_by_temperature": False},
    {"temperature": 2.0, "backend": "reference"},
    {"temperature": inf},
)

LOSSES = (
    Loss(
        luce.cross_entropy_loss,
        luce.CrossEntropyLoss,
        options=({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "backend": "reference"}),
        bad_options=(("label_smoothing", 1.0), ("label_smoothing", -0.1)),
        needs_label=True,
        uses_label=True,
        golden=Golden(log(2)),
        laws=("vanishing_classes", "settled_choice", "log_tail"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.kd_loss,
        luce.KDLoss,
        SOFTENED,
        TEMPERATURES,
        zero_at_equality=True,
        golden=Golden(divergence(P, Q)),
        laws=("vanishing_classes", "log_tail", "temperature_scaled"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.reverse_kl_loss,
        luce.ReverseKLLoss,
        SOFTENED,
        TEMPERATURES,
        zero_at_equality=True,
        golden=Golden(divergence(Q, P)),
        laws=("vanishing_classes", "temperature_scaled"),
        inf_if_teacher_excludes=True,
    ),
    Loss(
        luce.jsd_loss,
        luce.JSDLoss,
        options=(
            {},
            {"beta": 0.1, "temperature": 2.0},
            {"temperature": 3.0, "scale_by_temperature": False},
            {"beta": 0.3, "backend": "reference"},
            {"beta": 0.3, "temperature": inf},
        ),
        bad_options=(*TEMPERATURES, ("beta", 0.0), ("beta", 1.0), ("beta", -0.5)),
        zero_at_equality=True,
        golden=Golden((divergence(P, [5 / 16, 3 / 8, 5 / 16]) + divergence(Q, [5 / 16, 3 / 8, 5 / 16])) / 2),
        laws=("vanishing_classes", "temperature_scaled"),
    ),
    Loss(
        luce.dkd_loss,
        luce.DKDLoss,
        options=(
            {},
            {"alpha": 0.5, "beta": 2.0, "temperature": 1.0},
            {"scale_by_temperature": False},
            {"backend": "reference"},
        ),
        bad_options=(*TEMPERATURES, ("temperature", inf), ("alpha", -1.0), ("beta", -1.0)),
        needs_label=True,
        uses_label=True,
        zero_at_equality=True,
        golden=Golden(
            divergence([1 / 8, 7 / 8], [1 / 2, 1 / 2]) + 8 * divergence([4 / 7, 3 / 7], [1 / 2, 1 / 2]),
            {"temperature": 1.0},
        ),
        laws=("vanishing_classes", "log_tail", "temperature_scaled"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.pld_loss,
        luce.PLDLoss,
        options=(
            {},
            {"teacher_temperature": 2.0},
            {"top_k": 1},
            {"top_k": 3},
            {"epsilon": 0.05},
            {"ties": "average"},
            {"tolerance": 0.0, "backend": "reference"},
        ),
        bad_options=(
            ("teacher_temperature", 0.0),
            ("teacher_temperature", -1.0),
            ("teacher_temperature", float("nan")),
            ("top_k", 0),
            ("top_k", -1),
            ("top_k", 1.5),
            ("top_k", True),
            ("epsilon", 0.0),
            ("epsilon", 1.0),
            ("tolerance", -1.0),
            ("ties", "first"),
            ("backend", "fast"),
        ),
        uses_label=True,
        ranks=True,
        golden=Golden(1 / 8 * log(4 / 2) + 1 / 2 * log(2 / 1)),
        laws=("vanishing_classes", "settled_choice", "log_tail"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.listmle_loss,
        luce.ListMLELoss,
        uses_label=True,
        ranks=True,
        golden=Golden(log(4 / 2) + log(2 / 1)),
        laws=("settled_choice", "log_tail"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.p_listmle_loss,
        luce.PListMLELoss,
        options=({}, {"normalize": False}),
        uses_label=True,
        ranks=True,
        golden=Golden((3 * log(4 / 2) + 1 * log(2 / 1)) / (3 + 1)),
        laws=("settled_choice", "log_tail"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.listnet_loss,
        luce.ListNetLoss,
        ({}, {"temperature": 2.0}),
        TEMPERATURES,
        golden=Golden(1 / 8 * log(2) + 1 / 2 * log(4) + 3 / 8 * log(4)),
        laws=("vanishing_classes", "log_tail"),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.logit_matching_loss,
        luce.LogitMatchingLoss,
        options=({}, {"center": True}),
        shift_invariant=False,
        zero_at_equality=True,
        golden=Golden((log(2) ** 2 + log(4) ** 2 + log(3) ** 2) / 3),
        inf_if_student_excludes=True,
        inf_if_teacher_excludes=True,
    ),
    Loss(
        luce.dist_loss,
        luce.DISTLoss,
        options=(
            {},
            {"beta": 1.0, "gamma": 0.0, "temperature": 1.0},
            {"gamma": 1.0, "scale_by_temperature": False},
        ),
        bad_options=(*TEMPERATURES, ("beta", -1.0), ("gamma", -1.0)),
        couples_rows=True,
        zero_at_equality=True,
        golden=Golden(1 - correlation(Q, P), {"beta": 1.0, "gamma": 0.0, "temperature": 1.0}),
    ),
    Loss(
        luce.normkd_loss,
        luce.NormKDLoss,
        options=({}, {"t_norm": 1.0, "unbiased": False}),
        bad_options=(("t_norm", 0.0), ("t_norm", -1.0), ("t_norm", float("nan"))),
        zero_at_equality=True,
        scale_blind=True,
        golden=Golden(
            stdev(T) ** 2 * divergence(softmax(T, stdev(T)), softmax(S, stdev(S))), {"t_norm": 1.0}
        ),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.normdkd_loss,
        luce.NormDKDLoss,
        options=({}, {"alpha": 4.0, "beta": 5.0, "t_norm": 1.0, "unbiased": False}),
        bad_options=(("t_norm", 0.0), ("alpha", -1.0), ("beta", -1.0)),
        needs_label=True,
        uses_label=True,
        zero_at_equality=True,
        scale_blind=True,
        golden=Golden(
            stdev(T) ** 2 * divergence(split(softmax(T, stdev(T))), split(softmax(S, stdev(S)))),
            {"t_norm": 1.0, "beta": 0.0},
        ),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.nkd_loss,
        luce.NKDLoss,
        options=({}, {"gamma": 3.5, "temperature": 3.0}),
        bad_options=(*TEMPERATURES, ("gamma", -1.0)),
        needs_label=True,
        uses_label=True,
        golden=Golden(1 / 8 * log(2) + 1.5 * (4 / 7 + 3 / 7) * log(2)),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.tvd_loss,
        luce.TVDLoss,
        ({}, {"temperature": 2.5}),
        TEMPERATURES,
        zero_at_equality=True,
        golden=Golden((3 / 8 + 1 / 4 + 1 / 8) / 2),
    ),
    Loss(
        luce.wsld_loss,
        luce.WSLDLoss,
        options=({}, {"temperature": 1.0}, {"temperature": 2.5, "scale_by_temperature": False}),
        bad_options=TEMPERATURES,
        needs_label=True,
        uses_label=True,
        zero_at_equality=True,
        detached=True,
        golden=Golden((1 - exp(-log(2) / (log(8) + 1e-7))) * divergence(P, Q), {"temperature": 1.0}),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.tfkd_loss,
        luce.TfKDLoss,
        options=(
            {},
            {"correct_probability": 0.9, "temperature": 4.0},
            {"temperature": 2.5, "scale_by_temperature": False},
        ),
        bad_options=(*TEMPERATURES, ("correct_probability", 0.0), ("correct_probability", 1.0)),
        needs_label=True,
        uses_label=True,
        golden=Golden(divergence([0.8, 0.1, 0.1], Q), {"correct_probability": 0.8, "temperature": 1.0}),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.partial_kd_loss,
        luce.PartialKDLoss,
        options=(
            {},
            {"temperature": 4.0, "scale_by_temperature": False},
            {"keep": "uniform", "temperature": 2.0, "label_smoothing": 0.2},
            {"keep": "topk", "top_k": 2},
            {"keep": "topk", "top_k": 0.4, "always_keep_true": True},
        ),
        bad_options=(
            *TEMPERATURES,
            ("keep", "nothing"),
            ("label_smoothing", 1.0),
            ("label_smoothing", -0.1),
            ("top_k", 0),
            ("top_k", -1),
            ("top_k", 1.5),
            ("top_k", 0.0),
            ("top_k", True),
        ),
        needs_label=True,
        uses_label=True,
        golden=Golden(divergence([1 / 8, 7 / 16, 7 / 16], Q)),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.decomposed_kd_loss,
        luce.DecomposedKDLoss,
        options=(
            {},
            {"temperature": 4.0},
            {
                "guidance_weight": 0.5,
                "smooth_weight": 2.0,
                "relation_weight": 1.5,
                "scale_by_temperature": False,
            },
        ),
        bad_options=(
            *TEMPERATURES,
            ("guidance_weight", -1.0),
            ("smooth_weight", -1.0),
            ("relation_weight", -1.0),
        ),
        needs_label=True,
        uses_label=True,
        golden=Golden(2 / 8 * log(2) + 1 / 2 * log(4) + 3 / 8 * log(4), {"guidance_weight": 2.0}),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.mlld_loss,
        luce.MLLDLoss,
        options=(
            {},
            {"temperatures": (1.0, 4.0), "instance_weight": 0.5, "batch_weight": 2.0, "class_weight": 0.1},
        ),
        bad_options=(
            ("temperatures", ()),
            ("temperatures", 4.0),
            ("temperatures", (2.0, 0.0)),
            ("instance_weight", -1.0),
            ("batch_weight", -1.0),
            ("class_weight", -1.0),
        ),
        couples_rows=True,
        grows_with_rows=True,
        zero_at_equality=True,
        golden=Golden(
            divergence(P, Q)
            + (dot(P, P) - dot(Q, Q)) ** 2
            + (dot(P, P) ** 2 + dot(Q, Q) ** 2 - 2 * dot(P, Q) ** 2) / 3,
            {"temperatures": (1.0,)},
        ),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.rkkd_loss,
        luce.RKKDLoss,
        options=(
            {},
            {"form": "sign_tanh", "steepness": 0.3},
            {"form": "product", "steepness": 0.1},
            {"form": "sigmoid", "steepness": 2.0, "backend": "reference"},
            {"form": "clip", "steepness": 0.05},
            {"channels": "top", "share": 3},
            {"channels": "bottom", "share": 0.7},
        ),
        bad_options=(
            ("form", "kendall"),
            ("steepness", 0.0),
            ("steepness", float("inf")),
            ("channels", "middle"),
            ("share", 0.0),
            ("share", 1.5),
            ("share", float("nan")),
            ("share", 1),
            ("share", True),
            ("backend", "fast"),
        ),
        ranks=True,
        golden=Golden(1 + (tanh(log(4)) * tanh(log(2)) + tanh(log(3)) * tanh(log(2))) / 3),
    ),
    Loss(
        luce.ranking_hinge_loss,
        luce.RankingHingeLoss,
        options=({}, {"margin": 5.0}),
        bad_options=(("margin", 0.0), ("margin", -1.0), ("margin", float("nan"))),
        has_margin=True,
        ranks=True,
        golden=Golden(((1 + log(2)) + (1 + log(2)) + 1) / 3),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.ranking_logistic_loss,
        luce.RankingLogisticLoss,
        options=({}, {"steepness": 0.3}),
        bad_options=(("steepness", 0.0), ("steepness", -1.0), ("steepness", float("inf"))),
        ranks=True,
        golden=Golden((log(1 + 2) + log(1 + 2) + log(1 + 1)) / 3),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.rankdistil_loss,
        luce.RankDistilLoss,
        options=(
            {"seed": 0},
            {"top_k": 2, "sample_size": 3, "seed": 1},
            {"temperature": 2.0, "seed": 2},
        ),
        bad_options=(
            *TEMPERATURES,
            ("top_k", 0),
            ("top_k", 1.5),
            ("sample_size", 0),
            ("sample_size", 2.5),
            ("sample_size", True),
            ("seed", 0.5),
            ("seed", True),
        ),
        ranks=True,
        golden=Golden(log(3) + log(2), student=(0.0, 0.0, 0.0)),
        inf_if_student_excludes=True,
    ),
    Loss(
        luce.hard_label_loss,
        luce.HardLabelLoss,
        ({}, {"backend": "reference"}),
        ranks=True,
        golden=Golden(log(4)),
        laws=("vanishing_classes",),
    ),
)

OF_THEIR_OWN = {luce.CTKDLoss, luce.Standardized}
"""Modules that are more than a function with its options stored; their own tests hold them to the same."""


@dataclass(frozen=True)
class Case:
    """A loss with one set of options, called alike whether or not it looks at the teacher."""

    loss: Loss
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shift_invariant(self) -> bool:
        """As the loss is, or made so by its options."""
        return self.loss.shift_invariant or self.options.get("center", False)

    @property
    def limit(self) -> bool:
        """At an infinite temperature, where any class that one network alone excludes costs +inf."""
        return self.options.get("temperature") == inf

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, **more: Any) -> Tensor:
        logits = (student, teacher) if self.loss.module.takes_teacher else (student,)
        return self.loss.function(*logits, target, **{**self.options, **more})

    def grad(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, **more: Any) -> Tensor:
        """Gradient of the value, summed if there are several, towards a copy of the student's logits."""
        student = student.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(self(student, teacher, target, **more).sum(), student)
        return grad

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.loss.name}[{options}]" if options else self.loss.name


CASES = tuple(Case(loss, options) for loss in LOSSES for options in loss.options)
DEFAULTS = tuple(Case(loss, loss.options[0]) for loss in LOSSES)
BY_ROW = tuple(case for case in CASES if not case.loss.couples_rows)


def batch(
    *rows: int, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0
):
    """Random ``(student, teacher, target)``: logits ``(*rows, classes)`` and labels of the shape ``rows``."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *rows, classes, generator=random, dtype=torch.float64)
    target = torch.randint(classes, rows, generator=random)
    return student.to(dtype), teacher.to(dtype), target
