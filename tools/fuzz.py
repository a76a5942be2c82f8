#!/usr/bin/env python3
"""Fuzzing: every reader, command and call of pygpt, fed with what it does not expect.

    python tools/fuzz.py                                   all targets, 1,000 executions each (slow ones fewer)
    python tools/fuzz.py checkpoint serve --seconds 600    two of them, for ten minutes each
    python tools/fuzz.py --total-seconds 3600 --seed 7     all of them, an hour in all
    python tools/fuzz.py checkpoint --repeat FILE          one input again, with all that is said about it
    python tools/fuzz.py --coverage-min 95                 and fail unless 95 % of each reader's branches are taken
    python tools/fuzz.py safetensors --atheris             libFuzzer chooses the inputs, where atheris is installed

Inputs are sound ones of tiny shapes, those of tests/corpus/, and mutations of both: of bytes, of header fields, of JSON. With
some of them the system fails, too: calls that end with an error, a full disk, a file that another process changes. An input
that takes a new way through pygpt's Python code (pairs of lines), or is answered with a new kind of message, is kept and
mutated further. The same seed and number of executions give the same inputs; where branches are measured (--coverage), new ways
are not seen meanwhile, and fewer inputs are kept. The last line says how many executions there were in all, of which seed, in
which time, how many findings, and which share of the readers' branches was taken where that was asked for.

A finding is an exception that is no PyGPTError, a message that is no clear line, a process that dies, takes longer than
--limit or 3 GiB more memory, an exit status or stderr that commands do not promise, a half-written file, and every
disagreement with the parsers of tools/fuzzing/reference.py or with a second way to the same result. Each target runs in a
child process; a finding's input is saved in --output.

Exit status: 0; 1 when there is a finding, or too little coverage; 2 for bad arguments; 130 after Ctrl-C.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; then it is main()'s

import argparse
import faulthandler
import hashlib
import importlib
import importlib.util
import json
import os
import re
import resource
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import FrameType
from typing import IO, Any, NamedTuple, NoReturn

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
# This checkout's pygpt; and tools/ last, for its names shadow modules of the standard library.
sys.path[:] = [*(path for path in sys.path if Path(path or ".").resolve() != TOOLS), str(ROOT), str(TOOLS)]

from pygpt.commands.console import HelpFormatter, Parser, say, status_of  # noqa: E402
from pygpt.errors import InputError, PyGPTError  # noqa: E402

CORPUS = ROOT / "tests" / "corpus"
NAMES = (
    "checkpoint", "safetensors", "convert", "shard", "tokenizer", "debug-state", "examples", "state", "text",
    "cli", "command", "serve", "shards", "eval", "train", "chat",
    "calls", "process", "terminal",
)  # fmt: skip
SLOW = {
    "process": 100,
    "terminal": 250,
    "calls": 2,
    "serve": 2,
    "train": 4,
    "eval": 4,
    "shards": 4,
    "chat": 2,
}  # executions of the others to one of these
EXECUTIONS = 1000
LONGEST_INPUT = 10.0  # seconds of one that count: a machine may be stopped meanwhile
MEMORY_BYTES = 3 << 30  # beyond what a child has when it is ready
READERS = (
    "checkpoint", "safetensors_file", "huggingface", "data", "llmc", "tokenizer", "state", "convert",
    "__main__", "cli", "stop", "prefix",
)  # fmt: skip


class Reply(NamedTuple):
    """What became of one input; `ways` are pairs of lines that this child had not run before."""

    kind: str  # ok, refused or finding
    text: str
    ways: list[str]


class Found(NamedTuple):
    """A finding: what, and where its input is."""

    text: str
    path: Path


class Result(NamedTuple):
    """A target's figures."""

    executions: int
    corpus: int
    behaviours: int
    findings: list[Found]
    seconds: float


class Branches(NamedTuple):
    """A reader's branches: how many were taken, of how many; the others as LINE->LINE (-: a function's end). A branch is what
    coverage.py calls so: a line that has more than one line to follow it, and one of those."""

    taken: int
    of: int
    left: str

    @property
    def share(self) -> float:
        """Percent; all of it where there is nothing."""
        return 100 * self.taken / self.of if self.of else 100.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    found: list[int] = []
    return status_of(lambda: found.append(run(build_parser().parse_args(arguments)))) or found[0]


