"""Signals at random moments: SIGINT, SIGTERM, SIGSTOP and SIGCONT, and a reader that closes the pipe. The programs are
commands, the chat, programs of the API with few and many workers, and every program that writes files. There are also forks and
exits while workers are busy.

Each time the status is documented, stdout is a prefix of the right ids in whole lines, and files are complete. Programs do not
print tracebacks, hang, or leave processes. Moments begin when the program's own code runs."""

import dataclasses
import http.client
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import programs
import pytest
from budget import Budget
from known import make_model
from programs import BEGIN, PREAMBLE, PYTHON, ROOT, Files, command, finish, run, run_program, send, start, wait_until, writers
from serving import ServerProcess

from pygpt import GPT2, Config, Tokenizer, TrainingState
from pygpt.hub.find import EMBEDDED_MODEL

LONG = Config(maxT=1000, V=211, L=3, NH=4, C=96)
TOTAL = 120  # tokens of a completion
TEXT = "Ladies and"
# Each signal ("gone": the reader of stdout closes it) and its documented statuses. 0: it came too late. -SIGINT, which
# shells call 130, too: all was done, and the interpreter, about to end, had given the signal back to the system.
ALLOWED = {
    "SIGINT": {0, 130, -signal.SIGINT},
    "SIGTERM": {0, -signal.SIGTERM},
    "SIGSTOP": {0},
    "gone": {0, 141},
    "nothing": {0},
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


class Setting:
    """A model and its expected results."""

    def __init__(self, place: Path) -> None:
        self.sharp = make_model(place / "sharp.bin", LONG, sharp=9)
        with GPT2.load(self.sharp, threads=1) as model:
            self.ids = list(model.generate([1, 2], total=TOTAL))
            self.answers = [list(model.generate([1, 2, i], total=40)) for i in range(3)]
        tokenizer = Tokenizer()
        with GPT2.load(EMBEDDED_MODEL, threads=1) as model:
            self.reply = tokenizer.decode(list(model.generate(tokenizer.encode(TEXT), max_new_tokens=20)))

    @property
    def said(self) -> str:
        """The ids as a program's argument."""
        return " ".join(map(str, self.ids))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"))


COMMAND = f"""{BEGIN}{PREAMBLE}
from pygpt.commands.complete import build_parser, run
from pygpt.commands.console import command

def job(options):
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    run(options)

sys.exit(command(build_parser, job)(sys.argv[1:]))
"""
API = f"""{BEGIN}{PREAMBLE}
from pygpt.commands.console import status_of

def job():
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    with GPT2.load(sys.argv[1], threads=int(sys.argv[2])) as model:
        for token in model.generate([1, 2], total=int(sys.argv[3])):
            sys.stdout.write(f"{{token}}\\n")
            sys.stdout.flush()

sys.exit(status_of(job))
"""
CHAT = f"""{BEGIN}
import sys
from pygpt.commands import chat
sys.argv[0] = "{ROOT}/chat.py"
sys.stderr.write("ready\\n")
sys.stderr.flush()
sys.exit(chat.main())
"""


class Program(NamedTuple):
    """A program under signals: its words, its input, its approximate duration, and the check of its output."""

    name: str
    argv: list[object]
    given: bytes
    seconds: float
    right: Callable[[bytes], object]


def some_programs(setting: Setting) -> list[Program]:
    lines = "".join(f"{token}\n" for token in setting.ids).encode()
    requests = b"".join(b'{"tokens": [1, 2, %d], "total": 40}\n' % i for i in range(3))

    def whole_lines(out: bytes) -> bool:
        return lines.startswith(out) and (not out or out.endswith(b"\n"))

    def prefixes(out: bytes) -> bool:
        found = [[int(word) for word in line.split()] for line in out.split(b"\n")]
        pairs = zip(found, setting.answers, strict=False)
        return len(found) <= len(setting.answers) + 1 and all(line == answer[: len(line)] for line, answer in pairs)

    found = []
    for threads in (1, 2, 8):
        words: list[object] = [PYTHON, "-c", COMMAND, "-m", setting.sharp, "-t", threads]
        found.append(Program("the command", [*words, "-n", TOTAL, 1, 2], b"", 0.15, whole_lines))
        found.append(Program("serving", [*words, "-"], requests, 0.15, prefixes))
        found.append(Program("the API", [PYTHON, "-c", API, setting.sharp, threads, TOTAL], b"", 0.15, whole_lines))
    chat: list[object] = [PYTHON, "-c", CHAT, "-m", EMBEDDED_MODEL, "-t", 2, "-n", 20, TEXT]
    return [*found, Program("chat", chat, b"", 0.8, lambda out: setting.reply.encode().startswith(out.removesuffix(b"\n")))]


def strike(process: "subprocess.Popen[bytes]", kind: str, rng: random.Random) -> None:
    """Send the signal to a running program."""
    if kind == "gone":
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
    elif kind == "SIGSTOP":
        for _ in range(rng.randrange(1, 4)):
            for number in (signal.SIGSTOP, signal.SIGCONT):
                send(process, number)
                time.sleep(rng.random() * 0.02)
    elif kind != "nothing":
        send(process, signal.Signals[kind])


def alive(pid: int) -> bool:
    """Whether a process is there (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended
        return []
    return [int(word) for text in texts for word in text.split()]


def test_programs_under_signals(budget: Budget, setting: Setting) -> None:
    rng = budget.random
    for number in budget.rounds():
        for program in [rng.choice(some_programs(setting))] if budget.long else budget.some(some_programs(setting)):
            kind = rng.choice(sorted(ALLOWED))
            process = start(program.argv, bufsize=0)
            assert process.stdin is not None
            assert process.stderr is not None
            process.stdin.write(program.given)
            assert process.stderr.readline() == b"ready\n"
            pause = rng.random() * program.seconds
            time.sleep(pause)
            children = children_of(process.pid)
            strike(process, kind, rng)
            outcome = finish(process)
            detail = f"run {number}, {program.name}: {kind} after {pause:.4f} s: {program.argv[3:]}: {outcome}"
            assert outcome.status in ALLOWED[kind], detail
            assert program.right(outcome.out), detail
            assert "Traceback" not in outcome.err, detail
            assert outcome.err.strip() in ("", "Text:"), detail
            assert wait_until(lambda children=children: not any(map(alive, children))), detail  # type: ignore[misc]


def test_writers_under_signals(budget: Budget, files: Files, tmp_path: Path) -> None:
    """Interrupted training is resumed, and ends as a run that was not."""
    (tmp_path / "whole").mkdir()
    [training] = [writer for writer in writers(files, tmp_path / "whole") if writer.name == "training"]
    outcome = run(training.argv)
    assert outcome.status == 0, outcome
    whole = training_of(tmp_path / "whole")
    kinds = [number for number, writer in enumerate(writers(files, tmp_path)) if budget.long or writer.name == "training"]
    for number in budget.rounds():
        (place := tmp_path / str(number)).mkdir()
        writer = writers(files, place)[budget.random.choice(kinds)]
        interrupted(writer, files, place, budget.random)
        if writer.name == "training":
            state = place / "m.state"
            outcome = run(command("train", "--resume", state) if state.exists() else writer.again)
            assert outcome.status == 0, outcome
            assert training_of(place) == whole
        shutil.rmtree(place)


def interrupted(writer: programs.Writer, files: Files, place: Path, rng: random.Random) -> None:
    """Run a program that writes; send it a signal."""
    kind = rng.choice(("SIGINT", "SIGTERM", "SIGSTOP"))
    if rng.random() < 0.5:
        writer.put_older(files, place)
    process = start(writer.argv)
    wait_until(lambda: process.poll() is not None or writer.begun(place))
    pause = rng.random() * writer.over_s
    time.sleep(pause)
    strike(process, kind, rng)
    outcome = finish(process)
    detail = f"{writer.name}: {kind} {pause:.4f} s after it began: {outcome}"
    saves = {143} if writer.name in ("training", "a vocabulary") and kind == "SIGTERM" else set()
    assert outcome.status in ALLOWED[kind] | saves, detail
    assert "Traceback" not in outcome.err, detail
    assert writer.whole(place), detail
    left = writer.leftovers(place)
    if outcome.status == -signal.SIGTERM:  # it ends a program as kill -9 does, training before its first step
        left = [name for name in left if not writer.temporary(name)]
    assert not left, detail


def training_of(place: Path) -> list[bytes]:
    """Return the result of a training run: the model, and its state without names of files."""
    with TrainingState(place / "m.state") as state:
        job = {name: value for name, value in state.progress.job.items() if name != "log"}
        rest = repr(dataclasses.replace(state.progress, job=job)).encode()
        values = 3 * 4 * state.config.parameters(padded=True)
    return [(place / "m.bin").read_bytes(), (place / "m.state").read_bytes()[-values - 32 : -32], rest]


def test_servers_under_signals(budget: Budget, files: Files) -> None:
    """The first signal decides the status. What clients got before their stream ended is the beginning of the right answer."""
    with GPT2.load(files.small, threads=1) as model:
        wanted = [list(model.generate([1, i], max_new_tokens=100, sampler="greedy")) for i in range(4)]
    for number in budget.rounds():
        server, rng, found = (
            ServerProcess("-m", files.small, "-t", "2", "--grace", "1"),
            budget.random,
            [list[int]() for _ in wanted],
        )

        def client(i: int, server: ServerProcess = server, found: list[list[int]] = found) -> None:
            body = {"prompt": [1, i], "max_tokens": 100, "temperature": 0, "stream": True, "return_token_ids": True}
            with suppress(OSError, http.client.HTTPException):
                for event in server.at.ask("POST", "/v1/completions", body).events():
                    found[i] += event["choices"][0]["token_ids"] if "choices" in event else []

        clients = [threading.Thread(target=client, args=(i,)) for i in range(len(wanted))]
        for each in clients:
            each.start()
        time.sleep(rng.random() * 0.3)
        if stopped := rng.random() < 0.3:
            strike(server.child, "SIGSTOP", rng)
        first, status = rng.choice(((signal.SIGTERM, 0), (signal.SIGINT, 130)))
        times = rng.randrange(1, 3)
        outcome = server.end(first, times)
        detail = number, first, times, stopped, outcome
        for each in clients:
            each.join()
        assert outcome[0] in {status, *([-first] if times > 1 else [])}, detail  # a second one may meet the interpreter's end
        assert outcome[1:] == (b"", b""), detail
        assert all(ids == right[: len(ids)] for ids, right in zip(found, wanted, strict=True)), detail


# ------------------------------------------------------------------------------------------------ forks, exits, clocks

FORK = """
wanted = [int(word) for word in sys.argv[3].split()][:38]
model = GPT2.load(sys.argv[1], threads=int(sys.argv[2]))
busy = threading.Thread(target=lambda: [list(model.generate([1, 2], total=60)) for _ in range(8)], daemon=True)
busy.start()
for _ in range(4):
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if list(model.generate([1, 2], total=40)) == wanted else 3
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
busy.join()
assert list(model.generate([1, 2], total=40)) == wanted
print("fine")
"""
EXIT = """
import random
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
print("fine", flush=True)
if how == "close":
    models[0].close()
if how == "exit":
    sys.exit(0)
if how == "raise":
    raise SystemExit
"""
ENGINE = """
wanted = [int(word) for word in sys.argv[3].split()][:38]
model = GPT2.load(sys.argv[1], threads=int(sys.argv[2]))
engine = model.engine(prefix=model.new_prefix_cache())
jobs = [engine.add(Request(model.config, [1, 2], total=40, speculation=count)) for count in (None, 3, True)]
for _ in range(5):
    engine.step()
child = os.fork()
list(engine.run())
right = all(completion.tokens == wanted for job in jobs for completion in job.completions)
if not child:
    os._exit(0 if right else 3)
_, status = os.waitpid(child, 0)
assert right and status == 0, status
print("fine")
"""
CLOSE = """
wanted = [int(word) for word in sys.argv[3].split()]
def work(model, found, caches=None):
    try:
        for token in model.generate([1, 2], total=120, cache=caches, speculation=len(found) or None):
            found.append(token)
    except ClosedError:
        pass
for pause in range(12):
    model = GPT2.load(sys.argv[1], threads=int(sys.argv[2]))
    lists = [[] for _ in range(3)]
    threads = [threading.Thread(target=work, args=(model, found, model.new_prefix_cache())) for found in lists]
    for thread in threads:
        thread.start()
    time.sleep(pause / 500)
    model.close()
    for thread in threads:
        thread.join()
    assert all(found == wanted[:len(found)] for found in lists)
print("fine")
"""
CLOCK = """
now = time.time
time.time = lambda: now() + next(jumps)
def leaps():
    while True:
        yield from (0, 1e9, -1e9, 3600, -3600)
jumps = leaps()
with GPT2.load(sys.argv[1], threads=int(sys.argv[2])) as model:
    assert list(model.generate([1, 2], total=40)) == [int(word) for word in sys.argv[3].split()][:38]
print("fine")
"""


@pytest.mark.parametrize(
    "code", [FORK, EXIT, CLOCK, ENGINE, CLOSE], ids=["forks", "exits", "clocks", "forks of an engine", "closes"]
)
def test_with_busy_workers(budget: Budget, setting: Setting, code: str) -> None:
    """Children compute alone, the interpreter ends while threads compute, and waits use the monotonic clock."""
    for _ in budget.rounds():
        for workers in budget.some((1, 2, 8), few=1):
            words = setting.said if code != EXIT else budget.random.randrange(10**6)
            outcome = run_program(code, setting.sharp, workers, words)
            assert (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", ""), outcome


def test_waits_use_the_monotonic_clock() -> None:
    """A download's age, a trace's date and the time of an answer in OpenAI's API are dates."""
    sources = [path for pattern in ("*.py*", "*.h") for path in (ROOT / "pygpt").rglob(pattern) if path.suffix != ".pyc"]
    others = [path for path in sources if path.parent.name != "hub" and path.name not in ("traces.py", "answering.py")]
    wall = re.compile(r"(?<![\w_])time\(\)|CLOCK_REALTIME|datetime")
    assert [path.name for path in others if wall.search(path.read_text())] == []
