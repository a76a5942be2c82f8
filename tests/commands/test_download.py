"""Test pygpt download with a local server that can fail: it saves a complete model, or prints one line and saves none."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import make_huggingface as hf
import pytest
from limits import full_disk
from make_huggingface import SHAPE
from running import assert_one_line_error, execute, gist
from web_site import COMMIT, Answer, Handler, Site, status

from pygpt import __version__
from pygpt.commands import download
from pygpt.commands.download import EXAMPLES, main
from pygpt.errors import CheckpointError, InputError
from pygpt.hub.find import MODELS, cache_folder, cached_model, find_model, is_downloadable
from pygpt.model import GPT2 as Network

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

WEIGHTS = hf.weights(**SHAPE)
BIN = {version: hf.checkpoint_bytes(WEIGHTS, version, **SHAPE) for version in (1, 3)}
BIN[5] = hf.checkpoint_bytes(hf.rounded(WEIGHTS, "BF16"), 5, **SHAPE)
SETTINGS = json.dumps(hf.settings(**SHAPE)).encode()
GPT2, LLMC = "/openai-community/gpt2/resolve", "/datasets/karpathy/llmc-starter-pack/resolve/main/gpt2_124M.bin"
CONFIG, MODEL = f"{GPT2}/main/config.json", f"{GPT2}/{COMMIT}/model.safetensors"
INDEX = "model.safetensors.index.json"
KNOWN = download.LLMC_SHA256["gpt2_124M"]


def safetensors(dtype: str) -> bytes:
    tensors = hf.named(WEIGHTS, dtype)
    return hf.file_of(json.dumps(hf.header_of(tensors)).encode(), b"".join(data for _, _, data in tensors.values()))


FILE = safetensors("F32")
SHA = hashlib.sha256(FILE).hexdigest()


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set an empty current folder, new cache folders, default settings, small reads, and retries without waits."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING", "PYGPT_", "XDG_")):
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYGPT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    changes = {"HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False}
    for constant, value in {**changes, "HF_HUB_DISABLE_TELEMETRY": True, "DOWNLOAD_CHUNK_SIZE": 512}.items():
        monkeypatch.setattr(constants, constant, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield
    hub.close_session()  # its connections end with the server


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Start a server with GPT-2 and llm.c's file, and use it instead of Hugging Face."""
    with Site() as found:
        found.files = {CONFIG: SETTINGS, f"{GPT2}/{COMMIT}/config.json": SETTINGS, MODEL: FILE, LLMC: BIN[3]}
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setitem(download.LLMC_SHA256, "gpt2_124M", hashlib.sha256(BIN[3]).hexdigest())
        yield found


def snapshot(name: str = "models--openai-community--gpt2") -> Path:
    """Return the folder of a repository's files in huggingface_hub's cache."""
    return Path(constants.HF_HUB_CACHE, name, "snapshots", COMMIT)


def error_of(capsys: pytest.CaptureFixture[str], *left: str) -> str:
    """Return the error line. Assert that no model was saved, and that each warning of huggingface_hub is one line."""
    output = capsys.readouterr()
    assert output.out == ""
    *before, last = output.err.splitlines()
    assert all(line.startswith("pygpt: ") for line in before)
    assert last.startswith("pygpt: error: ")
    assert os.listdir() == list(left)
    assert not os.path.isdir(cache_folder()) or os.listdir(cache_folder()) == []
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    return last


# ---------------------------------------------------------------------------------------------------------------------
# Successful downloads


def test_a_model_by_name(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"^gpt2: .*`pygpt download gpt2`"):
        find_model("gpt2")
    assert main(["gpt2"]) == 0
    target = cached_model("gpt2")
    said = f"{target} (version 3, float32, {len(BIN[3])} bytes)"
    assert capsys.readouterr() == ("", f"pygpt: {snapshot()} -> {said}\n")
    assert Path(target).read_bytes() == BIN[3]
    assert os.listdir(cache_folder()) == ["gpt2.bin"]
    assert find_model("gpt2") == (target, "given")
    asked = [(command, path) for command, path, _ in site.requests]
    names = ["tokenizer.json", "vocab.json", "merges.txt"]
    names += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    vocabulary = [("HEAD", MODEL.replace("model.safetensors", name)) for name in names]
    assert asked == [("HEAD", CONFIG), ("GET", CONFIG), *vocabulary, ("HEAD", MODEL), ("GET", MODEL)]  # all of one commit
    assert all(headers["user-agent"].startswith(f"pygpt/{__version__}; hf_hub/") for _, _, headers in site.requests)
    site.requests.clear()
    assert main(["gpt2"]) == 0
    assert capsys.readouterr().err.startswith(f"pygpt: {said} exists already")
    assert main(["gpt2", "--version", "5"]) == 2
    assert_one_line_error(capsys.readouterr().err, "version 3 ... pygpt convert")
    assert site.requests == []


