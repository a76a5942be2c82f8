"""Everything at once in one process, every result compared with its known bits.

Threads generate on shared and separate models, alone and in batches, with and without prefix caches. They also cancel, open and
close models, resize caches, evaluate, train, save and resume. The main thread completes and trains, and is interrupted all the
time. Meanwhile memory, descriptors and threads stay constant."""

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budget import Budget
from jobs import Jobs
from known import OPTIONS, PROMPTS, SHAPE, STEPS, TOKENS, Known, state_of
from programs import patience

from pygpt import GPT2, Checkpoint, ClosedError, InputError, SerialGPT2, Tokenizer, TrainableGPT2
from pygpt.commands.console import made_of_ctrl_c

THREADS = 6
TEXT = "Ladies and gentlemen, \u00fcnd \U0001f600 so on.\n\n" * 9
MAPS = 17  # descriptors of an open model: its file, and the map of each tensor
RESIDENT_SLACK = 32 << 20  # bytes: the tolerance for the allocator's arenas


class Interrupted(Exception):
    """The exception of the main thread's timer."""


class Load(Jobs):
    """Jobs on models that all threads share."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known
        loaded = zip(known.files.items(), (1, 2, 3), strict=True)
        self.shared = {version: GPT2.load(file, threads=threads) for (version, file), threads in loaded}
        self.prefixes = {version: model.new_prefix_cache() for version, model in self.shared.items()}
        self.learner = TrainableGPT2.load(known.files[3], threads=2)  # evaluates in all threads; the main one trains another
        self.learned = known.losses_of(self.learner)
        self.trainee = TrainableGPT2.load(known.files[3], threads=3)
        self.trainer = known.trainer(self.trainee)
        self.start = str(known.place / "start.state")
        self.trainer.save(self.start)
        self.tokenizer = Tokenizer()
        self.text_ids = self.tokenizer.encode(TEXT)
        self.jobs = [
            self.generate, self.cancel, self.with_prefix, self.batch, self.own_model, self.grow, self.train, self.evaluate,
            self.resume, self.serial, self.read, self.misuse, self.text,
        ]  # fmt: skip

    def refused(self, error: type[Exception], words: str, call: Callable[[], object]) -> None:
        """Check that a call raises this error, and that its message has these words."""
        try:
            call()
        except error as found:
            self.check(words in str(found), found)
        else:
            self.check(False, "not refused", words)

    def pick(self, rng: random.Random) -> tuple[int, int, int, list[int]]:
        """A version, a prompt and options, and the answer."""
        version, p, o = rng.choice(list(self.shared)), rng.randrange(len(PROMPTS)), rng.randrange(len(OPTIONS))
        return version, p, o, self.known.answers[version][p, o]

    def generate(self, rng: random.Random) -> None:
        version, p, o, wanted = self.pick(rng)
        self.check(list(self.shared[version].generate(PROMPTS[p], **OPTIONS[o])) == wanted, version, p, o)

    def cancel(self, rng: random.Random) -> None:
        version, p, o, wanted = self.pick(rng)
        iterator: Any = self.shared[version].generate(PROMPTS[p], **OPTIONS[o])
        count = rng.randrange(4)
        ids = [next(iterator) for _ in range(count)]
        iterator.close()
        self.check(ids == wanted[:count] and list(iterator) == [], version, p, o, ids)

    def with_prefix(self, rng: random.Random) -> None:
        """It continues from the cache of another thread's completion."""
        version, p, o, wanted = self.pick(rng)
        ids = list(self.shared[version].generate(PROMPTS[p], cache=self.prefixes[version], **OPTIONS[o]))
        self.check(ids == wanted, version, p, o, ids)

    def batch(self, rng: random.Random) -> None:
        version, _, o, _ = self.pick(rng)
        chosen = [rng.randrange(len(PROMPTS)) for _ in range(rng.randrange(1, 6))]
        found = self.shared[version].generate_batch([PROMPTS[p] for p in chosen], **OPTIONS[o])
        wanted = [self.known.answers[version][p, o] for p in chosen]
        self.check([completion.tokens for completion in found] == wanted, version, chosen, o)

    def own_model(self, rng: random.Random) -> None:
        version, p, o, wanted = self.pick(rng)
        with GPT2.load(self.known.files[version], threads=rng.randrange(1, 5), mmap=rng.random() < 0.5) as model:
            self.check(list(model.generate(PROMPTS[p], **OPTIONS[o])) == wanted, version, p, o)
        with GPT2.load(self.known.other, threads=2) as model:
            self.check(list(model.generate([1, 2, 3], total=40)) == self.known.other_ids)

    def grow(self, rng: random.Random) -> None:
        """A cache grows by pieces and shrinks again."""
        version = rng.choice(list(self.shared))
        model, wanted = self.shared[version], self.known.logits[version]
        cache = model.new_cache()
        for _ in range(6):
            start, room = cache.length, len(TOKENS) - cache.length
            if not room or rng.random() < 0.3:
                cache.truncate(rng.randrange(start + 1))
                continue
            stop = start + min(room, rng.choice((1, 1, 3, 20, 60)))
            if rng.random() < 0.5:
                self.check(np.array_equal(model.prefill(cache, TOKENS[start:stop]), wanted[stop - 1]), version, start, stop)
            else:
                found = model.step([(token, cache, True) for token in TOKENS[start:stop]])
                self.check(np.array_equal(found, wanted[start:stop]), version, start, stop)

    def train(self, rng: random.Random) -> None:
        self.check(self.known.train(rng.randrange(1, 4)) == (self.known.trained, self.known.losses))

    def evaluate(self, rng: random.Random) -> None:
        """An engine that all threads share."""
        self.check(self.known.losses_of(self.learner) == self.learned)

    def resume(self, rng: random.Random) -> None:
        """A run is saved after some steps and goes on in another object."""
        path, stop = self.known.place / f"{threading.get_ident()}.state", rng.randrange(STEPS)
        for end in (stop, STEPS):
            with TrainableGPT2.load(self.known.files[3], threads=rng.randrange(1, 4)) as engine:
                trainer = self.known.trainer(engine)
                if end == STEPS:
                    trainer.restore(path)
                while trainer.done < end:
                    trainer.step()
                self.check(state_of(trainer) == self.known.states[end], stop, end)
                trainer.save(path)

    def serial(self, rng: random.Random) -> None:
        with SerialGPT2.load(self.known.files[3], mmap=rng.random() < 0.5) as model:
            self.check(np.allclose(model.logits(TOKENS[:6]), self.known.logits[3][:6], rtol=1e-3, atol=1e-3))

    def read(self, rng: random.Random) -> None:
        """A file's tensors outlive it; a loader's batches are the same."""
        with Checkpoint(self.known.files[rng.choice((1, 3))], mmap=rng.random() < 0.5) as checkpoint:
            gains = checkpoint.tensor("lnfw")
        self.check(bool((gains == 9).all()))
        pairs = zip(self.known.some_batches(), self.known.batches, strict=True)
        self.check(all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True)))

    def misuse(self, rng: random.Random) -> None:
        """Refused calls are always refused, and leave no trace."""
        version = rng.choice(list(self.shared))
        model = self.shared[version]
        self.refused(InputError, "is not a token id", lambda: list(model.generate([SHAPE.V])))
        cache = model.new_cache(3)
        self.refused(InputError, "room for 3", lambda: model.prefill(cache, TOKENS[:4]))
        self.refused(InputError, "full", lambda: model.step([(1, cache, False)] * 4))
        self.check(cache.length == 0)
        own = GPT2.load(self.known.files[version], threads=2)
        iterator = own.generate([1, 2], total=9)
        next(iterator)
        own.close()
        self.refused(ClosedError, "closed", lambda: next(iterator))

    def text(self, rng: random.Random) -> None:
        ids = self.tokenizer.encode(TEXT)
        self.check(ids == self.text_ids and self.tokenizer.decode(ids) == TEXT)

    def interrupted(self, rng: random.Random, alarm: "Alarm") -> None:
        """In the main thread: a completion and steps that a signal ends at any moment."""
        version, p, o, wanted = self.pick(rng)
        ids: list[int] = []
        cache = self.shared[version].new_cache()
        done = before = 0
        try:
            with alarm.after(rng.random() * 0.01):
                for token in self.shared[version].generate(PROMPTS[p], cache=self.prefixes[version], **OPTIONS[o]):
                    ids.append(token)
                while cache.length < len(TOKENS):
                    before = cache.length
                    self.shared[version].step([(TOKENS[before], cache, True)])
                    done = before + 1
        except Interrupted as error:
            pass_on_ctrl_c(error)
        self.check(ids == wanted[: len(ids)], version, p, o, ids)
        self.check(cache.length in (before, done, before + 1), cache.length, before, done)

    def interrupted_training(self, rng: random.Random, alarm: "Alarm") -> None:
        """In the main thread: steps of training that a signal ends at any moment, each made wholly or not at all."""
        if self.trainer.done == STEPS:
            self.trainer.restore(self.start)
        try:
            with alarm.after(rng.random() * 0.02):
                while self.trainer.done < STEPS:
                    self.trainer.step()
        except Interrupted as error:
            pass_on_ctrl_c(error)
        self.check(state_of(self.trainer) == self.known.states[self.trainer.done], self.trainer.done)

    def close(self) -> None:
        shared: list[GPT2 | TrainableGPT2] = [*self.shared.values(), self.learner, self.trainee]
        for model in shared:
            model.close()


