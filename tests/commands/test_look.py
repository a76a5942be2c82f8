"""Test pygpt look: the tables, the JSON, the pictures, and one-line errors."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make
from running import assert_refused, assert_refuses, run

from pygpt import GPT2, Tokenizer, loss_by_position
from pygpt.commands.look import main
from pygpt.hub.find import EMBEDDED_MODEL

TEXT = "My lord, the king is dead, and"


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "-o", "json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return json.loads(output.out)


def test_the_json_agrees_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    found, ids = result_of(capsys, TEXT, "-k", "3", "-t", "2"), Tokenizer().encode(TEXT)
    assert found.keys() == {"model", "threads", "tokens", "lens", "lead", "heads"}
    assert (found["model"], found["threads"]) == (EMBEDDED_MODEL, 2)
    with GPT2.load() as model:
        logits, losses, L, NH = model.logits(ids)[-1].astype(float), loss_by_position(model, ids), 6, 4
        patterns = model.activations(ids, "probs")["probs"]
    assert [token["id"] for token in found["tokens"]] == ids
    assert "".join(token["text"] for token in found["tokens"]) == TEXT
    assert b"".join(bytes.fromhex(token["bytes"]) for token in found["tokens"]) == TEXT.encode()
    assert [token["loss"] for token in found["tokens"]] == [None, *losses.tolist()]

    assert [row["layer"] for row in found["lens"]] == [None, *range(L)]
    best = np.argsort(-logits, kind="stable")[:3].tolist()
    assert [top["id"] for top in found["lens"][-1]["top"]] == best
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert [top["probability"] for top in found["lens"][-1]["top"]] == pytest.approx(probs[best], rel=1e-5)
    assert found["lens"][0]["top"][0]["id"] == ids[-1]  # wte is also the head: the embedding predicts its own token

    lead = found["lead"]
    assert (lead["token"], lead["against"]) == tuple(best[:2])
    assert lead["logits"] == pytest.approx(logits[best[0]] - logits[best[1]], abs=1e-5)
    assert (len(lead["heads"]), len(lead["heads"][0]), len(lead["mlps"])) == (L, NH, L)
    parts = lead["embedding"] + lead["rest"] + math.fsum(lead["mlps"]) + math.fsum(map(math.fsum, lead["heads"]))
    assert parts == pytest.approx(lead["logits"], abs=1e-4)

    assert [abs(row["adds"]) for row in found["heads"]] == sorted(np.abs(lead["heads"]).reshape(-1), reverse=True)[:3]
    for row in found["heads"]:
        assert row["adds"] == lead["heads"][row["layer"]][row["head"]]
        pattern = patterns[row["layer"], row["head"], -1]
        assert (row["attends"], row["attention"]) == (int(pattern.argmax()), float(pattern.max()))
        assert row["zeroed"] != 0


def test_the_text_fits_100_columns_and_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = "Shall I compare thee\nto a summer's day? Thou art 日本 " * 6
    found = result_of(capsys, text)
    assert main([text]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"{len(found['tokens'])} tokens, ")
    assert repr("\n") in output
    assert repr(b"\xa5") in output  # a part of a character
    for row in found["heads"]:
        line = next(line for line in lines if line.startswith(f"layer {row['layer']} head {row['head']} "))
        assert f"{row['adds']:+.2f}" in line
    assert f"{found['lead']['logits']:+.2f}" in output


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([f"{TEXT} $x^ $ 日本", "--plot", str(tmp_path / "new" / "folder")]) == 0
    assert capsys.readouterr().err == ""
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {f"{name}.{ending}" for name in ("lens", "heads", "attention") for ending in ("svg", "png")}


def test_small_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """More predictions and heads than there are; a text as long as the context."""
    make(tmp_path / "model.bin", L=1, NH=1, C=4, V=50257, maxT=4, seed=1)
    found = result_of(capsys, "a b c d", "-m", str(tmp_path / "model.bin"), "-k", "50")
    assert (len(found["heads"]), len(found["lens"][0]["top"])) == (1, 50)
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (tmp_path / "model.bin").rename(folder / "model.bin")
    assert main(["a b c d", "-m", str(folder / "model.bin")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert len(first) <= 100
    assert "/model.bin, " in first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["TEXT"]),
        ([""], ["empty"]),
        (["a"], ["1 token", "at least 2"]),
        (["a " * 300], ["301 tokens", "256"]),
        ([TEXT, "-o", "xml"], ["invalid choice: 'xml'", "text", "json"]),
        ([TEXT, "-k", "1"], ["'1'", "from 2 to 50"]),
        ([TEXT, "-m", "nowhere.bin"], ["nowhere.bin"]),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert_refuses(main, capsys, arguments, *words)


@pytest.mark.parametrize("folder", ["/dev/null/x", "/dev/null", ""])
def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    pytest.importorskip("matplotlib")
    assert_refuses(main, capsys, [TEXT, "--plot", folder], f"--plot is '{folder}'", "give a folder")


def test_the_process() -> None:
    assert run("look", TEXT, "-k", "2").returncode == 0
    assert run("look", TEXT, shell='"$@" | head -c 1').stdout == "9"
    assert_refused(run("look", TEXT, shell='"$@" >&-'), "stdout is closed", status=1)
