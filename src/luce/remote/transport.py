"""HTTP requests with a limited number of repetitions; see docs/black-box.md."""

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
"""Seconds before a repetition: they double each time, and a random part of up to half is subtracted."""

LONGEST_RETRY_AFTER = 120.0
"""Longest wait in seconds that a server may demand; a longer one ends the run."""

MOST_BYTES = 64 * 2**20
"""Largest size of a response."""

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
    """A server that cannot be reached, or answers incorrectly."""


class _Unanswered(Exception):
    """A request without a valid response, which may be repeated.

    Attributes:
        wait: Seconds that the server demands; None if it demands none.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class Cost:
    """Cost of the queries of this process.

    Attributes:
        cached: Rows with a cached answer.
        requests: Requests sent, repetitions included.
        retries: Repetitions.
        seconds: Time spent on requests.
    """

    cached: int = 0
    requests: int = 0
    retries: int = 0
    seconds: float = 0.0


def checked_url(url: str) -> str:
    """Return the address of a server without a final slash.

    Raises:
        UserError: If it is invalid, or contains a secret, which would be written to recipes and caches.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises on an invalid port
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


class Connection:
    """A client of one server, with a thread that runs its simultaneous requests.

    Args:
        url: Of the server.
        token: Sent with every request.
        timeout: Seconds from sending a request to the end of its response.
        retries: Largest number of repetitions of a request.
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
                "expected a token of plain characters, without spaces around it, got another or an empty one"
            )
        self.client = self.http.AsyncClient(
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                **({} if token is None else {"Authorization": f"Bearer {token}"}),
            },
            timeout=None,  # `request` limits the whole
            follow_redirects=False,  # no other server may receive the token
            trust_env=urlsplit(url).hostname not in ("127.0.0.1", "::1", "localhost"),
            limits=self.http.Limits(max_connections=None, keepalive_expiry=4.0),
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name="luce-remote", daemon=True).start()
        self.chance = random.Random()  # the generators of the training must not move

    def _serve(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def run(self, work: Callable[[asyncio.Event], Awaitable[T]]) -> T:
        """Run a coroutine in the thread of requests and wait for it.

        Args:
            work: Receives an event; once it is set, no new request may start.
        """
        stop = asyncio.Event()

        async def begin() -> T:
            return await work(stop)

        future = asyncio.run_coroutine_threadsafe(begin(), self.loop)
        try:
            return future.result()
        except KeyboardInterrupt:  # running requests are charged: wait for them and cache their answers
            self.loop.call_soon_threadsafe(stop.set)
            with suppress(Exception):
                future.result(self.timeout)
            raise

    def close(self) -> None:
        if self.loop.is_running():
            asyncio.run_coroutine_threadsafe(self.client.aclose(), self.loop).result(self.timeout)
            self.loop.call_soon_threadsafe(self.loop.stop)

    async def request(
        self,
        path: str,
        body: bytes | None,
        read: Callable[[Mapping[str, Any]], T],
        stop: asyncio.Event,
        cost: Cost,
    ) -> T:
        """Request a page, with repetitions while there is no valid response.

        Args:
            path: Of the page.
            body: Sent by POST; None for GET.
            read: Parses the response, or raises ValueError.
            stop: Once it is set, nothing is repeated.
            cost: Updated in place.
        Raises:
            RemoteError: If no attempt succeeds, or the response is incorrect.
        """
        page = f"{self.url}{path}"
        for attempt in range(self.retries + 1):
            cost.requests += 1
            cost.retries += attempt > 0
            try:
                content = await asyncio.wait_for(self._once(page, body), self.timeout)
                break
            except asyncio.TimeoutError:
                problem = _Unanswered(f"no complete response within {self.timeout:g} seconds")
            except self.http.TransportError as error:
                problem = _Unanswered(f"no connection, or a broken one ({one_line(error)})")
            except _Unanswered as unanswered:
                problem = unanswered
            given_up = RemoteError(f"{page}: {problem}; it was requested {attempt + 1} times; {KEPT}")
            if attempt == self.retries or stop.is_set():
                raise given_up from problem
            wait = self._wait(attempt, problem.wait)
            if wait > LONGEST_RETRY_AFTER:
                raise RemoteError(
                    f"{page}: {problem}, and the server demands to wait {wait:g} seconds; {KEPT}"
                )
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), wait)
                raise given_up from problem
        try:
            return read(content)
        except ValueError as error:
            raise RemoteError(f"{page} gave an incorrect response: {str(error)[:300]}; {KEPT}") from error

    def _wait(self, attempt: int, demanded: float | None) -> float:
        """Return the seconds before the next attempt, at least those that the server demands."""
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * self.chance.uniform(0.5, 1.0)
        return backoff if demanded is None else max(backoff, demanded)

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
                        f"{page}: a response of more than {MOST_BYTES} bytes; {ADVICE[413]}; {KEPT}"
                    )
        content = b"".join(parts)
        if 300 <= status < 400:
            where = response.headers.get("location", "nowhere")
            raise RemoteError(f"{page} redirects to {where[:200]}; give the final address as `teacher.url`")
        if status in REPEATED:
            raise _Unanswered(f"status {status}, {_reason(content)}", _retry_after(response.headers))
        if status != 200:
            advice = ADVICE.get(status, "it may be no server of this protocol")
            raise RemoteError(f"{page}: status {status}, {_reason(content)}; {advice}; {KEPT}")
        try:
            return wire.parse(content)
        except ValueError as error:
            raise _Unanswered(str(error)) from error


KEPT = "earlier answers are cached"


def _reason(content: bytes) -> str:
    """Return the reason that a server gives, shortened."""
    try:
        return f"`{one_line(Exception(wire.parse(content)['error']))[:160]}`"
    except (ValueError, KeyError):
        return wire.quote(content)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of the header ``Retry-After``, which may also hold a date."""
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
