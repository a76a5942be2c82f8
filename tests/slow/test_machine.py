"""Failures of the machine: no memory, no threads, streams that are closed or full, files that change in use.

An error is one line and the documented status. The object that raised it works on."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from budget import Budget
from programs import PYTHON, TRAINING, Files, command, environment, finish, run, run_program, start

from pygpt import GPT2, TrainingState, _signals
from pygpt.hub.find import EMBEDDED_MODEL

TOTAL = 3000  # tokens of an answer during which a file changes
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")

# ------------------------------------------------------------------------------------------------ streams


def test_streams_that_are_closed_or_full(budget: Budget, files: Files) -> None:
    show = command("shards", "--show", files.tokens)
    small = command("-m", files.small, 1, 2)
    serving = command("-m", files.small, "-")
    chat = command("chat", "-n", 4, "-m", EMBEDDED_MODEL, "hi")
    evaluate = command("eval", "perplexity", files.tokens, "-m", files.small, "-n", 99, "-o", "json")
    bench = command("bench", "-m", files.small, "-p", 4, "-n", 2, "-d", 2, "-t", 1, "-r", 1, "-o", "json")
    profile = command("profile", "-m", files.small, "--tokens", 1, "-n", 2, "-r", 1, "--skip", "all", "-o", "json")
    train = command("train", "--data", files.tokens, "--init", files.small, "--steps", 2, *TRAINING)
    convert = command("convert", files.small, "/dev/full")
    full = ">/dev/full" if os.path.exists("/dev/full") else ">&-"
    cases = [
        *((argv, streams, 1) for argv in (small, serving, show, evaluate, bench, profile) for streams in (full, ">&-")),
        *((argv, "2>&-", 0) for argv in (small, chat, show, evaluate, bench, profile, train)),
        *((argv, "<&-", 0) for argv in (small, serving, chat, train)),
        *((convert, streams, 2) for streams in (">&-", "2>&-")),
        (command("--help"), full, 1),
        (command("--version"), ">&-", 1),
        (chat, full, 1),
        (train, full, 1),
        (train, ">&-", 0),  # what it makes is in files
    ]
    for argv, streams, status in budget.some(cases, few=4):
        outcome = run(["/bin/sh", "-c", f'"$@" {streams}', "sh", *argv], b"1 2\n")
        for notice in ("this run will not be saved: to save it, name a file with --out", "2 steps; nothing was saved"):
            outcome.err = outcome.err.replace(f"pygpt: {notice}\n", "") if argv is train else outcome.err
        assert outcome.status == status, (argv[3:], streams, outcome)
        told = not outcome.err if status == 0 or streams == "2>&-" else outcome.one_line
        assert told, (argv[3:], streams, outcome)


# ------------------------------------------------------------------------------------------------ no memory, no threads

NO_MEMORY = """
import resource

class Scarce:
    # In this block the address space may grow by `spare` bytes only.
    def __init__(self, spare):
        self.spare = spare
    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + self.spare, self.before[1]))
    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.before)

def fails(what, job):
    try:
        job()
    except MemoryError as error:
        assert str(error).isprintable(), error
        return
    raise SystemExit(f"{what}: no MemoryError")

small, long, big = sys.argv[1:]
model = GPT2.load(long, threads=2)
wanted = model.logits([1, 2, 3])
tokens = [i % 211 for i in range(5000)]
with Scarce(1 << 20):
    fails("load", lambda: GPT2.load(long, threads=1))
    fails("load into memory", lambda: GPT2.load(long, threads=1, mmap=False))
    fails("cache", model.new_cache)
    fails("completion", lambda: list(model.generate(tokens, total=9000)))
    fails("prefix cache", lambda: list(model.generate(tokens, total=9000, cache=model.new_prefix_cache())))
    fails("logits", lambda: model.logits(tokens))
cache = model.new_cache()
first = model.prefill(cache, tokens[:7])
with Scarce(1 << 20):
    fails("step", lambda: model.step([(t, cache, True) for t in tokens]))
    assert cache.length == 7, cache.length
