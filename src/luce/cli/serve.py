"""``luce serve``: a finished run's student as a black box behind HTTP."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

USAGE = "luce serve FOLDER [--answers probs|topk|label] [--host ADDRESS] [--port PORT] [--token TOKEN] [...]"
DESCRIPTION = """Answer questions over HTTP with the student of a run folder, which tells no more than asked
for; docs/black-box.md has the protocol. It listens on this machine alone unless an address is given.

  luce serve runs/digits-teacher --answers label --port 8000"""
TOKEN = "LUCE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _parser() -> argparse.ArgumentParser:
    from ._parser import Parser

    parser = Parser("serve", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a finished run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, which takes a free one, unless given")
    parser.add_argument(
        "--answers", default="probs", help="what is told of a row: probs, topk or label; probs unless given"
    )
    parser.add_argument("--top_k", type=int, help="how many classes topk tells")
    parser.add_argument("--decimals", type=int, help="round probabilities to so many")
    parser.add_argument(
        "--token", help=f"that a request must bring; else the variable {TOKEN} has it, or one is made up"
    )
    parser.add_argument("--max_request_bytes", type=int, default=16 * 2**20, help="16 MiB unless given")
    parser.add_argument("--max_batch", type=int, default=1024, help="most rows in a request: 1024")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    return parser


def main(words: Sequence[str]) -> None:
    parser = _parser()
    if "--help" in words or "-h" in words:
        parser.print_help()
        return
    request = parser.parse_args(list(words))
    token = os.environ.get(TOKEN) if request.token is None else request.token
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise UserError("expected a token of plain characters, without spaces")
    if token is None and request.host not in LOOPBACK:
        raise UserError(
            f"expected a token to listen on {request.host}, where others can ask; give --token or {TOKEN}"
        )

    import torch

    from ..remote.server import ServiceOptions, build_app, new_server
    from ..training import checkpoint

    offer = ServiceOptions(
        request.answers, request.top_k, request.decimals, request.max_batch, request.max_request_bytes
    )
    network, description = checkpoint.load_student(request.folder)
    device = torch.device("cuda" if torch.cuda.is_available() and not request.cpu else "cpu")
    made_up = token is None
    token = token or secrets.token_urlsafe(24)
    server = new_server(build_app(network, description, offer, token=token, device=device))
    with _listening(request.host, request.port) as door:
        host = f"[{request.host}]" if ":" in request.host else request.host
        print(
            f"serving {description['model']} of {request.folder}: {len(description['classes'])} classes, "
            f"{offer.answers} alone\nurl: http://{host}:{door.getsockname()[1]}"
        )
        print(f"token: {token}" if made_up else "token: the one that was given", flush=True)
        try:
            server.run(sockets=[door])
        except KeyboardInterrupt:  # how a server is told to end
            return


def _listening(host: str, port: int) -> socket.socket:
    """A socket on this address.

    Raises:
        UserError: If it cannot be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"expected `--port` in 0 .. 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
        door.listen()  # whoever reads the address may come before the server is quite awake
    except OSError as error:
        door.close()
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another"
        ) from error
    return door
