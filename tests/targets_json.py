"""More targets of fuzzing, whose inputs are JSON: vocabularies, the lines and restarts of `pygpt batch`, and bodies of HTTP."""

import asyncio
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import parsers
from mutate import dump, mutate_bytes, mutate_json_text
from run_main import bounded, judge, run_main
from serving import bare
from targets import LONGEST_MESSAGE, LONGEST_RUN_S, SERVED, FileTarget, LeftOut, Target, load_json, skeleton, weights
from targets import TARGETS as OTHERS
from tokenizers import Tokenizer as Peer

from pygpt import GPT2, InputError, write_checkpoint
from pygpt.__main__ import main
from pygpt.cluster import Complete
from pygpt.formats.vocabulary import characters_of, load_tokenizer, trained_on, write_vocabulary
from pygpt.server.app import ENDPOINTS, Options, Server
from pygpt.server.call import Served

SEPARATOR = b"\0\0"  # between the files of an input
LONG = 300  # tokens: a window may slide for ever
PATHS = sorted({endpoint.path.encode() for endpoint in ENDPOINTS} - {b"/trace"})  # which waits for a step


def model_in(folder: Path) -> Path:
    """Write a small model with a vocabulary of characters, beside the working folder."""
    path = folder.with_name(folder.name + ".bin")
    write_checkpoint(path, SERVED, weights(SERVED))
    write_vocabulary(str(path.with_suffix(".tokenizer.json")), characters_of([*map(chr, range(32, 127)), "\n\u00e9"]))
    return path


class TokenizerJsonTarget(FileTarget):
    """tokenizer.json, or vocab.json and merges.txt. Ids are those of Hugging Face's tokenizers, if it reads the file, too."""

    name = "vocabulary"
    TEXTS = ("", "to be, or not to be", "  to\n\nbe \u00e9\u00e9", "or<|endoftext|>not", "abc123 'll")

    def seeds(self) -> list[bytes]:
        text = ["to be, or not to be: that is the question\n" * 3]
        found = [dump(characters_of(["ab\u00e9"])), dump(trained_on(text, 270))]
        model = trained_on(text, 262)["model"]
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        return [*found, SEPARATOR.join([dump(model["vocab"]), "\n".join(["#version: 0.2", *merges, ""]).encode()])]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        first, *merges = data.split(SEPARATOR, 1)
        if merges and random.random() < 0.5:
            return SEPARATOR.join([first, mutate_bytes(random, merges[0], other, fields=0)])
        return SEPARATOR.join([mutate_json_text(random, first, other.split(SEPARATOR)[0]), *merges])

    def neighbours(self, data: bytes) -> Iterator[bytes]:
        return islice(super().neighbours(data), 0, None, 9)

    def run(self, data: bytes) -> str:
        first, *merges = data.split(SEPARATOR, 1)
        names = ("vocab.json", "merges.txt") if merges else ("tokenizer.json",)
        for name, content in zip(names, (first, *merges), strict=True):
            (self.folder / name).write_bytes(content)
        return self.read(self.folder, data)

    def read(self, path: Path, data: bytes) -> str:
        mine, ids = load_tokenizer(path), []
        for text in self.TEXTS:
            try:
                ids.append(mine.encode(text, allow_special=True))
            except InputError:  # a character that the vocabulary does not have
                ids.append([])
            mine.decode(ids[-1]).encode()
        write_vocabulary(str(path / "again.json"), mine.vocabulary())
        again = load_tokenizer(path / "again.json")
        assert all(again.encode(text, allow_special=True) == own for text, own in zip(self.TEXTS, ids, strict=True) if own)
        if SEPARATOR in data:
            return "two files"
        try:
            peer = Peer.from_file(str(path / "tokenizer.json"))
            theirs = [peer.encode(text, add_special_tokens=False).ids for text in self.TEXTS]
        except BaseException as error:  # its panics are BaseException
            return f"alone: {skeleton(str(error))}"
        given = load_json(data)
        if any(t["content"] not in given["model"]["vocab"] for t in given.get("added_tokens") or []):
            return "other ids"  # tokenizers numbers these itself
        for text, own, its in zip(self.TEXTS, ids, theirs, strict=True):
            assert not own or own == its, (text, own, its)
        return "as tokenizers"


