"""Downloads by huggingface_hub, from a server on this machine that also misbehaves: the same promises in the same words."""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import make_huggingface as hf
import pytest
import web_site as web
from limits import full_disk
from make_huggingface import SHAPE
from test_download import Terminal, error_of, token_of
from web_site import COMMIT, Handler, Site

from pygpt import __version__, http_client
from pygpt.commands.download import main
from pygpt.hub.fetch import HUB_VERSIONS
from pygpt.hub.find import cache_folder, cached_model
from pygpt.hub.web import RETRY_AFTER_LIMIT

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = hf.weights(**SHAPE)
MODEL = hf.checkpoint_bytes(WEIGHTS, 3, **SHAPE)
SETTINGS = json.dumps(hf.settings(**SHAPE)).encode()
REPOSITORY = "/openai-community/gpt2/resolve"
TENSORS = f"{REPOSITORY}/{COMMIT}/model.safetensors"  # where the file is asked for, and HEAD first
MAIN = f"{REPOSITORY}/main/model.safetensors"
CONFIG = f"{REPOSITORY}/main/config.json"


def safetensors(dtype: str = "F32") -> bytes:
    tensors = hf.named(WEIGHTS, dtype)
    return hf.file_of(json.dumps(hf.header_of(tensors)).encode(), b"".join(data for _, _, data in tensors.values()))


FILE = safetensors()
SIZE, SHA = len(FILE), hashlib.sha256(FILE).hexdigest()


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, the current one; caches of its own; nothing of the user's settings; small reads."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING", "PYGPT_")):
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYGPT_HOME", str(tmp_path / "cache"))
    changes = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "DOWNLOAD_CHUNK_SIZE": 512,
    }
    for constant, value in changes.items():
        monkeypatch.setattr(constants, constant, value)
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers
    yield
    logger.handlers = before
    hub.close_session()  # proxies, and connections to a server that ends


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A hub with GPT-2, the endpoint."""
    with Site() as found:
        for revision in "main", COMMIT:
            found.files |= {f"{REPOSITORY}/{revision}/{name}": data for name, data in FILES.items()}
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


FILES = {"model.safetensors": FILE, "config.json": SETTINGS}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the downloads would have waited."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def fetched() -> bool:
    """Whether the model is there, and nothing else: neither beside it nor in huggingface_hub's cache."""
    return Path(cached_model("gpt2")).read_bytes() == MODEL and os.listdir(cache_folder()) == ["gpt2.bin"] and no_copy()


