"""GPT2: the class for users. It joins the network, which computes logits, and the engine, which completes requests."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from ._signals import see_through
from .errors import TYPE_CHECKING, InputError, PyGPTError, check_whole
from .formats.dtypes import ModelFile
from .formats.open import open_weights
from .generation.generate import Generator
from .generation.request import check_tokens
from .generation.speculate import Draft
from .hub.find import find_model
from .network import CHUNK, KVCache, Network, Row
from .pool import TRIES

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    import numpy as np
    import numpy.typing as npt

    from ._kernels import Floats, Trace
    from .activations import Value

# The weights that guess for each format: much smaller than the model's own. For the smallest format, only the text guesses.
DRAFTS = {"float32": "q8_0", "bfloat16": "q4_0", "float16": "q4_0", "q8_0": "q4_0"}


class GPT2(Generator):
    """A GPT-2 model on `threads` workers. Use it in a `with` block, or close() it.

    Threads may share a model: their steps take turns. Its methods return fresh float32 arrays, which belong to the caller. A
    step uses one worker if it is small, else as many as can run at once; with all_workers, always all."""

    network: Network

    def __init__(self, checkpoint: ModelFile, *, threads: "SupportsIndex | None" = None, all_workers: bool = False) -> None:
        if isinstance(checkpoint, (str, os.PathLike)):
            raise InputError(f"checkpoint is {checkpoint!r}: GPT2.load(path) opens a model file or folder")
        super().__init__(Network(checkpoint, threads=threads, all_workers=all_workers))
        self._draft: Draft | None = None
        self._draft_weights = DRAFTS.get(checkpoint.format.name)  # quantise to this format for guesses

    @classmethod
    def load(
        cls,
        path: "str | os.PathLike[str] | None" = None,
        *,
        threads: "SupportsIndex | None" = None,
        mmap: bool = True,
        weights: str | None = None,
        tokenizer: "str | os.PathLike[str] | None" = None,
        text_only: bool = False,
        all_workers: bool = False,
        draft: "str | os.PathLike[str] | None" = None,
    ) -> "GPT2":
        """Open a model file or folder: `path`, else the one that find_model() finds. Unless mmap is False, it is mapped.

        threads: the number of workers, 1 to 256; else PYGPT_THREADS, else one for each usable core.
        weights: "q8_0" or "q4_0" quantises the matrices in memory; None uses the file's weights. tokenizer: a file with the
        vocabulary, for stop strings; None uses the one beside the model or inside it, else GPT-2's. text_only: leave out the
        ids beyond the tokenizer's, so that they are never chosen.

        draft: what guesses tokens for speculation. "q8_0" or "q4_0" quantises these weights (default: one of the two, at the
        first use). "lookup" uses only the text so far. Or the file of a model with the same vocabulary.
        Raises CheckpointError for a file that is not a model, InputError for bad threads, weights or draft and for a tokenizer
        that does not exist. A tokenizer that is not a vocabulary is refused when a text first needs it."""
        found, _ = find_model(path)
        checkpoint = open_weights(found, mmap=mmap, weights=weights, threads=threads, tokenizer=tokenizer, text_only=text_only)
        with ExitStack() as undo:
            undo.callback(checkpoint.close)
            model = cls(checkpoint, threads=threads, all_workers=all_workers)
            undo.callback(model.close)
            if draft is not None:
                model._choose_draft(os.fspath(draft))
            undo.pop_all()
        return model

    def _choose_draft(self, draft: str) -> None:
        """Take the draft that load() was asked for. Raises InputError for a model with another vocabulary."""
        from .formats.panels import QUANTISED

        self._draft_weights = None
        if draft in QUANTISED:
            self._draft = self._draft_from(self.network.quantised(draft))
        elif draft != "lookup":
            checkpoint = open_weights(find_model(draft)[0])
            if checkpoint.config.V != self.config.V:
                checkpoint.close()
                counts = f"draft {draft} has {checkpoint.config.V} token ids, and the model has {self.config.V}"
                raise InputError(f"{counts}: give a draft with the model's vocabulary")
            self._draft = self._draft_from(checkpoint)

    def draft(self, make: bool) -> Draft | None:
        """Return the draft, which guesses tokens for speculation, or None. If `make` is True, quantise weights for it once:
        if that fails, for example without memory, only the text guesses."""
        if self._draft is None and make and self._draft_weights is not None:
            try:
                self._draft = self._draft_from(self.network.quantised(self._draft_weights))
            except (PyGPTError, MemoryError):  # no memory, or values that are too large: the request can do without
                self._draft_weights = None
        return self._draft

    def _draft_from(self, checkpoint: ModelFile) -> Draft:
        return Draft(Network(checkpoint, target=self.network), shared=checkpoint.config == self.config)  # its caches

    @property
    def threads(self) -> int:
        """The number of workers, the caller included."""
        return self.network.threads

    def new_cache(self, capacity: "SupportsIndex | None" = None) -> KVCache:
        """Return an empty key-value cache for one sequence of up to `capacity` tokens (default maxT)."""
        return self.network.new_cache(capacity)

    def step(self, rows: Iterable[Row], edits: "Mapping[Any, Value] | None" = None) -> "npt.NDArray[np.float32]":
        """Run the network over rows (token, cache, want_logits); return the logits of the rows that want them, (wanted, V).

        The position of a row is its cache's length plus the earlier rows of that cache in the list. If anything fails, the
        caches have not changed. Raises InputError for a bad token, a full cache or another model's cache, ClosedError after
        close(). edits: of all sequences, as in activations(); an array fits one position, a function gets these rows."""
        watch = None
        if edits is not None:
            from .activations import Edits, Watch

            watch = Watch(Edits(self.config, edits))
        return self._whole(lambda lengths: self.network.step(rows, lengths, watch))

    def extend(self, cache: KVCache, tokens: "Iterable[SupportsIndex]") -> "npt.NDArray[np.float32]":
        """Append tokens to the cache, in chunks; return the logits after the last one, (V,).

        If anything fails, the cache has not changed. Raises InputError for zero tokens, and for more than it has room for."""
        row: npt.NDArray[np.float32] = self._whole(lambda lengths: self.network.extend(cache, tokens, lengths))[0]
        return row

    def _whole(self, run: "Callable[[dict[KVCache, int]], Floats]") -> "npt.NDArray[np.float32]":
        """Return the logits of run(lengths) as an array. If it is interrupted, restore the lengths of all caches."""
        import numpy as np

        lengths: dict[KVCache, int] = {}

        def restore() -> bool:
            for cache, length in lengths.items():
                cache._truncate(length)
            return True

        try:
            return np.asarray(run(lengths))
        except BaseException:
            see_through(restore, TRIES)  # Ctrl-C can arrive after a step is committed, before its caller has the logits
            raise

    def prefill(self, cache: KVCache, tokens: "Iterable[SupportsIndex]") -> "npt.NDArray[np.float32]":
        """Append a prompt. This is an older name of extend()."""
        return self.extend(cache, tokens)

    def decode(self, cache: KVCache, token: "SupportsIndex") -> "npt.NDArray[np.float32]":
        """Append one token. This is an older name of extend()."""
        return self.extend(cache, [token])

    def logits(self, tokens: "Iterable[SupportsIndex]") -> "npt.NDArray[np.float32]":
        """Return the logits of every position of a sequence, (T, V)."""
        import numpy as np

        ids = check_tokens(self.config, tokens)
        out = np.empty((len(ids), self.config.V), np.float32)
        cache = self.new_cache(len(ids))
        for start in range(0, len(ids), CHUNK):
            out[start : start + CHUNK] = self.step([(token, cache, True) for token in ids[start : start + CHUNK]])
        return out

    def activations(
        self,
        tokens: "Iterable[SupportsIndex]",
        names: "Iterable[str] | str",
        layers: "Iterable[SupportsIndex] | None" = None,
        positions: "Iterable[SupportsIndex] | None" = None,
        edits: "Mapping[Any, Value] | None" = None,
        out: "Mapping[str, npt.NDArray[np.float32]] | None" = None,
        chunk: "SupportsIndex" = CHUNK,
    ) -> "dict[str, npt.NDArray[np.float32]]":
        """Run a sequence of T tokens; return the named activations in float32, with the bits of an ordinary step.

        encoded, lnf (T, C); logits (T, V). Of each layer: ln1, q, k, v, atty, attproj, residual2, ln2, fcproj and residual3
        (L, T, C); fch, before the activation function, and fch_gelu (L, T, F); probs (L, NH, T, T), how each position attends
        to each key. In q, k, v and atty, head h has the channels from h * HS. residual2 is attproj + the residual3 of the
        layer before, or encoded. residual3 is residual2 + fcproj.

        layers, positions: which to return, in this order (default: all). out: arrays of the right shapes to fill and return,
        such as numpy.memmap. All other arrays together may take 2 GiB. chunk: the most tokens of one step, without edits.
        Steps of other threads run in between.

        edits: map (name, layer, position) to changes, made in this order. The layer is None for encoded, lnf and logits;
        position None means all. A change is an array that replaces the activation, add(), scale(), zero(), or a function that
        gets the array and returns another or changes it. The shape is that of a position, such as (C,), or for all positions
        that of a layer, such as (T, C). An edit of k or v changes the cache. An edit of probs changes atty; keys after the
        position stay 0. All numbers before an edit keep their bits, at earlier positions and in earlier phases. Raises
        InputError for an unknown name, a layer or position that is not there, an array of another shape, and if the arrays
        take too much memory."""
        from .activations import Capture, Edits, Watch

        ids = check_tokens(self.config, tokens)
        capture = Capture(self.config, len(ids), names, layers, positions, out)
        watch = Watch(Edits(self.config, {} if edits is None else edits, len(ids)), capture)
        cache = self.new_cache(len(ids))
        size = check_whole("chunk", chunk, 1, CHUNK) if edits is None else len(ids)  # a function gets the whole array
        for start in range(0, len(ids), size):
            rows = [(token, cache, i in capture.wanted) for i, token in enumerate(ids[start : start + size], start)]
            self.network.step(rows, watch=watch)
        return capture.arrays

    def logits_of(self, streams: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
        """Return the logits (N, V) that residual streams (N, C) give through the last layernorm and the head.

        The network itself computes the rows, in place of the last layer's, so the weights may have any format."""
        import numpy as np

        place, maxT, streams = ("residual3", self.config.L - 1, None), self.config.maxT, np.atleast_2d(streams)
        if streams.shape[1:] != (self.config.C,):
            raise InputError(f"streams have shape {streams.shape}: they must be residuals of shape (N, {self.config.C})")
        found = np.empty((len(streams), self.config.V), np.float32)
        for start in range(0, len(streams), maxT):
            part, out = streams[start : start + maxT], {"logits": found[start : start + maxT]}
            self.activations([0] * len(part), "logits", edits={place: part}, out=out)
        return found

    def record(self, trace: "Trace | None") -> None:
        """Record the workers' phases of later steps in `trace`; None stops the recording. It costs about 0.1 us per phase."""
        self.network.record(trace)

    def fork_join(self, on: bool) -> None:
        """Run later steps as one round of the pool for each kernel instead of one per step, for comparison."""
        self.network.fork_join(on)

    def close(self) -> None:
        """Stop the workers and unmap the file, after a running step has ended. May be called twice."""
        self.network.close()
        if self._draft is not None:
            self._draft.network.close()
