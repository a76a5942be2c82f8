#!/usr/bin/env python3
"""Draw the documentation's pictures: docs/pictures/rooms.svg, step.svg, token.svg, schedule.svg, speculation.svg, load.svg.

    python tools/pictures.py                              draw all pictures
    python tools/pictures.py --record gpt2_124M.bin       first record a step of this model in tools/benchmarks/step.json

rooms   the imports between the parts of pygpt/, read from the import statements
step    one step of the network on two workers, from a recorded trace
token   the way of a token through the program
schedule  requests in one engine, step by step
speculation   guesses of a draft, and the step that checks them
load    clients of a server: tokens a second, and times between tokens, from tools/benchmarks/server.json (measure_server.py)

All colours are readable on white and on black. The same sources give the same bytes, so a test can compare them."""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != TOOLS), str(TOOLS)]

from chart import LIMIT, MODELS, OUR_BAR, TEXT, text  # noqa: E402

import pygpt  # noqa: E402

FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
WIDTH, MARGIN = 820, 12
GREEN = "#3a9a5b"
STEP = TOOLS / "benchmarks" / "step.json"


def svg(height: float, title: str, lines: Sequence[str]) -> str:
    """Return a whole picture."""
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {FONT}>'
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{TEXT}"/></marker></defs>'
    )
    return "\n".join([head, f"<title>{title}</title>", arrow, *lines, "</svg>"]) + "\n"


def rect(x: float, y: float, width: float, height: float, colour: str, *, filled: bool = True) -> str:
    """Return a bar, or with filled=False the outline of a box."""
    style = f'fill="{colour}"' if filled else f'fill="{colour}" fill-opacity="0.12" stroke="{colour}" rx="4"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" {style}/>'


def path(points: Sequence[tuple[float, float]], *, arrow: bool = True, dashes: str = "") -> str:
    """Return a line through points."""
    style = f'fill="none" stroke="{TEXT}"' + (' marker-end="url(#arrow)"' if arrow else "")
    style += f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" {style}/>'


# ------------------------------------------------------------------------------------------------ rooms

