"""Report where the time goes: in a prompt and the tokens after it, or in iterations of training.

    pygpt profile                                   the model that pygpt would use, two tokens in, 32 out
    pygpt profile -m gpt2_124M.bin --prompt-length 512 -n 32 -t 2
    pygpt profile --train -B 4 -T 64 -n 3           three iterations of training on 4 sequences of 64 tokens
    pygpt profile --skip all                        hotspots only, in a second
    pygpt profile -o json > a.json                  the same as JSON; --compare a.json b.json says what moved
    pygpt profile --stretch fc=3 --stretch 1:all=2  slow parts down, to see whether the report finds them

JSON, schema 1 (times in ns, summed over the rounds except for medians; null or empty: not measured):

    schema, pygpt           1, and the package's version
    model                   path, name, L, NH, C, V, maxT, version, value_bytes
    machine                 processor, isa, cores, threads (workers)
    job                     prompt_tokens, new_tokens, sampler, or B, T, iterations; rounds, all_workers, planted [text]
    bits                    profiled, unprofiled: digests of all logits (of losses, norms and weights); same
    trace                   capacity, dropped [events that found no room, by worker]
    ceilings                [threads, read_gb_s, fma_gflop_s, stream_gb_s (AdamW's traffic)]
    wall_ns                 time around all profiled calls
    kernels                 [mode, name, kind (kernel, wait or outside), calls, total_ns = self_ns + wait_ns, median_ns (self,
                            of one call), share (of the mode's wall_ns), cumulative, imbalance, flop, bytes, gflop_s, gb_s,
                            roof, bound (fma, read or stream), workers [calls, self_ns, wait_ns]]; a mode's total_ns add up to
                            its wall_ns
    modes.prefill, .decode; .train
                            wall_ns, calls, tokens, steps, workers_used, median_call_ns, untraced_median_call_ns, wait_ns,
                            flop, bytes, imbalance {self_ns [by worker], slowest, excess}, layers [layer, else as kernels],
                            stages [name (forward, backward, norm, update), wall_ns, median_ns, untraced_median_ns, share] of
                            an iteration, amdahl {serial_ns, serial_share, serial_fraction, one_thread_ns, predictions
                            [threads, prediction, amdahl, bandwidth]}
    scaling                 [threads, prediction (false), prefill_ns, prefill_speedup, decode_ns, decode_speedup]; of training
                            train_ns, train_speedup and the same of forward, backward, norm and update: forward_ns,
                            forward_speedup, backward_ns, backward_speedup, norm_ns, norm_speedup, update_ns, update_speedup
    strategies              prompt_tokens, same_bits, same_tokens, ways [name, threads, rounds_a_step, meetings_a_step,
                            prefill_ns, prefill_speedup, prefill_efficiency, decode_ns, decode_speedup, decode_efficiency];
                            of training B, T, same_bits, same_losses, and in a way (whose step is an iteration) train_ns,
                            train_speedup, train_efficiency and the same of its stages: forward_efficiency,
                            backward_efficiency, norm_efficiency, update_efficiency
    startup                 [name, ns, minor, major (page faults)]
    perf                    samples, symbols [symbol, object, share], families {name: share of computing}, reported {the
                            same from the kernels}

Exit status: 0; 1 for a failure at run time; 2 for bad arguments, with one line on stderr; 130 after Ctrl-C.
"""

import argparse
import json
import os
import platform
from functools import partial
from typing import Any

from ... import __version__
from ..._kernels import Trace, cpu_info
from ...cpus import default_threads
from ...errors import InputError
from ...formats.checkpoint import Checkpoint
from ...hub.find import find_model
from ..console import HelpFormatter, Parser, check_stdout, say, status_of, whole
from . import compare, job, numbers, perf, plots, startup, strategies, text, traces

