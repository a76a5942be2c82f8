"""Write traces for viewers: Chrome's trace events (Perfetto, chrome://tracing), and Paraver's .prv, .pcf and .row.

Times begin with the first call. Sources: Google's "Trace Event Format" and Paraver's "Trace format"."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any

from ...formats.files import atomic_file
from .job import WAKE, Call, Event, place

ChromeEvent = dict[str, Any]


def chrome(path: str | os.PathLike[str], calls: list[Call], nth: int, title: str) -> None:
    """Write trace events with one track for each worker: calls, stages of training, steps, layers, phases and waits, nested."""
    events = [_event("process_name", 0, name=title)]
    events += [_event("thread_name", ith, name=f"worker {ith}") for ith in range(nth)]
    events += [_event("thread_sort_index", ith, sort_index=ith) for ith in range(nth)]
    span = partial(_span, calls[0].begin)
    for number, call in enumerate(calls):
        events.append(span(0, f"{call.mode} {number}", "call", call.begin, call.ran, rows=call.rows))
        events += [span(0, name, "stage", begin, end) for name, (begin, end) in call.bounds()]
        for step in call.steps:
            for ith, noted in enumerate(step):
                events += _nested(partial(span, ith), noted)
        if call.done > call.ran:
            events.append(span(0, "sampler", "sampler", call.ran, call.done))
    with atomic_file(path) as file:
        file.write(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}, separators=(",", ":")).encode())


def _nested(span: Callable[..., ChromeEvent], noted: list[Event]) -> Iterator[ChromeEvent]:
    """Yield the events of one worker's step, the outermost first."""
    if noted:
        yield span("step", "step", noted[0].begin, noted[-1].left)
    for where, events in groupby(noted, _layer):
        part = list(events)
        if where:
            yield span(where, "layer", part[0].begin, part[-1].left)
        for event in part:
            for name, begin, end in event.spans():
                kind, more = ("phase", {}) if begin == event.begin < event.end else ("wait", {"after": event.phase})
                yield span(name, kind, begin, end, layer=event.layer, **more)


def _layer(event: Event) -> str:
    """Return the name of the event's layer, "head", or "" for a phase outside both."""
    where = place(event.phase, event.layer)
    return f"layer {where}" if where.isdigit() else where if where == "head" else ""


def _span(zero: int, ith: int, name: str, category: str, begin: int, end: int, /, **args: object) -> ChromeEvent:
    """Return a complete event. Its times are microseconds with three decimals, so they are exact to the nanosecond."""
    times = {"ts": round((begin - zero) / 1000, 3), "dur": round((end - begin) / 1000, 3)}
    return {**_event(name, ith, **args), "cat": category, "ph": "X", **times}


def _event(name: str, ith: int, /, **args: object) -> ChromeEvent:
    """Return a metadata event, for example the name of a track."""
    return {"name": name, "ph": "M", "pid": 1, "tid": ith, "args": args}


IDLE, RUNNING, SYNCHRONISATION, FORK_JOIN = 0, 1, 5, 7
STATES = {
    IDLE: ("Idle", "117,195,255"), RUNNING: ("Running", "0,0,255"), SYNCHRONISATION: ("Synchronization", "179,0,0"),
    FORK_JOIN: ("Scheduling and Fork/Join", "255,255,0"), 9: ("Blocked", "0,162,0"), 12: ("I/O", "172,174,41"),
}  # fmt: skip
MODE, PHASE, LAYER = 60000001, 60000002, 60000003  # event types; the value 0 ends an event
SAMPLER = "sampler"
PCF_HEAD = """\
DEFAULT_OPTIONS\n\nLEVEL               THREAD\nUNITS               NANOSEC\nLOOK_BACK           100\nSPEED               1
FLAG_ICONS          ENABLED\nNUM_OF_STATE_COLORS 1000\nYMAX_SCALE          37\n\n
DEFAULT_SEMANTIC\n\nTHREAD_FUNC         State As Is\n\n
"""

Interval = tuple[int, int, int, str, str]  # begin, end, state, phase or "", place or ""


