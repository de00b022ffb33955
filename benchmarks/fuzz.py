"""``python -m benchmarks.fuzz``: random calls of every loss, looking for raw errors and undefined values.

A call draws a loss of the tests' catalogue with its options, the shape, dtype and strides of the logits,
their size up to 1e18, labels, weights and the reduction, and may draw a wrong one of each. A finding is

- an error that is no sentence of Luce's own (ValueError, TypeError);
- NaN in the value although all logits are finite and all arguments right, or in the gradient of a finite one:
  products of features of 1e18 may exceed the range of float32, and infinity is then the right value;
- infinity where the same call in float64 gives a number within the range of the dtype.

Each finding has a number: ``--only NUMBER`` repeats its call alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.losses import catalogue, feature_cases

SIZES = (0.0, 1e-30, 1e-3, 1.0, 1.0, 30.0, 1e4, 1e9, 1e18)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPENINGS = ("expected", "unknown", "`", "there is no", "the ", "a ")
"""How the messages of losses begin; those of PyTorch have other ones."""
WRONG_LABELS = (-2, -101, 5000, 2**40, -(2**63))


@dataclass
class Call:
    """One drawn call.

    Attributes:
        name: Of the loss, with its options.
        run: From two lists of tensors, the student's and the teacher's, to the value.
        student: Logits or features.
        teacher: Likewise.
        right: Whether nothing is wrong with it, so that it must have a value.
        finite: Whether all numbers are finite, so that the value must be defined.
    """

    name: str
    run: Callable[[list[Tensor], list[Tensor]], Tensor]
    student: list[Tensor]
    teacher: list[Tensor]
    right: bool = True
    finite: bool = True
    more: str = ""


@dataclass
class Fuzzer:
    """Draws calls; the call of a number is always the same."""

    built: dict[str, Any] = field(default_factory=dict)

    def draw(self, number: int) -> Call:
        chance = random.Random(number)
        torch.manual_seed(number)
        return self._features(chance) if chance.random() < 0.25 else self._logits(chance)

    def _logits(self, chance: random.Random) -> Call:
        loss = chance.choice(catalogue.LOSSES)
        options, right = dict(chance.choice(loss.options)), True
        if loss.bad_options and chance.random() < 0.1:
            options.update([chance.choice(loss.bad_options)])
            right = False
        if "temperature" in options and right and chance.random() < 0.3:
            options["temperature"] = chance.choice((1e-3, 0.5, 100.0, 1e6))
        classes, rows = chance.choice((1, 2, 3, 5, 33, 200, 1500)), chance.choice((0, 1, 2, 7))
        extra = chance.choice(((), (), (3,), (2, 2)))
        last = chance.random() < 0.3
        shape = (rows, *extra, classes) if last else (rows, classes, *extra)
        if not extra and chance.random() < 0.1:
            shape = (classes,)
        axis = -1 if last else 1
        of_rows = shape[:-1] if last or len(shape) == 1 else (shape[0], *shape[2:])
        student, teacher = (numbers(chance, shape, chance.choice(DTYPES)) for _ in range(2))
        finite = chance.random() < 0.8
        if not finite:
            for logits in (student, teacher):
                if chance.random() < 0.7:
                    logits.masked_fill_(torch.rand(shape) < 0.3, -torch.inf)
        target = torch.randint(classes, of_rows)
        for label in (-1, -100):
            target = torch.where(torch.rand(of_rows) < chance.choice((0.0, 0.3, 1.0)) / 3, label, target)
        if chance.random() < 0.1 and target.numel():
            target.view(-1)[0], right = chance.choice(WRONG_LABELS), False
        if chance.random() < 0.1:
            target = target.to(chance.choice((torch.int32, torch.int16, torch.float32, torch.bool)))
            right = False
        given: dict[str, Any] = {"reduction": chance.choice(("none", "mean", "sum"))}
        if chance.random() < 0.3:
            given["row_weight"] = torch.rand(of_rows) * chance.choice((0, 1, 1e6))
        if chance.random() < 0.05:
            given.update(
                [chance.choice((("reduction", "max"), ("row_weight", torch.rand(9)), ("class_dim", 9)))]
            )
            right = False
        given.setdefault("class_dim", axis)
        labels = None if chance.random() < 0.1 and not loss.needs_label else target

        def run(s: list[Tensor], t: list[Tensor]) -> Tensor:
            logits = (s[0], t[0]) if loss.module.takes_teacher else (s[0],)
            return loss.function(*logits, labels, **options, **given)

        return Call(
            f"{loss.name} {options}",
            run,
            [strided(chance, student)],
            [strided(chance, teacher)],
            right,
            finite,
            f"{tuple(shape)} {student.dtype} {teacher.dtype} {given.keys() - {'row_weight'}}",
        )

    def _features(self, chance: random.Random) -> Call:
        case = chance.choice(feature_cases.CASES)
        dtype, rows = chance.choice(DTYPES), chance.choice((0, 1, 2, 5))
        if str(case) not in self.built:
            self.built[str(case)] = case.build().eval()
        loss = self.built[str(case)].to(torch.float32)
        student, teacher = (
            [strided(chance, numbers(chance, (rows, *shape), dtype)) for shape in shapes]
            for shapes in (case.student, case.teacher)
        )

        def run(s: list[Tensor], t: list[Tensor]) -> Tensor:
            torch.manual_seed(0)  # some draw a mask
            wide = torch.float64 if torch.float64 in (s[0].dtype, t[0].dtype) else torch.float32
            result = loss.to(wide)(s, t)
            return torch.stack([*result.values()]).sum() if isinstance(result, dict) else result

        return Call(str(case), run, student, teacher, right=rows > 0, more=f"{rows} rows {dtype}")


def numbers(chance: random.Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Finite numbers of at most 1e18: random, equal, a few different ones, or one class far above."""
    size = min(chance.choice(SIZES), torch.finfo(dtype).max / 8)
    kind = chance.choice(("normal", "equal", "ties", "peak"))
    if kind == "equal":
        values = torch.full(tuple(shape), size, dtype=torch.float64)
    elif kind == "ties":
        values = size * torch.randint(-2, 3, tuple(shape)).double() / 2
    else:
        values = size * torch.randn(*shape, dtype=torch.float64).clamp(-4, 4) / 4
        if kind == "peak":
            values = torch.where(torch.rand(*shape) < 0.1, size, values * 1e-6)
    return values.to(dtype)


