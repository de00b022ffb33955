"""`luce serve`'s application over a real connection: right answers, refusals, and staying up."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import os
import random
import socket
import struct
import threading
import time
from typing import Any
from unittest.mock import Mock

import httpx2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from luce.errors import MissingExtra, UserError
from luce.remote import server as luce_server
from luce.remote.server import Predictor, ServiceOptions, build_app, fingerprint
from luce.signals import answer

from .. import servers as servers_of_tests
from ..servers import DESCRIPTION, TOKEN, Network, serving

BODIES = int(os.environ.get("LUCE_FUZZ_BODIES", "300"))
"""Of the fuzz; 10000 take about half a minute."""
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
ROWS = [[0.5, -1.0, 2.0], [1, 0, 3]]


def post(url: str, content: Any, **headers: str) -> httpx2.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx2.post(f"{url}/v1/predict", content=body, headers={**HEADERS, **headers}, trust_env=False)


def get(url: str, **headers: str) -> httpx2.Response:
    return httpx2.get(url, headers=headers, trust_env=False)


def packed(dtype: str = "float32", shape: Any = (2, 3), data: bytes | None = None) -> dict[str, Any]:
    data = struct.pack("<6f", *ROWS[0], *ROWS[1]) if data is None else data
    return {"dtype": dtype, "shape": list(shape), "base64": base64.b64encode(data).decode()}


# Right questions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offer", [{}, {"decimals": 2}, {"answers": "topk", "top_k": 3}, {"answers": "label"}], ids=str
)
def test_what_is_offered_is_told_and_no_more(offer: dict[str, Any]) -> None:
    logits = Network()(torch.tensor(ROWS)).detach()
    best = logits.softmax(-1).topk(3)
    with serving(**offer) as url:
        told = post(url, {"inputs": ROWS}).json()
        about = get(f"{url}/v1/info", **HEADERS).json()
    model = told.pop("model")
    assert about == {
        "protocol": 1,
        "model": model,
        "classes": DESCRIPTION["classes"],
        "input_shape": [3],
        "answers": offer.get("answers", "probs"),
        "top_k": offer.get("top_k"),
        "decimals": offer.get("decimals"),
        "max_batch": 1024,
        "max_request_bytes": 16 * 2**20,
    }
    if "decimals" in offer:
        assert told.keys() == {"probs"}
        probs = torch.tensor(told["probs"])
        torch.testing.assert_close(probs, probs.round(decimals=2))
        torch.testing.assert_close(probs, logits.softmax(-1), rtol=0, atol=0.005001)
    elif not offer:
        torch.testing.assert_close(torch.tensor(told.pop("probs")), logits.softmax(-1))
        assert told == {}
    elif "top_k" in offer:
        assert told.pop("classes") == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(told.pop("probs")), best.values)
        assert told == {}
    else:
        assert told == {"classes": logits.argmax(-1).tolist()}


def test_inputs_and_answers_in_base64() -> None:
    with serving() as url:
        plain = post(url, {"inputs": ROWS}).json()["probs"]
        assert post(url, {"inputs": packed()}).json()["probs"] == plain
        told = post(url, {"inputs": packed(), "encoding": "base64"}).json()["probs"]
        pixels = post(url, {"inputs": packed("uint8", (1, 3), bytes([0, 51, 255]))}).json()["probs"]
        floats = post(url, {"inputs": [[0.0, 0.2, 1.0]]}).json()["probs"]
    assert (told["dtype"], told["shape"]) == ("float32", [2, 4])
    assert list(struct.unpack("<8f", base64.b64decode(told["base64"]))) == pytest.approx(np.ravel(plain))
    assert pixels[0] == pytest.approx(floats[0], rel=1e-6)


def test_token_ids_reach_a_network_that_embeds_them() -> None:
    network = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 4))
    with serving(network) as url:
        assert post(url, {"inputs": [[1, 2, 3]]}).status_code == 200
        assert post(url, {"inputs": packed("int64", (1, 3), struct.pack("<3q", 1, 2, 3))}).status_code == 200
        assert "whole numbers" in post(url, {"inputs": [[1.0, 2.5, 3.0]]}).text
        assert post(url, {"inputs": [[1, 2, 99]]}).status_code == 500  # no token of the network's


def test_answers_leave_at_once_and_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces wait for an acknowledgement in between: 44 ms for a request on a kept connection."""
    servers: list[Any] = []

    def keep(app: Any) -> Any:
        servers.append(luce_server.new_server(app))
        return servers[0]

    monkeypatch.setattr(servers_of_tests, "new_server", keep)
    with serving() as url, httpx2.Client(headers=HEADERS, trust_env=False) as client:
        client.get(f"{url}/v1/info")
        [connection] = servers[0].server_state.connections
        door = connection.transport.get_extra_info("socket")
        assert door.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        connection.transport = written = Mock(wraps=connection.transport)
        assert client.post(f"{url}/v1/predict", json={"inputs": ROWS}).status_code == 200
    pieces = [call.args[0] for call in written.write.call_args_list if call.args[0]]
    assert [(piece[:12], piece[-1:]) for piece in pieces] == [(b"HTTP/1.1 200", b"}")]


