"""Asking a teacher over a real connection: what is right, what goes wrong, and what it costs."""

from __future__ import annotations

import json
import re
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luce.errors import MissingExtra, UserError
from luce.remote import RemoteError, RemoteTeacher, transport
from luce.remote.cache import AnswerCache
from luce.signals import BudgetError, LocalBlackBox

from ..servers import CLASSES, TOKEN, Handler, Network, Reply, good, puppet, serving

KINDS: list[dict[str, Any]] = [
    {"answers": "probs"},
    {"answers": "probs", "decimals": 3},
    {"answers": "topk", "top_k": 2},
    {"answers": "label"},
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))[:count]


def ask(url: str, **options: Any) -> RemoteTeacher:
    return RemoteTeacher(url, token=TOKEN, **{"timeout": 30.0, "retries": 2, **options})


# Right answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offer", KINDS, ids=str)
def test_it_tells_what_the_network_would(offer: dict[str, Any]) -> None:
    plain = {name: value for name, value in offer.items() if name != "decimals"}
    local = LocalBlackBox(Network(), classes=4, floor=5e-4 if "decimals" in offer else 1e-12, **plain)
    with serving(**offer) as url:
        remote = ask(url, batch_size=7)
        batch = {"input": rows(40)}
        answer, expected = remote.signal(batch), local.signal(batch)
    assert answer.kind == offer["answers"]
    if "decimals" in offer:
        told = torch.tensor(local.query(batch["input"]).numpy().round(3))
        torch.testing.assert_close(remote.query(batch["input"]), told)
    else:
        torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert remote.queries == 40
    assert remote.cost["requests"] == 1 + 6


def test_bytes_and_token_ids_travel_as_they_are() -> None:
    seen: list[Any] = []

    def watch(handler: Handler, count: int) -> None:
        good(handler, count)

    with puppet(watch, input_shape=None) as server:
        teacher = ask(server.url)
        for dtype in (torch.uint8, torch.int32, torch.float64, torch.bfloat16):
            seen.append(teacher.query(torch.ones(2, 3).to(dtype)).shape)
    assert seen == [(2, 4)] * 4
    # As floats, both of the last are the same row; all rows of a batch are equal here, and asked about once.
    assert server.asked == [1, 1, 1]


def test_equal_rows_are_asked_about_once() -> None:
    network = Network()
    with serving(network) as url:
        teacher = ask(url)
        inputs = rows(6)[[0, 1, 0, 2, 1, 0]]
        answers = teacher.query(inputs)
        again = teacher.query(inputs[:4])
    assert sorted(network.rows) == sorted({tuple(row) for row in inputs.tolist()})
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(again, answers[:4])
    assert teacher.queries == teacher.cost["queries"] == 3
    assert teacher.cost["cached"] == 3 + 4


