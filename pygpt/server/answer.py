"""Write answers: text in whole characters without stop strings, log-probabilities, and the JSON objects of OpenAI's API.

A streamed answer and a whole one come from the same pieces. A piece has the new text of one choice, with its tokens.
"""

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..generation.logprobs import TokenInfo
from .call import Call
from .served import Served

LEAST = -9999.0  # JSON has no infinity
Note = tuple[int, TokenInfo | None, int]  # a token, its info, and its offset


@dataclass(slots=True)
class Piece:
    """New text of one choice with its tokens, or a whole choice."""

    index: int
    text: str
    tokens: list[Note]
    finish_reason: str | None


class Choice:
    """One completion of a call: takes its tokens one by one, and returns pieces.

    Text stays back while it may become a stop string, or while its last character is incomplete. text_offset counts
    characters of the choice's whole text. A token whose bytes complete no character begins where the next one does.
    """

    def __init__(self, call: Call, prompt: list[int], index: int) -> None:
        self.call, self.index = call, index
        self.count = 0  # new tokens
        self.finish_reason: str | None = None
        self._prompt = prompt
        self._held = b""  # bytes that may be the beginning of a stop string
        self._sent = 0  # characters in the pieces so far
        self._seen = 0  # characters of all tokens so far
        self._out = codecs.getincrementaldecoder("utf-8")("replace")
        self._all = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[Note] = []  # tokens, and their offsets, that no piece has yet
        self._stops = [text.encode() for text in call.stop]

    def push(
        self, token: int | None, info: TokenInfo | None, reason: str | None, prompt: list[TokenInfo] | None
    ) -> Piece | None:
        """Take the next token, and the reason if it is the last one; return a piece, or None if no text is complete.

        prompt: for the first token, the infos of all tokens of the prompt but the first; else None.
        """
        text, served = "", self.call.served
        if prompt is not None and self.call.echo:
            for given, its in zip(self._prompt, [None, *prompt] if prompt else [None] * len(self._prompt), strict=True):
                self._note(given, its)
            text = self._out.decode(served.bytes_of(self._prompt))
        self.finish_reason = reason
        if token is not None:
            self.count += 1
            self._note(token, info)
            self._held += b"" if token in self.call.stop_ids else served.bytes_of([token])
        ready, self._held = self._split(reason is not None)
        text += self._out.decode(ready, final=reason is not None)
        if not text and reason is None:
            return None
        self._sent += len(text)
        last = reason is not None  # it has all tokens; the other pieces have those that begin in the text so far
        tokens = [(t, its, min(at, self._sent)) for t, its, at in self._waiting if last or at < self._sent]
        self._waiting = self._waiting[len(tokens) :]
        return Piece(self.index, text, tokens, reason)

    def _note(self, token: int, info: TokenInfo | None) -> None:
        self._waiting.append((token, info, self._seen))
        self._seen += len(self._all.decode(self.call.served.bytes_of([token])))

    def _split(self, last: bool) -> tuple[bytes, bytes]:
        """Return the bytes that are certain to belong to the text, and those that may begin a stop string."""
        held = self._held
        if found := [at for stop in self._stops if (at := held.find(stop)) >= 0]:
            return held[: min(found)], b""
        begun = (n for stop in self._stops for n in range(min(len(stop) - 1, len(held)), 0, -1) if held.endswith(stop[:n]))
        cut = len(held) - (0 if last else max(begun, default=0))
        return held[:cut], held[cut:]


def token_text(data: bytes) -> str:
    """Return a token's text. Bytes that are not whole characters become `bytes:` and their values, as in OpenAI's API."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def logprobs_of(served: Served, tokens: list[Note]) -> dict[str, Any]:
    """Return the log-probabilities of tokens: OpenAI's fields, token_ids, bytes, and top, a list that keeps all entries."""
    rows = []
    for token, info, offset in tokens:
        data = served.bytes_of([token])
        top, logprob, named = None, None, dict[str, float]()
        if info is not None:
            top = [(other, token_text(served.bytes_of([other])), max(value, LEAST)) for other, value in info.top]
            logprob = max(info.logprob, LEAST)
            for _, text, value in [*top, (token, token_text(data), logprob)]:
                named.setdefault(text, value)
        rows.append((token_text(data), logprob, named or None, offset, token, list(data), top))
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "bytes", "top")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


class Writer:
    """Write the objects of one answer. id, created: as in OpenAI's API."""

    def __init__(self, call: Call, id: str, created: int) -> None:
        self.call = call
        kind = ("chat.completion.chunk" if call.stream else "chat.completion") if call.chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if call.chat else "cmpl-") + id,
            "object": kind,
            "created": created,
            "model": call.fields.get("model", call.served.names[0]),
            "system_fingerprint": call.served.fingerprint,
        }
        self._begun: set[int] = set()

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return the object of a piece, or of a whole choice, in `choices`."""
        call, index, first = self.call, piece.index, piece.index not in self._begun
        self._begun.add(index)
        found: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason, "logprobs": None}
        if call.chat:
            role = {"role": "assistant"} if first else {}
            return {**found, "delta" if call.stream else "message": {**role, "content": piece.text}}
        found["text"] = piece.text
        if call.logprobs is not None:
            found["logprobs"] = logprobs_of(call.served, piece.tokens)
        if call.token_ids:
            prompt = call.requests[index // call.n].tokens
            found["token_ids"] = [token for token, _, _ in piece.tokens[len(prompt) if call.echo and first else 0 :]]
            if first:
                found["prompt_token_ids"] = prompt
        return found

    def whole(self, pieces: Iterable[Piece], choices: list[Choice]) -> bytes:
        """Return the whole answer."""
        joined = [Piece(choice.index, "", [], choice.finish_reason) for choice in choices]
        for piece in pieces:
            joined[piece.index].text += piece.text
            joined[piece.index].tokens += piece.tokens
        return encoded({**self._head, "choices": [self.choice(piece) for piece in joined], "usage": self.usage(choices)})

    def chunk(self, piece: Piece | None, choices: list[Choice]) -> bytes:
        """Return one event of a stream: a piece, or the usage at the end."""
        body = {**self._head, "choices": [] if piece is None else [self.choice(piece)]}
        if piece is None or self.call.usage_in_chunks:
            body["usage"] = self.usage(choices)
        elif self.call.usage_in_stream:
            body["usage"] = None
        return event(encoded(body))

    def usage(self, choices: list[Choice]) -> dict[str, int]:
        """Return the numbers of tokens. Each prompt counts once, and each of its n completions."""
        given, new = sum(len(request.tokens) for request in self.call.requests), sum(choice.count for choice in choices)
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}


def encoded(body: Any) -> bytes:
    """Return a JSON object as bytes."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def event(data: bytes) -> bytes:
    """Return data as one server-sent event."""
    return b"data: " + data + b"\n\n"