class BatchTarget(Target):
    """Lines for `pygpt batch`, the answers so far and the job's record. Each answer is that of its row alone."""

    name = "batch"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = model_in(folder)

    def seeds(self) -> list[bytes]:
        rows = [
            b'{"id": 1, "tokens": [1, 2], "max_new_tokens": 3}\n{"tokens": [5], "top_p": 0.7}\n{"id": "x", "prompt": "to"}\n',
            b'{"prompt": "to be", "continuations": ["or", [1, 2]]}\n\n{"tokens": [1], "overflow": "slide", "total": 40}\n',
            b'{"tokens": [3], "sampler": "greedy", "stop_token_ids": [7]}\n{"id": 2, "tokens": [3], "top_k": 2, "seed": 1}',
        ]
        with_parts = []
        for lines in rows[:2]:
            self.answer(lines)
            record, done = ((self.folder / f"out{end}").read_bytes() for end in (".job.json", ""))
            with_parts.append(SEPARATOR.join([lines, done[: len(done) * 2 // 3], record]))
            for path in self.folder.iterdir():
                path.unlink()
        return [*rows, *with_parts, b'{"id": 1, "tokens": [1]}\n{"id": "1", "tokens": [1]}\n', b"\n", b'{"id": NaN}', b"\xff\n"]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        parts, at = data.split(SEPARATOR), random.randrange(data.count(SEPARATOR) + 1)
        if random.random() < 0.2:
            parts[at] = mutate_bytes(random, parts[at], other, fields=0)
        else:
            lines = parts[at].split(b"\n") if at < 2 else [parts[at]]
            which = random.randrange(len(lines))
            lines[which] = mutate_json_text(random, lines[which], random.choice(other.split(SEPARATOR)[0].split(b"\n")))
            parts[at] = b"\n".join(lines)
        return SEPARATOR.join(parts)

    def answer(self, rows: bytes, *more: bytes) -> Any:
        """Run the command over lines, with the answers so far and the record if they are given."""
        (self.folder / "rows.jsonl").write_bytes(rows)
        for name, content in zip(("out.part", "out.job.json"), more, strict=False):
            (self.folder / name).write_bytes(content)
        argv = ["batch", str(self.folder / "rows.jsonl"), "-o", str(self.folder / "out"), "-m", str(self.model), "-t", "1"]
        with bounded(LONGEST_RUN_S):
            outcome = run_main(main, argv)
        judge(outcome, argv, lines=2)
        return outcome

    def run(self, data: bytes) -> str:
        rows, *more = data.split(SEPARATOR)
        found = [(i, row) for i, line in enumerate(rows.split(b"\n"), 1) if (row := load_json(line)) is not None]
        sizes = [row.get(name) for _, row in found if isinstance(row, dict) for name in ("total", "max_new_tokens")]
        if any(isinstance(size, (int, float)) and size > LONG for size in sizes):
            raise LeftOut
        outcome, out = self.answer(rows, *more[:2]), self.folder / "out"
        assert {path.name for path in self.folder.iterdir()} <= {"rows.jsonl", "out", "out.part", "out.job.json"}
        if outcome.status != 0:
            assert not out.exists()
            assert more or outcome.status != 2 or not (self.folder / "out.part").exists()
            return f"status {outcome.status} {skeleton(outcome.err.strip().replace(str(self.folder), ''))}"
        answers, kept = out.read_bytes().splitlines(keepends=True), more[0].splitlines(keepends=True) if more else []
        assert len(answers) == len(found)
        assert all(parsers.strict_json(line) is not None or b"Infinity" in line for line in answers if line not in kept)
        with Complete(self.model, threads=1, batch_size=1, seed=0) as alone:
            for (number, row), line in zip(found, answers, strict=True):
                [wanted] = alone.rows([{"id": number, **row}])
                assert line in kept or json.loads(line) == json.loads(json.dumps(wanted)), (row, line, wanted)
        return f"{len(found)} answers, {sum(line in kept for line in answers)} kept"


class HTTPTarget(Target):
    """A request to the server: a line with the path, and the body. It is asked twice; the second answer meets a warm cache."""

    name = "http"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = model_in(folder)
        self.model = GPT2.load(self.path, threads=2)

    def seeds(self) -> list[bytes]:
        completions: list[dict[str, Any]] = [
            {"prompt": "to be", "max_tokens": 3, "temperature": 0, "logprobs": 2},
            {"prompt": ["to", "be"], "n": 2, "seed": 3, "stream": True, "stop": ["t"], "stream_options": {}},
            {"prompt": [1, 2, 3], "echo": True, "logprobs": 0, "max_tokens": 0, "top_k": 3, "min_p": 0.1, "seed": 1},
            {"prompt": [[1], [2, 3]], "logit_bias": {"1": 5, "2": -100}, "repetition_penalty": 1.2, "seed": 2},
            {"prompt": "to", "speculation": 3, "sampler": "median", "return_token_ids": True, "presence_penalty": 1},
        ]  # fmt: skip
        others: dict[str, Any] = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "to"}], "max_completion_tokens": 2, "seed": 5},
            "/tokenize": {"content": "to be", "with_pieces": True}, "/detokenize": {"tokens": [1, 2, 3]}, "/nothing": {},
            "/inspect": {"tokens": [1, 2, 3], "layer": 1}, "/v1/models/x": {}, "/tokenizer_info": {}, "/metrics": {},
        }  # fmt: skip
        pairs = [*(("/v1/completions", body) for body in completions), *others.items()]
        return [path.encode() + b"\n" + dump(body) for path, body in pairs]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        path, _, body = data.partition(b"\n")
        if random.random() < 0.1:
            path = random.choice([*PATHS, mutate_bytes(random, path, other, fields=0)])
        return path.replace(b"\n", b"") + b"\n" + mutate_json_text(random, body, other.partition(b"\n")[2])

    def run(self, data: bytes) -> str:
        path, _, body = data.partition(b"\n")
        if path.strip(b"/") == b"trace":
            raise LeftOut
        (status, first), (again, second) = asyncio.run(self.ask(path.decode("latin-1"), body))
        assert status in (200, 400, 404, 405, 429), (status, first)
        assert again == status
        if status != 200:
            error = parsers.strict_json(first)
            assert error is not None
            message = error["error"]["message"]
            assert message.isprintable()
            assert 0 < len(message) < LONGEST_MESSAGE, message
            assert first == second
            return f"{status} {skeleton(message)}"
        asked = load_json(body)
        if path == b"/v1/completions" and isinstance(asked, dict):
            fixed = "seed" in asked and asked["seed"] is not None
            if asked.get("stream"):
                assert first.endswith(b"data: [DONE]\n\n") or b'"error"' in first, first
            else:
                assert not fixed or bare(json.loads(first)) == bare(json.loads(second)), (first, second)
        return f"200 {path!r}"

    async def ask(self, path: str, body: bytes) -> list[tuple[int, bytes]]:
        """Send a request twice to a new server without a socket; return status and content of each answer."""
        limits: dict[str, Any] = {"cache_bytes": 1 << 20, "max_live": 3, "target_ms": 60, "fingerprint": False}
        served, found = Served(self.model, ["model"], str(self.path), **limits), []
        server = Server([served], Options(chat=True, queue=8))
        methods = {one.path: "GET" if one.fields is None else "POST" for one in ENDPOINTS}
        scope = {"type": "http", "method": methods.get(path, "POST"), "path": path, "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
        async with server._lifespan(server._app):
            for _ in range(2):
                parts: list[Any] = []
                left = [{"type": "http.request", "body": body, "more_body": False}]

                async def receive(left: list[Any] = left) -> Any:
                    if left:
                        return left.pop()
                    return await asyncio.Event().wait()

                async def send(message: Any, parts: list[Any] = parts) -> None:
                    parts.append(message)

                async with asyncio.timeout(60):
                    await server(dict(scope), receive, send)
                found.append((parts[0]["status"], b"".join(part.get("body", b"") for part in parts[1:])))
        return found


TARGETS: dict[str, type[Target]] = {**OTHERS, **{each.name: each for each in (TokenizerJsonTarget, BatchTarget, HTTPTarget)}}
