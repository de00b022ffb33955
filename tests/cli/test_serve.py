"""``luce serve`` as a process, and runs that query it, with either process killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from luce.remote import RemoteTeacher

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TOKEN = "correct-horse"


@contextmanager
def served(*words: str, token: str | None = TOKEN) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """Start ``luce serve``; yield its address, its token and the process."""
    environment = {**ENVIRONMENT, **({} if token is None else {"LUCE_TOKEN": token})}
    run = subprocess.Popen(
        [sys.executable, "-m", "luce", "serve", "runs/teacher", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    try:
        lines = [run.stdout.readline() for _ in range(3)]
        assert lines[2], lines
        url, shown = (line.partition(": ")[2].strip() for line in lines[1:])
        yield url, shown if token is None else token, run
    finally:
        run.kill()
        run.communicate()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def recipe(url: str, **changes: Any) -> dict[str, Any]:
    return {
        "method": "KD",
        "data": {"name": "sklearn:iris", "validation": 0.2},
        "student": {"name": "mlp", "options": {"hidden": [8]}},
        "teacher": {
            "url": url,
            "token_env": "LUCE_TOKEN",
            "cache_outputs": True,
            "batch_size": 4,
            "concurrency": 1,
        },
        "loss": {"kd": {"loss": "KDLoss"}},
        "training": {"epochs": 3, "batch_size": 32, "lr": 0.05},
        **changes,
    }


def paid(path: Path) -> int:
    """The number of cached answers."""
    if not path.exists():
        return 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
        try:
            return int(base.execute("SELECT count(*) FROM answer").fetchone()[0])
        except sqlite3.OperationalError:  # another process is creating it
            return 0


def test_it_answers_and_ends_when_told(teacher: Path) -> None:
    with served("--answers", "topk", "--top_k", "2", "--decimals", "3", token=None) as (url, token, run):
        assert url.startswith("http://127.0.0.1:")
        assert len(token) > 30
        assert httpx2.get(f"{url}/healthz", trust_env=False).json() == {"status": "ok"}
        service = RemoteTeacher(url, token=token).service
        assert (service.classes, service.input_shape, service.answers) == (3, (4,), "topk")
        answer = httpx2.post(  # the curl of the docs
            f"{url}/v1/predict",
            content=b'{"inputs": [[5.1, 3.5, 1.4, 0.2]]}',
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
        )
        assert answer.status_code == 200
        assert answer.json().keys() == {"model", "classes", "probs"}
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=20) in (0, -signal.SIGINT)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "expected nowhere to be a finished run"),
        ([], "expected FOLDER; luce serve --help"),
        (
            ["runs/teacher", "--answers", "logits"],
            "expected `--answers` as one of probs, topk, label, got 'logits'",
        ),
        (["runs/teacher", "--answers", "topk"], "expected `--top_k` in 1 .. 3"),
        (["runs/teacher", "--decimals", "0"], "expected `--decimals` in 1 .. 8"),
        (["runs/teacher", "--max_batch", "0"], "expected `--max_batch`"),
        (["runs/teacher", "--port", "99999"], "expected `--port` in 0 .. 65535"),
        (
            ["runs/teacher", "--host", "0.0.0.0"],
            "expected a token to listen on 0.0.0.0, which other machines can reach",
        ),
        (["runs/teacher", "--host", "203.0.113.1", "--token", "x"], "cannot listen on 203.0.113.1 port 0"),
        (["runs/teacher", "--token", ""], "expected a value after `--token`, got an empty one"),
        (["runs/teacher", "--token", "two words"], "expected a token of printable ASCII characters"),
        (["runs/teacher", "--tok", "x"], "unknown option `--tok`; did you mean `--top_k` or `--token`"),
    ],
)
def test_what_is_refused(
    words: list[str], reason: str, teacher: Path, refuses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LUCE_TOKEN", raising=False)
    assert reason in refuses("serve", *words)


def test_a_port_that_is_taken(teacher: Path, refuses: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert "choose another" in refuses("serve", "runs/teacher", "--port", str(listener.getsockname()[1]))


def test_help(luce: Any) -> None:
    answer = luce("serve", "--help")
    assert answer.status == 0
    assert "--max_request_bytes" in answer.out


@pytest.mark.slow  # test_kill.py kills a run too, tests/remote tests the cache of paid answers
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_on_either_side_nothing_is_paid_for_twice(
    teacher: Path, write: Any, luce: Any, refuses: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUCE_TOKEN", TOKEN)
    port, cache = free_port(), place / "runs" / "answers.sqlite"
    words = ("distill", write("student.yaml", base=recipe(f"http://127.0.0.1:{port}")), "--out", "out")

    # Kill the run between two answers.
    with served("--port", str(port)):
        run = subprocess.Popen(
            [sys.executable, "-m", "luce", *words],
            env=ENVIRONMENT | {"LUCE_TOKEN": TOKEN},
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 60
        while not (answered := paid(cache)):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
        run.kill()
        run.communicate()
    answered = paid(cache)
    assert 0 < answered <= 90

    # Without a server the run names the reason, and the paid answers stay in the cache.
    monkeypatch.setattr("luce.remote.transport.FIRST_WAIT", 0.001)
    reason = refuses(*words)
    assert f"http://127.0.0.1:{port}/v1/info: no connection" in reason
    assert paid(cache) == answered
    assert not (place / "out" / "result.json").exists()

    with served("--port", str(port)):
        answer = luce(*words)
    assert answer.status == 0, answer.err
    assert f"({answered} are cached)" in answer.err
    found = json.loads((place / "out" / "result.json").read_text())["teacher"]
    assert found["queries"] == paid(cache)
    assert found["queries"] <= 90
