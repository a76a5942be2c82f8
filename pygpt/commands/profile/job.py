"""The profiled job, and the recording of its calls and events.

A Call is timed from outside; its steps hold the workers' events. Times are nanoseconds of the clock of the kernels' trace."""

import hashlib
import math
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any, ClassVar, NamedTuple, cast

from ..._kernels import PHASES, Trace
from ...config import Config
from ...errors import InputError, NumericalError
from ...formats.open import open_floats
from ...generation.engine import Engine
from ...generation.request import Request
from ...generation.speculate import MOST, Draft
from ...model import GPT2
from ...network import Network
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ..bench.measuring import batch_of, marks

WAKE = "wake-up"  # the time in which some workers are awake and others are not
FIRST = ("encoder", "dlogits", "norm", "update")  # the phases that begin a step
STAGES = ("forward", "backward", "norm", "update")  # the steps of an iteration of training
HEAD = ("lnf", "logits", "loss", "dlogits", "dhead", "dlnf")


def clock() -> int:
    """Return the time of the kernels' clock, in ns."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Event(NamedTuple):
    """One phase on one worker. It computes from begin to end, and waits at the barrier from end to left."""

    phase: str
    layer: int
    begin: int
    end: int
    left: int

    def spans(self) -> list[tuple[str, int, int]]:
        """Return the phase and the wait after it as (name, begin, end), without empty ones."""
        spans = [(self.phase, self.begin, self.end), (WAKE if self.phase == WAKE else "wait", self.end, self.left)]
        return [span for span in spans if span[2] > span[1]]


def place(phase: str, layer: int) -> str:
    """Return the place of a phase in the network: a layer's number, "encoder", "head", or the name of the phase itself."""
    if phase in HEAD:
        return "head"
    if phase in ("encoder", "dencoder"):
        return "encoder"
    return phase if phase in (WAKE, "norm", "update") else str(layer)


Step = list[list[Event]]  # one pass through the network: for each worker its events in time order, or [] if it did not run


