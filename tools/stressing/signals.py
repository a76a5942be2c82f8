"""signals: SIGINT, SIGTERM, SIGSTOP and SIGCONT, and a reader that goes away, at random moments of the command, of its serving,
of the chat, of programs of the API with few and many workers, and of every program that writes files; forks while workers are
busy; ends at random moments; and, without chance, Ctrl-C at every moment of a step, of a step of training, and of its saving.

Checked each time: the status is one that is documented for what came; stdout is a prefix of the right ids, in whole lines;
files are whole, absent or the older ones, and training goes on from them to the same bytes; no traceback; no hang; no process
is left. Moments begin when the program's own code runs: a Ctrl-C during the start of the interpreter itself ends that in its
own way.
"""

import dataclasses
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from pygpt import (
    GPT2,
    Config,
    DataLoader,
    SerialTrainableGPT2,
    Tokenizer,
    TrainableGPT2,
    Trainer,
    TrainingOptions,
    TrainingState,
)
from pygpt.hub.find import EMBEDDED_MODEL

from .common import BEGIN, OTHER, ROOT, Tally, alive, children_of, finish, folder, make_model, run, send, start, wait_until
from .load import state_of
from .moments import moments, raise_ctrl_c, send_together
from .writers import TOOLS, Files, Writer, put_older, writers

RUNS = 1000
LONG = Config(maxT=1000, V=211, L=3, NH=4, C=96)
TOTAL = 120  # tokens of a completion
TEXT = "Ladies and"
PYTHON = sys.executable
# What comes (gone: the reader of stdout), and the statuses that are documented for it; 0 where it came too late; -SIGINT, which
# shells call 130 too, where all was done and the interpreter, about to end, had given the signal back to the system.
ALLOWED = {
    "SIGINT": {0, 130, -signal.SIGINT},
    "SIGTERM": {0, -signal.SIGTERM},
    "SIGSTOP": {0},
    "gone": {0, 141},
    "nothing": {0},
}


class Setting(Files):
    """The files, and what must come out. Use it in a `with` block."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.trained = self.training(place)
        self.sharp = make_model(place / "sharp.bin", LONG, sharp=9)
        with GPT2.load(self.sharp, threads=1) as model:
            self.ids = list(model.generate([1, 2], total=TOTAL))
            self.answers = [list(model.generate([1, 2, i], total=40)) for i in range(3)]
        tokenizer = Tokenizer()
        with GPT2.load(EMBEDDED_MODEL, threads=1) as model:
            self.reply = tokenizer.decode(list(model.generate(tokenizer.encode(TEXT), max_new_tokens=20)))

    def training(self, place: Path) -> list[bytes]:
        """What a run of training that nobody disturbs writes."""
        (place / "trained").mkdir()
        [writer] = [writer for writer in writers(self, place / "trained") if writer.name == "training"]
        outcome = run(writer.argv)
        assert outcome.status == 0, outcome
        return training_of(place / "trained")


def training_of(place: Path) -> list[bytes]:
    """What a run of training has come to: the model, and what its state has beside names of files."""
    with TrainingState(place / "m.state") as state:
        job = {name: value for name, value in state.progress.job.items() if name != "log"}
        rest = repr(dataclasses.replace(state.progress, job=job)).encode()
        values = 3 * 4 * state.config.parameters(padded=True)
    return [(place / "m.bin").read_bytes(), (place / "m.state").read_bytes()[-values - 32 : -32], rest]


class Target:
    """A program under signals: its words, what it is given, how long its computation takes about, and who judges its output."""

    def __init__(self, name: str, argv: list[object], given: bytes, seconds: float, right: Callable[[bytes], object]) -> None:
        self.name, self.argv, self.given, self.seconds, self.right = name, argv, given, seconds, right


COMMAND = """
import sys
from pygpt import model
from pygpt.__main__ import main, run
pygpt.cpus.workers_for = lambda threads, *_: threads

def job(options):
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    run(options)

main.__globals__["run"] = job
sys.exit(main(sys.argv[1:]))
"""
API = """
import sys
import pygpt.model
from pygpt import GPT2
from pygpt.commands.console import status_of
pygpt.cpus.workers_for = lambda threads, *_: threads

def job():
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    with GPT2.load(sys.argv[1], threads=int(sys.argv[2])) as model:
        for token in model.generate([1, 2], total=int(sys.argv[3])):
            sys.stdout.write(f"{token}\\n")
            sys.stdout.flush()