def pass_on_ctrl_c(error: Interrupted) -> None:
    """Raise KeyboardInterrupt if the alarm's exception took the place of one that was on its way here."""
    if made_of_ctrl_c(error):
        raise KeyboardInterrupt from error


class Alarm:
    """Interrupts the main thread. There is one for a whole run: a handler that is taken away while its signal is on the way
    would miss it."""

    def __init__(self) -> None:
        self.armed = False

    def ring(self, *_: object) -> None:
        """The signal's handler."""
        if self.armed:
            self.armed = False
            raise Interrupted

    @contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        """Raise Interrupted after so long, if the block has not ended."""
        self.armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)


def measured() -> tuple[int, int, int]:
    """Resident bytes, open descriptors and threads of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count()


def leaks(samples: list[tuple[int, int, int]]) -> list[str]:
    """Return the resources that the second half of a run uses more than the first half. The beginning does not count."""
    middle, begin = len(samples) // 2, len(samples) // 10
    found = []
    for which, (what, slack) in enumerate((("resident", RESIDENT_SLACK), ("descriptors", MAPS * THREADS), ("threads", 16))):
        first, second = (max((one[which] for one in part), default=0) for part in (samples[begin:middle], samples[middle:]))
        if middle - begin >= 2 and second > first + slack + first // 20:
            found.append(f"{what}: {first} in the first half, {second} in the second")
    return found


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known(tmp_path_factory.mktemp("known"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interruptions in finalizers; others fail below
def test_everything_at_once(budget: Budget, known: Known) -> None:
    _, descriptors, threads = measured()
    lost: list[str] = []
    hook, sys.unraisablehook = (
        sys.unraisablehook,
        lambda found: None if found.exc_type is Interrupted else lost.append(f"{found.exc_value!r} in {found.object!r}"),
    )
    load, alarm, over = Load(known), Alarm(), threading.Event()
    handler = signal.signal(signal.SIGALRM, alarm.ring)
    workers = [threading.Thread(target=load.work, args=(budget.random.random(), over), daemon=True) for _ in range(THREADS)]
    samples: list[tuple[int, int, int]] = []
    try:
        for worker in workers:
            worker.start()
        end = time.monotonic() + (budget.seconds or 0.5)
        while time.monotonic() < end:
            budget.random.choice((load.interrupted, load.interrupted_training))(budget.random, alarm)
            samples.append(measured())
    finally:
        over.set()
        for _ in patience(0.5):
            for worker in workers:
                worker.join(0.5 / THREADS)
        signal.signal(signal.SIGALRM, handler)
        sys.unraisablehook = hook
    assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    load.close()
    assert load.wrong + lost + leaks(samples) == []
    assert load.done.keys() >= {job.__name__ for job in load.jobs if job != load.misuse} | {"interrupted"}
    del load
    gc.collect()
    _, descriptors_now, threads_now = measured()
    assert (descriptors_now <= descriptors, threads_now <= threads) == (True, True)


# ------------------------------------------------------------------------------------------------ the other side


def test_a_wrong_bit_is_found(known: Known) -> None:
    load = Load(known)
    answers, logits = known.answers, known.logits
    known.answers = {v: {key: [*ids[:-1], -1] for key, ids in found.items()} for v, found in answers.items()}
    known.logits = {version: values + 1 for version, values in logits.items()}
    try:
        for job in (load.generate, load.batch, load.with_prefix, load.grow):
            load.wrong.clear()
            for seed in range(5):
                job(random.Random(seed))
            assert load.wrong, job
    finally:
        known.answers, known.logits = answers, logits
        load.close()


def test_a_leak_is_found() -> None:
    assert leaks([(1 << 30, 10, 5)] * 20) == []
    assert [found.split(":")[0] for found in leaks([(1 << 30, 10, 5)] * 10 + [(1 << 31, 10, 5)] * 10)] == ["resident"]
    assert len(leaks([(1 << 30, 10, 5)] * 10 + [(1 << 30, 200, 50)] * 10)) == 2
