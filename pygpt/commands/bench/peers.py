"""Peers of `pygpt bench --against`: other programs that run the same checkpoint in their own processes, alternating with pygpt.

    with Peer("torch", "gpt2_124M.bin", threads=2) as peer:
        peer.prefill(512), peer.decode(64, 8)              # seconds
        peer.train(inputs, targets, lr=1e-4, ...)          # a loss, and seconds

Each peer has its own process, because the libraries' thread pools and allocators disturb each other and pygpt. Also, the
libraries read their numbers of threads at import.

Each peer uses the fastest way that its public interface offers for one sequence in float32 (llama.cpp: in bfloat16 if the file
is), or in the quantised mode that its name ends with. This means a key-value cache, the head for the last row only, and a copy
of the weights. First calls are not timed. Only installed peers run. Every weight comes from the model file; this module does
not download. The head is wte without padding."""

import importlib
import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from functools import partial
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

from ...config import Config
from .measuring import laps, peak_rss_bytes, prompt, seconds_of

Weights = dict[str, Any]  # float32 arrays by the names of tensors; this process does not import numpy
# The peers, and the packages that each needs, besides numpy. torch-compile also needs a C++ compiler.
PEERS: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",), "torch": ("torch",), "torch-compile": ("torch",), "transformers": ("torch", "transformers"),
    **dict.fromkeys(("llama.cpp", "llama.cpp-q8_0", "llama.cpp-q4_0"), ("llama_cpp",)),
    **dict.fromkeys(("ctranslate2", "ctranslate2-int8"), ("ctranslate2",)),
}  # fmt: skip
QUANTISED = {"llama.cpp-q8_0": "q8_0", "llama.cpp-q4_0": "q4_0", "ctranslate2-int8": "q8_0"}  # our format of the same size
TRAINING = ("torch", "transformers")  # the peers that can train
EPSILON = 1e-5
CLOSE_SECONDS = 2.0  # the time for a child to end by itself
SETTLE_SECONDS = 0.25  # OpenMP workers spin for up to 0.2 s after their last loop: wait, so that they do not slow the next test
WARM_UP_TOKENS = 4
# Variables that the libraries read at import: their numbers of threads, and no network access.
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SETTINGS = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # compile in the child: a compiler process would stay


def available() -> list[str]:
    """Return the peers whose packages are installed, without importing them."""
    return [name for name in PEERS if not _missing(name)]


def of_kind(names: list[str], formats: Collection[str]) -> list[str]:
    """Return the peers to compare with these weight formats: of quantised peers those of a format, of others all or none."""
    floats = any(kind not in QUANTISED.values() for kind in formats)
    return [name for name in names if (QUANTISED[name] in formats if name in QUANTISED else floats)]


def _missing(name: str) -> list[str]:
    return [package for package in PEERS[name] if importlib.util.find_spec(package) is None]


class Peer(AbstractContextManager["Peer"]):
    """An Engine that runs a checkpoint in a child process. Use it in a `with` block, or close() it.

    Raises RuntimeError with one line for every failure, such as a missing package or a child that died."""

    def __init__(self, name: str, model_path: str | os.PathLike[str], threads: int) -> None:
        if name not in PEERS:
            raise RuntimeError(f"{name!r} is not a peer: it must be one of {', '.join(PEERS)}")
        if missing := _missing(name):
            raise RuntimeError(f"peer {name}: not installed: {', '.join(missing)}")
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, os.fspath(model_path), threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the child ends the pipe
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """Return a method of Engine, which runs in the child."""
        return partial(self._ask, method)

    def close(self) -> None:
        """End the child; kill it if it takes longer than CLOSE_SECONDS. Safe to call twice."""
        self._pipe.close()
        self.process.join(CLOSE_SECONDS)
        self.process.kill()  # has no effect if the child has ended
        self.process.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the child's engine; return its result."""
        if self._pipe.closed:
            raise RuntimeError(f"peer {self.name}: closed before this call")
        with suppress(BrokenPipeError):  # the child died: _answer() reports how
            self._pipe.send((method, arguments, named))
        return self._answer()

    def _answer(self) -> Any:
        """Wait for the child's answer and return its result. Raises RuntimeError for an error, or if the child died."""
        try:
            result, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            status = self.process.exitcode or 0
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise RuntimeError(f"peer {self.name}: its process died ({how})") from None
        if error:
            raise RuntimeError(f"peer {self.name}: {error}")
        return result


