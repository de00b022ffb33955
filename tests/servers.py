"""Servers for tests, at free ports of this machine: one that behaves, and one that does what it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor, nn

from luce.remote import wire
from luce.remote.server import ServiceOptions, build_app, new_server

TOKEN = "correct-horse"
CLASSES = ["a", "b", "c", "d"]


class Network(nn.Module):
    """From 3 numbers to the logits of 4 classes, the same in every process; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).sin() * 3)
        self.rows: list[tuple[float, ...]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows += [tuple(row) for row in inputs.tolist()]
        return inputs @ self.weight


DESCRIPTION = {"model": "toy", "classes": CLASSES, "input_shape": [3]}


@contextmanager
def serving(
    network: nn.Module | None = None,
    port: int = 0,
    description: Mapping[str, Any] = DESCRIPTION,
    **offer: Any,
) -> Iterator[str]:
    """The address of ``luce serve``'s application, in a thread."""
    app = build_app(network or Network(), description, ServiceOptions(**offer), token=TOKEN)
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(("127.0.0.1", port))
    server = new_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        door.close()


def info(**changes: Any) -> dict[str, Any]:
    """What a server of the four classes says of itself."""
    known = {"protocol": 1, "model": "toy", "classes": CLASSES, "input_shape": [3], "answers": "probs"}
    return {**known, **changes}


Reply = Callable[["Handler", int], None]
"""What to do about a question of so many rows."""


class Handler(BaseHTTPRequestHandler):
    """Answers `/v1/info`, and questions as the server's `script` says: its last entry over and over."""

    protocol_version = "HTTP/1.1"
    server: Puppet

    def do_GET(self) -> None:
        self.json(self.server.info)

    def do_POST(self) -> None:
        question = wire.parse(self.rfile.read(int(self.headers["content-length"])))
        rows = len(wire.unpack(question["inputs"]))
        with self.server.lock:
            self.server.asked.append(rows)
            step = self.server.script[min(len(self.server.asked), len(self.server.script)) - 1]
        step(self, rows)

    def json(self, content: Any, status: int = 200, **headers: str) -> None:
        self.text(json.dumps(content), status, kind="application/json", **headers)

    def text(self, text: str, status: int = 200, kind: str = "text/html", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Silence."""


class Puppet(ThreadingHTTPServer):
    """Does what its script says."""

    daemon_threads = True

    def __init__(self, script: list[Reply], said: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.info, self.asked, self.lock = script, said, [], threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """A client that has hung up is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def puppet(*script: Reply, **said: Any) -> Iterator[Puppet]:
    server = Puppet(list(script), info(**said))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def good(handler: Handler, rows: int) -> None:
    """Equal probabilities."""
    handler.json({"probs": [[0.25] * 4] * rows})
