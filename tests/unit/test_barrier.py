"""The native barrier (sync.h): every interleaving of two and three workers, and ThreadSanitizer on real threads.

The search runs sync.h itself. Its functions are translated to Python generators that yield each atomic operation. In every
state that can be reached, every worker may take the next step. The search has two barriers one after the other, any number
of spins, wake-ups with and without a reason, workers that fail and abort, and an abort from outside at any moment. It proves
that

- workers pass a barrier only after all have arrived, and a worker leaves early only if the step was aborted;
- there are no deadlocks, lost wake-ups or endless loops: all workers leave, also after an abort;
- at the end the count of sleepers is 0 and the barrier is at rest: after reset(), the next step begins like the first.

The same search finds each of a dozen plausible mistakes, planted in the text of sync.h. So the test can fail.

The search assumes sequential consistency: all workers agree on one order of all atomic operations. All operations of sync.h
except one are sequentially consistent (C11 7.17.3). This is necessary, because two words are involved: a sleeper counts
itself and then reads `phase`; the opener changes `phase` and then reads `sleepers`. With only acquire and release, both
could read the old value, and the wake-up would be lost.

The exception is the spinner's load of `phase`, an acquire. It decides only whether phase has moved, and that word only
grows. Reading an old value is like reading earlier, which the search includes. If it reads the new value, it synchronises
with the opener's fetch_add, which comes after all arrivals. All these are read-modify-writes of one word, and each acquires
the release of the previous one. So memory written before a wait is visible after it. ThreadSanitizer checks this on plain
memory (barrier_harness.c), and reports a relaxed load."""

import os
import re
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from running import execute

ROOT = Path(__file__).resolve().parents[2]
SYNC = (ROOT / "pygpt" / "csrc" / "sync.h").read_text()

# ---------------------------------------------------------------------------------------------------------------------
# sync.h as Python

FUTEX, CONDITION = "futex", "condition"  # how a worker sleeps: on Linux, elsewhere

STATEMENTS = [  # C, Python; what none of them matches whole is refused
    (r"uint32_t (\w+) = (.+);", r"\1 = \2"),
    (r"return (?:\(int\))?(.+);", r"return \1"),
    (r"(.+);", r"\1"),
]
EXPRESSIONS = [
    (r"atomic_load\(&b->(\w+)\)", r'(yield "load", "\1", 0)'),
    (r"atomic_load_explicit\(&b->(\w+), memory_order_acquire\)", r'(yield "load", "\1", 0)'),
    (r"atomic_store\(&b->(\w+), (\w+)\)", r'(yield "store", "\1", \2)'),
    (r"atomic_fetch_add\(&b->(\w+), (\w+)\)", r'(yield "add", "\1", \2)'),
    (r"atomic_fetch_sub\(&b->(\w+), (\w+)\)", r'(yield "add", "\1", -\2)'),
    (r"sleep_while\(b, (\w+)\)", r"(yield from sleep_while(\1))"),
    (r"wake_all\(b\)", r"(yield from wake_all())"),
    (r"(barrier_\w+)\(b\)", r"(yield from \1())"),
    (r"pthread_mutex_(lock|unlock)\(&b->mutex\)", r'(yield "\1", "", 0)'),
    (r"pthread_cond_wait\(&b->cond, &b->mutex\)", r'((yield "wait", "", 0), (yield "lock", "", 0))'),
    (r"pthread_cond_broadcast\(&b->cond\)", r'(yield "wake", "", 2**31 - 1)'),
    (r"pthread_cond_signal\(&b->cond\)", r'(yield "wake", "", 1)'),
    (r"syscall\(SYS_futex, &b->phase, FUTEX_WAIT_PRIVATE, (.+), NULL, NULL, 0\)", r'(yield "futex", "", \1)'),
    (r"syscall\(SYS_futex, &b->phase, FUTEX_WAKE_PRIVATE, (\w+), NULL, NULL, 0\)", r'(yield "wake", "", \1)'),
    (r"INT_MAX", r"2**31 - 1"),
    (r"pause_cpu\(\)", "None"),
    (r"b->parties", "parties"),
]
SIGNATURES = {"sleep_while": "phase", "wake_all": "", "barrier_open": "", "barrier_abort": "", "barrier_wait": ""}


