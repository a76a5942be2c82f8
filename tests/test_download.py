"""Downloads from a server on this machine that also misbehaves: a whole and right file, or one clear line and nothing new."""

import fcntl
import hashlib
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_huggingface as hf
import pytest
import web_site as web
from limits import full_disk
from make_huggingface import SHAPE
from web_site import Site

from pygpt.commands import download
from pygpt.commands.convert import parse_version
from pygpt.commands.download import EXAMPLES, SHA256, SOURCES, main
from pygpt.errors import CheckpointError, PyGPTError
from pygpt.hub import http_client
from pygpt.hub.find import MODELS, cache_folder, cached_model, find_model
from pygpt.hub.http_client import KEEP_FREE, MOST_TRIES, TRIES, Ask, Client, Redirects, clock
from pygpt.hub.part import Part
from pygpt.hub.web import RETRY_AFTER_LIMIT, retry_after

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = hf.weights(**SHAPE)
BIN = {version: hf.checkpoint_bytes(WEIGHTS, version, **SHAPE) for version in (1, 3, 5)}
MODEL, SIZE = BIN[3], len(BIN[3])
SHA = hashlib.sha256(MODEL).hexdigest()
PATH = "/models/a.bin"


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, the current one; a cache of its own; nothing of the user's settings; small reads."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "PYGPT_")):
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYGPT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYGPT_HUB", "0")  # test_download_hub.py is about the other way
    monkeypatch.setattr(http_client, "READ_BYTES", 512)


@pytest.fixture
def site() -> Iterator[Site]:
    """A server with one model."""
    with Site() as found:
        found.files[PATH] = MODEL
        yield found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the downloads would have waited."""
    found: list[float] = []
    monkeypatch.setattr(http_client, "sleep", found.append)
    return found


def fetch(site: Site, *options: str) -> int:
    return main([site.url + PATH, *options])


def fetched(expected: bytes = MODEL) -> bool:
    """Whether the file is there, and nothing else."""
    return os.listdir() == ["a.bin"] and Path("a.bin").read_bytes() == expected


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr: the one that is an error."""
    output = capsys.readouterr()
    assert output.out == ""
    *before, last = output.err.splitlines()
    assert all(re.match(r"pygpt: http\S+: .*: trying again in \d+ s$", line) for line in before)
    assert last.startswith("pygpt: error: ")
    return last


# ---------------------------------------------------------------------------------------------------------------------
# It arrives


