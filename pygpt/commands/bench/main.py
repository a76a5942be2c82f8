"""Measure speed in tokens per second, and compare it with the machine's limits, measured in the same minutes.

    pygpt bench -m gpt2_124M.bin                     print the table for 1 and 2 threads
    pygpt bench -m gpt2_124M.bin -p 512 -n 64 -d 8,512 -t 2 -r 9 -o json
    pygpt bench -m gpt2_124M.bin --reference         also run the serial reference, and show the speed-up over it
    pygpt bench -m gpt2_124M.bin --against all       also run installed peers (other programs) on the same weights
    pygpt bench -m gpt2_124M.bin --weights file,q8_0,q4_0 --against all  compare the file's weights and two quantised formats
    pygpt bench -m gpt2_124M.bin --train -B 4 -T 64  measure training; --reference and --against work too

Tests are named as in llama-bench:

    pp512        prefill of a prompt of 512 tokens
    tg64@d8      decode of 64 new tokens after a context of 8 tokens
    tg64@d8xb8   the same for 8 sequences together
    process      the whole command, with 2 prompt tokens and 8 new tokens

Each round runs every test once, so that a slow minute of a shared machine affects all tests alike. The results are medians. The
middle half is the range without the lowest and the highest quarter of the rounds.

Limits: prefill does 2 operations for each weight and token (the head for one token only). Its attention does 4 x position x C
operations for each token and layer. The limit of prefill is the FMA peak. For products of quantised weights it is the peak of
the format's integer dot product instead; their float32 scales do not count. Each decode step reads every weight except wpe, in
its format, and the keys and values of its context. The limit of decode is the read bandwidth. The test "process" has no limit.

Peers run the weights in float32 (llama.cpp: in bfloat16 if the file is). "llama.cpp-q8_0", "llama.cpp-q4_0" and
"ctranslate2-int8" are the quantised modes of peers. With --against all, the peers of the same formats as pygpt run.

JSON (-o json) is a list of objects. CSV (-o csv) has the fields of the tests as columns. The first object of the JSON describes
the machine:

    test                "ceilings"
    cpu, isa, python, pygpt, commit
    model               L, NH, C, V, maxT, version (null for other files than .bin)
    read_gb_s, fma_gflop_s, stream_gb_s (with --train)
                        the limits, by number of threads
    dot_gop_s           the limits of integer products in 10^9 operations per second, by weight format and number of threads

Each other object is a test of one program with one number of threads:

    test, by, threads, rounds
                        name of the test, program, number of threads, number of rounds; by is "pygpt q8_0" with --weights q8_0
    weights             pygpt's weight format of the layers' matrices
    tokens_per_s, seconds
                        medians
    tokens_per_s_middle_half
                        [low, high]
    percent_of_limit    null if the test has no limit
    peak_anon_bytes     resident memory after the test in a fresh process, without pages of files; null if not measured
    anon_before_bytes   the part of peak_anon_bytes that was resident before the test
    cache_bytes         size of keys and values, which peak_anon_bytes does not include
    mapped_bytes        resident pages of files
    speed_up, hardware_speed_up, percent_of_hardware_scaling
                        over one thread, if the run measured one thread
    speed_up_over_reference, efficiency_over_reference
                        with --reference
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import isnan
from pathlib import Path
from typing import Any

from ... import __version__
from ..._kernels import cpu_info
from ...ceilings import Ceilings
from ...config import Config
from ...cpus import processors
from ...errors import InputError, PyGPTError
from ...formats.open import open_floats, open_model
from ...formats.panels import LAYERED
from ...formats.quantise import QUANTISED
from ...formats.tensors import layout
from ...hub.find import find_model
from ...model import GPT2
from ...reference import SerialGPT2
from ...training.trainable import TrainableGPT2
from ..child import child_environment
from ..console import Parser, check_stdout, say, status_of, whole
from ..progress import Progress
from . import load
from . import peers as bench_peers
from . import train as bench_train
from .peers import Peer, laps, peak_rss_bytes, prompt, resident_bytes, seconds_of
from .train import figure, print_table, run_rounds

BATCH = 8
RATES = ("read_gb_s", "fma_gflop_s", "stream_gb_s")  # of Ceilings
REFERENCE_TOKENS = 8  # new tokens in the reference's job, after 2 prompt tokens
FILE = "file"  # with --weights: the weights of the file, as they are
Stored = Mapping[str, tuple[str, int]]  # by tensor: weight format and bytes, as Network.stored


@dataclass
class Test:
    """A test. run: a function that runs it once and returns seconds. Its least work: operations by weight format, or bytes."""

    name: str
    threads: int
    tokens: int
    run: Callable[[], float]
    by: str
    weights: str | None = None
    operations: Mapping[str, float] | None = None
    read_bytes: float = 0
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def result(self, ceilings: dict[int, Ceilings]) -> dict[str, Any]:
        """Return the test as an object of the JSON output. The first round was a warm-up."""
        rates = sorted(self.tokens / seconds for seconds in self.seconds[1:])
        seconds, limit = statistics.median(self.seconds[1:]), None
        if self.operations:
            rate = ceilings[self.threads].operations_gop_s
            limit = sum(count / (rate(kind) * 1e9) for kind, count in self.operations.items()) / seconds
        elif self.read_bytes:
            limit = self.read_bytes / seconds / (ceilings[self.threads].read_gb_s * 1e9)
        return {
            "test": self.name, "by": self.by, "threads": self.threads, "weights": self.weights,
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_middle_half": [rates[len(rates) // 4], rates[-1 - len(rates) // 4]],
            "seconds": seconds, "rounds": len(rates), "percent_of_limit": None if limit is None else 100 * limit,
            "peak_anon_bytes": None, **self.memory,
        }  # fmt: skip


def prefill_operations(config: Config, stored: Stored, length: int) -> Mapping[str, float]:
    """Return the number of operations of a prompt by weight format, with the head for its last token only."""
    found: Counter[str] = Counter(float32=2 * config.L * config.C * length * (length + 1))  # attention
    for name in (*LAYERED, "wte"):
        layers, N, K = layout(config, name)
        found[stored[name][0]] += 2 * layers * N * K * (1 if name == "wte" else length)
    return found


def decode_bytes(config: Config, stored: Stored, depth: int, new: int, batch: int) -> float:
    """Return the number of bytes that `new` decode steps read: each time the weights, and all keys and values so far."""
    weights = sum(size for name, (_, size) in stored.items() if name != "wpe")
    context = sum(2 * 4 * config.L * config.C * (depth + i + 1) for i in range(new))
    return float(new * weights + batch * context)


def time_prefill(model: GPT2, length: int) -> float:
    """Return the seconds of a prompt."""
    tokens, cache = prompt(model.config, 0, length), model.new_cache(length)
    return seconds_of(lambda: model.prefill(cache, tokens))


def time_decode(model: GPT2, depth: int, new: int, batch: int) -> float:
    """Return the seconds for `new` tokens of each of `batch` sequences. Their context of `depth` tokens is not timed."""
    caches = [model.new_cache(depth + new) for _ in range(batch)]
    for cache in caches:
        model.prefill(cache, prompt(model.config, 0, depth))
    rows = [((13 + i) % model.config.V, cache, True) for i, cache in enumerate(caches)]
    return seconds_of(lambda: [model.step(rows) for _ in range(new)])


def time_reference_job(model: GPT2 | SerialGPT2) -> float:
    """Return the seconds of the reference's job: 2 prompt tokens and 8 new tokens."""
    return seconds_of(lambda: list(model.generate([0, 0], max_new_tokens=REFERENCE_TOKENS)))


