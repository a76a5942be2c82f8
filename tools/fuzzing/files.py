"""Targets: the readers of files, each held against a parser of its own (reference.py), and the writers, by what they give back.

Shapes are tiny, so that a whole file is a few hundred bytes. What a reader accepts is used: a checkpoint's numbers, whatever
they are, go through the native kernels.
"""

import hashlib
import importlib
import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from pygpt import (
    GPT2,
    Checkpoint,
    Config,
    DataLoader,
    Example,
    InputError,
    NumericalError,
    SerialGPT2,
    Tokenizer,
    TrainableGPT2,
    encode_text,
    read_debug_state,
    read_examples,
    read_text,
    read_tokenizer,
    read_tokens,
    tokens_of_text,
    write_checkpoint,
    write_debug_state,
    write_examples,
    write_tokenizer,
    write_tokens,
)
from pygpt.formats.llmc import DebugState
from pygpt.formats.safetensors import SafetensorsFile, write_safetensors

from . import reference
from .mutate import UINT64, mutate_bytes, mutate_json_text, put
from .target import Finding, Target, agreeing, same

TINY = Config(maxT=3, V=5, L=1, NH=2, C=4)
SMALL = Config(maxT=6, V=130, L=2, NH=1, C=2)
SERVED = Config(maxT=12, V=130, L=2, NH=1, C=2)  # room for the ten tokens that are the default
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def weights(config: Config, seed: int = 1) -> Arrays:
    """Random weights."""
    source = np.random.default_rng(seed)
    return {name: source.normal(0, 0.5, shape).astype(np.float32) for name, shape, _, _ in config.tensors(padded=False)}


def written(path: Path, write: Any, *arguments: Any, **options: Any) -> bytes:
    """What a writer makes of something."""
    write(path, *arguments, **options)
    return path.read_bytes()


class FileTarget(Target):
    """A reader of one file."""

    fields = 10  # of the header

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change bytes, its header's fields above all."""
        return mutate_bytes(random, data, other, fields=self.fields)

    def run(self, data: bytes) -> str:
        """Read it as a file."""
        path = self.folder / "input.bin"
        path.write_bytes(data)
        return self.read(path, data)

    def read(self, path: Path, data: bytes) -> str:
        """Read the file; compare."""
        raise NotImplementedError

    @property
    def scratch(self) -> Path:
        """Where to write something."""
        return self.folder / "output.bin"


class CheckpointTarget(FileTarget):
    """Checkpoint, write_checkpoint, and the networks over whatever numbers a file holds."""

    name = "checkpoint"
    fields = 9

    def seeds(self) -> list[bytes]:
        """Every version of two shapes."""
        return [
            written(self.scratch, write_checkpoint, config, weights(config), version=version)
            for config in (TINY, SMALL)
            for version in (1, 3, 5)
        ]

    def read(self, path: Path, data: bytes) -> str:
        """Compare every tensor, write it again, compute with it."""
        expected = reference.checkpoint(data)
        with agreeing(expected is not None, "checkpoint"):
            checkpoint = Checkpoint(path)
        assert expected is not None
        version, shape, tensors = expected
        with checkpoint:
            config = checkpoint.config
            same("shape", {name: getattr(config, name) for name in shape}, shape)
            found = {name: checkpoint.tensor(name) for name in tensors}
            for name, values in found.items():
                wanted = reference.as_floats("BF16" if version == 5 else "F32", tensors[name])
                same(name, values.tobytes(), wanted[: values.size].tobytes())
                same(f"pieces of {name}", np.concatenate(list(checkpoint.pieces(name))).tobytes(), values.tobytes())
            again = written(self.scratch, write_checkpoint, config, found, version=version)
            padding = slice(1024 + config.V * config.C * (2 if version == 5 else 4), 1024 + len(tensors["wte"]))
            clean = data[: padding.start] + bytes(padding.stop - padding.start) + data[padding.stop :]
            if version == 1:
                clean = put(clean, 28, bytes(4))  # Vp is not used
            if version != 5 or not any(np.isnan(values).any() for values in found.values()):  # a NaN becomes a quiet one
                same("the file written again", again, clean)
        self.compute(path, config)
        return f"version {version}"

    def compute(self, path: Path, config: Config) -> None:
        """Ids are ids, or else the numbers are refused."""
        total = min(config.maxT, 4)
        with GPT2.load(path, threads=2) as model, SerialGPT2.load(path) as serial:
            for network in (model, serial):
                for sampler in ("median", "greedy", "sample"):
                    try:
                        ids = list(network.generate([0], total=total, sampler=sampler)) if total > 1 else []
                    except NumericalError:
                        continue
                    if not all(type(token) is int and 0 <= token < config.V for token in ids):
                        raise Finding(f"{sampler} gives {ids} for V = {config.V}")
        with TrainableGPT2.load(path, threads=2) as trainable:
            batch = np.zeros((2, config.maxT), np.int64)
            trainable.forward(batch, batch)
            trainable.backward()
            trainable.update(lr=0.1, step=1)


