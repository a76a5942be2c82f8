"""load: everything at once in one process for a long time, every result compared with its known bits.

Threads generate on shared models and on their own, alone and in batches, with prefix caches and without, cancel by closing
iterators, open and close models, let caches grow and shrink, evaluate, train, save and resume; the main thread, which completes
and trains, is interrupted all the time. Meanwhile resident memory, descriptors and threads must stay what they were after the
first part of the run.
"""

import gc
import hashlib
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

from pygpt import (
    GPT2,
    Checkpoint,
    ClosedError,
    DataLoader,
    InputError,
    SerialGPT2,
    Tokenizer,
    TrainableGPT2,
    Trainer,
    TrainingOptions,
)
from pygpt.commands.interrupts import made_of_ctrl_c

from .common import OTHER, SHAPE, Tally, folder, make_model, patience

SECONDS = 3600.0  # of this process's life: what the machine, or who stops us, takes away in one piece does not count
PIECE_S = 1.0
THREADS = 6
TOKENS = [(17 * i + 3) % SHAPE.V for i in range(SHAPE.maxT)]
STEPS = 4  # of a run of training
PROMPTS = [TOKENS[:5], TOKENS[:40], [*TOKENS[:39], 7], [1], TOKENS[50:120]]
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 8, "sampler": "greedy"},
    {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"max_new_tokens": 8, "top_k": 5, "repetition_penalty": 1.3, "seed": 8},
    {"total": 150, "overflow": "slide"},
]
TEXT = "Ladies and gentlemen, \u00fcnd \U0001f600 so on.\n\n" * 9
RESIDENT_SLACK = 32 << 20  # bytes: what the allocator's arenas may differ by


class Interrupted(Exception):
    """What the main thread's timer raises."""


class Known:
    """The files, and what must come out."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files = {version: make_model(place / f"{version}.bin", version=version, sharp=9) for version in (1, 3, 5)}
        self.other = make_model(place / "other.bin", OTHER, sharp=9)
        self.logits: dict[int, Any] = {}
        self.answers: dict[int, dict[tuple[int, int], list[int]]] = {}
        for version, file in self.files.items():
            with GPT2.load(file, threads=1) as model:
                self.logits[version] = model.logits(TOKENS)
                self.answers[version] = {
                    (p, o): list(model.generate(PROMPTS[p], **OPTIONS[o]))
                    for p in range(len(PROMPTS))
                    for o in range(len(OPTIONS))
                }
        with GPT2.load(self.other, threads=1) as model:
            self.other_ids = list(model.generate([1, 2, 3], total=40))
        self.data = np.array([(31 * i + i // 7) % SHAPE.V for i in range(2000)], np.uint16)
        self.batches = [[part.copy() for part in batch] for batch in self._some(self.loader())]
        self.trained, self.losses = self.train(1)
        with TrainableGPT2.load(self.files[3], threads=1) as engine:
            trainer = self.trainer(engine)
            self.states = [state_of(trainer)]
            for _ in range(STEPS):
                trainer.step()
                self.states.append(state_of(trainer))

    def loader(self) -> DataLoader:
        """Batches of the data."""
        return DataLoader(self.data, B=2, T=16, shuffle_seed=3)

    def losses_of(self, engine: TrainableGPT2) -> bytes:
        """An evaluation."""
        return engine.evaluate(*self.batches[3]).tobytes()

    def trainer(self, engine: TrainableGPT2) -> Trainer:
        """A run of STEPS steps."""
        return Trainer(engine, self.loader(), TrainingOptions(lr=1e-2, clip=1.0, steps=STEPS))

    @staticmethod
    def _some(loader: DataLoader) -> Iterator[Any]:
        for _ in range(4):
            yield loader.next_batch()

    def train(self, threads: int) -> tuple[str, bytes]:
        """Two steps of training and an evaluation; the digest of the weights, and the losses' bytes."""
        with TrainableGPT2.load(self.files[3], threads=threads) as model:
            for step in (1, 2):
                model.forward(*self.batches[step])
                model.backward()
                model.gradient_norm()
                model.update(lr=1e-3, step=step, weight_decay=0.1)
            losses = self.losses_of(model)
            return hashlib.sha256(model.parameters.tobytes()).hexdigest(), losses


def state_of(trainer: Trainer) -> tuple[int, object, str]:
    """All that a run is: updates made, place in the data, digest of weights and moments."""
    engine = trainer.engine
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (engine.parameters, engine.first_moments, engine.second_moments)))
    return trainer.done, trainer.loader.state()["batch"], digest.hexdigest()


