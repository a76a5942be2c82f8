"""Measure speed in tokens per second, and compare it with the machine's limits, measured in the same minutes.

    pygpt bench -m gpt2_124M.bin                     print the table for 1 and 2 threads
    pygpt bench -m gpt2_124M.bin -p 512 -n 64 -d 8,512 -t 2 -r 9 -o json
    pygpt bench -m gpt2_124M.bin --reference         also run the serial reference, and show the speed-up over it
    pygpt bench -m gpt2_124M.bin --against all       also run installed peers (other programs) on the same weights
    pygpt bench -m gpt2_124M.bin --weights file,q8_0,q4_0 --against all  compare the file's weights and two quantised formats
    pygpt bench -m gpt2_124M.bin --train -B 4 -T 64  measure training; --reference and --against work too
    pygpt bench -m gpt2_124M.bin --speculate auto,4 --sampler greedy,median --draft-model q8_0,lookup  measure speculation
    pygpt bench --serve http://127.0.0.1:8000        measure a server; --serve URL --help shows the options

Tests are named as in llama-bench:

    pp512        prefill of a prompt of 512 tokens
    tg64@d8      decode of 64 new tokens after a context of 8 tokens
    tg64@d8xb8   the same for 8 sequences together
    process      the whole command, with 2 prompt tokens and 8 new tokens

Each round runs every test once, so that a slow minute of a shared machine affects all tests alike. The results are medians.
docs/reference/reports.md describes the limits and the JSON."""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from ... import __version__
from ..._kernels import cpu_info
from ...ceilings import Ceilings
from ...config import Config
from ...cpus import processors
from ...errors import InputError, PyGPTError, plural
from ...formats.open import open_floats, open_model
from ...formats.panels import QUANTISED
from ...generation.request import check_speculation
from ...generation.sampling import SAMPLERS
from ...hub.find import find_model
from ..console import Parser, Progress, check_stdout, listed, status_of, whole
from ..options import DRAFT_HELP, parse_number, parse_speculation
from . import load, peers
from .measuring import CLONE, Result, print_results
from .tests import FILE, PARTS, check_losses, generation_tests, training_tests

BATCH = 8
RATES = ("read_gb_s", "fma_gflop_s", "stream_gb_s")  # of Ceilings; the last one with --train
SIZES: dict[str, Any] = {"new": 64, "depths": [8, 512], "batches": [1, BATCH], "weights": [FILE]}
MODES: dict[str, dict[str, Any]] = {  # the options of each mode, and their usual values
    "": {"prompts": [64, 512, 1000], **SIZES},
    "train": {"B": 4, "T": 64},
    "speculate": {
        **SIZES, "depths": [8], "batches": [1], "speculate": [], "sampler": ["greedy"], "temperature": 1.0, "seed": 1,
        "draft_model": [None],
    },
}  # fmt: skip
FLAGS = {name: f"--{name}" for name in ("weights", "speculate", "sampler", "seed")}
FLAGS |= {"temperature": "--temp", "draft_model": "--draft-model"}


def numbers(text: str) -> list[int]:
    """Read a list of positive whole numbers such as 64,512,1000, as a type for argparse."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive whole numbers such as 64,512")
    return [int(word) for word in words]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt bench", usage="pygpt bench [options]", description=__doc__)
    add, count = parser.add_argument, whole(1, 999_999)
    guessed = "measure decode with and without speculation, for each of these: auto (default), or a number of tokens to guess"
    add("-m", "--model", help="a model file or a downloaded model (default: see pygpt --help)")
    kinds = f"formats to measure, each quantised in memory: {', '.join(QUANTISED)}, or {FILE} for those of the file (default)"
    add("--weights", type=listed([FILE, *QUANTISED]), metavar="LIST", help=kinds)
    add("-p", "--prompts", type=numbers, help="lengths of prompts (default 64,512,1000)")
    add("-n", "--new", type=count, help="new tokens in a decode test (default 64)")
    add("-d", "--depths", type=numbers, help="tokens of context before the new tokens (default 8,512)")
    add("-b", "--batches", type=numbers, help=f"numbers of sequences decoded together (default 1,{BATCH})")
    add("--train", action="store_true", help="measure training: forward, backward, norm, update")
    add("-B", type=count, help="with --train, sequences in a batch (default 4)")
    add("-T", type=count, help="with --train, tokens in a sequence (default 64)")
    add("--speculate", metavar="LIST", nargs="?", const="auto", help=guessed)
    add("--sampler", metavar="LIST", type=listed(SAMPLERS), help="for --speculate: names of samplers (default greedy)")
    add("--temp", dest="temperature", metavar="X", help="for --speculate: temperature of the sampler sample (default 1)")
    add("-s", "--seed", type=whole(0, 1 << 62), metavar="N", help="for --speculate: seed of the sampler sample (default 1)")
    add("--draft-model", metavar="LIST", type=lambda text: text.split(","), help=DRAFT_HELP)
    add("-t", "--threads", type=numbers, default="1,2", help="numbers of threads (default 1,2)")
    add("-r", "--rounds", type=count, default=5, help="number of rounds (default 5)")
    add("-o", "--output", choices=("md", "json", "csv"), default="md", help="md (a Markdown table, default), json or csv")
    add("--reference", action="store_true", help="also run the serial reference, which is slow")
    add("--against", metavar="LIST", default="", help="peers to run too, separated by commas, or all for the installed ones")
    add("--no-process", dest="process", action="store_false", help="leave out the test process")
    add("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    larger = "size of the arrays that measure the limits, larger than any cache (default 512)"
    add("--limit-megabytes", type=count, default=512, help=larger)
    add("--serve", metavar="URL", help="measure a server; add --help for the options that go with it")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the options. Raises InputError for bad ones."""
    options = build_parser().parse_args(arguments)
    mode = "train" if options.train else "speculate" if options.speculate else ""
    for owner, name in ((owner, name) for owner, mine in MODES.items() for name in mine if name not in MODES[mode]):
        if getattr(options, name) is not None:
            flag = FLAGS.get(name, f"-{name[0]}")
            how = f"with --{mode}" if mode else f"without --{owner}"
            raise InputError(f"{flag} cannot be used {how}: leave out {flag}")
    if options.temperature is not None:
        options.temperature = parse_number("temperature (--temp)", options.temperature)
        options.sampler = options.sampler or ["sample"]
    for name, usual in MODES[mode].items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    if options.speculate:
        words = [word for word in options.speculate.split(",") if check_speculation(parse_speculation(word)) is not None]
        options.speculate = [word if word == "auto" else int(word) for word in words]  # without off
        options.prompts, options.process = [], False
        options.drawing = {"temperature": options.temperature, "seed": options.seed}
    options.expected, options.kinds = {}, set()
    options.threads = sorted({*options.threads})
    options.all_peers = options.against == "all"
    options.against = resolve_peers(options.against, options.train) if options.against else []
    return options


