"""The tests of `pygpt bench`, of generation, speculation and training: what runs, and the least work that the limits allow.

An iteration of training is forward, backward, the gradient's norm and one step of AdamW, always on the same batch."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from time import perf_counter
from typing import Any

from ...ceilings import Ceilings
from ...config import Config
from ...errors import PyGPTError
from ...generation.request import Request
from ...model import DRAFTS, GPT2
from ...reference import SerialGPT2
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ..child import child_environment
from ..console import say
from ..profile.work import decode_bytes, floats, forward, operations, training
from . import peers
from .measuring import Result, batch_of, laps, middle, peak_rss_bytes, prompt, resident_bytes, seconds_of

REFERENCE_TOKENS = 8  # new tokens in the reference's job, after 2 prompt tokens
FILE = "file"  # with --weights: the weights of the file, as they are
PARTS = ("forward", "backward", "norm", "update")
ADAMW: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # as llm.c's train_gpt2.c
TOLERANCE = 1e-3  # of a loss; relative to the loss if it is above 1
COMPARED = 3  # number of iterations whose losses are compared
Work = Mapping[str, float]  # operations by weight format, and bytes by "read" or "stream"


@dataclass
class Test:
    """A test of one program. run: a function that runs it once, and returns the seconds, or in training those of each part.

    work: of each part. facts: more fields of the result. once: run it only once, after all rounds."""

    name: str
    threads: int
    tokens: int
    run: Callable[[], float | Sequence[float]]
    by: str
    weights: str | None = None
    work: Sequence[Work] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    rounds: list[float | Sequence[float]] = field(default_factory=list)

    def result(self, ceilings: dict[int, Ceilings]) -> Result:
        """Return the test as an object of the JSON output."""
        counted = self.rounds[0 if self.once else 1 :]  # the first round was a warm-up
        rounds = [(taken,) if isinstance(taken, float) else taken for taken in counted]
        seconds, (low, high) = middle(map(sum, rounds))
        least = [least_seconds(work, ceilings[self.threads]) for work in self.work]
        found = {
            "test": self.name, "by": self.by, "threads": self.threads, "weights": self.weights,
            "tokens_per_s": self.tokens / seconds, "tokens_per_s_middle_half": [self.tokens / high, self.tokens / low],
            "seconds": seconds, "rounds": len(rounds), "percent_of_limit": 100 * sum(least) / seconds or None,
            "peak_anon_bytes": None, **self.facts,
        }  # fmt: skip
        if "losses" in found:
            found["losses"] = found["losses"][:COMPARED]
            for part, values in zip((*PARTS, "total"), [*zip(*rounds, strict=True), map(sum, rounds)], strict=True):
                found[f"{part}_ms"], found[f"{part}_ms_middle_half"] = middle(1e3 * value for value in values)
            for part, limit in zip(PARTS, least, strict=False):
                found[f"{part}_percent_of_limit"] = 1e5 * limit / found[f"{part}_ms"]
        return found


def least_seconds(work: Work, limits: Ceilings) -> float:
    """Return the seconds that work takes at the machine's limits."""
    moved = {"read": limits.read_gb_s, "stream": limits.stream_gb_s}
    rates = {kind: moved[kind] if kind in moved else limits.operations_gop_s(kind) for kind in work}
    return sum(amount / (rates[kind] * 1e9) for kind, amount in work.items())


def memory_of(measure: Callable[..., dict[str, int]], *arguments: object) -> dict[str, int]:
    """Return the result of memory_of_training() or memory_of_step() in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def time_prefill(model: GPT2, length: int) -> float:
    """Return the seconds of a prompt."""
    tokens, cache = prompt(model.config, 0, length), model.new_cache(length)
    return seconds_of(lambda: model.prefill(cache, tokens))


def time_decode(model: GPT2, depth: int, new: int, batch: int) -> float:
    """Return the seconds for `new` tokens of each of `batch` sequences. Their context of `depth` tokens is not timed."""
    caches = [model.new_cache(depth + new) for _ in range(batch)]
    for cache in caches:
        model.prefill(cache, prompt(model.config, 0, depth))
    rows = [((13 + i) % model.config.V, cache, True) for i, cache in enumerate(caches)]
    return seconds_of(lambda: [model.step(rows) for _ in range(new)])


def time_reference_job(model: GPT2 | SerialGPT2) -> float:
    """Return the seconds of the reference's job: 2 prompt tokens and 8 new tokens."""
    return seconds_of(lambda: list(model.generate([0, 0], max_new_tokens=REFERENCE_TOKENS)))


