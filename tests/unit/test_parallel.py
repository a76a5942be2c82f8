"""Several ranks: the tree's sum, and training with the same bits on any number of ranks, here threads that exchange copies."""

import hashlib
import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygpt import Config, DataLoader, InputError, NumericalError, PyGPTError, Ranks, TrainableGPT2, Trainer, TrainingOptions
from pygpt.training import parallel as step_module
from pygpt.training import trainer as trainer_module
from pygpt.training.parallel import SharedStep, middle, slices_of, subtrees, tree_sum
from pygpt.training.parameters import NORM_BLOCK

CONFIG = Config(maxT=16, V=900, L=2, NH=2, C=96)  # parameters in 6 norm blocks, the last one not full
TOKENS = np.random.default_rng(1).integers(0, CONFIG.V, 5000).astype(np.uint16)
DEADLINE_S = 60


class Threads(Ranks):
    """One of several ranks in threads of this process."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self.shared = rank, size, shared

    def gather(self, value: Any) -> list[Any]:
        self.shared["values"][self.rank] = value
        self.shared["barrier"].wait(DEADLINE_S)
        found = list(self.shared["values"])
        self.shared["barrier"].wait(DEADLINE_S)
        return found

    def begin(self, sends: Any, receives: Any) -> Any:
        for array, rank in sends:
            self.shared["queues"][self.rank, rank].put(array.copy())
        return list(receives)

    def finish(self, begun: Any) -> None:
        for array, rank in begun:
            array[:] = self.shared["queues"][rank, self.rank].get(timeout=DEADLINE_S)


def on_ranks(size: int, job: Callable[[Ranks], Any]) -> list[Any]:
    """Run a job on so many ranks; return the results, or raise the first exception."""
    pairs = {(a, b): queue.Queue[Any]() for a in range(size) for b in range(size)}
    shared = {"values": [None] * size, "barrier": threading.Barrier(size), "queues": pairs}
    with ThreadPoolExecutor(size) as pool:
        return [found.result() for found in [pool.submit(job, Threads(rank, size, shared)) for rank in range(size)]]


@given(st.integers(1, 70).flatmap(lambda parts: st.tuples(st.just(parts), st.integers(0, parts - 1), st.integers(1, parts))))
def test_subtrees_make_up_a_range_and_have_no_smaller_number(case: tuple[int, int, int]) -> None:
    parts, first, last = case
    first, last = min(first, last - 1), max(first + 1, last)
    found = subtrees(first, last, parts)
    assert [a for a, _ in found] + [last] == [first] + [b for _, b in found]
    every: set[tuple[int, int]] = set()

    def walk(a: int, b: int) -> None:
        every.add((a, b))
        if b - a > 1:
            assert a < middle(a, b) < b
            walk(a, middle(a, b))
            walk(middle(a, b), b)

    walk(0, parts)
    assert {*found} <= every
    assert not {(a, d) for (a, _), (_, d) in pairwise(found)} & every


@given(st.integers(0, 10**7), st.integers(1, 300))
def test_slices_are_whole_blocks_in_order(size: int, ranks: int) -> None:
    found = slices_of(size, ranks)
    assert (len(found), found[0].start, found[-1].stop) == (ranks, 0, size)
    assert all(a.stop == b.start and b.start % NORM_BLOCK == 0 for a, b in pairwise(found))
    assert max(s.stop - s.start for s in found) <= (-(-size // NORM_BLOCK) // ranks + 1) * NORM_BLOCK


def test_the_tree_of_five() -> None:
    values = np.random.default_rng(2).standard_normal((5, 7)).astype("f4")
    expected = ((values[0] + values[1]) + (values[2] + values[3])) + values[4]
    have = {(i, i + 1): values[i].copy() for i in range(5)}
    np.testing.assert_array_equal(tree_sum(have, 0, 5), expected)


def train(
    ranks: Ranks, parts: int, steps: int = 3, path: str = "", state: str = "", threads: int = 1, labels: Any = None
) -> Any:
    """Train; return a digest of the weights, the moments that this rank owns, losses, norms, the validation loss."""
    options = TrainingOptions(lr=1e-2, clip=0.5, weight_decay=0.1, decay_matrices_only=True, accumulate=2, parts=parts)
    loader = DataLoader(TOKENS, 1, 8, shuffle_seed=3, labels=labels)
    with TrainableGPT2.random(CONFIG, seed=1, threads=threads) as engine:
        trainer = Trainer(engine, loader, options, ranks)
        if state:
            trainer.restore(state)
        records = [trainer.step() for _ in range(steps)]
        if path:
            trainer.save(path)
        validation = trainer.evaluate(DataLoader(TOKENS[:400], 1, 8), 7)
        trainer.check_equal()
        own = slices_of(engine.parameters.size, ranks.size)[ranks.rank]
        other = np.ones(engine.parameters.size, bool)
        other[own] = False
        assert not engine.first_moments[other].any()
        assert not engine.second_moments[other].any()
        assert [len(record.ranks) for record in records] == [ranks.size] * steps
        moments = engine.first_moments[own].tobytes(), engine.second_moments[own].tobytes()
        rest = [(record.step, record.loss, record.norm) for record in records], validation, loader.state()
        return hashlib.sha256(engine.parameters.tobytes()).hexdigest(), moments, rest


def joined(found: list[Any]) -> Any:
    """Return the result of all ranks as that of one."""
    assert all((one[0], one[2]) == (found[0][0], found[0][2]) for one in found)
    return found[0][0], tuple(b"".join(one[1][i] for one in found) for i in range(2)), found[0][2]


@pytest.mark.parametrize("parts", [1, 2, 6, 12])
def test_any_number_of_ranks_has_the_same_bits(parts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(step_module, "PIECE", 30_000)  # several messages for each slice, the last one shorter
    monkeypatch.setattr(trainer_module, "CHECK_EVERY", 2)
    one = joined([train(Ranks(), parts, path=str(tmp_path / "1.state"))])
    expected = (tmp_path / "1.state").read_bytes()
    for size in [size for size in (2, 3, 4, 6, 12) if parts % size == 0]:
        path = str(tmp_path / f"{size}.state")
        assert joined(on_ranks(size, partial(train, parts=parts, path=path, threads=size % 2 + 1))) == one
        assert (tmp_path / f"{size}.state").read_bytes() == expected
    straight = joined([train(Ranks(), parts, steps=5)])
    for size in {1, 2, parts} & {size for size in range(1, 13) if parts % size == 0}:
        resumed = joined(on_ranks(size, partial(train, parts=parts, steps=2, state=str(tmp_path / "1.state"))))
        assert resumed[:2] == straight[:2]
        assert resumed[2][0] == straight[2][0][3:]


def test_targets_that_are_not_trained_on_have_the_same_bits_on_any_number_of_ranks() -> None:
    labels = np.where(np.random.default_rng(3).random(len(TOKENS)) < 0.6, -100, TOKENS.astype(np.int32))
    one = joined([train(Ranks(), 6, labels=labels)])
    assert one != joined([train(Ranks(), 6)])
    for size in (2, 3):
        assert joined(on_ranks(size, partial(train, parts=6, labels=labels))) == one


def test_one_part_is_the_mean_gradient_and_parts_change_only_rounding() -> None:
    found = [joined([train(Ranks(), parts, steps=1)])[2][0][0] for parts in (1, 2, 6)]
    assert len({loss for _, loss, _ in found}) == 3
    loader = DataLoader(TOKENS, 1, 8, shuffle_seed=3)
    with TrainableGPT2.random(CONFIG, seed=1, threads=1) as engine:
        for i in range(12):
            engine.forward(*loader.next_batch())
            engine.backward(accumulate=i > 0, scale=1 / 12)
        # The sum of twelve float32 gradients in another order: relative errors of about 12 * 2^-24.
        assert found[2][2] == pytest.approx(engine.gradient_norm(), rel=1e-6)


def test_an_interrupted_step_leaves_nothing_in_the_sum() -> None:
    with TrainableGPT2.random(CONFIG, seed=1, threads=1) as engine:
        step = SharedStep(engine, Ranks(), 3)
        for part in (0, 1, 0, 1, 2):  # interrupted after part 1, then all again
            engine.gradients[:] = 10**part
            step.add(part)
        step.reduce()
        assert np.array_equal(engine.gradients, np.full(engine.gradients.size, 111, np.float32))


def test_failures_are_raised_on_all_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def refused(ranks: Ranks, job: Callable[[], object], kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            job()

    def job(ranks: Ranks) -> None:
        with TrainableGPT2.random(CONFIG, seed=1, threads=1) as engine:
            loader = DataLoader(TOKENS, 1, 8)
            refused(ranks, lambda: Trainer(engine, loader, TrainingOptions(parts=3), ranks), InputError, "is 3: 2 ranks")
            trainer = Trainer(engine, loader, TrainingOptions(parts=2), ranks)
            trainer.step()
            refused(ranks, lambda: trainer.save(tmp_path / "no" / "x.state"), PyGPTError, "No such file")
            refused(
                ranks, lambda: ranks.together(lambda: TrainingOptions(parts=1 - ranks.rank)), InputError, "rank 1: parts is 0"
            )
            refused(ranks, lambda: ranks.check_equal({"x": 1, "y": ranks.rank}), InputError, "rank 1 has y 1, rank 0 has 0")
            if ranks.rank:
                engine.parameters[5] += 1
            refused(ranks, trainer.check_equal, PyGPTError, "the weights of rank 1 differ")
            place = loader.state()
            if ranks.rank:
                engine.parameters[:] = math.nan
            refused(ranks, trainer.step, NumericalError, "batch 3: this step")  # of rank 1's batch
            assert (loader.state(), trainer.done, engine.updates) == (place, 1, 1)

    on_ranks(2, job)


def test_skipped_batches_are_those_that_follow() -> None:
    shards = [np.arange(n).astype(np.uint16) for n in (50, 26, 33)]
    for seed in (None, 4):
        one = DataLoader(np.concatenate(shards), 1, 8, shuffle_seed=seed)
        places, batches = [], []
        for _ in range(40):
            places.append(one.state())
            batches.append(one.next_batch())
        for count in (0, 1, 12, 13, 14, 27, 39):
            one.reset()
            one.skip(count)
            assert one.state() == places[count]
            np.testing.assert_array_equal(one.next_batch(), batches[count])


def test_squares_and_updates_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    with TrainableGPT2.random(CONFIG, seed=1, threads=2) as whole, TrainableGPT2.random(CONFIG, seed=1, threads=3) as sliced:
        size = whole.gradients.size
        whole.gradients[:] = sliced.gradients[:] = rng.standard_normal(size)
        edges = [0, NORM_BLOCK, NORM_BLOCK, 3 * NORM_BLOCK, size]
        squares = [sliced.gradient_squares(a, b) for a, b in pairwise(edges)]
        np.testing.assert_array_equal(np.concatenate(squares), whole.gradient_squares(0, size))
        for a, b in ((1, NORM_BLOCK), (0, 5), (-NORM_BLOCK, 0), (0, size + NORM_BLOCK)):
            with pytest.raises(InputError, match="blocks of 65536"):
                whole.gradient_squares(a, b)
        whole.update(lr=0.1, step=1, weight_decay=0.3, decay_matrices_only=True)
        for a, b in pairwise(edges):
            sliced.update(lr=0.1, step=1, weight_decay=0.3, decay_matrices_only=True, own=slice(a, b))
        for name in ("parameters", "first_moments", "second_moments"):
            np.testing.assert_array_equal(getattr(sliced, name), getattr(whole, name))
        assert (whole.updates, sliced.updates) == (1, 4)


def test_the_serial_reference_has_parts_but_one_rank() -> None:
    from pygpt import SerialTrainableGPT2

    config = Config(maxT=8, V=31, L=1, NH=1, C=16)
    with SerialTrainableGPT2.random(config, seed=1) as engine, TrainableGPT2.random(config, seed=1, threads=1) as other:
        for one in (engine, other):
            Trainer(one, DataLoader(TOKENS % 31, 1, 8), TrainingOptions(parts=3, lr=1e-2)).step()
        # Adam divides by the gradient's size, so an error of 2^-20 of a gradient moves a weight by that part of lr.
        np.testing.assert_allclose(engine.parameters, other.parameters, atol=2e-5)
        ranks = Threads(0, 2, {})
        with pytest.raises(InputError, match="one rank"):
            SharedStep(engine, ranks, 2)
