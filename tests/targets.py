"""The targets of fuzzing: each reader of a file, compared with its parser in parsers.py, and the commands that take files and
requests.

A target has valid inputs of tiny shapes, their mutations, and check(), which tries one input. test_readers.py tries the
corpus and some mutations, tools/fuzz.py as many as you like. All inputs are bytes."""

import codecs
import hashlib
import io
import json
import os
import re
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import parsers
from mutate import UINT64, dump, mutate_bytes, mutate_json_text, neighbours, put
from run_main import Outcome, bounded, judge, run_main

import pygpt
from pygpt import GPT2, Config, DataLoader, Example, PyGPTError, write_checkpoint, write_examples, write_tokenizer, write_tokens
from pygpt.__main__ import main
from pygpt.errors import DataError
from pygpt.formats.dtypes import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q8_0, Format, layout
from pygpt.formats.gguf import TYPES, GGUFFile, write_gguf
from pygpt.formats.panels import PanelFile, formats_of, quantise, write_panels
from pygpt.formats.safetensors import SafetensorsFile, write_safetensors
from pygpt.tokenizer import END_OF_TEXT

TINY = Config(maxT=3, V=5, L=1, NH=2, C=4)
SMALL = Config(maxT=6, V=130, L=2, NH=1, C=2)
SERVED = Config(maxT=12, V=130, L=2, NH=1, C=2)  # room for the ten tokens that are the default
ONE = Config(maxT=3, V=5, L=1, NH=1, C=1)
GPT2_IDS = Config(maxT=8, V=50257, L=1, NH=1, C=2)  # its ids are GPT-2's, so that they are text
TRAINED = Config(maxT=3, V=5, L=1, NH=2, C=4)
WIDE = Config(maxT=3, V=5, L=1, NH=2, C=32)  # its rows are whole blocks
NARROW = Config(maxT=3, V=5, L=1, NH=1, C=2, F=3, epsilon=1e-3, tied=False)
GGUF_HEADER = 1100  # bytes: most of a small file's
LONGEST_MESSAGE = 1500  # characters: one clear line, a path in it
LONGEST_RUN_S = 5.0  # of a command
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


class LeftOut(Exception):
    """An input that cannot be judged: its answer is random."""