class Load:
    """The run: jobs that any thread does at any time, on models that all threads share."""

    def __init__(self, tally: Tally, known: Known) -> None:
        self.tally, self.known = tally, known
        self.shared = {
            version: GPT2.load(file, threads=threads)
            for (version, file), threads in zip(known.files.items(), (1, 2, 3), strict=True)
        }
        self.prefixes = {version: model.new_prefix_cache() for version, model in self.shared.items()}
        self.learner = TrainableGPT2.load(known.files[3], threads=2)  # evaluates in all threads; the main one trains another
        self.learned = known.losses_of(self.learner)
        self.trainee = TrainableGPT2.load(known.files[3], threads=3)
        self.trainer = known.trainer(self.trainee)
        self.start = str(known.place / "start.state")
        self.trainer.save(self.start)
        self.tokenizer = Tokenizer()
        self.text_ids = self.tokenizer.encode(TEXT)
        self.jobs: list[Callable[[random.Random], None]] = [
            self.generate,
            self.cancel,
            self.with_prefix,
            self.batch,
            self.own_model,
            self.grow,
            self.train,
            self.evaluate,
            self.resume,
            self.serial,
            self.read,
            self.misuse,
            self.text,
        ]

    def _pick(self, rng: random.Random) -> tuple[int, int, int]:
        return rng.choice(list(self.shared)), rng.randrange(len(PROMPTS)), rng.randrange(len(OPTIONS))

    def generate(self, rng: random.Random) -> None:
        """A completion on a shared model."""
        version, p, o = self._pick(rng)
        ids = list(self.shared[version].generate(PROMPTS[p], **OPTIONS[o]))
        self.tally.check("completions on shared models", ids == self.known.answers[version][p, o], (version, p, o, ids))

    def cancel(self, rng: random.Random) -> None:
        """A completion that nobody wants any more: its iterator is closed."""
        version, p, o = self._pick(rng)
        wanted = self.known.answers[version][p, o]
        iterator = self.shared[version].generate(PROMPTS[p], **OPTIONS[o])
        count = rng.randrange(4)
        ids = [next(iterator) for _ in range(count)]
        iterator.close()  # type: ignore[attr-defined]
        self.tally.check("completions cancelled", ids == wanted[:count] and list(iterator) == [], (version, p, o, ids))

    def with_prefix(self, rng: random.Random) -> None:
        """A completion that goes on from what another thread's has left."""
        version, p, o = self._pick(rng)
        ids = list(self.shared[version].generate(PROMPTS[p], cache=self.prefixes[version], **OPTIONS[o]))
        self.tally.check("completions from a prefix cache", ids == self.known.answers[version][p, o], (version, p, o, ids))

    def batch(self, rng: random.Random) -> None:
        """Several completions together."""
        version, _, o = self._pick(rng)
        chosen = [rng.randrange(len(PROMPTS)) for _ in range(rng.randrange(1, 6))]
        found = self.shared[version].generate_batch([PROMPTS[p] for p in chosen], **OPTIONS[o])
        right = [completion.tokens == self.known.answers[version][p, o] for completion, p in zip(found, chosen, strict=True)]
        self.tally.check("batches", all(right), (version, chosen, o))

    def own_model(self, rng: random.Random) -> None:
        """A model is opened, used and closed."""
        version, p, o = self._pick(rng)
        with GPT2.load(self.known.files[version], threads=rng.randrange(1, 5), mmap=rng.random() < 0.5) as model:
            ids = list(model.generate(PROMPTS[p], **OPTIONS[o]))
        self.tally.check("models opened and closed", ids == self.known.answers[version][p, o], (version, p, o, ids))
        with GPT2.load(self.known.other, threads=2) as model:
            self.tally.check("models opened and closed", list(model.generate([1, 2, 3], total=40)) == self.known.other_ids)

    def grow(self, rng: random.Random) -> None:
        """A cache grows by pieces and shrinks again."""
        version = rng.choice(list(self.shared))
        model, wanted = self.shared[version], self.known.logits[version]
        cache = model.new_cache()
        for _ in range(6):
            room = len(TOKENS) - cache.length
            if not room or rng.random() < 0.3:
                cache.truncate(rng.randrange(cache.length + 1))
                continue
            start, count = cache.length, min(room, rng.choice((1, 1, 3, 20, 60)))
            if rng.random() < 0.5:
                found, rows = model.prefill(cache, TOKENS[start : start + count])[None], wanted[start + count - 1][None]
            else:
                found, rows = (
                    model.step([(t, cache, True) for t in TOKENS[start : start + count]]),
                    wanted[start : start + count],
                )
            self.tally.check("steps of growing caches", np.array_equal(found, rows), (version, start, count))

    def train(self, rng: random.Random) -> None:
        """Two steps of training and an evaluation."""
        digest, losses = self.known.train(rng.randrange(1, 4))
        self.tally.check("training steps", digest == self.known.trained)
        self.tally.check("evaluations", losses == self.known.losses)

    def evaluate(self, rng: random.Random) -> None:
        """Losses of an engine that all threads share."""
        self.tally.check("evaluations of a shared engine", self.known.losses_of(self.learner) == self.learned)

    def resume(self, rng: random.Random) -> None:
        """A run that is saved after some steps and goes on in another object."""
        path, stop = self.known.place / f"{threading.get_ident()}.state", rng.randrange(STEPS)
        for end in (stop, STEPS):
            with TrainableGPT2.load(self.known.files[3], threads=rng.randrange(1, 4)) as engine:
                trainer = self.known.trainer(engine)
                if end == STEPS:
                    trainer.restore(path)
                while trainer.done < end:
                    trainer.step()
                self.tally.check("runs saved and resumed", state_of(trainer) == self.known.states[end], (stop, end))
                trainer.save(path)

    def serial(self, rng: random.Random) -> None:
        """The serial reference beside all that."""
        with SerialGPT2.load(self.known.files[3], mmap=rng.random() < 0.5) as model:
            found = model.logits(TOKENS[:6])
        self.tally.check("serial references", np.allclose(found, self.known.logits[3][:6], rtol=1e-3, atol=1e-3))

    def read(self, rng: random.Random) -> None:
        """A file's tensors, and a loader's batches."""
        with Checkpoint(self.known.files[rng.choice((1, 3))], mmap=rng.random() < 0.5) as checkpoint:
            gains = checkpoint.tensor("lnfw")
        self.tally.check("tensors after close()", bool((gains == 9).all()))
        batches = list(self.known._some(self.known.loader()))
        same = [
            np.array_equal(a, b) for x, y in zip(batches, self.known.batches, strict=True) for a, b in zip(x, y, strict=True)
        ]
        self.tally.check("batches of a loader", all(same))

    def misuse(self, rng: random.Random) -> None:
        """What is refused stays refused, and leaves nothing behind."""
        version = rng.choice(list(self.shared))
        model = self.shared[version]
        with self.tally.expect("refusals", InputError, "is not a token id"):
            list(model.generate([SHAPE.V]))
        cache = model.new_cache(3)
        with self.tally.expect("refusals", InputError, "room for 3"):
            model.prefill(cache, TOKENS[:4])
        with self.tally.expect("refusals", InputError, "full"):
            model.step([(1, cache, False)] * 4)
        self.tally.check("refusals", cache.length == 0)
        model = GPT2.load(self.known.files[version], threads=2)
        iterator = model.generate([1, 2], total=9)
        next(iterator)
        model.close()
        with self.tally.expect("refusals", ClosedError, "closed"):
            next(iterator)

    def text(self, rng: random.Random) -> None:
        """The one tokenizer, and text there and back."""
        ids = self.tokenizer.encode(TEXT)
        self.tally.check("texts", ids == self.text_ids and self.tokenizer.decode(ids) == TEXT)

    def interrupted(self, rng: random.Random, alarm: "Alarm") -> None:
        """In the main thread: a completion that a signal ends at any moment."""
        version, p, o = self._pick(rng)
        wanted, ids, moment = self.known.answers[version][p, o], [], rng.random() * 0.01
        cache = self.shared[version].new_cache()
        done = before = 0
        try:
            with alarm.after(moment):
                for token in self.shared[version].generate(PROMPTS[p], cache=self.prefixes[version], **OPTIONS[o]):
                    ids.append(token)
                while cache.length < len(TOKENS):
                    before = cache.length
                    self.shared[version].step([(TOKENS[before], cache, True)])
                    done = before + 1
        except Interrupted as error:
            pass_on_ctrl_c(error)
            self.tally.note("interruptions")
        self.tally.check("interrupted completions", ids == wanted[: len(ids)], (version, p, o, ids))
        self.tally.check("interrupted steps", cache.length in (before, done, before + 1), (cache.length, before, done))

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
            self.tally.note("interruptions of training")
        found = state_of(self.trainer)
        self.tally.check("interrupted training", found == self.known.states[self.trainer.done], found)

    def close(self) -> None:
        """Close what is shared."""
        shared: list[GPT2 | TrainableGPT2] = [*self.shared.values(), self.learner, self.trainee]
        for model in shared:
            model.close()


