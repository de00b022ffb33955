"""Runs pytest in forks of a process that has PyTorch loaded, which saves seconds for every mutant.

A request is a line of JSON with `arguments` and `limit`; the answer is one with `status` (None after the
limit) and `output`. Luce itself is loaded by the forks, each of which sees the mutant of its time.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time

HEAVY = ("pytest", "torch", "numpy", "accelerate", "hypothesis", "torchmetrics", "sklearn.model_selection")


def answer(arguments: list[str], limit: float) -> dict[str, object]:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.setsid()  # tests start processes of their own, which must be stopped together
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            sys.dont_write_bytecode = (
                True  # bytecode of a mutant would outlive it: source times are in seconds
            )
            status = 99
            try:
                import pytest

                status = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status_or_none = _wait(child, limit)
        output.seek(0)
        return {"status": status_or_none, "output": output.read().decode(errors="replace")[-5000:]}


def _wait(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
