"""Test tools/chart.py: bars have the measured lengths, the committed picture shows the committed data, and data that are not
measurements are refused in one line."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, assert_one_line_error, environment, execute, run

TOOLS = ROOT / "tools"
SVG = "{http://www.w3.org/2000/svg}"
OURS, OTHERS = "#2f7fe0", "#8c8c8c"
Row = dict[str, Any]


def chart(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", str(TOOLS / "chart.py"), *map(str, arguments)]
    return execute(command, env=environment(), cwd=ROOT)


def machine(version: int = 3, **changes: Any) -> Row:
    model = {"L": 12, "NH": 12, "C": 768, "V": 50257, "maxT": 1024, "version": version}
    return {"test": "ceilings", "cpu": "2 x <CPU> & Co", "isa": "avx2", "model": model} | changes


def row(test: str, by: str, rate: float, limit: float | None = None, threads: int = 2) -> Row:
    return {"test": test, "by": by, "threads": threads, "tokens_per_s": rate, "percent_of_limit": limit}


def drawn(folder: Path, *files: list[Row], tests: str = "") -> ElementTree.Element:
    paths = [folder / f"{i}.json" for i in range(len(files))]
    for path, objects in zip(paths, files, strict=True):
        path.write_text(json.dumps(objects))
    out = folder / "out.svg"
    done = chart(*paths, "-o", out, *(["--tests", tests] if tests else []))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return ElementTree.fromstring(out.read_bytes())


def texts(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def bars(picture: ElementTree.Element) -> list[tuple[float, float, float, str]]:
    """Return (x, y, width, colour) of each bar."""
    found = picture.iter(f"{SVG}rect")
    return [(float(bar.attrib["x"]), float(bar.attrib["y"]), float(bar.attrib["width"]), bar.attrib["fill"]) for bar in found]


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def test_the_committed_picture_is_the_committed_data(tmp_path: Path) -> None:
    names = ["float32.json", "bfloat16.json"]
    done = chart(*(TOOLS / "benchmarks" / name for name in names), "-o", tmp_path / "speed.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "speed.svg").read_bytes() == (TOOLS / "benchmarks" / "speed.svg").read_bytes()
    command = " ".join(f"tools/benchmarks/{name}" for name in names) + " -o tools/benchmarks/speed.svg"
    assert f"python tools/chart.py {command}" in (TOOLS / "chart.py").read_text()
    assert f"python tools/chart.py {command}" in (TOOLS.parent / "docs" / "benchmarks.md").read_text()


def test_bars_are_as_long_as_rates(tmp_path: Path) -> None:
    objects = [
        machine(),
        row("pp512", "peer <1>", 300),
        row("pp512", "pygpt", 100, limit=25),
        row("pp512", "pygpt", 77, limit=25, threads=1),  # not at the highest number of threads
        row("tg64@d8", "pygpt", 40),
        row("tg64@d8xb8", "pygpt", 1e6),  # not requested
    ]
    picture = drawn(tmp_path, objects)
    by_length = sorted(bars(picture), key=lambda bar: bar[2])
    (x1, y1, hundred, ours), (x2, y2, third, other), (x3, y3, whole, again) = by_length
    assert (ours, other, again) == (OURS, OTHERS, OURS)
    assert third == pytest.approx(3 * hundred, abs=0.2)
    [limit] = picture.iter(f"{SVG}line")
    assert float(limit.attrib["x1"]) == float(limit.attrib["x2"])
    assert float(limit.attrib["x1"]) - x1 == pytest.approx(4 * hundred, abs=0.4)
    assert x1 == x2 != x3
    assert y2 < y1 == y3  # the program with the best rates on average comes first
    shown = texts(picture)
    assert shown[0] == "GPT-2 124M in float32, 2 threads"
    assert shown[1:3] == ["peer <1>", "pygpt"]
    assert {"prefill, 512 tokens", "decode after 8 tokens", "300", "100", "40.0", "limit 400"} <= set(shown)
    assert shown[-1].endswith("2 x <CPU> & Co, avx2")
    assert len(by_length) == 3
    assert whole > 4 * hundred - 0.4  # a column without a limit is as wide as its best


def test_files_share_their_columns(tmp_path: Path) -> None:
    whole = [machine(), *(row(test, "pygpt", 10) for test in ("pp512", "tg64@d8", "tg64@d512"))]
    part = [
        machine(5, model={"L": 2, "C": 8, "version": 5}),
        row("tg64@d8", "a", 20, threads=1),
        row("tg64@d512", "b", 5, threads=1),
    ]
    picture = drawn(tmp_path, part, whole)
    places = {round(x) for x, _, _, _ in bars(picture)}
    assert len(places) == 3
    assert [text for text in texts(picture) if " in " in text] == [
        "L 2, C 8 in bfloat16, 1 thread",
        "GPT-2 124M in float32, 2 threads",
    ]
    assert texts(picture).count("prefill, 512 tokens") == 1


def test_other_tests_can_be_named(tmp_path: Path) -> None:
    objects = [machine(), row("process", "pygpt", 7.123), row("tg64@d8xb8", "pygpt", 12345)]
    shown = texts(drawn(tmp_path, objects, tests="tg64@d8xb8,process,pp9"))
    assert {"process", "decode after 8 tokens, 8 together", "7.12", "12,345"} <= set(shown)


def test_output_of_bench_can_be_drawn(tmp_path: Path) -> None:
    small = ["-p", "8", "-n", "2", "-d", "4", "-b", "1", "-t", "1", "-r", "1", "--limit-megabytes", "8"]
    done = run("bench", *small, "--no-process", "--no-memory", "--against", "numpy", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "a.json").write_text(done.stdout)
    done = chart(tmp_path / "a.json", "-o", tmp_path / "a.svg", "--tests", "pp8,tg2@d4")
    assert (done.returncode, done.stderr) == (0, "")
    picture = ElementTree.fromstring((tmp_path / "a.svg").read_bytes())
    assert {"pygpt", "numpy", "prefill, 8 tokens", "decode after 4 tokens"} <= set(texts(picture))
    assert len(bars(picture)) == 4


def test_it_can_be_read_on_white_and_on_black() -> None:
    """WCAG 2 requires a contrast of 3 for shapes and large text. GitHub's dark background is used for black."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    picture = ElementTree.parse(TOOLS / "benchmarks" / "speed.svg").getroot()
    colours = {value for element in picture.iter() for name, value in element.attrib.items() if name in ("fill", "stroke")}
    assert len(colours) == 4
    for colour in colours:
        for ground in "#ffffff", "#0d1117":
            light, dark = sorted([luminance(colour), luminance(ground)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, ground)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


NOT_PRINTED = "... pygpt bench: "


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON: "),
        (b"\xff[]", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b"{}", "... pygpt bench -o json"),
        (b"[1]", "not a list"),
        (b"[]", "... ceilings"),
        ([row("pp512", "pygpt", 1)], "... ceilings"),
        ([machine()], "... pp512, tg64@d8, tg64@d512 ... --tests"),
        ([machine(), row("pp64", "pygpt", 1)], "... pp512, tg64@d8, tg64@d512 ... pp64;"),
        ([machine(), {"test": "pp512"}], NOT_PRINTED + "'threads' is missing"),
        ([machine(), row("pp512", "pygpt", 0)], NOT_PRINTED + "0 "),
        ([machine(), row("pp512", "pygpt", float("nan"))], NOT_PRINTED + "nan "),
        ([machine(), row("pp512", "pygpt", True)], NOT_PRINTED + "True "),
        ([machine(), row("pp512", "pygpt", 1, limit=-3)], NOT_PRINTED + "-3 "),
        ([machine(), row("pp512", "p\x00", 1)], NOT_PRINTED + "'p\\x00' "),
        ([machine(), row("pp512", "", 1)], NOT_PRINTED + "'' "),
        ([machine(), row("pp512", "p", 1), row("pp512", "p", 2)], NOT_PRINTED + "p ... pp512 ... 2 threads"),
        ([machine(version=9), row("pp512", "p", 1)], NOT_PRINTED + "9 "),
        ([machine(model=[]), row("pp512", "p", 1)], NOT_PRINTED),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path: Path, content: bytes | list[Row], reason: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    done = chart(path, "-o", tmp_path / "out.svg")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line_error(done.stderr, f"{path}: {reason}")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ([], 2, "FILE, -o/--output"),
        (["absent.json", "-o", "a.svg"], 2, r"absent\.json: .*No such file"),
        (["a.json", "-o", "a.png"], 2, r"-o is 'a\.png'.*\.svg"),
        (["a.json", "-o", "a.svg", "--tests", ","], 2, r"--tests is ','.*pp512,tg64@d8"),
        (["tools/benchmarks/float32.json", "-o", "absent/a.svg"], 1, r"absent/a\.svg: .*No such"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], status: int, reason: str) -> None:
    done = chart(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert re.search(rf"^pygpt: error: .*{reason}", done.stderr)
