"""What is around the completions: keys, limits, disconnects, metrics, prefixes, slow clients, and the end of the server."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import PYGPT, assert_refuses, environment
from serving import MAXT, SHAPE, Live, ServerProcess, live, slow_steps, tiny, wait_for

from pygpt import Tokenizer
from pygpt.commands import serve
from pygpt.formats.vocabulary import characters_of, write_vocabulary
from pygpt.inspection.inside import logit_lens
from pygpt.network import Network
from pygpt.server import answering, app
from pygpt.server.app import ENDPOINTS

HELLO = {"prompt": "Hello", "max_tokens": 2}
ROUTES = [(("POST" if e.fields is not None else "GET"), re.sub(r"\{.*", "x", e.path), e.key) for e in ENDPOINTS]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("http"))


@pytest.fixture(scope="module")
def at(path: Path) -> Iterator[Live]:
    with live(path, queue=20, body_limit=5000, keys=["secret", "other"], origins=["http://a.example"]) as running:
        yield running


KEY = {"Authorization": "Bearer secret"}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(monkeypatch, seconds=0.03)


# ------------------------------------------------------------------------------------------------ routes, keys, origins


@pytest.mark.parametrize(("method", "route", "key"), ROUTES)
def test_every_route_checks_the_key(at: Live, method: str, route: str, key: bool) -> None:
    for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}, {"X-Api-Key": "secret2"}):
        answer = at.ask(method, route, **headers)
        assert (answer.status == 401) == key
        assert key == ("www-authenticate" in answer.headers)
    for headers in (KEY, {"X-Api-Key": "other"}, {"Authorization": "bearer  other"}):
        assert at.ask(method, route, **headers).status != 401


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_and_paths(at: Live, method: str) -> None:
    for _, route, _ in ROUTES:
        answer = at.ask(method, route, **KEY)
        if answer.status == 405:
            assert answer.headers["allow"]
            assert "not allowed" in answer.json()["error"]["message"]
        with_slash = at.ask(method, f"{route}/", **KEY)
        assert with_slash.status == answer.status
    missing = at.ask("GET", "/v2/\u001b[31m".encode().decode("ascii", "ignore").replace("\x1b", "%1b"), **KEY)
    assert missing.status == 404
    assert missing.json()["error"]["message"].isprintable()
    assert "did you mean /v1/completions" in at.ask(method, "/completion", **KEY).json()["error"]["message"]
    assert at.ask("HEAD", "/health").status == 200
    assert at.ask("HEAD", "/health").body == b""


def test_origins(at: Live, path: Path) -> None:
    """A preflight needs no key. Other origins, and a server without the option, get no permission."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours = at.ask("OPTIONS", "/v1/completions", Origin="http://a.example", **asked)
    assert (ours.status, ours.headers["access-control-allow-origin"]) == (200, "http://a.example")
    assert at.ask("OPTIONS", "/v1/completions", Origin="http://b.example", **asked).status == 400
    wrong = at.ask("GET", "/v1/models", Origin="http://a.example")
    assert (wrong.status, wrong.headers["access-control-allow-origin"]) == (401, "http://a.example")
    assert "access-control-allow-origin" not in at.ask("GET", "/health", Origin="http://b.example").headers
    with live(path) as closed:
        found = closed.ask("OPTIONS", "/v1/completions", Origin="http://a.example", **asked)
        assert found.status == 405
        assert not any(name.startswith("access-control") for name in found.headers)


def test_request_ids(at: Live) -> None:
    answer = at.ask("POST", "/v1/completions", HELLO, X_Request_Id="mine-1", **KEY)
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("mine-1", "cmpl-mine-1")
    assert len(at.ask("GET", "/health", X_Request_Id="\xe9").headers["x-request-id"]) == 32


