"""Compare thread counts and strategies in generation and in training, without a trace.

A strategy is a way to dispatch the same kernels, or the serial reference. The report's notes (text.py) name the sources."""

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
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ..bench.measuring import laps
from .job import Call, Job, Training, clock

Row = dict[str, Any]
Times = dict[str, list[int]]  # ns of each call or stage, by its name
Outcome = tuple[Times, str, list[float]]  # times, digest of the bits, and results that must agree with the reference too
DECODES = 8  # tokens decoded in each round of a comparison
SERIAL = "serial reference"


def ceilings(counts: list[int], rounds: int, *, stream: bool, dots: Iterable[str] = ()) -> list[Row]:
    """Measure this machine's limits with each number of threads; `stream` and dots (weight formats) are as in Ceilings."""
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


def times_of(calls: Iterable[Call]) -> Times:
    """Return the times of calls and of their stages, in ns."""
    found: Times = defaultdict(list)
    for call in calls:
        for name, ns in call.times():
            found[name].append(ns)
    return found


@dataclass
class Way:
    """A way to run a job: its times, the digests of its bits, and its latest results."""

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

    def row(self, base: "Way | None", timed: Iterable[str], **facts: Any) -> Row:
        """Return a row of the report: facts, then times in ns, speed-ups (T_base / T) and efficiencies (speed-up / threads)."""
        for name in timed:
            facts[f"{name}_ns"] = median(self.times[name])
            facts[f"{name}_speedup"] = speedup = median(base.times[name]) / facts[f"{name}_ns"] if base else None
            facts[f"{name}_efficiency"] = speedup / self.threads if speedup else None
        return facts


def measured(ways: list[Way], rounds: int) -> None:
    """Run the ways in turns after a warm-up, and the reference once."""
    parallel = [way for way in ways if way.name != SERIAL]
    for way in parallel:
        way.once()
    for way in parallel * rounds + [way for way in ways if way.name == SERIAL]:
        way.measure()


def scaling(path: str, job: Job, counts: list[int], rounds: int) -> list[Row]:
    """Run the job with each number of threads; return the median times of calls and stages, and the speed-ups."""

    def once(model: Any) -> Outcome:
        return times_of(job.run(model, digest=False)[0]), "", []

    with ExitStack() as stack:
        ways = [Way("", n, 0, 0, partial(once, stack.enter_context(job.open(path, n)))) for n in counts]
        measured(ways, rounds)
    timed = [name for name in job.timed if all(name in way.times for way in ways)]  # with --speculate auto, phases may differ
    return [way.row(ways[0], timed, threads=way.threads, prediction=False) for way in ways]  # counts begins with 1


def fast(model: GPT2, prompt: list[int], extra: list[int], *, forked: bool = False) -> Outcome:
    """Run the prompt, then the given tokens one by one, with the KV cache and without a sampler.

    forked: with one round of the pool for each kernel."""
    model.fork_join(forked)
    cache, digest = model.new_cache(len(prompt) + len(extra)), hashlib.blake2b(digest_size=16)
    times, tokens = [], []
    for part in [prompt, *([token] for token in extra)]:
        begin = clock()
        logits = model.extend(cache, part)
        times.append(clock() - begin)
        digest.update(logits.data)
        tokens.append(float(logits.argmax()))
    return {"prefill": times[:1], "decode": times[1:]}, digest.hexdigest(), tokens[:2]


def serial(model: SerialGPT2, prompt: list[int], extra: list[int]) -> Outcome:
    """Run the prompt and one more token with the serial reference, which has no cache and computes the sequence twice."""
    logits, seconds = laps(partial(model.logits, prompt), partial(model.logits, prompt + extra[:1]))
    times = {name: [round(1e9 * taken)] for name, taken in zip(("prefill", "decode"), seconds, strict=True)}
    return times, "", [float(found[-1].argmax()) for found in logits]


def trained(model: TrainableGPT2 | SerialTrainableGPT2, job: Any) -> Outcome:
    """Run an iteration of training, and compute the loss after it."""
    calls, digest = job.run(model)
    return times_of(calls), digest, [float(model.evaluate(job.inputs, job.targets).mean(dtype="f8"))]


def compare(path: str, job: Job, threads: int, rounds: int, *, with_serial: bool) -> Row:
    """Compare the strategies on a small job: of generation with its prompt, or of training."""
    with ExitStack() as stack:
        many: Any = stack.enter_context(job.open(path, threads))
        L, once, slow = many.config.L, partial(trained, job=job), partial(trained, job=job)
        load: Callable[..., Any] = SerialTrainableGPT2.load
        if isinstance(job, Training):
            facts: Row = {"B": len(job.inputs), "T": len(job.inputs[0])}
            ways = [Way("one round a stage", threads, 4, 14 * L + 6, partial(once, many))]
        else:
            facts, load = {"prompt_tokens": len(job.prompt)}, partial(SerialGPT2.load, weights=job.weights)
            extra = [job.prompt[i % len(job.prompt)] for i in range(min(DECODES, many.config.maxT - len(job.prompt)))]
            once, slow = (partial(run, prompt=job.prompt, extra=extra) for run in (fast, serial))
            ways = [Way("one round a kernel", threads, 7 * L + 3, 0, partial(once, many, forked=True))]
            ways.append(Way("one round a step", threads, 1, 5 * L + 1, partial(once, many)))
        if threads > 1:
            ways.insert(0, Way("one worker", 1, 0, 0, partial(once, stack.enter_context(job.open(path, 1)))))
        if with_serial:
            ways.insert(0, Way(SERIAL, 1, 0, 0, partial(slow, stack.enter_context(load(path)))))
        measured(ways, rounds)
    base, training = ways[0] if with_serial else None, isinstance(job, Training)
    bits = set().union(*(way.digests for way in ways if way.name != SERIAL))
    pairs = [pair for way in ways for pair in zip(way.found, ways[-1].found, strict=True)]
    same = all(math.isclose(a, b, rel_tol=1e-3 if training else 0.0) for a, b in pairs)
    rows = []
    for way in ways:
        described = {"name": way.name, "threads": way.threads, "rounds_a_step": way.rounds_a_step}
        rows.append(way.row(base, [name for name in job.timed if name in way.times], **described, barriers_a_step=way.barriers))
    return {**facts, "same_losses" if training else "same_tokens": same, "same_bits": len(bits) == 1, "ways": rows}