def test_requests_that_wait_together_are_predicted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized(Network):
        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return super().forward(inputs)

    async def ask() -> list[Tensor]:
        predictor = Predictor(Sized(), torch.device("cpu"))
        asked = [asyncio.create_task(predictor(part)) for part in inputs.split([1, 2, 3, 4, 9, 2])]
        work = asyncio.create_task(predictor.work())
        answers = await asyncio.gather(*asked)
        work.cancel()
        return answers

    monkeypatch.setattr(luce_server, "PREDICTION_BATCH", 6)
    sizes: list[int] = []
    inputs = torch.randn(21, 3)
    torch.testing.assert_close(torch.cat(asyncio.run(ask())), Network()(inputs).detach())
    assert sizes == [6, 4, 9, 2]


def test_one_row_that_spoils_a_prediction_spoils_no_other() -> None:
    class Picky(Network):
        def forward(self, inputs: Tensor) -> Tensor:
            time.sleep(0.02)
            if (inputs == 7).any():
                raise RuntimeError("no sevens")
            return super().forward(inputs) * torch.where(inputs == 8, torch.nan, 1.0).sum(1, keepdim=True)

    with serving(Picky()) as url, concurrent.futures.ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(post, url, {"inputs": [[i, 0, 0]]}) for i in range(9)]
        states = [one.result().status_code for one in asked]
    assert states == [200] * 7 + [500] * 2


def test_a_network_that_answers_about_other_rows_stops_nothing() -> None:
    class Short(Network):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)[: 1 if (inputs == 7).any() else None]

    with serving(Short()) as url:
        assert post(url, {"inputs": [[7, 0, 0], [0, 0, 0]]}).status_code == 500
        assert post(url, {"inputs": ROWS}).status_code == 200


def test_anybody_may_ask_whether_it_is_up() -> None:
    with serving() as url:
        assert get(f"{url}/healthz").json() == {"status": "ok"}
        assert get(f"{url}/").status_code == 404
        assert get(f"{url}/v1/predict", **HEADERS).status_code == 405


def test_a_model_is_known_by_its_weights_and_its_normalisation() -> None:
    network, other = Network(), Network()
    with torch.no_grad():
        other.weight[0, 0] += 1e-6
    described = {**DESCRIPTION, "mean": [0.5]}
    marks = {
        fingerprint(network, DESCRIPTION),
        fingerprint(other, DESCRIPTION),
        fingerprint(network, described),
    }
    assert len(marks) == 3
    assert fingerprint(network, DESCRIPTION) in marks


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"]
)
def test_who_brings_no_token_is_told_nothing(header: str | None) -> None:
    network = Network()
    with serving(network) as url:
        headers = {} if header is None else {"Authorization": header}
        answers = [
            httpx2.post(f"{url}/v1/predict", content=b"x" * 10**6, headers=headers, trust_env=False),
            get(f"{url}/v1/info", **headers),
        ]
    for reply in answers:
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "classes" not in reply.text
    assert not network.rows


