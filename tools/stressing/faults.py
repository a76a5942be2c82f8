"""faults: what a machine does to programs. Kill -9 while a file is written, full disks, no memory, no threads, streams that
are closed or full, and model files that change under the one who uses them.

Whatever happens, a file is whole, or absent, or the older one; an error is one line and the documented status; the object that
raised works on. A killed program cannot tidy up: it may leave *.tmp files, and temporary folders beside its target, which the
next run does not mind.
"""

import os
import resource
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pygpt import GPT2, TrainingState
from pygpt.hub.find import EMBEDDED_MODEL

from .common import ROOT, Outcome, Tally, command, environment, finish, folder, run, send, start, wait_until
from .writers import PYTHON, TOOLS, TRAINING, Files, Writer, ids_of, put_older, writers

ROUNDS = 3
TOTAL = 3000  # tokens of an answer during which a file changes
STEPS = 40  # of a run of training that is killed again and again


# ------------------------------------------------------------------------------------------------ kill -9 while writing


def kills(tally: Tally, files: Files) -> None:
    """Each writer is killed at a random moment, with an older file there and without; then it runs to its end."""
    for older in (False, True):
        with folder() as place:
            for number in files.some(range(len(writers(files, place))), tally.random):
                here = place / str(number)
                here.mkdir()
                killed(tally, files, here, writers(files, here)[number], older=older)


def killed(tally: Tally, files: Files, place: Path, writer: Writer, *, older: bool) -> None:
    """One writer, killed and begun again."""
    if older:
        put_older(files, place, writer)
    process = start(writer.argv)
    moment = tally.random.random() * writer.over_s
    wait_until(lambda: process.poll() is not None or writer.begun(place))
    time.sleep(moment)
    send(process, signal.SIGKILL)
    outcome = finish(process)
    what = f"kill -9: {writer.name}"
    tally.note(f"{what}, {'killed' if outcome.status == -signal.SIGKILL else 'ended before'}")
    tally.check(what, writer.whole(place), outcome)
    there = not older or writer.fresh or all((place / target).exists() for target in writer.targets)
    tally.check(what, there, "an older file is gone")
    left = writer.leftovers(place)
    tally.check(f"{what}: leftovers", all(writer.temporary(name) for name in left), left)
    if writer.argv == writer.again and writer.fresh and not any(name.endswith(".part") for name in left):
        writer.clear(place)
    again = run(writer.again)
    tally.check(f"{what}: the next run", again.status == 0 and writer.whole(place), again)
    tally.check(f"{what}: the next run", set(writer.leftovers(place)) <= set(left), writer.leftovers(place))
    tally.check(f"{what}: the next run", all((place / target).exists() for target in writer.targets), "a target is missing")


def training_goes_on(tally: Tally, files: Files) -> None:
    """A run of training that is killed again and again ends with the bytes of one that nobody disturbed."""
    with folder() as place:
        train: list[object] = [PYTHON, TOOLS / "train.py"]
        options = ["--data", files.tokens, "--init", files.small, "--shuffle", "--clip", 1, *TRAINING, "--steps", STEPS]
        names = ("m.bin", "m.state")
        for run_of in ("one", "two"):
            (place / run_of).mkdir()
        outcome = run([*train, *options, "--out", place / "one" / "m.bin"])
        tally.check("kill -9: training goes on", outcome.status == 0, outcome)
        state = place / "two" / "m.state"

        def words() -> list[object]:
            if state.exists() or Path(f"{state}.1").exists():
                return [*train, "--resume", state]
            return [*train, *options, "--out", place / "two" / "m.bin", "--force"]

        for _ in files.some(range(8), tally.random):
            process = start(words())
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(tally.random.random() * 0.1)
            send(process, signal.SIGKILL)
            outcome = finish(process)
            tally.check("kill -9: training goes on", outcome.status in (0, -signal.SIGKILL), outcome)
        outcome = run(words())
        tally.check("kill -9: training goes on", outcome.status == 0, outcome)
        same = all((place / "one" / name).read_bytes() == (place / "two" / name).read_bytes() for name in names)
        tally.check("kill -9: training ends with the same bytes", same, "they differ")


# ------------------------------------------------------------------------------------------------ full disks


