"""Peak memory of a step beyond its inputs, scratch of native code included.

Every case gets a fresh process, in which each contestant takes one step on small inputs of the same kind,
to have libraries loaded and threads started, and then one on inputs of the case's shape. The figure is how
far the process's resident set rose above where it stood before that step, at its highest: Linux resets this
mark (``VmHWM``) when 5 is written to ``/proc/self/clear_refs``. What the allocator keeps of freed memory
would blur it by several arrays either way, so it is told to give large blocks back at once. Elsewhere
nothing is measured.

The process is ``python -m luce.bench.memory``: a request comes as JSON, the answer leaves as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .cases import Case
from .contestants import find
from .inputs import make
from .measure import run

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of(case: Case, contestants: Sequence[str], threads: int) -> dict[str, float]:
    """Extra peak of each contestant in arrays of N x C of the case's dtype; empty where it means nothing.

    Raises:
        RuntimeError: If the process fails, as it does when memory runs out.
    """
    if not (contestants and case.measures_memory and RESET.exists()):
        return {}
    request = {"case": asdict(case), "contestants": contestants, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "luce.bench.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"the process that measures memory failed: {last}")
    return {name: peak / case.array_bytes for name, peak in json.loads(done.stdout).items()}


def _resident(mark: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) * 1024


def _peak(name: str, case: Case) -> int:
    generator = torch.Generator().manual_seed(0)
    step = find(name)
    run(step, make(case, (2, min(case.shape[1], 1000)), generator), backward=case.backward)
    inputs = make(case, case.shape, generator)
    RESET.write_text("5")
    before = _resident("VmRSS")
    run(step, inputs, backward=case.backward)
    return _resident("VmHWM") - before


def main() -> None:
    request = json.load(sys.stdin)
    case = Case(**{**request["case"], "shape": tuple(request["case"]["shape"]), "goals": ()})
    torch.set_num_threads(request["threads"])
    json.dump({name: _peak(name, case) for name in request["contestants"]}, sys.stdout)


if __name__ == "__main__":
    main()
