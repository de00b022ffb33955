"""Losses that break one law each, and sound losses that obey it.

Each defect was reported for public code; the laws name the reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Mutant:
    """A broken loss, the law that must catch it, and a sound loss that obeys the law."""

    law: str
    broken: Callable[..., Any]
    sound: Callable[..., Any]
    against: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.law}: {self.broken.__name__}"


def rows_of_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    q, p = (x / temperature for x in (student_logits, teacher_logits))
    return F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    return temperature**2 * rows_of_kl(student_logits, teacher_logits, temperature).mean()


def kd_detached(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kd(student_logits, teacher_logits.detach())


def kd_with_labels(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 1.0):
    distilled = temperature**2 * rows_of_kl(student_logits, teacher_logits, temperature).mean()
    return 0.5 * F.cross_entropy(student_logits, target) + 0.5 * distilled


def masked_kd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    keep = target != IGNORED
    return rows_of_kl(student_logits[keep], teacher_logits[keep]).sum() / keep.sum().clamp_min(1)


def kd_of_existing_classes(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    missing = (student_logits == -torch.inf) & (teacher_logits == -torch.inf)
    log_q, log_p = (x.log_softmax(-1).masked_fill(missing, 0) for x in (student_logits, teacher_logits))
    return (log_p.exp() * (log_p - log_q)).masked_fill(missing, 0).sum(-1).mean()


def kd_of_an_empty_batch_too(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return rows_of_kl(student_logits, teacher_logits).sum() / max(len(student_logits), 1)


def listmle(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    ordered = student_logits.gather(-1, teacher_logits.argsort(-1, descending=True))
    return (ordered.flip(-1).logcumsumexp(-1).flip(-1) - ordered).sum(-1).mean()


def terms(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    parts = {"task": F.cross_entropy(student_logits, target), "kd": kd(student_logits, teacher_logits)}
    return {**parts, "loss": parts["task"] + parts["kd"]}


def truncated(student_logits: Tensor, teacher_logits: Tensor, top_k: int | None = None) -> Tensor:
    """KL over the teacher's top classes and one bucket for the rest."""
    k = student_logits.shape[-1] if top_k is None else top_k
    chosen = teacher_logits.topk(k).indices
    log_q, log_p = (x.log_softmax(-1).gather(-1, chosen) for x in (student_logits, teacher_logits))
    tail_q, tail_p = ((1 - x.exp().sum(-1)).clamp_min(1e-12) for x in (log_q, log_p))
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + tail_p * (tail_p / tail_q).log()).mean()


# Broken losses, in the order of the laws