sys.exit(status_of(job))
"""
FORK = """
import os, signal, sys, threading
import pygpt.model
from pygpt import GPT2
pygpt.cpus.workers_for = lambda threads, *_: threads
sys.stderr.write("ready\\n")
sys.stderr.flush()
wanted = [int(word) for word in sys.argv[3].split()]
model = GPT2.load(sys.argv[1], threads=int(sys.argv[2]))
busy = threading.Thread(target=lambda: [list(model.generate([1, 2], total=60)) for _ in range(8)], daemon=True)
busy.start()
for _ in range(4):
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if list(model.generate([1, 2], total=40)) == wanted[:38] else 3
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
busy.join()
assert list(model.generate([1, 2], total=40)) == wanted[:38]
print("fine")
"""
EXIT = """
import atexit, os, random, sys, threading, time
import pygpt.model
from pygpt import GPT2
pygpt.cpus.workers_for = lambda threads, *_: threads
sys.stderr.write("ready\\n")
sys.stderr.flush()
rng = random.Random(int(sys.argv[3]))
models = [GPT2.load(sys.argv[1], threads=int(sys.argv[2])) for _ in range(2)]
def work(model):
    try:
        while True:
            list(model.generate([1, 2], total=60))
    except BaseException:
        pass
for model in models * 2:
    threading.Thread(target=work, args=(model,), daemon=True).start()
time.sleep(rng.random() * 0.1)
how = rng.choice(("return", "exit", "raise", "close"))
if how == "close":
    models[0].close()
if how == "exit":
    sys.exit(0)
if how == "raise":
    raise SystemExit
