"""Means, spreads and paired differences over seeds, with intervals and corrected p-values.

Two runs with the same seed share their initial weights and the order of their data, so methods are compared
seed by seed: the difference within a pair has far less noise than the difference of two means. Intervals are
Student's t at 95%, one comparison at a time. Claims are stricter: a difference is beyond noise if its
p-value is below 0.05 after Holm's correction for all comparisons of its setting. These are each method
against the baseline and PLD against each method. `verdict` can name any of them, so correcting for fewer
would let it present the luckiest of several chance differences as progress.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .runs import Comparison, Run, Setting

FOCUS = "PLD"
LEVEL = 0.95
METRICS = ("accuracy", "nll", "calibration_error", "agreement", "kl", "kendall_tau", "topk_overlap")
# Two different accuracies differ by at least 1e-6 (one of a million test rows); a smaller spread is rounding.
ROUNDING = 1e-12

At = Literal["last", "best"]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of ``count`` seeds; the deviation is None for a single one."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Test accuracy of ``method`` minus that of ``reference``, paired by seed; fractions, not points.

    ``low`` and ``high`` (the 95% interval) are None below two pairs; ``mean`` is NaN without a pair.
    ``pvalue`` is None if the t test is undefined: below two pairs, or with the same difference in every pair.
    ``adjusted`` is the p-value after Holm's correction.
    """

    method: str
    reference: str
    mean: float
    low: float | None
    high: float | None
    pvalue: float | None
    adjusted: float | None
    each: tuple[float, ...]

    @property
    def beyond_noise(self) -> bool:
        """Whether the adjusted p-value is below 0.05."""
        return self.adjusted is not None and self.adjusted < 1 - LEVEL


@dataclass(frozen=True)
class SettingSummary:
    """The figures of one setting: ``spreads[method][metric]`` and ``differences[method, reference]``."""

    setting: Setting
    spreads: Mapping[str, Mapping[str, Spread]]
    differences: Mapping[tuple[str, str], Difference]

    def accuracy(self, method: str) -> float:
        """Return the mean test accuracy, in [0, 1]."""
        return self.spreads[method]["accuracy"].mean


