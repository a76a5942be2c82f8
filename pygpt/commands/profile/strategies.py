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
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from ...ceilings import Ceilings
from ...model import GPT2
from ...reference import SerialGPT2
from ...training.serial import SerialTrainableGPT2
from ...training.trainable import TrainableGPT2
from ..bench.peers import laps
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
    taken: dict[int, list[Call]] = {threads: [] for threads in counts}
    with ExitStack() as stack:
        models: dict[int, Any] = {threads: stack.enter_context(job.open(path, threads)) for threads in counts}
        for model in models.values():
            job.warm_up(model)
        for _ in range(rounds):
            for threads, model in models.items():
                taken[threads] += job.run(model, digest=False)[0]
    rows: list[Row] = []
    for threads, times in ((threads, times_of(calls)) for threads, calls in taken.items()):
        row: Row = {"threads": threads, "prediction": False}
        for name in job.timed:
            row[f"{name}_ns"] = median(times[name])
            row[f"{name}_speedup"] = (rows or [row])[0][f"{name}_ns"] / row[f"{name}_ns"]  # counts begins with 1
        rows.append(row)
    return rows


@dataclass
class Way:
    """A strategy for the small job: its times, the digests of its bits, and its latest results."""

    name: str
    threads: int
    rounds_a_step: int
    barriers: int
    once: Callable[[], Outcome]
    times: Times = field(default_factory=lambda: defaultdict(list))
    digests: set[str] = field(default_factory=set)
    found: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Run the job once and keep its outcome."""
        times, digest, self.found = self.once()
        for name, ns in times.items():
            self.times[name] += ns
        self.digests.add(digest)

    def row(self, base: "Way | None", timed: Iterable[str]) -> Row:
        """Return the report's row: times in ns, speed-up (T_serial / T_parallel) and efficiency (speed-up / threads)."""
        row: Row = {"name": self.name, "threads": self.threads, "rounds_a_step": self.rounds_a_step}
        row["meetings_a_step"] = self.barriers
        for name in timed:
            row[f"{name}_ns"] = median(self.times[name])
            row[f"{name}_speedup"] = speedup = median(base.times[name]) / row[f"{name}_ns"] if base else None
            row[f"{name}_efficiency"] = speedup / self.threads if speedup else None
        return row


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
    logits, seconds = laps(partial(model.logits, prompt), partial(model.logits, prompt + extra[:1]))
    times = {name: [round(1e9 * taken)] for name, taken in zip(("prefill", "decode"), seconds, strict=True)}
    return times, "", [float(found[-1].argmax()) for found in logits]


def trained(model: TrainableGPT2 | SerialTrainableGPT2, job: Training) -> Outcome:
    """Run an iteration of training, and compute the loss after it."""
    calls, digest = job.run(model)
    losses = model.evaluate(job.inputs, job.targets)
    return times_of(calls), digest, [float(losses.mean(dtype="f8"))]


def compare(path: str, prompt: list[int], threads: int, rounds: int, *, with_serial: bool, weights: str | None = None) -> Row:
    """Compare the strategies of generation."""
    with ExitStack() as stack:
        many = stack.enter_context(GPT2.load(path, threads=threads, weights=weights))
        job = prompt, [prompt[i % len(prompt)] for i in range(min(DECODES, many.config.maxT - len(prompt)))]
        ways = [
            Way("one round a kernel", threads, 7 * many.config.L + 3, 0, partial(forked, many, *job)),
            Way("one round a step", threads, 1, 5 * many.config.L + 1, partial(fast, many, *job)),
        ]
        if threads > 1:
            alone = stack.enter_context(GPT2.load(path, threads=1, weights=weights))
            ways.insert(0, Way("one worker", 1, 0, 0, partial(fast, alone, *job)))
        if with_serial:
            reference = stack.enter_context(SerialGPT2.load(path, weights=weights))
            ways.insert(0, Way(SERIAL, 1, 0, 0, partial(serial, reference, *job)))
        found = measured(ways, rounds, ("prefill", "decode"))
    return {"prompt_tokens": len(prompt), "same_tokens": same_findings(ways), **found}


def compare_training(job: Training, threads: int, rounds: int, *, with_serial: bool) -> Row:
    """Compare the strategies of training, with one iteration each."""
    with ExitStack() as stack:
        many = stack.enter_context(job.open(job.path, threads))
        ways = [Way("one round a stage", threads, 4, 14 * many.config.L + 6, partial(trained, many, job))]
        if threads > 1:
            alone = stack.enter_context(job.open(job.path, 1))
            ways.insert(0, Way("one worker", 1, 0, 0, partial(trained, alone, job)))
        if with_serial:
            reference = stack.enter_context(SerialTrainableGPT2.load(job.path))
            ways.insert(0, Way(SERIAL, 1, 0, 0, partial(trained, reference, job)))
        found = measured(ways, rounds, job.timed)
    return {"B": len(job.inputs), "T": len(job.inputs[0]), "same_losses": same_findings(ways, 1e-3), **found}


def measured(ways: list[Way], rounds: int, timed: Iterable[str]) -> Row:
    """Run the strategies in turns, and the reference once. Return their rows, and whether all others have the same bits."""
    references, parallel = ([way for way in ways if (way.name == SERIAL) is serial] for serial in (True, False))
    for way in parallel:
        way.once()  # warm up
    for way in parallel * rounds + references:
        way.measure()
    bits = set().union(*(way.digests for way in parallel))
    base = references[0] if references else None
    return {"same_bits": len(bits) == 1, "ways": [way.row(base, timed) for way in ways]}


def same_findings(ways: list[Way], within: float = 0.0) -> bool:
    """Return whether all strategies have the same results, within a relative tolerance."""
    pairs = [pair for way in ways for pair in zip(way.found, ways[-1].found, strict=True)]
    return all(math.isclose(a, b, rel_tol=within) for a, b in pairs)