def time_process(path: str, weights: str | None, *options: str) -> float:
    """Return the seconds of the whole command for the same job, including the start of the interpreter."""
    quantised = [] if weights is None else ["--weights", weights]
    command = [sys.executable, "-m", "pygpt", "-m", path, *quantised, *options, "0", "0"]
    (done,), (seconds,) = laps(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, env=child_environment()))
    if done.returncode:
        raise PyGPTError(f"the measured command ended with status {done.returncode}")
    return seconds


def memory_of_step(
    path: str, weights: str | None, threads: int, length: int, depth: int = 0, new: int = 0, batch: int = 0
) -> dict[str, int]:
    """Return the resident memory after a prefill, or with a batch after a decode, when its caches are freed."""
    with GPT2.load(path, threads=threads, weights=weights) as model:
        before = resident_bytes("RssAnon")
        if batch:
            time_decode(model, depth, new, batch)
        else:
            time_prefill(model, length)
        cache = 2 * 4 * model.config.L * model.config.C * (length + (depth + new) * batch)
        after, mapped = resident_bytes("RssAnon"), resident_bytes("RssFile")
    return {"peak_anon_bytes": after, "anon_before_bytes": before, "cache_bytes": cache, "mapped_bytes": mapped}


def by(program: str, weights: str | None) -> str:
    """Return a program's name in the results: with the format if --weights gave one."""
    return program if weights is None else f"{program} {weights}"


def tg(depth: int, new: int, batch: int = 1) -> str:
    """Return the name of a decode test."""
    return f"tg{new}@d{depth}" + (f"xb{batch}" if batch > 1 else "")


def generation_tests(options: argparse.Namespace, stack: ExitStack, path: str, config: Config) -> list[Test]:
    """Return the tests of all formats of weights with all numbers of threads, of the reference, and of the peers."""
    tests, models = [], dict[str | None, list[GPT2]]()
    for weights in (None if given == FILE else given for given in options.weights):
        load = partial(GPT2.load, path, weights=weights)
        models[weights] = [stack.enter_context(load(threads=threads)) for threads in options.threads]
    leave_out(options, config.maxT)
    for weights, model in ((weights, model) for weights, found in models.items() for model in found):
        tests += (speculative_tests if options.speculate else own_tests)(options, stack, model, weights, path)
    for weights in models if options.reference else ():
        serial = stack.enter_context(SerialGPT2.load(path, weights=weights))
        tests += reference_tests(serial, models[weights], weights, path, options.process)
    if options.all_peers:
        options.against = peers.of_kind(options.against, {found[0].network.stored["qkvw"][0] for found in models.values()})
    options.kinds |= {kind for found in models.values() for kind, _ in found[0].network.stored.values()}
    threads, new = max(options.threads), options.new
    for name in options.against:
        peer = stack.enter_context(peers.Peer(name, path, threads))
        tests += [Test(f"pp{n}", threads, n, partial(peer.prefill, n), name) for n in options.prompts]
        tests += [Test(tg(depth, new), threads, new, partial(peer.decode, new, depth), name) for depth in options.depths]
    return tests


def leave_out(options: argparse.Namespace, maxT: int) -> None:
    """Remove tests that exceed the model's context from the options, and print a notice."""
    more = 1 if options.speculate else 0  # the token with which a text begins
    names = [f"pp{length}" for length in options.prompts if length > maxT]
    names += [tg(depth, options.new) for depth in options.depths if depth + options.new + more > maxT]
    options.prompts = [length for length in options.prompts if length <= maxT]
    options.depths = [depth for depth in options.depths if depth + options.new + more <= maxT]
    if maxT < 2 + REFERENCE_TOKENS:
        names += ["process"] * options.process + ["the reference"] * options.reference
        options.process = options.reference = False
    if names:
        say(f"left out, because they exceed the model's context of {maxT} tokens: {', '.join(names)}")


def own_tests(options: argparse.Namespace, _: ExitStack, model: GPT2, weights: str | None, path: str) -> list[Test]:
    """Return pygpt's tests with one number of threads and one format of weights."""
    config, threads, stored, tests = model.config, model.threads, model.network.stored, []
    own = partial(Test, by=by("pygpt", weights), weights=stored["qkvw"][0])

    def memory(*sizes: int) -> dict[str, int]:
        return memory_of(memory_of_step, path, weights, threads, *sizes) if options.memory else {}

    for length in options.prompts:
        run, work = partial(time_prefill, model, length), operations(stored, forward(config, stored, length))
        tests.append(own(f"pp{length}", threads, length, run, work=[work], facts=memory(length)))
    for depth, batch in product(options.depths, options.batches):
        sizes = depth, options.new, batch
        run, work = partial(time_decode, model, *sizes), {"read": decode_bytes(config, stored, *sizes)}
        tests.append(own(tg(*sizes), threads, options.new * batch, run, work=[work], facts=memory(0, *sizes)))
    if options.process:
        tests.append(own("process", threads, REFERENCE_TOKENS, lambda: time_process(path, weights, "-t", str(threads))))
    return tests