class Target(ABC):
    """One reader or command, in a folder that is empty before each input."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Yield valid inputs, and some that are nearly valid."""

    @abstractmethod
    def run(self, data: bytes) -> str:
        """Try one input. Return the outcome in a word. Raise PyGPTError for a refusal, AssertionError for a finding."""

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change an input; `other` is another one, to take parts from."""
        return mutate_bytes(random, data, other)

    def check(self, data: bytes) -> str:
        """Try one input; return a label for its outcome. Raises for a finding."""
        for entry in os.scandir(self.folder):  # files are not written anew in place: an older map may still view them
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        try:
            label = self.run(data)
        except LeftOut:
            label = "left out"
        except PyGPTError as error:
            text = str(error).replace(str(self.folder), "")
            if not text.strip() or "\n" in text or len(text) > LONGEST_MESSAGE:
                raise AssertionError(f"not a clear line: {text[:3000]!r}") from error
            label = f"refused: {skeleton(text)}"
        left = [path.name for path in self.folder.rglob("*.tmp")]
        assert not left, f"left half-written: {left}"
        return label


def skeleton(text: str) -> str:
    """A message without its values, which messages of one kind have in common."""
    text = re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "_", text)
    return re.sub(r"[-+.\w]*\d[-+.\w]*", "_", text)[:80]


@contextmanager
def agreeing(expected: object, what: str) -> Iterator[None]:
    """In this block a reader must agree with a parser: `expected` is None if the parser refused the file."""
    try:
        yield
    except PyGPTError as error:
        if expected is not None:
            raise AssertionError(f"a sound {what} is refused: {error}") from error
        raise
    assert expected is not None, f"accepted, and it is not a sound {what}"


def weights(config: Config, seed: int = 1) -> Arrays:
    """Random weights."""
    source = np.random.default_rng(seed)
    return {name: source.normal(0, 0.5, shape).astype(np.float32) for name, shape, _, _ in config.tensors(padded=False)}


class FileTarget(Target):
    """A reader of one file."""

    fields = 10  # of the header

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        return mutate_bytes(random, data, other, fields=self.fields)

    def neighbours(self, data: bytes) -> Iterator[bytes]:
        """An input with one number changed."""
        return neighbours(data, self.fields)

    def run(self, data: bytes) -> str:
        path = self.folder / "input.bin"
        path.write_bytes(data)
        return self.read(path, data)

    @abstractmethod
    def read(self, path: Path, data: bytes) -> str:
        """Read the file; compare."""

    def written(self, write: Callable[..., object], *arguments: Any, **options: Any) -> bytes:
        """What a writer makes."""
        path = self.folder / "output.bin"
        write(path, *arguments, **options)
        return path.read_bytes()


class CheckpointTarget(FileTarget):
    """Checkpoint, write_checkpoint, and networks with any numbers that a file may have."""

    name, fields = "checkpoint", 9

    def seeds(self) -> list[bytes]:
        return [
            self.written(write_checkpoint, config, weights(config), version=version)
            for config in (TINY, SMALL)
            for version in (1, 3, 5)
        ]

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.checkpoint(data)
        with agreeing(expected, "checkpoint"):
            checkpoint = pygpt.Checkpoint(path)
        assert expected is not None
        version, shape, tensors = expected
        with checkpoint:
            config = checkpoint.config
            assert {name: getattr(config, name) for name in shape} == shape
            found = {name: checkpoint.tensor(name) for name in tensors}
            for name, values in found.items():
                wanted = parsers.as_floats("BF16" if version == 5 else "F32", tensors[name])
                assert values.tobytes() == wanted[: values.size].tobytes(), name
                assert np.concatenate(list(checkpoint.pieces(name))).tobytes() == values.tobytes(), name
            again = self.written(write_checkpoint, config, found, version=version)
        begin = 1024 + config.V * config.C * (2 if version == 5 else 4)
        end = 1024 + len(tensors["wte"])
        clean = data[:begin] + bytes(end - begin) + data[end:]  # padding is written as zeros
        clean = put(clean, 28, bytes(4)) if version == 1 else clean  # which does not use Vp
        if version != 5 or not any(np.isnan(values).any() for values in found.values()):  # a NaN becomes a quiet one
            assert again == clean
        self.compute(path, config)
        return f"version {version}"

    def compute(self, path: Path, config: Config) -> None:
        """The networks give ids, or refuse the numbers."""
        total = min(config.maxT, 4)
        with GPT2.load(path, threads=2) as model, pygpt.SerialGPT2.load(path) as serial:
            for network in (model, serial):
                for sampler in ("median", "greedy", "sample"):
                    try:
                        ids = list(network.generate([0], total=total, sampler=sampler)) if total > 1 else []
                    except pygpt.NumericalError:
                        continue
                    assert all(type(token) is int and 0 <= token < config.V for token in ids), (sampler, ids)
        with pygpt.TrainableGPT2.load(path, threads=2) as trainable:
            batch = np.zeros((2, config.maxT), np.int64)
            trainable.forward(batch, batch)
            trainable.backward()
            trainable.update(lr=0.1, step=1)


class SafetensorsTarget(FileTarget):
    """SafetensorsFile and write_safetensors."""

    name = "safetensors"

    def seeds(self) -> list[bytes]:
        arrays = [np.arange(size, dtype=np.float32) for size in (6, 4)]
        by_hand = {
            "x": ("F16", (2, 3), bytes(12)), "y": ("BF16", (1,), b"\x80\x3f"), "empty": ("I64", (0, 7), b""),
            "scalar": ("F64", (), bytes(8)),
        }  # fmt: skip
        pair = parsers.safetensors_bytes(dict.fromkeys("ab", ("F32", (1,), bytes(4))))
        files = [parsers.safetensors_bytes(found) for found in ({}, by_hand)]
        files += [pair, pair.replace(b'"b"', b'"a"'), struct.pack("<Q", 8) + b"[]      "]  # a name twice; not an object
        files += [pair.replace(b"[4, 8]", b"[5, 9]") + b"\0", pair.replace(b"[4, 8]", b"[0, 4]")[:-4]]  # a hole; an overlap
        for dtype in ("F32", "BF16"):
            with (self.folder / "output.bin").open("wb") as file:
                write_safetensors(file, dtype, [("a", (2, 3)), ("bc", (4,))], iter(arrays))
            files.append((self.folder / "output.bin").read_bytes())
        return files

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        return mutate_safetensors(random, data, other)

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.safetensors(data)
        with agreeing(expected, "safetensors file"):
            file = SafetensorsFile(path)
        assert expected is not None
        with file:
            assert sorted(file.tensors) == sorted(expected)
            for name, (dtype, shape, content) in expected.items():
                assert file.tensors[name][:2] == (dtype, shape)
                if dtype in ("F32", "F16", "BF16"):
                    assert file.stored(name).tobytes() == content
            for name, (dtype, _, _) in expected.items():
                if dtype not in ("F32", "F16", "BF16"):
                    file.stored(name)
                    raise AssertionError(f"tensor {name!r} of dtype {dtype} was given out")
        return "read"


class GGUFTarget(FileTarget):
    """GGUFFile and write_gguf."""

    name = "gguf"

    def seeds(self) -> list[bytes]:
        files = []
        for config, kind, head in (
            (TINY, FLOAT32, BFLOAT16),
            (WIDE, Q4_0, Q8_0),
            (WIDE, FLOAT16, Q4_0),
            (NARROW, FLOAT32, FLOAT32),
        ):
            formats = formats_of(config, kind, head, FLOAT32)
            tensors = {name: iter(blocks) for name, blocks in blocks_by_layer(config, formats).items()}
            files.append(self.written(write_gguf, config, formats, tensors))
        return files

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change the header, where most fields are of 64 bits, or anything."""
        if random.random() < 0.3:
            return mutate_bytes(random, data, other, fields=6)
        if random.random() < 0.5:
            value = random.choice((*UINT64, *range(40)))
            return put(data, random.randrange(GGUF_HEADER), struct.pack("<Q", value)[: random.choice((1, 4, 8))])
        return mutate_bytes(random, data[:GGUF_HEADER], other[:GGUF_HEADER], fields=6) + data[GGUF_HEADER:]

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.gguf(data)
        with agreeing(expected, "GGUF file"):
            model = GGUFFile(path)
        assert expected is not None
        shape, tensors = expected
        with model:
            assert {name: getattr(model.config, name) for name in shape} == shape
            for (name, layer), (kind, content) in tensors.items():
                _, N, _ = layout(model.config, name)
                found, blocks = model.part(name, layer, 0, N)
                assert TYPES[kind] == found
                assert blocks.tobytes() == content
            model.stored()
        return "read"


