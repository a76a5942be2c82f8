"""Write the report, and the differences of two reports, as text of at most 100 columns."""

import json
import os
import textwrap
from typing import Any

from ...errors import InputError, plural
from .job import STAGES

WIDTH = 100
SCHEMA = 1
PARTS = {"model", "machine", "job", "bits", "ceilings", "kernels", "modes"}  # the parts of a report that are compared
Report = dict[str, Any]
Row = dict[str, Any]

CALLS = {"prefill": "a prompt", "decode": "a token", "train": "an iteration"}
CALLS |= {"draft": "a guess", "verify": "a step", "rollback": "a rollback"}

NOTES = """\
Each row is a mean over the workers of a step: self is computing, wait is waiting at the barrier after it, total is both. ms \
and calls are for one round of the job. A mode's rows add up to the time around its calls. In "wake-up", some workers are \
awake. In "pack", the rows of a large product are rearranged. In "python, pool", no worker computes: checks, waking, \
gathering.
GFLOP/s and GB/s are a kernel's least work divided by its self time. roof compares them with this machine's nearer ceiling: f \
for fused multiply-add, d for integer products, r for reading, s for AdamW's traffic. Above 100% of r or s, the data came from \
a cache. Above 100% of f, the machine was busy when its ceiling was measured.
imbal is how much longer than the mean the slowest worker of a kernel computes. slow is the worker with the most computing \
time.
Serial means that fewer than all workers compute. Amdahl is 1 / (f + (1 - f) / n), with f the serial share of one thread's \
time (Amdahl 1967). With bandwidth, the parallel part takes at least the time to read its bytes at the ceiling; a dash means \
that they came from a cache. Both are predictions, even for this machine's own number of threads."""

STRATEGY_NOTES = """\
serial reference: one thread and scalar loops, like llm.c's train_gpt2.c. Without a cache, each token costs the whole \
sequence.
one worker: the same kernels as below, without barriers.
one round a kernel: fork-join. The pool is woken and gathered for every kernel, like OpenMP's parallel-for regions in llm.c.
one round a step: the pool is woken once, and the workers wait at native barriers between kernels, like ggml's graph threads. \
The output channels are split statically. Only this split helps for a single token too.
one round a stage: the same for forward, backward, norm and update. No two workers add to the same sum.
speed-up = T_serial / T_parallel, efficiency = speed-up / threads. Not compared here: fused regions for each layer, \
token-block tasks with dependencies (OmpSs-2), dynamic and guided chunks. A published run of llm.c's training on 112 cores \
reached a speed-up of 22 to 25 with OpenMP and with a tasking runtime."""


def render(report: Report, *, by_layer: bool = False) -> str:
    """Return the whole report as text."""
    parts = [head(report)]
    for mode in report["modes"]:
        parts.append(mode_text(report, mode))
        if by_layer:
            parts.append(layer_text(report, mode))
    parts.append(amdahl_text(report))
    sections = {"speculation": speculation_text, "strategies": strategies_text, "startup": startup_text, "perf": perf_text}
    parts += [section(report) for name, section in sections.items() if report[name]]
    parts.append(wrap("NOTES\n" + NOTES))
    return "\n\n".join(parts)