def time_process(path: str, weights: str | None, *options: str) -> float:
    """Return the seconds of the whole command for the same job, including the start of the interpreter."""
    quantised = [] if weights is None else ["--weights", weights]
    command = [sys.executable, "-m", "pygpt", "-m", path, *quantised, *options, "0", "0"]
    (done,), (seconds,) = laps(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, env=child_environment()))
    if done.returncode:
        raise PyGPTError(f"the measured command ended with status {done.returncode}")
    return seconds


def memory_of(*test: object, train: bool = False) -> dict[str, int]:
    """Return the memory of a test in a fresh process, which calls memory_of_training() or memory_of_step() with `test`."""
    command = [sys.executable, "-m", "pygpt", "bench", *["--train"] * train, "--memory-of", json.dumps(test)]
    done = subprocess.run(command, capture_output=True, check=True, env=child_environment())
    found: dict[str, int] = json.loads(done.stdout)
    return found


def memory_of_training(path: str, threads: int, B: int, T: int) -> dict[str, int]:
    """Return the peak of the resident memory, and the memory after two iterations of training."""
    with TrainableGPT2.load(path, threads=threads) as model:
        for step in (1, 2):
            bench_train.iterate(model, bench_train.batch_of(model.config, B, T), step)
        found = {"peak_rss_bytes": peak_rss_bytes(), "peak_anon_bytes": resident_bytes("RssAnon")}
        arrays = model.parameters, model.gradients, model.first_moments, model.second_moments
        return {**found, "parameter_bytes": sum(array.nbytes for array in arrays)}