def reference_tests(serial: SerialGPT2, models: list[GPT2], weights: str | None, path: str, process: bool) -> list[Test]:
    """Return the tests of the serial reference, and the same job with pygpt, with one format of weights."""
    test = partial(Test, tokens=REFERENCE_TOKENS, weights=models[0].network.stored["qkvw"][0])
    tests = [test("tg8@d2", 1, run=partial(time_reference_job, serial), by=by("reference", weights))]
    for model in models:
        tests.append(test("tg8@d2", model.threads, run=partial(time_reference_job, model), by=by("pygpt", weights)))
    if process:
        tests.append(test("process", 1, run=partial(time_process, path, weights, "--reference"), by=by("reference", weights)))
    return tests


def speculative_tests(options: argparse.Namespace, stack: ExitStack, model: GPT2, weights: str | None, path: str) -> list[Test]:
    """Return pygpt's tests with --speculate, with one number of threads and one format of weights."""
    kind, tests = model.network.stored["qkvw"][0], []
    load_with = partial(GPT2.load, path, threads=model.threads, weights=weights)
    guided = {draft: stack.enter_context(load_with(draft=draft)) for draft in options.draft_model if draft is not None}
    for depth, batch, sampler in product(options.depths, options.batches, options.sampler):
        texts = own_texts(model, depth, batch)
        asked = {"sampler": sampler, **(options.drawing if sampler == "sample" else {})}
        expected = options.expected.setdefault((weights, depth, batch, sampler), [])
        for draft, guesses in [(None, False), *product(options.draft_model, options.speculate)]:
            test = partial(Completions, guided.get(draft, model), texts, options.new, expected)
            job, program = test(asked | {"speculation": guesses == "auto" or guesses}), by("pygpt", weights)
            if guesses:
                job.facts["draft"], job.facts["speculation"] = draft or DRAFTS.get(kind, "lookup"), guesses
                program += f" +{job.facts['draft']} {guesses}"
            name, new = f"{tg(depth, options.new, batch)} {sampler}", options.new * batch
            tests.append(Test(name, model.threads, new, job.run, program, kind, facts=job.facts))
    return tests


def own_texts(model: GPT2, length: int, count: int) -> list[list[int]]:
    """Return texts that the model draws at random, each with its own seed."""
    start, seeds = [model.config.V - 1], range(1, count + 1)
    drawn = model.generate_batch([start] * count, max_new_tokens=length, sampler="sample", seed=list(seeds))
    return [completion.tokens for completion in drawn]


class Completions:
    """Complete texts again and again on one engine, because an engine learns when speculation pays.

    expected: the tokens that must come; an empty list takes those of the first run. facts: fields of the result."""

    def __init__(self, model: GPT2, texts: Sequence[list[int]], new: int, expected: list[Any], asked: dict[str, Any]) -> None:
        self._requests = [Request(model.config, text, max_new_tokens=new + 1, **asked) for text in texts]
        self._engine, self._new, self._expected, self._runs = model.engine(), new, expected, 0
        unknown = dict.fromkeys(("speculation", "draft", "acceptance"))
        self.facts: dict[str, Any] = {"sampler": asked["sampler"], **unknown, "drafted": 0, "accepted": 0}

    def run(self) -> float:
        """Return the seconds of `new` tokens of each text. A first token, which ends the prefill, does not count."""
        found = [self._engine.add(request).completions[0] for request in self._requests]
        while not all(completion.tokens for completion in found):
            self._step()
        early, began = sum(len(completion.tokens) - 1 for completion in found), perf_counter()
        while self._engine.busy:
            self._step()
        seconds, total = perf_counter() - began, self._new * len(found)
        tokens = [completion.tokens for completion in found]
        self._expected[:] = self._expected or tokens
        for number, (own, expected) in enumerate(zip(tokens, self._expected, strict=True)):
            if own != expected:
                raise PyGPTError(f"speculation changed tokens of text {number}: {own} instead of {expected}")
        if self._runs:  # the first one was a warm-up
            for name in "drafted", "accepted":
                self.facts[name] += sum(getattr(completion, name) for completion in found)
            drafted, accepted, new = self.facts["drafted"], self.facts["accepted"], total * self._runs
            self.facts |= {"acceptance": accepted / drafted if drafted else None, "tokens_per_step": new / (new - accepted)}
        self._runs += 1
        return seconds * total / (total - early)  # with many prompts, early texts go on before the last prompt is read

    def _step(self) -> None:
        for event in self._engine.step():
            if event.error is not None:
                raise event.error


