"""A server that answers queries with a classifier; docs/black-box.md defines the protocol.

Needs the extra ``serve``.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import digest, log
from ..errors import UserError, import_optional
from ..signals.blackbox import AnswerKind, answer, check_answers
from . import wire

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PREDICTION_BATCH = 256
"""Rows that are predicted together, unless a single request has more."""

RECEIVE_TIMEOUT = 30.0
"""Seconds in which the head of a request must arrive, and then its body."""

SMALL = 2**14
"""Bytes of a request that are parsed sooner than a thread starts to."""

CONNECTIONS = 64
"""Largest number of simultaneous connections."""


@dataclass(frozen=True)
class ServiceOptions:
    """Form of a server's answers, and limits of a request.

    Attributes:
        answers: See `luce.signals.answer`.
        top_k: Number of classes in an answer of kind ``"topk"``.
        decimals: Decimals of the probabilities; None for no rounding.
        max_batch: Largest number of rows in a request.
        max_request_bytes: Largest size of a request.
    """

    answers: AnswerKind = "probs"
    top_k: int | None = None
    decimals: int | None = None
    max_batch: int = 1024
    max_request_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.decimals is not None and not 1 <= self.decimals <= 8:
            raise UserError(f"expected `decimals` in 1 .. 8, got {self.decimals}")
        if self.max_batch < 1 or self.max_request_bytes < 1:
            raise UserError("expected `max_batch` and `max_request_bytes` of at least 1")

    def answer(self, logits: Tensor) -> dict[str, np.ndarray]:
        """Return the arrays that answer for these logits, by name."""
        answers = answer(logits, self.answers, self.top_k).numpy()
        if self.answers == "probs":
            return {"probs": self._rounded(answers)}
        if self.answers == "label":
            return {"classes": answers[:, 0].astype(np.int64)}
        best, probs = np.split(answers, 2, axis=1)
        return {"classes": best.astype(np.int64), "probs": self._rounded(probs)}

    def _rounded(self, probs: np.ndarray) -> np.ndarray:
        return probs if self.decimals is None else probs.round(self.decimals)


class Refusal(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status of the response.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Predictor:
    """Predicts the rows of waiting requests together, in a thread of its own."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network.eval().to(device), device
        self.waiting: deque[tuple[Tensor, asyncio.Future[Tensor]]] = deque()
        self.wake = asyncio.Event()

    async def __call__(self, inputs: Tensor) -> Tensor:
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.waiting.append((inputs, future))
        self.wake.set()
        return await future

    async def work(self) -> None:
        """Answer waiting requests, forever."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.waiting:
                group = [self.waiting.popleft()]
                rows = len(group[0][0])
                while self.waiting and rows + len(self.waiting[0][0]) <= PREDICTION_BATCH:
                    group.append(self.waiting.popleft())
                    rows += len(group[-1][0])
                await self.answer(group)

    async def answer(self, group: list[tuple[Tensor, asyncio.Future[Tensor]]]) -> None:
        try:
            logits = await asyncio.to_thread(self.predict, torch.cat([inputs for inputs, _ in group]))
            parts = logits.split([len(inputs) for inputs, _ in group])
        except Exception as error:  # networks fail in many ways
            if len(group) > 1:  # one by one, so that a faulty request does not spoil others
                for request in group:
                    await self.answer([request])
            elif not group[0][1].done():
                group[0][1].set_exception(error)
            return
        for (_, future), part in zip(group, parts, strict=True):
            if not future.done():  # done if the client has disconnected
                future.set_result(part)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs.to(self.device)).float().cpu()
        if not torch.isfinite(logits).all():
            raise ValueError("the network answers with NaN or infinity")
        return logits


def new_server(app: Starlette) -> uvicorn.Server:
    """Make a server of the application that closes idle connections."""
    uvicorn = import_optional("uvicorn", "serve")
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class OneWrite(h11.Connection):
        """Holds the head of a response back until its body, so that both leave in one segment."""

        head = b""

        def send(self, event: h11.Event) -> bytes:  # type: ignore[override]
            output = self.head + (super().send(event) or b"")
            self.head, output = (output, b"") if isinstance(event, h11.Response) else (b"", output)
            return output

    class Protocol(H11Protocol):
        """Closes a connection on which no complete head of a request arrives in time, and answers at once.

        uvicorn waits without a limit for the first head, and for later ones while bytes keep arriving, so
        slow clients could occupy all connections.
        """

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.conn = OneWrite(h11.SERVER)
            # Otherwise a segment waits for the client to acknowledge the one before, up to 40 ms.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.expect_request()

        def on_response_complete(self) -> None:
            self.expect_request()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
            super().connection_lost(exc)

        def expect_request(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_later(RECEIVE_TIMEOUT, self.give_up, self.cycle)

        def give_up(self, before: object) -> None:
            if self.cycle is before:
                self.transport.abort()

    config = uvicorn.Config(
        app,
        http=Protocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=int(RECEIVE_TIMEOUT),
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens on an address; port 0 takes a free one.

    Raises:
        UserError: If the system refuses the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # clients may connect as soon as they read the address, before the server runs
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another"
        ) from error
    return listener


def fingerprint(network: nn.Module, description: Mapping[str, Any]) -> str:
    """Return a short hash of all weights and of the description."""
    parts = digest.of_tensors(network.state_dict()), digest.of_json(dict(description))
    return digest.of_bytes(*(part.encode() for part in parts))[:12]


def build_app(
    network: nn.Module,
    description: Mapping[str, Any],
    options: ServiceOptions,
    *,
    token: str,
    device: torch.device | None = None,
) -> Starlette:
    """Build the application; run it with any ASGI server.

    Args:
        network: From unnormalised inputs to logits.
        description: ``model``, ``classes`` and ``input_shape``, as in a run's ``student.json``.
        options: Form of the answers, and limits of a request.
        token: That a request must carry.
        device: To compute on; None for the CPU.
    Raises:
        UserError: If the options do not suit the network.
    """
    import_optional("starlette", "serve")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    shape = tuple(description["input_shape"])
    check_answers(options.answers, options.top_k, len(description["classes"]))
    texts = any(isinstance(part, nn.Embedding) for part in network.modules())
    model = f"{description['model']}-{fingerprint(network, description)}"
    info = {
        "protocol": wire.PROTOCOL,
        "model": model,
        "classes": list(description["classes"]),
        "input_shape": list(shape),
        "answers": options.answers,
        "top_k": options.top_k,
        "decimals": options.decimals,
        "max_batch": options.max_batch,
        "max_request_bytes": options.max_request_bytes,
    }
    predictor = Predictor(network, device or torch.device("cpu"))

    def guarded(page: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """Require the token, and turn a refusal into its status."""

        async def answer(request: Request) -> Response:
            try:
                check_token(request.headers.get("authorization"), token)
                return JSONResponse(await page(request))
            except Refusal as refusal:
                headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
                return JSONResponse({"error": str(refusal)}, refusal.status, headers)

        return answer

    async def describe(_: Request) -> Any:
        return info

    async def predict(request: Request) -> Any:
        content = await read_body(request, options.max_request_bytes)
        read = partial(read_inputs, content, shape, options.max_batch, texts)
        inputs, packed = read() if len(content) <= SMALL else await asyncio.to_thread(read)
        del content, read
        try:
            logits = await predictor(inputs)
        except Exception as error:
            log.warning(f"a prediction failed: {error}")
            raise Refusal(500, "the network fails at these inputs") from error
        answers = options.answer(logits)
        return {
            "model": model,
            **{name: wire.pack(part) if packed else part.tolist() for name, part in answers.items()},
        }

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def working(_: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(predictor.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    return Starlette(
        routes=[
            Route("/healthz", health),
            Route("/v1/info", guarded(describe)),
            Route("/v1/predict", guarded(predict), methods=["POST"]),
        ],
        lifespan=working,
    )


def check_token(header: str | None, token: str) -> None:
    """Compare tokens in constant time.

    Raises:
        Refusal: On another token, or none.
    """
    kind, _, given = (header or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    if kind.lower() != "bearer" or not right:
        raise Refusal(401, "expected the header `Authorization: Bearer TOKEN` with the server's token")


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body within limits of size and time.

    Raises:
        Refusal: If it is larger, as soon as that is known, or slower.
    """
    from starlette.requests import ClientDisconnect

    too_large = Refusal(413, f"expected at most {limit} bytes in a request; send fewer rows")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 18 or int(announced) > limit:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), RECEIVE_TIMEOUT)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"expected the request within {RECEIVE_TIMEOUT:g} seconds") from error
    except ClientDisconnect as error:
        raise Refusal(400, "expected a complete request") from error