def memory_of_step(
    path: str, weights: str | None, threads: int, length: int, depth: int = 0, new: int = 0, batch: int = 0
) -> dict[str, int]:
    """Return the resident memory after a prefill, or with a batch after a decode, when its caches are freed."""
    with GPT2.load(path, threads=threads, weights=weights) as model:
        before = resident_bytes("RssAnon")
        if batch:
            time_decode(model, depth, new, batch)
        else:
            time_prefill(model, length)
        cache = 2 * 4 * model.config.L * model.config.C * (length + (depth + new) * batch)
        after, mapped = resident_bytes("RssAnon"), resident_bytes("RssFile")
    return {"peak_anon_bytes": after, "anon_before_bytes": before, "cache_bytes": cache, "mapped_bytes": mapped}


def by(program: str, weights: str | None) -> str:
    """Return a program's name in the results: with the format if --weights gave one."""
    return program if weights is None else f"{program} {weights}"


def own_tests(options: argparse.Namespace, model: GPT2, weights: str | None, path: str) -> list[Test]:
    """Return pygpt's tests with one number of threads and one format of weights."""
    config, threads, stored, tests = model.config, model.threads, model.network.stored, []
    own = partial(Test, by=by("pygpt", weights), weights=stored["qkvw"][0])
    memory: Callable[..., dict[str, int]] = partial(memory_of, path, weights, threads) if options.memory else lambda *_: {}
    for length in options.prompts:
        run, work = partial(time_prefill, model, length), prefill_operations(config, stored, length)
        tests.append(own(f"pp{length}", threads, length, run, operations=work, memory=memory(length)))
    for depth, batch in product(options.depths, options.batches):
        name = f"tg{options.new}@d{depth}" + (f"xb{batch}" if batch > 1 else "")
        sizes = depth, options.new, batch
        run, amount = partial(time_decode, model, *sizes), decode_bytes(config, stored, *sizes)
        tests.append(own(name, threads, options.new * batch, run, read_bytes=amount, memory=memory(0, *sizes)))
    if options.process:
        tests.append(own("process", threads, REFERENCE_TOKENS, lambda: time_process(path, weights, "-t", str(threads))))
    return tests


def reference_tests(serial: SerialGPT2, models: list[GPT2], weights: str | None, path: str, process: bool) -> list[Test]:
    """Return the tests of the serial reference, and the same job with pygpt, with one format of weights."""
    test = partial(Test, tokens=REFERENCE_TOKENS, weights=models[0].network.stored["qkvw"][0])
    tests = [test("tg8@d2", 1, run=partial(time_reference_job, serial), by=by("reference", weights))]
    for model in models:
        tests.append(test("tg8@d2", model.threads, run=partial(time_reference_job, model), by=by("pygpt", weights)))
    if process:
        run = partial(time_process, path, weights, "--reference")
        tests.append(test("process", 1, run=run, by=by("reference", weights)))
    return tests