class SafetensorsTarget(FileTarget):
    """SafetensorsFile and write_safetensors."""

    name = "safetensors"

    def seeds(self) -> list[bytes]:
        """Files of several dtypes, and those that are written here."""
        values = {name: np.arange(size, dtype=np.float32) for name, size in (("a", 6), ("bc", 4))}
        by_hand = {
            "x": ("F16", (2, 3), bytes(12)),
            "y": ("BF16", (1,), b"\x80\x3f"),
            "empty": ("I64", (0, 7), b""),
            "scalar": ("F64", (), bytes(8)),
        }
        files = [reference.safetensors_bytes({}), reference.safetensors_bytes(by_hand), struct.pack("<Q", 8) + b"[]      "]
        for dtype in ("F32", "BF16"):
            with self.scratch.open("wb") as file:
                write_safetensors(file, dtype, [("a", (2, 3)), ("bc", (4,))], iter(values.values()))
            files.append(self.scratch.read_bytes())
        return files

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change the header's JSON, its length, or the bytes after it."""
        return mutate_safetensors(random, data, other)

    def read(self, path: Path, data: bytes) -> str:
        """Compare every tensor."""
        expected = reference.safetensors(data)
        with agreeing(expected is not None, "safetensors file"):
            file = SafetensorsFile(path)
        assert expected is not None
        with file:
            same("names", sorted(file.tensors), sorted(expected))
            for name, (dtype, shape, content) in expected.items():
                same(name, file.tensors[name][:2], (dtype, shape))
                if dtype in ("F32", "F16", "BF16"):
                    same(f"values of {name}", file.stored(name).tobytes(), content)
            labels = sorted({dtype for dtype, _, _ in expected.values()})
            for name, (dtype, _, _) in expected.items():
                if dtype not in ("F32", "F16", "BF16"):
                    file.stored(name)
                    raise Finding(f"tensor {name!r} of dtype {dtype} was given out")
        return f"dtypes {' '.join(labels)}"


def mutate_safetensors(random: Random, data: bytes, other: bytes) -> bytes:
    """Change a safetensors file where it matters."""
    size = int.from_bytes(data[:8], "little")
    kind = random.randrange(10)
    if kind == 0:
        return put(data, 0, struct.pack("<Q", random.choice((*UINT64, size + 1, abs(size - 1)))))
    if kind <= 2 or 8 + size > len(data):
        return mutate_bytes(random, data, other, fields=3)
    header = mutate_json_text(random, data[8 : 8 + size], other[8 : 8 + int.from_bytes(other[:8], "little")])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


