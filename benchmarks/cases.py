"""The cases: what is measured, on which inputs and device, and the goals of each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from luce.errors import unknown_name

Device = Literal["cpu", "gpu"]
Dtype = Literal["float32", "bfloat16"]
Logits = Literal["normal", "image", "language"]
Measure = Literal["speed", "copy", "memory", "microseconds", "value error", "gradient error"]
Shape = tuple[int, int]

HIGHER_IS_BETTER = ("speed", "copy")


@dataclass(frozen=True)
class Goal:
    """A bound that a case must reach (`least`) and should reach (`aim`).

    ``"speed"`` is the time of `against` over the candidate's, ``"copy"`` the candidate's speed as a share of
    that of copying its inputs and its gradient: higher is better. Lower is better for ``"memory"``, the
    candidate's extra peak in arrays of N x C or as a share of that of `against`; for ``"microseconds"``, its
    time for a call; and for errors against float64, relative to the value and to a row's largest gradient.
    """

    least: float
    aim: float
    against: str = ""
    measure: Measure = "speed"

    def verdict(self, value: float | None) -> str:
        sign = 1 if self.measure in HIGHER_IS_BETTER else -1
        if value is None:
            return "not measured"
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "met" if sign * value >= sign * self.least else "missed"

    def __str__(self) -> str:
        bound = "≥" if self.measure in HIGHER_IS_BETTER else "≤"
        subject = " of ".join(part for part in (self.measure, self.against) if part)
        subject = self.against if self.measure == "speed" else subject
        aim = "" if self.aim == self.least else f", aim {self.aim:.3g}"
        return f"{subject} {bound} {self.least:.3g}{aim}"


@dataclass(frozen=True)
class Case:
    """A candidate and its baselines, names of `benchmarks.baselines`, on one kind of inputs.

    Attributes:
        name: ``group/NxC/dtype``, the group in two parts.
        shape: ``(N, C)``.
        inputs: Fields of `benchmarks.inputs.Inputs` to make before the clock starts.
        backward: A step is forward and backward through autograd; otherwise the call under ``no_grad``.
        width: Of the hidden states that a head turns into logits; 0 where the inputs are logits.
    """

    name: str
    shape: Shape
    candidate: str
    baselines: tuple[str, ...] = ()
    dtype: Dtype = "float32"
    device: Device = "cpu"
    logits: Logits = "normal"
    inputs: tuple[str, ...] = ("student", "teacher", "target")
    backward: bool = True
    width: int = 0
    goals: tuple[Goal, ...] = ()

    @property
    def group(self) -> str:
        return "/".join(self.name.split("/")[:2])

    @property
    def networks(self) -> int:
        """How many networks' logits a step reads."""
        return len({"student", "teacher"}.intersection(self.inputs))

    @property
    def array_bytes(self) -> int:
        """Bytes of one array of N x C, the unit of memory."""
        return self.shape[0] * self.shape[1] * (2 if self.dtype == "bfloat16" else 4)

    @property
    def measures_memory(self) -> bool:
        """Whether memory is measured; below 8 MB of logits a CPU process's own noise is as large."""
        return self.device == "gpu" or self.array_bytes * self.networks >= 8_000_000


SIZES: tuple[Shape, ...] = ((128, 100), (1024, 100), (256, 1000), (1024, 1000), (64, 32000), (16, 128256))
LONG_ROWS: tuple[Shape, ...] = ((1, 2**20), (1, 2**22), (1, 2**24), (1, 2**26))
COMPILED = "compiled "
PER_ALGORITHM = "softmax *"
"""Stands for every algorithm that `luce.ops.softmax.ALGORITHMS` lists."""
EAGER_PLD = ("eager KD", "eager PLD", "lean float32 PLD", "compiled eager KD", "compiled eager PLD")
THREE_PASS = ("softmax three_pass_recompute", "softmax three_pass_reload")
HELD = "KD of logits held whole"
PRODUCTS = "matrix products"


def _case(
    group: str,
    shape: Shape,
    dtype: Dtype,
    candidate: str,
    baselines: tuple[str, ...],
    *goals: Goal,
    **more: Any,
) -> Case:
    """Make a case; up to 1000 classes the logits are an image classifier's, above a language model's."""
    more.setdefault("logits", "image" if shape[1] <= 1000 else "language")
    case = Case(f"{group}/{shape[0]}x{shape[1]}/{dtype}", shape, candidate, baselines, dtype, **more)
    return replace(case, goals=tuple(g for g in goals if g.measure != "memory" or case.measures_memory))