def peer_tests(options: argparse.Namespace, stack: ExitStack, path: str) -> list[Test]:
    """Return the tests of the peers. Each peer runs in its own process with the largest number of threads."""
    threads, new, tests = max(options.threads), options.new, []
    for name in options.against:
        peer = stack.enter_context(Peer(name, path, threads))
        tests += [Test(f"pp{n}", threads, n, partial(peer.prefill, n), by=name) for n in options.prompts]
        tests += [
            Test(f"tg{new}@d{depth}", threads, new, partial(peer.decode, new, depth), by=name) for depth in options.depths
        ]
    return tests


def describe(config: Config, version: int | None, ceilings: dict[int, Ceilings], dots: Iterable[str] = ()) -> dict[str, Any]:
    """Return the first object of the JSON output: the machine, the model, the limits. dots: the measured integer formats."""
    rates = {name: {str(n): getattr(limit, name) for n, limit in ceilings.items()} for name in RATES}
    if any(isnan(rate) for rate in rates["stream_gb_s"].values()):
        del rates["stream_gb_s"]  # it was not measured
    names = processors()
    return {
        "test": "ceilings", "cpu": f"{len(names)} x {names[0]}" if names else platform.processor(),
        "isa": cpu_info()["isa"], "python": platform.python_version(), "pygpt": __version__, "commit": _commit(),
        "model": {**{name: getattr(config, name) for name in ("L", "NH", "C", "V", "maxT")}, "version": version},
        **rates,
        "dot_gop_s": {kind: {str(n): found.operations_gop_s(kind) for n, found in ceilings.items()} for kind in dots},
    }  # fmt: skip


def _commit() -> str:
    """Return the clone's commit, or "" for an installed package or without git."""
    root = Path(__file__).parents[3]
    with suppress(OSError):
        if (root / ".git").exists():
            command = ["git", "rev-parse", "--short", "HEAD"]
            return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    return ""


def scaling(results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Add speed-up and efficiency over one thread, and over the reference, if they were measured."""
    rate = {(r["by"], r["test"], r["threads"]): r["tokens_per_s"] for r in results}
    for r in results:
        alone, own = rate.get((r["by"], r["test"], 1)), r["by"].startswith("pygpt")
        if own and r["threads"] > 1 and alone:
            r["speed_up"] = r["tokens_per_s"] / alone
            peak = machine["dot_gop_s"].get(r["weights"], machine["fma_gflop_s"])
            limit = peak if r["test"].startswith("pp") else machine["read_gb_s"]
            r["hardware_speed_up"] = limit[str(r["threads"])] / limit["1"]
            r["percent_of_hardware_scaling"] = 100 * r["speed_up"] / r["hardware_speed_up"]
        serial = rate.get((r["by"].replace("pygpt", "reference"), r["test"], 1))
        if own and serial:
            r["speed_up_over_reference"] = r["tokens_per_s"] / serial
            r["efficiency_over_reference"] = r["speed_up_over_reference"] / r["threads"]


def print_machine(machine: dict[str, Any]) -> None:
    """Print the machine, the versions and the limits."""
    print(f"{machine['cpu']}, {machine['isa']}, Python {machine['python']}, pygpt {machine['pygpt']} {machine['commit']}")
    for threads in machine["read_gb_s"]:
        read, fma = machine["read_gb_s"][threads], machine["fma_gflop_s"][threads]
        update = f", AdamW's traffic {machine['stream_gb_s'][threads]:.1f} GB/s" if "stream_gb_s" in machine else ""
        dots = "".join(f", {kind} products {rates[threads]:.0f} Gop/s" for kind, rates in machine["dot_gop_s"].items())
        print(f"limits of {threads} threads: read {read:.1f} GB/s, FMA {fma:.0f} GFLOP/s{dots}{update}")
    print()


def print_markdown(results: list[dict[str, Any]]) -> None:
    """Print the results as a Markdown table."""
    heads = ["test", "by", "threads", "tokens/s", "middle half", "% of limit", "x 1 thread", "x reference", "anon MB"]
    rows = []
    for r in results:
        low, high = r["tokens_per_s_middle_half"]
        rows.append([
            r["test"], r["by"], r["threads"], f"{r['tokens_per_s']:.4g}", f"{low:.4g} to {high:.4g}",
            figure(r, "percent_of_limit", 0), figure(r, "speed_up", 2), figure(r, "speed_up_over_reference", 1),
            figure(r, "peak_anon_bytes", 0, 1e6),
        ])  # fmt: skip
    print_table(heads, rows)


def print_csv(results: list[dict[str, Any]]) -> None:
    """Print one line for each test. The columns are the union of their fields."""
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(name for r in results for name in r)))
    writer.writeheader()
    writer.writerows(results)


def numbers(text: str) -> list[int]:
    """Read a list of positive whole numbers such as 64,512,1000, as a type for argparse."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive whole numbers such as 64,512")
    return [int(word) for word in words]