def full_disks(tally: Tally, files: Files) -> None:
    """Each writer on a disk that fills up: by a limit of the file's size, and on a small file system where one can be had."""
    with folder() as place:
        for number in files.some(range(len(writers(files, place))), tally.random):
            here = place / str(number)
            here.mkdir()
            writer = writers(files, here)[number]
            put_older(files, here, writer)
            size = tally.random.randrange(1000, writer.least)
            outcome = run(writer.argv, preexec_fn=lambda size=size: limit(resource.RLIMIT_FSIZE, size))
            refused(tally, f"full disk: {writer.name}", outcome, writer, here)
            for target in writer.targets:
                same = writer.fresh or (here / target).read_bytes() == Path(files.small).read_bytes()
                tally.check(f"full disk: {writer.name}", same, "the older file has changed")
        for number in files.some(range(len(writers(files, place))), tally.random):
            with small_disk(place / f"disk{number}", tally.random.randrange(2, 8) * 4096) as disk:
                if disk is None:
                    tally.note("full disk: no small file system can be had here")
                    return
                writer = writers(files, disk)[number]
                outcome = run(writer.argv)
                refused(tally, f"full disk: {writer.name}", outcome, writer, disk)


def refused(tally: Tally, what: str, outcome: Outcome, writer: Writer, place: Path) -> None:
    """Status 1, one line (a program of the API: its exception), nothing half-written, nothing left."""
    tally.check(what, outcome.status == 1 and outcome.one_line, outcome)
    left = [name for name in writer.leftovers(place) if ".part" not in name]  # with which a download goes on
    tally.check(what, not left and writer.whole(place), left)
    if writer.fresh:
        writer.clear(place)


def limit(which: int, value: int) -> None:
    """Set a limit of this process; SIGXFSZ is ignored, as Python does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(which, (value, value))


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes, where this user may mount one; else None."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def full_streams(tally: Tally, files: Files) -> None:
    """stdin, stdout and stderr closed or full, for the command, for its serving and for the chat."""
    chat = [PYTHON, ROOT / "chat.py", "-n", 4, "-m", EMBEDDED_MODEL, "hi"]
    evaluate = [PYTHON, TOOLS / "eval.py", "perplexity", files.tokens, "-m", files.small, "-n", 99, "-o", "json"]
    bench = [PYTHON, TOOLS / "bench.py", "-m", files.small, "-p", 4, "-n", 2, "-d", 2, "-t", 1, "-r", 1, "-o", "json"]
    job = ["-m", files.small, "--tokens", 1, "-n", 2, "-r", 1, "--skip", "all", "-o", "json"]
    profile = [PYTHON, TOOLS / "profile.py", *job]
    train = [PYTHON, TOOLS / "train.py", "--data", files.tokens, "--init", files.small, "--steps", 2, *TRAINING]
    show = [PYTHON, TOOLS / "shards.py", "--show", files.tokens]
    small = command("-m", files.small, 1, 2)
    serving = command("-m", files.small, "-")
    convert = [PYTHON, "-m", "pygpt.commands.convert", files.small, "/dev/full"]
    full = ">/dev/full" if os.path.exists("/dev/full") else ">&-"
    cases: list[tuple[list[Any], str, int]] = [
        (small, full, 1),
        (small, ">&-", 1),
        (small, "2>&-", 0),
        (small, "<&-", 0),
        (serving, full, 1),
        (serving, ">&-", 1),
        (serving, "<&-", 0),
        (command("--help"), full, 1),
        (command("--version"), ">&-", 1),
        (chat, full, 1),
        (chat, "2>&-", 0),
        (chat, "<&-", 0),
        (convert, ">&-", 2),
        (convert, "2>&-", 2),
        *((tool, streams, 1) for tool in (evaluate, bench, profile, show) for streams in (full, ">&-")),
        (train, full, 1),
        (train, ">&-", 0),  # what it makes is in files
        *((tool, "2>&-", 0) for tool in (evaluate, bench, profile, train, show)),
        (train, "<&-", 0),
    ]
    for argv, streams, status in files.some(cases, tally.random):
        outcome = run(["/bin/sh", "-c", f'"$@" {streams}', "sh", *argv], b"1 2\n")
        if argv is train:  # it says that nothing will be saved
            outcome.err = outcome.err.removeprefix("pygpt: nothing will be saved: --out names the model to write\n")
            outcome.err = outcome.err.removeprefix("pygpt: 2 steps; nothing was saved\n")
        told = outcome.quiet if status == 0 or streams == "2>&-" else outcome.one_line
        name = " ".join(str(word).rpartition("/")[2] for word in argv[1:4])
        tally.check("streams closed or full", outcome.status == status and told, f"{name} {streams}: {outcome}")


# ------------------------------------------------------------------------------------------------ no memory, no threads


def program(code: str, *arguments: object) -> Outcome:
    """Run a program of the API."""
    return run([PYTHON, "-W", "error", "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code), *arguments])


PREAMBLE = """
import resource, sys, threading
import numpy as np
import pygpt.model
from pygpt import GPT2, PyGPTError, TrainableGPT2
pygpt.cpus.workers_for = lambda threads, *_: threads

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

