"""Targets: the tools' command lines, the chat's commands, and chat.py as a process.

The tools run in this process, over files of tiny shapes; what would take long (a large shape, a thousand steps) is left out.
What they write must be sound files, and what they refuse must leave no trace.
"""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

import eval as evaluation
import numpy as np
import shards
import train
from training import report
from training.job import Job

import chat
from pygpt import GPT2, Config, DataLoader, Example, Trainer, write_checkpoint, write_examples, write_tokens
from pygpt.commands.child import ChildError, read_ids
from pygpt.errors import InputError
from pygpt.generation.request import Completion, Request

from . import reference
from .commands import (
    PATIENCE,
    ROOT,
    STATUSES,
    WORDS,
    LineTarget,
    Outcome,
    _other_surrogates,
    closed_streams,
    judge,
    label_of,
    options_of,
    parse_input,
    run_main,
    run_process,
    stays,
)
from .files import TINY, weights
from .mutate import dump, mutate_bytes, mutate_json_text
from .target import Finding, LeftOut, load_json, pack, same, skeleton, unpack

TEXT = "First line\n\nto be, or not to be\n" * 4
GPT2_IDS = Config(maxT=8, V=50257, L=1, NH=1, C=2)  # a model whose ids are GPT-2's, so that they are text
MOST_STEPS, MOST_BATCHES, MOST_PARAMETERS = 3, 50, 300_000  # of a run of training
LINES = 12  # on stderr: notices, one each


