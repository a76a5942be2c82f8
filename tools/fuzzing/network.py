"""Targets: downloads, both ways, from a server in this process that answers with any bytes. No other host is ever asked.

An input is several files: the words, the server's answers in their order as the bytes of HTTP, and what an earlier download
may have left. In words and answers @/ stands for the server's address, and %/ for the same one by another name.
"""

import hashlib
import importlib
import os
import re
import socket
import ssl
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from pygpt import Checkpoint, download, http_client, write_checkpoint
from pygpt.formats.huggingface import write_model

from . import reference
from .commands import WORDS, FilesTarget, as_program, judge, label_of, options_of, run_main, stays, words_of
from .faults import failing
from .files import TINY, weights
from .mutate import dump
from .target import Finding, load_json, pack, same, unpack

BIN, FOLDER = "/m/a.bin", "/m/model.safetensors"
GPT2, COMMIT = "/openai-community/gpt2/resolve/main/model.safetensors", "5e" * 20
HUB_WORDS = (
    f"@{GPT2}", "@/me/my.model/resolve/refs%2Fpr%2F1/sub%20folder/model.safetensors?download=true",
    "@/a/b/resolve/main/%1b[31m.safetensors", "@/a/b/resolve/main/%2e%2e/x.safetensors", "@/a/b/resolve/%2e%2e/x.safetensors",
    "@/a/b/resolve/main/%2Fx.safetensors", "@/a/b/resolve/main//x.safetensors", "@/a/b/resolve/main/%00.safetensors",
    "@/a/--b/resolve/main/x.safetensors", "@/a/b/resolve/%0a/x.safetensors", "@/a/b/resolve/main/%ff%80.safetensors",
    "@/datasets/a/b/resolve/main/x.safetensors",
)  # fmt: skip
CACHED = ("cached.config.json", "cached.model.safetensors")
PROGRESS = 78  # characters of the line that is drawn
RETRIES = 40  # lines on stderr: one for each attempt, and the error
ANSWERS = [str(i) for i in range(10)]
HEADERS = (
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: x",
    b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Location: @/m/a.bin", b"Location: %/m/a.bin",
    b"Location: file:///etc/passwd",
    b"Location: http://[", b"Location: //", b"Location: ftp://x/", b"Location: \x1b[31m", b"Retry-After: 0",
    b"Retry-After: 1e9", b"Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", b"Retry-After: Fri, 99 Foo 0000", b'ETag: "x"',
    b'ETag: W/"x"', b"ETag: \xff", b"ETag: a\r\n b", b"Content-Range: bytes 3-9/10", b"Content-Range: bytes 0-0/0",
    b"Content-Range: bytes */5",
    b"Content-Range: bytes 100-9999/999999", b"X-Linked-Size: 7", b"X-Linked-Etag: " + b'"' + b"0" * 64 + b'"', b"x" * 70000,
    b": ", b"a\x00b: c", b"X-Repo-Commit: main", b"X-Repo-Commit: " + b"5e" * 20, b"X-Repo-Commit: ../../x",
    b"ETag: a/../../../../../x", b"ETag: a/b", b"X-Linked-Size: 99999999999999999999", b"X-Error-Code: RepoNotFound",
    b"X-Error-Code: GatedRepo", b'RateLimit: "api";r=0;t=99999999999', b"X-Error-Message: \x1b[31m",
    b'Content-Disposition: inline; filename="\xc2\x9b31m";', b"Location: /m/a.bin", b'Link: <@/x>; rel="xet-auth"',
)  # fmt: skip
DATES = (b"Fri, 31 Dec 9999 23:59:59 GMT", b"Fri, 99 Foo 0000", b"0", b"soon")
STATUS_LINES = (
    b"HTTP/1.1 200 OK", b"HTTP/1.1 206 Partial", b"HTTP/1.1 302 Found", b"HTTP/1.1 308 Moved", b"HTTP/1.1 404 Not Found",
    b"HTTP/1.1 401 \x1b]0;x\x07", b"HTTP/1.1 416 Range", b"HTTP/1.1 429 Slow", b"HTTP/1.1 503 \x9b31m",
    b"HTTP/1.1 100 Continue", b"HTTP/1.0 200", b"HTTP/9 200", b"HTTP/1.1 999 x", b"HTTP/1.1 204 None",
    b"ICY 200 OK", b"", b"HTTP/1.1 -1 x",
)  # fmt: skip