class PanelTarget(FileTarget):
    """PanelFile and write_panels."""

    name = "panels"

    def seeds(self) -> list[bytes]:
        files = []
        for config, kind, head in ((TINY, Q8_0, Q4_0), (SMALL, Q4_0, Q8_0), (ONE, FLOAT16, FLOAT32), (ONE, BFLOAT16, Q8_0)):
            formats = formats_of(config, kind, head, BFLOAT16 if kind == BFLOAT16 else FLOAT32)
            tensors = {name: iter(blocks) for name, blocks in blocks_by_layer(config, formats).items()}
            files.append(self.written(write_panels, config, formats, tensors, "0" * 64))
        return files

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change the header, and pad it to a whole line again."""
        data = mutate_safetensors(random, data, other)
        size = int.from_bytes(data[:8], "little")
        if 8 + size > len(data) or random.random() < 0.1:
            return data
        text = data[8 : 8 + size] + b" " * (-(8 + size) % 64)
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    def run(self, data: bytes) -> str:
        path = self.folder / "input.safetensors"
        path.write_bytes(data)
        return self.read(path, data)

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.panels(data)
        with agreeing(expected, "panel file"):
            model = PanelFile(path)
        assert expected is not None
        shape, tensors = expected
        with model:
            assert {name: getattr(model.config, name) for name in shape} == shape
            for name, (kind, content) in tensors.items():
                assert model.formats[name].name == kind
                used = model._stored(name)[1]
                assert content.startswith(used)
                assert len(content) - len(used) < 64
                list(model.parts(name))
            model.stored()
        return "read"


def blocks_by_layer(config: Config, formats: dict[str, Format]) -> dict[str, list[Any]]:
    """Random weights as blocks of these formats, layer by layer."""
    found: dict[str, list[Any]] = {}
    for name, array in weights(config).items():
        layers, N, K = layout(config, name)
        kind = formats[name]
        rows = np.pad(array.reshape(layers, N, K), ((0, 0), (0, 0), (0, -K % kind.block_values)))
        found[name] = [kind.from_float32(layer) if kind.from_float32 else quantise(kind, layer) for layer in rows]
    return found


def mutate_safetensors(random: Random, data: bytes, other: bytes) -> bytes:
    """Change the header's JSON, its length, or the bytes after it."""
    size = int.from_bytes(data[:8], "little")
    kind = random.randrange(10)
    if kind == 0:
        return put(data, 0, struct.pack("<Q", random.choice((*UINT64, min(size + 1, 2**64 - 1), abs(size - 1)))))
    if kind <= 2 or 8 + size > len(data):
        return mutate_bytes(random, data, other, fields=3)
    header = mutate_json_text(random, data[8 : 8 + size], other[8 : 8 + int.from_bytes(other[:8], "little")])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