MALFORMED: dict[str, Any] = {
    "nothing": b"",
    "no JSON": b"inputs=1",
    "no text": b"\xff\xfe\x00",
    "NaN": b'{"inputs": [[NaN, 1, 2]]}',
    "infinity": b'{"inputs": [[1e999, 1, 2]]}',
    "too large for float32": b'{"inputs": [[1e300, 1, 2]]}',
    "many digits": b'{"inputs": [[' + b"9" * 10000 + b", 1, 2]]}",
    "deep": b"[" * 200000,
    "deep inputs": b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}",
    "list": [1],
    "the same twice": b'{"inputs": [[1, 2, 3]], "inputs": [[4, 5, 6]]}',
    "a million dimensions": {"inputs": packed(shape=[2**31 - 1] * 10**6)},
    "an array of 2**93 numbers": {"inputs": packed(shape=[2**31 - 1] * 3)},
    "an empty array of 2**62 columns": {"inputs": packed(shape=[0, 2**31 - 1, 2**31 - 1], data=b"")},
    "no inputs": {},
    "others": {"inputs": ROWS, "outputs": 1},
    "null": {"inputs": None},
    "text": {"inputs": "abc"},
    "no rows": {"inputs": []},
    "ragged": {"inputs": [[1, 2, 3], [1, 2]]},
    "words": {"inputs": [["1", "2", "3"]]},
    "truths": {"inputs": [[True, False, True]]},
    "objects": {"inputs": [[{}, 1, 2]]},
    "shape": {"inputs": [[1, 2, 3, 4]]},
    "flat": {"inputs": [1, 2, 3]},
    "too many rows": {"inputs": [[0, 0, 0]] * 9},
    "encoding": {"inputs": ROWS, "encoding": "xml"},
    "encoding of another type": {"inputs": ROWS, "encoding": ["base64"]},
    "base64": {"inputs": {**packed(), "base64": "?!"}},
    "too few bytes": {"inputs": packed(data=b"1234")},
    "no bytes": {"inputs": {**packed(), "base64": None}},
    "dtype": {"inputs": packed("float64")},
    "dtype of another type": {"inputs": {**packed(), "dtype": ["float32"]}},
    "huge shape": {"inputs": packed(shape=(2**30, 2**30, 2**30))},
    "negative shape": {"inputs": packed(shape=(-2, -3))},
    "shape of truths": {"inputs": packed(shape=(True, 3))},
    "no shape": {"inputs": {**packed(), "shape": 6}},
    "empty shape": {"inputs": packed(shape=(), data=b"1234")},
    "NaN in base64": {"inputs": packed(shape=(1, 3), data=struct.pack("<3f", 1, float("nan"), 2))},
}


def test_malformed_requests_are_refused_with_a_reason() -> None:
    network = Network()
    with serving(network, max_batch=8) as url:
        for name, content in MALFORMED.items():
            answer = post(url, content)
            assert answer.status_code == 400, name
            reason = answer.json()["error"]
            assert reason.startswith("expected"), (name, reason)
            assert len(reason) < 250, name
        assert not network.rows
        assert post(url, {"inputs": ROWS}).status_code == 200


def test_a_large_request_is_refused_while_it_is_read() -> None:
    """By what it announces, and, if it announces nothing, as soon as it is too much."""
    with serving(max_request_bytes=5000) as url:
        assert post(url, {"inputs": ROWS}).status_code == 200
        large = post(url, b"x" * 5001)
        assert (large.status_code, large.json()["error"][:22]) == (413, "expected at most 5000 ")
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as line:
            start = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            line.sendall(f"{start}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(6):  # and the end never comes
                line.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n")
            assert line.recv(4096).startswith(b"HTTP/1.1 413 ")
        assert post(url, {"inputs": ROWS}).status_code == 200


def test_a_slow_request_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luce_server, "RECEIVE_TIMEOUT", 0.2)
    with serving() as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as line:
            start = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            line.sendall(f"{start}Content-Length: 100\r\n\r\nabc".encode())
            assert line.recv(4096).startswith(b"HTTP/1.1 408 ")


