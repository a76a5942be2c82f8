"""Test the peers of pygpt bench: the NumPy peer computes pygpt's network, and every failure is one clear line.

The other peers need packages that a test run does not install. To check a new peer, compare its Peer.logits() with pygpt's."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make
from running import environment, run

from pygpt import GPT2
from pygpt.commands.bench import peers as bench_peers
from pygpt.formats.gguf import GGUFFile
from pygpt.hub.find import EMBEDDED_MODEL

TOKENS = [31373, 612, 13, 50256, 0]


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    with bench_peers.Peer("numpy", EMBEDDED_MODEL, 1) as opened:
        yield opened


@pytest.fixture
def small(tmp_path: Path) -> Path:
    make(tmp_path / "small.bin", L=2, NH=2, C=8, V=130, maxT=12, version=1)
    return tmp_path / "small.bin"


@pytest.mark.parametrize("count", [1, 2, len(TOKENS)])
def test_numpy_computes_the_same_network(peer: Any, count: int) -> None:
    with GPT2.load(EMBEDDED_MODEL, threads=1) as model:
        wanted = model.logits(TOKENS[:count])[-1]
    np.testing.assert_allclose(peer.logits(TOKENS[:count]), wanted, atol=1e-3)


@pytest.mark.parametrize("version", [1, 3, 5])
def test_numpy_reads_every_version(tmp_path: Path, version: int) -> None:
    path = tmp_path / "model.bin"
    make(path, L=2, NH=2, C=8, V=130, maxT=12, version=version)
    tokens = list(range(118, 130))
    with GPT2.load(path, threads=1) as model, bench_peers.Peer("numpy", path, 1) as peer:
        np.testing.assert_allclose(peer.logits(tokens), model.logits(tokens)[-1], atol=1e-4)


@pytest.mark.parametrize("target", ["q8.gguf", "q8.safetensors"])
def test_numpy_reads_quantised_models(tmp_path: Path, target: str) -> None:
    make(tmp_path / "model.bin", L=2, NH=2, C=32, V=130, maxT=12)
    path = tmp_path / target
    assert run("quantize", str(tmp_path / "model.bin"), str(path)).returncode == 0
    with GPT2.load(path, threads=1) as model, bench_peers.Peer("numpy", path, 1) as peer:
        wanted = model.logits([5, 129])[-1]  # whose activations are rounded to 8 bits
        np.testing.assert_allclose(peer.logits([5, 129]), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("formats", "found"),
    [
        ({"float32"}, ["numpy", "llama.cpp"]),
        ({"q8_0"}, ["llama.cpp-q8_0", "ctranslate2-int8"]),
        ({"q4_0", "bfloat16"}, ["numpy", "llama.cpp", "llama.cpp-q4_0"]),
    ],
)
def test_all_peers_are_those_of_the_same_formats(formats: set[str], found: list[str]) -> None:
    names = ["numpy", "llama.cpp", "llama.cpp-q8_0", "llama.cpp-q4_0", "ctranslate2-int8"]
    assert bench_peers.of_kind(names, formats) == found


def test_llama_cpp_gets_the_format_of_its_name(small: Path, tmp_path: Path) -> None:
    """Of the file's own precision without a format; the smallest model has rows of 8, which fill no block."""
    bench_peers.convert_to_gguf(str(small), str(tmp_path))
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert {kind.name for kind in file.formats.values()} == {"float32"}
    make(tmp_path / "model.bin", L=1, NH=1, C=32, V=70, maxT=4)
    bench_peers.convert_to_gguf(str(tmp_path / "model.bin"), str(tmp_path), "q4_0")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert (file.format.name, file.formats["wte"].name) == ("q4_0", "q8_0")


def test_seconds_and_memory_are_plausible(peer: Any) -> None:
    assert 0 < peer.prefill(16) < 60
    assert 0 < peer.decode(4, 8) < 60
    assert 10e6 < peer.peak_rss_bytes() < 10e9


