"""`pygpt bench --serve`: its requests are a function of the seed, and its figures agree with the server's own counts."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from running import assert_refuses
from serving import MAXT, Live, live, tiny

from pygpt.commands.bench import load, main

SMALL = ["--prompt", "10", "--new", "6", "--context", str(MAXT), "-n", "12"]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tiny(tmp_path_factory.mktemp("bench")), keys=["k"]) as running:
        yield running


def url(at: Live) -> str:
    return f"http://127.0.0.1:{at.address[1]}"


def test_figures(at: Live, capsys: pytest.CaptureFixture[str]) -> None:
    before = at.ask("GET", "/metrics", X_Api_Key="k").body
    assert b"generation_tokens_total" in before
    arguments = ["--serve", url(at), "--key", "k", *SMALL, "--clients", "1,4", "--long", "50", "--shared", "4", "--check"]
    assert main.main([*arguments, "-o", "json"]) == 0
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [found["clients"] for found in results] == [1, 4]
    options = load.build_parser().parse_args(arguments)
    for found in results:
        assert found["goodput"] is None
        asked = load.requests_of(options, found["clients"])
        assert asked == load.requests_of(options, found["clients"])
        assert len({tuple(body["prompt"][:4]) for body in asked}) == 1
        assert all(len(body["prompt"]) + body["max_tokens"] <= MAXT for body in asked)
        assert (found["requests"], found["failed"], found["equal_to_alone"]) == (12, 0, 12)
        tokens = found["tokens_per_s"] * found["seconds"]
        assert 12 <= tokens <= sum(body["max_tokens"] for body in asked) + 0.5  # a chunk may hold two tokens
        for name in load.TIMES:
            assert 0 <= found[name][0] <= found[name][1] <= found[name][2]


def test_random_arrivals_and_a_table(at: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--serve", url(at), "--key=k", *SMALL, "--rate", "200"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert len(head.split("|")) == len(row.split("|"))
    assert row.startswith("| 200/s | ")


def test_goodput_counts_requests_within_all_limits(at: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for limits, share in (("ttft:1e9,itl:1e9,tpot:1e9", 1), ("tpot:1e9,ttft:1e-9", 0)):
        arguments = ["--serve", url(at), "--key=k", *SMALL, "--clients", "2", "-o", "json", "--goodput", limits]
        assert main.main(arguments) == 0
        [found] = json.loads(capsys.readouterr().out)
        assert found["goodput"] == pytest.approx(share * 12 / found["seconds"])


def test_failures_are_counted(at: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says how many requests failed, and why one of them did. If all fail, it ends with an error."""
    long = ["--context", str(MAXT + 30), "--prompt", str(MAXT - 5), "--new", "6"]
    assert main.main(["--serve", url(at), "--key=k", *SMALL, *long, "--clients", "2", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert 0 < json.loads(out)[0]["failed"] < 12
    assert (err.count("\n"), "of 12 requests failed, such as with 'the prompt has" in err) == (1, True)
    assert_refuses(main.main, capsys, ["--serve", url(at), *SMALL], "12 of 12", "the API key is missing", status=1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--serve", "https://a.example"], "https://a.example"),
        (["--serve", "8000"], "8000"),
        (["--serve", "http://127.0.0.1", "--clients", "1,x"], "--clients"),
        (["--serve", "http://127.0.0.1", "--rate", "-1"], "--rate"),
        (["--serve", "http://127.0.0.1", "--goodput", "ttfb:5"], "ttfb:5"),
        (["--serve", "http://127.0.0.1", "--goodput", "itl:fast"], "itl:fast"),
        (["--serve", "http://127.0.0.1", "--goodput", "itl:0"], "itl:0"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert_refuses(main.main, capsys, arguments, named)


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--rate", "50", "-n", "2"]):
        assert_refuses(main.main, capsys, ["--serve", "http://127.0.0.1:9", *more], "cannot reach", status=1)
