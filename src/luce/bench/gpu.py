"""``make gpu-check``: the GPU tests, then the Triton kernels against their baselines and their goals.

Needs a checkout, PyTorch, NumPy and Triton, and no network; nothing else that Luce requires is imported.
Every figure is a median of `triton.testing.do_bench`, which empties the cache between two runs, so that
inputs come from memory.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import luce

from ..ops.engines import why_no_triton
from ..ops.suffix_logsumexp import suffix_logsumexp
from ..source import commit
from .contestants import TEMPERATURE, eager_kl_div, lean_pld
from .gpu_report import page

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Bench = Callable[[Callable[[], Any]], float]
"""Takes what is to be timed, returns the median in milliseconds."""

SECONDS = 480
"""What everything together may take; what does not fit any more is left out, and said to be."""


@dataclass(frozen=True)
class Case:
    """A loss of ours on one size, against baselines.

    Attributes:
        loss: A name in `OURS`.
        copy_share: At least this share of the speed of copying inputs and gradient; None for no such goal.
        at_least: Times as fast as a baseline, at least.
    """

    loss: str
    shape: tuple[int, int]
    dtype: str
    baselines: tuple[str, ...] = ()
    copy_share: float | None = None
    at_least: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.loss} {self.shape[0]}x{self.shape[1]} {self.dtype}"


def _eager_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return eager_kl_div(s, t)


def _eager_cross_entropy(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(s, y)


def _liger_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean")
    value: Tensor = loss((s / TEMPERATURE).log_softmax(-1), (t / TEMPERATURE).softmax(-1))
    return value * TEMPERATURE**2


def _liger_cross_entropy(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    value: Tensor = liger_cross_entropy(s, y)
    return value


def _liger_linear_kd(student: luce.LinearLogits, teacher: luce.LinearLogits, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    pair = (student.hidden, student.weight, teacher.hidden, teacher.weight)
    value: Tensor = liger_fused_linear_jsd(*pair, y, jsd_beta=0.0, temperature=TEMPERATURE)
    return value * TEMPERATURE**2


def _trl_jsd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    value: Tensor = GKDTrainer.generalized_jsd_loss(s[None], t[None], beta=0.5, temperature=TEMPERATURE)
    return value


BASELINES: dict[str, Loss] = {
    "eager KD": _eager_kd,
    "eager PLD": lambda s, t, y: lean_pld(s, t, y),
    "eager CE": _eager_cross_entropy,
    "reference DKD": lambda s, t, y: luce.dkd_loss(s, t, y, temperature=TEMPERATURE, backend="reference"),
    "reference JSD": lambda s, t, y: luce.jsd_loss(s, t, temperature=TEMPERATURE, backend="reference"),
    "reference RKKD": lambda s, t, y: luce.rkkd_loss(s, t, backend="reference"),
    "flipped logcumsumexp": lambda s, t, y: s.flip(-1).logcumsumexp(-1).flip(-1).sum(),
    "Liger KD": _liger_kd,
    "Liger CE": _liger_cross_entropy,
    "TRL JSD": _trl_jsd,
}
COMPILED = "compiled "

OURS: dict[str, Callable[..., Tensor]] = {
    "KD": lambda s, t, y, b: luce.kd_loss(s, t, temperature=TEMPERATURE, backend=b),
    "reverse KL": lambda s, t, y, b: luce.reverse_kl_loss(s, t, temperature=TEMPERATURE, backend=b),
    "JSD": lambda s, t, y, b: luce.jsd_loss(s, t, temperature=TEMPERATURE, backend=b),
    "CE": lambda s, t, y, b: luce.cross_entropy_loss(s, y, backend=b),
    "DKD": lambda s, t, y, b: luce.dkd_loss(s, t, y, temperature=TEMPERATURE, backend=b),
    "PLD": lambda s, t, y, b: luce.pld_loss(s, t, y, tolerance=0, backend=b),
    "PLD top-128": lambda s, t, y, b: luce.pld_loss(s, t, y, top_k=128, backend=b),
    "RKKD": lambda s, t, y, b: luce.rkkd_loss(s, t, backend=b),
    "suffixes": lambda s, t, y, b: suffix_logsumexp(s, backend=b).sum(),
}
ERRORS = {
    "KD": 1e-5,
    "reverse KL": 1e-5,
    "JSD": 1e-5,
    "CE": 2e-6,
    "DKD": 1e-5,
    "PLD": 1e-5,
    "PLD top-128": 1e-5,
    "RKKD": 1e-5,
    "suffixes": 1e-5,
}
"""What a value in float32 may differ from float64, and a gradient over the largest entry in its row."""
BFLOAT16 = 2 * 2.0**-8
"""Twice what rounding a gradient to bfloat16 may change it by: a unit in the last place."""

_KD, _LIGER = ("eager KD", COMPILED + "eager KD"), "Liger KD"
CASES = (
    Case("KD", (8192, 1000), "float32", (*_KD, _LIGER), copy_share=0.6),
    Case("KD", (8192, 1000), "bfloat16", (*_KD, _LIGER), copy_share=0.6),
    Case("KD", (4096, 128256), "bfloat16", (*_KD, _LIGER), copy_share=0.6),
    Case("PLD", (1024, 100), "float32", ("eager PLD", "eager KD"), at_least={"eager PLD": 10, "eager KD": 1}),
    Case(
        "PLD", (1024, 1000), "float32", ("eager PLD", "eager KD"), at_least={"eager PLD": 10, "eager KD": 1}
    ),
    Case(
        "PLD", (16384, 100), "float32", ("eager PLD", "eager KD"), at_least={"eager PLD": 10, "eager KD": 1}
    ),
    Case(
        "PLD", (16384, 1000), "float32", ("eager PLD", "eager KD"), at_least={"eager PLD": 10, "eager KD": 1}
    ),
    Case("PLD top-128", (4096, 128256), "bfloat16", ("eager KD",), copy_share=0.5, at_least={"eager KD": 2}),
    Case("CE", (8192, 1000), "float32", ("eager CE", COMPILED + "eager CE", "Liger CE")),
    Case("CE", (4096, 128256), "bfloat16", ("eager CE", "Liger CE")),
    Case("reverse KL", (8192, 1000), "float32"),
    Case("JSD", (8192, 1000), "float32", ("reference JSD", "TRL JSD")),
    Case("DKD", (8192, 1000), "float32", ("reference DKD",)),
    Case("PLD", (512, 32000), "bfloat16", ("eager PLD", "eager KD")),
    Case("RKKD", (4096, 1000), "float32", ("reference RKKD",)),
    Case("suffixes", (8192, 1000), "float32", ("flipped logcumsumexp",)),
)
HEAD = (8192, 4096, 128256)
"""Rows, width of the hidden states, and classes of the losses from hidden states and a head."""
HEAD_TIMES, HEAD_MEMORY = 1.5, 1 / 8
"""What they may take: times the matrix products alone, and of the memory of logits held whole."""
HELD = "KD of logits held whole"


def inputs_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    student, teacher = (torch.randn(case.shape, device=device, dtype=dtype, generator=make) for _ in range(2))
    target = torch.randint(case.shape[1], case.shape[:1], device=device, generator=make)
    return 2 * student, 3 * teacher, target


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """Forward and backward, as a training loop runs them; nothing is left of it, for `peak_memory`."""
    student = inputs[0].detach().requires_grad_()

    def run() -> None:
        loss(student, *inputs[1:]).backward()
        student.grad = None

    return run


def peak_memory(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a step takes on top of its inputs; the gradient is one of them."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def errors_of(case: Case, device: torch.device, backend: str) -> dict[str, float]:
    """Largest relative errors of value and gradient on a few rows, against float64."""
    rows = min(case.shape[0], 32 if case.shape[1] < 10000 else 2)
    small = Case(case.loss, (rows, case.shape[1]), case.dtype)
    student, teacher, target = inputs_of(small, device)
    found = []
    for dtype, engine in ((student.dtype, backend), (torch.float64, "reference")):
        x = student.to(dtype).detach().requires_grad_()
        value = OURS[case.loss](x, teacher.to(dtype), target, engine)
        (gradient,) = torch.autograd.grad(value, x)
        found.append((value.detach().double(), gradient.double()))
    (value, gradient), (truth, slope) = found
    error = (gradient - slope).abs().amax(1) / slope.abs().amax(1)
    return {"value": float((value - truth).abs() / truth.abs()), "gradient": float(error.max())}


def measure(case: Case, device: torch.device, backend: str, bench: Bench, copy_rate: float) -> dict[str, Any]:
    """Milliseconds, bytes and errors of a case; a baseline that cannot run has its reason instead."""
    inputs = inputs_of(case, device)
    found: dict[str, Any] = {"case": case.name, "milliseconds": {}, "memory": {}, "failed": {}}
    contestants: dict[str, Loss] = {"ours": lambda s, t, y: OURS[case.loss](s, t, y, backend)}
    for name in case.baselines:
        loss = BASELINES[name.removeprefix(COMPILED)]
        contestants[name] = torch.compile(loss, dynamic=False) if name.startswith(COMPILED) else loss
    for name, loss in contestants.items():
        try:
            run = step(loss, inputs)
            found["milliseconds"][name] = bench(run)
            found["memory"][name] = peak_memory(run, device)
        except Exception as error:  # whatever a baseline dies of is its own affair, and is reported
            found["failed"][name] = _reason(error)
    if "ours" in found["milliseconds"]:
        moved = (2 if case.loss in ("CE", "suffixes") else 3) * inputs[0].numel() * inputs[0].element_size()
        found["copy_share"] = moved / copy_rate / (found["milliseconds"]["ours"] * 1e-3)
        found["errors"] = errors_of(case, device, backend)
    return found


def measure_heads(
    device: torch.device, bench: Bench, size: tuple[int, int, int] = HEAD, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Any], list[tuple[bool, str]]]:
    """KD and PLD from hidden states against the matrix products alone and logits held whole."""
    rows, width, classes = size
    make = torch.Generator(device).manual_seed(0)

    def drawn(n: int) -> Tensor:
        return torch.randn(n, width, device=device, generator=make).div_(width**0.25).to(dtype)

    hidden, weight, teacher_hidden, teacher_weight = drawn(rows), drawn(classes), drawn(rows), drawn(classes)
    target = torch.randint(classes, (rows,), device=device, generator=make)

    def products() -> None:
        logits = hidden @ weight.T
        logits.T @ hidden
        logits @ weight
        teacher_hidden @ teacher_weight.T

    def run(loss: Callable[..., Tensor], held: torch.dtype | None = None) -> Callable[[], None]:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

        def step() -> None:
            student = luce.LinearLogits(x, w)
            teacher = luce.LinearLogits(teacher_hidden, teacher_weight)
            if held is None:
                loss(student, teacher, target).backward()
            else:
                loss(student.logits().to(held), teacher.logits().to(held), target).backward()
            x.grad = w.grad = None

        return step

    found: dict[str, Any] = {"products": bench(products), "milliseconds": {}, "memory": {}, "failed": {}}
    contestants = {
        "linear_kd": run(functools.partial(luce.linear_kd_loss, temperature=TEMPERATURE)),
        "linear_pld": run(functools.partial(luce.linear_pld_loss, top_k=128)),
        HELD: run(_eager_kd, dtype),
        f"{HELD} in float32": run(_eager_kd, torch.float32),
        "Liger linear KD": run(_liger_linear_kd),
    }
    for name, step in contestants.items():
        try:
            found["milliseconds"][name] = bench(step)
            found["memory"][name] = peak_memory(step, device)
        except Exception as error:
            found["failed"][name] = _reason(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    said = []
    whole = found["memory"].get(HELD)
    for name in ("linear_kd", "linear_pld"):
        if name not in found["milliseconds"]:
            said.append((False, f"{name}: {found['failed'][name]}"))
            continue
        times = found["milliseconds"][name] / found["products"]
        said.append((times <= HEAD_TIMES, f"{name}: {times:.2f} times the products, goal {HEAD_TIMES}"))
        if whole:
            share = found["memory"][name] / whole
            words = f"{name}: {share:.3f} of the memory of {HELD}, goal {HEAD_MEMORY}"
            said.append((share <= HEAD_MEMORY, words))
    return found, said


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def verdicts(case: Case, found: dict[str, Any]) -> list[tuple[bool, str]]:
    """Whether each goal of a case was reached, in words."""
    if "ours" in found["failed"]:
        return [(False, f"{case.name}: {found['failed']['ours']}")]
    said = []
    times = found["milliseconds"]
    if case.copy_share is not None:
        share = found["copy_share"]
        said.append(
            (share >= case.copy_share, f"{case.name}: {share:.2f} of the copy limit, goal {case.copy_share}")
        )
    for name, goal in case.at_least.items():
        if name in times:
            ratio = times[name] / times["ours"]
            said.append((ratio >= goal, f"{case.name}: {ratio:.1f} times as fast as {name}, goal {goal:g}"))
        else:
            said.append((False, f"{case.name}: {name} did not run, {found['failed'].get(name)}"))
    most = ERRORS[case.loss] + (BFLOAT16 if case.dtype == "bfloat16" else 0)
    errors = found["errors"]
    right = errors["value"] <= ERRORS[case.loss] and errors["gradient"] <= most
    said.append(
        (right, f"{case.name}: errors {errors['value']:.0e} and {errors['gradient']:.0e}, at most {most:.0e}")
    )
    return said


def rates(device: torch.device, bench: Bench, elements: int = 2**28, side: int = 8192) -> dict[str, float]:
    """What the device does at most: bytes a second of a copy, steps a second of a matrix product."""
    x = torch.empty(elements, device=device)
    y = torch.empty_like(x)
    copied = 2 * x.numel() * x.element_size() / (bench(lambda: y.copy_(x)) * 1e-3)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return {"copy_bytes_per_second": copied, "matrix_flops": 2 * side**3 / (bench(lambda: a @ a) * 1e-3)}


def run_tests(seconds: float) -> str:
    """The GPU tests of the checkout: "passed", or why there is no such word."""
    root = Path(__file__).parents[3]
    names = [str(path) for path in root.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()]
    if not names:
        return "not run: this is no checkout"
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *sorted(names)]
    if importlib.util.find_spec("xdist") is not None:  # kernels compile side by side
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 1)))]
    path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} seconds"
    summary = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    if done.returncode:
        print(done.stdout[-4000:])
    return f"{'passed' if done.returncode == 0 else 'FAILED'}: {summary}"


def check(
    device: torch.device,
    bench: Bench,
    cases: Sequence[Case] = CASES,
    backend: str = "gpu",
    seconds: float = SECONDS,
    tests: str = "not run",
    head: tuple[int, int, int] = HEAD,
    **sizes: int,
) -> dict[str, Any]:
    """Measure the cases and judge them; everything, as one record."""
    begin = time.monotonic()
    found: dict[str, Any] = {
        "device": _name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "luce": commit() or luce.__version__,
        "tests": tests,
        "rates": rates(device, bench, **sizes),
        "cases": [],
    }
    copy_rate = found["rates"]["copy_bytes_per_second"]
    said = []
    for case in cases:
        if time.monotonic() - begin > seconds:
            said.append((False, f"{case.name}: not measured, the {seconds:.0f} seconds were over"))
            continue
        print(f"measuring {case.name}", file=sys.stderr)
        try:
            measured = measure(case, device, backend, bench, copy_rate)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:  # the device's memory is full, or the device lost: what there is, is told
            measured = {
                "case": case.name,
                "milliseconds": {},
                "memory": {},
                "failed": {"ours": _reason(error)},
            }
        found["cases"].append(measured)
        said += verdicts(case, measured)
    if time.monotonic() - begin > seconds:
        said.append((False, f"linear_kd, linear_pld: not measured, the {seconds:.0f} seconds were over"))
    else:
        print("measuring losses from hidden states", file=sys.stderr)
        try:
            found["heads"], of_heads = measure_heads(device, bench, head)
        except Exception as error:
            of_heads = [(False, f"linear_kd, linear_pld: {_reason(error)}")]
        said += of_heads
    found["verdicts"] = [{"reached": reached, "goal": words} for reached, words in said]
    return found


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="luce bench --suite gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu/results.json"), metavar="FILE"
    )
    parser.add_argument("--skip-tests", action="store_true")
    request = parser.parse_args(words)
    why = "there is no CUDA device" if not torch.cuda.is_available() else why_no_triton(torch.device("cuda"))
    if why is not None:
        print(f"luce bench --suite gpu: nothing was measured, {why}", file=sys.stderr)
        return 1
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # before the minutes, not after them
        print(f"luce bench --suite gpu: cannot write to {request.out}: {error.strerror}", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    begin = time.monotonic()
    tests = "not run: --skip-tests"
    if not request.skip_tests:
        print(f"testing, for at most {SECONDS / 2:.0f} seconds", file=sys.stderr)
        tests = run_tests(SECONDS / 2)
    bench = functools.partial(do_bench, warmup=25, rep=200, return_mode="median")
    left = SECONDS - (time.monotonic() - begin)
    found = check(torch.device("cuda"), bench, seconds=left, tests=tests)
    text = page(found)
    print(text)
    record = json.dumps({**found, "goals": [asdict(case) for case in CASES]}, indent=1)
    beside = request.out.with_suffix(".txt")
    for path, content in ((request.out, record), (beside, text)):
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(content + "\n")
        aside.replace(path)
    print(f"results: {request.out}, {beside}")
    return 0 if tests.startswith(("passed", "not run")) else 1


if __name__ == "__main__":
    sys.exit(main())