def paraver(stem: str | os.PathLike[str], calls: list[Call], nth: int) -> list[str]:
    """Write STEM.prv, STEM.pcf and STEM.row; return their names. Every worker has exactly one state at every time."""
    events = [event for call in calls for step in call.steps for noted in step for event in noted if event.phase != WAKE]
    names = {MODE: [*dict.fromkeys(call.mode for call in calls)]}
    names[PHASE] = [*dict.fromkeys(event.phase for event in events), SAMPLER]
    names[LAYER] = [*dict.fromkeys(map(_place, events)), SAMPLER]
    levels = {"CPU": [f"CPU {i + 1}" for i in range(nth)], "NODE": ["node 1"], "THREAD": [f"worker {i}" for i in range(nth)]}
    blocks = ["\n".join([f"LEVEL {level} SIZE {len(own)}", *own]) for level, own in levels.items()]
    texts = {".prv": _prv(calls, nth, names), ".pcf": _pcf(names), ".row": "\n\n".join(blocks) + "\n"}
    for suffix, text in texts.items():
        with atomic_file(f"{os.fspath(stem)}{suffix}") as file:
            file.write(text.encode())
    return [f"{os.fspath(stem)}{suffix}" for suffix in texts]


def _place(event: Event) -> str:
    """Return the place of an event in the network."""
    return _layer(event) or place(event.phase, event.layer)


def _prv(calls: list[Call], nth: int, names: dict[int, list[str]]) -> str:
    """Return the records, sorted by time. At equal times, states come first, then ends of events, then begins of events."""
    zero, end = calls[0].begin, calls[-1].done
    records: list[tuple[int, int, int, str]] = []  # time, rank, worker, text
    for ith in range(nth):
        who = f"{ith + 1}:1:1:{ith + 1}"
        for begin, until, state, phase, where in _intervals(calls, ith):
            b, u = begin - zero, until - zero
            records.append((b, 1, ith, f"1:{who}:{b}:{u}:{state}"))
            if phase:
                values = f"{PHASE}:{names[PHASE].index(phase) + 1}:{LAYER}:{names[LAYER].index(where) + 1}"
                records.append((b, 3, ith, f"2:{who}:{b}:{values}"))
                records.append((u, 2, ith, f"2:{who}:{u}:{PHASE}:0:{LAYER}:0"))
    for call in calls:
        b, u = call.begin - zero, call.done - zero
        records.append((b, 3, 0, f"2:1:1:1:1:{b}:{MODE}:{names[MODE].index(call.mode) + 1}"))
        records.append((u, 2, 0, f"2:1:1:1:1:{u}:{MODE}:0"))
    records.sort()
    head = f"#Paraver ({datetime.now():%d/%m/%Y at %H:%M}):{end - zero}_ns:1({nth}):1:1({nth}:1)"
    return "\n".join([head, *(text for *_, text in records)]) + "\n"


def _intervals(calls: list[Call], ith: int) -> Iterator[Interval]:
    """Yield one worker's states, without gaps, from the begin of the first call to the end of the last."""
    between = FORK_JOIN if ith == 0 else IDLE  # time without an event is Python and pool on worker 0
    at = calls[0].begin
    for call in calls:
        for step in call.steps:
            for event in step[ith]:
                if event.begin > at:
                    yield at, event.begin, between, "", ""
                for name, begin, end in event.spans():
                    busy = name == event.phase != WAKE
                    yield (begin, end, RUNNING, name, _place(event)) if busy else (begin, end, SYNCHRONISATION, "", "")
                at = event.left
        if ith == 0:
            yield at, call.ran, between, "", ""
            if call.done > call.ran:
                yield call.ran, call.done, RUNNING, SAMPLER, SAMPLER
            at = call.done
    if calls[-1].done > at:
        yield at, calls[-1].done, between, "", ""


def _pcf(names: dict[int, list[str]]) -> str:
    """Return the names and colours of the numbers in the .prv file."""
    lines = ["STATES", *(f"{number}    {name}" for number, (name, _) in STATES.items())]
    lines += ["", "", "STATES_COLOR", *(f"{number}    {{{colour}}}" for number, (_, colour) in STATES.items())]
    for number, label in ((MODE, "Call"), (PHASE, "Phase"), (LAYER, "Layer")):
        lines += ["", "", "EVENT_TYPE", f"0    {number}    {label}", "VALUES", "0    End"]
        lines += [f"{value}    {name}" for value, name in enumerate(names[number], 1)]
    return PCF_HEAD + "\n".join(lines) + "\n"
