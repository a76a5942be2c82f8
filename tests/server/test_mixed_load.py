"""Everything at once on one server, every answer compared with its known bytes; ten thousand connections; steady memory.

    python -m pytest -m slow --seconds 3600 tests/server/test_mixed_load.py

The server is a process with four models. Threads send completions, whole and streamed, with and without speculation. They leave
before or in the middle of an answer, send bad requests, and ask for everything else. Meanwhile the resident memory, descriptors
and threads of the server stay constant."""

import json
import random
import resource
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from budget import Budget
from jobs import Jobs, in_threads
from running import PYGPT, environment
from serving import Live, ServerProcess, bare, joined, live, tiny, wait_for

import pygpt

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

CLIENTS = 12
CACHE = 4 << 20  # bytes of four models: so small that it is full soon
SLACK = {
    "bytes": 24 << 20,
    "descriptors": 2 * CLIENTS,
    "threads": 34,
}  # arenas; connections at their ends; asyncio's own threads
PACKAGED = Path(pygpt.__file__).with_name("data") / "shakespeare.bin"
MODELS = ("one", "two", "shakespeare", "packed")  # random, random, the package's in float32 and in q8_0


def cases() -> list[dict[str, Any]]:
    """The requests: all models, all kinds of prompts and options, shared beginnings, and a seed where the answer needs one."""
    draw, found = random.Random(3), []
    shared = [draw.randrange(50257) for _ in range(40)]
    for number in range(80):
        text = ["Hello", "Hello world, hello", "Once upon a time", [15496, 995], "\u00e9 \N{GRINNING FACE}"]
        prompt: Any = text[(number + number // 10) % 5]
        if number % 7 == 3:
            prompt = [*shared[: draw.randrange(41)], *(draw.randrange(50257) for _ in range(draw.randrange(1, 20)))]
        several = [prompt, "Hello"] if isinstance(prompt, str) else prompt
        options: list[dict[str, Any]] = [
            {}, {"temperature": 0}, {"logprobs": 3}, {"n": 3}, {"echo": True, "logprobs": 1}, {"sampler": "median"},
            {"top_k": 5}, {"prompt": several}, {"stop": ["e", " t"]}, {"repetition_penalty": 1.3},
        ]  # fmt: skip
        fields = {"prompt": prompt, "model": MODELS[number // 10 % 4], "max_tokens": draw.randrange(1, 30), "ignore_eos": True}
        seed = {} if number % 10 == 5 else {"seed": number % 4}
        found.append({**fields, **seed, **options[number % 10]})
    return found


CASES = cases()
BAD: list[tuple[int, Any]] = [
    (400, {"prompt": [60000]}), (400, {"prompt": "a", "n": 0}), (400, {"prompt": "a" * 9000}), (400, {"prompt": "a", "x": 1}),
    (400, {"prompt": ""}), (400, {"prompt": "a", "stop": 1}), (400, b"{"), (404, {"prompt": "a", "model": "none"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("load")
    packed = folder / f"{MODELS[3]}.gguf"
    subprocess.run([*PYGPT, "quantize", PACKAGED, packed], check=True, capture_output=True, env=environment())
    return [*(tiny(folder, name, seed=seed) for seed, name in enumerate(MODELS[:2])), PACKAGED, packed]


@pytest.fixture(scope="module")
def answers(paths: list[Path]) -> list[Any]:
    """The answer to each request alone."""
    with live(*paths, threads=1, max_live=1) as alone:
        return [bare(alone.complete(**fields)) for fields in CASES]


class Load(Jobs):
    """What clients do."""

    def __init__(self, at: Live, answers: list[Any]) -> None:
        super().__init__()
        self.at, self.answers = at, answers
        self.jobs = [
            self.whole, self.whole, self.stream, self.stream, self.leave_a_stream, self.leave, self.refused, self.other,
        ]  # fmt: skip

    def pick(self, rng: random.Random) -> tuple[dict[str, Any], Any]:
        number = rng.randrange(len(CASES))
        guesses: dict[str, Any] = rng.choice([{}, {}, {"speculation": True}, {"speculation": rng.randrange(1, 9)}])
        return {**CASES[number], **guesses}, self.answers[number]

    def whole(self, rng: random.Random) -> None:
        fields, wanted = self.pick(rng)
        self.check(bare(self.at.complete(**fields)) == wanted, fields)

    def stream(self, rng: random.Random) -> None:
        fields, wanted = self.pick(rng)
        self.check(joined(self.at.stream(**fields)) == wanted["choices"], fields)

    def leave_a_stream(self, rng: random.Random) -> None:
        """Read a few events of a stream, and close the connection."""
        fields, wanted = self.pick(rng)
        connection = self.at.connect()
        try:
            body = json.dumps({**fields, "stream": True}).encode()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            found = [""] * len(wanted["choices"])
            for _ in range(rng.randrange(1, 12)):
                line = response.readline()
                if line.startswith(b"data: {"):
                    for piece in json.loads(line[6:])["choices"]:
                        found[piece["index"]] += piece["text"]
        finally:
            connection.close()
        pairs = zip(found, wanted["choices"], strict=True)
        self.check(all(choice["text"].startswith(text) for text, choice in pairs), fields)

    def leave(self, rng: random.Random) -> None:
        """Send a request, or a part of it, and close the connection soon."""
        connection = self.at.connect()
        body = json.dumps({**self.pick(rng)[0], "stream": rng.random() < 0.5}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sent = head.encode() + body
        connection.sock.sendall(sent if rng.random() < 0.7 else sent[: rng.randrange(len(sent))])
        time.sleep(rng.random() * 0.05)
        connection.close()
        self.check(True)

    def refused(self, rng: random.Random) -> None:
        status, bad = rng.choice(BAD)
        answer = self.at.ask("POST", "/v1/completions", bad)
        self.check(answer.status == status and answer.json()["error"]["message"], status, answer.status)

    def other(self, rng: random.Random) -> None:
        for path in ("/metrics", "/health", "/v1/models", "/", "/openapi.json", "/tokenizer_info"):
            self.check(self.at.ask("GET", path).status == 200, path)
        self.check(self.at.ask("POST", "/detokenize", {"tokens": [15496, 995]}).json()["content"] == "Hello world")


def most(samples: list[dict[str, int]]) -> dict[str, int]:
    """Return the most of each resource."""
    return {name: max(one[name] for one in samples) for name in SLACK}


def leaks(samples: list[dict[str, int]]) -> list[str]:
    """Return the resources of which the last quarter of a run uses more than the first."""
    quarter = len(samples) // 4
    before, after = most(samples[:quarter]), most(samples[-quarter:])
    return [f"{name}: {before[name]}, later {after[name]}" for name in SLACK if after[name] > before[name] + SLACK[name]]


def serving(paths: list[Path], *arguments: str) -> ServerProcess:
    models = [word for path in paths for word in ("-m", str(path))]
    return ServerProcess(*models, "-t", "2", "--cache-bytes", str(CACHE), *arguments)


def quiet(at: Live) -> bool:
    found = at.metrics()
    return found["num_requests_running"] == found["num_requests_waiting"] == 0


def test_everything_at_once(budget: Budget, paths: list[Path], answers: list[Any]) -> None:
    process = serving(paths, "--max-live", "6", "--queue", "1000")
    load, over = Load(process.at, answers), threading.Event()
    count = CLIENTS if budget.long else 3
    clients = [threading.Thread(target=load.work, args=(budget.random.random(), over), daemon=True) for _ in range(count)]
    samples = []
    for client in clients:
        client.start()
    end = time.monotonic() + (budget.seconds or 1.0)
    while time.monotonic() < end:
        time.sleep(0.2)
        samples.append(process.resources())
    over.set()
    for client in clients:
        client.join(300)
    assert not any(client.is_alive() for client in clients)
    assert load.wrong + (leaks(samples) if budget.long else []) == []
    assert load.done.keys() >= {job.__name__ for job in load.jobs}
    wait_for(lambda: quiet(process.at))
    found = process.at.metrics()
    quarter = max(len(samples) // 4, 1)
    print(dict(load.done), most(samples[:quarter]), most(samples[-quarter:]), samples[0], samples[-1])
    print({name: value for name, value in found.items() if "bucket" not in name})
    assert found["spec_decode_num_accepted_tokens_total"] > 0
    assert found["prefix_cache_hits_total"] > 0
    assert found["http_requests_client_disconnected_total"] > 0
    assert process.end() == (0, b"", b"")


def test_a_wrong_byte_and_a_leak_are_found(paths: list[Path], answers: list[Any]) -> None:
    wrong = [{**answer, "choices": [{**c, "text": "\0" + c["text"]} for c in answer["choices"]]} for answer in answers]
    with live(*paths) as running:
        for job in ("whole", "stream", "leave_a_stream"):
            load = Load(running, wrong)
            for seed in range(4):
                getattr(load, job)(random.Random(seed))
            assert load.wrong, job
    steady = {"bytes": 1 << 28, "descriptors": 10, "threads": 5}
    assert leaks([steady] * 30) == []
    assert len(leaks([steady] * 30 + [{name: 2 * value + 100 for name, value in steady.items()}] * 10)) == 3


@pytest.mark.slow
def test_memory_reaches_a_plateau(tmp_path: Path) -> None:
    """Ever new prompts, 3,000 of them: the caches take what --cache-bytes says, also after many were allocated and freed."""
    limit = 16 << 20
    model, sizes = tiny(tmp_path, L=4, C=64, V=1000, maxT=256), list[int]()
    process = ServerProcess("-m", str(model), "-t", "2", "--cache-bytes", str(limit))

    before = process.resources()["bytes"]

    def client(first: int) -> None:
        for number in range(first, first + 25):
            process.at.complete(
                [number // 10, number % 10, *range(3 + number % 60)], max_tokens=20, ignore_eos=True, logprobs=2
            )

    for batch in range(10):
        in_threads(client, [1000 * batch + 30 * i for i in range(CLIENTS)])
        sizes.append(process.resources()["bytes"])
    assert process.end()[0] == 0
    print(before, sizes)
    assert max(sizes[5:]) - sizes[4] < 4 << 20, sizes
    assert max(sizes) - before < 5 * limit // 2, (before, sizes)  # all caches at their whole capacity take 5 times the limit


@pytest.fixture
def many_files() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 10_500:
        pytest.skip(f"the system allows {hard} open files")
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1024, 10_500])
def test_ten_thousand_connections(many_files: int, paths: list[Path], answers: list[Any], limit: int) -> None:
    """All at once: each is served or refused with a whole answer, also if the server may open few files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, many_files))
    process = serving(paths)
    resource.setrlimit(resource.RLIMIT_NOFILE, (10_500, many_files))
    before = process.resources()["descriptors"]
    load, over = Load(process.at, answers), threading.Event()
    held, statuses = [], Counter[bytes]()
    try:
        for _ in range(10_000):
            held.append(socket.create_connection(process.at.address))
            with suppress(OSError):  # refused already
                held[-1].sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        for one in held:
            one.settimeout(30)
            answer = b""
            while not answer.endswith(b"}"):
                answer += one.recv(4096) or b"closed}"
            statuses[answer[9:12]] += 1
        assert statuses.keys() == {b"200", b"503"}
        assert sum(statuses.values()) == 10_000
    finally:
        for one in held:
            one.close()
    over.set()
    load.work(1, over)  # one of each job
    assert load.wrong == []
    wait_for(lambda: process.resources()["descriptors"] <= before + 2)
    assert process.end() == (0, b"", b"")