@dataclass
class Call:
    """One prefill, decode or iteration of training, timed from outside."""

    mode: str
    position: int  # number of tokens in the cache before the call
    rows: int
    begin: int
    ran: int  # the time when the logits were ready
    done: int  # the time when the next token was chosen; in training, the same as ran
    stages: tuple[int, ...] = ()  # in training, the end of each of STAGES
    sequences: int = 1
    wanted: int = 1  # number of rows with logits
    steps: list[Step] = field(default_factory=list)

    def bounds(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name, begin and end of each stage."""
        return zip(STAGES, pairwise((self.begin, *self.stages)), strict=False)

    def times(self) -> list[tuple[str, int]]:
        """Return the times that are compared between runs: (mode, time of the call), then (name, time) of each stage."""
        return [(self.mode, self.done - self.begin), *((name, end - begin) for name, (begin, end) in self.bounds())]


@dataclass(frozen=True)
class Generation:
    """A job that runs a prompt, then decodes `new` tokens one by one, with the engine that users have.

    With speculation, a step is a decode, or a sequence: drafts, a rollback of their rows from the caches, a verification, and
    a rollback of wrong rows. Every moment of a step belongs to one of these phases."""

    prompt: list[int]
    new: int
    sampler: str = "median"
    all_workers: bool = False  # use all workers even for steps that are faster on fewer
    weights: str | None = None  # the format to quantise the weights to in memory, or None for those of the file
    speculation: int | bool = False
    draft: str | None = None

    modes: ClassVar = ("prefill", "draft", "verify", "rollback", "decode")
    timed: ClassVar = modes  # the times that are compared between runs

    def open(self, path: str, threads: int | None) -> GPT2:
        """Open the model that runs this job, and make its draft."""
        options: Any = {"weights": self.weights, "all_workers": self.all_workers, "draft": self.draft}
        model = GPT2.load(path, threads=threads, **options)
        model.draft(bool(self.speculation))
        return model

    def run(self, model: GPT2, *, digest: bool = True) -> tuple[list[Call], str]:
        """Run the job once; return its calls and a digest of the logits that chose the tokens, computed between the calls."""
        found: list[Call] = []
        network, draft = _Watched(model.network, "decode", found), model.draft(False)
        watched = draft and Draft(_Watched(draft.network, "draft", found), shared=draft.shared)
        engine = Engine(network, draft=lambda make: watched)
        options: Any = {"sampler": self.sampler, "speculation": self.speculation}
        options["overflow"] = "slide"  # room for the last token
        [completion] = engine.add(Request(model.config, self.prompt, max_new_tokens=self.new + 1, **options)).completions
        calls: list[Call] = []
        bits = hashlib.blake2b(digest_size=16)
        while engine.busy:
            prefill, begin = not completion.tokens, clock()
            events = engine.step()
            found[0].begin, end = begin, clock()
            for call, after in zip_longest(found, found[1:]):
                call.done = after.begin if after else end
                if call.mode == "rollback":
                    call.ran = call.done
                elif call.mode == "decode" and (prefill or call.rows > 1):
                    call.mode = "prefill" if prefill else "verify"
            if events and events[-1].error is not None:
                raise events[-1].error
            if digest and events:
                bits.update(memoryview(network.logits).cast("B")[: 4 * model.config.V * len(events)])
            if prefill and calls:  # the next rows of a long prompt
                calls[0].rows += found[0].rows
                calls[0].ran, calls[0].done, calls[0].wanted = found[0].ran, end, found[0].wanted
            else:
                calls += found
            found.clear()
        return calls, bits.hexdigest()

    def warm_up(self, model: GPT2) -> None:
        """Touch every page of weights and activations once."""
        replace(self, new=min(self.new, 2)).run(model, digest=False)

    def events(self, config: Config) -> int:
        """Return the largest number of events of a worker. A step of a prompt has at least 16 rows."""
        guesses = MOST if self.speculation is True else self.speculation  # for one token, at the worst
        return (11 * config.L + 4) * ((1 + guesses) * self.new + len(self.prompt) // 16 + 2)

    def describe(self) -> dict[str, Any]:
        """Return the fields of the report that describe this job."""
        return {"prompt_tokens": len(self.prompt), "new_tokens": self.new, "sampler": self.sampler}


class _Watched:
    """A network that adds a Call to `calls` for each step, and for each removal of rows from its caches."""

    def __init__(self, network: Any, mode: str, calls: list[Call]) -> None:
        self._network, self._mode, self._calls = network, mode, calls
        self.logits: Any = None  # of the latest step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def step(self, rows: list[tuple[int, Any, bool]], *, watch: Any = None) -> Any:
        """Run a step of the network."""
        position, wanted, begin = rows[0][1].length, sum(wants for *_, wants in rows), clock()
        self.logits = self._network.step(rows, watch=watch)
        self._calls.append(Call(self._mode, position, len(rows), begin, ran := clock(), ran, wanted=wanted))
        return self.logits

    def new_cache(self, capacity: int | None = None) -> Any:
        """Return a cache of the network."""
        cache = self._network.new_cache(capacity)
        truncate = cache.truncate

        def rewind(length: int) -> None:
            removed, begin = cache.length - length, clock()
            truncate(length)
            if removed:
                self._calls.append(Call("rollback", length, removed, begin, ran := clock(), ran))

        vars(cache)["truncate"] = rewind
        return cache


@dataclass(frozen=True)
class Training:
    """A job that runs iterations of training on one batch. Every run begins with the weights in the file."""

    path: str
    inputs: list[list[int]]
    targets: list[list[int]]
    iterations: int
    all_workers: bool = False  # use all workers even for steps that are faster on fewer

    modes: ClassVar = ("train",)
    timed: ClassVar = ("train", *STAGES)

    @classmethod
    def of(cls, path: str, B: int, T: int, iterations: int, *, all_workers: bool = False) -> "Training":
        """Return a job with an artificial batch of B x T tokens. Raises InputError if T exceeds the model's context."""
        with open_floats(path) as opened:
            return cls(path, *batch_of(opened.config, B, T), iterations, all_workers)

    def open(self, path: str, threads: int | None) -> TrainableGPT2:
        """Open the model that runs this job."""
        return TrainableGPT2.load(path, threads=threads, all_workers=self.all_workers)

    def run(self, model: TrainableGPT2 | SerialTrainableGPT2, *, digest: bool = True) -> tuple[list[Call], str]:
        """Run the job once; return its calls and a digest of all losses, all norms and the final weights.

        Raises NumericalError if a gradient norm is not finite."""
        with open_floats(self.path) as opened:
            model.take(opened)
        for array in (model.gradients, model.first_moments, model.second_moments):
            array.fill(0)
        bits = hashlib.blake2b(digest_size=16)
        calls = []
        for step in range(1, self.iterations + 1):
            update = partial(model.update, lr=1e-4, step=step)
            forward = partial(model.forward, self.inputs, self.targets)
            (losses, _, norm, _), (begin, *stages) = marks(clock, forward, model.backward, model.gradient_norm, update)
            calls.append(Call("train", 0, losses.size, begin, stages[-1], stages[-1], tuple(stages), len(losses)))
            bits.update(losses.data)
            bits.update(struct.pack("d", norm))
            if not math.isfinite(norm):
                raise NumericalError(f"the gradient norm is {norm} in iteration {step}: run fewer iterations (-n)")
        if digest:
            bits.update(model.parameters.data)
        return calls, bits.hexdigest()

    def warm_up(self, model: TrainableGPT2 | SerialTrainableGPT2) -> None:
        """Touch every page of weights, gradients, moments and activations once."""
        replace(self, iterations=1).run(model, digest=False)

    def events(self, config: Config) -> int:
        """Return the largest number of events of a worker."""
        return (18 * config.L + 12) * self.iterations

    def describe(self) -> dict[str, Any]:
        """Return the fields of the report that describe this job."""
        return {"B": len(self.inputs), "T": len(self.inputs[0]), "iterations": self.iterations}


Job = Generation | Training


def draft_of(model: GPT2 | TrainableGPT2) -> Network | None:
    """Return the network of the draft that a job has made, or None."""
    draft = model.draft(False) if isinstance(model, GPT2) else None
    return None if draft is None else cast("Network", draft.network)


def stored_of(model: GPT2 | TrainableGPT2) -> dict[str, tuple[str, int]]:
    """Return the weight format and the bytes of each tensor as the kernels read them."""
    if isinstance(model, GPT2):
        return model.network.stored
    return {name: (kind, data.nbytes) for name, (kind, data) in model.weights().stored().items()}


class Planted(NamedTuple):
    """A slowdown by the factor `times`, of a phase (None: all phases) on a worker (None: all workers). It tests the report."""

    phase: str | None
    times: float
    worker: int | None


@dataclass
class Recording:
    """All rounds of a job: the calls of the traced rounds, the calls of the untraced rounds, and the digests of both."""

    capacity: int
    dropped: list[int]
    calls: list[Call] = field(default_factory=list)
    untraced: list[Call] = field(default_factory=list)
    digests: dict[str, set[str]] = field(default_factory=lambda: {"profiled": set(), "unprofiled": set()})


def record(model: Any, job: Job, rounds: int, capacity: int | None = None, planted: Sequence[Planted] = ()) -> Recording:
    """Run the job `rounds` times, each time without and with a trace, on a model that job.open() returned."""
    out = Recording(capacity or job.events(model.config), [0] * model.threads)
    trace = Trace(model.threads, out.capacity)
    plant(trace, planted)
    job.warm_up(model)
    for _ in range(rounds):
        calls, digest = job.run(model)
        out.untraced += calls
        out.digests["unprofiled"].add(digest)
        trace.clear()
        recorded = [model, *([draft] if (draft := draft_of(model)) else [])]
        for network in recorded:
            network.record(trace)
        try:
            calls, digest = job.run(model)
        finally:
            for network in recorded:
                network.record(None)
        out.digests["profiled"].add(digest)
        out.calls += assign(calls, [[Event(*event) for event in trace.events(ith)] for ith in range(trace.nth)])
        out.dropped = [before + trace.dropped(ith) for ith, before in enumerate(out.dropped)]
    return out


def plant(trace: Trace, planted: Sequence[Planted]) -> None:
    """Add slowdowns to a trace. Raises InputError for a phase or a worker that does not exist."""
    for phase, times, worker in planted:
        for ith in range(trace.nth) if worker is None else [worker]:
            try:
                trace.stretch(ith, phase, times)
            except InputError:
                raise InputError(f"--stretch: worker {ith} does not exist: workers are 0 to {trace.nth - 1}") from None
            except ValueError:
                raise InputError(f"--stretch: {phase!r} is not a phase: phases are {', '.join(PHASES)}, or all") from None


def assign(calls: list[Call], notes: list[list[Event]]) -> list[Call]:
    """Divide each worker's events into steps, and add the steps to their calls.

    A step begins with a phase of FIRST, and only after all workers have finished the previous step. So events of another worker
    belong to the last step that worker 0 had begun when the events ended. In a step without barriers, another worker may
    finish before worker 0 begins. Then its events belong to the next step of worker 0 that begins with the same phase."""
    mine, *others = (_split(events) for events in notes)
    steps: list[Step] = [[part, *([] for _ in others)] for part in mine]
    for ith, theirs in enumerate(others, 1):
        at = 0
        for part in theirs:
            while at + 1 < len(mine) and mine[at + 1][0].begin <= part[-1].left:
                at += 1
            while at + 1 < len(mine) and mine[at][0].phase != part[0].phase:
                at += 1
            if steps:
                steps[at][ith] = part
    for step in steps:
        call = next((call for call in calls if step[0][0].begin < call.ran), None)
        if call is not None:
            call.steps.append(settle(step))
    return calls


def _split(events: list[Event]) -> list[list[Event]]:
    """Split one worker's events at the beginning of each step."""
    parts: list[list[Event]] = []
    for event in events:
        if event.phase in FIRST or not parts:
            parts.append([])
        parts[-1].append(event)
    return parts


def settle(step: Step) -> Step:
    """Add waits so that all workers of a step begin and end together.

    A worker that wakes up early waits for the other workers. A worker that finishes early waits in the pool."""
    present = [events for events in step if events]
    first, up = min(events[0].begin for events in present), max(events[0].begin for events in present)
    last = max(events[-1].left for events in present)
    settled = []
    for head, *rest in present:
        begun = [head]
        if head.begin > first:
            begun = [Event(WAKE, 0, first, first, head.begin), head]
        elif (asleep := min(up, head.left)) > head.end:  # it finished its first phase before the others began
            waited = Event(WAKE, 0, head.end, head.end, asleep)
            begun = [head._replace(left=head.end), waited, head._replace(begin=asleep, end=asleep)]
        *before, end = begun + rest
        settled.append([*before, end._replace(left=last)])
    found = iter(settled)
    return [next(found) if events else events for events in step]