@dataclass(frozen=True)
class Summary:
    """All settings of a comparison, after the last or the best epoch."""

    at: At
    baseline: str
    settings: tuple[SettingSummary, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return mean, sample standard deviation and count.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        Spread(mean=2.0, deviation=1.0, count=3)
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def paired_difference(
    method: str, values: Mapping[int, float], reference: str, reference_values: Mapping[int, float]
) -> Difference:
    """Return the difference over shared seeds, with its 95% t interval and two-sided p-value.

    Args:
        method, reference: Names of the two methods.
        values, reference_values: Test accuracy, in [0, 1], by seed.

    Example:
        >>> paired_difference("PLD", {0: 0.5, 1: 0.75}, "KD", {0: 0.25, 1: 0.5}).mean
        0.25
    """
    from scipy import stats

    each = tuple(values[seed] - reference_values[seed] for seed in sorted(values.keys() & reference_values))
    if len(each) < 2:
        mean = each[0] if each else math.nan
        return Difference(method, reference, mean, None, None, None, None, each)
    pairs = spread(each)
    error = (pairs.deviation or 0.0) / math.sqrt(pairs.count)
    # Without spread the t statistic is 0/0 or infinite: equal results count as p = 1, others have no p-value.
    if error < ROUNDING:
        pvalue = 1.0 if abs(pairs.mean) < ROUNDING else None
        return Difference(method, reference, pairs.mean, pairs.mean, pairs.mean, pvalue, None, each)
    student = stats.t(pairs.count - 1)
    margin = float(student.ppf((1 + LEVEL) / 2)) * error
    pvalue = 2 * float(student.sf(abs(pairs.mean) / error))
    return Difference(
        method, reference, pairs.mean, pairs.mean - margin, pairs.mean + margin, pvalue, None, each
    )


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, which bound the chance of any false claim among them.

    Example:
        >>> holm([0.25, 0.125])
        [0.25, 0.25]
    """
    adjusted = [0.0] * len(pvalues)
    largest = 0.0  # the running maximum keeps a larger p-value from ending below a smaller one
    for rank, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        largest = max(largest, (len(pvalues) - rank) * pvalues[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def summarise(comparison: Comparison, at: At = "last") -> Summary:
    """Return every figure of a comparison.

    Args:
        comparison: From `read_comparison`.
        at: ``"last"``, the last epoch, or ``"best"``, the epoch chosen on validation rows.
    """
    return Summary(at, comparison.baseline, tuple(_setting(comparison, s, at) for s in comparison.settings))


def _setting(comparison: Comparison, setting: Setting, at: At) -> SettingSummary:
    runs = {method: seeds for method, seeds in comparison.runs[setting.name].items() if seeds}
    spreads = {method: _spreads(seeds, at) for method, seeds in runs.items()}
    accuracy = {
        method: {run.seed: getattr(run, at).test.accuracy for run in seeds} for method, seeds in runs.items()
    }
    baseline = comparison.baseline
    pairs = [(method, baseline) for method in runs if method != baseline and baseline in runs]
    if FOCUS in runs and baseline != FOCUS:
        pairs += [(FOCUS, method) for method in runs if method not in (FOCUS, baseline)]
    differences = [paired_difference(a, accuracy[a], b, accuracy[b]) for a, b in pairs]
    tested = [difference for difference in differences if difference.pvalue is not None]
    adjusted = holm([difference.pvalue for difference in tested if difference.pvalue is not None])
    family = {(d.method, d.reference): p for d, p in zip(tested, adjusted, strict=True)}
    return SettingSummary(
        setting,
        spreads,
        {pair: replace(d, adjusted=family.get(pair)) for pair, d in zip(pairs, differences, strict=True)},
    )


def _spreads(runs: Sequence[Run], at: At) -> dict[str, Spread]:
    tests = [getattr(run, at).test for run in runs]
    values = {name: [v for test in tests if (v := getattr(test, name)) is not None] for name in METRICS}
    return {name: spread(numbers) for name, numbers in values.items() if numbers}


def verdict(summary: Summary) -> dict[str, str]:
    """Return the result of each setting in sentences, by the setting's name.

    They compare the best method with the baseline, PLD with the baseline, and PLD with the best other method,
    for better or worse. Percentages are means over all seeds of a method, differences are over the seeds that
    two methods share.
    """
    return {setting.setting.name: _sentence(setting, summary) for setting in summary.settings}


def _sentence(result: SettingSummary, summary: Summary) -> str:
    setting, baseline = result.setting, summary.baseline
    opening = f"With {setting.description}" if setting.description else f"In {setting.name}"
    if not result.spreads:
        return f"{opening}, no run has finished."
    reached = {method: f"{100 * result.accuracy(method):.1f}%" for method in result.spreads}
    ranking = sorted(result.spreads, key=result.accuracy, reverse=True)
    what = f"test accuracy at the {summary.at} epoch"
    if baseline not in reached:
        return f"{opening}, {ranking[0]} reached {reached[ranking[0]]} {what}; {baseline} has not finished."
    if len(ranking) == 1:
        return f"{opening}, {baseline} reached {reached[baseline]} {what}; no other method has finished."

    # On equal means the baseline counts as best: a tie is not a gain.
    best = baseline if result.accuracy(baseline) >= result.accuracy(ranking[0]) else ranking[0]
    if best == baseline:
        first = f"{opening}, no method exceeded {baseline}, which reached {reached[baseline]} {what}."
    else:
        first = (
            f"{opening}, {best} reached {reached[best]} {what} against {reached[baseline]} for {baseline}"
            f"{_gain(result, best, baseline, after=True)}."
        )
    others = [method for method in ranking if method != FOCUS]
    if FOCUS not in reached or baseline == FOCUS:
        if best != baseline:
            return first
        runner_up = next(method for method in ranking if method != baseline)
        gain = _gain(result, runner_up, baseline, after=True)
        return f"{first} {runner_up} reached {reached[runner_up]}{gain}."
    if best == FOCUS:
        if others[0] == baseline:
            return first
        gain = _gain(result, FOCUS, others[0])
        return f"{first} Against {others[0]}, the best other method with {reached[others[0]]}: {gain}."
    rivals = [baseline] if best == baseline else [baseline, best]
    gains = "; ".join(f"against {rival}, {_gain(result, FOCUS, rival)}" for rival in rivals)
    return f"{first} {FOCUS} reached {reached[FOCUS]}; {gains}."


def _gain(result: SettingSummary, method: str, reference: str, *, after: bool = False) -> str:
    """Describe one difference; ``after=True`` adds the comma or colon that joins it to a sentence."""
    difference = result.differences[method, reference]
    pairs = len(difference.each)
    points = f"{signed(difference.mean)} points"
    comma, colon = (", ", ": ") if after else ("", "")
    if difference.low is None or difference.high is None:
        if not pairs:
            return f"{comma}no paired difference (no seed in common)"
        return f"{colon}{points} (1 seed: no interval, so no claim)"
    if difference.pvalue is None:
        return f"{colon}{points} in each of {pairs} seeds (no spread to judge it by)"
    interval = f"(95% interval {number(difference.low)} to {number(difference.high)}, {pairs} seeds, paired)"
    if difference.beyond_noise:
        return f"{colon}{points} {interval}"
    # The interval covers one comparison, the claim all of them: explain an interval without 0 that is no
    # claim.
    comparisons = sum(d.pvalue is not None for d in result.differences.values())
    noise = f"the noise of {comparisons} comparisons" if difference.pvalue < 1 - LEVEL else "noise"
    return f"{comma}no difference beyond {noise}: {points} {interval}"


def number(fraction: float) -> str:
    """Format a fraction in percent or points with one decimal and a true minus sign.

    Example:
        >>> number(-0.0123), number(-0.0001)
        ('−1.2', '0.0')
    """
    return f"{round(100 * fraction, 1) + 0.0:.1f}".replace("-", "−")


def signed(fraction: float) -> str:
    """Format as `number` does, with a plus sign before gains.

    Example:
        >>> signed(0.072), signed(0.0)
        ('+7.2', '0.0')
    """
    text = number(fraction)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"