FAULTS = (
    ["lock", 1, "EAGAIN"], ["lock", 1, "remove"], ["lock", 1, "EIO"], ["room", 1, "half"], ["room", 1, "EIO"],
    ["open", 1, "EACCES"], ["open", 2, "EIO"], ["open", 2, "half"], ["open", 3, "EIO"], ["fsync", 1, "EIO"],
    ["fsync", 2, "ENOSPC"], ["replace", 1, "EROFS"], ["replace", 2, "interrupt"], ["replace", 2, "EEXIST"], ["fstat", 1, "EIO"],
    ["limit", 100, ""], ["limit", 1200, ""], ["mmap", 1, "ENOMEM"], ["makedirs", 1, "EROFS"], ["mmap", 1, "cut"],
)  # fmt: skip


class Server:
    """Sends what it was told to send, one answer a connection; then nothing."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.leaked = False  # whether the token came to the other name
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request and (piece := connection.recv(1 << 16)):
                    request += piece
                if b"host: localhost" in request.lower() and b"authorization:" in request.lower():
                    self.leaked = True
                connection.sendall(self.answers.pop(0) if self.answers else b"")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

    def close(self) -> None:
        """End it."""
        self._socket.close()


def answer(body: bytes, *headers: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """An answer as bytes."""
    lines = [status, *headers, b"Content-Length: %d" % len(body), b"Connection: close"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def head(body: bytes, *headers: bytes, length: bytes | None = None) -> bytes:
    """An answer to HEAD, as Hugging Face's."""
    size = b"%d" % len(body) if length is None else length
    tag = () if any(header.startswith(b"ETag") for header in headers) else (b'ETag: "x"',)
    lines = [b"HTTP/1.1 200 OK", b"X-Repo-Commit: " + COMMIT.encode(), *tag, *headers, b"Connection: close"]
    return b"\r\n".join(lines + ([b"Content-Length: " + size] if size else [])) + b"\r\n\r\n"


