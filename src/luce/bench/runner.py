"""The steps of a run: the tests of the ops, what all figures share, and one case."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..errors import UserError
from ..runs.environment import environment
from . import measure, memory
from .cases import Case
from .contestants import COMPILED, find, names
from .inputs import pool
from .results import Record, record

CHECKOUT = Path(__file__).resolve().parents[3]
# What vector code is chosen by: how its names begin in /proc/cpuinfo, on x86 and on Arm.
INSTRUCTIONS = ("sse4", "avx", "amx", "fma", "f16c", "neon", "asimd", "sve", "bf16")


def check_ops() -> str:
    """Run the tests of the ops and say so; figures of wrong code are worth nothing.

    Raises:
        UserError: If a test fails or the tests cannot run.
    """
    tests = CHECKOUT / "tests" / "ops"
    if not tests.is_dir():
        return "not in this installation"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(tests)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(
            f"expected the ops' tests to pass before anything is measured, pytest said: {said}; mend them "
            "(pytest tests/ops), or pass --skip-tests, which the results will say"
        )
    return "passed"


def describe(tests: str, load: float | None) -> dict[str, Any]:
    """What all figures of a run share."""
    found = environment()
    found.pop("threads")  # each record says its own
    started = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    backend: dict[str, Any] = getattr(ops, "describe", dict)()
    return {
        "id": f"{started}-{(found['commit'] or 'installed').rstrip('+')[:7]}",
        "tests": tests,
        "load": load,
        "quiet": measure.is_quiet(load),
        "environment": {**found, "cores": os.cpu_count(), **backend, "instructions": instructions()},
    }


def instructions() -> str:
    """Vector instructions of the processor, as far as the system tells."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    return " ".join(sorted({word for word in words if word.startswith(INSTRUCTIONS)}))


def measure_case(case: Case, threads: int, *, seconds: float, compile: bool) -> Record:
    """Time and memory of all contestants of a case."""
    steps = {name: find(name) for name in names(case.candidate, case.baselines)}
    left_out = [] if compile else [name for name in steps if name.startswith(COMPILED)]
    if compile:
        torch.compiler.reset()  # every case is compiled for its own shape and threads
    with measure.using(threads):
        taking_part = {name: step for name, step in steps.items() if name not in left_out}
        timing = measure.interleave(taking_part, pool(case), seconds=seconds, backward=case.backward)
    timing.failed |= dict.fromkeys(left_out, "only with --compile")
    try:
        eager = [name for name in timing.seconds if not name.startswith(COMPILED)]
        arrays = memory.of(case, eager, threads)
    except RuntimeError as error:
        arrays, timing.failed["memory"] = {}, str(error)
    copy = {"threads": threads, "copy_gbps": measure.copy_bandwidth(threads)}
    return copy | record(case, timing, arrays)
