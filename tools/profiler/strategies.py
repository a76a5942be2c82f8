"""Timed against each other, untraced: thread counts, the serial reference, ways to dispatch the same kernels.

Everything here takes turns over a few rounds and reports medians, so that a slow minute of a shared machine touches all
alike. The sources of the strategies are in the report's notes (text.py).
"""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from pygpt import GPT2, Ceilings, SerialGPT2

from .job import Job, clock, run, warm_up

Row = dict[str, Any]
Outcome = tuple[int, list[int], str, list[int]]  # ns of the prefill, ns of each decode, digest of the logits, argmax of each
DECODES = 8  # tokens decoded in each round of a comparison
SERIAL = "serial reference"


def ceilings(counts: list[int], rounds: int) -> list[Row]:
    """This machine's limits for each number of threads."""
    found = []
    for threads in counts:
        with Ceilings(threads) as limit:
            limit.measure(rounds)
            found.append({"threads": threads, "read_gb_s": limit.read_gb_s, "fma_gflop_s": limit.fma_gflop_s})
    return found


def best(first: list[Row], second: list[Row]) -> list[Row]:
    """The larger of two measurements of the same ceilings: a ceiling is what was reached at any time."""
    return [{key: max(value, two[key]) for key, value in one.items()} for one, two in zip(first, second, strict=True)]


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4 .. and the number of cores."""
    return sorted({*(1 << k for k in range(cores.bit_length()) if 1 << k <= cores), cores})


def scaling(path: str, job: Job, counts: list[int], rounds: int) -> list[Row]:
    """The job with each number of threads: median times of the prefill and of one decoded token, and the speed-ups."""
    prefills: dict[int, list[int]] = {threads: [] for threads in counts}
    decodes: dict[int, list[int]] = {threads: [] for threads in counts}
    with ExitStack() as stack:
        models = {threads: stack.enter_context(GPT2.load(path, threads=threads)) for threads in counts}
        for model in models.values():
            warm_up(model, job)
        for _ in range(rounds):
            for threads, model in models.items():
                (prefill, *decode), _ = run(model, job, digest=False)
                prefills[threads].append(prefill.done - prefill.begin)
                decodes[threads] += [call.done - call.begin for call in decode]
    rows = []
    for threads in counts:
        row: Row = {"threads": threads, "prediction": False}
        for name, times in (("prefill", prefills), ("decode", decodes)):
            row[f"{name}_ns"] = median(times[threads])
            row[f"{name}_speedup"] = median(times[1]) / median(times[threads])
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------ ways to dispatch


class Way:
    """One way to run the small job: its times, a digest of its logits, the most probable tokens."""

    def __init__(self, name: str, threads: int, rounds_a_step: int, meetings: int, once: Callable[[], Outcome]) -> None:
        self.name, self.threads = name, threads
        self.rounds_a_step, self.meetings = rounds_a_step, meetings
        self.once = once
        self.prefills: list[int] = []
        self.decodes: list[int] = []
        self.digests: set[str] = set()
        self.tokens: list[int] = []

    def measure(self) -> None:
        """Run once more."""
        prefill, decodes, digest, self.tokens = self.once()
        self.prefills.append(prefill)
        self.decodes += decodes
        self.digests.add(digest)


def fast(model: GPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """The cached model: the prompt at once, then given tokens one by one. The sampler is left out."""
    cache = model.new_cache(len(prompt) + len(extra))
    begin = clock()
    logits = model.prefill(cache, prompt)
    prefill = clock() - begin
    digest = hashlib.blake2b(logits.data, digest_size=16)
    decodes, tokens = [], [int(logits.argmax())]
    for token in extra:
        begin = clock()
        logits = model.decode(cache, token)
        decodes.append(clock() - begin)
        digest.update(logits.data)
        tokens.append(int(logits.argmax()))
    return prefill, decodes, digest.hexdigest(), tokens


def forked(model: GPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """The same with one round of the pool for each kernel."""
    model.fork_join(True)
    try:
        return fast(model, prompt, extra)
    finally:
        model.fork_join(False)


def serial(model: SerialGPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """The serial reference: no cache, so a token costs the whole sequence again. One token only: it is slow."""
    begin = clock()
    first = model.logits(prompt)
    middle = clock()
    second = model.logits(prompt + extra[:1])
    end = clock()
    return middle - begin, [end - middle], "", [int(first[-1].argmax()), int(second[-1].argmax())]


def compare(path: str, prompt: list[int], threads: int, rounds: int, *, with_serial: bool) -> Row:
    """The ways against each other: times, speed-up (T_serial / T_parallel), efficiency (speed-up / threads), and bits."""
    with ExitStack() as stack:
        many = stack.enter_context(GPT2.load(path, threads=threads))
        extra = [prompt[i % len(prompt)] for i in range(min(DECODES, many.config.maxT - len(prompt)))]
        alone = stack.enter_context(GPT2.load(path, threads=1))
        L = many.config.L
        ways = [
            Way("one round a kernel", threads, 7 * L + 3, 0, lambda: forked(many, prompt, extra)),
            Way("one round a step", threads, 1, 5 * L + 1, lambda: fast(many, prompt, extra)),
        ]
        if threads > 1:
            ways.insert(0, Way("one worker", 1, 0, 0, lambda: fast(alone, prompt, extra)))
        for way in ways:
            way.once()  # warm
        for _ in range(rounds):
            for way in ways:
                way.measure()
        if with_serial:
            reference = stack.enter_context(SerialGPT2.load(path))
            ways.insert(0, Way(SERIAL, 1, 0, 0, lambda: serial(reference, prompt, extra)))
            ways[0].measure()
    bits = set().union(*(way.digests for way in ways if way.name != SERIAL))
    return {
        "prompt_tokens": len(prompt),
        "same_bits": len(bits) == 1,
        "same_tokens": all(way.tokens[:2] == ways[-1].tokens[:2] for way in ways),
        "ways": [_row(way, ways[0] if with_serial else None) for way in ways],
    }


def _row(way: Way, base: Way | None) -> Row:
    """A way's row; speed-up and efficiency against the base."""
    row: Row = {
        "name": way.name,
        "threads": way.threads,
        "rounds_a_step": way.rounds_a_step,
        "meetings_a_step": way.meetings,
    }
    for name in ("prefill", "decode"):
        taken = median(getattr(way, f"{name}s"))
        speedup = median(getattr(base, f"{name}s")) / taken if base else None
        row[f"{name}_ns"] = taken
        row[f"{name}_speedup"] = speedup
        row[f"{name}_efficiency"] = speedup / way.threads if speedup else None
    return row