@pytest.mark.parametrize("name", MODELS)
def test_every_name_has_a_source(site: Site, name: str) -> None:
    site.files.clear()
    assert main([name]) == 2
    place = (LLMC if "124M" in name else CONFIG).replace("gpt2_124M" if "124M" in name else "gpt2", name)
    assert site.requests[0][1] == (place.replace("openai-community", "distilbert") if name == "distilgpt2" else place)


@pytest.mark.parametrize("arguments", [["me/my.model@refs/pr/1"], ["me/my.model", "--revision", "refs/pr/1"]])
def test_a_repository_and_a_revision(site: Site, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    site.files = {"/me/my.model/resolve/refs%2Fpr%2F1/config.json": SETTINGS}
    site.files[f"/me/my.model/resolve/{COMMIT}/model.safetensors"] = FILE
    assert main(arguments) == 0
    found = os.path.join(cache_folder(), "me--my.model@refs--pr--1.bin")
    assert Path(found).read_bytes() == BIN[3]
    assert find_model("me/my.model@refs/pr/1") == (found, "given")
    monkeypatch.setenv("PYGPT_MODEL", "me/my.model")
    with pytest.raises(CheckpointError, match=r"^me/my\.model .*PYGPT_MODEL"):
        find_model()


@pytest.mark.parametrize(("dtype", "version", "expected"), [("F32", "1", 1), ("F32", "5", 5), ("BF16", "", 5), ("F16", "", 3)])
def test_it_is_converted(site: Site, dtype: str, version: str, expected: int) -> None:
    site.files[MODEL] = safetensors(dtype)
    assert main(["gpt2", "-o", "x.bin", *(["--version", version] if version else [])]) == 0
    assert Path("x.bin").read_bytes() == hf.checkpoint_bytes(hf.rounded(WEIGHTS, dtype), expected, **SHAPE)
    assert os.listdir() == ["x.bin"]
    assert not os.path.exists(cache_folder())


def test_a_model_in_shards(site: Site, tmp_path: Path) -> None:
    hf.make_model(tmp_path / "model", hf.named(WEIGHTS), None, shards=3)
    del site.files[MODEL]
    site.files |= {f"{GPT2}/{COMMIT}/{path.name}": path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert main(["gpt2"]) == 0
    assert Path(cached_model("gpt2")).read_bytes() == BIN[3]


def test_llmcs_file_lies_on_the_disk_once(site: Site) -> None:
    assert main(["gpt2_124M", "--version", "3"]) == 0
    linked, theirs = Path(cached_model("gpt2_124M")), snapshot("datasets--karpathy--llmc-starter-pack") / "gpt2_124M.bin"
    assert os.path.samefile(linked, theirs)
    assert find_model("gpt2_124M") == (str(linked), "given")
    assert main(["gpt2_124M", "-o", "own.bin"]) == 0
    assert Path("own.bin").read_bytes() == BIN[3]
    assert not os.path.samefile("own.bin", theirs)
    theirs.unlink()  # `hf cache` does this
    with pytest.raises(CheckpointError, match="pygpt download"):
        find_model("gpt2_124M")
    assert main(["gpt2_124M", "--version", "5"]) == 0
    assert (linked.is_symlink(), linked.read_bytes(), theirs.read_bytes()) == (False, BIN[5], BIN[3])


# ---------------------------------------------------------------------------------------------------------------------
# Checks of the files, downloaded or from huggingface_hub's cache


def test_offline(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Files in huggingface_hub's cache are used without a request."""
    assert main(["gpt2"]) == 0
    os.unlink(cached_model("gpt2"))
    site.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["gpt2"]) == 0
    os.unlink(cached_model("gpt2"))
    assert main(["gpt2-xl"]) == 1
    assert re.search("openai-community/gpt2-xl: .*HF_HUB_OFFLINE", error_of(capsys))
    assert site.requests == []


@pytest.mark.parametrize("data", [FILE[:-1] + b"?", FILE[:-1], b""])
def test_a_damaged_cache(site: Site, capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    assert main(["gpt2"]) == 0
    os.unlink(cached_model("gpt2"))
    (snapshot() / "model.safetensors").write_bytes(data)  # writes through the link
    assert main(["gpt2"]) == 1
    line = error_of(capsys)
    assert f"model.safetensors: wrong bytes: sha256 {hashlib.sha256(data).hexdigest()}, expected {SHA}: delete " in line
    os.unlink(re.findall("delete (.*) and download it again", line)[0])
    assert main(["gpt2"]) == 0
    os.unlink(cached_model("gpt2"))
    (snapshot() / "model.safetensors").unlink()  # as with HF_HUB_DISABLE_SYMLINKS, where sha256 is not the file's name
    (snapshot() / "model.safetensors").write_bytes(data)
    if len(data) < len(FILE):
        assert main(["gpt2"]) == 2
        assert error_of(capsys).endswith("delete it and download it again")


def test_wrong_bytes_arrive(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Hugging Face sends the sha256 of a large file when it redirects to another host."""
    sound: dict[str, str | int] = {"X_Linked_ETag": f'"{SHA}"', "X_Linked_Size": len(FILE), "X_Repo_Commit": COMMIT}
    with Site() as other:
        other.files["/blob"] = FILE[:-1] + b"?"
        site.plans["HEAD", MODEL] = [status(302, Location=other.url.replace("127.0.0.1", "localhost") + "/blob", **sound)]
        assert main(["gpt2"]) == 1
    assert f"wrong bytes: sha256 {hashlib.sha256(FILE[:-1] + b'?').hexdigest()}, expected {SHA}" in error_of(capsys)


def test_llmcs_known_file(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(download.LLMC_SHA256, "gpt2_124M", KNOWN)
    assert main(["gpt2_124M"]) == 1
    known = "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162"
    assert re.search(f"wrong bytes: sha256 {hashlib.sha256(BIN[3]).hexdigest()}, expected .*{known}", error_of(capsys))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"pytorch_model.bin": b"x"}, "pickle"),
        ({"pytorch_model.bin.index.json": b"x"}, "a PyTorch pickle"),
        ({"tf_model.h5": b"x"}, f"{INDEX} in this repository"),
        ({INDEX: b'{"weight_map": {"x": "../x.safetensors"}}'}, "../x.safetensors"),
        ({INDEX: b'{"weight_map": {"x": "x.safetensors"}}'}, "x.safetensors"),
        ({"model.safetensors": FILE[:-4]}, "truncated: "),
        ({"config.json": SETTINGS.replace(b'"gpt2"', b'"bert"'), "model.safetensors": FILE}, "model_type is 'bert'"),
        ({"config.json": SETTINGS[:-1], "model.safetensors": FILE}, "config.json is not JSON"),
    ],
)
def test_without_a_model(site: Site, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], named: str) -> None:
    site.files = {f"{GPT2}/{COMMIT}/{name}": data for name, data in files.items()}
    site.files[CONFIG] = files.get("config.json", SETTINGS)
    assert main(["gpt2"]) == 2
    assert re.search(gist(named), error_of(capsys))
    fetched = [path.rpartition("/")[2] for command, path, _ in site.requests if command == "GET"]
    assert fetched[1:] == ([name for name in files if "config.json" not in files and name in (INDEX, "model.safetensors")])


# ---------------------------------------------------------------------------------------------------------------------
# The network, and the server


def test_breaks(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken download continues at the same byte, and prints a line."""
    offsets = [1024, 3072, 5120]
    site.plans["GET", MODEL] = [lambda handler, data, at=at: handler.send_file(data, at) for at in offsets]  # type: ignore[misc]
    assert main(["gpt2"]) == 0
    asked = [headers.get("range") for command, path, headers in site.requests if (command, path) == ("GET", MODEL)]
    assert asked == [None, *(f"bytes={at}-" for at in offsets)]
    *notes, last = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in notes] == [" Error while downloading from http"] * 3
    assert last.startswith(f"pygpt: {snapshot()}")


def test_a_break_for_good(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    site.plans["GET", MODEL] = [lambda handler, data: handler.send_file(data, 0)] * 20
    assert main(["gpt2"]) == 1
    assert re.search(f"gpt2: cannot download from {site.url}: .*: check the network, then try again", error_of(capsys))
    with Site() as gone:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone.url + "/{repo_id}/{revision}/{filename}")
    assert main(["gpt2-xl"]) == 1
    assert "Connection refused: check the network" in error_of(capsys)


def test_ctrl_c(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def half(handler: Handler, data: bytes) -> None:
        handler.send_file(data, len(data) // 2)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.5)  # keeps the connection open

    site.plans["GET", MODEL] = [half]
    assert main(["gpt2"]) == 130
    assert capsys.readouterr() == ("", "")
    assert [*os.listdir(cache_folder()), *Path(constants.HF_HUB_CACHE).rglob("*.incomplete")] == []
    assert main(["gpt2"]) == 0


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plans["HEAD", MODEL] = [lambda handler, data: handler.send_file(data, Content_Length=10**17)]
    assert main(["gpt2"]) == 1
    assert capsys.readouterr().err.startswith("pygpt: Not enough free disk space to download the file. ")


@pytest.mark.parametrize(
    ("answer", "code", "named"),
    [
        (status(401, X_Error_Code="RepoNotFound"), 2, "no such repository ... log in"),
        (status(403, X_Error_Code="GatedRepo"), 1, "gated ... log in"),
        (status(404, X_Error_Code="RevisionNotFound"), 2, "'main' ... branch"),
        (status(404, X_Error_Code="EntryNotFound"), 2, "config.json ... main"),
        (status(401), 1, "401 ... hf auth login ... HF_TOKEN"),
        (status(403, X_Error_Message="\x1b[2J no"), 1, "403 (\\x1b[2J no) ... log in"),
        (status(410), 1, "410 ... check the network"),
        (status(503), 1, "503 ... check the network"),
        (status(302, Location=CONFIG), 1, "Exceeded"),
        (status(200, ETag="x"), 1, "Hugging Face Hub"),
        (lambda handler, data: handler.wfile.write(b"nonsense\r\n\r\n"), 1, "check the network"),
    ],
)
def test_a_refusal(site: Site, capsys: pytest.CaptureFixture[str], answer: Answer, code: int, named: str) -> None:
    site.plans["HEAD", CONFIG] = [answer] * 99
    assert main(["gpt2"]) == code
    line = error_of(capsys)
    assert line.startswith("pygpt: error: openai-community/gpt2: ")
    assert re.search(gist(named), line)
    assert line.isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# The disk, and the command


@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_something_else_is_there(site: Site, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    {"file": os.mknod, "folder": os.mkdir, "link": lambda path: os.symlink("nowhere", path), "fifo": os.mkfifo}[kind]("a.bin")
    assert main(["gpt2", "-o", "a.bin"]) == 2
    assert "a.bin: exists already" in error_of(capsys, "a.bin")
    assert site.requests == []


def test_the_disk_fills_up(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(5000):
        assert main(["gpt2"]) == 1
    assert re.search("File too large: .*HF_HOME", error_of(capsys))
    site.files[MODEL] = safetensors("BF16")
    with full_disk(len(site.files[MODEL]) + 10):
        assert main(["gpt2", "--version", "3"]) == 1
    assert re.search("gpt2.bin: .*File too large", error_of(capsys))
    site.plans["GET", MODEL] = [status(410)]
    assert main(["gpt2", "-o", "x.bin"]) == main(["gpt2_124M", "-o", "y.bin"]) == 0  # complete files are not downloaded again
    capsys.readouterr()
    with full_disk(100):
        assert main(["gpt2_124M", "-o", "z.bin"]) == 1
    assert re.search("z.bin: .*File too large", error_of(capsys, *sorted(os.listdir())))
    monkeypatch.setenv("PYGPT_HOME", os.path.abspath("x.bin/cache"))
    assert main(["gpt2"]) == 1
    assert re.search("x.bin/cache/gpt2.bin: .*Not a directory", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "NAME; see --help"),
        ("gpt3", "'gpt3' ... (gpt2, gpt2-medium, "),
        ("gpt2 gpt2", "gpt2"),
        ("gpt2 --version 4", "4 ... 1 ... 3 ... 5"),
        ("gpt2 -o ''", "-o is ''"),
        ("gpt2 -o sub/", "-o is 'sub/'"),
        ("gpt2 -o absent/a.bin", "absent/a.bin: the folder "),
        ("https://host/a.bin", "https://host/a.bin: ... `pygpt"),
        ("me/model.bin", "'me/model.bin'"),
        ("../me", "'../me' is neither"),
        ("me/..", "'me/..' is neither"),
        ("me/a--b", "'me/a--b' is neither"),
        ("me/model@a/../b", "'me/model@a/../b'"),
        ("me/model@a --revision b", "'me/model@a@b'"),
        ("gpt2 --revision ''", "'gpt2@' is neither"),
        ("me/a+b", "Repo id must use alphanumeric chars"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: str, named: str) -> None:
    assert main(shlex.split(arguments)) == 2
    assert re.search(gist(named), error_of(capsys))


def test_a_file_of_that_name_wins() -> None:
    os.makedirs(cache_folder())
    for name in "gpt2", "me/model":
        Path(cached_model(name)).touch()
        Path(name).mkdir(parents=True)  # a folder of that name does not count
        assert find_model(name) == (cached_model(name), "given")
        Path(name).rmdir()
        Path(name).touch()
        assert find_model(name) == (name, "given")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    linux, mac = "/home/someone/.cache/pygpt", "/home/someone/Library/Caches/pygpt"
    for home, caches, platform, expected in [
        ("~/models", "/caches", "linux", "/home/someone/models"),
        ("", "", "linux", linux),
        ("", "/caches", "linux", "/caches/pygpt"),
        ("", "relative", "linux", linux),  # the specification says to ignore it
        ("", "/caches", "darwin", mac),
    ]:
        for name, value in ("PYGPT_HOME", home), ("XDG_CACHE_HOME", caches):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == expected
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(InputError, match=r"^~/Library/Caches/pygpt: .*PYGPT_HOME"):
        find_model("gpt2")


@pytest.mark.parametrize("lost", ["huggingface_hub", "huggingface_hub.file_download"])
def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub.file_download", None)
    monkeypatch.setitem(sys.modules, lost, None)
    assert main(["gpt2"]) == 1
    assert error_of(capsys).endswith(": python -m pip install huggingface_hub")


WITHOUT_HOME = "import pwd, sys; pwd.getpwuid = {}.__getitem__; from pygpt.__main__ import main; "


def test_as_a_process(site: Site, tmp_path: Path) -> None:
    """The process reads its settings from the environment: no home folder, a token. Other commands do not import the hub."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "PYGPT_HOME", "HF_HOME")}
    environment |= {"PYTHONPATH": str(Path(download.__file__).parents[2]), "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(code: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-W", "error", "-c", WITHOUT_HOME + code]
        done = execute(command, env=environment)
        assert os.listdir() == []
        return done

    def stderr_of(name: str, status: int) -> str:
        done = run(f"sys.exit(main(['download', {name!r}]))")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
        return done.stderr

    assert "set PYGPT_HOME" in stderr_of("gpt2", 2)
    environment["PYGPT_HOME"] = str(tmp_path / "cache")
    assert str(tmp_path / "cache" / "huggingface") in stderr_of("gpt2", 0)
    assert Path(cached_model("gpt2")).read_bytes() == BIN[3]
    assert {headers.get("authorization") for _, path, headers in site.requests if "/api/" not in path} == {"Bearer hf_x"}
    used = run("main(['-m', 'gpt2', '-n', '3', '1']); sys.exit('huggingface_hub' in sys.modules)")
    assert (used.returncode, len(used.stdout.split()), used.stderr) == (0, 2, "")
    environment["HF_HUB_ETAG_TIMEOUT"] = "soon"
    assert "does not accept a variable HF_...: invalid literal for int() with base 10: 'soon'" in stderr_of("gpt2-xl", 2)


def test_examples_of_the_help_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert EXAMPLES in capsys.readouterr().out
    assert all(name in EXAMPLES for name in MODELS)
    commands = re.findall(r"^  pygpt download (.*?)  ", EXAMPLES, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert is_downloadable(download.build_parser().parse_args(shlex.split(command)).model)


def test_a_relative_of_gpt2_stays_in_the_cache_of_the_hub(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A .bin file cannot describe the model, so it is used where it was fetched, whichever program fetched it."""
    tensors = hf.named(hf.weights(**hf.SHAPE))
    settings = {**hf.settings(**hf.SHAPE), "activation_function": "relu"}
    site.files[CONFIG] = json.dumps(settings).encode()
    header = json.dumps(hf.header_of(tensors)).encode()
    site.files[CONFIG.replace("config.json", "model.safetensors")] = hf.file_of(
        header, b"".join(data for _, _, data in tensors.values())
    )
    assert main(["gpt2"]) == 0
    assert "used in place" in capsys.readouterr().err
    with Network.load("gpt2") as model:
        assert model.config.activation == "relu"
