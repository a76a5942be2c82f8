"""Measure a server: clients send completions to any server with OpenAI's API, and time each token.

    pygpt bench --serve http://127.0.0.1:8000                      1, 8 and 32 clients, one after the other
    pygpt bench --serve http://127.0.0.1:8000 --rate 2 -n 100      arrivals at random times, 2 a second on average
    pygpt bench --serve http://127.0.0.1:8000 --clients 8 --long 1000   a prompt of 1,000 tokens joins again and again

The seed decides the lengths of prompts and answers and their token ids, so every run sends the same requests.
docs/reference/reports.md describes the clients, the times (ttft, itl, tpot) and the JSON."""

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError, PyGPTError
from ..console import Parser, check_stdout, say, whole
from .measuring import print_table

SIGMA = 0.5  # of the logarithms of lengths
TIMES = ("ttft", "itl", "tpot")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `pygpt bench --serve`."""
    parser = Parser(prog="pygpt bench --serve", usage="pygpt bench --serve URL [options]", description=__doc__)
    add, count = parser.add_argument, whole(1, 1 << 20)
    add("--serve", metavar="URL", required=True, help="address of the server, without /v1")
    add("--clients", metavar="LIST", default="1,8,32", help="numbers of clients, separated by commas (default 1,8,32)")
    add("--rate", metavar="R", type=float, help="requests a second at random times, instead of clients")
    add("-n", "--requests", metavar="N", type=count, default=64, help="requests of each measurement (default 64)")
    add("--prompt", metavar="N", type=count, default=220, help="median length of prompts (default 220)")
    add("--new", metavar="N", type=count, default=64, help="median length of answers (default 64)")
    add("--shared", metavar="N", type=whole(0, 1 << 20), default=0, help="first tokens that all prompts share (default 0)")
    add("--long", metavar="N", type=whole(0, 1 << 20), default=0, help="also send prompts of N tokens, one after the other")
    add("--context", metavar="N", type=count, default=1024, help="most tokens of prompt and answer (default 1024)")
    add("--vocabulary", metavar="N", type=count, default=50257, help="ids are below N (default 50257)")
    add("--seed", metavar="N", type=whole(0, 1 << 62), default=1, help="of the requests (default 1)")
    add("--goodput", metavar="LIMITS", type=limits, help="also count requests within limits in ms, such as ttft:500,itl:100")
    add("--key", metavar="KEY", help="API key")
    add("--check", action="store_true", help="send each request again alone, and compare the answers")
    add("-o", "--output", metavar="FORMAT", choices=("text", "json"), default="text", help="text (default) or json")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Measure the server, and print the results."""
    options = build_parser().parse_args(arguments)
    check_stdout("the results")
    counts = [int(part) if part.isascii() and part.isdigit() else 0 for part in options.clients.split(",")]
    if not all(0 < count < 10_000 for count in counts) or not (options.rate is None or options.rate > 0):
        raise InputError("--clients must be whole numbers from 1 to 9999 separated by commas, and --rate above 0")
    url = urlsplit(options.serve)
    if url.scheme != "http" or not url.hostname:
        raise InputError(f"--serve is {options.serve[:60]!r}: it must be an address such as http://127.0.0.1:8000")
    results = [asyncio.run(measure(options, count)) for count in ([options.requests] if options.rate else counts)]
    if options.output == "json":
        print(json.dumps(results))
        return
    rows = []
    for found in results:
        equal = "" if found["equal_to_alone"] is None else f"{found['equal_to_alone']} of {found['requests']}"
        times = [f"{value:.1f}" for name in TIMES for value in found[name]]
        clients = f"{options.rate:g}/s" if options.rate else found["clients"]
        within = "" if found["goodput"] is None else f"{found['goodput']:.2f}"
        rows.append([clients, f"{found['tokens_per_s']:.1f}", *times, within, found["failed"], equal])
    heads = [head for name in TIMES for head in (f"{name} p50", "p99", "max")]
    print_table(["clients", "tokens/s", *heads, "goodput", "failed", "equal"], rows)


def limits(text: str) -> dict[str, float]:
    """Read the value of --goodput: limits in milliseconds, by time."""
    try:
        found = {name: float(limit) for name, _, limit in (part.partition(":") for part in text.split(","))}
    except ValueError:
        found = {}
    if not found or not all(name in TIMES and limit > 0 for name, limit in found.items()):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: it must be limits such as ttft:500,itl:100 ({', '.join(TIMES)})")
    return found


