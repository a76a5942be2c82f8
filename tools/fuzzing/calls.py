"""Target: the Python interface. An input is a JSON list of calls, [name, argument, ...]; values that JSON has not are objects
with one member: {"array": [values, dtype]}, {"power": n} (10 to the n), {"bytes": text}, {"tuple": [...]}, {"set": [...]},
{"repeat": [value, times]}. The call ["faulty", faults, call] makes another one on a system that fails (faults.py).

A second account is kept of what is in each cache. A call that is refused must have changed nothing, and in the end every
cache must give the very logits that its tokens have without one.
"""

import math
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np

from pygpt import (
    GPT2,
    Checkpoint,
    Config,
    DataLoader,
    DebugState,
    Example,
    PyGPTError,
    StreamDecoder,
    Tokenizer,
    TrainableGPT2,
    TrainingOptions,
    encode_text,
    open_state,
    read_debug_state,
    read_examples,
    split,
    write_checkpoint,
    write_debug_state,
    write_examples,
    write_tokenizer,
    write_tokens,
)
from pygpt.errors import ClosedError
from pygpt.formats.checkpoint import StreamedCheckpoint
from pygpt.formats.safetensors import SafetensorsFile, write_safetensors
from pygpt.generation.completion import TokenInfo
from pygpt.tokenizer import _load
from pygpt.training.state import Progress, write_state

from .faults import draw, failing
from .files import SMALL, weights
from .mutate import dump, mutate_json
from .reference import Floats
from .target import Finding, Target, load_json, same

DTYPES = ("i4", "i8", "u1", "u8", "f4", "f8", "?", "O", "U", "c16", "M8[s]")
LONGEST = 70_000  # values of a list: more than a field of 16 bits says
MOST = 300  # tokens of a completion: a window may slide for ever
OPTIONS = {
    "total", "max_new_tokens", "sampler", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "seed",
    "stop_token_ids", "stop_strings", "overflow", "slide_to",
}  # fmt: skip
SPECIAL: tuple[Any, ...] = (
    {"array": [[1, 2], "i8"]}, {"array": [1, "i4"]}, {"array": [[[1, 2], [3, 4]], "u1"]}, {"array": [[1.5], "f8"]},
    {"array": [[], "i4"]}, {"array": [[True], "?"]}, {"array": [[1], "O"]}, {"array": [0.5, "f4"]}, {"array": [7, "u8"]},
    {"array": [["a"], "U"]},
    {"power": 5000}, {"power": 19}, {"power": 400}, {"bytes": "\x01\x02"}, {"tuple": [1, 2]}, {"set": [3]},
    {"repeat": [1, 40000]},
)  # fmt: skip