class ShardTarget(FileTarget):
    """read_tokens, write_tokens and DataLoader."""

    name, fields = "shard", 4

    def seeds(self) -> list[bytes]:
        return [self.written(write_tokens, ids) for ids in ([0], list(range(13)), [50256, 0, 65535] * 9)]

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.shard(data)
        with agreeing(expected, "token file"):
            tokens = pygpt.read_tokens(path)
        assert expected is not None
        assert tokens.tolist() == expected
        assert self.written(write_tokens, iter([tokens])) == data
        B, T = 1 + len(data) % 3, 1 + len(data) // 3 % 4
        V = 50257 if expected[0] % 2 else None
        sound = len(expected) > B * T and (V is None or max(expected) < V)
        with agreeing(sound or None, "data set"):
            loader = DataLoader(path, B, T, V=V, shuffle_seed=None if len(data) % 5 else 7)
        places = {
            (tuple(expected[i : i + B * T]), tuple(expected[i + 1 : i + B * T + 1])) for i in range(0, len(expected), B * T)
        }
        batches = [loader.next_batch() for _ in range(loader.batches)]
        assert loader.batches == (len(expected) - 1) // (B * T)
        assert all(tuple(tuple(part.ravel().tolist()) for part in batch) in places for batch in batches)
        place = json.loads(json.dumps(loader.state()))
        following = loader.next_batch()[0].tolist()
        loader.restore(place)
        assert loader.next_batch()[0].tolist() == following
        return f"loaded, V {V}"


class VocabularyTarget(FileTarget):
    """read_tokenizer and write_tokenizer."""

    name, fields = "tokenizer", 5

    def seeds(self) -> list[bytes]:
        vocabularies = (([b"a"], 0), ([b"", b"\xff" * 255, b"<|endoftext|>"], 2), ([b"ab"] * 40, 39))
        first = struct.pack("<256i", 20240328, 1, 50257, *[0] * 253) + bytes(50257)
        return [*(self.written(write_tokenizer, tokens, eot) for tokens, eot in vocabularies), first]

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.tokenizer(data)
        with agreeing(expected, "vocabulary"):
            found = pygpt.read_tokenizer(path)
        assert found == expected
        again = self.written(write_tokenizer, *found)
        assert data[4] != 2 or again == data
        return f"version {data[4]}"


class DebugStateTarget(FileTarget):
    """read_debug_state and write_debug_state."""

    name, fields = "debug-state", 5

    def seeds(self) -> list[bytes]:
        states = []
        for B, T in ((1, 1), (2, 3)):
            ids = np.arange(B * T, dtype=np.int32).reshape(B, T) % ONE.V
            states.append(pygpt.DebugState(ids, ids, np.ones((B, T, ONE.V), np.float32), 1.5, weights(ONE)))
        return [self.written(pygpt.write_debug_state, ONE, state) for state in states]

    def read(self, path: Path, data: bytes) -> str:
        shape = parsers.shape_of(3, 5, 1, 1, 1)
        assert shape is not None
        expected = parsers.debug_state(data, shape)
        with agreeing(expected, "debug state"):
            found = pygpt.read_debug_state(path, ONE)
        assert expected is not None
        assert (found.inputs.ravel().tolist(), found.targets.ravel().tolist()) == (expected["inputs"], expected["targets"])
        assert found.logits.tobytes() == expected["logits"]
        assert np.isnan(found.loss) or struct.pack("<f", found.loss) == expected["loss"]
        values = [array.tobytes() for array in found.gradients.values()]
        assert values[0] == expected["gradients"][: 4 * 5]
        assert b"".join(values[1:]) == expected["gradients"][4 * 128 :]
        again = parsers.debug_state(self.written(pygpt.write_debug_state, ONE, found), shape)
        assert again is not None
        assert again["logits"] == expected["logits"]
        return "read"


class ExamplesTarget(FileTarget):
    """read_examples and write_examples."""

    name, fields = "examples", 5

    def seeds(self) -> list[bytes]:
        one = Example(0, 3, [5], [[1], [2], [3], [50256]])
        more = [Example(i, i, [7, 8, 9], [[1, 2], [3], [4] * 5, [6]]) for i in range(3)]
        sound, other = (self.written(write_examples, examples) for examples in ([one], more))
        size, longest = struct.unpack_from("<H", sound, 1026)[0] + 2, struct.unpack_from("<i", sound, 12)[0] + 2
        surplus = put(put(sound, 1026, struct.pack("<H", size)), 12, struct.pack("<i", longest)) + bytes(2)
        return [sound, other, surplus, *(put(sound, at, b"\5") for at in (1028, 1030, 1032))]  # index, label, endings

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.examples(data, 50257)
        with agreeing(expected, "file of examples"):
            found = list(pygpt.read_examples(path, V=50257))
        assert [(one.label, [list(ids) for ids in (one.context, *one.endings)]) for one in found] == expected
        assert self.written(write_examples, found)[1024:] == data[1024:]
        return "read"


