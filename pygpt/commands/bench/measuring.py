"""What the benchmarks share: clocks, artificial tokens, resident memory and tables."""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ...config import Config
from ...errors import InputError

CLONE = Path(__file__).resolve().parents[3]  # the folder of the package's folder
Result = dict[str, Any]


def marks(clock: Callable[[], Any], *steps: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    """Run the steps one after the other; return their results, and the times of the begin and of the end of each."""
    results, times = [], [clock()]
    for step in steps:
        results.append(step())
        times.append(clock())
    return results, times


def laps(*steps: Callable[[], Any]) -> tuple[list[Any], list[float]]:
    """Run the steps one after the other; return their results, and the seconds of each."""
    results, times = marks(time.perf_counter, *steps)
    return results, [end - begin for begin, end in pairwise(times)]


def seconds_of(job: Callable[[], object]) -> float:
    """Run a job; return its seconds."""
    return laps(job)[1][0]


def artificial_ids(config: Config, start: int, stop: int) -> list[int]:
    """Return token ids, spread over the vocabulary, with the numbers [start, stop)."""
    return [(i * 7919 + 13) % config.V for i in range(start, stop)]


def prompt(config: Config, start: int, stop: int) -> list[int]:
    """Return artificial token ids for positions [start, stop). Raises ValueError for positions that the model does not have."""
    if not 0 <= start < stop <= config.maxT:
        raise ValueError(f"positions {start} to {stop} were requested, but the model has {config.maxT}")
    return artificial_ids(config, start, stop)


def batch_of(config: Config, B: int, T: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return B artificial sequences of T tokens, and their targets. Raises InputError if T exceeds the model's context."""
    if config.maxT < T:
        raise InputError(f"-T is {T}: it must be at most the model's context of {config.maxT} tokens")
    ids = artificial_ids(config, 0, B * T + 1)
    inputs, targets = ([ids[start + b * T : start + (b + 1) * T] for b in range(B)] for start in (0, 1))
    return inputs, targets


def resident_bytes(field: str) -> int:
    """Return a field of /proc/self/status, such as RssAnon, in bytes, or 0 if the system does not have it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory in bytes."""
    if peak := resident_bytes("VmHWM"):  # on Linux, because getrusage would include the parent's memory at the fork
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def middle(values: Iterable[float]) -> tuple[float, list[float]]:
    """Return the median, and the lowest and the highest of the middle half."""
    ordered = sorted(values)
    return median(ordered), [ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]]


def print_table(heads: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def print_results(results: list[Result], columns: Iterable[tuple[str, str, str]]) -> None:
    """Print results as a Markdown table. columns: the head, the field and the format of each column."""
    heads, names, forms = map(list, zip(*columns, strict=True))
    print_table(heads, [[figure(r.get(name), form) for name, form in zip(names, forms, strict=True)] for r in results])


def figure(value: Any, form: str) -> str:
    """Return the value of a field as text: a range as two numbers, and "" if it was not measured."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(format(limit, form) for limit in value)
    return f"{value / 1e6:.0f}" if form == "MB" else format(value, form)
