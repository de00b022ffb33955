"""Peak memory of a step beyond its inputs, the scratch memory of native code included.

On a GPU PyTorch's allocator counts it. On a CPU every case gets a fresh process (``python -m
benchmarks.memory``, request and answer as JSON). Each step runs once on small inputs, which loads libraries
and starts threads, then once on the case's shape: the figure is how far the resident set rose at its highest.
Linux resets that mark (``VmHWM``) when 5 is written to ``/proc/self/clear_refs``; other systems are not
measured. Freed blocks that the allocator keeps would blur it by several arrays, so it returns large ones at
once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .baselines import find, run
from .cases import COMPILED, Case
from .inputs import device_of, make

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of a process whose memory is measured."""


def of(case: Case, steps: Sequence[str], threads: int) -> dict[str, float]:
    """Return the extra peak of each step in arrays of N x C of the case's dtype; empty if not measurable.

    Raises:
        RuntimeError: If the process fails, as it does when memory runs out.
    """
    if not (steps and case.measures_memory):
        return {}
    if case.device == "gpu":
        peaks = {name: _peak_on_gpu(name, case) for name in steps}
    elif RESET.exists():
        peaks = _in_a_fresh_process(case, [n for n in steps if not n.startswith(COMPILED)], threads)
    else:
        return {}
    return {name: peak / case.array_bytes for name, peak in peaks.items()}


def _in_a_fresh_process(case: Case, steps: Sequence[str], threads: int) -> dict[str, int]:
    request = {"case": asdict(case), "steps": steps, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **RETURN_BLOCKS},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"the process that measures memory failed: {last}")
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def risen(work: Callable[[], object]) -> int:
    """Return by how many bytes the resident set rises during `work`, at its highest."""
    RESET.write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(mark: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) * 1024


def _peak(name: str, case: Case) -> int:
    generator = torch.Generator().manual_seed(0)
    step = find(name)
    run(step, make(case, (2, min(case.shape[1], 1000)), generator), backward=case.backward)
    inputs = make(case, case.shape, generator)
    return risen(lambda: run(step, inputs, backward=case.backward))


def _peak_on_gpu(name: str, case: Case) -> int:
    device = device_of(case)
    step, inputs = find(name), make(case, case.shape, torch.Generator(device).manual_seed(0))
    run(step, inputs, backward=case.backward)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(step, inputs, backward=case.backward)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    request = json.load(sys.stdin)
    case = Case(**{**request["case"], "shape": tuple(request["case"]["shape"]), "goals": ()})
    torch.set_num_threads(request["threads"])
    json.dump({name: _peak(name, case) for name in request["steps"]}, sys.stdout)


if __name__ == "__main__":
    main()