class StateTarget(FileTarget):
    """TrainingState, its JSON of options, and Trainer.restore()."""

    name, fields = "state", 10

    def trainer(self) -> pygpt.Trainer:
        """A run that wrote these states."""
        loader = DataLoader(np.arange(40) % 5, 1, 3, shuffle_seed=1)
        return pygpt.Trainer(pygpt.TrainableGPT2.random(ONE, seed=1, threads=1), loader, pygpt.TrainingOptions())

    def seeds(self) -> list[bytes]:
        trainer = self.trainer()
        with trainer.engine:
            trainer.step()
            trainer.save(self.folder / "run.state", {"a": 1})
        sound = (self.folder / "run.state").read_bytes()
        text = sound[1024 : 1024 + int.from_bytes(sound[32:36], "little")].rstrip()
        odd = (b'"a": 1, "a": 1', b'"a": NaN', b'"a": 1e999', b'"a": "\\ud800"')
        return [sound, *(self.with_json(sound, text.replace(b'"a": 1', one)) for one in odd)]

    def with_json(self, data: bytes, text: bytes) -> bytes:
        """A state that says this, with a sum that fits."""
        text += b" " * (-len(text) % 64)
        size = int.from_bytes(data[32:36], "little")
        return self.sealed(data[:32] + struct.pack("<I", len(text)) + data[36:1024] + text + data[1024 + size :])

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change JSON, header or values, mostly with a sum that fits."""
        size = int.from_bytes(data[32:36], "little")
        if random.random() < 0.5 and 1024 + size + 32 < len(data):
            text = mutate_json_text(random, data[1024 : 1024 + size].rstrip(), other[1024:2048]) or b" "
            return self.with_json(data, text)
        data = mutate_bytes(random, data, other, fields=10)
        return self.sealed(data) if random.random() < 0.9 else data

    def neighbours(self, data: bytes) -> Iterator[bytes]:
        for one in neighbours(data, self.fields):
            yield one
            yield self.sealed(one)

    def sealed(self, data: bytes) -> bytes:
        """With a sum that fits."""
        return data[:-32] + hashlib.sha256(data[:-32]).digest()

    def read(self, path: Path, data: bytes) -> str:
        expected = parsers.state(data)
        if expected is None:
            with agreeing(None, "training state"):
                pygpt.TrainingState(path)
        assert expected is not None
        shape, text, values = expected
        with pygpt.TrainingState(path) as state:
            assert {name: getattr(state.config, name) for name in shape} == shape
            buffers = [np.empty(state.config.parameters(padded=True), np.float32) for _ in range(3)]
            state.read_into(buffers)
            assert b"".join(buffer.tobytes() for buffer in buffers) == values
            found = parsers.strict_json(text.strip())
            assert found is not None, "its JSON is not strict"
            assert (state.progress.step, state.progress.loader) == (found["step"], found["loader"])
        trainer = self.trainer()
        with trainer.engine:
            trainer.restore(path)
            trainer.save(self.folder / "again.state", state.progress.job)
        again = parsers.state((self.folder / "again.state").read_bytes())
        assert again is not None
        assert again[2] == values
        return "read"


class TextTarget(FileTarget):
    """read_text, encode_text and Tokenizer: any bytes are a text, or refused at the right offset."""

    name = "text"
    PIECES = ("\n", "\n\n", "\r\n", "\r", " ", "  ", "é", "🙂", "\u3000", "\x1c", "\xa0", "\u0300", "'s", "7", "\ufeff", "\0")

    def seeds(self) -> list[bytes]:
        hello, spaces = "hello there\n\nLadies and <|endoftext|> gentlemen\n\n\n", " \n \n\n" * 9
        texts = ("", hello, spaces, "\ufeff\ufefftwo marks", "naïve 中文 🙂\u200b \u2028\x85\x1c 'll")
        return [text.encode() for text in texts]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change bytes or put characters in."""
        if random.random() < 0.5:
            return mutate_bytes(random, data, other, fields=0)
        at, piece = random.randrange(len(data) + 1), random.choice(self.PIECES)
        return data[:at] + random.choice((1, 1, 1, 3, 3, 20, 5000)) * piece.encode() + data[at:]

    def read(self, path: Path, data: bytes) -> str:
        tokenizer = pygpt.Tokenizer()
        try:
            expected = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            try:
                "".join(pygpt.read_text(path))
            except DataError as refusal:
                if f"at offset {error.start} " not in str(refusal) and "is UTF-16 or UTF-32" not in str(refusal):
                    raise AssertionError(f"{refusal}, and the first bad byte is at {error.start}") from refusal
                raise
            raise AssertionError("bytes that are not UTF-8 are accepted") from error
        assert "".join(pygpt.read_text(path)) == expected
        cut = len(data) % 7 + 1
        end = 60 * cut
        pieces = [expected[i : i + cut] for i in range(0, min(len(expected), end), cut)] + [expected[end:]]
        whole, eot = tokenizer.encode(expected), ("none", "document", "paragraph")[len(data) % 3]
        special = len(data) % 2 == 1
        tokens = [token for part in pygpt.encode_text(pieces, eot=eot, allow_special=special) for token in part.tolist()]
        assert tokens == pygpt.tokens_of_text(expected, eot=eot, allow_special=special).tolist()
        assert tokenizer.decode_bytes(whole) == expected.encode()
        kept = expected.removeprefix("\ufeff")  # encode_text() drops a mark, as read_text() has dropped another one
        assert eot != "none" or tokens == tokenizer.encode(kept, allow_special=special)
        kept = kept.replace(END_OF_TEXT, "") if special else kept
        assert tokenizer.decode(token for token in tokens if token != tokenizer.eot) == kept
        return f"text, {eot}"