def requests_of(options: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """Return the bodies of the requests of a measurement."""
    draw = random.Random(f"{options.seed} {number}")
    shared = [draw.randrange(options.vocabulary) for _ in range(options.shared)]

    def length(median: int, most: int) -> int:
        return max(1, min(round(median * draw.lognormvariate(0, SIGMA)), most))

    bodies = []
    for seed in range(options.requests):
        new = length(options.new, options.context // 2)
        given = length(options.prompt, options.context - new)
        prompt = [*shared, *(draw.randrange(options.vocabulary) for _ in range(given))][: options.context - new]
        bodies.append({"prompt": prompt, "max_tokens": new, "seed": seed, "temperature": 0.8, "ignore_eos": True})
    return bodies


async def measure(options: argparse.Namespace, clients: int) -> dict[str, Any]:
    """Send the requests with this number of clients, or at random times; return the results."""
    bodies = requests_of(options, clients)
    waiting, draw, answers = iter(enumerate(bodies)), random.Random(options.seed), {}
    began, running = time.perf_counter(), True

    async def client() -> None:
        for number, body in waiting:
            answers[number] = await ask(options, body)
            if options.rate:
                return

    async def arrivals() -> None:
        tasks = []
        for _ in bodies:
            await asyncio.sleep(draw.expovariate(options.rate))
            tasks.append(asyncio.create_task(client()))
        await asyncio.gather(*tasks)

    async def long_prompts() -> None:
        while running and options.long:
            await ask(options, {"prompt": [draw.randrange(options.vocabulary) for _ in range(options.long)], "max_tokens": 1})

    disturbing = asyncio.create_task(long_prompts())
    await (arrivals() if options.rate else asyncio.gather(*(client() for _ in range(clients))))
    seconds, running = time.perf_counter() - began, False
    await disturbing
    good = [answer for answer in answers.values() if isinstance(answer, tuple)]
    if len(good) < len(bodies):
        failed = f"{len(bodies) - len(good)} of {len(bodies)} requests failed, such as with "
        failed += next(repr(answer) for answer in answers.values() if isinstance(answer, str))
        if not good:
            raise PyGPTError(f"{options.serve}: {failed}")
        say(f"{options.serve}: {failed}")
    equal = None
    if options.check:
        pairs = [(await ask(options, body), answers[number]) for number, body in enumerate(bodies)]
        equal = sum(again[0] == first[0] for again, first in pairs if isinstance(again, tuple) and isinstance(first, tuple))
    gaps = [[1000 * (b - a) for a, b in pairwise(times[1:])] for _, times in good]
    tokens = sum(len(times) - 1 for _, times in good)
    firsts = [1000 * (times[1] - times[0]) if len(times) > 1 else math.inf for _, times in good]
    worst = zip(firsts, (max(own, default=0.0) for own in gaps), (sum(own) / max(1, len(own)) for own in gaps), strict=True)
    most = [(options.goodput or {}).get(name, math.inf) for name in TIMES]
    met = sum(all(value <= limit for value, limit in zip(one, most, strict=True)) for one in worst)
    return {
        "clients": clients, "requests": len(bodies), "failed": len(bodies) - len(good), "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "ttft": spread(first for first in firsts if first < math.inf),
        "itl": spread(gap for own in gaps for gap in own),
        "tpot": spread(sum(own) / len(own) for own in gaps if own),
        "goodput": met / seconds if options.goodput else None, "equal_to_alone": equal,
    }  # fmt: skip


def spread(values: Iterable[float]) -> list[float]:
    """Return the 50th and 99th percentile and the maximum."""
    ordered = sorted(values) or [0.0]
    return [ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]]


async def ask(options: argparse.Namespace, body: dict[str, Any]) -> tuple[str, list[float]] | str:
    """Stream a completion; return its text, and the times of the request and of each token. If it failed, return why."""
    url = urlsplit(options.serve)
    data = json.dumps({**body, "stream": True}).encode()
    key = f"Authorization: Bearer {options.key}\r\n" if options.key else ""
    head = f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n{key}"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection(url.hostname, url.port or 80, limit=1 << 24)
    except OSError as error:
        raise PyGPTError(f"cannot reach {options.serve}: {error.strerror or error}") from None
    times, text, done, why = [time.perf_counter()], "", False, "no answer"
    try:
        writer.write(head.encode() + data)
        async for line in reader:
            done = done or line.startswith(b"data: [DONE]")
            why = line.decode("latin-1").strip() if line.startswith(b"HTTP/") else why
            if line.startswith((b"data: {", b"{")):
                found = json.loads(line.removeprefix(b"data: "))
                if "error" in found:
                    return str(found["error"]["message"])
                if piece := found["choices"][0]["text"]:  # some servers send an empty one at the end
                    times.append(time.perf_counter())
                    text += piece
    except (OSError, ValueError, LookupError, TypeError):
        return why
    finally:
        writer.close()
    return (text, times) if done else why