class Engine:
    """An implementation of GPT-2 with one sequence. A subclass defines _run(), and Torch's subclasses can train, too."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._warm: set[tuple[str, int, int]] = set()  # the kinds and sizes of calls that ran before

    def _run(self, tokens: list[int], start: int) -> Any:
        """Run tokens from position `start`; return the last token's logits.

        start 0 begins a new sequence. With any other start, there is one token."""
        raise NotImplementedError

    def _last(self, tokens: list[int]) -> Any:
        """Return the last token's logits. Run the last token as a step, to check both prefill and decode."""
        last = self._run(tokens[:-1] or tokens, 0)
        return self._run(tokens[-1:], len(tokens) - 1) if len(tokens) > 1 else last

    def logits(self, tokens: list[int]) -> list[float]:
        """Return the last token's logits as floats."""
        V, maxT = self.config.V, self.config.maxT
        if not 1 <= len(tokens) <= maxT or not all(0 <= token < V for token in tokens):
            raise ValueError(f"tokens must be 1 to {maxT} ids from 0 to {V - 1}")
        return [float(value) for value in self._last(tokens)[:V]]

    def prefill(self, n: int) -> float:
        """Return the seconds for a prompt of n tokens. Before the first timing of a kind and size, run it as a warm-up."""
        tokens = prompt(self.config, 0, n)
        if self._is_new("prefill", n, 0):
            self._run(tokens, 0)
        return seconds_of(lambda: self._run(tokens, 0))

    def decode(self, n: int, depth: int) -> float:
        """Return the seconds for n tokens, one by one, after a context."""
        context, new = prompt(self.config, 0, depth), prompt(self.config, depth, depth + n)
        if self._is_new("decode", n, depth):
            self._time_decode(context, new[:WARM_UP_TOKENS])
        return self._time_decode(context, new)

    def _is_new(self, *call: Any) -> bool:
        known = call in self._warm
        self._warm.add(call)
        return not known

    def _time_decode(self, context: list[int], new: list[int]) -> float:
        self._run(context, 0)
        return seconds_of(lambda: [self._run([token], position) for position, token in enumerate(new, len(context))])

    def peak_rss_bytes(self) -> int:
        """Return this process's peak resident memory in bytes."""
        return peak_rss_bytes()

    def train(self, inputs: list[list[int]], targets: list[list[int]], **adamw: float) -> dict[str, float]:
        """Run one iteration of training on a batch (B, T). adamw: lr, beta1, beta2 and eps.

        Return the mean `loss` before the update, and the seconds of `forward`, `backward`, `norm` (not used) and `update`."""
        raise NotImplementedError("this peer cannot train")


def read_weights(path: str) -> tuple[Config, Weights]:
    """Return the sixteen tensors as float32 arrays, with wte unpadded.

    The arrays are copies, like a peer's own. Separate maps keep the file's pages out of the peer's memory."""
    import numpy as np

    from ...formats.open import open_model

    weights = {}
    with open_model(path) as source:
        for name, shape, _, _ in source.config.tensors(padded=False):
            array, start = np.empty(shape, np.float32), 0
            for rows in source.pieces(name):
                array[start : start + len(rows)] = rows
                start += len(rows)
            weights[name] = array
    return source.config, weights


