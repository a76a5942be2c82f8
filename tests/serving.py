"""Servers on loopback in this process or another one, and a plain HTTP client for them."""

import asyncio
import atexit
import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import make
from prometheus_client.parser import text_string_to_metric_families
from running import PYGPT, environment

from pygpt import GPT2
from pygpt.network import Network
from pygpt.server.app import Options, Server, embedded, listen
from pygpt.server.call import Served

MAXT = 96
SHAPE: dict[str, Any] = {"L": 2, "NH": 2, "C": 16, "V": 50257, "maxT": MAXT}


def tiny(folder: Path, name: str = "tiny", **shape: Any) -> Path:
    """Write a model with GPT-2's vocabulary and random weights."""
    path = folder / f"{name}.bin"
    make(path, **{**SHAPE, "seed": 4, "peak": 30.0, **shape})
    return path


@dataclass
class Answer:
    """A whole answer of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream: objects, and at its end the string [DONE]."""
        found = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part.startswith(b"data: ")]
        return [part.decode() if part == b"[DONE]" else json.loads(part) for part in found]


class Live:
    """A running server, and requests to it."""

    def __init__(self, server: Server, address: Any, stop: Callable[[], None]) -> None:
        self.server, self.address, self.stop = server, address, stop
        self.model = server.models[0].model
        self.engine = server.models[0].engine

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost")
        family = (
            socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        )
        connection.sock = socket.socket(family)
        connection.sock.settimeout(300)
        connection.sock.connect(self.address)
        if family != socket.AF_UNIX:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = self.connect()
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            if body is not None:
                named.setdefault("Content-Type", "application/json")
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, named)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def complete(self, prompt: Any = "Hello", **fields: Any) -> Any:
        answer = self.ask("POST", "/v1/completions", {"prompt": prompt, **fields})
        assert answer.status == 200, answer.body
        return answer.json()

    def stream(self, prompt: Any = "Hello", **fields: Any) -> list[Any]:
        answer = self.ask("POST", "/v1/completions", {"prompt": prompt, "stream": True, **fields})
        assert answer.status == 200, answer.body
        events = answer.events()
        assert events.pop() == "[DONE]"
        return events

    def refused(self, status: int, fields: Any, path: str = "/v1/completions") -> Any:
        answer = self.ask("POST", path, fields)
        assert answer.status == status, answer.body
        return answer.json()["error"]

    def metrics(self) -> dict[str, float]:
        """All samples, sums over the models: name, or name{label=value}."""
        found = defaultdict[str, float](float)
        for family in text_string_to_metric_families(self.ask("GET", "/metrics").body.decode()):
            for sample in family.samples:
                labels = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name")
                found[sample.name.removeprefix("pygpt:") + (f"{{{labels}}}" if labels else "")] += sample.value
        return dict(found)


@contextmanager
def live(
    *paths: Path,
    host: str = "127.0.0.1",
    uds: str | None = None,
    max_live: int = 8,
    cache_bytes: int | None = None,
    grace_s: float = 10.0,
    fingerprint: bool = False,
    threads: int = 2,
    **options: Any,
) -> Iterator[Live]:
    """Serve models in a thread of this process; stop the server at the end of the block."""
    models = []
    for path in paths:
        model = GPT2.load(path, threads=threads)
        most = cache_bytes or 64 * model.network.position_bytes * model.config.maxT
        models.append(
            Served(model, [path.stem], str(path), cache_bytes=most, max_live=max_live, target_ms=60, fingerprint=fingerprint)
        )
    server = Server(models, Options(**options))
    listening = listen(host, 0, uds)
    serving = embedded(server, grace_s)
    thread = threading.Thread(target=lambda: asyncio.run(serving.serve(sockets=[listening])))
    thread.start()

    def stop() -> None:
        server.draining = serving.should_exit = True
        thread.join()

    try:
        while not server.ready and thread.is_alive():
            pass
        yield Live(server, uds or listening.getsockname()[:2], stop)
    finally:
        stop()
        for served in models:
            served.model.close()


class ServerProcess:
    """A `pygpt serve` process. begin: a function that it calls before the command begins."""

    def __init__(self, *arguments: str, begin: Callable[[], None] | None = None) -> None:
        words, pipe = [*PYGPT, "serve", "--port", "0", *arguments], subprocess.PIPE
        self.child = subprocess.Popen(words, stdout=pipe, stderr=pipe, env=environment(), preexec_fn=begin)
        atexit.register(self.child.kill)  # after a test that failed
        assert self.child.stderr
        self.line = self.child.stderr.readline().decode()
        found = re.search(r":(\d+)$", self.line)
        self.at = Live.__new__(Live)
        self.at.address = ("127.0.0.1", int(found[1])) if found else None

    def resources(self) -> dict[str, int]:
        """The process's resident bytes without files, descriptors and threads."""
        place = Path(f"/proc/{self.child.pid}")
        kilobytes = sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", (place / "status").read_text())))
        counts = {name: sum(1 for _ in (place / name).iterdir()) for name in ("fd", "task")}
        return {"bytes": 1024 * kilobytes, "descriptors": counts["fd"], "threads": counts["task"]}

    def end(self, number: int = signal.SIGTERM, times: int = 1) -> tuple[int, bytes, bytes]:
        for _ in range(times):
            self.child.send_signal(number)
            time.sleep(0.2)
        out, err = self.child.communicate(timeout=60)
        return self.child.returncode, out, err


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let each step wait for so long, so that a request runs for a while."""
    step = Network.step

    def slowly(self: Network, *arguments: Any) -> Any:
        time.sleep(seconds)
        return step(self, *arguments)

    monkeypatch.setattr(Network, "step", slowly)


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def bare(answer: Any) -> Any:
    """An answer without what differs between two requests by design."""
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def joined(events: list[Any]) -> list[dict[str, Any]]:
    """The choices of a stream, joined as a client does."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            whole = choices.setdefault(piece["index"], {"index": piece["index"], "text": "", "logprobs": None})
            assert whole.get("finish_reason") is None  # only the last piece of a choice has a reason
            assert piece["text"] or piece["finish_reason"]  # no empty pieces
            whole["text"] += piece["text"]
            whole["finish_reason"] = piece["finish_reason"]
            if "token_ids" in piece:
                whole["token_ids"] = whole.get("token_ids", []) + piece["token_ids"]
                whole.setdefault("prompt_token_ids", piece.get("prompt_token_ids"))
            if piece["logprobs"]:
                if whole["logprobs"] is None:
                    whole["logprobs"] = {name: [] for name in piece["logprobs"]}
                for name, values in piece["logprobs"].items():
                    whole["logprobs"][name] += values
    return [choices[index] for index in sorted(choices)]