def expression(c: str) -> str:
    """A C expression of sync.h as Python."""
    for pattern, python in EXPRESSIONS:
        c = re.sub(pattern, python, c)
    assert not re.search(r"->|&|(?<!yield from )\b\w+\(", c), f"no translation for {c}"
    return c


def statement(c: str, depth: int) -> list[str]:
    """One line of C, braces apart, as lines of Python."""
    indent = "    " * depth
    if match := re.fullmatch(r"(if|while) \((.+)\) (\{|[^{]+;)", c):
        head, rest = f"{indent}{match[1]} {expression(match[2])}:", match[3]
        return [head] if rest == "{" else [head, *statement(rest, depth + 1)]
    if re.fullmatch(r"for \(uint32_t i = 0; i < b->spins; i\+\+\) \{", c):
        return [f"{indent}for i in range(spins):"]
    for pattern, python in STATEMENTS:
        if match := re.fullmatch(pattern, c):
            return [indent + expression(match.expand(python))]
    raise AssertionError(f"no translation for {c}")


def function(name: str, text: str) -> str:
    """One function of sync.h as a Python generator."""
    found = re.search(rf"^static [^\n]*\b{name}\([^)]*\) \{{(?:\n(.*?)^\}}| ([^\n]*) \}}$)", text, re.MULTILINE | re.DOTALL)
    assert found, f"sync.h has no {name}()"
    lines, depth = [f"def {name}({SIGNATURES[name]}):"], 1
    for line in (found[1] or found[2]).splitlines():
        c = re.sub(r"\s*/\*.*?\*/", "", line).strip()
        if c == "}":
            depth -= 1
        elif c:
            lines += statement(c, depth)
            depth += c.endswith("{")
    return "\n".join(lines)


PROCESSES = """
def worker():
    for k in range(barriers):
        if (yield "work", "", 0):  # its share, or a failure
            yield from barrier_abort()
            return
        if (yield from barrier_wait()):
            yield "left", "", 0
            return
        yield "passed", "", 0

def outsider():
    yield from barrier_abort()
"""


class Op(NamedTuple):
    """The next operation of a process, as one indivisible step."""

    name: str
    word: str
    value: int


Run = Generator[tuple[str, str, int], int, int | None]


def program(text: str, sleep: str, **constants: int) -> dict[str, Callable[[], Run]]:
    """Return the two kinds of processes: a worker of a step, and a process that aborts the step from outside."""
    platforms = re.search(r"#if defined\(__linux__\)\n(static.*?)\n#else\n(.*?)\n#endif\n", text, re.DOTALL)
    assert platforms
    sleeping = platforms[1 if sleep == FUTEX else 2]
    source = [function(name, sleeping) for name in ("sleep_while", "wake_all")]
    source += [function(name, text) for name in ("barrier_open", "barrier_abort", "barrier_wait")]
    names: dict[str, Any] = dict(constants)
    exec("\n".join([*source, PROCESSES]), names)
    return {name: names[name] for name in ("worker", "outsider")}


# ---------------------------------------------------------------------------------------------------------------------
# The search


class Words(NamedTuple):
    """The shared words."""

    arrived: int = 0
    phase: int = 2**32 - 1  # it wraps within the first barrier
    sleepers: int = 0
    aborted: int = 0
    mutex: int = 0


class Local(NamedTuple):
    """The local state of a process. Two histories that lead to the same state are equal."""

    kind: str
    place: tuple[object, ...]  # of each frame: line and variables
    op: Op | None  # None: it has ended
    worked: int  # shares of work done: barriers come to
    passed: int
    left: bool  # it has seen that the step is aborted


State = tuple[Words, tuple[tuple[int, bool], ...]]  # each process: number of its Local, asleep; sorted: workers are alike


class Flaw(AssertionError):
    """What the search found."""