"""


def targets(setting: Setting) -> list[Target]:
    """The programs."""
    lines = "".join(f"{token}\n" for token in setting.ids).encode()
    requests = b"".join(b'{"tokens": [1, 2, %d], "total": 40}\n' % i for i in range(3))
    found = []
    for threads in (1, 2, 8):
        words = [PYTHON, "-c", BEGIN + COMMAND, "-m", setting.sharp, "-t", threads]
        found.append(Target("the command", [*words, "-n", TOTAL, 1, 2], b"", 0.15, lambda out: whole_lines(out, lines)))
        found.append(Target("serving", [*words, "-"], requests, 0.15, lambda out: prefixes(out, setting.answers)))
    for threads in (2, 8):
        argv = [PYTHON, "-c", BEGIN + API, setting.sharp, threads, TOTAL]
        found.append(Target("the API", argv, b"", 0.15, lambda out: whole_lines(out, lines)))
    chat = [PYTHON, "-c", BEGIN + CHAT, ROOT, "-m", EMBEDDED_MODEL, "-t", 2, "-n", 20, TEXT]
    found.append(Target("chat.py", chat, b"", 0.8, lambda out: setting.reply.encode().startswith(out.removesuffix(b"\n"))))
    return found


CHAT = """
import sys
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
sys.argv[0] = folder + "/chat.py"
import chat
sys.stderr.write("ready\\n")
sys.stderr.flush()
sys.exit(chat.main())
"""


def whole_lines(out: bytes, lines: bytes) -> bool:
    """Whether output is the beginning of what it must be, whole lines of it."""
    return lines.startswith(out) and (not out or out.endswith(b"\n"))


def prefixes(out: bytes, answers: list[list[int]]) -> bool:
    """Whether each line of output is the beginning of an answer; the last line may be unfinished."""
    lines = [[int(word) for word in line.split()] for line in out.split(b"\n")]
    return len(lines) <= len(answers) + 1 and all(
        line == answer[: len(line)] for line, answer in zip(lines, answers, strict=False)
    )


def one(tally: Tally, target: Target, kind: str, rng: random.Random) -> None:
    """One run of a program, and what comes to it."""
    process = start(target.argv, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(target.given)
    ready = process.stderr.readline()
    children = []
    pause = rng.random() * target.seconds
    if kind != "nothing":
        time.sleep(pause)
        children = children_of(process.pid)
        strike(process, kind, rng)
    outcome = finish(process)
    what = f"{target.name}: {kind}"
    detail = f"{target.argv[3:]}, {pause:.4f} s after {ready!r}: {outcome}"
    err = outcome.err.replace("pygpt: using the small embedded", "")
    tally.check(what, outcome.status in ALLOWED[kind] and ready == b"ready\n", detail)
    tally.check(what, target.right(outcome.out), detail)
    tally.check(what, "Traceback" not in err and "Exception" not in err and err.strip() in ("", "Text:"), detail)
    if children:
        tally.check(f"{target.name}: no process left", wait_until(lambda: not any(map(alive, children))), children)


def strike(process: "subprocess.Popen[bytes]", kind: str, rng: random.Random) -> None:
    """Do to a running program what is to be done."""
    if kind == "gone":
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
    elif kind == "SIGSTOP":
        for _ in range(rng.randrange(1, 4)):
            send(process, signal.SIGSTOP)
            time.sleep(rng.random() * 0.02)
            send(process, signal.SIGCONT)
            time.sleep(rng.random() * 0.02)
    else:
        send(process, signal.Signals[kind])


def written(tally: Tally, setting: Setting, number: int, kind: str, rng: random.Random) -> None:
    """One run of a program that writes, and a signal that comes to it."""
    with folder() as place:
        writer = writers(setting, place)[number]
        if rng.random() < 0.5:
            put_older(setting, place, writer)
        process = start(writer.argv)
        wait_until(lambda: process.poll() is not None or writer.begun(place))
        pause = rng.random() * writer.over_s
        time.sleep(pause)
        strike(process, kind, rng)
        outcome = finish(process)
        what, detail = f"writing: {kind}", f"{writer.name}, {pause:.4f} s after it began: {outcome}"
        training = writer.name == "training"
        allowed = ALLOWED[kind] | ({143} if training and kind == "SIGTERM" else set())
        tally.check(what, outcome.status in allowed, detail)
        tally.check(what, "Traceback" not in outcome.err and "Exception" not in outcome.err, detail)
        tally.check(what, writer.whole(place), f"a file is damaged: {detail}")
        left = [name for name in writer.leftovers(place) if ".part" not in name]  # with which a download goes on
        if outcome.status == -signal.SIGTERM:  # which ends a program as kill -9 does, training before its first step
            left = [name for name in left if not writer.temporary(name)]
        tally.check(what, not left, f"{left} is left: {detail}")
        if training:
            goes_on(tally, writer, place, setting)


def goes_on(tally: Tally, writer: Writer, place: Path, setting: Setting) -> None:
    """A run of training that was interrupted is resumed, and ends as one that was not."""
    state = place / "m.state"
    outcome = run([PYTHON, TOOLS / "train.py", "--resume", state] if state.exists() else writer.again)
    tally.check("training goes on", outcome.status == 0, outcome)
    tally.check("training ends with the same bytes", training_of(place) == setting.trained, "they differ")


def random_signals(tally: Tally, setting: Setting, runs: int) -> None:
    """So many runs of random programs under random kinds."""
    rng = tally.random
    found: list[Target | int] = [*targets(setting), *range(len(writers(setting, Path())))]
    for _ in range(runs):
        target = rng.choice(found)
        if isinstance(target, Target):
            one(tally, target, rng.choice(sorted(ALLOWED)), rng)
        else:
            written(tally, setting, target, rng.choice(("SIGINT", "SIGTERM", "SIGSTOP")), rng)


def every_moment(tally: Tally, setting: Setting) -> None:
    """Ctrl-C at each moment of a step, of a step of training and of saving it: nothing is done, or all."""
    for threads in (1, 3):
        with GPT2.load(setting.small, threads=threads) as model:
            steps_at_every_moment(tally, model)
            steps_beside_another_signal(tally, model)
        with TrainableGPT2.random(OTHER, seed=1, threads=threads) as engine:
            training_at_every_moment(tally, engine, save=threads == 1)
    with SerialTrainableGPT2.random(OTHER, seed=1) as serial:
        training_at_every_moment(tally, serial)


def steps_at_every_moment(tally: Tally, model: GPT2) -> None:
    """A step that raises has changed no cache; the one after it has the right bits."""
    wanted = model.logits([1, 2, 3, 4])
    for count in (1, 3):
        cache = model.new_cache()
        model.prefill(cache, [1])
        for came in moments(lambda cache=cache, count=count: model.prefill(cache, [2, 3, 4][:count])):  # type: ignore[misc]
            tally.check("every moment of a step", cache.length == 1 or not came, cache.length)
            cache.truncate(1)
            right = (model.prefill(cache, [2, 3, 4]) == wanted[-1]).all()
            tally.check("every moment of a step", right, "the next step is wrong")
            cache.truncate(1)


class Other(Exception):
    """What the handler of another signal than Ctrl-C's raises."""


def two_signals() -> Iterator[Callable[[], None]]:
    """Yields twice, with what lets Ctrl-C come together with another signal, whose handler raises before it or after it."""

    def other(*_: object) -> None:
        raise Other

    for number in (signal.SIGHUP, signal.SIGUSR1):  # Python takes the signals that wait in the order of their numbers
        before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(number, other)
        try:
            yield partial(send_together, signal.SIGINT, number)
        finally:
            signal.signal(signal.SIGINT, before[0])
            signal.signal(number, before[1])