def strided(chance: random.Random, values: Tensor) -> Tensor:
    """The same numbers in another layout of memory."""
    layout = chance.choice(("plain", "plain", "transposed", "steps"))
    if layout == "transposed" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "steps":
        return torch.stack([values, values], dim=-1)[..., 0]
    return values


def evaluate(call: Call, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return the value and the gradients towards the student; in another dtype if given."""
    student, teacher = (
        [part.to(dtype) if dtype else part.clone() for part in parts]
        for parts in (call.student, call.teacher)
    )
    student = [part.detach().requires_grad_() for part in student]
    value = call.run(student, teacher)
    if not value.requires_grad:
        return value.detach(), []
    gradients = torch.autograd.grad(value.sum(), student, allow_unused=True)
    return value.detach(), [part for part in gradients if part is not None]


def finding(call: Call) -> str | None:
    """Return what is wrong with the outcome of a call; None if nothing is."""
    try:
        value, gradients = evaluate(call)
    except (ValueError, TypeError) as error:
        if not str(error).startswith(OPENINGS):
            return f"raw {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if call.right and not is_about_rows(str(error)):
            return f"refused: {str(error)[:160]}"
        return None
    except Exception as error:
        return f"raw {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    if not (call.right and call.finite):
        return None
    found = [value, *gradients]
    if value.isnan().any():
        return "NaN in the value"
    if value.isfinite().all() and any(part.isnan().any() for part in gradients):
        return "NaN in the gradient"
    if not any(part.isinf().any() for part in found):
        return None
    exact_value, exact = evaluate(call, torch.float64)
    for part, other in zip(found, [exact_value, *exact], strict=True):
        inside = other.abs() < torch.finfo(part.dtype).max / 16
        if bool((part.isinf() & inside).any()):
            return "infinite, and finite in float64: " + ("value" if part is value else "gradient")
    return None


def is_about_rows(message: str) -> bool:
    """Whether a refusal is about the number of rows or classes, which not every loss takes."""
    return any(word in message for word in ("class", "row", "ignore_index", "at least"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", allow_abbrev=False)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", type=int, help="repeat one call, with its traceback")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fuzzer = Fuzzer()
    if options.only is not None:
        call = fuzzer.draw(options.only)
        print(call.name, call.more, call.student, call.teacher, finding(call), sep="\n")
        print(*evaluate(call), sep="\n")
        return 0
    findings: dict[tuple[str, str], list[int]] = defaultdict(list)
    names: dict[int, str] = {}
    start, done = time.monotonic(), 0
    for number in range(options.first, options.first + options.calls):
        if time.monotonic() - start > options.seconds:
            break
        call, done = fuzzer.draw(number), done + 1
        if (what := finding(call)) is not None:
            findings[call.name.split(" ")[0], what].append(number)
            names[number] = f"{call.name} {call.more}"
    for (loss, what), numbers_of in sorted(findings.items()):
        print(f"{loss}: {what}: {len(numbers_of)} calls, such as {numbers_of[0]}: {names[numbers_of[0]]}")
    print(f"{done} calls, {sum(map(len, findings.values()))} findings in {len(findings)} kinds")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
