"""What is measured: every case as a row of data, with the goals it has to reach."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import unknown_name

Dtype = Literal["float32", "bfloat16"]
Logits = Literal["normal", "image", "language"]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Goal:
    """What a case must reach (`least`) and should reach (`aim`).

    ``"speed"`` is the time of `against` over the candidate's: higher is better. ``"memory"`` is the
    candidate's extra peak in arrays of N x C, ``"microseconds"`` its time for a call, less that of `against`
    where one is named: lower is better.
    """

    least: float
    aim: float
    against: str = ""
    measure: Literal["speed", "memory", "microseconds"] = "speed"

    def verdict(self, value: float | None) -> str:
        sign = 1 if self.measure == "speed" else -1
        if value is None:
            return "not measured"
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "met" if sign * value >= sign * self.least else "missed"

    def __str__(self) -> str:
        bound = "≥" if self.measure == "speed" else "≤"
        subject = self.against if self.measure == "speed" else self.measure
        return f"{subject} {bound} {self.least:g}, aim {self.aim:g}"


@dataclass(frozen=True)
class Case:
    """A candidate and its baselines, all of them names of `luce.bench.contestants`, on one kind of logits.

    `inputs` are the fields of `luce.bench.inputs.Inputs` that are made before the clock starts. With
    `backward`, a step is forward and backward through autograd; without, the call alone under ``no_grad``.
    """

    name: str
    shape: Shape
    candidate: str
    baselines: tuple[str, ...] = ()
    dtype: Dtype = "float32"
    logits: Logits = "normal"
    inputs: tuple[str, ...] = ("student", "teacher", "target")
    backward: bool = True
    goals: tuple[Goal, ...] = ()

    @property
    def group(self) -> str:
        return "/".join(self.name.split("/")[:2])

    @property
    def array_bytes(self) -> int:
        """Bytes of one array of N x C, the unit of memory."""
        return self.shape[0] * self.shape[1] * (2 if self.dtype == "bfloat16" else 4)

    @property
    def measures_memory(self) -> bool:
        """Whether the logits are at least 8 MB: below, the process's own comings and goings show."""
        return self.array_bytes * len({"student", "teacher"}.intersection(self.inputs)) >= 8_000_000


SIZES: tuple[Shape, ...] = ((128, 100), (1024, 100), (256, 1000), (1024, 1000), (64, 32000), (16, 128256))
LONG_ROWS: tuple[Shape, ...] = ((1, 2**20), (1, 2**22), (1, 2**24), (1, 2**26))
PER_ALGORITHM = "softmax *"
"""Stands for every algorithm that `luce.ops.softmax.ALGORITHMS` lists."""
EAGER_PLD = ("eager KD", "eager PLD", "lean float32 PLD", "compiled eager KD", "compiled eager PLD")
THREE_PASS = ("softmax three_pass_recompute", "softmax three_pass_reload")


def _case(
    group: str,
    shape: Shape,
    dtype: Dtype,
    candidate: str,
    baselines: tuple[str, ...],
    *goals: Goal,
    **more: Any,
) -> Case:
    """Up to 1000 classes the logits look like an image classifier's, above like a language model's."""
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
    # The table of goals asks for KD with cross-entropy; KD alone is held to the same against its like.
    yield _case("kd/kl", shape, "float32", "KD", ("eager kl_div",), Goal(*kd, "eager kl_div"), memory)
    yield _case("kd/kl+ce", shape, "float32", "KD + CE", with_ce, Goal(*kd, "eager KD"))
    for group, name in (("kd/reverse_kl", "reverse KL"), ("kd/jsd", "JSD"), ("kd/dkd", "DKD")):
        yield _case(group, shape, "float32", name, (f"reference {name}",))
    yield _case(
        "suffix/logsumexp",
        shape,
        "float32",
        "suffix_logsumexp",
        ("flipped logcumsumexp",),
        inputs=("student", "upstream"),
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
    only_bfloat16 = ("torch.softmax", PER_ALGORITHM)  # the others have none
    least = Goal(1.8 if shape[1] >= 1000 else 1, 2.5, "torch.softmax")
    two_pass = (Goal(1.18, 1.33, THREE_PASS[0]), Goal(1.1, 1.33, THREE_PASS[1])) if shape[1] >= 2**24 else ()
    yield _case("softmax/auto", shape, "float32", "softmax auto", others, least, **forward)
    level = Goal(1, 2.5, "torch.softmax")
    yield _case("softmax/auto", shape, "bfloat16", "softmax auto", only_bfloat16, level, **forward)
    yield _case("softmax/two_pass", shape, "float32", "softmax two_pass", THREE_PASS, *two_pass, **forward)


def _all() -> Iterator[Case]:
    for shape in SIZES:
        yield from _losses(shape)
    for shape in SIZES + LONG_ROWS:
        yield from _softmax(shape)
    # The kernel itself takes less than a microsecond here.
    overhead = Goal(20, 8, measure="microseconds")
    yield _case("overhead/pld", (1, 8), "float32", "op pld", (), overhead, backward=False)
    # Shows in a second that everything works, measures nothing of worth, and is not part of "all".
    yield _case("quick/kl", (8, 16), "float32", "KD", ("eager kl_div",))
    yield _case("quick/pld", (8, 16), "bfloat16", "PLD", ("eager KD",), logits="language")


CASES: dict[str, Case] = {case.name: case for case in sorted(_all(), key=lambda case: case.group)}


def select(words: Iterable[str]) -> list[Case]:
    """The cases named by ``all``, by beginnings such as ``pld`` or ``pld/exact``, by whole names and by
    patterns such as ``pld/*/float32``, in the table's order.

    Raises:
        UserError: If a word names none.
    """
    chosen: set[str] = set()
    for word in words:
        if word == "all":
            chosen.update(name for name in CASES if not name.startswith("quick/"))
        elif found := fnmatch.filter(CASES, word) or fnmatch.filter(CASES, f"{word}/*"):
            chosen.update(found)
        else:
            depth = word.count("/") + 1  # suggest names of the length that was typed
            raise unknown_name("case", word, {"all", *("/".join(n.split("/")[:depth]) for n in CASES)})
    return [case for name, case in CASES.items() if name in chosen]