class DownloadTarget(FilesTarget):
    """`python -m pygpt.commands.download`. Where an input has a file "terminal", stderr is one."""

    name = "download"
    options = tuple(options_of(download.build_parser()))
    words: tuple[str, ...] = (
        *WORDS, "@/m/a.bin", "@/m/model.safetensors", "@", "@/x.bin?a=b#c", "http://", "https://x/..bin", "ftp://x/a.bin",
        "http://u:p@x/a.bin", "@/pytorch_model.bin", "file:///etc/passwd", "http://[::1", "@/m/%2e%2e%2f.bin", "gpt2-xl",
        "gpt2_124M", "5", "1", "two-words", "https://cert/a.bin", "https://nowhere/a.bin",
    )  # fmt: skip

    def open(self) -> None:
        """Start the server; no waiting, no other host, no setting of the user's."""
        self.server = Server()
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("HF_", "PYGPT_")):
                del os.environ[name]
        self.url = f"http://127.0.0.1:{self.server.port}"
        os.environ |= {"HF_ENDPOINT": self.url, "HF_TOKEN": "secret", "PYGPT_HOME": str(self.folder), "no_proxy": "*"}
        os.environ["PYGPT_HUB"] = "0"  # HubTarget is about the other way
        time.sleep = vars(http_client)["sleep"] = lambda _: None
        connect = socket.create_connection

        def only_here(address: Any, *arguments: Any, **options: Any) -> socket.socket:
            if address[0] == "cert":
                raise ssl.SSLCertVerificationError("this certificate is nobody's")
            if address not in (("127.0.0.1", self.server.port), ("localhost", self.server.port)):
                raise socket.gaierror(f"{address[0]} is not this fuzzer's server")
            return connect(("127.0.0.1", self.server.port), *arguments, **options)

        socket.create_connection = only_here

    def close(self) -> None:
        """Stop the server."""
        self.server.close()

    def seeds(self) -> list[bytes]:
        """Files that arrive whole, in parts, moved, late, damaged; names and addresses."""
        path = self.folder / "a.bin"
        write_checkpoint(path, TINY, weights(TINY))
        model = path.read_bytes()
        with Checkpoint(path) as checkpoint:
            write_model(str(self.folder / "hf"), checkpoint)
        config, tensors = ((self.folder / "hf" / name).read_bytes() for name in ("config.json", "model.safetensors"))
        digest, half = hashlib.sha256(model).hexdigest().encode(), len(model) // 2
        rest = b"Content-Range: bytes %d-%d/%d" % (half, len(model) - 1, len(model))
        facts = {"url": f"@{BIN}", "size": len(model), "validator": '"x"', "sha256": None}
        whole, tag = answer(model), b'ETag: "x"'
        words = ("https://cert/a.bin", "https://nowhere/a.bin", "@/pytorch_model.bin", "@/x.pt", "x:/y")
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
        known = {"a.bin.part": model[:half], "a.bin.part.json": dump(facts)}
        all_there = {"a.bin.part": model, "a.bin.part.json": dump(facts)}
        second = answer(model[half:], rest, tag, status=b"HTTP/1.1 206 Partial")
        moved = answer(b"", b"Location: @/x", status=b"HTTP/1.1 302 Found")
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(model), model)
        cases: list[tuple[list[str], list[bytes], dict[str, bytes]]] = [
            ([f"@{BIN}"], [whole], {}),
            ([f"@{BIN}", "--version", "5"], [answer(model, b"X-Linked-Etag: " + digest)], {}),
            ([f"@{BIN}", "-o", "x.bin"], [answer(model, b'ETag: "' + digest + b'"')], {}),
            ([f"@{BIN}"], [chunked + b"\r\n" + chunks], {}),
            ([f"@{BIN}"], [b"HTTP/1.0 200 OK\r\n\r\n" + model], {}),
            ([f"@{BIN}"], [second], known),
            ([f"@{BIN}"], [answer(model, tag)[: -len(model) + half], second], {}),
            ([f"@{BIN}"], [moved, whole], {}),
            ([f"@{BIN}"], [answer(b"", b"Retry-After: 3", status=b"HTTP/1.1 503 Busy"), whole], {}),
            ([f"@{BIN}"], [answer(b"", status=b"HTTP/1.1 404 None")], {}),
            ([f"@{BIN}"], [answer(b"", status=b"HTTP/1.1 416 Range"), whole], all_there),
            ([f"@{BIN}"], [answer(model, b"Content-Encoding: gzip")], {}),
            ([f"@{FOLDER}"], [answer(config), answer(tensors)], {}),
            ([f"@{FOLDER}", "--version", "1"], [answer(config)[:-9], answer(config), answer(tensors, tag)], {}),
            (["gpt2"], [answer(config), answer(tensors)], {}),
            (["gpt2_124M"], [whole], {}),
            ([f"@{BIN}"], [], {"a.bin": model}),
            ([f"@{BIN}", "--version", "5"], [], {"a.bin": model}),
            ([f"@{BIN}"], [answer(b"", b"Location: %/m/a.bin", status=b"HTTP/1.1 307 Moved"), whole], {}),
            ([f"@{BIN}"], [answer(b"", b"Location: ftp://x/a.bin", status=b"HTTP/1.1 302 Moved")], {}),
            ([f"@{BIN}"], [answer(model, b"X-Linked-Size: 7")], {}),
            ([f"@{BIN}"], [whole], {"a.bin.part": model[:half]}),
            ([f"@{BIN}"], [answer(model, tag)[: -len(model) + half]], {}),
            ([f"@{BIN}"], [chunked + b"\r\n" + chunks[:-90]], {}),
            ([f"@{BIN}"], [chunked.replace(b"200", b"206") + rest + b"\r\n\r\n" + chunks], known),
            ([f"@{BIN}"], [answer(b"", b"Retry-After: " + date, status=b"HTTP/1.1 429 Slow") for date in DATES], {}),
            *(([word], [], {}) for word in words),
            *(([f"@{BIN}", "-o", word], [whole], {}) for word in ("x/", "no/x.bin", "there.bin", "two-words")),
            (["--help"], [], {}),
            ([f"@{BIN}"], [whole], {"terminal": b""}),
            ([f"@{BIN}"], [b"HTTP/1.0 200 OK\r\n\r\n" + model], {"terminal": b""}),
            ([f"@{BIN}"], [answer(model, tag)[: -len(model) + half], answer(b"", status=b"HTTP/1.1 503 Busy"), second],
             {"terminal": b""}),
            ([f"@{BIN}", "-o", "\x1b[31mé.bin"], [whole], {"terminal": b""}),
            ([f"@{BIN}"], [second.replace(b"-%d/" % (len(model) - 1), b"-1/"), whole], known),
            ([f"@{BIN}"], [second.replace(rest, b"Content-Range: bytes 0-1/2"), whole], known),
            ([f"@{BIN}"], [answer(b"", status=b"HTTP/1.1 299 Odd")], {}),
            ([f"@{BIN}"], [answer(b"", status=b"HTTP/1.1 503 Busy"), answer(b"", status=b"HTTP/1.1 403 No")], {}),
            *(([f"@{BIN}"], [whole], {"faults": dump([fault])}) for fault in FAULTS),
            *(([f"@{BIN}"], [second], {**known, "faults": dump([fault])}) for fault in FAULTS),
            *(([f"@{FOLDER}", "--version", "5"], [answer(config), answer(tensors)], {"faults": dump([fault])})
              for fault in FAULTS),
        ]  # fmt: skip
        return [
            pack({"argv": dump(argv), **dict(zip(ANSWERS, answers, strict=False)), **files}) for argv, answers, files in cases
        ]

    def altered(self, random: Random, name: str, content: bytes, like: bytes) -> bytes:
        """An answer with another status line or header; else any other bytes."""
        if name not in ANSWERS or random.random() < 0.3:
            return super().altered(random, name, content, like)
        head, gap, body = content.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        at = random.randrange(len(lines))
        kind = random.randrange(4)
        if kind == 0:
            lines[0] = random.choice(STATUS_LINES)
        elif kind == 1:
            lines.insert(at + 1, random.choice(HEADERS))
        elif kind == 2 and at:
            lines[at] = random.choice(HEADERS)
        else:
            del lines[at]
        return b"\r\n".join(lines) + gap + body

    def placed(self, content: bytes) -> bytes:
        """An input's bytes with the server's address in them, and the same by another name, to which no token may go."""
        return content.replace(b"@/", self.url.encode() + b"/").replace(b"%/", b"http://localhost:%d/" % self.server.port)

    def run(self, data: bytes) -> str:
        """Fetch; what has the model's name afterwards is whole, and nothing else is there than what was kept of it."""
        files = unpack(data)
        argv = [word.replace("@", self.url, 1) if word.startswith("@") else word for word in words_of(files.pop("argv", b""))]
        argv = [word for word in argv if stays(word)]
        faults, terminal = load_json(files.pop("faults", b"")), files.pop("terminal", None) is not None
        self.server.answers = [self.placed(files.pop(name)) for name in ANSWERS if name in files]
        os.chdir(self.folder)
        before = {name.replace("..", "_"): self.placed(content) for name, content in files.items()} | {"there.bin": b"no model"}
        for name, content in before.items():
            (self.folder / name).write_bytes(content)
        os.environ["HF_TOKEN"] = "two words" if "two-words" in argv else "secret"
        with failing(faults, self.folder) as changed:
            outcome = run_main(as_program("pygpt.commands.download"), argv, terminal=terminal)
        outcome = outcome._replace(err=self.undrawn(outcome.err)) if terminal else outcome
        judge(outcome, argv, lines=RETRIES)
        if "secret" in outcome.err or self.server.leaked:
            raise Finding(f"the token is shown: {outcome.err[-1000:]!r}")
        after = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        kept = (".part", ".part.json")
        made = [name for name in after if after[name] != before.get(name) and not name.endswith(kept)]
        if changed:
            return label_of(outcome)  # another process was at what is written: it is not ours to judge
        if (outcome.status != 0 and not faults) or outcome.out:  # a fault may come when it is there
            same("files made", made, [])
        if len(made) > 1 or any(reference.checkpoint(after[name]) is None for name in made):
            raise Finding(f"{argv!r:.300} made {made}, which is not one sound checkpoint")
        if outcome.status == 0 and any(f"{name}.part" in after for name in made):
            raise Finding(f"{argv!r:.300} has left a part of {made}")
        return label_of(outcome)

    def undrawn(self, err: str) -> str:
        """Stderr without the lines that are drawn anew on a terminal, each over the one before."""
        for line in re.findall(r"\r([^\r\n]*)", err):
            if len(line) != PROGRESS or not line.isprintable():
                raise Finding(f"drawn on the terminal: {line!r:.300}")
        return re.sub(r"(\r[^\r\n]*)+\n", "", err)


