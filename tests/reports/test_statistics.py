"""The arithmetic by hand, and sentences that claim no more than it allows."""

from __future__ import annotations

import math

import pytest

from luce.reports import read_comparison, summarise, verdict
from luce.reports.statistics import holm, number, paired_difference, signed, spread

# Quantiles of Student's t at 97.5%, from printed tables.
T_1, T_2 = 12.7062, 4.30265


def test_spread_by_hand():
    found = spread([0.80, 0.84, 0.82])
    assert found.mean == pytest.approx(0.82)
    assert found.deviation == pytest.approx(math.sqrt((0.02**2 + 0.02**2 + 0) / 2))
    assert spread([0.8]).deviation is None


def test_paired_difference_by_hand():
    # Differences 0.10, 0.06, 0.08: mean 0.08, deviation 0.02, standard error 0.02 / sqrt(3).
    found = paired_difference("PLD", {0: 0.9, 1: 0.8, 2: 0.7}, "KD", {0: 0.8, 1: 0.74, 2: 0.62})
    margin = T_2 * 0.02 / math.sqrt(3)
    assert found.mean == pytest.approx(0.08)
    assert found.low == pytest.approx(0.08 - margin, rel=1e-5)
    assert found.high == pytest.approx(0.08 + margin, rel=1e-5)
    # With two degrees of freedom P(|T| > t) = 1 - t / sqrt(t**2 + 2).
    t = 0.08 / (0.02 / math.sqrt(3))
    assert found.pvalue == pytest.approx(1 - t / math.sqrt(t**2 + 2))


def test_pairing_removes_what_seeds_share():
    # The seeds lie 30 points apart, the two methods always 1 or 2: pairs see only the latter.
    found = paired_difference("a", {0: 0.51, 1: 0.82}, "b", {0: 0.50, 1: 0.80})
    error = math.sqrt((0.005**2 + 0.005**2) / 1) / math.sqrt(2)
    assert found.high == pytest.approx(0.015 + T_1 * error, rel=1e-5)


def test_only_shared_seeds_are_paired():
    found = paired_difference("a", {0: 0.9, 1: 0.8, 7: 0.1}, "b", {1: 0.7, 0: 0.7, 5: 0.99})
    assert found.each == pytest.approx((0.2, 0.1))
    assert math.isnan(paired_difference("a", {0: 0.9}, "b", {1: 0.9}).mean)


def test_one_pair_has_no_interval():
    found = paired_difference("a", {3: 0.75}, "b", {3: 0.5})
    assert (found.mean, found.low, found.high, found.pvalue) == (0.25, None, None, None)
    assert not found.beyond_noise


def test_identical_values_have_an_interval_of_no_width():
    same = paired_difference("a", {0: 0.9, 1: 0.8}, "b", {0: 0.9, 1: 0.8})
    assert (same.low, same.mean, same.high, same.pvalue) == (0, 0, 0, 1)
    # 0.9 - 0.8 and 0.8 - 0.7 differ by rounding only: no spread, so no p-value that means anything.
    shifted = paired_difference("a", {0: 0.9, 1: 0.8}, "b", {0: 0.8, 1: 0.7})
    assert shifted.low == shifted.high == pytest.approx(0.1)
    assert shifted.pvalue is None
    assert not shifted.beyond_noise


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04; the last may not fall below the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_last_and_best_epoch_are_separate(tmp_path, write_comparison, write_run):
    folder = write_comparison(tmp_path, {"few": {"cross-entropy": [0.7]}})
    write_run(folder / "few" / "PLD" / "seed-0", "PLD", 0, accuracy=0.8, best=0.85)
    comparison = read_comparison(folder)
    last, best = summarise(comparison), summarise(comparison, at="best")
    assert (last.settings[0].accuracy("PLD"), best.settings[0].accuracy("PLD")) == (0.8, 0.85)
    assert last.settings[0].differences["PLD", "cross-entropy"].mean == pytest.approx(0.1)
    assert best.settings[0].differences["PLD", "cross-entropy"].mean == pytest.approx(0.15)
    assert last.settings[0].spreads["PLD"]["kl"].mean == pytest.approx(0.4)


def test_the_family_is_the_setting(tmp_path, write_comparison):
    few = {"cross-entropy": [0.70, 0.72, 0.74], "KD": [0.75, 0.76, 0.80], "PLD": [0.80, 0.83, 0.84]}
    comparison = read_comparison(write_comparison(tmp_path, {"few": few, "all": few}))
    differences = summarise(comparison).settings[0].differences
    assert set(differences) == {("KD", "cross-entropy"), ("PLD", "cross-entropy"), ("PLD", "KD")}
    smallest = min(differences.values(), key=lambda difference: difference.pvalue)
    assert smallest.adjusted == pytest.approx(3 * smallest.pvalue)


def sentences(tmp_path, write_comparison, methods, **recipe):
    settings = {"few": {"description": "5 labels per class"}}
    options = {"settings": settings} | recipe
    folder = write_comparison(tmp_path, {"few": methods}, **options)
    return verdict(summarise(read_comparison(folder)))["few"]