def resolve_peers(text: str, train: bool) -> list[str]:
    """Return the peers to run. Raises InputError for a peer that is unknown or not installed."""
    known = peers.TRAINING if train else peers.PEERS
    installed = [name for name in peers.available() if name in known]
    wanted = installed if text == "all" else [*filter(None, text.split(","))]
    for name in wanted:
        if name not in known:
            raise InputError(f"--against: {name!r} is not a peer here: it must be one of {', '.join(known)}")
        if name not in installed:
            raise InputError(f"--against: {name!r} is not installed: the installed peers are {', '.join(installed) or 'none'}")
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if any(word.partition("=")[0] == "--serve" for word in given):
        return status_of(lambda: load.run(given))
    return status_of(lambda: run(parse(given)))


def run(options: argparse.Namespace) -> None:
    """Measure and print the results."""
    check_stdout("the results")
    path = os.path.abspath(find_model(options.model)[0])  # absolute: a child may have another current folder
    try:
        machine, results = measure(options, path)
    except (RuntimeError, subprocess.SubprocessError) as error:  # from a peer or a child
        raise PyGPTError(str(error)) from None
    scaling(results, machine["read_gb_s"])
    if options.output == "json":
        print(json.dumps([machine, *results], indent=1))
    elif options.output == "csv":
        writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(name for r in results for name in r)))
        writer.writeheader()
        writer.writerows(results)
    else:
        print_text(machine, results, TRAINING if options.train else SPECULATION if options.speculate else COLUMNS)


def measure(options: argparse.Namespace, path: str) -> tuple[Result, list[Result]]:
    """Open the models and run all rounds; return the objects of the machine and of the tests."""
    with (open_floats if options.train else open_model)(path) as opened:
        config, version = opened.config, getattr(opened, "version", None)
    with ExitStack() as stack:
        tests = (training_tests if options.train else generation_tests)(options, stack, path, config)
        dots = sorted(options.kinds & {*QUANTISED})
        limits = partial(Ceilings, megabytes=options.limit_megabytes, stream=options.train, dots=dots)
        ceilings = {n: stack.enter_context(limits(n)) for n in options.threads}
        progress = stack.enter_context(Progress("rounds", options.rounds))
        for _ in run_rounds(options.rounds, ceilings, progress.update):
            for test in tests:
                if not test.once:
                    test.rounds.append(test.run())
            check_losses(tests)
    for test in tests:
        if test.once:
            test.rounds.append(test.run())
    check_losses(tests)
    return describe(config, version, ceilings, dots, options.train), [test.result(ceilings) for test in tests]


def run_rounds(rounds: int, ceilings: dict[int, Ceilings], progress: Callable[[int], None]) -> Iterator[int]:
    """Yield the number of each round, after measuring the ceilings. Round 0 is a warm-up."""
    for number in range(rounds + 1):
        for ceiling in ceilings.values():
            ceiling.measure(1)
        yield number
        progress(number)