def table(*rows: list[str]) -> list[str]:
    """Return the lines of a table with its heads: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides, gap = ["<", *">" * (len(widths) - 1)], "  " if sum(widths) + 2 * len(widths) <= WIDTH + 2 else " "
    return [gap.join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows]


def ms(ns: float | None) -> str:
    """Return nanoseconds as milliseconds, with about three significant digits."""
    if ns is None:
        return "-"
    value = ns / 1e6
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent, or a dash for None."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def wrap(text: str, indent: str = "") -> str:
    """Wrap each line of a text at WIDTH."""
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=indent) for line in text.splitlines())


def head(report: Report) -> str:
    """Describe the model, the job, the machine and its ceilings, with warnings."""
    model, machine, job = report["model"], report["machine"], report["job"]
    shape = f"L{model['L']} NH{model['NH']} C{model['C']} V{model['V']} maxT{model['maxT']}"
    if "train" in report["modes"]:
        what = f"{plural(job['iterations'], 'iteration')} of training on {job['B']} x {job['T']} tokens"
    else:
        what = f"{plural(job['prompt_tokens'], 'token')} in, {job['new_tokens']} decoded one by one ({job['sampler']} sampler)"
    formats = f"{model['weights']} weights" + ("" if model["head"] == model["weights"] else f", head {model['head']}")
    bits = "the same as without profiling" if report["bits"]["same"] else "NOT the same as without profiling"
    lines = [
        f"pygpt {report['pygpt']} on {machine['processor']}, {machine['isa']}",
        f"model    {model['name']} ({shape}, {formats})",
        f"job      {what}; {plural(job['rounds'], 'round')}; {plural(machine['threads'], 'worker')}, "
        f"{plural(machine['cores'], 'core')}",
        f"bits     {bits} ({report['bits']['profiled']})",
    ]
    for ceiling in report["ceilings"]:
        limits = f"{ceiling['fma_gflop_s']:.0f} GFLOP/s fused multiply-add, {ceiling['read_gb_s']:.1f} GB/s read"
        limits += "".join(f", {rate:.0f} Gop/s of {kind} products" for kind, rate in ceiling["dot_gop_s"].items())
        if ceiling["stream_gb_s"]:
            limits += f", {ceiling['stream_gb_s']:.1f} GB/s of AdamW's traffic"
        lines.append(f"ceiling  {plural(ceiling['threads'], 'thread')}: {limits}")
    lines += [f"WARNING  {warning}" for warning in warnings(report)]
    lines += [f"STRETCH  {text}" for text in job["planted"]]
    return "\n".join(wrap(line, " " * 9) for line in lines)


def warnings(report: Report) -> list[str]:
    """Return warnings about conditions that make the numbers less reliable."""
    found = []
    if report["ceilings"]:
        one, most = report["ceilings"][0], report["ceilings"][-1]
        if (gain := most["fma_gflop_s"] / one["fma_gflop_s"]) < 0.8 * most["threads"]:
            reached = f"{plural(most['threads'], 'thread')} together reach only {gain:.1f} times the arithmetic of one"
            why = "The machine is busy, or its processors share cores. This causes waiting that the program cannot avoid."
            found.append(f"{reached}. {why}")
    trace = report["trace"]
    if any(trace["dropped"]):
        lost = ", ".join(f"worker {ith} {count}" for ith, count in enumerate(trace["dropped"]))
        text = f"the trace overflowed: it holds {trace['capacity']} events of a worker in a round. Dropped: {lost}"
        found.append(f'{text}. Their time appears as "python, pool". Raise --capacity.')
    return found


def mode_text(report: Report, mode: str) -> str:
    """Return the table of hotspots of one mode."""
    summary, rounds = report["modes"][mode], report["job"]["rounds"]
    wall, wait = summary["wall_ns"], summary["wait_ns"]
    rows = [row for row in report["kernels"] if row["mode"] == mode]
    title = f"{mode.upper()}  {ms(summary['median_call_ns'])} ms {CALLS[mode]}, median (untraced "
    title += f"{ms(summary['untraced_median_call_ns'])}); {summary['tokens'] / wall * 1e9:.1f} tokens/s; "
    title += f"{summary['workers_used']} of {plural(report['machine']['threads'], 'worker')} used"
    heads = ["kernel", "calls", "total ms", "self ms", "wait ms", "share", "cum", "GFLOP/s", "GB/s", "roof", "imbal", "slow"]
    total = ["total", "", *(ms(ns / rounds) for ns in (wall, wall - wait, wait)), percent(sum(row["share"] for row in rows))]
    total += ["", number(summary["flop"] / wall), number(summary["bytes"] / wall), "", "", ""]
    lines = [title, *table(heads, *(_hotspot(row, rounds) for row in rows), total)]
    if summary["stages"]:
        stages = [f"{row['name']} {ms(row['median_ns'])} ms ({percent(row['share'])})" for row in summary["stages"]]
        lines.append(wrap(f"Stages: {', '.join(stages)}."))
    return "\n".join([*lines, wrap(reading(summary, rows))])


def _hotspot(row: Row, rounds: int) -> list[str]:
    """Return the cells of one kernel."""
    roof = "-" if row["roof"] is None else f"{100 * row['roof']:.0f}%{row['bound'][0]}"
    imbalance = ["-", "-"]
    if row["kind"] == "kernel" and sum(worker["calls"] > 0 for worker in row["workers"]) > 1:
        slow = max(range(len(row["workers"])), key=lambda ith: row["workers"][ith]["self_ns"])
        imbalance = [percent(row["imbalance"]), str(slow)]
    unless = {"total_ns": "", "self_ns": "wait", "wait_ns": "outside"}  # the kind of row without such a time
    times = ["-" if row["kind"] == kind else ms(row[name] / rounds) for name, kind in unless.items()]
    rates = [percent(row["share"]), percent(row["cumulative"]), number(row["gflop_s"]), number(row["gb_s"])]
    return [row["name"], f"{row['calls'] / rounds:.0f}", *times, *rates, roof, *imbalance]


def reading(summary: Row, rows: list[Row]) -> str:
    """Summarize the table in a line or two."""
    most = rows[0]
    outside = sum(row["share"] for row in rows if row["kind"] == "outside")
    text = f"Most time: {most['name']}, {percent(most['share'])}"
    if most["roof"] is not None:
        ceiling = {"fma": "arithmetic", "dot": "integer", "read": "reading", "stream": "traffic"}[most["bound"]]
        text += f", computing at {percent(most['roof'], 0)} of this machine's {ceiling} ceiling"
    text += f". Waiting: {percent(summary['wait_ns'] / summary['wall_ns'])}. Outside the kernels: {percent(outside)}."
    imbalance = summary["imbalance"]
    if summary["workers_used"] > 1 and imbalance["excess"] > 0.05:
        text += f" IMBALANCE: worker {imbalance['slowest']} computes {percent(imbalance['excess'])} longer than the mean;"
        text += " the others wait for it."
    return text


def layer_text(report: Report, mode: str) -> str:
    """Return the table of one mode's layers."""
    rounds = report["job"]["rounds"]
    rows = [["layer", "total ms", "self ms", "wait ms", "share"]]
    for row in report["modes"][mode]["layers"]:
        times = (ms(row[f"{key}_ns"] / rounds) for key in ("total", "self", "wait"))
        rows.append([row["layer"], *times, percent(row["share"])])
    return "\n".join([f"{mode.upper()} BY LAYER", *table(*rows)])


