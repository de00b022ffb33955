"""Mutants of the native kernels, which are built again for each."""

from __future__ import annotations

from .mutant import Mutant, mutant

PLD = "tests/ops/test_pld_native.py"
DIVERGENCE = "tests/ops/test_divergence.py"

NATIVE: tuple[Mutant, ...] = (
    mutant(
        "csrc/cross-entropy gradient of the label ignores smoothing",
        "tests/ops/test_cross_entropy.py",
        "evenly - (1 - smoothing) * (z_rest / z) * weight",
        "evenly - (z_rest / z) * weight",
    ),
    mutant(
        "csrc/DKD gradient adds the label's part",
        DIVERGENCE,
        "c.h * of_rest - c.q * of_label",
        "c.h * of_rest + c.q * of_label",
    ),
    mutant(
        "csrc/JSD gradient with the teacher's share",
        DIVERGENCE,
        "- middle.low) * (other * scale)",
        "- middle.low) * (share * scale)",
    ),
    mutant(
        "csrc/KL limit is the whole variance",
        DIVERGENCE,
        "? INFINITY : squares / (2 * count)",
        "? INFINITY : squares / count",
    ),
    mutant(
        "csrc/reverse KL gradient without its mean",
        DIVERGENCE,
        "row.p(i) * ((load(difference + i) - middle.high) - middle.low) * scale",
        "row.p(i) * load(difference + i) * scale",
    ),
    mutant(
        "csrc/one place too few within epsilon",
        PLD,
        "return std::max<int64_t>(k, 1);",
        "return std::max<int64_t>(k - 1, 1);",
    ),
    mutant(
        "csrc/PLD value without the row weight",
        PLD,
        "static_cast<T>(s ? result.loss * weight(index) : 0)",
        "static_cast<T>(s ? result.loss : 0)",
    ),
    mutant(
        "csrc/PLD gradient with the wrong sign",
        PLD,
        "(load(worth + k) * seen - load(alpha + k)) * scale",
        "(load(worth + k) * seen + load(alpha + k)) * scale",
    ),
    mutant(
        "csrc/tied places share without Efron's half",
        PLD,
        "const double half = (members + 1) / (2 * members);",
        "const double half = (members - 1) / (2 * members);",
    ),
    mutant(
        "csrc/truncated rows forget the label's own place",
        PLD,
        "const int64_t wanted = places + 1;",
        "const int64_t wanted = places;",
    ),
    mutant(
        "csrc/a bin's members see no more than half of it",
        PLD,
        "share = alone ? 1 : (d + 1) / (2 * d)",
        "share = alone ? 1 : (d - 1) / (2 * d)",
    ),
    mutant(
        "csrc/sorted RKKD counts concord for discord",
        "tests/ops/test_rkkd.py",
        "const int64_t before = begin - upward.begin - above.begin;",
        "const int64_t before = begin - upward.begin + above.begin;",
    ),
    mutant(
        "csrc/RKKD divides by all ordered pairs",
        "tests/ops/test_rkkd.py",
        "0.5 * static_cast<double>(count) * static_cast<double>(count - 1)",
        "1.0 * static_cast<double>(count) * static_cast<double>(count - 1)",
    ),
    mutant(
        "csrc/slices of a softmax joined with the wrong base",
        "tests/ops/test_softmax.py",
        "power ? std::exp2(down) : std::exp(down)",
        "power ? std::exp(down) : std::exp2(down)",
    ),
    mutant(
        "csrc/the end of a short softmax counts twice",
        "tests/ops/test_softmax.py",
        "const Pair<W> counted = without_first<S>(UNIT - rest, end, Pair<W>{});",
        "const Pair<W> counted = end;",
    ),
    mutant(
        "csrc/suffix gradient without its exponential",
        "tests/ops/test_suffix_logsumexp.py",
        "store_lanes(dx + k, load_lanes(worth + k, lanes, T(0)) * b, lanes);",
        "store_lanes(dx + k, b, lanes);",
    ),
)