def test_a_file(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(site) == 0
    assert fetched()
    assert capsys.readouterr() == ("", f"pygpt: {site.url}{PATH} -> a.bin (version 3, float32, {SIZE} bytes)\n")
    [headers] = site.asked(PATH)
    assert headers["User-Agent"].startswith("pygpt/")
    assert headers["Accept-Encoding"] == "identity"
    assert "Authorization" not in headers
    assert waits == []


@pytest.mark.parametrize("answer", [web.chunked, web.dribble, web.whole(Content_Length=None), web.whole(ETag=None)])
def test_however_it_is_sent(site: Site, waits: list[float], answer: web.Answer) -> None:
    site.plans[PATH] = [answer]
    assert fetch(site, "-o", "a.bin") == 0
    assert fetched()
    assert waits == []


@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize("found", [1, 3, 5])
def test_a_version_may_be_asked_for(site: Site, found: int, version: int) -> None:
    site.files[PATH] = BIN[found]
    assert fetch(site, "--version", str(version)) == 0
    if found == 5:
        expected = hf.checkpoint_bytes(hf.rounded(WEIGHTS, "BF16"), version, **SHAPE)
        assert fetched(expected)
    else:
        assert fetched(BIN[version])


def test_a_query_and_a_fragment(site: Site) -> None:
    assert main([f"{site.url}{PATH}?download=true#top"]) == 0
    assert fetched()


def test_another_name(site: Site) -> None:
    Path("sub").mkdir()
    assert fetch(site, "-o", "sub/b\n.bin") == 0
    assert os.listdir("sub") == ["b\n.bin"]
    assert os.listdir() == ["sub"]


# ---------------------------------------------------------------------------------------------------------------------
# The connection breaks


def test_twenty_breaks(site: Site, waits: list[float]) -> None:
    offsets = sorted(random.Random(7).sample(range(1, SIZE), 20))
    site.plans[PATH] = [web.dropped(at) for at in offsets]
    assert fetch(site) == 0
    assert fetched()
    asked = site.asked(PATH)
    assert "Range" not in asked[0]
    assert [headers["Range"] for headers in asked[1:]] == [f"bytes={at}-" for at in offsets]
    assert {headers["If-Range"] for headers in asked[1:]} == {site.etag}
    assert waits == [1.0] * 20


def test_a_break_before_the_first_byte(site: Site, waits: list[float]) -> None:
    site.plans[PATH] = [web.dropped(0), web.nonsense, web.dropped(0)]
    assert fetch(site) == 0
    assert fetched()
    assert waits == [1.0, 2.0, 4.0]


def test_a_server_that_falls_silent(site: Site, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "TIMEOUT", 0.2)
    site.plans[PATH] = [web.silence]
    assert fetch(site) == 0
    assert fetched()
    assert waits[0] == 1.0
    assert site.asked(PATH)[1]["Range"] == f"bytes={SIZE // 2}-"


def test_chunks_that_break_off(site: Site, waits: list[float]) -> None:
    site.plans[PATH] = [web.cut_chunk]
    assert fetch(site) == 0
    assert fetched()
    assert waits == [1.0]
    assert site.asked(PATH)[1]["Range"] == "bytes=1500-"


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_it_begins_anew(site: Site, waits: list[float], etag: str | None) -> None:
    site.etag = etag
    site.plans[PATH] = [web.dropped(SIZE // 2)]
    assert fetch(site) == 0
    assert fetched()
    assert "Range" not in site.asked(PATH)[1]


def test_a_server_without_ranges(site: Site, waits: list[float]) -> None:
    site.plans[PATH] = [web.dropped(SIZE // 2), web.whole()]
    assert fetch(site) == 0
    assert fetched()


def test_the_file_changes_in_between(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.plans[PATH] = [web.dropped(SIZE // 2)]
    other = hf.checkpoint_bytes(hf.weights(2, **SHAPE), 3, **SHAPE)

    def change(wait: float) -> None:
        site.files[PATH], site.etag = other, '"two"'

    monkeypatch.setattr(http_client, "sleep", change)
    assert fetch(site) == 0
    assert fetched(other)
    assert site.asked(PATH)[1]["If-Range"] == '"one"'


@pytest.mark.parametrize(
    "answer",
    [
        web.partial(f"bytes 0-{SIZE - 1}/{SIZE}", MODEL),
        web.partial(f"bytes 1000-{SIZE - 1}/{SIZE + 1}", MODEL[1000:]),
        web.partial(f"bytes 1000-{SIZE - 1}/{SIZE}", MODEL[1000:], ETag='"two"'),
        web.partial(None, MODEL[1000:]),
        web.partial("bytes x", MODEL[1000:]),
        web.status(416),
    ],
)
def test_a_continuation_of_something_else_is_not_taken(site: Site, waits: list[float], answer: web.Answer) -> None:
    site.plans[PATH] = [web.dropped(1000), answer]
    assert fetch(site) == 0
    assert fetched()
    assert "Range" not in site.asked(PATH)[2]


def test_a_continuation_of_unknown_length(site: Site, waits: list[float]) -> None:
    site.plans[PATH] = [web.dropped(1000), web.partial(f"bytes 1000-{SIZE - 1}/*", MODEL[1000:])]
    assert fetch(site) == 0
    assert fetched()
    assert len(site.asked(PATH)) == 2


def test_it_gives_up(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[PATH] = [web.dropped(1000)] * (TRIES + 3)
    assert fetch(site) == 1
    assert re.search(f"broke off after 1000 of {SIZE} bytes: given up after {TRIES} tries", error_of(capsys))
    assert len(site.asked(PATH)) == TRIES
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert sorted(os.listdir()) == ["a.bin.part", "a.bin.part.json"]
    site.plans.clear()
    assert fetch(site) == 0  # and goes on, in another run
    assert fetched()
    assert site.asked(PATH)[-1]["Range"] == "bytes=1000-"


def test_a_byte_at_a_time_ends_too(
    site: Site, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MOST_TRIES == 1000
    monkeypatch.setattr(http_client, "MOST_TRIES", 30)
    site.plans[PATH] = [web.dropped(at) for at in range(1, 100)]
    assert fetch(site) == 1
    assert re.search("broke off after 30 of .* given up after 30 tries", error_of(capsys))
    assert len(waits) == 29


def test_a_length_that_is_too_long(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[PATH] = [web.whole(Content_Length=SIZE + 5)] * TRIES
    assert fetch(site) == 1
    assert f"broke off after {SIZE} of {SIZE + 5} bytes: given up" in error_of(capsys)
    assert "a.bin" not in os.listdir()
    assert fetch(site) == 0  # there is nothing more to be had: it begins anew
    assert "the server has fewer bytes than have arrived" in capsys.readouterr().err
    assert fetched()


def test_a_length_that_is_too_short(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[PATH] = [web.whole(Content_Length=SIZE - 5)]
    assert fetch(site) == 2
    assert f"truncated: {SIZE - 5} bytes, expected {SIZE}" in error_of(capsys)
    assert os.listdir() == []


def test_ctrl_c_and_on_again(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = Part.write

    def write(part: Part, data: bytes) -> None:
        real(part, data)
        if part.have > 2000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Part, "write", write)
        assert fetch(site) == 130
    assert capsys.readouterr() == ("", "")
    have = os.path.getsize("a.bin.part")
    assert 2000 < have < SIZE
    assert fetch(site) == 0
    assert fetched()
    assert site.asked(PATH)[1]["Range"] == f"bytes={have}-"


@pytest.mark.parametrize(
    ("note", "resumed"),
    [
        ({}, True),
        ({"size": None}, True),
        ({"url": "http://elsewhere/a.bin"}, False),
        ({"size": 999}, False),
        ({"size": "20000"}, False),
        ({"validator": 5}, False),
        ({"validator": None}, False),
        ({"sha256": []}, False),
        (b"", False),
        (b"[]", False),
        (b"5", False),
        (b"[" * 60_000, False),
        (b'{"url": 1}', False),
        (None, False),
    ],
)
def test_notes_of_an_earlier_run(site: Site, waits: list[float], note: dict[str, Any] | bytes | None, resumed: bool) -> None:
    """What they do not vouch for is fetched again: the bytes here are wrong, so that taking them would show."""
    Path("a.bin.part").write_bytes(MODEL[:1000] if resumed else b"x" * 1000)
    if isinstance(note, dict):
        facts = {"url": site.url + PATH, "size": SIZE, "validator": site.etag, "sha256": None} | note
        Path("a.bin.part.json").write_text(json.dumps(facts))
    elif note is not None:
        Path("a.bin.part.json").write_bytes(note)
    assert fetch(site) == 0
    assert fetched()
    assert ("Range" in site.asked(PATH)[0]) == resumed


def test_a_whole_part_is_not_fetched_again(site: Site) -> None:
    Path("a.bin.part").write_bytes(MODEL)
    facts = {"url": site.url + PATH, "size": SIZE, "validator": site.etag, "sha256": SHA}
    Path("a.bin.part.json").write_text(json.dumps(facts))
    assert fetch(site) == 0
    assert fetched()
    assert site.requests == []


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], seed: int) -> None:
    """A right file or an error, and never half of one; and once the server behaves, a right file."""
    rng = random.Random(seed)
    site.extra = {"X-Linked-Etag": SHA} if seed % 4 else {}
    cut = [web.dropped(rng.randrange(SIZE)) for _ in range(4)]
    odd = [
        web.nonsense,
        web.chunked,
        web.cut_chunk,
        web.status(416),
        web.whole(ETag='"two"'),
        web.whole(Content_Length=SIZE + 9),
    ]
    slow = [web.status(503), web.status(429, Retry_After="1"), web.moved(PATH), web.partial("bytes 5-9/10", b"12345")]
    bad = [web.status(404), web.whole(MODEL[::-1])] if seed % 4 else [web.status(404)]
    for _ in range(3):
        site.plans[PATH] = [rng.choice(rng.choice([cut, cut, odd, slow, bad])) for _ in range(8)]
        status = fetch(site)
        assert fetched() if status == 0 else (status == 1 and "a.bin" not in os.listdir())
        if status == 0:
            return
    site.plans.clear()
    assert fetch(site) == 0
    assert fetched()


# ---------------------------------------------------------------------------------------------------------------------
# The server refuses, or asks for patience


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (401, "set HF_TOKEN"),
        (403, "ask for access"),
        (404, "no such file"),
        (410, "Gone"),
        (400, "400"),
        (501, "501"),
        (304, "304"),
    ],
)
def test_a_refusal(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], code: int, named: str) -> None:
    site.plans[PATH] = [web.status(code)]
    assert fetch(site) == 1
    line = error_of(capsys)
    assert f"{site.url}{PATH}: the server answers {code}" in line
    assert named in line
    assert len(site.requests) == 1
    assert os.listdir() == []


def test_an_answer_without_content(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[PATH] = [web.status(204)]
    assert fetch(site) == 1
    assert "the server answers 204 (No Content), expected 200 or 206" in error_of(capsys)
    assert os.listdir() == []


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_patience(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], code: int) -> None:
    site.plans[PATH] = [
        web.status(code, Retry_After="7"),
        web.status(code),
        web.status(code, Retry_After="soon"),
        web.status(code, Retry_After="99999"),
    ]
    assert fetch(site) == 0
    assert fetched()
    assert waits == [7.0, 2.0, 4.0, RETRY_AFTER_LIMIT]
    assert f"the server answers {code}" in capsys.readouterr().err


def test_patience_ends(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[PATH] = [web.status(503)] * 100
    assert fetch(site) == 1
    assert f"503 (Service Unavailable): given up after {TRIES} tries" in error_of(capsys)
    assert len(waits) == TRIES - 1
    assert os.listdir() == []


def test_patience_in_between(site: Site, waits: list[float]) -> None:
    site.plans[PATH] = [web.dropped(1000), web.status(429, Retry_After="3"), web.dropped(2000), web.status(503)]
    assert fetch(site) == 0
    assert fetched()
    assert waits == [1.0, 3.0, 1.0, 2.0]


def test_how_long_a_server_may_ask_to_wait() -> None:
    assert retry_after(None) is None
    assert retry_after("") is None
    assert retry_after("-5") is None
    assert retry_after("1e3") is None
    assert retry_after(" 5 ") == 5.0
    assert retry_after("0") == 0.0
    assert retry_after("9" * 18) == RETRY_AFTER_LIMIT
    assert retry_after("9" * 5000) is None
    assert retry_after(formatdate(time.time() + 3600, usegmt=True)) == RETRY_AFTER_LIMIT
    assert retry_after(formatdate(time.time() - 3600, usegmt=True)) == 0.0
    assert retry_after("Mon, 99 Foo 2026 00:00:00 GMT") is None


def test_nobody_there(waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Site() as gone:
        pass
    assert fetch(gone) == 1
    assert f"{gone.url}{PATH}: cannot connect: Connection refused" in error_of(capsys)
    assert main(["http://host.invalid/a.bin"]) == 1
    assert "http://host.invalid/a.bin: cannot connect: " in error_of(capsys)
    assert waits == []
    assert os.listdir() == []


def test_it_goes_away_in_between(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Once it has answered, it may come back: this one does not."""
    monkeypatch.setattr(http_client, "sleep", lambda wait: site.close())
    site.plans[PATH] = [web.dropped(1000)]
    assert fetch(site) == 1
    assert "Connection refused: given up after 6 tries; what has arrived is kept" in error_of(capsys)
    assert os.path.getsize("a.bin.part") == 1000


# ---------------------------------------------------------------------------------------------------------------------
# The wrong bytes


@pytest.mark.parametrize("tag", [SHA, f'"{SHA}"', f'W/"{SHA}"'])
@pytest.mark.parametrize("there", [True, False])
def test_the_digest_that_a_server_names(
    site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], tag: str, there: bool
) -> None:
    if there:
        site.extra = {"X-Linked-Etag": tag, "X-Linked-Size": SIZE}
    else:
        site.plans["/first/a.bin"] = [web.moved(site.url + PATH, X_Linked_Etag=tag, X_Linked_Size=SIZE)] * 2
    url = site.url + (PATH if there else "/first/a.bin")
    wrong = bytearray(MODEL)
    wrong[3000] ^= 1
    site.files[PATH] = bytes(wrong)
    assert main([url]) == 1
    assert f"wrong bytes: sha256 {hashlib.sha256(wrong).hexdigest()}, expected {SHA}" in error_of(capsys)
    assert os.listdir() == []
    site.files[PATH] = MODEL
    assert main([url]) == 0
    assert fetched()


def test_the_tag_of_any_server_is_no_digest(site: Site) -> None:
    site.etag = '"' + "0" * 64 + '"'
    assert fetch(site) == 0
    assert fetched()


def test_the_tag_of_the_hub_is_one(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.etag = '"' + "0" * 64 + '"'
    assert fetch(site) == 1
    assert f"wrong bytes: sha256 {SHA}, expected {'0' * 64}" in error_of(capsys)
    assert os.listdir() == []
    site.etag = f'"{SHA}"'
    assert fetch(site) == 0


def test_the_digest_of_a_known_file(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    path = SOURCES["gpt2_124M"]
    assert {path: "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162"}
    site.files[f"/{path}"] = MODEL
    assert main(["gpt2_124M"]) == 1
    assert f"wrong bytes: sha256 {SHA}, expected {SHA256[path]}" in error_of(capsys)
    assert os.listdir(cache_folder()) == []
    monkeypatch.setitem(SHA256, path, SHA)
    assert main(["gpt2_124M"]) == 0
    assert Path(cached_model("gpt2_124M")).read_bytes() == MODEL


def test_a_digest_survives_a_break(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.extra = {"X-Linked-Etag": SHA}
    site.plans[PATH] = [web.dropped(1000)]
    site.files[PATH] = MODEL[:2000] + b"?" + MODEL[2001:]
    assert fetch(site) == 1
    assert "wrong bytes" in error_of(capsys)
    assert os.listdir() == []


def test_lengths_that_contradict_each_other(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.extra = {"X-Linked-Size": SIZE + 1}
    assert fetch(site) == 1
    assert f"wrong length: {SIZE} bytes are announced for a file of {SIZE + 1}" in error_of(capsys)
    assert os.listdir() == []


def test_more_than_was_announced(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.extra = {"X-Linked-Size": SIZE - 1}
    site.plans[PATH] = [web.chunked]
    assert fetch(site) == 1
    assert f"wrong length: more bytes arrive than the {SIZE - 1}" in error_of(capsys)
    assert os.listdir() == []


def test_something_else_than_a_model(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.files[PATH] = b"<html>" + b" please log in " * 100
    assert fetch(site) == 2
    line = error_of(capsys)
    assert f"{site.url}{PATH}: what came is no model that is read, and deleted: " in line
    assert "not an llm.c checkpoint" in line
    assert os.listdir() == []


def test_an_encoding_that_nobody_asked_for(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.extra = {"Content-Encoding": "gzip"}
    assert fetch(site) == 1
    assert "arrives encoded (gzip)" in error_of(capsys)
    assert os.listdir() == []


# ---------------------------------------------------------------------------------------------------------------------
# Redirects, tokens, proxies


def test_a_redirect_without_end(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[PATH] = [web.moved(site.url + PATH)] * 100
    assert fetch(site) == 1
    assert "redirected without end" in error_of(capsys)
    assert len(site.requests) < 20
    assert os.listdir() == []


def test_what_a_redirect_carries_is_not_read(site: Site, waits: list[float]) -> None:
    """However much it is: the connection would break off here if it were."""
    site.plans[PATH] = [web.moved(site.url + PATH, Content_Length=1 << 40)]
    assert fetch(site) == 0
    assert fetched()
    assert (len(site.requests), waits) == (2, [])


def test_a_server_does_not_command_the_terminal(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def hostile(handler: web.Handler, data: bytes) -> None:
        handler.wfile.write(b"HTTP/1.1 404 \x1b]0;title\x07\x9b31m\r\nContent-Length: 0\r\n\r\n")

    def busy(handler: web.Handler, data: bytes) -> None:
        handler.wfile.write(b"HTTP/1.1 503 \x1b[2J" + b"x" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n")

    site.plans[PATH] = [busy, hostile]
    assert fetch(site) == 1
    error = capsys.readouterr().err
    assert error.replace("\n", "").isprintable()
    assert "503 (\\x1b[2Jxxx" in error
    assert max(map(len, error.splitlines())) < 6000


def test_redirects_that_wander_without_end(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(100):
        site.plans[f"/{number}.bin"] = [web.moved(f"/{number + 1}.bin")]
    assert main([f"{site.url}/0.bin"]) == 1
    assert "redirected without end" in error_of(capsys)
    assert len(site.requests) < 20


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.bin", "data:,x", "gopher://x/", "//[/", "http://"])
def test_redirects_that_lead_astray(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], target: str) -> None:
    site.plans[PATH] = [web.moved(target)] * 20
    assert fetch(site) == 1
    assert f"{site.url}{PATH}" in error_of(capsys)
    assert os.listdir() == []


def test_never_from_https_to_http() -> None:
    client = Client("https://huggingface.co")
    redirects = Redirects(client)
    ask = Ask("https://huggingface.co/a.bin", {}, [])
    with pytest.raises(PyGPTError, match=r"leads to http://huggingface\.co/a\.bin: it must be https"):
        redirects.redirect_request(ask, io.BytesIO(), 302, "", Message(), "http://huggingface.co/a.bin")
    assert redirects.redirect_request(ask, io.BytesIO(), 302, "", Message(), "https://cdn.example/a.bin") is not None


def token_of(headers: dict[str, str]) -> str | None:
    return headers.get("Authorization")


def test_the_token_stays_at_home(site: Site, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_TOKEN", "  hf_secret\n")
    with Site() as cdn:
        cdn.files["/blob"] = MODEL
        cdn.plans["/blob"] = [web.dropped(1000)]
        cdn.plans["/away.bin"] = [web.moved(f"{site.url}/home.bin")] * 2
        site.plans[PATH] = [web.moved("/renamed.bin")] * 2
        site.plans["/renamed.bin"] = [web.moved(f"{cdn.url}/away.bin")] * 2
        site.plans["/home.bin"] = [web.moved(f"{cdn.url}/blob")] * 2
        assert fetch(site) == 0
        assert fetched()
        assert len(cdn.requests) == 4
        assert all(token_of(headers) is None for _, headers in cdn.requests)
        assert all(token_of(headers) == "Bearer hf_secret" for _, headers in site.requests)
        assert len(site.requests) == 6
        assert cdn.asked("/blob")[1]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("endpoint", ["", "http://localhost:{port}", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
def test_the_token_is_not_for_another_host(site: Site, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Nor for another port or scheme. An empty HF_ENDPOINT counts as unset."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint.format(port=site.server_port))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(site) == 0
    assert token_of(site.asked(PATH)[0]) is None


@pytest.mark.parametrize("token", ["a b", "a\nb", "ä", "a\x7f"])
def test_a_token_that_is_none(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert fetch(site) == 2
    line = error_of(capsys)
    assert "HF_TOKEN" in line
    assert repr(token)[1:-1] not in line
    assert site.requests == []
    assert os.listdir() == []


def test_a_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    assert main([f"http://models.invalid{PATH}"]) == 0
    assert fetched()
    assert site.asked(PATH)[0]["Host"] == "models.invalid"


def test_the_proxys_password_stays_with_the_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url.replace("//", "//me:secret@"))
    monkeypatch.setenv("no_proxy", "localhost")
    with Site() as other:
        other.files[PATH] = MODEL
        site.plans[PATH] = [web.moved("http://models.invalid/again.bin")]
        site.plans["/again.bin"] = [web.moved(f"http://localhost:{other.server_port}{PATH}")]
        assert main([f"http://models.invalid{PATH}"]) == 0
        assert [headers["Proxy-Authorization"] for _, headers in site.requests] == ["Basic bWU6c2VjcmV0"] * 2
        assert "Proxy-Authorization" not in other.asked(PATH)[0]
    assert fetched()


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's models, and names


def hub(site: Site, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str = "F32") -> str:
    """Let the site serve a model of this name; return the path of its tensors."""
    path = f"/openai-community/{name}/resolve/main/model.safetensors"
    tensors = hf.named(WEIGHTS, dtype)
    data = b"".join(data for _, _, data in tensors.values())
    site.files[path] = hf.file_of(json.dumps(hf.header_of(tensors)).encode(), data)
    site.files[path.replace("model.safetensors", "config.json")] = json.dumps(hf.settings(**SHAPE)).encode()
    monkeypatch.setenv("HF_ENDPOINT", f"{site.url}/")
    return path


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_model_by_name(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waits: list[float], name: str
) -> None:
    path = hub(site, monkeypatch, name)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    site.plans[path] = [web.dropped(5000)]
    site.plans[path.replace("model.safetensors", "config.json")] = [web.status(503), web.dropped(20)]
    with pytest.raises(CheckpointError, match=f"^{name}: not downloaded yet: run `pygpt download {name}` first$"):
        find_model(name)
    assert main([name]) == 0
    target = cached_model(name)
    assert target == os.path.join(os.environ["PYGPT_HOME"], f"{name}.bin")
    assert capsys.readouterr().err.endswith(f"{site.url}{path} -> {target} (version 3, float32, {SIZE} bytes)\n")
    assert Path(target).read_bytes() == MODEL
    assert os.listdir(cache_folder()) == [f"{name}.bin"]
    assert find_model(name) == (target, "given")
    assert {token_of(headers) for _, headers in site.requests} == {"Bearer hf_secret"}


@pytest.mark.parametrize(("dtype", "version", "expected"), [("F32", 5, 5), ("F32", 1, 1), ("BF16", None, 5), ("F16", None, 3)])
def test_in_the_version_that_is_wanted(
    site: Site, monkeypatch: pytest.MonkeyPatch, dtype: str, version: int | None, expected: int
) -> None:
    hub(site, monkeypatch, "gpt2", dtype)
    assert main(["gpt2", "-o", "x.bin", *([] if version is None else ["--version", str(version)])]) == 0
    assert Path("x.bin").read_bytes() == hf.checkpoint_bytes(hf.rounded(WEIGHTS, dtype), expected, **SHAPE)
    assert os.listdir() == ["x.bin"]
    assert not os.path.exists(cache_folder())


def test_any_hugging_face_model_by_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    url = site.url + hub(site, monkeypatch, "mine")
    monkeypatch.delenv("HF_ENDPOINT")
    assert main([f"{url}?download=true"]) == 0
    assert Path("model.bin").read_bytes() == MODEL


def test_settings_that_do_not_come(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = hub(site, monkeypatch, "gpt2")
    config = path.replace("model.safetensors", "config.json")
    good = site.files.pop(config)
    assert main(["gpt2"]) == 1
    assert f"{site.url}{config}: the server answers 404" in error_of(capsys)
    for bad in (good[:-1], good.replace(b"gelu_new", b"relu"), good + b" " * (1 << 22)):
        site.files[config] = bad
        assert main(["gpt2"]) == 2
        assert "config.json" in error_of(capsys)
    assert site.asked(path) == []
    assert os.listdir(cache_folder()) == []


def test_tensors_that_are_not_a_model(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = hub(site, monkeypatch, "gpt2")
    site.files[path] = site.files[path][:-4]
    assert main(["gpt2"]) == 2
    assert "not a sound safetensors file: truncated" in error_of(capsys)
    assert os.listdir(cache_folder()) == []


def test_every_name_has_a_source() -> None:
    assert tuple(SOURCES) == MODELS
    assert SOURCES["gpt2"] == "openai-community/gpt2/resolve/main/model.safetensors"
    assert SOURCES["gpt2_124M_bf16"] == "datasets/karpathy/llmc-starter-pack/resolve/main/gpt2_124M_bf16.bin"
    assert all(name in EXAMPLES for name in MODELS)


def test_a_file_of_that_name_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(cache_folder())
    Path(cached_model("gpt2")).touch()
    assert find_model("gpt2") == (cached_model("gpt2"), "given")
    Path("gpt2").mkdir()  # a folder does not
    assert find_model("gpt2") == (cached_model("gpt2"), "given")
    monkeypatch.setenv("PYGPT_MODEL", "gpt2")
    assert find_model() == (cached_model("gpt2"), "PYGPT_MODEL")
    Path("gpt2").rmdir()
    Path("gpt2").touch()
    assert find_model("gpt2") == ("gpt2", "given")
    monkeypatch.setenv("PYGPT_MODEL", "gpt2-xl")
    with pytest.raises(CheckpointError, match=r"^gpt2-xl \(named by PYGPT_MODEL\): not downloaded yet: run "):
        find_model()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == os.environ["PYGPT_HOME"]
    monkeypatch.setenv("PYGPT_HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == "/home/someone/.cache/pygpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == "/caches/pygpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_folder() == "/home/someone/.cache/pygpt"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == "/home/someone/Library/Caches/pygpt"


# ---------------------------------------------------------------------------------------------------------------------
# The disk, and the command


def test_a_model_that_is_there_stays(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(site) == 0
    capsys.readouterr()
    for options in ([], ["--version", "3"]):
        assert fetch(site, *options) == 0
        assert (
            capsys.readouterr().err == f"pygpt: a.bin (version 3, float32, {SIZE} bytes) is there already: nothing to fetch\n"
        )
    assert fetch(site, "--version", "5") == 2
    assert "a.bin: there already, of version 3: remove it, or use pygpt convert" in error_of(capsys)
    assert len(site.requests) == 1
    assert fetched()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_something_else_is_there(site: Site, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    if kind == "file":
        Path("a.bin").write_text("text")
    elif kind == "folder":
        Path("a.bin").mkdir()
    elif kind == "link":
        os.symlink("nowhere", "a.bin")
    else:
        os.mkfifo("a.bin")
    assert fetch(site) == 2
    assert "a.bin: there already, and not a model file" in error_of(capsys)
    assert os.listdir() == ["a.bin"]
    assert site.requests == []


def test_two_at_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with Part("a.bin.part", site.url + PATH) as part:
        part.write(b"mine")
        assert fetch(site) == 1
        assert "a.bin.part: another process is fetching this file" in error_of(capsys)
        assert Path("a.bin.part").read_bytes() == b"mine"
    assert fetch(site) == 0
    assert fetched()


def test_a_part_that_is_renamed_while_another_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets the lock of a file that has lost its name opens the next one."""
    real = fcntl.flock
    moves: list[Callable[[], None]] = [lambda: os.rename("p", "gone"), lambda: os.unlink("p")]

    def flock(file: Any, flags: int) -> None:
        if moves:
            moves.pop(0)()
        real(file, flags)

    monkeypatch.setattr("pygpt.hub.part.fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
    with Part("p", "http://x/") as part:
        part.write(b"new")
        assert Path("p").read_bytes() == b"new"
    assert Path("gone").read_bytes() == b""


def test_too_little_room(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pygpt.hub.part.shutil.disk_usage", lambda folder: SimpleNamespace(free=SIZE - 1))
    assert fetch(site) == 1
    assert f"{os.getcwd()}: {SIZE - 1} bytes are free and {SIZE} are needed" in error_of(capsys)
    assert os.listdir() == []


@pytest.mark.parametrize("answer", [web.chunked, web.whole(Content_Length=None)])
def test_a_file_of_unknown_length_does_not_fill_the_disk(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: web.Answer
) -> None:
    """It stops in time; what has arrived is kept, and gone on with when there is room."""
    room = SIZE // 2

    def disk_usage(folder: str) -> SimpleNamespace:
        return SimpleNamespace(free=KEEP_FREE + room - sum(entry.stat().st_size for entry in os.scandir(folder)))

    monkeypatch.setattr("pygpt.hub.part.shutil.disk_usage", disk_usage)
    site.plans[PATH] = [answer]
    assert fetch(site) == 1
    assert re.search(rf"{re.escape(os.getcwd())}: \d+ bytes are free and \d+ are needed: make room", error_of(capsys))
    have = os.path.getsize("a.bin.part")
    assert room - 1024 < have < room
    assert "a.bin" not in os.listdir()
    room = 2 * SIZE
    assert fetch(site) == 0
    assert fetched()
    assert site.asked(PATH)[1]["Range"] == f"bytes={have}-"


def test_room_for_what_it_becomes(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needed = len(site.files[hub(site, monkeypatch, "gpt2")]) + len(BIN[5])
    free = needed - 1
    monkeypatch.setattr("pygpt.hub.part.shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    assert main(["gpt2", "--version", "5"]) == 1
    assert f"{needed - 1} bytes are free and {needed} are needed" in error_of(capsys)
    free = needed
    assert main(["gpt2", "--version", "5"]) == 0


def test_the_disk_fills_up(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(3000):
        status = fetch(site)
    assert status == 1
    assert "a.bin.part: cannot write here: File too large" in error_of(capsys)
    assert waits == []
    assert "a.bin" not in os.listdir()
    assert fetch(site) == 0
    assert fetched()
    assert site.asked(PATH)[1]["Range"] == "bytes=3000-"


def test_no_room_for_what_it_becomes(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The part is kept, and is not fetched again."""
    path = hub(site, monkeypatch, "gpt2", "BF16")
    with full_disk(len(site.files[path]) + 10):
        assert main(["gpt2", "--version", "3"]) == 1
    assert "gpt2.bin: cannot write the model file: File too large" in error_of(capsys)
    assert sorted(os.listdir(cache_folder())) == ["gpt2.bin.part", "gpt2.bin.part.json"]
    assert main(["gpt2", "--version", "3"]) == 0
    assert len(site.asked(path)) == 1
    assert os.listdir(cache_folder()) == ["gpt2.bin"]


def test_places_that_cannot_be_written(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.bin.part").mkdir()
    assert fetch(site) == 1
    assert "a.bin.part: cannot write here: Is a directory" in error_of(capsys)
    Path("file").touch()
    monkeypatch.setenv("PYGPT_HOME", os.path.abspath("file/cache"))
    assert main(["gpt2"]) == 1
    assert "file/cache: cannot write here: Not a directory" in error_of(capsys)
    assert site.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir(mode=0o555)
    assert fetch(site, "-o", "sub/a.bin") == 1
    assert "sub/a.bin.part: cannot write here: Permission denied" in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["NAME | URL", "--help"]),
        (["gpt3"], ["'gpt3'", "gpt2, gpt2-medium"]),
        ([""], ["''"]),
        (["gpt2", "gpt2"], ["gpt2"]),
        (["gpt2", "--version", "4"], ["'4'", "1, 3 or 5"]),
        (["gpt2", "-o", ""], ["''", "not the name of a file"]),
        (["gpt2", "-o", "sub/"], ["'sub/'", "not the name of a file"]),
        (["gpt2", "-o", "absent/a.bin"], ["absent", "no folder"]),
        (["file:///etc/a.bin"], ["'file:///etc/a.bin'", "must be an address"]),
        (["ftp://host/a.bin"], ["'ftp://host/a.bin'"]),
        (["https:///a.bin"], ["must be an address"]),
        (["https://host:port/a.bin"], ["must be an address"]),
        (["https://host:0/a.bin"], ["must be an address"]),
        (["https://[/a.bin"], ["must be an address"]),
        (["https://host/a b.bin"], ["must be an address"]),
        (["https://host/ä.bin"], ["must be an address"]),
        (["https://host/a.bin\r\nX: y"], ["must be an address"]),
        (["https://me:secret@host/a.bin"], ["set HF_TOKEN instead"]),
        (["https://host/"], ["must end in .bin"]),
        (["https://host/a.txt"], ["must end in .bin"]),
        (["https://host/a.bin/"], ["must end in .bin"]),
        (["https://host/.bin"], ["must end in .bin"]),
        (["https://host/model.safetensors.index.json"], ["must end in .bin"]),
        (["https://host/pytorch_model.bin"], ["PyTorch pickle"]),
        (["https://host/pytorch_model-00001-of-00002.bin?x=y"], ["PyTorch pickle"]),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]) -> None:
    assert main(arguments) == 2
    line = error_of(capsys)
    assert "secret" not in line
    for word in named:
        assert word in line
    assert os.listdir() == []


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://huggingface.co", "https://me@huggingface.co"])
def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert main(["gpt2"]) == 2
    assert "HF_ENDPOINT" in error_of(capsys)
    assert not os.path.exists(cache_folder())


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(site: Site, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(http_client, "monotonic", lambda: float(next(clock)))
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    site.plans[PATH] = [web.dropped(SIZE // 2)]
    assert fetch(site) == 0
    lines = screen.getvalue().splitlines()  # \r ends a line here too
    assert all(len(line) <= 78 for line in lines if not line.startswith("pygpt:"))
    assert any(re.fullmatch(r"a\.bin: \d+ % of 0\.0 MB, 0\.0 MB/s, 0:\d\d left *", line) for line in lines)
    assert any(line.startswith("a.bin: 100 % of") for line in lines)
    assert lines[-1].startswith(f"pygpt: {site.url}{PATH} -> a.bin")
    assert any(line.endswith("trying again in 1 s") for line in lines)


def test_progress_of_unknown_length(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(http_client, "monotonic", lambda: float(next(clock)))
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    site.plans[PATH] = [web.chunked]
    assert fetch(site) == 0
    assert re.search(r"\ra\.bin: 0\.0 MB, 0\.0 MB/s *\r", screen.getvalue())


def test_times() -> None:
    assert [clock(seconds) for seconds in (0, 9.9, 60, 3599, 3600, 7325, 1e12)] == [
        *("0:00", "0:09", "1:00", "59:59", "1:00:00", "2:02:05", "99:59:59"),
    ]


def test_without_huggingface_hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, monkeypatch, "gpt2")
    monkeypatch.delenv("PYGPT_HUB")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["gpt2"]) == 0
    assert Path(cached_model("gpt2")).read_bytes() == MODEL
    assert site.heads == []


def test_as_a_process(site: Site) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(ROOT)}

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-W", "error", "-m", "pygpt.commands.download", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    done = run(site.url + PATH)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert fetched()
    refusal = run("gpt5")
    assert (refusal.returncode, refusal.stdout, refusal.stderr.count("\n")) == (2, "", 1)


def test_examples_of_the_help_are_sound(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert EXAMPLES in capsys.readouterr().out
    commands = re.findall(r"^  python -m pygpt\.download (.*?)  ", EXAMPLES, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        options = download.build_parser().parse_args(shlex.split(command))
        assert options.model in SOURCES
        parse_version(options.version)