last = model.prefill(cache, tokens[7:400])
assert np.array_equal(model.logits([1, 2, 3]), wanted)
with GPT2.load(long, threads=1) as other:
    again = other.new_cache()
    assert np.array_equal(other.prefill(again, tokens[:400]), last)
model.close()
with GPT2.load(big, threads=2) as model:
    cache = model.new_cache()
    model.prefill(cache, tokens[:7])
    with Scarce(0):
        fails("prompt", lambda: model.prefill(cache, tokens[7:200]))
    assert cache.length == 7, cache.length
    last = model.prefill(cache, tokens[7:200])
    assert np.array_equal(model.logits(tokens[:200])[-1], last)
with TrainableGPT2.load(small, threads=2) as training:
    ids = np.arange(8 * 64).reshape(8, 64) % 211
    losses = training.forward(ids, ids).copy()
    training.backward()
    gradients = training.gradients.copy()
    many = np.zeros((400, 128), int)
    with Scarce(1 << 20):
        fails("batch", lambda: training.forward(many, many))
        fails("training", lambda: TrainableGPT2.load(long, threads=1))
    assert np.array_equal(training.forward(ids, ids), losses)
    training.backward()
    assert np.array_equal(training.gradients, gradients)
print("fine")
"""
LIMITED = """
import resource, sys
from pygpt.__main__ import main
import numpy, pygpt.model, pygpt.generation.request, pygpt.generation.sampling, pygpt.tokenizer, pygpt.training.trainable
import pygpt.commands.complete, pygpt.commands.train.main
page = resource.getpagesize()
limit = int(open("/proc/self/statm").read().split()[0]) * page + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


