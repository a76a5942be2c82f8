#!/usr/bin/env python3
"""Measure `pygpt serve` on a quiet machine, alone or in turns with other servers; then `python tools/pictures.py` draws it.

    python tools/measure_server.py -m gpt2_124M.bin -o tools/benchmarks/server.json
    python tools/measure_server.py -m gpt2_124M.bin --against llama.cpp=http://127.0.0.1:8080 -o tools/benchmarks/server.json

The tool starts the server of this checkout. An other server must run already, with the same model. The measurements are:

    load       tokens a second and times of `pygpt bench --serve` for each number of --clients, all servers in turns
    long       the same with 8 clients, while prompts of 1,000 tokens join one after the other
    overhead   8 requests at once for whole answers over HTTP, in turns with generate_batch(): the median ratio, in %
    cached     milliseconds to the first token of prompts whose first 512 tokens are in the prefix cache
    cancel     steps that a stream still runs after its client has left, and the milliseconds until the server is idle

Times are [median, 99th percentile, maximum], in milliseconds. A real-time priority is not a help: the system then stops the
workers for 50 ms of each second."""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path[:] = [str(TOOLS.parent), *(path for path in sys.path if Path(path or ".").resolve() != TOOLS)]

from pygpt import GPT2  # noqa: E402
from pygpt.commands.bench import load  # noqa: E402
from pygpt.commands.console import Parser, check_stdout, status_of, whole  # noqa: E402
from pygpt.cpus import processors  # noqa: E402
from pygpt.errors import InputError, PyGPTError  # noqa: E402
from pygpt.formats.files import atomic_file  # noqa: E402
from pygpt.tokenizer import tokenizer_of  # noqa: E402

OURS = "pygpt"


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[str]:
    """Run the server of this checkout; yield its address."""
    arguments = ["-m", options.model, "--port", "0", *(["-t", options.threads] if options.threads else [])]
    command = [sys.executable, "-m", "pygpt", "serve", *arguments]
    path = os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert child.stderr is not None
    try:
        line = child.stderr.readline()
        if not (found := re.search(r"http://\S+$", line)):
            raise PyGPTError(f"the server did not start: {line.strip().removeprefix('pygpt: error: ')}")
        yield found[0]
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


def settings(address: str, options: argparse.Namespace, *more: str) -> argparse.Namespace:
    """Return the options of `pygpt bench --serve`."""
    words = ["--serve", address, "-n", str(options.requests), "--prompt", str(options.prompt), "--new", str(options.new)]
    return load.build_parser().parse_args([*words, "--context", str(options.context), *more])


def measured(address: str, options: argparse.Namespace, clients: int, *more: str) -> dict[str, Any]:
    """Return what `pygpt bench --serve` measures for one number of clients."""
    found = asyncio.run(load.measure(settings(address, options, *more), clients))
    return {name: value for name, value in found.items() if name != "equal_to_alone"}