class ToolTarget(LineTarget):
    """A tool's main(), over files that are made anew each time. Words that lead out of the folder are left out."""

    tool: Any
    statuses: tuple[int, ...] = STATUSES

    def open(self) -> None:
        """No setting of the user's counts."""
        for name in [name for name in os.environ if name.startswith("PYGPT_")]:
            del os.environ[name]
        os.environ["PYGPT_HOME"] = str(self.folder)
        self.files = self.made()

    def made(self) -> dict[str, bytes]:
        """The files to work on."""
        raise NotImplementedError

    def run(self, data: bytes) -> str:
        """Run the tool; look at what it wrote."""
        argv, stdin = parse_input(data)
        return self.try_line(argv, stdin, self.files, closed_streams(data))

    def try_line(self, argv: list[str], stdin: bytes, files: dict[str, bytes], closed: Sequence[str] = ()) -> str:
        """The same, with these files."""
        argv = [word for word in argv if stays(word)]
        os.chdir(self.folder)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        outcome = run_main(self.tool.main, argv, stdin, closed)
        judge(outcome, argv, lines=LINES, statuses=self.statuses)
        after = {str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        self.check(outcome, argv, {name: content for name, content in after.items() if files.get(name) != content})
        if lost := sorted(files.keys() - after.keys()):
            raise Finding(f"{argv!r:.300}: {lost} went away")
        return label_of(outcome)

    def check(self, outcome: Outcome, argv: list[str], written: dict[str, bytes]) -> None:
        """Judge stdout and the files that were written."""
        same("files written", sorted(written), [])


# ------------------------------------------------------------------------------------------------ tools


class ShardsTarget(ToolTarget):
    """tools/shards.py."""

    name = "shards"
    tool = shards
    options = tuple(options_of(shards.build_parser()))
    words = (
        *WORDS,
        "a.txt",
        "*.txt",
        "bad.txt",
        "empty.txt",
        "t.bin",
        "data",
        "data/",
        "data/x",
        "paragraph",
        "document",
        "none",
    )
    lines = (
        "a.txt -o data", "a.txt -o x --val-tokens 3", "a.txt b.txt -o data/x --val-fraction 0.2 --eot none",
        "--show t.bin -n 2",
        "*.txt -o data --shard-size 4 --eot document", "- -o data", "bad.txt -o x", "empty.txt -o x --eot none", "--help",
    )  # fmt: skip

    def seeds(self) -> list[bytes]:
        """And a text from a stdin that is closed."""
        return [*super().seeds(), dump({"argv": ["-", "-o", "data"], "closed": ["stdin"]})]

    def made(self) -> dict[str, bytes]:
        """Texts and a shard."""
        write_tokens(self.folder / "t.bin", [31373, 612, 50256])
        return {
            "a.txt": TEXT.encode(), "b.txt": b"short", "bad.txt": b"\xff", "empty.txt": b"",
            "t.bin": (self.folder / "t.bin").read_bytes(),
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        """There is a folder to write into."""
        (self.folder / "data").mkdir()
        return super().run(data)

    def check(self, outcome: Outcome, argv: list[str], written: dict[str, bytes]) -> None:
        """Shards, or nothing."""
        if outcome.status != 0 or outcome.out:
            same("files written", sorted(written), [])
        elif not written:
            raise Finding(f"{argv!r:.300} ends well and wrote nothing")
        for name, content in written.items():
            found = reference.shard(content)
            if found is None or max(found) > 50256 or not re.search(r"_(train|val)(_\d{6})?\.bin$", name):
                raise Finding(f"{argv!r:.300} wrote {name}, which is no sound shard")


class EvalTarget(ToolTarget):
    """tools/eval.py."""

    name = "eval"
    tool = evaluation
    options = tuple(options_of(evaluation.build_parser()))
    words = (*WORDS, "perplexity", "hellaswag", "next", "a.txt", "t.bin", "h.bin", "ids.bin", "json", "text", "8", "9")
    lines = (
        "perplexity a.txt -m gpt2.bin", "perplexity t.bin -m tiny.bin --window 3 --stride 1 -n 5 -o json",
        "hellaswag h.bin -m tiny.bin -n 1", "hellaswag h.bin -m gpt2.bin -o json -t 2", "next Ladies -m gpt2.bin -k 3",
        "next Ladies -m gpt2.bin -o json", "next x -m tiny.bin", "perplexity - -m gpt2.bin", "next", "--help", "next --help",
    )  # fmt: skip

    def made(self) -> dict[str, bytes]:
        """Two models, a text, a shard, examples."""
        for name, config in (("tiny.bin", TINY), ("gpt2.bin", GPT2_IDS)):
            write_checkpoint(self.folder / name, config, weights(config))
        write_tokens(self.folder / "t.bin", [1, 2, 3, 4, 0, 1, 2])
        write_examples(self.folder / "h.bin", [Example(0, 1, [1], [[2], [3], [4, 1], [0]])])
        found = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        return {**found, "a.txt": TEXT.encode()}

    def check(self, outcome: Outcome, argv: list[str], written: dict[str, bytes]) -> None:
        """Lines of text, or one JSON object without NaN."""
        super().check(outcome, argv, written)
        if outcome.status != 0:
            same("stdout", outcome.out, b"")
        elif outcome.out.startswith(b"{") and reference.strict_json(outcome.out) is None:
            raise Finding(f"stdout of {argv!r:.300} is {outcome.out[:300]!r}")


class BoundedTrainer(Trainer):
    """A Trainer that asks for its end, as Ctrl-C does, after a few steps."""

    def step(self) -> Any:
        """Make a step."""
        if self.options.accumulate > MOST_BATCHES:
            raise LeftOut
        self.made = getattr(self, "made", 0) + 1
        if self.made == MOST_STEPS:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step()


class TrainTarget(ToolTarget):
    """tools/train.py. An input is several files: the words, and what run.state says of its job."""

    name = "train"
    tool = train
    statuses = (*STATUSES, 143)
    options = tuple(options_of(train.build_parser()))
    words = (*WORDS, "t.bin", "a.txt", "*.bin", "tiny.bin", "run.state", "L=1,NH=1,C=2,maxT=4,V=5", "L=1,L=1", "gpt2", "random",
             "new.bin", "log.json", "p.svg", "cosine", "constant", "1e-3", "0.2", "debug.bin", "4", "3")  # fmt: skip
    small = "--shape L=1,NH=1,C=2,maxT=4,V=5 --data t.bin -B 1 -T 2"
    lines = (
        f"{small} --steps 2 --out new.bin --log log.json", f"{small} --val v.bin --val-every 1 --sample-every 1 --steps 2",
        f"{small} --val-tokens 9 --schedule cosine --warmup 1 --min-lr 0 --steps 3 --clip 1 --accumulate 2 --weight-decay 0.1",
        "--init tiny.bin --data t.bin -B 2 -T 3 --steps 1 --out new --version 5 --save-every 1 --decay-matrices-only --shuffle",
        "--resume run.state", "--resume run.state --steps 9 --lr 1e-3 --log log.json --force",
        "--check debug.bin --init tiny.bin",
        f"{small} --val-fraction 0.3 --reference --steps 1 --plot p.svg", "--data a.txt --init random --shape gpt2", "--help",
    )  # fmt: skip

    def open(self) -> None:
        """Take away what takes long: large shapes, many steps, pictures."""
        super().open()
        self.engine = train.make_engine
        replaced: dict[str, Any] = {"Trainer": BoundedTrainer, "make_engine": self.make_engine, "matplotlib": lambda: None}
        for name, value in replaced.items():
            setattr(train, name, value)
        vars(report)["draw"] = lambda *_: None

    def make_engine(self, config: Config, init: str | None, job: Any, threads: int | None) -> Any:
        """An engine of a small model."""
        if config.parameters(padded=True) > MOST_PARAMETERS:
            raise LeftOut
        return self.engine(config, init, job, threads)

    def made(self) -> dict[str, bytes]:
        """A model, its debug state, shards, and a text; the state of a run is made for each input."""
        ids = np.arange(40, dtype=np.uint16) % 5
        write_tokens(self.folder / "t.bin", ids)
        write_tokens(self.folder / "v.bin", ids[:11])
        write_checkpoint(self.folder / "tiny.bin", TINY, weights(TINY))
        found = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        return {**found, "a.txt": TEXT.encode(), "debug.bin": b"no debug state"}

    def seeds(self) -> list[bytes]:
        """Command lines, each with a sound state."""
        job = dump(vars(Job(data="t.bin", B=1, T=2, sample_every=0, log="log.json", val_tokens=9, plot="p.png")))
        place = {"step": 3, "options": {"steps": 5, "lr": 0.01}, "loader": self.place()}
        return [pack({"argv": dump(line.split()), "job": job, "place": dump(place)}) for line in self.lines]

    def place(self) -> dict[str, Any]:
        """Where the loader of the run is."""
        return dict(DataLoader(np.arange(31) % 5, 1, 2).state())

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change the words, the job, or the rest of what the state says."""
        files, others = unpack(data), unpack(other)
        if not files or not others:
            return other
        kind = random.random()
        argv, more = (parse_input(b'{"argv": ' + part.get("argv", b"[]") + b"}")[0] for part in (files, others))
        if kind < 0.6:
            for _ in range(random.choice((1, 1, 2, 3))):
                argv = self.change(random, argv, more)
            files["argv"] = dump(argv[:40])
        else:
            name = "job" if kind < 0.85 else "place"
            files[name] = mutate_json_text(random, files.get(name, b"{}"), others.get(name, b"{}"))
            if "--resume" not in argv:
                files["argv"] = dump(["--resume", "run.state", *random.choice(([], ["--steps", "9"], ["--log", "l.json"]))])
        return pack(files)

    def run(self, data: bytes) -> str:
        """Train."""
        found = unpack(data)
        argv, _ = parse_input(b'{"argv": ' + (found.get("argv") or b"[]") + b"}")
        job, place = load_json(found.get("job", b"")), load_json(found.get("place", b""))
        if isinstance(job, dict) and not all(stays(path) for path in job.values() if isinstance(path, str)):
            raise LeftOut
        state = reference.state_bytes(TINY_STATE, {**place, "job": job} if isinstance(place, dict) else place)
        return self.try_line(argv, b"", {**self.files, "run.state": state, "precious.txt": b"not a log\n"})

    def check(self, outcome: Outcome, argv: list[str], written: dict[str, bytes]) -> None:
        """Models, states, logs: each whole."""
        for name, content in written.items():
            if name.endswith((".state", ".state.1")):
                sound = reference.state(content) is not None
            elif name.endswith(".bin"):
                sound = reference.checkpoint(content) is not None
            else:
                sound = all(reference.strict_json(line) is not None for line in content.splitlines())
            if not sound:
                raise Finding(f"{argv!r:.300} wrote {name}, which is not sound: {content[:100]!r}")
        if "precious.txt" in written:
            raise Finding(f"{argv!r:.300} has replaced a file that was there")


TINY_STATE = {"maxT": 3, "V": 5, "L": 1, "NH": 2, "C": 4, "Vp": 128}


# ------------------------------------------------------------------------------------------------ chat

TYPED = (
    "", " ", "Ladies and", "é", "\udcff\udcfe", "中文 🙂", "<|endoftext|>", "/", "//", "/help", "/quit", "/reset", "/n 3",
    "/temp x", "/seed 1", "/nothing", "/model x", "/save x", "/load x", "/" + "x" * 300, "\t", "\x1b[A", "a" * 900,
    "word " * 300, "--", "-n", "\\", "\\\\", "text\\", "/set", "/set new 3", "/set temperature 0.5", "/set temp default",
    "/set stop \"\\n\"", "/set stop \"", "/set stop x", "/set stop \"\\ud800\"", "/set stop_token 5", "/set overflow slide",
    "/set overflow stop", "/set sampler greedy", "/set sampler nothing", "/set top-k 5", "/set TOP_P 0.9", "/set seed 7",
    "/set stats on", "/set stats x", "/set nothing 1", "/set n 0", "/set n 99999999999999999999", "/set -- x", "/again",
    "/more", "/tokens", "/probs", "/again x", "//slash", "/set min_p 2", "/set seed 18446744073709551615",
)  # fmt: skip
CHAT_OPTIONS = tuple(option for option in options_of(chat.build_parser()) if option != "--reference")


class Answers:
    """Answers as the command does that chat.py starts, from a model in this process. `lie` spoils what it says."""

    def __init__(self, model: GPT2, lie: bytes | None) -> None:
        self.stopped = False
        self._model, self._lie = model, lie

    def ask(self, tokens: Sequence[int], options: dict[str, Any]) -> Iterator[int]:
        """The new ids, through the protocol's text."""
        request = Request(self._model.config, **json.loads(json.dumps({"tokens": list(tokens), **options})))
        said = " ".join(map(str, self._model.complete(Completion(request)))).encode() + b"\n"
        said = said if self._lie is None else self._lie
        try:
            yield from read_ids(said[i : i + 5] for i in range(0, len(said), 5))
        except EOFError:
            raise ChildError("the pygpt command ended with status 0") from None

    def check(self) -> None:
        """It never ends."""

    def show_notices(self, *, others: bool = False) -> None:
        """It has none."""

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Nobody presses Ctrl-C."""
        yield


class ChatTarget(LineTarget):
    """The chat's commands, in this process: {"argv": [words], "typed": [lines], "lie": text}."""

    name = "chat"
    batch = 200
    words = TYPED
    options = CHAT_OPTIONS

    def open(self) -> None:
        """Make a model whose ids are GPT-2's."""
        self.path = self.folder.with_name(self.folder.name + ".bin")
        write_checkpoint(self.path, GPT2_IDS, weights(GPT2_IDS))
        self.model = GPT2.load(self.path, threads=1)
        chat.input_waits = lambda: True

    def close(self) -> None:
        """Stop the model."""
        self.model.close()

    def seeds(self) -> list[bytes]:
        """A conversation with every command."""
        typed = (
            ["Ladies and", "/more", "/again", "/tokens", "/probs", "/help", "/set", "/quit"],
            ["/set temperature 0.5", "/set seed 3", "x", "/again", "/set sampler greedy", "/set stats on", "y", "//z"],
            ["/set stop \"\\n\\n\"", "/set overflow slide", "a\\", "b", "/set new 3", "/set new default", "/more"],
            ["/probs", "/more", "/set overflow stop", "to be or not to be that is the question", "/more"],
        )  # fmt: skip
        found: list[dict[str, Any]] = [{"argv": ["-n", "2"], "typed": lines} for lines in typed]
        return [dump(one) for one in [*found, {"argv": ["--stats"], "typed": ["x"], "lie": "12 13"}]]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change lines, options, and now and then what the command answers."""
        found, more = load_json(data), load_json(other)
        if not isinstance(found, dict) or not isinstance(more, dict):
            return other
        lines = [line for line in found.get("typed") or [] if isinstance(line, str)]
        kind, at = random.randrange(8), random.randrange(len(lines) + 1)
        if kind <= 2:
            lines.insert(at, random.choice(TYPED))
        elif kind == 3 and lines:
            place = random.randrange(len(lines))
            changed = mutate_bytes(random, lines[place].encode("utf-8", "surrogateescape"), b"/set ", fields=0)
            lines[place] = changed.decode("utf-8", "surrogateescape").replace("\n", " ")
        elif kind == 4:
            lines.insert(at, f"/set {random.choice([*chat.SETTINGS, 'x'])} {random.choice(WORDS)}")
        elif kind == 5:
            found["argv"] = self.change(random, parse_input(data)[0], parse_input(other)[0])
        elif kind == 6:
            lines += [line for line in more.get("typed") or [] if isinstance(line, str)][:4]
        else:
            found["lie"] = random.choice(
                ("12 13\n", "12 x\n", "12", "\n", " \n", "99999999\n", "50257\n", "é\n", "1 2 3", "1\n2\n")
            )
        return dump({**found, "typed": lines[:12]})

    def run(self, data: bytes) -> str:
        """Converse."""
        found = load_json(data)
        found = found if isinstance(found, dict) else {}
        typed, lie = found.get("typed"), found.get("lie")
        lines = [line for line in typed if isinstance(line, str) and "\n" not in line] if isinstance(typed, list) else []
        lie = lie.encode("utf-8", "replace") if isinstance(lie, str) else None
        argv = [word for word in parse_input(data)[0] if not word.startswith(("-h", "--h"))]
        outcome = run_main(lambda _: self.converse(argv, lines, lie), argv)
        said = [line for line in outcome.err.splitlines() if line.startswith(("chat.py: ", "pygpt: "))]
        if outcome.status not in STATUSES or "Traceback" in outcome.err or any("\x1b" in line for line in said):
            raise Finding(f"{argv!r:.200} and {lines!r:.300} end with {outcome.status}: {outcome.err[-2000:]!r}")
        return f"status {outcome.status} {' '.join(sorted({skeleton(line) for line in said}))}"

    def converse(self, argv: list[str], lines: list[str], lie: bytes | None) -> int:
        """What chat.main() does, without a child process and a terminal."""
        waiting = iter(lines)

        def ask(_: str) -> str:
            try:
                line = next(waiting)
            except StopIteration:
                raise EOFError from None
            return line

        chat.line_reader = lambda: ask
        try:
            options = chat.parse(argv)
            if options.words:
                raise LeftOut
            settings = chat.Settings(options, self.model.config)
            answers: Any = Answers(self.model, lie)
            return chat.Chat(answers, settings, model=str(self.path), threads="1").converse()
        except InputError as error:
            chat.say(f"error: {error}")
            return 2
        except ChildError as error:
            chat.say(f"error: {error}")
            return 1


class TerminalTarget(LineTarget):
    """chat.py as a process: words, a piped text, or lines typed on a terminal.

    Inputs are {"argv": [words], "stdin": text, "typed": [lines]}; where there is "typed", "stdin" does not count.
    """

    name = "terminal"
    batch = 50

    def seeds(self) -> list[bytes]:
        """The three ways to use it."""
        argvs: tuple[dict[str, Any], ...] = (
            {"argv": ["-n", "2", "Ladies", "and"]},
            {"argv": ["-n2", "-t1", "--sampler=greedy"], "stdin": "Ladies and\n"},
            {"argv": ["-n", "1", "-t1"], "typed": ["Ladies and", "/help", "x"]},
        )
        return [dump(one) for one in argvs]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change words and lines."""
        found, more = load_json(data), load_json(other)
        if not isinstance(found, dict) or not isinstance(more, dict):
            return other
        for _ in range(random.choice((1, 2, 3))):
            kind = random.randrange(6)
            lines = [line for line in found.get("typed") or [] if isinstance(line, str)]
            argv = [word for word in found.get("argv") or [] if isinstance(word, str)]
            at = random.randrange(len(argv) + 1)
            if kind <= 2 and "typed" in found:
                lines.insert(random.randrange(len(lines) + 1), random.choice(TYPED))
                found["typed"] = lines[:6]
            elif kind == 3:
                argv[at:at] = [random.choice(CHAT_OPTIONS), random.choice((*WORDS[:8], *WORDS, *TYPED))]
            elif kind == 4:
                argv[at : at + 1] = [random.choice((*WORDS, *TYPED))]
            elif "stdin" in found:
                found["stdin"] = "".join(random.choice(TYPED) for _ in range(random.randrange(4)))
            else:
                found = {**more, "argv": argv}
            found["argv"] = argv
        return dump(found)

    def run(self, data: bytes) -> str:
        """Start it; stdout has the reply, stderr no traceback."""
        found = load_json(data)
        argv, stdin = parse_input(data)
        typed = found.get("typed") if isinstance(found, dict) else None
        limited = ["-n2", *argv] if not any(word.startswith(("-n", "--new", "-h", "--help")) for word in argv) else argv
        command = [sys.executable, str(ROOT / "chat.py"), *limited]
        os.chdir(self.folder)
        if isinstance(typed, list):
            lines = "".join(f"{line}\n" for line in typed if isinstance(line, str) and not _other_surrogates(line))
            status, _, err = run_on_terminal(command, lines.encode("utf-8", "surrogateescape"))
        else:
            status, _, err = run_process(command, stdin)
        if status not in STATUSES or "Traceback" in err:
            raise Finding(f"chat.py {limited!r:.300} ends with status {status}; stderr: {err[-3000:]}")
        errors = [line for line in err.replace("Text: ", "").splitlines() if "error" in line]
        if status in (1, 2) and len(errors) != 1:
            raise Finding(f"chat.py {limited!r:.300}: status {status} and not one line of error: {err[-3000:]!r}")
        return f"status {status} {' '.join(skeleton(line) for line in errors)}"


def run_on_terminal(command: list[str], typed: bytes) -> Outcome:
    """Run a program whose stdin is a terminal, type, then Ctrl-D."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "TERM": "dumb"}
    try:
        with subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
        ) as process:
            os.close(theirs)
            os.set_blocking(ours, False)
            for line in [*typed[:3000].split(b"\n"), b"\x04", b"\x04"]:
                with suppress(BlockingIOError, OSError):
                    os.write(
                        ours, line.replace(b"\x03", b"").replace(b"\x1c", b"")[:1000] + (b"" if line == b"\x04" else b"\n")
                    )
            try:
                out, err = process.communicate(timeout=PATIENCE)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            return Outcome(process.returncode, out, err.decode("utf-8", "replace"))
    finally:
        os.close(ours)


PROGRAMS = (ShardsTarget, EvalTarget, TrainTarget, ChatTarget, TerminalTarget)
