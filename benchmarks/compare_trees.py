"""``python -m benchmarks.compare_trees --before OLD --after NEW``: the speed of two checkouts, interleaved.

Each round starts a process for either tree, in an order reversed each round, on the same inputs. A figure
of a process is the median over many steps, forward and backward; a ratio is taken within a round, so that a
drift of the machine's speed cancels. Both trees need their native library built. Run it on a machine that
does nothing else; on the same tree twice it shows the noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPES = ((128, 100), (1024, 1000), (16, 128256))
POOL_BYTES = 64 * 2**20
FEWEST_STEPS = 7

Figures = dict[str, float]
"""Milliseconds of a step by ``loss NxC, threads T``."""


def _steps() -> dict[str, Callable[..., Any]]:
    import luce
    from luce.ops.softmax import softmax

    return {
        "pld": lambda s, t, y, g: luce.pld_loss(s, t, y).backward(),
        "kd": lambda s, t, y, g: luce.kd_loss(s, t, temperature=4.0).backward(),
        "softmax": lambda s, t, y, g: softmax(s).backward(g),
    }


def _inputs(shape: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Logits like an image classifier's or, above 1000 classes, a language model's; enough rows to be new."""
    import torch

    make = torch.Generator().manual_seed(0)

    def logits(rank: Any) -> Any:
        noise = torch.randn(shape, generator=make)
        return 1.5 * noise + 9 * (rank == 0) if shape[1] <= 1000 else 0.5 * noise - 1.8 * (rank + 1.0).log()

    pool = []
    for _ in range(min(16, max(2, POOL_BYTES // (12 * shape[0] * shape[1])))):
        rank = torch.rand(shape, generator=make).argsort(-1)
        student, teacher = logits(rank).requires_grad_(), logits(rank)
        pool.append((student, teacher, rank.argmin(-1), torch.randn(shape, generator=make)))
    return pool


def measure(seconds: float, threads: Sequence[int]) -> Figures:
    """Return the medians of this process, whose Luce is the one on the path."""
    import torch

    from luce import ops

    if ops.describe()["backend"] == "reference":
        raise RuntimeError(f"expected a native library beside {ops.__file__}; build it with `make native`")
    figures = {}
    for shape in SHAPES:
        pool = _inputs(shape)
        for (name, step), count in itertools.product(_steps().items(), threads):
            torch.set_num_threads(count)
            taken: list[float] = []
            for inputs in itertools.cycle(pool):
                begin = time.perf_counter()
                step(*inputs)
                taken.append(time.perf_counter() - begin)
                inputs[0].grad = None
                if len(taken) >= FEWEST_STEPS and sum(taken) > seconds:
                    break
            steady = taken[len(taken) // 5 :]  # the first fifth warms up
            figures[f"{name} {shape[0]}x{shape[1]}, threads {count}"] = 1e3 * statistics.median(steady)
    return figures


def run_worker(tree: Path, python: Path, seconds: float, threads: Sequence[int]) -> Figures:
    """Measure one tree in a process of its own.

    Raises:
        RuntimeError: If the process fails.
    """
    command = [str(python), __file__, "--worker", str(seconds), ",".join(map(str, threads))]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {tree} failed: {done.stderr.strip()[-1000:]}")
    figures: Figures = json.loads(done.stdout)
    return figures


def table(before: Sequence[Figures], after: Sequence[Figures]) -> str:
    """Return a row for each case: milliseconds, and how many times faster `after` is, with quantiles."""
    lines = [
        "| case | before, ms | after, ms | before / after | 20% | 80% |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for name in before[0]:
        old, new = ([figures[name] for figures in rounds] for rounds in (before, after))
        ratios = sorted(a / b for a, b in zip(old, new, strict=True))
        low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8))
        cells = [f"{statistics.median(values):.3f}" for values in (old, new)]
        cells += [f"{value:.3f}" for value in (statistics.median(ratios), low, high)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_trees", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout with its native library")
    parser.add_argument("--after", type=Path, default=Path.cwd(), help="another one; this one unless given")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of processes: 11")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each case in a process: 0.4")
    parser.add_argument("--threads", default="1,2", help="such as 1,2")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of both processes")
    options = parser.parse_args(argv)
    threads = [int(count) for count in options.threads.split(",")]
    trees = {"before": options.before.resolve(), "after": options.after.resolve()}
    rounds: dict[str, list[Figures]] = {name: [] for name in trees}
    order = list(trees)
    for number in range(options.rounds):
        for name in order:
            rounds[name].append(run_worker(trees[name], options.python, options.seconds, threads))
        order.reverse()
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"{options.rounds} rounds, {options.seconds:g} s a case, load {load}\n")
    print(table(rounds["before"], rounds["after"]))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path.pop(0)  # this file's folder, which belongs to one tree only
        print(json.dumps(measure(float(sys.argv[2]), [int(count) for count in sys.argv[3].split(",")])))
    else:
        sys.exit(main())