@contextmanager
def finalizers(tally: Tally) -> Iterator[None]:
    """Look at what is raised where nobody can catch it: in finalizers nothing but the interruptions may be."""

    def look(found: "sys.UnraisableHookArgs") -> None:
        tally.check("exceptions in finalizers", found.exc_type is Interrupted, f"{found.exc_value!r} in {found.object!r}")

    before, sys.unraisablehook = sys.unraisablehook, look
    try:
        yield
    finally:
        sys.unraisablehook = before


def pass_on_ctrl_c(error: Interrupted) -> None:
    """Raise KeyboardInterrupt if the alarm's exception took the place of one that was on its way here."""
    if made_of_ctrl_c(error):
        raise KeyboardInterrupt from error


class Alarm:
    """Interrupts the main thread. There is one for a whole run: a handler that is taken away while its signal is on the way
    would be missed."""

    def __init__(self) -> None:
        self.armed = False
        signal.signal(signal.SIGALRM, self.ring)

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


def resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def descriptors() -> int:
    """Open descriptors of this process; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def run_load(tally: Tally, seconds: float | None) -> None:
    """Run for so many seconds, 3,600 if nothing else is said."""
    seconds = SECONDS if seconds is None else seconds
    with folder() as place, finalizers(tally):
        files, threads = descriptors(), threading.active_count()
        known = Known(place)
        load = Load(tally, known)
        over = threading.Event()
        workers = [threading.Thread(target=work, args=(load, tally.seed * 1000 + i, over), daemon=True) for i in range(THREADS)]
        for worker in workers:
            worker.start()
        samples: list[tuple[int, int, int]] = []
        stopped = False
        try:
            supervise(load, tally.random, seconds, samples)
        except KeyboardInterrupt:
            stopped = True  # an early end: what was counted so far
        over.set()
        for _ in patience(0.5):
            for worker in workers:
                worker.join(0.5 / THREADS)
        tally.check("threads that end", not any(worker.is_alive() for worker in workers), "a thread hangs")
        load.close()
        del load
        gc.collect()
        judge(tally, samples)
        tally.check("descriptors at the end", descriptors() == files, (descriptors(), files))
        tally.check("threads at the end", threading.active_count() == threads, threading.enumerate())
        if stopped:
            raise KeyboardInterrupt


def work(load: Load, seed: int, over: threading.Event) -> None:
    """A thread: one job after another, at least one of each."""
    rng = random.Random(seed)
    waiting = rng.sample(load.jobs, len(load.jobs))
    while waiting or not over.is_set():
        job = waiting.pop() if waiting else rng.choice(load.jobs)
        try:
            job(rng)
        except BaseException as error:
            load.tally.check(job.__name__, False, repr(error))


def supervise(load: Load, rng: random.Random, seconds: float, samples: list[tuple[int, int, int]]) -> None:
    """The main thread: interruptions, and now and then a look at memory, descriptors and threads, noted in `samples`."""
    alarm = Alarm()
    begin = before = time.monotonic()
    lived = looked = 0.0
    try:
        while lived < seconds:
            rng.choice((load.interrupted, load.interrupted_training))(rng, alarm)
            now = time.monotonic()
            lived, before = lived + min(now - before, PIECE_S), now
            if lived - looked > 0.25:
                looked = lived
                samples.append((resident(), descriptors(), threading.active_count()))
    finally:
        load.tally.runs = round(lived)
        print(f"seconds: {lived:.0f} of work, {before - begin:.0f} by the clock, {time.process_time():.0f} of processors")


def judge(tally: Tally, samples: list[tuple[int, int, int]]) -> None:
    """The second half of the run must not need more than the first, whose beginning does not count."""
    middle, begin = len(samples) // 2, len(samples) // 10
    if middle - begin < 2:
        return
    for which, (what, slack) in enumerate((("resident", RESIDENT_SLACK), ("descriptors", 16), ("threads", 16))):
        first, second = (max(sample[which] for sample in part) for part in (samples[begin:middle], samples[middle:]))
        print(f"{what}: at most {first} in the first half, {second} in the second, {samples[-1][which]} at the end")
        tally.check(f"{what} stays", second <= first + slack + first // 20, (first, second))