class Search:
    """Every state that `parties` workers can reach."""

    def __init__(
        self, text: str = SYNC, *, sleep: str, parties: int, spins: int, barriers: int = 2, failures: bool, outsider: bool
    ) -> None:
        self.kinds = program(text, sleep, parties=parties, spins=spins, barriers=barriers)
        self.barriers = barriers
        self.failures = failures
        self.locals: list[Local] = []
        self.histories: list[list[int]] = []
        self.numbers: dict[Local, int] = {}
        self.moves: dict[tuple[int, int], int] = {}
        workers = [self.arrive("worker", [])] * parties
        self.first: State = (Words(), tuple(sorted((n, False) for n in [*workers, *[self.arrive("outsider", [])] * outsider])))

    def arrive(self, kind: str, history: list[int]) -> int:
        """The number of the Local that a process reaches when its steps gave the results of `history`."""
        run, results = self.kinds[kind](), iter(history)
        worked = passed = 0
        left = False
        try:
            op = Op(*next(run))
            while True:
                if op.name in ("passed", "left"):
                    passed, left, result = passed + (op.name == "passed"), op.name == "left", 0
                elif (result := next(results, -1)) < 0:
                    break
                worked += op.name == "work" and not result
                op = Op(*run.send(result))
            local = Local(kind, tuple(places(run)), op, worked, passed, left)
        except StopIteration:
            local = Local(kind, (), None, worked, passed, left)
        if local not in self.numbers:
            self.numbers[local] = len(self.locals)
            self.locals.append(local)
            self.histories.append(history)
        return self.numbers[local]

    def move(self, number: int, result: int) -> int:
        """Where a process goes from a Local when its operation gives `result`."""
        if (number, result) not in self.moves:
            self.moves[number, result] = self.arrive(self.locals[number].kind, [*self.histories[number], result])
        return self.moves[number, result]

    def successors(self, state: State) -> Iterator[tuple[bool, State]]:
        """Yield each state after one more step, and whether it needs a wake-up without a reason."""
        words, processes = state
        for i, (number, asleep) in enumerate(processes):
            op = self.locals[number].op
            if op is None or (i and processes[i] == processes[i - 1]):
                continue
            if asleep:
                yield True, (words, put(processes, i, self.move(number, 0)))
            elif op.name in ("load", "store", "add"):
                old = getattr(words, op.word)
                new = {"load": old, "store": op.value, "add": (old + op.value) % 2**32}[op.name]
                yield False, (words._replace(**{op.word: new}), put(processes, i, self.move(number, old)))
            elif op.name == "work":
                for failed in range(1 + self.failures):
                    yield False, (words, put(processes, i, self.move(number, failed)))
            elif op.name == "lock":
                if not words.mutex:
                    yield False, (words._replace(mutex=1), put(processes, i, self.move(number, 0)))
            elif op.name == "unlock":
                yield False, (words._replace(mutex=0), put(processes, i, self.move(number, 0)))
            elif op.name == "wait":  # a condition variable lets go of the mutex and sleeps in one step
                yield False, (words._replace(mutex=0), put(processes, i, number, asleep=True))
            elif op.name == "futex":  # Linux compares and sleeps in one step
                sleeps = words.phase == op.value
                yield False, (words, put(processes, i, number if sleeps else self.move(number, 0), asleep=sleeps))
            elif op.name == "wake":
                woken = [j for j, (_, asleep) in enumerate(processes) if asleep][: op.value]
                after = [(self.move(n, 0), False) if j in woken else (n, asleep) for j, (n, asleep) in enumerate(processes)]
                yield False, (words, put(after, i, self.move(number, 0)))
            else:
                raise AssertionError(op)

    def run(self) -> int:
        """Visit every state; return how many there are. Raises Flaw."""
        numbers, todo = {self.first: 0}, deque([self.first])
        edges: list[list[int]] = []  # from each state; wake-ups without a reason are left out, because they may never come
        while todo:
            state = todo.popleft()
            self.check(state)
            edges.append([])
            for spurious, after in self.successors(state):
                if after not in numbers:
                    numbers[after] = len(numbers)
                    todo.append(after)
                if not spurious:
                    edges[-1].append(numbers[after])
            if not edges[-1]:
                self.check_end(state)
        check_loops(edges)
        return len(edges)

    def check(self, state: State) -> None:
        """Check the state at any moment."""
        workers = [local for number, _ in state[1] if (local := self.locals[number]).kind == "worker"]
        if max(worker.passed for worker in workers) > min(worker.worked for worker in workers):
            raise Flaw("a worker passed the barrier before all had come")
        if any(worker.left for worker in workers) and not state[0].aborted:
            raise Flaw("a worker left a step that was not aborted")

    def check_end(self, state: State) -> None:
        """Check a state in which all processes have stopped."""
        words, processes = state
        if any(self.locals[number].op is not None for number, _ in processes):
            raise Flaw("deadlock")
        if words.sleepers or words.mutex or (words.arrived and not words.aborted):
            raise Flaw(f"the barrier is not at rest: {words}")
        if not words.aborted and any(self.locals[number].passed != self.barriers for number, _ in processes):
            raise Flaw("a worker left early")


