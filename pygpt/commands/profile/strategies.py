"""Timed against each other, untraced: thread counts, the serial reference, ways to dispatch the same kernels, in generation
and in training.

Everything here takes turns over a few rounds and reports medians, so that a slow minute of a shared machine touches all
alike. The sources of the strategies are in the report's notes (text.py).
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from ...ceilings import Ceilings
from ...model import GPT2
from ...reference import SerialGPT2, SerialTrainableGPT2
from ...training.trainable import TrainableGPT2
from .job import Call, Job, Training, clock

Row = dict[str, Any]
Times = dict[str, list[int]]  # ns of each call or stage, by its name
Outcome = tuple[Times, str, list[float]]  # times, digest of the bits, and what even the reference must agree with
DECODES = 8  # tokens decoded in each round of a comparison
SERIAL = "serial reference"


def ceilings(counts: list[int], rounds: int, *, stream: bool) -> list[Row]:
    """This machine's limits for each number of threads; that of an update's traffic only if it is wanted."""
    found = []
    for threads in counts:
        with Ceilings(threads, stream=stream) as limit:
            limit.measure(rounds)
            row: Row = {"threads": threads, "read_gb_s": limit.read_gb_s, "fma_gflop_s": limit.fma_gflop_s}
            found.append(row | {"stream_gb_s": limit.stream_gb_s if stream else None})
    return found


def best(first: list[Row], second: list[Row]) -> list[Row]:
    """The larger of two measurements of the same ceilings: a ceiling is what was reached at any time."""
    return [
        {key: None if value is None else max(value, two[key]) for key, value in one.items()}
        for one, two in zip(first, second, strict=True)
    ]


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4 .. and the number of cores."""
    return sorted({*(1 << k for k in range(cores.bit_length()) if 1 << k <= cores), cores})


def times_of(calls: Iterable[Call]) -> Times:
    """The times of calls and of their stages."""
    found: Times = defaultdict(list)
    for call in calls:
        for name, ns in call.times():
            found[name].append(ns)
    return found


def scaling(path: str, job: Job, counts: list[int], rounds: int) -> list[Row]:
    """The job with each number of threads: median times of each kind of call (and stage), and the speed-ups."""
    taken: dict[int, Times] = {threads: defaultdict(list) for threads in counts}
    with ExitStack() as stack:
        models: dict[int, Any] = {threads: stack.enter_context(job.open(path, threads)) for threads in counts}
        for model in models.values():
            job.warm_up(model)
        for _ in range(rounds):
            for threads, model in models.items():
                calls, _ = job.run(model, digest=False)
                for name, times in times_of(calls).items():
                    taken[threads][name] += times
    rows = []
    for threads in counts:
        row: Row = {"threads": threads, "prediction": False}
        for name in job.timed:
            row[f"{name}_ns"] = median(taken[threads][name])
            row[f"{name}_speedup"] = median(taken[1][name]) / row[f"{name}_ns"]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------ ways to dispatch


class Way:
    """One way to run the small job: its times, digests of its bits, and what it found."""

    def __init__(self, name: str, threads: int, rounds_a_step: int, meetings: int, once: Callable[[], Outcome]) -> None:
        self.name, self.threads = name, threads
        self.rounds_a_step, self.meetings = rounds_a_step, meetings
        self.once = once
        self.times: Times = defaultdict(list)
        self.digests: set[str] = set()
        self.found: list[float] = []

    def measure(self) -> None:
        """Run once more."""
        times, digest, self.found = self.once()
        for name, ns in times.items():
            self.times[name] += ns
        self.digests.add(digest)


