"""Compare two JSON reports: which kernels became faster or slower from the first to the second."""

import json
import os
from typing import Any

from ...errors import InputError
from .text import CALLS, WIDTH, ms, table

SCHEMA = 1
PARTS = {"model", "machine", "job", "bits", "ceilings", "kernels", "modes"}  # the parts of a report that are compared
Report = dict[str, Any]


def load(path: str) -> Report:
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
    a, b = load(path_a), load(path_b)
    if a["modes"].keys() != b["modes"].keys():
        jobs = (
            f"{os.path.basename(path)} is of {' and '.join(report['modes'])}" for path, report in ((path_a, a), (path_b, b))
        )
        raise InputError(f"--compare: {', '.join(jobs)}: give two reports of the same kind of job")
    lines = [f"a  {os.path.basename(path_a)}", f"b  {os.path.basename(path_b)}", *differences(a, b)]
    for mode in a["modes"]:
        lines += ["", *_mode(a, b, mode)]
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


def _mode(a: Report, b: Report, mode: str) -> list[str]:
    """Return the table of one mode in ms per call (a prompt, a token, an iteration), the largest change first."""
    times = [_times(report, mode) for report in (a, b)]
    wall_a, wall_b = (report["modes"][mode]["wall_ns"] / report["modes"][mode]["calls"] for report in (a, b))
    found = []
    for name in {**times[0], **times[1]}:
        (self_a, wait_a), (self_b, wait_b) = (side.get(name, (0.0, 0.0)) for side in times)
        found.append((self_b + wait_b - self_a - wait_a, name, self_a, self_b, wait_a, wait_b))
    rows = []
    for moved, name, self_a, self_b, wait_a, wait_b in sorted(found, key=lambda row: -abs(row[0])):
        ratio = f"{self_b / self_a:.2f}x" if self_a > 0 else "-"
        change = [f"{moved / 1e6:+.3f}", f"{moved / wall_a:+.1%}"]
        rows.append([name, ms(self_a), ms(self_b), ratio, ms(wait_a), ms(wait_b), *change])
    title = f"{mode.upper()}  {ms(wall_a)} -> {ms(wall_b)} ms {CALLS[mode]} ({wall_b / wall_a - 1:+.1%})"
    heads = ["ms", "self a", "self b", "b / a", "wait a", "wait b", "change", "of wall a"]
    return [title, *table(heads, rows, [13, 11, 11, 9, 11, 11, 11, 11])]


def _times(report: Report, mode: str) -> dict[str, tuple[float, float]]:
    """Return self and wait of each row, in ns per call."""
    calls = report["modes"][mode]["calls"]
    rows = [row for row in report["kernels"] if row["mode"] == mode]
    return {row["name"]: (row["self_ns"] / calls, row["wait_ns"] / calls) for row in rows}
