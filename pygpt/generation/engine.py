"""Continuous batching: requests join and leave, and each step of the network serves all live requests.

    engine = Engine(network)
    job = engine.add(request)
    for event in engine.run():              # step after step
        print(event.job is job, event.token)

A step has one row for each decoding sequence, then rows of prompts in order of arrival. Sequences share prefixes: if a cache
has keys and values for the beginning of a new prompt, the engine copies them instead of computing them. Batching and sharing
do not change results, because the logits of a row do not depend on the other rows.

add() and cancel() may be called on any thread, step() on one thread at a time."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator

from ..errors import TYPE_CHECKING, InputError, Uncopied, check_number, check_whole, shown
from .completion import Completion
from .prefix import Memory, PrefixCache, common_prefix
from .request import Request
from .sampling import SEEDS
from .speculate import Draft, Speculation, Speculator

if TYPE_CHECKING:
    from typing import SupportsFloat, SupportsIndex

    from .._kernels import Logits
    from .prefix import AnyNetwork

LIVE = 64  # sequences in one step: more would gain little speed, and each needs memory for keys and values
WORTH_WAITING = 8  # a sequence waits for an earlier prompt that will give it at least this many more tokens than any cache
FEWEST_ROWS = 16  # the least number of prompt rows in a step with decoding sequences
SCORED_ROWS = 128  # the most rows of a step for log-probabilities of prompts: their logits take 26 MB with GPT-2's vocabulary


class Job:
    """A request in an engine. `completions` are its n results, which grow step by step.

    error: the exception that ended the job, or None. cancelled: whether cancel() was called. owner: for the caller's use.
    began: the time.monotonic() of its first step, or None. shared: the number of the prompt's tokens that came from a cache."""

    def __init__(
        self, request: Request, completions: list[Completion], deadline: float | None = None, owner: object = None
    ) -> None:
        self.request, self.completions, self.deadline, self.owner = request, completions, deadline, owner
        self.cancelled = False
        self.error: Exception | None = None
        self.began: float | None = None
        self.shared = 0

    @property
    def done(self) -> bool:
        """Whether all events of the job have come."""
        return self.cancelled or self.error is not None or all(c.finish_reason is not None for c in self.completions)


class Event:
    """A new token of completion number `choice` of a job; or, with token None, the error that ended the job.

    finish_reason: of the completion after this token; None unless this token is its last one. Several events of one completion
    may come from one step. A completion of 0 tokens ends without a token."""

    def __init__(self, job: Job, choice: int, token: int | None, error: Exception | None = None) -> None:
        self.job, self.choice, self.token, self.error = job, choice, token, error
        self.finish_reason = None if error else job.completions[choice].finish_reason


class _Sequence:
    """A waiting or running completion. memory: its cache with the tokens in it; None until it has one."""

    def __init__(self, job: Job, choice: int) -> None:
        self.job, self.choice, self.completion, self.edits = job, choice, job.completions[choice], job.request.edits
        self.memory: Memory | None = None
        self.speculation = Speculation() if self.completion.speculation is not None else None


class _Part:
    """The work of a step for one sequence: append `tokens` to its memory. last: whether they end its window.

    scored: whether each token's logits are needed, for log-probabilities of the prompt. guesses: tokens that may follow."""

    def __init__(self, sequence: _Sequence, memory: Memory, window: list[int]) -> None:
        self.sequence, self.memory, self.window = sequence, memory, window
        self.last, self.scored = True, sequence.completion.unscored
        shared = memory.shared(window)
        if self.scored:
            shared = min(shared, len(sequence.completion.prompt_infos))
        memory.keep(shared)
        self.tokens = window[shared:]
        self.guesses: list[int] = []


