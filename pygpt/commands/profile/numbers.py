"""Compute the numbers of the report from a job's events: hotspots, layers, the serial fraction, predictions.

Times of a kernel are means over the workers that ran the step. So a mode's rows add up to the measured time of its calls."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from ...config import Config
from .job import STAGES, WAKE, Call, Step, place
from .work import WEIGHTS, Stored, Work, forward, training

OUTSIDE, SAMPLER = "python, pool", "sampler"
PREDICTED = (2, 4, 8, 16, 112)

Row = dict[str, Any]
Ceiling = dict[str, Any]  # threads, read_gb_s, fma_gflop_s, stream_gb_s or None, dot_gop_s by weight format


class Tally:
    """Sums over the instances of one kernel, or of one layer."""

    def __init__(self, nth: int) -> None:
        self.wait_ns = self.slowest_ns = 0.0  # sums of the mean wait and of the slowest worker's self time
        self.selves: list[float] = []  # of each instance, the mean over the workers of the step
        self.workers: list[Row] = [{"calls": 0, "self_ns": 0, "wait_ns": 0} for _ in range(nth)]

    def add(self, times: Sequence[tuple[int, int, int]], present: int) -> None:
        """Add one instance. times: (worker, self, wait) of each worker that ran it. present: number of workers in the step."""
        self.selves.append(sum(busy for _, busy, _ in times) / present)
        self.wait_ns += sum(wait for _, _, wait in times) / present
        self.slowest_ns += max(busy for _, busy, _ in times)
        for ith, busy, wait in times:
            for name, more in ("calls", 1), ("self_ns", busy), ("wait_ns", wait):
                self.workers[ith][name] += more

    def row(self, wall_ns: int) -> Row:
        """Return the sums as a row of the report."""
        self_ns = sum(self.selves)
        return {
            "calls": len(self.selves), "total_ns": self_ns + self.wait_ns, "self_ns": self_ns, "wait_ns": self.wait_ns,
            "median_ns": median(self.selves) if self.selves else 0.0, "share": (self_ns + self.wait_ns) / wall_ns,
            "imbalance": self.slowest_ns / self_ns - 1 if self_ns else 0.0, "workers": self.workers,
        }  # fmt: skip


def instances(step: Step) -> dict[tuple[str, int], list[tuple[int, int, int]]]:
    """Return the times of a step's phases by (phase, layer), as (worker, self, wait) of each worker."""
    found: dict[tuple[str, int], dict[int, tuple[int, int]]] = defaultdict(dict)
    for ith, events in enumerate(step):
        for event in events:
            busy, wait = found[event.phase, event.layer].get(ith, (0, 0))
            found[event.phase, event.layer][ith] = busy + event.end - event.begin, wait + event.left - event.end
    return {key: [(ith, *times) for ith, times in by_worker.items()] for key, by_worker in found.items()}


def wall_of(calls: Iterable[Call]) -> int:
    """Return the time measured around calls, including the choice of the next token."""
    return sum(call.done - call.begin for call in calls)


def tallies_of(calls: list[Call], nth: int, key: Callable[[str, int], str]) -> dict[str, Tally]:
    """Add up the instances of all phases by key(phase, layer)."""
    tallies: dict[str, Tally] = defaultdict(lambda: Tally(nth))
    for step in (step for call in calls for step in call.steps):
        present = sum(bool(events) for events in step)
        for (phase, layer), times in instances(step).items():
            tallies[key(phase, layer)].add(times, present)
    return tallies