def steps_beside_another_signal(tally: Tally, model: GPT2) -> None:
    """Ctrl-C comes out of the step, or Python notes it as what the other exception met; either way no cache has changed."""
    wanted = model.logits([1, 2, 3])
    cache = model.new_cache()
    for both in two_signals():
        cache.truncate(0)
        model.prefill(cache, [1])
        for came in moments(lambda: model.prefill(cache, [2, 3]), both):
            tally.check("Ctrl-C beside another signal", came, "it is lost")
            tally.check("Ctrl-C beside another signal", cache.length == 1, cache.length)
            right = (model.prefill(cache, [2, 3]) == wanted[-1]).all()
            tally.check("Ctrl-C beside another signal", right, "the next step is wrong")
            cache.truncate(1)


def training_at_every_moment(
    tally: Tally, engine: TrainableGPT2 | SerialTrainableGPT2, *, both: bool = True, save: bool = False
) -> None:
    """A step of training that raises was made by all workers and counted, or by none; with `both` also where two signals come
    together; with `save`, a state that is saved over an older one is the older or the newer."""
    loader = DataLoader(np.arange(3000) * 31 % engine.config.V, 1, 8, shuffle_seed=1)
    trainer = Trainer(engine, loader, TrainingOptions(lr=1e-2, clip=1.0, accumulate=2))
    with folder() as place:
        path = place / "run.state"
        trainer.step()
        before = state_of(trainer)
        trainer.save(path)
        trainer.step()
        after = state_of(trainer)
        trainer.restore(path)
        for strike in chain([raise_ctrl_c], two_signals() if both else ()):
            seen = set()
            for came in moments(trainer.step, strike):
                tally.check("every moment of training", came, "Ctrl-C is lost")
                found = state_of(trainer)
                seen.add(found)
                if found == before:
                    trainer.step()
                    tally.check("every moment of training", state_of(trainer) == after, "the next step is wrong")
                trainer.restore(path)
            tally.check("every moment of training", seen == {before, after}, seen)
            trainer.restore(path)  # the last step was not interrupted
        saved = trainer.done
        for _ in moments(lambda: trainer.save(path)) if save else ():
            with TrainingState(path) as state:
                tally.check("every moment of saving", state.progress.step in (saved, trainer.done), state.progress.step)
            saved = state.progress.step
            trainer.step()


def forks(tally: Tally, setting: Setting) -> None:
    """Children of a process whose workers are busy compute on their own."""
    for workers in (2, 8):
        words = [PYTHON, "-W", "ignore::DeprecationWarning", "-c", FORK, setting.sharp, workers]
        outcome = finish(start([*words, " ".join(map(str, setting.ids))]))
        tally.check("forks", (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", "ready\n"), outcome)


def ends(tally: Tally, setting: Setting) -> None:
    """The interpreter ends while threads compute."""
    for workers in (1, 2, 8):
        outcome = finish(start([PYTHON, "-c", EXIT, setting.sharp, workers, tally.random.randrange(10**6)]))
        tally.check("ends", (outcome.status, outcome.out, outcome.err) == (0, b"", "ready\n"), outcome)


CLOCK = """
import sys, time
now = time.time
time.time = lambda: now() + next(jumps)
def leaps():
    while True:
        yield from (0, 1e9, -1e9, 3600, -3600)
jumps = leaps()
import pygpt.model
from pygpt import GPT2
pygpt.cpus.workers_for = lambda threads, *_: threads
with GPT2.load(sys.argv[1], threads=4) as model:
    assert list(model.generate([1, 2], total=40)) == [int(word) for word in sys.argv[2].split()][:38]
print("fine")
"""


def clocks(tally: Tally, setting: Setting) -> None:
    """The clock of the day jumps: what waits, waits by the monotonic one."""
    outcome = finish(start([PYTHON, "-c", CLOCK, setting.sharp, " ".join(map(str, setting.ids))]))
    tally.check("clocks: a program", (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", ""), outcome)
    sources = [*(ROOT / "pygpt").glob("*.py*"), *(ROOT / "pygpt").glob("*.h"), ROOT / "chat.py"]
    for source in sources:
        wall = re.search(r"(?<![\w_])time\(\)|CLOCK_REALTIME|datetime", source.read_text())
        tally.check("clocks: sources", not wall or source.name == "web.py", f"{source.name} reads the time of day")


def run_signals(tally: Tally, seconds: float | None, count: int | None) -> None:
    """`count` runs under signals (RUNS if nothing else is said), and the others between them; or those there is time for."""
    end = None if seconds is None else time.monotonic() + seconds
    left = RUNS if count is None else count
    with folder() as place, Setting(place) as setting:
        clocks(tally, setting)
        every_moment(tally, setting)
        while left and (end is None or time.monotonic() < end):
            runs = min(left, 20)
            random_signals(tally, setting, runs)
            left -= runs
            tally.runs += runs
            forks(tally, setting)
            ends(tally, setting)
