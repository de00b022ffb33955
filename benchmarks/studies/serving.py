"""Throughput of a teacher behind `luce serve` against the same network in the process.

    python -m benchmarks.studies.serving RUN [--rows 4096] [--rounds 5] [--out FILE]

A process serves the student of a finished run over loopback. `RemoteTeacher` queries it about new rows each
time, 8 requests of 256 at once; then the same network in a process of its own answers as many rows in batches
of 256. Both take turns, as the machine may be busy with other things, and the medians are compared. Set
OMP_NUM_THREADS for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from luce.remote import RemoteTeacher
from luce.runs.environment import environment
from luce.training import checkpoint

BATCH = 256
LOCAL = """
import sys, time, torch
from pathlib import Path
from luce.training import checkpoint
network, description = checkpoint.load_student(Path(sys.argv[1]))
rows = torch.rand(int(sys.argv[2]), *description["input_shape"])
with torch.no_grad():
    network(rows[:256])
    for _ in sys.stdin:
        started = time.perf_counter()
        for batch in rows.split(256):
            network(batch)
        print(time.perf_counter() - started, flush=True)
"""


def process(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )


def measure(run: Path, rows: int, rounds: int, concurrency: int) -> dict[str, Any]:
    """Return rows per second over HTTP and locally, and their ratio."""
    _, description = checkpoint.load_student(run)
    server = process("-m", "luce", "serve", str(run), "--cpu")
    local = process("-c", LOCAL, str(run), str(rows))
    assert server.stdout is not None
    assert local.stdout is not None
    assert local.stdin is not None
    try:
        server.stdout.readline()
        url, token = (server.stdout.readline().split()[-1] for _ in range(2))
        teacher = RemoteTeacher(url, token=token, concurrency=concurrency, batch_size=BATCH)
        generator = torch.Generator().manual_seed(0)
        seconds: dict[str, list[float]] = {"remote": [], "local": []}
        for _ in range(rounds + 1):
            inputs = torch.rand(rows, *description["input_shape"], generator=generator)
            started = time.perf_counter()
            teacher.query(inputs)
            seconds["remote"].append(time.perf_counter() - started)
            local.stdin.write("\n")
            local.stdin.flush()
            seconds["local"].append(float(local.stdout.readline()))
        teacher.close()
    finally:
        server.kill()
        local.kill()
    warm = {name: values[1:] for name, values in seconds.items()}  # the first round warms both up
    medians = {name: statistics.median(values) for name, values in warm.items()}
    return {
        "model": description["model"],
        "rows": rows,
        "batch": BATCH,
        "concurrency": concurrency,
        "threads": torch.get_num_threads(),
        "rows_per_second": {name: rows / value for name, value in medians.items()},
        "ratio": medians["local"] / medians["remote"],
        "ratio_by_round": [b / a for a, b in zip(warm["remote"], warm["local"], strict=True)],
        "seconds": warm,
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a finished run, such as runs/fashion-mnist/teacher"
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--out", type=Path, help="append the result to this file")
    request = parser.parse_args()
    figures = measure(request.run, request.rows, request.rounds, request.concurrency)
    spread = ", ".join(f"{ratio:.2f}" for ratio in sorted(figures["ratio_by_round"]))
    rates = {name: f"{rate:,.0f} rows/s" for name, rate in figures["rows_per_second"].items()}
    print(
        f"{figures['model']}: {rates['remote']} over HTTP, {rates['local']} locally: "
        f"{figures['ratio']:.2f} ({spread})"
    )
    if request.out is not None:
        with request.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
