"""Training data: the tokens of shards or arrays, in batches.

A data set is one or more shards. Tokens stay in the mapped file until a batch needs them. Refuses shards that are too small
for one batch. Source: llm.c, llmc/dataloader.h."""

import glob
import hashlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..config import LIMITS
from ..errors import DataError, InputError, check_whole, plural, real, shown
from ..formats.files import Path
from ..formats.llmc import Tokens, as_tokens, check_ids, read_tokens

Batch = npt.NDArray[np.int32]  # (B, T)

# The fingerprint of a data set hashes all its tokens, up to WHOLE of them. Reading a hundred gigabytes takes minutes, so the
# fingerprint of a larger data set hashes samples of every shard.
WHOLE = 1 << 24
PIECE = 1 << 20  # tokens hashed at a time
SAMPLES, SAMPLE = 16, 1 << 12  # samples in a shard, evenly spaced from its first token to its last; tokens in one sample


def split(
    tokens: Tokens, *, val_tokens: SupportsIndex | None = None, val_fraction: SupportsFloat | None = None
) -> tuple[Tokens, Tokens]:
    """Split tokens into (train, val), two views.

    val_tokens: the number of tokens for validation, from the beginning, as llm.c splits tinyshakespeare. val_fraction: the
    share for validation, from the end. Raises InputError unless exactly one of them is given and both parts get tokens."""
    count = len(tokens)
    if count < 2:
        raise InputError(f"{plural(count, 'token')} cannot be split: at least 2 are needed")
    if (val_tokens is None) == (val_fraction is None):
        raise InputError("give either val_tokens, a number of first tokens, or val_fraction, a share at the end")
    if val_tokens is not None:
        first = check_whole("val_tokens", val_tokens, 1, count - 1, f", with {count} tokens from 1 to {count - 1}")
        return tokens[first:], tokens[:first]
    fraction = real(val_fraction)
    if not 0 < fraction < 1 or not 0 < round(count * fraction) < count:
        rule = f"it must be between 0 and 1, and each part of {count} tokens needs one"
        raise InputError(f"val_fraction is {shown(val_fraction)}: {rule}")
    train = count - round(count * fraction)
    return tokens[:train], tokens[train:]


