"""A model that is served: its names, engine and tokenizer."""

import hashlib
import os
from asyncio import Future
from collections.abc import Iterable
from typing import Any

from .. import __version__
from ..errors import InputError
from ..model import GPT2
from ..tokenizer import Tokenizer, tokenizer_of
from .schema import ApiError


class Served:
    """A model under one or more names, with its engine. cache_bytes: the most bytes of keys and values."""

    def __init__(
        self, model: GPT2, names: list[str], path: str, *, cache_bytes: int, max_live: int, target_ms: float, fingerprint: bool
    ) -> None:
        self.model, self.names, self.path = model, names, path
        self.created = int(os.path.getmtime(path))
        try:
            self.tokenizer: Tokenizer | None = tokenizer_of(model.config)
        except InputError:  # its vocabulary is unknown
            self.tokenizer = None
        self.eot = self.tokenizer.eot if self.tokenizer else None
        prefix = model.new_prefix_cache(cache_bytes)
        self.engine = model.engine(prefix=prefix, max_live=max_live, cache_bytes=cache_bytes, target_ms=target_ms)
        self.traced: list[Future[list[list[Any]]]] = []  # who waits for the timeline of the next step
        self.fingerprint = _fingerprint(path) if fingerprint else None

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of ids. Ids beyond the vocabulary have none."""
        if self.tokenizer is None:
            return b""
        return self.tokenizer.decode_bytes([token for token in tokens if token < self.tokenizer.V])

    def check_ids(self, name: str, tokens: list[int]) -> None:
        """Raise ApiError if a token of the field `name` is outside the vocabulary."""
        if (worst := max(tokens, default=0)) >= self.model.config.V:
            raise ApiError(f"{name} has the token id {worst}: ids of this model are below {self.model.config.V}", name)


def _fingerprint(path: str) -> str:
    """Return a hash of the weights, their format and the arithmetic: answers with equal hashes are equal."""
    with open(path, "rb") as file:
        return f"pygpt-{__version__}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