def formats(text: str) -> list[str | None]:
    """Read a list of weight formats such as file,q8_0, as a type for argparse. None stands for the file's own weights."""
    words = list(dict.fromkeys(text.split(",")))
    if unknown := [word for word in words if word != FILE and word not in QUANTISED]:
        raise argparse.ArgumentTypeError(f"{unknown[0][:40]!r} is not one of {', '.join((FILE, *QUANTISED))}")
    return [None if word == FILE else word for word in words]


GENERATION = {"prompts": [64, 512, 1000], "new": 64, "depths": [8, 512], "batches": [1, BATCH], "weights": [None]}
FLAGS = {"weights": "--weights"}  # where the flag is not the first letter
TRAINING = {"B": 4, "T": 64}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="pygpt bench", usage="pygpt bench [options]", description=f"{__doc__}\n{bench_train.__doc__}\n{load.__doc__}"
    )
    add, count = parser.add_argument, whole(1, 999_999)
    kinds = f"{', '.join(QUANTISED)}, or {FILE} for those of the file (default)"
    add("-m", "--model", help="a model file or a downloaded model (default: see pygpt --help)")
    add("--weights", type=formats, metavar="LIST", help=f"formats to measure, each quantised in memory: {kinds}")
    add("-p", "--prompts", type=numbers, help="lengths of prompts (default 64,512,1000)")
    add("-n", "--new", type=count, help="new tokens in a decode test (default 64)")
    add("-d", "--depths", type=numbers, help="tokens of context before the new tokens (default 8,512)")
    add("-b", "--batches", type=numbers, help=f"numbers of sequences decoded together (default 1,{BATCH})")
    add("--train", action="store_true", help="measure training: forward, backward, norm, update")
    add("-B", type=count, help="with --train, sequences in a batch (default 4)")
    add("-T", type=count, help="with --train, tokens in a sequence (default 64)")
    add("-t", "--threads", type=numbers, default="1,2", help="numbers of threads (default 1,2)")
    add("-r", "--rounds", type=count, default=5, help="number of rounds (default 5)")
    add("-o", "--output", choices=("md", "json", "csv"), default="md", help="md (a Markdown table, default), json or csv")
    add("--reference", action="store_true", help="also run the serial reference, which is slow")
    add("--against", default="", help="peers to run too, separated by commas, or all for the installed ones")
    add("--no-process", dest="process", action="store_false", help="leave out the test process")
    add("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    larger = "size of the arrays that measure the limits, larger than any cache (default 512)"
    add("--limit-megabytes", type=count, default=512, help=larger)
    add("--serve", metavar="URL", help="measure a server; add --help for the options that go with it")
    add("--memory-of", help=argparse.SUPPRESS)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the options. Raises InputError for bad ones."""
    options = build_parser().parse_args(arguments)
    mine, others = (TRAINING, GENERATION) if options.train else (GENERATION, TRAINING)
    for name in others:
        if getattr(options, name) is not None:
            flag = FLAGS.get(name, f"-{name[0]}")
            raise InputError(f"{flag} cannot be used {'with' if options.train else 'without'} --train: leave out {flag}")
    for name, usual in mine.items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    options.threads = sorted({*options.threads})
    options.all_peers = options.against == "all"
    options.against = resolve_peers(options.against, bench_peers.TRAINING if options.train else bench_peers.PEERS)
    return options


def resolve_peers(text: str, known: Iterable[str]) -> list[str]:
    """Return the peers to run. Raises InputError for a peer that is unknown or not installed."""
    installed = [name for name in bench_peers.available() if name in known]
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
    if options.memory_of:
        asked = json.loads(options.memory_of)
        print(json.dumps((memory_of_training if options.train else memory_of_step)(*asked)))
        return
    check_stdout("the results")
    path = os.path.abspath(find_model(options.model)[0])  # absolute: a child may have another current folder
    try:
        machine, results = (measure_training if options.train else measure)(options, path)
    except (RuntimeError, subprocess.SubprocessError) as error:  # from a peer or a child
        raise PyGPTError(str(error)) from None
    if not options.train:
        scaling(results, machine)
    if options.output == "json":
        print(json.dumps([machine, *results], indent=1))
    elif options.output == "csv":
        print_csv(results)
    else:
        print_machine(machine)
        (bench_train.print_markdown if options.train else print_markdown)(results)


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # the object of the machine, the objects of the tests


def measure(options: argparse.Namespace, path: str) -> Measured:
    """Open the models, run all rounds, and return the results."""
    with open_model(path) as opened:
        config, version = opened.config, getattr(opened, "version", None)
    with ExitStack() as stack:
        models: dict[str | None, list[GPT2]] = {}
        for weights in options.weights:
            load = partial(GPT2.load, path, weights=weights)
            models[weights] = [stack.enter_context(load(threads=threads)) for threads in options.threads]
        measured = {kind for found in models.values() for kind, _ in found[0].network.stored.values()}
        ceilings = open_ceilings(options, stack, dots := sorted(measured & {*QUANTISED}))
        leave_out(options, config.maxT)
        tests = []
        for weights, found in models.items():
            tests += [test for model in found for test in own_tests(options, model, weights, path)]
        for weights in options.weights if options.reference else ():
            serial = stack.enter_context(SerialGPT2.load(path, weights=weights))
            tests += reference_tests(serial, models[weights], weights, path, options.process)
        if options.all_peers:
            layers = {found[0].network.stored["qkvw"][0] for found in models.values()}
            options.against = bench_peers.of_kind(options.against, layers)
        tests += peer_tests(options, stack, path)
        progress = stack.enter_context(Progress("rounds", options.rounds))
        for _ in run_rounds(options.rounds, ceilings, progress.update):
            for test in tests:
                test.seconds.append(test.run())
        return describe(config, version, ceilings, dots), [test.result(ceilings) for test in tests]


def leave_out(options: argparse.Namespace, maxT: int) -> None:
    """Remove tests that exceed the model's context from the options, and print a notice."""
    names = [f"pp{length}" for length in options.prompts if length > maxT]
    names += [f"tg{options.new}@d{depth}" for depth in options.depths if depth + options.new > maxT]
    options.prompts = [length for length in options.prompts if length <= maxT]
    options.depths = [depth for depth in options.depths if depth + options.new <= maxT]
    if maxT < 2 + REFERENCE_TOKENS:
        names += ["process"] * options.process + ["the reference"] * options.reference
        options.process = options.reference = False
    if names:
        say(f"left out, because they exceed the model's context of {maxT} tokens: {', '.join(names)}")


def open_ceilings(options: argparse.Namespace, stack: ExitStack, dots: Sequence[str] = ()) -> dict[int, Ceilings]:
    """Return the machine's limits, not measured yet, by number of threads. dots: the integer formats to measure."""
    limits = partial(Ceilings, megabytes=options.limit_megabytes, stream=options.train, dots=dots)
    return {n: stack.enter_context(limits(n)) for n in options.threads}


def measure_training(options: argparse.Namespace, path: str) -> Measured:
    """Do the same as measure() for training."""
    with open_floats(path) as opened:
        config, version = opened.config, getattr(opened, "version", None)
    batch = bench_train.batch_of(config, options.B, options.T)
    with ExitStack() as stack:
        ceilings, progress = open_ceilings(options, stack), stack.enter_context(Progress("rounds", options.rounds))
        memory = (lambda threads: memory_of(path, threads, options.B, options.T, train=True)) if options.memory else None
        results = bench_train.measure(
            path, config, batch, options.rounds, ceilings, memory_of=memory, peers=options.against,
            reference=options.reference, progress=progress.update,
        )  # fmt: skip
        bench_train.scaling(results)
        return describe(config, version, ceilings), results