class NumPyGPT2(Engine):
    """A handwritten GPT-2 with NumPy and its BLAS."""

    def __init__(self, path: str, threads: int) -> None:
        import numpy as np

        self.np = np
        config, self.weights = read_weights(path)
        super().__init__(config)
        shape = (self.config.L, self.config.NH, self.config.maxT, self.config.HS)
        self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def _run(self, tokens: list[int], start: int) -> Any:
        w, stop = self.weights, start + len(tokens)
        x = w["wte"][tokens] + w["wpe"][start:stop]  # (T, C)
        for i in range(self.config.L):
            x += self._attention(i, self._layernorm(x, w["ln1w"][i], w["ln1b"][i]), start, stop)
            fch = self._layernorm(x, w["ln2w"][i], w["ln2b"][i]) @ w["fcw"][i].T + w["fcb"][i]  # (T, 4C)
            x += self._gelu(fch) @ w["fcprojw"][i].T + w["fcprojb"][i]
        return (self._layernorm(x[-1:], w["lnfw"], w["lnfb"]) @ w["wte"].T)[0]

    def _attention(self, i: int, x: Any, start: int, stop: int) -> Any:
        """Compute causal attention of rows [start, stop) over all rows so far. Several rows are always a whole prompt."""
        np, w, T = self.np, self.weights, stop - start
        qkv = x @ w["qkvw"][i].T + w["qkvb"][i]  # (T, 3C)
        q, k, v = qkv.reshape(T, 3, self.config.NH, self.config.HS).transpose(1, 2, 0, 3)  # (NH, T, HS) each
        self.keys[i, :, start:stop], self.values[i, :, start:stop] = k, v
        scores = (q * np.float32(self.config.HS**-0.5)) @ self.keys[i, :, :stop].swapaxes(1, 2)  # (NH, T, stop)
        if T > 1:
            scores += np.triu(np.full((T, T), -np.inf, np.float32), 1)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        atty = (scores @ self.values[i, :, :stop]).swapaxes(0, 1).reshape(T, -1)  # (T, C)
        return atty @ w["attprojw"][i].T + w["attprojb"][i]

    def _layernorm(self, x: Any, weight: Any, bias: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = self.np.einsum("tc,tc->t", centred, centred)[:, None] / self.np.float32(x.shape[-1])
        centred /= self.np.sqrt(variance + self.np.float32(EPSILON))
        centred *= weight
        centred += bias
        return centred

    def _gelu(self, x: Any) -> Any:
        np, scale = self.np, (2 / self.np.pi) ** 0.5
        inner = (x * x * np.float32(0.044715 * scale) + np.float32(scale)) * x  # NumPy reuses the array of a temporary result
        np.tanh(inner, out=inner)
        inner += 1
        inner *= x
        inner *= np.float32(0.5)
        return inner


class Torch(Engine):
    """The training of all PyTorch peers, with PyTorch's fused AdamW and weight decay 0."""

    trained: list[Any]  # the network's weights, each once
    batch: Callable[[Any], Any]  # (B, T) -> logits (B, T, V), with a graph for autograd

    def __init__(self, path: str, threads: int) -> None:
        config, self.arrays = read_weights(path)
        super().__init__(config)
        self.torch: Any = importlib.import_module("torch")
        self.functional: Any = importlib.import_module("torch.nn.functional")
        self.torch.set_num_threads(threads)
        self.optimizer: Any = None

    def train(self, inputs: list[list[int]], targets: list[list[int]], **adamw: float) -> dict[str, float]:
        """Run one iteration. Clearing the gradients is part of the update."""
        torch = self.torch
        if self.optimizer is None:
            parameters = [parameter.requires_grad_() for parameter in self.trained]
            lr, *betas, eps = (adamw[name] for name in ("lr", "beta1", "beta2", "eps"))
            self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        x, y = torch.tensor(inputs), torch.tensor(targets)
        parameters = self.optimizer.param_groups[0]["params"]
        loss: Any = None

        def forward() -> None:
            nonlocal loss
            loss = self.functional.cross_entropy(self.batch(x).flatten(0, 1), y.flatten())

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        def norm() -> float:
            return float(torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters])).norm())

        _, seconds = laps(forward, lambda: loss.backward(), norm, update)
        return {"loss": loss.item(), **dict(zip(("forward", "backward", "norm", "update"), seconds, strict=True))}


class TorchGPT2(Torch):
    """A handwritten GPT-2 with PyTorch and its fused attention. Generation runs without autograd."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__(path, threads)
        self.weights = {name: self.torch.from_numpy(array) for name, array in self.arrays.items()}
        shape = (1, self.config.NH, self.config.maxT, self.config.HS)
        self.keys, self.values = ([self.torch.zeros(shape) for _ in range(self.config.L)] for _ in range(2))
        self.trained, self.batch = [*self.weights.values()], self._forward
        self.run_prompt: Callable[[Any, int], Any] = self._forward
        self.run_step: Callable[[Any, int], Any] = self._forward

    def _run(self, tokens: list[int], start: int) -> Any:
        with self.torch.inference_mode():
            return (self.run_step if start else self.run_prompt)(self.torch.tensor([tokens]), start)[0, -1]

    def _forward(self, tokens: Any, start: int | None = None) -> Any:
        """Return logits (1, 1, V) of the last of the tokens (1, T) at `start`; without a start, (B, T, V) of all tokens."""
        w, layer_norm, linear = self.weights, self.functional.layer_norm, self.functional.linear
        C, first = (self.config.C,), start or 0
        x = w["wte"][tokens] + w["wpe"][first : first + tokens.shape[1]]  # (B, T, C)
        for i in range(self.config.L):
            x = x + self._attention(i, layer_norm(x, C, w["ln1w"][i], w["ln1b"][i], EPSILON), start)
            fch = linear(layer_norm(x, C, w["ln2w"][i], w["ln2b"][i], EPSILON), w["fcw"][i], w["fcb"][i])  # (B, T, 4C)
            x = x + linear(self.functional.gelu(fch, approximate="tanh"), w["fcprojw"][i], w["fcprojb"][i])
        return linear(layer_norm(x if start is None else x[:, -1:], C, w["lnfw"], w["lnfb"], EPSILON), w["wte"])

    def _attention(self, i: int, x: Any, start: int | None) -> Any:
        """Compute causal attention of rows over all rows so far. Several rows are always a whole prompt."""
        w, linear, (B, T, _) = self.weights, self.functional.linear, x.shape
        qkv = linear(x, w["qkvw"][i], w["qkvb"][i]).view(B, T, 3, self.config.NH, self.config.HS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, NH, T, HS) each
        if start is not None:
            positions = self.torch.arange(start, start + T)
            self.keys[i].index_copy_(2, positions, k)  # for a slice assignment, the compiler would copy the whole cache
            self.values[i].index_copy_(2, positions, v)
            if T == 1:
                k, v = (cache[i][:, :, : start + T] for cache in (self.keys, self.values))
        atty = self.functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return linear(atty.transpose(1, 2).reshape(B, T, -1), w["attprojw"][i], w["attprojb"][i])


class CompiledGPT2(TorchGPT2):
    """TorchGPT2 under torch.compile, compiled once for each prompt length, and once for steps at any position."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__(path, threads)
        importlib.import_module("torch._dynamo").config.recompile_limit = 64  # above this limit, new lengths run uncompiled
        self.run_prompt = self.torch.compile(self._forward, dynamic=False)
        self.run_step = self.torch.compile(self._forward, dynamic=True)