class ShardTarget(FileTarget):
    """read_tokens, DataLoader, write_tokens."""

    name = "shard"
    fields = 4

    def seeds(self) -> list[bytes]:
        """A few sizes."""
        return [written(self.scratch, write_tokens, ids) for ids in ([0], list(range(13)), [50256, 0, 65535] * 9)]

    def read(self, path: Path, data: bytes) -> str:
        """Compare the ids, write them again, and load batches of them."""
        expected = reference.shard(data)
        with agreeing(expected is not None, "token file"):
            tokens = read_tokens(path)
        assert expected is not None
        same("tokens", tokens.tolist(), expected)
        same("the file written again", written(self.scratch, write_tokens, iter([tokens])), data)
        B, T = 1 + len(data) % 3, 1 + len(data) // 3 % 4
        V = 50257 if expected[0] % 2 else None
        sound = len(expected) > B * T and (V is None or max(expected) < V)
        with agreeing(sound, "data set"):
            loader = DataLoader(path, B, T, V=V, shuffle_seed=None if len(data) % 5 else 7)
        starts = []
        for _ in range(loader.batches):
            inputs, targets = loader.next_batch()
            start = next(i for i in range(0, len(expected), B * T) if i // (B * T) not in starts
                         and expected[i : i + B * T] == inputs.ravel().tolist()
                         and expected[i + 1 : i + B * T + 1] == targets.ravel().tolist())  # fmt: skip
            starts.append(start // (B * T))
        same("batches of an epoch", sorted(starts), list(range((len(expected) - 1) // (B * T))))
        place = json.loads(json.dumps(loader.state()))
        following = loader.next_batch()[0].tolist()
        loader.restore(place)
        same("the batch after restore()", loader.next_batch()[0].tolist(), following)
        return f"loaded, V {V}"


class VocabularyTarget(FileTarget):
    """read_tokenizer, write_tokenizer."""

    name = "tokenizer"
    fields = 5

    def seeds(self) -> list[bytes]:
        """Small vocabularies of version 2, and one of version 1."""
        files = [
            written(self.scratch, write_tokenizer, tokens, eot)
            for tokens, eot in (([b"a"], 0), ([b"", b"\xff" * 255, b"<|endoftext|>"], 2), ([b"ab"] * 40, 39))
        ]
        return [struct.pack("<256i", 20240328, 1, 50257, *[0] * 253) + bytes(50257), *files]

    def read(self, path: Path, data: bytes) -> str:
        """Compare the tokens, write them again."""
        expected = reference.tokenizer(data)
        with agreeing(expected is not None, "vocabulary"):
            found = read_tokenizer(path)
        same("vocabulary", found, expected)
        again = written(self.scratch, write_tokenizer, *found)
        if data[4] == 2:
            same("the file written again", again, data)
        return f"version {data[4]}"


class DebugStateTarget(FileTarget):
    """read_debug_state, write_debug_state."""

    name = "debug-state"
    fields = 5
    config = Config(maxT=3, V=5, L=1, NH=1, C=1)

    def seeds(self) -> list[bytes]:
        """Two batches."""
        return [written(self.scratch, write_debug_state, self.config, self.state(B, T)) for B, T in ((1, 1), (2, 3))]

    def state(self, B: int, T: int) -> DebugState:
        """Any debug state."""
        ids = np.arange(B * T, dtype=np.int32).reshape(B, T) % self.config.V
        return DebugState(ids, ids, np.ones((B, T, self.config.V), np.float32), 1.5, weights(self.config))

    def read(self, path: Path, data: bytes) -> str:
        """Compare everything, write it again."""
        s = reference.shape_of(3, 5, 1, 1, 1)
        assert s is not None
        expected = reference.debug_state(data, s)
        with agreeing(expected is not None, "debug state"):
            found = read_debug_state(path, self.config)
        assert expected is not None
        same("inputs", found.inputs.ravel().tolist(), expected["inputs"])
        same("targets", found.targets.ravel().tolist(), expected["targets"])
        same("logits", found.logits.tobytes(), expected["logits"])
        if not np.isnan(found.loss):
            same("loss", struct.pack("<f", found.loss), expected["loss"])
        values = found.gradients.values()
        same("wte", next(iter(values)).tobytes(), expected["gradients"][: 4 * 5])
        same("other gradients", b"".join(array.tobytes() for array in list(values)[1:]), expected["gradients"][4 * 128 :])
        again = reference.debug_state(written(self.scratch, write_debug_state, self.config, found), s)
        assert again is not None
        same("the logits written again", again["logits"], expected["logits"])
        return f"B and T {found.inputs.shape}"


class ExamplesTarget(FileTarget):
    """read_examples, write_examples."""

    name = "examples"
    fields = 5
    V = 50257

    def seeds(self) -> list[bytes]:
        """One example, and three."""
        one = Example(0, 3, [5], [[1], [2], [3], [50256]])
        more = [Example(i, i, [7, 8, 9], [[1, 2], [3], [4] * 5, [6]]) for i in range(3)]
        sound, other = (written(self.scratch, write_examples, examples) for examples in ([one], more))
        size, longest = struct.unpack_from("<H", sound, 1026)[0] + 2, struct.unpack_from("<i", sound, 12)[0] + 2
        surplus = put(put(sound, 1026, struct.pack("<H", size)), 12, struct.pack("<i", longest)) + bytes(2)
        return [sound, other, surplus, *(put(sound, at, b"\5") for at in (1028, 1030, 1032))]  # index, label, endings

    def read(self, path: Path, data: bytes) -> str:
        """Compare every example, write them again."""
        expected = reference.examples(data, self.V)
        with agreeing(expected is not None, "file of examples"):
            found = list(read_examples(path, V=self.V))
        same("examples", [(one.label, [list(ids) for ids in (one.context, *one.endings)]) for one in found], expected)
        again = written(self.scratch, write_examples, found)
        same("the examples written again", again[1024:], data[1024:])
        return "read"


class StateTarget(FileTarget):
    """TrainingState and write_state, the Trainer's files."""

    name = "state"
    fields = 10
    config = Config(maxT=3, V=5, L=1, NH=1, C=1)

    @property
    def module(self) -> Any:
        """Where the states' reader is."""
        return importlib.import_module("pygpt.training.state")

    def loader(self) -> DataLoader:
        """The loader that the states are of."""
        return DataLoader(np.arange(40) % 5, 1, 3, shuffle_seed=1)

    def seeds(self) -> list[bytes]:
        """The states of two runs."""
        P = self.config.parameters(padded=True)
        buffers = [np.full(P, i, np.float32) for i in range(3)]
        files = []
        for step, options, job in ((0, {}, {}), (7, {"lr": 0.1, "schedule": "cosine", "warmup": 2}, {"text": "a"})):
            progress = self.module.Progress(step, self.module.TrainingOptions(**options), self.loader().state(), job)
            self.module.write_state(self.scratch, self.config, progress, buffers)
            files.append(self.scratch.read_bytes())
        return files

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change JSON, header or values, mostly with a sum that fits."""
        size = int.from_bytes(data[32:36], "little")
        if random.random() < 0.5 and 1024 + size + 32 < len(data):
            text = mutate_json_text(random, data[1024 : 1024 + size].rstrip(), other[1024:2048]) or b" "
            text += b" " * (-len(text) % 64)
            data = data[:32] + struct.pack("<I", len(text)) + data[36:1024] + text + data[1024 + size :]
        else:
            data = mutate_bytes(random, data, other, fields=10)
        return data[:-32] + hashlib.sha256(data[:-32]).digest() if random.random() < 0.9 else data

    def read(self, path: Path, data: bytes) -> str:
        """Compare the values, write it again, and let a loader go on from it."""
        expected = reference.state(data)
        if expected is None:
            with agreeing(False, "training state"):
                self.module.TrainingState(path)
        assert expected is not None
        shape, text, values = expected
        with self.module.TrainingState(path) as state:
            same("shape", {name: getattr(state.config, name) for name in shape}, shape)
            buffers = [np.empty(state.config.parameters(padded=True), np.float32) for _ in range(3)]
            state.read_into(buffers)
            same("values", b"".join(buffer.tobytes() for buffer in buffers), values)
            found = reference.strict_json(text.strip())
            if found is not None:
                same("step", state.progress.step, found["step"])
                same("loader", state.progress.loader, found["loader"])
            self.module.write_state(self.scratch, state.config, state.progress, buffers)
            again = reference.state(self.scratch.read_bytes())
            assert again is not None
            same("the values written again", again[2], values)
            place = state.progress.loader
        self.loader().restore(place)
        return "read"


class TextTarget(FileTarget):
    """read_text, encode_text, tokens_of_text, Tokenizer: any bytes are a text or refused at the right offset."""

    name = "text"
    fields = 0

    def open(self) -> None:
        """Load the vocabulary."""
        self.tokenizer = Tokenizer()

    def seeds(self) -> list[bytes]:
        """Text of several kinds."""
        texts = (
            "",
            "hello there\n\nLadies and <|endoftext|> gentlemen\n\n\n",
            "naïve 中文 🙂\u200b \u2028\x85\x1c 'll",
            " \n \n\n" * 9,
        )
        return [text.encode() for text in texts]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change bytes or put characters in."""
        if random.random() < 0.5:
            return mutate_bytes(random, data, other, fields=0)
        at = random.randrange(len(data) + 1)
        piece = random.choice(
            ("\n", "\n\n", " ", "  ", "é", "🙂", "\u3000", "\x1c", "\xa0", "\u0300", "'s", "7", "\ufeff", "\0")
        )
        return data[:at] + random.choice((1, 1, 1, 3, 3, 20, 5000)) * piece.encode() + data[at:]

    def read(self, path: Path, data: bytes) -> str:
        """Compare with Python's own decoder, and the tokens of pieces with those of the whole."""
        try:
            expected = data.decode()
        except UnicodeDecodeError as error:
            try:
                "".join(read_text(path))
            except InputError as refusal:
                if f"at offset {error.start} " not in str(refusal):
                    raise Finding(f"{refusal}, and the first bad byte is at {error.start}") from refusal
                raise
            raise Finding("bytes that are not UTF-8 are accepted") from error
        same("text", "".join(read_text(path)), expected)
        cut = len(data) % 7 + 1
        pieces = [expected[i : i + cut] for i in range(0, min(len(expected), 420), cut)] + [
            expected[420:]
        ]  # 420: a multiple of every cut
        whole = self.tokenizer.encode(expected)
        eot = ("none", "document", "paragraph")[len(data) % 3]
        tokens = [token for part in encode_text(pieces, eot=eot) for token in part.tolist()]
        same("tokens of pieces", tokens, tokens_of_text(expected, eot=eot).tolist())
        if eot == "none":
            same("tokens", tokens, whole)
        same("the tokens' bytes", self.tokenizer.decode_bytes(whole), data)
        same("the text of tokens", self.tokenizer.decode(token for token in tokens if token != self.tokenizer.eot), expected)
        return f"text, {eot}"


FILES = (
    CheckpointTarget,
    SafetensorsTarget,
    ShardTarget,
    VocabularyTarget,
    DebugStateTarget,
    ExamplesTarget,
    StateTarget,
    TextTarget,
)
