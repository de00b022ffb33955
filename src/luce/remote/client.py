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
from .cache import Answers, key_of
from .service import Service
from .transport import Cost, Line, RemoteError, checked_url


class RemoteTeacher(BlackBox):
    """A black box behind HTTP, such as ``luce serve`` offers one.

    Rows that are equal are asked about once; a row whose answer is known, never again. Every answer is put
    into the cache as it arrives, so that whatever happens later nothing is paid for twice. A request that
    was not answered (no connection, no answer in time, too many requests, an error of the server, something
    that is no JSON) is repeated a few times, with growing waits; an answer that cannot be right is not.

    Args:
        url: Of the server, such as ``http://127.0.0.1:8000``.
        answers: What it is expected to tell; None takes what it says.
        top_k: Likewise.
        budget: Rows that may be asked about and paid for; None for any number. What is in the cache is free.
        cache: File of the answers; see `luce.remote.cache.Answers`. None keeps them in memory.
        account: On which queries are counted, across restarts if there is a cache.
        concurrency: Requests on their way at one time.
        batch_size: Most rows in a request.
        timeout: Seconds from sending a request to the end of its answer.
        retries: How often a request is repeated at most.
        token: Sent as ``Authorization: Bearer``; kept nowhere.
        floor: See `luce.signals.logits_from`; half of the last decimal where the server rounds.
    Raises:
        UserError: On an option that makes no sense, or a cache that cannot be used.
        RemoteError: If the server cannot be asked, or is not what is expected.
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
        self._line = Line(self.url, token=token, timeout=timeout, retries=retries)
        self._one_at_a_time = threading.Lock()
        self.service = self._line.run(
            lambda stop: self._line.ask("/v1/info", None, Service.read, stop, self.cost_here)
        )
        for name, wanted in (("answers", answers), ("top_k", top_k)):
            if wanted is not None and wanted != getattr(self.service, name):
                raise RemoteError(
                    f"expected a server whose `{name}` is {wanted}, got {getattr(self.service, name)} from "
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
        self.known = Answers(cache, identity, account)
        self._at_end: int | None = None

    @property
    def queries(self) -> int:  # type: ignore[override]
        """Also what other processes have paid for on this account."""
        return self.known.paid if self._at_end is None else self._at_end

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
        """Answers go wherever a batch is."""

    def account(self, name: str) -> RemoteTeacher:
        other = copy.copy(self)
        other.cost_here = Cost()
        other.known = self.known.account(name)
        return other

    def close(self) -> None:
        """Hang up, for all accounts. Answers that are in the cache stay there."""
        self._at_end = self.queries
        self._line.close()
        self.known.close()

    def price(self, batches: Iterable[Batch]) -> int:
        missing: set[bytes] = set()
        for batch in batches:
            keys = {key_of(row) for row in _rows(batch["input"])}
            missing |= keys - self.known.find(keys).keys()
        return len(missing)

    def query(self, inputs: Tensor) -> Tensor:
        """Return the answers to these rows, ``(N, ...)``; see `luce.signals.blackbox.answer`.

        Raises:
            BudgetError: If the rows that are not known exceed the budget; nothing has been asked then.
            RemoteError: If the server does not answer as it should; what it has answered is kept.
        """
        rows = _rows(inputs)
        keys = [key_of(row) for row in rows]
        with self._one_at_a_time:
            known = self.known.find(dict.fromkeys(keys))
            missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
            self.check_budget(len(missing))
            self.cost_here.cached += len(keys) - len(missing)
            if missing:
                started = time.perf_counter()
                try:
                    known |= self._line.run(
                        lambda stop: self._ask(list(missing), list(missing.values()), stop)
                    )
                finally:
                    self.cost_here.seconds += time.perf_counter() - started
        size = 4 * self.service.width
        if any(len(known[key]) != size for key in keys):
            raise self.known.damaged("an answer of the wrong length")
        table = np.frombuffer(b"".join(known[key] for key in keys), dtype="<f4")
        return torch.from_numpy(table.reshape(len(keys), self.service.width).astype(np.float32))

    async def _ask(
        self, keys: Sequence[bytes], rows: Sequence[np.ndarray], stop: asyncio.Event
    ) -> dict[bytes, bytes]:
        """Ask about rows, several requests at a time; after the first failure no new one is begun."""
        gate = asyncio.Semaphore(self.concurrency)
        answers: dict[bytes, bytes] = {}
        failures: list[Exception] = []

        async def ask(some: slice) -> None:
            async with gate:
                if stop.is_set():
                    return
                body = json.dumps({"inputs": wire.pack(np.stack(rows[some])), "encoding": "base64"}).encode()
                count = len(keys[some])
                try:
                    told = await self._line.ask(
                        "/v1/predict",
                        body,
                        lambda content: self.service.read_answers(content, count),
                        stop,
                        self.cost_here,
                    )
                    new = dict(zip(keys[some], (row.tobytes() for row in told.astype("<f4")), strict=True))
                    await asyncio.to_thread(self.known.keep, new)  # a slow disk delays no other answer
                except Exception as error:
                    failures.append(error)
                    stop.set()
                    return
                answers.update(new)

        starts = range(0, len(keys), self.batch_size)
        await asyncio.gather(*(ask(slice(start, start + self.batch_size)) for start in starts))
        if failures:
            raise failures[0]
        return answers


def _rows(inputs: Tensor) -> np.ndarray:
    """Inputs as they are sent: float32, or bytes or token ids as they are."""
    plain = inputs.detach().cpu()
    if plain.dtype is not torch.uint8:
        plain = plain.float() if plain.is_floating_point() else plain.long()
    return plain.contiguous().numpy()