def gradient_two_percent_small(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    value = kd(student_logits, teacher_logits)
    return 0.98 * value + 0.02 * value.detach()


def probabilities_kept_in_8_bits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    p = teacher_logits.softmax(-1)
    if p.dtype in (torch.bfloat16, torch.float16):
        p = p.to(torch.float8_e5m2).to(p.dtype)
    return -(p * student_logits.log_softmax(-1)).sum(-1).mean()


def exp_without_its_maximum(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q = student_logits - student_logits.exp().sum(-1, keepdim=True).log()
    return -(teacher_logits.softmax(-1) * log_q).sum(-1).mean()


def divided_by_a_square_root(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    def normalised(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-7)

    return kd(normalised(student_logits), normalised(teacher_logits))


def memory_taken_for_contiguous(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kd(student_logits.as_strided(student_logits.shape, (student_logits.shape[1], 1)), teacher_logits)


def maximum_taken_off_in_place(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    teacher_logits -= teacher_logits.amax(-1, keepdim=True)
    return kd(student_logits, teacher_logits)


def rows_weighted_by_their_place(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    values = rows_of_kl(student_logits, teacher_logits)
    return (values * torch.linspace(1, 2, len(values), dtype=values.dtype)).mean()


def student_padded_with_zeros(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    missing = teacher_logits.shape[-1] - student_logits.shape[-1]
    return kd(F.pad(student_logits, (0, max(missing, 0))), teacher_logits)


def task_without_a_gradient(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor
) -> dict[str, Tensor]:
    return terms(student_logits, teacher_logits, target) | {
        "task": F.cross_entropy(student_logits.detach(), target)
    }


def a_term_left_out_of_the_sum(student_logits: Tensor, teacher_logits: Tensor, target: Tensor):
    parts = terms(student_logits, teacher_logits, target)
    return parts | {"loss": parts["kd"]}


def one_class_fewer(student_logits: Tensor, teacher_logits: Tensor, top_k: int | None = None) -> Tensor:
    if top_k is None:
        return truncated(student_logits, teacher_logits)
    keep = teacher_logits.argsort(-1, descending=True)[:, : max(top_k - 1, 1)]
    return kd(student_logits.gather(-1, keep), teacher_logits.gather(-1, keep))


def fused_without_the_factor(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return 0.5 * kd(student_logits, teacher_logits)


def logits_pulled_to_zero(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kd(student_logits, teacher_logits) + 1e-3 * student_logits.square().mean()


def student_off_by_one_class(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kd(student_logits[:, 1:], teacher_logits[:, 1:])


def mean_over_elements(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return F.kl_div(student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="mean")


def sum_over_rows(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return rows_of_kl(student_logits, teacher_logits).sum()


def shifted_mask(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    return masked_kd(student_logits, teacher_logits, target.roll(1))


def mean_over_all_rows(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    return (rows_of_kl(student_logits, teacher_logits) * (target != IGNORED)).mean()


def masked_by_a_product(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    keep = target != IGNORED
    return (rows_of_kl(student_logits, teacher_logits) * keep).sum() / keep.sum().clamp_min(1)


def divided_by_no_rows(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    keep = target != IGNORED
    return rows_of_kl(student_logits[keep], teacher_logits[keep]).sum() / keep.sum()


def no_squared_temperature(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    return rows_of_kl(student_logits, teacher_logits, temperature).mean()


def squared_temperature_on_the_task(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    distilled = rows_of_kl(student_logits, teacher_logits, temperature).mean()
    return 0.5 * temperature**2 * F.cross_entropy(student_logits, target) + 0.5 * distilled


def squared_temperature_on_both(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    return temperature**2 * kd_with_labels(student_logits, teacher_logits, target, temperature)


def truncated_without_a_tail(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    chosen = teacher_logits.topk(2).indices
    log_q, log_p = (x.log_softmax(-1).gather(-1, chosen) for x in (student_logits, teacher_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def epsilon_in_the_log(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    q, p = student_logits.softmax(-1), teacher_logits.softmax(-1)
    return (p * (p.log() - (q + 1e-8).log())).sum(-1).mean()


def epsilon_in_the_suffix_sums(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    ordered = student_logits.gather(-1, teacher_logits.argsort(-1, descending=True))
    ordered = ordered - ordered.amax(-1, keepdim=True)
    return ((ordered.exp().flip(-1).cumsum(-1).flip(-1) + 1e-10).log() - ordered).sum(-1).mean()


MUTANTS = (
    Mutant("gradient", gradient_two_percent_small, kd),
    Mutant("low_precision", probabilities_kept_in_8_bits, kd),
    Mutant("huge_logits", exp_without_its_maximum, kd),
    Mutant("nothing_to_learn", divided_by_a_square_root, kd),
    Mutant("layout", memory_taken_for_contiguous, kd),
    Mutant("inputs_unchanged", maximum_taken_off_in_place, kd),
    Mutant("row_order", rows_weighted_by_their_place, kd),
    Mutant("unequal_classes", student_padded_with_zeros, kd),
    Mutant("terms", task_without_a_gradient, terms),
    Mutant("terms", a_term_left_out_of_the_sum, terms),
    Mutant("top_k_limit", one_class_fewer, truncated),
    Mutant("implementations", fused_without_the_factor, kd, against=kd),
    Mutant("shift_invariant", logits_pulled_to_zero, kd),
    Mutant("class_order", student_off_by_one_class, kd),
    Mutant("vanishing_classes", mean_over_elements, kd),
    Mutant("excluded_classes", kd, kd_of_existing_classes),
    Mutant("micro_batches", sum_over_rows, kd),
    Mutant("ignored_rows", shifted_mask, masked_kd),
    Mutant("ignored_rows", mean_over_all_rows, masked_kd),
    Mutant("ignored_nan", masked_by_a_product, masked_kd),
    Mutant("all_ignored", divided_by_no_rows, masked_kd),
    Mutant("empty_batch", kd, kd_of_an_empty_batch_too),
    Mutant("temperature_scaled", no_squared_temperature, kd),
    Mutant("temperature_scaled", squared_temperature_on_the_task, kd_with_labels),
    Mutant("temperature_scaled", squared_temperature_on_both, kd_with_labels),
    Mutant("non_negative", truncated_without_a_tail, kd),
    Mutant("zero_at_equality", epsilon_in_the_log, kd),
    Mutant("settled_choice", epsilon_in_the_suffix_sums, listmle),
    Mutant("log_tail", epsilon_in_the_log, kd),
    Mutant("detached_teacher", kd, kd_detached),
)