def overhead(address: str, options: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Compare 8 requests at once over HTTP with generate_batch(), in turns."""
    length, new = options.context // 8, options.context // 8
    times: dict[str, list[float]] = {"http": [], "batch": []}
    with GPT2.load(options.model, threads=int(options.threads) if options.threads else None) as model:
        decode = tokenizer_of(model.config).decode
        for number in range(rounds + 1):
            draw = random.Random(f"{options.seed} {number}")  # other prompts each time: no cache has them
            prompts = [[draw.randrange(model.config.V) for _ in range(length)] for _ in range(8)]
            began = time.perf_counter()
            wanted = model.generate_batch(prompts, max_new_tokens=new, sampler="greedy")
            middle = time.perf_counter()
            answers = together(address, prompts, new)
            ended = time.perf_counter()
            for completion, answer in zip(wanted, answers, strict=True):
                if answer != decode(completion.tokens):
                    raise PyGPTError("an answer over HTTP is not that of generate_batch()")
            if number:  # the first round is for warming up
                times["batch"].append(middle - began)
                times["http"].append(ended - middle)
    ratios = [a / b for a, b in zip(times["http"], times["batch"], strict=True)]
    return {"percent": 100 * (statistics.median(ratios) - 1), **{f"{name}_s": found for name, found in times.items()}}


def together(address: str, prompts: list[list[int]], new: int) -> list[str]:
    """Ask for all completions at once; return their texts."""

    def ask(prompt: list[int]) -> str:
        with post(address, {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(ask, prompts))


def post(address: str, body: dict[str, Any]) -> Any:
    """Send a completion request; return the answer, a file to read and close."""
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return urllib.request.urlopen(request)


def cached(address: str, options: argparse.Namespace, count: int) -> list[float]:
    """Return the times to the first token of prompts that share their first half of the context."""
    asked, draw = settings(address, options), random.Random(options.seed)
    shared = [draw.randrange(1000) for _ in range(options.context // 2)]

    async def ask(number: int) -> float:
        answer = await load.ask(asked, {"prompt": [*shared, number], "max_tokens": 1, "ignore_eos": True})
        if isinstance(answer, str):
            raise PyGPTError(f"a request with a cached prefix failed: {answer}")
        return 1000 * (answer[1][1] - answer[1][0])

    async def all_of_them() -> list[float]:
        await ask(0)
        return [await ask(number + 1) for number in range(count)]

    return load.spread(asyncio.run(all_of_them()))


def cancel(address: str, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Leave streams in the middle; count the steps that the server still runs, and the time until it is idle."""
    steps, times = [], []
    for number in range(count):
        before, got = metric(address, "iteration_tokens_total_count"), 0
        body = {"prompt": [number, 1, 2], "max_tokens": options.context - 8, "ignore_eos": True, "stream": True}
        body["speculation"] = False  # so that a step gives one token
        with post(address, body) as answer:
            while got < 5 + number % 3:
                got += answer.readline().startswith(b"data: {")
        left = time.perf_counter()
        while metric(address, "num_requests_running"):
            pass
        times.append(1000 * (time.perf_counter() - left))
        steps.append(metric(address, "iteration_tokens_total_count") - before - got)
    return {"steps": load.spread(steps), "ms": load.spread(times)}


def metric(address: str, name: str) -> float:
    """Return a metric of the server."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        found = re.search(rf"^pygpt:{name}\{{.*\}} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = Parser(prog="measure_server", usage="python tools/measure_server.py -m MODEL [options]", description=__doc__)
    add, count = parser.add_argument, whole(1, 1 << 20)
    add("-m", "--model", metavar="FILE", required=True, help="the model to serve")
    add("-t", "--threads", metavar="N", help="threads of the server (default: one per usable core)")
    add("--against", metavar="NAME=URL", action="append", default=[], help="also measure this server; may be repeated")
    add("--clients", metavar="LIST", default="1,8,32", help="numbers of clients (default 1,8,32)")
    add("-n", "--requests", metavar="N", type=count, default=64, help="requests of each load (default 64)")
    add("--prompt", metavar="N", type=count, default=220, help="median length of prompts (default 220)")
    add("--new", metavar="N", type=count, default=64, help="median length of answers (default 64)")
    add("--context", metavar="N", type=count, default=1024, help="the model's context (default 1024)")
    add("--rounds", metavar="N", type=count, default=5, help="pairs for the overhead, streams to cancel, cached prompts / 4")
    add("--seed", metavar="N", type=count, default=1, help="of the requests (default 1)")
    add("-o", "--output", metavar="FILE", help="write the JSON here (default: stdout)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure, and write the results."""
    if options.output is None:
        check_stdout("the results")
    others = dict(one.partition("=")[::2] for one in options.against)
    if OURS in others or not all(name and url.startswith("http://") for name, url in others.items()):
        raise InputError(f"--against is {options.against}: it must be NAME=http://HOST:PORT, with another name than {OURS}")
    with serving(options) as ours:
        servers = {OURS: ours, **others}
        names = processors() or ["an unknown processor"]
        result: dict[str, Any] = {"machine": f"{len(names)} x {names[0]}", "model": Path(options.model).stem}
        result["load"] = {name: [] for name in servers}
        for clients in [int(part) for part in options.clients.split(",")]:
            for name, address in servers.items():
                result["load"][name].append(measured(address, options, clients))
        long = ["--long", str(options.context * 1000 // 1024), "--prompt", str(min(60, options.prompt))]
        result["long"] = {name: measured(address, options, 8, *long) for name, address in servers.items()}
        result["overhead"] = overhead(ours, options, options.rounds)
        result["cached"] = {name: cached(address, options, 4 * options.rounds) for name, address in servers.items()}
        result["cancel"] = cancel(ours, options, options.rounds)
    data = json.dumps(json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 3)), indent=1) + "\n"
    if options.output is None:
        print(data, end="")
        return
    with atomic_file(options.output) as file:
        file.write(data.encode())


if __name__ == "__main__":
    sys.exit(status_of(lambda: run(build_parser().parse_args())))
