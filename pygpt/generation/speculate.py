"""Speculative decoding: guess the next tokens cheaply, then check all guesses in one step of the network.

A step of k + 1 rows takes little longer than a step of one row, because both read all weights once. Each row of that step has
the bits that plain decoding gives it. So the completion chooses from each row as it always does: while its choice equals the
guess, the next row is valid, too. The first row whose choice differs still gives the right token. The tokens are therefore
those of plain decoding for every sampler, and the guesses only decide how many tokens a step gives.

Guesses come from the text so far, if its last tokens occurred before (prompt lookup), else from a draft: the same model with
quantised weights, or another model. A draft of the same dimensions appends to the model's own caches. These rows are removed
before the checked rows replace them.

Sources: Leviathan et al. 2023 and Chen et al. 2023 (speculative decoding); Saxena 2023 (prompt lookup)."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from .completion import Completion
from .prefix import Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .prefix import AnyNetwork

MOST = 12  # guesses in one step: more are rarely all right
NGRAM = 3  # equal tokens that a lookup needs
WORTH = 1.1  # the least predicted gain
GUESS, ROW = 0.3, 0.06  # times of a guess and of one more row, in plain steps, until they are measured
PATIENCE = 64  # tokens, at least, before a draft that does not seem to pay guesses again
LOOK_S = 5e-6  # of one sequence in a step, to look for guesses
LOOKS = 0.1  # plain steps: when looks in vain have taken so long, the sequence rests
IN_VAIN = 0.005  # the share of time for looks and guesses of a sequence that do not pay: it rests in between
QUICK_S = 0.0005  # a plain step that is shorter reads its weights from a cache: weights are not quantised for it
SOON = 48  # the fewest tokens still to come for which weights are quantised
FEW = 4  # sequences: with more, guesses gain little, and then lose it, because some sequences end much earlier than others
ROWS = 16  # of a step with guesses: more rows make a step bound by arithmetic
FIXED_ROWS = 128  # the same for a fixed number of guesses: their logits take 26 MB with GPT-2's vocabulary
SURE = 1.5  # a predicted gain that needs no fresh times
FRESH = 16  # steps: for a smaller gain, the next step is plain after so many with guesses, to measure its time again
RECENT = 0.06  # the weight of the latest guess in a share of accepted guesses


class Share:
    """A running mean of right guesses. It begins as if two guesses had been compared."""

    __slots__ = ("count", "mean")

    def __init__(self, mean: float) -> None:
        self.mean, self.count = mean, 2

    def note(self, guesses: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare guesses with the tokens that came, up to the first wrong guess: later guesses could not be right."""
        for guess, token in zip(guesses, tokens, strict=False):
            self.count += 1
            self.mean += max(RECENT, 1 / self.count) * ((guess == token) - self.mean)
            if guess != token:
                break

    def best(self, most: int, guess: float) -> tuple[float, int]:
        """Return the highest speed, and its number of guesses, from 1 to `most`; (0, 0) without any.

        The speed is the expected tokens of a step, divided by its time. Times are in plain steps. guess: the time of one guess
        and of its row. The speed rises to one maximum, so the search ends where it falls."""
        best, count, tokens, power, time = 0.0, 0, 1.0, 1.0, 1.0
        while count < most:
            power *= self.mean
            tokens += power
            time += guess
            if (speed := tokens / time) <= best:
                break
            best, count = speed, count + 1
        return best, count