def value_of(value: Any) -> Any:
    """What an argument stands for."""
    if isinstance(value, list):
        return [value_of(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "array" and isinstance(inner, list) and len(inner) == 2 and inner[1] in DTYPES:
            try:
                return np.array(inner[0], inner[1])
            except (ValueError, TypeError, OverflowError):
                return inner[0]
        if kind == "power" and type(inner) is int and 0 <= inner < 10000:
            return 10**inner
        if kind == "bytes" and isinstance(inner, str):
            return inner.encode("utf-8", "replace")
        if kind == "tuple" and isinstance(inner, list):
            return tuple(value_of(one) for one in inner)
        if kind == "repeat" and isinstance(inner, list) and len(inner) == 2 and type(inner[1]) is int:
            return inner[:1] * min(inner[1], LONGEST)
        if kind == "set" and isinstance(inner, list):
            return {one for one in inner if isinstance(one, int | str)}
    return {name: value_of(one) for name, one in value.items()}


def zeros(shape: Any) -> Floats | None:
    """An array of a sane shape."""
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    if all(type(size) is int and 0 <= size <= 200 for size in sizes) and 0 <= len(sizes) <= 4 and math.prod(sizes) < 1 << 16:
        return np.zeros(sizes, np.float32)
    return None


class CallsTarget(Target):
    """GPT2, its caches, TrainableGPT2, DataLoader, Tokenizer, and the writers, called with all sorts of things."""

    name = "calls"
    batch = 500

    def open(self) -> None:
        """Load the same model three times."""
        folder = self.folder
        path = self.path = folder.with_name(folder.name + ".bin")
        write_checkpoint(path, SMALL, weights(SMALL))
        self.model = GPT2.load(path, threads=2)
        self.other = GPT2.load(path, threads=1)
        self.trainable = TrainableGPT2.load(path, threads=2)
        self.tokenizer = Tokenizer()

    def close(self) -> None:
        """Stop the workers."""
        for one in (self.model, self.other, self.trainable):
            one.close()

    def seeds(self) -> list[bytes]:
        """All calls, as they are meant."""
        programs: list[list[Any]] = [
            [["step", [[1, 0, True], [2, 1, False], [3, 0, True]]], ["truncate", 0, 1], ["step", [[4, 0, True]]], ["step", []]],
            [["prefill", 0, [1, 2, 3]], ["decode", 0, 4], ["decode", 1, 5], ["prefill", 1, [6, 7, 8, 9, 10]], ["decode", 1, 1]],
            [["new_cache", 3], ["prefill", 2, [1, 2]], ["decode", 2, 3], ["decode", 2, 4], ["logits", [1, 2, 3]]],
            [["generate", [1, 2], {"total": 5}], ["generate", [1], {"max_new_tokens": 2, "sampler": "greedy"}]],
            [
                [
                    "generate",
                    [1],
                    {"temperature": 0.8, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 1},
                ]
            ],
            [
                ["generate", [1], {"overflow": "slide", "slide_to": 2, "total": 9, "stop_token_ids": [3]}],
                ["prefix", [1, 2], [1, 3, 4]],
            ],
            [["batch", [[1, 2], [3]], {"num_return_sequences": 2, "seed": [1, 2], "top_logprobs": 3, "temperature": 1.0}]],
            [["forward", [[1, 2], [3, 4]], [[2, 3], [4, 5]]], ["backward", 1.0], ["update", {"lr": 0.1, "step": 1}], ["norm"]],
            [
                [
                    "update",
                    {"lr": 0.1, "step": 3, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "gradient_scale": 0.5},
                ]
            ],
            [["loader", [1, 2, 3, 4, 5, 6, 7], 1, 2, {"V": 10, "shuffle_seed": 1}], ["split", [1, 2, 3, 4], {"val_tokens": 1}]],
            [["split", [1, 2, 3, 4], {"val_fraction": 0.5}], ["config", {"maxT": 1, "V": 2, "L": 3, "NH": 2, "C": 4}]],
            [["decode_ids", [31373, 612]], ["encode_text", ["a b", "c"], "paragraph"], ["write_tokens", [1, 2]]],
            [["write_tokenizer", [{"bytes": "a"}], 0], ["capacity", 4], ["threads", 2], ["foreign", 1]],
            [["loader", {"bytes": "x"}, 1, 2, {}], ["loader", ["a", "b"], 1, 2, {}], ["loader", "*.bin", 1, 2, {}]],
            [
                ["loader", [], 1, 2, {}],
                ["loader", [1, 2, 3], 1, 1, {"V": 0}],
                ["loader", [1, 2, 3], 1, 1, {"shuffle_seed": -1}],
            ],
            [["split", [1, 2], {}], ["split", [1, 2], {"val_tokens": 2}], ["split", [1, 2], {"val_fraction": 1}]],
            [["shards", 3, 9, {"batch": 4, "shard": 0}], ["shards", 3, 9, {"epoch": 2, "shard": 1}], ["changed", 5]],
            [["write_tokens", []], ["write_tokens", [65536]], ["write_tokenizer", [{"bytes": "x"}], 1]],
            [["checkpoint", 3, "wte", [130, 2]], ["checkpoint", 4, "wte", [130, 2]], ["checkpoint", 5, "x", [1]]],
            [
                ["checkpoint", 1, "ln1w", [3, 2]],
                ["checkpoint", 3, "lnfw", [1]],
                ["tensor", "wte", False],
                ["tensor", "x", True],
                ["tensor", "wte", True],
            ],
            [["write_debug_state", 1, 2, "ln1w", [2, 2]], ["write_debug_state", 1, 2, "x", [1]]],
            [["write_debug_state", 1, 2, "wte", [1]], ["write_debug_state", 1, 9, "", []]],
            [["write_examples", [[0, [1], [[1], [2], [3], [4]]]]], ["write_examples", []], ["write_examples", [[4, [1], []]]]],
            [["write_examples", [[0, [1] * 40, [[1], [2], [3], [4], [5]]]]], ["write_safetensors", [2, 3], 6]],
            [
                ["write_safetensors", [2], 3],
                ["write_state", 1, {"a": 1}, 1],
                ["write_state", 1, {}, 2],
                ["write_state", 1, {}, 0],
            ],
            [["encode", "a<|endoftext|>b", True], ["encode", "a", False], ["foreign_prefix", [1]]],
            [["generate", [1], {"stop_strings": 5}], ["generate", [1], {"stop_strings": ["a"]}]],
            [["write_onto", [1]], ["generate", [1], {"stop_strings": [""]}], ["write_tokenizer", [{"bytes": "x" * 256}], 0]],
            [
                ["write_examples", [[0, {"repeat": [1, 40000]}, [[1], [2], [3], [4]]]]],
                ["write_examples", [[0, [1], [[2]] * 5]]],
            ],
            [
                ["write_many", [1, 2], 5],
                ["write_many", [1], (1 << 31) - 1],
                ["long_loader", 100],
                ["long_loader", (1 << 24) + 9],
            ],
            *([["faulty", [["open", 1, how]], ["vocabulary"]]] for how in ("half", "ENOENT", "memory", "interrupt")),
            *(
                [["faulty", [fault], call]]
                for call in (["write_tokens", [1, 2]], ["write_state", 1, {}, 1], ["tensor", "wte", False])
                for fault in (["os.open", 1, "ENOSPC"], ["fsync", 1, "EIO"], ["limit", 1100, ""], ["mmap", 1, "cut"])
            ),
            [["generate", [1], {"stop_strings": [5]}], ["generate", [1], {"stop_token_ids": "x", "total": 4}]],
        ]
        return [dump(program) for program in programs]

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change arguments, or put in calls of another input."""
        program, more = load_json(data), load_json(other)
        if not isinstance(program, list) or not isinstance(more, list):
            return other
        if random.random() < 0.2 and more:
            program.insert(random.randrange(len(program) + 1), random.choice(more))
        if program and random.random() < 0.1:
            program.append(["faulty", [draw(random)], random.choice(program)])
        for _ in range(random.choice((1, 1, 2, 3))):
            if program and random.random() < 0.3:
                call = random.choice(program)
                if isinstance(call, list) and len(call) > 1:
                    place = self.inner(random, call)
                    place[random.randrange(len(place))] = random.choice(SPECIAL)
                    continue
            program = mutate_json(random, program)
            program = program if isinstance(program, list) else []
        return dump(program[:12])

    def inner(self, random: Random, call: list[Any]) -> list[Any]:
        """A list to change something in: the call's, or one of its arguments."""
        lists = [argument for argument in call[1:] if isinstance(argument, list) and argument]
        return random.choice([call, *lists])

    def run(self, data: bytes) -> str:
        """Carry out the calls; then see what the caches hold."""
        program = load_json(data)
        self.caches = [self.model.new_cache(), self.model.new_cache()]
        self.held: list[list[int]] = [[], []]
        labels = []
        for call in program if isinstance(program, list) else []:
            labels += self.perform(call)
            same("lengths of the caches", [cache.length for cache in self.caches], [len(ids) for ids in self.held])
        for cache, ids in zip(self.caches, self.held, strict=True):
            if ids:
                cache.truncate(len(ids) - 1)
                if not np.array_equal(self.model.decode(cache, ids[-1]), self.other.logits(ids)[-1]):
                    raise Finding(f"the cache of {ids} gives other logits than its tokens")
        return " ".join(sorted(set(labels)))

    def perform(self, call: Any) -> list[str]:
        """Carry out a call; say what became of it, nothing for what is no call."""
        method = getattr(self, f"do_{call[0]}", None) if isinstance(call, list) and call and isinstance(call[0], str) else None
        if method is None or method.__code__.co_argcount != len(call):
            return []
        try:
            method(*(call[1:] if call[0] == "faulty" else map(value_of, call[1:])))
        except PyGPTError as error:
            if "\n" in str(error) or len(str(error)) > 600:
                raise Finding(f"not a clear line: {str(error)[:2000]!r}") from error
            return [f"{call[0]} {type(error).__name__}"]
        return [f"{call[0]} ok"]

    def do_faulty(self, faults: Any, call: Any) -> None:
        """Another call, while the system fails: it may say so in Python's own words."""
        if isinstance(call, list) and call[:1] != ["faulty"]:
            with suppress(OSError, MemoryError, ImportError, KeyboardInterrupt), failing(faults, self.folder):
                self.perform(call)

    def cache(self, number: Any) -> Any:
        """A cache by its number; whatever else was given, as it is."""
        return self.caches[number % len(self.caches)] if type(number) is int else number

    def note(self, number: Any, *tokens: Any) -> None:
        """Note what a cache now holds, and that these were indeed token ids."""
        ids = []
        for token in tokens:
            number_of = token.__index__()
            if isinstance(token, bool) or not 0 <= number_of < SMALL.V:
                raise Finding(f"token {token!r} is accepted")
            ids.append(number_of)
        self.held[number % len(self.held)] += ids

    def do_step(self, rows: Any) -> None:
        """GPT2.step."""
        if not isinstance(rows, list | tuple):
            return
        triples = [
            (row[0], self.cache(row[1]), row[2]) if isinstance(row, list | tuple) and len(row) == 3 else row for row in rows
        ]
        wanted = [row[2] for row in rows if isinstance(row, list | tuple) and len(row) == 3]
        if any(isinstance(want, np.ndarray) for want in wanted):
            return  # whether an array is true is NumPy's to say
        logits = self.model.step(triples)
        for token, number, _ in rows:
            self.note(number, token)
        same("shape of the logits", logits.shape, (sum(map(bool, wanted)), SMALL.V))

    def do_prefill(self, number: Any, tokens: Any) -> None:
        """GPT2.prefill."""
        if type(number) is int and isinstance(tokens, list | tuple):
            same("shape of the logits", self.model.prefill(self.cache(number), tokens).shape, (SMALL.V,))
            self.note(number, *tokens)

    def do_decode(self, number: Any, token: Any) -> None:
        """GPT2.decode."""
        if type(number) is int:
            same("shape of the logits", self.model.decode(self.cache(number), token).shape, (SMALL.V,))
            self.note(number, token)

    def do_truncate(self, number: Any, length: Any) -> None:
        """KVCache.truncate."""
        if type(number) is int:
            self.cache(number).truncate(length)
            del self.held[number % len(self.held)][length:]

    def do_new_cache(self, capacity: Any) -> None:
        """GPT2.new_cache."""
        self.caches.append(self.model.new_cache(capacity))
        self.held.append([])

    def do_foreign(self, token: Any) -> None:
        """Another model's cache is refused."""
        self.model.step([(token, self.other.new_cache(), True)])
        raise Finding("another model's cache is accepted")

    def do_logits(self, tokens: Any) -> None:
        """GPT2.logits."""
        logits = self.model.logits(tokens)
        same("shape of the logits", logits.shape[1], SMALL.V)

    def options(self, options: Any, *more: str) -> dict[str, Any]:
        """The options that are known, with an end to what slides."""
        known = (
            {name: value for name, value in options.items() if name in OPTIONS | set(more)} if isinstance(options, dict) else {}
        )
        for name in ("total", "max_new_tokens"):
            if type(known.get(name)) is int and known[name] > MOST and known.get("overflow") == "slide":
                known[name] = MOST
        return known

    def check_ids(self, ids: list[int]) -> None:
        """Refuse ids that are none."""
        if not all(type(token) is int and 0 <= token < SMALL.V for token in ids):
            raise Finding(f"generated {ids}")

    def do_generate(self, tokens: Any, options: Any) -> None:
        """GPT2.generate."""
        self.check_ids(list(self.model.generate(tokens, **self.options(options))))

    def do_prefix(self, first: Any, second: Any) -> None:
        """GPT2.generate with a prefix cache."""
        prefix = self.model.new_prefix_cache()
        for tokens in (first, second):
            once = list(self.model.generate(tokens, total=6, cache=prefix))
            same("ids with a prefix cache", once, list(self.other.generate(tokens, total=6)))

    def do_batch(self, prompts: Any, options: Any) -> None:
        """GPT2.generate_batch."""
        known = self.options(options, "num_return_sequences", "top_logprobs")
        if not isinstance(prompts, list | tuple):
            return
        if type(known.get("num_return_sequences")) is int and known["num_return_sequences"] > 20:
            known["num_return_sequences"] = 20
        for completion in self.model.generate_batch(prompts, **known):
            self.check_ids(completion.tokens)
            if completion.infos is not None and not all(isinstance(info, TokenInfo) for info in completion.infos):
                raise Finding("infos are no TokenInfo")

    def do_forward(self, inputs: Any, targets: Any) -> None:
        """TrainableGPT2.forward and evaluate."""
        losses = self.trainable.forward(inputs, targets)
        again = self.trainable.evaluate(inputs, targets)
        same("losses", losses.tobytes(), again.tobytes())

    def do_backward(self, scale: Any) -> None:
        """TrainableGPT2.backward."""
        self.trainable.backward(scale=scale)

    def do_norm(self) -> None:
        """TrainableGPT2.gradient_norm."""
        self.trainable.gradient_norm()

    def do_update(self, options: Any) -> None:
        """TrainableGPT2.update; the weights are then put back."""
        names = ("lr", "step", "beta1", "beta2", "eps", "weight_decay", "gradient_scale")
        known = {name: value for name, value in options.items() if name in names} if isinstance(options, dict) else {}
        before = self.trainable.parameters.copy()
        try:
            self.trainable.update(**{"lr": 0.1, "step": 1, **known})
        finally:
            self.trainable.parameters[:] = before
            for moments in (self.trainable.first_moments, self.trainable.second_moments):
                moments[:] = 0

    def do_loader(self, source: Any, B: Any, T: Any, options: Any) -> None:
        """DataLoader."""
        known = {name: options[name] for name in ("V", "shuffle_seed") if name in options} if isinstance(options, dict) else {}
        if isinstance(source, str) and source.startswith(("/", "~")):
            return
        loader = DataLoader(source, B, T, **known)
        for _ in range(min(loader.batches, 3)):
            inputs, targets = loader.next_batch()
            same("shapes of a batch", (inputs.shape, targets.shape), ((B, T), (B, T)))
        loader.restore(loader.state())

    def do_restore(self, state: Any) -> None:
        """DataLoader.restore."""
        if isinstance(state, dict):
            DataLoader([1, 2, 3], 1, 1).restore(state)

    def do_split(self, tokens: Any, options: Any) -> None:
        """split."""
        known = (
            {name: options[name] for name in ("val_tokens", "val_fraction") if name in options}
            if isinstance(options, dict)
            else {}
        )
        if isinstance(tokens, list):
            train, val = split(tokens, **known)  # type: ignore[arg-type]
            same("tokens in both parts", len(train) + len(val), len(tokens))

    def do_config(self, options: Any) -> None:
        """Config."""
        known = (
            {name: options[name] for name in ("maxT", "V", "L", "NH", "C") if name in options}
            if isinstance(options, dict)
            else {}
        )
        config = Config(**{"maxT": 1, "V": 2, "L": 3, "NH": 2, "C": 4, **known})
        if config.parameters(padded=True) >= 2**60:
            raise Finding(f"{config} has {config.parameters(padded=True)} parameters")

    def do_decode_ids(self, ids: Any) -> None:
        """Tokenizer.decode and StreamDecoder."""
        if not isinstance(ids, list | tuple):
            return
        whole = self.tokenizer.decode(ids)
        stream = StreamDecoder(self.tokenizer)
        same("text of a stream", "".join([*map(stream.push, ids), stream.finish()]), whole)

    def do_encode_text(self, pieces: Any, eot: Any) -> None:
        """encode_text."""
        if isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces):
            tokens = [token for part in encode_text(pieces, eot=eot) for token in part.tolist()]
            text = self.tokenizer.decode(token for token in tokens if token != self.tokenizer.eot)
            same("text", text, "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def do_write_tokens(self, tokens: Any) -> None:
        """write_tokens."""
        write_tokens(self.folder / "tokens.bin", tokens)

    def do_write_onto(self, tokens: Any) -> None:
        """write_tokens onto a folder."""
        try:
            write_tokens(self.folder, tokens)
        except FileExistsError:
            return
        raise Finding("a folder was replaced")

    def do_write_tokenizer(self, tokens: Any, eot: Any) -> None:
        """write_tokenizer."""
        if isinstance(tokens, list) and all(isinstance(token, bytes) for token in tokens):
            write_tokenizer(self.folder / "tokenizer.bin", tokens, eot)

    def do_write_many(self, first: Any, count: Any) -> None:
        """write_tokens of some tokens, and of so many more that do not exist in memory."""
        begin = first if isinstance(first, list) else []
        if type(count) is int and (0 <= count <= 1000 or 1 << 31 <= count + len(begin) < 1 << 40):
            pieces: list[Any] = [begin, np.broadcast_to(np.uint16(3), count)]
            same("tokens", write_tokens(self.folder / "tokens.bin", iter(pieces)), len(begin) + count)

    def do_long_loader(self, count: Any) -> None:
        """A DataLoader over so many tokens, which do not exist in memory."""
        if type(count) is int and 0 < count <= 1 << 25:
            tokens = np.broadcast_to(np.uint16(3), count)
            loaders = [DataLoader(tokens[some:], 1, 1 + count // 10) for some in (0, 0, 1)]
            same("tokens", [loader.tokens for loader in loaders], [count, count, count - 1])
            same("equal fingerprints", [loaders[0].fingerprint == one.fingerprint for one in loaders], [True, True, False])

    def do_vocabulary(self) -> None:
        """Tokenizer, its vocabulary read anew."""
        _load.cache_clear()
        same("ids", Tokenizer().encode("hello there"), [31373, 612])

    def do_checkpoint(self, version: Any, name: Any, shape: Any) -> None:
        """write_checkpoint with one tensor of this shape, and what Checkpoint reads then."""
        if isinstance(name, str) and (array := zeros(shape)) is not None:
            given = {**weights(SMALL), name: array}
            write_checkpoint(self.folder / "x.bin", SMALL, given, version=version)
            with Checkpoint(self.folder / "x.bin", mmap=version != 3) as checkpoint:
                same("values", checkpoint.tensor(name).tobytes(), array.tobytes())

    def do_tensor(self, name: Any, closed: Any) -> None:
        """tensor() of both kinds of Checkpoint, of a closed one, too."""
        for kind in (Checkpoint, StreamedCheckpoint) if isinstance(name, str) else ():
            with kind(self.path) as checkpoint:
                checkpoint.tensor(name)
                checkpoint.close()
                checkpoint.close()
                if closed is True:
                    with suppress(ClosedError):
                        checkpoint.tensor(name)
                        raise Finding(f"a closed {kind.__name__} gives out {name}")

    def do_write_debug_state(self, B: Any, T: Any, name: Any, shape: Any) -> None:
        """write_debug_state with one gradient of this shape."""
        array, ids = zeros(shape), zeros([B, T])
        if not isinstance(name, str) or array is None or ids is None:
            return
        tokens = ids.astype(np.int32)
        logits = np.zeros((*tokens.shape, SMALL.V), np.float32)
        gradients = {**weights(SMALL), **({name: array} if name else {})}
        write_debug_state(self.folder / "x.bin", SMALL, DebugState(tokens, tokens, logits, 0.5, gradients))
        same("inputs", read_debug_state(self.folder / "x.bin", SMALL).inputs.tolist(), tokens.tolist())

    def do_write_examples(self, examples: Any) -> None:
        """write_examples, and what is read then."""
        if not isinstance(examples, list) or not all(isinstance(one, list) and len(one) == 3 for one in examples):
            return
        if not all(isinstance(endings, list) and all(isinstance(ids, list) for ids in endings) for _, _, endings in examples):
            return
        write_examples(self.folder / "x.bin", [Example(0, label, context, endings) for label, context, endings in examples])
        read = read_examples(self.folder / "x.bin")
        same("examples", [[one.label, list(one.context), [list(ids) for ids in one.endings]] for one in read], examples)

    def do_write_safetensors(self, shape: Any, count: Any) -> None:
        """write_safetensors of a tensor and so many values."""
        array, values = zeros(shape), zeros([count])
        if array is not None and values is not None:
            with (self.folder / "x.safetensors").open("wb") as file:
                write_safetensors(file, "F32", [("a", array.shape)], iter([values]))
            with SafetensorsFile(self.folder / "x.safetensors") as found:
                same("shape", found.stored("a").shape, array.shape)

    def do_write_state(self, step: Any, job: Any, buffers: Any) -> None:
        """write_state twice, so many buffers of the right size in it, and what is read then."""
        if type(step) is not int or not 0 <= step < 1 << 40 or not isinstance(job, dict) or type(buffers) is not int:
            return
        P = SMALL.parameters(padded=True)
        given = [np.zeros(P if 0 < buffers < 3 else 1, np.float32)] * 3
        progress = Progress(step, TrainingOptions(), {}, {**job, **({"x": "x" * (1 << 24)} if buffers == 2 else {})})
        try:
            path = write_state(self.folder / "x.state", SMALL, progress, given)
            write_state(path, SMALL, progress, given, after=path)
            write_state(path, SMALL, progress, given, after=f"{path}.1")
        except ValueError as error:
            if "JSON compliant" in str(error):  # NaN, which the job's owner has put there
                return
            raise
        with open_state(path)[0] as state:
            same("step and job", (state.progress.step, state.progress.job), (step, progress.job))

    def do_shards(self, first: Any, second: Any, place: Any) -> None:
        """A loader of two files goes to a place."""
        counts = [count for count in (first, second) if type(count) is int and 1 < count < 1000]
        if len(counts) == 2 and isinstance(place, dict):
            files = [self.folder / f"{i}.bin" for i in range(2)]
            for file, count in zip(files, counts, strict=True):
                write_tokens(file, np.arange(count, dtype=np.uint16))
            loader = DataLoader(files, 1, 1, shuffle_seed=None if first % 2 else 5)
            try:
                loader.restore({**loader.state(), **place})
            finally:
                loader.next_batch()

    def do_changed(self, count: Any) -> None:
        """A file that another has replaced is noticed."""
        write_tokens(self.folder / "0.bin", [1, 2, 3])
        loader = DataLoader(self.folder / "0.bin", 1, 1)
        if type(count) is int and 0 < count < 1000:
            write_tokens(self.folder / "0.bin", np.zeros(count, np.uint16))
            loader.reset()
            same("tokens", count, 3)

    def do_encode(self, text: Any, special: Any) -> None:
        """Tokenizer.encode."""
        if isinstance(text, str):
            found = self.tokenizer.decode(self.tokenizer.encode(text, allow_special=special is True))
            same("text", found, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def do_foreign_prefix(self, tokens: Any) -> None:
        """Another model's prefix cache is refused."""
        self.model.generate(tokens, cache=self.other.new_prefix_cache())
        raise Finding("another model's prefix cache is accepted")

    def do_capacity(self, capacity: Any) -> None:
        """A cache's capacity is kept."""
        cache = self.model.new_cache(capacity)
        for _ in range(cache.capacity):
            self.model.decode(cache, 1)
        try:
            self.model.decode(cache, 1)
        except PyGPTError:
            return
        raise Finding(f"a cache of capacity {capacity} takes more")

    def do_threads(self, threads: Any) -> None:
        """A number of workers."""
        if type(threads) is not int or threads <= 8 or threads > 256:
            TrainableGPT2(Config(maxT=1, V=1, L=1, NH=1, C=1), threads=threads).close()