def hotspots(config: Config, stored: Stored, calls: list[Call], nth: int, ceiling: Ceiling | None) -> list[Row]:
    """Return the rows of one mode, the longest total first. Their shares add up to 1."""
    wall, trains = wall_of(calls), bool(calls[0].stages)
    need: Work = {}
    for call in calls:
        if trains:
            work = training(config, call.sequences, call.rows // call.sequences)
        else:
            work = forward(config, stored, call.rows, call.position, steps=max(1, len(call.steps)), wanted=call.wanted)
        for name, least in work.items():
            flop, size = need.get(name, (0, 0))
            need[name] = flop + least[0], size + least[1]
    rows = []
    for name, tally in tallies_of(calls, nth, lambda phase, _: phase).items():
        row = {"name": name, "kind": "wait" if name == WAKE else "kernel", **tally.row(wall)}
        kind = stored[WEIGHTS[name]][0] if name in WEIGHTS and not trains else ""
        rows.append(row | rates(name, *need.get(name, (0, 0)), row["self_ns"], ceiling, kind))
    sampler = sum(call.done - call.ran for call in calls)
    rest = wall - sampler - sum(row["total_ns"] for row in rows)
    for name, total in ((OUTSIDE, rest),) if trains else ((SAMPLER, sampler), (OUTSIDE, rest)):
        times = {"calls": len(calls), "self_ns": total, "median_ns": total / len(calls), "share": total / wall}
        row = {"name": name, "kind": "outside", **Tally(0).row(wall), **times, "total_ns": total}
        rows.append(row | rates(name, 0, 0, 0, None))
    rows.sort(key=lambda row: -row["total_ns"])
    for row, reached in zip(rows, accumulate(row["share"] for row in rows), strict=True):
        row["cumulative"] = reached
    return rows


def moved_by(name: str) -> str:
    """Return the ceiling for a kernel's bytes: "stream" for AdamW, which writes nearly as much as it reads, else "read"."""
    return "stream" if name == "update" else "read"


def rates(name: str, flop: int, size: int, self_ns: float, ceiling: Ceiling | None, kind: str = "") -> Row:
    """Return a kernel's operations and bytes per second, and its share of the nearer of two ceilings (roofline model).

    kind: the weight format of a product. If it has integer products, their ceiling replaces that of fused multiply-add."""
    row: Row = {"flop": flop, "bytes": size, "gflop_s": None, "gb_s": None, "roof": None, "bound": None}
    if self_ns and flop:
        row["gflop_s"], row["gb_s"] = flop / self_ns, size / self_ns
        if ceiling:
            moved, dot = row["gb_s"] / ceiling[f"{moved_by(name)}_gb_s"], ceiling["dot_gop_s"].get(kind)
            computed = row["gflop_s"] / (dot or ceiling["fma_gflop_s"]), "dot" if dot else "fma"
            row["roof"], row["bound"] = max(computed, (moved, moved_by(name)))
    return row


def layers(calls: list[Call], nth: int) -> list[Row]:
    """Return total, self and wait of each layer with its backward pass, and of the parts before and after the layers."""
    rows = ({"layer": name, **tally.row(wall_of(calls))} for name, tally in tallies_of(calls, nth, place).items())
    kernels = ("median_ns", "calls")  # these fields count single kernels, not layers
    return [{key: value for key, value in row.items() if key not in kernels} for row in rows]


def computing(step: Step) -> dict[int, int]:
    """Return for each k how long exactly k workers compute in a step, in ns."""
    events = [event for noted in step for event in noted]
    edges = sorted([(event.begin, 1) for event in events] + [(event.end, -1) for event in events])
    found: dict[int, int] = defaultdict(int)
    count, before = 0, edges[0][0]
    for at, change in edges:
        found[count] += at - before
        count, before = count + change, at
    return found


def amdahl(serial: float, parallel: float, nth: int, floor: float | None) -> Row:
    """Predict speed-ups over one thread of the same kernels, from a run with nth workers.

    serial: ns in which fewer than all workers compute. parallel: ns in which all compute. The prediction "amdahl" divides the
    parallel part by n. In "bandwidth", the parallel part takes at least `floor` ns, its bytes' time at the read ceiling."""
    alone = serial + nth * parallel
    shares = {"serial_share": serial / (serial + parallel), "serial_fraction": serial / alone}
    found: Row = {"workers": nth, "serial_ns": serial, **shares, "one_thread_ns": alone, "predictions": []}
    for n in PREDICTED:
        part = (alone - serial) / n
        bandwidth = None if floor is None else alone / (serial + max(part, floor))
        row = {"threads": n, "prediction": True, "amdahl": alone / (serial + part), "bandwidth": bandwidth}
        found["predictions"].append(row)
    return found


def bandwidth_floor(rows: list[Row], ceilings: Sequence[Ceiling]) -> float | None:
    """Return the least time in ns that the rows' bytes take with all of this machine's threads.

    Return None if the ceiling is unknown, or if the bytes came faster than it allows, because then they came from a cache."""
    if not ceilings:
        return None
    most = max(ceilings, key=lambda ceiling: int(ceiling["threads"]))
    floor = sum(row["bytes"] / most[f"{moved_by(row['name'])}_gb_s"] for row in rows if row["bytes"])
    computing_ns = sum(row["self_ns"] for row in rows if row["kind"] == "kernel")
    return float(floor) if floor < 1.2 * computing_ns else None


def mode_report(
    config: Config, stored: Stored, calls: list[Call], untraced: list[Call], nth: int, ceilings: Sequence[Ceiling]
) -> tuple[Row, list[Row]]:
    """Return the summary and the rows of one mode."""
    wall = wall_of(calls)
    steps = [step for call in calls for step in call.steps]
    used = max((sum(bool(events) for events in step) for step in steps), default=nth)
    rows = hotspots(config, stored, calls, nth, next((c for c in ceilings if c["threads"] == used), None))
    active = used if used > 1 else nth
    together = sum(computing(step)[active] for step in steps)
    medians = [median(call.done - call.begin for call in found) if found else None for found in (calls, untraced)]
    summary = {
        "wall_ns": wall, "calls": len(calls), "tokens": sum(call.rows for call in calls), "steps": len(steps),
        "workers_used": used, "median_call_ns": medians[0], "untraced_median_call_ns": medians[1],
        **{name: sum(row[name] for row in rows) for name in ("wait_ns", "flop", "bytes")},
        "imbalance": _imbalance(rows, nth), "layers": layers(calls, nth), "stages": stages(calls, untraced),
        "amdahl": amdahl(wall - together, together, active, bandwidth_floor(rows, ceilings)),
    }  # fmt: skip
    return summary, rows


def stages(calls: list[Call], untraced: list[Call]) -> list[Row]:
    """Return the stages of an iteration of training, or [] for other calls. Their wall_ns add up to the mode's wall_ns."""
    rows = []
    for name in STAGES if calls[0].stages else ():
        times, plain = ([dict(call.times())[name] for call in found] for found in (calls, untraced))
        medians = {"median_ns": median(times), "untraced_median_ns": median(plain)}
        rows.append({"name": name, "wall_ns": sum(times), **medians, "share": sum(times) / wall_of(calls)})
    return rows


def speculation(calls: Sequence[Call], new: int) -> Row:
    """Return the counts of guesses of rounds with `new` tokens. Each step gives its right guesses and one more token."""
    guesses = [call.rows - 1 for call in calls if call.mode in ("verify", "decode")]
    tokens, drafted = new * sum(call.mode == "prefill" for call in calls), sum(guesses)
    accepted = tokens - len(guesses)
    acceptance = accepted / drafted if drafted else None
    return {"drafted": drafted, "accepted": accepted, "acceptance": acceptance, "tokens_per_step": tokens / len(guesses)}


def _imbalance(rows: list[Row], nth: int) -> Row:
    """Compare the busiest worker of the whole mode with the mean of all workers that compute."""
    busy = [sum(row["workers"][ith]["self_ns"] for row in rows if row["workers"]) for ith in range(nth)]
    mean = sum(busy) / max(1, sum(ns > 0 for ns in busy))
    worst = max(range(nth), key=busy.__getitem__)
    return {"self_ns": busy, "slowest": worst, "excess": busy[worst] / mean - 1 if mean else 0.0}