def speculation_text(report: Report) -> str:
    """Return the counts of guesses, and the shares of the phases in the time after the prefill."""
    found, modes = report["speculation"], report["modes"]
    after = sum(summary["wall_ns"] for mode, summary in modes.items() if mode != "prefill")
    shares = [f"{mode} {percent(summary['wall_ns'] / after)}" for mode, summary in modes.items() if mode != "prefill"]
    right = f"{found['accepted']} of {found['drafted']} guesses were right ({percent(found['acceptance'])})"
    text = f"SPECULATION  guesses: {found['guesses']}, draft: {found['draft']}. {right}"
    return wrap(f"{text}; {found['tokens_per_step']:.2f} tokens a step. Time after the prefill: {', '.join(shares)}.")


def amdahl_text(report: Report) -> str:
    """Return the serial fraction, its predictions, and the measured speed-ups."""
    lines = ["SPEED-UP over one thread of the same kernels"]
    modes = {mode: summary for mode, summary in report["modes"].items() if summary["steps"]}
    for mode, summary in modes.items():
        workers = plural(summary["amdahl"]["workers"], "worker")
        serial, alone = (percent(summary["amdahl"][name]) for name in ("serial_share", "serial_fraction"))
        lines.append(f"{mode}: fewer than {workers} compute in {serial} of the time, which is {alone} of one thread's time")
    measured = {row["threads"]: row for row in report["scaling"]}
    rows = []
    for mode in (*modes, *(STAGES if "train" in modes else ())):
        predicted = {row["threads"]: row for row in modes[mode]["amdahl"]["predictions"]} if mode in modes else {}
        for threads in sorted({*measured, *predicted}):
            guess, fact = predicted.get(threads, {}), measured.get(threads, {})
            cells = [guess.get("amdahl"), guess.get("bandwidth"), fact.get(f"{mode}_speedup")]
            rows.append([str(threads), mode, *(number(value, 2) for value in cells), "" if fact else "prediction only"])
    return "\n".join([*lines, *table(["threads", "mode", "Amdahl", "+ bandwidth", "measured", ""], *rows)])