class Engine(Uncopied):
    """Complete requests together on one network.

    prefix: keeps idle caches of completed requests for later ones (default: keep none). max_live: the most sequences in a
    step. cache_bytes: the most bytes of keys and values of live and idle sequences together (default: no limit). A sequence
    reserves the most that it can need before it starts, so it never runs out of memory later. target_ms: the approximate time
    of a step, so that long prompts do not delay decoding sequences (default: no limit, which is fastest for prompts). draft:
    returns the network's draft, as Speculator asks for it (default: guesses come only from the text)."""

    def __init__(
        self,
        network: "AnyNetwork",
        *,
        prefix: PrefixCache | None = None,
        max_live: "SupportsIndex" = LIVE,
        cache_bytes: "SupportsIndex | None" = None,
        target_ms: "SupportsFloat | None" = None,
        draft: Callable[[bool], Draft | None] | None = None,
    ) -> None:
        self.network = network
        self.speculator = Speculator(draft or (lambda make: None))
        own = draft(False) if draft is not None else None  # a draft with caches of its own takes more memory
        self._position_bytes = network.position_bytes + (0 if own is None else own.position_bytes)
        self.prefix = PrefixCache(network, 0) if prefix is None else prefix
        self.max_live = check_whole("max_live", max_live, 1, 1 << 20)
        self.cache_bytes = None if cache_bytes is None else check_whole("cache_bytes", cache_bytes, 1, 1 << 62)
        self._clock = None if target_ms is None else _Clock(check_number("target_ms", target_ms, 0, 1e9))
        self._inbox: deque[_Sequence] = deque()  # any thread may fill it
        self._waiting: deque[_Sequence] = deque()
        self._live: list[_Sequence] = []
        self._ended = False  # whether a job was cancelled or has failed since the last _drop_ended()

    # ---------------------------------------------------------------- from any thread

    def add(
        self,
        request: Request,
        *,
        n: "SupportsIndex" = 1,
        seed: int | None = None,
        deadline: float | None = None,
        owner: object = None,
    ) -> Job:
        """Add a request to complete n times; return its job. Completion i uses stream i of one seed.

        seed: replaces the request's. deadline: the time.monotonic() at which the job ends with TimeoutError. owner: is kept as
        Job.owner. Raises InputError for a bad n, or if one sequence can never fit in cache_bytes."""
        n = check_whole("n", n, 1, 1 << 20)
        if not isinstance(request, Request) or request.config != self.network.config:
            raise InputError(f"the request is {shown(request)}: it must be a Request for this model's config")
        if deadline is not None:
            deadline = check_number("deadline", deadline, 0, math.inf)
        needed = self._position_bytes * min(request.total, request.config.maxT)
        if self.cache_bytes is not None and needed > self.cache_bytes:
            limit = f"but the limit is {self.cache_bytes}: use fewer tokens"
            raise InputError(f"the request needs {needed} bytes of keys and values, {limit}")
        seed = request.sampler.start() if seed is None else check_whole("seed", seed, 0, SEEDS - 1)
        job = Job(request, [Completion(request, seed=seed, stream=stream) for stream in range(n)], deadline, owner)
        self._inbox.extend([_Sequence(job, choice) for choice in range(n)])
        return job

    def cancel(self, job: Job) -> None:
        """End a job. Its events end with the step that runs now."""
        job.cancelled = True
        self._ended = True

    # ---------------------------------------------------------------- from one thread

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._inbox or self._waiting or self._live)

    @property
    def load(self) -> tuple[int, int, int]:
        """The number of running sequences, of waiting sequences, and the bytes of keys and values in use or reserved."""
        return len(self._live), len(self._waiting) + len(self._inbox), self._reserved() + self.prefix.nbytes

    def run(self) -> Iterator[Event]:
        """Step until all jobs are done; yield their events."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Event]:
        """Run the network once for all live jobs; return the events, an empty list if the engine is not busy.

        If it raises (Ctrl-C, out of memory), tokens are not lost: the next step does the same work again."""
        self._receive()
        late = self._expire()
        self._drop_ended()
        self._admit()
        plan = self._plan()
        looked = all(part.last and len(part.tokens) == 1 for part in plan) and self._guess(plan)
        if self._ended:  # cancelled meanwhile
            plan = [part for part in plan if not _has_ended(part.sequence)]
        if not plan:
            self._drop_ended()
            return late
        rows = []
        for part in plan:
            rows += [(token, part.memory.cache, part.scored) for token in part.tokens[:-1]]
            rows.append((part.tokens[-1], part.memory.cache, part.scored or part.last))
            rows += [(token, part.memory.cache, True) for token in part.guesses]
        began = time.perf_counter()
        watch = None
        if edited := {part.memory.cache: part.sequence.edits for part in plan if part.sequence.edits is not None}:
            from ..activations import Watch

            watch = Watch(edited)
        try:
            logits = self.network.step(rows) if watch is None else self.network.step(rows, watch=watch)
        except Exception as error:  # an error of an edit ends only its job
            if watch is None or watch.editing is None:
                raise
            self._ended = True
            jobs = dict.fromkeys(part.sequence.job for part in plan if part.sequence.edits is watch.editing)
            return late + [_failed(job, error) for job in jobs]
        seconds = time.perf_counter() - began
        singles = sum(len(part.tokens) == 1 for part in plan)
        if self._clock is not None and 0 < singles < len(plan):
            self._clock.note(len(rows) - singles, seconds)
        for part in plan:
            part.memory.note(part.tokens)
        events = self._choose(plan, logits)
        if looked:
            self.speculator.note(len(plan), len(rows) - len(plan), time.perf_counter() - began)
        self._drop_ended()
        return late + events

    def fail(self, error: Exception) -> list[Event]:
        """End all jobs with an error; return the events. A caller does this if step() fails each time."""
        self._receive()
        events = [_failed(s.job, error) for s in (*self._waiting, *self._live) if not s.job.done]
        self._ended = True
        self._drop_ended()
        return events

    def close(self) -> None:
        """Cancel all jobs, and give their caches to the prefix cache."""
        self._receive()
        for sequence in (*self._waiting, *self._live):
            self.cancel(sequence.job)
        self._drop_ended()

    # ---------------------------------------------------------------- the parts of a step

    def _receive(self) -> None:
        """Move the sequences that other threads have added to the waiting ones."""
        while self._inbox:
            self._waiting.append(self._inbox.popleft())

    def _expire(self) -> list[Event]:
        """End the jobs whose deadline has passed; return their events."""
        now, events = time.monotonic(), []
        for sequence in (*self._waiting, *self._live):
            job = sequence.job
            if job.deadline is not None and now > job.deadline and not job.done:
                events.append(_failed(job, TimeoutError("the time limit of the request has passed")))
                self._ended = True
        return events

    def _drop_ended(self) -> None:
        """Remove sequences whose completion or job has ended, and give their caches to the prefix cache."""
        if self._ended:
            self._ended = False
            self._waiting = deque(sequence for sequence in self._waiting if not _has_ended(sequence))
        for sequence in [sequence for sequence in self._live if _has_ended(sequence)]:
            self._live.remove(sequence)
            if sequence.memory is not None and sequence.edits is None:
                self.prefix.give(sequence.memory)
        self._make_room()

    def _make_room(self) -> None:
        """Drop idle caches until the rest, and the reservations of live sequences, fit in cache_bytes."""
        if self.cache_bytes is not None:
            self.prefix.shrink(self.cache_bytes - self._reserved())

    def _admit(self) -> None:
        """Start waiting sequences in order of arrival, as long as their reservations fit in cache_bytes."""
        while self._waiting and len(self._live) < self.max_live:
            needed = self._position_bytes * self._waiting[0].completion.longest
            if self.cache_bytes is not None and self._reserved() + needed > self.cache_bytes:
                return
            self._live.append(self._waiting.popleft())
            job = self._live[-1].job
            job.began = job.began or time.monotonic()

    def _plan(self) -> list[_Part]:
        """Return the work of the next step: decoding sequences, then prompts as long as the step has room for rows."""
        windows = [sequence.completion.window() for sequence in self._live]
        for i, sequence in enumerate(self._live):
            if sequence.memory is None:
                self._begin(sequence, windows[i], list(zip(self._live[:i], windows, strict=False)))
        self._make_room()
        decoding: list[_Part] = []
        prompts: list[_Part] = []
        for sequence, window in zip(self._live, windows, strict=True):
            if sequence.memory is not None:
                part = _Part(sequence, sequence.memory, window)
                (decoding if len(part.tokens) == 1 else prompts).append(part)
        scores = SCORED_ROWS
        left = self._clock.rows(self.network.chunk) if self._clock is not None and decoding else self.network.chunk
        plan = decoding
        for part in prompts:
            if room := min(left, scores) if part.scored else left:
                part.last = len(part.tokens) <= room
                part.tokens = part.tokens[:room]
                plan.append(part)
                left -= len(part.tokens)
                scores -= len(part.tokens) if part.scored else 0
        return plan

    def _guess(self, plan: list[_Part]) -> bool:
        """Guess the next tokens of the decoding sequences that ask for it and do not rest. Return whether there are any."""
        states = [(part, state) for part in plan if (state := part.sequence.speculation) is not None]
        asking = [(part, state) for part, state in states if len(part.sequence.completion.sequence) >= state.rest]
        if asking:
            wanted = [(part.sequence.completion, part.memory, state) for part, state in asking]
            found = self.speculator.guess(wanted, len(plan), lambda: self._ended)
            for (part, _), guesses in zip(asking, found, strict=True):
                part.guesses = guesses
        return bool(asking)

    def _begin(self, sequence: _Sequence, window: list[int], earlier: list[tuple[_Sequence, list[int]]]) -> None:
        """Give a sequence a cache with the longest prefix of its window that any cache has.

        If an earlier sequence will soon compute a longer prefix, the sequence does not get a cache yet, and waits."""
        if sequence.completion.unscored:  # a copied prefix would come without logits
            sequence.memory = Memory(self.network.new_cache(self._capacity(sequence)))
            return
        live, held, coming = None, 0, 0
        for other, its_window in earlier:
            if other.memory is not None and other.edits is sequence.edits:  # others change keys and values
                if its_window == window:
                    return
                if (shared := other.memory.shared(window)) > held:
                    live, held = other.memory, shared
                coming = max(coming, common_prefix(its_window, window, len(window) - 1))
        idle, kept = self.prefix.best(window) if sequence.edits is None else (None, 0)
        if coming - max(held, kept) >= WORTH_WAITING:
            return
        if idle is not None and kept >= held and self.prefix.take(idle):  # another thread may take it first
            if self._may_take(idle, kept, sequence.completion.longest):
                idle.keep(kept)
                sequence.memory = idle
            else:
                sequence.memory = idle.copy(kept, self._capacity(sequence))
                self.prefix.give(idle)
        elif live is not None:
            sequence.memory = live.copy(held, self._capacity(sequence))
        else:
            sequence.memory = Memory(self.network.new_cache(self._capacity(sequence)))
        if not sequence.choice and not sequence.completion.tokens:
            sequence.job.shared = max(held, kept) if sequence.memory.tokens else 0

    def _may_take(self, donor: Memory, shared: int, longest: int) -> bool:
        """Whether to take an idle memory instead of a copy: most of it is shared, or cache_bytes has no room for a copy."""
        full = False
        if self.cache_bytes is not None:
            extra = self._position_bytes * max(donor.positions - longest, 0)  # beyond what the sequence has reserved
            if self._reserved() + extra > self.cache_bytes:
                return False
            full = self._reserved() + self.prefix.nbytes > self.cache_bytes
        return donor.cache.capacity >= longest and (full or 2 * shared >= len(donor.tokens))

    def _capacity(self, sequence: _Sequence) -> int:
        """Return the capacity of a new cache: the whole context if later requests may reuse it, else the sequence's need."""
        return self.network.config.maxT if self.prefix.max_bytes else sequence.completion.longest

    def _choose(self, plan: list[_Part], logits: "Logits") -> list[Event]:
        """Let completions choose their next tokens. Sequences that wait for the same window choose from the same logits."""
        events: list[Event] = []
        takers: list[tuple[_Sequence, int, _Part | None]] = []
        row = 0
        waiting = [s for s in self._live if s.memory is None and not s.job.completions[0].unscored]
        for part in plan:
            if part.scored:
                events += self._score(part, logits, row)
                row += len(part.tokens) - 1
            if not part.last:
                row += part.scored
                continue
            takers.append((part.sequence, row, part))
            for twin in waiting:
                same = twin.memory is None and twin.edits is part.sequence.edits
                if same and twin.completion.window() == part.window:
                    twin.memory = part.memory.copy(len(part.window), self._capacity(twin))
                    takers.append((twin, row, None))
            row += 1 + len(part.guesses)
        chosen: dict[int, list[Event]] = {}

        def take(i: int) -> None:
            sequence, row, part = takers[i]
            chosen[i] = [self._take(sequence, logits, row)]
            if part is not None and part.guesses:
                chosen[i] += self._check(part, logits, row, chosen[i][0])

        controls = [sequence.job.request.control for sequence, _, _ in takers]
        if any(control is not None and control.calls_out for control in controls):
            for i in range(len(takers)):
                take(i)
        else:
            self.network.each(take, len(takers))
        for i, (sequence, _, guessing) in enumerate(takers):
            if guessing is not None and guessing.guesses:
                assert sequence.speculation is not None
                right, last = len(chosen[i]) - 1, chosen[i][-1].token
                self.speculator.check(sequence.completion, sequence.speculation, guessing.guesses, right, last)
        return events + [event for i in range(len(takers)) for event in chosen[i]]

    def _score(self, part: _Part, logits: "Logits", row: int) -> list[Event]:
        """Note log-probabilities of a prompt's tokens, from rows `row` and up. An error ends only its job."""
        completion = part.sequence.completion
        try:
            for i in range(len(part.tokens)):
                if completion.unscored:
                    completion.score(logits, row + i)
        except Exception as error:
            self._ended, part.last = True, False
            return [_failed(part.sequence.job, error)]
        return []

    def _check(self, part: _Part, logits: "Logits", row: int, event: Event) -> list[Event]:
        """Choose from the rows of a part's guesses as long as the guesses are right. event: of the row before them, `row`."""
        events, right = [event], 0
        while right < len(part.guesses) and event.token == part.guesses[right] and not _has_ended(part.sequence):
            part.memory.note([part.guesses[right]])
            right += 1
            events.append(event := self._take(part.sequence, logits, row + right))
        part.memory.cache.truncate(len(part.memory.tokens))
        return events[1:]

    def _take(self, sequence: _Sequence, logits: "Logits", row: int) -> Event:
        """Let one completion choose its next token. An error ends only its job."""
        try:
            if sequence.completion.new:
                return Event(sequence.job, sequence.choice, sequence.completion.take(logits, row))
            sequence.completion.finish_reason = "length"  # of 0 tokens: only the prompt was scored
            return Event(sequence.job, sequence.choice, None)
        except Exception as error:
            self._ended = True
            return _failed(sequence.job, error, sequence.choice)

    def _reserved(self) -> int:
        """Return the most bytes that the live sequences can need."""
        used = (0 if sequence.memory is None else sequence.memory.positions for sequence in self._live)
        return self._position_bytes * sum(max(s.completion.longest, n) for s, n in zip(self._live, used, strict=True))


