"""With --train, measure iterations of training, and compare each part with the machine's limits.

An iteration is forward, backward, the gradient's norm and one step of AdamW, always on the same batch of B x T tokens. All
programs begin with the same weights and run one iteration per round. The first round is a warm-up. The serial reference runs
one iteration after all rounds. Times are reported only if the losses agree. The losses of all numbers of threads must have the
same bits. The losses of peers and of the reference may differ by 0.001, relative to a loss above 1.

Limits of training: for each token, forward does 2 operations for each of the 12 L C^2 + V C weights of products. Its attention
does 4 C operations for each token, layer and visible key. Backward does twice as many; recomputed values do not count. The
limit of both is the FMA peak. The norm reads 4 bytes for each parameter; its limit is the read bandwidth. AdamW moves 28 bytes
for each parameter; its limit is the same traffic without arithmetic. Above 100%, some of the data came from a cache.

With --train, the JSON object of a test has these fields in addition:

    B, T
    forward_ms, backward_ms, norm_ms, update_ms, total_ms
                        medians
    forward_ms_middle_half, ..., total_ms_middle_half
                        [low, high]
    forward_percent_of_limit, ..., percent_of_limit
                        least time over measured time, of each part and of the whole iteration
    losses              of the first iterations, including the warm-up
    forward_speed_up, ..., speed_up, efficiency
                        over one thread; efficiency is speed_up / threads
    hardware_speed_up   speed-up of the least times
    percent_of_hardware_scaling
                        speed_up relative to hardware_speed_up
    forward_speed_up_over_reference, ..., speed_up_over_reference, efficiency_over_reference
                        over the reference
    peak_rss_bytes, peak_anon_bytes, parameter_bytes
                        peak and final resident memory, and the size of weights, gradients and moments
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from ...ceilings import Ceilings
from ...config import Config
from ...errors import InputError, PyGPTError
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ..profile.work import floats, operations, training
from .peers import Peer, artificial_ids, laps

PARTS = ("forward", "backward", "norm", "update")
ADAMW: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # as llm.c's train_gpt2.c
TOLERANCE = 1e-3  # of a loss; relative to the loss if it is above 1
COMPARED = 3  # number of iterations whose losses are compared
Ids = list[list[int]]
Result = dict[str, Any]


class Batch(NamedTuple):
    """B sequences of T tokens, and for each token the next one."""

    inputs: Ids
    targets: Ids

    @property
    def tokens(self) -> int:
        """B x T."""
        return len(self.inputs) * len(self.inputs[0])


class Iteration(NamedTuple):
    """The mean loss of one iteration, and the seconds of each part."""

    loss: float
    forward: float
    backward: float
    norm: float
    update: float

    @property
    def total(self) -> float:
        """Return the seconds of all parts."""
        return self.forward + self.backward + self.norm + self.update


def batch_of(config: Config, B: int, T: int) -> Batch:
    """Return an artificial batch with ids spread over the vocabulary. Raises InputError if T exceeds the model's context."""
    if config.maxT < T:
        raise InputError(f"-T is {T}: it must be at most the model's context of {config.maxT} tokens")
    ids = artificial_ids(config, 0, B * T + 1)
    return Batch(*([ids[start + b * T : start + (b + 1) * T] for b in range(B)] for start in (0, 1)))


def iterate(model: TrainableGPT2 | SerialTrainableGPT2, batch: Batch, step: int) -> Iteration:
    """Run one iteration. step: its number in this model's training, from 1."""
    steps = partial(model.forward, *batch), model.backward, model.gradient_norm, partial(model.update, step=step, **ADAMW)
    (losses, *_), seconds = laps(*steps)
    return Iteration(float(losses.mean(dtype="f8")), *seconds)


def iterate_peer(peer: Peer, batch: Batch, step: int) -> Iteration:
    """Run one iteration of a peer, which counts its steps itself."""
    return Iteration(**peer.train(*batch, **ADAMW))


class Test:
    """A program that trains, and its iterations so far. uncounted: the number of warm-up iterations."""

    def __init__(self, by: str, threads: int, iterate: Callable[[Batch, int], Iteration], *, uncounted: int = 1) -> None:
        self.by, self.threads, self.iterate, self.uncounted = by, threads, iterate, uncounted
        self.iterations: list[Iteration] = []
        self.memory: dict[str, int] = {}

    def run(self, batch: Batch) -> None:
        """Run one more iteration."""
        self.iterations.append(self.iterate(batch, len(self.iterations) + 1))

    def result(self, batch: Batch, least: Iteration | None) -> Result:
        """Return the test as an object of the JSON output. least: the shortest times that the machine's limits allow."""
        counted = self.iterations[self.uncounted :]
        B, T = len(batch.inputs), len(batch.inputs[0])
        found: Result = {"test": f"train_b{B}_t{T}", "by": self.by, "threads": self.threads, "B": B, "T": T}
        for part in (*PARTS, "total"):
            found[f"{part}_ms"], found[f"{part}_ms_middle_half"] = middle(1e3 * getattr(one, part) for one in counted)
            if least is not None:
                name = "percent_of_limit" if part == "total" else f"{part}_percent_of_limit"
                found[name] = 100 * 1e3 * getattr(least, part) / found[f"{part}_ms"]
        seconds = found["total_ms"] / 1e3
        low, high = found["total_ms_middle_half"]
        found |= {"tokens_per_s": batch.tokens / seconds, "seconds": seconds, "rounds": len(counted)}
        found["tokens_per_s_middle_half"] = [1e3 * batch.tokens / high, 1e3 * batch.tokens / low]
        return found | {"losses": [iteration.loss for iteration in self.iterations[:COMPARED]], **self.memory}


