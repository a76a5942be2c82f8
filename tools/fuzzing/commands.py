"""Targets: the package's commands. What they print, their exit statuses and what they leave behind are held against their
promises.

They run in this process, with streams of its own: `run_main` tries some hundred command lines a second. `process` starts real
processes. Inputs are JSON: {"argv": [words], "stdin": text}, in which U+DC80 to U+DCFF stand for single bytes; of commands over
files they are several files, which pack() makes one. The tools' command lines and the chat are in programs.py.
"""

import argparse
import io
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from pygpt import GPT2, Checkpoint, CheckpointError, InputError, PyGPTError, _signals, convert, write_checkpoint
from pygpt.__main__ import LINE_LIMIT, build_parser, main
from pygpt.commands.console import status_of
from pygpt.formats.huggingface import JSON_LIMIT, write_model

from . import reference
from .faults import draw, failing
from .files import SERVED, SMALL, TINY, mutate_safetensors, weights
from .mutate import dump, mutate_bytes, mutate_json_text
from .target import Finding, LeftOut, Target, empty, load_json, pack, same, skeleton, unpack

ROOT = Path(__file__).resolve().parents[2]
STATUSES = (0, 1, 2, 130, 141)
MOST_OUTPUT = 4000  # bytes: then the reader of stdout goes
PATIENCE = 120  # seconds for a process, on a machine that others use, too
LONGEST_LINE = 5100  # characters on stderr: a path may have 4,096

WORDS = (
    "", "-", "--", "0", "1", "2", "3", "4", "5", "6", "10", "-1", "00", "007", "1e3", "0x10", "\uff11\uff12", "\u0663",
    "9" * 18, "9" * 19, "9" * 30, "9" * 5000, "nan", "inf", "-inf", "1_000", " 1", "1 ", "\udcff", "\n", "1\n2", "é", "{", "@x",
    "=", "a" * 300, "a" * 5000, "%s", "%(prog)s", "2147483648", "9223372036854775808", "18446744073709551615",
    "18446744073709551616", "0.5", ".5", "5.", "1e-320", "1e38", "1e400", "median", "greedy", "sample", "stop", "slide",
    "<|endoftext|>", "\x1b[31m", "\u2028", "--x", "-q", "-n5", "tiny.bin", "./tiny.bin", ".", "/", "/dev/null", "nothing.bin",
    "gpt2", "out.bin", "out/", "half.bin", "0" * 8 + "1" * 5000, "1" + "0" * 400,
)  # fmt: skip


class Outcome(NamedTuple):
    """What became of a command."""

    status: int
    out: bytes
    err: str


class Pipe(io.RawIOBase):
    """Stdout whose reader goes after some bytes."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes, or fail as a pipe without a reader does."""
        if len(self.content) > MOST_OUTPUT:
            raise BrokenPipeError
        self.content += bytes(data)
        return len(data)


