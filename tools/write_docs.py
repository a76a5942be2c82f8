#!/usr/bin/env python3
"""Write the parts of the documentation that are generated from the code and from the measurements.

    python tools/write_docs.py          write them all

A generated part of a page lies between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. The parsers give `commands`, the
docstrings `python`, tools/benchmarks/ `speed` and `limits`, and the log `ways`. A test compares the pages with their sources.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != TOOLS), str(TOOLS)]

import chart  # noqa: E402

import pygpt  # noqa: E402
from pygpt.commands import COMMANDS  # noqa: E402
from pygpt.server import app, metrics, schema  # noqa: E402

# ------------------------------------------------------------------------------------------------ the commands


def commands() -> Iterator[str]:
    """Yield usage, description, options and examples of every command."""
    modules = {"": "complete", **{name: module for name, (module, _) in COMMANDS.items()}}
    for name, module in modules.items():
        yield from command(f"pygpt {name}".strip(), import_module(f"pygpt.commands.{module}").build_parser())


def command(name: str, parser: argparse.ArgumentParser, level: str = "##") -> Iterator[str]:
    """Yield one parser as Markdown."""
    yield f"{level} {name}"
    if parser.usage:
        yield f"```text\n{parser.usage}\n```"
    if parser.description:
        yield fenced(parser.description)
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    rows = [f"| {option(action)} | {cell(meaning(parser, action))} |" for action in actions if action.help != argparse.SUPPRESS]
    yield "\n".join(["| option | meaning |", "|---|---|", *rows])
    if parser.epilog:
        yield fenced(parser.epilog)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for task, subparser in action.choices.items():
                yield from command(f"{name} {task}", subparser, level + "#")


def fenced(text: str) -> str:
    """Return several lines as a text block, and one line as a paragraph."""
    text = inspect.cleandoc(text)
    return f"```text\n{text}\n```" if "\n" in text else text


def option(action: argparse.Action) -> str:
    """Return an option or argument with its values."""
    metavar = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    value = "" if action.nargs == 0 else " ".join(metavar) if isinstance(metavar, tuple) else metavar
    return cell(f"`{', '.join(action.option_strings)} {value}`".replace("` ", "`").replace(" `", "`"))


def meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of an option with its default."""
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


# ------------------------------------------------------------------------------------------------ the public names


def python() -> Iterator[str]:
    """Yield signature, docstring and members of every public name."""
    for name in sorted(set(pygpt.__all__) - {"__version__"}, key=str.lower):
        found = getattr(pygpt, name)
        yield f"### {name}"
        yield f"`{name}{signature(found)}`\n\n{inspect.cleandoc(found.__doc__ or '')}"
        if inspect.isclass(found) and not issubclass(found, Exception):
            yield "\n".join(member(*pair) for pair in members(found))


