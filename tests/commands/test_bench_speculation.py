"""Test pygpt bench --speculate: the figures agree with each other, and changed tokens and bad options are refused."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import make
from running import assert_refuses, run

from pygpt import GPT2, PyGPTError
from pygpt.commands.bench import main as bench
from pygpt.commands.bench import tests as speculation
from pygpt.hub.find import EMBEDDED_MODEL

Result = dict[str, Any]
QUICK = ("--limit-megabytes", "4", "-t", "1")


def results_of(*arguments: str) -> list[Result]:
    done = run("bench", *QUICK, *arguments, "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    found: list[Result] = json.loads(done.stdout)[1:]
    return found


def test_every_sampler_and_draft() -> None:
    given = ("--speculate", "4,auto", "--sampler", "greedy,sample,median", "--draft-model", "q4_0,lookup", "--temp", "0.8")
    found = results_of(*given, "-d", "8", "-b", "1,3", "-n", "50", "-r", "1")
    ways = [None, ("q4_0", 4), ("q4_0", "auto"), ("lookup", 4), ("lookup", "auto")]
    assert [(r["test"], r["by"]) for r in found] == [
        (f"tg50@d8{batch} {sampler}", "pygpt" if way is None else f"pygpt +{way[0]} {way[1]}")
        for batch in ("", "xb3")
        for sampler in ("greedy", "sample", "median")
        for way in ways
    ]
    for at, r in enumerate(found):
        plain, tokens = found[at - at % len(ways)], 150 if "xb3" in r["test"] else 50
        assert r["tokens_per_s"] == pytest.approx(tokens / r["seconds"])
        assert r["tokens_per_step"] == pytest.approx(tokens / (tokens - r["accepted"]))  # of one round
        assert 0 <= r["accepted"] <= r["drafted"]
        assert r["acceptance"] == (pytest.approx(r["accepted"] / r["drafted"]) if r["drafted"] else None)
        if r is plain:
            assert (r["speculation"], r["draft"], r["drafted"]) == (None, None, 0)
            assert "speed_up_over_plain" not in r
        else:
            assert r["speed_up_over_plain"] == pytest.approx(plain["seconds"] / r["seconds"])
        if r["by"] == "pygpt +q4_0 4":
            assert r["accepted"] > 0, "a draft of the same model is right in some places"


def test_every_thread_count_agrees() -> None:
    """Counts are of the rounds after the warm-up. How many guesses come from the text depends on times."""
    found = results_of("--speculate", "3", "-t", "1,2", "-d", "5", "-n", "20", "-r", "2", "--draft-model", "q8_0")
    assert [(r["threads"], r["speculation"], r["drafted"] > 0) for r in found] == [
        (threads, guesses, guesses is not None) for threads in (1, 2) for guesses in (None, 3)
    ]
    for r in found[1::2]:
        assert 0 < r["accepted"] < 2 * 20, "two rounds of 20 tokens, of which some were not guessed"
        assert r["tokens_per_step"] == pytest.approx(40 / (40 - r["accepted"]))
    assert "speed_up" in found[2]


def test_defaults_and_the_table(tmp_path: Path) -> None:
    """A quantised model has its own draft, and a model that is too short leaves the test out."""
    make(tmp_path / "small.bin", L=1, NH=1, C=32, V=90, maxT=24)
    assert run("quantize", "--format", "q4_0", str(tmp_path / "small.bin"), str(tmp_path / "q4.gguf")).returncode == 0
    given = ("bench", *QUICK, "--speculate", "-n", "4", "-d", "19,20", "-r", "1", "-m")
    for name, draft in ("small.bin", "q8_0"), ("q4.gguf", "lookup"):
        done = run(*given, str(tmp_path / name))
        assert re.fullmatch(r"pygpt: [^\n]* 24 tokens: tg4@d20\n", done.stderr)
        lines = [line.split(" | ")[:2] for line in done.stdout.splitlines()[-2:]]
        assert lines == [["| tg4@d19 greedy", "pygpt"], ["| tg4@d19 greedy", f"pygpt +{draft} auto"]]
        assert "| x plain | acceptance | tokens a step |" in done.stdout


def test_changed_tokens_are_an_error() -> None:
    with GPT2.load(EMBEDDED_MODEL, threads=1) as model:
        texts, expected = speculation.own_texts(model, 4, 2), list[Any]()
        plain = speculation.Completions(model, texts, 6, expected, {"sampler": "greedy"})
        assert plain.run() > 0
        assert [len(tokens) for tokens in expected] == [7, 7]
        expected[1][3] += 1
        with pytest.raises(PyGPTError, match=r"^speculation changed tokens of text 1: "):
            speculation.Completions(model, texts, 6, expected, {"sampler": "greedy", "speculation": 2}).run()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--speculate", "many"], "'many'"),
        (["--speculate", "4,65"], "speculation is 65"),
        (["--speculate", "--sampler", "best"], "'best' ... median, greedy, sample"),
        (["--speculate", "--temp", "hot"], "'hot'"),
        (["--speculate", "--temp", "-1"], "-1"),
        (["--speculate", "--draft-model", "missing.bin"], "missing.bin"),
        (["--speculate", "-p", "8"], "-p ... with --speculate"),
        (["--speculate", "-B", "8"], "-B ... with --speculate"),
        (["--speculate", "--train"], "--speculate ... with --train"),
        (["--sampler", "greedy"], "--sampler ... without --speculate"),
        (["--draft-model", "q8_0"], "--draft-model ... without --speculate"),
        (["--temp", "1"], "--temp ... without --speculate"),
        (["--seed", "1"], "--seed ... without --speculate"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], named: str) -> None:
    assert_refuses(bench.main, capsys, [*QUICK, "-m", EMBEDDED_MODEL, *arguments], named)