PARTS = ("ceilings", "scaling", "strategies", "serial", "startup")
PROMPT = (31373, 612)  # "hello there"
GENERATION = {"tokens": "--tokens", "prompt_length": "--prompt-length", "sampler": "--sampler"}  # options of one kind of job
TRAINING = {"B": "-B", "T": "-T"}
Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(parse(arguments)))


# ------------------------------------------------------------------------------------------------ arguments


def build_parser() -> argparse.ArgumentParser:
    """The options and their help."""
    parser = Parser(
        prog="pygpt profile",
        usage="pygpt profile [options]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="PATH", help="an llm.c checkpoint (default: the one that pygpt would use)")
    add("--tokens", metavar="IDS", help="the prompt, as in 31373,612 (the default)")
    add("--prompt-length", metavar="N", help="a made-up prompt of so many tokens instead")
    add(
        "-n",
        "--new",
        metavar="N",
        type=whole(1, 1 << 20),
        help="tokens to decode after the prompt, one by one (default 32); or iterations (default 3)",
    )
    add("--train", action="store_true", help="training instead: forward, backward, gradient's norm, AdamW")
    add("-B", metavar="N", type=whole(1, 1 << 16), help="its sequences in a batch (default 4)")
    add("-T", metavar="N", type=whole(1, 1 << 16), help="its tokens in a sequence (default 64)")
    add(
        "-t", "--threads", metavar="N", type=whole(1, 256), help="workers (default $PYGPT_THREADS, else what fits this machine)"
    )
    add(
        "-r",
        "--rounds",
        metavar="N",
        type=whole(1, 1000),
        default=3,
        help="rounds of the job, untraced and traced in turn (default 3)",
    )
    add("--sampler", metavar="NAME", help="median (default) or greedy")
    add("--by-layer", action="store_true", help="add a table by layer")
    add("--skip", metavar="LIST", default="", help=f"leave out parts: all, or some of {','.join(PARTS)}")
    add(
        "--serial-tokens",
        metavar="N",
        type=whole(1, 1 << 20),
        default=8,
        help="tokens of the strategies: the serial reference is slow (default 8)",
    )
    add("--plot", metavar="DIR", help="write pictures there, SVG and PNG (needs matplotlib)")
    add("--trace", metavar="FILE", help="write Chrome's trace events, for Perfetto")
    add("--paraver", metavar="STEM", help="write STEM.prv, STEM.pcf and STEM.row, for Paraver")
    add("--sample", action="store_true", help="run the job under Linux perf too and print the hottest symbols")
    add("-o", "--output", metavar="FORMAT", default="text", help="text (default) or json, with the schema above")
    add("--compare", metavar=("A", "B"), nargs=2, help="print what moved between two reports in JSON; nothing runs")
    add("--all-workers", action="store_true", help="use all workers even for steps too small to be worth it")
    add("--capacity", metavar="N", type=whole(1, 1 << 24), help="events that a worker can note in a round (default: enough)")
    planting = "debugging: make a phase (or `all`) last K times as long, on worker W or on all; may be repeated"
    add("--stretch", metavar="[W:]PHASE=K", action="append", default=[], help=planting)
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Check all that can be checked without the model."""
    options = build_parser().parse_args(arguments)
    for name, flag in (GENERATION if options.train else TRAINING).items():
        if getattr(options, name) is not None:
            raise InputError(f"{flag} has no meaning {'with' if options.train else 'without'} --train: leave it out")
    for name, usual in ("new", 3 if options.train else 32), ("B", 4), ("T", 64), ("sampler", "median"):
        if getattr(options, name) is None:
            setattr(options, name, usual)
    if options.output not in ("text", "json"):
        raise InputError(f"-o is {options.output[:40]!r}: it must be text or json")
    if options.sampler not in ("median", "greedy"):
        raise InputError(f"--sampler is {options.sampler[:40]!r}: it must be median or greedy")
    if options.tokens is not None and options.prompt_length is not None:
        raise InputError("--tokens and --prompt-length were both given: give one")
    skipped = set(filter(None, options.skip.split(",")))
    if unknown := sorted(skipped - {*PARTS, "all"}):
        raise InputError(f"--skip: no part {unknown[0][:40]!r}: parts are {', '.join(PARTS)}, or all")
    options.parts = set() if "all" in skipped else {*PARTS} - skipped
    options.stretch = [planted(given) for given in options.stretch]
    for flag, path in ("--trace", options.trace), ("--paraver", options.paraver):
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"{flag}: {path}: there is no folder {os.path.dirname(path)!r}: make it first")
    return options


def count(name: str, given: str, least: int, most: int) -> int:
    """A whole number of an option."""
    if not (given.isascii() and given.isdigit() and len(given) < 12 and least <= int(given) <= most):
        raise InputError(f"{name} is {given[:40]!r}: it must be a whole number from {least} to {most}")
    return int(given)


def planted(given: str) -> job.Planted:
    """--stretch [W:]PHASE=K."""
    where, _, times = given.rpartition("=")
    worker, colon, phase = where.rpartition(":")
    try:
        factor = float(times)
    except ValueError:
        factor = 0.0
    if not phase or not 1 <= factor <= 1000 or (colon and not (worker.isascii() and worker.isdigit() and len(worker) < 5)):
        raise InputError(f"--stretch is {given[:40]!r}: it must look like fc=3, 1:fc=3 or 1:all=2, times from 1 to 1000")
    return job.Planted(None if phase == "all" else phase, factor, int(worker) if colon else None)


def make_job(options: argparse.Namespace, path: str) -> job.Job:
    """What is to be run; raises InputError for what does not fit the model."""
    if options.train:
        return job.Training.of(path, options.B, options.T, options.new, all_workers=options.all_workers)
    with Checkpoint(path) as checkpoint:
        V, maxT = checkpoint.config.V, checkpoint.config.maxT
    if options.prompt_length is not None:
        length = count("--prompt-length", options.prompt_length, 1, maxT)
        prompt = [(PROMPT[0] + 7919 * i) % V for i in range(length)]
    elif options.tokens is not None:
        prompt = [count("--tokens: an id", word.strip(), 0, V - 1) for word in options.tokens.split(",")]
    else:
        prompt = [token % V for token in PROMPT]
    if len(prompt) + options.new > maxT:
        raise InputError(f"a prompt of {len(prompt)} and {options.new} new tokens exceed the model's {maxT} tokens")
    return job.Generation(prompt, options.new, options.sampler, options.all_workers)


# ------------------------------------------------------------------------------------------------ the run


def run(options: argparse.Namespace) -> None:
    """Profile, print the report, write the files that were asked for."""
    check_stdout("the report")
    if options.compare:
        print(compare.compare(*options.compare))
        return
    if options.plot:
        plots.matplotlib()  # if it is missing, say so now
    path, _ = find_model(options.model)
    report, recording, task = profile(options, path)
    if options.sample:
        try:
            report["perf"] = perf.look(path, task, report["machine"]["threads"])
            report["perf"]["reported"] = perf.reported(report["kernels"])
        except perf.PerfAbsent as error:
            say(str(error))
    print(json.dumps(report, indent=1) if options.output == "json" else text.render(report, by_layer=options.by_layer))
    for name in write(options, report, recording.calls):
        say(f"wrote {name}")


def write(options: argparse.Namespace, report: Report, calls: list[job.Call]) -> list[str]:
    """Write pictures and traces; returns their names."""
    nth = report["machine"]["threads"]
    written = []
    if options.trace:
        traces.chrome(options.trace, calls, nth, f"pygpt {report['model']['name']}")
        written.append(options.trace)
    if options.paraver:
        written += traces.paraver(options.paraver, calls, nth)
    if options.plot:
        written += plots.draw(options.plot, report, calls)
    return written


def profile(options: argparse.Namespace, path: str) -> tuple[Report, job.Recording, job.Job]:
    """Run all parts that are wanted: the report, what was noted, and the job."""
    cores, parts = default_threads(), options.parts
    task = make_job(options, path)
    with task.open(path, options.threads) as model:
        nth = model.threads
        job.plant(Trace(nth, 1), options.stretch)  # refused before anything runs
        counts = sorted({*strategies.thread_counts(cores), nth})
        limits = partial(strategies.ceilings, counts, stream=options.train)
        ceilings = limits(2) if "ceilings" in parts else []
        recording = job.record(model, task, options.rounds, options.capacity, options.stretch)
        ceilings = strategies.best(ceilings, limits(1) if ceilings else [])
    report = facts(options, path, task, recording) | hotspots(path, task, recording, ceilings)
    report |= {"ceilings": ceilings, "scaling": [], "strategies": None, "startup": None, "perf": None}
    if "scaling" in parts:
        report["scaling"] = strategies.scaling(path, task, counts, options.rounds)
    if "strategies" in parts:
        report["strategies"] = ways(options, path, task, nth)
    if "startup" in parts:
        report["startup"] = startup.measure(path, task, nth)
    return report, recording, task


def ways(options: argparse.Namespace, path: str, task: job.Job, nth: int) -> Report:
    """The ways to dispatch a smaller job."""
    with Checkpoint(path) as checkpoint:
        maxT = checkpoint.config.maxT
    tokens, serial = options.serial_tokens, "serial" in options.parts
    if isinstance(task, job.Training):
        small = job.Training.of(path, 1, min(tokens, maxT), 1, all_workers=options.all_workers)
        return strategies.compare_training(small, nth, options.rounds, with_serial=serial)
    prompt = task.prompt[: max(1, min(tokens, maxT - strategies.DECODES))]
    return strategies.compare(path, prompt, nth, options.rounds, with_serial=serial)


def hotspots(path: str, task: job.Job, recording: job.Recording, ceilings: list[dict[str, Any]]) -> Report:
    """The figures of the job itself: wall_ns, kernels, modes."""
    with Checkpoint(path) as checkpoint:
        config, value_bytes = checkpoint.config, checkpoint.format.block_bytes
    modes, kernels = {}, []
    for mode in task.modes:
        calls, untraced = ([call for call in found if call.mode == mode] for found in (recording.calls, recording.untraced))
        nth = len(recording.dropped)
        modes[mode], rows = numbers.mode_report(config, value_bytes, calls, untraced, nth, ceilings)
        kernels += [{"mode": mode, **row} for row in rows]
    return {"wall_ns": sum(summary["wall_ns"] for summary in modes.values()), "kernels": kernels, "modes": modes}


def facts(options: argparse.Namespace, path: str, task: job.Job, recording: job.Recording) -> Report:
    """What ran on what."""
    with Checkpoint(path) as checkpoint:
        shape = {name: getattr(checkpoint.config, name) for name in ("L", "NH", "C", "V", "maxT")}
        values = {"version": checkpoint.version, "value_bytes": checkpoint.format.block_bytes}
    nth = len(recording.dropped)
    machine = {"processor": processor(), "isa": cpu_info()["isa"], "cores": default_threads(), "threads": nth}
    described = []
    for phase, times, worker in options.stretch:
        where = "" if worker is None else f" on worker {worker}"
        described.append(f"{phase or 'every phase'} takes {times:g} times as long{where}")
    return {
        "schema": compare.SCHEMA,
        "pygpt": __version__,
        "model": {"path": path, "name": os.path.basename(path), **shape, **values},
        "machine": machine,
        "job": {
            **task.describe(),
            "rounds": options.rounds,
            "all_workers": options.all_workers,
            "planted": described,
        },
        "bits": {name: min(found) for name, found in recording.digests.items()} | {"same": recording.same_bits},
        "trace": {"capacity": recording.capacity, "dropped": recording.dropped},
    }


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