def no_copy() -> bool:
    return not any(path.stat().st_size >= SIZE // 2 for path in Path(constants.HF_HOME).rglob("*"))


def failed(capsys: pytest.CaptureFixture[str]) -> str:
    """The line about a failure that left nothing."""
    output = capsys.readouterr()
    assert output.out == ""
    *before, last = output.err.splitlines()
    assert all(line.startswith("pygpt: ") for line in before)
    assert last.startswith("pygpt: error: ")
    assert os.listdir(cache_folder()) == []
    assert no_copy()
    return last


# ---------------------------------------------------------------------------------------------------------------------
# It arrives


def test_a_model_by_name(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt2"]) == 0
    assert fetched()
    assert capsys.readouterr() == (
        "",
        f"pygpt: {site.url}{MAIN} -> {cached_model('gpt2')} (version 3, float32, {len(MODEL)} bytes)\n",
    )
    assert [path for path, _ in site.requests] == [f"{REPOSITORY}/{COMMIT}/config.json", TENSORS]  # of one commit
    agents = {headers["user-agent"].split("; python")[0] for _, headers in site.requests + site.heads}
    assert agents == {f"pygpt/{__version__}; hf_hub/{hub.__version__}"}
    assert {token_of(headers) for _, headers in site.requests + site.heads} == {None}
    assert waits == []


@pytest.mark.parametrize(("dtype", "version"), [("F32", 5), ("BF16", None), ("F16", None)])
def test_it_is_converted(site: Site, dtype: str, version: int | None) -> None:
    site.files[MAIN] = site.files[TENSORS] = safetensors(dtype)
    assert main(["gpt2", "-o", "x.bin", *([] if version is None else ["--version", str(version)])]) == 0
    expected = 5 if dtype == "BF16" else version or 3
    assert Path("x.bin").read_bytes() == hf.checkpoint_bytes(hf.rounded(WEIGHTS, dtype), expected, **SHAPE)
    assert os.listdir() == ["x.bin"]


def test_an_address_of_the_hub(site: Site) -> None:
    folder = "/me/my.model/resolve/{}/sub folder/"
    for revision in "refs%2Fpr%2F1", COMMIT:
        for name, data in FILES.items():
            site.files[folder.format(revision).replace(" ", "%20") + name] = data
    assert main([f"{site.url}{folder.format('refs%2Fpr%2F1').replace(' ', '%20')}model.safetensors?download=true"]) == 0
    assert Path("model.bin").read_bytes() == MODEL
    assert [path.split("/")[4] for path, _ in site.requests] == [COMMIT, COMMIT]


@pytest.mark.parametrize("place", ["/datasets/a/b/resolve/main/", "/a/", "/a/b/c/resolve/main/"])
def test_other_addresses_are_not_its(site: Site, place: str) -> None:
    site.files |= {place + name: data for name, data in FILES.items()}
    assert main([f"{site.url}{place}model.safetensors"]) == 0
    assert Path("model.bin").read_bytes() == MODEL
    assert site.heads == []


def test_other_hosts_are_not_its(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{site.url}/mirror")
    assert main([site.url + MAIN]) == 0
    assert Path("model.bin").read_bytes() == MODEL
    monkeypatch.delenv("HF_ENDPOINT")
    assert main([site.url + MAIN, "-o", "again.bin"]) == 0
    assert site.heads == []


def test_a_mirror_in_a_folder(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files |= {f"/mirror{path}": data for path, data in site.files.items()}
    monkeypatch.setenv("HF_ENDPOINT", f"{site.url}/mirror/")
    assert main(["gpt2"]) == 0
    assert fetched()
    assert {path.partition("/openai")[0] for path, _ in site.requests + site.heads} == {"/mirror"}


def test_a_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", site.url)
    assert main(["gpt2"]) == 0
    assert fetched()
    assert {headers["Host"] for _, headers in site.requests + site.heads} == {"hub.invalid"}


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("login", [True, False])
def test_the_token(site: Site, monkeypatch: pytest.MonkeyPatch, login: bool) -> None:
    """Of the environment, else of `hf auth login`; it stays at home."""
    if login:
        os.makedirs(constants.HF_HOME)
        Path(constants.HF_TOKEN_PATH).write_text("hf_secret\n")
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Site() as other:
        other.files["/blob"] = FILE
        site.plans[f"HEAD {TENSORS}"] = [
            web.moved(f"{other.url}/blob", X_Repo_Commit=COMMIT, ETag=f'"{SHA}"', X_Linked_Size=SIZE)
        ] * 2
        assert main(["gpt2"]) == 0
        assert [token_of(headers) for _, headers in other.requests] == [None]
    assert fetched()
    assert {token_of({name.title(): value for name, value in headers.items()}) for _, headers in site.heads} == {
        "Bearer hf_secret"
    }


def test_a_token_that_is_none(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "a b")
    assert main(["gpt2"]) == 2
    assert "HF_TOKEN has a space" in failed(capsys)
    assert site.heads == []


# ---------------------------------------------------------------------------------------------------------------------
# It is there already


def put_into_cache(repository: str = "models--openai-community--gpt2", commit: str = COMMIT, **files: bytes) -> Path:
    """Put files into huggingface_hub's cache as it does; return the folder of the snapshot."""
    folder = Path(constants.HF_HUB_CACHE, repository)
    snapshot = folder / "snapshots" / commit
    for part in folder / "refs", folder / "blobs", snapshot:
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, data in files.items():
        blob = folder / "blobs" / (SHA if name == "model" else "0" * 40)
        blob.write_bytes(data)
        (snapshot / {"model": "model.safetensors", "config": "config.json"}[name]).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("repository", ["models--openai-community--gpt2", "models--gpt2"])
@pytest.mark.parametrize("offline", [True, False])
def test_the_users_cache(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: str, offline: bool
) -> None:
    snapshot = put_into_cache(repository, model=FILE, config=SETTINGS)
    before = {path: path.lstat().st_mtime_ns for path in Path(constants.HF_HOME).rglob("*")}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert main(["gpt2"]) == 0
    assert Path(cached_model("gpt2")).read_bytes() == MODEL
    assert os.listdir(cache_folder()) == ["gpt2.bin"]
    assert capsys.readouterr().err.startswith(f"pygpt: {snapshot / 'model.safetensors'} -> {cached_model('gpt2')} (version 3")
    assert site.requests == site.heads == []
    assert {path: path.lstat().st_mtime_ns for path in Path(constants.HF_HOME).rglob("*")} == before


def test_half_of_it_in_the_cache(site: Site) -> None:
    """Settings and tensors are of one revision."""
    put_into_cache(commit="01" * 20, config=b"{}")
    assert main(["gpt2"]) == 0
    assert fetched()


def test_a_damaged_cache(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = put_into_cache(model=FILE[:-1] + b"?", config=SETTINGS)
    assert main(["gpt2"]) == 1
    assert f"{snapshot / 'model.safetensors'}: wrong bytes: sha256 " in error_of(capsys)
    assert os.listdir(cache_folder()) == []
    assert (snapshot / "model.safetensors").exists()


def test_a_cache_of_something_else(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = put_into_cache(config=SETTINGS)
    (snapshot / "model.safetensors").write_bytes(FILE[:-4])  # where there are no links: no digest either
    assert main(["gpt2"]) == 2
    error = error_of(capsys)
    assert "not a sound safetensors file: truncated" in error
    assert "deleted" not in error
    assert (snapshot / "model.safetensors").exists()
    assert os.listdir(cache_folder()) == []


def test_no_room_beside_the_cache(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put_into_cache(model=FILE, config=SETTINGS)
    monkeypatch.setattr("pygpt.hub.part.shutil.disk_usage", lambda folder: SimpleNamespace(free=len(MODEL) - 1))
    assert main(["gpt2"]) == 1
    assert f"{len(MODEL) - 1} bytes are free and {len(MODEL)} are needed" in error_of(capsys)


def test_offline(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["gpt2"]) == 1
    assert "HF_HUB_OFFLINE is set, and huggingface_hub's cache has no such file" in failed(capsys)
    assert site.requests == site.heads == []


# ---------------------------------------------------------------------------------------------------------------------
# The connection breaks


def test_breaks(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    offsets = [1024, 3072, 3584, 5120, 6144, 6656, 7168]  # more than huggingface_hub takes in a row: each brings something
    assert offsets[-1] < SIZE
    site.plans[TENSORS] = [web.dropped(at) for at in offsets]
    assert main(["gpt2"]) == 0
    assert fetched()
    asked = [headers.get("Range", headers.get("range")) for headers in site.asked(TENSORS)]
    assert asked == [None, *(f"bytes={at}-" for at in offsets)]
    *notes, last = capsys.readouterr().err.splitlines()
    assert len(notes) == len(offsets)
    assert all(line.startswith("pygpt: Error while downloading from ") for line in notes)
    assert last.startswith(f"pygpt: {site.url}")


def test_breaks_without_end(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[TENSORS] = [web.dropped(0)] * 100
    assert main(["gpt2"]) == 1
    assert "PYGPT_HUB=0 downloads without huggingface_hub" in failed(capsys)
    assert len(site.asked(TENSORS)) < 10
    site.plans.clear()
    assert main(["gpt2"]) == 0
    assert fetched()


def test_a_server_that_falls_silent(site: Site, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    site.plans[TENSORS] = [web.silence]
    assert main(["gpt2"]) == 0
    assert fetched()


def test_ctrl_c(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def half(handler: Handler, data: bytes) -> None:
        handler.head(200, {"Content-Length": len(data)})
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        os.kill(os.getpid(), signal.SIGINT)
        handler.server.released.wait(60)

    site.plans[TENSORS] = [half]
    assert main(["gpt2"]) == 130
    assert capsys.readouterr() == ("", "")
    assert os.listdir(cache_folder()) == []
    site.plans.clear()
    assert main(["gpt2"]) == 0
    assert fetched()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Site() as site:
        url = site.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert main(["gpt2"]) == 1
    assert re.search(r"config\.json: .*Connection refused.*: PYGPT_HUB=0 ", failed(capsys))
    assert sum(waits) < 60


# ---------------------------------------------------------------------------------------------------------------------
# The server refuses


@pytest.mark.parametrize("path", [f"HEAD {CONFIG}", f"HEAD {REPOSITORY}/{COMMIT}/model.safetensors", TENSORS])
@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (web.status(401), "401: it wants a token: set HF_TOKEN"),
        (web.status(401, X_Error_Code="RepoNotFound"), "401: it wants a token: set HF_TOKEN"),
        (web.status(403, X_Error_Code="GatedRepo"), "403: HF_TOKEN is not allowed to read this: ask for access"),
        (web.status(404), "404: there is no such file"),
        (web.status(404, X_Error_Code="EntryNotFound"), "404: there is no such file"),
        (web.status(404, X_Error_Code="RevisionNotFound"), "404: there is no such file"),
        (web.status(410), "410: Gone"),
        (web.status(416), "416: Requested Range Not Satisfiable"),
    ],
)
def test_a_refusal(
    site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], path: str, answer: web.Answer, named: str
) -> None:
    site.plans[path] = [answer]
    assert main(["gpt2"]) == 1
    line = failed(capsys)
    assert f"{'config.json' if path.endswith('json') else 'model.safetensors'}: the server answers {named}" in line
    assert waits == []


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_patience(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], code: int) -> None:
    site.plans[f"HEAD {CONFIG}"] = [web.status(code), web.status(code, Retry_After="7")]
    assert main(["gpt2"]) == 0
    assert fetched()
    assert waits == [1.0, 8.0]
    assert all(line.startswith("pygpt: ") for line in capsys.readouterr().err.splitlines())


def test_patience_ends(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[f"HEAD {CONFIG}"] = [web.status(503)] * 100
    assert main(["gpt2"]) == 1
    assert "config.json: the server answers 503" in failed(capsys)
    assert len(site.heads) < 10
    assert sum(waits) < 60


@pytest.mark.parametrize("asked", [{"Retry_After": "99999999999"}, {"RateLimit": '"api";r=0;t=99999999999'}])
@pytest.mark.parametrize("path", [f"HEAD {CONFIG}", TENSORS])
def test_how_long_a_server_may_ask_to_wait(site: Site, waits: list[float], path: str, asked: dict[str, str]) -> None:
    site.plans[path] = [web.status(429, **asked)]
    assert main(["gpt2"]) == 0
    assert fetched()
    assert waits == [RETRY_AFTER_LIMIT + 1 if "Retry_After" in asked else 1.0]


@pytest.mark.parametrize("path", [f"HEAD {CONFIG}", f"HEAD {TENSORS}", TENSORS])
def test_a_redirect_without_end(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], path: str) -> None:
    site.plans[path] = [web.moved(path.removeprefix("HEAD "))] * 200
    assert main(["gpt2"]) == 1
    assert re.search(r"(config\.json|model\.safetensors): Exceeded .*redirects.*: PYGPT_HUB=0 ", failed(capsys))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.bin", "data:,x"])
def test_redirects_that_lead_astray(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], target: str) -> None:
    site.plans[TENSORS] = [web.moved(target)] * 100
    assert main(["gpt2"]) == 1
    assert "model.safetensors: " in failed(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# What arrives is not what was announced


def test_wrong_bytes(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    other = FILE[:-1] + b"?"
    site.plans[TENSORS] = [web.whole(other)]
    assert main(["gpt2"]) == 1
    assert f"wrong bytes: sha256 {hashlib.sha256(other).hexdigest()}, expected {SHA}; they are deleted" in failed(capsys)


@pytest.mark.parametrize("other", [FILE[:-1], FILE + b"?", b""])
def test_wrong_length(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str], other: bytes) -> None:
    site.plans[TENSORS] = [web.whole(other)] * 100
    assert main(["gpt2"]) == 1
    assert f"should be of size {SIZE}" in failed(capsys)
    assert len(site.asked(TENSORS)) < 10


def test_a_length_that_nobody_knows(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[f"HEAD {TENSORS}"] = [web.announced(Content_Length=None)] * 2
    assert main(["gpt2"]) == 1
    assert "model.safetensors: the server does not say how long this file is: PYGPT_HUB=0 " in failed(capsys)
    assert site.asked(TENSORS) == []


def test_a_server_that_is_no_hub(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for path in list(site.files):
        site.plans[f"HEAD {path}"] = [web.announced(X_Repo_Commit=None)] * 9
    assert main(["gpt2"]) == 1
    assert "PYGPT_HUB=0 downloads without huggingface_hub" in failed(capsys)


@pytest.mark.parametrize("settings", [SETTINGS[:-1], SETTINGS.replace(b"gelu_new", b"relu")])
def test_settings_that_are_none(site: Site, capsys: pytest.CaptureFixture[str], settings: bytes) -> None:
    site.files[CONFIG] = site.files[f"{REPOSITORY}/{COMMIT}/config.json"] = settings
    assert main(["gpt2"]) == 2
    assert "config.json" in failed(capsys)
    assert site.asked(TENSORS) == []


def test_settings_without_end(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plans[f"HEAD {CONFIG}"] = [web.announced(Content_Length=1 << 40)]
    assert main(["gpt2"]) == 1
    assert f"config.json: {1 << 40} bytes are announced" in failed(capsys)
    assert site.requests == []


def test_tensors_that_are_not_a_model(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.files[MAIN] = site.files[TENSORS] = FILE[:-4]
    assert main(["gpt2"]) == 2
    assert "what came is no model that is read, and deleted: " in failed(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def test_too_little_room(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needed = SIZE + len(MODEL)
    free = needed - 1
    monkeypatch.setattr("pygpt.hub.part.shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    assert main(["gpt2"]) == 1
    assert f"{needed - 1} bytes are free and {needed} are needed" in failed(capsys)
    assert site.asked(TENSORS) == []
    free = needed
    assert main(["gpt2"]) == 0
    assert fetched()


@pytest.mark.filterwarnings("default")
def test_too_little_room_all_at_once(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """huggingface_hub asks again how long the file is, and warns: of that, too, there are lines."""
    site.plans[f"HEAD {TENSORS}"] = [web.announced(), web.announced(Content_Length=10**17)]
    assert main(["gpt2"]) == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("pygpt: Not enough free disk space to download the file.")


def test_the_disk_fills_up(site: Site, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(5000):
        assert main(["gpt2"]) == 1
    assert "model.safetensors: File too large" in failed(capsys)


def test_no_room_for_what_it_becomes(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """What has arrived is kept, and is not fetched again."""
    site.files[MAIN] = site.files[TENSORS] = safetensors("BF16")
    with full_disk(len(site.files[TENSORS]) + 10):
        assert main(["gpt2", "--version", "3"]) == 1
    assert "gpt2.bin: cannot write the model file: File too large" in error_of(capsys)
    assert sorted(os.listdir(cache_folder())) == ["gpt2.bin.part", "gpt2.bin.part.json"]
    assert main(["gpt2", "--version", "3"]) == 0
    assert len(site.asked(TENSORS)) == 1
    assert os.listdir(cache_folder()) == ["gpt2.bin"]


# ---------------------------------------------------------------------------------------------------------------------
# Which of the two


def test_an_earlier_run_is_gone_on_with(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the standard library has begun, it ends."""
    monkeypatch.setattr(http_client, "READ_BYTES", 512)
    site.etag = f'"{SHA}"'
    site.plans[MAIN] = [web.dropped(5000), web.status(403)]
    monkeypatch.setattr(http_client, "sleep", lambda seconds: None)
    monkeypatch.setenv("PYGPT_HUB", "0")
    assert main(["gpt2"]) == 1
    assert site.heads == []
    monkeypatch.setenv("PYGPT_HUB", "1")
    assert main(["gpt2"]) == 0
    assert fetched()
    assert site.asked(MAIN)[-1]["Range"] == "bytes=5000-"
    assert site.heads == []


@pytest.mark.parametrize("version", ["0.36.2", "1.30.9", "3.0.0rc1", "3.1"])
def test_versions_that_are_not_known(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    monkeypatch.setattr(hub, "__version__", version)
    assert main(["gpt2"]) == 0
    assert fetched()
    assert site.heads == []
    assert f"huggingface_hub {version} is not of those that are used, from 1.31 and below 3: " in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["", "try_to_load_from_cache", "get_hf_file_metadata", "hf_hub_download"])
def test_an_installation_that_is_broken(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    if lost:
        monkeypatch.delattr(f"huggingface_hub.file_download.{lost}")
    else:
        monkeypatch.setitem(sys.modules, "huggingface_hub.file_download", None)
    assert main(["gpt2"]) == 1
    assert re.search(
        f"(json|safetensors): .*{lost[:6]}.*huggingface_hub.file_download.*: PYGPT_HUB=0 downloads without", failed(capsys)
    )


def test_the_extra_has_the_same_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    least, below = (".".join(map(str, version)) for version in HUB_VERSIONS)
    assert extras["hub"] == [f"huggingface_hub>={least},<{below}"]


@pytest.mark.parametrize("value", ["no", "2", "a\nb"])
def test_a_variable_that_is_none(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("PYGPT_HUB", value)
    assert main(["gpt2"]) == 2
    assert f"PYGPT_HUB is {value!r}: it must be 0" in failed(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# As users see it


def test_progress_is_for_terminals(site: Site, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    site.plans[TENSORS] = [web.dropped(SIZE // 2)]
    assert main(["gpt2"]) == 0
    lines = screen.getvalue().splitlines()  # \r ends a line here too
    assert any(re.search(r"model\.safetensors: +100%\|.*<.*B/s", line) for line in lines)
    assert [line.split()[1] for line in lines if "pygpt: " in line] == ["Error", f"{site.url}{MAIN}"]
    assert all(line.startswith("pygpt: ") for line in lines if "pygpt: " in line)


def test_a_name_that_a_server_gives_is_not_drawn(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    site.plans[TENSORS] = [web.whole(Content_Disposition='inline; filename="\x9b31mother";')]
    assert main(["gpt2"]) == 0
    assert "model.safetensors: 100%" in screen.getvalue()
    assert "\x9b" not in screen.getvalue()
    assert "other" not in screen.getvalue()


def test_as_a_process(site: Site, tmp_path: Path) -> None:
    """With the environment's own settings; and the package is imported by nobody else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "own"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_x",
    }

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    done = run("-m", "pygpt.commands.download", "gpt2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert Path(cached_model("gpt2")).read_bytes() == MODEL
    assert {headers["authorization"] for _, headers in site.heads} == {"Bearer hf_x"}
    environment["HF_HUB_OFFLINE"] = "1"
    refusal = run("-m", "pygpt.commands.download", "gpt2-xl")
    assert (refusal.returncode, refusal.stdout, refusal.stderr.count("\n")) == (1, "", 1)
    assert "HF_HUB_OFFLINE is set" in refusal.stderr
    environment["HF_HUB_ETAG_TIMEOUT"] = "soon"
    nonsense = run("-m", "pygpt.commands.download", "gpt2-xl")
    assert (nonsense.returncode, nonsense.stdout, nonsense.stderr.count("\n")) == (1, "", 1)
    assert "'soon': PYGPT_HUB=0 downloads without" in nonsense.stderr
    imported = run("-c", "import sys, pygpt, pygpt.__main__, pygpt.commands.download; print('huggingface_hub' in sys.modules)")
    assert imported.stdout == "False\n"