# Small modules that share a room. Every other folder or module is one room.
TOGETHER = {
    "_kernels": "kernels",
    "_backward": "kernels",
    "_reference": "kernels",
    "_signals": "kernels",
    "errors": "errors, config",
    "config": "errors, config",
}
MEANING = {
    "__main__": "dispatches to a command",
    "commands": "one file a subcommand; reports",
    "server": "the API over HTTP, and a page",
    "inspection": "lens, attribution, patching",
    "training": "parameters, options, data, trainer, state",
    "reference": "the serial program, for comparison",
    "cluster": "answers rows on any cluster",
    "model": "GPT2 joins network and engine",
    "generation": "the engine: requests in, tokens out",
    "activations": "what a step computes, and its edits",
    "network": "step(rows); key-value caches",
    "hub": "finds the model to use",
    "formats": "reads and writes every file",
    "pool": "a fixed set of threads",
    "cpus": "how many threads fit",
    "ceilings": "the machine's limits, measured",
    "tokenizer": "text to ids and back",
    "kernels": "Cython and C without the GIL (csrc/)",
    "errors, config": "exceptions; the table of tensors",
}


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports, without imports for types."""
    found: dict[str, set[str]] = {}
    for file in sorted([*(ROOT / "pygpt").rglob("*.py"), *(ROOT / "pygpt").glob("*.pyx")]):
        module = file.relative_to(ROOT).with_suffix("").parts
        if module == ("pygpt", "__init__"):
            continue  # the table of public names
        room = room_of(module)
        found.setdefault(room, set())
        for name in imported(file, module):
            if name.startswith("pygpt.") and (target := room_of(tuple(name.split(".")))) != room:
                found[room].add(target)
    return {room: {target for target in targets if target in found} for room, targets in found.items()}


def room_of(module: tuple[str, ...]) -> str:
    """Return the room of a module, or of a name that the package exports."""
    name = pygpt._HOME.get(module[1], module[1]).split(".")[0]
    return TOGETHER.get(name, name)


def imported(file: Path, module: tuple[str, ...]) -> Iterator[str]:
    """Yield the full names that a file imports from the package at run time."""
    if file.suffix == ".pyx":
        for name in re.findall(r"^from \.(\w+) c?import", file.read_text(), re.MULTILINE):
            yield f"pygpt.{name}"
        return
    tree = ast.parse(file.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {inner for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            base = [*module[: -node.level], node.module or ""] if node.level else [node.module or ""]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def stair(rooms: dict[str, set[str]]) -> list[str]:
    """Return the rooms in an order in which a room comes before its imports. A circle is cut at its lowest room."""
    order: list[str] = []
    left = dict(rooms)
    while left:
        users = {room: sum(room in targets for targets in left.values()) for room in left}
        order.append(min(left, key=lambda room: (users[room], room not in ("__main__", "commands"), -len(left[room]), room)))
        del left[order[-1]]
    return order


def draw_rooms() -> str:
    """Draw the stair. Each room has a line down; a dot on it means that the room imports the room to the right."""
    rooms = imports()
    order = stair(rooms)
    rise, high, wide = 40, 32, 236
    run = (WIDTH - 2 * MARGIN - wide) / (len(order) - 1)
    places = {room: (MARGIN + i * run, MARGIN + i * rise) for i, room in enumerate(order)}
    lines = []
    for room, (x, y) in places.items():
        users = [user for user in order[: order.index(room)] if room in rooms[user]]
        for user in users:
            lines.append(f'<circle cx="{places[user][0] + 10:.1f}" cy="{y + high / 2:.1f}" r="3" fill="{OUR_BAR}"/>')
        if users:
            first = min(places[user][0] for user in users) + 10
            lines.append(path([(first, y + high / 2), (x, y + high / 2)]))
        if rooms[room]:
            lowest = max(places[target][1] for target in rooms[room]) + high / 2
            lines.append(path([(x + 10, y + high), (x + 10, lowest)], arrow=False))
        lines.append(rect(x, y, wide, high, OUR_BAR if (ROOT / "pygpt" / room).is_dir() else TEXT, filled=False))
        lines.append(text(x + 8, y + 13, room + "/" * (ROOT / "pygpt" / room).is_dir(), weight="bold"))
        lines.append(text(x + 8, y + 27, MEANING[room], size=11))
    height = 2 * MARGIN + rise * len(order) + 14
    lines.append(
        text(MARGIN, height - 8, "A dot: the room above imports the room to the right. Blue boxes are folders.", size=11)
    )
    return svg(height, "The rooms of pygpt and what they import", lines)


# ------------------------------------------------------------------------------------------------ step

KINDS = {"qkv": OUR_BAR, "attproj": OUR_BAR, "fc": OUR_BAR, "fcproj": OUR_BAR, "logits": OUR_BAR, "attention": LIMIT}
LAYER = 5  # of the enlarged part


def record(model_file: str, steps: int = 60) -> dict[str, Any]:
    """Record decode steps of one sequence on two workers; keep the shortest. Times are in microseconds from its beginning."""
    trace, best = pygpt.Trace(2, 4096), None
    with pygpt.GPT2.load(model_file, threads=2) as model:
        cache = model.new_cache()
        model.step([(token, cache, False) for token in range(64)])
        model.record(trace)
        for _ in range(steps):
            trace.clear()
            model.step([(50256, cache, True)])
            cache.truncate(64)
            workers = [trace.events(ith) for ith in range(2)]
            begin = min(events[0][2] for events in workers)
            length = max(events[-1][4] for events in workers) - begin
            if best is None or length < best[0]:
                best = length, [[[name, layer, *((t - begin) / 1e3 for t in ns)] for name, layer, *ns in w] for w in workers]
        config = model.config
    assert best is not None
    name = f"{MODELS.get((config.L, config.C), f'L {config.L}, C {config.C}')}, one token after 64, two workers"
    return {"title": name, "isa": pygpt.cpu_info()["isa"], "workers": best[1]}


def draw_step() -> str:
    """Draw the whole step, and one layer enlarged."""
    step = json.loads(STEP.read_text())
    workers = step["workers"]
    end = max(events[-1][4] for events in workers)
    layer = [[event for event in events if event[1] == LAYER and event[0] != "encoder"] for events in workers]
    first, last = min(events[0][2] for events in layer), max(events[-1][4] for events in layer)
    phases = len(workers[0])
    lines = [
        text(MARGIN, 24, f"One step: {phases} phases, {end / 1000:.1f} ms ({step['title']}, {step['isa']})", weight="bold")
    ]
    lines += strips(workers, 36, 0, end, 22)
    left, right = place(first, 0, end), place(last, 0, end)
    lines += [path([(left, 88), (place(0, 0, 1), 112)], arrow=False), path([(right, 88), (place(1, 0, 1), 112)], arrow=False)]
    lines.append(text(MARGIN, 134, f"Layer {LAYER} of this step: {last - first:.0f} us", weight="bold"))
    lines += strips(layer, 146, first, last, 34, names=True)
    for event in layer[0]:
        if event[4] > event[3]:
            x = place(event[4], first, last)
            lines.append(path([(x, 140), (x, 226)], arrow=False, dashes="3 3"))
    x = MARGIN
    for colour, meaning in (
        (OUR_BAR, "matrix products: each worker has its own outputs"),
        (LIMIT, "attention: heads and rows"),
        (GREEN, "other kernels"),
    ):
        lines += [rect(x, 240, 12, 12, colour), text(x + 18, 250, meaning, size=11)]
        x += 30 + 6.1 * len(meaning)
    lines.append(text(x, 250, "dashed: barrier, gap: waiting", size=11))
    return svg(264, "One step of the network on two workers", lines)


NAMES_WIDTH = 66


def place(t: float, first: float, last: float) -> float:
    """Return the x of a time between the left and the right edge."""
    return MARGIN + NAMES_WIDTH + (WIDTH - 2 * MARGIN - NAMES_WIDTH) * (t - first) / (last - first)


def strips(workers: Any, top: float, first: float, last: float, high: float, *, names: bool = False) -> Iterator[str]:
    """Yield a strip for each worker, with a bar for each phase that it computes."""
    for ith, events in enumerate(workers):
        y = top + ith * (high + 6)
        yield text(MARGIN, y + high / 2 + 4, f"worker {ith}", size=11)
        for name, _, begin, stop, _ in events:
            x, width = place(begin, first, last), place(stop, first, last) - place(begin, first, last)
            yield rect(x, y, max(width - (0.6 if names else 0.1), 0.3), high, KINDS.get(name, GREEN))
            if names and width > 6.5 * len(name) + 4:
                yield text(x + width / 2, y + high / 2 + 4, name, anchor="middle", colour="#ffffff", size=11)


# ------------------------------------------------------------------------------------------------ token

# The boxes: x, y, width, title, note. The loop runs clockwise.
BOXES = (
    (12, 20, 150, "Tokenizer", "text to ids"),
    (206, 20, 170, "engine", "requests join and leave"),
    (420, 20, 180, "caches", "keep keys and values"),
    (644, 20, 164, "step(rows)", "checks all rows"),
    (644, 130, 164, "pool", "wakes the workers once"),
    (420, 130, 180, "kernels, no GIL", "every worker, every layer"),
    (206, 130, 170, "sampler", "chooses one id"),
    (12, 130, 150, "StreamDecoder", "ids to text"),
)
ARROWS = ("ids", "new tokens", "rows", "one job", "job(ith, nth)", "logits (V)", "id")


def draw_token() -> str:
    """Draw a loop of boxes: from the text to the network and back, and from the new id to the next step."""
    lines = []
    high = 44
    for i, (x, y, width, title, note) in enumerate(BOXES):
        colour = OUR_BAR if title.startswith("kernels") else LIMIT if title == "pool" else TEXT
        lines.append(rect(x, y, width, high, colour, filled=False))
        lines += [text(x + 8, y + 18, title, weight="bold"), text(x + 8, y + 35, note, size=11)]
        if i == len(ARROWS):
            break
        right, below, name = BOXES[i + 1][0] > x, BOXES[i + 1][1] > y, ARROWS[i]
        if below:
            lines += [path([(x + width / 2, y + high), (x + width / 2, BOXES[i + 1][1])])]
            lines.append(text(x + width / 2 + 6, y + high + 36, name, size=11))
        else:
            start, stop = (x + width, BOXES[i + 1][0]) if right else (x, BOXES[i + 1][0] + BOXES[i + 1][2])
            lines.append(path([(start, y + high / 2), (stop, y + high / 2)]))
            lines.append(text((start + stop) / 2, y - 6 if right else y + high + 15, name, anchor="middle", size=11))
    lines.append(path([(270, 130), (270, 97), (510, 97), (510, 64)]))
    lines.append(text(390, 92, "the new id is the next row", anchor="middle", size=11))
    return svg(204, "The way of a token", lines)


# ------------------------------------------------------------------------------------------------ schedule

# Requests: the step before which one arrives, its prompt, its new tokens, and what is special about it.
ARRIVALS = (
    (0, range(100, 140), 12, "a prompt of 40 tokens"),
    (0, range(200, 206), 9, "a prompt of 6 tokens"),
    (4, range(300, 348), 6, "48 tokens, which arrive later"),
    (8, range(100, 142), 5, "42 tokens, 40 as in the first"),
    (10, range(400, 410), 4, "10 tokens"),
)
BUDGET = 16  # rows of prompts in a step


def schedule() -> list[dict[int, int]]:
    """Run the requests; return the rows of each step by request."""
    steps: list[dict[int, int]] = []
    with pygpt.GPT2.load(ROOT / "pygpt" / "data" / "shakespeare.bin", threads=1) as model:
        engine, run = model.engine(), model.network.step
        jobs: list[pygpt.Job] = []

        def counted(rows: list[Any], *others: Any) -> Any:
            caches = [cache for _, cache, _ in rows]
            owners = {id(s.memory.cache): jobs.index(s.job) for s in engine._live if s.memory is not None}
            steps.append({owners[id(cache)]: caches.count(cache) for cache in dict.fromkeys(caches)})
            return run(rows, *others)

        model.network.chunk = BUDGET
        model.network.step = counted  # type: ignore[assignment, method-assign]
        while engine.busy or len(jobs) < len(ARRIVALS):
            for _, prompt, new, _ in ARRIVALS[len(jobs) : sum(at <= len(steps) for at, *_ in ARRIVALS)]:
                jobs.append(engine.add(pygpt.Request(model.config, prompt, max_new_tokens=new)))
            engine.step()
    return steps


def draw_schedule() -> str:
    """A line for each request, a column for each step."""
    steps, left, rise, high = schedule(), 210, 30, 24
    wide = (WIDTH - MARGIN - left) / len(steps)
    lines = []
    for line, (_, _, _, note) in enumerate(ARRIVALS):
        y = MARGIN + line * rise
        lines.append(text(MARGIN, y + 16, note, size=12))
        for column, rows in enumerate(steps):
            if line in rows:
                colour = OUR_BAR if rows[line] == 1 else GREEN
                lines.append(rect(left + column * wide, y, wide - 2, high, colour))
                lines.append(
                    text(
                        left + column * wide + wide / 2 - 1, y + 16, str(rows[line]), anchor="middle", colour="#ffffff", size=11
                    )
                )
    height = 2 * MARGIN + rise * len(ARRIVALS) + 18
    words = f"Green: rows of prompts, at most {BUDGET} a step here. Blue: one row for a new token."
    lines.append(text(MARGIN, height - 8, words, size=11))
    return svg(height, "Five requests in one engine, step by step", lines)


GUESSED = (("not", "not", True), ("to", "to", True), ("be", "be", True), (",", ":", False))  # guess, choice, whether equal


def draw_speculation() -> str:
    """Draw four guesses of a draft, the step that checks them, and the tokens that it gives."""
    lines = [text(12, 34, "the draft guesses"), text(12, 94, "one step checks all rows"), text(12, 154, "the tokens")]
    for i, (guess, choice, right) in enumerate((("or", "", True), *GUESSED)):
        x = 200 + 120 * i
        if i:
            lines += [rect(x, 14, 96, 30, LIMIT, filled=False), text(x + 48, 34, guess, anchor="middle")]
        lines += [rect(x, 74, 96, 30, OUR_BAR, filled=False), text(x + 48, 94, f"row of {guess!r}", anchor="middle", size=12)]
        lines.append(path([(x + 48, 44 if i else 60), (x + 48, 74)]))
        if i < len(GUESSED):
            _, choice, right = GUESSED[i]
            lines += [rect(x, 134, 96, 30, GREEN if right else TEXT, filled=False), path([(x + 48, 104), (x + 48, 134)])]
            lines.append(text(x + 48, 154, choice, anchor="middle", weight="bold"))
            lines.append(text(x + 48, 182, "as guessed" if right else "replaces the guess", anchor="middle", size=11))
    lines.append(text(200 + 120 * 4 + 48, 154, "not used", anchor="middle", size=11))
    return svg(194, "Speculation: three of four guesses are right, so one step gives four tokens", lines)


LOAD = TOOLS / "benchmarks" / "server.json"


def draw_load() -> str:
    """A line for each number of clients and each server: tokens a second, and the median and 99th percentile between tokens."""
    found = json.loads(LOAD.read_text())
    rows = [(one["clients"], name, one, "") for name, loads in found["load"].items() for one in loads]
    rows.sort(key=lambda row: row[0])
    rows += [(one["clients"], name, one, ", and long prompts") for name, one in found["long"].items()]
    left, right, wide, rise, top = 250, 520, 220, 24, 34
    fastest = max(one["tokens_per_s"] for _, _, one, _ in rows)
    slowest = max(one["itl"][1] for _, _, one, _ in rows)
    lines = [
        text(left, 20, "tokens a second: more is better"),
        text(right, 20, "ms between tokens: median, 99th percentile"),
    ]
    for i, (clients, name, one, note) in enumerate(rows):
        y, colour = top + i * rise, OUR_BAR if name == "pygpt" else TEXT
        lines.append(text(MARGIN, y + 12, f"{name}, {clients} client{'s' * (clients > 1)}{note}", colour=colour))
        length = wide * one["tokens_per_s"] / fastest
        lines += [rect(left, y, length, 14, colour), text(left + length + 4, y + 12, f"{one['tokens_per_s']:.0f}")]
        median, most = (wide * value / slowest for value in one["itl"][:2])
        lines += [rect(right, y, most, 14, colour, filled=False), rect(right, y, median, 14, colour)]
        lines.append(text(right + most + 4, y + 12, f"{one['itl'][0]:.0f}, {one['itl'][1]:.0f}"))
    height = top + rise * len(rows) + 24
    lines.append(text(MARGIN, height - 8, f"{found['model']} on {found['machine']}", size=11))
    return svg(height, "Speed of servers by the number of clients", lines)


PICTURES = {
    "load": draw_load,
    "schedule": draw_schedule,
    "rooms": draw_rooms,
    "step": draw_step,
    "token": draw_token,
    "speculation": draw_speculation,
}


def main() -> None:
    """Record a step if --record is given, then draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", metavar="MODEL", help="a model file of GPT-2's shape")
    options = parser.parse_args()
    if options.record:
        found = record(options.record)
        found["workers"] = [[[name, layer, *(round(t, 1) for t in ts)] for name, layer, *ts in w] for w in found["workers"]]
        STEP.write_text(json.dumps(found).replace("[[[", "[[\n[").replace("], [", "],\n[") + "\n")
    for name, draw in PICTURES.items():
        (ROOT / "docs" / "pictures" / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
