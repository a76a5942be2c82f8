"""Targets: the package's commands. What they print, their exit statuses and what they leave behind are held against their
promises.

They run in this process, with streams of its own: `run_main` tries some hundred command lines a second. `process` starts real
processes. Inputs are JSON: {"argv": [words], "stdin": text}, in which U+DC80 to U+DCFF stand for single bytes. The tools'
command lines and the chat are in programs.py, downloads in network.py.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from pygpt import GPT2, Checkpoint, PyGPTError, write_checkpoint
from pygpt.__main__ import LINE_LIMIT, build_parser, main
from pygpt.convert import main as convert_main
from pygpt.huggingface import write_model

from . import reference
from .files import SERVED, SMALL, TINY, mutate_safetensors, weights
from .mutate import dump, mutate_json, mutate_json_text
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


def run_main(
    command: Callable[[Sequence[str]], int], argv: Sequence[str], stdin: bytes = b"", closed: Sequence[str] = ()
) -> Outcome:
    """Run a command's main() here, with streams of its own. closed: those of "stdin" and "stdout" that are not there."""
    before = sys.stdin, sys.stdout, sys.stderr
    pipe, err = Pipe(), io.BytesIO()
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


VARIABLES = ("PYGPT_MODEL", "PYGPT_THREADS", "PYGPT_HOME", "XDG_CACHE_HOME")


class CommandTarget(LineTarget):
    """`python -m pygpt TOKEN...`, in this process, over a tiny model. Beside "argv" and "stdin" an input may have "env", values
    of VARIABLES, "" for one that is not set; and "here", a model in the current folder."""

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
        return [*super().seeds(), *map(dump, more)]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change words; now and then a variable."""
        changed = load_json(super().mutate(random, data, other))
        before = load_json(data)
        assert isinstance(changed, dict)
        if isinstance(before, dict):
            changed |= {name: before[name] for name in ("env", "here") if name in before}
        if random.random() < 0.15:
            changed["env"] = {random.choice(VARIABLES): random.choice(self.words)}
            changed["here"] = random.random() < 0.5
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
        before = sorted(os.listdir(self.folder))
        closed = closed_streams(data)
        outcome = self.start(argv, stdin, closed)
        judge(outcome, argv, lines=2)  # a notice about the embedded model
        self.judge_output(outcome, [*argv, *(["and what is not usual"] if variables or closed else [])])
        same("files", sorted(os.listdir(self.folder)), before)
        return label_of(outcome)

    def start(self, argv: list[str], stdin: bytes, closed: list[str]) -> Outcome:
        """Run it."""
        return run_main(main, argv, stdin, closed)

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
    """The same command lines in processes of their own."""

    name = "process"

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
        if any(value is None for value in found.values()):
            return None
        for name in ("total", "max_new_tokens"):  # a window may slide for ever
            if isinstance(found.get(name), int) and found[name] > 3000 and found.get("overflow") == "slide":
                raise LeftOut
        return found


class ConvertTarget(Target):
    """`python -m pygpt.convert`: folders and files of Hugging Face's kind, and checkpoints. An input holds several files."""

    name = "convert"
    batch = 500

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
        return [pack(files) for files in found]

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

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change one of the files, put in one of another input, or take one away."""
        files, others = unpack(data), unpack(other)
        if not files:
            return other
        name = random.choice(sorted(files))
        content, like = files[name], others.get(name, b"")
        if random.random() < 0.1:
            del files[name]
        elif random.random() < 0.1 and others:
            name = random.choice(sorted(others))
            files[name] = others[name]
        elif name == "argv":
            files[name] = self.words(random, content)
        elif name.endswith(".json"):
            files[name] = mutate_json_text(random, content, like)
        else:
            files[name] = mutate_safetensors(random, content, like)
        return pack(files)

    def words(self, random: Random, content: bytes) -> bytes:
        """Change the command line."""
        if random.random() < 0.5:
            return dump(mutate_json(random, load_json(content)))
        words = load_json(content)
        words = words if isinstance(words, list) else []
        words.insert(
            random.randrange(len(words) + 1), random.choice((*WORDS, "--version", "--heads", "--heads=2", "--version=3"))
        )
        return dump(words)

    def run(self, data: bytes) -> str:
        """Convert; compare the result with what another parser finds in the source."""
        files = unpack(data)
        for name in ("hf", "dir.safetensors", "empty", "full"):
            (self.folder / name).mkdir()
        (self.folder / "full" / "old.bin").write_bytes(b"old")
        os.mkfifo(self.folder / "fifo.safetensors")
        argv, _ = parse_input(b'{"argv": ' + (files.pop("argv", b"[]") or b"[]") + b"}")
        argv = [word for word in argv if stays(word)]
        for name, content in files.items():
            (self.folder / ("" if name == "a.bin" else "hf") / name.replace("..", "_")).write_bytes(content)
        os.chdir(self.folder)
        before = self.tree()
        outcome = run_main(convert_main, argv)
        judge(outcome, argv)
        after = self.tree()
        if "-h" in argv or "--help" in argv or outcome.status != 0:
            same("files", after, before)
            return label_of(outcome)
        same("stdout", outcome.out, b"")
        changed = sorted(name for name in after if after[name] != before.get(name))
        self.compare(before, after, changed)
        return label_of(outcome)

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


COMMANDS = (CommandTarget, ServeTarget, ConvertTarget, ProcessTarget)
