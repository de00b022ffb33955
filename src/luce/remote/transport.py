"""Requests that are repeated a few times, and no more; see docs/black-box.md."""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import UserError, import_optional, one_line
from . import wire

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a request is repeated: they double each time, less up to a half by chance."""

LONGEST_RETRY_AFTER = 120.0
"""Seconds that a server may ask us to wait; who wants more has to be asked another day."""

MOST_BYTES = 64 * 2**20
"""Of an answer."""

REPEATED = (408, 425, 429, 500, 502, 503, 504)

ADVICE = {
    400: "it understands another protocol, or takes other inputs",
    401: "give the right token; the recipe names where it is in `teacher.token_env`",
    403: "the token does not allow it",
    404: "it has no such page: `teacher.url` is the address before /v1",
    413: "lower `teacher.batch_size`",
    422: "it takes other inputs",
}


class RemoteError(UserError):
    """A server that cannot be asked, or does not answer as it should."""


class _Unanswered(Exception):
    """A request that may be repeated.

    Attributes:
        wait: Seconds that the server asks for; None if it does not.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class Cost:
    """What asking has cost in this process.

    Attributes:
        cached: Rows whose answer was there already.
        requests: Sent, those that were repeated included.
        retries: How many of them were repetitions.
        seconds: Spent on asking.
    """

    cached: int = 0
    requests: int = 0
    retries: int = 0
    seconds: float = 0.0


def checked_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        UserError: If it is none, or holds a secret, which would be written into recipes and caches.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # or it complains of a port that is none
    except ValueError as error:
        raise UserError(f"expected a URL such as https://example.org, got `{url}` ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"expected a URL such as https://example.org, got `{url}`")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            "expected a URL without a password or a query, which would end up in recipes and caches; give a "
            "token instead"
        )
    return url.rstrip("/")


class Line:
    """To one server: a client, and a thread in which requests wait side by side.

    Args:
        url: Of the server.
        token: Sent with every request.
        timeout: Seconds from sending a request to the end of its answer, however slowly it drips.
        retries: How often a request is repeated at most.
    """

    def __init__(self, url: str, *, token: str | None, timeout: float, retries: int) -> None:
        self.url, self.timeout, self.retries = url, timeout, retries
        self.http = import_optional("httpx2", "remote")
        try:
            self.http.URL(url)
        except self.http.InvalidURL as error:  # it is stricter than `checked_url`
            raise UserError(f"expected a URL such as https://example.org, got {url!r} ({error})") from error
        if token is not None and not (
            token.isascii() and token.isprintable() and token.strip() == token != ""
        ):
            raise UserError(
                "expected a token of plain characters, without spaces around it, got another or none"
            )
        self.client = self.http.AsyncClient(
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                **({} if token is None else {"Authorization": f"Bearer {token}"}),
            },
            timeout=None,  # `ask` has one for the whole
            follow_redirects=False,  # nobody else gets the token
            trust_env=urlsplit(url).hostname not in ("127.0.0.1", "::1", "localhost"),
            limits=self.http.Limits(max_connections=None, keepalive_expiry=4.0),
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name="luce-remote", daemon=True).start()
        self.chance = random.Random()  # not the generator that trainings draw from

    def _serve(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def run(self, work: Callable[[asyncio.Event], Awaitable[T]]) -> T:
        """Do something in the thread of requests and wait for it.

        Args:
            work: Gets an event that tells it to begin nothing new.
        """
        stop = asyncio.Event()

        async def begin() -> T:
            return await work(stop)

        future = asyncio.run_coroutine_threadsafe(begin(), self.loop)
        try:
            return future.result()
        except KeyboardInterrupt:  # what is on its way will be charged: it is waited for and kept
            self.loop.call_soon_threadsafe(stop.set)
            with suppress(Exception):
                future.result(self.timeout)
            raise

    def close(self) -> None:
        if self.loop.is_running():
            asyncio.run_coroutine_threadsafe(self.client.aclose(), self.loop).result(self.timeout)
            self.loop.call_soon_threadsafe(self.loop.stop)

    async def ask(
        self,
        path: str,
        body: bytes | None,
        read: Callable[[Mapping[str, Any]], T],
        stop: asyncio.Event,
        cost: Cost,
    ) -> T:
        """What a page answers, repeating the request while there is no answer.

        Args:
            path: Of the page.
            body: To post; None gets the page.
            read: Makes something of the answer, or raises ValueError.
            stop: Once it is set nothing is repeated.
            cost: Is added to.
        Raises:
            RemoteError: If there is no answer after all, or one that makes no sense.
        """
        page = f"{self.url}{path}"
        for attempt in range(self.retries + 1):
            cost.requests += 1
            cost.retries += attempt > 0
            try:
                content = await asyncio.wait_for(self._once(page, body), self.timeout)
                break
            except asyncio.TimeoutError:
                problem = _Unanswered(f"no whole answer within {self.timeout:g} seconds")
            except self.http.TransportError as error:
                problem = _Unanswered(f"no connection, or it broke off ({one_line(error)})")
            except _Unanswered as unanswered:
                problem = unanswered
            given_up = RemoteError(f"{page}: {problem}; it was asked {attempt + 1} times; {KEPT}")
            if attempt == self.retries or stop.is_set():
                raise given_up from problem
            wait = self._wait(attempt, problem.wait)
            if wait > LONGEST_RETRY_AFTER:
                raise RemoteError(f"{page}: {problem}, and to be asked again in {wait:g} seconds; {KEPT}")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), wait)
                raise given_up from problem
        try:
            return read(content)
        except ValueError as error:
            raise RemoteError(f"{page} answers what it should not: {str(error)[:300]}; {KEPT}") from error

    def _wait(self, attempt: int, wanted: float | None) -> float:
        """Seconds before the next attempt, at least those that the server asks for."""
        ours = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * self.chance.uniform(0.5, 1.0)
        return ours if wanted is None else max(ours, wanted)

    async def _once(self, page: str, body: bytes | None) -> dict[str, Any]:
        headers = {} if body is None else {"Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        async with self.client.stream(method, page, content=body, headers=headers) as response:
            status, parts, size = response.status_code, [], 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise RemoteError(
                        f"{page}: an answer of more than {MOST_BYTES} bytes; {ADVICE[413]}; {KEPT}"
                    )
        content = b"".join(parts)
        if 300 <= status < 400:
            where = response.headers.get("location", "nowhere")
            raise RemoteError(f"{page} sends us to {where[:200]}; give the final address as `teacher.url`")
        if status in REPEATED:
            raise _Unanswered(f"status {status}, {_reason(content)}", _retry_after(response.headers))
        if status != 200:
            advice = ADVICE.get(status, "it may be no server of answers")
            raise RemoteError(f"{page}: status {status}, {_reason(content)}; {advice}; {KEPT}")
        try:
            return wire.parse(content)
        except ValueError as error:
            raise _Unanswered(str(error)) from error


KEPT = "all answers before it are kept"


def _reason(content: bytes) -> str:
    """What a server gives as reason, in a few words."""
    try:
        return f"`{one_line(Exception(wire.parse(content)['error']))[:160]}`"
    except (ValueError, KeyError):
        return wire.quote(content)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of the header ``Retry-After``, which may also be a date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
