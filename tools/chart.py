"""Draw an SVG picture of the speed of pygpt and its peers, from measurements of `pygpt bench`.

    pygpt bench -m gpt2_124M.bin --against all -t 2 -o json > tools/benchmarks/float32.json
    python tools/chart.py tools/benchmarks/float32.json tools/benchmarks/bfloat16.json -o tools/benchmarks/speed.svg

Each FILE becomes a block, with a line for each program that ran any of --tests, the fastest first. Each test that any file has
becomes a column. Bars are medians at the file's highest number of threads. The dashed line is the machine's limit.

A file that `pygpt bench` did not print is refused in one line. The picture contains text as text and has no background. Its
colours can be read on white and on black. The same files give the same bytes on every machine, so a test can compare the
picture with its data. That is why bars are drawn without matplotlib, whose versions differ in every line."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

# Import this checkout's pygpt. tools/ comes last, because its names shadow modules of the standard library.
TOOLS = Path(__file__).resolve().parent
sys.path[:] = [str(TOOLS.parent), *(path for path in sys.path if Path(path or ".").resolve() != TOOLS), str(TOOLS)]

from pygpt import InputError, PyGPTError  # noqa: E402
from pygpt.commands.console import Parser, status_of  # noqa: E402
from pygpt.formats.files import atomic_file  # noqa: E402

TESTS = "pp512,tg64@d8,tg64@d512"
MODELS = {(12, 768): "GPT-2 124M", (24, 1024): "GPT-2 355M", (36, 1280): "GPT-2 774M", (48, 1600): "GPT-2 1558M"}  # by L, C
VALUES = {1: "float32", 3: "float32", 5: "bfloat16"}  # by a checkpoint's version
OURS = "pygpt"

# Every colour has a contrast of 3 or more with white and with black, the text's colour 4 or more.
TEXT, BAR, OUR_BAR, LIMIT = "#797979", "#8c8c8c", "#2f7fe0", "#d4691e"

# Sizes in pixels.
MARGIN, NAMES, GAP, VALUE = 12, 104, 22, 46  # around the picture; column of names; between columns; column of a value
WIDTH, LINE, BAR_HEIGHT, HEAD, FOOT = 820, 22, 13, 44, 22


class Block(NamedTuple):
    """One file: model and machine; for each test, the tokens a second of each program, and of the machine's limit."""

    title: str
    machine: str
    tests: dict[str, dict[str, float]]
    limits: dict[str, float]

    def programs(self) -> list[str]:
        """Return all programs, the fastest first: by the mean ratio of each to the fastest one, over the tests that it ran."""
        shares: dict[str, list[float]] = {}
        for rates in self.tests.values():
            for name, rate in rates.items():
                shares.setdefault(name, []).append(rate / max(rates.values()))
        return sorted(shares, key=lambda name: (-sum(shares[name]) / len(shares[name]), name))


# ------------------------------------------------------------------------------------------------ the measurements


def read_block(path: str, wanted: Sequence[str]) -> Block:
    """Read a file of `pygpt bench`. Raises InputError for any other file, and for a file without any of the tests."""
    try:
        objects = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(objects, list) or not all(isinstance(found, dict) and "test" in found for found in objects):
        raise InputError(f"{path}: not a list of tests, as pygpt bench -o json prints it")
    if not objects or objects[0]["test"] != "ceilings":
        raise InputError(f"{path}: does not begin with the machine's ceilings, as the output of pygpt bench -o json does")
    machine, *results = objects
    found = [result for result in results if result["test"] in wanted]
    if not found:
        have = ", ".join(dict.fromkeys(str(result["test"]) for result in results)) or "none"
        raise InputError(f"{path}: the tests {', '.join(wanted)} are missing: it has {have}; choose tests with --tests")
    try:
        return block_of(machine, found, wanted)
    except KeyError as error:
        raise InputError(f"{path}: not an output of pygpt bench: {error} is missing, or its value is unknown") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not an output of pygpt bench: {error}") from None


def block_of(machine: dict[str, Any], results: list[dict[str, Any]], wanted: Sequence[str]) -> Block:
    """Return the block for a machine's object and the objects of its tests. Raises KeyError, TypeError, ValueError."""
    threads = max(result["threads"] for result in results)
    tests: dict[str, dict[str, float]] = {test: {} for test in wanted}
    limits = {}
    for result in results:
        test, name = result["test"], printable(result["by"])
        if result["threads"] != threads:
            continue
        if name in tests[test]:
            raise ValueError(f"{name} has {test} with {threads} threads twice")
        tests[test][name] = positive(result["tokens_per_s"])
        if result["percent_of_limit"] is not None:
            limits[test] = tests[test][name] / positive(result["percent_of_limit"]) * 100
    L, C, version = (machine["model"][key] for key in ("L", "C", "version"))
    title = f"{MODELS.get((L, C), f'L {L}, C {C}')} in {VALUES[version]}, {threads} thread{'s' * (threads != 1)}"
    where = f"{printable(machine['cpu'])}, {printable(machine['isa'])}"
    return Block(printable(title), where, {test: found for test, found in tests.items() if found}, limits)