def build_parser() -> argparse.ArgumentParser:
    """The options and their help."""
    parser = Parser(
        prog="fuzz.py",
        usage="python tools/fuzz.py [TARGET ...] [--seconds N | --executions N] [options]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help=f"{', '.join(NAMES)} (default: all)")
    add("--seconds", metavar="N", help="for so long, each target")
    add("--total-seconds", metavar="N", help="for so long in all, the same for each target")
    add("--executions", metavar="N", help=f"so many inputs for each target (default {EXECUTIONS})")
    add("--seed", metavar="S", default="1", help="of the mutations (default 1)")
    add("--limit", metavar="N", default="150", help="seconds after which an input hangs (default 150)")
    add("-o", "--output", metavar="DIR", default="fuzz-findings", help="where inputs of findings go (default fuzz-findings)")
    add("--repeat", metavar="FILE", help="try this input once")
    add("--keep", action="store_true", help="add an input for each new kind of answer to tests/corpus/, made short")
    add("--coverage", action="store_true", help="say which share of each reader's branches is taken (needs coverage)")
    add("--coverage-min", metavar="PERCENT", help="the same, and fail where it is less for one of them")
    add("--atheris", action="store_true", help="let libFuzzer choose the inputs of one target (needs atheris)")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def run(options: argparse.Namespace) -> int:
    """Check the arguments, then fuzz. Returns the exit status."""
    if unknown := [name for name in options.targets if name not in NAMES]:
        raise InputError(f"target {unknown[0][:40]!r} is unknown: it must be one of {', '.join(NAMES)}")
    times = {"--seconds": options.seconds, "--total-seconds": options.total_seconds, "--executions": options.executions}
    if len(both := [name for name, value in times.items() if value is not None]) > 1:
        raise InputError(f"{' and '.join(both)} were both given: give one")
    executions = EXECUTIONS if options.executions is None else whole("--executions", options.executions)
    limit, seed = whole("--limit", options.limit), whole("--seed", options.seed)
    least = 0 if options.coverage_min is None else whole("--coverage-min", options.coverage_min)
    if least > 100:
        raise InputError(f"--coverage-min is {least}: it must be 100 or less")
    if options.child:
        serve(options.targets[0])
        return 0
    names = options.targets or NAMES
    seconds: float | None = None if options.seconds is None else whole("--seconds", options.seconds)
    if options.total_seconds is not None:
        seconds = whole("--total-seconds", options.total_seconds) / max(1, len(names))
    if (options.repeat is not None or options.atheris) and len(options.targets) != 1:
        raise InputError("--repeat and --atheris take one TARGET")
    if options.atheris:
        run_atheris(names[0], seconds, executions, seed)
    if options.repeat is not None:
        return repeat(names[0], Path(options.repeat), limit)
    if (options.coverage or least) and importlib.util.find_spec("coverage") is None:
        raise InputError("--coverage needs the package coverage: python -m pip install coverage")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        measured = Path(work) / "coverage" if options.coverage or least else None
        results = []
        for name in names:
            fuzzer = Fuzzer(name, seed, limit, Path(options.output), measured=measured, keep=options.keep)
            with fuzzer:
                results.append(fuzzer.run(seconds, max(1, executions // SLOW.get(name, 1))))
            report(name, seed, results[-1])
        reached, low = ("", 0) if measured is None else report_coverage(measured_branches(measured), least)
    findings = sum(len(result.findings) for result in results)
    took = sum(result.seconds for result in results)
    print(
        f"in all: {len(results)} targets, {sum(result.executions for result in results)} executions, seed {seed}, "
        f"{took:.0f} seconds, findings {findings}{reached}"
    )
    return max(low, int(findings > 0))


def whole(name: str, given: str) -> int:
    """A whole number of an option."""
    if not (given.isascii() and given.isdigit() and len(given) < 16):
        raise InputError(f"{name} is {given[:40]!r}: it must be a whole number")
    return int(given)


def report(name: str, seed: int, result: Result) -> None:
    """Say what a target gave."""
    rate = result.executions / max(result.seconds, 1e-9)
    print(
        f"{name:12} {result.executions:8} executions  seed {seed}  corpus {result.corpus:4}  "
        f"new behaviours {result.behaviours:4}  findings {len(result.findings)}  ({rate:.0f}/s)",
        flush=True,
    )
    for found in result.findings:
        print(f"  finding: {shortened(found.text)}\n  again: python tools/fuzz.py {name} --repeat {found.path}", flush=True)


def shortened(text: str) -> str:
    """A finding's text without the middle of a long one; --repeat says it all."""
    return text if len(text) <= 800 else f"{text[:200]} [...] {text[-600:]}"


def repeat(name: str, path: Path, limit: int) -> int:
    """Try one input and print everything about it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    with Child(name, limit) as child:
        reply = child.attempt(data)
    print(f"{reply.kind}: {reply.text}")
    return 1 if reply.kind == "finding" else 0


# ------------------------------------------------------------------------------------------------ the loop


class Fuzzer:
    """The loop over one target: choose an input, change it, try it, keep it if it shows something new."""

    def __init__(
        self, name: str, seed: int, limit: int, output: Path, *, measured: Path | None = None, keep: bool = False
    ) -> None:
        self.name, self._output, self._keep = name, output, keep
        self._random = Random(f"{seed} {name}")  # a str seeds by its bytes, whatever the hash seed
        self._child = Child(name, limit, measured)
        self._ways: set[str] = set()
        self._labels: dict[str, int] = {}
        self._corpus: list[bytes] = []
        self._findings: dict[str, Found] = {}
        self.executions, self.seconds = 0, 0.0  # what was tried, and how long that took

    def __enter__(self) -> "Fuzzer":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.end()

    def run(self, seconds: float | None, executions: int) -> Result:
        """Try the seeds, the corpus, then mutations, until the time or the number of executions is up."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            target = new_target(self.name, Path(folder))
            first = [*target.seeds(), *stored(self.name)]
            for data in first:
                self._try(data, kept=True)
            known = len(self._labels) + len(self._ways)
            while (self.seconds < seconds) if seconds is not None else (self.executions < executions):
                newest = max(self._random.randrange(len(self._corpus)), self._random.randrange(len(self._corpus)))
                other = self._random.choice(self._corpus)
                self._try(target.mutate(self._random, self._corpus[newest], other))
        new = len(self._labels) + len(self._ways) - known
        findings = list(self._findings.values())
        return Result(self.executions, len(self._corpus), new, findings, self.seconds)

    def _try(self, data: bytes, *, kept: bool = False) -> None:
        begin = time.monotonic()
        reply = self._child.attempt(data)
        self.seconds += min(time.monotonic() - begin, LONGEST_INPUT)
        self.executions += 1
        if reply.kind == "finding":
            self._save(data, reply.text)
        label = f"{reply.kind} {reply.text}"[:200]
        new_label = label not in self._labels
        self._labels[label] = self._labels.get(label, 0) + 1
        new_ways = not self._ways.issuperset(reply.ways)
        self._ways.update(reply.ways)
        if kept or ((new_label or new_ways) and reply.kind != "finding" and len(self._corpus) < 5000):
            self._corpus.append(data)
        if self._keep and (new_label or new_ways) and not kept and reply.kind != "finding":
            self._store(self._shortened(data, reply) if new_label else data)

    def _save(self, data: bytes, text: str) -> None:
        """Save a finding's input, the first of its kind."""
        kind = kind_of(text)
        if kind in self._findings:
            return
        self._output.mkdir(parents=True, exist_ok=True)
        path = self._output / f"{self.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        self._findings[kind] = Found(text, path)

    def _shortened(self, data: bytes, reply: Reply) -> bytes:
        """What is left of an input when pieces are taken out as long as it is answered alike."""
        size = len(data)
        while size > 1:
            size //= 2
            at = 0
            while at < len(data) and len(data) > 1:
                shorter = data[:at] + data[at + size :]
                again = self._child.attempt(shorter)
                if again[:2] == reply[:2]:
                    data = shorter
                else:
                    at += size
            if len(data) > 300 * size:
                break
        return data

    def _store(self, data: bytes) -> None:
        """Put an input into tests/corpus/."""
        folder = CORPUS / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def kind_of(text: str) -> str:
    """What findings of one kind share: the last place in pygpt and the kind of the last line."""
    from fuzzing.target import skeleton

    places = re.findall(r'pygpt/(\w+\.\w+)", line \d+, in (\w+)', text)
    return f"{places[-1:]} {skeleton(text.strip().splitlines()[-1])[:60]}"


def stored(name: str) -> list[bytes]:
    """The inputs of a target in tests/corpus/."""
    folder = CORPUS / name
    return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []


def new_target(name: str, folder: Path) -> Any:
    """A target by its name. The modules are imported here, once what measures them runs."""
    from fuzzing.calls import CallsTarget
    from fuzzing.commands import COMMANDS
    from fuzzing.files import FILES
    from fuzzing.programs import PROGRAMS

    return next(target for target in (*FILES, *COMMANDS, *PROGRAMS, CallsTarget) if target.name == name)(folder)


# ------------------------------------------------------------------------------------------------ the child process


class Child:
    """A child process that tries inputs, started anew after each that ends it, and now and then."""

    def __init__(self, name: str, limit: float, measured: Path | None = None, command: Sequence[str] = ()) -> None:
        self._name, self._limit, self._measured = name, limit, measured
        self._command = command or [sys.executable, str(Path(__file__).resolve()), "--child", name]
        self._process: subprocess.Popen[bytes] | None = None
        self._left = 0  # inputs until it is started anew
        self._said: IO[bytes] | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _start(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        if self._measured:
            environment["FUZZ_COVERAGE"] = str(self._measured)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (end() closes it)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        ready = self._read_line(self._limit)
        if ready is None or not ready.startswith(b"ready "):
            raise PyGPTError(f"the child for {self._name} does not start: {self._heard()[-300:]}")
        self._left = int(ready.split()[1])

    def attempt(self, data: bytes) -> Reply:
        """Have an input tried."""
        if self._left == 0:
            self.end()
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._left -= 1
        try:
            send(self._process.stdin, struct.pack("<I", len(data)) + data)
            line = self._read_line(self._limit)
        except BrokenPipeError:
            line = b""
        if line is None:
            self._kill()
            return Reply("finding", f"no end after {self._limit} seconds", [])
        if not line:
            status = self._process.wait()
            heard = self._heard()
            self.end()
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            return Reply("finding", f"the process ended with {how}: {heard[-2000:]}", [])
        return Reply(*json.loads(line))

    def _read_line(self, limit: float) -> bytes | None:
        """A line from the child; what there is of it if the child ends, None if the time is up."""
        assert self._process is not None
        assert self._process.stdout is not None
        line, left = b"", limit
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                while not selector.select(1):  # seconds are counted one by one: a machine that is stopped meanwhile adds one
                    left -= 1
                    if left <= 0:
                        return None
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    return b""
                line += piece
        return line

    def _heard(self) -> str:
        """What the child wrote to its stderr."""
        assert self._said is not None
        self._said.seek(0)
        return self._said.read().decode("utf-8", "replace")

    def _kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """End the child by ending its input."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._said is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._said.close()
        self._process = None


def send(pipe: IO[bytes], data: bytes) -> None:
    """Write all bytes to an unbuffered pipe."""
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


def serve(name: str) -> None:
    """The child: try each input that comes on stdin, and answer with a line."""
    faulthandler.enable()
    replies, requests = os.fdopen(os.dup(1), "wb", 0), os.fdopen(os.dup(0), "rb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    measurement = start_coverage()
    from fuzzing.target import attempt

    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        folder = home / "work"
        folder.mkdir()
        target = new_target(name, folder)
        target.open()
        limit_memory()
        ways = Ways(traced=measurement is None)
        replies.write(f"ready {target.batch}\n".encode())
        while head := requests.read(4):
            data = requests.read(struct.unpack("<I", head)[0])
            with ways:
                kind, text = attempt(target, data)
            send(replies, json.dumps([kind, text, ways.take()]).encode() + b"\n")
        target.close()
    finally:
        os.chdir("/")
        shutil.rmtree(home, ignore_errors=True)
        if measurement is not None:
            measurement.stop()
            measurement.save()


def limit_memory() -> None:
    """Let the process have so much more address space than it has now, where the system says how much that is."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return  # not Linux: RLIMIT_AS would not hold there
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Ways:
    """Notes which lines of pygpt follow each other, in a `with` block."""

    def __init__(self, *, traced: bool) -> None:
        self._traced = traced
        self._seen: set[tuple[str, int, int]] = set()
        self._new: list[str] = []
        self._of_pygpt: dict[str, str] = {}

    def __enter__(self) -> None:
        if self._traced:
            sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        if self._traced:
            sys.settrace(None)

    def take(self) -> list[str]:
        """The pairs that are new since the last call."""
        new, self._new = self._new, []
        return new

    def _call(self, frame: FrameType, event: str, arg: object) -> Callable[[FrameType, str, object], Any] | None:
        file = frame.f_code.co_filename
        name = self._of_pygpt.get(file)
        if name is None:
            path = Path(file)
            name = self._of_pygpt[file] = path.name if path.parent == ROOT / "pygpt" else ""
        if not name:
            return None
        before = frame.f_lineno

        def line(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal before
            way = name, before, frame.f_lineno
            if way not in self._seen:
                self._seen.add(way)
                self._new.append(f"{name}:{before}:{frame.f_lineno}")
            before = frame.f_lineno
            return line

        return line


# ------------------------------------------------------------------------------------------------ coverage, atheris


def start_coverage() -> Any:
    """Measure this process if it was asked to be, before pygpt's readers are imported."""
    if not (path := os.environ.get("FUZZ_COVERAGE")):
        return None
    coverage = importlib.import_module("coverage")
    measurement = coverage.Coverage(
        data_file=path, data_suffix=True, branch=True, source=[str(ROOT / "pygpt")], config_file=False
    )
    measurement.start()
    return measurement


def measured_branches(path: Path) -> dict[str, Branches]:
    """What the children have measured, by reader."""
    coverage = importlib.import_module("coverage")
    measurement = coverage.Coverage(data_file=str(path), branch=True, source=[str(ROOT / "pygpt")], config_file=False)
    measurement.combine([str(path.parent)])
    report = path.with_name("report.json")
    measurement.json_report(outfile=str(report))
    files = {Path(file).stem: entry for file, entry in json.loads(report.read_bytes())["files"].items()}
    found = {}
    for name in READERS:
        summary, missing = files[name]["summary"], files[name]["missing_branches"]
        left = " ".join(f"{a}->{b if b > 0 else '-'}" for a, b in missing)
        found[name] = Branches(summary["covered_branches"], summary["num_branches"], left)
    return found


def report_coverage(found: dict[str, Branches], least: float) -> tuple[str, int]:
    """Print which share of each reader's branches was taken. Returns that of all in words, and the exit status: 1 if one reader
    is below `least` percent."""
    print(f"{'reader':18} {'branches':>8} {'taken':>8}  not taken")
    for name, branches in found.items():
        print(f"{name:18} {branches.of:8} {branches.share:6.1f} %  {branches.left}".rstrip())
    low = [(name, branches.share) for name, branches in found.items() if branches.share < least]
    for name, share in low:
        say(f"error: {name}: {share:.1f} % of its branches are taken, fewer than {least} %")
    everything = Branches(sum(one.taken for one in found.values()), sum(one.of for one in found.values()), "")
    lowest = min(one.share for one in found.values())
    return f", {everything.share:.1f} % of the readers' branches, {lowest:.1f} % of the lowest one's", int(bool(low))


def run_atheris(name: str, seconds: float | None, executions: int, seed: int) -> NoReturn:
    """Let libFuzzer call a target, its own mutations and ours. Ends the process."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        raise InputError("--atheris needs the package atheris: python -m pip install atheris") from None
    with atheris.instrument_imports(include=["pygpt"]):
        from fuzzing.target import attempt

        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        (folder / "work").mkdir()
        target = new_target(name, folder / "work")
    target.open()

    def try_one(data: bytes) -> None:
        kind, text = attempt(target, data)
        if kind == "finding":
            raise AssertionError(text)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        changed = target.mutate(random, data, data) if random.random() < 0.8 else atheris.Mutate(data, most)
        return bytes(changed[:most])

    corpus = folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate([*target.seeds(), *stored(name)]):
        (corpus / str(i)).write_bytes(data)
    end = f"-runs={executions}" if seconds is None else f"-max_total_time={seconds:.0f}"
    atheris.Setup([sys.argv[0], end, f"-seed={seed}", "-max_len=131072", str(corpus)], try_one, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("libFuzzer has returned")


if __name__ == "__main__":
    sys.exit(main())
