"""A worker begins a phase of a step only after all workers have ended the phases that it depends on.

The trace of each worker says when it began and ended each phase. Two phases depend on each other if one writes an array that
the other reads or writes. The table below names these arrays, taken from the network's definition. All workers must wait for
each other between such phases. One worker is delayed on purpose. So a missing barrier shows, unless all workers end in the same
nanosecond. A correct step cannot fail, however busy the machine is."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from pygpt import GPT2, Config, Trace, TrainableGPT2
from pygpt._kernels import PHASES

Event = tuple[str, int, int, int, int]  # phase, layer, begin_ns, end_ns, left_ns

SHAPE = Config(maxT=80, V=301, L=3, NH=3, C=57)
MOST = 8  # workers
DELAY = 30.0  # the delayed worker takes so many times as long for its share

# The arrays that each phase reads and writes. Rows may be packed before a product. Gradients of weights are left out, because
# only one phase writes each; wte's gradient is the exception.
TABLE = {
    "encoder": ("", "proj residual"),
    "ln1": ("residual", "ln"),
    "qkv": ("ln packed", "qkv cache"),
    "attention": ("qkv cache", "atty"),
    "attproj": ("atty packed residual", "proj residual"),
    "ln2": ("residual", "ln"),
    "fc": ("ln packed", "fch"),
    "fcproj": ("fch packed residual", "proj residual"),
    "lnf": ("residual", "ln"),
    "logits": ("ln packed", "logits"),
    "loss": ("logits", "logits"),
    "pack": ("ln atty fch", "packed"),
    "dlogits": ("logits", "logits"),
    "dhead": ("logits ln", "dinp dresidual dwte"),
    "dlnf": ("dinp residual", "dresidual"),
    "dfcproj": ("dresidual fch", "dfch"),
    "dfc": ("dfch ln", "dinp"),
    "dln2": ("dinp residual", "dresidual"),
    "dattproj": ("dresidual atty", "dinp"),
    "dattention": ("dinp qkv cache", "dqkv"),
    "dqkv": ("dqkv ln", "dinp"),
    "dln1": ("dinp residual", "dresidual"),
    "dencoder": ("dresidual", "dwte"),
}
READS, WRITES = ({phase: set(sides[i].split()) for phase, sides in TABLE.items()} for i in range(2))
LAYER = ("ln1", "qkv", "attention", "attproj", "ln2", "fc", "fcproj")
BACK = ("dfcproj", "dfc", "dln2", "dattproj", "dattention", "dqkv", "dln1")
PRODUCTS = ("qkv", "attproj", "fc", "fcproj", "logits")


def forward(L: int, *end: str) -> list[str]:
    return ["encoder", *LAYER * L, "lnf", "logits", *end]


def backward(L: int) -> list[str]:
    return ["dlogits", "dhead", "dlnf", *BACK * L, "dencoder"]


def packed(phases: Sequence[str]) -> list[str]:
    return [name for phase in phases for name in (("pack", phase) if phase in PRODUCTS else (phase,))]


def check(logs: Sequence[Sequence[Event]], phases: Sequence[str], *, private: Sequence[str] = ()) -> None:
    """Raise AssertionError unless every worker ran these phases, and each phase began after all its dependencies had ended.
    private: arrays that each worker has separately."""
    for log in logs:
        assert [name for name, *_ in log] == list(phases)
    ended = [max(log[i][3] for log in logs) for i in range(len(phases))]
    begun = [min(log[i][2] for log in logs) for i in range(len(phases))]
    for (i, before), (j, after) in combinations(enumerate(phases), 2):
        shared = WRITES[before] & (READS[after] | WRITES[after]) | READS[before] & WRITES[after]
        if shared - set(private):
            assert ended[i] <= begun[j], f"phase {j}, {after}, began before all had ended phase {i}, {before}: {shared}"


def delayed(threads: int, worker: int) -> Trace:
    """Return a trace that delays one worker."""
    trace = Trace(threads, 1000)
    trace.stretch(worker, None, DELAY)
    return trace


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("threads", [2, 3, MOST])
@pytest.mark.parametrize(  # up to 4 rows, every worker normalises all; from 65 rows on, they are packed
    ("rows", "wanted"), [(1, 1), (4, 4), (5, 5), (64, 64), (65, 65), (80, 80), (80, 66), (80, 1), (80, 0), (4, 1), (4, 0)]
)
def test_inference(tmp_path_factory: pytest.TempPathFactory, rows: int, wanted: int, threads: int, forked: bool) -> None:
    """In the last layer, only the keys and values of rows without logits are needed."""
    path = tmp_path_factory.getbasetemp() / "phases.bin"
    if not path.exists():
        with TrainableGPT2.random(SHAPE, seed=1, threads=1) as network:
            network.save(path)
    cut = forward(SHAPE.L).index("attention", 2 + len(LAYER) * (SHAPE.L - 1))
    for_all, for_wanted = forward(SHAPE.L)[:cut], forward(SHAPE.L)[cut:] if wanted else []
    phases = (packed(for_all) if rows > 64 else for_all) + (packed(for_wanted) if wanted > 64 else for_wanted)
    with GPT2.load(path, threads=threads) as model:
        model.fork_join(forked)
        for worker in (0, threads - 1):
            trace = delayed(threads, worker)
            model.record(trace)
            caches = [model.new_cache() for _ in range(min(rows, 3))]
            model.step([(i, caches[i % len(caches)], i >= rows - wanted) for i in range(rows)])
            logs = [trace.events(ith) for ith in range(threads)]
            check(logs, phases, private=["ln"] if rows <= 4 else [])


@pytest.mark.parametrize("threads", [2, 3, MOST])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 4), (2, 9), (1, 65), (3, 40)])
def test_training(B: int, T: int, threads: int) -> None:
    losses = forward(SHAPE.L, "loss")
    inputs, targets = np.random.default_rng(1).integers(0, SHAPE.V, (2, B, T))
    with TrainableGPT2.random(SHAPE, seed=1, threads=threads) as model:
        for worker in (0, threads - 1):
            trace = delayed(threads, worker)
            model.record(trace)
            model.forward(inputs, targets)
            model.backward()
            logs = [trace.events(ith) for ith in range(threads)]
            check(logs, [*(packed(losses) if B * T > 64 else losses), *backward(SHAPE.L)])


def test_the_check_finds_a_phase_that_began_too_early() -> None:
    """Invented times: a worker is early by one nanosecond, in arrays that the others still write, or still read."""
    phases = ["encoder", "ln1", "qkv", "attention", "attproj"]
    one: list[Event] = [(phase, 0, 10 * i, 10 * i + 9, 10 * i + 10) for i, phase in enumerate(phases)]
    check([one, one], phases)
    for i in range(1, 5):
        early = [*one[:i], (phases[i], 0, 10 * i - 2, 10 * i + 9, 10 * i + 10), *one[i + 1 :]]
        with pytest.raises(AssertionError, match=f"{phases[i]},.*phase {i - 1}, {phases[i - 1]}:"):
            check([one, early], phases)
    late = [(name, layer, begin, 35 if name == "encoder" else end, left) for name, layer, begin, end, left in one]
    with pytest.raises(AssertionError, match=r"phase 1, ln1,.*phase 0, encoder"):
        check([late, one], phases)
    check([one[:2], [one[0], ("ln1", 0, 10, 50, 50)]], phases[:2])
    with pytest.raises(AssertionError):
        check([one, one[:4]], phases)


def test_the_table_names_every_phase_that_workers_share() -> None:
    assert set(TABLE) == set(PHASES) - {"norm", "update"}  # the pool runs these two as separate rounds
