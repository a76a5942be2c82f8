"""Show where GPT-2 spends its time: in a prompt and the tokens after it, or in iterations of training.

    pygpt profile                                   the default model, 2 prompt tokens, 32 new tokens
    pygpt profile -m gpt2_124M.bin --prompt-length 512 -n 32 -t 2
    pygpt profile -m gpt2_124M.bin --weights q8_0   the same with weights that are quantised in memory
    pygpt profile --train -B 4 -T 64 -n 3           three iterations of training on 4 sequences of 64 tokens
    pygpt profile --speculate auto -n 64            with speculation: draft, verify and rollback apart
    pygpt profile --skip all                        only the hotspots and predictions, in a second
    pygpt profile -o json > a.json                  print JSON; --compare a.json b.json shows the differences of two reports
    pygpt profile --stretch fc=3 --stretch 1:all=2  slow down a kernel and a worker, to check that the report shows it

docs/reference/reports.md describes the JSON."""

import argparse
import json
import os
import platform
from functools import partial
from typing import Any

from ... import __version__
from ..._kernels import Trace, cpu_info
from ...cpus import default_threads, processors
from ...errors import InputError
from ...formats.files import check_writable
from ...formats.open import open_model
from ...formats.panels import QUANTISED
from ...generation.request import check_speculation
from ...hub.find import find_model
from ...inspection.show import make_plot_folder
from ...model import DRAFTS
from ..console import Parser, check_stdout, listed, say, status_of, whole
from ..options import DRAFT_HELP, SPECULATE_HELP, parse_speculation
from . import job, numbers, perf, plots, startup, strategies, text, traces
from .work import Stored, weight_bytes