def places(run: Run) -> Iterator[object]:
    """Yield the places of a generator and of the generators that it waits for."""
    inner: Any = run
    while inner is not None:
        yield inner.gi_code.co_name, inner.gi_frame.f_lasti, tuple(sorted(inner.gi_frame.f_locals.items()))
        inner = inner.gi_yieldfrom


def put(processes: Sequence[tuple[int, bool]], i: int, number: int, *, asleep: bool = False) -> tuple[tuple[int, bool], ...]:
    """The processes with the i-th elsewhere."""
    return tuple(sorted([*processes[:i], (number, asleep), *processes[i + 1 :]]))


def check_loops(edges: Sequence[Sequence[int]]) -> None:
    """Raises Flaw where states lead to each other in a circle."""
    ways = Counter(after for afters in edges for after in afters)
    free = [state for state in range(len(edges)) if not ways[state]]
    for state in free:  # grows
        for after in edges[state]:
            ways[after] -= 1
            if not ways[after]:
                free.append(after)
    if len(free) < len(edges):
        raise Flaw("endless loop")


# ---------------------------------------------------------------------------------------------------------------------
# Every interleaving

SLEEPS = (FUTEX, CONDITION)


@pytest.fixture(scope="module")
def searched(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """How many states each search has reached; said at the end."""
    found: list[int] = []
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nbarrier: {sum(found)} states reached in {len(found)} searches, all there are (no seed)")


@pytest.mark.parametrize("sleep", SLEEPS)
@pytest.mark.parametrize("spins", [0, 1])  # one load is enough: a load without a change is a pause
@pytest.mark.parametrize("outsider", [False, True])
@pytest.mark.parametrize("parties", [2, 3])
def test_every_interleaving(searched: list[int], parties: int, outsider: bool, spins: int, sleep: str) -> None:
    search = Search(sleep=sleep, parties=parties, spins=spins, barriers=5 - parties, failures=True, outsider=outsider)
    states = search.run()
    searched.append(states)
    assert states > 500
    reached = search.locals
    assert any(local.passed == search.barriers for local in reached)
    assert any(local.left for local in reached)
    assert any(local.op and local.op.name == ("futex" if sleep == FUTEX else "wait") for local in reached)


class Mistake(NamedTuple):
    """A mistake to plant in sync.h, and the flaw that the search then reports."""

    name: str
    old: str
    new: str
    flaw: str
    sleeps: Sequence[str] = SLEEPS


EARLY = "a worker passed the barrier before all had come"
MISTAKES = [
    Mistake(
        "phase read after arriving",
        """\
    uint32_t phase = atomic_load(&b->phase);
    if (atomic_load(&b->aborted)) return 1; /* read after phase: a later abort changes phase */
    if (atomic_fetch_add(&b->arrived, 1) + 1 == b->parties) {
""",
        """\
    if (atomic_load(&b->aborted)) return 1;
    uint32_t before = atomic_fetch_add(&b->arrived, 1);
    uint32_t phase = atomic_load(&b->phase);
    if (before + 1 == b->parties) {
""",
        "deadlock",
    ),
    Mistake(
        "aborted read before phase",
        "    uint32_t phase = atomic_load(&b->phase);\n    if (atomic_load(&b->aborted)) return 1;",
        "    if (atomic_load(&b->aborted)) return 1;\n    uint32_t phase = atomic_load(&b->phase);",
        "deadlock",
    ),
    Mistake("aborted not read", "    if (atomic_load(&b->aborted)) return 1;", "", "deadlock"),
    Mistake(
        "abort moves phase first",
        "    atomic_store(&b->aborted, 1);\n    barrier_open(b);",
        "    barrier_open(b);\n    atomic_store(&b->aborted, 1);",
        EARLY,
    ),
    Mistake(
        "abort opens nothing",
        "    atomic_store(&b->aborted, 1);\n    barrier_open(b);",
        "    atomic_store(&b->aborted, 1);",
        "deadlock",
    ),
    Mistake(
        "count cleared after the opening",
        "        atomic_store(&b->arrived, 0);\n        barrier_open(b);",
        "        barrier_open(b);\n        atomic_store(&b->arrived, 0);",
        "deadlock",
    ),
    Mistake("count not cleared", "        atomic_store(&b->arrived, 0);\n", "", "deadlock"),
    Mistake("one too few", "== b->parties", "== b->parties - 1", EARLY),
    Mistake(
        "sleepers read before phase moves",
        "    atomic_fetch_add(&b->phase, 1);\n    if (atomic_load(&b->sleepers)) wake_all(b);",
        """\
    uint32_t sleepers = atomic_load(&b->sleepers);
    atomic_fetch_add(&b->phase, 1);
    if (sleepers) wake_all(b);
""",
        "deadlock",
    ),
    Mistake("sleepers not counted", "    atomic_fetch_add(&b->sleepers, 1);\n", "", "deadlock"),
    Mistake("sleepers not counted off", "    atomic_fetch_sub(&b->sleepers, 1);\n", "", "the barrier is not at rest"),
    Mistake(
        "wakes once for good",
        "    while (atomic_load(&b->phase) == phase) sleep",
        "    if (atomic_load(&b->phase) == phase) sleep",
        EARLY,
    ),
    Mistake(
        "spins for ever",
        "    while (atomic_load(&b->phase) == phase) sleep_while(b, phase);",
        "    while (atomic_load(&b->phase) == phase) pause_cpu();",
        "endless loop",
    ),
    Mistake("only one is woken", "FUTEX_WAKE_PRIVATE, INT_MAX", "FUTEX_WAKE_PRIVATE, 1", "deadlock", [FUTEX]),
    Mistake("only one is woken", "pthread_cond_broadcast", "pthread_cond_signal", "deadlock", [CONDITION]),
    Mistake("sleeps on any phase", "WAIT_PRIVATE, phase", "WAIT_PRIVATE, atomic_load(&b->phase)", "deadlock", [FUTEX]),
    Mistake("sleeps on any phase", "    if (atomic_load(&b->phase) == phase) pthread", "    pthread", "deadlock", [CONDITION]),
    Mistake(
        "wakes without the mutex",
        """\
    pthread_mutex_lock(&b->mutex);
    pthread_cond_broadcast(&b->cond);
    pthread_mutex_unlock(&b->mutex);
""",
        "    pthread_cond_broadcast(&b->cond);\n",
        "deadlock",
        [CONDITION],
    ),
]


def planted(mistake: Mistake) -> str:
    assert SYNC.count(mistake.old) == 1
    return SYNC.replace(mistake.old, mistake.new)


@pytest.mark.parametrize(
    ("mistake", "sleep"), [pytest.param(m, sleep, id=f"{m.name}-{sleep}") for m in MISTAKES for sleep in m.sleeps]
)
def test_the_search_finds_mistakes(mistake: Mistake, sleep: str) -> None:
    search = Search(planted(mistake), sleep=sleep, parties=3, spins=0, failures=False, outsider="abort" in mistake.name)
    with pytest.raises(Flaw, match=mistake.flaw):
        search.run()


def test_unknown_c_is_refused() -> None:
    """Another memory order, another statement: the proof would not be of this code."""
    for old, new in [("memory_order_acquire", "memory_order_relaxed"), ("    barrier_open(b);", "    sched_yield();")]:
        assert old in SYNC
        with pytest.raises(AssertionError, match="no translation"):
            program(SYNC.replace(old, new), FUTEX, parties=2, spins=1, barriers=1)


# ---------------------------------------------------------------------------------------------------------------------
# Real threads under ThreadSanitizer

COMPILER = shutil.which("cc") or shutil.which("gcc")
PORTABLE = "-U__linux__"  # sync.h then sleeps as on other systems
SANITIZE = "-fsanitize=thread"


def build(folder: Path, *flags: str, text: str = SYNC) -> str:
    """The harness with this sync.h."""
    assert COMPILER
    (folder / "sync.h").write_text(text)
    program = str(folder / "harness")
    sources = ["-I", str(folder), str(ROOT / "tests" / "barrier_harness.c"), "-pthread", "-o", program]
    command = [COMPILER, "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", *flags, *sources]
    done = execute(command)
    assert (done.returncode, done.stderr) == (0, "")
    return program


def run(program: str, *, workers: int, spins: int, steps: int) -> subprocess.CompletedProcess[str]:
    command = [program, str(workers), str(spins), str(steps), "7"]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return execute(command, env=environment)


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiler's flag for ThreadSanitizer, where a program made with it runs."""
    if not COMPILER:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    program = str(folder / "probe")
    command = [COMPILER, SANITIZE, str(folder / "probe.c"), "-o", program]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{COMPILER} has no {SANITIZE}")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ThreadSanitizer does not run here: {done.stderr[:200]}")
    return SANITIZE