class Speculation:
    """What one sequence remembers: where its n-grams end, how often guesses were right, and when to try again. drafts, lookups:
    the shares of right guesses. A lookup's guesses are noted even if they were not used. drafted: whether the guesses of this
    step come from the draft. rest: steps are plain until the sequence has this length. due: the length at which a draft that
    does not seem to pay guesses again, or 0. vain: seconds of looks since the latest rest, less what right guesses saved."""

    __slots__ = ("_ends", "_guessed", "_known", "drafted", "drafts", "due", "lookups", "rest", "vain")

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._guessed: list[int] = []  # what look_up() returned for the tokens from `_known` on
        self.drafts, self.lookups, self.drafted = Share(0.8), Share(0.6), False
        self.rest, self.due, self.vain = 0, 0, 0.0

    def look_up(self, sequence: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that followed the latest earlier occurrence of the last NGRAM tokens."""
        if self._guessed:
            self.lookups.note(self._guessed, sequence[self._known :])
        for end in range(max(self._known, NGRAM), len(sequence)):  # not yet the last n-gram
            self._ends[tuple(sequence[end - NGRAM : end])] = end
        self._known = len(sequence)
        found: list[int] = []
        if (end := self._ends.get(tuple(sequence[-NGRAM:]), 0)) > 0:
            for place in range(end, end + most):  # the text goes on by repeating itself
                found.append(sequence[place] if place < len(sequence) else found[place - len(sequence)])
        self._guessed = found
        return found


class Draft:
    """A network that guesses for a target. shared: it extends the target's caches. position_bytes: of its own caches."""

    def __init__(self, network: "AnyNetwork", *, shared: bool) -> None:
        self.network, self.shared = network, shared
        self.position_bytes = 0 if shared else network.position_bytes
        self.seconds: float | None = None  # of one guess for each sequence of a step, a running mean

    def guess(self, wanted: list[tuple[Completion, Memory, int]], over: Callable[[], bool] = bool) -> list[list[int]]:
        """Return for each (completion, memory, count) its guesses, at most `count`, fewer if over() returns True meanwhile. The
        memories do not change. Each memory lacks only the completion's last token."""
        found: list[list[int]] = [[] for _ in wanted]
        if not self.shared:  # its context may be shorter
            maxT = self.network.config.maxT
            wanted = [(completion, memory, min(count, maxT - len(memory.tokens))) for completion, memory, count in wanted]
        if (rounds := max(count for *_, count in wanted)) < 1:
            return found
        memories = [memory if self.shared or count < 1 else self._own(memory, over) for _, memory, count in wanted]
        began, number = time.perf_counter(), 0
        try:
            while number < rounds:
                active = [i for i, (*_, count) in enumerate(wanted) if len(found[i]) == number < count]
                if not active or over():
                    break
                logits = self.network.step([((found[i] or wanted[i][0].sequence)[-1], memories[i].cache, True) for i in active])
                for row, i in enumerate(active):
                    with suppress(Exception):  # logits may be NaN, and a user's function may fail on them: the check decides
                        found[i].append(wanted[i][0].choose(logits, row, found[i]))
                number += 1
        finally:
            for memory in memories:
                memory.note([])  # the rows of guesses take memory, too
                memory.cache.truncate(len(memory.tokens))
        if number:
            self.seconds = mean(self.seconds, (time.perf_counter() - began) / number)
        return found

    def _own(self, memory: Memory, over: Callable[[], bool]) -> Memory:
        """Return the draft's own memory of a sequence, with all tokens of the target's memory in it, unless over() is True."""
        if memory.draft is None:
            memory.draft = Memory(self.network.new_cache(min(memory.cache.capacity, self.network.config.maxT)))
        own, tokens = memory.draft, memory.tokens
        shared = own.shared([*tokens, -1])
        own.keep(shared)
        for start in range(shared, len(tokens), self.network.chunk):
            if over():
                break
            chunk = tokens[start : start + self.network.chunk]
            self.network.step([(token, own.cache, False) for token in chunk])
            own.note(chunk)
        return own


class Speculator:
    """Guess tokens for an engine's decoding sequences, as many as pay. drafted, accepted: checked and right guesses."""

    def __init__(self, draft: Callable[[bool], Draft | None]) -> None:
        """draft(make) returns the draft, or None if there is none. It makes a missing draft only if `make` is True."""
        self._draft = draft
        self._plains: dict[int, float] = {}  # for numbers of sequences, seconds of a step with one row for each
        self._row: float | None = None  # seconds of one more row
        self._age = 0  # steps with guesses since the latest plain one
        self._gain = 0.0  # the highest predicted one of the sequences of a step
        self._may_make = True  # until the draft that is wanted cannot be made
        self.drafted = self.accepted = 0

    def guess(
        self, parts: list[tuple[Completion, Memory, Speculation]], sequences: int, over: Callable[[], bool] = bool
    ) -> list[list[int]]:
        """Return the guesses for some of the `sequences` of the next step, all of which decode. over: ends the guessing."""
        found: list[list[int]] = [[] for _ in parts]
        limit = min(MOST, ROWS // sequences - 1) if sequences <= FEW else 0
        plain = self._plains.get(sequences)
        self._gain = 0.0
        wanted: list[tuple[int, int]] = []
        for i, (completion, memory, state) in enumerate(parts):
            fixed = completion.speculation or 0
            most = min(fixed, FIXED_ROWS // sequences - 1) if fixed else limit
            room = min(completion.guesses, memory.cache.capacity - memory.cache.length - 1, most)
            if room < 1:
                continue
            state.vain += LOOK_S
            if not fixed and plain is not None and state.vain > LOOKS * plain / sequences:
                state.rest, state.vain = len(completion.sequence) + int(LOOKS / IN_VAIN), 0.0
            looked, state.drafted = state.look_up(completion.sequence, room), False
            count = self._count(completion, state, room, looked, sequences)
            if count < 0:
                found[i] = looked[:-count]
            elif count:
                wanted.append((i, count))
        if self._age >= FRESH and 0 < self._gain < SURE:
            return [[] for _ in parts]
        if wanted:
            self._may_make = (draft := self._draft(True)) is not None
            asked = [(*parts[i][:2], count) for i, count in wanted]
            guesses = [[]] * len(wanted) if draft is None else draft.guess(asked, over)
            for (i, _), tokens in zip(wanted, guesses, strict=True):
                found[i], parts[i][2].drafted = tokens, True
        return found

    def _count(self, completion: Completion, state: Speculation, room: int, looked: list[int], sequences: int) -> int:
        """Return how many tokens the draft should guess; -n means to take n tokens of the lookup. All times are in plain
        steps of one of the sequences. Until a guess, or a row of a guess, is timed, there is only one."""
        fixed, draft = completion.speculation, self._draft(False)
        if sequences not in self._plains and not fixed:
            self._gain = max(self._gain, 1.0)  # beside a fixed number, only a plain step on purpose gives its time
            return 0
        plain = self._plains.get(sequences, 1.0)
        row = ROW if self._row is None else self._row * sequences / plain
        guess = GUESS if draft is None or draft.seconds is None else draft.seconds / plain
        by_lookup, looks = state.lookups.best(len(looked) if fixed or self._row is not None else min(len(looked), 1), row)
        may_make = self._may_make and (fixed or (completion.guesses >= SOON and plain >= QUICK_S))
        most = room if fixed or (draft is not None and draft.seconds is not None) else min(room, 1)
        by_draft, drafts = state.drafts.best(most, row + guess) if draft is not None or may_make else (0.0, 0)
        if fixed:
            return -len(looked) if looked and by_lookup >= by_draft else room
        if (gain := max(by_lookup, by_draft)) >= WORTH:
            self._gain = max(self._gain, gain)
            return -looks if by_lookup >= by_draft else drafts
        length, due = len(completion.sequence), state.due
        if not drafts or length < due:
            return 0
        state.due = length + PATIENCE + int((row + guess) / IN_VAIN)
        return min(due, 1)

    def note(self, sequences: int, guesses: int, seconds: float) -> None:
        """Note the time of a step with one row for each sequence and so many rows of guesses, choices included."""
        self._age = self._age + 1 if guesses else 0
        plain = self._plains.get(sequences)
        stale = plain is not None and seconds < 0.8 * plain  # such as a first step, which reads the model from the disk
        if stale or not guesses:
            self._plains[sequences] = mean(None if stale else plain, seconds, 0.3)
        elif plain is not None:
            self._row = mean(self._row, max(seconds - plain, 0.0) / guesses, 0.2)

    def check(self, completion: Completion, state: Speculation, guesses: list[int], right: int, token: int | None) -> None:
        """Note that of these guesses the first `right` were right; the token after them was `token`."""
        for counts in (self, completion):
            counts.drafted += len(guesses)
            counts.accepted += right
        if state.drafted:
            state.drafts.note(guesses, [*guesses[:right], -1 if token is None else token])
        if right:
            state.vain = -right * self._plains.get(1, 0.0)


def mean(before: float | None, now: float, weight: float = 0.1) -> float:
    """Return the running mean of times: the latest one has this weight."""
    return now if before is None else before + weight * (now - before)