def check_losses(tests: Iterable[Test]) -> None:
    """Raise PyGPTError if a test's losses differ from the first test's: then they do not train the same network."""
    first, *others = tests
    for other in others:
        for number, (ours, theirs) in enumerate(zip(first.iterations[:COMPARED], other.iterations, strict=False), 1):
            allowed = 0.0 if other.by == first.by else TOLERANCE * max(1.0, abs(ours.loss))
            if not abs(ours.loss - theirs.loss) <= allowed:  # NaN differs from everything
                whose = f"{other.by}'s with {other.threads} threads is {theirs.loss!r}"
                raise PyGPTError(
                    f"losses of iteration {number} differ: {first.by}'s loss with {first.threads} threads is {ours.loss!r}, "
                    f"{whose}, and they may differ by {allowed:g}"
                )


def least_times(config: Config, batch: Batch, ceiling: Ceilings) -> Iteration:
    """Return the seconds that each part takes at the machine's limits."""
    work = training(config, len(batch.inputs), len(batch.inputs[0]))
    forward = sum(operations(floats(config), work).values()) / (ceiling.fma_gflop_s * 1e9)
    norm, update = work["norm"][1] / (ceiling.read_gb_s * 1e9), work["update"][1] / (ceiling.stream_gb_s * 1e9)
    return Iteration(0.0, forward, 2 * forward, norm, update)


def scaling(results: list[Result], read: Mapping[str, float]) -> None:
    """Add the speed-ups over one thread, over the reference and over plain decode, where these were measured.

    read: the read bandwidth by number of threads. It is the hardware's scaling of tests without a limit.
    """
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


def measure(
    path: str,
    config: Config,
    batch: Batch,
    rounds: int,
    ceilings: dict[int, Ceilings],
    *,
    memory_of: Callable[[int], dict[str, int]] | None,
    peers: Iterable[str] = (),
    reference: bool = False,
    progress: Callable[[int], None],
) -> list[Result]:
    """Train the model `path` with pygpt, the peers and the reference; return their results in this order.

    ceilings: by number of threads; pygpt runs with each of these numbers.
    """
    with ExitStack() as stack:
        models = [stack.enter_context(TrainableGPT2.load(path, threads=threads)) for threads in ceilings]
        others = [stack.enter_context(Peer(name, path, max(ceilings))) for name in peers]
        tests = [Test("pygpt", model.threads, partial(iterate, model)) for model in models]
        tests += [Test(peer.name, max(ceilings), partial(iterate_peer, peer)) for peer in others]
        for number in run_rounds(rounds, ceilings, progress):
            for test in tests:
                test.run(batch)
            if number < COMPARED:
                check_losses(tests)
        if memory_of:
            for test, peer in zip(tests[len(models) :], others, strict=True):
                test.memory = {"peak_rss_bytes": peer.peak_rss_bytes()}
    if memory_of:  # measure in fresh processes, after the models of this process are closed
        for test in tests[: len(models)]:
            test.memory = memory_of(test.threads)
    if reference:
        tests.append(reference_test(path, batch))
        check_losses([tests[0], tests[-1]])
    least = {threads: least_times(config, batch, ceiling) for threads, ceiling in ceilings.items()}
    return [test.result(batch, least[test.threads] if test.by == "pygpt" else None) for test in tests]


def reference_test(path: str, batch: Batch) -> Test:
    """Run one iteration of the serial reference, after touching the pages of its arrays."""
    with SerialTrainableGPT2.load(path) as model:
        for array in (model.gradients, model.first_moments, model.second_moments):
            array.fill(0)
        test = Test("reference", 1, partial(iterate, model), uncounted=0)
        test.run(batch)
    return test


COLUMNS = [  # head, field and format of each column
    ("by", "by", ""), ("threads", "threads", ""), *((f"{part} ms", f"{part}_ms", ".4g") for part in (*PARTS, "total")),
    ("middle half", "total_ms_middle_half", ".4g"), ("tokens/s", "tokens_per_s", ".4g"),
    ("% of limit: forward", "forward_percent_of_limit", ".0f"),
    *((part, f"{part}_percent_of_limit", ".0f") for part in PARTS[1:]), ("total", "percent_of_limit", ".0f"),
    ("x 1 thread", "speed_up", ".2f"), ("efficiency", "efficiency", ".2f"), ("x reference", "speed_up_over_reference", ".1f"),
    ("anon MB", "peak_anon_bytes", "MB"), ("peak MB", "peak_rss_bytes", "MB"),
]  # fmt: skip


def print_markdown(results: list[Result]) -> None:
    """Print the results as a Markdown table, with notes."""
    print_results(results, COLUMNS)
    first = results[0]
    print(f"\n{first['test']}: medians of {first['rounds']} iterations after one warm-up iteration.")
    if results[-1]["by"] == "reference":
        print("The reference ran one iteration only.")


def run_rounds(rounds: int, ceilings: dict[int, Ceilings], progress: Callable[[int], None]) -> Iterator[int]:
    """Yield the number of each round, after measuring the ceilings. Round 0 is a warm-up."""
    for number in range(rounds + 1):
        for ceiling in ceilings.values():
            ceiling.measure(1)
        yield number
        progress(number)


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