class Scarce:
    # In this block the address space may grow by `spare` bytes only.
    def __init__(self, spare):
        self.spare = spare
    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used() + self.spare, self.before[1]))
    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.before)

def fails(what, job, error=MemoryError):
    try:
        job()
    except error as found:
        assert str(found).isprintable(), found
        return str(found)
    raise SystemExit(f"{what}: no {error.__name__}")
"""


def no_memory(tally: Tally, files: Files) -> None:
    """No room for the model, the cache, a long prompt, a batch in training: one line, and the object works on."""
    if not os.path.exists("/proc/self/statm"):
        tally.note("no memory: cannot be tried here")
        return
    outcome = program(
        """
        small, long, big = sys.argv[1:]
        model = GPT2.load(long, threads=2)
        wanted = model.logits([1, 2, 3])
        tokens = [i % 211 for i in range(5000)]
        with Scarce(1 << 20):
            fails("load", lambda: GPT2.load(long, threads=1))
            fails("load into memory", lambda: GPT2.load(long, threads=1, mmap=False))
            fails("cache", model.new_cache)
            fails("completion", lambda: list(model.generate(tokens, total=9000)))
            fails("prefix cache", model.new_prefix_cache)
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
            with Scarce(1 << 18):
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
                fails("training", lambda: TrainableGPT2.load(long, threads=2))
            assert np.array_equal(training.forward(ids, ids), losses)
            training.backward()
            assert np.array_equal(training.gradients, gradients)
        print("fine")
        """,
        files.small,
        files.long,
        files.model,
    )
    tally.check("no memory: objects work on", (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", ""), outcome)
    for options, kind in (([], "the map"), (["--no-mmap"], "a copy")):
        limited: list[object] = [PYTHON, "-c", LIMITED]
        argv = ["-m", files.bf16, *options, "-n", 200, 1]
        free = run([*limited, 30, *argv])
        tally.check(f"no memory: {kind}", free.status == 0, free)
        for megabytes in files.some(sorted(tally.random.sample(range(1, 24), 4)), tally.random):
            outcome = run([*limited, megabytes, *argv])
            right = outcome.status == 0 and outcome.out == free.out
            said = outcome.status == 1 and outcome.one_line and ids_of(free)[: len(ids_of(outcome))] == ids_of(outcome)
            tally.check(f"no memory: {kind}", right or said, f"{megabytes} MB: {outcome}")
    with folder() as place:
        train: list[object] = [PYTHON, "-c", LIMITED_TRAINING, TOOLS]
        made = place / "m.bin"
        run_of = ["--data", files.tokens, "--init", files.small, "--steps", 3, *TRAINING, "-T", 128, "--out", made]
        free = run([*train, 999, *run_of])
        tally.check("no memory: training", free.status == 0, free)
        whole = made.read_bytes()
        for megabytes in files.some(sorted(tally.random.sample(range(1, 32), 6)), tally.random):
            outcome = run([*train, megabytes, *run_of, "--force"])
            said = outcome.status == 1 and outcome.err.splitlines()[-1].startswith("pygpt: error: ")
            tally.check("no memory: training", outcome.status == 0 or said, f"{megabytes} MB: {outcome}")
            tally.check("no memory: training", made.read_bytes() == whole, f"{megabytes} MB: another model")


LIMITED = """
import resource, sys
from pygpt.__main__ import main
import pygpt.generation.request, pygpt.model, pygpt.generation.sampling
page = resource.getpagesize()
limit = int(open("/proc/self/statm").read().split()[0]) * page + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""
LIMITED_TRAINING = """
import resource, sys
sys.path.append(sys.argv.pop(1))
import train
import numpy, pygpt.training.trainable, pygpt.generation.request, pygpt.generation.sampling, pygpt.tokenizer
page = resource.getpagesize()
limit = int(open("/proc/self/statm").read().split()[0]) * page + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(train.main(sys.argv[1:]))
"""