class Transformers(Torch):
    """Hugging Face's GPT2LMHeadModel with its default cache and fused attention."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__(path, threads)
        library: Any = importlib.import_module("transformers")
        c = self.config
        options = {"vocab_size": c.V, "n_positions": c.maxT, "n_embd": c.C, "n_layer": c.L, "n_head": c.NH}
        with self.torch.device("meta"):  # allocate nothing: filling random weights would take seconds
            self.model = library.GPT2LMHeadModel(library.GPT2Config(**options, attn_implementation="sdpa")).eval()
        self.model.load_state_dict(self._renamed(self.arrays), strict=True, assign=True)
        self.model.tie_weights()  # otherwise wte and the head would be two parameters
        self.trained = [*self.model.parameters()]
        self.batch = lambda tokens: self.model(tokens, use_cache=False).logits  # without dropout, because of eval()
        self.cache: Any = None

    def _renamed(self, weights: Weights) -> dict[str, Any]:
        """Return the weights by the library's names and layout. Empties `weights`, so that each is in memory once."""
        from pygpt.formats.huggingface import HEAD, NAMES, PREFIX

        state = {}
        for ours in [*weights]:
            (theirs, transposed), values = NAMES[ours], weights.pop(ours)
            for i, one in enumerate(values if "{}" in theirs else [values]):
                state[PREFIX + theirs.format(i)] = self.torch.from_numpy(one.T.copy() if transposed else one)
        return {**state, HEAD: state[f"{PREFIX}wte.weight"]}

    def _run(self, tokens: list[int], start: int) -> Any:
        cache = self.cache if start else None
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[0, -1]


class LlamaCpp(Engine):
    """llama.cpp through the C interface of llama-cpp-python. Its Python class would keep the logits of every row.

    The defaults are the fastest settings: keys, values and GELU's table are float16. Logits agree to 2e-3 of the largest."""

    def __init__(self, path: str, threads: int, format: str | None = None) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        self.lib.llama_backend_init()
        with TemporaryDirectory() as folder:  # the file stays mapped after it is deleted
            super().__init__(convert_to_gguf(path, folder, format))
            file = os.path.join(folder, "model.gguf").encode()
            self.model = self.lib.llama_model_load_from_file(file, self.lib.llama_model_default_params())
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = self.config.maxT
        options.n_threads = options.n_threads_batch = threads
        self.context = self.model and self.lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp cannot load the converted model")

    def _run(self, tokens: list[int], start: int) -> Any:
        """Return the logits of the last token. A batch of llama_batch_get_one computes no others."""
        if not start:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        ids = (self.lib.llama_token * len(tokens))(*tokens)  # the batch keeps a pointer to this array
        if status := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode failed with status {status}")
        return self.lib.llama_get_logits(self.context)