def _losses(shape: Shape) -> Iterator[Case]:
    small, language = shape[1] < 1000, shape[1] >= 32000
    over_pld = Goal(9, 15, "eager PLD") if small else Goal(12, 20, "eager PLD")
    exact = (over_pld, Goal(1, 1.5, "eager KD"), Goal(1.5, 1.0, measure="memory"))
    default = (Goal(3, 5, "eager KD"),) if language else ()
    kd = (2.0, 4.0) if small else (4.5, 8.0)
    memory = Goal(1.1, 1.0, measure="memory")
    with_ce = ("eager KD", "compiled eager KD")
    yield _case("pld/exact", shape, "float32", "PLD exact", EAGER_PLD, *exact)
    yield _case("pld/exact_normal", shape, "float32", "PLD exact", EAGER_PLD, *exact, logits="normal")
    yield _case("pld/default", shape, "float32", "PLD", ("eager KD", "PLD exact"), *default)
    yield _case(
        "pld/order",
        shape,
        "float32",
        "PLD exact, order given",
        ("PLD exact", "eager KD"),
        Goal(1.6, 2, "PLD exact"),
        inputs=("student", "teacher", "target", "order"),
    )
    yield _case("kd/kl", shape, "float32", "KD", ("eager kl_div",), Goal(*kd, "eager kl_div"), memory)
    yield _case("kd/kl+ce", shape, "float32", "KD + CE", with_ce, Goal(*kd, "eager KD"))
    for group, name in (("kd/reverse_kl", "reverse KL"), ("kd/jsd", "JSD"), ("kd/dkd", "DKD")):
        yield _case(group, shape, "float32", name, (f"reference {name}",))
    suffixes = ("student", "upstream")
    yield _case(
        "suffix/logsumexp", shape, "float32", "suffix_logsumexp", ("flipped logcumsumexp",), inputs=suffixes
    )
    if small:  # all pairs of classes fit into one array
        yield _case("rkkd/tanh", shape, "float32", "RKKD", ("eager RKKD", "reference RKKD"))
    else:
        yield _case("pld/exact", shape, "bfloat16", "PLD exact", EAGER_PLD)
        yield _case(
            "pld/default", shape, "bfloat16", "PLD", ("eager KD", "PLD exact"), Goal(2, 4, "eager KD")
        )
        yield _case("kd/kl", shape, "bfloat16", "KD", ("eager kl_div",))
        yield _case("kd/kl+ce", shape, "bfloat16", "KD + CE", with_ce)
    if language:
        top = ("PLD top_k=128", ("eager KD", "PLD"), Goal(4, 7, "eager KD"))
        yield _case("pld/top_k", shape, "float32", *top)
        yield _case("pld/top_k", shape, "bfloat16", *top)


def _softmax(shape: Shape) -> Iterator[Case]:
    forward: dict[str, Any] = {"inputs": ("student",), "backward": False}
    if shape in LONG_ROWS:
        forward["logits"] = "normal"
    others = ("torch.softmax", "scipy", "numpy", "ONNX Runtime", PER_ALGORITHM)
    only_bfloat16 = ("torch.softmax", PER_ALGORITHM)  # the other libraries have no bfloat16
    least = Goal(1.8 if shape[1] >= 1000 else 1, 2.5, "torch.softmax")
    two_pass = (Goal(1.18, 1.33, THREE_PASS[0]), Goal(1.1, 1.33, THREE_PASS[1])) if shape[1] >= 2**24 else ()
    yield _case("softmax/auto", shape, "float32", "softmax auto", others, least, **forward)
    level = Goal(1, 2.5, "torch.softmax")
    yield _case("softmax/auto", shape, "bfloat16", "softmax auto", only_bfloat16, level, **forward)
    yield _case("softmax/two_pass", shape, "float32", "softmax two_pass", THREE_PASS, *two_pass, **forward)


def _on_gpu(
    group: str,
    shape: Shape,
    dtype: Dtype,
    candidate: str,
    baselines: tuple[str, ...],
    *goals: Goal,
    error: float = 1e-5,
    **more: Any,
) -> Case:
    # Rounding a gradient to bfloat16 changes it by up to half a unit in the last place, 2**-8 of it.
    rounding = 2 * 2.0**-8 if dtype == "bfloat16" else 0.0
    errors = (
        Goal(error, error, measure="value error"),
        Goal(error + rounding, error + rounding, measure="gradient error"),
    )
    more = {"device": "gpu", "logits": "normal", **more}
    return _case(group, shape, dtype, candidate, baselines, *goals, *errors, **more)