def strategies_text(report: Report) -> str:
    """Return the table that compares the strategies."""
    found, training = report["strategies"], "train" in report["modes"]
    modes, stages = (("train",), STAGES) if training else (("prefill", "decode"), ())
    job = f"an iteration on {found.get('B')} x {found.get('T')} tokens"
    if not training:
        job = f"prefill of {plural(found['prompt_tokens'], 'token')}, then single tokens without a sampler"
    group = ["", "", "pool", "native", *(cell for mode in modes for cell in (mode, "speed-", "effi-")), *stages]
    heads = ["strategy", "threads", "rounds", "barriers", *["ms", "up", "ciency"] * len(modes), *["speed-up"] * len(stages)]
    rows = []
    for way in found["ways"]:
        row = [way["name"], *(str(way[name]) for name in ("threads", "rounds_a_step", "barriers_a_step"))]
        for mode in modes:
            row += [ms(way[f"{mode}_ns"]), *(number(way[f"{mode}_{name}"]) for name in ("speedup", "efficiency"))]
        rows.append([*row, *(number(way[f"{name}_speedup"]) for name in stages)])
    bits = "all except the reference give the same bits" if found["same_bits"] else "the bits are NOT the same"
    results = "all choose the same tokens" if found.get("same_tokens") else "the most probable tokens are NOT the same"
    if training:
        results = "all end at the same loss" if found["same_losses"] else "the final losses are NOT the same"
    if any(summary["workers_used"] < report["machine"]["threads"] for summary in report["modes"].values()):
        results += "; some steps ran on fewer workers (--all-workers changes this)"
    lines = [f"STRATEGIES  {job}; medians, untraced", *table(group, heads, *rows)]
    return "\n".join([*lines, wrap(f"Bits: {bits}; {results}."), wrap(STRATEGY_NOTES, "  ")])


def startup_text(report: Report) -> str:
    """Return the table of a fresh process's start, until its first result."""
    rows = [[row["name"], ms(row["ns"]), str(row["minor"]), str(row["major"])] for row in report["startup"]]
    rows.append(["total", ms(sum(row["ns"] for row in report["startup"])), "", ""])
    title = "START-UP  a fresh process; the system counts page faults (getrusage)"
    return "\n".join([title, *table(["part", "ms", "minor faults", "major faults"], *rows)])