def test_requests_wait_side_by_side() -> None:
    busy, most, lock, four = 0, 0, threading.Lock(), threading.Barrier(4)

    def together(handler: Handler, count: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        four.wait(20)
        with lock:
            busy -= 1
        good(handler, count)

    with puppet(together) as server:
        ask(server.url, batch_size=1, concurrency=4, timeout=30.0).query(rows(12))
    assert most == 4
    assert server.asked == [1] * 12


def test_the_largest_batch_of_a_server_is_kept_to() -> None:
    with puppet(good, max_batch=5) as server:
        ask(server.url).query(rows(11))
    assert sorted(server.asked) == [1, 5, 5]


def test_asking_draws_no_random_number() -> None:
    with puppet(lambda handler, _: handler.json({}, 503), good) as server:
        before = torch.get_rng_state()
        ask(server.url).query(rows(4))
        assert torch.equal(torch.get_rng_state(), before)


# The cache --------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    cache, network = tmp_path / "answers.sqlite", Network()
    with serving(network) as url:
        first = ask(url, cache=cache).query(rows(20))
        teacher = ask(url, cache=cache, account="another")
        assert torch.equal(teacher.query(rows(20)), first)
        assert (
            teacher.price([{"input": rows(20)}, {"input": rows(9, seed=1)}, {"input": rows(9, seed=1)}]) == 9
        )
    assert len(network.rows) == 20
    assert (teacher.queries, teacher.cost["cached"]) == (0, 20)


def test_answers_of_another_model_kind_or_place_are_others(tmp_path: Path) -> None:
    cache, other = tmp_path / "answers.sqlite", Network()
    with torch.no_grad():
        other.weight += 1
    with serving() as url:
        ask(url, cache=cache).query(rows(5))
        port = int(url.rpartition(":")[2])
    for network, offer in ((other, {}), (Network(), {"answers": "label"}), (Network(), {"decimals": 2})):
        with serving(network, port, **offer) as url:
            teacher = ask(url, cache=cache)
            teacher.query(rows(5))
            assert teacher.queries == 5
    with serving() as url:
        assert ask(url, cache=cache).price([{"input": rows(5)}]) == 5
    with serving(port=port) as url:
        assert ask(url, cache=cache).price([{"input": rows(5)}]) == 0


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    with puppet(good, good, good, lambda handler, _: handler.json({"error": "no more"}, 403)) as server:
        with pytest.raises(RemoteError, match=r"status 403, `no more`.*earlier answers are cached"):
            ask(server.url, cache=cache, batch_size=2, concurrency=1).query(rows(20))
        server.script = [good]
        teacher = ask(server.url, cache=cache, batch_size=2)
        assert teacher.queries == 6  # on the same account
        teacher.query(rows(20))
    assert sum(server.asked) == 20 + 2
    assert teacher.queries == 20


def test_others_on_their_way_are_waited_for_and_kept(tmp_path: Path) -> None:
    def late(handler: Handler, count: int) -> None:
        time.sleep(0.2)
        good(handler, count)

    with puppet(lambda handler, _: handler.json({}, 401), late) as server:
        teacher = ask(server.url, batch_size=2, concurrency=3)
        with pytest.raises(RemoteError, match="status 401"):
            teacher.query(rows(20))
        assert server.asked == [2, 2, 2]  # nothing new was begun
        assert teacher.price([{"input": rows(20)}]) == 16
    assert teacher.queries == 4


def test_who_waits_to_ask_again_does_not_once_another_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_WAIT", 30.0)
    waiting = threading.Event()

    def later(handler: Handler, _: int) -> None:
        waiting.set()
        handler.json({}, 503)

    def refuses(handler: Handler, _: int) -> None:
        assert waiting.wait(20)
        time.sleep(0.1)  # for the other to hear of its 503
        handler.json({}, 403)

    with puppet(later, refuses) as server:
        with pytest.raises(RemoteError, match="status 403"):
            ask(server.url, batch_size=2, concurrency=2, timeout=20.0).query(rows(4))
        assert server.asked == [2, 2]


def test_a_slow_disk_makes_no_answer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are kept in another thread than that in which others are waited for."""
    keep, threads = AnswerCache.save, set()

    def spy(*arguments: Any) -> None:
        threads.add(threading.current_thread().name)
        keep(*arguments)

    monkeypatch.setattr(AnswerCache, "save", spy)
    with puppet(good) as server:
        ask(server.url).query(rows(4))
    assert threads
    assert "luce-remote" not in threads


def test_a_cache_with_an_answer_of_another_length_is_damaged() -> None:
    with puppet(good) as server:
        teacher = ask(server.url)
        teacher.query(rows(1))
        teacher.service = teacher.service.__class__(**{**vars(teacher.service), "classes": 5})
        with pytest.raises(UserError, match=r"damaged .*wrong length"):
            teacher.query(rows(1))


# The budget -------------------------------------------------------------------------------------------------


def test_a_budget_is_looked_at_before_anything_is_asked(tmp_path: Path) -> None:
    cache, network = tmp_path / "answers.sqlite", Network()
    with serving(network) as url:
        teacher = ask(url, cache=cache, budget=10)
        teacher.query(rows(8))
        with pytest.raises(BudgetError, match=r"expected at most 10 rows .* got 12 more after 8"):
            teacher.query(rows(20))
        assert len(network.rows) == 8
        teacher.query(torch.cat([rows(8), rows(2, seed=1)]))  # eight of them are free
        again = ask(url, cache=cache, budget=10)  # as after a crash
        assert again.queries == 10
        with pytest.raises(BudgetError):
            again.query(rows(1, seed=2))
        other = again.account("another run")
        other.query(rows(10, seed=3))
        with pytest.raises(BudgetError, match="1 more after 10"):
            other.query(rows(1, seed=4))
    assert len(network.rows) == 20


# Bad answers ------------------------------------------------------------------------------------------------


def says(content: Any, status: int = 200, **headers: str) -> Reply:
    return lambda handler, _: handler.json(content, status, **headers)


def of(row: Any) -> Reply:
    return lambda handler, count: handler.json({"probs": [row] * count})


def drips(handler: Handler, _: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drips_headers(handler: Handler, _: int) -> None:
    for part in b"HTTP/1.1 200 OK\r\nX-Slow: " + 100 * b"x":
        handler.wfile.write(bytes([part]))
        time.sleep(0.05)


def hangs_up(handler: Handler, _: int) -> None:
    handler.close_connection = True
    handler.connection.close()


def breaks_off(handler: Handler, _: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"probs": [[')
    handler.close_connection = True


def floods(handler: Handler, _: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    for _ in range(64):
        handler.wfile.write(b" " * 2**16)


REFUSED = {
    "classes": (of([0.2] * 5), r"expected `probs` of 3 rows and 4 classes, got other classes: \(3, 5\)"),
    "rows": (says({"probs": [[0.25] * 4] * 2}), r"3 rows and 4 classes, got other rows: \(2, 4\)"),
    "flat": (says({"probs": [0.25] * 4}), "got other rows"),
    "ragged": (says({"probs": [[0.5, 0.5], [1.0]]}), "expected lists of equal lengths"),
    "words": (of(["a", "b", "c", "d"]), "expected numbers"),
    "numbers as words": (of(["0.25"] * 4), "expected numbers"),
    "null": (of([None, 1.0, 0.0, 0.0]), "expected numbers"),
    "truth": (of([True, False, False, False]), "expected numbers"),
    "objects": (of([{}, 1, 0, 0]), "expected numbers"),
    "infinite": (lambda h, _: h.text('{"probs": [[1e999, 0, 0, 0]]}'), "infinity"),
    "negative": (of([-0.5, 0.5, 0.5, 0.5]), "got a negative one: -0.5"),
    "sum": (of([0.5] * 4), "expected probabilities that sum to 1, got a row that sums to 2"),
    "small sum": (of([0.1] * 4), "sums to 0.4"),
    "logits": (of([3.0, -1.0, 0.0, 2.0]), "negative"),
    "no probs": (says({"predictions": []}), r"expected `probs` in the answer, got 'predictions'"),
    "empty object": (says({}), "got nothing"),
    "base64": (says({"probs": {"dtype": "uint8", "shape": [3, 4], "base64": "AA=="}}), "the bytes of uint8"),
    "no base64": (says({"probs": {"dtype": "float32", "shape": [1], "base64": "é"}}), "expected `base64`"),
    "dtype": (says({"probs": {"dtype": "object", "shape": [1], "base64": ""}}), "expected a `dtype` among"),
    "shape": (says({"probs": {"dtype": "uint8", "shape": [-1], "base64": ""}}), "expected `shape`"),
    "long model": (says({"model": "x" * 10**5}), "of the model toy, got answers of xxx"),
    "model": (says({"model": "new", "probs": [[0.25] * 4] * 3}), "of the model toy, got answers of new"),
    "redirect": (says({}, 302, Location="http://elsewhere.test"), "redirects to http://elsewhere.test"),
    "400": (says({"error": "no"}, 400), "status 400, `no`; it understands another protocol"),
    "401": (says({"error": "who"}, 401), "status 401, `who`; give the right token"),
    "403": (says({}, 403), "status 403"),
    "404": (says({}, 404), "it has no such page"),
    "413": (says({}, 413), "lower `teacher.batch_size`"),
    "418": (says({}, 418), "it may be no server of this protocol"),
    "later": (says({}, 429, Retry_After="3600"), "the server demands to wait 3600 seconds"),
}  # fmt: skip
REPEATED = {
    "nan": (lambda h, _: h.text('{"probs": [[NaN, 0, 0, 0]]}'), "expected JSON, got"),
    "html": (lambda h, _: h.text("<html><body>Sign in"), "expected JSON, got `<html><body>Sign in`"),
    "empty": (lambda h, _: h.text(""), "expected JSON, got nothing"),
    "cut": (lambda h, _: h.text('{"probs": [[0.1'), "expected JSON"),
    "list": (says([1, 2]), "expected a JSON object"),
    "deep": (lambda h, _: h.text("[" * 100000), "expected JSON"),
    "429": (says({"error": "slow down"}, 429), "status 429, `slow down`"),
    "500": (says({}, 500), "status 500"),
    "503": (lambda h, _: h.text("<h1>Bad", 503), "status 503, `<h1>Bad`"),
    "drip": (drips, "no complete response within 0.4 seconds"),
    "drip of headers": (drips_headers, "no complete response within 0.4 seconds"),
    "hang up": (hangs_up, "no connection, or a broken one"),
    "break off": (breaks_off, "no connection, or a broken one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_answer_is_told_and_not_asked_for_again(name: str) -> None:
    reply, message = REFUSED[name]
    with puppet(reply) as server:
        teacher = ask(server.url)
        with pytest.raises(RemoteError, match=message) as raised:
            teacher.query(rows(3))
        assert len(str(raised.value)) < 500
        assert server.asked == [3]
        assert teacher.queries == 0
        server.script = [good]
        assert teacher.query(rows(3)).shape == (3, 4)


@pytest.mark.parametrize("name", REPEATED)
def test_no_answer_is_asked_for_again_a_few_times(name: str) -> None:
    reply, message = REPEATED[name]
    with puppet(reply) as server:
        teacher = ask(server.url)
        if "drip" in name:
            teacher._connection.timeout = 0.4
        with pytest.raises(RemoteError, match=message) as raised:
            teacher.query(rows(3))
        assert "it was requested 3 times" in str(raised.value)
        assert server.asked == [3, 3, 3]
        assert (teacher.cost["requests"], teacher.cost["retries"], teacher.queries) == (4, 2, 0)
        # One that comes to its senses loses nothing.
        teacher._connection.timeout = 30.0
        server.script = [good] if "drip" in name else [reply] * (len(server.asked) + 1) + [good]
        assert teacher.query(rows(3)).shape == (3, 4)
        assert teacher.queries == 3


@pytest.mark.parametrize(
    ("said", "answer", "message"),
    [
        ({"answers": "label"}, {"classes": [0, 1, 4]}, r"expected `classes` in 0 \.\. 3, got 0 \.\. 4"),
        ({"answers": "label"}, {"classes": [0, 1, -1]}, r"expected `classes` in 0 \.\. 3, got -1"),
        ({"answers": "label"}, {"classes": [0.0, 1.5, 2.0]}, "expected class numbers"),
        ({"answers": "label"}, {"classes": [0, 1]}, r"of shape \(3, 1\), got \(2, 1\)"),
        ({"answers": "label"}, {"classes": ["cat"] * 3}, "expected numbers"),
        ({"answers": "label"}, {"probs": [[0.25] * 4] * 3}, "expected `classes`"),
        ({"answers": "topk", "top_k": 2}, {"classes": [[1, 1]] * 3, "probs": [[0.5, 0.2]] * 3}, "twice"),
        ({"answers": "topk", "top_k": 2}, {"classes": [[1, 2]] * 3, "probs": [[0.2, 0.5]] * 3}, "falling"),
        ({"answers": "topk", "top_k": 2}, {"classes": [[1, 2]] * 3, "probs": [[0.8, 0.5]] * 3}, "to 1.3"),
        ({"answers": "topk", "top_k": 2}, {"classes": [[1, 2]] * 3, "probs": [[0.8]] * 3}, "other classes"),
    ],
)  # fmt: skip
def test_wrong_answers_of_other_kinds(said: Any, answer: Any, message: str) -> None:
    with puppet(says(answer), **said) as server, pytest.raises(RemoteError, match=message):
        ask(server.url).query(rows(3))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"protocol": 2}, "expected `protocol` 1, got 2"),
        ({"classes": 0}, "expected `classes`"),
        ({"classes": [1, 2]}, "expected `classes`"),
        ({"classes": True}, "expected `classes`"),
        ({"answers": "logits"}, "unknown kind of `answers`"),
        ({"answers": None}, "unknown kind of `answers`"),
        ({"answers": "topk"}, "expected `top_k`"),
        ({"input_shape": [0]}, "expected `input_shape`"),
        ({"max_batch": "many"}, "expected `max_batch`"),
        ({"max_batch": 0}, "expected `max_batch`"),
        ({"decimals": 50}, r"expected `decimals` in 1 \.\. 17"),
        ({"decimals": 10**400}, r"expected `decimals` in 1 \.\. 17"),
        ({"model": None}, "expected `model` as a name, got None"),
        ({"model": ""}, "expected `model` as a name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_servers_that_introduce_themselves_badly(said: Any, message: str) -> None:
    with puppet(good, **said) as server, pytest.raises(RemoteError, match=message):
        ask(server.url)


def test_a_flood_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_BYTES", 2**20)
    with puppet(floods) as server, pytest.raises(RemoteError, match="a response of more than 1048576 bytes"):
        ask(server.url).query(rows(3))


def test_a_server_that_asks_for_time_gets_it() -> None:
    with puppet(says({}, 429, Retry_After="0.3"), good) as server:
        started = time.monotonic()
        ask(server.url).query(rows(3))
        assert time.monotonic() - started > 0.29
    assert server.asked == [3, 3]


def test_a_server_may_name_a_date() -> None:
    seconds = [transport._retry_after({"retry-after": formatdate(date, usegmt=True)}) for date in (4e9, 0.0)]
    assert seconds == [pytest.approx(4e9 - time.time(), abs=60), 0.0]


@pytest.mark.parametrize("after", ["soon", "", "nan", "-5"])
def test_a_server_that_asks_for_nonsense_is_asked_as_usual(after: str) -> None:
    with puppet(says({}, 503, Retry_After=after), good) as server:
        ask(server.url).query(rows(3))
    assert server.asked == [3, 3]


def test_waits_grow_and_end() -> None:
    with puppet(good) as server:
        line = ask(server.url)._connection
    waits = [line._wait(attempt, None) / transport.FIRST_WAIT for attempt in range(6)]
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))
    assert line._wait(100, None) <= transport.LONGEST_WAIT
    assert line._wait(0, 7.0) == 7.0


def test_nobody_there() -> None:
    with puppet(good) as server:
        url = server.url
    with pytest.raises(RemoteError, match=r"no connection.*it was requested 3 times"):
        ask(url)


def test_a_wrong_token_and_none() -> None:
    with serving() as url:
        for token in ("wrong", None):
            with pytest.raises(RemoteError, match=r"status 401.*give the right token"):
                RemoteTeacher(url, token=token)


def test_what_others_pay_for_on_one_account_counts(tmp_path: Path) -> None:
    with puppet(good) as server:
        one, two = (ask(server.url, cache=tmp_path / "answers", budget=10) for _ in range(2))
        one.query(rows(8))
        with pytest.raises(BudgetError, match="got 5 more after 8"):
            two.query(rows(5, seed=1))
        two.query(rows(2, seed=1))
        one.close()
    assert one.queries == two.queries == 10


def test_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    with serving() as url:
        teacher = ask(url, cache=cache)
        teacher.query(rows(2))
        assert TOKEN not in repr(teacher) + json.dumps(teacher.cost)
        teacher.close()
    assert TOKEN.encode() not in cache.read_bytes()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("example.org", "expected a URL such as"),
        ("ftp://example.org", "expected a URL such as"),
        ("http://", "expected a URL such as"),
        ("http://example.org:99999", "expected a URL such as"),
        ("http://example.org/\n", "expected a URL such as"),
        ("http://999.1.1.1", "expected a URL such as"),
        ("http://me:secret@example.org", "without a password"),
        ("http://example.org/?key=secret", "without a password"),
    ],
)
def test_addresses_that_are_none(url: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        RemoteTeacher(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "expected `concurrency`"),
        ({"batch_size": 0}, "expected `concurrency`"),
        ({"retries": -1}, "expected `concurrency`"),
        ({"timeout": 0}, "expected `concurrency`"),
        ({"timeout": float("inf")}, "expected `concurrency`"),
        ({"budget": -1}, "expected a `budget`"),
        ({"floor": 0.0}, "expected a `floor`"),
        ({"floor": -1.0}, "expected a `floor`"),
        ({"token": "two words\n"}, "expected a token"),
        ({"token": ""}, "expected a token"),
        ({"answers": "label"}, "expected a server whose `answers` is label, got probs"),
        ({"top_k": 3}, "expected a server whose `top_k` is 3, got None"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with puppet(good) as server, pytest.raises(UserError, match=message):
        RemoteTeacher(server.url, **options)


def test_without_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtra, match=r"pip install 'luce\[remote\]'"):
        RemoteTeacher("http://127.0.0.1:1")


def test_many_decimals_leave_the_logits_finite() -> None:
    with puppet(of([1.0, 0.0, 0.0, 0.0]), decimals=17) as server:
        assert ask(server.url).signal({"input": rows(2)}).logits.isfinite().all()


def test_names_of_classes_may_stay_unknown() -> None:
    with puppet(good, classes=len(CLASSES), input_shape=None) as server:
        service = ask(server.url).service
    assert (service.classes, service.names, service.input_shape) == (4, None, None)