class HubTarget(DownloadTarget):
    """The same by huggingface_hub. An input's "hub.json" has PYGPT_HUB, whether it is "offline", its "version", and how
    files CACHED lie in its cache: of which "repository", the model as a link to which "blob"."""

    name = "hub"
    words = (*DownloadTarget.words, *HUB_WORDS)

    def open(self) -> None:
        """Settings of its own; and no Xet, which connects in another way."""
        super().open()
        os.environ |= {"HF_HOME": str(self.folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        self.package = importlib.import_module("huggingface_hub")
        self.constants = importlib.import_module("huggingface_hub.constants")

    def seeds(self) -> list[bytes]:
        """Files that arrive, are cached, differ from what HEAD said of them, or lie in strange places."""
        path = self.folder / "a.bin"
        write_checkpoint(path, TINY, weights(TINY))
        with Checkpoint(path) as checkpoint:
            write_model(str(self.folder / "hf"), checkpoint)
        config, tensors = ((self.folder / "hf" / name).read_bytes() for name in ("config.json", "model.safetensors"))
        digest = hashlib.sha256(tensors).hexdigest()
        settled = [head(config), head(config), answer(config)]
        sound = [*settled, head(tensors), head(tensors), answer(tensors)]
        busy, half = answer(b"", b"Retry-After: 3", status=b"HTTP/1.1 503 Busy"), answer(tensors)[: -len(tensors) // 2]
        cached = dict(zip(CACHED, (config, tensors), strict=True))
        facts = dump({"url": f"@{GPT2}", "size": len(tensors), "validator": None, "sha256": None})
        part, whole = ({"gpt2.bin.part": data, "gpt2.bin.part.json": facts} for data in (tensors[:9], tensors))
        shown = answer(tensors, b'Content-Disposition: inline; filename="\xc2\x9b31m";')
        up = [head(tensors, b'ETag: "a/../../../../../x"')] * 2
        cases: list[tuple[list[str], list[bytes], dict[str, bytes], dict[str, Any]]] = [
            (["gpt2"], sound, {}, {}),
            (["gpt2"], sound, {"terminal": b""}, {}),
            (["gpt2"], [*sound[:5], half, answer(tensors)], {"terminal": b""}, {}),
            (["gpt2"], [*settled, *[head(tensors, b'X-Linked-Etag: "%b"' % digest.encode())] * 2, answer(tensors)], {}, {}),
            (["gpt2"], [*settled, *[head(tensors, b'ETag: "%b"' % (b"0" * 64))] * 2, answer(tensors)], {}, {}),
            (["gpt2"], [*settled, head(tensors), head(tensors[:-1]), answer(tensors[:-1])], {}, {}),
            (["gpt2"], [*settled, head(tensors), head(tensors, length=b"9" * 17), answer(tensors)], {}, {}),
            (["gpt2"], [*settled, *up, half], {"x.incomplete": b"kept"}, {}),
            (["gpt2"], [busy, *sound], {}, {}),
            (["gpt2"], [busy.replace(b": 3", b": soon"), *sound], {}, {}),
            (["gpt2"], [answer(b"", status=b"HTTP/1.1 404 None")], {}, {}),
            (["gpt2"], [answer(b"", b"Location: %/x", status=b"HTTP/1.1 302 Found"), *sound], {}, {}),
            (["gpt2"], [head(config, length=b"")], {}, {}),
            (["gpt2"], [head(config, length=b"99999999999")], {}, {}),
            (["gpt2"], [head(config, length=b"-1")] * 3, {}, {}),
            (["gpt2"], [head(config).replace(b"X-Repo-Commit", b"X-None")] * 9, {}, {}),
            (["gpt2"], [], {}, {"offline": True}),
            (["gpt2"], [], {}, {"PYGPT_HUB": "2"}),
            (["gpt2"], [answer(config), answer(tensors)], {}, {"PYGPT_HUB": "0"}),
            (["gpt2"], [answer(config), answer(tensors)], {}, {"version": "0.36.2"}),
            (["gpt2"], [answer(config), answer(tensors)], part, {}),
            (["gpt2"], sound[:3], whole, {}),
            (["gpt2_124M"], [answer(tensors)], {}, {}),
            *((["gpt2"], sound, cached, {"repository": name, "blob": blob})
              for name in ("gpt2", "openai-community--gpt2") for blob in (digest, "0" * 64, "")),
            (["gpt2"], [*sound[:5], shown], {"terminal": b""}, {}),
            *(([word], sound, files, {}) for word in HUB_WORDS for files in ({"terminal": b""}, {"x.safetensors": b"kept"})),
            *((["gpt2"], sound, {"faults": dump([fault])}, {}) for fault in FAULTS),
            *((["gpt2"], sound, {**cached, "faults": dump([fault])}, {}) for fault in FAULTS),
            *((["gpt2"], sound, {"faults": dump([["import", number, "ENOENT"]])}, {}) for number in range(1, 9)),
        ]  # fmt: skip
        return [
            pack(
                {
                    "argv": dump(argv),
                    "hub.json": dump({"PYGPT_HUB": "1"} | hub),
                    **dict(zip(ANSWERS, answers, strict=False)),
                    **files,
                }
            )
            for argv, answers, files, hub in cases
        ]

    def run(self, data: bytes) -> str:
        """Fetch; huggingface_hub leaves nothing in its cache, and nothing elsewhere."""
        files = unpack(data)
        found = load_json(files.pop("hub.json", b""))
        hub = found if isinstance(found, dict) else {}
        wanted, version = hub.get("PYGPT_HUB"), hub.get("version", self.package.__version__)
        self.put_into_cache(hub, {name: files.pop(name) for name in CACHED if name in files})
        before = self.everything()
        with ExitStack() as stack:
            stack.callback(self.package.close_session)
            stack.enter_context(patch.dict(os.environ, {"PYGPT_HUB": wanted if wanted in ("0", "2", "") else "1"}))
            stack.enter_context(patch.object(self.package, "__version__", str(version)))
            stack.enter_context(patch.object(self.constants, "HF_HUB_OFFLINE", hub.get("offline") is True))
            label = super().run(pack(files))
        if strange := [path for path in self.everything() - before if path.is_dir() or path.parent != self.folder]:
            raise Finding(f"left where nothing belongs: {strange}")
        return label

    def everything(self) -> set[Path]:
        """Every file and folder here, and beside it."""
        return {*self.folder.parent.iterdir(), *self.folder.rglob("*")}

    def put_into_cache(self, hub: dict[str, Any], cached: dict[str, bytes]) -> None:
        """Lay files into huggingface_hub's cache as it does, or as a system without links has it."""
        repository = "models--gpt2" if hub.get("repository") == "gpt2" else "models--openai-community--gpt2"
        folder, blob = self.folder / "hf" / "hub" / repository, str(hub.get("blob"))
        for place in folder / "refs", folder / "blobs", folder / "snapshots" / COMMIT:
            place.mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        for name, content in cached.items():
            path = folder / "snapshots" / COMMIT / name.removeprefix("cached.")
            if name == CACHED[1] and re.fullmatch("[0-9a-f]{64}", blob):
                (folder / "blobs" / blob).write_bytes(content)
                path.symlink_to(f"../../blobs/{blob}")
            else:
                path.write_bytes(content)

    def undrawn(self, err: str) -> str:
        """Stderr without its bars, and without what clears them."""
        kept = []
        for piece in re.split(r"(?<=\n)|\r", err.replace("\x1b[A", "")):
            if not piece.strip("\n").isprintable():
                raise Finding(f"drawn on the terminal: {piece!r:.300}")
            if not re.fullmatch(r" *\n?|.{,60}: +\d+%\|.*\n?|.{,60}: .*B \[.*\n?|.* [kMG]B/s.* *\n?", piece):
                kept.append(piece)
        return "".join(kept)


NETWORK = (DownloadTarget, HubTarget)
