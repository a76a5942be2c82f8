"""What every test shares, and how long slow tests take."""

import random
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest

from pygpt import cpus

T = TypeVar("T")
SECONDS = 120.0  # of all slow tests together
GRACE_S = 600.0  # beyond its share, after which a slow test is a hang


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of slow tests."""
    parser.addoption("--seconds", type=float, default=SECONDS, help="slow tests share so many seconds (default 120)")
    parser.addoption("--seed", type=int, default=1, help="of the random choices in slow tests (default 1)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let slow tests take their share of --seconds."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(config.getoption("--seconds") + GRACE_S))


class Budget:
    """How much a test tries: one round and a few cases in the default run; with `-m slow` every case, until its time is up."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.long, self.seconds, self.random = seconds > 0, seconds, random.Random(seed)

    def rounds(self) -> Iterator[int]:
        """Yield 0, 1, ... at least once, and until the time is up."""
        end, number = time.monotonic() + self.seconds, 0
        while number == 0 or time.monotonic() < end:
            yield number
            number += 1

    def some(self, cases: Sequence[T], few: int = 2) -> Sequence[T]:
        """All cases, or a few of them in their order."""
        if self.long or few >= len(cases):
            return cases
        return [cases[i] for i in sorted(self.random.sample(range(len(cases)), few))]


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.slow)])
def budget(request: pytest.FixtureRequest) -> Budget:
    """The time of a test that has a short and a long form. Slow tests share --seconds."""
    slow = sum(1 for item in request.session.items if item.get_closest_marker("slow"))
    seconds = request.config.getoption("--seconds") / slow if request.param == "long" else 0.0
    return Budget(seconds, request.config.getoption("--seed"))


@pytest.fixture(autouse=True, scope="session")
def _every_worker_works() -> Iterator[None]:
    """The shapes of tests are tiny, and a step that small would run on one worker. Here every step uses all workers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cpus, "workers_for", lambda threads, *_: threads)
    yield
    patch.undo()
