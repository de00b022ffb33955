"""``python -m benchmarks.mutants``: run the tests against every mutant and count those that are noticed."""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from .losses import LOSSES
from .mutant import Mutant, MutantError, apply, locate_tests, read_sources
from .native import NATIVE
from .ops import OPS
from .training import TRAINING

MUTANTS: tuple[Mutant, ...] = (*LOSSES, *OPS, *TRAINING, *NATIVE)
COPIED = ("src", "csrc", "tests", "recipes", "benchmarks", "docs", "examples")
TEST_FAILED = 1
"""What pytest exits with when tests ran and one failed: any other failure says nothing about the mutant."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed, survived, timeout, or error where the tests could not run."""

    name: str
    file: str
    verdict: str
    seconds: float
    by: str
    tests: list[str]


class Copy:
    """A copy of a checkout, in which one mutant at a time is tested."""

    def __init__(self, tree: Path, folder: Path, python: Path) -> None:
        self.folder, self.python = folder, python
        for path in tree.iterdir():
            if path.is_file():
                shutil.copy2(path, folder)
            elif path.name in COPIED:
                shutil.copytree(path, folder / path.name)
        self.sources = read_sources(folder)
        self.server = subprocess.Popen(
            [python, Path(__file__).with_name("preloaded.py")],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def pytest(self, tests: Sequence[str], limit: float) -> tuple[int | None, str]:
        """Exit status, None after the time limit, and the end of what pytest printed."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        arguments = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
        self.server.stdin.write(json.dumps({"arguments": arguments, "limit": limit}) + "\n")
        self.server.stdin.flush()
        if not (line := self.server.stdout.readline()):
            raise MutantError("the process that runs pytest has died")
        answer = json.loads(line)
        return answer["status"], answer["output"]

    def build(self) -> None:
        done = subprocess.run(
            [self.python, "hatch_build.py"], cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise MutantError(f"the native library does not build: {(done.stdout + done.stderr)[-1000:]}")

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()

    def judge(self, mutant: Mutant, limit: float) -> Outcome:
        started = time.perf_counter()
        path, text = apply(mutant, self.sources)
        tests = locate_tests(self.folder, mutant.tests)
        built = self.folder / "build", self.folder / "src/luce/ops/lib"
        kept = self.folder / "kept"
        if mutant.native:
            if not built[0].exists():
                self.build()
            for folder in built:
                shutil.copytree(folder, kept / folder.name, copy_function=shutil.copy2)
        before = (self.folder / path).stat()
        (self.folder / path).write_text(text, encoding="utf-8")
        try:
            if mutant.native:
                self.build()
            status, output = self.pytest(tests, limit)
        finally:
            (self.folder / path).write_text(self.sources[path], encoding="utf-8")
            os.utime(self.folder / path, ns=(before.st_atime_ns, before.st_mtime_ns))
            if mutant.native:  # with their times, so that nothing else is compiled again
                for folder in built:
                    shutil.rmtree(folder)
                    shutil.move(kept / folder.name, folder)
        verdict = {None: "timeout", 0: "survived", TEST_FAILED: "killed"}.get(status, "error")
        seconds = round(time.perf_counter() - started, 1)
        return Outcome(mutant.name, str(path), verdict, seconds, _reason(verdict, output), tests)


def _reason(verdict: str, output: str) -> str:
    """The first failed test, or the end of what pytest said where it could not run."""
    if verdict == "killed" and (failed := re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)):
        return failed[1]
    return "" if verdict in ("survived", "timeout") else output[-500:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument(
        "--tree", type=Path, default=Path.cwd(), help="a checkout with its native library built"
    )
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="an interpreter with pytest"
    )
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="such as 'losses/*'")
    parser.add_argument("--jobs", type=int, default=1, help="copies that work side by side")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of one mutant")
    parser.add_argument("--skip-baseline", action="store_true", help="trust that the tests pass unmutated")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="outcomes, written after each mutant")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if any(fnmatch(m.name, pattern) for pattern in options.only)]
    python = options.python.absolute()  # not resolved: a link into a virtual environment must stay one
    try:
        sources = read_sources(options.tree)
        for mutant in chosen:
            apply(mutant, sources)
            locate_tests(options.tree, mutant.tests)
        outcomes = run(
            options.tree, python, chosen, options.jobs, options.limit, options.skip_baseline, options.out
        )
    except MutantError as error:
        print(error, file=sys.stderr)
        return 2
    counts = Counter(outcome.verdict for outcome in outcomes)
    print(f"{len(outcomes)} mutants: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    return 0


def run(
    tree: Path,
    python: Path,
    chosen: Sequence[Mutant],
    jobs: int,
    limit: float,
    trusted: bool,
    out: Path | None,
) -> list[Outcome]:
    """Test the mutants in copies of the tree, printing a line for each.

    Raises:
        MutantError: If the tests fail without any mutant, or the library does not build.
    """
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        copies: queue.Queue[Copy] = queue.Queue()
        for job in range(jobs):
            folder = Path(parent, str(job))
            folder.mkdir()
            copies.put(Copy(tree, folder, python))
        if not trusted:
            first = copies.queue[0]
            tests = sorted({test for m in chosen for test in locate_tests(first.folder, m.tests)})
            status, output = first.pytest(tests, 10 * limit)
            if status != 0:
                raise MutantError(f"the tests must pass before anything is mutated: {output[-2000:]}")

        def judge(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                return copy.judge(mutant, limit)
            finally:
                copies.put(copy)

        try:
            with ThreadPoolExecutor(jobs) as pool:
                for number, outcome in enumerate(pool.map(judge, chosen), 1):
                    outcomes.append(outcome)
                    line = (
                        f"{number}/{len(chosen)} {outcome.verdict:8} {outcome.seconds:6.1f} s {outcome.name}"
                    )
                    print(line, outcome.by.splitlines()[-1] if outcome.by else "", flush=True)
                    if out is not None:
                        text = json.dumps([asdict(each) for each in outcomes], indent=1)
                        out.write_text(text + "\n", encoding="utf-8")
        finally:
            while not copies.empty():
                copies.get().close()
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
