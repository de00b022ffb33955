"""A classifier behind HTTP, as a black box; docs/black-box.md has the protocol.

Needs the extra ``serve``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, import_optional
from ..signals.blackbox import AnswerKind, answer, check_answers
from . import wire

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

AT_ONCE = 256
"""Rows that are predicted together, unless a single request has more."""

SLOWEST = 30.0
"""Seconds that the head of a request may take to arrive, and then its body."""

CONNECTIONS = 64
"""At one time."""


@dataclass(frozen=True)
class ServiceOptions:
    """What a server tells, and how much it takes.

    Attributes:
        answers: See `luce.signals.answer`.
        top_k: How many classes ``"topk"`` tells.
        decimals: Probabilities are rounded to so many; None for none.
        max_batch: Most rows in a request.
        max_request_bytes: Most bytes in one.
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
        """What is told of these logits, by name."""
        told = answer(logits, self.answers, self.top_k).numpy()
        if self.answers == "probs":
            return {"probs": self._rounded(told)}
        if self.answers == "label":
            return {"classes": told[:, 0].astype(np.int64)}
        chosen, probs = np.split(told, 2, axis=1)
        return {"classes": chosen.astype(np.int64), "probs": self._rounded(probs)}

    def _rounded(self, probs: np.ndarray) -> np.ndarray:
        return probs if self.decimals is None else probs.round(self.decimals)


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: Of HTTP.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Predictor:
    """Asks a network about the rows of several requests together, in a thread beside that of the requests."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network.eval().to(device), device
        self.waiting: deque[tuple[Tensor, asyncio.Future[Tensor]]] = deque()
        self.called = asyncio.Event()

    async def __call__(self, inputs: Tensor) -> Tensor:
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.waiting.append((inputs, future))
        self.called.set()
        return await future

    async def work(self) -> None:
        """Answer what is waiting, for ever."""
        while True:
            await self.called.wait()
            self.called.clear()
            while self.waiting:
                some = [self.waiting.popleft()]
                rows = len(some[0][0])
                while self.waiting and rows + len(self.waiting[0][0]) <= AT_ONCE:
                    some.append(self.waiting.popleft())
                    rows += len(some[-1][0])
                await self.answer(some)

    async def answer(self, some: list[tuple[Tensor, asyncio.Future[Tensor]]]) -> None:
        try:
            logits = await asyncio.to_thread(self.predict, torch.cat([inputs for inputs, _ in some]))
            parts = logits.split([len(inputs) for inputs, _ in some])
        except Exception as error:  # networks fail in many ways
            if len(some) > 1:  # each by itself, so that one request spoils no other
                for one in some:
                    await self.answer([one])
            elif not some[0][1].done():
                some[0][1].set_exception(error)
            return
        for (_, future), part in zip(some, parts, strict=True):
            if not future.done():  # or nobody waits for it any more
                future.set_result(part)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs.to(self.device)).float().cpu()
        if not torch.isfinite(logits).all():
            raise ValueError("the network answers with NaN or infinity")
        return logits


def new_server(app: Starlette) -> uvicorn.Server:
    """What runs the application, and hangs up on who does not ask."""
    uvicorn = import_optional("uvicorn", "serve")
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Ends a connection on which no whole head of a request has arrived in time.

        uvicorn waits for one as long as there is now and then a byte, for the first one without end; and a
        few connections are all that it takes.
        """

        patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.expect_request()

        def on_response_complete(self) -> None:
            self.expect_request()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.patience is not None:
                self.patience.cancel()
            super().connection_lost(exc)

        def expect_request(self) -> None:
            if self.patience is not None:
                self.patience.cancel()
            self.patience = self.loop.call_later(SLOWEST, self.give_up, self.cycle)

        def give_up(self, before: object) -> None:
            if self.cycle is before:
                self.transport.abort()

    config = uvicorn.Config(
        app,
        http=Impatient,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=int(SLOWEST),
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
    """A few characters that change with any weight, and with how inputs are normalised."""
    digest = hashlib.blake2b(json.dumps(dict(description), sort_keys=True).encode(), digest_size=6)
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def build_app(
    network: nn.Module,
    description: Mapping[str, Any],
    offer: ServiceOptions,
    *,
    token: str,
    device: torch.device | None = None,
) -> Starlette:
    """The application that answers; run it with any ASGI server.

    Args:
        network: From inputs as data has them to logits.
        description: ``model``, ``classes`` and ``input_shape``, as in a run's ``student.json``.
        offer: What is told, and how much is taken.
        token: That a request must bring.
        device: To compute on; the CPU unless given.
    Raises:
        UserError: If the offer does not go with the network.
    """
    import_optional("starlette", "serve")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    shape = tuple(description["input_shape"])
    check_answers(offer.answers, offer.top_k, len(description["classes"]))
    texts = any(isinstance(part, nn.Embedding) for part in network.modules())
    model = f"{description['model']}-{fingerprint(network, description)}"
    info = {
        "protocol": wire.PROTOCOL,
        "model": model,
        "classes": list(description["classes"]),
        "input_shape": list(shape),
        "answers": offer.answers,
        "top_k": offer.top_k,
        "decimals": offer.decimals,
        "max_batch": offer.max_batch,
        "max_request_bytes": offer.max_request_bytes,
    }
    predictor = Predictor(network, device or torch.device("cpu"))

    def guarded(page: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """A page for those who know the token; a refusal becomes its status."""

        async def answer(request: Request) -> Response:
            try:
                check_token(request.headers.get("authorization"), token)
                return JSONResponse(await page(request))
            except Refusal as refusal:
                headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
                return JSONResponse({"error": str(refusal)}, refusal.status, headers)

        return answer

    async def introduce(_: Request) -> Any:
        return info

    async def predict(request: Request) -> Any:
        content = await read_body(request, offer.max_request_bytes)
        inputs, packed = await asyncio.to_thread(read_inputs, content, shape, offer.max_batch, texts)
        del content
        try:
            logits = await predictor(inputs)
        except Exception as error:
            print(f"luce serve: a prediction failed: {error}", file=sys.stderr)
            raise Refusal(500, "the network fails at these inputs") from error
        told = offer.answer(logits)
        return {
            "model": model,
            **{name: wire.pack(part) if packed else part.tolist() for name, part in told.items()},
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
            Route("/v1/info", guarded(introduce)),
            Route("/v1/predict", guarded(predict), methods=["POST"]),
        ],
        lifespan=working,
    )


def check_token(header: str | None, token: str) -> None:
    """Compare in a time that tells nothing of the token.

    Raises:
        Refusal: If it is another one, or none.
    """
    kind, _, given = (header or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    if kind.lower() != "bearer" or not right:
        raise Refusal(401, "expected the header `Authorization: Bearer TOKEN` with the server's token")


async def read_body(request: Request, most: int) -> bytes:
    """A body, up to a size and a time.

    Raises:
        Refusal: If it is larger, as soon as that is known, or slower.
    """
    from starlette.requests import ClientDisconnect

    too_large = Refusal(413, f"expected at most {most} bytes in a request; send fewer rows")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 18 or int(announced) > most:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), SLOWEST)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"expected the request within {SLOWEST:g} seconds") from error
    except ClientDisconnect as error:
        raise Refusal(400, "expected a whole request") from error


def read_inputs(content: bytes, shape: tuple[int, ...], max_batch: int, texts: bool) -> tuple[Tensor, bool]:
    """The rows to answer, and whether the answer is wanted as base64.

    Raises:
        Refusal: If they are not what the network takes.
    """
    try:
        question = wire.parse(content)
        if unknown := question.keys() - {"inputs", "encoding"}:
            raise ValueError(f"expected `inputs` and perhaps `encoding`, got {sorted(unknown)[0][:40]!r} too")
        if "inputs" not in question:
            raise ValueError("expected `inputs`")
        encoding = question.get("encoding", "lists")
        if encoding not in ("lists", "base64"):
            raise ValueError("expected `encoding` lists or base64")
        array = wire.unpack(question["inputs"])
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