@pytest.mark.parametrize("prefix", ["/gpt", "/a/b/"])
def test_prefix(path: Path, prefix: str) -> None:
    with live(path, root_path=prefix) as running:
        for base in ("", prefix.rstrip("/")):
            assert running.ask("POST", f"{base}/v1/completions", HELLO).status == 200
            assert running.ask("GET", f"{base}/v1/models/").status == 200
            assert b"<html" in running.ask("GET", f"{base}/").body
        assert running.ask("GET", prefix.rstrip("/")).headers["location"] == prefix.strip("/").rpartition("/")[2] + "/"
        assert running.ask("GET", "/gpt2/health").status == 404
        assert running.ask("GET", "/openapi.json").json()["servers"] == [{"url": prefix.rstrip("/")}]


def test_an_answer_does_not_wait_for_the_client_s_acknowledgement(at: Live) -> None:
    """On one connection, an answer takes much less than the 40 ms after which a client acknowledges its first part."""
    connection, times = at.connect(), []
    for _ in range(20):
        began = time.monotonic()
        connection.request("POST", "/detokenize", b'{"tokens": [1]}', {"Content-Type": "application/json", **KEY})
        assert connection.getresponse().read()
        times.append(time.monotonic() - began)
    connection.close()
    assert min(times[5:]) < 0.03