def read_inputs(content: bytes, shape: tuple[int, ...], max_batch: int, texts: bool) -> tuple[Tensor, bool]:
    """Parse the rows of a query, and whether its answer should be in base64.

    Raises:
        Refusal: If the network cannot take them.
    """
    try:
        query = wire.parse(content)
        if unknown := query.keys() - {"inputs", "encoding"}:
            raise ValueError(f"expected only `inputs` and `encoding`, got {sorted(unknown)[0][:40]!r} too")
        if "inputs" not in query:
            raise ValueError("expected `inputs`")
        encoding = query.get("encoding", "lists")
        if encoding not in ("lists", "base64"):
            raise ValueError("expected `encoding` lists or base64")
        array = wire.unpack(query["inputs"])
        if array.shape[1:] != shape or not 1 <= len(array) <= max_batch:
            raise ValueError(
                f"expected `inputs` of 1 .. {max_batch} rows of shape {shape}, got {array.shape}"
            )
        if texts:
            if array.dtype.kind not in "iu":
                raise ValueError("expected token ids, which are whole numbers")
            array = array.astype(np.int64)
        elif array.dtype == np.uint8:
            array = array.astype(np.float32) / np.float32(255)
        else:
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise ValueError("expected numbers that float32 can hold")
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    return torch.from_numpy(array), encoding == "base64"