class CTranslate2(Engine):
    """CTranslate2's Generator with greedy sampling. It offers no single step, so tokens are timed in its callback."""

    def __init__(self, path: str, threads: int, compute_type: str = "float32") -> None:
        library: Any = importlib.import_module("ctranslate2")
        with TemporaryDirectory() as folder:
            super().__init__(convert_to_ctranslate2(path, folder))
            self.generator = library.Generator(folder, compute_type=compute_type, intra_threads=threads)

    def _generate(self, tokens: list[int], new: int, callback: Callable[[Any], bool] | None = None, **options: Any) -> Any:
        """Run a prompt with the head for its last token only, then generate new - 1 tokens."""
        options |= {"max_length": new, "end_token": [], "sampling_topk": 1, "include_prompt_in_result": False}  # no early stop
        return self.generator.generate_batch([[str(token) for token in tokens]], callback=callback, **options)[0]

    def _run(self, tokens: list[int], start: int) -> Any:
        self._generate(tokens, 1)

    def _time_decode(self, context: list[int], new: list[int]) -> float:
        """Return the seconds from the first generated token to the token len(new) later."""
        times: list[float] = []

        def note(_: Any) -> bool:
            times.append(time.perf_counter())
            return False  # continue

        self._generate(context, len(new) + 1, note)
        if len(times) != len(new) + 1:
            raise RuntimeError(f"{len(times)} tokens came back, expected {len(new) + 1}")
        return times[-1] - times[0]

    def _last(self, tokens: list[int]) -> Any:
        import numpy as np

        return np.array(self._generate(tokens, 1, return_logits_vocab=True).logits[0][0])


ENGINES: dict[str, Callable[[str, int], Engine]] = {
    "numpy": NumPyGPT2, "torch": TorchGPT2, "torch-compile": CompiledGPT2, "transformers": Transformers,
    **{name: partial(LlamaCpp, format=QUANTISED.get(name)) for name in PEERS if name.startswith("llama.cpp")},
    "ctranslate2": CTranslate2, "ctranslate2-int8": partial(CTranslate2, compute_type="int8"),
}  # fmt: skip


def convert_to_gguf(path: str, folder: str, format: str | None = None) -> Config:
    """Write model.gguf in a format of `pygpt quantize`, or in the file's own precision; return the dimensions."""
    from ...formats.open import open_model
    from ..quantize import FORMATS, HEADS, quantise

    with open_model(path) as source:
        kind = format or ("bf16" if source.formats["wpe"] == FORMATS["bf16"] else "f32")
        quantise(source, os.path.join(folder, "model.gguf"), FORMATS[kind], FORMATS[HEADS.get(kind, kind)])
        return source.config


def convert_to_ctranslate2(path: str, folder: str) -> Config:
    """Write CTranslate2's model files from its specification of a decoder; return the dimensions. A word is an id in decimal.

    This does the same as CTranslate2's converter for transformers, without that package and a tokenizer."""
    library: Any = importlib.import_module("ctranslate2")
    config, weights = read_weights(path)
    spec = library.specs.TransformerDecoderModelSpec.from_config(
        config.L, config.NH, pre_norm=True, activation=library.specs.Activation.GELUTanh
    )

    def fill(target: Any, name: str, *layer: int) -> None:
        names = ("gamma", "beta") if name.startswith("ln") else ("weight", "bias")
        for attribute, suffix in zip(names, "wb", strict=True):
            setattr(target, attribute, weights[name + suffix][layer])

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte"]
    decoder.position_encodings.encodings = weights["wpe"]
    fill(decoder.layer_norm, "lnf")
    for i, layer in enumerate(decoder.layer):
        attention, ffn = layer.self_attention, layer.ffn
        targets = attention.layer_norm, *attention.linear[:2], ffn.layer_norm, ffn.linear_0, ffn.linear_1
        for name, target in zip(("ln1", "qkv", "attproj", "ln2", "fc", "fcproj"), targets, strict=True):
            fill(target, name, i)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(config.V - 1)
    spec.register_vocabulary([str(token) for token in range(config.V)])
    spec.validate()
    spec.optimize()
    spec.save(folder)
    return config


def serve(requests: Connection, name: str, path: str, threads: int) -> None:
    """Run the child: load the model and report that, then answer calls of the engine's methods until the pipe ends."""
    os.environ.update({**dict.fromkeys(POOLS, str(threads)), **SETTINGS})
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # libraries print to stdout
        os.dup2(nothing, stream)

    def answer(work: Callable[[], Any]) -> None:
        try:
            reply = work(), ""
        except Exception as error:
            why = f"cannot import {error.name or 'a package'}" if isinstance(error, ImportError) else type(error).__name__
            reply = None, f"{why}: {error}".splitlines()[0]
        time.sleep(SETTLE_SECONDS)
        requests.send(reply)

    engines: list[Engine] = []
    answer(lambda: engines.append(ENGINES[name](path, threads)))
    with suppress(EOFError):
        while engines:
            method, arguments, named = requests.recv()
            answer(partial(getattr(engines[0], method), *arguments, **named))