def fast(model: GPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """The cached model: the prompt at once, then given tokens one by one. The sampler is left out."""
    cache = model.new_cache(len(prompt) + len(extra))
    begin = clock()
    logits = model.prefill(cache, prompt)
    prefill = clock() - begin
    digest = hashlib.blake2b(logits.data, digest_size=16)
    decodes, tokens = [], [float(logits.argmax())]
    for token in extra:
        begin = clock()
        logits = model.decode(cache, token)
        decodes.append(clock() - begin)
        digest.update(logits.data)
        tokens.append(float(logits.argmax()))
    return {"prefill": [prefill], "decode": decodes}, digest.hexdigest(), tokens[:2]


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
    times = {"prefill": [middle - begin], "decode": [end - middle]}
    return times, "", [float(first[-1].argmax()), float(second[-1].argmax())]


def trained(model: TrainableGPT2 | SerialTrainableGPT2, job: Training) -> Outcome:
    """An iteration of training, and the loss that it leaves."""
    calls, digest = job.run(model)
    losses = model.evaluate(job.inputs, job.targets)
    return times_of(calls), digest, [float(losses.mean(dtype="f8"))]


def compare(path: str, prompt: list[int], threads: int, rounds: int, *, with_serial: bool) -> Row:
    """Ways to generate against each other."""
    with ExitStack() as stack:
        many = stack.enter_context(GPT2.load(path, threads=threads))
        extra = [prompt[i % len(prompt)] for i in range(min(DECODES, many.config.maxT - len(prompt)))]
        L = many.config.L
        ways = [
            Way("one round a kernel", threads, 7 * L + 3, 0, lambda: forked(many, prompt, extra)),
            Way("one round a step", threads, 1, 5 * L + 1, lambda: fast(many, prompt, extra)),
        ]
        if threads > 1:
            alone = stack.enter_context(GPT2.load(path, threads=1))
            ways.insert(0, Way("one worker", 1, 0, 0, partial(fast, alone, prompt, extra)))
        if with_serial:
            reference = stack.enter_context(SerialGPT2.load(path))
            ways.insert(0, Way(SERIAL, 1, 0, 0, lambda: serial(reference, prompt, extra)))
        rows = measured(ways, rounds, ("prefill", "decode"))
    return {"prompt_tokens": len(prompt), "same_bits": same_bits(ways), "same_tokens": same_findings(ways), "ways": rows}


def compare_training(job: Training, threads: int, rounds: int, *, with_serial: bool) -> Row:
    """Ways to train against each other, one iteration each."""
    with ExitStack() as stack:
        many = stack.enter_context(job.open(job.path, threads))
        ways = [Way("one round a stage", threads, 4, 14 * many.config.L + 6, lambda: trained(many, job))]
        if threads > 1:
            alone = stack.enter_context(job.open(job.path, 1))
            ways.insert(0, Way("one worker", 1, 0, 0, partial(trained, alone, job)))
        if with_serial:
            reference = stack.enter_context(SerialTrainableGPT2.load(job.path))
            ways.insert(0, Way(SERIAL, 1, 0, 0, lambda: trained(reference, job)))
        rows = measured(ways, rounds, job.timed)
    shape = {name: job.describe()[name] for name in ("B", "T")}
    return {**shape, "same_bits": same_bits(ways), "same_losses": same_findings(ways, 1e-3), "ways": rows}


def measured(ways: list[Way], rounds: int, timed: Iterable[str]) -> list[Row]:
    """Run the ways in turns, the reference once: a row each with times, speed-up (T_serial / T_parallel) and efficiency
    (speed-up / threads)."""
    fast_ways = [way for way in ways if way.name != SERIAL]
    for way in fast_ways:
        way.once()  # warm
    for _ in range(rounds):
        for way in fast_ways:
            way.measure()
    if ways[0].name == SERIAL:
        ways[0].measure()
    return [_row(way, ways[0] if ways[0].name == SERIAL else None, timed) for way in ways]


def same_bits(ways: list[Way]) -> bool:
    """Whether all ways but the reference computed the same bits."""
    return len(set().union(*(way.digests for way in ways if way.name != SERIAL))) == 1


def same_findings(ways: list[Way], within: float = 0.0) -> bool:
    """Whether all ways found the same, within a share of it."""
    pairs = [pair for way in ways for pair in zip(way.found, ways[-1].found, strict=True)]
    return all(math.isclose(a, b, rel_tol=within) for a, b in pairs)


def _row(way: Way, base: Way | None, timed: Iterable[str]) -> Row:
    """A way's row; speed-up and efficiency against the base."""
    row: Row = {
        "name": way.name,
        "threads": way.threads,
        "rounds_a_step": way.rounds_a_step,
        "meetings_a_step": way.meetings,
    }
    for name in timed:
        taken = median(way.times[name])
        speedup = median(base.times[name]) / taken if base else None
        row[f"{name}_ns"] = taken
        row[f"{name}_speedup"] = speedup
        row[f"{name}_efficiency"] = speedup / way.threads if speedup else None
    return row