@pytest.mark.parametrize("flags", [[], [PORTABLE]], ids=["native", "portable"])
def test_races_and_early_passes(flags: list[str], sanitizer: str, tmp_path: Path) -> None:
    program = build(tmp_path, "-Werror", sanitizer, *flags)
    for workers in (1, 2, 3, 4, 8):
        for spins, steps in ((0, 1000), (100, 300), (20_000, 200)):
            if spins > 100 and workers > 3:
                continue  # more workers than processors, each spinning its time away
            done = run(program, workers=workers, spins=spins, steps=steps)
            assert (done.returncode, done.stderr) == (0, ""), (workers, spins)
            aborted = re.fullmatch(rf"{workers} workers, {steps} steps, (\d+) aborted\n", done.stdout)
            assert aborted
            assert 0.2 * steps < int(aborted[1]) < 0.5 * steps


@pytest.mark.parametrize(
    ("old", "new", "flags", "complaint"),
    [
        ("memory_order_acquire", "memory_order_relaxed", [SANITIZE], "WARNING: ThreadSanitizer: data race"),
        ("== b->parties", ">= b->parties - 1", [], "another has not ended the last"),
        (
            "return atomic_fetch_add_explicit(&pile->taken, 1, memory_order_relaxed);",
            "uint32_t part = atomic_load(&pile->taken); sched_yield(); atomic_store(&pile->taken, part + 1); return part;",
            ["-include", "sched.h"],
            "a part was left out, or taken twice",
        ),
    ],
)
@pytest.mark.usefixtures("sanitizer")
def test_the_harness_finds_mistakes(old: str, new: str, flags: list[str], complaint: str, tmp_path: Path) -> None:
    assert SYNC.count(old) == 1
    program = build(tmp_path, *flags, text=SYNC.replace(old, new))
    done = run(program, workers=3, spins=2_000_000, steps=2000)  # spins for longer than a worker waits for a processor
    assert done.returncode != 0
    assert complaint in done.stderr
