"""Latency of `luce serve` on a kept connection, and the memory of its process before and after many requests.

    python -m benchmarks.studies.latency RUN [--requests 10000]

One client asks about one row at a time over loopback. The first tenth of the requests warms the server up.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from luce.documents import read_json


@contextmanager
def served(run: Path) -> Iterator[tuple[str, str, int]]:
    """Serve the student of a run; yield address, token and process number."""
    words = [sys.executable, "-m", "luce", "serve", str(run), "--cpu"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert server.stdout is not None
    try:
        server.stdout.readline()
        url, token = (server.stdout.readline().split()[-1] for _ in range(2))
        yield url, token, server.pid
    finally:
        server.kill()


def memory(process: int) -> int:
    """Resident bytes of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(run: Path, requests: int) -> dict[str, Any]:
    """Return milliseconds per request and the growth of the server in bytes."""
    row: Any = 0.5
    for size in reversed(read_json(run / "student.json")["input_shape"]):
        row = [row] * size
    body = json.dumps({"inputs": [row]}).encode()
    with served(run) as (url, token, process):
        place = urlsplit(url)
        head = f"POST /v1/predict HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {token}\r\n"
        message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        seconds, before = [], 0
        with socket.create_connection((place.hostname, place.port)) as line:
            for number in range(requests + requests // 10):
                if number == requests // 10:
                    seconds, before = [], memory(process)
                started = time.perf_counter()
                line.sendall(message)
                answer = line.recv(2**16)  # a short answer arrives in one piece
                seconds.append(time.perf_counter() - started)
                if not (answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}")):
                    raise SystemExit(f"unexpected answer: {answer[:200]!r}")
        return {
            "requests": requests,
            "median_ms": 1e3 * statistics.median(seconds),
            "p99_ms": 1e3 * statistics.quantiles(seconds, n=100)[-1],
            "least_ms": 1e3 * min(seconds),
            "grown_bytes": memory(process) - before,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.run, arguments.requests), indent=2))