def no_threads(tally: Tally, files: Files) -> None:
    """The system refuses a thread: an error that says so, nothing left behind, and fewer threads work."""
    outcome = program(
        """
        name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
        real, allowed = getattr(threading, name), 0

        def counted(*words, **more):
            global allowed
            allowed -= 1
            if allowed < 0:
                raise RuntimeError("can't start new thread")
            return real(*words, **more)

        def refused(job):
            said = fails("threads", job, PyGPTError)
            assert "refused thread" in said and "use fewer threads" in said, said
            assert threading.active_count() == 1, threading.enumerate()

        path = sys.argv[1]
        setattr(threading, name, counted)
        for workers in (2, 3, 8):
            for allowed_now in range(workers - 1):
                allowed = allowed_now
                refused(lambda: GPT2.load(path, threads=workers))
                allowed = allowed_now
                refused(lambda: TrainableGPT2.load(path, threads=workers))
            allowed = workers - 1
            with GPT2.load(path, threads=workers) as model:
                assert list(model.generate([1, 2])) == [int(word) for word in sys.argv[2].split()]
        print("fine")
        """,
        files.small,
        " ".join(map(str, files.answer)),
    )
    tally.check("no threads: in the library", (outcome.status, outcome.out, outcome.err) == (0, b"fine\n", ""), outcome)
    scarce = without_threads()
    if scarce is None:
        tally.note("no threads: RLIMIT_NPROC cannot be tried by this user")
        return
    what = "no threads: RLIMIT_NPROC"
    train = [PYTHON, TOOLS / "train.py", "--data", files.tokens, "--init", files.small, "--steps", 2, *TRAINING]
    blas = environment(OPENBLAS_NUM_THREADS="1")  # NumPy's BLAS starts threads at import, and ends the process else
    counts = [(workers, some) for workers in (2, 4, 8) for some in range(1, workers + 1)]
    for workers, some in files.some(counts, tally.random):
        scarce[1] = f"--nproc={some}"
        outcome = run([*scarce, *command("-m", files.small, "-t", workers, 1, 2)])
        if some == workers:
            tally.check(what, outcome.status == 0 and ids_of(outcome) == files.answer, outcome)
            continue
        refusal = f"refused thread {some + 1} of {workers}" in outcome.err and "use fewer threads" in outcome.err
        tally.check(what, outcome.status == 1 and outcome.one_line and refusal and not outcome.out, outcome)
        outcome = run([*scarce, *train, "-t", workers], env=blas)
        tally.check(f"{what}, training", outcome.status == 1 and "refused thread" in outcome.err.splitlines()[-1], outcome)
    scarce[1] = "--nproc=1"
    outcome = run([*scarce, *train], env=blas)
    tally.check(f"{what}, training", outcome.status == 0, outcome)
    outcome = run([*scarce, PYTHON, ROOT / "chat.py", "-m", EMBEDDED_MODEL, "-t", 1, "-n", 2, "hi"])  # it starts a process
    tally.check(f"{what}, chat.py", outcome.status == 1 and outcome.one_line, outcome)