POST = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("start", "drip"),
    [(b"", b""), (POST + b"X-Slow: ", b"x"), (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")],
    ids=["silent", "slow head", "refused and goes on"],
)
def test_who_brings_no_token_holds_no_connection(
    start: bytes, drip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luce_server, "RECEIVE_TIMEOUT", 0.2)
    monkeypatch.setattr(luce_server, "CONNECTIONS", 2)
    with serving() as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=0.02) as line:
            deadline, open_ = time.monotonic() + 5, True
            line.sendall(start)
            while open_:
                assert time.monotonic() < deadline
                try:
                    line.sendall(drip)
                    open_ = bool(line.recv(4096))
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            assert post(url, {"inputs": ROWS}).status_code == 200


def mutated(body: bytes, chance: random.Random) -> bytes:
    """Something wrong: bits flipped, parts cut out, doubled or replaced, or noise alone."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.randbytes(chance.randrange(300))
    if kind == 1:
        return json.dumps(
            chance.choice([None, 1, "x", [], [[]], {"inputs": {}}, {"inputs": [[[]]]}])
        ).encode()
    if kind == 2:
        return body[: chance.randrange(len(body))]
    changed = bytearray(body)
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(len(changed))
        if kind == 3:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 4:
            changed[at : at + chance.randrange(10)] = chance.choice(
                [b"", b"[", b'"', b"1e9", b"-", b"null", b"{"]
            )
        else:
            other = chance.randrange(len(changed))
            changed[at:at] = changed[other : other + 20]
    return bytes(changed)


def test_it_stays_up_under_bad_bodies() -> None:
    chance = random.Random(0)
    questions = {"inputs": ROWS}, {"inputs": packed(), "encoding": "base64"}
    good = [json.dumps(question).encode() for question in questions]
    bodies = [mutated(chance.choice(good), chance) for _ in range(BODIES)]
    states: dict[int, int] = {}
    lock, threads = threading.Lock(), threading.active_count()
    with serving(max_request_bytes=400) as url:

        def send(some: list[bytes]) -> None:
            with httpx2.Client(headers=HEADERS, trust_env=False) as client:
                for body in some:
                    answer = client.post(f"{url}/v1/predict", content=body)
                    answer.json()
                    with lock:
                        states[answer.status_code] = states.get(answer.status_code, 0) + 1

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(send, (bodies[start::4] for start in range(4))))
        assert post(url, {"inputs": ROWS}).status_code == 200
        assert get(f"{url}/healthz").status_code == 200
        assert threading.active_count() < threads + 40
    assert states.keys() <= {200, 400, 413}
    assert sum(states.values()) == BODIES
    assert states[400] > 0.7 * BODIES


def test_connections_that_send_no_http_do_no_harm() -> None:
    chance = random.Random(1)
    with serving() as url:
        host, port = url.removeprefix("http://").split(":")
        for number in range(100):
            with socket.create_connection((host, int(port)), timeout=5) as line:
                line.sendall(
                    chance.randbytes(200) if number % 2 else b"POST /v1/predict HTTP/1.1\r\nContent-Le"
                )
        assert post(url, {"inputs": ROWS}).status_code == 200


# Offers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        ({"answers": "logits"}, "unknown kind of `answers`"),
        ({"answers": "topk"}, "expected `top_k`"),
        ({"answers": "topk", "top_k": 5}, r"expected `top_k` in 1 \.\. 4"),
        ({"decimals": 0}, "expected `decimals` in 1"),
        ({"max_batch": 0}, "expected `max_batch`"),
        ({"max_request_bytes": 0}, "expected `max_batch` and `max_request_bytes`"),
    ],
)
def test_offers_that_cannot_be_kept(offer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_app(Network(), DESCRIPTION, ServiceOptions(**offer), token=TOKEN)


def test_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(MissingExtra, match=r"pip install 'luce\[serve\]'"):
        build_app(Network(), DESCRIPTION, ServiceOptions(), token=TOKEN)


def test_the_network_is_asked_in_evaluation_mode_without_gradient() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 4)).train()
    inputs = torch.randn(5, 3)
    found = Predictor(network, torch.device("cpu")).predict(inputs)
    assert not found.requires_grad
    assert torch.equal(found, network[1](inputs).detach())
    assert torch.equal(answer(found, "label")[:, 0].long(), found.argmax(-1))
