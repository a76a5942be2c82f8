"""Draw a report as SVG and PNG: hotspots, the workers' timeline, speed-up against the ideal. Needs matplotlib."""

import os
from typing import Any

from ...inspection.show import matplotlib, save
from .job import WAKE, Call

Report = dict[str, Any]

# One colour for each kernel in all pictures: products blue, attention orange, small kernels green. A backward kernel has a
# similar shade. Kernels that only training has are brown.
COLOURS = {
    "qkv": "#4292c6", "attproj": "#9ecae1", "fc": "#08519c", "fcproj": "#2171b5", "logits": "#6a51a3", "attention": "#fd8d3c",
    "ln1": "#74c476", "ln2": "#41ab5d", "lnf": "#238b45", "encoder": "#a1d99b", "dqkv": "#6baed6", "dattproj": "#c6dbef",
    "dfc": "#08306b", "dfcproj": "#2c7fb8", "dhead": "#9e9ac8", "dattention": "#e6550d", "dln1": "#98df8a", "dln2": "#31a354",
    "dlnf": "#006d2c", "dencoder": "#c7e9c0", "loss": "#d8b365", "dlogits": "#a6761d", "norm": "#8c6d31", "update": "#7f3b08",
    "sampler": "#e7298a", "python, pool": "#969696", WAKE: "#d9d9d9", "wait": "#cb181d",
}  # fmt: skip
OTHER = "#555555"


def draw(folder: str, report: Report, calls: list[Call]) -> list[str]:
    """Write all pictures into the folder; return their names."""
    plt = matplotlib()
    os.makedirs(folder, exist_ok=True)
    figures = hotspots(plt, report), timeline(plt, calls, report["machine"]["threads"]), speedup(plt, report)
    written = []
    for name, figure in zip(("hotspots", "timeline", "speedup"), figures, strict=True):
        for suffix in ("svg", "png"):
            written.append(os.path.join(folder, f"{name}.{suffix}"))
            save(figure, written[-1])
        plt.close(figure)
    return written


def hotspots(plt: Any, report: Report) -> Any:
    """Draw bars of self and wait for every row of each mode."""
    modes = {mode: [row for row in report["kernels"] if row["mode"] == mode][::-1] for mode in report["modes"]}
    size = (5.5 * len(modes) if len(modes) > 1 else 8, max(5, 0.27 * max(map(len, modes.values()))))
    figure, axes = plt.subplots(1, len(modes), figsize=size, layout="constrained", squeeze=False)
    for axis, (mode, rows) in zip(axes[0], modes.items(), strict=True):
        summary, names = report["modes"][mode], [row["name"] for row in rows]
        selves, waits = ([100 * row[key] / summary["wall_ns"] for row in rows] for key in ("self_ns", "wait_ns"))
        axis.barh(names, selves, color=[COLOURS.get(name, OTHER) for name in names])
        axis.barh(names, waits, left=selves, color=COLOURS["wait"], label="waiting")
        for y, row in enumerate(rows):
            roof = "" if row["roof"] is None else f", {100 * row['roof']:.0f}% of {row['bound']}"
            axis.text(100 * row["share"], y, f" {100 * row['share']:.1f}%{roof}", va="center", fontsize=8)
        widest = 1.45 * max(100 * row["share"] for row in rows)
        title = f"{mode}: {summary['median_call_ns'] / 1e6:.2f} ms a call"
        axis.set(xlim=(0, widest), xlabel="share of the time, %", title=title)
        axis.legend(loc="lower right", frameon=False)
    return figure


def timeline(plt: Any, calls: list[Call], nth: int) -> Any:
    """Draw the workers' phases in the last call of each mode. Waiting is red; Python and pool are blank."""
    from matplotlib.patches import Patch

    shown = [*{call.mode: call for call in calls}.values()]
    height = 1.4 + len(shown) * (1 + 0.45 * nth)
    figure, axes = plt.subplots(len(shown), 1, figsize=(11, height), layout="constrained", squeeze=False)
    seen: set[str] = set()
    for axis, call in zip(axes[:, 0], shown, strict=True):
        for ith in range(nth):
            bars = [bar for step in call.steps for event in step[ith] for bar in event.spans()]
            if ith == 0 and call.done > call.ran:
                bars.append(("sampler", call.ran, call.done))
            seen.update(name for name, _, _ in bars)
            spans = [((begin - call.begin) / 1e6, (end - begin) / 1e6) for _, begin, end in bars]
            axis.broken_barh(spans, (ith - 0.4, 0.8), facecolors=[COLOURS.get(name, OTHER) for name, _, _ in bars])
        axis.set_yticks(range(nth), [f"worker {ith}" for ith in range(nth)])
        axis.set(ylim=(nth - 0.5, -0.5), xlim=(0, (call.done - call.begin) / 1e6), xlabel="ms")
        training = f"an iteration of training, sequences: {call.sequences}"
        kind = training if call.stages else f"{call.mode} at position {call.position}"
        axis.set_title(f"{kind}, tokens: {call.rows}", loc="left")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return figure


def speedup(plt: Any, report: Report) -> Any:
    """Draw the speed-up over one thread: the ideal, the measured points, and the two predictions."""
    modes = report["modes"]
    figure, axes = plt.subplots(1, len(modes), figsize=(5.5 * len(modes), 4.6), layout="constrained", squeeze=False)
    for axis, (mode, summary) in zip(axes[0], modes.items(), strict=True):
        found = summary["amdahl"]["predictions"]
        threads = [1, *(row["threads"] for row in found)]
        axis.plot(threads, threads, color="#969696", linestyle=":", label="ideal")
        axis.plot(threads, [1, *(row["amdahl"] for row in found)], "--o", color="#2171b5", ms=4, label="prediction: Amdahl")
        if found[0]["bandwidth"] is not None:
            bounded = [1, *(row["bandwidth"] for row in found)]
            axis.plot(threads, bounded, "--s", color="#fd8d3c", ms=4, label="prediction: Amdahl and bandwidth")
        points = [(row["threads"], row[f"{mode}_speedup"]) for row in report["scaling"] if f"{mode}_speedup" in row]
        if points:
            axis.plot(*zip(*points, strict=True), "-D", color="black", ms=6, label="measured")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(threads, [str(n) for n in threads])
        axis.set_yticks([2**k for k in range(8)], [str(2**k) for k in range(8)])
        axis.minorticks_off()
        axis.set(xlabel="threads", ylabel="speed-up over one thread", title=mode)
        axis.legend(loc="upper left", frameon=False, fontsize=9)
    return figure