def test_verdict_when_pld_is_best(tmp_path, write_comparison):
    text = sentences(
        tmp_path,
        write_comparison,
        {
            "cross-entropy": [0.840, 0.842, 0.838],
            "KD": [0.880, 0.878, 0.881],
            "PLD": [0.911, 0.914, 0.911],  # 7.1, 7.2, 7.3 points over the baseline
        },
    )
    margin = T_2 * 0.1 / math.sqrt(3)
    interval = f"{7.2 - margin:.1f} to {7.2 + margin:.1f}"
    assert text.startswith(
        "With 5 labels per class, PLD reached 91.2% test accuracy at the last epoch against 84.0% for "
        f"cross-entropy: +7.2 points (95% interval {interval}, 3 seeds, paired)."
    )
    assert "Against KD, the best other method with 88.0%: +3.2 points" in text


def test_verdict_says_when_pld_is_worse(tmp_path, write_comparison):
    text = sentences(
        tmp_path,
        write_comparison,
        {
            "cross-entropy": [0.800, 0.802, 0.801],
            "KD": [0.900, 0.903, 0.901],
            "PLD": [0.850, 0.851, 0.852],
        },
    )
    assert "KD reached 90.1%" in text
    assert "PLD reached 85.1%; against cross-entropy, +5.0 points" in text
    assert "against KD, −5.0 points" in text


def test_verdict_when_the_baseline_is_best(tmp_path, write_comparison):
    methods = {"cross-entropy": [0.9, 0.91, 0.92], "PLD": [0.8, 0.82, 0.81]}
    text = sentences(tmp_path, write_comparison, methods)
    assert "no method exceeded cross-entropy, which reached 91.0%" in text
    assert "PLD reached 81.0%; against cross-entropy, −10.0 points" in text


def test_verdict_calls_noise_noise(tmp_path, write_comparison):
    # Differences -1, 0, +1.3 points.
    methods = {"cross-entropy": [0.9, 0.9, 0.9], "PLD": [0.89, 0.9, 0.913]}
    text = sentences(tmp_path, write_comparison, methods)
    assert "for cross-entropy, no difference beyond noise: +0.1 points (95% interval −" in text


def test_verdict_explains_an_interval_that_excludes_zero_without_a_claim(tmp_path, write_comparison):
    # PLD's gains of 1.2, 2 and 2.8 points give t = 2 / (0.8 / sqrt(3)) = 4.33 and p = 0.0494: below 0.05
    # alone, and not among three.
    methods = {
        "cross-entropy": [0.800, 0.800, 0.800],
        "KD": [0.790, 0.810, 0.801],
        "PLD": [0.812, 0.820, 0.828],
    }
    text = sentences(tmp_path, write_comparison, methods)
    assert "no difference beyond the noise of 3 comparisons: +2.0 points (95% interval 0.0 to 4.0" in text


def test_verdict_with_one_seed_claims_nothing(tmp_path, write_comparison):
    text = sentences(tmp_path, write_comparison, {"cross-entropy": [0.8], "PLD": [0.9]})
    assert "+10.0 points (1 seed: no interval, so no claim)" in text


def test_verdict_with_equal_gains_in_every_seed(tmp_path, write_comparison):
    text = sentences(tmp_path, write_comparison, {"cross-entropy": [0.8, 0.7], "PLD": [0.9, 0.8]})
    assert "+10.0 points in each of 2 seeds (no spread to judge it by)" in text


def test_verdict_without_pld(tmp_path, write_comparison):
    text = sentences(tmp_path, write_comparison, {"cross-entropy": [0.9, 0.9], "KD": [0.8, 0.82]})
    assert "no method exceeded cross-entropy" in text
    assert "KD reached 81.0%, no difference beyond noise: −9.0 points" in text
    assert "PLD" not in text


def test_verdict_when_pieces_are_missing(tmp_path, write_comparison):
    methods = {"cross-entropy": [0.9], "PLD": [0.8]}
    folder = write_comparison(tmp_path, {"few": methods, "all": methods, "none": methods})
    (folder / "few" / "cross-entropy" / "seed-0" / "result.json").unlink()
    (folder / "all" / "PLD" / "seed-0" / "result.json").unlink()
    for method in methods:
        (folder / "none" / method / "seed-0" / "result.json").unlink()
    found = verdict(summarise(read_comparison(folder)))
    assert found["few"].endswith("80.0% test accuracy at the last epoch; cross-entropy has not finished.")
    assert found["all"].endswith("no other method has finished.")
    assert found["none"] == "In none, no run has finished."


def test_verdict_without_a_seed_in_common(tmp_path, write_comparison):
    folder = write_comparison(tmp_path, {"few": {"cross-entropy": [0.8, 0.8], "PLD": [0.9, 0.9]}})
    (folder / "few" / "cross-entropy" / "seed-0" / "result.json").unlink()
    (folder / "few" / "PLD" / "seed-1" / "result.json").unlink()
    assert "no paired difference (no seed in common)" in verdict(summarise(read_comparison(folder)))["few"]


def test_numbers_have_one_decimal_a_true_minus_and_no_signed_zero():
    assert [number(x) for x in (0.9123, -0.05, -0.0004)] == ["91.2", "−5.0", "0.0"]
    assert [signed(x) for x in (0.072, -0.072, 0.0004)] == ["+7.2", "−7.2", "0.0"]
