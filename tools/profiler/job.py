"""The job that is profiled: a prompt, then tokens one by one; and what the workers noted meanwhile.

A Call is one prefill() or decode() and the choice of the next token, timed from outside; its steps are what happened
inside, worker by worker. All times are nanoseconds of one monotonic clock, the same that the kernels' trace reads.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pygpt import GPT2, InputError, Trace
from pygpt._kernels import PHASES
from pygpt.sampling import sample

WAKE = "wake-up"  # the time in which some workers are up and others are still asleep
MODES = ("prefill", "decode")


def clock() -> int:
    """The kernels' clock."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Event(NamedTuple):
    """One phase on one worker: it computes from begin to end and waits for the others from end to left."""

    phase: str
    layer: int
    begin: int
    end: int
    left: int


Step = list[list[Event]]  # one pass through the network: each worker's events in time order, empty where it took no part


@dataclass
class Call:
    """One prefill or decode from outside: `ran` is when the logits were there, `done` when the next token was chosen."""

    mode: str
    position: int  # tokens in the cache before
    rows: int
    begin: int
    ran: int
    done: int
    steps: list[Step] = field(default_factory=list)


class Job(NamedTuple):
    """What to run: the prompt, how many tokens to decode after it, and how each is chosen."""

    prompt: list[int]
    new: int
    sampler: str = "median"


class Planted(NamedTuple):
    """Slowness planted to see whether the report finds it: `times` as long in a phase (None: all), on a worker (None: all)."""

    phase: str | None
    times: float
    worker: int | None


class Recording:
    """All rounds of a job: calls of the traced ones, calls of the untraced ones, and digests of their logits."""

    def __init__(self, capacity: int, nth: int) -> None:
        self.capacity = capacity
        self.dropped = [0] * nth
        self.calls: list[Call] = []
        self.untraced: list[Call] = []
        self.digests: dict[str, set[str]] = {"profiled": set(), "unprofiled": set()}

    @property
    def same_bits(self) -> bool:
        """Whether every logit of every round had the same bits, traced or not."""
        return len(self.digests["profiled"] | self.digests["unprofiled"]) == 1


def run(model: GPT2, job: Job, *, digest: bool = True) -> tuple[list[Call], str]:
    """Run the job once: its calls, and a digest of the bits of all logits (made between the calls)."""
    cache = model.new_cache(len(job.prompt) + job.new)
    bits = hashlib.blake2b(digest_size=16)
    calls = []
    tokens = job.prompt
    for number in range(job.new + 1):
        position = cache.length
        begin = clock()
        logits = model.decode(cache, tokens[0]) if number else model.prefill(cache, tokens)
        ran = clock()
        token = sample(job.sampler, logits.reshape(1, -1).data, 0)
        calls.append(Call(MODES[number > 0], position, len(tokens), begin, ran, clock()))
        if digest:
            bits.update(logits.data)
        tokens = [token]
    return calls, bits.hexdigest()


def warm_up(model: GPT2, job: Job) -> None:
    """Touch every page of weights and activations once."""
    run(model, job._replace(new=min(job.new, 2)), digest=False)


def record(model: GPT2, job: Job, rounds: int, capacity: int | None = None, planted: Sequence[Planted] = ()) -> Recording:
    """Run the job `rounds` times untraced and traced in turn."""
    out = Recording(capacity or events_of(model, job), model.threads)
    trace = Trace(model.threads, out.capacity)
    plant(trace, planted)
    warm_up(model, job)
    for _ in range(rounds):
        calls, digest = run(model, job)
        out.untraced += calls
        out.digests["unprofiled"].add(digest)
        trace.clear()
        model.record(trace)
        try:
            calls, digest = run(model, job)
        finally:
            model.record(None)
        out.digests["profiled"].add(digest)
        notes = [[Event(*event) for event in trace.events(ith)] for ith in range(trace.nth)]
        out.calls += assign(calls, notes)
        out.dropped = [before + trace.dropped(ith) for ith, before in enumerate(out.dropped)]
    return out


def events_of(model: GPT2, job: Job) -> int:
    """Room for all events that a worker can note: steps of a prompt have 16 rows at the least."""
    return (7 * model.config.L + 3) * (job.new + len(job.prompt) // 16 + 2)


def plant(trace: Trace, planted: Sequence[Planted]) -> None:
    """Plant slowness in a trace; raises InputError for a phase or a worker that is not there."""
    for phase, times, worker in planted:
        for ith in range(trace.nth) if worker is None else [worker]:
            try:
                trace.stretch(ith, phase, times)
            except InputError:
                raise InputError(f"--stretch: no worker {ith}: workers are 0 to {trace.nth - 1}") from None
            except ValueError:
                raise InputError(f"--stretch: no phase {phase!r}: phases are {', '.join(PHASES)}, or all") from None


# ------------------------------------------------------------------------------------------------ from events to steps


def assign(calls: list[Call], notes: list[list[Event]]) -> list[Call]:
    """Give each call its steps. A step begins with the encoder; another worker's events belong to the last step that
    worker 0 had begun when they were left, for no step begins before all workers have finished the one before."""
    parts = [_split(events) for events in notes]
    starts = [part[0].begin for part in parts[0]]
    steps: list[Step] = [[part, *([] for _ in notes[1:])] for part in parts[0]]
    for ith, theirs in enumerate(parts[1:], 1):
        at = 0
        for part in theirs:
            while at + 1 < len(starts) and starts[at + 1] <= part[-1].left:
                at += 1
            if steps:
                steps[at][ith] = part
    rest = iter(steps)
    step = next(rest, None)
    for call in calls:
        while step is not None and step[0][0].begin < call.ran:
            call.steps.append(settle(step))
            step = next(rest, None)
    return calls


def _split(events: list[Event]) -> list[list[Event]]:
    """Cut one worker's events where a step begins."""
    parts: list[list[Event]] = []
    for event in events:
        if event.phase == "encoder" or not parts:
            parts.append([])
        parts[-1].append(event)
    return parts


def settle(step: Step) -> Step:
    """Make the workers of a step begin and end together: who is up first waits for the others to wake up, and who is done
    first waits for the others in the pool."""
    present = [events for events in step if events]
    first, up = min(events[0].begin for events in present), max(events[0].begin for events in present)
    last = max(events[-1].left for events in present)
    return [_settle(events, first, up, last) if events else events for events in step]


def _settle(events: list[Event], first: int, up: int, last: int) -> list[Event]:
    """One worker's part of settle(): the others are all up at `up`, and all done at `last`."""
    head, *rest = events
    begun = [head]
    if head.begin > first:
        begun = [Event(WAKE, 0, first, first, head.begin), head]
    elif (asleep := min(up, head.left)) > head.end:  # its first phase was done, and the others had not begun
        waited = Event(WAKE, 0, head.end, head.end, asleep)
        begun = [head._replace(left=head.end), waited, head._replace(begin=asleep, end=asleep)]
    settled = begun + rest
    settled[-1] = settled[-1]._replace(left=last)
    return settled
