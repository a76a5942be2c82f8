"""Batch jobs: complete or score many prompts, on one machine or on the workers of any cluster.

    done = Complete("gpt2", threads=4, seed=7, max_new_tokens=32, temperature=0.8)
    done({"id": [1, 2], "prompt": ["To be", "Once upon"]})       # a batch of columns, as Ray Data and Dask pass it
    list(done.rows([{"id": 1, "prompt": "To be"}]))              # rows, as `pygpt batch` reads them

An answer depends only on its row, the model, and the options and the seed of the job. Each row has its own seed, made from the
job's seed and the row's id. So batch size, order, partition and cluster do not change an answer. Refuses to know about files
and schedulers: they call a Complete."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from . import __version__
from ._kernels import cpu_info
from .errors import Closing, InputError, PyGPTError, check_whole, is_whole, shown
from .formats.open import sha256_of
from .generation.engine import LIVE, Engine, Job
from .generation.logprobs import score
from .generation.request import JSON_KEYS, Request, check_ids, check_keys, complete_order
from .hub.find import find_model
from .model import GPT2
from .tokenizer import Tokenizer, tokenizer_of

Row = Mapping[str, Any]
Answer = dict[str, Any]
KEYS = JSON_KEYS | {"id", "prompt", "continuations"}
AHEAD = 64 * LIVE  # the most answers that wait for an earlier one: more rows must wait, so that memory stays small


class Complete(Closing):
    """Complete or score rows on a model of its own. Use it in a `with` block, or close() it.

    model: a path or name for find_model(). threads, mmap, weights: as for GPT2.load(). seed: of the job, 0 to 2**64 - 1.
    logprobs: report each new token's log-probability, and this number of most probable tokens. keep_going: answer a bad row
    with its error instead of raising it. batch_size: sequences in a step of the network. options: of all completions, as for
    GPT2.generate(); a row can override them.

    A row has an "id", a whole number or a string, and a "prompt" (text) or "tokens" (ids). To complete it, it can have options
    of its own, a "seed" included. To score it, without edits, it has "continuations", a list of texts or of lists of ids.
    A text is encoded alone, so begin it with its space."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        mmap: bool = True,
        weights: str | None = None,
        seed: int = 0,
        logprobs: int | None = None,
        keep_going: bool = False,
        batch_size: int = LIVE,
        **options: Any,
    ) -> None:
        check_whole("seed", seed, 0, 2**64 - 1, " from 0 to 2^64 - 1")
        if "top_logprobs" in options:
            raise InputError("top_logprobs is an option of generate(): give logprobs instead")
        self.path = find_model(model)[0]
        self.model = GPT2.load(self.path, threads=threads, mmap=mmap, weights=weights)
        self.seed, self.logprobs, self.keep_going, self.batch_size = seed, logprobs, keep_going, batch_size
        self._weights, self._options = weights, options
        self._cache, self._held = self.model.new_cache(), list[int]()  # the latest scored prompt: many share their beginning
        self._tokenizer: Tokenizer | None = None
        with suppress(InputError):  # its vocabulary is unknown
            self._tokenizer = tokenizer_of(self.model.config)
        try:
            self.model.engine(max_live=batch_size)
            Request(self.model.config, [0], top_logprobs=logprobs, **options)  # report bad options before any row
        except BaseException:
            self.close()
            raise

    def identity(self) -> dict[str, Any]:
        """Return everything on which answers depend besides the rows, for JSON. The first call reads the whole model file."""
        own = {"seed": self.seed, "logprobs": self.logprobs, "keep_going": self.keep_going, "options": self._options}
        arithmetic = {"weights": self._weights, "fused multiply-add": cpu_info()["fused"]}
        return {"pygpt": __version__, "model": sha256_of(self.path), **arithmetic, **own}

    def seed_of(self, key: int | str) -> int:
        """Return the seed of a row: the first 8 bytes of the SHA-256 of "SEED/ID", little-endian."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{key}".encode("utf-8", "surrogatepass")).digest()[:8], "little")

    def check(self, row: Row) -> Request | tuple[list[int], list[list[int]]]:
        """Return a row's request, or the ids of the prompt and the continuations to score. Raises InputError for a bad row."""
        if not hasattr(row, "items"):
            raise InputError(f'a row is {shown(row)}: it must be a dict, such as {{"id": 1, "prompt": "To be"}}')
        key = row.get("id")
        if not isinstance(key, str) and not is_whole(key, -(2**63), 2**64 - 1):
            raise InputError(f'"id" is {shown(key)}: it must be a string or a whole number of 64 bits')
        check_keys(row, KEYS)
        if ("prompt" in row) == ("tokens" in row):
            raise InputError('give either "prompt", a text, or "tokens", a list of ids')
        tokens = self._ids("prompt", row["prompt"], str) if "prompt" in row else self._ids("tokens", row["tokens"], list)
        if "continuations" in row:
            return tokens, self._continuations(row, len(tokens))
        own = {name: value for name, value in row.items() if name not in ("id", "prompt", "tokens")}
        return Request(self.model.config, tokens, top_logprobs=self.logprobs, **complete_order(own, self._options))

    def _continuations(self, row: Row, prompt: int) -> list[list[int]]:
        given, most = row["continuations"], self.model.config.maxT + 1  # the last token is not an input
        edited = {"edits"} if self._options.get("edits") else {}
        if surplus := sorted({*row, *edited} - {"id", "prompt", "tokens", "continuations"}):
            raise InputError(f'{surplus[0]!r} is an option of completions, and "continuations" are scored: leave one out')
        if not isinstance(given, list) or not given:
            raise InputError(f'"continuations" is {shown(given)}: it must be a list of texts or of lists of ids')
        found = [self._ids("continuations", one, str | list) for one in given]
        if prompt + (longest := max(map(len, found))) > most:
            raise InputError(f"{prompt} tokens and a continuation of {longest} were given: at most {most} can be scored")
        return found

    def _ids(self, name: str, value: object, kind: Any) -> list[int]:
        if not isinstance(value, kind):
            raise InputError(f"{name!r} holds {shown(value)}: it must be {'a list of ids' if kind is list else 'a text'}")
        if isinstance(value, str):
            if self._tokenizer is None:
                raise InputError(f"{name!r} is a text, but the model's {self.model.config.V} ids are not GPT-2's: give ids")
            value = self._tokenizer.encode(value)
        return check_ids(self.model.config, value)

    def rows(self, rows: Iterable[Row]) -> Iterator[Answer]:
        """Yield the answer of each row, in order. It takes few rows ahead of the answers, so `rows` may be endless.

        A completion's answer has id, text (absent if the vocabulary is unknown), tokens (the new ids) and finish_reason. With
        logprobs, it has for each new token its id, logprob and top, a list of [id, logprob]. A scored row's answer has id and
        scores. For each continuation, they are logprob (the sum, in nats), greedy (whether each token is the most probable
        one), tokens and logprobs (of each token). Raises InputError for a bad row unless keep_going."""
        source, ended = iter(rows), False
        engine = self.model.engine(max_live=self.batch_size)
        pending: deque[tuple[Any, Job | Answer]] = deque()
        live: set[Job] = set()
        try:
            while pending or not ended:
                if pending and (isinstance(pending[0][1], dict) or pending[0][1].done):
                    yield self._answer(*pending.popleft())
                elif not ended and len(live) < 2 * self.batch_size and len(pending) < AHEAD:
                    if ended := (row := next(source, source)) is source:
                        continue
                    pending.append((row, begun := self._begin(row, engine)))
                    if not isinstance(begun, dict):
                        live.add(begun)
                else:
                    live -= {event.job for event in engine.step() if event.job.done}
        finally:
            engine.close()

    def _begin(self, row: Any, engine: Engine) -> Job | Answer:
        """Add a row's request to the engine, or score the row; return the job or the answer."""
        try:
            asked = self.check(row)
            if not isinstance(asked, Request):
                return {"id": row["id"], "scores": self._score(*asked)}
            derived = asked.sampler.name == "sample" and asked.sampler.seed is None
            return engine.add(asked, seed=self.seed_of(row["id"]) if derived else None)
        except PyGPTError as error:
            return self._failed(row, error)

    def _answer(self, row: Row, job: Job | Answer) -> Answer:
        if isinstance(job, dict):
            return job
        if job.error is not None:
            return self._failed(row, job.error)
        done = job.completions[0]
        text = {} if self._tokenizer is None else {"text": self._tokenizer.decode(done.tokens)}
        infos = {} if self.logprobs is None else {"logprobs": [info._asdict() for info in done.infos]}
        return {"id": row["id"], **text, "tokens": done.tokens, "finish_reason": done.finish_reason, **infos}

    def _failed(self, row: Row, error: Exception) -> Answer:
        if self.keep_going:
            return {"id": row.get("id") if hasattr(row, "items") else None, "error": str(error)}
        raise error

    def _score(self, prompt: list[int], continuations: list[list[int]]) -> list[Answer]:
        """Return the scores of continuations of a prompt. The prompt runs once; each continuation uses a copy of its cache."""
        scores, found = [], score(self.model.network, self._cache, self._held, prompt, continuations)
        for one, infos in zip(continuations, found, strict=True):
            logprobs = [info.logprob for info in infos]
            greedy = all(info.token == info.top[0][0] for info in infos)
            scores.append({"logprob": math.fsum(logprobs), "greedy": greedy, "tokens": one, "logprobs": logprobs})
        return scores

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Answer a batch of columns, lists or arrays; return columns, one value a row. A missing value is None or NaN. The
        returned columns are the keys of the answers of rows(). An answer without a key has None there."""
        if not hasattr(batch, "items"):
            raise InputError(f"the batch is {shown(batch)}: it must be columns, such as a dict of lists; rows() takes rows")
        columns = {name: [_plain(value) for value in column] for name, column in batch.items()}
        if len(sizes := {len(column) for column in columns.values()}) > 1:
            raise InputError(f"the columns have {sorted(sizes)} values: each must have one for every row, or None")
        rows = [
            {name: value for name, value in zip(columns, values, strict=True) if value is not None and value == value}
            for values in zip(*columns.values(), strict=True)
        ]
        answers = list(self.rows(rows))
        names = dict.fromkeys(name for answer in answers for name in answer)
        return {name: [answer.get(name) for answer in answers] for name in names}

    def close(self) -> None:
        """Stop the workers and unmap the file. May be called twice."""
        self.model.close()


def _plain(value: Any) -> Any:
    """Return a value of a column as Python's own types: Ray passes NumPy's numbers and arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
