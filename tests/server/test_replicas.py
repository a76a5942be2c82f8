"""Two replicas behind a proxy, of which one is killed in the middle of an answer: with a seed, the other gives the same bytes.

The proxy is a small one in this process, and nginx with the guide's configuration where it is installed."""

import http.client
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT
from serving import Answer, Live, ServerProcess, tiny

BODY = {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "temperature": 0.9, "seed": 5}


class Proxy(BaseHTTPRequestHandler):
    """Pass a request to the first replica that sends a byte. After that byte, a lost replica ends the answer."""

    replicas: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sent = False
        for host, port in self.replicas:
            upstream = http.client.HTTPConnection(host, port, timeout=60)
            with closing(upstream), suppress(OSError, http.client.HTTPException):
                upstream.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = upstream.getresponse()
                while piece := answer.read1():
                    if not sent:
                        self.send_response(answer.status)
                        self.end_headers()
                    self.wfile.write(piece)
                    sent = True
            if sent:
                return

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def small_proxy(replicas: list[Any], folder: Path) -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Its", (Proxy,), {"replicas": replicas})) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address
        server.shutdown()


@contextmanager
def nginx(replicas: list[Any], folder: Path) -> Iterator[Any]:
    if (program := shutil.which("nginx")) is None:
        pytest.skip("nginx is not installed")
    (guide,) = re.findall(r"(upstream pygpt.*?)^```", (ROOT / "docs/guides/many-machines.md").read_text(), re.M | re.S)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for host, (name, number) in zip(("10.0.0.1:8000", "10.0.0.2:8000"), replicas, strict=True):
        guide = guide.replace(host, f"{name}:{number}")
    guide = guide.replace("listen 80;", f"listen 127.0.0.1:{port};")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}}\nhttp {{ access_log off;\n{paths}{guide} }}"
    )
    process = subprocess.Popen([program, "-e", str(folder / "errors"), "-c", str(config)])
    try:
        for _ in range(1000):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("proxy", [small_proxy, pytest.param(nginx, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_is_killed_in_the_middle_of_an_answer(tmp_path: Path, proxy: Any, stream: bool) -> None:
    model = tiny(tmp_path, L=6, NH=4, C=128, maxT=400)  # slow enough to be killed
    replicas = [ServerProcess("-m", str(model), "-t", "1") for _ in range(2)]
    try:
        expected = replicas[1].at.complete(**BODY)["choices"]
        with proxy([replica.at.address for replica in replicas], tmp_path) as address, ThreadPoolExecutor(1) as pool:
            client = Live.__new__(Live)
            client.address = address
            asked = pool.submit(client.ask, "POST", "/v1/completions", {**BODY, "stream": stream})
            deadline = time.monotonic() + 60
            while not (busy := [replica for replica in replicas if replica.at.metrics()["num_requests_running"]]):
                assert time.monotonic() < deadline
            assert len(busy) == 1
            if stream:
                while busy[0].at.metrics()["generation_tokens_total"] < 20:
                    assert time.monotonic() < deadline
            busy[0].end(signal.SIGKILL)
            if not stream:  # the proxy has asked the other replica
                assert asked.result().json()["choices"] == expected
                return
            try:
                part = asked.result().body
            except http.client.IncompleteRead as error:
                part = error.partial
            begun = Answer(200, {}, part.rpartition(b"\n\n")[0]).events()
            again = client.ask("POST", "/v1/completions", {**BODY, "stream": True}).events()
            assert (begun.count("[DONE]"), again.pop()) == (0, "[DONE]")
            first, second = ("".join(event["choices"][0]["text"] for event in events) for events in (begun, again))
            assert (second, second[: len(first)]) == (expected[0]["text"], first)
            assert first
    finally:
        for replica in replicas:
            replica.end(signal.SIGKILL)