def members(found: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class and its bases, by name."""
    ours = [base for base in reversed(found.__mro__) if base.__module__.startswith("pygpt")]
    for name in dict.fromkeys(name for base in ours for name in vars(base)):
        value = inspect.getattr_static(found, name)
        if not name.startswith("_") and (inspect.getdoc(value) or "").strip() and not is_field(value):
            yield name, value


def is_field(value: object) -> bool:
    """Return whether a member is data that the docstring of the class describes: a field or a slot."""
    return type(value).__name__ in ("_tuplegetter", "member_descriptor") or isinstance(value, int | float | str | dict | None)


def member(name: str, value: Any) -> str:
    """Return a method or property as an item of a list."""
    inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    text = inspect.cleandoc(inspect.getdoc(inner) or "").replace("\n", "\n  ")
    return f"- `.{name}{signature(inner) if callable(inner) else ''}`\n\n  {text}\n"


def signature(found: Any) -> str:
    """Return the arguments without their types."""
    try:
        arguments = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return ""
    shown = [each.replace(annotation=inspect.Parameter.empty) for each in arguments if each.name not in ("self", "cls")]
    return str(inspect.Signature(shown)) if not issubclass_of_exception(found) else ""


def issubclass_of_exception(found: Any) -> bool:
    """Return whether this is an exception; its arguments are left out."""
    return inspect.isclass(found) and issubclass(found, Exception)


# ------------------------------------------------------------------------------------------------ the measurements


def measured(name: str) -> list[dict[str, Any]]:
    """Return a file of measurements."""
    found: list[dict[str, Any]] = json.loads((TOOLS / "benchmarks" / f"{name}.json").read_text())
    return found


def speed() -> Iterator[str]:
    """Yield the table of tokens a second of pygpt and its peers."""
    tests = chart.TESTS.split(",")
    block = chart.read_block(str(TOOLS / "benchmarks" / "float32.json"), tests)
    lines = [f"| program | {' | '.join(map(chart.title_of, tests))} |", f"|---|{'---:|' * len(tests)}"]
    for program in block.programs():
        rates = [chart.figure(block.tests[test][program]) for test in tests]
        lines.append(f"| {program} | {' | '.join(rates)} |")
    yield "\n".join(lines)
    yield f"Tokens a second: {block.title}, {block.machine}. Medians of alternating runs."


def limits() -> Iterator[str]:
    """Yield pygpt's share of the machine's limits."""
    lines = ["| weights | test | tokens a second | middle half | of the limit |", "|---|---|---:|---:|---:|"]
    for name in ("float32", "bfloat16"):
        for result in measured(name)[1:]:
            if result["by"] == "pygpt" and result["percent_of_limit"] is not None:
                low, high = map(chart.figure, result["tokens_per_s_middle_half"])
                rate, share = chart.figure(result["tokens_per_s"]), f"{result['percent_of_limit']:.0f}%"
                lines.append(f"| {name} | {chart.title_of(result['test'])} | {rate} | {low} to {high} | {share} |")
    yield "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the server


def paths() -> Iterator[str]:
    """The server's paths."""
    lines = ["| path | method | key | what it does |", "|---|---|---|---|"]
    for one in app.ENDPOINTS:
        about = (one.handler.__doc__ or "").partition("\n")[0]
        method, key = "GET" if one.fields is None else "POST", "yes" if one.key else ""
        lines.append(f"| `{one.path.replace(':path', '')}` | {method} | {key} | {about} |")
    yield "\n".join(lines)


def fields() -> Iterator[str]:
    """The fields of a completion."""
    yield "\n".join(
        ["| field | value |", "|---|---|", *(f"| `{name}` | {one['description']} |" for name, one in schema.COMPLETION.items())]
    )


def server_metrics() -> Iterator[str]:
    """The server's metrics."""
    kinds = {"gauge": metrics.GAUGES, "counter": metrics.COUNTERS, "histogram": metrics.HISTOGRAMS}
    lines = ["| metric | kind | meaning |", "|---|---|---|"]
    for kind, names in kinds.items():
        end = "_total" if kind == "counter" else ""
        lines += [f"| `pygpt:{name}{end}` | {kind} | {about} |" for name, about in names.items()]
    yield "\n".join(lines)


def ways() -> Iterator[str]:
    """Yield the ways to use two processors, from the newest table of the log that begins with `way`."""
    log = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in log[log.index("| way |") :].split("\n\n")[0].split("\n")[2:]]
    lines = ["| way | workers | a token, ms | speed-up | efficiency | over the serial program |", "|---|" + "---:|" * 5]
    for way, workers, *_, token, gain in rows:
        speedup = float(rows[1][-2]) / float(token)
        own = f"{speedup:.2f} | {speedup / int(workers):.2f}" if speedup >= 1 else " | "
        lines.append(f"| {way} | {workers} | {token} | {own} | {float(gain):,.0f} |")
    yield "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the pages

PARTS: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "README.md": {"speed": speed},
    "docs/course.md": {"ways": ways},
    "docs/explanation/performance.md": {"limits": limits},
    "docs/reference/commands.md": {"commands": commands},
    "docs/reference/python.md": {"python": python},
    "docs/reference/server.md": {"paths": paths, "fields": fields, "metrics": server_metrics},
}


def filled(page: str) -> str:
    """Return a page with new generated parts."""
    text = (ROOT / page).read_text()
    for name, part in PARTS[page].items():
        content = "\n\n".join(part())
        found = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text, count = found.subn(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)  # type: ignore[misc]
        assert count == 1, f"{page} has {count} parts {name}"
    return text


if __name__ == "__main__":
    for page in PARTS:
        (ROOT / page).write_text(filled(page))