class DataLoader:
    """Serve endless batches of B sequences of T tokens, in llm.c's order.

    A batch reads B*T + 1 tokens, and the next batch starts B*T tokens later. source: a path or a pattern of shards (sorted),
    a list of paths, or tokens in memory. A shard gives floor((tokens - 1) / (B*T)) batches; the last may give none.
    labels, for tokens in memory: the targets, int32 (tokens,), with -100 for a token that is not trained on. After the last
    shard a new epoch begins. shuffle_seed: shuffle the shards, and the batches in each shard, again in every epoch. The order
    depends only on seed and epoch, so it is the same on every machine. V: the vocabulary size; opening a shard checks every id.

    `batches` is the number of batches in an epoch, and `tokens` the number of tokens in all shards. `epoch` is that of the
    latest batch, from 0. `masked`: whether there are labels. `fingerprint` is a hash that identifies the data in a state().
    Raises InputError for a bad B, T, V or seed, DataError for a file that is not a shard or is too small for one batch."""

    def __init__(
        self,
        source: Path | Sequence[Path] | npt.ArrayLike,
        B: SupportsIndex,
        T: SupportsIndex,
        *,
        shuffle_seed: SupportsIndex | None = None,
        V: SupportsIndex | None = None,
        labels: Tokens | None = None,
    ) -> None:
        self.B, self.T = B, T = check_whole("B", B, 1, 1 << 30), check_whole("T", T, 1, 1 << 30)
        self._V = V if V is None else check_whole("V", V, 1, LIMITS["V"])
        self.shuffle_seed = shuffle_seed if shuffle_seed is None else check_whole("shuffle_seed", shuffle_seed, 0, 2**64 - 1)
        self._files, tokens = _find(source)
        if tokens is not None:
            check_ids(tokens, self._V or LIMITS["V"], "tokens")
        self._tokens = tokens  # of the open shard
        self._counts = [len(read_tokens(path)) for path in self._files] if tokens is None else [len(tokens)]
        self._batches = [(count - 1) // (B * T) for count in self._counts]
        last = len(self._counts) - 1
        for i, (name, count) in enumerate(zip(self._files or ["tokens"], self._counts, strict=True)):
            if count < B * T + 1 and (i < last or not last):  # `pygpt shards` writes the rest into the last shard
                needed = f"B*T + 1 = {B}*{T} + 1 = {B * T + 1} are needed: use a longer text, or make B or T smaller"
                or_else = ", or leave this file out" if last else ""
                raise DataError(f"{name}: {plural(count, 'token')}, too few for one batch: {needed}{or_else}")
        if labels is not None and (tokens is None or labels.shape != tokens.shape):
            raise InputError(f"labels have shape {labels.shape}: they need one label for each of the tokens in memory")
        self._labels, self.masked = labels, labels is not None
        self.batches, self.tokens = sum(self._batches), sum(self._counts)
        parts = map(read_tokens, self._files) if tokens is None else [tokens, *([] if labels is None else [labels])]
        self.fingerprint = _fingerprint(parts, self.tokens)
        self.reset()

    def next_batch(self) -> tuple[Batch, Batch]:
        """Return the next (inputs, targets), fresh int32 arrays (B, T); each target is the token after its input."""
        while self._batch == len(self._order):  # a last shard can be too small for a batch
            self._next_shard()
        assert self._tokens is not None
        B, T = self.B, self.T
        start = int(self._order[self._batch]) * B * T
        tokens = self._tokens[start : start + B * T + 1]
        targets = (tokens if self._labels is None else self._labels[start : start + B * T + 1])[1:]
        self._batch += 1
        return tokens[:-1].astype(np.int32).reshape(B, T), targets.astype(np.int32).reshape(B, T)

    def skip(self, batches: int) -> None:
        """Go forward by a number of batches without reading them, as if next_batch() had returned them."""
        while batches > (left := len(self._order) - self._batch):
            batches -= left
            self._next_shard()
        self._batch += batches

    def _next_shard(self) -> None:
        last = self._shard == len(self._counts) - 1
        self._move(*((self.epoch + 1, 0, 0) if last else (self.epoch, self._shard + 1, 0)))

    def reset(self) -> None:
        """Go to the first batch of the first epoch. Validation does so before each evaluation."""
        self._move(0, 0, 0)

    def state(self) -> dict[str, int | str | None]:
        """Return the position and the identity of the data, for JSON. restore() continues there with the same batches."""
        return {"epoch": self.epoch, "shard": self._shard, "batch": self._batch, **self._identity()}

    def restore(self, state: Mapping[str, int | str | None]) -> None:
        """Go to the position of a state(). Raises InputError if that loader had other data, B, T or seed."""
        identity = self._identity()
        state = {"fingerprint": self.fingerprint, **state}  # the oldest states lack a fingerprint
        if set(state) != {"epoch", "shard", "batch", *identity}:
            raise InputError(f"the loader's state has the fields {shown(sorted(state))}, expected {sorted(self.state())}")
        for name, value in identity.items():
            if type(state[name]) is not type(value) or state[name] != value:  # an array compares with a number, too
                both = f"{name} = {shown(state[name])}, this loader has {value!r}"
                raise InputError(f"the loader's state is for {both}: use the same data, B, T and seed, or start a new run")
        limits = {"epoch": 2**63, "shard": len(self._counts) - 1, "batch": self.batches}
        self._move(*(check_whole(f"the loader's state: {name}", state[name], 0, most) for name, most in limits.items()))

    def _identity(self) -> dict[str, int | str | None]:
        """Return the values on which the meaning of a position depends."""
        rest = {name: getattr(self, name) for name in ("tokens", "fingerprint", "shuffle_seed")}
        return {"B": self.B, "T": self.T, "shards": len(self._counts), **rest}

    def _move(self, epoch: int, shard: int, batch: int) -> None:
        """Open the epoch's shard number `shard`, and go to one of its batches. On failure the position does not change."""
        index = int(self._permutation(epoch, 0, len(self._counts))[shard])
        if batch > self._batches[index]:
            raise InputError(f"the loader's state has batch = {batch}: its shard has {self._batches[index]} batches")
        tokens = self._tokens
        if self._files:
            tokens = read_tokens(self._files[index], V=self._V)
            if len(tokens) != (count := self._counts[index]):
                raise DataError(f"{self._files[index]}: {len(tokens)} tokens, expected {count}: the file has changed")
        self._order = self._permutation(epoch, 1 + index, self._batches[index])
        self._tokens, self.epoch, self._shard, self._batch = tokens, epoch, shard, batch

    def _permutation(self, epoch: int, stream: int, count: int) -> Sequence[int] | npt.NDArray[np.intp]:
        """Return an order of `count` items. Stream 0 orders the epoch's shards, stream 1 + i the batches of shard i. Items are
        sorted by 64 random bits. Philox's raw output and a stable sort are the same in every NumPy, on every machine."""
        if self.shuffle_seed is None:
            return range(count)
        key, counter = np.array([self.shuffle_seed, epoch], np.uint64), np.array([0, stream, 0, 0], np.uint64)
        return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")


def matching(name: str, advice: str) -> list[str]:
    """Return the files that a name or pattern matches, sorted. Raises DataError, with this advice, if there is none."""
    files = [name] if os.path.lexists(name) else sorted(glob.glob(name))
    if not files:
        raise DataError(f"{name!r}: not a file, and not a pattern that matches files: {advice}")
    return files


def _find(source: Path | Sequence[Path] | npt.ArrayLike) -> tuple[list[str], Tokens | None]:
    if isinstance(source, str | os.PathLike):
        return matching(os.fspath(source), "make token files with `pygpt shards`"), None
    if isinstance(source, list | tuple) and all(isinstance(item, str | os.PathLike) for item in source):
        if not source:
            raise DataError("the list of token files is empty: name at least one")
        return [os.fspath(item) for item in source], None
    return [], as_tokens(source)  # type: ignore[arg-type]


def _fingerprint(shards: Iterable[Tokens], total: int) -> str:
    """Return 32 hexadecimal digits that identify a data set of `total` tokens by its contents, not by its file names."""
    digest = hashlib.sha256()
    for tokens in shards:
        count = len(tokens)
        digest.update(struct.pack("<q", count))
        if total <= WHOLE:
            pieces = [(start, PIECE) for start in range(0, count, PIECE)]
        else:
            pieces = [(max(0, count - SAMPLE) * i // (SAMPLES - 1), SAMPLE) for i in range(SAMPLES)]
        for start, size in pieces:
            digest.update(tokens[start : start + size].astype("<u4").data)
    return digest.hexdigest()[:32]