def describe(config: Config, version: int | None, ceilings: dict[int, Ceilings], dots: Sequence[str], train: bool) -> Result:
    """Return the first object of the JSON output: the machine, the model, the limits. dots: the measured integer formats."""
    names = processors()
    return {
        "test": "ceilings", "cpu": f"{len(names)} x {names[0]}" if names else platform.processor(),
        "isa": cpu_info()["isa"], "python": platform.python_version(), "pygpt": __version__, "commit": _commit(),
        "model": {**{name: getattr(config, name) for name in ("L", "NH", "C", "V", "maxT")}, "version": version},
        **{name: {str(n): getattr(limit, name) for n, limit in ceilings.items()} for name in RATES[: 3 if train else 2]},
        "dot_gop_s": {kind: {str(n): found.operations_gop_s(kind) for n, found in ceilings.items()} for kind in dots},
    }  # fmt: skip


def _commit() -> str:
    """Return the clone's commit, or "" for an installed package or without git."""
    with suppress(OSError):
        if (CLONE / ".git").exists():
            command = ["git", "rev-parse", "--short", "HEAD"]
            return subprocess.run(command, cwd=CLONE, capture_output=True, text=True).stdout.strip()
    return ""


def scaling(results: list[Result], read: Mapping[str, float]) -> None:
    """Add the speed-ups over one thread, the reference and plain decode. read: the read bandwidth by number of threads."""
    known = {(r["by"], r["test"], r["threads"]): r for r in results}
    for r in results:
        program, plain = r["by"].partition(" ")[0], (r["by"].partition(" +")[0], r["test"], r["threads"])
        bases = {"": (r["by"], r["test"], 1), "_over_reference": (r["by"].replace("pygpt", "reference"), r["test"], 1)}
        for suffix, key in {**bases, "_over_plain": plain}.items():
            base = known.get(key)
            if program != "pygpt" or base is None or base is r:
                continue
            r[f"speed_up{suffix}"] = base["seconds"] / r["seconds"]
            for part in PARTS if "B" in r else ():
                r[f"{part}_speed_up{suffix}"] = base[f"{part}_ms"] / r[f"{part}_ms"]
            if key[2] == 1 and suffix != "_over_plain":
                r[f"efficiency{suffix}"] = r[f"speed_up{suffix}"] / r["threads"]
            if not suffix:  # the machine's own speed-up is that of the least times
                least = [read.get(str(one["threads"]), 1.0) for one in (r, base)]
                if r["percent_of_limit"] is not None:
                    least = [one["percent_of_limit"] * one["seconds"] for one in (base, r)]
                r["hardware_speed_up"] = least[0] / least[1]
                r["percent_of_hardware_scaling"] = 100 * r["speed_up"] / r["hardware_speed_up"]


COLUMNS = [  # head, field and format of each column
    ("test", "test", ""), ("by", "by", ""), ("threads", "threads", ""), ("tokens/s", "tokens_per_s", ".4g"),
    ("middle half", "tokens_per_s_middle_half", ".4g"), ("% of limit", "percent_of_limit", ".0f"),
    ("x 1 thread", "speed_up", ".2f"), ("x reference", "speed_up_over_reference", ".1f"), ("anon MB", "peak_anon_bytes", "MB"),
]  # fmt: skip
SPECULATION = [
    *COLUMNS[:5], ("x plain", "speed_up_over_plain", ".2f"), ("acceptance", "acceptance", ".3f"),
    ("tokens a step", "tokens_per_step", ".2f"),
]  # fmt: skip
TRAINING = [
    ("by", "by", ""), ("threads", "threads", ""), *((f"{part} ms", f"{part}_ms", ".4g") for part in (*PARTS, "total")),
    ("middle half", "total_ms_middle_half", ".4g"), ("tokens/s", "tokens_per_s", ".4g"),
    ("% of limit: forward", "forward_percent_of_limit", ".0f"),
    *((part, f"{part}_percent_of_limit", ".0f") for part in PARTS[1:]), ("total", "percent_of_limit", ".0f"),
    ("x 1 thread", "speed_up", ".2f"), ("efficiency", "efficiency", ".2f"), ("x reference", "speed_up_over_reference", ".1f"),
    ("anon MB", "peak_anon_bytes", "MB"), ("peak MB", "peak_rss_bytes", "MB"),
]  # fmt: skip


def print_text(machine: Result, results: list[Result], columns: Sequence[tuple[str, str, str]]) -> None:
    """Print the machine, the versions, the limits and a table, in training with notes."""
    print(f"{machine['cpu']}, {machine['isa']}, Python {machine['python']}, pygpt {machine['pygpt']} {machine['commit']}")
    for threads in machine["read_gb_s"]:
        read, fma = machine["read_gb_s"][threads], machine["fma_gflop_s"][threads]
        update = f", AdamW's traffic {machine['stream_gb_s'][threads]:.1f} GB/s" if "stream_gb_s" in machine else ""
        dots = "".join(f", {kind} products {rates[threads]:.0f} Gop/s" for kind, rates in machine["dot_gop_s"].items())
        print(f"limits of {plural(int(threads), 'thread')}: read {read:.1f} GB/s, FMA {fma:.0f} GFLOP/s{dots}{update}")
    print()
    print_results(results, columns)
    first = results[0] if results else {}
    if "losses" in first:
        print(f"\n{first['test']}: medians of {first['rounds']} iterations after one warm-up iteration.")
        if results[-1]["by"] == "reference":
            print("The reference ran one iteration only.")
