"""The papers' formulas in plain Python floats, row by row: written to be read, ignorant of PyTorch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Row = Sequence[float]


def log_sum_exp(x: Row) -> float:
    top = max(x)
    return top + math.log(math.fsum(math.exp(v - top) for v in x))


def log_softmax(x: Row, temperature: float = 1.0) -> list[float]:
    x = [v / temperature for v in x]
    return [v - log_sum_exp(x) for v in x]


def softmax(x: Row, temperature: float = 1.0) -> list[float]:
    return [math.exp(v) for v in log_softmax(x, temperature)]


def kl(log_p: Row, log_q: Row) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def divergence(p: Row, q: Row) -> float:
    """KL divergence of probabilities."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dot(a: Row, b: Row) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def split(p: Row) -> list[float]:
    """The first class against all others together."""
    return [p[0], 1 - p[0]]


def cross_entropy(s: Row, y: int, label_smoothing: float = 0.0) -> float:
    log_q = log_softmax(s)
    return -(1 - label_smoothing) * log_q[y] - label_smoothing * statistics.fmean(log_q)


def kd(s: Row, t: Row, temperature: float = 1.0) -> float:
    return temperature**2 * kl(log_softmax(t, temperature), log_softmax(s, temperature))


def jsd(s: Row, t: Row, beta: float = 0.5, temperature: float = 1.0) -> float:
    log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
    log_m = [
        math.log(beta * math.exp(a) + (1 - beta) * math.exp(b)) for a, b in zip(log_p, log_q, strict=True)
    ]
    return temperature**2 * (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))


def tckd(s: Row, t: Row, y: int, temperature: float = 1.0) -> float:
    """KL of (p_y, 1 - p_y) against (q_y, 1 - q_y), without the square of the temperature."""

    def target_and_rest(x: Row) -> list[float]:
        log_probs = log_softmax(x, temperature)
        return [log_probs[y], log_sum_exp(log_probs[:y] + log_probs[y + 1 :])]

    return kl(target_and_rest(t), target_and_rest(s))


def nckd(s: Row, t: Row, y: int, temperature: float = 1.0) -> float:
    """KL among the classes other than the label, without the square of the temperature."""
    s, t = [*s[:y], *s[y + 1 :]], [*t[:y], *t[y + 1 :]]
    return kl(log_softmax(t, temperature), log_softmax(s, temperature))


def dkd(s: Row, t: Row, y: int, alpha: float, beta: float, temperature: float) -> float:
    return temperature**2 * (alpha * tckd(s, t, y, temperature) + beta * nckd(s, t, y, temperature))


def logit_matching(s: Row, t: Row) -> float:
    return statistics.fmean((a - b) ** 2 for a, b in zip(s, t, strict=True))


def logit_matching_limit(s: Row, t: Row) -> float:
    """Where KD tends as its temperature grows."""
    d = [a - b for a, b in zip(s, t, strict=True)]
    return math.fsum(v * v for v in d) / (2 * len(d)) - statistics.fmean(d) ** 2 / 2


def dist_terms(s: Sequence[Row], t: Sequence[Row], temperature: float) -> tuple[float, float]:
    """One minus the mean correlation within rows, and across the rows for each class."""
    q, p = ([softmax(row, temperature) for row in x] for x in (s, t))
    within = [statistics.correlation(a, b) for a, b in zip(q, p, strict=True)]
    across = [
        statistics.correlation(a, b) for a, b in zip(zip(*q, strict=True), zip(*p, strict=True), strict=True)
    ]
    return 1 - statistics.fmean(within), 1 - statistics.fmean(across)


def ranking(t: Row, y: int | None = None) -> list[int]:
    """The label, if there is one, then the others by falling teacher logit, the lower index first."""
    order = sorted(range(len(t)), key=lambda i: (-t[i], i))
    return order if y is None else [y, *(i for i in order if i != y)]


def stage_costs(s: Row, order: Sequence[int]) -> list[float]:
    """Minus the log-probability that each class is chosen among itself and those behind it."""
    return [log_sum_exp([s[i] for i in order[k:]]) - s[order[k]] for k in range(len(order))]


def ranking_cost(s: Row, order: Sequence[int], weights: Row) -> float:
    return math.fsum(a * cost for a, cost in zip(weights, stage_costs(s, order), strict=False))


def ranking_gradient(s: Row, order: Sequence[int], weights: Row) -> list[float]:
    """Sum over the stages of weight times (softmax over the suffix, minus one at the chosen class)."""
    gradient = [0.0] * len(s)
    for k, weight in enumerate(weights):
        for i, share in zip(order[k:], softmax([s[i] for i in order[k:]]), strict=True):
            gradient[i] += weight * share
        gradient[order[k]] -= weight
    return gradient


def pld_weights(t: Row, order: Sequence[int], temperature: float = 1.0) -> list[float]:
    probs = softmax(t, temperature)
    return [probs[i] for i in order]


def pld(s: Row, t: Row, y: int | None, temperature: float = 1.0, top_k: int | None = None) -> float:
    order = ranking(t, y)
    return ranking_cost(s, order, pld_weights(t, order, temperature)[:top_k])


def pld_gradient(
    s: Row, t: Row, y: int | None, temperature: float = 1.0, top_k: int | None = None
) -> list[float]:
    order = ranking(t, y)
    return ranking_gradient(s, order, pld_weights(t, order, temperature)[:top_k])


def listmle(s: Row, t: Row, y: int | None = None) -> float:
    return math.fsum(stage_costs(s, ranking(t, y)))


def p_listmle(s: Row, t: Row, y: int | None = None, *, normalize: bool) -> float:
    classes = len(s)
    weights = [2.0 ** (classes - k) - 1 for k in range(1, classes + 1)]
    cost = ranking_cost(s, ranking(t, y), weights)
    return cost / sum(weights) if normalize else cost


def listnet(s: Row, t: Row, temperature: float = 1.0) -> float:
    p, log_q = softmax(t, temperature), log_softmax(s, temperature)
    return -math.fsum(a * b for a, b in zip(p, log_q, strict=True))
