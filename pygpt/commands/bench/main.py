"""Measure speed in tokens per second, and compare it with the machine's limits, measured in the same minutes.

    pygpt bench -m gpt2_124M.bin                     print the table for 1 and 2 threads
    pygpt bench -m gpt2_124M.bin -p 512 -n 64 -d 8,512 -t 2 -r 9 -o json
    pygpt bench -m gpt2_124M.bin --reference         also run the serial reference, and show the speed-up over it
    pygpt bench -m gpt2_124M.bin --against all       also run installed peers (other programs) on the same weights
    pygpt bench -m gpt2_124M.bin --weights file,q8_0,q4_0 --against all  compare the file's weights and two quantised formats
    pygpt bench -m gpt2_124M.bin --train -B 4 -T 64  measure training; --reference and --against work too
    pygpt bench -m gpt2_124M.bin --speculate auto,4 --sampler greedy,median --draft-model q8_0,lookup  measure speculation

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
    speed_up, efficiency, hardware_speed_up, percent_of_hardware_scaling
                        over one thread, if the run measured one thread; hardware_speed_up is that of the least times
    speed_up_over_reference, efficiency_over_reference
                        with --reference
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import isnan
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ... import __version__
from ..._kernels import cpu_info
from ...ceilings import Ceilings
from ...config import Config
from ...cpus import processors
from ...errors import InputError, PyGPTError
from ...formats.open import open_floats, open_model
from ...formats.quantise import QUANTISED
from ...generation.request import check_speculation
from ...generation.sampling import SAMPLERS
from ...hub.find import find_model
from ...model import DRAFTS, GPT2
from ...reference import SerialGPT2
from ...training.trainable import TrainableGPT2
from ..child import child_environment
from ..console import Parser, Progress, check_stdout, listed, say, status_of, whole
from ..options import DRAFT_HELP, parse_number, parse_speculation
from ..profile.work import decode_bytes, forward, operations
from . import load, speculation
from . import peers as bench_peers
from . import train as bench_train
from .peers import Peer, laps, peak_rss_bytes, prompt, resident_bytes, seconds_of
from .train import middle, print_results, run_rounds, scaling

BATCH = 8
RATES = ("read_gb_s", "fma_gflop_s", "stream_gb_s")  # of Ceilings
REFERENCE_TOKENS = 8  # new tokens in the reference's job, after 2 prompt tokens
FILE = "file"  # with --weights: the weights of the file, as they are


@dataclass
class Test:
    """A test. run: a function that runs it once and returns seconds. work: operations by weight format, or bytes as "read"."""

    name: str
    threads: int
    tokens: int
    run: Callable[[], float]
    by: str
    weights: str | None = None
    work: Mapping[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)  # more fields of the result

    def result(self, ceilings: dict[int, Ceilings]) -> dict[str, Any]:
        """Return the test as an object of the JSON output. The first round was a warm-up."""
        seconds, (low, high) = middle(self.seconds[1:])
        limits = ceilings[self.threads]
        rates = {kind: limits.read_gb_s if kind == "read" else limits.operations_gop_s(kind) for kind in self.work}
        percent = sum(100 * amount / (rates[kind] * 1e9) for kind, amount in self.work.items()) / seconds
        return {
            "test": self.name, "by": self.by, "threads": self.threads, "weights": self.weights,
            "tokens_per_s": self.tokens / seconds, "tokens_per_s_middle_half": [self.tokens / high, self.tokens / low],
            "seconds": seconds, "rounds": len(self.seconds) - 1, "percent_of_limit": percent or None,
            "peak_anon_bytes": None, **self.facts,
        }  # fmt: skip


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


def memory_of(measure: Callable[..., dict[str, int]], *arguments: object) -> dict[str, int]:
    """Return the result of memory_of_training() or memory_of_step() in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


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


def tg(depth: int, new: int, batch: int = 1) -> str:
    """Return the name of a decode test."""
    return f"tg{new}@d{depth}" + (f"xb{batch}" if batch > 1 else "")


def own_tests(options: argparse.Namespace, stack: ExitStack, model: GPT2, weights: str | None, path: str) -> list[Test]:
    """Return pygpt's tests with one number of threads and one format of weights."""
    if options.speculate:
        return speculative_tests(options, stack, model, weights, path)
    config, threads, stored, tests = model.config, model.threads, model.network.stored, []
    own = partial(Test, by=by("pygpt", weights), weights=stored["qkvw"][0])
    memory: Callable[..., dict[str, int]] = (
        partial(memory_of, memory_of_step, path, weights, threads) if options.memory else lambda *_: {}
    )
    for length in options.prompts:
        run, work = partial(time_prefill, model, length), operations(stored, forward(config, stored, length))
        tests.append(own(f"pp{length}", threads, length, run, work=work, facts=memory(length)))
    for depth, batch in product(options.depths, options.batches):
        sizes = depth, options.new, batch
        run, work = partial(time_decode, model, *sizes), {"read": decode_bytes(config, stored, *sizes)}
        tests.append(own(tg(*sizes), threads, options.new * batch, run, work=work, facts=memory(0, *sizes)))
    if options.process:
        tests.append(own("process", threads, REFERENCE_TOKENS, lambda: time_process(path, weights, "-t", str(threads))))
    return tests