def _has_ended(sequence: _Sequence) -> bool:
    """Return whether a sequence has ended. Also set the finish_reason of a cancelled completion."""
    job, completion = sequence.job, sequence.completion
    if job.cancelled and completion.finish_reason is None:
        completion.finish_reason = "cancelled"
    return completion.finish_reason is not None or job.error is not None


def _failed(job: Job, error: Exception, choice: int = 0) -> Event:
    """End a job with an error; return the event."""
    job.error = error
    return Event(job, choice, None, error)


class _Clock:
    """Choose how many prompt rows run together with decoding sequences, so that a step takes about `target_ms`.

    The number follows the times of the steps themselves. So it needs no model of the machine, whose speed other programs
    change, and where the first rows beside a decode step cost much less than later ones."""

    def __init__(self, target_ms: float) -> None:
        self._target_s = target_ms / 1000
        self._rows = float(FEWEST_ROWS)

    def note(self, rows: int, seconds: float) -> None:
        """Note the time of a step with decoding sequences and so many prompt rows."""
        change = min(max(self._target_s / seconds, 0.5), 1.5)
        if change < 1 or rows >= int(self._rows):  # a step with fewer rows says nothing about so many
            self._rows = max(self._rows * change, FEWEST_ROWS)

    def rows(self, most: int) -> int:
        """Return how many prompt rows to run in the next step, at most `most`."""
        return min(int(self._rows), most)