PARTS = ("ceilings", "scaling", "strategies", "serial", "startup")
PROMPT = (31373, 612)  # "hello there"
GENERATION = ("tokens", "prompt_length", "sampler", "weights", "speculate", "draft_model")  # options that --train does not have
Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(parse(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt profile", usage="pygpt profile [options]", description=__doc__)
    add = parser.add_argument
    new = "number of tokens to decode one by one (default 32); with --train, number of iterations (default 3)"
    rounds = "run the job N times without a trace and N times with a trace, alternating (default 3)"
    slow = "number of tokens in the comparison of strategies, because the serial reference is slow (default 8)"
    planting = "for tests: slow down a phase (or `all`) by the factor K, on worker W or on all workers; may be repeated"
    add("-m", "--model", metavar="PATH", help="a model file or a downloaded model (default: see pygpt --help)")
    add("--weights", metavar="FORMAT", help="quantise the weights in memory to q8_0 or q4_0 (default: use the file's weights)")
    add("--tokens", metavar="IDS", help="the prompt, such as 31373,612 (the default)")
    add("--prompt-length", metavar="N", type=whole(1, 1 << 20), help="use an artificial prompt of N tokens instead")
    add("-n", "--new", metavar="N", type=whole(1, 1 << 20), help=new)
    add("--train", action="store_true", help="profile training: forward, backward, gradient norm, AdamW")
    add("-B", metavar="N", type=whole(1, 1 << 16), help="with --train, sequences in a batch (default 4)")
    add("-T", metavar="N", type=whole(1, 1 << 16), help="with --train, tokens in a sequence (default 64)")
    add("-t", "--threads", metavar="N", type=whole(1, 256), help="threads (default $PYGPT_THREADS, else one per usable core)")
    add("-r", "--rounds", metavar="N", type=whole(1, 1000), default=3, help=rounds)
    add("--sampler", metavar="NAME", choices=("median", "greedy"), help="median (default) or greedy")
    add("--speculate", metavar="K", help=f"{SPECULATE_HELP} (default off)")
    add("--draft-model", metavar="MODEL", help=DRAFT_HELP)
    add("--by-layer", action="store_true", help="add a table of the layers")
    parts = f"leave out parts of the report: all, or some of {','.join(PARTS)}"
    add("--skip", metavar="LIST", type=listed(["all", *PARTS]), default=[], help=parts)
    add("--serial-tokens", metavar="N", type=whole(1, 1 << 20), default=8, help=slow)
    add("--plot", metavar="DIR", help="write pictures into this folder as SVG and PNG (needs matplotlib)")
    add("--trace", metavar="FILE", help="write Chrome's trace events, for Perfetto")
    add("--paraver", metavar="STEM", help="write STEM.prv, STEM.pcf and STEM.row, for Paraver")
    add("--sample", action="store_true", help="run the job under Linux perf too: the hottest symbols")
    add("-o", "--output", metavar="FORMAT", choices=("text", "json"), default="text", help="text (default) or json")
    add("--compare", metavar=("A", "B"), nargs=2, help="show the differences of two JSON reports; run nothing")
    add("--all-workers", action="store_true", help="use all workers even for steps that are faster on fewer")
    add("--capacity", metavar="N", type=whole(1, 1 << 24), help="record at most N events per worker and round (default: all)")
    add("--stretch", metavar="[W:]PHASE=K", action="append", default=[], help=planting)
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the arguments. Raises InputError for everything that can be checked without the model."""
    options = build_parser().parse_args(arguments)
    for name in GENERATION if options.train else ("B", "T"):
        if getattr(options, name) is not None:
            flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} cannot be used {'with' if options.train else 'without'} --train: leave out {flag}")
    for name, usual in ("new", 3 if options.train else 32), ("B", 4), ("T", 64), ("sampler", "median"):
        if getattr(options, name) is None:
            setattr(options, name, usual)
    options.speculate = parse_speculation(options.speculate or "off")
    if check_speculation(options.speculate) is None and options.draft_model is not None:
        raise InputError("--draft-model cannot be used without --speculate: leave out --draft-model")
    if options.tokens is not None and options.prompt_length is not None:
        raise InputError("--tokens and --prompt-length were both given: give one")
    options.parts = set() if "all" in options.skip else {*PARTS} - {*options.skip}
    options.stretch = [planted(given) for given in options.stretch]
    written = [f"{options.paraver}{ending}" for ending in (".prv", ".pcf", ".row") if options.paraver is not None]
    for path in filter(None, [options.trace, *written]):
        check_writable(path)
    return options


def planted(given: str) -> job.Planted:
    """Read the value of --stretch: [W:]PHASE=K. Raises InputError for anything else."""
    where, _, times = given.rpartition("=")
    worker, colon, phase = where.rpartition(":")
    try:
        factor = float(times)
    except ValueError:
        factor = 0.0
    if not phase or not 1 <= factor <= 1000 or (colon and not (worker.isascii() and worker.isdigit() and len(worker) < 5)):
        raise InputError(f"--stretch is {given[:40]!r}: it must look like fc=3, 1:fc=3 or 1:all=2, the factor from 1 to 1000")
    return job.Planted(None if phase == "all" else phase, factor, int(worker) if colon else None)


def make_job(options: argparse.Namespace, path: str) -> job.Job:
    """Return the job to run. Raises InputError for options that do not fit the model."""
    if options.train:
        return job.Training.of(path, options.B, options.T, options.new, all_workers=options.all_workers)
    with open_model(path) as opened:
        V, maxT = opened.config.V, opened.config.maxT
    if options.prompt_length is not None:
        prompt = [(PROMPT[0] + 7919 * i) % V for i in range(options.prompt_length)]
    elif options.tokens is not None:
        try:
            prompt = [whole(0, V - 1)(word.strip()) for word in options.tokens.split(",")]
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--tokens: an id: {error}") from None
    else:
        prompt = [token % V for token in PROMPT]
    if len(prompt) + options.new > maxT:
        given = f"{len(prompt)} prompt tokens and {options.new} new tokens"
        raise InputError(f"{given} exceed the model's context of {maxT}: make one of them smaller (--prompt-length, -n)")
    asked = prompt, options.new, options.sampler, options.all_workers, options.weights
    return job.Generation(*asked, options.speculate, options.draft_model)


def run(options: argparse.Namespace) -> None:
    """Profile the job, print the report, and write the requested files."""
    check_stdout("the report")
    if options.compare:
        print(text.compare(*options.compare))
        return
    path, _ = find_model(options.model)
    if options.plot:
        make_plot_folder(options.plot)
    report, recording, task = profile(options, path)
    if options.sample:
        report["perf"] = perf.sampled(path, task, report)
    print(json.dumps(report, indent=1) if options.output == "json" else text.render(report, by_layer=options.by_layer))
    nth, calls, written = report["machine"]["threads"], recording.calls, []
    if options.trace:
        traces.chrome(options.trace, calls, nth, f"pygpt {report['model']['name']}")
        written.append(options.trace)
    if options.paraver:
        written += traces.paraver(options.paraver, calls, nth)
    if options.plot:
        written += plots.draw(options.plot, report, calls)
    for name in written:
        say(f"wrote {name}")


def profile(options: argparse.Namespace, path: str) -> tuple[Report, job.Recording, job.Job]:
    """Run all requested parts; return the report, the recording and the job."""
    cores, parts = default_threads(), options.parts
    task = make_job(options, path)
    with task.open(path, options.threads) as model:
        nth = model.threads
        job.plant(Trace(nth, 1), options.stretch)  # raises InputError before the job runs
        counts = sorted({*(1 << k for k in range(cores.bit_length())), cores, nth})  # powers of two, all cores
        stored = job.stored_of(model)
        kinds = {kind for network in (stored, getattr(job.draft_of(model), "stored", {})) for kind, _ in network.values()}
        limits = partial(strategies.ceilings, counts, stream=options.train, dots=sorted(kinds & {*QUANTISED}))
        ceilings = limits(2) if "ceilings" in parts else []
        recording = job.record(model, task, options.rounds, options.capacity, options.stretch)
        ceilings = strategies.best(ceilings, limits(1) if ceilings else [])
        report = facts(options, path, stored, task, recording) | hotspots(model, task, recording, ceilings)
    report |= {"ceilings": ceilings, "scaling": [], "strategies": None, "startup": None, "perf": None}
    if "scaling" in parts:
        report["scaling"] = strategies.scaling(path, task, counts, options.rounds)
    if "strategies" in parts:
        report["strategies"] = ways(options, path, task, nth, model.config.maxT)
    if "startup" in parts:
        report["startup"] = startup.measure(path, task, nth)
    return report, recording, task


def ways(options: argparse.Namespace, path: str, task: job.Job, nth: int, maxT: int) -> Report:
    """Compare the strategies on a smaller job."""
    tokens, serial = options.serial_tokens, "serial" in options.parts
    small: job.Job
    if isinstance(task, job.Training):
        small = job.Training.of(path, 1, min(tokens, maxT), 1, all_workers=options.all_workers)
    else:
        small = job.Generation(task.prompt[: max(1, min(tokens, maxT - strategies.DECODES))], 1, weights=task.weights)
    return strategies.compare(path, small, nth, options.rounds, with_serial=serial)


def hotspots(model: Any, task: job.Job, recording: job.Recording, ceilings: list[dict[str, Any]]) -> Report:
    """Return the part of the report about the job itself: wall_ns, kernels, modes, speculation."""
    report: Report = {"wall_ns": 0, "kernels": [], "modes": {}, "speculation": None}
    stored, draft = job.stored_of(model), job.draft_of(model)
    shapes = {} if draft is None else {"draft": (draft.config, draft.stored)}
    for mode in task.modes:
        calls, untraced = ([call for call in found if call.mode == mode] for found in (recording.calls, recording.untraced))
        if not calls:
            continue
        config, weights = shapes.get(mode, (model.config, stored))
        summary, rows = numbers.mode_report(config, weights, calls, untraced, len(recording.dropped), ceilings)
        report["wall_ns"] += summary["wall_ns"]
        report["modes"][mode] = summary
        report["kernels"] += [{"mode": mode, **row} for row in rows]
    if isinstance(task, job.Generation) and task.speculation:
        draft_name = task.draft or DRAFTS.get(stored["qkvw"][0], "lookup")
        report["speculation"] = {"guesses": "auto" if task.speculation is True else task.speculation, "draft": draft_name}
        report["speculation"] |= numbers.speculation(recording.calls, task.new)
    return report


def facts(options: argparse.Namespace, path: str, stored: Stored, task: job.Job, recording: job.Recording) -> Report:
    """Return the part of the report about the model, the machine and the job's options."""
    with open_model(path) as opened:
        config, version = opened.config, getattr(opened, "version", None)
    described = []
    for phase, times, worker in options.stretch:
        where = "" if worker is None else f" on worker {worker}"
        described.append(f"{phase or 'every phase'} takes {times:g} times as long{where}")
    processor = (processors() or [platform.processor() or platform.machine()])[0]
    nth, digests = len(recording.dropped), recording.digests
    return {
        "schema": text.SCHEMA, "pygpt": __version__,
        "model": {
            "path": path, "name": os.path.basename(path), "version": version,
            **{name: getattr(config, name) for name in ("L", "NH", "C", "V", "maxT")},
            "weights": stored["qkvw"][0], "head": stored["wte"][0], "weight_bytes": weight_bytes(stored),
        },
        "machine": {"processor": processor, "isa": cpu_info()["isa"], "cores": default_threads(), "threads": nth},
        "job": {**task.describe(), "rounds": options.rounds, "all_workers": options.all_workers, "planted": described},
        "bits": {**{name: min(found) for name, found in digests.items()}, "same": len(set().union(*digests.values())) == 1},
        "trace": {"capacity": recording.capacity, "dropped": recording.dropped},
    }  # fmt: skip
