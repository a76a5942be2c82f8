"""Compare thread counts and strategies in generation and in training, without a trace.

A strategy is a way to dispatch the same kernels, or the serial reference. All candidates run in turns over a few rounds. The
results are medians, so that a slow minute of a shared machine affects all candidates alike. The report's notes (text.py) name
the sources of the strategies.
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
Outcome = tuple[Times, str, list[float]]  # times, digest of the bits, and results that must agree with the reference too
DECODES = 8  # tokens decoded in each round of a comparison
SERIAL = "serial reference"


def ceilings(counts: list[int], rounds: int, *, stream: bool, dots: Iterable[str] = ()) -> list[Row]:
    """Measure this machine's limits with each number of threads; with `stream`, also the limit of AdamW's memory traffic.

    dots: the weight formats whose integer products are measured.
    """
    found = []
    for threads in counts:
        with Ceilings(threads, stream=stream, dots=dots) as limit:
            limit.measure(rounds)
            row: Row = {"threads": threads, "read_gb_s": limit.read_gb_s, "fma_gflop_s": limit.fma_gflop_s}
            row["dot_gop_s"] = {kind: limit.operations_gop_s(kind) for kind in dots}
            found.append(row | {"stream_gb_s": limit.stream_gb_s if stream else None})
    return found


def best(first: list[Row], second: list[Row]) -> list[Row]:
    """Return the larger of two measurements of each ceiling: a ceiling is the highest speed that was reached."""

    def higher(one: Any, two: Any) -> Any:
        return {key: higher(one[key], two[key]) for key in one} if isinstance(one, dict) else one and max(one, two)

    return [higher(one, two) for one, two in zip(first, second, strict=True)]


def thread_counts(cores: int) -> list[int]:
    """Return the powers of two up to the number of cores, and the number of cores."""
    return sorted({*(1 << k for k in range(cores.bit_length()) if 1 << k <= cores), cores})


def times_of(calls: Iterable[Call]) -> Times:
    """Return the times of calls and of their stages, in ns."""
    found: Times = defaultdict(list)
    for call in calls:
        for name, ns in call.times():
            found[name].append(ns)
    return found


def scaling(path: str, job: Job, counts: list[int], rounds: int) -> list[Row]:
    """Run the job with each number of threads; return the median times of calls and stages, and the speed-ups."""
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


# ------------------------------------------------------------------------------------------------ strategies


class Way:
    """A strategy for the small job: its times, the digests of its bits, and its latest results."""

    def __init__(self, name: str, threads: int, rounds_a_step: int, barriers: int, once: Callable[[], Outcome]) -> None:
        self.name, self.threads = name, threads
        self.rounds_a_step, self.barriers = rounds_a_step, barriers
        self.once = once
        self.times: Times = defaultdict(list)
        self.digests: set[str] = set()
        self.found: list[float] = []

    def measure(self) -> None:
        """Run the job once and keep its outcome."""
        times, digest, self.found = self.once()
        for name, ns in times.items():
            self.times[name] += ns
        self.digests.add(digest)


def fast(model: GPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """Run the prompt, then the given tokens one by one, with the KV cache and without a sampler."""
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
    """Run the same as fast(), with one round of the pool for each kernel."""
    model.fork_join(True)
    try:
        return fast(model, prompt, extra)
    finally:
        model.fork_join(False)


def serial(model: SerialGPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """Run the prompt and one more token with the serial reference, which has no cache and computes the sequence twice."""
    begin = clock()
    first = model.logits(prompt)
    middle = clock()
    second = model.logits(prompt + extra[:1])
    end = clock()
    times = {"prefill": [middle - begin], "decode": [end - middle]}
    return times, "", [float(first[-1].argmax()), float(second[-1].argmax())]


def trained(model: TrainableGPT2 | SerialTrainableGPT2, job: Training) -> Outcome:
    """Run an iteration of training, and compute the loss after it."""
    calls, digest = job.run(model)
    losses = model.evaluate(job.inputs, job.targets)
    return times_of(calls), digest, [float(losses.mean(dtype="f8"))]


def compare(path: str, prompt: list[int], threads: int, rounds: int, *, with_serial: bool, weights: str | None = None) -> Row:
    """Compare the strategies of generation."""
    with ExitStack() as stack:
        many = stack.enter_context(GPT2.load(path, threads=threads, weights=weights))
        extra = [prompt[i % len(prompt)] for i in range(min(DECODES, many.config.maxT - len(prompt)))]
        L = many.config.L
        ways = [
            Way("one round a kernel", threads, 7 * L + 3, 0, lambda: forked(many, prompt, extra)),
            Way("one round a step", threads, 1, 5 * L + 1, lambda: fast(many, prompt, extra)),
        ]
        if threads > 1:
            alone = stack.enter_context(GPT2.load(path, threads=1, weights=weights))
            ways.insert(0, Way("one worker", 1, 0, 0, partial(fast, alone, prompt, extra)))
        if with_serial:
            reference = stack.enter_context(SerialGPT2.load(path, weights=weights))
            ways.insert(0, Way(SERIAL, 1, 0, 0, lambda: serial(reference, prompt, extra)))
        rows = measured(ways, rounds, ("prefill", "decode"))
    return {"prompt_tokens": len(prompt), "same_bits": same_bits(ways), "same_tokens": same_findings(ways), "ways": rows}


def compare_training(job: Training, threads: int, rounds: int, *, with_serial: bool) -> Row:
    """Compare the strategies of training, with one iteration each."""
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
    """Run the strategies in turns, and the reference once.

    Return for each a row with times in ns, speed-up (T_serial / T_parallel) and efficiency (speed-up / threads).
    """
    fast_ways = [way for way in ways if way.name != SERIAL]
    for way in fast_ways:
        way.once()  # warm up
    for _ in range(rounds):
        for way in fast_ways:
            way.measure()
    if ways[0].name == SERIAL:
        ways[0].measure()
    return [_row(way, ways[0] if ways[0].name == SERIAL else None, timed) for way in ways]


def same_bits(ways: list[Way]) -> bool:
    """Return whether all strategies except the reference computed the same bits."""
    return len(set().union(*(way.digests for way in ways if way.name != SERIAL))) == 1


def same_findings(ways: list[Way], within: float = 0.0) -> bool:
    """Return whether all strategies have the same results, within a relative tolerance."""
    pairs = [pair for way in ways for pair in zip(way.found, ways[-1].found, strict=True)]
    return all(math.isclose(a, b, rel_tol=within) for a, b in pairs)


def _row(way: Way, base: Way | None, timed: Iterable[str]) -> Row:
    """Return a strategy's row, with speed-up and efficiency relative to `base`."""
    row: Row = {"name": way.name, "threads": way.threads, "rounds_a_step": way.rounds_a_step, "meetings_a_step": way.barriers}
    for name in timed:
        taken = median(way.times[name])
        speedup = median(base.times[name]) / taken if base else None
        row[f"{name}_ns"] = taken
        row[f"{name}_speedup"] = speedup
        row[f"{name}_efficiency"] = speedup / way.threads if speedup else None
    return row