def read_report(path: str) -> Report:
    """Read a report. Raises InputError for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--compare: {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or PARTS - report.keys():
        raise InputError(f"--compare: {path}: not a report of pygpt profile (schema {SCHEMA}): write one with -o json")
    return report


def compare(path_a: str, path_b: str) -> str:
    """Return the comparison of two reports as text. Raises InputError if they are of different kinds of jobs."""
    a, b = read_report(path_a), read_report(path_b)
    names = [os.path.basename(path) for path in (path_a, path_b)]
    modes = [mode for mode in a["modes"] if mode in b["modes"]]
    if not modes:
        jobs = (f"{name} is of {' and '.join(report['modes'])}" for name, report in zip(names, (a, b), strict=True))
        raise InputError(f"--compare: {', '.join(jobs)}: give two reports of the same kind of job")
    lines = [f"a  {names[0]}", f"b  {names[1]}", *differences(a, b)]
    for mode in modes:
        lines += ["", *_differences_of(a, b, mode)]
    return "\n".join(lines)


def differences(a: Report, b: Report) -> list[str]:
    """Return a warning for each difference in model, machine or job. Such differences make the times hard to compare."""
    lines = []
    for part in ("model", "machine", "job"):
        for key, value in a[part].items():
            other = b[part].get(key)
            if value != other and key != "path":
                lines.append(f"WARNING  {part} {key}: {value} in a, {other} in b"[:WIDTH])
    speeds = [{row["threads"]: row["read_gb_s"] for row in report["ceilings"]} for report in (a, b)]
    for threads in sorted({*speeds[0]} & {*speeds[1]}):
        one, two = speeds[0][threads], speeds[1][threads]
        if not 0.85 < two / one < 1.15:
            lines.append(f"WARNING  the machine's speed differs: {threads} threads read {one:.1f} GB/s in a, {two:.1f} in b")
    if a["model"] == b["model"] and a["job"] == b["job"] and a["bits"]["profiled"] != b["bits"]["profiled"]:
        lines.append("WARNING  the same job gave different bits")
    return lines


def _differences_of(a: Report, b: Report, mode: str) -> list[str]:
    """Return the table of one mode in ms per call (a prompt, a token, an iteration), the largest change first."""
    times = []  # of a and of b: self and wait of each row
    for report in (a, b):
        calls, kernels = report["modes"][mode]["calls"], (row for row in report["kernels"] if row["mode"] == mode)
        times.append({row["name"]: (row["self_ns"] / calls, row["wait_ns"] / calls) for row in kernels})
    wall_a, wall_b = (report["modes"][mode]["wall_ns"] / report["modes"][mode]["calls"] for report in (a, b))
    rows = []
    for name in {**times[0], **times[1]}:
        (self_a, wait_a), (self_b, wait_b) = (side.get(name, (0.0, 0.0)) for side in times)
        moved, ratio = self_b + wait_b - self_a - wait_a, f"{self_b / self_a:.2f}x" if self_a > 0 else "-"
        cells = [name, ms(self_a), ms(self_b), ratio, ms(wait_a), ms(wait_b), f"{moved / 1e6:+.3f}", f"{moved / wall_a:+.1%}"]
        rows.append((-abs(moved), cells))
    title = f"{mode.upper()}  {ms(wall_a)} -> {ms(wall_b)} ms {CALLS[mode]} ({wall_b / wall_a - 1:+.1%})"
    heads = ["ms", "self a", "self b", "b / a", "wait a", "wait b", "change", "of wall a"]
    return [title, *table(heads, *(cells for _, cells in sorted(rows)))]


def perf_text(report: Report) -> str:
    """Return the table of the hottest symbols found by perf."""
    found = report["perf"]
    shown = [row for row in found["symbols"] if row["share"] >= 0.002][:16]
    rows = [[row["symbol"][:44], row["object"][:44], percent(row["share"])] for row in shown]
    lines = [f"SAMPLED BY PERF  {plural(found['samples'], 'sample')} of processor time"]
    lines += table(["symbol", "object", "share"], *rows)
    compared = [["perf", *map(percent, found["families"].values())], ["this report", *map(percent, found["reported"].values())]]
    lines += table(["share of computing", *found["families"]], *compared)
    return "\n".join(lines)