def speculative_tests(options: argparse.Namespace, stack: ExitStack, model: GPT2, weights: str | None, path: str) -> list[Test]:
    """Return pygpt's tests with --speculate, with one number of threads and one format of weights."""
    kind, tests = model.network.stored["qkvw"][0], []
    load_with = partial(GPT2.load, path, threads=model.threads, weights=weights)
    guided = {draft: stack.enter_context(load_with(draft=draft)) for draft in options.draft_model if draft is not None}
    for depth, batch, sampler in product(options.depths, options.batches, options.sampler):
        texts = speculation.own_texts(model, depth, batch)
        asked = {"sampler": sampler, **(options.drawing if sampler == "sample" else {})}
        expected = options.expected.setdefault((weights, depth, batch, sampler), [])
        for draft, guesses in [(None, False), *product(options.draft_model, options.speculate)]:
            test = partial(speculation.Completions, guided.get(draft, model), texts, options.new, expected)
            job, program = test(asked | {"speculation": guesses == "auto" or guesses}), by("pygpt", weights)
            if guesses:
                job.facts["draft"], job.facts["speculation"] = draft or DRAFTS.get(kind, "lookup"), guesses
                program += f" +{job.facts['draft']} {guesses}"
            name, new = f"{tg(depth, options.new, batch)} {sampler}", options.new * batch
            tests.append(Test(name, model.threads, new, job.run, program, kind, facts=job.facts))
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
        tests += [Test(tg(depth, new), threads, new, partial(peer.decode, new, depth), by=name) for depth in options.depths]
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


def print_machine(machine: dict[str, Any]) -> None:
    """Print the machine, the versions and the limits."""
    print(f"{machine['cpu']}, {machine['isa']}, Python {machine['python']}, pygpt {machine['pygpt']} {machine['commit']}")
    for threads in machine["read_gb_s"]:
        read, fma = machine["read_gb_s"][threads], machine["fma_gflop_s"][threads]
        update = f", AdamW's traffic {machine['stream_gb_s'][threads]:.1f} GB/s" if "stream_gb_s" in machine else ""
        dots = "".join(f", {kind} products {rates[threads]:.0f} Gop/s" for kind, rates in machine["dot_gop_s"].items())
        print(f"limits of {threads} threads: read {read:.1f} GB/s, FMA {fma:.0f} GFLOP/s{dots}{update}")
    print()


COLUMNS = [  # head, field and format of each column
    ("test", "test", ""), ("by", "by", ""), ("threads", "threads", ""), ("tokens/s", "tokens_per_s", ".4g"),
    ("middle half", "tokens_per_s_middle_half", ".4g"), ("% of limit", "percent_of_limit", ".0f"),
    ("x 1 thread", "speed_up", ".2f"), ("x reference", "speed_up_over_reference", ".1f"), ("anon MB", "peak_anon_bytes", "MB"),
]  # fmt: skip
SPECULATION = [
    *COLUMNS[:5], ("x plain", "speed_up_over_plain", ".2f"), ("acceptance", "acceptance", ".3f"),
    ("tokens a step", "tokens_per_step", ".2f"),
]  # fmt: skip


def numbers(text: str) -> list[int]:
    """Read a list of positive whole numbers such as 64,512,1000, as a type for argparse."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive whole numbers such as 64,512")
    return [int(word) for word in words]


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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    about = "\n".join(map(str, (__doc__, speculation.__doc__, bench_train.__doc__, load.__doc__)))
    parser = Parser(prog="pygpt bench", usage="pygpt bench [options]", description=about)
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
    add("--against", default="", help="peers to run too, separated by commas, or all for the installed ones")
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
    options.expected = {}
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
    check_stdout("the results")
    path = os.path.abspath(find_model(options.model)[0])  # absolute: a child may have another current folder
    try:
        machine, results = (measure_training if options.train else measure)(options, path)
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
        print_machine(machine)
        if options.train:
            bench_train.print_markdown(results)
        else:
            print_results(results, SPECULATION if options.speculate else COLUMNS)


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # the object of the machine, the objects of the tests


def measure(options: argparse.Namespace, path: str) -> Measured:
    """Open the models, run all rounds, and return the results."""
    with open_model(path) as opened:
        config, version = opened.config, getattr(opened, "version", None)
    with ExitStack() as stack:
        models: dict[str | None, list[GPT2]] = {}
        for weights in (None if given == FILE else given for given in options.weights):
            load = partial(GPT2.load, path, weights=weights)
            models[weights] = [stack.enter_context(load(threads=threads)) for threads in options.threads]
        measured = {kind for found in models.values() for kind, _ in found[0].network.stored.values()}
        ceilings = open_ceilings(options, stack, dots := sorted(measured & {*QUANTISED}))
        leave_out(options, config.maxT)
        tests = []
        for weights, found in models.items():
            for model in found:
                tests += own_tests(options, stack, model, weights, path)
        for weights in models if options.reference else ():
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
    more = 1 if options.speculate else 0  # the token with which a text begins
    names = [f"pp{length}" for length in options.prompts if length > maxT]
    names += [tg(depth, options.new) for depth in options.depths if depth + options.new + more > maxT]
    options.prompts = [length for length in options.prompts if length <= maxT]
    options.depths = [depth for depth in options.depths if depth + options.new + more <= maxT]
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
        memory = (
            (lambda threads: memory_of(memory_of_training, path, threads, options.B, options.T)) if options.memory else None
        )
        results = bench_train.measure(
            path, config, batch, options.rounds, ceilings, memory_of=memory, peers=options.against,
            reference=options.reference, progress=progress.update,
        )  # fmt: skip
        return describe(config, version, ceilings), results