def without_threads() -> list[str] | None:
    """What to put before a command that is to get so many threads only (word 1 says how many): root, for whom the limit does
    not count, becomes a user who may read root's files. None where this cannot be had."""
    words = ["prlimit", "--nproc=1"]
    if not os.geteuid():
        one = "-all,+dac_override"
        caps = [f"--{kind}={one}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
        words += ["setpriv", f"--reuid={random_user()}", "--clear-groups", *caps]
    probe = "import threading; threading.Thread(target=print).start()"
    try:
        found = run([*words, PYTHON, "-c", probe])
    except OSError:
        return None
    return words if "can't start new thread" in found.err else None


def random_user() -> int:
    """The number of a user who has no processes, so that a limit of threads is this program's alone."""
    return 1_000_000 + os.getpid() % 1_000_000


# ------------------------------------------------------------------------------------------------ files that change


def changing_files(tally: Tally, files: Files) -> None:
    """The model is cut short, deleted, replaced or written over while the command computes with it: it has begun an answer,
    and the next request waits."""
    with GPT2.load(files.long, threads=2) as model:
        answers = [list(model.generate([1], total=TOTAL)), list(model.generate([2]))]
    whole = b"".join(b" ".join(b"%d" % token for token in answer) + b"\n" for answer in answers)
    requests = b'{"tokens": [1], "total": %d}\n2\n' % TOTAL
    cases: list[tuple[str, list[str], int]] = [
        ("nothing", [], 0),
        ("deleted", [], 0),
        ("renamed over", [], 0),
        ("cut short", ["--no-mmap"], 0),
        ("written over", ["--no-mmap"], 0),
        ("cut short", ["-t", "1"], -signal.SIGBUS),
        ("cut short", ["-t", "4"], -signal.SIGBUS),
    ]
    for change, options, status in files.some(cases, tally.random):
        with folder() as place:
            path = place / "model.bin"
            shutil.copy(files.long, path)
            process = start(command("-m", path, *options, "-"), bufsize=0)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(requests[:-2])
            first = process.stdout.read(1)
            make_change(change, path, files.small)
            outcome = finish(process, requests[-2:])
            found = first + outcome.out
        what = f"the model's file: {change}{' with --no-mmap' if '--no-mmap' in options else ''}"
        tally.check(what, outcome.status == status, outcome)
        tally.check(what, found == whole if status == 0 else whole.startswith(found), found[-200:])
        said = outcome.one_line and "SIGBUS" in outcome.err and "--no-mmap" in outcome.err
        tally.check(what, outcome.quiet if status == 0 else said, outcome)


def changing_data(tally: Tally, files: Files) -> None:
    """The token file is cut short while a run of training reads it: one line, and what was saved can be resumed."""
    what = "the training's data: cut short"
    with folder() as place:
        data, state = place / "data.bin", place / "m.state"
        shutil.copy(files.tokens, data)
        options = ["--data", data, "--init", files.small, *TRAINING, "--steps", 10**6, "--out", place / "m.bin"]
        process = start([PYTHON, TOOLS / "train.py", *options])
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        os.truncate(data, 0)
        outcome = finish(process)
        tally.check(what, outcome.status == -signal.SIGBUS and outcome.one_line and "SIGBUS" in outcome.err, outcome)
        shutil.copy(files.tokens, data)
        with TrainingState(state) as found:
            done = found.progress.step
        outcome = run([PYTHON, TOOLS / "train.py", "--resume", state, "--steps", done + 2])
        tally.check(what, outcome.status == 0, outcome)


def make_change(change: str, path: Path, other: str) -> None:
    """Do to a file in use what its name says."""
    if change == "deleted":
        path.unlink()
    elif change == "renamed over":
        shutil.copy(other, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    elif change == "cut short":
        os.truncate(path, 1024)
    elif change == "written over":
        path.write_bytes(bytes(path.stat().st_size))


def useless_files(tally: Tally, files: Files) -> None:
    """Names under which there is no model: one line, status 2, no waiting."""
    with folder() as place:
        (place / "secret.bin").touch(0o000)
        (place / "gone.bin").symlink_to("nowhere.bin")
        os.mkfifo(place / "fifo.bin")
        (place / "half.bin").write_bytes(Path(files.small).read_bytes()[:5000])
        paths = ["", place, "/dev/zero", "nul\tl", *sorted(place.iterdir())]
        for path in paths:
            outcome = run(command("-m", path, 1))
            tally.check("no model under this name", outcome.status == 2 and outcome.one_line, f"{path}: {outcome}")
            outcome = run([PYTHON, "-m", "pygpt.commands.convert", path, place / "out.bin"])
            tally.check("no model under this name", outcome.status == 2 and outcome.one_line, f"convert {path}: {outcome}")


SCENARIOS: list[Callable[[Tally, Files], None]] = [
    kills,
    training_goes_on,
    full_disks,
    full_streams,
    no_memory,
    no_threads,
    changing_files,
    changing_data,
    useless_files,
]


def run_faults(tally: Tally, seconds: float | None, count: int | None) -> None:
    """Every scenario once, then again: `count` rounds, as many as there is time for, or ROUNDS."""
    end = None if seconds is None else time.monotonic() + seconds
    rounds = count or (ROUNDS if seconds is None else 10**9)
    with folder() as place, Files(place) as files:
        for number in range(rounds):
            for scenario in SCENARIOS:
                if number == 0 or end is None or time.monotonic() < end:
                    scenario(tally, files)
            tally.runs += 1
            if end is not None and time.monotonic() >= end:
                return