def test_decode_does_not_count_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, prompts = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def run(tokens: list[int], start: int) -> None:
        clock.now += 1 if start else 1000
        if not start:
            prompts.append(tokens)

    shape: Any = SimpleNamespace(V=100, maxT=64)
    engine: Any = bench_peers.Engine(shape)
    engine._run = run
    assert engine.decode(7, 3) == 7
    assert engine.prefill(5) == 1000
    assert [len(tokens) for tokens in prompts] == [3, 3, 5, 5]  # one warm-up call of each kind before the timed call
    assert prompts[-1] == [13, 32, 51, 70, 89]
    engine.prefill(5)
    assert len(prompts) == 5


@pytest.mark.parametrize(("n", "depth"), [(5, 8), (1, 12), (0, 3), (3, 0), (-1, 3)])
def test_too_many_or_too_few_tokens_are_refused_and_the_peer_goes_on(small: Path, n: int, depth: int) -> None:
    with bench_peers.Peer("numpy", small, 1) as peer:
        with pytest.raises(RuntimeError, match=r"^peer numpy: ValueError: positions .* the model has 12$"):
            peer.decode(n, depth)
        with pytest.raises(RuntimeError, match=r"^peer numpy: ValueError: tokens must be 1 to 12 ids from 0 to 129$"):
            peer.logits([130])
        assert peer.decode(4, 8) > 0
        assert peer.prefill(12) > 0


def test_wrong_name() -> None:
    with pytest.raises(RuntimeError, match=r"^'nunpy'.*numpy, torch, .*ctranslate2-int8$"):
        bench_peers.Peer("nunpy", EMBEDDED_MODEL, 1)


def test_wrong_file(tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"^peer numpy: CheckpointError: .*bad\.bin: 8 bytes.*header[^\n]*$"):
        bench_peers.Peer("numpy", tmp_path / "bad.bin", 1)


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_peers.PEERS, "torch", ("numpy", "no_such_package"))
    assert "torch" not in bench_peers.available()
    with pytest.raises(RuntimeError, match=r"^peer torch: not installed: no_such_package$"):
        bench_peers.Peer("torch", EMBEDDED_MODEL, 1)


def test_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("print('chatter')\nimport no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^peer torch: cannot import no_such_package: [^\n]*$"):
        bench_peers.Peer("torch", EMBEDDED_MODEL, 1)


@pytest.mark.parametrize("when", ["at a call", "while loading"])
def test_child_that_dies(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    if when == "at a call":
        with bench_peers.Peer("numpy", small, 1) as peer:
            peer.process.kill()
            peer.process.join()
            with pytest.raises(RuntimeError, match=r"^peer numpy: its process died \(SIGKILL\)$"):
                peer.prefill(4)
        return
    (tmp_path / "torch.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^peer torch: its process died \(exit status 7\)$"):
        bench_peers.Peer("torch", small, 1)


def test_close_ends_the_child_and_may_be_called_twice(small: Path) -> None:
    peer = bench_peers.Peer("numpy", small, 1)
    peer.close()
    peer.close()
    assert peer.process.exitcode == 0
    with pytest.raises(RuntimeError, match=r"^peer numpy: closed before this call$"):
        peer.prefill(4)


def test_available_lists_installed_peers_without_imports() -> None:
    program = (
        "import json, sys; from pygpt.commands.bench.peers import available; names = available(); "
        "print(json.dumps([names, sorted(sys.modules)]))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    names, imported = json.loads(result.stdout)
    packages = {package for needed in bench_peers.PEERS.values() for package in needed}
    found = {package for package in packages if importlib.util.find_spec(package)}
    assert names == [name for name, needed in bench_peers.PEERS.items() if found.issuperset(needed)]
    assert "numpy" in names
    assert not packages.intersection(imported)


def test_every_peer_has_an_engine() -> None:
    assert list(bench_peers.ENGINES) == list(bench_peers.PEERS)
