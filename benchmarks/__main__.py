"""``python -m benchmarks``: speed and memory of losses and operators against their baselines."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from luce.errors import UserError

from . import machine, report, results
from .cases import Case, select
from .measure import measure_case

DESCRIPTION = """Measure losses and operators against their baselines: the candidate and its baselines take
turns in one process on the same random logits. Name cases by the beginning of a name (softmax, pld,
pld/exact), by a pattern ('pld/*/float32'), or not at all for all of them. The operators' tests run first: if
one fails, a CPU gets no figures. A record for each case and number of threads is added to --out; README.md
and ratios.png beside it show the last run. Stop everything else: a busy machine makes figures useless.
With --device gpu this needs a CUDA device, PyTorch, NumPy and Triton, and no other package."""
GPU_SECONDS = 480
"""Default of --limit on a GPU, tests included; cases that no longer fit are left out and reported."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "action", choices=("run", "list"), help="measure cases, or list them with their goals"
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which cases; all unless given")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: the Triton kernels")
    parser.add_argument("--seconds", type=_seconds, default=None, help="for each case: 4, on a GPU 1")
    parser.add_argument("--threads", type=_counts, help="such as 1,2; 1 and all of them unless given")
    parser.add_argument("--limit", type=_seconds, help=f"seconds for the whole run; on a GPU {GPU_SECONDS}")
    parser.add_argument(
        "--compile", action="store_true", help="baselines through torch.compile too: minutes; always on a GPU"
    )
    parser.add_argument("--skip-tests", action="store_true", help="do not run the tests; results say so")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="benchmarks/results/cpu/results.jsonl.gz unless given"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of threads such as 1,2, got {text!r}")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        cases = select(options.cases or ["all"], options.device)
        if options.action == "list":
            for case in cases:
                print(f"{case.name}: {case.candidate}", *case.goals, sep="; ")
            return 0
        return _measure(cases, options)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _measure(cases: Sequence[Case], options: argparse.Namespace) -> int:
    gpu = options.device == "gpu"
    if gpu:
        _check_gpu()
    out = options.out or Path(f"benchmarks/results/{options.device}/results.jsonl.gz")
    if out.is_dir():
        raise UserError(f"expected a file after `--out`, got the folder {out}; name one in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring, not after them
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another file with --out") from error
    load = machine.read_load()  # before the tests make some
    if not machine.is_quiet(load):
        known = "unknown" if load is None else f"{load:.2f}"
        print(f"the machine is not quiet (load {known}); figures will be noisy", file=sys.stderr)
    limit = options.limit or (GPU_SECONDS if gpu else math.inf)
    end = time.monotonic() + limit
    tests = "not run: --skip-tests"
    if not options.skip_tests:
        tests = machine.run_tests(options.device, limit / 2 if math.isfinite(limit) else None)
    failed_tests = not tests.startswith(("passed", "not run"))
    if failed_tests and not gpu:  # time on a GPU is rare: there, everything is measured and then reported
        raise UserError(
            f"expected the operators' tests to pass before anything is measured, got: {tests}; correct them "
            "(pytest tests/ops), or pass --skip-tests, which the results will show"
        )
    shared = machine.describe_run(options.device, tests, load)
    threads = [1] if gpu else options.threads or sorted({1, torch.get_num_threads()})
    records: list[results.Record] = []
    turns = list(product(cases, threads))
    try:
        for number, (case, count) in enumerate(turns):
            if time.monotonic() > end:
                print(f"no time left for the last {len(turns) - number} measurements", file=sys.stderr)
                break
            print(f"{number + 1}/{len(turns)} {case.name}, threads {count}", file=sys.stderr)
            seconds = options.seconds or (1.0 if gpu else 4.0)
            figures = measure_case(case, count, seconds=seconds, compile=options.compile or gpu)
            records.append({"id": f"{shared['id']}-{number:03d}", **figures, "run": shared})
            results.append(out, records[-1])
    finally:  # also of a run that was stopped
        if records:
            print(report.text(records))
            report.write_pages(out)
            print(f"tests {tests}; results: {out}")
    failed = [record for record in records if record["candidate"] in record["failed"]]
    if failed:
        why = failed[0]["failed"][failed[0]["candidate"]]
        raise UserError(f"{len(failed)} of {len(records)} measurements failed; {failed[0]['case']}: {why}")
    return int(failed_tests)


def _check_gpu() -> None:
    from luce.ops.engines import why_no_triton

    why = "there is no CUDA device" if not torch.cuda.is_available() else why_no_triton(torch.device("cuda"))
    if why is not None:
        raise UserError(f"nothing was measured, {why}")


if __name__ == "__main__":
    sys.exit(main())
