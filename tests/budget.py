"""How much a test tries."""

import random
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Budget:
    """The budget of a test. The default run does one round and a few cases. `-m slow` tries every case, until its time is
    up."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.long, self.seconds, self.random = seconds > 0, seconds, random.Random(seed)

    def rounds(self) -> Iterator[int]:
        """Yield 0, 1, ... at least once, and until the time is up."""
        end, number = time.monotonic() + self.seconds, 0
        while number == 0 or time.monotonic() < end:
            yield number
            number += 1
        if self.long:
            print(f"\n{number} rounds in {self.seconds:.0f} seconds")

    def some(self, cases: Sequence[T], few: int = 2) -> Sequence[T]:
        """Return all cases, or a few in their order."""
        if self.long or few >= len(cases):
            return cases
        return [cases[i] for i in sorted(self.random.sample(range(len(cases)), few))]