# ------------------------------------------------------------------------------------------------ commands


def load_json(data: bytes) -> Any:
    """Return an input as JSON, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def words_of(given: object) -> list[str]:
    """The words of an input's "argv" that a command can be given, and that stay in the current folder."""
    words = [word.replace("\0", "") for word in given if isinstance(word, str)] if isinstance(given, list) else []
    words = [word for word in words if not re.search("[\ud800-\udc7f\udd00-\udfff]", word)]
    return [word for word in words if ".." not in word and not re.search(r"(^(-\w)?|[=\s~*\[])[/~]", word)]


WORDS = (
    "", "-", "--", "0", "1", "2", "3", "4", "5", "10", "-1", "007", "1e3", "0x10", "\uff11\uff12", "\u0663", "9" * 18, "9" * 19,
    "9" * 5000, "nan", "inf", "1_000", " 1", "\udcff", "\n", "1\n2", "é", "=", "a" * 5000, "%s", "%(prog)s", "2147483648",
    "18446744073709551616", "0.5", "1e-320", "1e400", "median", "greedy", "sample", "stop", "slide", "\x1b[31m", "\u2028",
    "--x", "tiny.bin", ".", "nothing.bin", "gpt2", "out.bin", "out/", "half.bin", "0" * 8 + "1" * 5000, "hf", "hf/", "a.txt",
    "t.bin", "bad.txt", "h.bin", "run.state", "data/x", "paragraph", "json", "log.json", "cosine", "1e-3", "*.bin",
)  # fmt: skip
TRAIN = "train --shape L=1,NH=1,C=2,maxT=4,V=5 --data t.bin -B 1 -T 2 --steps 2"
LINES = (
    "0 1 -n 3 -m tiny.bin", "4 --sampler greedy --max-new-tokens 2 -t 2 -m tiny.bin", "0 0 0", "--version", "--help",
    "1 --temp 0.8 --top-k 2 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.3 -s 7 -n 3 -m tiny.bin", "0 -n 3 --no-mmap -m tiny.bin",
    "1 --stop-token 2 --overflow slide -n 9 -m tiny.bin", "0 --stop x -n 3 -m gpt2.bin", "0 --reference -n 3 -m tiny.bin",
    "shards a.txt -o data/x --val-fraction 0.2 --eot none", "shards --show t.bin -n 2", "shards bad.txt -o x", "shards - -o x",
    "shards *.txt -o x --shard-size 4", "eval perplexity a.txt -m gpt2.bin", "eval next Ladies -m gpt2.bin -k 3",
    "eval perplexity t.bin -m tiny.bin --window 3 --stride 1 -n 5 -o json", "eval hellaswag h.bin -m tiny.bin -n 1",
    f"{TRAIN} --out new.bin --log log.json", f"{TRAIN} --val t.bin --val-every 1 --sample-every 1 --schedule cosine --warmup 1",
    "train --init tiny.bin --data t.bin -B 2 -T 3 --steps 1 --out new --version 5 --save-every 1 --shuffle --clip 1",
    "train --resume run.state --steps 4", "train --check t.bin --init tiny.bin", "convert --heads 2 tiny.bin out/",
    "convert tiny.bin half.bin", "convert nothing.bin out.bin",
)  # fmt: skip
OPTIONS = [word for line in LINES for word in line.split() if word.startswith("-")]
LONG = ("bench", "profile", "chat", "download")  # commands that other tests try