def test_objects_work_after_a_memory_error(files: Files) -> None:
    outcome = run_program(NO_MEMORY, files.small, files.long, files.model)
    assert (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", "")


@pytest.mark.parametrize("options", [[], ["--no-mmap"]], ids=["mapped", "read"])
def test_commands_without_memory(budget: Budget, files: Files, options: list[str]) -> None:
    """They answer, or begin to answer and say in one line that memory ended."""
    argv = ["-m", files.bf16, *options, "-n", 200 if budget.long else 60, 1]
    free = run([PYTHON, "-c", LIMITED, 30, *argv])
    assert free.status == 0, free
    for _ in budget.rounds():
        for megabytes in budget.some(sorted(budget.random.sample(range(1, 24), 4)), few=1):
            outcome = run([PYTHON, "-c", LIMITED, megabytes, *argv])
            if outcome.status == 0:
                assert outcome.out == free.out
            else:
                assert (outcome.status, outcome.one_line) == (1, True), (megabytes, outcome)
                assert free.ids[: len(outcome.ids)] == outcome.ids


def test_training_without_memory(budget: Budget, files: Files, tmp_path: Path) -> None:
    made = tmp_path / "m.bin"
    argv = ["train", "--data", files.tokens, "--init", files.small, "--steps", 3, *TRAINING, "-T", 128, "--out", made]
    outcome = run([PYTHON, "-c", LIMITED, 999, *argv])
    assert outcome.status == 0, outcome
    whole = made.read_bytes()
    for _ in budget.rounds():
        for megabytes in budget.some(sorted(budget.random.sample(range(1, 32), 6)), few=1):
            outcome = run([PYTHON, "-c", LIMITED, megabytes, *argv, "--force"])
            said = outcome.status == 1 and outcome.err.splitlines()[-1].startswith("pygpt: error: ")
            assert outcome.status == 0 or said, (megabytes, outcome)
            assert made.read_bytes() == whole


NO_THREADS = """
name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
real, allowed = getattr(threading, name), 0

def counted(*words, **more):
    global allowed
    allowed -= 1
    if allowed < 0:
        raise RuntimeError("can't start new thread")
    return real(*words, **more)

def refused(job):
    try:
        job()
    except PyGPTError as error:
        assert "refused thread" in str(error) and "use fewer threads" in str(error), error
    else:
        raise SystemExit("no PyGPTError")
    assert threading.active_count() == 1, threading.enumerate()

path = sys.argv[1]
setattr(threading, name, counted)
for workers in (2, 3, 8):
    for allowed_now in range(workers - 1):
        for kind in (GPT2, TrainableGPT2):
            allowed = allowed_now
            refused(lambda: kind.load(path, threads=workers))
    allowed = workers - 1
    with GPT2.load(path, threads=workers) as model:
        assert list(model.generate([1, 2])) == [int(word) for word in sys.argv[2].split()]
print("fine")
"""


def test_threads_that_the_system_refuses(files: Files) -> None:
    outcome = run_program(NO_THREADS, files.small, " ".join(map(str, files.answer)))
    assert (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", "")


def test_commands_without_threads(budget: Budget, files: Files) -> None:
    """Where this user may limit the threads of another one: RLIMIT_NPROC does not count for root."""
    scarce = without_threads()
    if scarce is None:
        pytest.skip("RLIMIT_NPROC cannot be tried by this user")
    train = command("train", "--data", files.tokens, "--init", files.small, "--steps", 2, *TRAINING)
    blas = environment(OPENBLAS_NUM_THREADS="1")  # else NumPy's BLAS starts threads when it is imported, and ends the process
    counts = [(workers, some) for workers in (2, 4, 8) for some in range(1, workers + 1)]
    for workers, some in budget.some(counts):
        scarce[1] = f"--nproc={some}"
        outcome = run([*scarce, *command("-m", files.small, "-t", workers, 1, 2)])
        if some == workers:
            assert (outcome.status, outcome.ids) == (0, files.answer), outcome
            continue
        assert (outcome.status, outcome.one_line, outcome.out) == (1, True, b""), outcome
        assert f"refused thread {some + 1} of {workers}" in outcome.err, outcome
        assert "use fewer threads" in outcome.err, outcome
        outcome = run([*scarce, *train, "-t", workers], env=blas)
        assert outcome.status == 1, outcome
        assert "refused thread" in outcome.err.splitlines()[-1], outcome
    scarce[1] = "--nproc=1"
    outcome = run([*scarce, *train], env=blas)
    assert outcome.status == 0, outcome
    outcome = run([*scarce, *command("chat", "-m", EMBEDDED_MODEL, "-t", 1, "-n", 2, "hi")])  # it starts a process
    assert (outcome.status, outcome.one_line) == (1, True), outcome


def without_threads() -> list[str] | None:
    """Return the words before a command that limits its number of threads (word 1). Root becomes a user of no processes
    who may read root's files. None if this is impossible here."""
    words = ["prlimit", "--nproc=1"]
    if not os.geteuid():
        one = "-all,+dac_override"
        caps = [f"--{kind}={one}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
        words += ["setpriv", f"--reuid={1_000_000 + os.getpid() % 1_000_000}", "--clear-groups", *caps]
    try:
        found = run([*words, PYTHON, "-c", "import threading; threading.Thread(target=print).start()"])
    except OSError:
        return None
    return words if "can't start new thread" in found.err else None


# ------------------------------------------------------------------------------------------------ files that change


def test_a_model_file_that_changes_in_use(budget: Budget, files: Files, tmp_path: Path) -> None:
    """The command has begun an answer, and the next request waits."""
    total = TOTAL if budget.long else 600
    with GPT2.load(files.long, threads=2) as model:
        answers = [list(model.generate([1], total=total)), list(model.generate([2]))]
    whole = b"".join(b" ".join(b"%d" % token for token in answer) + b"\n" for answer in answers)
    requests = b'{"tokens": [1], "total": %d}\n2\n' % total
    path = tmp_path / "model.bin"

    def rename_over() -> None:
        shutil.copy(files.small, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def write_over() -> None:
        path.write_bytes(bytes(path.stat().st_size))

    def cut() -> None:
        os.truncate(path, 1024)

    cases: list[tuple[Callable[[], object], list[str], int]] = [
        (lambda: None, [], 0), (path.unlink, [], 0), (rename_over, [], 0), (cut, ["--no-mmap"], 0),
        (write_over, ["--no-mmap"], 0), (cut, ["-t", "1"], -signal.SIGBUS), (cut, ["-t", "4"], -signal.SIGBUS),
    ]  # fmt: skip
    for number in budget.some(range(len(cases)), few=2):
        change, options, status = cases[number]
        shutil.copy(files.long, path)
        process = start(command("-m", path, *options, "-"), bufsize=0)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(requests[:-2])
        first = process.stdout.read(1)
        change()
        outcome = finish(process, requests[-2:])
        assert outcome.status == status, (number, outcome)
        found = first + outcome.out
        if status == 0:
            assert (found, outcome.err) == (whole, "")
        else:
            assert whole.startswith(found)
            assert outcome.one_line
            assert "SIGBUS" in outcome.err
            assert "--no-mmap" in outcome.err


def test_training_with_truncated_data(files: Files, tmp_path: Path) -> None:
    """One line is printed, and saved work can be resumed."""
    data, state = tmp_path / "data.bin", tmp_path / "m.state"
    shutil.copy(files.tokens, data)
    options = ["--data", data, "--init", files.small, *TRAINING, "--steps", 10**6, "--out", tmp_path / "m.bin"]
    process = start(command("train", *options))
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.truncate(data, 0)
    outcome = finish(process)
    assert (outcome.status, outcome.one_line, "SIGBUS" in outcome.err) == (-signal.SIGBUS, True, True), outcome
    shutil.copy(files.tokens, data)
    with TrainingState(state) as found:
        done = found.progress.step
    outcome = run(command("train", "--resume", state, "--steps", done + 2))
    assert outcome.status == 0, outcome


def test_names_without_a_model(budget: Budget, files: Files, tmp_path: Path) -> None:
    """One line, status 2, no waiting."""
    (tmp_path / "secret.bin").touch(0o000)
    (tmp_path / "gone.bin").symlink_to("nowhere.bin")
    os.mkfifo(tmp_path / "fifo.bin")
    (tmp_path / "half.bin").write_bytes(Path(files.small).read_bytes()[:5000])
    for path in budget.some(["", tmp_path, "/dev/zero", "nul\tl", *sorted(tmp_path.iterdir())]):
        for argv in (command("-m", path, 1), command("convert", path, tmp_path / "out.bin")):
            outcome = run(argv)
            assert (outcome.status, outcome.one_line) == (2, True), (path, outcome)


# ------------------------------------------------------------------------------------------------ the handler of SIGBUS

SIGBUS_PROGRAM = """
import mmap, os, sys
from pygpt.commands.console import status_of
with open(sys.argv[1], "wb") as file:
    file.write(bytes(8192))
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_READ)
def touch():
    os.truncate(sys.argv[1], 0)
    return mapped[5000]
"""


def test_the_line_of_the_outer_command_stays() -> None:
    assert _signals.begin(b"outer\n")
    try:
        assert not _signals.begin(b"inner\n")  # its end() would remove the handler of the outer one
    finally:
        _signals.end()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("status_of(touch)", 1),
        ("status_of(lambda: status_of(touch))", 1),
        ("status_of(lambda: None); touch()", 0),  # the library alone, and a command that is over, leave the signal alone
        ("touch()", 0),
        ("import signal; status_of(lambda: os.kill(os.getpid(), signal.SIGBUS))", 0),  # its usual effect, no explanation
    ],
)
def test_message_of_sigbus(tmp_path: Path, end: str, said: int) -> None:
    variables = environment()
    del variables["PYTHONFAULTHANDLER"]
    outcome = run([PYTHON, "-c", f"{SIGBUS_PROGRAM}\n{end}", tmp_path / "file"], env=variables)
    assert (outcome.status, outcome.out) == (-signal.SIGBUS, b"")
    assert outcome.err.count("\n") == outcome.err.count("(SIGBUS)") == said
    assert outcome.one_line == bool(said)


def test_another_handler_comes_after_ours(tmp_path: Path) -> None:
    """Faulthandler's traceback, for one, once our line is written."""
    outcome = run([PYTHON, "-X", "faulthandler", "-c", f"{SIGBUS_PROGRAM}\nstatus_of(touch)", tmp_path / "file"])
    assert outcome.status == -signal.SIGBUS
    assert "(SIGBUS)" in outcome.err.splitlines()[0]
    assert "Fatal Python error: Bus error" in outcome.err
