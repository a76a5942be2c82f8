"""signals: SIGINT, SIGTERM, SIGSTOP and SIGCONT, and a reader that goes away, at random moments of the command, of its serving,
of the chat, and of programs of the API with few and many workers; forks while workers are busy; ends at random moments.

Checked each time: the status is one that is documented for what came; stdout is a prefix of the right ids, in whole lines; no
traceback; no hang; no process is left. Moments begin when the program's own code runs: a Ctrl-C during the start of the
interpreter itself ends that in its own way.
"""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pygpt import GPT2, Config, Tokenizer
from pygpt.checkpoint import EMBEDDED_MODEL

from .common import ROOT, Tally, alive, children_of, finish, folder, make_model, send, start, wait_until

RUNS = 1000
LONG = Config(maxT=1000, V=211, L=3, NH=4, C=96)
TOTAL = 120  # tokens of a completion
TEXT = "Ladies and"
PYTHON = sys.executable
# What comes (gone: the reader of stdout), and the statuses that are documented for it; 0 where it came too late.
ALLOWED = {"SIGINT": {0, 130}, "SIGTERM": {0, -signal.SIGTERM}, "SIGSTOP": {0}, "gone": {0, 141}, "nothing": {0}}


class Setting:
    """The model, and what must come out."""

    def __init__(self, place: Path) -> None:
        self.model = make_model(place / "model.bin", LONG, sharp=9)
        with GPT2.load(self.model, threads=1) as model:
            self.ids = list(model.generate([1, 2], total=TOTAL))
            self.answers = [list(model.generate([1, 2, i], total=40)) for i in range(3)]
        tokenizer = Tokenizer()
        with GPT2.load(EMBEDDED_MODEL, threads=1) as model:
            self.reply = tokenizer.decode(list(model.generate(tokenizer.encode(TEXT), max_new_tokens=20)))


class Target:
    """A program under signals: its words, what it is given, how long its computation takes about, and who judges its output."""

    def __init__(self, name: str, argv: list[object], given: bytes, seconds: float, right: Callable[[bytes], object]) -> None:
        self.name, self.argv, self.given, self.seconds, self.right = name, argv, given, seconds, right


READY = """
import sys
sys.stderr.write("ready\\n")   # the program's own code runs from here on
sys.stderr.flush()
"""
COMMAND = """
import sys
from pygpt import model
from pygpt.__main__ import main, run
model.MEETING_WEIGHT = 0

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
from pygpt.cli import status_of
pygpt.model.MEETING_WEIGHT = 0

def job():
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    with GPT2.load(sys.argv[1], threads=int(sys.argv[2])) as model:
        for token in model.generate([1, 2], total=int(sys.argv[3])):
            print(token, flush=True)

sys.exit(status_of(job))
"""
FORK = """
import os, signal, sys, threading
import pygpt.model
from pygpt import GPT2
pygpt.model.MEETING_WEIGHT = 0
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
pygpt.model.MEETING_WEIGHT = 0
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
        words = [PYTHON, "-c", COMMAND, "-m", setting.model, "-t", threads]
        found.append(Target("the command", [*words, "-n", TOTAL, 1, 2], b"", 0.15, lambda out: whole_lines(out, lines)))
        found.append(Target("serving", [*words, "-"], requests, 0.15, lambda out: prefixes(out, setting.answers)))
    for threads in (2, 8):
        argv = [PYTHON, "-c", API, setting.model, threads, TOTAL]
        found.append(Target("the API", argv, b"", 0.15, lambda out: whole_lines(out, lines)))
    chat = [PYTHON, "-c", READY + CHAT, ROOT, "-m", EMBEDDED_MODEL, "-t", 2, "-n", 20, TEXT]
    found.append(Target("chat.py", chat, b"", 0.8, lambda out: setting.reply.encode().startswith(out.removesuffix(b"\n"))))
    return found


CHAT = """
import runpy
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
sys.argv[0] = folder + "/chat.py"
import chat
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
    if kind == "nothing":
        outcome = finish(process)
    else:
        time.sleep(rng.random() * target.seconds)
        children = children_of(process.pid)
        strike(process, kind, rng)
        outcome = finish(process)
    what = f"{target.name}: {kind}"
    err = outcome.err.replace("pygpt: no gpt2_124M.bin here", "")
    tally.check(what, outcome.status in ALLOWED[kind] and ready == b"ready\n", f"{target.argv[-6:]}: {ready!r} {outcome}")
    tally.check(what, target.right(outcome.out), f"{target.argv[-6:]}: {outcome}")
    tally.check(what, "Traceback" not in err and "Exception" not in err and err.strip() in ("", "Text:"), outcome)
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


def random_signals(tally: Tally, setting: Setting, runs: int) -> None:
    """So many runs of random programs under random kinds."""
    rng = tally.random
    found = targets(setting)
    for _ in range(runs):
        one(tally, rng.choice(found), rng.choice(sorted(ALLOWED)), rng)


def forks(tally: Tally, setting: Setting) -> None:
    """Children of a process whose workers are busy compute on their own."""
    for workers in (2, 8):
        words = [PYTHON, "-W", "ignore::DeprecationWarning", "-c", FORK, setting.model, workers]
        outcome = finish(start([*words, " ".join(map(str, setting.ids))]))
        tally.check("forks", (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", "ready\n"), outcome)


def ends(tally: Tally, setting: Setting) -> None:
    """The interpreter ends while threads compute."""
    for workers in (1, 2, 8):
        outcome = finish(start([PYTHON, "-c", EXIT, setting.model, workers, tally.random.randrange(10**6)]))
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
pygpt.model.MEETING_WEIGHT = 0
with GPT2.load(sys.argv[1], threads=4) as model:
    assert list(model.generate([1, 2], total=40)) == [int(word) for word in sys.argv[2].split()][:38]
print("fine")
"""


def clocks(tally: Tally, setting: Setting) -> None:
    """The clock of the day jumps: what waits, waits by the monotonic one."""
    outcome = finish(start([PYTHON, "-c", CLOCK, setting.model, " ".join(map(str, setting.ids))]))
    tally.check("clocks: a program", (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", ""), outcome)
    sources = [*(ROOT / "pygpt").glob("*.py*"), *(ROOT / "pygpt").glob("*.h"), ROOT / "chat.py"]
    for source in sources:
        wall = re.search(r"(?<![\w_])time\(\)|CLOCK_REALTIME|datetime", source.read_text())
        tally.check("clocks: sources", not wall or source.name == "download.py", f"{source.name} reads the time of day")


def run_signals(tally: Tally, seconds: float | None) -> None:
    """RUNS runs under signals, and the others between them; or as many as there is time for."""
    end = None if seconds is None else time.monotonic() + seconds
    with folder() as place:
        setting = Setting(place)
        clocks(tally, setting)
        for _ in range(RUNS // 20):
            random_signals(tally, setting, 20)
            forks(tally, setting)
            ends(tally, setting)
            if end is not None and time.monotonic() >= end:
                return
