"""``luce serve``: a finished run's student as a black box behind HTTP."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..remote.server import ServiceOptions, build_app, listen, new_server
from ..training import checkpoint

TOKEN = "LUCE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Options(ServiceOptions):
    """Answer queries over HTTP with the student of a finished run; docs/black-box.md describes the protocol.

    The answers reveal no more than --answers allows. The server listens on this machine alone unless --host
    is given.

      luce serve runs/digits-teacher --answers label --port 8000

    Attributes:
        folder: A finished run.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        token: Token that each request must present. If not given, the value of the environment variable
            LUCE_TOKEN, else a random one, which is printed.
        cpu: Use the CPU even if there is a GPU.
        trusted: Let the folder name code of others, such as python: networks.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    cpu: bool = False
    trusted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 2**16:
            raise UserError(f"expected `port` in 0 .. 65535, got {self.port}")


def main(options: Options, _: str) -> None:
    """Serve until interrupted."""
    token = os.environ.get(TOKEN) if options.token is None else options.token
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise UserError("expected a token of printable ASCII characters without spaces")
    if token is None and options.host not in LOOPBACK:
        raise UserError(
            f"expected a token to listen on {options.host}, which other machines can reach; give --token or "
            f"{TOKEN}"
        )
    network, description = checkpoint.load_student(options.folder, trusted=options.trusted)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    secret = token or secrets.token_urlsafe(24)
    server = new_server(build_app(network, description, options, token=secret, device=device))
    with listen(options.host, options.port) as listener:
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(
            f"serving {description['model']} of {options.folder}: {len(description['classes'])} classes, "
            f"answers {options.answers}\nurl: http://{host}:{listener.getsockname()[1]}"
        )
        print(f"token: {secret if token is None else 'as given'}", flush=True)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # Ctrl-C is the ordinary end of a server
            return