class LineTarget(Target):
    """Any command line, over files of every kind: {"argv": [words], "stdin": text, "closed": [streams]}; and what the training
    state's JSON says: {"progress": value}."""

    name = "command"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = self.made()

    def made(self) -> dict[str, bytes]:
        """The files that commands may name."""
        for name, config in (("tiny.bin", TINY), ("gpt2.bin", GPT2_IDS)):
            write_checkpoint(self.folder / name, config, weights(config))
        write_tokens(self.folder / "t.bin", np.arange(40, dtype=np.uint16) % 5)
        write_examples(self.folder / "h.bin", [Example(0, 1, [1], [[2], [3], [4, 1], [0]])])
        files = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        text = b"First line\n\nto be, or not to be\n" * 4
        return {**files, "a.txt": text, "bad.txt": b"\xff", "half.bin": files["tiny.bin"][:-1], "precious.txt": b"not a log\n"}

    def progress(self) -> dict[str, Any]:
        """Return the state of a run with these files."""
        job = {"data": "t.bin", "B": 1, "T": 2, "log": "log.json", "sample_every": 0, "val_tokens": 9, "plot": None}
        loader = dict(DataLoader(np.arange(31) % 5, 1, 2).state())
        return {"step": 1, "options": {"steps": 2, "lr": 0.01}, "loader": loader, "job": job}

    def seeds(self) -> list[bytes]:
        lines = [{"argv": line.split(), "stdin": "Ladies and"} for line in LINES]
        closed = [{"argv": argv.split(), "closed": [name]} for argv in ("0", "--help", "-") for name in ("stdin", "stdout")]
        others = [
            {"argv": ["train", "--resume", "run.state"], "progress": self.progress()},
            {"argv": ["-m", "\x1b[31m\x9b2J", "0"]},
        ]
        return [dump(one) for one in [*lines, *closed, *others]]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        found, more = load_json(data), load_json(other)
        if not isinstance(found, dict) or not isinstance(more, dict):
            return other
        if "progress" in found and random.random() < 0.7:
            return dump({**found, "progress": load_json(mutate_json_text(random, dump(found["progress"]), b"{}"))})
        argv = words_of(found.get("argv"))
        for _ in range(random.choice((1, 1, 2, 3))):
            at, word, option = random.randrange(len(argv) + 1), random.choice(WORDS), random.choice(OPTIONS)
            new = random.choice(([word], [option, word], [f"{option}={word}"], words_of(more.get("argv"))[:4], []))
            argv[at : at + random.randrange(2)] = new
        return dump({**found, "argv": argv[:40]})

    def run(self, data: bytes) -> str:
        found = load_json(data)
        found = found if isinstance(found, dict) else {}
        argv, stdin = words_of(found.get("argv")), found.get("stdin")
        if argv[:1] and argv[0] in LONG:
            raise LeftOut
        stdin = stdin.encode("utf-8", "replace") if isinstance(stdin, str) else b""
        names = found.get("closed")
        closed = [name for name in ("stdin", "stdout") if isinstance(names, list) and name in names]
        progress = found.get("progress", self.progress())
        job = progress.get("job") if isinstance(progress, dict) else None
        if isinstance(job, dict) and not all(word in words_of([word]) for word in job.values() if isinstance(word, str)):
            raise LeftOut  # it would write elsewhere
        files = {**self.files, "run.state": parsers.state_bytes(vars_of(TRAINED), progress)}
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            with bounded(LONGEST_RUN_S):
                outcome = run_main(main, argv, stdin, closed)
        finally:
            os.chdir(here)
        judge(outcome, argv, lines=12 if argv[:1] == ["train"] else 2)
        self.judge_files(outcome, argv, files)
        return f"status {outcome.status} {skeleton(outcome.err.strip())}"

    def judge_files(self, outcome: Outcome, argv: Sequence[str], files: dict[str, bytes]) -> None:
        """Written files are complete, and other files are unchanged."""
        after = {str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        assert files.keys() <= after.keys(), f"{argv!r:.300}: {sorted(files.keys() - after.keys())} went away"
        assert after["precious.txt"] == files["precious.txt"], f"{argv!r:.300} has replaced a file that was there"
        written = {name: content for name, content in after.items() if files.get(name) != content}
        assert not written or (argv[:1] and argv[0] in ("shards", "train", "convert")), f"{argv!r:.300} wrote {sorted(written)}"
        for name, content in written.items():
            parts = name.split("/")
            if name.endswith((".png", ".svg")):
                continue
            if parts[-1] in ("config.json", "model.safetensors"):
                sound: object = parsers.safetensors(content) if parts[-1][0] == "m" else parsers.strict_json(content)
            elif ".state" in name:
                sound = parsers.state(content)
            elif argv[0] == "shards":
                sound = parsers.shard(content)
            else:
                lines = [parsers.strict_json(line) for line in content.splitlines()]
                sound = parsers.checkpoint(content) or (None not in lines or None)  # a model, or a log
            assert sound is not None, f"{argv!r:.300} wrote {name}, which is not sound: {content[:100]!r}"


def vars_of(config: Config) -> parsers.Shape:
    """A configuration's numbers."""
    return {name: getattr(config, name) for name in ("maxT", "V", "L", "NH", "C", "Vp")}


class ServeTarget(Target):
    """`pygpt -`: lines of ids and JSON objects, each compared with the API without a prefix cache."""

    name = "serve"
    KEYS = frozenset(
        ("tokens", "total", "max_new_tokens", "sampler", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
         "stop_token_ids", "stop_strings", "overflow")
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder.with_name(folder.name + ".bin")
        write_checkpoint(self.path, SERVED, weights(SERVED))

    def seeds(self) -> list[bytes]:
        return [
            b'{"tokens": [1, 2], "total": 5}\n{"tokens": [1, 2, 3], "max_new_tokens": 2}\n',
            b'{"tokens": [1], "sampler": "greedy", "total": 4, "stop_token_ids": [7]}\n\n{"tokens": [1], "total": 2}',
            b'{"tokens": [5], "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 3, "total": 6}\n',
            b'{"tokens": [5], "repetition_penalty": 1.2, "sampler": "sample", "total": 6, "overflow": "stop"}\n',
            b'{"tokens": [5], "overflow": "slide", "max_new_tokens": 9, "stop_strings": []}\n',
            b'\n \n{"tokens": [129], "total": 6, "stop_token_ids": 3}\n', b"1 2 3\n", b"1 2 3\n4\0pad", b'{"total": 5}\n',
            b'{"tokens": [1], "seed": null}\n', b'{"tokens": [1], "seed": [1]}\n', b'{"tokens": [1], "x": 1}\n',
        ]  # fmt: skip

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        lines, more = data.split(b"\n"), other.split(b"\n")
        at = random.randrange(len(lines))
        if random.random() < 0.25:
            lines.insert(at, random.choice(more))
        else:
            lines[at] = mutate_json_text(random, lines[at], random.choice(more))
        return b"\n".join(lines)[: 1 << 21]

    def run(self, data: bytes) -> str:
        """Serve the lines, and answer them once more by the API. "pad" after a zero makes a line as long as may be."""
        data = data[: 1 << 20].replace(b"\0pad", b" " * (1 << 20), 1)
        with GPT2.load(self.path, threads=1) as model:
            expected, ended = self.expect(model, data)
        outcome = run_main(main, ["-m", str(self.path), "-t", "2", "-"], data)
        judge(outcome, ["-"])
        if outcome.status != 141:
            assert outcome.status == ended
            answers = outcome.out.decode("ascii").split("\n")
            assert answers.pop() == ""
            assert len(answers) == len(expected)
            for found, wanted in zip(answers, expected, strict=True):
                assert len(found.split()) == wanted if isinstance(wanted, int) else found == " ".join(map(str, wanted))
        return f"status {outcome.status}"

    def expect(self, model: GPT2, data: bytes) -> tuple[list[list[int] | int], int]:
        """The answers, of random ones only how long they are, and the exit status."""
        expected: list[list[int] | int] = []
        for line in io.BytesIO(data):
            request = self.understand(line.removeprefix(codecs.BOM_UTF8).strip())
            if request is None or len(line) > 1 << 20:
                return expected, 2
            if not request:
                expected.append([])
                continue
            try:
                completion = model.generate_batch([request.pop("tokens")], **request)[0]
            except PyGPTError:
                return expected, 2
            drawn = completion.seed is not None and "seed" not in request
            if drawn and (request.get("stop_token_ids") or request.get("stop_strings")):
                raise LeftOut
            expected.append(len(completion.tokens) if drawn else completion.tokens)
        return expected, 0

    def understand(self, line: bytes) -> dict[str, Any] | None:
        """A request as arguments; {} for a blank line, None for a line that is not a request."""
        if not line:
            return {}
        if not line.startswith(b"{"):
            words = line.split()
            return {"tokens": list(map(int, words))} if all(re.fullmatch(rb"0*[0-9]{1,18}", word) for word in words) else None
        found = load_json(line)
        if not isinstance(found, dict) or not self.KEYS.issuperset(found) or not isinstance(found.get("tokens"), list):
            return None
        if any(value is None for value in found.values()) or isinstance(found.get("seed"), list):  # as of a batch
            return None
        for name in ("total", "max_new_tokens"):  # a window may slide for ever
            if isinstance(found.get(name), int) and found[name] > 3000 and found.get("overflow") == "slide":
                raise LeftOut
        return found


READERS: tuple[type[Target], ...] = (CheckpointTarget, SafetensorsTarget, ShardTarget, VocabularyTarget, DebugStateTarget)
READERS += (ExamplesTarget, StateTarget, TextTarget, GGUFTarget, PanelTarget)
TARGETS: dict[str, type[Target]] = {target.name: target for target in READERS}
TARGETS |= {"serve": ServeTarget, "command": LineTarget}
