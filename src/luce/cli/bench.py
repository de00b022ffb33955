"""``luce bench``: speed and memory of losses and ops against their baselines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

from ..errors import UserError

DESCRIPTION = """Measure losses and ops against what people use instead: candidate and baselines take turns
in one process on the same random logits. Cases are named by the beginning of a name (softmax, pld, kd,
pld/exact), by a pattern ('pld/*/float32'), or all at once. The tests of the ops run first: if one fails,
there are no figures. A line for each case and number of threads is added to --out; README.md and ratios.png
beside it show the last run. Close everything else: a busy machine makes figures useless."""


class Parser(argparse.ArgumentParser):
    """Refuses as Luce does: one sentence, exit status 2."""

    def __init__(self, command: str, **settings: str) -> None:
        super().__init__(
            prog=f"luce {command}",
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help tells more")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("bench", description=DESCRIPTION)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which cases; all unless given")
    parser.add_argument(
        "--suite", choices=("cpu", "gpu"), default="cpu", help="gpu: the Triton kernels, on a CUDA device"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and their goals, measure nothing")
    parser.add_argument(
        "--seconds", type=_seconds, default=4.0, help="for each case and number of threads: 4"
    )
    parser.add_argument("--threads", type=_counts, help="such as 1,2; 1 and all of them unless given")
    parser.add_argument(
        "--compile", action="store_true", help="baselines through torch.compile too, which takes minutes"
    )
    parser.add_argument("--skip-tests", action="store_true", help="do not run the ops' tests; results say so")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON lines to add to: benchmarks/results/cpu/results.jsonl; one JSON with --suite gpu",
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
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of threads such as 1,2, got {text!r}")
    return counts


def main(words: Sequence[str]) -> None:
    parser = _parser()
    if "--help" in words or "-h" in words:
        parser.print_help()
        return
    request = parser.parse_args(words)
    if request.suite == "gpu":
        _gpu(request)
        return
    request.out = request.out or Path("benchmarks/results/cpu/results.jsonl")

    import torch
    from rich.console import Console

    from ..bench import measure, report, results, runner
    from ..bench.cases import select
    from ..files import make_folder
    from ..training.progress import Bar, progress_bars

    cases = select(request.cases or ["all"])
    if request.list:
        for case in cases:
            print(f"{case.name}: {case.candidate}", *case.goals, sep="; ")
        return
    if request.out.is_dir():
        raise UserError(f"expected a file after `--out`, got the folder {request.out}; name one in it")
    make_folder(request.out.parent)
    load = measure.load()  # before the tests make some
    if not measure.is_quiet(load):
        known = "unknown" if load is None else f"{load:.2f}"
        print(f"luce bench: the machine is not quiet (load {known}); figures will be noisy", file=sys.stderr)
    shared = runner.describe("skipped" if request.skip_tests else runner.check_ops(), load)
    turns = list(product(cases, request.threads or sorted({1, torch.get_num_threads()})))
    records: list[results.Record] = []
    try:
        with progress_bars() as progress, Bar(progress, "cases", len(turns)) as bar:
            for number, (case, threads) in enumerate(turns):
                bar.note(f"{case.name}, {threads} threads")
                found = runner.measure_case(case, threads, seconds=request.seconds, compile=request.compile)
                records.append({"id": f"{shared['id']}-{number:03d}", **found, "run": shared})
                results.append(request.out, records[-1])
                bar.advance()
    finally:  # also of a run that was stopped
        if records:
            Console().print(report.terminal(records))
            report.write_pages(request.out)
            print(f"results: {request.out}")
    failed = [found for found in records if found["candidate"] in found["failed"]]
    if failed:
        why = failed[0]["failed"][failed[0]["candidate"]]
        raise UserError(f"{len(failed)} of {len(records)} measurements failed; {failed[0]['case']}: {why}")


def _gpu(request: argparse.Namespace) -> None:
    from ..bench import gpu

    words = ["--skip-tests"] if request.skip_tests else []
    words += [] if request.out is None else ["--out", str(request.out)]
    if request.cases or request.list:
        raise UserError("`--suite gpu` measures all its cases in one run; leave out CASE and --list")
    if code := gpu.main(words):
        sys.exit(code)