def _gpu() -> Iterator[Case]:
    image, language = (8192, 1000), (4096, 128256)
    kd = ("eager kl_div", "compiled eager kl_div", "Liger KD")
    of_copy = Goal(0.6, 0.6, measure="copy")
    yield _on_gpu("gpu/kd", image, "float32", "KD", kd, of_copy)
    yield _on_gpu("gpu/kd", image, "bfloat16", "KD", kd, of_copy)
    yield _on_gpu("gpu/kd", language, "bfloat16", "KD", kd, of_copy)
    pld = ("lean float32 PLD", "eager kl_div")
    over = (Goal(10, 10, pld[0]), Goal(1, 1, pld[1]))
    for shape in ((1024, 100), (1024, 1000), (16384, 100), (16384, 1000)):
        yield _on_gpu("gpu/pld", shape, "float32", "PLD exact", pld, *over)
    top = (Goal(0.5, 0.5, measure="copy"), Goal(2, 2, "eager kl_div"))
    yield _on_gpu("gpu/pld_top_k", language, "bfloat16", "PLD top_k=128", ("eager kl_div",), *top)
    labelled: dict[str, Any] = {"inputs": ("student", "target"), "error": 2e-6}
    ce = ("eager CE", "compiled eager CE", "Liger CE")
    yield _on_gpu("gpu/ce", image, "float32", "CE", ce, **labelled)
    yield _on_gpu("gpu/ce", language, "bfloat16", "CE", ("eager CE", "Liger CE"), **labelled)
    yield _on_gpu("gpu/reverse_kl", image, "float32", "reverse KL", ())
    yield _on_gpu("gpu/jsd", image, "float32", "JSD", ("reference JSD", "TRL JSD"))
    yield _on_gpu("gpu/dkd", image, "float32", "DKD", ("reference DKD",))
    yield _on_gpu("gpu/pld", (512, 32000), "bfloat16", "PLD exact", pld)
    yield _on_gpu("gpu/rkkd", (4096, 1000), "float32", "RKKD", ("reference RKKD",))
    suffixes = ("student", "upstream")
    yield _on_gpu(
        "gpu/suffix", image, "float32", "suffix_logsumexp", ("flipped logcumsumexp",), inputs=suffixes
    )
    # From hidden states and heads: time against the matrix products alone, memory against whole logits.
    head: dict[str, Any] = {"device": "gpu", "logits": "normal", "width": 4096}
    goals = (Goal(1 / 1.5, 1 / 1.5, PRODUCTS), Goal(1 / 8, 1 / 8, HELD, "memory"))
    others = (PRODUCTS, HELD, f"{HELD} in float32")
    yield _case(
        "gpu/linear_kd",
        (8192, 128256),
        "bfloat16",
        "linear KD",
        (*others, "Liger linear KD"),
        *goals,
        **head,
    )
    yield _case(
        "gpu/linear_pld", (8192, 128256), "bfloat16", "linear PLD top_k=128", others[:2], *goals, **head
    )


def _all() -> Iterator[Case]:
    for shape in SIZES:
        yield from _losses(shape)
    for shape in SIZES + LONG_ROWS:
        yield from _softmax(shape)
    # The kernel itself takes less than a microsecond here.
    overhead = Goal(20, 8, measure="microseconds")
    yield _case("overhead/pld", (1, 8), "float32", "op pld", (), overhead, backward=False)
    # Show within a second that everything works; `all` leaves them out, as their figures mean nothing.
    yield _case("quick/kl", (8, 16), "float32", "KD", ("eager kl_div",))
    yield _case("quick/pld", (8, 16), "bfloat16", "PLD", ("eager KD",), logits="language")
    yield from _gpu()


CASES: dict[str, Case] = {case.name: case for case in sorted(_all(), key=lambda case: case.group)}


def select(patterns: Iterable[str], device: Device = "cpu") -> list[Case]:
    """Return the cases of a device that the patterns name, in the order of the table.

    A pattern is ``all``, the beginning of a name such as ``pld`` or ``pld/exact``, a whole name, or a pattern
    such as ``pld/*/float32``.

    Raises:
        UserError: If a pattern names no case.
    """
    known = {name: case for name, case in CASES.items() if case.device == device}
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == "all":
            chosen.update(name for name in known if not name.startswith("quick/"))
        elif matching := fnmatch.filter(known, pattern) or fnmatch.filter(known, f"{pattern}/*"):
            chosen.update(matching)
        else:
            depth = pattern.count("/") + 1  # suggest names as long as the one that was typed
            raise unknown_name("case", pattern, {"all", *("/".join(n.split("/")[:depth]) for n in known)})
    return [case for name, case in known.items() if name in chosen]