def positive(value: Any) -> float:
    """Return a number that can be drawn. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r:.40} is not a positive number")
    return float(value)


def printable(value: Any) -> str:
    """Return text that can be drawn. Raises ValueError."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 80:
        raise ValueError(f"{value!r:.40} is not a short line of text")
    return value


# ------------------------------------------------------------------------------------------------ the picture


def draw(blocks: Sequence[Block], wanted: Sequence[str]) -> str:
    """Return the picture's SVG, with columns in the order of `wanted`."""
    lines: list[str] = []
    y = MARGIN
    tests = [test for test in wanted if any(test in block.tests for block in blocks)]
    for block in blocks:
        lines += draw_block(block, tests, y)
        y += HEAD + LINE * len(block.programs()) + FOOT
    machines = "; ".join(dict.fromkeys(block.machine for block in blocks))
    lines.append(text(MARGIN, y + 10, f"Tokens a second, medians: more is better. {machines}", size=11))
    height = y + 10 + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    title = "<title>Tokens a second of pygpt and its peers, and the machine's limits</title>"
    return "\n".join([head, title, *lines, "</svg>"]) + "\n"


def draw_block(block: Block, tests: Sequence[str], top: int) -> Iterator[str]:
    """Yield a block: its title, names and columns. A column has the same place in all blocks."""
    names = block.programs()
    yield text(MARGIN, top + 12, block.title, weight="bold", size=13)
    for i, name in enumerate(names):
        colour, weight = (OUR_BAR, "bold") if name == OURS else (TEXT, "normal")
        y = top + HEAD + LINE * i + BAR_HEIGHT - 2
        yield text(MARGIN + NAMES - 8, y, name, anchor="end", colour=colour, weight=weight)
    column = (WIDTH - 2 * MARGIN - NAMES - GAP * (len(tests) - 1)) / len(tests)
    for i, test in enumerate(tests):
        if test in block.tests:
            left = MARGIN + NAMES + i * (column + GAP)
            yield text(left, top + 34, title_of(test))
            yield from draw_column(names, block.tests[test], block.limits.get(test), left, top + HEAD, column)


def draw_column(
    names: Sequence[str], rates: dict[str, float], limit: float | None, left: float, top: int, width: float
) -> Iterator[str]:
    """Yield a test: a bar and a number for each program that ran it, and the limit as a line across the bars."""
    scale = (width - VALUE) / max([limit or 0, *rates.values()])
    for i, name in enumerate(names):
        if name in rates:
            y = top + LINE * i
            colour, weight = (OUR_BAR, "bold") if name == OURS else (BAR, "normal")
            length = rates[name] * scale
            yield f'<rect x="{left:.1f}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{colour}"/>'
            yield text(left + width, y + BAR_HEIGHT - 2, figure(rates[name]), anchor="end", weight=weight)
    if limit is not None:
        x, bottom = left + limit * scale, top + LINE * len(names)
        dashes = f'stroke="{LIMIT}" stroke-width="1.5" stroke-dasharray="4 3"'
        yield f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom - 4}" {dashes}/>'
        yield text(x + 2, bottom + 9, f"limit {figure(limit)}", anchor="end", colour=LIMIT, size=11)


def title_of(test: str) -> str:
    """Return a test's name in words."""
    if found := re.fullmatch(r"pp(\d+)", test):
        return f"prefill, {found[1]} tokens"
    if found := re.fullmatch(r"tg\d+@d(\d+)(?:xb(\d+))?", test):
        return f"decode after {found[1]} tokens" + (f", {found[2]} together" if found[2] else "")
    return test


def figure(rate: float) -> str:
    """Return a rate with three significant figures."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:#.3g}"


def text(
    x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal", colour: str = TEXT, size: int = 12
) -> str:
    """Return a line of text as SVG."""
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


# ------------------------------------------------------------------------------------------------ the command line


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = Parser(
        prog="chart",
        usage="python tools/chart.py [options] FILE [FILE ...]",
        description=__doc__,
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="the output of pygpt bench -o json")
    add("-o", "--output", metavar="FILE.svg", required=True, help="the picture")
    add("--tests", default=TESTS, help=f"the columns, by their names in pygpt bench (default {TESTS})")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; return the exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def run(options: argparse.Namespace) -> None:
    """Read all files, then write the picture."""
    if not options.output.endswith(".svg"):
        raise InputError(f"-o is {options.output!r}: the picture is SVG, so its name must end in .svg")
    wanted = list(dict.fromkeys(filter(None, options.tests.split(","))))
    if not wanted:
        raise InputError(f"--tests is {options.tests!r}: it must name tests, as in {TESTS}")
    picture = draw([read_block(path, wanted) for path in options.files], wanted)
    try:
        with atomic_file(options.output) as file:
            file.write(picture.encode())
    except OSError as error:
        raise PyGPTError(f"{options.output}: cannot write the picture: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
