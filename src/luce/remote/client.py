"""A teacher behind HTTP; docs/black-box.md has the protocol."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..signals.blackbox import FLOOR, AnswerKind, BlackBox, check_limits
from ..signals.teachers import Batch
from . import wire
from .cache import AnswerCache, key_of
from .service import Service
from .transport import Connection, Cost, RemoteError, checked_url


class RemoteTeacher(BlackBox):
    """A black box behind HTTP, such as ``luce serve``.

    Equal rows are queried once, and a row with a cached answer is not queried again. Every answer is written
    to the cache as it arrives, so that nothing is paid for twice, whatever happens later. A request without a
    valid response (no connection, a timeout, too many requests, a server error, a response that is not JSON)
    is repeated a few times with growing waits; a response that cannot be correct is not repeated.

    Args:
        url: Of the server, such as ``http://127.0.0.1:8000``.
        answers: Expected form of the answers; None accepts the server's.
        top_k: Likewise.
        budget: Largest number of rows to pay for; None for no limit. Cached answers are free.
        cache: File of the answers; see `luce.remote.cache.AnswerCache`. None keeps them in memory.
        account: Name of the account that counts the queries, across restarts if there is a cache.
        concurrency: Largest number of simultaneous requests.
        batch_size: Largest number of rows in a request.
        timeout: Seconds from sending a request to the end of its response.
        retries: Largest number of repetitions of a request.
        token: Sent as ``Authorization: Bearer``; stored nowhere.
        floor: See `luce.signals.logits_from`; half of the last decimal where the server rounds.
    Raises:
        UserError: On an option out of range, or a cache that cannot be used.
        RemoteError: If the server cannot be reached, or answers in another form than expected.
    """

    repeats_are_free = True

    def __init__(
        self,
        url: str,
        *,
        answers: AnswerKind | None = None,
        top_k: int | None = None,
        budget: int | None = None,
        cache: Path | str | None = None,
        account: str = "",
        concurrency: int = 8,
        batch_size: int = 256,
        timeout: float = 60.0,
        retries: int = 5,
        token: str | None = None,
        floor: float | None = None,
    ) -> None:
        self.url = self.address = checked_url(url)
        check_limits(budget, floor)
        if min(concurrency, batch_size) < 1 or retries < 0 or not 0 < timeout < math.inf:
            raise UserError(
                "expected `concurrency` and `batch_size` of at least 1, `retries` of at least 0 and a "
                f"positive `timeout`, got {concurrency}, {batch_size}, {retries} and {timeout}"
            )
        self.concurrency, self.cost_here = concurrency, Cost()
        self._connection = Connection(self.url, token=token, timeout=timeout, retries=retries)
        self._lock = threading.Lock()
        self.service = self._connection.run(
            lambda stop: self._connection.request("/v1/info", None, Service.read, stop, self.cost_here)
        )
        for name, expected in (("answers", answers), ("top_k", top_k)):
            if expected is not None and expected != getattr(self.service, name):
                raise RemoteError(
                    f"expected a server whose `{name}` is {expected}, got {getattr(self.service, name)} from "
                    f"{self.url}"
                )
        self.answers, self.top_k = self.service.answers, self.service.top_k
        self.classes = self.service.classes
        self.batch_size = min(batch_size, self.service.max_batch or batch_size)
        self.preferred_batch = self.batch_size * concurrency
        rounding = self.service.decimals
        self.floor = floor or (FLOOR if rounding is None else max(FLOOR, 0.5 * 10.0**-rounding))
        self.budget = budget
        identity = json.dumps(
            [self.url, self.service.model, self.classes, self.answers, self.top_k, rounding]
        )
        self._cache = AnswerCache(cache, identity, account)
        self._final_queries: int | None = None

    @property
    def queries(self) -> int:  # type: ignore[override]
        """Number of paid rows of this account, including those of other processes."""
        return self._cache.paid if self._final_queries is None else self._final_queries

    @property
    def cost(self) -> dict[str, Any]:
        here = self.cost_here
        return {
            "url": self.url,
            **super().cost,
            "cached": here.cached,
            "requests": here.requests,
            "retries": here.retries,
            "seconds": here.seconds,
        }

    def to(self, device: torch.device) -> None:
        """Do nothing: answers go to the device of the batch."""

    def account(self, name: str) -> RemoteTeacher:
        other = copy.copy(self)
        other.cost_here = Cost()
        other._cache = self._cache.account(name)
        return other

    def close(self) -> None:
        """Close the connection for all accounts. The cached answers remain."""
        self._final_queries = self.queries
        self._connection.close()
        self._cache.close()

    def price(self, batches: Iterable[Batch]) -> int:
        missing: set[bytes] = set()
        for batch in batches:
            keys = {key_of(row) for row in _rows(batch["input"])}
            missing |= keys - self._cache.find(keys).keys()
        return len(missing)

    def query(self, inputs: Tensor) -> Tensor:
        """Return the answers to these rows, ``(N, ...)``; see `luce.signals.blackbox.answer`.

        Raises:
            BudgetError: If the rows without a cached answer exceed the budget; no row has been queried then.
            RemoteError: If the server fails or answers incorrectly; earlier answers are cached.
        """
        rows = _rows(inputs)
        keys = [key_of(row) for row in rows]
        with self._lock:
            answers = self._cache.find(dict.fromkeys(keys))
            missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in answers}
            self.check_budget(len(missing))
            self.cost_here.cached += len(keys) - len(missing)
            if missing:
                started = time.perf_counter()
                try:
                    answers |= self._connection.run(
                        lambda stop: self._query(list(missing), list(missing.values()), stop)
                    )
                finally:
                    self.cost_here.seconds += time.perf_counter() - started
        size = 4 * self.service.width
        if any(len(answers[key]) != size for key in keys):
            raise self._cache.damaged("an answer of the wrong length")
        table = np.frombuffer(b"".join(answers[key] for key in keys), dtype="<f4")
        return torch.from_numpy(table.reshape(len(keys), self.service.width).astype(np.float32))

    async def _query(
        self, keys: Sequence[bytes], rows: Sequence[np.ndarray], stop: asyncio.Event
    ) -> dict[bytes, bytes]:
        """Query rows with several simultaneous requests; start no new one after the first failure."""
        gate = asyncio.Semaphore(self.concurrency)
        answers: dict[bytes, bytes] = {}
        failures: list[Exception] = []

        async def query(part: slice) -> None:
            async with gate:
                if stop.is_set():
                    return
                body = json.dumps({"inputs": wire.pack(np.stack(rows[part])), "encoding": "base64"}).encode()
                count = len(keys[part])
                try:
                    received = await self._connection.request(
                        "/v1/predict",
                        body,
                        lambda content: self.service.read_answers(content, count),
                        stop,
                        self.cost_here,
                    )
                    contents = (row.tobytes() for row in received.astype("<f4"))
                    new = dict(zip(keys[part], contents, strict=True))
                    await asyncio.to_thread(self._cache.save, new)  # a slow disk delays no other answer
                except Exception as error:
                    failures.append(error)
                    stop.set()
                    return
                answers.update(new)

        starts = range(0, len(keys), self.batch_size)
        await asyncio.gather(*(query(slice(start, start + self.batch_size)) for start in starts))
        if failures:
            raise failures[0]
        return answers


def _rows(inputs: Tensor) -> np.ndarray:
    """Convert inputs to the dtypes of the protocol: float32, or unchanged bytes and token ids."""
    plain = inputs.detach().cpu()
    if plain.dtype is not torch.uint8:
        plain = plain.float() if plain.is_floating_point() else plain.long()
    return plain.contiguous().numpy()