@pytest.mark.parametrize(("host", "reached"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1")])
def test_addresses(path: Path, host: str, reached: str) -> None:
    with live(path, host=host, keys=["k"]) as running:
        running.address = (reached, running.address[1])
        events = running.ask("POST", "/v1/completions", {**HELLO, "stream": True}, Authorization="Bearer k").events()
        assert events[-1] == "[DONE]"


def test_unix_socket(path: Path, tmp_path: Path) -> None:
    where = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(where)  # a server that was killed leaves its socket
    with live(path, uds=where) as running:
        assert running.complete(max_tokens=2)["usage"]["completion_tokens"] == 2
        with pytest.raises(Exception, match="cannot listen at"):
            app.listen("", 0, where)
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(Exception, match="cannot listen at"):
        app.listen("", 0, str(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "kept"


# ------------------------------------------------------------------------------------------------ the other answers


def test_tokens(at: Live) -> None:
    def post(route: str, **fields: Any) -> Any:
        return at.ask("POST", route, fields, **KEY).json()

    text = "h\u00e9 \N{GRINNING FACE}"
    ids = Tokenizer().encode(text)
    assert post("/tokenize", prompt=text, add_special_tokens=True) == {"tokens": ids, "count": len(ids), "max_model_len": MAXT}
    assert post("/tokenize", content=text) == {"tokens": ids}
    pieces = post("/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces) == text.encode()
    assert post("/tokenize", prompt="a", return_token_strs=True)["token_strs"] == ["a"]
    assert post("/detokenize", tokens=ids) == {"prompt": text, "content": text}
    assert post("/tokenize", prompt="x y " * 1000)["count"] == 2001
    for special in (False, True):
        found = post("/tokenize", content="a<|endoftext|>", parse_special=special)["tokens"]
        assert found == Tokenizer().encode("a<|endoftext|>", allow_special=special)
        assert (found[-1] == 50256) == special
    assert post("/tokenize")["error"]["param"] == "prompt"
    assert post("/detokenize", tokens=[50257])["error"]["param"] == "tokens"
    info = at.ask("GET", "/tokenizer_info", **KEY).json()
    assert (info["eos_token"], info["model_max_length"]) == ("<|endoftext|>", MAXT)


def test_the_attention_of_the_last_token(path: Path) -> None:
    with live(path) as running:
        tokens, config = [1, 2, 3, 4], running.model.config
        for layer in range(config.L):
            found = running.ask("POST", "/inspect", {"tokens": tokens, "layer": layer}).json()
            expected = running.model.activations(tokens, ["probs"])["probs"][layer, :, -1]
            assert found["attention"] == expected.tolist()
            lens = logit_lens(running.model, tokens, positions=[3])[:, 0]
            assert [[one["id"] for one in top] for top in found["lens"]] == [[*np.argsort(-row)[:3]] for row in lens]
            exact = [row - np.logaddexp.reduce(row) for row in lens.astype(np.float64)]
            given = [[one["logprob"] for one in top] for top in found["lens"]]
            assert np.allclose(given, [row[np.argsort(-row)[:3]] for row in exact], rtol=0, atol=1e-5)  # float32 logits
        of_one = running.ask("POST", "/inspect", {"tokens": tokens, "position": 2, "head": config.NH - 1}).json()
        cut = running.ask("POST", "/inspect", {"tokens": tokens[:3]}).json()
        assert of_one == {"attention": cut["attention"][-1:], "lens": cut["lens"]}
        for name, limit in (("position", len(tokens)), ("head", config.NH)):
            error = running.refused(400, {"tokens": tokens, name: limit}, "/inspect")
            assert f"{name} is {limit}" in error["message"]
            assert f"to {limit - 1}" in error["message"]
            assert error["param"] == name
        error = running.refused(400, {"tokens": tokens, "layer": config.L}, "/inspect")
        assert f"layer is {config.L}: it must be a whole number from 0 to {config.L - 1}" in error["message"]
        error = running.refused(400, {"tokens": [1] * (config.maxT + 1)}, "/inspect")
        assert (error["param"], error["message"].endswith("so give fewer")) == ("tokens", True)


def test_chat(path: Path) -> None:
    """Refused without a template. With the plain one: lines of roles, and the answer ends at the next role."""
    messages = [{"role": "user", "content": "Hello"}]
    with live(path) as without:
        error = without.refused(400, {"messages": messages}, "/v1/chat/completions")
        assert "/v1/completions" in error["message"]
    with live(path, chat=True) as running:
        wanted = running.complete("user: Hello\nassistant:", seed=1, max_tokens=5)["choices"][0]["text"]
        asked = {"messages": messages, "seed": 1, "max_completion_tokens": 5}
        whole = running.ask("POST", "/v1/chat/completions", asked).json()
        assert whole["object"] == "chat.completion"
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": wanted}
        events = running.ask("POST", "/v1/chat/completions", {**asked, "stream": True}).events()[:-1]
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == wanted
        assert running.refused(400, {"messages": [{"role": "x", "content": ""}]}, "/v1/chat/completions")["param"] == "messages"


def test_the_openapi_document_names_every_field(at: Live) -> None:
    paths = at.ask("GET", "/openapi.json", **KEY).json()["paths"]
    for endpoint in ENDPOINTS:
        if endpoint.handler is not app.Server.page:
            (operation,) = paths[endpoint.path.replace(":path", "")].values()
            if endpoint.fields is not None:
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                assert body["properties"].keys() == endpoint.fields.keys()
            assert "200" in operation["responses"]


def test_the_timeline_of_a_step(path: Path, slow: None) -> None:
    with live(path) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.ask, "POST", "/trace", {})
        while not asked.done():
            running.complete(max_tokens=3)
        workers = asked.result().json()["workers"]
        assert len(workers) == 2
        for phases in workers:
            assert {"encoder", "qkv", "attention", "fc"} <= {name for name, *_ in phases}
            assert all(0 <= begin <= end <= left for _, _, begin, end, left in phases)
            assert {layer for _, layer, *_ in phases} == {*range(SHAPE["L"] + 1)}  # the head comes after the layers


# ------------------------------------------------------------------------------------------------ metrics


def test_exact_counts(path: Path) -> None:
    with live(path) as running:
        for i in range(10):
            running.complete("Hello world", max_tokens=3 + i % 2, ignore_eos=True, n=1 + i % 2)
        found = running.metrics()
        assert found["prompt_tokens_total"] == 20
        assert found["generation_tokens_total"] == 5 * 3 + 5 * 8
        assert found["request_success_total{finished_reason=length}"] == 15
        assert found["prefix_cache_queries_total"] == 20
        assert found["prefix_cache_hits_total"] == 9  # each request but the first had one of two tokens in the cache
        assert found["http_requests_total{status=200}"] == 10
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
            assert found[f"{name}_seconds_count"] == found[f"{name}_seconds_bucket{{le=+Inf}}"] == 10
        assert found["inter_token_latency_seconds_count"] == 5 * 2 + 5 * 6
        assert found["iteration_tokens_total_sum"] == 55
        assert found["num_requests_running"] == found["num_requests_waiting"] == 0
        assert 0 < found["kv_cache_usage_perc"] < 1
        assert found["spec_decode_num_draft_tokens_total"] == found["spec_decode_num_accepted_tokens_total"] == 0


@pytest.mark.parametrize("by_request", [True, False])
def test_speculation_is_counted_and_keeps_the_text(path: Path, by_request: bool) -> None:
    fields = {"prompt": "Hello world", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    with live(path) as plain:
        wanted = plain.complete(**fields)["choices"]
    with live(path, speculation=False if by_request else 4) as running:
        assert running.complete(**fields, **({"speculation": 4} if by_request else {}))["choices"] == wanted
        first, second = running.metrics(), running.metrics()
        drafted, right = (first[f"spec_decode_num_{name}_tokens_total"] for name in ("draft", "accepted"))
        assert 0 < right <= drafted == second["spec_decode_num_draft_tokens_total"]
        assert running.complete(**fields, speculation=False)["choices"] == wanted
        assert running.metrics()["spec_decode_num_draft_tokens_total"] == drafted


# ------------------------------------------------------------------------------------------------ disconnects


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequences(path: Path, slow: None, stream: bool) -> None:
    with live(path, max_live=2) as running:
        connections = []
        for _ in range(6):
            connection = running.connect()
            body = {"prompt": "Hello", "max_tokens": 90, "n": 2, "stream": stream, "ignore_eos": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            connections.append(connection)
        wait_for(lambda: running.engine.load[:2] == (2, 10))
        if stream:
            assert connections[0].getresponse().readline().startswith(b"data: ")
        wait_for(lambda: "iteration_tokens_total_count" in running.metrics())
        steps = running.metrics()["iteration_tokens_total_count"]
        for connection in connections:
            connection.close()
        wait_for(lambda: running.engine.load[:2] == (0, 0) and running.server.models[0].admitted == 0)
        found = running.metrics()
        assert found["iteration_tokens_total_count"] - steps <= 5  # each cancel takes effect after the step that runs
        assert found["http_requests_client_disconnected_total"] == 6
        assert found["num_requests_running"] == 0
        assert "request_success_total{finished_reason=length}" not in found


@pytest.mark.parametrize(("left", "counted"), [(2, 1), (0, 0)])
def test_a_client_that_has_its_answer_did_not_leave(left: int, counted: int) -> None:
    """It may close the connection while the last bytes are sent."""

    added: list[tuple[str, str, int]] = []
    metrics = SimpleNamespace(add=lambda *given: added.append(given))
    run: Any = SimpleNamespace(_left=left, _model="tiny", _wake=asyncio.Event(), _metrics=metrics)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    asyncio.run(answering.Run._watch(run, receive))
    assert added == [("http_requests_client_disconnected", "tiny", counted)]


def test_two_hundred_cancelled_then_one_answer(path: Path) -> None:
    with live(path, queue=400) as running:
        asked = json.dumps({"prompt": "Hello", "max_tokens": 90, "ignore_eos": True, "stream": True})
        connections = [running.connect() for _ in range(200)]
        for connection in connections:
            connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
        time.sleep(0.5)
        for connection in connections:
            connection.close()
        assert running.complete(max_tokens=5)["usage"]["completion_tokens"] == 5
        assert running.metrics()["generation_tokens_total"] < 200 * 90 / 2
        wait_for(lambda: running.server.models[0].admitted == 0)
        assert running.engine.load[2] <= (running.engine.cache_bytes or 0)


# ------------------------------------------------------------------------------------------------ limits


def test_the_queue_is_bounded(path: Path, slow: None) -> None:
    """Two run and three wait; more are refused before their prompts are even read as tokens."""
    with live(path, max_live=2, queue=3) as running, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(running.complete, max_tokens=40, ignore_eos=True) for _ in range(5)]
        wait_for(lambda: running.server.models[0].admitted == 5)
        answer = running.ask("POST", "/v1/completions", {"prompt": "word " * 5000})
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        assert running.refused(400, {"prompt": "a", "n": 6})["param"] == "n"
        assert running.ask("GET", "/health").status == 200
        for one in asked:
            assert one.result()["usage"]["completion_tokens"] == 40
        assert running.complete(max_tokens=1)


def test_idle_models_do_not_lengthen_the_queue(tmp_path: Path, slow: None) -> None:
    paths = [tiny(tmp_path, name, seed=1) for name in ("one", "two")]
    with live(*paths, max_live=2, queue=1) as running, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(running.complete, model="one", max_tokens=40, ignore_eos=True) for _ in range(3)]
        wait_for(lambda: running.server.models[0].admitted == 3)
        assert running.refused(429, HELLO)["code"] == "queue_full"
        asked += [pool.submit(running.complete, model="two", max_tokens=40, ignore_eos=True) for _ in range(2)]
        wait_for(lambda: running.server.models[1].admitted == 2)
        assert running.refused(429, {**HELLO, "model": "two"})["code"] == "queue_full"  # the other model's request waits
        for one in asked:
            assert one.result()["usage"]["completion_tokens"] == 40


def test_a_call_of_which_one_prompt_can_never_fit_leaves_no_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(path, cache_bytes=20 * 512) as running:  # 20 tokens
        add, jobs = running.engine.add, list[Any]()

        def noting(*given: Any, **more: Any) -> Any:
            jobs.append(add(*given, **more))
            return jobs[-1]

        monkeypatch.setattr(running.engine, "add", noting)
        error = running.refused(400, {"prompt": [[1], [1] * 30], "max_tokens": 4})
        assert error["code"] == "context_length_exceeded"
        assert [job.cancelled for job in jobs] == [True]


def test_the_time_limit_of_requests(path: Path, slow: None) -> None:
    with live(path, request_timeout=1.5) as running:
        assert running.refused(504, {"prompt": "a", "max_tokens": 90, "ignore_eos": True})["code"] == "timeout"
        fields = {"prompt": "a", "max_tokens": 90, "ignore_eos": True, "stream": True}
        events = running.ask("POST", "/v1/completions", fields).events()
        assert len(events) > 2
        assert events[-1]["error"]["code"] == "timeout"
        assert running.complete(max_tokens=2)


def test_bodies(at: Live) -> None:
    def post(body: bytes, kind: str = "application/json", route: str = "/v1/completions") -> int:
        answer = at.ask("POST", route, body, Content_Type=kind, **KEY)
        assert answer.status == 200 or answer.json()["error"]["message"]
        return answer.status

    good = json.dumps(HELLO).encode()
    assert post(good, "application/json; charset=utf-8") == 200
    assert post(good, "text/plain") == post(good, "application/x-www-form-urlencoded") == 415
    assert post(good.ljust(5000)) == 200
    for route in [route for method, route, _ in ROUTES if method == "POST"]:
        assert post(good.ljust(5001), route=route) == 413
    for bad in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": NaN}',
        b"\xff",
        b'"a"',
        b"[" * 4000,
        b'{"prompt": 1' + b"0" * 4500 + b"}",
    ):
        assert post(bad) == 400
    for _ in range(5):  # the client sends all of it before it listens
        assert at.ask("POST", "/tokenize", b" " * (6 << 20), Connection="close", **KEY).status == 413
    connection = at.connect()  # a body of unknown length
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked", **KEY}
    connection.request("POST", "/tokenize", iter([b"{", b" " * 6000, b"}"]), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nX: ",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 99\r\n\r\n",
    ],
    ids=["nothing", "headers", "body", "after an answer"],
)
def test_slow_clients(path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(app, "HEADER_S", 0.3)
    monkeypatch.setattr(app, "SLOW_S", 0.3)
    with live(path) as running:
        connection = running.connect()
        began = time.monotonic()
        connection.sock.sendall(sent)
        if b"text/plain" in sent:
            refused = connection.sock.recv(4096)
            while not refused.endswith(b"}}"):  # the body may come after the headers
                refused += connection.sock.recv(4096)
            assert refused[:12] == b"HTTP/1.1 415"
            connection.sock.sendall(b"{")
        answer = b"".join(iter(lambda: connection.sock.recv(4096), b""))
        connection.close()
        assert time.monotonic() - began < 10
        assert answer[:12] == (b"HTTP/1.1 408" if b"\n{" in sent else b"")
        assert running.complete(max_tokens=1)


def test_a_client_that_does_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream ends after a while, and its sequences are freed."""
    monkeypatch.setattr(answering, "SLOW_S", 0.3)
    with live(path, queue=2000, max_live=64) as running:
        connection = running.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        body = {"prompt": ["Hello"] * 60, "max_tokens": 90, "logprobs": 20, "n": 6, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        wait_for(lambda: running.server.models[0].admitted)
        wait_for(lambda: not running.server.models[0].admitted, 60)
        connection.close()
        assert running.complete(max_tokens=1)


def test_long_headers_and_hostile_ones(path: Path) -> None:
    with live(path) as running:
        for head in (b"X: " + b"a" * 300000, b"Content-Length: -1", b"Content-Length: 1\r\nContent-Length: 2", b"\x00: a"):
            connection = running.connect()
            connection.sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n")
            assert connection.sock.recv(12) in (b"HTTP/1.1 400", b"")
            connection.close()
        assert running.ask("GET", "/health").status == 200


def test_too_many_connections_are_refused_politely(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(path) as running:
        monkeypatch.setattr(app.Protocol, "most", 20)
        monkeypatch.setattr(app, "HEADER_S", 200.0)  # the idle connections stay open
        held = [running.connect() for _ in range(20)]
        wait_for(lambda: running.ask("GET", "/health").status == 503)
        answer = running.ask("GET", "/health")
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "connections"
        held.pop().close()
        wait_for(lambda: running.ask("GET", "/health").status == 200)
        for connection in held:
            connection.close()


def test_few_files(path: Path) -> None:
    """A server that may open 40 files, 17 of them its model's, still answers every connection."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    process = ServerProcess("-m", str(path), "-t", "1", "--no-page", begin=limit)
    held = [socket.create_connection(process.at.address, timeout=30) for _ in range(60)]
    for connection in held:
        with suppress(OSError):  # refused already
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert {connection.recv(4096)[9:12] for connection in held} == {b"200", b"503"}
    for connection in held:
        connection.close()
    wait_for(lambda: process.at.ask("GET", "/health").status == 200)
    assert "there are" in process.at.ask("GET", "/").json()["error"]["message"]
    assert process.end()[::2] == (0, b"")


def test_files_outside_the_page_are_not_served(at: Live) -> None:
    for name in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd", "app.py", "", "%00"):
        assert at.ask("GET", f"/page/{name}", **KEY).status in (404, 401)
    headers = at.ask("GET", "/").headers
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


# ------------------------------------------------------------------------------------------------ scheduling


def test_a_long_prompt_does_not_stall_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decoding sequence, a step takes few rows of a prompt: so the stream goes on between them."""
    with live(tiny(tmp_path, maxT=512)) as running, ThreadPoolExecutor(1) as pool:
        rows: list[int] = []
        step = Network.step

        def counting(self: Network, asked: Any, *others: Any) -> Any:
            rows.append(len(asked))
            time.sleep(0.0005 * len(asked))
            return step(self, asked, *others)

        monkeypatch.setattr(Network, "step", counting)
        stream = pool.submit(running.stream, max_tokens=60, ignore_eos=True)
        wait_for(lambda: len(rows) > 5)
        running.complete([(3 * i) % 50257 for i in range(500)], max_tokens=1)
        stream.result()
        mixed = [count for count in rows if count > 1]
        assert len(mixed) > 3
        assert max(mixed) < 300  # 60 ms at about 0.5 ms a row, and never less than 16


def test_a_step_tells_the_loop_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(path) as running:
        told: list[int] = []

        def telling(events: list[Any]) -> None:
            told.append(len(events))
            running.server.deliver(events)

        monkeypatch.setattr(running.server.worker, "_deliver", telling)
        running.complete(n=8, max_tokens=10, ignore_eos=True)
        assert sum(told) == 80
        assert len(told) <= 12


def test_memory_does_not_grow(path: Path) -> None:
    """Requests with ever new prompts: resident memory without files stays, and the cache keeps to its limit."""

    def resident() -> int:
        with open("/proc/self/status", encoding="ascii") as file:
            return sum(int(found) for found in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", file.read()))

    with live(path, cache_bytes=1 << 20) as running, ThreadPoolExecutor(8) as pool:
        sizes = []
        for batch in range(4):
            list(pool.map(lambda i: running.complete([i, i + 1, 5], max_tokens=8), range(1000 * batch, 1000 * batch + 120)))
            assert running.engine.load[2] <= 1 << 20
            sizes.append(resident())
        assert sizes[-1] - sizes[1] < 8000  # kB: the allocator's noise


# ------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("grace_s", [20.0, 0.0])
def test_draining(path: Path, slow: None, grace_s: float) -> None:
    """Running requests end within the grace time. After it, streams and those that wait for whole answers get an error."""
    with ThreadPoolExecutor(2) as pool:
        with live(path, grace_s=grace_s) as running:
            body = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True}
            whole = pool.submit(running.ask, "POST", "/v1/completions", body)
            stream = pool.submit(running.ask, "POST", "/v1/completions", {**body, "stream": True})
            wait_for(lambda: running.engine.load[0] == 2)
            running.server.draining = True
            assert running.ask("GET", "/health").status == 503
            assert running.refused(503, HELLO)["code"] == "shutting_down"
            began = time.monotonic()
        assert time.monotonic() - began < 15
        events = stream.result().events()
        assert events[-1] == "[DONE]" if grace_s else "shutting down" in events[-1]["error"]["message"]
        assert whole.result().status == (200 if grace_s else 503)
        assert ("shutting_down" in whole.result().body.decode()) == (not grace_s)


def test_a_server_leaves_the_socket_of_another_one(path: Path, tmp_path: Path) -> None:
    """The new socket may have the inode number of the old one. A server also ends well if its socket is gone."""
    where = tmp_path / "socket"
    process = ServerProcess("-m", str(path), "-t", "1", "--uds", str(where))
    where.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(where))
        assert process.end() == (0, b"", b"")
        assert where.exists()
    process = ServerProcess("-m", str(path), "-t", "1", "--uds", str(tmp_path / "gone"))
    (tmp_path / "gone").unlink()
    assert process.end() == (0, b"", b"")


def test_names_of_folders(path: Path, tmp_path: Path) -> None:
    """A slash at the end, as shells complete it, and a dot."""
    folder = tmp_path / "gpt2.v1"
    subprocess.run([*PYGPT, "convert", path, f"{folder}/"], check=True, capture_output=True, env=environment())
    process = ServerProcess("-m", f"{folder}/", "-t", "1")
    assert process.line.startswith("pygpt: serving gpt2.v1 at ")
    assert process.end() == (0, b"", b"")


def test_the_end_of_the_grace_time_answers_every_request(path: Path) -> None:
    """Also one that waits for something else than tokens."""
    with ThreadPoolExecutor(1) as pool:
        with live(path, grace_s=0.0) as running:
            waiting = pool.submit(running.ask, "POST", "/trace", {})
            wait_for(lambda: running.server.models[0].traced)
        answer = waiting.result()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals(path: Path, number: int, status: int) -> None:
    process = ServerProcess("-m", f"small={path}", "-m", f"again={path}", "--max-live", "4", "-t", "1")
    assert process.line.startswith("pygpt: serving small, again at http://127.0.0.1:")
    assert process.at.complete(model="again", max_tokens=2)["model"] == "again"
    assert process.end(number) == (status, b"", b"")


def test_an_open_stream_does_not_stop_the_end(path: Path) -> None:
    """A second signal ends the server while a client waits for more; --grace 0 does so at the first one."""
    for grace, times in (("30", 2), ("0", 1)):
        process = ServerProcess("-m", str(path), "--grace", grace)
        with socket.create_connection(process.at.address) as held:
            body = json.dumps({"prompt": ["a"] * 100, "max_tokens": 90, "stream": True, "ignore_eos": True, "n": 3}).encode()
            head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            held.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
            assert held.recv(100)
            began = time.monotonic()
            status, _, err = process.end(signal.SIGTERM, times)
            assert time.monotonic() - began < 9
        assert (status, err) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-m", "/nowhere.bin"], ["/nowhere.bin"]),
        (["-m", "=x"], ["x"]),
        (["-m", "a={path}", "-m", "a={path}"], ["'a'", "twice"]),
        (["--port", "65536"], ["65536"]),
        (["--host", "192.0.2.1"], ["192.0.2.1", "cannot listen"]),
        (["--host", "no such host"], ["no such host", "cannot listen"]),
        (["--uds", "/nowhere/socket"], ["/nowhere/socket"]),
        (["--uds", "{long}"], ["cannot listen", "path too long;"]),
        (["--api-key", ""], ["API key"]),
        (["--api-key-file", "/nowhere"], ["/nowhere", "cannot read"]),
        (["--api-key-file", "{empty}"], ["no key"]),
        (["--chat-template", "chatml"], ["chatml", "plain"]),
        (["--max-live", "0"], ["max-live"]),
        (["--weights", "q5"], ["q5"]),
        (["--tokenizer", "/nowhere.json"], ["/nowhere.json"]),
        (["--tokenizer", "{empty}"], ["empty"]),
        (["-t", "0"], ["threads", "0"]),
        (["-t", "two"], ["threads", "'two'"]),
        (["--speculate", "soon"], ["speculation", "'soon'", "auto, off"]),
        (["--speculate", "65"], ["speculation", "65", "64"]),
        (["--draft-model", "/nowhere.bin"], ["/nowhere.bin"]),
        (["--root-path", "gpt"], ["gpt", "/"]),
        (["--cors-origins", "a.example"], ["a.example"]),
        (["--cors-origins", "https://a.example/"], ["https://a.example/", "without a path"]),
        (["--cors-origins", "https://*"], ["https://*"]),
    ],
    ids=str,
)
def test_bad_options(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    filled = [word.format(path=path, empty=empty, long=tmp_path / ("x" * 120)) for word in arguments]
    assert_refuses(serve.main, capsys, ["--port", "0", *filled], *named)


def test_a_busy_port_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refuses(serve.main, capsys, ["-m", str(path), "--port", port], port, "in use")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import builtins
    import sys

    find = builtins.__import__

    def missing(name: str, *others: Any) -> Any:
        if name.partition(".")[0] == "starlette":
            raise ModuleNotFoundError("No module named 'starlette'", name="starlette")
        return find(name, *others)

    for name in [name for name in sys.modules if name.startswith("pygpt.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert_refuses(serve.main, capsys, [], "starlette", "python -m pip install starlette uvicorn", status=1)


def test_a_tokenizer_from_a_file(tmp_path: Path) -> None:
    """With --text-only, no id beyond the vocabulary is ever chosen."""
    vocabulary, own = characters_of(["abc \n"]), tmp_path / "own.json"
    write_vocabulary(str(own), vocabulary)
    known = Tokenizer(vocabulary).known
    process = ServerProcess("-m", str(tiny(tmp_path, V=known + 50)), "--tokenizer", str(own), "--text-only", "-t", "1")
    answer = process.at.complete("ab c", max_tokens=40, seed=1, return_token_ids=True)["choices"][0]
    assert answer["prompt_token_ids"] == Tokenizer(vocabulary).encode("ab c")
    assert max(answer["token_ids"]) < known
    assert answer["text"] == Tokenizer(vocabulary).decode(answer["token_ids"])
    assert process.end()[0] == 0


def test_keys_from_a_file(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n# a comment\ntwo\n")
    os.chmod(file, 0o600)
    process = ServerProcess("-m", str(path), "--api-key-file", str(file), "--api-key", "three")
    statuses = [process.at.ask("GET", "/v1/models", X_Api_Key=key).status for key in ("one", "two", "three", "# a comment")]
    assert statuses == [200, 200, 200, 401]
    assert process.end(signal.SIGTERM)[0] == 0