def training_tests(options: argparse.Namespace, stack: ExitStack, path: str, config: Config) -> list[Test]:
    """Return a test for each number of threads, each peer, and the reference."""
    B, T, most = options.B, options.T, max(options.threads)
    batch, work, tests = batch_of(config, B, T), training_work(config, B, T), []
    memory = {n: memory_of(memory_of_training, path, n, B, T) if options.memory else {} for n in options.threads}

    def add(by: str, threads: int, iterate: Any, *given: Any, work: Sequence[Work] = (), once: bool = False) -> None:
        facts = {"B": B, "T": T, "losses": [], **(memory[threads] if work else {})}
        run = partial(iterate, *given, batch, facts)
        tests.append(Test(f"train_b{B}_t{T}", threads, B * T, run, by, work=work, facts=facts, once=once))

    for threads in options.threads:
        add("pygpt", threads, iterate, stack.enter_context(TrainableGPT2.load(path, threads=threads)), work=work)
    for name in options.against:
        add(name, most, iterate_peer, stack.enter_context(peers.Peer(name, path, most)), options.memory)
    if options.reference:
        add("reference", 1, iterate_reference, path, once=True)
    return tests


def training_work(config: Config, B: int, T: int) -> list[Work]:
    """Return the least work of each part of an iteration."""
    work = training(config, B, T)
    once = float(sum(operations(floats(config), work).values()))
    return [{"float32": once}, {"float32": 2 * once}, {"read": work["norm"][1]}, {"stream": work["update"][1]}]


def iterate(model: TrainableGPT2 | SerialTrainableGPT2, batch: tuple[Any, Any], facts: Result) -> list[float]:
    """Run one iteration, and add its loss to the facts; return the seconds of each part."""
    update = partial(model.update, step=len(facts["losses"]) + 1, **ADAMW)
    (losses, *_), seconds = laps(partial(model.forward, *batch), model.backward, model.gradient_norm, update)
    facts["losses"].append(float(losses.mean(dtype="f8")))
    return seconds


def iterate_peer(peer: Any, memory: bool, batch: tuple[Any, Any], facts: Result) -> list[float]:
    """Do the same with a peer, which counts its steps itself."""
    found = peer.train(*batch, **ADAMW)
    facts["losses"].append(found["loss"])
    if memory:
        facts["peak_rss_bytes"] = peer.peak_rss_bytes()
    return [found[part] for part in PARTS]


def iterate_reference(path: str, batch: tuple[Any, Any], facts: Result) -> list[float]:
    """Do the same with the serial reference, after touching the pages of its arrays."""
    with SerialTrainableGPT2.load(path) as model:
        for array in (model.gradients, model.first_moments, model.second_moments):
            array.fill(0)
        return iterate(model, batch, facts)


def memory_of_training(path: str, threads: int, B: int, T: int) -> dict[str, int]:
    """Return the peak of the resident memory, and the memory after two iterations of training."""
    with TrainableGPT2.load(path, threads=threads) as model:
        batch, facts = batch_of(model.config, B, T), {"losses": list[float]()}
        for _ in range(2):
            iterate(model, batch, facts)
        found = {"peak_rss_bytes": peak_rss_bytes(), "peak_anon_bytes": resident_bytes("RssAnon")}
        arrays = model.parameters, model.gradients, model.first_moments, model.second_moments
        return {**found, "parameter_bytes": sum(array.nbytes for array in arrays)}


def check_losses(tests: Sequence[Test]) -> None:
    """Raise PyGPTError if a test's losses differ from the first test's: then they do not train the same network."""
    for first, other in product(tests[:1], tests[1:]):
        losses = (test.facts.get("losses", [])[:COMPARED] for test in (first, other))
        for number, (ours, theirs) in enumerate(zip(*losses, strict=False), 1):
            allowed = 0.0 if other.by == first.by else TOLERANCE * max(1.0, abs(ours))
            if not abs(ours - theirs) <= allowed:  # NaN differs from everything
                whose = f"{first.by}'s loss with {first.threads} threads is {ours!r}, {other.by}'s with {other.threads} threads"
                differ = f"losses of iteration {number} differ: {whose} is {theirs!r}"
                raise PyGPTError(f"{differ}, and they may differ by {allowed:g}")