class Piped(io.TextIOWrapper):
    """A text stream over a Pipe, written through."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(io.BufferedWriter(pipe, 1), "utf-8", "strict", write_through=True)


class Screen(io.BytesIO):
    """Stderr on a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def run_main(
    command: Callable[[Sequence[str]], int],
    argv: Sequence[str],
    stdin: bytes = b"",
    closed: Sequence[str] = (),
    *,
    terminal: bool = False,
) -> Outcome:
    """Run a command's main() here, with streams of its own. closed: those of "stdin" and "stdout" that are not there.
    terminal: whether stderr is one."""
    before = sys.stdin, sys.stdout, sys.stderr
    pipe, err = Pipe(), Screen() if terminal else io.BytesIO()
    out = Piped(pipe)
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    sys.stdout, sys.stderr = out, io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True)
    for name in closed:
        setattr(sys, name, None)
    try:
        status = command(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 99
    finally:
        errors = err.getvalue().decode()
        sys.stdin, sys.stdout, sys.stderr = before
        with suppress(BrokenPipeError, ValueError):
            out.detach()  # what nobody reads is not written when it is collected
    return Outcome(status, pipe.content, errors)


def as_program(module: str) -> Callable[[Sequence[str]], int]:
    """What `python -m MODULE` runs, in this process."""

    def command(argv: Sequence[str]) -> int:
        with patch.object(sys, "argv", [module, *argv]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # so it is: as a module
            runpy.run_module(module, run_name="__main__")
        raise Finding(f"{module} ends without an exit status")

    return command


def judge(outcome: Outcome, argv: Sequence[str], *, lines: int = 1, statuses: Sequence[int] = STATUSES) -> None:
    """Hold a command's status and stderr against what all commands promise."""
    status, _, err = outcome
    if status not in statuses:
        raise Finding(f"exit status {status} for {argv!r:.300}; stderr: {err[-2000:]}")
    found = err.splitlines()
    if len(found) > lines or "Traceback" in err or not all(line.startswith("pygpt: ") for line in found):
        raise Finding(f"stderr of {argv!r:.300} is {err[-3000:]!r}")
    if status in (1, 2) and not (found and found[-1].startswith("pygpt: error: ")):
        raise Finding(f"status {status} without an error line for {argv!r:.300}: {err!r:.300}")
    if unprintable := [char for line in found for char in line if not char.isprintable()]:
        raise Finding(f"stderr of {argv!r:.300} has {unprintable[0]!r} in it: {err[-2000:]!r}")
    if any(len(line) > LONGEST_LINE for line in found):
        raise Finding(f"a line of {max(map(len, found))} characters on stderr for {argv!r:.300}")


def label_of(outcome: Outcome) -> str:
    """The kind of an outcome."""
    said = re.sub(r"(unrecognized arguments|unknown key): .*", r"\1", outcome.err.strip())
    return f"status {outcome.status} {skeleton(said)}"


def parse_input(data: bytes) -> tuple[list[str], bytes]:
    """An input's words and stdin."""
    found = load_json(data)
    found = found if isinstance(found, dict) else {}
    argv, stdin = found.get("argv"), found.get("stdin")
    words = [word.replace("\0", "") for word in argv if isinstance(word, str)] if isinstance(argv, list) else []
    words = [
        os.fsdecode(word.encode("utf-8", "surrogateescape"))
        for word in words
        if not re.search("[\ud800-\udc7f\udd00-\udfff]", word)
    ]
    return words, stdin.encode("utf-8", "replace" if _other_surrogates(stdin) else "surrogateescape") if isinstance(
        stdin, str
    ) else b""


def _other_surrogates(text: str) -> bool:
    return re.search("[\ud800-\udc7f\udd00-\udfff]", text) is not None


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser and of the parsers in it."""
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [option for inner in action.choices.values() for option in options_of(inner)]
    return list(dict.fromkeys(found))


def stays(path: str) -> bool:
    """Whether a word, as a path or an option with one, stays in the current folder."""
    return ".." not in path and not re.search(r"(^(-\w)?|[=\s~*\[])[/~]", path)


def closed_streams(data: bytes) -> list[str]:
    """Which streams an input wants to be closed."""
    found = load_json(data)
    names = found.get("closed") if isinstance(found, dict) else None
    return [name for name in ("stdin", "stdout") if isinstance(names, list) and name in names]


def faults_of(data: bytes) -> list[Any]:
    """What an input has the system do."""
    found = load_json(data)
    faults = found.get("faults") if isinstance(found, dict) else None
    return faults if isinstance(faults, list) else []


class LineTarget(Target):
    """A command line. `options` and `words` are what mutations put into it, `lines` what they begin from."""

    batch = 300  # a reader that goes costs a descriptor
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = WORDS
    lines: tuple[str, ...] = ()

    def seeds(self) -> list[bytes]:
        """Every option as it is meant; and where a stream is closed."""
        lines = [line.split() for line in self.lines]
        closed = [{"argv": argv, "closed": [name]} for argv in (lines[0], ["--help"], ["-"]) for name in ("stdin", "stdout")]
        return [*(dump({"argv": argv, "stdin": ""}) for argv in lines), *map(dump, closed)]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change words, and put options in."""
        argv, stdin = parse_input(data)
        more, _ = parse_input(other)
        for _ in range(random.choice((1, 1, 2, 3))):
            argv = self.change(random, argv, more)
        closed = {"closed": names} if (names := closed_streams(data)) else {}
        return dump({"argv": argv[:40], "stdin": os.fsdecode(stdin), **closed})

    def change(self, random: Random, argv: list[str], more: list[str]) -> list[str]:
        """One change to a command line."""
        at, word = random.randrange(len(argv) + 1), random.choice(self.words)
        kind = random.randrange(7)
        if kind <= 1:
            return [*argv[:at], word, *argv[at:]]
        if kind == 2:
            return [*argv[:at], random.choice(self.options), word, *argv[at:]]
        if kind == 3:
            return [*argv[:at], f"{random.choice(self.options)}={word}", *argv[at:]]
        if kind == 4:
            return [*argv[:at], word, *argv[at + 1 :]]
        if kind == 5:
            return [*argv[:at], *argv[at + 1 :]]
        return [*argv, *more[: random.randrange(4)]]


class FilesTarget(LineTarget):
    """A command over files. An input is several of them, among which "argv" has the words and "faults" what the system does
    not do."""

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change one of the files, put in one of another input, or take one away; now and then have the system fail."""
        files, others = unpack(data), unpack(other)
        if not files:
            return other
        name = "faults" if random.random() < 0.06 else random.choice(sorted(files))
        content, like, kind = files.get(name, b""), others.get(name, b""), random.random()
        if name == "faults":
            files[name] = dump([draw(random) for _ in range(random.choice((1, 1, 2)))])
        elif kind < 0.07:
            del files[name]
        elif kind < 0.17 and others:
            name = random.choice(sorted(others))
            files[name] = others[name]
        elif name == "argv":
            files[name] = dump(self.change(random, words_of(content), words_of(like))[:12])
        elif name.endswith(".json"):
            files[name] = mutate_json_text(random, content, like)
        else:
            files[name] = self.altered(random, name, content, like)
        return pack(files)

    def altered(self, random: Random, name: str, content: bytes, like: bytes) -> bytes:
        """A file that is no JSON, changed. `like`: another input's of that name."""
        return mutate_bytes(random, content, like, fields=0)


def words_of(argv: bytes) -> list[str]:
    """The words in an input's file "argv"."""
    return parse_input(b'{"argv": ' + (argv or b"[]") + b"}")[0]


VARIABLES = ("PYGPT_MODEL", "PYGPT_THREADS", "PYGPT_HOME", "XDG_CACHE_HOME")


class CommandTarget(LineTarget):
    """`python -m pygpt TOKEN...`, in this process, over a tiny model. Beside "argv" and "stdin" an input may have "env", values
    of VARIABLES, "" for one that is not set; "here", a model in the current folder; and "faults" of the system."""

    name = "command"
    options = tuple(option for option in options_of(build_parser()) if option != "--reference")
    lines = (
        "0", "0 1 -n 3", "0 --max-new-tokens 1 -t 2", "4 --sampler greedy -n 2",
        "1 --temp 0.8 --top-k 2 --top-p 0.5 -s 7 -n 3",
        "1 --min-p 0.1 --repeat-penalty 1.3 --seed 1 -n 3", "1 --stop-token 2 --stop-token 3 -n 3",
        "0 --overflow stop",
        "0 --overflow slide -n 9", "0 -n 3 -m tiny.bin", "0 --stop x -n 3", "0 --stop-at-eot -n 3", "--help",
        "--version",
        "0 --reference -n 3", "0 0 0", "-", "0 -n 3 --no-mmap",
    )  # fmt: skip

    def open(self) -> None:
        """Make a model; no setting of the user's counts."""
        folder = self.folder
        self.model = folder.with_name(folder.name + ".bin")
        write_checkpoint(self.model, TINY, weights(TINY))
        for name in [name for name in os.environ if name.startswith("PYGPT_")]:
            del os.environ[name]
        os.environ["PYGPT_MODEL"], os.environ["PYGPT_HOME"] = str(self.model), str(folder)
        self.usual = {name: os.environ.get(name, "") for name in VARIABLES}

    def seeds(self) -> list[bytes]:
        """Every option, and every variable."""
        variables: tuple[dict[str, str], ...] = (
            {"PYGPT_THREADS": "2"}, {"PYGPT_MODEL": "tiny.bin"}, {"PYGPT_MODEL": "gpt2", "PYGPT_HOME": "."},
            {"PYGPT_MODEL": ""},
            {"PYGPT_MODEL": "gpt2", "PYGPT_HOME": "", "XDG_CACHE_HOME": "x"},
        )  # fmt: skip
        more = [{"argv": ["0", "-n", "3"], "env": one, "here": here} for one in variables for here in (True, False)]
        more.append({"argv": ["0", "-m", ""]})
        return [*super().seeds(), *map(dump, more), *map(dump, self.failures())]

    def failures(self) -> list[dict[str, Any]]:
        """The model, mapped and read, on a system that fails, and on another one."""
        line = ["0", "-n", "3", "-m", "tiny.bin"]
        hows = [
            *([call, 1, how] for call in ("os.open", "fstat", "read", "mmap") for how in ("EIO", "ENOMEM", "interrupt", "cut")),
            *(["fdopen", 1, how] for how in ("cut", "grow", "touch", "EIO")), ["read", 1, "half"], ["import", 1, "ENOENT"],
        ]  # fmt: skip
        lines = line, [*line, "--no-mmap"]
        other = {"argv": ["0", "-m", "gpt2"], "env": {"PYGPT_HOME": ""}, "faults": [["system", 0, "darwin"]]}
        return [*({"argv": line, "faults": [how]} for line in lines for how in hows), other]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change words; now and then a variable."""
        changed = load_json(super().mutate(random, data, other))
        before = load_json(data)
        assert isinstance(changed, dict)
        if isinstance(before, dict):
            changed |= {name: before[name] for name in ("env", "here", "faults") if name in before}
        if random.random() < 0.15:
            changed["env"] = {random.choice(VARIABLES): random.choice(self.words)}
            changed["here"] = random.random() < 0.5
        if random.random() < 0.1:
            changed["faults"] = [draw(random)]
        return dump(changed)

    def surroundings(self, data: bytes) -> dict[str, str]:
        """Set the variables and make the files that an input asks for; return those variables."""
        found = load_json(data)
        found = found if isinstance(found, dict) else {}
        wanted = found.get("env")
        wanted = wanted if isinstance(wanted, dict) else {}
        texts = {
            name: text for name, text in wanted.items() if name in VARIABLES and isinstance(text, str) and "\0" not in text
        }
        for name, text in (self.usual | texts).items():
            if _other_surrogates(text) or not text:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text
        model = self.model.read_bytes()
        files = {"tiny.bin": model, "half.bin": model[:-1]}
        if found.get("here") is True:
            files |= {"gpt2_124M.bin": model, "gpt2.bin": model}  # as if fetched, where the cache folder is this one
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        return texts

    def run(self, data: bytes) -> str:
        """Run the command; where the words are ids and -n alone, say first what must come of them."""
        argv, stdin = parse_input(data)
        os.chdir(self.folder)
        variables = self.surroundings(data)
        before = set(os.listdir(self.folder))
        closed, faults = closed_streams(data), faults_of(data)
        with failing(faults, self.folder) as changed:
            outcome = self.start(argv, stdin, closed)
        judge(outcome, argv, lines=2)  # a notice about the embedded model
        self.judge_output(outcome, [*argv, *(["and what is not usual"] if variables or closed or faults else [])])
        same("files", sorted(set(os.listdir(self.folder)) - changed), sorted(before - changed))
        return label_of(outcome)

    def start(self, argv: list[str], stdin: bytes, closed: list[str]) -> Outcome:
        """Run it."""
        return run_main(as_program("pygpt.__main__"), argv, stdin, closed)

    def judge_output(self, outcome: Outcome, argv: list[str]) -> None:
        """Ids, one a line, and as many as were asked for."""
        asked = any(word.startswith(("-h", "--help", "--version")) for word in argv)
        if outcome.status == 0 and asked and outcome.out.startswith((b"usage: ", b"pygpt ")) and not outcome.err:
            return
        if not re.fullmatch(rb"(\d+\n)*\d*" if outcome.status == 141 else rb"(\d+[ \n])*\n*(\d+[ \n]|\n)*", outcome.out):
            raise Finding(f"stdout of {argv!r:.300} is {outcome.out[:300]!r}")
        plain = re.fullmatch(r"((?:[0-9]{1,17} )*)(?:-n ([0-9]{1,17}) )?", "".join(f"{word} " for word in argv))
        if plain and not any(" " in word for word in argv):
            ids, total = list(map(int, plain[1].split())), 10 if plain[2] is None else int(plain[2])
            sound = 0 < len(ids) < total <= TINY.maxT and all(token < TINY.V for token in ids)
            if (outcome.status == 0) != sound or (sound and len(outcome.out.split()) != total - len(ids)):
                raise Finding(f"{argv} ends with {outcome.status} and gives {outcome.out!r}: {outcome.err}")


class ProcessTarget(CommandTarget):
    """The same command lines in processes of their own, on a system that is sound."""

    name = "process"

    def failures(self) -> list[dict[str, Any]]:
        """None: faults are this process's."""
        return []

    def start(self, argv: list[str], stdin: bytes, closed: list[str]) -> Outcome:
        """Run it; the reader of stdout goes after a while."""
        return run_process([sys.executable, "-m", "pygpt", *argv], stdin)


def run_process(command: list[str], stdin: bytes) -> Outcome:
    """Run a program; read some of its stdout, then go."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(stdin[:60000])
                process.stdin.close()
            out = process.stdout.read(MOST_OUTPUT)
            process.stdout.close()
            err = process.stderr.read().decode("utf-8", "replace")
            return Outcome(process.wait(PATIENCE), out, err)
        except BaseException:
            process.kill()
            raise


class ServeTarget(Target):
    """`python -m pygpt -`: lines of ids and JSON objects, each held against what the API answers without a prefix cache."""

    name = "serve"
    batch = 300

    def open(self) -> None:
        """Make a model."""
        folder = self.folder
        self.path = folder.with_name(folder.name + ".bin")
        write_checkpoint(self.path, SERVED, weights(SERVED))
        self.model = GPT2.load(self.path, threads=1)

    def close(self) -> None:
        """Stop the model."""
        self.model.close()

    def seeds(self) -> list[bytes]:
        """Requests of both kinds; the second line goes on from the first."""
        return [
            b'{"tokens": [1, 2], "total": 5}\n{"tokens": [1, 2, 3], "max_new_tokens": 2}\n',
            b'{"tokens": [1], "sampler": "greedy", "total": 4, "stop_token_ids": [7]}\n\n{"tokens": [1], "total": 2}',
            b'{"tokens": [5], "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 3, "total": 6}\n',
            b'{"tokens": [5], "repetition_penalty": 1.2, "sampler": "sample", "total": 6, "overflow": "stop"}\n',
            b'{"tokens": [5], "overflow": "slide", "max_new_tokens": 9, "stop_strings": []}\n',
            b'\n \n{"tokens": [129], "total": 6, "stop_token_ids": 3}\n',
            b"1 2 3\n",
            b"1 2 3\n4\0pad",
            b'{"total": 5}\n',
            b'{"tokens": [1], "seed": null}\n',
            b'{"tokens": [1], "seed": [1]}\n',
            b'{"tokens": [1], "x": 1}\n',
        ]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change a line, or put one of another input in."""
        lines = data.split(b"\n")
        more = other.split(b"\n")
        at = random.randrange(len(lines))
        if random.random() < 0.25:
            lines.insert(at, random.choice(more))
        else:
            lines[at] = mutate_json_text(random, lines[at], random.choice(more))
        return b"\n".join(lines)[: 1 << 21]

    def run(self, data: bytes) -> str:
        """Serve the lines, and answer them once more by the API. "pad" after a zero makes a line as long as may be."""
        data = data[: 1 << 20].replace(b"\0pad", b" " * LINE_LIMIT, 1)
        expected, ended = self.expect(data)
        outcome = run_main(main, ["-m", str(self.path), "-t", "2", "-"], data)
        judge(outcome, ["-"])
        if outcome.status != 141:
            same("status", outcome.status, ended)
            answers = outcome.out.decode("ascii").split("\n")
            same("the end of stdout", answers.pop(), "")
            same("number of answers", len(answers), len(expected))
            for found, wanted in zip(answers, expected, strict=True):
                if isinstance(wanted, int):
                    same("number of ids", len(found.split()), wanted)
                else:
                    same("answer", found, " ".join(map(str, wanted)))
        return label_of(outcome)

    def expect(self, data: bytes) -> tuple[list[list[int] | int], int]:
        """The answers, of random ones only how long they are, and the exit status."""
        expected: list[list[int] | int] = []
        for line in io.BytesIO(data):
            request = self.understand(line.strip())
            if request is None or len(line) > LINE_LIMIT:
                return expected, 2
            if not request:
                expected.append([])
                continue
            try:
                completion = self.model.generate_batch([request.pop("tokens")], **request)[0]
            except PyGPTError:
                return expected, 2
            drawn = completion.seed is not None and "seed" not in request
            stops = request.get("stop_token_ids") or request.get("stop_strings")
            if drawn and stops:
                raise LeftOut
            expected.append(len(completion.tokens) if drawn else completion.tokens)
        return expected, 0

    def understand(self, line: bytes) -> dict[str, Any] | None:
        """A request as arguments; {} for a blank line, None for one that is none."""
        if not line:
            return {}
        if not line.startswith(b"{"):
            words = line.split()
            return {"tokens": list(map(int, words))} if all(re.fullmatch(rb"0*[0-9]{1,18}", word) for word in words) else None
        found = load_json(line)
        keys = {"tokens", "total", "max_new_tokens", "sampler", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
        keys |= {"seed", "stop_token_ids", "stop_strings", "overflow"}
        if not isinstance(found, dict) or not keys.issuperset(found) or not isinstance(found.get("tokens"), list):
            return None
        if any(value is None for value in found.values()) or isinstance(found.get("seed"), list):  # as of a batch
            return None
        for name in ("total", "max_new_tokens"):  # a window may slide for ever
            if isinstance(found.get(name), int) and found[name] > 3000 and found.get("overflow") == "slide":
                raise LeftOut
        return found


class ConvertTarget(FilesTarget):
    """`pygpt convert`: folders and files of Hugging Face's kind, and checkpoints. The first "\\0pad" in a file is
    more than such a file may have; one that is "\\0fifo" is a pipe."""

    name = "convert"
    batch = 500
    options = tuple(options_of(convert.build_parser()))
    words = (*WORDS, "a.bin", "hf", "hf/", "hf/x.safetensors", "dir.safetensors", "full/", "empty/", "2", "--version=3")

    def seeds(self) -> list[bytes]:
        """One file or shards, with or without config.json, of each dtype; checkpoints."""
        found = []
        for config, version in ((TINY, 3), (TINY, 5), (SMALL, 1)):
            path = self.folder / "a.bin"
            write_checkpoint(path, config, weights(config), version=version)
            found.append({"argv": b'["a.bin", "out/"]', "a.bin": path.read_bytes()})
            found.append({"argv": b'["--version", "1", "a.bin", "out.bin"]', "a.bin": path.read_bytes()})
            with Checkpoint(path) as checkpoint:
                write_model(str(self.folder / "hf"), checkpoint)
            files = {name: (self.folder / "hf" / name).read_bytes() for name in ("config.json", "model.safetensors")}
            found.append({"argv": b'["hf", "out.bin"]', **files})
            found.append(
                {"argv": b'["--heads", "2", "hf/x.safetensors", "out.bin"]', "x.safetensors": files["model.safetensors"]}
            )
            found.append(self.sharded(files))
            empty(self.folder)
        files = found[2]
        found.append({**files, "model.safetensors": self.halved(files["model.safetensors"])})
        found.append({"argv": b'["hf", "out.bin"]', "config.json": files["config.json"], "pytorch_model.bin": b"PK\x03\x04"})
        model, single = found[0]["a.bin"], {"x.safetensors": files["model.safetensors"]}
        lines = (
            "a.bin a.bin", "a.bin full/", "a.bin empty/", "a.bin hf", "a.bin x.safetensors", "--version 5 a.bin out/",
            "a.bin no/out.bin", "--heads 2 a.bin out.bin", "a.bin full/old.bin", "dir.safetensors out.bin", "full out.bin",
            "--version 3 a.bin out.bin", "--help",
        )  # fmt: skip
        found += [{"argv": dump(line.split()), "a.bin": model} for line in lines]
        whole = {name: files[name] for name in ("config.json", "model.safetensors")}
        found += [{"argv": dump(line.split()), **whole} for line in ("--heads 2 hf x", "hf out/", "hf hf/config.json")]
        found.append({"argv": b'["hf/x.safetensors", "out.bin"]', **single})
        found.append({"argv": b'["a.bin", "out.bin"]', "a.bin": b"PK\x03\x04"})
        found += [{**whole, "argv": files["argv"], "model.safetensors": file} for file in self.odd(whole["model.safetensors"])]
        found.append({"argv": b'["hf/x.safetensors", "out.bin"]', "x.safetensors": self.of_known_size()})
        found.append({"argv": b'["hf/x.safetensors", "out.bin"]', "x.safetensors": reference.safetensors_bytes({})})
        found += [{"argv": dump(argv), "a.bin": model} for argv in (["a.bin", ""], ["fifo.safetensors", "out.bin"])]
        found.append(
            {**whole, "argv": files["argv"], "config.json": whole["config.json"].replace(b'"n_inner": null', b'"n_inner": 5')}
        )
        shards, index = self.sharded(whole), "model.safetensors.index.json"
        places = json.loads(shards[index])["weight_map"]
        fewer = dict(list(places.items())[1:])
        for changed in ({}, fewer, {**places, "x": "model-0.safetensors"}, {**fewer, "x": "../x.safetensors"}):
            found.append({**shards, index: dump({"weight_map": changed})})
        found += [{**whole, "argv": files["argv"], "config.json": odd} for odd in (b"{}\0pad", b"\0fifo", b"[]")]
        headless = (8).to_bytes(8, "little") + b"[]      "
        found += [{"argv": dump(["hf/x.safetensors", "out.bin"]), "x.safetensors": odd} for odd in (headless, b"\0fifo")]
        found.append({"argv": dump(["--heads", "0", "hf/x.safetensors", "out.bin"]), **single})
        found += [{**one, "faults": dump([fault])} for fault in self.failures() for one in (found[0], found[1], files)]
        return [pack(files) for files in found]

    def failures(self) -> list[list[Any]]:
        """What fails while a model is read or written."""
        return [
            ["os.open", 1, "EMFILE"], ["os.open", 2, "EEXIST"], ["os.open", 2, "interrupt"], ["mmap", 1, "EIO"],
            ["mmap", 1, "cut"], ["mmap", 2, "ENOMEM"], ["open", 1, "EACCES"], ["open", 1, "half"], ["open", 2, "interrupt"],
            ["fsync", 1, "ENOSPC"], ["fsync", 1, "interrupt"], ["replace", 1, "EROFS"], ["mkdir", 1, "EEXIST"],
            ["limit", 0, ""], ["limit", 1500, ""], ["fdopen", 1, "memory"], ["import", 1, "ENOENT"],
        ]  # fmt: skip

    def odd(self, file: bytes) -> list[bytes]:
        """A model's tensors with one too many, too few, twice, of another shape or dtype, and with another head."""
        tensors = reference.safetensors(file)
        assert tensors is not None
        name, (dtype, shape, data) = "transformer.wte.weight", tensors["transformer.wte.weight"]
        changes: tuple[dict[str, tuple[str, tuple[int, ...], bytes]], ...] = (
            {"x": ("F32", (1,), bytes(4))}, {"wte.weight": tensors[name]}, {name: (dtype, shape[::-1], data)},
            {name: ("I32", shape, data)}, {"lm_head.weight": (dtype, shape, bytes(len(data)))},
            {"lm_head.weight": ("F32", (1,), bytes(4))},
        )  # fmt: skip
        files = [reference.safetensors_bytes({**tensors, **change}) for change in changes]
        return [*files, reference.safetensors_bytes({other: tensors[other] for other in tensors if other != name})]

    def of_known_size(self) -> bytes:
        """The layers and channels of GPT-2, and little else of it."""
        zeros = bytes(4 * 768)
        names = ("wte.weight", "wpe.weight", "h.11.ln_1.weight")
        return reference.safetensors_bytes(dict.fromkeys(names, ("F32", (1, 768), zeros)))

    def sharded(self, files: dict[str, bytes]) -> dict[str, bytes]:
        """A model in two shards."""
        tensors = reference.safetensors(files["model.safetensors"])
        assert tensors is not None
        places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
        shards = {
            shard: reference.safetensors_bytes({name: tensors[name] for name in tensors if places[name] == shard})
            for shard in set(places.values())
        }
        index = dump({"metadata": {}, "weight_map": places})
        return {
            "argv": b'["hf", "out.bin"]',
            "config.json": files["config.json"],
            "model.safetensors.index.json": index,
            **dict(sorted(shards.items())),
        }

    def halved(self, file: bytes) -> bytes:
        """A file's tensors in float16, the names without prefix, a head and masks beside them."""
        tensors = reference.safetensors(file)
        assert tensors is not None
        halves = {
            name.removeprefix("transformer."): ("F16", shape, reference.as_floats(dtype, data).astype("<f2").tobytes())
            for name, (dtype, shape, data) in tensors.items()
        }
        masks = {"h.0.attn.bias": ("BOOL", (1, 1), b"\x01"), "h.0.attn.masked_bias": ("F32", (), bytes(4))}
        return reference.safetensors_bytes({**halves, "lm_head.weight": halves["wte.weight"], **masks})

    def altered(self, random: Random, name: str, content: bytes, like: bytes) -> bytes:
        """A model's file, changed."""
        return mutate_safetensors(random, content, like)

    def run(self, data: bytes) -> str:
        """Convert; compare the result with what another parser finds in the source."""
        files = unpack(data)
        for name in ("hf", "dir.safetensors", "empty", "full"):
            (self.folder / name).mkdir()
        (self.folder / "full" / "old.bin").write_bytes(b"old")
        os.mkfifo(self.folder / "fifo.safetensors")
        argv = [word for word in words_of(files.pop("argv", b"")) if stays(word)]
        faults = load_json(files.pop("faults", b""))
        for name, content in files.items():
            self.place(self.folder / ("" if name == "a.bin" else "hf") / name.replace("..", "_"), content)
        os.chdir(self.folder)
        before = self.tree()
        with failing(faults, self.folder) as altered:
            outcome = run_main(as_program("pygpt.commands.convert"), argv)
        judge(outcome, argv)
        after = {**self.tree(), **{name: before[name] for name in altered & before.keys()}}
        if altered - before.keys():
            return label_of(outcome)  # another process was at what is written: it is not ours to judge
        if "-h" in argv or "--help" in argv or (outcome.status != 0 and (not faults or after == before)):
            same("files", after, before)
            return label_of(outcome)
        same("stdout", outcome.out, b"")  # what is written is whole, also where a fault came when it was done
        changed = sorted(name for name in after if after[name] != before.get(name))
        self.compare(before, after, changed)
        return label_of(outcome)

    def place(self, path: Path, content: bytes) -> None:
        """Make one of the files."""
        if content == b"\0fifo":
            os.mkfifo(path)
        else:
            path.write_bytes(content.replace(b"\0pad", b" " * JSON_LIMIT, 1))

    def tree(self) -> dict[str, bytes]:
        """All files."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def compare(self, before: dict[str, bytes], after: dict[str, bytes], changed: list[str]) -> None:
        """The result is sound and has the source's values, rounded where it is bfloat16."""
        results = [after[name] for name in changed]
        if len(results) == 1:
            made = reference.checkpoint(results[0])
            if made is None:
                raise Finding(f"the result is no sound checkpoint: {changed}")
            version, shape, tensors = made
            values = {
                name: reference.as_floats("BF16" if version == 5 else "F32", data)[
                    : shape["V"] * shape["C"] if name == "wte" else None
                ]
                for name, data in tensors.items()
            }
            bf16 = version == 5
        else:
            file = next(after[name] for name in changed if name.endswith(".safetensors"))
            found = reference.safetensors(file)
            if (
                found is None
                or len(changed) != 2
                or reference.strict_json(next(after[n] for n in changed if n.endswith("json"))) is None
            ):
                raise Finding(f"the result is no sound folder: {changed}")
            values, dtypes = reference.model_of(found)
            bf16 = dtypes == {"BF16"}
        for source in self.sources(before):
            if all(_equal(source.get(name), array, bf16) for name, array in values.items()):
                return
        raise Finding("the result has not the source's values")

    def sources(self, before: dict[str, bytes]) -> list[dict[str, reference.Floats]]:
        """The models that are there."""
        found = []
        for content in before.values():
            if sound := reference.checkpoint(content):
                version, shape, values = sound
                dtype = "BF16" if version == 5 else "F32"
                flat = {name: reference.as_floats(dtype, data) for name, data in values.items()}
                found.append({**flat, "wte": flat["wte"][: shape["V"] * shape["C"]]})
        parts = [tensors for content in before.values() if (tensors := reference.safetensors(content))]
        with suppress(ValueError, KeyError):
            found += [reference.model_of(part)[0] for part in parts]
            found.append(reference.model_of({name: tensor for part in parts for name, tensor in part.items()})[0])
        return found


def _equal(source: reference.Floats | None, found: reference.Floats, bf16: bool) -> bool:
    """Whether values are the source's, or its nearest bfloat16."""
    if source is None or source.shape != found.shape:
        return False
    nan = np.isnan(source)
    if not np.array_equal(nan, np.isnan(found)):
        return False
    if bf16 and not np.array_equal(source[~nan].view("<u4"), found[~nan].view("<u4")):
        bits = source[~nan].view("<u4").astype("u8")
        return np.array_equal((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16, found[~nan].view("<u4"))
    return np.array_equal(source[~nan].view("<u4"), found[~nan].view("<u4"))


class StatusTarget(Target):
    """cli.status_of, which every command goes through: {"raise": exception, "cause": another, "text": what it says, "out":
    what was printed, "inner": whether a command is run by a command}, and "closed" streams."""

    name = "cli"

    def open(self) -> None:
        """Let go of SIGBUS, which this process has as a command of its own: here each input takes it and gives it back."""
        _signals.end()

    def seeds(self) -> list[bytes]:
        """Every exception."""
        found: list[dict[str, Any]] = [{"raise": name, "text": "no"} for name in STATUS]
        found += [{"raise": "RuntimeError", "cause": cause, "text": "no"} for cause in STATUS]
        found += [{"raise": None, "out": "1\n" * 3000}, {"raise": None, "inner": True}, {"raise": "OSError", "inner": True}]
        found += [{"raise": "InputError", "text": text} for text in ("", "a\nb\u2028c", "\x1b[31m", "\ud800", "x" * 9000)]
        return [dump(one) for one in [*found, {"raise": None, "out": "1", "closed": ["stdout"]}]]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change anything."""
        found = load_json(data)
        if not isinstance(found, dict) or random.random() < 0.5:
            return mutate_json_text(random, data, other)
        values: dict[str, Sequence[Any]] = {name: [*STATUS, None] for name in ("raise", "cause")}
        values |= {"inner": [True, False], "text": WORDS, "out": WORDS}
        key = random.choice(list(values))
        return dump({**found, key: random.choice(values[key])})

    def run(self, data: bytes) -> str:
        """Raise it: the status is the promised one, and what is promised nothing comes out as it is."""
        found = load_json(data)
        found = found if isinstance(found, dict) else {}
        wanted, cause, text, out = (str(found.get(name, "")) for name in ("raise", "cause", "text", "out"))
        if not text.strip():
            text = "" if wanted == "MemoryError" else "what"  # the others always say something
        error = EXCEPTIONS[wanted](text) if wanted in STATUS else None
        if error is not None and cause in STATUS:
            error.__cause__ = EXCEPTIONS[cause]("cause")

        def job() -> None:
            if out:
                print(out.encode("utf-8", "replace").decode())
            if error is not None:
                raise error

        def command(_: Sequence[str]) -> int:
            statuses: list[int] = []
            inner = found.get("inner") is True
            status = status_of(lambda: statuses.append(status_of(job)) if inner else job())
            return statuses[0] if inner else status

        closed = closed_streams(data)
        try:
            outcome = run_main(command, [], b"", closed)
        except BaseException as got:
            if got is not error or STATUS[wanted] is not None:
                raise
            return f"{wanted} comes out"
        judge(outcome, [], lines=1)
        expected = 0 if error is None else STATUS[wanted]
        if isinstance(error, (ImportError, RuntimeError)) and isinstance(error.__cause__, KeyboardInterrupt):
            expected = 130
        gone = len(out.encode("utf-8", "replace")) > MOST_OUTPUT
        if outcome.status != expected and not gone:
            raise Finding(f"{error!r:.200} ends with {outcome.status}, expected {expected}")
        return label_of(outcome)


EXCEPTIONS: dict[str, Callable[[str], BaseException]] = {
    **{one.__name__: one for one in (InputError, CheckpointError, PyGPTError, MemoryError, ImportError, OSError)},
    **{one.__name__: one for one in (KeyboardInterrupt, BrokenPipeError, RuntimeError, ZeroDivisionError, RecursionError)},
}
# By exception: the exit status; None for what is a defect, and is shown as one.
STATUS = {
    "InputError": 2, "CheckpointError": 2, "PyGPTError": 1, "MemoryError": 1, "ImportError": 1, "OSError": 1,
    "KeyboardInterrupt": 130, "BrokenPipeError": 141, "RuntimeError": None, "ZeroDivisionError": None, "RecursionError": None,
}  # fmt: skip

COMMANDS = (StatusTarget, CommandTarget, ServeTarget, ConvertTarget, ProcessTarget)
